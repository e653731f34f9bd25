"""Work that is repeated in the background while a service runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from parties.net.calls import unexpected
from secure.errors import Error


class Repeating:
    """A thread that calls ``action`` every ``seconds`` until it is closed.

    An Error is logged once, and again only after the action has worked or says something else.
    """

    def __init__(self, seconds: float, action: Callable[[], object], log: logging.Logger) -> None:
        self._seconds, self._action, self._log = seconds, action, log
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="unseen-repeating", daemon=True).start()

    def close(self) -> None:
        """End the thread; a call that runs now ends by itself, and what it raises is dropped."""
        self._closed.set()

    def _run(self) -> None:
        said = ""
        while not self._closed.wait(self._seconds):
            try:
                self._action()
                said = ""
            except Exception as error:
                text = str(error).replace("\n", "; ")
                if self._closed.is_set() or text == said:
                    continue
                said = text
                if isinstance(error, Error):
                    self._log.warning("%s", text)
                else:
                    unexpected(error, self._log)
