"""Choices among the entries of an axis: arg-max, arg-min, and the k largest or smallest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from approximations.primitives import by_size, top_indices, top_of, top_values
from secure.capture.builder import Builder, Value, scalar_of, shape_of
from secure.capture.graph import Node
from secure.capture.operation import OPERATIONS, operation, rule
from secure.errors import InvalidInput, UnsupportedOperation
from secure.lowering.lower import Lowering
from secure.lowering.ranges import dyadic
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


@operation("largest_of", compares=True, takes_integers=True)
def largest_of(x: Tensor, numbers: Tensor, /, *, count: int) -> Tensor:
    """Take the whole numbers that stand where the ``count`` largest of the last axis of x do."""
    return numbers.gather(-1, by_size(x, count))


@largest_of.lower
def _(to: Lowering, node: Node) -> Symbol:
    x, numbers = node.inputs
    found: Symbol = top_of(to.symbol(x), to.symbol(numbers), int(node.attrs["count"]), TOLERANCE)
    return _bounded(to, node, found)


@operation("rows_at", takes_integers=True)
def rows_at(places: Tensor, x: Tensor, /) -> Tensor:
    """Take rows of x, (..., n, width), at places (..., count) that an arg-max or a top-k found: (..., count, width)."""
    return x.gather(-2, places[..., None].expand(*places.shape, x.shape[-1]))


@rows_at.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Multiply by the unit vectors of the places, which have no fraction bits."""
    places, x = node.inputs
    rows = to.graph.nodes[x].shape[-2]
    check_places(to, node, places, rows)
    most = 2.0 ** math.ceil(math.log2(max(to.seen.magnitude[x] * to.margin, 2.0**-16)))  # any row may be taken
    return (to.symbol(places).units(rows) @ to.symbol(x)).bounded(-most, most)


@operation("renumbered", takes_integers=True)
def renumbered(x: Tensor, offsets: Tensor | None = None, /, *, step: int = 1) -> Tensor:
    """Compute x * step + offsets of whole numbers that nobody knows; everybody knows the step and the offsets."""
    moved = x * step
    return moved if offsets is None else moved + offsets


@renumbered.lower
def _(to: Lowering, node: Node) -> Symbol:
    x = to.symbol(node.inputs[0]) * float(node.attrs.get("step", 1))
    if len(node.inputs) > 1:
        x = x.expand(node.shape) + to.weight(node.inputs[1])
    return _bounded(to, node, x)


def _reach(to: Lowering, i: int) -> tuple[float, float]:
    """Return the least and the greatest value that whole numbers may have: any place may be found.

    Raises UnsupportedOperation for those of an operation that makes none.
    """
    node = to.graph.nodes[i]
    low, high = 0.0, 0.0
    if node.op in ("largest_at", "sampled"):
        high = to.graph.nodes[node.inputs[0]].shape[-1] - 1.0
    elif node.op == "renumbered":
        ends = [end * float(node.attrs.get("step", 1)) for end in _reach(to, node.inputs[0])]
        known = to.known(node.inputs[1]) if len(node.inputs) > 1 else torch.zeros(1)
        known = torch.zeros(1) if known.is_meta else known  # shapes alone: costs are counted
        low, high = min(ends) + float(known.min()), max(ends) + float(known.max())
    elif node.op == "largest_of":
        low, high = _reach(to, node.inputs[1])
    elif OPERATIONS[node.op].moves:
        lows, highs = zip(*(_reach(to, operand) for operand in node.inputs), strict=True)
        low, high = min(*lows, 0.0), max(*highs, 0.0)  # a move may put zeros beside them
    else:
        raise UnsupportedOperation(f"{node.path or 'model'}: the range of whole numbers from {node.op} is not known")
    return low, high


def _bounded(to: Lowering, node: Node, x: Symbol) -> Symbol:
    low, high = _reach(to, node.id)
    return x.bounded(low, max(high, low + 1.0))


def check_places(to: Lowering, node: Node, places: int, entries: int) -> None:
    """Raise InvalidInput if places that nobody knows may lie beyond what is looked up, where torch would fail."""
    low, high = _reach(to, places)
    if low < 0 or high >= entries:
        raise InvalidInput(
            f"{node.path or 'model'}: places from {low:.0f} to {high:.0f} among {entries} entries",
            "look up a table that has an entry for every place",
        )


def is_whole(value: Value) -> bool:
    """True of whole numbers that nobody knows, such as an arg-max finds."""
    return isinstance(value, Node) and value.visibility == "shared" and value.dtype == "int"


def are_public(value: Value) -> bool:
    """True of whole numbers that everybody knows."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, int) and not isinstance(value, bool)


def is_step(value: Value) -> bool:
    """True of a number that everybody knows, by which whole numbers are multiplied exactly (see ``dyadic``)."""
    number = scalar_of(value) if are_public(value) else None
    if number is None or shape_of(value) != ():
        return False
    m, q = dyadic(number)
    return abs(number) < 2.0**31 and m * 2.0**-q == number


def gathered(b: Builder, x: Value, axis: int, index: Node) -> Value:
    """Translate ``x.gather(axis, index)`` where nobody knows the index.

    It is rows at places, an index that is the same for all entries of the last axis; or whole numbers x at the places
    of the largest of other values.
    """
    shape = shape_of(x)
    secret = isinstance(x, Node) and x.visibility == "shared"
    if secret and axis == len(shape) - 2 and index.op == "expand" and not is_whole(x):
        places, wanted = b.nodes[index.inputs[0]], shape_of(index)
        if shape_of(places) == (*wanted[:-1], 1) and (*wanted[:-2], wanted[-1]) == (*shape[:-2], shape[-1]):
            return b.shared("rows_at", b.reshape(places, shape_of(index)[:-1]), x)
    if axis == len(shape) - 1 and index.op == "largest_at" and is_whole(x):
        values = b.nodes[index.inputs[0]]
        if values.shape == shape:
            return b.shared("largest_of", values, x, count=index.attrs["count"])
    b.unsupported(
        "gather by an index that nobody knows takes rows at the places of a top-k (x.gather(-2, places[..., None]"
        ".expand(...))), or whole numbers that stand beside the values that it chose from"
    )


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
