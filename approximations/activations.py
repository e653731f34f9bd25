"""Activations as piecewise polynomials; all comparisons of one activation come from one opening.

GeLU has three forms. "cubic", the default: relu(x) - bump(|x|), where the bump is two minimax cubics on |x| < 3.7
(maximal error 5.6e-4, five comparisons; cubics keep all 16 fraction bits of x in a 64-bit ring). "quartic": one minimax
quartic on |x| < 3.25 (maximal error 1.9e-3, three comparisons). "puma": the published segments (arXiv 2307.12533,
eq. 2; maximal error 2.0e-2), for comparison.
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

_GELU_FITS = {"cubic": ((0.0, 1.5, 3.7), 3), "quartic": ((0.0, 3.25), 4)}
GELU_FORMS = (*_GELU_FITS, "puma")


def relu(x: Value) -> Value:
    return piecewise(x, [0.0], [ZERO, IDENTITY])


def absolute(x: Value) -> Value:
    return piecewise(x, [0.0], [Piece((0.0, -1.0)), IDENTITY])


def _bump(a: Tensor) -> Tensor:
    """Return relu(x) - gelu(x) as a function of a = |x|."""
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
    minus = [Piece(tuple(-c for c in p.coefficients), p.centre) for p in _segments(bump, knots, degree)]
    right = [_plus_identity(p) for p in minus]
    left = [p.mirrored() for p in reversed(minus)]
    all_knots = [-k for k in reversed(knots[1:])] + list(knots)
    return piecewise(x, all_knots, [ZERO, *left, *right, IDENTITY])


def _plus_identity(p: Piece) -> Piece:
    """Return the piece x + p(x)."""
    c = list(p.coefficients)
    return Piece((c[0] + p.centre, c[1] + 1.0, *c[2:]), p.centre)


def _segments(function: Callable[[Tensor], Tensor], knots: tuple[float, ...], degree: int) -> list[Piece]:
    return [minimax(function, a, b, degree)[0] for a, b in pairwise(knots)]


def tanh(x: Value) -> Value:
    """Return tanh(x), an odd function: cubics between 0, 0.7, 1.5, 2.6 and 4.5, their mirror images, -1 or 1 beyond."""
    knots = (0.0, 0.7, 1.5, 2.6, 4.5)
    right = _segments(torch.tanh, knots, 3)
    left = [p.mirrored(-1.0) for p in reversed(right)]
    all_knots = [-k for k in reversed(knots[1:])] + list(knots)
    return piecewise(x, all_knots, [constant(-1.0), *left, *right, constant(1.0)])


def sigmoid(x: Value) -> Value:
    """Return the sigmoid of x, as (1 + tanh(x / 2)) / 2."""
    return tanh(x * 0.5) * 0.5 + 0.5


def _silu_bump(a: Tensor) -> Tensor:
    return a * torch.sigmoid(-a)


def silu(x: Value) -> Value:
    """Return x sigmoid(x) = relu(x) - |x| sigmoid(-|x|), where cubics between 0, 2, 4.5 and 9 replace the last term.

    Maximal error 1.2e-3 (measured in tests).
    """
    return _even_bump(x, _silu_bump, (0.0, 2.0, 4.5, 9.0), 3)
