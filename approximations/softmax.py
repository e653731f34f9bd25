"""Softmax: subtract the row maximum, clip, exponentiate, then divide by the row sum.

y = max - x is clipped at CLIP *before* the row sum: e^-CLIP is below one unit, and nothing that the clip removes can
ever enter the sum (PUMA's Algorithm 2 as printed clips after the division, when (1 + x/32)^32 has grown again).
The maximum may be too small by TOLERANCE, which does not change softmax as long as y stays positive; hence TOLERANCE
is added to y.
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
    """Return softmax over the last dimension."""
    e, inverse = _exponentials(x)
    return e * inverse


def attend(scores: Value, values: Value) -> Value:
    """Return softmax(scores) @ values, dividing after the product.

    So a row takes as many multiplications as the head is wide, instead of as many as the row is long.
    """
    e, inverse = _exponentials(scores)
    return (e @ values) * inverse
