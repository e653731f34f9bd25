"""Minimax polynomial fits by the Remez exchange algorithm, in float64."""

from __future__ import annotations

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
def minimax(function: Function, low: float, high: float, degree: int) -> tuple[Piece, float]:
    """The polynomial of ``degree`` on [low, high] with the smallest maximal error, about the middle, and that error."""
    centre, half = (low + high) / 2, (high - low) / 2
    grid = torch.cos(torch.linspace(torch.pi, 0, _GRID, dtype=torch.float64))
    target = function(centre + half * grid)
    nodes = torch.round(torch.linspace(0, _GRID - 1, degree + 2)).to(torch.int64)
    signs = (-1.0) ** torch.arange(degree + 2, dtype=torch.float64)
    coefficients = torch.zeros(degree + 1, dtype=torch.float64)
    for _ in range(_ROUNDS):
        system = torch.cat([grid[nodes, None] ** torch.arange(degree + 1), signs[:, None]], dim=1)
        solution = torch.linalg.solve(system, target[nodes])
        coefficients = solution[:-1]
        error = target - (grid[:, None] ** torch.arange(degree + 1)) @ coefficients
        new = _alternation(error, degree + 2)
        if new is None or torch.equal(new, nodes):
            break
        nodes = new
    scaled = tuple(float(c) / half**j for j, c in enumerate(coefficients))
    return Piece(scaled, centre), float(error.abs().max())


def _alternation(error: Tensor, count: int) -> Tensor | None:
    """Indices of ``count`` extrema of alternating sign, the largest run there is; None if the error has fewer."""
    change = torch.nonzero(torch.sign(error[1:]) != torch.sign(error[:-1])).flatten() + 1
    bounds = [0, *change.tolist(), len(error)]
    extrema = [a + int(error[a:b].abs().argmax()) for a, b in pairwise(bounds) if b > a]
    while len(extrema) > count:  # drop the weaker end, which keeps the signs alternating
        extrema.pop(0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1)
    return torch.tensor(extrema) if len(extrema) == count else None
