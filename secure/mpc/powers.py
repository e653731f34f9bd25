"""Emission of inverse powers as one narrow opening and a dealt table of polynomials (``two_party.tabulated``).

The opening keeps the fraction bits that the smallest argument needs, and no more: a table has about three coefficients
(1 / sqrt(x)) or five (1 / x) for each multiple of the smallest argument in the range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from protocols import two_party as tp
from protocols.ring import WORD
from protocols.two_party.tabulated import PUBLIC, smallest
from secure.errors import DoesNotFit
from secure.lowering.primitives import Primitive
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Need, Plan
from secure.mpc.share import Share

ROUNDING = 17  # bits to which the opening rounds the smallest argument
ROOM = 1 + 2.0**-7  # by how much rounding may push an argument beyond its range
GUARD = 1  # fraction bits of the coefficients beyond those of the result


@dataclass(frozen=True)
class _Table:
    """A table's arguments low..high as integers of ``fraction`` bits, and its form."""

    fraction: int
    low: int
    high: int
    ring: int
    shift: int
    degree: int


def _table(plan: Plan, p: Primitive) -> _Table:
    """Choose the table of a primitive. Raises DoesNotFit for a range that no table holds."""
    a, given = p.attrs, plan.fraction[p.inputs[0]]
    fraction = min(given, ROUNDING - math.floor(math.log2(a["low"])))
    low, high = max(1, math.floor(a["low"] / ROOM * 2.0**fraction)), math.ceil(a["high"] * ROOM * 2.0**fraction)
    try:
        return _Table(fraction, low, high, *smallest(a["root"], low, high))
    except ValueError as error:
        raise DoesNotFit(f"{p.where}: {error}\nhint: narrower calibration inputs, or more fraction bits") from None


def needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    table = _table(plan, p)
    ring = table.ring + plan.fraction[p.inputs[0]] - table.fraction
    return (Need(ring, ring),)


def emit(e: Emitter, i: int, p: Primitive) -> Share:
    (x,), a, table = p.inputs, p.attrs, _table(e.plan, p)
    drop = e.plan.fraction[x] - table.fraction
    value = e.truncate(e.get(x, table.ring + drop), p.shape, drop)
    at = e.emit(tp.Open(p.shape, table.ring), value.index)
    want, fraction = e.plan.want(i), e.plan.fraction[i] + GUARD
    wide = min(WORD, want + GUARD + PUBLIC)
    scale = a["scale"] * 2.0 ** (fraction + table.fraction / a["root"])
    form = (table.ring, table.shift, table.degree, a["root"], table.low, table.high, scale)
    index = e.emit(tp.Tabulated(p.shape, *form, PUBLIC, wide), at)
    return Share(index, wide, fraction + PUBLIC)
