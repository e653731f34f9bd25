"""Ranges of traced values, learnt from calibration inputs, and how many bits they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from secure.errors import InvalidInput
from secure.lowering.primitives import Operand, meaning
from secure.lowering.trace import Trace, evaluate

_ROOM = 1 + 2**-6  # over the largest magnitude: rounded weights and truncations may push a value past it
_SIGNIFICANT = 14  # bits of a constant that is no short binary fraction


def dyadic(value: float) -> tuple[int, int]:
    """(m, q) with value = m 2^-q, exact if m takes at most 14 bits, else rounded to 14 significant bits;
    m odd or zero.
    """
    if value == 0:
        return 0, 0
    q = _SIGNIFICANT - 1 - math.floor(math.log2(abs(value)))
    m = round(value * 2.0**q)
    while m % 2 == 0:
        m, q = m // 2, q - 1
    return m, q


class Ranges:
    """[low, high] of every primitive of a trace over the calibration inputs, widened by ``margin_bits``.

    A primitive whose range its caller promises ("bounded") has that, without a margin, whatever was seen.
    """

    def __init__(self, trace: Trace, margin_bits: int) -> None:
        n = len(trace.primitives)
        self._trace, self._margin = trace, 2.0**margin_bits
        self._low, self._high = [math.inf] * n, [-math.inf] * n

    def observe(self, index: int, value: Tensor) -> None:
        self._low[index] = min(self._low[index], float(value.min()))
        self._high[index] = max(self._high[index], float(value.max()))

    @classmethod
    def calibrate(
        cls, trace: Trace, samples: Iterable[Mapping[str, Tensor]], weights: Mapping[str, Tensor], margin_bits: int
    ) -> Ranges:
        """Evaluate the trace in floating point on every sample."""
        ranges = cls(trace, margin_bits)
        for sample in samples:
            evaluate(trace, sample, weights, ranges.observe)
        if math.inf in ranges._low:
            raise InvalidInput("calibration needs at least one input")
        return ranges

    @classmethod
    def assume(cls, trace: Trace, reach: float, *, polynomial: bool = False) -> Ranges:
        """No calibration: inputs, matrix products, linear layers and sums are taken to stay within ``reach``.

        Other primitives follow from their operands by interval arithmetic, elementwise weights being taken for 1. Good
        to a few bits, for costs only: nothing may be computed with such ranges. ``polynomial``: so are products and
        polynomials, whose intervals grow without bound where training keeps arguments together.
        """
        ranges = cls(trace, 0)
        for index, p in enumerate(trace.primitives):
            known = meaning(p)
            operands = [Operand(ranges._low[i], ranges._high[i], trace.primitives[i].shape) for i in p.inputs]
            low, high = known.assume(p, operands, reach)
            if polynomial and known.multiplies:
                low, high = max(low, -reach), min(high, reach)
            ranges._low[index], ranges._high[index] = low, high
        return ranges

    def magnitude(self, index: int) -> float:
        """The largest absolute value that the ring is made for."""
        p = self._trace.primitives[index]
        if (promised := meaning(p).promised) is not None:
            return float(max(map(abs, promised(p))))
        return max(abs(self._low[index]), abs(self._high[index]), 2.0**-16) * self._margin

    def bits(self, index: int) -> int:
        """Integer bits m >= 0 with magnitude < 2^m, and room for the error of fixed point (the sign not counted)."""
        return max(0, math.floor(math.log2(self.magnitude(index) * _ROOM)) + 1)

    def seen(self, index: int) -> tuple[float, float]:
        """The range as it was observed."""
        return self._low[index], self._high[index]


def widened(edge: float, *, down: bool = False) -> float:
    """An edge of a range, outwards to a quarter of an octave: an exact one would show a value of a single sentence."""
    quarters = 4 * math.log2(edge)
    return float(2.0 ** ((math.floor(quarters) if down else math.ceil(quarters)) / 4))
