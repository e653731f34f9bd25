"""Sums, products, quotients and powers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from approximations.primitives import bounded
from approximations.softmax import CLIP, SLACK
from secure.capture.builder import Builder, Norm, Root, Value, scalar_of, shape_of
from secure.capture.graph import MASKED, Node
from secure.capture.operation import operation, rule
from secure.errors import InvalidInput, InvalidProgram
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol, WeightRef
from secure.operations.choices import are_public, is_step, is_whole

# Sums. An additive attention mask is an operand that the client knows.


@operation("add")
def add(x: Tensor, y: Tensor | None = None, /, *, scalar: float | None = None, mask: bool = False) -> Tensor:
    """Compute x + y, or x + scalar. mask: y marks absent entries of scores x by large negative numbers."""
    return x + float(scalar) if scalar is not None else torch.add(x, _second(y))


def _second(y: Tensor | None) -> Tensor:
    if y is None:
        raise InvalidProgram("it has neither a second operand nor a scalar")
    return y


@add.aten("add.Tensor", "add.Scalar")
def _(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    """Translate x + alpha * y."""
    for whole, offsets in ((x, y), (y, x)):
        if is_whole(whole) and alpha == 1 and are_public(offsets):
            return b.shared("renumbered", whole, offsets)
    return b.plus(x, y if alpha == 1 else b.times(y, alpha))


@add.lower
def _(to: Lowering, node: Node) -> Symbol:
    if "scalar" in node.attrs:
        return to.symbol(node.inputs[0]) + float(node.attrs["scalar"])
    first, second = node.inputs
    if (turned := _turned(to, first, second) or _turned(to, second, first)) is not None:
        return turned
    for i in (first, second):
        _check_range(to, i)
    if node.attrs.get("mask") and not to.is_known(first) and _is_deep(to, second):
        return _masked(to, second, to.symbol(first), to.seen.magnitude[first] * to.margin)
    left, right = to.operand(first), to.operand(second)
    if isinstance(left, WeightRef):
        assert isinstance(right, Symbol)
        return right + left
    return left + right


def _turned(to: Lowering, along: int, across: int) -> Symbol | None:
    """Return x * c + (-x'', x') * s for halves x', x'' of a row and public c and s, or None if the sum is no such.

    It is how models turn queries and keys by angles that their positions give (rotary embeddings: Su et al., RoFormer,
    2021, section 3.4.2), in one primitive.
    """
    if (found := _times_public(to, along)) is None or (other := _times_public(to, across)) is None:
        return None
    (x, cosine), (halves, sine) = found, other
    shapes, row = {to.graph.nodes[i].shape for i in (cosine, sine)}, to.graph.nodes[x].shape[-1:]
    if not _swaps_halves(to, x, halves) or len(shapes) > 1 or {shape[-1:] for shape in shapes} != {row}:
        return None
    return to.symbol(x).rotated(*(to.client_input(i, "public") for i in (cosine, sine)))


def _times_public(to: Lowering, i: int) -> tuple[int, int] | None:
    """Return the operands of a product with numbers that are no secret."""
    product = to.graph.nodes[i]
    if product.op != "mul" or "scalar" in product.attrs:
        return None
    for x, c in (product.inputs, product.inputs[::-1]):
        if to.is_public(c):
            return x, c
    return None


def _swaps_halves(to: Lowering, x: int, halves: int) -> bool:
    """True if ``halves`` is (-x'', x') for the halves x', x'' of the last dimension of x."""
    nodes, joined = to.graph.nodes, to.graph.nodes[halves]
    size, last = nodes[x].shape[-1], len(nodes[x].shape) - 1
    if joined.op != "cat" or joined.attrs["dim"] != last or len(joined.inputs) != 2 or size % 2:
        return False
    turned, first = (nodes[i] for i in joined.inputs)
    if turned.op != "neg" or len(turned.inputs) != 1:
        return False
    ends = {"dim": last, "step": 1}
    second = nodes[turned.inputs[0]]
    return (first.op, second.op, first.inputs, second.inputs) == ("slice", "slice", (x,), (x,)) and (
        first.attrs == {**ends, "start": 0, "stop": size // 2}
        and second.attrs == {**ends, "start": size // 2, "stop": size}
    )


def _is_deep(to: Lowering, i: int) -> bool:
    """True if a mask reaches down to where a softmax ignores what it is added to."""
    if to.is_known(i):
        known = to.known(i)
        return not known.is_meta and bool((known <= MASKED).any())
    return to.seen.magnitude[i] >= -MASKED


def _check_range(to: Lowering, i: int) -> None:
    """Raise InvalidInput for a summand of the client's whose range is unknown."""
    node = to.graph.nodes[i]
    if node.visibility == "client" and not to.seen.magnitude.get(i, 0.0):
        raise InvalidInput(
            f"{node.path or 'model'}: what the client adds here was zero in every calibration input, so its range is "
            "unknown",
            "for an attention mask, add a padded input to the calibration",
        )


def _masked(to: Lowering, mask: int, scores: Symbol, most: float) -> Symbol:
    """Add a mask to scores of magnitude ``most``, clamped at the depth that the softmax needs, to fit a smaller ring.

    The depth is a power of two, so that layers share inputs.
    """
    above = to.seen.highest.get(mask, 0.0) * to.margin
    reach = 2.0 ** math.ceil(math.log2(2 * most + above + CLIP + SLACK))
    if to.is_known(mask):
        summand: Symbol | WeightRef = to.weight(mask, f".down{reach:g}", to.known(mask).clamp(min=-reach))
    else:
        summand = to.client_input(mask, reach=reach)
    result: Symbol = bounded(scores + summand, -most - reach, most + above)
    return result


@operation("sub")
def sub(x: Tensor, y: Tensor, /) -> Tensor:
    """Compute x - y."""
    return torch.sub(x, y)


@sub.aten("sub.Tensor", "sub.Scalar")
def difference(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    """Translate x - alpha * y."""
    y = y if alpha == 1 else b.times(y, alpha)
    number = scalar_of(y)
    if number is not None:
        return b.plus(x, torch.full(shape_of(y), -number))
    if scalar_of(x) is not None:
        return b.plus(b.shared("neg", y), x)
    if isinstance(y, Node) and y.visibility == "client":  # a mask, perhaps
        return b.plus(x, b.clear("aten.neg.default", b.cast(y, torch.float32)))
    return b.shared("sub", b.finite(x), b.finite(y))


@rule("rsub.Tensor", "rsub.Scalar")
def rsub(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    """Translate y - alpha * x."""
    return difference(b, y, x, alpha)


@sub.lower
def _(to: Lowering, node: Node) -> Symbol:
    first, second = node.inputs
    left, right = to.operand(first), to.operand(second)
    if isinstance(left, WeightRef):
        assert isinstance(right, Symbol)
        return -right + left
    return left + to.weight(second, ".neg", -to.known(second)) if isinstance(right, WeightRef) else left - right


@operation("neg")
def neg(x: Tensor, /) -> Tensor:
    """Compute -x."""
    return -x


@neg.aten("neg.default")
def _(b: Builder, x: Value) -> Value:
    return b.shared("neg", x)


@neg.lower
def _(to: Lowering, node: Node) -> Symbol:
    return -to.symbol(node.inputs[0])


@operation("sum")
def sum_(x: Tensor, /, *, dims: Sequence[int], keepdim: bool) -> Tensor:
    """Sum over axes."""
    return torch.sum(x, list(dims), keepdim)


@sum_.aten("sum.dim_IntList", "sum.default")
def _(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return b.shared("sum", x, dims=axes_of(dims, len(shape_of(x))), keepdim=keepdim)


@sum_.lower
def _(to: Lowering, node: Node) -> Symbol:
    return to.symbol(node.inputs[0]).sum(node.attrs["dims"], node.attrs["keepdim"])


@operation("mean")
def mean(x: Tensor, /, *, dims: Sequence[int], keepdim: bool) -> Tensor:
    """Compute the mean over axes."""
    return torch.mean(x, list(dims), keepdim)


@mean.aten("mean.dim", "mean.default")
def _(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return b.shared("mean", x, dims=axes_of(dims, len(shape_of(x))), keepdim=keepdim)


@mean.lower
def _(to: Lowering, node: Node) -> Symbol:
    return to.symbol(node.inputs[0]).mean(node.attrs["dims"], node.attrs["keepdim"])


def axes_of(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Return axes as a sorted list of numbers that are not negative; no axes stand for all."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return list(range(rank))
    return sorted(dim % rank for dim in ([dims] if isinstance(dims, int) else dims))


# Products and quotients.


@operation("mul")
def mul(x: Tensor, y: Tensor | None = None, /, *, scalar: float | None = None) -> Tensor:
    """Compute x * y, or x * scalar."""
    return x * float(scalar) if scalar is not None else torch.mul(x, _second(y))


@mul.aten("mul.Tensor", "mul.Scalar")
def _(b: Builder, x: Value, y: Value) -> Value:
    for whole, step in ((x, y), (y, x)):
        if is_whole(whole) and is_step(step):
            return b.shared("renumbered", whole, step=int(scalar_of(step) or 0))
    return b.times(x, y)


@mul.lower
def _(to: Lowering, node: Node) -> Symbol:
    if "scalar" in node.attrs:
        x = to.symbol(node.inputs[0])
        return x if node.id in to.absorbed else x * float(node.attrs["scalar"])
    for i, other in (node.inputs, node.inputs[::-1]):
        if to.is_public(i):
            return to.symbol(other).times_public(to.client_input(i, "public"))
    left, right = (to.operand(i) for i in node.inputs)
    if isinstance(left, WeightRef):
        assert isinstance(right, Symbol)
        return right * left
    return left * right


@rule("div.Tensor", "div.Scalar")
def div(b: Builder, x: Value, y: Value) -> Value:
    """Translate x / y if one party knows y, or y is a square root, or y is the norm of x."""
    if isinstance(y, Norm):
        if not isinstance(x, Node) or x.id != y.value.id:
            b.unsupported("divide a value by its own norm only (F.normalize)")
        return b.shared("l2_normalize", x, dim=y.dim, eps=y.eps)
    if isinstance(y, Root):
        return b.times(x, b.shared("rsqrt", y.value))
    if isinstance(y, Node) and y.visibility == "shared":
        b.unsupported("divide by a value that one party knows, by sqrt(v) or by a norm; softmax as one operation")
    number = scalar_of(y)
    if number is not None:
        return b.times(x, torch.full(shape_of(y), 1 / number))
    return b.times(x, b.clear("aten.reciprocal.default", b.cast(y, torch.float32)))


@rule("reciprocal.default")
def reciprocal(b: Builder, x: Value) -> Value:
    """Translate 1 / x if one party knows x, or x is a square root."""
    return div(b, 1.0, x) if not isinstance(x, Root) else b.shared("rsqrt", x.value)


# Powers.


@operation("square")
def square(x: Tensor, /) -> Tensor:
    """Compute x * x."""
    return torch.square(x)


@square.aten("square.default")
def _(b: Builder, x: Value) -> Value:
    return b.shared("square", x)


@square.lower
def _(to: Lowering, node: Node) -> Symbol:
    return to.symbol(node.inputs[0]).square()


@rule("pow.Tensor_Scalar")
def power(b: Builder, x: Value, exponent: float) -> Value:
    """Translate powers with exponents 1 to 16, square roots (as denominators) and inverse square roots."""
    if exponent in (0.5, -0.5):
        return Root(b.operand(x)) if exponent > 0 else b.shared("rsqrt", x)
    if exponent != int(exponent) or not 1 <= exponent <= 16:
        b.unsupported("the exponents 1 to 16, 0.5 and -0.5 are supported")
    result: Value = None
    for digit in bin(int(exponent))[2:]:  # square and multiply
        result = None if result is None else b.shared("square", result)
        if digit == "1":
            result = x if result is None else b.times(x, result)
    return result


@rule("sqrt.default")
def sqrt(b: Builder, x: Value) -> Value:
    """Keep a square root until a division uses it as the denominator."""
    return Root(b.operand(x))
