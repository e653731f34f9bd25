"""Streams of the instructions of a circuit, of which one call of the cipher makes hundreds.

Most instructions of a text's step draw some hundred bytes, and a call takes as long as the cipher takes for thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from protocols.prg import SHORT, Key, Stream

TOGETHER = 256
"""The instructions whose streams are made together: 4 MB at most, as those of more than SHORT bytes are not."""


class StreamsAhead:
    """The streams of one party's key for the instructions of a circuit, each to be taken once, in any order.

    short: those that are made together, as ``short_draws`` returns them. Any other is made when it is taken.
    """

    def __init__(self, short: Sequence[Mapping[int, int]], key: Key) -> None:
        self._short, self._key = short, key
        self._made: dict[int, Stream] = {}
        self._begun = bytearray(len(short))

    def stream(self, index: int) -> Stream:
        """Return the stream of an instruction."""
        if not self._begun[block := index // TOGETHER]:
            self._begun[block] = True
            self._made |= self._key.streams(self._short[block])
        return self._made.pop(index, None) or self._key.stream(index)


def short_draws(circuit: Sequence[Any], party: int, offline: bool | None = None) -> list[dict[int, int]]:
    """Return the bytes of the streams that are made together, by instruction, for each TOGETHER instructions.

    party: whose draws the streams are for. offline: only those that the client draws before a query (True), only others
    (False), or all (None).
    """
    found: list[dict[int, int]] = [{} for _ in range(0, len(circuit), TOGETHER)]
    for index, instruction in enumerate(circuit):
        protocol = instruction.protocol
        size = protocol.drawn_bytes[party]
        if 0 < size <= SHORT and (offline is None or protocol.works_offline is offline):
            found[index // TOGETHER][index] = size
    return found
