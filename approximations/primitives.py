"""The primitive operations from which approximations are built, for tensors and for symbolic values.

A symbolic value offers ``+ - * @`` with other symbolic values and with Python numbers, ``sum``, ``square``, ``shape``,
and the methods that the functions here call if their argument is not a tensor.
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
    """The polynomial sum_j coefficients[j] (x - centre)^j on one segment. ``Piece(())`` is zero."""

    coefficients: tuple[float, ...]
    centre: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for c in reversed(self.coefficients):
            out = out * (x - self.centre) + c
        return out

    def mirrored(self, sign: float = 1.0) -> Piece:
        """Return the piece q with q(x) = sign * p(-x)."""
        return Piece(tuple(sign * c * (-1) ** j for j, c in enumerate(self.coefficients)), -self.centre)


ZERO = Piece(())
IDENTITY = Piece((0.0, 1.0))


def constant(value: float) -> Piece:
    return Piece((value,))


def piecewise(
    x: Value,
    knots: Sequence[float],
    pieces: Sequence[Piece],
    tolerance: float = 2**-8,
    extra_bits: int = 0,
    error: float = 0.0,
) -> Value:
    """Return pieces[i](x) for knots[i-1] <= x < knots[i].

    There is one piece more than knots, and knots ascend, else ValueError. Under the protocol each knot costs one
    comparison, all from one opening of x, and functions of the same x share them. An x less than ``tolerance`` below a
    knot may then count as above it. extra_bits: as in ``precise_product``. error: how far the pieces are from the
    function that they stand for; rounding may then add a quarter of it, where that is cheaper.
    """
    if len(pieces) != len(knots) + 1 or list(knots) != sorted(knots):
        raise ValueError(f"{len(knots)} ascending knots take {len(knots) + 1} pieces, got {len(pieces)}")
    if not isinstance(x, Tensor):
        return x.piecewise(tuple(knots), tuple(pieces), tolerance, extra_bits, error)
    out = pieces[0](x)
    for knot, piece in zip(knots, pieces[1:], strict=True):
        out = torch.where(x >= knot, piece(x), out)
    return out


def maximum(x: Value, tolerance: float) -> Value:
    """Return m with max - tolerance <= m <= max over the last dimension, which is kept with length one."""
    return x.amax(-1, keepdim=True) if isinstance(x, Tensor) else x.maximum(tolerance)


def top_indices(x: Value, count: int, tolerance: float) -> Value:
    """Return where the ``count`` largest entries of the last dimension stand, the largest first, as real numbers.

    Of equal ones, that which stands first comes first. Under the protocol an entry may stand before one that is larger
    by less than ``tolerance``.
    """
    return by_size(x, count).to(x.dtype) if isinstance(x, Tensor) else x.top_indices(count, tolerance)


def top_of(x: Value, numbers: Value, count: int, tolerance: float) -> Value:
    """Return the entries of ``numbers``, whole numbers in the shape of x, that stand where ``top_indices`` finds."""
    if isinstance(x, Tensor):
        return numbers.gather(-1, by_size(x, count))
    return x.top_of(numbers, count, tolerance)


def top_values(x: Value, count: int, tolerance: float) -> Value:
    """Return the entries of ``top_indices``; under the protocol each may be off by ``tolerance``."""
    return x.gather(-1, by_size(x, count)) if isinstance(x, Tensor) else x.top_values(count, tolerance)


def perturbed(x: Value, temperature: float, by: Value | None = None) -> Value:
    """Return x plus ``temperature``, or the secret ``by``, times independent Gumbel(0, 1) noise in the shape of x.

    Nobody knows the noise under the protocol. by: expands to the shape of x; ``temperature`` is not used then.
    """
    if isinstance(x, Tensor):
        return x - (temperature if by is None else by) * torch.empty_like(x).exponential_().log()
    return x.perturbed(temperature, by)


def by_size(x: Tensor, count: int) -> Tensor:
    """Return the positions of the ``count`` largest entries, of equal ones the first ones."""
    return x.sort(stable=True, dim=-1, descending=True).indices[..., :count]


def row_bound(x: Value, slack: float) -> Value:
    """Return m with max <= m <= max + slack over the last dimension, which is kept with length one."""
    return x.amax(-1, keepdim=True) if isinstance(x, Tensor) else x.row_bound(slack)


def exp_below(x: Value, bound: Value, extra_bits: int = 0) -> Value:
    """Return e^(x - bound) for x <= bound, which is broadcast; below e^-16 the result may be zero.

    extra_bits: as in ``precise_product``.
    """
    return torch.exp(x - bound) if isinstance(x, Tensor) else x.exp_below(bound, extra_bits)


def inverse_power(x: Value, root: int, low: float, high: float, scale: float, extra_bits: int) -> Value:
    """Return scale * x^(-1/root) for low <= x <= high, root 1 or 2; under the protocol from one opening of x.

    Exact for tensors; relative error 2^-15 under the protocol, and wrong outside of the range. extra_bits: as in
    ``precise_product``.
    """
    if isinstance(x, Tensor):
        return scale * (x.rsqrt() if root == 2 else x.reciprocal())
    return x.inverse_power(root, low, high, scale, extra_bits)


def bounded(x: Value, low: float, high: float) -> Value:
    """Return x, with the caller's promise that it lies in [low, high], whatever calibration observed."""
    return x if isinstance(x, Tensor) else x.bounded(low, high)


def precise_product(x: Value, y: Value, extra_bits: int) -> Value:
    """Return x * y with ``extra_bits`` more fraction bits than usual, for results well below one."""
    return x * y if isinstance(x, Tensor) else x.precise_product(y, extra_bits)


def precise_matmul(x: Value, y: Value, extra_bits: int, kept_bits: int) -> Value:
    """Return x @ y with ``extra_bits`` more fraction bits than usual; y is rounded to ``kept_bits`` before."""
    return x @ y if isinstance(x, Tensor) else x.precise_matmul(y, extra_bits, kept_bits)
