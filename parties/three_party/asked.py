"""A client's query at one party: its share of the inputs, how far it is, and the answer when it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from proto import unseen_pb2 as pb
from secure.errors import Error, PeerLost

BEAT = 1.0  # seconds between two words to a client
FASTEST = 0.05  # the same, whatever deadline a client has


@dataclass
class Progress:
    """How far a query is: ``steps`` grows with all that is done, ``waits_for`` names the role that it waits for."""

    steps: int = 0
    waits_for: str = ""

    @contextmanager
    def waiting(self, role: str) -> Iterator[None]:
        """One wait for a message of ``role``; what comes is a step."""
        self.waits_for = role
        yield
        self.waits_for, self.steps = "", self.steps + 1


@dataclass(eq=False)
class Asked:
    """One query. ``parts``: the byte strings that came with it. ``joined``: whether a computation took it up."""

    session: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    parts: list[bytes] = field(repr=False)
    deadline: float  # of the client
    progress: Progress = field(default_factory=Progress)
    joined: bool = False
    _answer: Future[pb.Answer] = field(default_factory=Future, repr=False)

    def finish(self, answer: pb.Answer) -> None:
        """The answer for the client, if it is still there."""
        with suppress(Exception):  # a client that left has cancelled it
            self._answer.set_result(answer)

    def fail(self, error: Error) -> None:
        """The same where there is none; after an answer or another error it does nothing."""
        with suppress(Exception):
            self._answer.set_exception(error)

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        self._answer.cancel()

    def when_left(self, action: Callable[[], object]) -> None:
        """Call ``action`` once the client has left before its answer."""

        def look(answer: Future[pb.Answer]) -> None:
            if answer.cancelled():
                action()

        self._answer.add_done_callback(look)

    def replies(self, joining: float) -> Iterator[pb.AskReply]:
        """Words to the client until the answer; its error is raised.

        joining: seconds within which the party that it waits for has to join, else PeerLost.
        """
        beat = min(BEAT, max(FASTEST, self.deadline / 4))
        until = time.monotonic() + joining
        while True:
            try:
                answer = self._answer.result(beat if self.joined else min(beat, joining))
            except TimeoutError:
                if not self.joined and time.monotonic() > until:
                    who = self.progress.waits_for
                    raise PeerLost(f"{who} did not come within {joining:g} s", "is it running? see its log") from None
                progress = self.progress
                yield pb.AskReply(working=pb.Working(steps=progress.steps, waits_for=progress.waits_for))
            except CancelledError:
                return
            else:
                yield pb.AskReply(answer=answer)
                return
