"""Softmax: divide e^(x - m) by its row sum, for an upper bound m of the row's maximum.

m cancels in the quotient, so it need not be the maximum, only close to it: at most SLACK above. Terms below e^-CLIP may
be left out before the sum, and nothing that is left out can ever enter it (PUMA's Algorithm 2 as printed clips after
the division, when (1 + x/32)^32 has grown again).
"""

from __future__ import annotations

import math

from approximations.division import reciprocal
from approximations.primitives import Value, bounded, exp_below, precise_matmul, row_bound

CLIP = 16.0
SLACK = 4.0
EXTRA = 4  # more fraction bits of what is divided by the sum, which may be e^-SLACK
LOWEST = 0.9 * math.exp(-SLACK)  # of a row's sum
KEPT = 14  # fraction bits of the values: one more than the scores have when they are opened, which moves terms more


def _exponentials(x: Value, longest: int) -> tuple[Value, Value]:
    """Return the terms, and the reciprocal of their sum.

    The sum is at least LOWEST, however many terms it has. The largest one is at least e^-SLACK - 1.5e-5 as the
    exponential computes it, with 2^-6 more slack if shares compare halves of the row. It is truncated then and loses
    less than a unit, which is 2^-12 at most. All others are products of integers that are not negative, and truncation
    makes no such number negative.
    """
    n = x.shape[-1]
    e = exp_below(x, row_bound(x, SLACK), EXTRA)
    total = bounded(e.sum(-1, keepdim=True), 0.0, float(n))
    return e, reciprocal(total, LOWEST, float(n), float(longest))


def softmax(x: Value, longest: int = 0) -> Value:
    """Return softmax over the last dimension.

    longest: the most entries of a row at any size of the model, if it has several. So all have the same primitives.
    """
    e, inverse = _exponentials(x, longest)
    return e * inverse


def attend(scores: Value, values: Value, longest: int = 0) -> Value:
    """Return softmax(scores) @ values, dividing after the product; ``longest`` as in ``softmax``.

    So a row takes as many multiplications as the head is wide, instead of as many as the row is long.
    """
    e, inverse = _exponentials(scores, longest)
    return precise_matmul(e, values, EXTRA, KEPT) * inverse
