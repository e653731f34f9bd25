"""The one family of errors. Whoever catches ``secure.Error`` catches everything that unseen raises on purpose.

Errors about what the caller gave (a model, an input, an option) are also ``ValueError``. A missing model is also a
``FileNotFoundError``, and a missing package an ``ImportError``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from protocols.errors import ClientDeviates, DoesNotFit, Error, FixedPointError

__all__ = [
    "Busy",
    "ChangedOnTheWay",
    "ClientDeviates",
    "CompiledError",
    "DealerError",
    "Diverged",
    "DoesNotFit",
    "DoesNotPack",
    "DownloadError",
    "EmptyInput",
    "EndpointError",
    "Error",
    "FixedPointError",
    "GoingAway",
    "HandshakeError",
    "InputTooLong",
    "InvalidInput",
    "InvalidProgram",
    "MissingPackage",
    "ModelNotFound",
    "NotDealt",
    "OtherVersion",
    "OutOfRange",
    "PartiesDisagree",
    "PeerLost",
    "ProtocolError",
    "QueryError",
    "QuotaError",
    "RangeLost",
    "ReceiptError",
    "ShareError",
    "StoreError",
    "TlsError",
    "TokenError",
    "UnsupportedOperation",
    "about",
    "from_code",
    "printable",
]


# what the caller gave


class InvalidInput(Error, ValueError):
    """An argument, an option, a file or a model's input cannot be used as it is."""

    code = "input"


class InputTooLong(InvalidInput):
    """A text has more tokens than the length to which texts are padded."""


class EmptyInput(InvalidInput):
    """A text has no tokens of its own."""


class ModelNotFound(Error, FileNotFoundError):
    """There is no model, or no tokenizer, where one was named."""

    code = "model"


class MissingPackage(Error, ImportError):
    """A package that the call needs is not installed."""

    code = "package"


# compiling


class UnsupportedOperation(Error, ValueError):
    """A model contains an operation that has no private protocol. The message names the module and the operation."""

    code = "unsupported"


class DoesNotPack(DoesNotFit):
    """A shape cannot be laid out in the slots of a ciphertext."""

    code = "does-not-pack"


class InvalidProgram(Error, ValueError):
    """An encoded Program is malformed or inconsistent."""

    code = "program"


# training


class Diverged(Error, ValueError):
    """The training loss is not finite. The last checkpoint is kept."""

    code = "diverged"


class RangeLost(Error, ValueError):
    """Training could not keep the arguments of a polynomial within their range."""

    code = "range-lost"


class OutOfRange(Error, ValueError):
    """A value of a query left the range for which the model was compiled, so that its answer would be wrong."""

    code = "out-of-range"


# between parties


class EndpointError(Error):
    """An address is unusable, or must not be used without an explicit option."""

    code = "endpoint"


class TlsError(Error):
    """A peer's certificate, or our own, does not prove what it should; nothing was sent to the peer."""

    code = "tls"


class HandshakeError(Error):
    """The two sides do not agree on version, deployment, Program, fixed point or weights."""

    code = "handshake"


class OtherVersion(HandshakeError):
    """The two sides speak different versions of the messages; the hint says which of them is to be updated."""

    code = "version"


class DealerError(Error):
    """The dealer refused, or cannot be reached."""

    code = "dealer"


class QuotaError(Error):
    """A caller has used up what the owner of a service lets it use."""

    code = "quota"


class TokenError(Error):
    """A caller has no token, or none that is valid."""

    code = "token"


class Busy(Error):
    """A service has no room for what was asked at this moment, and has done nothing for it.

    after: seconds after which asking again may help, LEAST_AFTER to MOST_AFTER, whatever the service says.
    """

    code = "busy"

    def __init__(self, message: str, hint: str | None = None, *, after: float = 1.0) -> None:
        super().__init__(message, hint)
        self.after = MOST_AFTER if math.isnan(after) else min(max(after, LEAST_AFTER), MOST_AFTER)


LEAST_AFTER, MOST_AFTER = 0.1, 60.0  # seconds


class QueryError(Error):
    """A query cannot run: it is not prepared, its number was used before, or the session is closed."""

    code = "query"


class NotDealt(QueryError):
    """Whoever dealt a query keeps no half of it: it was taken before, was never dealt, or is lost."""

    code = "not-dealt"


class ProtocolError(Error):
    """The peer sent something that the Program does not prescribe."""

    code = "protocol"


class PeerLost(Error):
    """The peer is gone, or did not answer within the deadline."""

    code = "peer-lost"


class ChangedOnTheWay(PeerLost):
    """A message came with other bytes than were sent. It was not used, and nothing goes on behind it."""

    code = "changed"


class GoingAway(PeerLost):
    """A service is being stopped and takes no more work. Another one may answer at its address, or will soon."""

    code = "going-away"


class DownloadError(Error):
    """A once-per-model file did not arrive as announced."""

    code = "download"


class PartiesDisagree(Error):
    """Two parties hold different copies of data that should be equal."""

    code = "disagree"


class CompiledError(Error):
    """A directory of a compiled model is damaged, mixed up, or of another version."""

    code = "compiled"


class StoreError(Error):
    """An entry of a store is damaged or not what was put there, or the store cannot be read or written."""

    code = "store"


class ShareError(Error):
    """A share of a model is damaged, or differs from what the Program prescribes."""

    code = "share"


class ReceiptError(Error):
    """A receipt differs from what its Programs prescribe; the message says where first."""

    code = "receipt"


def program_of_version(theirs: object, ours: int) -> InvalidProgram:
    """Return the error for a Program of another version than this one reads. theirs: as it says."""
    newer = isinstance(theirs, int) and theirs > ours
    hint = (
        "update unseen on this side" if newer else "whoever made it is to update unseen, and to compile the model anew"
    )
    return InvalidProgram(f"the Program has version {theirs!r:.40}, this is {ours}\nhint: {hint}")


def printable(text: str) -> str:
    """Make a peer's text safe for a terminal or a log: at most 2,000 characters, unprintable ones replaced by "?"."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:2000])


def kinds(base: type[Error] = Error) -> Iterator[type[Error]]:
    """Yield every class of error that has a code of its own."""
    for kind in base.__subclasses__():
        if "code" in kind.__dict__:
            yield kind
        yield from kinds(kind)


def about(which: str, error: Error) -> Error:
    """Return the same error with a message that says which of several things it is about."""
    message = f"{which}: {error}"
    return Busy(message, after=error.after) if isinstance(error, Busy) else type(error)(message)


def from_code(code: str, message: str, after: float = 0.0) -> Error:
    """Return the exception for the code of a peer's Failure message; an unknown code gives ``Error`` itself.

    after: what the peer says of when to ask again. Only Busy has it, within its bounds.
    """
    kind = next((kind for kind in kinds() if kind.code == code), Error)
    return Busy(message, after=after) if kind is Busy else kind(message)
