"""The guard of a service: it refuses a call before the handler reads anything, unless the caller's role may make it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc

from parties.limits.waiting import WaitingRoom
from parties.net.caller import Permissions, address, note
from parties.net.calls import refuse
from parties.net.network import Network
from parties.net.summed import MethodSums, all_sound, sums_of
from parties.net.versions import of_other_package
from parties.net.watchdog import Watchdog
from parties.services.draining import Draining
from secure.errors import ChangedOnTheWay, Error, OtherVersion, TlsError

log = logging.getLogger("unseen.guard")

COMING = 12  # single requests that may come at a time
SINGLE = 30.0  # seconds within which one comes; it has SERVICE_LIMIT bytes at most

Admit = Callable[[grpc.ServicerContext], AbstractContextManager[None]]


class Guard(grpc.ServerInterceptor):
    """An interceptor of all calls to a service.

    network: it reads the caller from the connection, and refuses a certificate that is revoked, expired or has no role.
    permissions: the roles that may call each method; a method that is not listed may be called by none. On a network
    without identities everybody may call everything. draining: counts calls, and refuses those of new clients while the
    service is being stopped.
    """

    def __init__(self, network: Network, permissions: Permissions, draining: Draining | None = None) -> None:
        self._network, self._permissions, self._draining = network, permissions, draining
        self._coming = WaitingRoom(COMING)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(details)
        if handler is None:
            return _refusing(details.method)
        sums = sums_of(details.method)
        return _guarded(handler, lambda context: self._admit(details.method, context), self._coming, sums)

    def _admit(self, method: str, context: grpc.ServicerContext) -> AbstractContextManager[None]:
        """Refuse a call, or return the context in which it runs."""
        try:
            who = self._network.caller(context)
        except Error as error:
            log.warning("refused a call of %s: %s", address(context), str(error).splitlines()[0])
            refuse(context, grpc.StatusCode.UNAUTHENTICATED, error)
        allowed = self._permissions.get(method, frozenset())
        if who.role is not None and who.role not in allowed:
            may = f"only {', '.join(sorted(allowed))} may" if allowed else "nobody may"
            log.warning("refused %s of %s: %s", method, who, may)
            said = f"a {who.role} may not call {method}; {may}"
            foreign = TlsError(said, "use the certificate of the role that you run")
            refuse(context, grpc.StatusCode.PERMISSION_DENIED, foreign)
        note(context, who)
        return self._draining.call(method, context) if self._draining is not None else nullcontext()


def _refusing(method: str) -> grpc.RpcMethodHandler[Any, Any] | None:
    """Return a handler that tells a caller of another version so; None if the method is none of unseen's."""
    if (error := of_other_package(method)) is None:
        return None
    log.warning("refused a call: %s", str(error).splitlines()[0])

    def refused(_: Iterator[Any], context: grpc.ServicerContext) -> Any:
        refuse(context, grpc.StatusCode.FAILED_PRECONDITION, error)

    return grpc.stream_stream_rpc_method_handler(refused)


def _guarded(
    handler: grpc.RpcMethodHandler[Any, Any], admit: Admit, coming: WaitingRoom, sums: MethodSums
) -> grpc.RpcMethodHandler[Any, Any]:
    """Return the handler behind ``admit``.

    gRPC reads a single request before it calls its handler, and would wait for it for ever. So every method is served
    as one that takes a stream, whose messages are read when they are asked for: after ``admit``. A single request is
    read in ``coming``, within SINGLE seconds. A message that the handler has encoded itself is sent as it is.
    """
    form = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    method: Any = (
        (handler.stream_stream if handler.response_streaming else handler.stream_unary)
        if handler.request_streaming
        else (handler.unary_stream if handler.response_streaming else handler.unary_unary)
    )

    def read(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        requests = all_sound(requests, f"the caller {address(context)}")
        if handler.request_streaming:
            return requests
        watch = Watchdog(SINGLE, context.cancel)
        try:
            with coming.place(context), watch.guard():
                for request in requests:
                    return request
        except ChangedOnTheWay as error:
            refuse(context, grpc.StatusCode.DATA_LOSS, error)
        except OtherVersion as error:
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, error)
        finally:
            watch.stop()
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")

    def single(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        with admit(context):
            return method(read(requests, context), context)

    def streamed(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with admit(context):
            yield from method(read(requests, context), context)

    made: Any = form
    read_by: Any = handler.request_deserializer
    written_by: Any = handler.response_serializer
    return made(  # type: ignore[no-any-return]
        streamed if handler.response_streaming else single,
        request_deserializer=sums.deserializer(read_by),
        response_serializer=sums.serializer(written_by),
    )
