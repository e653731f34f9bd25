"""Explain errors of gRPC calls on both ends: use ``calling`` around a call, and ``answering`` around its handler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import grpc

from parties.net.endpoints import Endpoint
from parties.proto import unseen_pb2 as pb
from secure.errors import (
    Busy,
    ChangedOnTheWay,
    Error,
    GoingAway,
    NotDealt,
    OtherVersion,
    PeerLost,
    QuotaError,
    TlsError,
    TokenError,
    from_code,
    printable,
)


class FailedCall(grpc.RpcError, grpc.Call):
    """A call that was not made, for ``reason``, in the shape of one that failed; whoever reads its answers gets it."""

    def __init__(self, reason: Error) -> None:
        super().__init__(str(reason))
        self.reason = reason

    def code(self) -> grpc.StatusCode:
        lost = isinstance(self.reason, PeerLost)
        return grpc.StatusCode.UNAVAILABLE if lost else grpc.StatusCode.UNAUTHENTICATED

    def details(self) -> str:
        return str(self.reason)

    def result(self, timeout: float | None = None) -> NoReturn:
        raise self

    def __iter__(self) -> FailedCall:
        return self

    def __next__(self) -> NoReturn:
        raise self

    def cancel(self) -> bool:
        return False

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> float:
        return 0.0

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False

    def initial_metadata(self) -> tuple[()]:
        return ()

    def trailing_metadata(self) -> tuple[()]:
        return ()


_NOT_ALLOWED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)  # by the guard of a service


CODE = "unseen-code"  # the key under which a refusal says which error it is
AFTER = "unseen-after"  # and after how many seconds asking again may help
_NAMED = tuple(kind.code for kind in (QuotaError, TokenError, Busy, GoingAway, ChangedOnTheWay, OtherVersion, NotDealt))
_FULL = "Concurrent RPC limit exceeded"  # what gRPC says where all threads of a service are taken


def failure(error: Error, *, goes_on: bool = False) -> pb.Failure:
    """Return the message that tells the other side of a stream of an error. goes_on: the stream goes on behind it."""
    after = error.after if isinstance(error, Busy) else 0.0
    return pb.Failure(code=error.code, message=str(error), after=after, goes_on=goes_on)


def failed(message: pb.Failure, who: str = "") -> Error:
    """Return the Error in a peer's Failure. who: what reports it, for the text."""
    reports = f"{who} reports: " if who else ""
    return from_code(message.code, f"{reports}{printable(message.message)}", message.after)


def refuse(context: grpc.ServicerContext, status: grpc.StatusCode, error: Error) -> NoReturn:
    """End a call with an Error that the caller gets as the same kind, if it is one of a few."""
    after = ((AFTER, f"{error.after:.3f}"),) if isinstance(error, Busy) else ()
    context.set_trailing_metadata(((CODE, error.code), *after))
    context.abort(status, str(error))


@contextmanager
def calling(who: str, where: Endpoint, hint: str, *, doing: str = "", kind: type[Error] = PeerLost) -> Iterator[None]:
    """Turn a gRPC error into a ``kind`` that says who failed at what, with the peer's own hint, or else ``hint``."""
    try:
        yield
    except grpc.RpcError as error:
        during = f" ({doing})" if doing else ""
        if not isinstance(error, grpc.Call):
            raise kind(f"{who} at {where} failed{during}: {type(error).__name__}", hint) from None
        if isinstance(error, FailedCall) and not isinstance(error.reason, PeerLost):
            raise error.reason from None
        if (named := named_refusal(error, f"{who} at {where} refused{during}", hint)) is not None:
            raise named from None
        if error.code() == grpc.StatusCode.UNAVAILABLE and "Socket closed" in (error.details() or ""):
            closed = f"{who} at {where} closed the connection{during}"
            raise kind(closed, f"if it uses TLS, give --tls DIRECTORY (network=secure.Tls(...)); else {hint}") from None
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            raise kind(f"{who} at {where} cannot be reached{during}", hint) from None
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise kind(f"{who} at {where} did not answer in time{during}", hint) from None
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            stranger = "check the addresses and ports; or it has another version of unseen"
            raise kind(f"what answers at {where} is not {who}{during}", stranger) from None
        raise refusal(error, f"{who} at {where} refused{during}", hint, kind) from None


def refusal(error: grpc.Call, said: str, hint: str, kind: type[Error] = PeerLost) -> Error:
    """Return the Error for a call that the peer refused: ``said`` and its reason, with its own hint, or else ``hint``.

    It is of the kind that the peer names, if that is one of a few; TlsError if the guard refused; else ``kind``.
    """
    if (named := named_refusal(error, said, hint)) is not None:
        return named
    message, _, theirs = printable(error.details() or "").partition("\nhint: ")
    found = TlsError if error.code() in _NOT_ALLOWED else kind
    return found(f"{said}: {message}", theirs or hint)


def named_refusal(error: grpc.Call, said: str, hint: str) -> Error | None:
    """Return the Error of the kind that the peer names, if that is one of a few, or that gRPC names for it."""
    message, _, theirs = printable(error.details() or "").partition("\nhint: ")
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and message.startswith(_FULL):
        return Busy(f"{said}: all its threads are taken", "try again later")
    told = dict(error.trailing_metadata() or ())
    if (code := told.get(CODE)) not in _NAMED:
        return None
    return from_code(str(code), str(Error(f"{said}: {message}", theirs or hint)), _seconds(told.get(AFTER)))


def _seconds(text: str | bytes | None) -> float:
    """Return the number in a few characters of a peer; 0 if they are none."""
    try:
        return float(text or 0) if len(text or "") <= 16 else 0.0
    except ValueError:
        return 0.0


@contextmanager
def answering(context: grpc.ServicerContext, log: logging.Logger) -> Iterator[None]:
    """Send an Error as the call's status; log any other exception, with a traceback only at level DEBUG."""
    try:
        yield
    except (Busy, GoingAway) as error:
        refuse(context, grpc.StatusCode.UNAVAILABLE, error)
    except Error as error:
        refuse(context, grpc.StatusCode.FAILED_PRECONDITION, error)
    except Exception as error:
        unexpected(error, log)
        context.abort(grpc.StatusCode.INTERNAL, "internal error\nhint: see its log")


def unexpected(error: Exception, log: logging.Logger) -> None:
    """Log an exception that should not happen."""
    text = str(error).splitlines() or [""]
    log.error("internal error: %s: %s", type(error).__name__, text[0], exc_info=log.isEnabledFor(logging.DEBUG))
