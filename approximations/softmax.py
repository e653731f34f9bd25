"""Softmax: subtract the row maximum, clip, exponentiate, then divide by the row sum.

y = max - x is clipped at CLIP *before* the row sum: e^-CLIP is below one unit, and nothing that the clip removes can
ever enter the sum (PUMA's Algorithm 2 as printed clips after the division, where (1 + x/32)^32 has grown again).
The maximum may be short by TOLERANCE, which softmax does not see, as long as y stays positive: hence the offset.
"""

from __future__ import annotations

import math

from approximations.division import reciprocal
from approximations.primitives import IDENTITY, Value, bounded, constant, exp_neg, maximum, piecewise

CLIP = 15.5
TOLERANCE = 0.125


def _exponentials(x: Value) -> tuple[Value, Value]:
    y = maximum(x, TOLERANCE) - x + TOLERANCE
    e = exp_neg(piecewise(y, [CLIP], [IDENTITY, constant(CLIP)]))
    # the largest term is at least e^(-2 TOLERANCE), the smallest sum one such term
    n = x.shape[-1]
    total = bounded(e.sum(-1, keepdim=True), 0.0, float(n))
    return e, reciprocal(total, math.exp(-2 * TOLERANCE) - 0.01, float(n))


def softmax(x: Value) -> Value:
    """Over the last dimension."""
    e, inverse = _exponentials(x)
    return e * inverse


def attend(scores: Value, values: Value) -> Value:
    """softmax(scores) @ values, dividing after the product:
    a head's width of products a row instead of a row's length.
    """
    e, inverse = _exponentials(scores)
    return (e @ values) * inverse
