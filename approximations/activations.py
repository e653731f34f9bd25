"""Activations as piecewise polynomials; all comparisons of one activation come from one opening.

GeLU has three forms. "cubic", the default: relu(x) - bump(|x|), where the bump is two minimax cubics on |x| < 3.7
(maximal error 5.6e-4, five comparisons). "quartic": one minimax quartic on |x| < 3.27 (maximal error 2.0e-3, three
comparisons). "puma": the published segments (arXiv 2307.12533, eq. 2; maximal error 2.0e-2), for comparison.

Comparisons are cheaper if they may be coarse. So neighbouring pieces overlap: each is fitted beyond its ends by half
of TOLERANCE, and the knots are compared half of it higher. An x within TOLERANCE below such a knot may count as above
it, and both pieces hold there: all maximal errors include it. ReLU and the absolute value cannot be fitted like that.
Their pieces meet at an angle, so the tolerance itself is (half of) their error: they have one of 2^-10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from approximations import puma
from approximations.fits import minimax
from approximations.primitives import IDENTITY, ZERO, Piece, Value, constant, piecewise

TOLERANCE = 2.0**-4
"""The length of the overlap of neighbouring pieces."""

_AT_AN_ANGLE = 2.0**-10

_GELU_FITS = {"cubic": ((0.0, 1.55, 3.7), 3), "quartic": ((0.0, 3.27), 4)}
GELU_FORMS = (*_GELU_FITS, "puma")


def relu(x: Value) -> Value:
    """Return max(x, 0). Under the protocol it may keep an x in [-2^-10, 0), so its error is at most 2^-10."""
    return piecewise(x, [0.0], [ZERO, IDENTITY], _AT_AN_ANGLE)


def absolute(x: Value) -> Value:
    return piecewise(x, [0.0], [Piece((0.0, -1.0)), IDENTITY], _AT_AN_ANGLE)


def _bump(a: Tensor) -> Tensor:
    """Return relu(x) - gelu(x) as a function of a = |x|, continued smoothly below 0."""
    return 0.5 * a * torch.erfc(a / math.sqrt(2))


def gelu(x: Value, form: str = "cubic") -> Value:
    """Return x Phi(x) in one of GELU_FORMS; raises ValueError for another form."""
    if form == "puma":
        return puma.gelu(x)
    if form not in _GELU_FITS:
        raise ValueError(f"unknown GeLU form {form!r}\nhint: one of {', '.join(GELU_FORMS)}")
    return _even_bump(x, _bump, *_GELU_FITS[form])


def _even_bump(x: Value, bump: Callable[[Tensor], Tensor], knots: tuple[float, ...], degree: int) -> Value:
    """Return relu(x) - bump(|x|), where the bump is zero beyond the last knot."""
    fits, error = _segments(bump, knots, degree)
    minus = [Piece(tuple(-c for c in p.coefficients), p.centre) for p in fits]
    right = [_plus_identity(p) for p in minus]
    left = [p.mirrored() for p in reversed(minus)]
    return _overlapping(x, knots, [ZERO, *left, *right, IDENTITY], error)


def _overlapping(x: Value, knots: tuple[float, ...], pieces: list[Piece], error: float) -> Value:
    """Return the pieces between ``knots`` and their mirror images, each of which overlaps its neighbours."""
    mirrored = [-k for k in reversed(knots[1:])]
    return piecewise(x, [k + TOLERANCE / 2 for k in (*mirrored, *knots)], pieces, TOLERANCE, error=error)


def _plus_identity(p: Piece) -> Piece:
    """Return the piece x + p(x)."""
    c = list(p.coefficients)
    return Piece((c[0] + p.centre, c[1] + 1.0, *c[2:]), p.centre)


def _segments(function: Callable[[Tensor], Tensor], knots: tuple[float, ...], degree: int) -> tuple[list[Piece], float]:
    """Fit every segment, and beyond its ends as far as a comparison may miss a knot; return the largest error too."""
    reach = TOLERANCE / 2
    fits = [minimax(function, a - reach, b + reach, degree) for a, b in pairwise(knots)]
    return [piece for piece, _ in fits], max(error for _, error in fits)


def tanh(x: Value) -> Value:
    """Return tanh(x), an odd function: cubics between 0, 0.6, 1.45, 2.5 and 4.6, their mirror images, -1 or 1 beyond.

    Maximal error 2.5e-4 (measured in tests).
    """
    knots = (0.0, 0.6, 1.45, 2.5, 4.6)
    right, error = _segments(torch.tanh, knots, 3)
    left = [p.mirrored(-1.0) for p in reversed(right)]
    return _overlapping(x, knots, [constant(-1.0), *left, *right, constant(1.0)], error)


def sigmoid(x: Value) -> Value:
    """Return the sigmoid of x, as (1 + tanh(x / 2)) / 2."""
    return tanh(x * 0.5) * 0.5 + 0.5


def _silu_bump(a: Tensor) -> Tensor:
    return a * torch.sigmoid(-a)


def silu(x: Value) -> Value:
    """Return x sigmoid(x) = relu(x) - |x| sigmoid(-|x|), with cubics between 0, 1.9, 4.2 and 9.4 for the last term.

    Maximal error 8.1e-4 (measured in tests).
    """
    return _even_bump(x, _silu_bump, (0.0, 1.9, 4.2, 9.4), 3)
