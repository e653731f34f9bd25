"""Ranges of traced values, learnt from calibration inputs, and how many bits they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from approximations.primitives import piecewise
from secure.lowering.trace import Primitive, Trace, evaluate

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

    A primitive "bounded" replaces what was seen by what its caller knows, without a margin.
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
            raise ValueError("calibration needs at least one input")
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
            low, high = _assumed(p, [(ranges._low[i], ranges._high[i]) for i in p.inputs], reach, trace)
            if polynomial and p.op in ("mul", "mul_weight", "piecewise"):
                low, high = max(low, -reach), min(high, reach)
            ranges._low[index], ranges._high[index] = low, high
        return ranges

    def magnitude(self, index: int) -> float:
        """The largest absolute value that the ring is made for."""
        p = self._trace.primitives[index]
        if p.op == "bounded":
            return float(max(abs(p.attrs["low"]), abs(p.attrs["high"])))
        return max(abs(self._low[index]), abs(self._high[index]), 2.0**-16) * self._margin

    def bits(self, index: int) -> int:
        """Integer bits m >= 0 with magnitude < 2^m, and room for the error of fixed point (the sign not counted)."""
        return max(0, math.floor(math.log2(self.magnitude(index) * _ROOM)) + 1)

    def seen(self, index: int) -> tuple[float, float]:
        """The range as it was observed."""
        return self._low[index], self._high[index]


def _assumed(p: Primitive, operands: list[tuple[float, float]], reach: float, trace: Trace) -> tuple[float, float]:
    if p.op in ("input", "linear", "matmul", "add", "add_weight"):
        return (0.0, 1.0) if p.attrs.get("integer") else (-reach, reach)
    low, high = operands[0]
    if p.op == "sub":
        return low - operands[1][1], high - operands[1][0]
    if p.op in ("mul", "scale", "mul_weight"):
        factors = operands[1] if p.op == "mul" else (1.0, 1.0) if p.op == "mul_weight" else (p.attrs["value"],) * 2
        corners = [a * b for a in (low, high) for b in factors]
        square = p.op == "mul" and p.inputs[0] == p.inputs[1]
        return (0.0 if square else min(corners)), max(corners)
    if p.op == "sum":
        n = math.prod(trace.primitives[p.inputs[0]].shape) // math.prod(p.shape)
        return n * low, n * high
    if p.op == "offset":
        return low + p.attrs["value"], high + p.attrs["value"]
    if p.op == "piecewise":
        values = piecewise(torch.linspace(low, high, 513, dtype=torch.float64), p.attrs["knots"], p.attrs["pieces"])
        return float(values.min()), float(values.max())
    if p.op == "exp_neg":
        return 0.0, 1.0
    if p.op == "cat":
        return min(low for low, _ in operands), max(high for _, high in operands)
    return (p.attrs["low"], p.attrs["high"]) if p.op == "bounded" else (low, high)


def widened(edge: float, *, down: bool = False) -> float:
    """An edge of a range, outwards to a quarter of an octave: an exact one would show a value of a single sentence."""
    quarters = 4 * math.log2(edge)
    return float(2.0 ** ((math.floor(quarters) if down else math.ceil(quarters)) / 4))
