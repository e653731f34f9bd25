"""Entries in other places: every operation of torch that copies entries, or puts zeros beside them, is one "take".

Where the entries go is public, so a party copies the entries of its share, and no message is sent. Which entries an
operation copies is found by applying it to the positions of the entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from protocols.windows import Run, check_runs, runs_of, take
from secure.capture.builder import Builder, Value, is_private, shape_of
from secure.capture.clear_operations import CLEAR_OPERATIONS
from secure.capture.graph import Node
from secure.capture.operation import operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol
from secure.operations.choices import gathered, is_whole

MAXIMUM_RUNS = 1 << 14


@operation("take")
def take_(x: Tensor, /, *, dim: int, runs: Sequence[Run]) -> Tensor:
    """Take the entries along an axis that runs of positions name; -1 stands for zero."""
    found = tuple((int(start), int(step), int(count)) for start, step, count in runs)
    check_runs(found, x.shape[dim])
    if x.is_meta:
        return x.new_empty((*x.shape[:dim], sum(count for *_, count in found), *x.shape[dim + 1 :]))
    return take(x, dim, found)


@take_.lower
def _(to: Lowering, node: Node) -> Symbol:
    runs = [(int(start), int(step), int(count)) for start, step, count in node.attrs["runs"]]
    return to.symbol(node.inputs[0]).take(node.attrs["dim"], runs)


def moved(b: Builder, x: Value, positions: Tensor) -> Value:
    """Return the entries of x at these positions (of all its entries in order; -1: zero), in their shape."""
    out, shape = tuple(positions.shape), list(shape_of(x))
    leading, trailing = 1, 1
    while shape and positions.dim() and positions.shape[0] == shape[0] and positions.numel():
        inner, first = math.prod(shape[1:]), positions[:1]
        steps = inner * torch.arange(shape[0]).reshape(-1, *[1] * (positions.dim() - 1))
        if not _same(positions, first, steps) or int(first.max()) >= inner:
            break
        leading, positions, shape = leading * shape[0], positions[0], shape[1:]
    while shape and positions.dim() and positions.shape[-1] == shape[-1] and positions.numel():
        width, first = shape[-1], positions[..., :1]
        if not _same(positions, first, torch.arange(width)) or bool((first.clamp(min=0) % width).any()):
            break
        positions = torch.where(first < 0, -1, first // width)[..., 0]
        trailing, shape = trailing * width, shape[:-1]
    runs = runs_of(positions.reshape(-1).tolist())
    if len(runs) > MAXIMUM_RUNS:
        b.unsupported(f"it copies entries without order, in {len(runs)} runs; up to {MAXIMUM_RUNS} are supported")
    flat = b.reshape(x, (leading, math.prod(shape), trailing))
    if not is_private(flat):
        return b.reshape(_copied(b, flat, positions.reshape(-1)), out)
    if runs != ((0, 1, math.prod(shape)),):
        flat = b.shared("take", flat, dim=1, runs=[list(run) for run in runs])
    return b.reshape(flat, out)


def _copied(b: Builder, x: Value, index: Tensor) -> Value:
    """Return the entries of what one party knows along its second of three axes; -1 stands for zero."""
    if bool((index < 0).any()):
        size = shape_of(x)[1]
        x, index = b.call("aten.constant_pad_nd.default", x, [0, 0, 0, 1]), torch.where(index < 0, size, index)
    return b.call("aten.index_select.default", x, 1, index)


def _same(positions: Tensor, first: Tensor, steps: Tensor) -> bool:
    """True if positions are ``first`` plus steps, and zeros are everywhere where there is one in ``first``."""
    expected = torch.where(first < 0, -1, first + steps)
    return bool((positions == expected).all())


def places(x: Value) -> Tensor:
    """Return the position of every entry of a value, in its shape."""
    shape = shape_of(x)
    return torch.arange(math.prod(shape)).reshape(shape)


@rule(
    "as_strided.default", "channel_shuffle.default", "diagonal.default", "flip.default", "narrow.int",
    "pixel_shuffle.default", "pixel_unshuffle.default", "repeat.default", "repeat_interleave.self_int",
    "roll.default", "select_copy.int", "tile.default", "unfold.default",
)  # fmt: skip
def move(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Translate an operation that copies entries; torch itself says which."""
    function = _function(b.operation)
    return moved(b, x, function(places(x), *args, **kwargs).contiguous())


def _function(target: str) -> Callable[..., Tensor]:
    if (known := CLEAR_OPERATIONS.get(target)) is not None:
        return known
    name, _, overload = target.removeprefix("aten.").partition(".")
    found: Callable[..., Tensor] = getattr(getattr(torch.ops.aten, name), overload)
    return found


@rule("tril.default", "triu.default")
def triangle(b: Builder, x: Value, diagonal: int = 0) -> Value:
    """Keep a triangle of every matrix; the rest becomes zero."""
    return moved(b, x, _function(b.operation)(places(x) + 1, diagonal) - 1)


@rule("constant_pad_nd.default", "pad.default")
def pad(b: Builder, x: Value, sizes: Sequence[int], *args: Any) -> Value:
    """Surround a value by one number."""
    mode, number = (args[0] if args else "constant"), (args[1] if len(args) > 1 else 0.0)
    if not isinstance(mode, str):
        mode, number = "constant", mode
    if mode != "constant":
        return moved(b, x, torch.nn.functional.pad(places(x).double(), list(sizes), mode).long())
    positions = torch.nn.functional.pad(places(x), list(sizes), value=-1)
    padded = moved(b, x, positions)
    return padded if not number else b.plus(padded, torch.where(positions < 0, float(number), 0.0))


@rule("reflection_pad1d.default", "reflection_pad2d.default", "replication_pad1d.default", "replication_pad2d.default")
def mirror(b: Builder, x: Value, sizes: Sequence[int]) -> Value:
    """Surround a value by its own entries."""
    return moved(b, x, _function(b.operation)(places(x).double(), list(sizes)).long())


@rule("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest2d.default")
def nearest(b: Builder, x: Value, *args: Any) -> Value:
    """Repeat entries."""
    return moved(b, x, _function(b.operation)(places(x).double(), *args).long())


# selections by an index. A public one says which entries are copied; one that the client knows becomes one-hot rows.


@rule("index_select.default")
def index_select(b: Builder, x: Value, dim: int, index: Value) -> Value:
    axis = dim % len(shape_of(x))
    return _selected(b, x, [*[None] * axis, index])


@rule("gather.default")
def gather(b: Builder, x: Value, dim: int, index: Value, **_: Any) -> Value:
    if isinstance(index, Tensor):
        return moved(b, x, torch.gather(places(x), dim, index))
    if isinstance(index, Node) and is_whole(index):
        return gathered(b, x, dim % len(shape_of(x)), index)
    axis, shape, wanted = dim % len(shape_of(x)), shape_of(x), shape_of(index)
    if isinstance(index, Node) and index.attrs.get("target") == "aten.expand.default":
        index = b.nodes[index.inputs[0]]  # one index for all entries of the last axes
    rows, inner = shape_of(index)[: axis + 1], math.prod(shape[axis + 1 :])
    whole = (*rows, *shape[axis + 1 :]) == wanted and math.prod(shape_of(index)) == math.prod(rows)
    if is_private(index) or rows[:axis] != shape[:axis] or not whole:
        b.unsupported("gather by an index that the client knows takes whole entries along an axis (index.expand(...))")
    one_hot = _one_hot(b, b.reshape(index, rows), shape[axis])
    return b.reshape(b.call("aten.matmul.default", one_hot, b.reshape(x, (*shape[: axis + 1], inner))), wanted)


@rule("index.Tensor")
def index(b: Builder, x: Value, indices: Sequence[Value]) -> Value:
    return _selected(b, x, indices)


def _selected(b: Builder, x: Value, indices: Sequence[Value]) -> Value:
    """Select entries of a private x as ``x[indices]`` does; None stands for a whole axis."""
    known = [None if i is None or isinstance(i, Node) else i for i in indices]
    secret = [axis for axis, i in enumerate(indices) if isinstance(i, Node)]
    if not secret:
        return moved(b, x, places(x)[tuple(slice(None) if i is None else i for i in known)].contiguous())
    axis, shape = secret[0], shape_of(x)
    picked = indices[axis]
    rows = shape_of(picked)
    batch = axis == 1 and isinstance(known[0], Tensor) and known[0].tolist() == list(range(shape[0]))
    alone = all(i is None for i in known)
    if len(secret) > 1 or picked.visibility != "client" or len(rows) != 1 or not (batch or alone):
        b.unsupported("of indices that the client knows, one along one axis is supported, beside arange of the batch")
    one_hot = _one_hot(b, picked, shape[axis])  # (rows, size)
    if batch:  # x[arange, picked]: one entry of every row
        flat = b.reshape(x, (shape[0], shape[1], math.prod(shape[2:])))
        found = b.call("aten.matmul.default", b.reshape(one_hot, (shape[0], 1, shape[1])), flat)
        return b.reshape(found, (shape[0], *shape[2:]))
    order = [axis, *(i for i in range(len(shape)) if i != axis)]
    flat = b.reshape(b.permute(x, order), (shape[axis], math.prod(shape) // shape[axis]))
    found = b.reshape(b.call("aten.matmul.default", one_hot, flat), (rows[0], *(shape[i] for i in order[1:])))
    return b.permute(found, [order.index(i) for i in range(len(shape))])


def _one_hot(b: Builder, index: Value, size: int) -> Value:
    """Return the one-hot rows of an index that one party knows; a negative one counts from the end.

    One out of range is clamped, as everywhere in the clear.
    """
    assert not is_private(index)
    index = b.clear("aten.clamp.default", index, -size, size - 1)
    wide = b.reshape(index, (*shape_of(index), 1))
    rows = [b.call("aten.eq.Tensor", wide, torch.arange(size) - shift) for shift in (0, size)]
    return b.plus(b.cast(rows[0], torch.float32), b.cast(rows[1], torch.float32))
