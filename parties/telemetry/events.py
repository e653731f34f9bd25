"""Events at a role: what its handlers tell in one place, whoever listens.

An event holds numbers, codes of errors and public names: of methods, Programs, modules. Shares, seeds, keys, inputs and
names of callers are in none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from secure.cost.timeline import Timeline

log = logging.getLogger("unseen.telemetry")


@dataclass(frozen=True)
class PhaseEnded:
    """A phase of one query that has ended well at a role.

    phase: OFFLINE or ONLINE of ``secure.cost.traffic``. seconds: its time here. query: the query's ``query_id``; "" for
    one that is dealt before anybody asks. rounds: messages that waited for one another. sent, received: bytes of
    payload that left this role, and came to it. count: the queries that were prepared together. timeline, paths: where
    one is kept, the moments of all steps, and the module of each instruction.
    """

    phase: str
    seconds: float
    query: str = ""
    rounds: int = 0
    sent: int = 0
    received: int = 0
    count: int = 1
    timeline: Timeline | None = field(default=None, repr=False)
    paths: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Reading:
    """A number that a role can tell at any time. name, help: as Prometheus shows them."""

    name: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


Readings = Callable[[], Iterable[Reading]]


def taken_of(what: str, taken: int, total: int) -> Iterator[Reading]:
    """Yield how many seats or places are taken, and of how many. what: sits there."""
    labels = {"what": what}
    yield Reading("unseen_seats", "Sessions, queries or models that fit at a time.", total, labels)
    yield Reading("unseen_seats_taken", "Those that it has.", taken, labels)


class Listener:
    """A listener to events, which hears of each in the thread in which it happens. By default it ignores them."""

    def ended(self, phase: PhaseEnded) -> None:
        """Hear of a phase that has ended."""

    def refused(self, code: str) -> None:
        """Hear that something was refused, or failed. code: that of the error."""

    def called(self, method: str, code: str, seconds: float) -> None:
        """Hear of a call that has ended. method: "Service/Method". code: "ok", "gone", or that of an error."""

    def moved(self, method: str, sent: int, received: int) -> None:
        """Hear of bytes of messages, as they are encoded, that a call has sent or received."""


class Events(Listener):
    """The events of one role. A listener that fails is reported, and fails nothing else."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = list(listeners)

    def __bool__(self) -> bool:
        """Tell whether anybody listens."""
        return bool(self._listeners)

    def tell(self, listener: Listener) -> None:
        """Tell a listener of all events from now on."""
        self._listeners.append(listener)

    def ended(self, phase: PhaseEnded) -> None:
        self._each(lambda listener: listener.ended(phase))

    def refused(self, code: str) -> None:
        self._each(lambda listener: listener.refused(code))

    def called(self, method: str, code: str, seconds: float) -> None:
        self._each(lambda listener: listener.called(method, code, seconds))

    def moved(self, method: str, sent: int, received: int) -> None:
        self._each(lambda listener: listener.moved(method, sent, received))

    def _each(self, hear: Callable[[Listener], Any]) -> None:
        for listener in self._listeners:
            try:
                hear(listener)
            except Exception as error:
                log.error(
                    "an event was not counted: %s", type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG)
                )
