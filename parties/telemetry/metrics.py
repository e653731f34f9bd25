"""Numbers of a role for Prometheus: of queries, calls, times and bytes, never of what is in them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from parties.telemetry.counting import GONE, INTERNAL, OK, OTHER
from parties.telemetry.events import Listener, PhaseEnded, Reading, Readings
from secure.cost.traffic import OFFLINE, ONLINE
from secure.errors import Error, kinds
from secure.version import WIRE_VERSION, __version__

log = logging.getLogger("unseen.telemetry")

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class RoleMetrics(Listener):
    """The numbers of one role. deployment, role: their names, which every number has as labels of ``unseen_info``."""

    def __init__(self, deployment: str, role: str) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._queries = Counter("unseen_queries", "Phases of queries that ended well.", ["phase"], **own)
        self._seconds = Histogram(
            "unseen_phase_seconds", "Seconds of phases of queries, at this role.", ["phase"], buckets=SECONDS, **own
        )
        self._rounds = Counter("unseen_rounds", "Rounds of queries.", ["phase"], **own)
        self._payload = Counter("unseen_payload_bytes", "Payload bytes of queries.", ["phase", "direction"], **own)
        self._refused = Counter("unseen_refusals", "Refusals and failures, by the error's code.", ["reason"], **own)
        self._calls = Counter("unseen_calls", "Calls that have ended.", ["method", "code"], **own)
        self._call_seconds = Counter("unseen_call_seconds", "Seconds of calls that have ended.", ["method"], **own)
        self._moved = Counter("unseen_message_bytes", "Bytes of messages of calls.", ["method", "direction"], **own)
        self._codes = frozenset({Error.code, *(kind.code for kind in kinds())})
        self._begin()
        ProcessCollector(**own)
        about = {"version": __version__, "wire": str(WIRE_VERSION), "deployment": deployment, "role": role}
        self.registry.register(_Now(lambda: [Reading("unseen_info", "What runs here.", 1, about)]))

    def _begin(self) -> None:
        """Tell zeros: Prometheus sees no increase in a number that is not there before its first event."""
        for phase in (OFFLINE, ONLINE):
            for each in (self._queries, self._seconds, self._rounds):
                each.labels(phase)
            for direction in ("sent", "received"):
                self._payload.labels(phase, direction)
        for code in (*self._codes, INTERNAL):
            self._refused.labels(code)

    def read(self, readings: Readings) -> None:
        """Ask for ``readings`` whenever the numbers are read."""
        self.registry.register(_Now(readings))

    def ended(self, phase: PhaseEnded) -> None:
        self._queries.labels(phase.phase).inc(phase.count)
        for _ in range(phase.count):
            self._seconds.labels(phase.phase).observe(phase.seconds / phase.count)
        self._rounds.labels(phase.phase).inc(phase.rounds)
        self._payload.labels(phase.phase, "sent").inc(phase.sent)
        self._payload.labels(phase.phase, "received").inc(phase.received)

    def refused(self, code: str) -> None:
        self._refused.labels(self._known(code)).inc()

    def called(self, method: str, code: str, seconds: float) -> None:
        self._calls.labels(method, code if code in (OK, GONE) else self._known(code)).inc()
        self._call_seconds.labels(method).inc(seconds)

    def moved(self, method: str, sent: int, received: int) -> None:
        if sent:
            self._moved.labels(method, "sent").inc(sent)
        if received:
            self._moved.labels(method, "received").inc(received)

    def _known(self, code: str) -> str:
        """Return a code of our own errors as it is: labels are few, and no peer chooses them."""
        return code if code in self._codes or code in STATUSES else OTHER


STATUSES = frozenset(
    {INTERNAL, "invalid-argument", "unimplemented", "cancelled", "unavailable", "unknown", "resource-exhausted"}
)
"""Codes of refusals that are no Error of ours: gRPC's status."""


class _Now(Collector):
    """A collector of numbers that are read when somebody asks."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()  # so that nothing is read when this is registered

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families = dict[str, GaugeMetricFamily]()
        try:
            for each in self._readings():
                _family(families, each.name, each.help, each.labels).add_metric(list(each.labels.values()), each.value)
        except Exception as error:  # a store that is being closed; the other numbers are told all the same
            log.warning("a number cannot be read: %s", str(error).replace("\n", "; "))
        return list(families.values())


def _family(
    families: dict[str, GaugeMetricFamily], name: str, help: str, labels: Mapping[str, str]
) -> GaugeMetricFamily:
    if name not in families:
        families[name] = GaugeMetricFamily(name, help, labels=list(labels))
    return families[name]
