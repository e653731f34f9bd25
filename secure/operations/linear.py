"""Matrix products: linear layers, products of two shared tensors, convolutions of disjoint patches, and embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secure.capture.builder import Builder, Value, is_private, shape_of
from secure.capture.graph import Node
from secure.capture.operation import operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol


@operation("linear", takes_affine=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor:
    """Compute x @ weight.T + bias for a weight that the server (or everybody) knows."""
    return F.linear(x, weight, bias)


@linear.aten("linear.default")
def layer(b: Builder, x: Value, weight: Value, bias: Value = None) -> Value:
    """Translate a linear layer; if the server does not know the matrix, it is a product of two shared tensors."""
    if any(isinstance(w, Node) and w.visibility not in ("server", "public") for w in (weight, bias)):
        product = b.call("aten.matmul.default", x, b.permute(weight, range(len(shape_of(weight)))[::-1]))
        return product if bias is None else b.plus(product, bias)
    if not is_private((x, weight)):
        return b.plus(b.clear("aten.linear.default", x, weight), bias)
    return b.shared("linear", x, weight, *(() if bias is None else (bias,)))


@linear.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Fold the weight and bias of a preceding normalization, and a factor that follows, into the layer's own."""
    source, factor = node.inputs[0], _following_factor(to, node)
    suffix = f"*{factor:.17g}" if factor != 1.0 else ""
    weight, *bias = (to.known(i) if factor == 1.0 else to.known(i) * factor for i in node.inputs[1:])
    if source in to.units:
        # the server gets the normalized value once, for the normalization's own weight and for this layer: it saves
        # two rounds
        x, suffix = to.units[source], f"{suffix}*%{source}"
        scale, shift = to.affine(to.graph.nodes[source])
        bias = [sum(bias, weight @ shift)] if shift is not None else bias
        weight = weight * scale if scale is not None else weight
    else:
        x = to.symbol(source)
    out = x.linear(to.weight(node.inputs[1], ".T" + suffix, weight.T))
    if not bias:
        return out
    key = node.inputs[2] if len(node.inputs) > 2 and source not in to.units else node.inputs[1]
    # a folded bias depends on the weight and takes the weight's name, as layers with other weights may share the bias
    return out + to.weight(key, (".bias" if key == node.inputs[1] else "") + suffix, bias[0])


def _following_factor(to: Lowering, node: Node) -> float:
    """Return the number by which a layer's result is multiplied later, or 1 if anything else reads it.

    Such a number is attention's 1/sqrt(d) after the product with the keys. The multiplication is noted as absorbed.
    """
    reader = to.only_reader(node)
    while reader is not None and reader.op in ("matmul", "reshape", "permute"):
        reader = to.only_reader(reader)
    if reader is None or reader.op != "mul" or "scalar" not in reader.attrs:
        return 1.0
    to.absorbed.add(reader.id)
    return float(reader.attrs["scalar"])


@operation("matmul")
def matmul(x: Tensor, y: Tensor, /) -> Tensor:
    """Compute x @ y."""
    return torch.matmul(x, y)


@matmul.aten("matmul.default", "mm.default", "bmm.default", "mv.default")
def product(b: Builder, x: Value, y: Value) -> Value:
    """Translate x @ y; with a matrix that the server knows it becomes "linear"."""
    if not is_private((x, y)):
        return b.clear("aten.matmul.default", x, y)
    known = isinstance(y, Tensor) or (isinstance(y, Node) and y.visibility == "server")
    if known and len(shape_of(y)) == 2:
        return b.shared("linear", x, b.transpose(y, 0, 1))
    return b.shared("matmul", x, y)


@matmul.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Divide by a preceding softmax's sums here, where fewer entries are to be divided."""
    left, right = node.inputs
    if left in to.scores:
        attended: Symbol = to.functions.attend(to.scores[left], to.symbol(right))
        return attended
    return to.symbol(left) @ to.symbol(right)


@rule("addmm.default", "baddbmm.default")
def addmm(b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """Translate beta * bias + alpha * x @ y."""
    known = all(isinstance(v, Tensor) or (isinstance(v, Node) and v.visibility == "server") for v in (bias, y))
    if known and (beta, alpha) == (1, 1) and len(shape_of(y)) == 2 and len(shape_of(bias)) == 1:
        return layer(b, x, b.transpose(y, 0, 1), bias)
    return b.plus(b.times(product(b, x, y), alpha), b.times(bias, beta))


@rule("conv2d.default")
def conv2d(
    b: Builder, x: Value, weight: Value, bias: Value = None, stride: Any = (1, 1), padding: Any = (0, 0),
    dilation: Any = (1, 1), groups: int = 1,
) -> Value:  # fmt: skip
    """Translate a convolution of disjoint patches, as in vision transformers, into a linear map of each patch."""
    (batch, channels, height, width), (out, _, kh, kw) = shape_of(x), shape_of(weight)
    pairs = [tuple(p) * (2 // len(p)) for p in (stride, padding, dilation)]
    if pairs != [(kh, kw), (0, 0), (1, 1)] or groups != 1 or height % kh or width % kw:
        b.unsupported("of convolutions only those of disjoint patches are: stride = kernel size, no padding")
    rows, columns = height // kh, width // kw
    x = b.permute(b.reshape(x, [batch, channels, rows, kh, columns, kw]), [0, 2, 4, 1, 3, 5])
    x = b.reshape(x, [batch, rows * columns, channels * kh * kw])
    y = layer(b, x, b.reshape(weight, [out, channels * kh * kw]), bias)
    return b.reshape(b.permute(y, [0, 2, 1]), [batch, out, rows, columns])


@operation("embedding", takes_integers=True)
def embedding(ids: Tensor, table: Tensor, /) -> Tensor:
    """Look up the rows of a table that the client's ids name."""
    return F.embedding(ids, table)


@embedding.aten("embedding.default")
def _(b: Builder, table: Value, ids: Value, *_: Any) -> Value:
    """Translate a look-up of the client's ids in a table that the server knows."""
    if not isinstance(ids, Node) or ids.visibility != "client":
        b.unsupported("the ids of an embedding are an input of the client, its table a parameter")
    return b.shared("embedding", ids, table)


@embedding.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Look up by a product with one-hot rows, or let the client look up, which then holds the table."""
    ids, table = node.inputs[0], to.weight(node.inputs[1])
    rows = to.client_input(ids, to.embedding, table)
    return rows.linear(table) if to.embedding == "one-hot" else rows
