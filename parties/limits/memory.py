"""A budget of bytes for what sessions keep prepared, and who gets the next of them.

The corrections of a query are its largest part by far, and lie in memory from their preparation to the end of their
query. So a session takes its bytes before it asks the dealer, and a session that finds none free waits for a short
time. Then it is told that the service is busy, and after how many seconds to ask again.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from weakref import WeakSet

from parties.limits.seats import Seat
from parties.telemetry.events import Reading
from secure.errors import Busy, InvalidInput

GB = 1e9
WAIT = 2.0  # seconds that a session waits for bytes
POLL = 0.25  # seconds after which a session that waits looks whether its client is still there
SOON, LATE = 0.5, 10.0  # the least and the most seconds after which a session is told to ask again
UNKNOWN = 2_000_000_000  # bytes to take where nothing says how many there are
RESERVE = 8  # one part of so many is left for those who need it
PART = 2  # a caller with a name gets one part of so many, but room for one query in any case
DISK = "room for temporary files", "name a larger place for them: TMPDIR"
CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


@dataclass(eq=False)
class Grant:
    """The bytes that one query of a session takes, until ``give_back``."""

    seat: Seat
    size: int
    since: float = field(default_factory=time.monotonic)


class PreparedMemory:
    """A budget of ``total`` bytes, of which a caller with a name gets at most the part 1 / PART.

    what, hint: the kind of bytes, and what gives a server more of them, for messages. who: whose they are.

    The order is that of need: first who has the least queries in memory already, then who has waited longest. A session
    that was told to come back keeps its time of waiting, but nobody waits for it while it is away. One whose client
    waits for nothing (its seat is idle beyond its grace) makes room for others.

    Callers without certificates have no names, and the budget alone bounds them together; of sessions, the number of
    queries that one may prepare bounds each.
    """

    def __init__(self, total: int, what: str = "memory", hint: str = "--memory", who: str = "the server") -> None:
        self.total, self._what, self._hint, self._who = total, what, hint, who
        self._free, self._numbers = threading.Condition(), count()
        self._grants: list[Grant] = []
        self._came: dict[Seat, int] = {}  # when sessions that wait, or were told to come back, asked first
        self._waiting: dict[Seat, int] = {}  # bytes that sessions wait for
        self._left: WeakSet[Seat] = WeakSet()  # they get nothing more, also if a thread of theirs still asks
        self._kept = SOON  # seconds for which bytes are taken, on average

    @property
    def used(self) -> int:
        """The bytes that are taken."""
        return sum(grant.size for grant in self._grants)

    def readings(self, budget: str) -> Iterator[Reading]:
        """Yield how much is taken, and of how much. budget: its name."""
        with self._free:
            taken, queries = self.used, len(self._grants)
        labels = {"budget": budget}
        yield Reading("unseen_budget_bytes", "Bytes that queries may take.", self.total, labels)
        yield Reading("unseen_budget_taken_bytes", "Bytes that queries take.", taken, labels)
        yield Reading("unseen_budget_grants", "Parts of it that are taken, one or two a query.", queries, labels)

    def take(self, seat: Seat, size: int, here: Callable[[], bool] = lambda: True) -> Grant:
        """Take the bytes of one query for a session. here: tells whether its client is still there.

        Raises Busy after WAIT seconds.
        """
        until = time.monotonic() + WAIT
        with self._free:
            if seat in self._left:
                raise self._busy(size)
            self._came.setdefault(seat, next(self._numbers))
            self._waiting[seat] = size
            try:
                while not self._next(seat):
                    self._make_room()
                    if (left := until - time.monotonic()) <= 0 or not here() or seat in self._left:
                        raise self._busy(size)
                    self._free.wait(min(left, POLL))
                del self._came[seat]
                self._grants.append(grant := Grant(seat, size))
                return grant
            finally:
                del self._waiting[seat]
                self._free.notify_all()  # whoever stood behind it

    def take_spare(self, seat: Seat, size: int) -> Grant | None:
        """Take bytes that would be good to have, at once; None if anybody waits, or if too few would be left."""
        with self._free:
            spare = not self._waiting and seat not in self._left and self._within_part(seat, size)
            if not spare or self.used + size > self.total - self.total / RESERVE:
                return None
            self._came.pop(seat, None)
            self._grants.append(grant := Grant(seat, size))
            return grant

    def give_back(self, grant: Grant) -> None:
        """Give bytes back; harmless if they were given back before."""
        with self._free:
            if grant in self._grants:
                self._grants.remove(grant)
                self._kept += (time.monotonic() - grant.since - self._kept) / 8
                self._free.notify_all()

    def leave(self, seat: Seat) -> None:
        """Give back all that a session has, and forget that it waited; from now on it gets nothing."""
        with self._free:
            self._left.add(seat)
            self._came.pop(seat, None)
            self._grants = [grant for grant in self._grants if grant.seat is not seat]
            self._free.notify_all()

    def _next(self, seat: Seat) -> bool:
        """Tell whether a session that waits is the first of those to whom their caller's part leaves room, and fits."""
        here = [each for each in self._waiting if each not in self._left]
        able = [each for each in here if self._within_part(each, self._waiting[each])]
        first = min(able, key=lambda each: (self._has(each), self._came[each]), default=None)
        return seat is first and self.used + self._waiting[seat] <= self.total

    def _has(self, seat: Seat) -> int:
        return sum(grant.seat is seat for grant in self._grants)

    def _within_part(self, seat: Seat, size: int) -> bool:
        mine = sum(grant.size for grant in self._grants if grant.seat.caller == seat.caller)
        return not seat.caller or not mine or mine + size <= self.total / PART

    def _make_room(self) -> None:
        """End the session that has kept bytes idle the longest beyond its grace, if there is one."""
        idle = [(beyond, grant.seat) for grant in self._grants if (beyond := grant.seat.idle()) is not None]
        if idle:
            seat = max(idle, key=lambda found: found[0])[1]
            seat.gone = True
            self._grants = [grant for grant in self._grants if grant.seat is not seat]  # it ends in a moment
            seat.leave()
            self._free.notify_all()

    def _busy(self, size: int) -> Busy:
        after = min(max(self._kept, SOON), LATE)
        return Busy(
            f"{self._who} has no {self._what} for another query at this moment ({size / GB:.3g} GB; "
            f"{self.used / GB:.3g} of {self.total / GB:.3g} GB are taken)",
            f"ask again later; the server's owner may give it more: {self._hint}",
            after=after,
        )


def memory_budget(given: float | None) -> int:
    """Return the bytes that were given, or half of what this machine has to spare now."""
    return int(given or available_memory() / 2 or UNKNOWN)


def disk_budget() -> int:
    """Return half of the bytes that are free where temporary files lie."""
    return shutil.disk_usage(tempfile.gettempdir()).free // 2


MORE_MEMORY = "free memory or raise --memory, which is half of what this machine has to spare by default"


def require_room(total: int, size: int, what: str = "memory", hint: str = MORE_MEMORY, *, workers: int = 1) -> None:
    """Raise InvalidInput if one query of ``size`` bytes is more than what each of the workers has of the budget."""
    if size > total // workers:
        each = f" for each of {workers} workers" if workers > 1 else ""
        raise InvalidInput(
            f"one prepared query takes {size / GB:.3g} GB of {what}, and the budget is {total // workers / GB:.3g} GB"
            f"{each}",
            f"lower --batch or --length, {'lower --workers, ' if workers > 1 else ''}or {hint}",
        )


def memory_said(own: int, mapped: int, what: str, hint: str) -> str:
    """Say what memory something takes before it begins: bytes of its own, and of files that it maps.

    Mapped files lie in the system's cache, once for all processes of a machine, and give way to what needs it more.
    Raises InvalidInput if this machine has not so much to spare.
    """
    free = available_memory()
    if 0 < free < own:
        raise InvalidInput(
            f"{what} takes about {own / GB:.3g} GB of memory, and this machine has {free / GB:.3g} GB to spare", hint
        )
    said = f"{what} takes about {own / GB:.3g} GB of memory"
    if not mapped:
        return said
    said += f" and {mapped / GB:.3g} GB of mapped weights, which the processes of a machine share"
    if 0 < free < own + mapped:
        said += (
            f"; {max(0, free - own) / GB:.3g} GB of them fit in memory, and the rest is read from the disk each time"
        )
    return said


def available_memory() -> int:
    """Return the bytes that this process may still take: those of the machine, or of its container if that has fewer.

    0 if neither says.
    """
    found = list[int]()
    with suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
    for most, taken in CGROUPS:
        with suppress(OSError, ValueError):  # ValueError: "max"
            numbers = [int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii")) for name in (most, taken)]
            found.append(numbers[0] - numbers[1])
    return max(0, min(found, default=0))
