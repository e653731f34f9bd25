"""Emission of rounded answers: to the nearest multiple of 2^-bits, exactly, before anything is revealed.

What is rounded is a share modulo 2^ring. The result depends on that number alone, and neither on how it is shared nor
on masks. Truncation by each party alone would add its own noise, which an answer would show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from protocols import local
from protocols import two_party as tp
from protocols.protocol import Shape
from protocols.two_party.rounding import MOST_SHIFT
from secure.mpc.emitter import Emitter
from secure.mpc.prices import Prices
from secure.mpc.share import Share


def rounded(e: Emitter, value: Share, shape: Shape, bits: int) -> Share:
    """Emit a value with ``bits`` fraction bits, a half rounded up; itself if it has no more.

    It takes an opening and a table, or several where smaller tables are cheaper than the round that they cost.
    """
    drop = value.fraction - bits
    if drop <= 0:
        return value
    half = e.emit(local.AddConstant(shape, value.ring, 1 << (drop - 1)), value.index)
    value = replace(value, index=half)
    for shift in _shifts(shape, value.ring, drop, e.plan.prices):
        opened = e.emit(tp.Open(shape, value.ring), value.index)
        index = e.emit(tp.Quotient(shape, value.ring, shift), opened)
        value = Share(index, value.ring - shift, value.fraction - shift)
    return value


def _shifts(shape: Shape, ring: int, drop: int, prices: Prices) -> Sequence[int]:
    """Return the bits that each table drops, ``drop`` together, by the least price."""
    ways = [[drop // n + (k < drop % n) for k in range(n)] for n in range(-(-drop // MOST_SHIFT), drop + 1)]
    return min(ways, key=lambda way: _price(shape, ring, way, prices))


def _price(shape: Shape, ring: int, shifts: Sequence[int], prices: Prices) -> float:
    total = 0.0
    for shift in shifts:
        total += prices.of(tp.Open(shape, ring).cost()) + prices.of(tp.Quotient(shape, ring, shift).cost())
        ring -= shift
    return total
