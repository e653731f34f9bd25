"""An interceptor before the guard: it sees how every call ends, what is refused, and the bytes of all messages.

So refusals are counted in one place, whether the guard, the meter, a handler or a stream's last message says them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from parties.net.calls import CODE
from parties.telemetry.events import Events

OK, GONE, INTERNAL = "ok", "gone", "internal"
OTHER = "other"
"""The name of all methods whose names callers chose: no peer makes new ones here."""


class Counting(grpc.ServerInterceptor):
    """An interceptor that tells ``events`` of all calls. The guard behind it makes every request a stream.

    methods: the full names of those that are served; calls of any other are told under the name OTHER.
    """

    def __init__(self, events: Events, methods: Container[str]) -> None:
        self._events, self._methods = events, methods

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(details)
        name = short(details.method) if details.method in self._methods else OTHER
        return None if handler is None else self._counted(handler, name)

    def _counted(self, handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
        events = self._events
        inner: Any = handler.stream_stream or handler.stream_unary
        read: Any = handler.request_deserializer
        write: Any = handler.response_serializer

        def received(data: bytes) -> Any:
            events.moved(method, 0, len(data))
            return read(data)

        def sent(message: Any) -> bytes:
            data: bytes = write(message)
            events.moved(method, len(data), 0)
            return data

        def single(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with self._call(method, context):
                return inner(requests, context)

        def streamed(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._call(method, context) as failed:
                for message in inner(requests, context):
                    if code := failure_in(message):
                        failed(code, goes_on=message.failure.goes_on)
                    yield message

        form: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return form(  # type: ignore[no-any-return]
            streamed if handler.response_streaming else single,
            request_deserializer=received,
            response_serializer=sent,
        )

    @contextmanager
    def _call(self, method: str, context: grpc.ServicerContext) -> Iterator[Callable[..., None]]:
        """Time a call, and tell how it ends; yields a function that is told of failures in its messages."""
        began, code = time.monotonic(), OK

        def failed(said: str, *, goes_on: bool) -> None:
            nonlocal code
            self._events.refused(said)
            code = code if goes_on else said

        try:
            yield failed
        except GeneratorExit:  # whoever called does not read on
            code = code if code != OK else GONE
            raise
        except Exception:
            code = GONE if not context.is_active() and context.code() is None else _refusal(context)  # type: ignore[attr-defined]
            if code != GONE:
                self._events.refused(code)
            raise
        finally:
            self._events.called(method, code, time.monotonic() - began)


def short(method: str) -> str:
    """Return "Service/Method" of a full name, such as "/unseen.v3.Dealer/Open"."""
    service, _, name = method.strip("/").partition("/")
    return f"{service.rpartition('.')[2]}/{name}"


def failure_in(message: Any) -> str:
    """Return the code of the failure that a message of a stream says; "" if it says none."""
    described = getattr(message, "DESCRIPTOR", None)  # none: a message that its handler has encoded
    if described is None or "failure" not in described.fields_by_name or not message.HasField("failure"):
        return ""
    return str(message.failure.code) or INTERNAL


def _refusal(context: grpc.ServicerContext) -> str:
    """Return the code with which a handler has ended its call."""
    given: Any = context
    told = dict(given.trailing_metadata() or ())
    if CODE in told:
        return str(told[CODE])
    status = given.code()
    return INTERNAL if status is None else str(status.name).lower().replace("_", "-")
