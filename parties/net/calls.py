"""Explain errors of gRPC calls on both ends: use ``calling`` around a call, and ``answering`` around its handler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import grpc

from parties.net.endpoints import Endpoint
from secure.errors import Error, PeerLost, QuotaError, TlsError, TokenError, from_code, printable


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
_NAMED = (QuotaError.code, TokenError.code)


def refuse(context: grpc.ServicerContext, status: grpc.StatusCode, error: Error) -> NoReturn:
    """End a call with an Error that the caller gets as the same kind, if it is one of a few."""
    context.set_trailing_metadata(((CODE, error.code),))
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
        if error.code() == grpc.StatusCode.UNAVAILABLE and "Socket closed" in (error.details() or ""):
            closed = f"{who} at {where} closed the connection{during}"
            raise kind(closed, f"if it uses TLS, give --tls DIRECTORY (network=secure.Tls(...)); else {hint}") from None
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            raise kind(f"{who} at {where} cannot be reached{during}", hint) from None
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise kind(f"{who} at {where} did not answer in time{during}", hint) from None
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise kind(f"what answers at {where} is not {who}{during}", "check the addresses and ports") from None
        raise refusal(error, f"{who} at {where} refused{during}", hint, kind) from None


def refusal(error: grpc.Call, said: str, hint: str, kind: type[Error] = PeerLost) -> Error:
    """Return the Error for a call that the peer refused: ``said`` and its reason, with its own hint, or else ``hint``.

    It is of the kind that the peer names, if that is one of a few; TlsError if the guard refused; else ``kind``.
    """
    message, _, theirs = printable(error.details() or "").partition("\nhint: ")
    if (code := dict(error.trailing_metadata() or ()).get(CODE)) in _NAMED:
        return from_code(str(code), str(Error(f"{said}: {message}", theirs or hint)))
    found = TlsError if error.code() in _NOT_ALLOWED else kind
    return found(f"{said}: {message}", theirs or hint)


@contextmanager
def answering(context: grpc.ServicerContext, log: logging.Logger) -> Iterator[None]:
    """Send an Error as the call's status; log any other exception, with a traceback only at level DEBUG."""
    try:
        yield
    except Error as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except Exception as error:
        unexpected(error, log)
        context.abort(grpc.StatusCode.INTERNAL, "internal error\nhint: see its log")


def unexpected(error: Exception, log: logging.Logger) -> None:
    """Log an exception that should not happen."""
    text = str(error).splitlines() or [""]
    log.error("internal error: %s: %s", type(error).__name__, text[0], exc_info=log.isEnabledFor(logging.DEBUG))
