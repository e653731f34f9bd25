"""The meter of a service: it names callers by their tokens, and counts their calls, sessions and bytes.

It stands behind the guard, which has noted who calls. It meters those methods that only clients may call: servers and
parties call one another as often as clients' queries make them, and have no tokens.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import grpc

from parties.limits.quotas import BYTES, QUERIES, Quotas
from parties.limits.tokens import Tokens
from parties.net.caller import Caller, Permissions, caller, note
from parties.net.calls import refuse
from secure.errors import Error, TokenError

log = logging.getLogger("unseen.meter")

CLIENT = "client"
FLUSHED = 16 << 20  # bytes of a call that are counted together
COUNTED: Mapping[str, str | None] = {
    "/unseen.v3.Inference/Session": None,  # it counts its queries and preparations itself
    "/unseen.v3.Party/Ask": QUERIES,
    "/unseen.v3.Ckks/Query": QUERIES,
    "/unseen.v3.Ckks/Upload": None,
}
"""The methods that are sessions while they last, and what each call of them is besides."""


class Meter(grpc.ServerInterceptor):
    """An interceptor of all calls to a service.

    quotas: None: nothing is counted. tokens: clients must show one; None: they need none.
    """

    def __init__(self, quotas: Quotas | None, tokens: Tokens | None, permissions: Permissions) -> None:
        self._quotas, self._tokens = quotas, tokens
        self._methods = frozenset(method for method, roles in permissions.items() if roles == {CLIENT})

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(details)
        if handler is None or details.method not in self._methods:
            return handler
        return self._metered(handler, details.method)

    def _metered(self, handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
        inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        made: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]

        def received(request: Any, count: Callable[[Any], Any]) -> Any:
            return map(count, request) if handler.request_streaming else count(request)

        def single(request: Any, context: grpc.ServicerContext) -> Any:
            with self._call(method, context) as count:
                return count(inner(received(request, count), context))

        def streamed(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._call(method, context) as count, closing(inner(received(request, count), context)) as replies:
                yield from map(count, replies)

        return made(  # type: ignore[no-any-return]
            streamed if handler.response_streaming else single,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @contextmanager
    def _call(self, method: str, context: grpc.ServicerContext) -> Iterator[Callable[[Any], Any]]:
        """Admit a call and count it; yields a function that counts the bytes of a message and returns it."""
        with ExitStack() as stack:
            try:
                who = self._admitted(method, context, stack)
            except Error as error:
                log.warning("refused %s of %s: %s", method, caller(context), str(error).splitlines()[0])
                wrong = isinstance(error, TokenError)
                refuse(context, grpc.StatusCode.UNAUTHENTICATED if wrong else grpc.StatusCode.RESOURCE_EXHAUSTED, error)
            if self._quotas is None:
                yield lambda message: message
                return
            tally = _Tally(self._quotas, who)
            try:
                yield tally.count
            finally:
                tally.flush()

    def _admitted(self, method: str, context: grpc.ServicerContext, stack: ExitStack) -> Caller:
        who = caller(context)
        if self._tokens is not None:
            who = self._tokens.named(who, context)
            note(context, who)
        if self._quotas is None:
            return who
        self._quotas.require(who)
        if method in COUNTED:
            stack.enter_context(self._quotas.session(who))
            if what := COUNTED[method]:
                self._quotas.spend(who, what)
        return who


class _Tally:
    """The bytes of one call, counted some megabytes at a time."""

    def __init__(self, quotas: Quotas, who: Caller) -> None:
        self._quotas, self._who, self._bytes = quotas, who, 0

    def count(self, message: Any) -> Any:
        """Count a message and return it."""
        self._bytes += message.ByteSize()
        if self._bytes >= FLUSHED:
            self.flush()
        return message

    def flush(self) -> None:
        """Write down what was counted. A failure is logged: what crossed has crossed."""
        counted, self._bytes = self._bytes, 0
        try:
            self._quotas.spend(self._who, BYTES, counted)
        except sqlite3.Error as error:
            log.error("%d bytes of %s were not counted: %s", counted, self._who, error)
