"""Streams of the instructions of a circuit, of which one call of the cipher makes hundreds.

Most instructions of a text's step draw some hundred bytes, and a call takes as long as the cipher takes for thousands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protocols.prg import SHORT, Key, Stream

TOGETHER = 256
"""The instructions whose streams are made together: 4 MB at most, as those of more than SHORT bytes are not."""


class StreamsAhead:
    """The streams of one party's key for the instructions of a circuit, each to be taken once, in any order.

    party: whose draws the streams are for. offline: only those that the client draws before a query are made together
    (True), only others (False), or all (None). Any other stream is made when it is taken.
    """

    def __init__(self, circuit: Sequence[Any], key: Key, party: int, *, offline: bool | None = None) -> None:
        self._circuit, self._key, self._party, self._offline = circuit, key, party, offline
        self._made: dict[int, Stream] = {}
        self._begun: set[int] = set()

    def stream(self, index: int) -> Stream:
        """Return the stream of an instruction."""
        if (start := index - index % TOGETHER) not in self._begun:
            self._begun.add(start)
            self._made |= self._key.streams(self._short(start))
        return self._made.pop(index, None) or self._key.stream(index)

    def _short(self, start: int) -> dict[int, int]:
        """Return the bytes of the streams that are made together, by instruction."""
        found = dict[int, int]()
        for index, instruction in enumerate(self._circuit[start : start + TOGETHER], start):
            protocol = instruction.protocol
            size = protocol.drawn_bytes[self._party]
            if 0 < size <= SHORT and (self._offline is None or protocol.works_offline is self._offline):
                found[index] = size
        return found
