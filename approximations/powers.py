"""Forms without comparisons: polynomials, inverse powers by polynomials, and Power-Softmax.

``power`` computes x^-1 or x^-1/2 on a range [low, high] that its argument must not leave. It starts with a minimax
polynomial y of small relative error; then come ``steps`` corrections y (1 - e)^exponent with
e = 1 - x y^(-1/exponent), where the factor is replaced by its series up to e^3, so that an error of the order of e^4
remains. For x^-1 the new error is e^4 itself, and the first e is a polynomial of x, so that each e is known as soon as
the one before is opened. Outside of the range the result is wrong without notice, so models are trained to stay inside
(``secure.polynomial``).

Power-Softmax (Zimerman et al., arXiv 2410.09457) is x^p / sum x^p for even p. This form has weights w of the keys (zero
if masked, else one over the number of keys: the mean of the length-agnostic form):
    sum_j w_j x_j^p v_j / (eps + sum_j w_j x_j^p).
With a shift c the power is (1 + x/c)^p, and c = p makes it the limit form of the exponential: all-MiniLM-L6-v2 without
any training keeps a rank correlation of 0.95 (p = 4), 0.97 (6) and 0.98 (8) to its own similarities, and 0.1 without
the shift. 2Quad (MPCFormer, arXiv 2211.01452) is p = 2, c = 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from approximations.fits import minimax
from approximations.primitives import Piece, Value, bounded, piecewise

SERIES = {-1.0: (1.0, 1.0, 1.0, 1.0), -0.5: (1.0, 0.5, 0.375, 0.3125)}
"""The coefficients of (1 - e)^exponent, by exponent."""


def polynomial(x: Value, piece: Piece, extra_bits: int = 0) -> Value:
    """Return piece(x) for every x; all powers of x come from one opening.

    extra_bits: more fraction bits in the result of a piece that is no line, or fewer.
    """
    c = piece.coefficients
    if isinstance(x, Tensor) or len(c) > 2:
        return piece(x) if isinstance(x, Tensor) else piecewise(x, [], [piece], extra_bits=extra_bits)
    slope = c[1] if len(c) == 2 else 0.0
    return x * slope + (c[0] - slope * piece.centre)


def _inverse(x: Tensor) -> Tensor:
    return 1 / x


_ROOTS = {-1.0: _inverse, -0.5: torch.rsqrt}


def power(
    x: Value, exponent: float, low: float, high: float, degree: int = 3, steps: int = 0, scale: float = 1.0
) -> Value:
    """Return scale * x^exponent for low <= x <= high; exponent is -1 or -1/2. Relative error: ``power_error``.

    Raises ValueError unless 0 < low < high.
    """
    if not 0 < low < high:
        raise ValueError(f"a positive range is needed, got [{low:g}, {high:g}]")
    start, x = starting(exponent, low, high, degree), bounded(x, low, high)
    y = polynomial(x, start if steps else _times(start, scale))
    series = Piece(SERIES[exponent])
    e = _error(x, start) if exponent == -1.0 and steps else None
    for step in range(steps):
        last = step == steps - 1
        if e is None or exponent != -1.0:
            e = 1.0 - x * (y * y)
        y = y * polynomial(e, _times(series, scale) if last else series)
        if exponent == -1.0 and not last:  # 1 - x y is now e^4: no product of x and y to wait for
            e = polynomial(e, Piece((0.0, 0.0, 0.0, 0.0, 1.0)))
    return y


def starting(exponent: float, low: float, high: float, degree: int) -> Piece:
    """Return the polynomial with which ``power`` begins."""
    return minimax(_ROOTS[exponent], low, high, degree, relative=True)[0]


def _error(x: Value, start: Piece) -> Value:
    """Return 1 - x start(x), a polynomial of x itself, so that it comes from the same opening as start(x)."""
    c = start.coefficients
    product = [start.centre * low + high for low, high in zip((*c, 0.0), (0.0, *c), strict=True)]
    return polynomial(x, Piece((1.0 - product[0], *(-v for v in product[1:])), start.centre))


def _times(piece: Piece, scale: float) -> Piece:
    return Piece(tuple(scale * c for c in piece.coefficients), piece.centre)


def power_error(exponent: float, degree: int, low: float, high: float, steps: int = 0) -> float:
    """Return the largest relative error on the range, of the polynomials alone, without fixed-point rounding."""
    x = torch.exp(torch.linspace(math.log(low), math.log(high), 4001, dtype=torch.float64))
    return float((power(x, exponent, low, high, degree, steps) / x**exponent - 1).abs().max())


def steps_for(exponent: float, degree: int, low: float, high: float, error: float) -> int:
    """Return the number of corrections that bring the relative error to ``error``; raises ValueError if none do."""
    for steps in range(5):
        if power_error(exponent, degree, low, high, steps) <= error:
            return steps
    raise ValueError(
        f"no polynomial form of x^{exponent:g} on [{low:g}, {high:g}] reaches a relative error of {error:g}\n"
        "hint: train the model with a stronger range loss, or compile with comparisons"
    )


def power_scores(scores: Value, p: int, shift: float = 0.0, scale: float = 1.0) -> Value:
    """Return (1 + scale scores / shift)^p, or (scale scores)^p without a shift, for even p.

    It takes one opening up to p = 4, two above.
    """
    pieces = power_pieces(p, shift, scale)
    if isinstance(scores, Tensor):
        return _to_the(p, scores * (scale / shift) + 1 if shift else scores * scale)
    for piece in pieces:
        scores = polynomial(scores, piece)
    return scores


def _to_the(p: int, x: Tensor) -> Tensor:
    """Return x^p for even p, by products: a general power takes several times as long."""
    square = x * x
    return square if p == 2 else square * square if p == 4 else square * _to_the(p - 2, x)


def power_pieces(p: int, shift: float, scale: float = 1.0) -> list[Piece]:
    """Return the power of ``power_scores`` as polynomials to apply one after the other.

    64 bits hold the fourth power of a fixed-point number precisely enough, but not the sixth: that is the square of the
    third. Raises ValueError unless p is even and positive.
    """
    if p < 2 or p % 2:
        raise ValueError(f"the power of Power-Softmax is even and positive, got {p}")
    first = p if p <= 4 else p // 2
    pieces = [Piece((*(0.0,) * first, (scale / (shift or 1.0)) ** first), -shift / scale)]
    return pieces if p == first else [*pieces, Piece((0.0, 0.0, 1.0))]


def stable_powers(scores: Tensor, weights: Tensor, p: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the weighed powers of each row divided by that of the largest base, and the magnitude of that base."""
    base = 1 + scores / shift if shift else scores
    largest = base.detach().abs().amax(-1, keepdim=True).clamp_min(1e-6)
    return _to_the(p, base / largest) * weights, largest


def power_attend(
    scores: Tensor, values: Tensor, weights: Tensor, p: int, eps: float, shift: float = 0.0, *, stable: bool = False
) -> Tensor:
    """Return Power-Softmax attention with an exact division, as training uses it.

    scores: (..., T, L); values: (..., L, d); weights: (..., 1 or T, L), zero for masked keys, adding up to one.
    stable: divide the base of the power by its largest magnitude first, and eps accordingly; this changes nothing but
    avoids overflow.
    """
    if stable:
        e, largest = stable_powers(scores, weights, p, shift)
        return (e @ values) / (eps / _to_the(p, largest) + e.sum(-1, keepdim=True))
    e = torch.as_tensor(power_scores(scores, p, shift)) * weights
    return (e @ values) / (eps + e.sum(-1, keepdim=True))
