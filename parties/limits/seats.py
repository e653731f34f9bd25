"""Seats: a service's bounded tables, in which only those who are idle give way to those who come later."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

from parties.telemetry.events import Reading, taken_of
from secure.errors import Busy

AFTER = 5.0  # seconds after which a seat may be free again


class Seat:
    """A seat that is taken. It is at work until ``rest`` says that it is idle; ``gone``: it was given to another."""

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


class Seats:
    """A table of at most ``limit`` seats, of which a caller that has a name gets at most ``per_caller``.

    If the table or a caller's part of it is full, the seat that has been idle the longest beyond its grace is taken
    away (of that caller, if it is the part that is full); if there is none, the newcomer is refused. Callers without a
    name (there are no certificates) are one caller, and ``limit`` alone bounds them.

    who: the service, and what: its seats ("sessions"), for messages.
    """

    def __init__(self, who: str, what: str, limit: int, per_caller: int) -> None:
        self.who, self.what, self.limit, self.per_caller = who, what, limit, per_caller
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._seats: dict[int, Seat] = {}

    def __len__(self) -> int:
        return len(self._seats)

    def readings(self) -> Iterator[Reading]:
        """Return how many seats are taken, and of how many."""
        return taken_of(self.what, len(self), self.limit)

    def take(self, caller: str, leave: Callable[[], object]) -> Seat:
        """Take a seat. leave: called, by the thread of somebody else, if it is taken away. Raises Busy."""
        with self._lock:
            seat, left = Seat(next(self._numbers), caller, leave), list[Seat]()
            mine = [p for p in self._seats.values() if p.caller == caller]
            if caller and len(mine) >= self.per_caller:
                left.append(self._longest(mine, f"{self.per_caller} {self.what} of this caller"))
            elif len(self._seats) >= self.limit:
                left.append(self._longest(list(self._seats.values()), f"{self.limit} {self.what}"))
            self._remove(left)
            self._seats[seat.number] = seat
        self._leave(left)
        return seat

    def give_back(self, seat: Seat) -> None:
        """Give a seat back; harmless if it was taken away or given back before."""
        with self._lock:
            self._seats.pop(seat.number, None)

    def sweep(self) -> None:
        """Take away every seat that has been idle beyond its grace."""
        with self._lock:
            left = [seat for seat in self._seats.values() if seat.idle() is not None]
            self._remove(left)
        self._leave(left)

    def _longest(self, seats: list[Seat], full: str) -> Seat:
        idle = [(beyond, seat) for seat in seats if (beyond := seat.idle()) is not None]
        if not idle:
            raise Busy(f"{self.who} has {full}, which is its limit", "try again later", after=AFTER)
        return max(idle, key=lambda found: found[0])[1]

    def _remove(self, seats: list[Seat]) -> None:
        for seat in seats:
            seat.gone = True
            del self._seats[seat.number]

    @staticmethod
    def _leave(seats: list[Seat]) -> None:
        for seat in seats:
            seat.leave()
