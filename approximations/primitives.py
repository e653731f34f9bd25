"""The primitives that approximations are made of, on tensors and on symbolic values alike.

A symbolic value offers ``+ - * @`` with its like and with Python numbers, ``sum``, ``square``, ``shape``, and the
methods that the functions here call when their argument is not a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Value = Any  # a Tensor or a symbolic value; the functions here are generic over both


@dataclass(frozen=True)
class Piece:
    """sum_j coefficients[j] (x - centre)^j on one segment. ``Piece(())`` is zero."""

    coefficients: tuple[float, ...]
    centre: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for c in reversed(self.coefficients):
            out = out * (x - self.centre) + c
        return out

    def mirrored(self, sign: float = 1.0) -> Piece:
        """The piece q with q(x) = sign * p(-x)."""
        return Piece(tuple(sign * c * (-1) ** j for j, c in enumerate(self.coefficients)), -self.centre)


ZERO = Piece(())
IDENTITY = Piece((0.0, 1.0))


def constant(value: float) -> Piece:
    return Piece((value,))


def piecewise(
    x: Value, knots: Sequence[float], pieces: Sequence[Piece], tolerance: float = 2**-8, extra_bits: int = 0
) -> Value:
    """pieces[i](x) where knots[i-1] <= x < knots[i]; one piece more than knots, knots ascending.

    Under the protocol an x less than ``tolerance`` below a knot may be taken for one above it; ``extra_bits`` as in
    ``precise_product``.

    Under the protocol the knots cost one comparison each, all from one opening of x, and functions of the same x
    share them.
    """
    if len(pieces) != len(knots) + 1 or list(knots) != sorted(knots):
        raise ValueError(f"{len(knots)} ascending knots take {len(knots) + 1} pieces, got {len(pieces)}")
    if not isinstance(x, Tensor):
        return x.piecewise(tuple(knots), tuple(pieces), tolerance, extra_bits)
    out = pieces[0](x)
    for knot, piece in zip(knots, pieces[1:], strict=True):
        out = torch.where(x >= knot, piece(x), out)
    return out


def exp_neg(x: Value) -> Value:
    """e^-x for 0 <= x < 16."""
    return torch.exp(-x) if isinstance(x, Tensor) else x.exp_neg()


def maximum(x: Value, tolerance: float) -> Value:
    """m with max - tolerance <= m <= max over the last dimension (kept with length one)."""
    return x.amax(-1, keepdim=True) if isinstance(x, Tensor) else x.maximum(tolerance)


def bounded(x: Value, low: float, high: float) -> Value:
    """x, of which the caller knows that it lies in [low, high] whatever the calibration inputs showed."""
    return x if isinstance(x, Tensor) else x.bounded(low, high)


def precise_product(x: Value, y: Value, extra_bits: int) -> Value:
    """x * y kept with ``extra_bits`` more fraction bits than usual, for results well below one."""
    return x * y if isinstance(x, Tensor) else x.precise_product(y, extra_bits)
