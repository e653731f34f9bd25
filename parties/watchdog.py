"""Deadlines for waits that cannot take one themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls ``action`` when one guarded wait lasts longer than ``seconds``; one sleeping thread, however many waits."""

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self._seconds, self._action = seconds, action
        self._since: float | None = None
        self._ended = threading.Event()
        self.fired = False
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                self.fired = True
                self._action()
                return
