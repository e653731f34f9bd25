"""Spans of OpenTelemetry, made of the phases of queries and their time lines, and exported by its SDK.

All parties of a query derive the trace's id from the query's name, so their spans are in one trace, each on its own
clock. Names of modules, times, sizes and counts are all that a span holds.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanContext, TraceFlags

from parties.telemetry.events import Listener, PhaseEnded
from secure.cost.timeline import Timeline
from secure.version import __version__

QUEUED = 1 << 14  # spans that wait for the exporter; more are dropped
MODULES = 8  # that a span names
LAST = 2.0  # seconds that the last spans may take to be exported


class Spans(Listener):
    """The spans of one role, handed to ``exporter`` by a thread of their own; it is closed with them."""

    def __init__(self, deployment: str, role: str, exporter: SpanExporter) -> None:
        about = {"unseen.deployment": deployment, "unseen.role": role}
        self._resource = Resource({"service.name": f"unseen {role}", "service.version": __version__, **about})
        self._waiting: Any = BatchSpanProcessor(exporter, max_queue_size=QUEUED)

    def ended(self, phase: PhaseEnded) -> None:
        for span in spans_of(phase, self._resource, time.time(), time.perf_counter()):
            self._waiting.on_end(span)

    def close(self) -> None:
        """Export what waits, and end: spans that come later are dropped, and so are those that take more than LAST."""
        closing = threading.Thread(target=self._waiting.shutdown, name="unseen-spans", daemon=True)
        closing.start()
        closing.join(LAST)


def spans_of(phase: PhaseEnded, resource: Resource, now: float, clock: float) -> Iterator[ReadableSpan]:
    """Yield a span of a phase, and where it has a time line, below it one for each round and each module's computing.

    now, clock: seconds since 1970, and of the time line's clock, at one moment after the end of the phase.
    """
    trace = _trace_id(phase.query)
    line, zero = phase.timeline, now - clock
    start, stop = (now - phase.seconds, now) if line is None else (zero + line.start, zero + line.stop)
    whole = _context(trace)
    own: About = {"rounds": phase.rounds, "sent": phase.sent, "received": phase.received, "queries": phase.count}
    own |= {"query": phase.query} if phase.query else {}
    yield _span(phase.phase, whole, None, resource, own, start, stop)
    for name, about, begun, ended in _parts(line, phase.paths) if line is not None else ():
        yield _span(name, _context(trace), whole, resource, about, zero + begun, zero + ended)


About = dict[str, str | int | float]
Part = tuple[str, About, float, float]
"""A name, what is said of it, and when it begins and ends."""


def _parts(line: Timeline, paths: tuple[str, ...]) -> Iterator[Part]:
    """Yield the rounds of a time line, and neighbours of one module as one piece of computing."""
    for number, r in enumerate(line.rounds, 1):
        modules = list(dict.fromkeys(paths[part.index] for part in r.parts))
        said = ", ".join(modules[:MODULES]) + (", ..." if len(modules) > MODULES else "")
        waited = r.received_at - r.sent_at
        about: About = {
            "round": number,
            "sent": r.sent,
            "received": r.received,
            "waited_seconds": waited,
            "modules": said,
        }
        yield "round", about, r.start, r.stop
    for path, works in groupby(line.work, lambda work: paths[work.index]):
        pieces = list(works)
        about = {"module": path, "instructions": len(pieces), "busy_seconds": sum(work.seconds for work in pieces)}
        yield "compute", about, pieces[0].start, pieces[-1].start + pieces[-1].seconds


def _trace_id(query: str) -> int:
    """Return the id of a query's trace; a fresh one for what belongs to no query yet."""
    drawn = hashlib.sha256(f"trace/{query}".encode()).digest() if query else secrets.token_bytes(32)
    return int.from_bytes(drawn[:16], "big") or 1


def _context(trace: int) -> SpanContext:
    return SpanContext(trace, secrets.randbits(64) or 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _span(
    name: str,
    context: SpanContext,
    parent: SpanContext | None,
    resource: Resource,
    about: About,
    start: float,
    stop: float,
) -> ReadableSpan:
    shown = {f"unseen.{key}": value for key, value in about.items()}
    begins, ends = int(start * 1e9), int(stop * 1e9)
    return ReadableSpan(name, context, parent, resource, shown, start_time=begins, end_time=ends)
