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
    operands = [weight] if bias is None else [torch.ones(list(shape)) if weight is None else weight, bias]
    known = [operand for operand in operands if operand is not None]
    return b.shared("layer_norm", x, *known, eps=eps, axes=list(range(rank - len(shape), rank)))


@layer_norm.observes
def _(x: Tensor, *, axes: Sequence[int], **_: Any) -> Tensor:
    """Return the variance."""
    return x.var(dim=tuple(axes), unbiased=False)


@layer_norm.assumes
def _(operand: Node, reach: float, **_: Any) -> tuple[float, float]:
    return SMALLEST_VARIANCE, reach**2


@layer_norm.lower
def _(to: Lowering, node: Node) -> Symbol:
    x, (low, high) = to.symbol(node.inputs[0]), _range_of_root(to, node)
    if list(node.attrs["axes"]) != [len(node.shape) - 1]:
        raise to.unsupported(node, f"layer_norm over axes {node.attrs['axes']}", "only the last axis is supported")
    return to.normalized(node, to.functions.layer_norm(x, 1.0, 0.0, float(node.attrs["eps"]), low, high))


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
    """Return the mean square plus eps, the argument of the root."""
    return x.square().mean(-1) + eps


@rms_norm.assumes
def _(operand: Node, reach: float, **_: Any) -> tuple[float, float]:
    return SMALLEST_VARIANCE, reach**2


@rms_norm.lower
def _(to: Lowering, node: Node) -> Symbol:
    x, (low, high), eps = to.symbol(node.inputs[0]), _range_of_root(to, node), float(node.attrs["eps"])
    if to.compares:
        return to.normalized(node, approximations.rms_norm(x, 1.0, eps, low - eps, high - eps))
    return to.normalized(node, x * _root(to, x.square().mean(-1, keepdim=True) + eps, low, high))


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
    shape = [-1 if axis == 1 else 1 for axis in range(len(shape_of(x)))]
    shape[1] = shape_of(x)[1]
    return b.plus(b.times(x, b.reshape(scale, shape)), b.reshape(shift, shape))


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
    """Return the squared norm."""
    return x.square().sum(dim=dim)


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
        result: Symbol = approximations.l2_normalize(x, low, high)
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
