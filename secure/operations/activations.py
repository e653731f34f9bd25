"""Activations: functions of one value, such as GeLU and tanh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import approximations
from approximations.fits import minimax
from approximations.primitives import IDENTITY, ZERO, constant, piecewise
from approximations.primitives import Value as Argument
from secure.capture.builder import Builder, Norm, Value, shape_of
from secure.capture.graph import Node
from secure.capture.operation import operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol


@operation("relu", compares=True)
def relu(x: Tensor, /) -> Tensor:
    """Compute max(x, 0)."""
    return torch.relu(x)


@relu.aten("relu.default")
def _(b: Builder, x: Value) -> Value:
    return b.shared("relu", x)


@rule("clamp_min.default", "clamp.default", "hardtanh.default")
def clamp(b: Builder, x: Value, minimum: float | None = None, maximum: float | None = None) -> Value:
    """Bound a norm from below, or a value by numbers: max(x, low) is low + max(x - low, 0)."""
    if isinstance(x, Norm):
        if not isinstance(minimum, float) or maximum is not None:
            b.unsupported("a norm is bounded from below by a number only")
        return Norm(x.value, x.dim, x.shape, max(minimum, x.eps))
    if not all(isinstance(bound, int | float | None) for bound in (minimum, maximum)):
        b.unsupported("the bounds of clamp are numbers")
    if minimum is not None:
        x = b.plus(b.shared("relu", b.plus(x, -minimum)), minimum)
    return x if maximum is None else b.plus(b.times(b.shared("relu", b.plus(b.times(x, -1.0), maximum)), -1.0), maximum)


@rule("clamp_max.default")
def clamp_max(b: Builder, x: Value, maximum: float) -> Value:
    """Bound a value from above."""
    return clamp(b, x, None, maximum)


@rule("relu6.default")
def relu6(b: Builder, x: Value) -> Value:
    """Compute min(max(x, 0), 6)."""
    return clamp(b, x, 0.0, 6.0)


@rule("hardsigmoid.default")
def hardsigmoid(b: Builder, x: Value) -> Value:
    """Compute min(max(x / 6 + 1/2, 0), 1)."""
    return clamp(b, b.plus(b.times(x, 1 / 6), 0.5), 0.0, 1.0)


@rule("hardswish.default")
def hardswish(b: Builder, x: Value) -> Value:
    """Compute x hardsigmoid(x)."""
    return b.times(x, hardsigmoid(b, x))


@rule("leaky_relu.default")
def leaky_relu(b: Builder, x: Value, slope: float = 0.01) -> Value:
    """Compute slope x + (1 - slope) max(x, 0)."""
    return b.plus(b.times(x, slope), b.times(b.shared("relu", x), 1 - slope))


@rule("prelu.default", "_prelu_kernel.default")
def prelu(b: Builder, x: Value, slope: Value) -> Value:
    """Compute the same with a trained slope, one for all or one a channel."""
    shape = [-1 if axis == 1 and len(shape_of(slope)) else 1 for axis in range(len(shape_of(x)))]
    slope = slope if len(shape_of(slope)) == len(shape_of(x)) else b.reshape(slope, _filled(shape, shape_of(slope)))
    positive = b.shared("relu", x)
    return b.plus(positive, b.times(b.plus(x, b.times(positive, -1.0)), slope))


def _filled(shape: Sequence[int], entries: Sequence[int]) -> list[int]:
    return [math.prod(entries) if size == -1 else size for size in shape]


@relu.lower
def _(to: Lowering, node: Node) -> Symbol:
    result: Symbol = approximations.relu(to.symbol(node.inputs[0]))
    return result


@operation("gelu", compares=True)
def gelu(x: Tensor, /, *, approximate: str) -> Tensor:
    """Multiply x by the normal distribution function of x, exactly or approximated by a tanh."""
    return F.gelu(x, approximate=approximate)


@gelu.aten("gelu.default")
def _(b: Builder, x: Value, *, approximate: str = "none") -> Value:
    return b.shared("gelu", x, approximate=approximate)


@gelu.recognizes
def _(b: Builder, half: Value, rest: Value) -> Node | None:
    """Recognize x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) and x/2 * (1 + erf(x / sqrt(2))).

    Several models write it so.
    """
    x = _operand_of(b, half, "mul", 0.5)
    tanh = _operand_of(b, rest, "add", 1.0)
    if x is not None and tanh is not None and tanh.op == "erf":
        scaled = _operand_of(b, b.nodes[tanh.inputs[0]], "mul", math.sqrt(0.5))
        return b.shared("gelu", x, approximate="none") if scaled is not None and scaled.id == x.id else None
    if x is None or tanh is None or tanh.op != "tanh":
        return None
    inner = _operand_of(b, b.nodes[tanh.inputs[0]], "mul", 0.7978845608)
    if inner is None or inner.op != "add" or x.id not in inner.inputs or len(inner.inputs) != 2:
        return None
    other = b.nodes[inner.inputs[1] if inner.inputs[0] == x.id else inner.inputs[0]]
    cube = _operand_of(b, other, "mul", 0.044715)
    if cube is None or cube.op != "mul" or x.id not in cube.inputs or len(cube.inputs) != 2:
        return None
    square = b.nodes[cube.inputs[0] if cube.inputs[1] == x.id else cube.inputs[1]]
    if square.op != "square" or square.inputs != (x.id,):
        return None
    return b.shared("gelu", x, approximate="tanh")


def _operand_of(b: Builder, value: Value, op: str, number: float) -> Node | None:
    """Return the operand x if ``value`` is ``op`` of x and (about) this number; else None."""
    if isinstance(value, Node) and value.op == op and abs(value.attrs.get("scalar", 0.0) - number) < 1e-6:
        return b.nodes[value.inputs[0]]
    return None


@gelu.lower
def _(to: Lowering, node: Node) -> Symbol:
    result: Symbol = to.functions.gelu(to.symbol(node.inputs[0]))
    return result


@operation("silu", compares=True)
def silu(x: Tensor, /) -> Tensor:
    """Compute x sigmoid(x)."""
    return F.silu(x)


@silu.aten("silu.default")
def _(b: Builder, x: Value) -> Value:
    return b.shared("silu", x)


@silu.lower
def _(to: Lowering, node: Node) -> Symbol:
    result: Symbol = to.functions.silu(to.symbol(node.inputs[0]))
    return result


@operation("erf", compares=True)
def erf(x: Tensor, /) -> Tensor:
    """Compute the error function."""
    return torch.erf(x)


@erf.aten("erf.default")
def _(b: Builder, x: Value) -> Value:
    return b.shared("erf", x)


@erf.lower
def _(to: Lowering, node: Node) -> Symbol:
    result: Symbol = approximate_erf(to.symbol(node.inputs[0]))
    return result


@operation("elu", compares=True)
def elu(x: Tensor, /, *, alpha: float, scale: float, input_scale: float) -> Tensor:
    """Compute scale x for x > 0 and scale alpha (e^(input_scale x) - 1) below."""
    return torch.ops.aten.elu.default(x, alpha, scale, input_scale)  # type: ignore[no-any-return]


@elu.aten("elu.default")
def _(b: Builder, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    if input_scale <= 0:
        b.unsupported("elu with input_scale > 0 is")
    return b.shared("elu", x, alpha=float(alpha), scale=float(scale), input_scale=float(input_scale))


@rule("celu.default")
def celu(b: Builder, x: Value, alpha: float = 1.0) -> Value:
    """Compute max(x, 0) + min(alpha (e^(x / alpha) - 1), 0)."""
    return b.shared("elu", x, alpha=float(alpha), scale=1.0, input_scale=1 / float(alpha))


@elu.lower
def _(to: Lowering, node: Node) -> Symbol:
    a = node.attrs
    x: Symbol = to.symbol(node.inputs[0])
    below: Symbol = approximate_expm1(x * a["input_scale"]) * (a["alpha"] * a["scale"])
    result: Symbol = below + approximations.relu(x) * a["scale"]
    return result


@rule("mish.default")
def mish(b: Builder, x: Value) -> Value:
    """Compute x tanh(softplus(x))."""
    return b.times(x, b.shared("tanh", b.shared("softplus", x, beta=1.0)))


@operation("tanh", compares=True)
def tanh(x: Tensor, /) -> Tensor:
    """Compute the hyperbolic tangent."""
    return torch.tanh(x)


@tanh.aten("tanh.default")
def _(b: Builder, x: Value) -> Value:
    return b.shared("tanh", x)


@rule("sigmoid.default")
def sigmoid(b: Builder, x: Value) -> Value:
    """Compute the sigmoid as (1 + tanh(x / 2)) / 2."""
    return b.times(b.plus(b.shared("tanh", b.times(x, 0.5)), 1.0), 0.5)


@tanh.lower
def _(to: Lowering, node: Node) -> Symbol:
    result: Symbol = approximations.tanh(to.symbol(node.inputs[0]))
    return result


@operation("softplus", compares=True)
def softplus(x: Tensor, /, *, beta: float) -> Tensor:
    """Compute log(1 + e^(beta x)) / beta."""
    return F.softplus(x, beta)


@softplus.aten("softplus.default")
def _(b: Builder, x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    """Refuse a low ``threshold``: above it torch replaces softplus by beta x, which would be another function."""
    if beta <= 0:
        b.unsupported("softplus with beta > 0 is supported")
    if threshold < _SOFTPLUS_KNOTS[-1]:
        b.unsupported(f"softplus with a threshold of at least {_SOFTPLUS_KNOTS[-1]:g} is supported")
    return b.shared("softplus", x, beta=float(beta))


@softplus.lower
def _(to: Lowering, node: Node) -> Symbol:
    beta = float(node.attrs["beta"])
    result: Symbol = approximate_softplus(to.symbol(node.inputs[0]) * beta) * (1 / beta)
    return result


_SOFTPLUS_KNOTS = (-9.0, -4.0, -1.5, 0.0, 1.5, 4.0, 9.0)
_SOFTPLUS_FITS = [minimax(F.softplus, low, high, 3) for low, high in pairwise(_SOFTPLUS_KNOTS)]


def approximate_softplus(x: Argument) -> Argument:
    """Approximate log(1 + e^x) by cubics between the knots, 0 below them and x above.

    The maximal error is 5e-4 (measured in tests). For softplus with ``beta`` it is 1/beta of that.
    """
    pieces = [ZERO, *(piece for piece, _ in _SOFTPLUS_FITS), IDENTITY]
    return piecewise(x, _SOFTPLUS_KNOTS, pieces, error=max(error for _, error in _SOFTPLUS_FITS))


_ERF_KNOTS = (0.0, 0.5, 1.1, 1.8, 3.2)
_ERF_FITS = [minimax(torch.erf, low, high, 3) for low, high in pairwise(_ERF_KNOTS)]


def approximate_erf(x: Argument) -> Argument:
    """Approximate the error function, which is odd, by cubics between the knots, and -1 or 1 beyond.

    The maximal error is 4e-4 (measured in tests).
    """
    right = [piece for piece, _ in _ERF_FITS]
    pieces = [constant(-1.0), *(p.mirrored(-1.0) for p in reversed(right)), *right, constant(1.0)]
    knots = (*(-k for k in reversed(_ERF_KNOTS[1:])), *_ERF_KNOTS)
    return piecewise(x, knots, pieces, error=max(error for _, error in _ERF_FITS))


_EXPM1_KNOTS = (-9.0, -4.5, -2.2, -0.9, 0.0)
_EXPM1_FITS = [minimax(torch.expm1, low, high, 3) for low, high in pairwise(_EXPM1_KNOTS)]


def approximate_expm1(x: Argument) -> Argument:
    """Approximate min(e^x - 1, 0) by cubics between the knots, -1 below them and 0 above.

    The maximal error is 5e-4 (measured in tests).
    """
    pieces = [constant(-1.0), *(piece for piece, _ in _EXPM1_FITS), ZERO]
    return piecewise(x, _EXPM1_KNOTS, pieces, error=max(error for _, error in _EXPM1_FITS))
