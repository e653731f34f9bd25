"""Reciprocal and inverse square root of a positive value in a known range.

Where high / low is at most ``NARROW``, the protocol has the function itself, from one opening
(``primitives.inverse_power``). Else range reduction follows:

x is compared with powers of 2^(1/4). The secret segment bits give u = c x just below 1 and the matching c^-p as
piecewise linear functions, and a minimax cubic gives u^p: x^p = u^p c^-p. All comparisons come from one opening. Few
values need this (one a row), so segments are cheap and rounds are expensive: no Newton or Goldschmidt step follows.
Relative error: ``reciprocal_error()``, ``rsqrt_error()`` (1.8e-5 and 4.6e-6) plus fixed-point rounding; none, but for
the protocol's own, in a narrow range.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from approximations.fits import minimax
from approximations.primitives import Piece, Value, bounded, constant, inverse_power, piecewise, precise_product

NARROW = {1: 2.0**15, 2: 2.0**13}
"""The largest high / low, by root, of a function whose tables take at most some 13 kB a value."""

PER_OCTAVE, DEGREE = 4, 3
# the range of u: one segment, widened by the rounding of c and by comparisons that pick the neighbouring segment
_LOWEST, _HIGHEST = 2.0 ** (-1 / PER_OCTAVE) * (1 - 2**-6) * (1 - 2**-7), 1 + 2**-6


def _power_of(x: Tensor, exponent: float) -> Tensor:
    return x**exponent


_POWERS = {root: partial(_power_of, exponent=-1 / root) for root in (1, 2)}


def _power(x: Value, root: int, low: float, high: float, scale: float, highest: float = 0.0) -> Value:
    if not 0 < low < high:
        raise ValueError(f"a positive range is needed, got [{low:g}, {high:g}]")
    extra = max(0, math.ceil(-math.log2(scale * high ** (-1 / root))))  # keep small results as precise as large ones
    if max(high, highest) <= NARROW[root] * low:
        return inverse_power(x, root, low, high, scale, extra)
    knots, shrinks, factors, of_mantissa = segments(root, low, high, scale)
    mantissa = piecewise(x, knots, shrinks, low / 128)
    # calibration may see a part of the range alone, so the results' ranges are promised
    factor = bounded(piecewise(x, knots, factors, low / 128, extra), 0.0, max(p.coefficients[0] for p in factors))
    result = precise_product(piecewise(mantissa, [], [of_mantissa]), factor, extra)
    return bounded(result, 0.0, 1.01 * scale * low ** (-1 / root))


def segments(root: int, low: float, high: float, scale: float) -> tuple[list[float], list[Piece], list[Piece], Piece]:
    """Return the range reduction of scale * x^(-1/root): knots, the pieces of u, those of a factor, and a polynomial.

    The result is polynomial(u) * factor.
    """
    first, last = math.floor(PER_OCTAVE * math.log2(low)) + 1, math.ceil(PER_OCTAVE * math.log2(high))
    first = min(first, last - 1)  # a range within one segment gets another below it, so that there is a comparison
    tops = [2.0 ** (i / PER_OCTAVE) for i in range(first, last + 1)]  # segment i ends at tops[i]
    shrinks = [_dyadic(1 / top) for top in tops]
    of_mantissa, _ = minimax(_POWERS[root], _LOWEST, _HIGHEST, DEGREE)
    return (
        tops[:-1],
        [Piece((0.0, c)) for c in shrinks],
        [constant(scale * c ** (1 / root)) for c in shrinks],
        of_mantissa,
    )


def _dyadic(c: float) -> float:
    """Round c to six significant bits, which is exact in fixed point; x^p = (c x)^p c^-p holds for any c."""
    unit = 2.0 ** (math.floor(math.log2(c)) - 5)
    return round(c / unit) * unit


def reciprocal(x: Value, low: float, high: float, highest: float = 0.0) -> Value:
    """Return 1 / x for low <= x <= high; raises ValueError unless 0 < low < high.

    highest: the greatest ``high`` of all sizes of one model, if it has several: one form is chosen for all of them.
    """
    return _power(x, 1, low, high, 1.0, highest)


def rsqrt(x: Value, low: float, high: float, scale: float = 1.0) -> Value:
    """Return scale / sqrt(x) for low <= x <= high; raises ValueError unless 0 < low < high."""
    return _power(x, 2, low, high, scale)


def reciprocal_error() -> float:
    """Return the largest relative error of the range reduction's polynomial, without fixed-point rounding."""
    return _relative_error(1)


def rsqrt_error() -> float:
    return _relative_error(2)


def _relative_error(root: int) -> float:
    u = torch.linspace(_LOWEST, _HIGHEST, 10001, dtype=torch.float64)
    piece, _ = minimax(_POWERS[root], _LOWEST, _HIGHEST, DEGREE)
    return float((piece(u) * u ** (1 / root) - 1).abs().max())
