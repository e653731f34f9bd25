"""Places: a service's bounded tables, in which nobody who is at work is pushed out by those who come later."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from secure.errors import Busy


class Place:
    """One place that is taken. It is at work until ``rest`` says that it is idle; ``gone``: it was given to another."""

    def __init__(self, number: int, caller: str, leave: Callable[[], object]) -> None:
        self.number, self.caller, self.leave = number, caller, leave
        self.gone = False
        self._idle: tuple[float, float] | None = None

    def work(self) -> None:
        """Say that it is in use from now on: it cannot be taken away."""
        self._idle = None

    def rest(self, grace: float) -> None:
        """Say that it is idle from now on. grace: seconds after which it may be taken away."""
        self._idle = (time.monotonic(), grace)

    def idle(self) -> float | None:
        """Return for how many seconds it has been idle beyond its grace; None if it cannot be taken away."""
        idle = self._idle
        beyond = None if idle is None else time.monotonic() - sum(idle)
        return beyond if beyond is not None and beyond >= 0 else None


class Places:
    """A table of at most ``limit`` places, of which a caller that has a name gets at most ``per_caller``.

    If the table or a caller's part of it is full, the place that has been idle the longest beyond its grace is taken
    away (of that caller, if it is the part that is full); if there is none, the newcomer is refused. Callers without a
    name (there are no certificates) are one caller, and ``limit`` alone bounds them.

    who: the service, and what: its places ("sessions"), for messages.
    """

    def __init__(self, who: str, what: str, limit: int, per_caller: int) -> None:
        self.who, self.what, self.limit, self.per_caller = who, what, limit, per_caller
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._places: dict[int, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def take(self, caller: str, leave: Callable[[], object]) -> Place:
        """Take a place. leave: called, by the thread of somebody else, if it is taken away. Raises Busy."""
        with self._lock:
            place, left = Place(next(self._numbers), caller, leave), list[Place]()
            mine = [p for p in self._places.values() if p.caller == caller]
            if caller and len(mine) >= self.per_caller:
                left.append(self._longest(mine, f"{self.per_caller} {self.what} of this caller"))
            elif len(self._places) >= self.limit:
                left.append(self._longest(list(self._places.values()), f"{self.limit} {self.what}"))
            self._remove(left)
            self._places[place.number] = place
        self._leave(left)
        return place

    def give_back(self, place: Place) -> None:
        """Give a place back; harmless if it was taken away or given back before."""
        with self._lock:
            self._places.pop(place.number, None)

    def sweep(self) -> None:
        """Take away every place that has been idle beyond its grace."""
        with self._lock:
            left = [place for place in self._places.values() if place.idle() is not None]
            self._remove(left)
        self._leave(left)

    def _longest(self, places: list[Place], full: str) -> Place:
        idle = [(beyond, place) for place in places if (beyond := place.idle()) is not None]
        if not idle:
            raise Busy(f"{self.who} has {full}, which is its limit", "try again later")
        return max(idle, key=lambda found: found[0])[1]

    def _remove(self, places: list[Place]) -> None:
        for place in places:
            place.gone = True
            del self._places[place.number]

    @staticmethod
    def _leave(places: list[Place]) -> None:
        for place in places:
            place.leave()
