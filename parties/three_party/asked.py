"""A client's query at one party: its share of the inputs, its progress, and its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from parties.proto import unseen_pb2 as pb
from parties.three_party.conversations import PartyConversation, WantedProgram
from parties.three_party.shared_model import SharedProgram
from secure.errors import Error, PeerLost

BEAT = 1.0  # seconds between two messages to a client that waits
FASTEST = 0.05  # the least seconds between two messages, however short the client's deadline is


@dataclass
class Progress:
    """The progress of a query. steps: grows with every step done; waits_for: the role that it waits for, or ""."""

    steps: int = 0
    waits_for: str = ""

    @contextmanager
    def waiting(self, role: str) -> Iterator[None]:
        """Mark one wait for a message of ``role``; the message counts as a step."""
        self.waits_for = role
        yield
        self.waits_for, self.steps = "", self.steps + 1


@dataclass(eq=False)
class Asked:
    """One query. parts: the byte strings that came with it. joined: True if a computation has taken it up.

    size: the Program that it computes. conversation: that in which it stands, if it stands in one, and which this party
    keeps; history: see ``PartyConversation.history``. owner: what the client shows to go on with it. following: the
    digest of the Program of the query after it, or "".
    """

    session: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    parts: list[bytes] = field(repr=False)
    deadline: float  # the client's, in seconds
    wanted: WantedProgram
    size: SharedProgram
    owner: bytes = field(default=b"", repr=False)
    following: str = ""
    conversation: PartyConversation | None = None
    history: bytes = b""
    progress: Progress = field(default_factory=Progress)
    joined: bool = False
    _answer: Future[pb.Answer] = field(default_factory=Future, repr=False)

    def finish(self, answer: pb.Answer) -> None:
        """Set the answer for the client, if it is still there."""
        with suppress(Exception):  # a client that left has cancelled it
            self._answer.set_result(answer)

    def fail(self, error: Error) -> None:
        """Set an error instead of an answer; after an answer or another error this does nothing."""
        with suppress(Exception):
            self._answer.set_exception(error)

    def leave(self) -> None:
        """Cancel the answer, because nobody waits for it any more."""
        self._answer.cancel()

    def when_left(self, action: Callable[[], object]) -> None:
        """Call ``action`` once the client has left before its answer."""

        def look(answer: Future[pb.Answer]) -> None:
            if answer.cancelled():
                action()

        self._answer.add_done_callback(look)

    def replies(self, joining: float) -> Iterator[pb.AskReply]:
        """Yield messages to the client: progress, and at last the answer. Raises the query's error if it failed.

        joining: seconds within which the party that the query waits for must join; raises PeerLost if it does not.
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
