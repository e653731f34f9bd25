"""Ranges of traced values, learnt from calibration inputs, and the number of bits that they need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from torch import Tensor

from secure.errors import InvalidInput
from secure.lowering.primitives import Operand, Primitive, meaning, promise
from secure.lowering.rows import Rows, every
from secure.lowering.trace import Trace, evaluate

ROUNDED = 1 + 2**-6  # over the largest magnitude: rounded weights and truncations may push a value past it
ROOM = 8 / 7 * ROUNDED  # of a ring over the largest magnitude, so that digits tell what is beyond (secure.mpc.watch)
_SIGNIFICANT = 14  # bits of a constant that is no short binary fraction


def dyadic(value: float) -> tuple[int, int]:
    """Return (m, q) with value = m 2^-q and m odd or zero.

    It is exact if m takes at most 14 bits, else rounded to 14 significant bits.
    """
    if value == 0:
        return 0, 0
    q = _SIGNIFICANT - 1 - math.floor(math.log2(abs(value)))
    m = round(value * 2.0**q)
    while m % 2 == 0:
        m, q = m // 2, q - 1
    return m, q


class Ranges:
    """The range [low, high] of every primitive of a trace over the calibration inputs, widened by ``margin_bits``.

    A primitive whose caller promises a range ("bounded") has that range, without a margin, whatever was observed; its
    operand has room for that range at least.
    """

    def __init__(self, trace: Trace, margin_bits: int) -> None:
        n = len(trace.primitives)
        self._trace, self._margin = trace, 2.0**margin_bits
        self._low, self._high = [math.inf] * n, [-math.inf] * n
        # a bounded value is its operand itself, so the operand takes the promised range too
        self._reach = {p.inputs[0]: max(map(abs, promise(p))) for p in trace.primitives if p.op == "bounded"}

    def observe(self, index: int, value: Tensor) -> None:
        """Widen the range of one primitive so that it holds ``value``, or all that might have been drawn instead."""
        p = self._trace.primitives[index]
        low, high = float(value.min()), float(value.max())
        if (known := meaning(p)).drawn:
            low, high = known.assume(p, self._operands(p), math.inf)
        self._low[index] = min(self._low[index], low)
        self._high[index] = max(self._high[index], high)

    def _operands(self, p: Primitive) -> list[Operand]:
        return [Operand(self._low[i], self._high[i], self._trace.primitives[i].shape) for i in p.inputs]

    @classmethod
    def calibrate(
        cls,
        trace: Trace,
        samples: Iterable[Mapping[str, Tensor]],
        weights: Mapping[str, Tensor],
        margin_bits: int,
        rows: Rows = every,
    ) -> Ranges:
        """Evaluate the trace in floating point on every sample. rows: chooses the part of each value that counts.

        Raises InvalidInput if there is no sample.
        """
        ranges = cls(trace, margin_bits)
        for sample in samples:
            evaluate(trace, sample, weights, lambda i, value: ranges.observe(i, rows(i, value)))
        if math.inf in ranges._low:
            raise InvalidInput("calibration needs at least one input")
        return ranges

    @classmethod
    def united(cls, parts: Sequence[Ranges], trace: Trace) -> Ranges:
        """Return ranges for a trace that hold those of all parts, whose traces have the same primitives.

        Raises InvalidInput if they have not: then no range could be told from another's.
        """
        for part in parts:
            for p, q in zip_longest(part._trace.primitives, trace.primitives):
                if p is None or q is None or (p.op, p.where) != (q.op, q.where):
                    raise InvalidInput(
                        f"{(p or q).where}: the model computes in another way at another size",
                        "compile it for each size on its own",
                    )
        whole = cls(trace, 0)
        whole._margin = parts[0]._margin
        whole._low = [min(lows) for lows in zip(*(part._low for part in parts), strict=True)]
        whole._high = [max(highs) for highs in zip(*(part._high for part in parts), strict=True)]
        return whole

    @classmethod
    def assume(cls, trace: Trace, reach: float, *, polynomial: bool = False) -> Ranges:
        """Assume ranges without calibration: inputs, matrix products, linear layers and sums stay within ``reach``.

        The ranges of other primitives follow from their operands by interval arithmetic, with elementwise weights
        assumed to be 1. They are good to a few bits and for costs only: nothing may be computed with them.
        ``polynomial``: products and polynomials stay within ``reach`` too. Their intervals would grow without bound,
        while training keeps the real arguments of such models together.
        """
        ranges = cls(trace, 0)
        for index, p in enumerate(trace.primitives):
            known = meaning(p)
            low, high = known.assume(p, ranges._operands(p), reach)
            if polynomial and known.multiplies:
                low, high = max(low, -reach), min(high, reach)
            ranges._low[index], ranges._high[index] = low, high
        return ranges

    def magnitude(self, index: int) -> float:
        """Return the largest absolute value that a ring must hold for this primitive."""
        p = self._trace.primitives[index]
        if (promised := meaning(p).promised) is not None:
            return float(max(map(abs, promised(p))))
        seen = max(abs(self._low[index]), abs(self._high[index]), 2.0**-16) * self._margin
        return max(seen, self._reach.get(index, 0.0))

    def interval(self, index: int) -> tuple[float, float]:
        """Return the range as it was observed, widened by the margin on both sides."""
        low, high = self._low[index], self._high[index]
        down, up = (self._margin if edge else 1 / self._margin for edge in (low < 0, high > 0))
        return low * down, high * up

    def span(self, index: int) -> tuple[float, float]:
        """Return the range that a ring must hold: what the caller promises, or all of the magnitude."""
        p = self._trace.primitives[index]
        if (promised := meaning(p).promised) is not None:
            low, high = promised(p)
            return float(low), float(high)
        return -self.magnitude(index), self.magnitude(index)

    def bits(self, index: int) -> int:
        """Return the integer bits m >= 0, without the sign, such that magnitude plus fixed-point error is below 2^m."""
        return max(0, math.floor(math.log2(self.magnitude(index) * ROOM)) + 1)

    def seen(self, index: int) -> tuple[float, float]:
        """Return the range as it was observed, without the margin."""
        return self._low[index], self._high[index]

    def likely(self, index: int) -> tuple[float, float]:
        """Return where values lie, as far as the ring shows: what the caller promises, or ``bits`` less the margin."""
        p = self._trace.primitives[index]
        if (promised := meaning(p).promised) is not None:
            low, high = promised(p)
            return float(low), float(high)
        reach = 2.0 ** self.bits(index) / self._margin
        return -reach, reach


def widened(edge: float, *, down: bool = False) -> float:
    """Round an edge of a range outwards to a quarter of an octave.

    An exact edge, which is public, would reveal a value of a single calibration sentence.
    """
    quarters = 4 * math.log2(edge)
    return float(2.0 ** ((math.floor(quarters) if down else math.ceil(quarters)) / 4))
