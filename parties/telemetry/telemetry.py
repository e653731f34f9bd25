"""The telemetry of one role: its events, and what listens to them as its options say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from parties.net.endpoints import Endpoint
from parties.telemetry import port
from parties.telemetry.events import Events, Readings
from secure.errors import InvalidInput, MissingPackage

STARTING, SERVING, DRAINING = "starting", "serving", "draining"


class Telemetry:
    """The telemetry of one role, from before it starts until it has ended.

    metrics: where Prometheus reads its numbers, as ``host:port`` or a port of the loopback; None: nowhere. ports: so
    many processes of the role take ports in a row. otlp: the URL to which spans of queries are sent; None: to none.
    Raises EndpointError, InvalidInput, MissingPackage.
    """

    def __init__(
        self, deployment: str, role: str, *, metrics: str | None = None, ports: int = 1, otlp: str | None = None
    ) -> None:
        self.events = Events()
        self.state: Callable[[], str] = lambda: STARTING
        self._metrics: Any = None
        self._spans: Any = None
        self._port: port.TelemetryPort | None = None
        self._row = 0  # ports that processes of the role take, from the first
        if metrics is not None:
            self._listen(port.parse(metrics), deployment, role, ports)
        if otlp is not None:
            self._export(otlp, deployment, role)

    def _listen(self, at: Endpoint, deployment: str, role: str, ports: int) -> None:
        _require_prometheus()
        from prometheus_client import make_wsgi_app

        from parties.telemetry.metrics import RoleMetrics

        self._row = ports if at.port else 0
        self._metrics = RoleMetrics(deployment, role)
        self.events.tell(self._metrics)
        shown: Any = make_wsgi_app(self._metrics.registry)
        self._port = port.TelemetryPort(at, {"/metrics": shown, "/healthz": self._healthz}, ports=ports)

    def _export(self, otlp: str, deployment: str, role: str) -> None:
        require_otlp(otlp)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        from parties.telemetry.spans import Spans

        self._spans = Spans(deployment, role, OTLPSpanExporter(otlp))
        self.events.tell(self._spans)

    def _healthz(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        state = self.state()
        status = "200 OK" if state == SERVING else "503 Service Unavailable"
        return port.page(status, f"{state}\n")(environ, start)

    def begin(self, readings: Readings, state: Callable[[], str]) -> None:
        """Say that the role serves from now on. readings: its numbers. state: SERVING, or DRAINING."""
        self.state = state
        if self._metrics is not None:
            self._metrics.read(readings)

    @property
    def about(self) -> tuple[str, ...]:
        """Lines for a person."""
        if self._port is None:
            return ()
        reach = "" if self._port.stays else " (whoever reaches this address reads them)"
        row = f", and at the ports after it: {self._row} in all" if self._row > 1 else ""
        return (f"numbers for Prometheus: http://{self._port.address}/metrics{reach}{row}",)

    def close(self) -> None:
        """Tell nobody anything more."""
        if self._port is not None:
            self._port.close()
        if self._spans is not None:
            self._spans.close()
        self._port = self._spans = None


def check_telemetry(metrics: str | None, otlp: str | None) -> None:
    """Raise what ``Telemetry`` raises for an address of no use or a package that is not there, before it listens."""
    if metrics is not None:
        port.parse(metrics).resolved()
        _require_prometheus()
    if otlp is not None:
        require_otlp(otlp)


def require_otlp(url: str) -> str:
    """Return the host and port of a URL to which spans can be sent.

    Raises InvalidInput for what is no URL of HTTP, and for one with a user's name or password, which everybody could
    read in the list of processes; MissingPackage if spans cannot be exported. No message shows the URL.
    """
    wrong = InvalidInput("--otlp: this is no URL of HTTP", "such as http://127.0.0.1:4318/v1/traces")
    try:
        found = urlsplit(url)
        sound = found.scheme in ("http", "https") and found.hostname and found.port != 0
    except ValueError:  # of the address or the port
        raise wrong from None
    if not sound:
        raise wrong
    if found.username is not None:
        raise InvalidInput(
            "--otlp: the URL has a user's name or password, which the list of processes shows to everybody",
            "give them in OTEL_EXPORTER_OTLP_HEADERS, such as Authorization=Basic%20...",
        )
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401  (is it there?)
    except ImportError:
        raise MissingPackage("OpenTelemetry's SDK is not installed", "pip install 'unseen[otlp]'") from None
    return found.netloc


def _require_prometheus() -> None:
    if find_spec("prometheus_client") is None:
        raise MissingPackage("prometheus_client is not installed", "pip install 'unseen[metrics]'")
