"""Deadlines for waits that cannot take one themselves."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from secure.errors import InvalidInput

T = TypeVar("T")

LASTING = 3600.0  # seconds that one query, or one upload, may last in all, whatever a peer tells of its progress


def check_deadline(seconds: object) -> None:
    """Raise InvalidInput unless a deadline is a number of seconds that a wait can end after."""
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise InvalidInput(f"a deadline of {seconds!r} s", "give a finite number of seconds, more than 0")


class Watchdog:
    """A deadline for waits: it calls ``action`` if one guarded wait lasts longer than ``seconds``.

    It takes one sleeping thread, however many waits there are.
    """

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self._seconds, self._action = seconds, action
        self._until: float | None = None
        self._ended = threading.Event()
        self.fired = False
        threading.Thread(target=self._run, name="unseen-watchdog", daemon=True).start()

    @contextmanager
    def guard(self, seconds: float | None = None) -> Iterator[None]:
        """Guard one wait. seconds: another deadline for this wait."""
        self._until = time.monotonic() + (seconds or self._seconds)
        try:
            yield
        finally:
            self._until = None

    def sending(self, messages: Iterable[T]) -> Iterator[T]:
        """Yield the messages; each is guarded until its consumer, perhaps a peer that does not read, has taken it."""
        for message in messages:
            with self.guard():
                yield message

    def receiving(self, messages: Iterable[T]) -> Iterator[T]:
        """Yield the messages; the wait for each is guarded."""
        coming = iter(messages)
        while True:
            with self.guard():
                try:
                    message = next(coming)
                except StopIteration:
                    return
            yield message

    def stop(self) -> None:
        """End the thread; the action is not called any more."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            until = self._until
            if until is not None and time.monotonic() > until:
                self.fired = True
                self._action()
                return
