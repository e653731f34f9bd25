"""The health of a service, as standard probes of gRPC ask for it (grpc.health.v1).

It tells whether the service takes clients, and nothing else. Its messages carry no sums (``parties.net.summed``), as
probes know of none: bytes that change on the way cost a probe its answer, and nobody a wrong one. On a network with
identities a prober needs a certificate like everybody else, of any role: the handshake refuses those who have none,
before the guard. A probe without identity asks ``/healthz`` on the port of the telemetry instead.

``Watch`` is not implemented, as the standard allows: each watcher would keep one of the service's few threads for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from parties.net.caller import Permissions
from parties.net.summed import WITHOUT_SUMS

SERVICE, METHOD = "grpc.health.v1.Health", "Check"
(CHECK,) = WITHOUT_SUMS


class HealthService:
    """The answer of one service. roles: those that may ask. methods: what it serves. serving: whether it does now."""

    def __init__(self, roles: Iterable[str], methods: Iterable[str], serving: Callable[[], bool]) -> None:
        self.permissions: Permissions = {CHECK: frozenset(roles)}
        self._names = {"", *(method.strip("/").partition("/")[0] for method in methods)}
        self._serving = serving

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Answer a probe; one for a service that is not here gets NOT_FOUND, as the standard says."""
        if request.service not in self._names:
            context.abort(grpc.StatusCode.NOT_FOUND, "this service is not served here")
        reply = health_pb2.HealthCheckResponse
        return reply(status=reply.SERVING if self._serving() else reply.NOT_SERVING)

    def add(self, server: grpc.Server) -> None:
        """Add it to a server."""
        check = grpc.unary_unary_rpc_method_handler(
            self.Check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {METHOD: check})])
