"""Signals, as a queue that the main thread reads. It needs no gRPC, so that a process may fork beside it."""

from __future__ import annotations

import queue
import signal
from contextlib import suppress

LOOKING = 0.25  # seconds between two looks for a signal


class Signals:
    """The signals that this process catches from now on, in their order. Unlike an Event, it is safe in a handler."""

    def __init__(self, *numbers: int) -> None:
        self._caught: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in numbers:
            signal.signal(number, lambda caught, _: self._caught.put(caught))

    def next(self) -> int:
        """Wait for the next signal.

        It looks again now and then: the second of two signals that come at once may reach another thread than the main
        one, which then sleeps on, though a handler waits for it to wake.
        """
        while True:
            with suppress(queue.Empty):
                return self._caught.get(timeout=LOOKING)

    def waits(self) -> bool:
        """Tell whether there is another one."""
        return not self._caught.empty()
