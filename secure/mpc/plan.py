"""What the readers of every value need: rings, scales, openings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from protocols.fixedpoint import FixedPoint
from protocols.ring import WORD
from secure.errors import DoesNotFit
from secure.lowering.ranges import Ranges, dyadic
from secure.lowering.trace import Primitive, Trace

EXPONENT_BITS = 4  # e^-x takes x below 2^4


_SHAPED = ("reshape", "expand", "permute", "slice", "cat", "bounded")


_LOCAL = (*_SHAPED, "add", "sub", "offset", "sum", "add_weight")


class Plan:
    """What the readers of every value need (pass 1)."""

    def __init__(self, trace: Trace, ranges: Ranges, fixed: FixedPoint, outputs: Sequence[int]) -> None:
        self.trace, self.ranges, self.fixed = trace, ranges, fixed
        n = len(trace.primitives)
        self.fraction = [fixed.fraction_bits] * n
        for i, p in enumerate(trace.primitives):
            self.fraction[i] = self._fraction(p)
        self.base, self.wish, self.opened, self.delivered = [0] * n, [0] * n, [0] * n, [0] * n
        self.knots: dict[int, tuple[float, ...]] = {}
        self.tolerance: dict[int, float] = {}
        for p in trace.primitives:
            if p.op == "piecewise":
                (x,) = p.inputs
                self.knots[x] = tuple(sorted({*self.knots.get(x, ()), *p.attrs["knots"]}))
                self.tolerance[x] = min(self.tolerance.get(x, math.inf), p.attrs["tolerance"])
        for i in outputs:
            self.base[i] = self.own(i)
        for i in reversed(range(n)):
            self._readers_need(i, trace.primitives[i])

    def _fraction(self, p: Primitive) -> int:
        f = 0 if p.attrs.get("integer") else self.fixed.fraction_bits
        if p.op in ("scale", *_LOCAL) and p.inputs:
            return max(self.fraction[i] for i in p.inputs)
        return f + int(p.attrs.get("extra", 0))

    def own(self, i: int) -> int:
        """The narrowest ring that holds value i at its settled scale, with the sign and the spare bit of extension."""
        return self._fitting(i, self.fraction[i])

    def _fitting(self, i: int, scale: int) -> int:
        bits = self.ranges.bits(i) + scale + 2
        if bits > WORD:
            p = self.trace.primitives[i]
            raise DoesNotFit(
                f"{p.path or 'the function'}: '{p.op}' reaches {self.ranges.magnitude(i):.3g} and needs {bits} bits "
                f"with {scale} fraction bits, a ring has {WORD}\n"
                "hint: fewer fraction bits, or narrower calibration inputs"
            )
        return bits

    def want(self, i: int) -> int:
        return min(WORD, max(self.own(i), self.wish[i]))

    def product_ring(self, i: int) -> int:
        """For mul, matmul, linear and mul_weight: the ring of the untruncated product."""
        p = self.trace.primitives[i]
        if p.op in ("linear", "mul_weight"):
            scale = self.fraction[p.inputs[0]] + self.fixed.weight_fraction_bits
        else:
            scale = sum(self.fraction[x] for x in p.inputs)
        return self._fitting(i, scale)

    def _readers_need(self, i: int, p: Primitive) -> None:
        def need(x: int, base: int, wish: int, *, opened: int = 0, delivered: int = 0) -> None:
            self.base[x] = max(self.base[x], min(base, WORD))
            self.wish[x] = max(self.wish[x], min(wish, WORD))
            self.opened[x] = max(self.opened[x], opened)
            self.delivered[x] = max(self.delivered[x], delivered)

        if p.op in _LOCAL:
            for x in p.inputs:
                lift = self.fraction[i] - self.fraction[x]
                need(x, self.own(i) - lift, self.want(i) - lift)
        elif p.op == "scale":
            q = max(0, dyadic(p.attrs["value"])[1])
            need(p.inputs[0], self._fitting(i, self.fraction[i] + q), self.want(i) + q)
        elif p.op in ("mul", "matmul"):
            ring = self.product_ring(i)
            for x in p.inputs:
                need(x, ring, ring, opened=ring)
        elif p.op in ("linear", "mul_weight"):
            ring = self.product_ring(i)
            need(p.inputs[0], ring, ring, delivered=ring)
        elif p.op == "piecewise":
            (x,) = p.inputs
            ring = max(self.compare_width(x), self.linear_ring(i)) if p.attrs["knots"] else 0
            need(x, ring, ring, opened=ring)
        elif p.op == "exp_neg":
            ring = self.fraction[p.inputs[0]] + EXPONENT_BITS + 1
            need(p.inputs[0], ring, ring, opened=ring)
        elif p.op == "maximum":
            ring = self.own(p.inputs[0]) + 1
            need(p.inputs[0], ring, ring)
        elif p.op != "input":
            raise AssertionError(f"no rule for {p.op}")

    def compare_width(self, x: int) -> int:
        """Bits of x - t, sign included, for every knot t of any function of x, and a tolerance to spare at the top."""
        knots, tolerance = self.knots.get(x, ()), self.tolerance.get(x, 0.0)
        reach = self.ranges.magnitude(x) + max((abs(k) for k in knots), default=0.0) + tolerance
        return int(reach * 2.0 ** self.fraction[x] + 1).bit_length() + 1

    def slope_bits(self, i: int) -> int:
        """Fraction bits beyond its own that piecewise i's linear pieces have: of x and the slopes together."""
        p = self.trace.primitives[i]
        lift = self.fraction[i] - self.fraction[p.inputs[0]]
        slopes = [piece.coefficients[1] for piece in p.attrs["pieces"] if len(piece.coefficients) == 2]
        return max([0, *(dyadic(slope)[1] - lift for slope in slopes if slope)])

    def linear_ring(self, i: int) -> int:
        """The ring of a selection of linear pieces, before the slopes' bits are truncated."""
        return self.own(i) + self.slope_bits(i)
