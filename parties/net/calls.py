"""Explain errors of gRPC calls on both ends: use ``calling`` around a call, and ``answering`` around its handler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from parties.net.endpoints import Endpoint
from secure.errors import Error, PeerLost, printable


@contextmanager
def calling(who: str, where: Endpoint, hint: str, *, doing: str = "", kind: type[Error] = PeerLost) -> Iterator[None]:
    """Turn a gRPC error into a ``kind`` that says who failed at what, with the peer's own hint, or else ``hint``."""
    try:
        yield
    except grpc.RpcError as error:
        during = f" ({doing})" if doing else ""
        if not isinstance(error, grpc.Call):
            raise kind(f"{who} at {where} failed{during}: {type(error).__name__}", hint) from None
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            raise kind(f"{who} at {where} cannot be reached{during}", hint) from None
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise kind(f"{who} at {where} did not answer in time{during}", hint) from None
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise kind(f"what answers at {where} is not {who}{during}", "check the addresses and ports") from None
        message, _, theirs = printable(error.details() or "").partition("\nhint: ")
        raise kind(f"{who} at {where} refused{during}: {message}", theirs or hint) from None


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
