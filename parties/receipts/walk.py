"""A walk over the messages of one connection: each is compared with the message that a conforming client sends there.

Sizes are those of messages that are built here, as a client builds them, with zeros in place of what is secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import repeat
from typing import Any

from parties.net.frames import PART
from parties.proto.unseen_pb2 import Frame
from parties.receipts.receipt import Channel, SentMessage
from secure.errors import ReceiptError


class Walk:
    """The messages of one connection, in order. number: that of the connection in the receipt, from 1."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel, self._number, self._at = channel, number, 0

    def __iter__(self) -> Iterator[SentMessage]:
        for at, message in enumerate(self.channel.sent, 1):
            self._at = at
            yield message

    def differs(self, why: str) -> ReceiptError:
        """Return the error for the message at which the walk stands."""
        at = f", message {self._at}" if self._at else ""
        return ReceiptError(f"connection {self._number} ({self.channel}){at}: {why}")

    def unknown(self, message: SentMessage) -> ReceiptError:
        """Return the error for a message that no client sends there."""
        return self.differs(f"{message.kind} of {message.bytes:,} bytes, which no conforming client sends here")

    def same(self, message: SentMessage, size: int) -> None:
        """Raise ReceiptError unless a message has the size that is prescribed."""
        if message.bytes != size:
            raise self.differs(f"{message.kind} of {message.bytes:,} bytes, where {size:,} are prescribed")

    def built(self, message: SentMessage, expected: Any) -> None:
        """Raise ReceiptError unless a message has the kind's fields, and the size, of one that is built here."""
        self.same(message, expected.ByteSize())

    def one_of(self, message: SentMessage, name: str, known: Iterable[str]) -> str:
        """Return what a message says in a field. Raises ReceiptError unless it is one of the ``known``."""
        found = message.said.get(name, "")
        if not isinstance(found, str) or found not in known:
            raise self.differs(f"{message.kind} names another {name} than the receipt")
        return found

    def count(self, message: SentMessage, name: str, most: int) -> int:
        """Return a number that a message says, 0 if it says none. Raises ReceiptError unless it is at most ``most``."""
        found = message.said.get(name, 0)
        if not isinstance(found, int) or found > most:
            raise self.differs(f"{message.kind} has another {name} than 0 to {most}")
        return found


class Frames:
    """The frames of one query that are still to come, as sizes of messages."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self._sizes, self._taken = sizes, 0

    @property
    def left(self) -> int:
        """The number of frames that are still to come."""
        return len(self._sizes) - self._taken

    def take(self, walk: Walk, message: SentMessage) -> None:
        """Compare the next one. Raises ReceiptError."""
        if not self.left:
            every = len(self._sizes)
            raise walk.differs(f"{message.kind} of {message.bytes:,} bytes behind the {every} that are prescribed")
        walk.same(message, self._sizes[self._taken])
        self._taken += 1


def frames(kind: Any, payloads: Iterable[int]) -> list[int]:
    """Return the sizes of the messages ``kind(frame=...)`` that carry payloads of these sizes, each in its parts."""
    return [size for payload in payloads if payload for size in _parts(kind, payload)]


def _parts(kind: Any, payload: int) -> Iterator[int]:
    """Yield the sizes of a payload's messages, of which no more than one part is ever made."""
    before = (payload - 1) // PART
    yield from repeat(_part(kind, PART, last=False), before)
    yield _part(kind, payload - before * PART, last=True)


@cache
def _part(kind: Any, size: int, *, last: bool) -> int:
    found: int = kind(frame=Frame(data=bytes(size), last=last)).ByteSize()
    return found
