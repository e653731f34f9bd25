"""The approximations of PUMA (Dong et al., arXiv 2307.12533) with the published constants, for comparison with ours.

The paper assumes protocols for maximum, reciprocal and inverse square root; here ours are used. Two places depart from
the printed text. The clip at T_EXP comes *before* the row sum, because (1 - y/32)^32 grows again for y above 64
(Algorithm 2 as printed clips after the division). SiLU, for which the paper has no formula, is that of the authors'
LLaMA example. The paper has no form of RMSNorm: Algorithm 3 without its mean is the same as ours.
"""

from __future__ import annotations

import math

from approximations.division import reciprocal
from approximations.norms import rms_norm_factors
from approximations.primitives import IDENTITY, ZERO, Piece, Value, bounded, maximum, piecewise, precise_product

T_EXP = -14.0
SQUARINGS = 5
EPS = 1e-6
TOLERANCE = 0.125  # by how much the maximum may be too small
EXTRA_BITS = 2  # more fraction bits for the powers, as five squarings enlarge rounding 31 times; two bits cost no byte

_GELU = (
    ZERO,
    Piece((-0.5054031199708174, -0.42226581151983866, -0.11807612951181953, -0.011034134030615728)),
    Piece((0.008526321541038084, 0.5, 0.3603292692789629, 0.0, -0.037688200365904236, 0.0, 0.0018067462606141187)),
    IDENTITY,
)
_SILU = (
    ZERO,
    Piece((-0.3067541139982155, -0.0819767021525476, -0.0055465625580307)),
    Piece((0.0085064025895951, 0.5, 0.2281430841728270, 0.0, -0.011113046708173, 0.0, 0.0002743776353465)),
    IDENTITY,
)


GELU_ERROR, SILU_ERROR = 2.0e-2, 7.2e-2


def gelu(x: Value) -> Value:
    """Return GeLU by equation 2. The largest error is GELU_ERROR, at the knot 3."""
    return piecewise(x, [-4.0, -1.95, 3.0], _GELU, error=GELU_ERROR)


def silu(x: Value) -> Value:
    """Return SiLU. The largest error is SILU_ERROR, at the knot 4."""
    return piecewise(x, [-8.0, -4.0, 4.0], _SILU, error=SILU_ERROR)


def exp_neg(y: Value) -> Value:
    """Return (1 - y/32)^32 instead of e^-y, and zero from y = 14 on, for y >= -TOLERANCE. Largest error 8.5e-3.

    Base and clip are one piecewise function with one comparison. The comparison may be coarse: from y = 12 on the power
    is below 3e-7.
    """
    share = 2.0**-SQUARINGS
    base = piecewise(y, [-T_EXP], [Piece((1.0, -share)), ZERO], 2.0, EXTRA_BITS)
    power = bounded(base, 0.0, 1.0 + TOLERANCE * share)
    for squaring in range(SQUARINGS):
        power = precise_product(power, power, EXTRA_BITS if squaring < SQUARINGS - 1 else 0)
    return power


def _exponentials(x: Value, longest: int) -> tuple[Value, Value]:
    """Return the powers of a row and the reciprocal of their sum, by Algorithm 2."""
    e = exp_neg(maximum(x, TOLERANCE) - x + EPS)
    n = x.shape[-1]
    total = bounded(e.sum(-1, keepdim=True), 0.0, n * math.exp(TOLERANCE))
    most = math.exp(TOLERANCE)
    return e, reciprocal(total, 0.99, n * most, longest * most)


def softmax(x: Value, longest: int = 0) -> Value:
    """Return softmax over the last dimension; ``longest`` as in our own form."""
    e, inverse = _exponentials(x, longest)
    return e * inverse


def attend(scores: Value, values: Value, longest: int = 0) -> Value:
    """Return softmax(scores) @ values; as in our own form, the division comes after the product."""
    e, inverse = _exponentials(scores, longest)
    return (e @ values) * inverse


def layer_norm(x: Value, weight: Value, bias: Value, eps: float, low: float, high: float) -> Value:
    """Return LayerNorm over the last dimension by Algorithm 3.

    It takes one inverse square root of the sum of squares, scaled by sqrt(n). low, high: the range of the variance.
    """
    rows, scale = layer_norm_factors(x, eps, low, high)
    return rows * scale * weight + bias


def layer_norm_factors(x: Value, eps: float, low: float, high: float) -> tuple[Value, Value]:
    """Return the rows and the column whose product is LayerNorm without weight and bias."""
    return rms_norm_factors(x - x.mean(-1, keepdim=True), eps, low, high)
