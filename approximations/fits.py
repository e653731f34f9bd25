"""Polynomial fits in float64: minimax by the Remez exchange algorithm, and least squares under a distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from approximations.primitives import Piece

Function = Callable[[Tensor], Tensor]

_GRID = 4001
_ROUNDS = 40


@lru_cache(maxsize=128)
def minimax(function: Function, low: float, high: float, degree: int, *, relative: bool = False) -> tuple[Piece, float]:
    """Fit the polynomial of ``degree`` with the smallest maximal error on [low, high]; return it and that error.

    The polynomial is centred in the middle of the range. relative: minimize the error divided by the function, which
    must not vanish there.
    """
    centre, half = (low + high) / 2, (high - low) / 2
    grid = torch.cos(torch.linspace(torch.pi, 0, _GRID, dtype=torch.float64))
    target = function(centre + half * grid)
    basis = grid[:, None] ** torch.arange(degree + 1)
    if relative:
        basis, target = basis / target[:, None], torch.ones_like(target)
    nodes = torch.round(torch.linspace(0, _GRID - 1, degree + 2)).to(torch.int64)
    signs = (-1.0) ** torch.arange(degree + 2, dtype=torch.float64)
    best, smallest = torch.zeros(degree + 1, dtype=torch.float64), math.inf
    for _ in range(_ROUNDS):
        system = torch.cat([basis[nodes], signs[:, None]], dim=1)
        solution = torch.linalg.solve(system, target[nodes])
        coefficients = solution[:-1]
        error = target - basis @ coefficients
        if (largest := float(error.abs().max())) < smallest:  # rounding can make the exchange repeat itself
            best, smallest = coefficients, largest
        new = _alternation(error, degree + 2)
        if new is None or torch.equal(new, nodes):
            break
        nodes = new
    scaled = tuple(float(c) / half**j for j, c in enumerate(best))
    return Piece(scaled, centre), smallest


def _alternation(error: Tensor, count: int) -> Tensor | None:
    """Return the indices of ``count`` large extrema with alternating signs; None if the error has fewer."""
    change = torch.nonzero(torch.sign(error[1:]) != torch.sign(error[:-1])).flatten() + 1
    bounds = [0, *change.tolist(), len(error)]
    extrema = [a + int(error[a:b].abs().argmax()) for a, b in pairwise(bounds) if b > a]
    while len(extrema) > count:  # drop the weaker end, which keeps the signs alternating
        extrema.pop(0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1)
    return torch.tensor(extrema) if len(extrema) == count else None


def least_squares(function: Function, samples: Tensor, degree: int) -> tuple[Piece, float]:
    """Fit the polynomial of ``degree`` closest to a function on samples; return it and the root mean square error.

    samples: arguments as they occur (one dimension).
    """
    x = samples.to(torch.float64)
    scale = float(x.abs().max().clamp_min(1e-9))
    basis = (x[:, None] / scale) ** torch.arange(degree + 1)
    target = function(x)
    solution = torch.linalg.lstsq(basis, target[:, None]).solution.squeeze(-1)
    error = target - basis @ solution
    # round far below the error: the last digits differ from run to run, but a resumed training must repeat exactly
    unit = 2.0 ** (math.floor(math.log2(float(solution.abs().max().clamp_min(1e-30)))) - 30)
    coefficients = tuple(round(float(c) / unit) * unit / scale**j for j, c in enumerate(solution))
    return Piece(coefficients), float(error.square().mean().sqrt())
