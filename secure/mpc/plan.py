"""Pass 1 over a trace, backwards: this module finds the ring, scale and openings that the readers of a value need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from protocols.fixedpoint import LEAST_FRACTION, FixedPoint
from protocols.ring import WORD
from secure.errors import DoesNotFit, UnsupportedOperation
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import Ranges
from secure.lowering.trace import Trace
from secure.mpc.prices import Prices


@dataclass(frozen=True)
class Need:
    """The needs that a reader has of an operand, in bits of a ring.

    base: the ring that the operand must have. wish: the ring that spares its readers extensions of their own.
    opened: the ring in which it is opened (0: it is not). lifted: the ring to which that opening is lifted, if it is
    narrower (0: to none). delivered: the ring in which the server gets it, masked (0: it does not). coarse: how many of
    its lowest bits the reader of its opening does not read.
    """

    base: int
    wish: int
    opened: int = 0
    lifted: int = 0
    delivered: int = 0
    coarse: int = 0


def opened(ring: int, coarse: int = 0) -> Need:
    """Return the need of a reader that opens its operand in a ring of ``ring`` bits, and reads all but the lowest."""
    return Need(ring, ring, opened=ring, coarse=coarse)


LEAST_OPENED = 8
"""The fewest bits of an opening without its lowest."""

Needs = Callable[["Plan", int, Primitive], Iterable[Need]]
Reach = Callable[["Plan", int, Primitive], int]


def nothing(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    """Return the needs of a primitive without operands: none."""
    return ()


def own_ring(plan: Plan, i: int, p: Primitive) -> int:
    """Return the reach of a primitive whose result is never wider than it must be."""
    return plan.own(i)


@dataclass(frozen=True)
class Planning:
    """The part of a primitive's record that pass 1 reads.

    needs: returns the needs of each operand in order, for primitive i of the plan's trace.
    reach: returns the widest ring that its result can have without an extension, once that of its operands is known.
    keeps_scale: the result has the largest scale among the operands, not the usual one.
    scale: the scale of the result, if it is always the same.
    note: records facts about a value that all its readers contribute before any of them is asked for its needs.
    """

    needs: Needs
    reach: Reach = own_ring
    keeps_scale: bool = False
    scale: int | None = None
    note: Callable[[Plan, Primitive], None] | None = None


def _more(fraction: int, p: Primitive) -> int:
    """Return the fraction bits of a result that has ``extra`` ones, or as many less but some."""
    return max(fraction + int(p.attrs.get("extra", 0)), min(fraction, LEAST_FRACTION))


_MOVES = ("reshape", "expand", "permute")
"""Moves of an opening that is kept."""


def _kept(trace: Trace) -> dict[int, str]:
    """Return the values that are no shares but openings that queries keep, and moves of these: their names, by place.

    Raises UnsupportedOperation for one that something else reads than moves and matrix products.
    """
    found: dict[int, str] = {}
    for i, p in enumerate(trace.primitives):
        if p.op == "keep":
            found[i] = str(p.attrs["name"])
        elif kept := [x for x in p.inputs if x in found]:
            if p.op in _MOVES:
                found[i] = found[kept[0]]
            elif p.op != "matmul":
                raise UnsupportedOperation(
                    f"{p.where}: '{p.op}' of keys or values that are kept", "matrix products read them"
                )
    return found


class Plan:
    """The scale (fraction bits) and the rings of every value of a trace. ``rules``: one per primitive, in order.

    kept: the rings of openings that queries keep, by name, as all Programs that share them have them; by default those
    that this trace needs. ``self.kept``: the values that are such openings, by place. ``self.readers``: the readers
    of each value, by place.
    """

    def __init__(
        self,
        trace: Trace,
        ranges: Ranges,
        fixed: FixedPoint,
        outputs: Sequence[int],
        rules: Sequence[Planning],
        prices: Prices,
        kept: Mapping[str, int] | None = None,
    ) -> None:
        self.trace, self.ranges, self.fixed, self.prices = trace, ranges, fixed, prices
        n = len(trace.primitives)
        self.kept_rings = dict(kept or {})
        self.kept = _kept(trace)
        self.rounded = dict[str, int]()  # of what is kept, the fraction bits that are dropped before it is opened
        self.fraction = [fixed.fraction_bits] * n
        self.base, self.wish, self.reach = [0] * n, [0] * n, [0] * n
        self.opened, self.lifted, self.delivered = [0] * n, [0] * n, [0] * n
        self._coarse: dict[int, int] = {}
        self.knots: dict[int, tuple[float, ...]] = {}
        self.tolerance: dict[int, float] = {}
        self.readers = list[list[int]]([] for _ in range(n))
        for i, (p, rule) in enumerate(zip(trace.primitives, rules, strict=True)):
            self.fraction[i] = self._fraction(p, rule)
            if p.op == "keep":
                self.rounded[self.kept[i]] = self.fraction[p.inputs[0]] - self.fraction[i]
            self.reach[i] = min(WORD, rule.reach(self, i, p))
            if rule.note is not None:
                rule.note(self, p)
        for i in outputs:
            self.base[i] = self.own(i)
        self._outputs = frozenset(outputs)
        for i in reversed(range(n)):
            p = trace.primitives[i]
            if self.unread(i):
                continue
            for x, need in zip(p.inputs, rules[i].needs(self, i, p), strict=True):
                self._demand(x, need)
                self.readers[x].append(i)

    def unread(self, i: int) -> bool:
        """True if nothing reads value i, so that it need not be computed."""
        known = self.readers[i] or i in self._outputs
        return not known and self.trace.primitives[i].op not in ("input", "keep")

    def _fraction(self, p: Primitive, rule: Planning) -> int:
        if rule.keeps_scale:
            most = max(self.fraction[i] for i in p.inputs)
            if p.op == "scale" and p.attrs["value"] > 1:  # as many significant bits take fewer places after the point
                return min(most, max(self.fixed.fraction_bits, most - math.floor(math.log2(p.attrs["value"]))))
            return _more(most, p)
        if rule.scale is not None:
            return rule.scale
        if p.attrs.get("public"):
            return self.fixed.weight_fraction_bits
        f = 0 if p.attrs.get("integer") else self.fixed.fraction_bits
        return _more(f, p)

    def _demand(self, x: int, need: Need) -> None:
        self.base[x] = max(self.base[x], min(need.base, WORD))
        self.wish[x] = max(self.wish[x], min(need.wish, WORD))
        self.opened[x] = max(self.opened[x], need.opened)
        self.lifted[x] = max(self.lifted[x], need.lifted)
        self.delivered[x] = max(self.delivered[x], need.delivered)
        if need.opened:
            self._coarse[x] = min(self._coarse.get(x, WORD), need.coarse)

    def coarse(self, i: int) -> int:
        """Return how many of the lowest bits of value i are not opened, as no reader of its opening reads them.

        So many are left that a digit of them tells whether the value is in its range.
        """
        return max(0, min(self._coarse.get(i, 0), self.own(i) - LEAST_OPENED))

    def own(self, i: int) -> int:
        """Return the narrowest ring for value i at its planned scale, with the sign and the spare bit of extension."""
        return self.fitting(i, self.fraction[i])

    def fitting(self, i: int, scale: int) -> int:
        """Return the narrowest ring for value i at another scale. Raises DoesNotFit if no ring is wide enough."""
        bits = self.ranges.bits(i) + scale + 2
        if bits > WORD:
            p = self.trace.primitives[i]
            raise DoesNotFit(
                f"{p.where}: '{p.op}' reaches {self.ranges.magnitude(i):.3g} and needs {bits} bits "
                f"with {scale} fraction bits, a ring has {WORD}\n"
                "hint: fewer fraction bits, or narrower calibration inputs"
            )
        return bits

    def extended(self, i: int) -> int:
        """Return the ring to which value i is extended if it must be: as its readers wish, at most 64 bits."""
        return max(self.base[i], min(WORD, self.wish[i]))

    def want(self, i: int) -> int:
        """Return the ring that spares the readers of value i extensions of their own, at most 64 bits."""
        return min(WORD, max(self.own(i), self.wish[i]))

    def widened(
        self, i: int, operands: Sequence[int], excess: int, narrowest: int, bytes_a_bit: float, most: int = WORD
    ) -> int:
        """Return the ring in which value i is computed from ``operands``, before it is truncated by ``excess`` bits.

        It is ``narrowest`` bits, or more if that spares the readers of value i an extension: if each operand reaches
        that ring, or must be extended anyway, and if the wider messages cost less than the round. bytes_a_bit: what
        they take for one more bit. most: the widest ring that there may be.
        """
        for result in (self.want(i), self.base[i]):
            ring = result + excess
            reached = all(ring <= self.reach[x] or narrowest > self.reach[x] for x in operands)
            cheaper = (ring - narrowest) * bytes_a_bit <= self.prices.round_bytes
            if narrowest <= ring <= most and reached and cheaper:
                return ring
        return narrowest

    def most(self, operands: Sequence[int]) -> int:
        """Return the widest ring that a matrix product of these may have: that of an opening that is kept.

        A word holds what is kept with the bits that are dropped before.
        """
        names = [self.kept[x] for x in operands if x in self.kept]
        return min((min(self.kept_rings.get(name, WORD), WORD - self.rounded[name]) for name in names), default=WORD)

    def widest(self, operands: Sequence[int], excess: int, narrowest: int) -> int:
        """Return the reach of a value that is computed from ``operands`` and truncated by ``excess`` bits."""
        rings = (self.reach[x] if narrowest <= self.reach[x] else WORD for x in operands)
        return min(rings) - excess

    # comparisons, which all functions of one value share

    def compares(self, x: int, knots: Iterable[float], tolerance: float) -> None:
        """Note that value x is compared with ``knots``, each of which may be missed by ``tolerance``."""
        self.knots[x] = tuple(sorted({*self.knots.get(x, ()), *knots}))
        self.tolerance[x] = min(self.tolerance.get(x, math.inf), tolerance)

    def compare_width(self, x: int) -> int:
        """Return the bits, with a sign, of x - t for all x that its ring holds and every knot t of a function of x."""
        knots, tolerance = self.knots.get(x, ()), self.tolerance.get(x, 0.0)
        reach = 2.0 ** self.ranges.bits(x) + max((abs(k) for k in knots), default=0.0) + tolerance
        return int(reach * 2.0 ** self.fraction[x] + 1).bit_length() + 1
