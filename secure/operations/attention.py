"""Softmax, the masking of its entries, and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secure.capture.builder import Builder, Value, scalar_of, shape_of
from secure.capture.graph import MASKED, Node
from secure.capture.operation import operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol


@operation("softmax", compares=True, takes_masks=True)
def softmax(x: Tensor, /, *, dim: int) -> Tensor:
    """Divide e^x by its sum along an axis."""
    return torch.softmax(x, dim)


@softmax.aten("softmax.int", "_softmax.default")
def _(b: Builder, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    return b.shared("softmax", x, dim=dim % len(shape_of(x)))


@softmax.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Leave the division to the product if a product is the only reader and this its left operand; see "matmul"."""
    x = to.symbol(node.inputs[0])
    if node.attrs["dim"] != len(node.shape) - 1:
        raise to.unsupported(
            node, f"softmax over dimension {node.attrs['dim']}", "only the last dimension is supported"
        )
    reader = to.only_reader(node)
    if reader is not None and reader.op == "matmul":
        to.scores[node.id] = x
        return x
    weights: Symbol = to.functions.softmax(x, to.longest(node))
    return weights


@rule("scaled_dot_product_attention.default")
def attention(
    b: Builder, query: Value, key: Value, value: Value, attn_mask: Value = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """Translate softmax(query @ key^T * scale + mask) @ value."""
    if dropout_p or enable_gqa:
        b.unsupported("call it with dropout_p=0 and as many key as query heads")
    rank, size = len(shape_of(key)), shape_of(query)[-1]
    scores = b.call("aten.matmul.default", query, b.transpose(key, rank - 2, rank - 1))
    scores = b.times(scores, 1 / math.sqrt(size) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(shape_of(scores)[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        boolean = attn_mask.dtype in (torch.bool, "bool")
        outer, b.takes_masks = b.takes_masks, True  # the sum is the softmax's alone
        scores = b.plus(scores, additive(b, attn_mask) if boolean else attn_mask)
        b.takes_masks = outer
    return b.call("aten.matmul.default", b.call("aten.softmax.int", scores, -1), value)


def additive(b: Builder, keep: Value) -> Value:
    """Turn a boolean mask (true: attend) into an additive one of 0 and `MASKED`."""
    return b.times(b.plus(b.cast(keep, torch.float32), -1.0), -MASKED)


@rule("where.self", "where.ScalarOther", "where.ScalarSelf")
def where(b: Builder, condition: Value, x: Value, y: Value) -> Value:
    """Select x if a condition that one party knows holds, else y."""
    for value in (condition, x, y):
        number = scalar_of(value)
        if value is not condition and number is not None and number <= MASKED:
            return _masked(b, condition, y if value is x else x, attend=value is y)
    keep = b.cast(condition, torch.float32)
    drop = b.plus(b.call("aten.neg.default", keep), 1.0)
    return b.plus(b.times(x, keep), b.times(y, drop))


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(b: Builder, x: Value, mask: Value, value: Value) -> Value:
    """Select a value if a mask holds, else x."""
    number = scalar_of(value)
    return where(b, mask, torch.tensor(number if number is not None else value), x)


def _masked(b: Builder, mask: Value, scores: Value, attend: bool) -> Value:
    """Add minus "infinity" to masked scores. It is exact only before a softmax, which is checked."""
    if not b.takes_masks:
        b.unsupported("filling with a large negative number is supported directly before a softmax only")
    summand = additive(b, mask) if attend else b.times(b.cast(mask, torch.float32), MASKED)
    return b.plus(scores, summand)
