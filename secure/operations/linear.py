"""Matrix products: linear layers, products of two shared tensors, and embeddings."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secure.capture.builder import Builder, Value, is_private, shape_of
from secure.capture.graph import Node
from secure.capture.operation import OPERATIONS, operation, rule
from secure.lowering.lower import Lowering
from secure.lowering.parts import part_of
from secure.lowering.trace import Symbol
from secure.operations.choices import check_places


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
    """Fold the weight and bias of a preceding normalization, and a factor that follows, into the layer's own.

    Layers that read the same normalized value, such as those of queries, keys and values, become one, of whose result
    each takes its columns. If they open their results, it is one opening for all of them.
    """
    if node.id in to.beside:
        return to.beside.pop(node.id)
    first, *others = layers = [_layer(to, each) for each in _side_by_side(to, node)]
    if not others:
        return _computed(to, layers)
    with to.within(_containing([layer.node.path for layer in layers])):
        whole = _computed(to, layers)
    start = 0
    for layer in layers:
        with to.within(layer.node.path):
            stop = start + layer.columns
            to.beside[layer.node.id] = whole.slice(len(whole.shape) - 1, start, stop)
            start = stop
    return to.beside.pop(first.node.id)


def _containing(paths: Sequence[str]) -> str:
    """Return the innermost module that contains several modules."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def _side_by_side(to: Lowering, node: Node) -> Sequence[Node]:
    """Return the linear layers that are computed as one with this one, which is the first of them."""
    source = node.inputs[0]
    if not to.stacks or source not in to.units or not _may_join(to, node):
        return [node]
    readers = [r for r in to.readers(to.graph.nodes[source]) if r.op == "linear" and r.inputs[0] == source]
    return [r for r in {r.id: r for r in readers}.values() if _may_join(to, r)]


def _may_join(to: Lowering, node: Node) -> bool:
    """True if a layer may be one with others: not a part that changes by itself, nor a matrix that is there once.

    What a normalization reads stays by itself as well: it may get more fraction bits than its neighbours need.
    """
    matrix, waiting = node.inputs[1], [node]
    if part_of(to.name(matrix)) or to.ties(matrix):
        return False
    while waiting:
        for reader in to.readers(waiting.pop()):
            if OPERATIONS[reader.op].measure is not None:
                return False
            if OPERATIONS[reader.op].moves:
                waiting.append(reader)
    return True


_LONG = 160  # characters


@dataclass(frozen=True)
class _Layer:
    """A layer: its matrix (columns, rows) and bias, by node, and the number that multiplies its result later."""

    node: Node
    matrix: int
    bias: int | None
    factor: float
    columns: int

    @property
    def suffix(self) -> str:
        """The end of the names of its weights."""
        return f"*{self.factor:.17g}" if self.factor != 1.0 else ""

    def scaled(self, to: Lowering, i: int) -> Tensor:
        """Return its matrix or its bias, times the factor."""
        return to.known(i) if self.factor == 1.0 else to.known(i) * self.factor

    def added(self, to: Lowering, shift: Tensor | None) -> Tensor:
        """Return what it adds, (columns,). shift: the bias of a normalization before it."""
        parts = [] if self.bias is None else [self.scaled(to, self.bias)]
        if shift is not None:
            parts.append(self.scaled(to, self.matrix) @ shift)
        return sum(parts[1:], parts[0]) if parts else torch.zeros(self.columns, dtype=torch.float64, device=to.device)


def _layer(to: Lowering, node: Node) -> _Layer:
    _, matrix, *bias = node.inputs
    return _Layer(node, matrix, bias[0] if bias else None, _following_factor(to, node), node.shape[-1])


def _computed(to: Lowering, layers: Sequence[_Layer]) -> Symbol:
    """Return the results of layers of one operand, side by side."""
    (source, *_), first = layers[0].node.inputs, layers[0]
    of, folded, scale, shift, column = [i for each in layers for i in each.node.inputs[1:]], "", None, None, None
    if source in to.units:
        # the server gets the normalized value once, for the normalization's own weight and for this layer: it saves
        # two rounds
        x, column, normalization = to.units[source]
        folded, of = f"*%{to.numbers[source]}", [*of, *normalization.inputs[1:]]
        scale, shift = to.affine(normalization)
        if scale is not None and first.factor == 1.0 and to.ties(first.matrix):
            x, scale = x * to.weight(normalization.inputs[1]), None
    else:
        x = to.symbol(source)

    def weight() -> Tensor:
        found = [each.scaled(to, each.matrix) for each in layers]
        found = [each if scale is None else each * scale for each in found]
        return (found[0] if len(layers) == 1 else torch.cat(found)).T

    def bias() -> Tensor:
        found = [each.added(to, shift) for each in layers]
        return (
            found[0]
            if len(layers) == 1
            else torch.cat([x.expand(n.columns) for x, n in zip(found, layers, strict=True)])
        )

    ends = [".T" + each.suffix + (folded if scale is not None else "") for each in layers]
    others = _short("".join(f"|{to.name(each.matrix)}{end}" for each, end in zip(layers[1:], ends[1:], strict=True)))
    rows, columns = to.graph.nodes[first.matrix].shape[-1], sum(each.columns for each in layers)
    out = x.linear(to.weight(first.matrix, ends[0] + others, weight, (rows, columns), of))
    out = out if column is None else out * column
    biases = [each.bias for each in layers if each.bias is not None]
    if not biases and shift is None:
        return out
    if len(layers) > 1:
        own = _short("".join(f"+{to.name(i)}" for i in biases))
        return out + to.weight(first.matrix, ".bias" + first.suffix + folded + others + own, bias, (columns,), of)
    key = biases[0] if biases and not folded else first.matrix
    # a folded bias depends on the weight and takes the weight's name, as layers with other weights may share the bias
    shared = folded and biases and len(to.readers(to.graph.nodes[first.matrix])) > 1
    own = f"+{to.name(biases[0])}" if shared else ""
    shape = (columns,) if shift is not None else to.graph.nodes[biases[0]].shape
    return out + to.weight(key, (".bias" if key == first.matrix else "") + first.suffix + folded + own, bias, shape, of)


def _short(names: str) -> str:
    """Return names as they are, or what stands for them where they are many: a Program's names have a bound."""
    return names if len(names) <= _LONG else f"{names[0]}{hashlib.sha256(names.encode()).hexdigest()[:32]}"


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
    left, right = _known(x), _known(y)
    if right and len(shape_of(y)) == 2:
        return b.shared("linear", x, b.transpose(y, 0, 1))
    if right and len(shape_of(x)) > 1 and len(shape_of(y)) > 2:
        return _product_each(b, x, y)
    if left and len(shape_of(x)) > 1 and len(shape_of(y)) > 1:  # x y = (y^T x^T)^T
        turned = product(b, _turned(b, y), _turned(b, x))
        return _turned(b, turned)
    return b.shared("matmul", x, y)


def _known(x: Value) -> bool:
    """True if the server knows a value, or everybody does."""
    return isinstance(x, Tensor) or (isinstance(x, Node) and x.visibility in ("server", "public"))


def _turned(b: Builder, x: Value) -> Value:
    rank = len(shape_of(x))
    return b.transpose(x, rank - 2, rank - 1)


def _product_each(b: Builder, x: Value, y: Value) -> Value:
    """Multiply matrices by those of a batch that the server knows, such as one for each head: a linear map each."""
    *batch, inner, outer = shape_of(y)
    rows = shape_of(x)[-2]
    whole = tuple(torch.broadcast_shapes(shape_of(x)[:-2], tuple(batch)))
    kept = max([i for i, n in enumerate(batch) if n > 1], default=-1)
    first = min([i for i, n in enumerate(batch) if n > 1], default=0)
    offset = len(whole) - len(batch)
    middle = whole[offset + first : offset + kept + 1] if kept >= first else ()
    before, each, after = (
        math.prod(part) for part in (whole[: offset + first], middle, whole[offset + max(kept + 1, first) :])
    )
    y = b.reshape(y, (*batch[first : kept + 1], inner, outer))
    matrices = b.reshape(b.expand(y, (*middle, inner, outer)), (each, inner, outer))
    x = b.reshape(b.expand(x, (*whole, rows, inner)), (before, each, after * rows, inner))
    parts = []
    for i in range(each):
        matrix = b.reshape(b.slice(matrices, 0, i, i + 1), (inner, outer))
        parts.append(b.shared("linear", b.slice(x, 1, i, i + 1), b.transpose(matrix, 0, 1)))
    joined = parts[0] if each == 1 else b.shared("cat", *parts, dim=1)
    return b.reshape(joined, (*whole, rows, outer))


@matmul.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Divide by a preceding softmax's sums here, where fewer entries are to be divided."""
    left, right = node.inputs
    if left in to.scores:
        attended: Symbol = to.functions.attend(to.scores[left], to.symbol(right), to.longest(to.graph.nodes[left]))
        return attended
    return to.symbol(left) @ to.symbol(right)


@rule("addmm.default", "baddbmm.default")
def addmm(b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """Translate beta * bias + alpha * x @ y."""
    known = all(isinstance(v, Tensor) or (isinstance(v, Node) and v.visibility == "server") for v in (bias, y))
    if known and (beta, alpha) == (1, 1) and len(shape_of(y)) == 2 and len(shape_of(bias)) == 1:
        return layer(b, x, b.transpose(y, 0, 1), bias)
    return b.plus(b.times(product(b, x, y), alpha), b.times(bias, beta))


@operation("embedding", takes_integers=True)
def embedding(ids: Tensor, table: Tensor, /) -> Tensor:
    """Look up the rows of a table that the client's ids name."""
    return F.embedding(ids, table)


@embedding.aten("embedding.default")
def _(b: Builder, table: Value, ids: Value, *_: Any) -> Value:
    """Translate a look-up in a table that the server knows: of the client's ids, or of positions that nobody knows."""
    if isinstance(ids, Node) and ids.visibility == "shared" and ids.dtype == "int" and _known(table):
        return b.shared("looked_up", ids, table)
    if not isinstance(ids, Node) or ids.visibility != "client":
        b.unsupported("the ids of an embedding are an input of the client or an arg-max, its table a parameter")
    return b.shared("embedding", ids, table)


@embedding.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Look up by a product with one-hot rows, or let the client look up, which then holds the table."""
    ids, table = node.inputs[0], to.weight(node.inputs[1])
    rows = to.client_input(ids, to.embedding, table)
    return rows.linear(table) if to.embedding == "one-hot" else rows


@operation("looked_up", takes_integers=True)
def looked_up(ids: Tensor, table: Tensor, /) -> Tensor:
    """Look up the rows of a table at positions that an arg-max or a top-k found, which nobody learns."""
    return F.embedding(ids, table)


@looked_up.lower
def _(to: Lowering, node: Node) -> Symbol:
    """Multiply the table with unit vectors of the positions. Any row may be found, so the ranges hold all of them.

    A table that parameters make up, one below the other, is looked up part by part, so that each is a weight.
    """
    ids, table = node.inputs
    check_places(to, node, ids, to.graph.nodes[table].shape[0])
    found = to.symbol(ids).units(to.graph.nodes[table].shape[0])
    parts, start = list[Symbol](), 0
    for part in _stacked(to, table):
        stop = start + to.graph.nodes[part].shape[0]
        rows = found.slice(len(found.shape) - 1, start, stop).linear(to.weight(part))
        parts.append(rows.bounded(*_reach(to, table)))
        start = stop
    total = parts[0]
    for each in parts[1:]:
        total = (total + each).bounded(*_reach(to, table))
    return total


def _stacked(to: Lowering, table: int) -> Sequence[int]:
    """Return the parameters that make up a table, one below the other, or the table itself."""
    node = to.graph.nodes[table]
    if node.op != "clear" or node.attrs["target"] != "aten.cat.default" or node.attrs["kwargs"]:
        return [table]
    listed, *dim = node.attrs["args"]
    parts = [to.graph.nodes[i] for i in node.inputs]
    below = dim in ([], [0]) and len(listed) == len(parts) and all(part.op == "parameter" for part in parts)
    return node.inputs if below else [table]


def _reach(to: Lowering, table: int) -> tuple[float, float]:
    """Return a range that holds every entry of a table: up to a power of two, which tells no entry."""
    known = to.known(table)
    most = 1.0 if known.is_meta else max(float(known.abs().max()), 2.0**-16)
    reach = 2.0 ** math.ceil(math.log2(most))
    return -reach, reach
