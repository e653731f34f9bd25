"""The HTTP service of a proxy, in a thread of its own, at addresses that stay on this machine unless it is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from parties.net.endpoints import Endpoint, is_loopback
from parties.services.hosting import IN_USE, STOPPING
from parties.services.signals import Signals
from secure.errors import EndpointError

STARTING = 30.0  # seconds
ENDING = 5.0  # seconds that requests get to end
BACKLOG = 256
MOST_CONNECTIONS = 320
FIRST = 10.0  # seconds within which a connection brings its first request


def check_stays(at: Endpoint, *, beyond_loopback: bool) -> tuple[str, ...]:
    """Return the addresses of an endpoint. Raises EndpointError if one of them can be reached from other machines."""
    addresses = at.resolved()
    if not beyond_loopback and not is_loopback(addresses):
        raise EndpointError(
            f"the proxy: {at} can be reached from other machines, and texts and answers would cross unencrypted",
            "listen on 127.0.0.1, or give --unencrypted-beyond-loopback where nobody else can read the network",
        )
    return addresses


def _first_in_time() -> type[Any]:
    """uvicorn's HTTP over h11, which closes a connection that brings no request within FIRST seconds."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class FirstInTime(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(FIRST, self._close_unasked)

        def _close_unasked(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return FirstInTime


class HttpService:
    """A running HTTP service of an application, as a context manager. address: host:port, with its real port."""

    def __init__(self, app: Any, at: Endpoint, *, beyond_loopback: bool = False) -> None:
        import uvicorn  # which few users of this package have

        self._sockets = _bound(at, check_stays(at, beyond_loopback=beyond_loopback))
        self.address = str(Endpoint(at.host, self._sockets[0].getsockname()[1]))
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            loop="asyncio",
            http=_first_in_time(),
            limit_concurrency=MOST_CONNECTIONS,
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=round(ENDING),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=(self._sockets,), name="proxy-http", daemon=True)
        self._thread.start()
        until = time.monotonic() + STARTING
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise EndpointError(f"the proxy: the address {at} cannot be used", IN_USE)
            time.sleep(0.01)

    def wait_announced(self, announce: Callable[[], None]) -> None:
        """Serve until the process is interrupted or terminated; call ``announce`` once that would end it cleanly."""
        stopped = Signals(*STOPPING)
        announce()
        stopped.next()

    def close(self) -> None:
        """Take no more requests, and stop when those that there are have ended, after ENDING seconds at the latest."""
        self._server.should_exit = True
        self._thread.join(ENDING + 1)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join()

    def __enter__(self) -> HttpService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bound(at: Endpoint, addresses: tuple[str, ...]) -> list[socket.socket]:
    """Listen at all addresses of an endpoint, on one port. An address of a family that is not there is left out."""
    made, port = list[socket.socket](), at.port
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listening = socket.create_server((address, port), family=family, backlog=BACKLOG)
        except OSError:
            continue
        made.append(listening)
        port = listening.getsockname()[1]
    if not made:
        raise EndpointError(f"the proxy: the address {at} cannot be used; it may be in use", IN_USE)
    return made
