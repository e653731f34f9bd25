"""Turns: the steps of a server's queries compute a few at a time, and who has had least computes next.

The steps between two messages of a query take milliseconds each. Without turns, the threads of all queries compute at
once, share the cores as the operating system likes, and a caller gets the more of them the more queries it runs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

MANY = 256  # callers of whom more is known than who computes or waits


class _Flow:
    """The account of one caller. finish: the virtual time at which its steps so far end."""

    def __init__(self) -> None:
        self.finish, self.inside = 0.0, 0


class _Step:
    """A step that waits for its turn. start: the virtual time at which it may start."""

    def __init__(self, start: float, number: int) -> None:
        self.start, self.number, self.ready = start, number, threading.Event()


class Turns:
    """Start-time fair queueing (Goyal, Vin and Cheng, 1996) of steps in ``slots`` slots.

    Every caller has a virtual time that grows by the seconds for which its steps held slots. A step starts at its
    caller's time, or at that of the step that was let in last if this is later; the waiting step that starts earliest
    is next. So callers who always have steps waiting get equal time, however many queries each of them runs; a single
    query, which has one step at a time, waits for one step of somebody else before each. Who comes anew, or
    comes back, goes before those who have had much, but has no claim to the time before. slots: the cores by default.

    A step must not wait for anybody while it holds a slot.
    """

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots or os.cpu_count() or 1
        self._lock = threading.Lock()
        self._free, self._now, self._count = self.slots, 0.0, 0
        self._flows: dict[Hashable, _Flow] = {}
        self._waiting: list[tuple[_Step, _Flow]] = []

    @contextmanager
    def query(self, who: Hashable) -> Iterator[Turn]:
        """Yield the turns of one query of a caller; the last of them ends with the context."""
        turn = Turn(self, who)
        try:
            yield turn
        finally:
            turn.end()

    def enter(self, who: Hashable) -> None:
        """Wait for a slot, and take it."""
        with self._lock:
            flow = self._flows.setdefault(who, _Flow())
            flow.inside += 1
            self._count += 1
            step = _Step(max(self._now, flow.finish), self._count)
            self._waiting.append((step, flow))
            self._admit()
        step.ready.wait()

    def leave(self, who: Hashable, seconds: float) -> None:
        """Give a slot back, after ``seconds`` of use."""
        with self._lock:
            flow = self._flows[who]
            flow.finish += seconds
            flow.inside -= 1
            self._free += 1
            self._admit()
            if self._free == self.slots:  # nobody has had to wait: all are equal again
                self._flows.clear()
            elif len(self._flows) > MANY:
                kept = {w: f for w, f in self._flows.items() if f.inside or f.finish > self._now}
                self._flows = kept  # who has no more than a newcomer has is one

    def _admit(self) -> None:
        while self._free and self._waiting:
            found = min(self._waiting, key=lambda each: (max(each[0].start, each[1].finish), each[0].number))
            self._waiting.remove(found)
            step, flow = found
            # the caller's other queries may have had turns since this step began to wait
            flow.finish = self._now = max(self._now, step.start, flow.finish)
            self._free -= 1
            step.ready.set()


class Turn:
    """The turns of one query: it computes between ``begin`` and ``end``."""

    def __init__(self, turns: Turns, who: Hashable) -> None:
        self._turns, self._who = turns, who
        self._since: float | None = None

    def begin(self) -> None:
        """Wait for a turn."""
        self._turns.enter(self._who)
        self._since = time.perf_counter()

    def end(self) -> None:
        """End the turn; harmless if there is none."""
        if self._since is not None:
            seconds, self._since = time.perf_counter() - self._since, None
            self._turns.leave(self._who, seconds)
