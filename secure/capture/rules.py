"""How ATen operations become operations on shared values: one rule for each, used when an operand is private.

A rule takes a `Builder` and the operation's own arguments. Rules compose the builder's methods, which choose by the
visibilities of their operands, so what one party can compute on its own stays in the clear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from secure.capture.builder import Builder, Norm, Root, Value, is_private, scalar_of, shape_of
from secure.capture.clear_operations import CLEAR_OPERATIONS
from secure.capture.graph import MASKED, Node

Rule = Callable[..., Value]
F = TypeVar("F", bound=Rule)

RULES: dict[str, Rule] = {}
"""Rules by the name of the operation; they apply when an operand is private."""

STRUCTURAL: dict[str, Rule] = {}
"""Rules that apply whatever the visibilities are."""

IDENTITIES = frozenset(
    f"aten.{name}"
    for name in (
        "alias.default", "clone.default", "contiguous.default", "detach.default", "detach_.default",
        "dropout.default", "feature_dropout.default", "lift_fresh.default", "lift_fresh_copy.default",
        "positive.default",
    )
)  # fmt: skip
"""Operations that do nothing in evaluation mode."""

CASTS = frozenset(
    f"aten.{name}"
    for name in (
        "_to_copy.default", "to.device", "to.dtype", "to.dtype_layout", "to.other", "to.prim_Device",
        "type_as.default",
    )
)  # fmt: skip
"""Operations that change the data type or the device only."""

IGNORED = frozenset({"aten._assert_tensor_metadata.default", "aten._assert_scalar.default"})
"""Checks that static shapes make superfluous."""


def rule(*names: str, table: dict[str, Rule] = RULES) -> Callable[[F], F]:
    """Register a rule for operations."""

    def register(function: F) -> F:
        table.update(dict.fromkeys((f"aten.{name}" for name in names), function))
        return function

    return register


def call(b: Builder, target: str, *args: Value, **kwargs: Value) -> Value:
    """Apply an operation, privately if it must be."""
    function = STRUCTURAL.get(target)
    if function is None:
        private = is_private((args, kwargs))
        if not private and (target in CLEAR_OPERATIONS or target not in RULES):
            return b.clear(target, *args, **kwargs)
        if target not in RULES:
            b.unsupported("replace it by supported operations, or leave it to the client, before or after the model")
        function = RULES[target]
    outer, b.operation = b.operation, target
    try:
        return function(b, *args, **kwargs)
    finally:
        b.operation = outer


def axes_of(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Axes as a list of natural numbers; none given means all."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return list(range(rank))
    return sorted(dim % rank for dim in ([dims] if isinstance(dims, int) else dims))


# Products.


@rule("linear.default")
def linear(b: Builder, x: Value, weight: Value, bias: Value = None) -> Value:
    """A product with a matrix that the server (or everybody) knows; anything else is a product of two tensors."""
    if any(isinstance(w, Node) and w.visibility not in ("server", "public") for w in (weight, bias)):
        product = call(b, "aten.matmul.default", x, b.permute(weight, range(len(shape_of(weight)))[::-1]))
        return product if bias is None else b.plus(product, bias)
    if not is_private((x, weight)):
        return b.plus(b.clear("aten.linear.default", x, weight), bias)
    return b.shared("linear", x, weight, *(() if bias is None else (bias,)))


@rule("matmul.default", "mm.default", "bmm.default", "mv.default")
def matmul(b: Builder, x: Value, y: Value) -> Value:
    """A product of tensors; one with a matrix of the server is "linear"."""
    if not is_private((x, y)):
        return b.clear("aten.matmul.default", x, y)
    known = isinstance(y, Tensor) or (isinstance(y, Node) and y.visibility == "server")
    if known and len(shape_of(y)) == 2:
        return b.shared("linear", x, b.transpose(y, 0, 1))
    return b.shared("matmul", x, y)


@rule("addmm.default", "baddbmm.default")
def addmm(b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """beta * bias + alpha * x @ y."""
    known = all(isinstance(v, Tensor) or (isinstance(v, Node) and v.visibility == "server") for v in (bias, y))
    if known and (beta, alpha) == (1, 1) and len(shape_of(y)) == 2 and len(shape_of(bias)) == 1:
        return linear(b, x, b.transpose(y, 0, 1), bias)
    return b.plus(b.times(matmul(b, x, y), alpha), b.times(bias, beta))


@rule("conv2d.default")
def conv2d(
    b: Builder, x: Value, weight: Value, bias: Value = None, stride: Any = (1, 1), padding: Any = (0, 0),
    dilation: Any = (1, 1), groups: int = 1,
) -> Value:  # fmt: skip
    """The convolution of disjoint patches (as in vision transformers): a linear map of each patch."""
    (batch, channels, height, width), (out, _, kh, kw) = shape_of(x), shape_of(weight)
    pairs = [tuple(p) * (2 // len(p)) for p in (stride, padding, dilation)]
    if pairs != [(kh, kw), (0, 0), (1, 1)] or groups != 1 or height % kh or width % kw:
        b.unsupported("of convolutions only those of disjoint patches are: stride = kernel size, no padding")
    rows, columns = height // kh, width // kw
    x = b.permute(b.reshape(x, [batch, channels, rows, kh, columns, kw]), [0, 2, 4, 1, 3, 5])
    x = b.reshape(x, [batch, rows * columns, channels * kh * kw])
    y = linear(b, x, b.reshape(weight, [out, channels * kh * kw]), bias)
    return b.reshape(b.permute(y, [0, 2, 1]), [batch, out, rows, columns])


@rule("scaled_dot_product_attention.default")
def attention(
    b: Builder, query: Value, key: Value, value: Value, attn_mask: Value = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """softmax(query @ key^T * scale + mask) @ value."""
    if dropout_p or enable_gqa:
        b.unsupported("call it with dropout_p=0 and as many key as query heads")
    rank, size = len(shape_of(key)), shape_of(query)[-1]
    scores = matmul(b, query, b.transpose(key, rank - 2, rank - 1))
    scores = b.times(scores, 1 / math.sqrt(size) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(shape_of(scores)[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        boolean = attn_mask.dtype in (torch.bool, "bool")
        scores = b.plus(scores, additive(b, attn_mask) if boolean else attn_mask)
    return matmul(b, call(b, "aten.softmax.int", scores, -1), value)


def additive(b: Builder, keep: Value) -> Value:
    """A boolean mask (true: attend) as a summand: 0 or `MASKED`."""
    return b.times(b.plus(b.cast(keep, torch.float32), -1.0), -MASKED)


# Sums, products and quotients.


@rule("add.Tensor", "add.Scalar")
def add(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    """x + alpha * y."""
    return b.plus(x, y if alpha == 1 else b.times(y, alpha))


@rule("sub.Tensor", "sub.Scalar")
def sub(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    """x - alpha * y."""
    y = y if alpha == 1 else b.times(y, alpha)
    number = scalar_of(y)
    if number is not None:
        return b.plus(x, torch.full(shape_of(y), -number))
    if scalar_of(x) is not None:
        return b.plus(b.shared("neg", y), x)
    return b.shared("sub", b.finite(x), b.finite(y))


@rule("rsub.Tensor", "rsub.Scalar")
def rsub(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    """y - alpha * x."""
    return sub(b, y, x, alpha)


@rule("mul.Tensor", "mul.Scalar")
def mul(b: Builder, x: Value, y: Value) -> Value:
    """x * y."""
    return b.times(x, y)


@rule("div.Tensor", "div.Scalar")
def div(b: Builder, x: Value, y: Value) -> Value:
    """x / y for y that one party knows, that is a square root, or that is the norm of x."""
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


@rule("pow.Tensor_Scalar")
def power(b: Builder, x: Value, exponent: float) -> Value:
    """Small natural powers, square roots (as denominators) and their inverses."""
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


@rule("square.default", "neg.default", "tanh.default", "relu.default", "silu.default", "rsqrt.default")
def unary(b: Builder, x: Value) -> Value:
    """Functions that have a protocol of their own."""
    return b.shared(b.operation.split(".")[1], x)


@rule("sqrt.default")
def sqrt(b: Builder, x: Value) -> Value:
    """A denominator to be."""
    return Root(b.operand(x))


@rule("reciprocal.default")
def reciprocal(b: Builder, x: Value) -> Value:
    """1 / sqrt(v)."""
    return div(b, 1.0, x) if not isinstance(x, Root) else b.shared("rsqrt", x.value)


@rule("sigmoid.default")
def sigmoid(b: Builder, x: Value) -> Value:
    """(1 + tanh(x / 2)) / 2."""
    return b.times(b.plus(b.shared("tanh", b.times(x, 0.5)), 1.0), 0.5)


@rule("gelu.default")
def gelu(b: Builder, x: Value, *, approximate: str = "none") -> Value:
    """GeLU, exact or with tanh."""
    return b.shared("gelu", x, approximate=approximate)


@rule("softmax.int", "_softmax.default")
def softmax(b: Builder, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    """Softmax along an axis."""
    return b.shared("softmax", x, dim=dim % len(shape_of(x)))


@rule("sum.dim_IntList", "mean.dim", "sum.default", "mean.default")
def reduction(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    """Sums and means."""
    return b.shared(b.operation.split(".")[1], x, dims=axes_of(dims, len(shape_of(x))), keepdim=keepdim)


# Normalizations.


@rule("layer_norm.default")
def layer_norm(
    b: Builder, x: Value, shape: Sequence[int], weight: Value = None, bias: Value = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    """Layer normalization over the last axes."""
    rank = len(shape_of(x))
    operands = [weight] if bias is None else [torch.ones(list(shape)) if weight is None else weight, bias]
    known = [operand for operand in operands if operand is not None]
    return b.shared("layer_norm", x, *known, eps=eps, axes=list(range(rank - len(shape), rank)))


@rule("rms_norm.default")
def rms_norm(b: Builder, x: Value, shape: Sequence[int], weight: Value = None, eps: float | None = None) -> Value:
    """x * rsqrt(mean(x^2) + eps) * weight."""
    rank = len(shape_of(x))
    dims = list(range(rank - len(shape), rank))
    mean = b.shared("mean", b.shared("square", x), dims=dims, keepdim=True)
    scale = b.shared("rsqrt", b.plus(mean, torch.finfo(torch.float32).eps if eps is None else eps))
    return b.times(b.times(x, scale), 1.0 if weight is None else weight)


@rule("batch_norm.default")
def batch_norm(
    b: Builder, x: Value, weight: Value, bias: Value, mean: Value, variance: Value, training: bool, momentum: float,
    eps: float, cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    """In evaluation mode an affine map with coefficients that the server computes."""
    if training or mean is None or variance is None:
        b.unsupported("use its running statistics: evaluation mode and track_running_stats=True")
    scale = call(b, "aten.rsqrt.default", b.plus(variance, eps))
    scale = scale if weight is None else b.times(scale, weight)
    shift = call(b, "aten.neg.default", b.times(mean, scale))
    shift = shift if bias is None else b.plus(shift, bias)
    shape = [-1 if axis == 1 else 1 for axis in range(len(shape_of(x)))]
    shape[1] = shape_of(x)[1]
    return b.plus(b.times(x, b.reshape(scale, shape)), b.reshape(shift, shape))


@rule("linalg_vector_norm.default")
def vector_norm(
    b: Builder, x: Value, order: float = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    """A denominator to be."""
    axes = axes_of(dims, len(shape_of(x)))
    if order != 2 or len(axes) != 1 or not keepdim:
        b.unsupported("of norms only the L2 norm along one axis is, as a denominator: F.normalize(x, dim=d)")
    shape = tuple(1 if axis == axes[0] else size for axis, size in enumerate(shape_of(x)))
    return Norm(b.operand(x), axes[0], shape)


@rule("clamp_min.default", "clamp.default")
def clamp_min(b: Builder, x: Value, minimum: float | None = None, maximum: float | None = None) -> Value:
    """The lower bound of a norm; max(x, 0)."""
    if isinstance(x, Norm) and isinstance(minimum, float) and maximum is None:
        return Norm(x.value, x.dim, x.shape, max(minimum, x.eps))
    if minimum == 0 and maximum is None:
        return b.shared("relu", x)
    b.unsupported("clamp(min=0) is relu; other bounds are not supported")
