"""Convolutions and pooling. A convolution is the linear map of every patch under a moving window.

The server gets what is convolved once, masked, and makes the patches of that itself (see ``protocols.windows``): online
a convolution costs the bytes of a linear layer of the same input, however large its window. The dealt bytes are those
of its output, but for a convolution of each channel alone, where they are those of its patches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import approximations
from protocols.windows import Window
from secure.capture.builder import Builder, Value, is_private, shape_of
from secure.capture.clear_operations import CLEAR_OPERATIONS
from secure.capture.graph import Node
from secure.capture.operation import operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol, concatenate
from secure.operations.linear import layer
from secure.operations.moves import moved, places

MAXIMUM_MATRIX = 1 << 22  # entries of the matrix of an interpolation
TOLERANCE = 2.0**-10  # by how much a maximum may be too low
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@operation("convolution")
def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, /, *, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Convolve (batch, channels, sizes) with a weight that the server (or everybody) knows."""
    function = _CONVOLUTIONS[x.dim() - 2]
    return function(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def _sizes(given: Any, rank: int) -> list[int]:
    values = [given] if isinstance(given, int) else list(given)
    return [int(v) for v in values] * (rank // len(values))


@rule("conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding")
def conv(
    b: Builder, x: Value, weight: Value, bias: Value = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Value:  # fmt: skip
    """Translate a convolution. Disjoint patches, as in vision transformers, are a new shape and a linear map."""
    (_, _, *sizes), (_, _, *kernel) = shape_of(x), shape_of(weight)
    rank = len(kernel)
    if rank != len(sizes) or rank > 3:
        b.unsupported("convolutions of (batch, channels, sizes) over one to three sizes are")
    stride, dilation = _sizes(stride, rank), _sizes(dilation, rank)
    if padding == "same":
        rooms = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(room % 2 for room in rooms):  # torch pads the end by one more
            x = b.call("aten.constant_pad_nd.default", x, [p for room in reversed(rooms) for p in (0, room % 2)])
        padding = [room // 2 for room in rooms]
    padding = [0] * rank if padding == "valid" else _sizes(padding, rank)
    if any(isinstance(w, Node) and w.visibility not in ("server", "public") for w in (weight, bias)):
        b.unsupported("the weight and bias of a convolution are the server's, or public")
    disjoint = stride == kernel and not any(padding) and dilation == [1] * rank
    if disjoint and groups == 1 and not any(n % k for n, k in zip(sizes, kernel, strict=True)):
        return _of_patches(b, x, weight, bias, kernel)
    known = (weight,) if bias is None else (weight, bias)
    return b.shared("convolution", x, *known, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _of_patches(b: Builder, x: Value, weight: Value, bias: Value, kernel: Sequence[int]) -> Value:
    (batch, channels, *sizes), out, rank = shape_of(x), shape_of(weight)[0], len(kernel)
    places = [n // k for n, k in zip(sizes, kernel, strict=True)]
    x = b.reshape(x, [batch, channels, *itertools.chain(*zip(places, kernel, strict=True))])
    x = b.permute(x, [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)])
    x = b.reshape(x, [batch, math.prod(places), channels * math.prod(kernel)])
    y = layer(b, x, b.reshape(weight, [out, channels * math.prod(kernel)]), bias)
    return b.reshape(b.permute(y, [0, 2, 1]), [batch, out, *places])


@rule("convolution.default")
def general(
    b: Builder, x: Value, weight: Value, bias: Value, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    """Translate torch's general convolution."""
    if transposed:
        b.unsupported("transposed convolutions are not")
    return conv(b, x, weight, bias, stride, padding, dilation, groups)


@convolution.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Multiply patches by a matrix; channels that stand alone by one number an entry, which are then added up."""
    a, known = node.attrs, [to.known(i) for i in node.inputs[1:]]
    x, weight = to.symbol(node.inputs[0]), known[0]
    out, depth, *kernel = weight.shape
    window = Window(tuple(kernel), tuple(a["stride"]), tuple(a["padding"]), tuple(a["dilation"]))
    groups, entries, channels = a["groups"], math.prod(kernel), x.shape[1]
    key = node.inputs[1]
    if groups == 1:
        y = x.patches(window).linear(to.weight(key, ".T", weight.reshape(out, -1).T))
    elif groups == channels == out:
        products = x.patches(window) * to.weight(key, ".row", weight.reshape(-1))
        y = products.reshape((*products.shape[:-1], channels, entries)).sum(-1)
    else:
        width, parts = out // groups, []
        for g in range(groups):
            part = x.slice(1, g * depth, (g + 1) * depth).patches(window)
            matrix = weight[g * width : (g + 1) * width].reshape(width, -1).T
            parts.append(part.linear(to.weight(key, f".T[{g}]", matrix)))
        y = concatenate(parts, len(parts[0].shape) - 1)
    if len(known) > 1:
        y = y + to.weight(node.inputs[2], "", known[1])
    rank = len(node.shape)
    return y.permute([0, rank - 1, *range(1, rank - 1)])


# pooling


@operation("amax", compares=True)
def amax(x: Tensor, /, *, dim: int, keepdim: bool) -> Tensor:
    """Compute the largest entry along an axis."""
    return x.amax(dim, keepdim)


@amax.aten("amax.default")
def _(b: Builder, x: Value, dims: Any = (), keepdim: bool = False) -> Value:
    """Translate the maximum over axes, one after the other."""
    rank = len(shape_of(x))
    axes = [dims] if isinstance(dims, int) else list(dims) or list(range(rank))
    for axis in sorted((a % rank for a in axes), reverse=True):
        x = _largest(b, x, axis, keepdim)
    return x


def _largest(b: Builder, x: Value, axis: int, keepdim: bool = False) -> Value:
    if not is_private(x):
        return b.clear("aten.amax.default", x, [axis], keepdim)
    return x if shape_of(x)[axis] == 1 and keepdim else b.shared("amax", x, dim=axis, keepdim=keepdim)


@rule("max.dim")
def maximum(b: Builder, x: Value, dim: int, keepdim: bool = False) -> list[Value]:
    """Translate the maximum along an axis; nobody may read where it is."""
    return [_largest(b, x, dim % len(shape_of(x)), keepdim), None]


@amax.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Compare along the last axis."""
    x, dim = to.symbol(node.inputs[0]), node.attrs["dim"]
    order = [i for i in range(len(x.shape)) if i != dim] + [dim]
    moved_ = x if order == list(range(len(x.shape))) else x.permute(order)
    result: Symbol = moved_ if moved_.shape[-1] == 1 else approximations.maximum(moved_, TOLERANCE)
    return result.reshape(node.shape)


@rule("max_pool1d.default", "max_pool2d.default", "max_pool2d_with_indices.default")
def max_pool(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    """Translate the maximum under a moving window, one axis after the other.

    At the border an entry of the window stands twice instead of the padding, which does not change the maximum.
    """
    rank = 1 if "1d" in b.operation else 2
    kernel = _sizes(kernel, rank)
    steps, pads, gaps = (_sizes(v, rank) for v in (stride or kernel, padding, dilation))
    if ceil_mode:
        b.unsupported("pooling with ceil_mode=False is")
    for i, (k, s, p, d) in enumerate(zip(kernel, steps, pads, gaps, strict=True)):
        axis = len(shape_of(x)) - rank + i
        size = shape_of(x)[axis]
        count = (size + 2 * p - d * (k - 1) - 1) // s + 1
        index = torch.arange(count)[:, None] * s - p + torch.arange(k) * d
        inside = torch.where((index >= 0) & (index < size), index, -1)
        spare = inside.amax(1, keepdim=True)  # an entry of the window that is there
        chosen = torch.where(inside < 0, spare, inside).reshape(-1)
        taken = moved(b, x, places(x).index_select(axis, chosen))
        shape = shape_of(taken)
        taken = b.reshape(taken, (*shape[:axis], count, k, *shape[axis + 1 :]))
        x = _largest(b, taken, axis + 1)
    return [x, None] if "with_indices" in b.operation else x


@rule("avg_pool1d.default", "avg_pool2d.default")
def average_pool(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Value:  # fmt: skip
    """Translate the mean under a moving window, one axis after the other."""
    rank = 1 if "1d" in b.operation else 2
    kernel = _sizes(kernel, rank)
    steps, pads = (_sizes(v, rank) for v in (stride or kernel, padding))
    if ceil_mode or divisor_override or (any(pads) and not count_include_pad):
        b.unsupported("average pooling with its default options is")
    for i, (k, s, p) in enumerate(zip(kernel, steps, pads, strict=True)):
        axis = len(shape_of(x)) - rank + i
        size = shape_of(x)[axis]
        index = torch.arange((size + 2 * p - k) // s + 1)[:, None] * s - p + torch.arange(k)
        positions = places(x).index_select(axis, index.reshape(-1).clamp(0, size - 1))
        outside = ((index < 0) | (index >= size)).reshape([-1 if j == axis else 1 for j in range(positions.dim())])
        taken = moved(b, x, torch.where(outside, -1, positions))
        shape = shape_of(taken)
        taken = b.reshape(taken, (*shape[:axis], len(index), k, *shape[axis + 1 :]))
        x = b.call("aten.mean.dim", taken, [axis + 1])
    return x


@rule(
    "upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_bilinear2d.default", "upsample_bicubic2d.vec",
    "_upsample_bilinear2d_aa.vec",
)  # fmt: skip
def interpolate(b: Builder, x: Value, *args: Any) -> Value:
    """Translate an interpolation, which is a linear map of every channel that everybody knows."""
    shape, target = shape_of(x), b.operation
    sizes = shape[2:]
    inner = math.prod(sizes)
    _, name, overload = target.split(".")
    mapped = CLEAR_OPERATIONS.get(target) or getattr(getattr(torch.ops.aten, name), overload)
    out = tuple(mapped(torch.empty(1, 1, *sizes, device="meta"), *args).shape[2:])
    if (entries := inner * math.prod(out)) > MAXIMUM_MATRIX:
        b.unsupported(f"interpolation by a matrix of at most {MAXIMUM_MATRIX} entries is, this has {entries}")
    matrix = mapped(torch.eye(inner).reshape(inner, 1, *sizes), *args).reshape(inner, -1)
    flat = b.reshape(x, (*shape[:2], inner))
    return b.reshape(b.call("aten.matmul.default", flat, matrix), (*shape[:2], *out))


@rule(
    "adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default",
    "adaptive_avg_pool3d.default",
)  # fmt: skip
def adaptive_pool(b: Builder, x: Value, sizes: Any) -> Value:
    """Translate pooling to a given size, which divides the size of what is pooled."""
    rank = 1 if "1d" in b.operation else 3 if "3d" in b.operation else 2
    for i, wanted in enumerate(_sizes(sizes, rank)):
        axis, shape = len(shape_of(x)) - rank + i, shape_of(x)
        if shape[axis] % wanted:
            b.unsupported("adaptive pooling to sizes that divide those of its operand is")
        split = b.reshape(x, (*shape[:axis], wanted, shape[axis] // wanted, *shape[axis + 1 :]))
        x = b.call("aten.mean.dim", split, [axis + 1])
    return x
