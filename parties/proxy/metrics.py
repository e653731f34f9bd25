"""Numbers for Prometheus: of requests, queries and bytes, never of what is in them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parties.proxy.page import History
from parties.telemetry.logs import tagged
from secure.session.link import Report

log = logging.getLogger("unseen.proxy")

SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


@dataclass
class HttpOutcome:
    """The HTTP status of a request; 499 until it has one, for callers who leave."""

    status: int = 499


class Metrics:
    """The numbers of one proxy. history: those of its page."""

    def __init__(self) -> None:
        self.history = History()
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("unseen_proxy_requests", "Requests.", ["endpoint", "status"], **own)
        self._seconds = Histogram(
            "unseen_proxy_request_seconds", "Seconds of requests.", ["endpoint"], buckets=SECONDS, **own
        )
        self._running = Gauge("unseen_proxy_requests_running", "Requests that are being answered.", **own)
        self._queries = Counter("unseen_proxy_queries", "Queries that ran to their end.", ["tokens"], **own)
        self._rounds = Counter("unseen_proxy_rounds", "Rounds of queries.", **own)
        self._bytes = Counter("unseen_proxy_bytes", "Payload bytes of queries.", ["phase", "sender", "receiver"], **own)
        self._online = Counter("unseen_proxy_online_seconds", "Seconds from queries to their answers.", **own)
        self._offline = Counter("unseen_proxy_offline_seconds", "Seconds in which queries were prepared.", **own)
        self.waiting = Gauge("unseen_proxy_inputs_waiting", "Inputs that wait for a session.", **own)
        self.ready = Gauge("unseen_proxy_queries_ready", "Queries that are prepared and not yet used.", **own)
        self.sessions = Gauge("unseen_proxy_sessions", "Sessions that are open, or are opened when asked.", **own)

    @contextmanager
    def request(self, endpoint: str) -> Iterator[HttpOutcome]:
        """Count a request; its status is that of the outcome at the end."""
        began, outcome = time.monotonic(), HttpOutcome()
        self._running.inc()
        try:
            yield outcome
        finally:
            self._running.dec()
            self._requests.labels(endpoint, str(outcome.status)).inc()
            self._seconds.labels(endpoint).observe(time.monotonic() - began)

    def query(self, report: Report) -> None:
        """Count a query, and log its name, which the services' logs have too."""
        log.debug("a query answered in %.2f s", report.online_seconds, extra=tagged(query=report.id))
        self.history.add(report)
        self._queries.labels(str(report.length)).inc()
        self._rounds.inc(report.rounds)
        self._online.inc(report.online_seconds)
        self._offline.inc(report.offline_seconds)
        for each in report.traffic:
            self._bytes.labels(each.phase, each.sender, each.receiver).inc(each.bytes)

    def text(self) -> bytes:
        """Return the numbers as Prometheus reads them."""
        return generate_latest(self.registry)
