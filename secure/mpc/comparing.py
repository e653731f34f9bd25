"""The cheapest comparison of an opened value with thresholds."""

from __future__ import annotations

import math
from functools import lru_cache

from protocols import two_party as tp
from protocols.protocol import Shape
from protocols.two_party.comparison import DIGITS


def spare(tolerance: float) -> int:
    """Return the low bits that are worth at most ``tolerance`` units."""
    return max(0, math.floor(math.log2(max(tolerance, 1.0))))


@lru_cache(maxsize=4096)  # a plan asks for the same ones many times
def cheapest_compare(
    shape: Shape, width: int, thresholds: tuple[int, ...], dropped: int, dealt_for_online: int
) -> tp.Compare:
    """Return the comparison with the fewest rounds, then the fewest bytes, that drops at most ``dropped`` low bits.

    A dealt byte counts for 1/dealt_for_online of an online one. Of equally cheap ones it returns the most exact.
    """

    def price(compare: tp.Compare) -> tuple[int, int, int]:
        cost = compare.cost()
        online = cost.to_first + cost.to_second
        return cost.rounds, dealt_for_online * online + cost.dealt, compare.drop

    drops = range(min(dropped, width - 2) + 1)
    return min((tp.Compare(shape, width, drop, thresholds, digit) for drop in drops for digit in DIGITS), key=price)
