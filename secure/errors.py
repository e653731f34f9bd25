"""One family of errors. Whoever catches ``secure.Error`` catches everything that unseen raises on purpose.

Those about what was given (a model, an input, an option) are ``ValueError`` too; a model or a package that is not there
is also the ``FileNotFoundError`` or ``ImportError`` that Python programs expect.
"""

from __future__ import annotations

from collections.abc import Iterator

from protocols.errors import DoesNotFit, Error, FixedPointError

__all__ = [
    "DealerError",
    "Diverged",
    "DoesNotFit",
    "DoesNotPack",
    "DownloadError",
    "EmptyInput",
    "EndpointError",
    "Error",
    "FixedPointError",
    "HandshakeError",
    "InputTooLong",
    "InvalidInput",
    "InvalidProgram",
    "MissingPackage",
    "ModelNotFound",
    "PartiesDisagree",
    "PeerLost",
    "ProtocolError",
    "QueryError",
    "RangeLost",
    "ShareError",
    "UnsupportedOperation",
    "from_code",
    "printable",
]


# what was given


class InvalidInput(Error, ValueError):
    """An argument, an option, a file or a model's input cannot be used as it is."""

    code = "input"


class InputTooLong(InvalidInput):
    """A text has more tokens than the length it is to be padded to."""


class EmptyInput(InvalidInput):
    """A text has no tokens of its own."""


class ModelNotFound(Error, FileNotFoundError):
    """There is no model, or no tokenizer, where one was named."""

    code = "model"


class MissingPackage(Error, ImportError):
    """A package that this needs is not installed."""

    code = "package"


# compiling


class UnsupportedOperation(Error, ValueError):
    """A model does something that has no private protocol; the message names the module and the operation."""

    code = "unsupported"


class DoesNotPack(DoesNotFit):
    """A shape has no place in the slots of a ciphertext."""

    code = "does-not-pack"


class InvalidProgram(Error, ValueError):
    """An encoded Program does not hold together."""

    code = "program"


# training


class Diverged(Error, ValueError):
    """A loss is not finite; the last checkpoint is kept."""

    code = "diverged"


class RangeLost(Error, ValueError):
    """Training could not hold a range."""

    code = "range-lost"


# between parties


class EndpointError(Error):
    """An address that cannot be used, or may not be used without saying so."""

    code = "endpoint"


class HandshakeError(Error):
    """The two sides do not agree on version, deployment, Program, fixed point or weights."""

    code = "handshake"


class DealerError(Error):
    """The dealer refused, or cannot be reached."""

    code = "dealer"


class QueryError(Error):
    """A query that cannot be run as asked: not prepared, its number already burnt, or the session closed."""

    code = "query"


class ProtocolError(Error):
    """The peer sent something that the Program does not prescribe."""

    code = "protocol"


class PeerLost(Error):
    """The peer is gone, or did not answer within the deadline."""

    code = "peer-lost"


class DownloadError(Error):
    """A once-per-model file did not arrive as announced."""

    code = "download"


class PartiesDisagree(Error):
    """Two parties hold different copies of what both should hold."""

    code = "disagree"


class ShareError(Error):
    """A share of a model is damaged, or not what the Program prescribes."""

    code = "share"


def printable(text: str) -> str:
    """What a peer wrote, safe for a terminal or a log."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:2000])


def kinds(base: type[Error] = Error) -> Iterator[type[Error]]:
    """Every kind of error that has a code of its own."""
    for kind in base.__subclasses__():
        if "code" in kind.__dict__:
            yield kind
        yield from kinds(kind)


def from_code(code: str, message: str) -> Error:
    """The exception that a peer's Failure message stands for; an unknown code gives ``Error`` itself."""
    return next((kind for kind in kinds() if kind.code == code), Error)(message)
