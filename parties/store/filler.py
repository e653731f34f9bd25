"""A thread that keeps a store full, for whatever a service serves at present, within a budget of bytes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from parties.net.calls import unexpected
from parties.store.entries import Store
from parties.telemetry.events import Reading
from secure.errors import Error
from secure.units import in_units

MOST_ENTRIES = 4096  # with one label
KEPT = 7 * 86400.0  # seconds that an entry is kept
SETTLED = 60.0  # seconds after which labels that nobody has served yet are taken for old ones
QUIET = 0.5  # seconds without a query after which entries are made
LOW = 10.0  # if the store holds less than this part of what it should, entries are made whatever runs
LOOKING = 30.0  # seconds after which the store is looked at again, if nobody wakes the thread
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0  # seconds between attempts that fail


@dataclass(frozen=True)
class Shelf:
    """A part of the store. what: its name in the log. size: bytes of an entry. make: makes one, and puts it there."""

    what: str
    label: str
    size: int
    make: Callable[[], None]


class Filler:
    """A thread that fills a store until it is closed.

    most: bytes of all entries; the shelves share them equally, and none has more than MOST_ENTRIES. All shelves should
    be named at the start, also those that are not needed yet: their labels and sizes are enough for that. It makes one
    entry at a time, for the shelf that is the emptiest. It waits while queries run, unless a shelf has less than a
    LOW-th of its entries. If making fails it says so once, and tries again after pauses that double. It removes entries
    that are older than KEPT, and those of labels that are not served: at once when a shelf is dropped or gets another
    label, SETTLED after the first shelf for what it never knew, because a service may come to serve it.
    """

    def __init__(self, store: Store, most: int, log: logging.Logger) -> None:
        self._store, self._most, self._log = store, most, log
        self._news = threading.Condition()
        self._shelves: dict[str, Shelf] = {}
        self._told: dict[str, tuple[str, int]] = {}
        self._levels: dict[str, tuple[int, int]] = {}
        self._old: set[str] = set()
        self._running, self._quiet_since = 0, 0.0
        self._closed, self._woken = False, False
        self._said, self._pause = "", 0.0
        self._began: float | None = None  # when the first shelf was served
        self._thread = threading.Thread(target=self._run, name="unseen-filler", daemon=True)
        self._thread.start()

    def readings(self) -> Iterator[Reading]:
        """Yield how many entries each shelf has, and how many it should have, as of when the thread looked last."""
        for label, (entries, target) in list(self._levels.items()):
            labels = {"shelf": label}
            yield Reading("unseen_stored_queries", "Queries left in the store.", entries, labels)
            yield Reading("unseen_stored_queries_wanted", "Queries that the store should hold.", target, labels)

    def serve(self, shelf: Shelf) -> None:
        """Keep a shelf filled; it takes the place of one of the same name."""
        with self._news:
            before = self._shelves.get(shelf.what)
            if before is not None and before.label != shelf.label:
                self._old.add(before.label)
            self._shelves[shelf.what] = shelf
            self._began = self._began or time.monotonic()
            self._old.discard(shelf.label)
        self.wake()

    def drop(self, what: str) -> None:
        """Remove a shelf and its entries."""
        with self._news:
            if (shelf := self._shelves.pop(what, None)) is not None:
                self._old.add(shelf.label)
                self._told.pop(what, None)
                self._levels.pop(what, None)
        self.wake()

    def wake(self) -> None:
        """Look at the store now."""
        with self._news:
            self._woken = True
            self._news.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Say that a query runs."""
        with self._news:
            self._running += 1
        try:
            yield
        finally:
            with self._news:
                self._running -= 1
                self._quiet_since = time.monotonic()
                self._woken = True
                self._news.notify_all()

    def close(self) -> None:
        """End the thread once the entry that it is making is there, or has failed; a second is waited for it."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closed:
            try:
                seconds = self._step()
                if seconds == 0.0:
                    self._said, self._pause = "", 0.0
            except Exception as error:
                seconds = self._failed(error)
            with self._news:
                if self._pause:
                    self._news.wait_for(lambda: self._closed, seconds)
                else:
                    self._news.wait_for(lambda: self._closed or self._woken, seconds)
                self._woken = False

    def _failed(self, error: Exception) -> float:
        text = str(error).replace("\n", "; ")
        self._pause = min(LAST_PAUSE, self._pause * 2 or FIRST_PAUSE)
        if text != self._said and not self._closed:
            self._said = text
            if isinstance(error, Error):
                self._log.warning("the store is not filled at present: %s", text)
            else:
                unexpected(error, self._log)
        return self._pause

    def _step(self) -> float:
        """Make one entry, if one is wanted; return the seconds to wait after it."""
        self._clear()
        with self._news:
            shelves = list(self._shelves.values())
        wanted: tuple[float, Shelf] | None = None
        levels = {shelf.label: self._store.level(shelf.label) for shelf in shelves}
        room = self._most - self._store.level().size + sum(level.size for level in levels.values())
        for shelf in shelves:
            target = max(0, min(MOST_ENTRIES, room // len(shelves) // shelf.size))
            entries = levels[shelf.label].entries
            while entries > target and self._store.take(shelf.label) is not None:  # the budget was larger once
                entries -= 1
            self._tell(shelf, entries, target)
            self._levels[shelf.what] = entries, target
            if entries < target and (wanted is None or entries / target < wanted[0]):
                wanted = entries / target, shelf
        if wanted is None:
            return LOOKING
        full, shelf = wanted
        with self._news:
            quiet = 0.0 if self._running else time.monotonic() - self._quiet_since
            if quiet < QUIET and full >= 1 / LOW:
                return LOOKING if self._running else QUIET - quiet
            if self._closed:
                return LOOKING
        shelf.make()
        return 0.0

    def _clear(self) -> None:
        """Remove what is old, or served no more."""
        with self._news:
            served, old = {shelf.label for shelf in self._shelves.values()}, self._old
            self._old = set()
        settled = self._began is not None and time.monotonic() - self._began > SETTLED
        dropped = self._store.sweep(served if settled else None, old, time.time() - KEPT)
        if dropped:
            self._log.info("the store dropped %d queries that can be used no more", dropped)

    def _tell(self, shelf: Shelf, entries: int, target: int) -> None:
        """Log the level if it is the first one, or has changed by a tenth."""
        tenth = 10 * entries // target if target else 0
        if self._told.get(shelf.what) == (shelf.label, tenth):
            return
        self._told[shelf.what] = shelf.label, tenth
        if target:
            size = in_units(entries * shelf.size)
            self._log.info("the store has %d queries left of %d (%s, %s)", entries, target, shelf.what, size)
        else:
            self._log.warning(
                "the store has no room for a query of %s: it takes %s; give more: --store-bytes",
                shelf.what,
                in_units(shelf.size),
            )
