"""Operations of models in polynomial form: polynomials with public coefficients, and powers on ranges from training.

``secure.polynomial.operations`` defines them for torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import approximations
from approximations import Piece
from secure.capture.builder import Builder, Value
from secure.capture.graph import Node
from secure.capture.operation import operation
from secure.errors import InvalidInput
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol


def _check_range(to: Lowering, node: Node) -> None:
    """Refuse a calibration that leaves the range of training. Raises InvalidInput."""
    low, high = to.measured(node)
    if not node.attrs["low"] <= low <= high <= node.attrs["high"]:
        raise InvalidInput(
            f"{node.path or 'model'}: '{node.op}' met values in [{low:.4g}, {high:.4g}], its polynomial is "
            f"made for [{node.attrs['low']:.4g}, {node.attrs['high']:.4g}]",
            "train on inputs like these, or longer, so that the range holds",
        )


@operation("polynomial", polynomial=True)
def polynomial(x: Tensor, /, *, coefficients: Sequence[float], centre: float, spare: int = 0) -> Tensor:
    """Compute sum_j coefficients[j] (x - centre)^j. spare: the fraction bits that its readers can do without."""
    return Piece(tuple(coefficients), centre)(x)


@polynomial.aten("polynomial.default", namespace="unseen")
def _(b: Builder, x: Value, coefficients: Sequence[float], centre: float, spare: int = 0) -> Value:
    return b.shared("polynomial", x, coefficients=list(coefficients), centre=centre, spare=spare)


@polynomial.lower
def _(to: Lowering, node: Node) -> Symbol:
    piece = Piece(tuple(node.attrs["coefficients"]), float(node.attrs["centre"]))
    result: Symbol = approximations.polynomial(to.symbol(node.inputs[0]), piece, -int(node.attrs.get("spare", 0)))
    return result


@operation("power", polynomial=True)
def power(x: Tensor, /, *, exponent: float, low: float, high: float, degree: int, steps: int) -> Tensor:
    """Compute x^exponent on [low, high] by polynomials; see ``approximations.power``."""
    return torch.as_tensor(approximations.power(x, exponent, low, high, degree, steps))


@power.aten("power.default", namespace="unseen")
def _(b: Builder, x: Value, exponent: float, low: float, high: float, degree: int, steps: int) -> Value:
    return b.shared("power", x, exponent=exponent, low=low, high=high, degree=degree, steps=steps)


@power.observes
def _(x: Tensor, **_: Any) -> Tensor:
    """Return the operand itself."""
    return x


@power.assumes
def _(operand: Node, reach: float, *, low: float, high: float, **_: Any) -> tuple[float, float]:
    return low, high


@power.lower
def _(to: Lowering, node: Node) -> Symbol:
    _check_range(to, node)
    a = node.attrs
    form = (a["exponent"], a["low"], a["high"], a["degree"], a["steps"])
    result: Symbol = to.power(node)(to.symbol(node.inputs[0]), *form)
    return result


@operation("polynomial_norm", polynomial=True)
def polynomial_norm(
    x: Tensor, weight: Tensor, bias: Tensor, /, *, eps: float, low: float, high: float, degree: int, steps: int
) -> Tensor:
    """Normalize over the last axis, with the inverse root by polynomials."""
    return torch.as_tensor(approximations.polynomial_layer_norm(x, weight, bias, eps, low, high, degree, steps))


@polynomial_norm.aten("layer_norm.default", namespace="unseen")
def _(
    b: Builder, x: Value, weight: Value, bias: Value, eps: float, low: float, high: float, degree: int, steps: int
) -> Value:
    return b.shared("polynomial_norm", x, weight, bias, eps=eps, low=low, high=high, degree=degree, steps=steps)


@polynomial_norm.observes
def _(x: Tensor, **_: Any) -> Tensor:
    """Return the variance."""
    return x.var(dim=-1, unbiased=False)


@polynomial_norm.assumes
def _(operand: Node, reach: float, *, low: float, high: float, **_: Any) -> tuple[float, float]:
    return low, high


@polynomial_norm.lower
def _(to: Lowering, node: Node) -> Symbol:
    _check_range(to, node)
    a = node.attrs
    form = (a["eps"], a["low"], a["high"], a["degree"], a["steps"])
    x = to.symbol(node.inputs[0])
    return to.normalized(node, *approximations.polynomial_layer_norm_factors(x, *form, to.functions.power))


@operation("polynomial_rms_norm", polynomial=True)
def polynomial_rms_norm(
    x: Tensor, weight: Tensor, /, *, eps: float, low: float, high: float, degree: int, steps: int
) -> Tensor:
    """Divide by the root of the mean square of the last axis, with the inverse root by polynomials."""
    return torch.as_tensor(approximations.polynomial_rms_norm(x, weight, eps, low, high, degree, steps))


@polynomial_rms_norm.aten("rms_norm.default", namespace="unseen")
def _(b: Builder, x: Value, weight: Value, eps: float, low: float, high: float, degree: int, steps: int) -> Value:
    return b.shared("polynomial_rms_norm", x, weight, eps=eps, low=low, high=high, degree=degree, steps=steps)


@polynomial_rms_norm.observes
def _(x: Tensor, **_: Any) -> Tensor:
    """Return the mean square."""
    return x.square().mean(-1)


@polynomial_rms_norm.assumes
def _(operand: Node, reach: float, *, low: float, high: float, **_: Any) -> tuple[float, float]:
    return low, high


@polynomial_rms_norm.lower
def _(to: Lowering, node: Node) -> Symbol:
    _check_range(to, node)
    a = node.attrs
    form = (a["eps"], a["low"], a["high"], a["degree"], a["steps"])
    x = to.symbol(node.inputs[0])
    return to.normalized(node, *approximations.polynomial_rms_norm_factors(x, *form, to.functions.power))
