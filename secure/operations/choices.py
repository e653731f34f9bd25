"""Choices among the entries of an axis: arg-max, arg-min, and the k largest or smallest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from approximations.primitives import by_size, top_indices, top_values
from secure.capture.builder import Builder, Value, shape_of
from secure.capture.graph import Node
from secure.capture.operation import operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol

TOLERANCE = 2.0**-10
"""By how much an entry may be smaller than another one that is chosen after it."""


@operation("largest_at", compares=True)
def largest_at(x: Tensor, /, *, count: int) -> Tensor:
    """Find where the ``count`` largest of the last axis stand; of equal ones the first comes first."""
    return by_size(x, count)


@largest_at.lower
def _(to: Lowering, node: Node) -> Symbol:
    result: Symbol = top_indices(to.symbol(node.inputs[0]), int(node.attrs["count"]), TOLERANCE)
    return result


@operation("largest", compares=True)
def largest(x: Tensor, /, *, count: int) -> Tensor:
    """Take the ``count`` largest of the last axis, in descending order."""
    return x.gather(-1, by_size(x, count))


@largest.lower
def _(to: Lowering, node: Node) -> Symbol:
    result: Symbol = top_values(to.symbol(node.inputs[0]), int(node.attrs["count"]), TOLERANCE)
    return result


@operation("real", takes_integers=True)
def real(x: Tensor, /) -> Tensor:
    """Take an integer as a real number, with which further operations compute."""
    return x.to(torch.get_default_dtype())


@real.lower
def _(to: Lowering, node: Node) -> Symbol:
    return to.symbol(node.inputs[0]).real()


@rule("argmax.default")
def argmax(b: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    """Find the largest entry of an axis; without an axis, of all entries in order."""
    shape = shape_of(x)
    if dim is None:
        return b.reshape(
            b.shared("largest_at", b.reshape(x, (math.prod(shape),)), count=1), (1,) * len(shape) * keepdim
        )
    axis = dim % len(shape)
    found = b.transpose(b.shared("largest_at", b.transpose(x, axis, len(shape) - 1), count=1), axis, len(shape) - 1)
    return found if keepdim else b.reshape(found, shape[:axis] + shape[axis + 1 :])


@rule("argmin.default")
def argmin(b: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    """Find the smallest entry of an axis."""
    return argmax(b, b.times(x, -1.0), dim, keepdim)


@rule("topk.default")
def topk(b: Builder, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[Value]:
    """Find the k largest or smallest entries of an axis and where they stand, always in order."""
    last = len(shape_of(x)) - 1
    axis = dim % (last + 1)
    if not 1 <= k <= shape_of(x)[axis]:
        b.unsupported(f"k from 1 to the {shape_of(x)[axis]} entries of the axis is supported")
    moved = b.transpose(x if largest else b.times(x, -1.0), axis, last)
    values, places = (b.transpose(b.shared(op, moved, count=k), axis, last) for op in ("largest", "largest_at"))
    return [values if largest else b.times(values, -1.0), places]
