"""What can go wrong between parties. Messages quote the value, and end with a ``hint:`` where one helps."""

from __future__ import annotations


class PartyError(Exception):
    """Base of everything that a user can meet here; ``code`` travels to the other side, messages never hold secrets."""

    code = "error"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)


class EndpointError(PartyError):
    """An address that cannot be used, or may not be used without saying so."""

    code = "endpoint"


class HandshakeError(PartyError):
    """The two sides do not agree on version, deployment, Program, fixed point or weights."""

    code = "handshake"


class DealerError(PartyError):
    """The dealer refused, or cannot be reached."""

    code = "dealer"


class QueryError(PartyError):
    """A query that cannot be run as asked: not prepared, or its number already burnt."""

    code = "query"


class ProtocolError(PartyError):
    """The peer sent something that the Program does not prescribe."""

    code = "protocol"


class PeerLost(PartyError):
    """The peer is gone, or did not answer within the deadline."""

    code = "peer-lost"


class DownloadError(PartyError):
    """A once-per-model file did not arrive as announced."""

    code = "download"


def printable(text: str) -> str:
    """What a peer wrote, safe for a terminal or a log."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:2000])


def from_code(code: str, message: str) -> PartyError:
    """The exception that a Failure message stands for."""
    for kind in PartyError.__subclasses__():
        if kind.code == code:
            return kind(message)
    return PartyError(message)
