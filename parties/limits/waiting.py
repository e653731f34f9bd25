"""Places for calls: some whose request has not come whole yet, and some that are worked on.

A service's threads are few, and whoever reaches its port can begin calls and send nothing. So a call takes a place for
work only after its request has come whole. Until then it is in a waiting room, which never refuses a newcomer.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import grpc

from parties.net.caller import Caller, caller
from parties.telemetry.events import Reading, taken_of
from secure.errors import Busy

FIRST = 10.0  # seconds within which the first message of a call comes
SLOWEST = 100_000  # bytes a second; whoever sends more slowly is not waited for


def patience(size: int) -> float:
    """Return the seconds within which a request of ``size`` bytes comes whole."""
    return FIRST + size / SLOWEST


class Clock:
    """The time that is left for a request. seconds: for all of it, from now on."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self, most: float) -> float:
        """Return the seconds that are left, ``most`` at most, and more than 0."""
        return max(0.001, min(most, self._until - time.monotonic()))


class WaitingRoom:
    """A room for ``places`` calls whose request is not complete.

    If it is full, a newcomer takes the place of another call, which is cancelled: of the caller who has the most, the
    one that has waited longest. So who leaves calls incomplete pushes out their own. Where callers have no names, all
    of them are one caller, and a call is pushed out when as many others begin before its request has come whole.
    """

    def __init__(self, places: int) -> None:
        self._places, self._numbers = places, count()
        self._inside: dict[int, tuple[str, Callable[[], object]]] = {}  # in order of time
        self._lock = threading.Lock()

    @contextmanager
    def place(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Hold a place while the request of a call comes."""
        with self._lock:
            cancel = self._pushed_out() if len(self._inside) >= self._places else None
            number = next(self._numbers)
            self._inside[number] = (caller(context).name, context.cancel)
        if cancel is not None:
            cancel()
        try:
            yield
        finally:
            with self._lock:
                self._inside.pop(number, None)

    def _pushed_out(self) -> Callable[[], object]:
        have = Counter(name for name, _ in self._inside.values())
        most = max(have.values())
        number = next(number for number, (name, _) in self._inside.items() if have[name] == most)
        return self._inside.pop(number)[1]


class Places:
    """Places for work. total: for all callers; each: for any one of them that has a name. who: the service, for errors.

    what: the name of the work, in the plural.
    """

    def __init__(self, total: int, each: int, who: str, what: str) -> None:
        self._total, self._each, self._who, self._what = total, each, who, what
        self._taken = Counter[str]()
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """The places that nobody has."""
        return self._total - self._taken.total()

    def readings(self) -> Iterator[Reading]:
        """Return how many places are taken, and of how many."""
        return taken_of(self._what, self._total - self.free, self._total)

    def take(self, by: Caller) -> Callable[[], None]:
        """Take a place for a caller; return the function that gives it back. Raises Busy if there is none."""
        with self._lock:
            if not self.free:
                raise Busy(f"{self._who} has {self._total} {self._what}, which is its limit", "try again later")
            if by.name and self._taken[by.name] >= self._each:
                raise Busy(
                    f"{self._who} has {self._each} {self._what} of this caller, which is its limit for one",
                    "wait for the answers of earlier ones",
                )
            self._taken[by.name] += 1

        def give_back() -> None:
            with self._lock:
                self._taken[by.name] -= 1

        return give_back
