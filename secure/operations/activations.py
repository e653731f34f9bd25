"""Activations: functions of one value, such as GeLU and tanh."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import approximations
from approximations.fits import minimax
from approximations.primitives import IDENTITY, ZERO, piecewise
from approximations.primitives import Value as Argument
from secure.capture.builder import Builder, Norm, Value
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


@rule("clamp_min.default", "clamp.default")
def clamp(b: Builder, x: Value, minimum: float | None = None, maximum: float | None = None) -> Value:
    """Bound a norm from below, or compute max(x, 0)."""
    if isinstance(x, Norm) and isinstance(minimum, float) and maximum is None:
        return Norm(x.value, x.dim, x.shape, max(minimum, x.eps))
    if minimum == 0 and maximum is None:
        return b.shared("relu", x)
    b.unsupported("clamp(min=0) is relu; other bounds are not supported")


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
    """Recognize x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as several models write it."""
    x = _operand_of(b, half, "mul", 0.5)
    tanh = _operand_of(b, rest, "add", 1.0)
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
