"""Normalizations and inverse roots. The argument of each root has a calibrated range, for which the root is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import approximations
from approximations.powers import steps_for
from secure.capture.builder import Builder, Norm, Value, shape_of
from secure.capture.graph import Node
from secure.capture.operation import operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.ranges import widened
from secure.lowering.trace import Symbol
from secure.operations.arithmetic import axes_of

SMALLEST_VARIANCE = 0.25  # smallest argument of a root that is assumed without calibration
ROOT_DEGREE, ROOT_ERROR = 3, 2.0**-13  # of inverse roots in Programs that compare nothing


def _range_of_root(to: Lowering, node: Node) -> tuple[float, float]:
    """Return the calibrated range of a root's argument, widened by the margin on both sides.

    Models that compare values get another factor of two on each side. Raises UnsupportedOperation if calibration met an
    argument that is not positive.
    """
    low, high = to.measured(node)
    if not low > 0:
        raise to.unsupported(
            node,
            f"'{node.op}' met a value of {low:.3g} at calibration, where a positive one is needed",
            "check the calibration inputs",
        )
    if to.compares:
        return low / (2 * to.margin), high * 2 * to.margin
    # less room, as room costs polynomials rounds; rounded, as the edges of a polynomial's range are public
    return widened(low / to.margin, down=True), widened(high * to.margin)


SIGNIFICANT = 12
"""The bits of a row's root mean square that are right, at least, before a normalization makes it one."""


def _brought_up(to: Lowering, node: Node, x: Symbol, high: float, part: float = 1.0) -> tuple[Symbol, float]:
    """Return x times a power of two, if its rows are small, and the factor by which their squares grow.

    A normalization does not notice the factor. high: the largest mean square of a row. part: the mean square, as part
    of what calibration measures. The products from which x is computed get more fraction bits, so that even its
    smallest row is held to SIGNIFICANT bits. Weights keep theirs: rows that are small because weights are below about
    2^-5 lose precision there.
    """
    halves = math.floor(-math.log2(math.sqrt(high)))
    if halves < 1:
        return x, 1.0
    low, _ = to.measured(node)
    missing = math.ceil(SIGNIFICANT - _USUAL - math.log2(low * part) / 2)
    return x.refined(min(max(missing, 0), halves, _FINEST)) * 2.0**halves, 4.0**halves


_USUAL = 16  # fraction bits
_FINEST = 12  # more fraction bits of what is normalized, at most


def _root(to: Lowering, x: Symbol, low: float, high: float) -> Symbol:
    """Compute 1 / sqrt(x) by polynomials alone, after scaling x to about one."""
    halves = round(math.log2(math.sqrt(low * high)))
    low, high = low * 2.0**-halves, high * 2.0**-halves
    steps = steps_for(-0.5, ROOT_DEGREE, low, high, ROOT_ERROR)
    result: Symbol = to.functions.power(x * 2.0**-halves, -0.5, low, high, ROOT_DEGREE, steps, 2.0 ** (-halves / 2))
    return result


# Layer normalization.


@operation("layer_norm", compares=True)
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, /, *, eps: float, axes: Sequence[int]
) -> Tensor:
    """Compute (x - mean) / sqrt(variance + eps) * weight + bias over the last axes."""
    return F.layer_norm(x, [x.shape[axis] for axis in axes], weight, bias, eps)


@layer_norm.aten("layer_norm.default")
def _(
    b: Builder, x: Value, shape: Sequence[int], weight: Value = None, bias: Value = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    rank = len(shape_of(x))
    if len(shape) > 1:  # as one axis, of which the entries have a weight each
        whole = shape_of(x)
        flat = b.reshape(x, (*whole[: rank - len(shape)], math.prod(shape)))
        weights = [None if w is None else b.reshape(w, (math.prod(shape),)) for w in (weight, bias)]
        return b.reshape(b.call("aten.layer_norm.default", flat, [math.prod(shape)], *weights, eps), whole)
    operands = [weight] if bias is None else [torch.ones(list(shape)) if weight is None else weight, bias]
    known = [operand for operand in operands if operand is not None]
    return b.shared("layer_norm", x, *known, eps=eps, axes=[rank - 1])


@layer_norm.observes
def _(x: Tensor, *, axes: Sequence[int], **_: Any) -> Tensor:
    """Return the variance of the rows that are not constant."""
    variance = x.var(dim=tuple(axes), unbiased=False)
    return _counting(variance, variance > _NOTHING * x.square().mean(dim=tuple(axes)))


_NOTHING = 2.0**-40  # relative to a row's mean square: what rounding leaves of the variance of a constant row


def _counting(found: Tensor, counts: Tensor) -> Tensor:
    """Return the arguments of a root that count; all of them if none does.

    A constant row, such as a padding token's zeros, does not: its root, which the protocol bounds, is multiplied by
    zero, or under shares by a unit in the last place.
    """
    return found[counts] if bool(counts.any()) else found


@layer_norm.assumes
def _(operand: Node, reach: float, **_: Any) -> tuple[float, float]:
    return SMALLEST_VARIANCE, reach**2


@layer_norm.lower
def _(to: Lowering, node: Node) -> Symbol:
    x, (low, high) = to.symbol(node.inputs[0]), _range_of_root(to, node)
    if list(node.attrs["axes"]) != [len(node.shape) - 1]:
        raise to.unsupported(node, f"layer_norm over axes {node.attrs['axes']}", "only the last axis is supported")
    x, grown = _brought_up(to, node, x, high)
    factors = to.functions.layer_norm_factors(x, float(node.attrs["eps"]) * grown, low * grown, high * grown)
    return to.normalized(node, *factors)


# RMS normalization.


@operation("rms_norm")
def rms_norm(x: Tensor, weight: Tensor | None = None, /, *, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@rms_norm.aten("rms_norm.default")
def _(b: Builder, x: Value, shape: Sequence[int], weight: Value = None, eps: float | None = None) -> Value:
    """Write the normalization out as products; those over the last axis are then recognized below."""
    rank = len(shape_of(x))
    dims = list(range(rank - len(shape), rank))
    mean = b.shared("mean", b.shared("square", x), dims=dims, keepdim=True)
    scale = b.shared("rsqrt", b.plus(mean, torch.finfo(torch.float32).eps if eps is None else eps))
    return b.times(b.times(x, scale), 1.0 if weight is None else weight)


@rms_norm.recognizes
def _(b: Builder, x: Value, factor: Value) -> Node | None:
    """Recognize x * rsqrt(mean(x^2) + eps) over the last axis, and its product with a weight of the server's."""
    if not isinstance(x, Node):
        return None
    known = isinstance(factor, Tensor) or (isinstance(factor, Node) and factor.visibility == "server")
    if known and x.op == "rms_norm" and len(x.inputs) == 1 and shape_of(factor) == x.shape[-1:]:
        return b.shared("rms_norm", b.nodes[x.inputs[0]], factor, eps=x.attrs["eps"])
    if not isinstance(factor, Node) or factor.op != "rsqrt":
        return None
    total = b.nodes[factor.inputs[0]]
    eps = total.attrs.get("scalar", 0.0) if total.op == "add" else 0.0
    mean = b.nodes[total.inputs[0]]
    if eps <= 0 or mean.op != "mean" or mean.attrs != {"dims": [len(x.shape) - 1], "keepdim": True}:
        return None
    square = b.nodes[mean.inputs[0]]
    return b.shared("rms_norm", x, eps=eps) if square.op == "square" and square.inputs == (x.id,) else None


@rms_norm.observes
def _(x: Tensor, *, eps: float) -> Tensor:
    """Return the mean square plus eps, the argument of the root, of the rows that are not zero."""
    found = x.square().mean(-1)
    return _counting(found, found > 0) + eps


@rms_norm.assumes
def _(operand: Node, reach: float, **_: Any) -> tuple[float, float]:
    return SMALLEST_VARIANCE, reach**2


@rms_norm.lower
def _(to: Lowering, node: Node) -> Symbol:
    x, (low, high), eps = to.symbol(node.inputs[0]), _range_of_root(to, node), float(node.attrs["eps"])
    if (looked_up := _looked_up(to, to.graph.nodes[node.inputs[0]], eps)) is not None:
        return to.normalized(node, looked_up, None)
    if to.compares:
        x, grown = _brought_up(to, node, x, high)
        factors = approximations.rms_norm_factors(x, eps * grown, (low - eps) * grown, (high - eps) * grown)
        return to.normalized(node, *factors)
    return to.normalized(node, x, _root(to, x.square().mean(-1, keepdim=True) + eps, low, high))


def _looked_up(to: Lowering, source: Node, eps: float) -> Symbol | None:
    """Return the normalized rows of a table that one-hot rows look up, or None if ``source`` is no such look-up.

    The inverse root of a row is known to whoever knows the table, so it is a look-up too: of one column, by the same
    one-hot rows, without a root under the protocol. Every row of the table is in its range, not only those that
    calibration met. None also if the roots differ by more than WIDEST: the smallest would lose precision.
    """
    if source.op != "embedding" or to.embedding != "one-hot":
        return None
    ids, table = source.inputs
    size, _ = to.graph.nodes[table].shape

    def roots() -> Tensor:
        squares = to.known(table).square().mean(-1, keepdim=True)
        return torch.where(squares > 0, (squares + eps).rsqrt(), 1.0)  # a row of zeros stays one, whatever the factor

    least, most = (1.0, 1.0) if to.known(table).is_meta else (float(x) for x in torch.aminmax(roots()))
    if most > WIDEST * least:
        return None
    halves = math.floor(math.log2(least))  # the smallest root becomes 1 to 2, so that its fraction bits suffice
    column = to.weight(table, f".roots*2^{-halves}", lambda: roots() * 2.0**-halves, (size, 1))
    rows = to.client_input(ids, "one-hot", to.weight(table))
    reach = 2.0 ** (math.ceil(math.log2(most)) - halves)
    return to.symbol(source.id) * rows.linear(column).bounded(0.0, reach) * 2.0**halves


WIDEST = 2.0**8
"""The greatest ratio of the inverse roots of a table's rows that are looked up."""


# Batch normalization.


@rule("batch_norm.default")
def batch_norm(
    b: Builder, x: Value, weight: Value, bias: Value, mean: Value, variance: Value, training: bool, momentum: float,
    eps: float, cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    """Translate the evaluation mode into an affine map whose coefficients the server computes."""
    if training or mean is None or variance is None:
        b.unsupported("use its running statistics: evaluation mode and track_running_stats=True")
    scale = b.call("aten.rsqrt.default", b.plus(variance, eps))
    scale = scale if weight is None else b.times(scale, weight)
    shift = b.call("aten.neg.default", b.times(mean, scale))
    shift = shift if bias is None else b.plus(shift, bias)
    shape = _along_channels(x)
    return b.plus(b.times(x, b.reshape(scale, shape)), b.reshape(shift, shape))


@rule("_native_batch_norm_legit_no_training.default")
def native_batch_norm(
    b: Builder, x: Value, weight: Value, bias: Value, mean: Value, variance: Value, momentum: float, eps: float
) -> list[Value]:
    """Translate what torch makes of the evaluation mode."""
    return [batch_norm(b, x, weight, bias, mean, variance, False, momentum, eps), None, None]


def _along_channels(x: Value) -> list[int]:
    """Return the shape in which one number a channel broadcasts to x, (batch, channels, sizes)."""
    shape = [1] * len(shape_of(x))
    shape[1] = shape_of(x)[1]
    return shape


# Group normalization.


@rule("group_norm.default")
def group_norm(
    b: Builder, x: Value, groups: int, weight: Value = None, bias: Value = None, eps: float = 1e-5, *_: Any
) -> Value:
    """Translate the normalization of groups of channels: a layer normalization of each, and a weight a channel."""
    whole = shape_of(x)
    flat = b.reshape(x, (whole[0], groups, math.prod(whole[1:]) // groups))
    out = b.reshape(b.call("aten.layer_norm.default", flat, [shape_of(flat)[-1]], None, None, eps), whole)
    out = out if weight is None else b.times(out, b.reshape(weight, _along_channels(x)))
    return out if bias is None else b.plus(out, b.reshape(bias, _along_channels(x)))


@rule("native_group_norm.default")
def native_group_norm(
    b: Builder, x: Value, weight: Value, bias: Value, batch: int, channels: int, size: int, groups: int, eps: float
) -> list[Value]:
    """Translate what torch makes of it."""
    return [group_norm(b, x, groups, weight, bias, eps), None, None]


# Euclidean norms, which exist as denominators only, and inverse roots.


@operation("l2_normalize")
def l2_normalize(x: Tensor, /, *, dim: int, eps: float) -> Tensor:
    """Compute x / |x| along an axis."""
    return F.normalize(x, dim=dim, eps=eps)


@rule("linalg_vector_norm.default")
def vector_norm(
    b: Builder, x: Value, order: float = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    """Keep a norm until a division uses it as the denominator; "div" makes the node."""
    axes = axes_of(dims, len(shape_of(x)))
    if order != 2 or len(axes) != 1 or not keepdim:
        b.unsupported("of norms only the L2 norm along one axis is, as a denominator: F.normalize(x, dim=d)")
    shape = tuple(1 if axis == axes[0] else size for axis, size in enumerate(shape_of(x)))
    return Norm(b.operand(x), axes[0], shape)


@l2_normalize.observes
def _(x: Tensor, *, dim: int, **_: Any) -> Tensor:
    """Return the squared norm of the rows that are not zero."""
    found = x.square().sum(dim=dim)
    return _counting(found, found > 0)


@l2_normalize.assumes
def _(operand: Node, reach: float, **_: Any) -> tuple[float, float]:
    return SMALLEST_VARIANCE, operand.shape[-1] * reach**2


@l2_normalize.lower
def _(to: Lowering, node: Node) -> Symbol:
    x, (low, high) = to.symbol(node.inputs[0]), _range_of_root(to, node)
    if node.attrs["dim"] != len(node.shape) - 1:
        raise to.unsupported(
            node, f"normalize over dimension {node.attrs['dim']}", "only the last dimension is supported"
        )
    if to.compares:
        width = node.shape[-1]
        x, grown = _brought_up(to, node, x, high / width, 1 / width)
        result: Symbol = approximations.l2_normalize(x, low * grown, high * grown)
        return result
    return x * _root(to, x.square().sum(-1, keepdim=True), low, high)


@operation("rsqrt")
def rsqrt(x: Tensor, /) -> Tensor:
    """Compute 1 / sqrt(x)."""
    return torch.rsqrt(x)


@rsqrt.aten("rsqrt.default")
def _(b: Builder, x: Value) -> Value:
    return b.shared("rsqrt", x)


@rsqrt.observes
def _(x: Tensor) -> Tensor:
    """Return the operand itself."""
    return x


@rsqrt.assumes
def _(operand: Node, reach: float) -> tuple[float, float]:
    return SMALLEST_VARIANCE, reach**2


@rsqrt.lower
def _(to: Lowering, node: Node) -> Symbol:
    x, (low, high) = to.symbol(node.inputs[0]), _range_of_root(to, node)
    if to.compares:
        result: Symbol = approximations.rsqrt(x, low, high)
        return result
    return _root(to, x, low, high)
