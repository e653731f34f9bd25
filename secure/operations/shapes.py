"""Translation rules for shapes, pieces and selections; see `secure.capture.rules`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from secure.capture.builder import Builder, Norm, Value, scalar_of, shape_of
from secure.capture.clear_operations import CLEAR_OPERATIONS
from secure.capture.graph import MASKED, Node
from secure.capture.rules import STRUCTURAL, additive, call, rule


@rule("view.default", "reshape.default", "_unsafe_view.default")
def reshape(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    """A new shape, in which one size may be -1."""
    return b.reshape(x, tuple(torch.empty(shape_of(x), device="meta").reshape(list(shape)).shape))


@rule("flatten.using_ints", "squeeze.default", "squeeze.dim", "squeeze.dims", "unflatten.int", "unsqueeze.default")
def shape_only(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Operations that change the shape only."""
    function = CLEAR_OPERATIONS[b.operation]
    return b.reshape(x, tuple(function(torch.empty(shape_of(x), device="meta"), *args, **kwargs).shape))


@rule("permute.default", "transpose.int", "swapaxes.default", "t.default", "numpy_T.default", "mT.default")
def permute(b: Builder, x: Value, *dims: Any) -> Value:
    """Permutations of axes."""
    rank, name = len(shape_of(x)), b.operation.split(".")[1]
    if name == "permute":
        return b.permute(x, dims[0])
    if name in ("transpose", "swapaxes"):
        return b.transpose(x, dims[0] % rank, dims[1] % rank)
    return b.transpose(x, rank - 2, rank - 1) if name == "mT" else b.permute(x, range(rank)[::-1])


@rule("expand.default", "expand_as.default")
def expand(b: Builder, x: Value, shape: Any, *, implicit: bool = False) -> Value:
    """Broadcasting; a norm broadcasts by itself."""
    if isinstance(x, Norm):
        return x
    if not isinstance(shape, list | tuple):
        return b.expand(x, shape_of(shape))
    return b.expand(x, tuple(torch.empty(shape_of(x), device="meta").expand(list(shape)).shape))


@rule("slice.Tensor", table=STRUCTURAL)
def slice_(b: Builder, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """A range of an axis."""
    axis = dim % len(shape_of(x))
    return b.slice(x, axis, *slice(start, end, step).indices(shape_of(x)[axis]))


@rule("select.int", table=STRUCTURAL)
def select(b: Builder, x: Value, dim: int, index: int) -> Value:
    """One entry of an axis."""
    shape = shape_of(x)
    axis = dim % len(shape)
    start = index % shape[axis]
    return b.reshape(b.slice(x, axis, start, start + 1), shape[:axis] + shape[axis + 1 :])


@rule("split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int", table=STRUCTURAL)
def split(b: Builder, x: Value, count: Any = 0, dim: int = 0) -> list[Value]:
    """Pieces of an axis."""
    axis = dim % len(shape_of(x))
    name, size = b.operation.split(".")[1], shape_of(x)[axis]
    if name == "unbind":
        axis = count % len(shape_of(x))
        return [select(b, x, axis, index) for index in range(shape_of(x)[axis])]
    if name == "split_with_sizes":
        bounds = list(itertools.accumulate(count, initial=0))
    else:
        width = max(1, -(-size // count) if name == "chunk" else count)
        bounds = [*range(0, size, width), size]
    return [b.slice(x, axis, start, stop) for start, stop in itertools.pairwise(bounds)]


@rule("cat.default", "concat.default", "concatenate.default")
def cat(b: Builder, values: Iterable[Value], dim: int = 0) -> Value:
    """Concatenation."""
    parts = [value for value in values if shape_of(value) != (0,)]
    return b.shared("cat", *parts, dim=dim % len(shape_of(parts[0]))) if len(parts) > 1 else parts[0]


@rule("stack.default")
def stack(b: Builder, values: Iterable[Value], dim: int = 0) -> Value:
    """Concatenation along a new axis."""
    parts = list(values)
    shape = shape_of(parts[0])
    axis = dim % (len(shape) + 1)
    return cat(b, [b.reshape(part, (*shape[:axis], 1, *shape[axis:])) for part in parts], axis)


# Selections.


@rule("embedding.default")
def embedding(b: Builder, table: Value, ids: Value, *_: Any) -> Value:
    """The client's (or shared) look-up in a table that the server knows."""
    if not isinstance(ids, Node) or ids.visibility != "client":
        b.unsupported("the ids of an embedding are an input of the client, its table a parameter")
    return b.shared("embedding", ids, table)


@rule("where.self", "where.ScalarOther", "where.ScalarSelf")
def where(b: Builder, condition: Value, x: Value, y: Value) -> Value:
    """x where a condition that one party knows holds, else y."""
    for value in (condition, x, y):
        number = scalar_of(value)
        if value is not condition and number is not None and number <= MASKED:
            return _masked(b, condition, y if value is x else x, attend=value is y)
    keep = b.cast(condition, torch.float32)
    drop = b.plus(call(b, "aten.neg.default", keep), 1.0)
    return b.plus(b.times(x, keep), b.times(y, drop))


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(b: Builder, x: Value, mask: Value, value: Value) -> Value:
    """A value where a mask holds, else x."""
    number = scalar_of(value)
    return where(b, mask, torch.tensor(number if number is not None else value), x)


def _masked(b: Builder, mask: Value, scores: Value, attend: bool) -> Value:
    """Scores with minus "infinity" where a mask says; exact after a softmax alone, which is checked."""
    if not b.before_softmax:
        b.unsupported("filling with a large negative number is supported directly before a softmax only")
    summand = additive(b, mask) if attend else b.times(b.cast(mask, torch.float32), MASKED)
    return b.plus(scores, summand)
