"""Shapes, pieces and concatenation: operations that move values and compute nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from secure.capture.builder import Builder, Norm, Value, shape_of
from secure.capture.clear_operations import CLEAR_OPERATIONS
from secure.capture.graph import Node
from secure.capture.operation import operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol, concatenate


@operation("reshape", moves=True)
def reshape(x: Tensor, /, *, shape: Sequence[int]) -> Tensor:
    """Put the same entries into another shape."""
    return x.reshape(list(shape))


@reshape.aten("view.default", "reshape.default", "_unsafe_view.default")
def _(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    """Translate to a new shape, in which one size may be -1."""
    return b.reshape(x, tuple(torch.empty(shape_of(x), device="meta").reshape(list(shape)).shape))


@reshape.aten(
    "flatten.using_ints", "squeeze.default", "squeeze.dim", "squeeze.dims", "unflatten.int", "unsqueeze.default"
)
def _(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Translate other spellings of reshape; torch itself computes the new shape."""
    function = CLEAR_OPERATIONS[b.operation]
    return b.reshape(x, tuple(function(torch.empty(shape_of(x), device="meta"), *args, **kwargs).shape))


@reshape.lower
def _(to: Lowering, node: Node) -> Symbol:
    return to.symbol(node.inputs[0]).reshape(node.shape)


@operation("permute", moves=True)
def permute(x: Tensor, /, *, dims: Sequence[int]) -> Tensor:
    """Put the axes into another order."""
    return x.permute(list(dims))


@permute.aten("permute.default")
def _(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    return b.permute(x, dims)


@permute.aten("transpose.int", "swapaxes.default")
def _(b: Builder, x: Value, first: int, second: int) -> Value:
    rank = len(shape_of(x))
    return b.transpose(x, first % rank, second % rank)


@permute.aten("t.default", "numpy_T.default")
def _(b: Builder, x: Value) -> Value:
    """Reverse the order of all axes."""
    return b.permute(x, range(len(shape_of(x)))[::-1])


@permute.aten("mT.default")
def _(b: Builder, x: Value) -> Value:
    """Exchange the last two axes."""
    rank = len(shape_of(x))
    return b.transpose(x, rank - 2, rank - 1)


@permute.lower
def _(to: Lowering, node: Node) -> Symbol:
    return to.symbol(node.inputs[0]).permute(node.attrs["dims"])


@operation("expand", moves=True)
def expand(x: Tensor, /, *, shape: Sequence[int]) -> Tensor:
    """Broadcast to a shape."""
    return x.expand(list(shape))


@expand.aten("expand.default", "expand_as.default")
def _(b: Builder, x: Value, shape: Any, *, implicit: bool = False) -> Value:
    """Translate an expansion; a norm stays as it is, since it broadcasts by itself."""
    if isinstance(x, Norm):
        return x
    if not isinstance(shape, list | tuple):
        return b.expand(x, shape_of(shape))
    return b.expand(x, tuple(torch.empty(shape_of(x), device="meta").expand(list(shape)).shape))


@expand.lower
def _(to: Lowering, node: Node) -> Symbol:
    return to.symbol(node.inputs[0]).expand(node.shape)


@operation("slice", moves=True)
def slice_(x: Tensor, /, *, dim: int, start: int, stop: int, step: int) -> Tensor:
    """Take a range of an axis."""
    return x[(slice(None),) * dim + (slice(start, stop, step),)]


@slice_.aten("slice.Tensor", structural=True)
def _(b: Builder, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    axis = dim % len(shape_of(x))
    return b.slice(x, axis, *slice(start, end, step).indices(shape_of(x)[axis]))


@slice_.lower
def _(to: Lowering, node: Node) -> Symbol:
    a = node.attrs
    return to.symbol(node.inputs[0]).slice(a["dim"], a["start"], a["stop"], a["step"])


@rule("select.int", structural=True)
def select(b: Builder, x: Value, dim: int, index: int) -> Value:
    """Take one entry of an axis."""
    shape = shape_of(x)
    axis = dim % len(shape)
    start = index % shape[axis]
    return b.reshape(b.slice(x, axis, start, start + 1), shape[:axis] + shape[axis + 1 :])


@rule("unbind.int", structural=True)
def unbind(b: Builder, x: Value, dim: int = 0) -> list[Value]:
    """Take every entry of an axis."""
    return [select(b, x, dim, index) for index in range(shape_of(x)[dim % len(shape_of(x))])]


@rule("split.Tensor", structural=True)
def split(b: Builder, x: Value, width: int, dim: int = 0) -> list[Value]:
    """Split an axis into pieces of one width; the last may be narrower."""
    return _pieces(b, x, dim, [*range(0, shape_of(x)[dim % len(shape_of(x))], width)])


@rule("chunk.default", structural=True)
def chunk(b: Builder, x: Value, count: int, dim: int = 0) -> list[Value]:
    """Split an axis into at most ``count`` pieces of one width; the last may be narrower."""
    size = shape_of(x)[dim % len(shape_of(x))]
    return split(b, x, max(1, -(-size // count)), dim)


@rule("split_with_sizes.default", structural=True)
def split_with_sizes(b: Builder, x: Value, sizes: Sequence[int], dim: int = 0) -> list[Value]:
    """Split an axis into pieces of these widths."""
    return _pieces(b, x, dim, list(itertools.accumulate(sizes[:-1], initial=0)))


def _pieces(b: Builder, x: Value, dim: int, starts: Sequence[int]) -> list[Value]:
    axis = dim % len(shape_of(x))
    bounds = itertools.pairwise([*starts, shape_of(x)[axis]])
    return [b.slice(x, axis, start, stop) for start, stop in bounds]


@operation("cat", moves=True)
def cat(*parts: Tensor, dim: int) -> Tensor:
    """Concatenate along an axis."""
    return torch.cat(parts, dim)


@cat.aten("cat.default", "concat.default", "concatenate.default")
def concatenation(b: Builder, values: Iterable[Value], dim: int = 0) -> Value:
    """Concatenate without the empty parts."""
    found = list(values)
    parts = [value for value in found if shape_of(value) and 0 not in shape_of(value)] or found[:1]
    return b.shared("cat", *parts, dim=dim % len(shape_of(parts[0]))) if len(parts) > 1 else parts[0]


@cat.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Put zeros where the server's parts stand, such as a class token, and add those."""
    dim, parts = node.attrs["dim"], [(i, to.graph.nodes[i].shape) for i in node.inputs]
    known = [to.is_known(i) for i in node.inputs]
    symbols = [to.symbol(i) for (i, _), there in zip(parts, known, strict=True) if not there]
    joined = concatenate(symbols, dim) if len(symbols) > 1 else symbols[0]
    if not any(known):
        return joined
    runs, pieces, at = [], [], 0
    for (i, shape), there in zip(parts, known, strict=True):
        width = shape[dim]
        runs.append((-1, 0, width) if there else (at, 1, width))
        at += 0 if there else width
        pieces.append(
            to.known(i).to(torch.float64) if there else torch.zeros(shape, dtype=torch.float64, device=to.device)
        )
    last = max(i for i, there in zip(node.inputs, known, strict=True) if there)
    return joined.take(dim, runs) + to.weight(last, f".in%{to.numbers[node.id]}", torch.cat(pieces, dim))


@rule("stack.default")
def stack(b: Builder, values: Iterable[Value], dim: int = 0) -> Value:
    """Concatenate along a new axis."""
    parts = list(values)
    shape = shape_of(parts[0])
    axis = dim % (len(shape) + 1)
    return concatenation(b, [b.reshape(part, (*shape[:axis], 1, *shape[axis:])) for part in parts], axis)
