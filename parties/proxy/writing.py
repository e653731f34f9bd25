"""A text that a worker writes, taken piece by piece in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass

from secure.session.generation import Generation
from secure.session.session import Session


@dataclass(frozen=True)
class Ended:
    """The end of a text. reason: why; prompt, written: tokens."""

    reason: str
    prompt: int
    written: int


class WrittenText:
    """A text. begin: asks a session for it. hidden: its steps go on when nobody reads them any more.

    It is made in the event loop that takes its pieces.
    """

    size = 1

    def __init__(self, begin: Callable[[Session], Generation], *, hidden: bool) -> None:
        self._begin, self._hidden = begin, hidden
        self.future: Future[None] = Future()
        self.begun = False
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[str | Ended | BaseException]()
        self._gone = threading.Event()
        self.future.add_done_callback(self._failed)

    def write(self, session: Session, heard: Callable[[], None]) -> int:
        """Write it, in a worker's thread; return the tokens of its prompt. heard: called after queries."""
        text, sent = self._begin(session), 0
        with closing(text):
            for _ in text:
                if self._gone.is_set() and not self._hidden:
                    break
                sent = self._send(text, sent)
                heard()
        self._send(text, sent)
        self._put(Ended(text.finish_reason or "stop", text.prompt_tokens, len(text.ids)))
        return text.prompt_tokens

    def _send(self, text: Generation, sent: int) -> int:
        self.begun = self.begun or bool(text.ids)
        if piece := text.text[sent:]:
            self._put(piece)
        return sent + len(piece)

    def _put(self, item: str | Ended | BaseException) -> None:
        if not self._gone.is_set():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)

    def _failed(self, future: Future[None]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._put(error)

    async def pieces(self) -> AsyncGenerator[str | Ended, None]:
        """Yield pieces of text, and the end. Raises what the session raises. Whoever leaves ends the text."""
        try:
            while True:
                item = await self._pieces.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Ended):
                    return
        finally:
            self._gone.set()
            self.future.cancel()
