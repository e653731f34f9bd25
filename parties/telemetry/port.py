"""The HTTP port of a role's telemetry: ``/metrics`` for Prometheus, ``/healthz`` for probes. It takes nothing in."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from parties.net.endpoints import Endpoint, is_loopback, names_this_machine
from secure.errors import EndpointError

PLACES = 8  # connections at a time; one more takes the place of the oldest
SECONDS = 10.0  # that a connection may last
Page = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
"""An application of WSGI."""


def parse(text: str) -> Endpoint:
    """Parse ``host:port``, or a port alone, which is one of the loopback. Raises EndpointError."""
    return Endpoint.parse(f"127.0.0.1:{text}" if text.strip().isdigit() else text, what="--metrics")


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: a request here is no event."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int]) -> None:
        self._open: dict[socket.socket, float] = {}  # connections, and when they came, in order of time
        self._lock = threading.Lock()  # no connection is cut after it was closed, when its descriptor may be another's
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, without looking up this machine's name as the standard library does, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a place and a thread. Whoever leaves connections silent pushes out the oldest of them."""
        self._cut(most=PLACES - 1)
        with self._lock:
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, however it ended, and also if it got no thread; its place is free."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that last too long; called several times a second."""
        self._cut(before=time.monotonic() - SECONDS)

    def server_close(self) -> None:
        super().server_close()
        self._cut(most=0)

    def _cut(self, *, most: int = PLACES, before: float = 0.0) -> None:
        """End the oldest connections beyond so many, and those that came before a moment."""
        with self._lock:
            while self._open and (len(self._open) > most or next(iter(self._open.values())) < before):
                request = next(iter(self._open))
                del self._open[request]
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: whoever asked is gone."""


class TelemetryPort:
    """A listening HTTP port. address: where, with its real port.

    at: port 0 chooses any free one. ports: so many processes listen at ports in a row from that of ``at``; this one
    takes the first that is free. pages: by path. Raises EndpointError.

    A port of the loopback answers nobody who asks for another machine's name: a web page whose name leads here by now.
    """

    def __init__(self, at: Endpoint, pages: dict[str, Page], *, ports: int = 1) -> None:
        addresses = at.resolved()
        self.stays = is_loopback(addresses[:1])
        self._server = _bound(at, addresses[0], ports if at.port else 1)

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            said = environ.get("HTTP_HOST")  # every browser says one; probes of HTTP/1.0 do not
            misled = self.stays and said is not None and not names_this_machine(said, at.host)
            return (_misled if misled else pages.get(environ.get("PATH_INFO", ""), _nothing))(environ, start)

        self._server.set_app(answer)
        self.address = str(Endpoint(at.host, self._server.server_port))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="unseen-telemetry", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> TelemetryPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bound(at: Endpoint, address: str, ports: int) -> _Server:
    for port in range(at.port, at.port + ports):
        with suppress(OSError, OverflowError):
            return _Server((address, port))
    row = f" nor one of the {ports - 1} ports after it" if ports > 1 else ""
    raise EndpointError(
        f"--metrics: the address {at} cannot be used{row}; it may be in use",
        "choose another port, or 0 for any free one",
    )


def _misled(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    return page("421 Misdirected Request", "this port is at an address or a name of this machine\n")(environ, start)


def _nothing(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    return page("404 Not Found", "there are /metrics and /healthz\n")(environ, start)


def page(status: str, text: str) -> Page:
    """Return a page of plain text."""

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode()]

    return answer
