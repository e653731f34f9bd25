"""From a model's graph to a trace of primitives: every operation becomes its approximation, run on symbolic values.

Before that, one floating-point pass over the calibration inputs finds what the approximations need to know: the range
of every variance, of every squared norm, and how far a masked score must be pushed down.
Weights that only the server knows are evaluated here, in the clear; what only the client knows stays a graph
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from approximations import Functions, relu, tanh
from approximations.softmax import CLIP
from secure.capture.graph import MASKED, Graph, Node, evaluate, run
from secure.errors import UnsupportedOperation
from secure.lowering.client_inputs import EMBEDDINGS, ClientInput, encode_input
from secure.lowering.observe import Observed
from secure.lowering.trace import Symbol, Trace, WeightRef, concatenate
from secure.operations.normalizations import Normalizations

POLYNOMIAL = frozenset({"polynomial", "power", "polynomial_norm"})  # operations of models in polynomial form
COMPARING = frozenset({"softmax", "gelu", "relu", "silu", "tanh", "layer_norm"})


@dataclass
class Lowered:
    trace: Trace
    outputs: list[Symbol]
    weights: dict[str, Tensor]
    client_graph: Graph
    client_inputs: list[ClientInput]
    clamps: dict[str, float]  # inputs that are additive masks: how low they need to go


def lower(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    seen: Observed,
    margin_bits: int,
    embedding: str,
    functions: Functions,
) -> Lowered:
    """Trace the graph through the approximations. ``parameters`` are float64."""
    if embedding not in EMBEDDINGS:
        raise ValueError(f"unknown embedding {embedding!r}\nhint: one of {', '.join(EMBEDDINGS)}")
    return _Lowering(graph, parameters, seen, margin_bits, embedding, functions).run()


class _Lowering(Normalizations):
    def __init__(
        self,
        graph: Graph,
        parameters: Mapping[str, Tensor],
        seen: Observed,
        margin_bits: int,
        embedding: str,
        functions: Functions,
    ) -> None:
        self.graph, self.parameters, self.seen = graph, parameters, seen
        self.margin, self.embedding, self.functions = 2.0**margin_bits, embedding, functions
        self.device = next((v.device for v in parameters.values()), torch.device("cpu"))  # "meta": shapes alone
        self.readers = graph.consumers()
        self.trace = Trace()
        self.symbols: dict[int, Symbol] = {}
        self.server: dict[int, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.client_outputs: list[int] = []
        self.client_inputs: dict[tuple[int, str], ClientInput] = {}
        self.clamps: dict[str, float] = {}
        self.factors, self.folded = self._fold_scalars()
        self.unscaled: dict[int, Symbol] = {}  # results of normalizations before their weight and bias
        shared = {node.op for node in graph.nodes if node.visibility == "shared"}
        self.compares = bool(shared & COMPARING) or not shared & POLYNOMIAL

    def run(self) -> Lowered:
        for node in self.graph.nodes:
            if node.visibility in ("public", "server"):
                self._evaluate(node)
            elif node.visibility == "shared":
                with self.trace.within(node.path):
                    self.symbols[node.id] = self._lower(node)
        for o in self.graph.outputs:
            if o not in self.symbols:
                raise UnsupportedOperation(
                    "an output does not depend on both the client's input and the server's weights, "
                    "so it needs no protocol\n"
                    "hint: compute it in the clear"
                )
        outputs = [self.symbols[o] for o in self.graph.outputs]
        client_graph = _subgraph(self.graph, self.client_outputs)
        return Lowered(self.trace, outputs, self.weights, client_graph, list(self.client_inputs.values()), self.clamps)

    def _evaluate(self, node: Node) -> None:
        if node.op == "parameter":
            value = self.parameters[node.attrs["name"]]
        else:
            with torch.device(self.device):
                value = evaluate(node, [self.server[i] for i in node.inputs], torch.float64)
        self.server[node.id] = value

    def _fold_scalars(self) -> tuple[dict[int, float], set[int]]:
        """Scalar factors of a product (attention's 1/sqrt(d)) move into the weights
        of the linear layer behind its left operand.
        """
        factors: dict[int, float] = {}
        folded: set[int] = set()
        for node in self.graph.nodes:
            if node.op != "mul" or "scalar" not in node.attrs:
                continue
            source = self.graph.nodes[node.inputs[0]]
            while source.op in ("matmul", "reshape", "permute") and len(self.readers[source.id]) == 1:
                source = self.graph.nodes[source.inputs[0]]
            if source.op == "linear" and source.visibility == "shared" and len(self.readers[source.id]) == 1:
                factors[source.id] = factors.get(source.id, 1.0) * float(node.attrs["scalar"])
                folded.add(node.id)
        return factors, folded

    # operands

    def _weight(self, i: int, suffix: str = "", value: Tensor | None = None) -> WeightRef:
        node = self.graph.nodes[i]
        name = (node.attrs["name"] if node.op == "parameter" else f"%{i}") + suffix
        found = (self.server[i] if value is None else value).to(torch.float64)
        if name in self.weights and self.weights[name].device.type != "meta" and not self.weights[name].equal(found):
            raise AssertionError(f"two weights of the name {name}")
        self.weights[name] = found
        return WeightRef(name, tuple(self.weights[name].shape))

    def _client(self, i: int, encoding: str = "plain", size: int = 0, shape: tuple[int, ...] | None = None) -> Symbol:
        """An input of the circuit that the client computes: node ``i`` of its graph."""
        node, key = self.graph.nodes[i], (i, encoding)
        if key not in self.client_inputs:
            if i not in self.client_outputs:
                self.client_outputs.append(i)
            name = f"{encoding}{i}"
            self.client_inputs[key] = ClientInput(
                name, self.client_outputs.index(i), encoding, size, shape if shape is not None else node.shape
            )
            self.symbols[i if encoding == "plain" else -1 - i] = self.trace.input(
                name, self.client_inputs[key].shape, integer=encoding == "one-hot"
            )
        return self.symbols[i if encoding == "plain" else -1 - i]

    def _symbol(self, i: int) -> Symbol:
        node = self.graph.nodes[i]
        if node.visibility == "shared":
            return self.symbols[i]
        if node.visibility == "client":
            return self._client(i)
        raise UnsupportedOperation(f"{node.path or 'model'}: a {node.visibility} operand cannot stand here")

    def _operand(self, i: int) -> Symbol | WeightRef:
        return self._weight(i) if self.graph.nodes[i].visibility in ("server", "public") else self._symbol(i)

    # operations

    def _lower(self, node: Node) -> Symbol:
        handler = getattr(self, f"_{node.op}", None)
        if handler is not None:
            return cast(Symbol, handler(node))
        x, a = self._symbol(node.inputs[0]), node.attrs
        simple: dict[str, Any] = {
            "neg": lambda: -x,
            "square": lambda: x.square(),
            "sum": lambda: x.sum(a["dims"], a["keepdim"]),
            "mean": lambda: x.mean(a["dims"], a["keepdim"]),
            "reshape": lambda: x.reshape(node.shape),
            "expand": lambda: x.expand(node.shape),
            "permute": lambda: x.permute(a["dims"]),
            "slice": lambda: x.slice(a["dim"], a["start"], a["stop"], a["step"]),
            "gelu": lambda: self.functions.gelu(x),
            "relu": lambda: relu(x),
            "silu": lambda: self.functions.silu(x),
            "tanh": lambda: tanh(x),
        }
        if node.op not in simple:
            known = sorted({*simple, *(n[1:] for n in dir(self) if n.startswith("_") and n[1:] in _HANDLED)})
            raise UnsupportedOperation(
                f"{node.path or 'model'}: no protocol for '{node.op}'\nhint: supported are {', '.join(known)}"
            )
        return cast(Symbol, simple[node.op]())

    def _add(self, node: Node) -> Symbol:
        if "scalar" in node.attrs:
            return self._symbol(node.inputs[0]) + float(node.attrs["scalar"])
        a, b = node.inputs
        for mask, other in ((a, b), (b, a)):
            self._note_mask(mask, other)
        left, right = self._operand(a), self._operand(b)
        return cast(Symbol, right) + left if isinstance(left, WeightRef) else left + right

    def _note_mask(self, mask: int, other: int) -> None:
        """An additive attention mask of the client: as low as it takes, not as low as it comes."""
        node = self.graph.nodes[mask]
        if node.visibility != "client":
            return
        if not self.seen.magnitude.get(mask, 0.0):
            raise ValueError(
                f"{node.path or 'model'}: what the client adds here was zero in every calibration input, so its range "
                "is unknown\nhint: for an attention mask, add a padded input to the calibration"
            )
        if self.seen.magnitude[mask] < -MASKED:
            return
        self._client(mask)
        name = self.client_inputs[mask, "plain"].name
        reach = 2 * self.seen.magnitude[other] * self.margin + CLIP + 1
        self.clamps[name] = max(self.clamps.get(name, 0.0), reach)

    def _sub(self, node: Node) -> Symbol:
        a, b = (self._operand(i) for i in node.inputs)
        if isinstance(a, WeightRef):
            return -cast(Symbol, b) + a
        if isinstance(b, WeightRef):
            return a + self._weight(node.inputs[1], ".neg", -self.server[node.inputs[1]])
        return a - b

    def _mul(self, node: Node) -> Symbol:
        if "scalar" in node.attrs:
            x = self._symbol(node.inputs[0])
            return x if node.id in self.folded else x * float(node.attrs["scalar"])
        left, right = (self._operand(i) for i in node.inputs)
        return cast(Symbol, right) * left if isinstance(left, WeightRef) else left * right

    def _matmul(self, node: Node) -> Symbol:
        left, right = node.inputs
        softmaxed = self.graph.nodes[left]
        if softmaxed.op == "softmax" and left != right and self._divides_later(softmaxed):
            return cast(Symbol, self.functions.attend(self._symbol(softmaxed.inputs[0]), self._symbol(right)))
        return self._symbol(left) @ self._symbol(right)

    def _softmax(self, node: Node) -> Symbol:
        x = self._symbol(node.inputs[0])
        if node.attrs["dim"] != len(node.shape) - 1:
            raise UnsupportedOperation(
                f"{node.path or 'model'}: softmax over dimension {node.attrs['dim']}\n"
                "hint: only the last dimension is supported"
            )
        return x if self._divides_later(node) else cast(Symbol, self.functions.softmax(x))

    def _divides_later(self, node: Node) -> bool:
        """Whether the softmax is only ever the left operand of one matrix product, which can divide after it."""
        readers = [self.graph.nodes[i] for i in self.readers[node.id]]
        return len(readers) == 1 and readers[0].op == "matmul" and readers[0].inputs[0] == node.id

    def _linear(self, node: Node) -> Symbol:
        source, factor = node.inputs[0], self.factors.get(node.id, 1.0)
        suffix = f"*{factor:.17g}" if factor != 1.0 else ""
        weight, *bias = (self.server[i] if factor == 1.0 else self.server[i] * factor for i in node.inputs[1:])
        if source in self.unscaled:  # weight and bias of the normalization move into these, and what it delivers to
            # the server for its own weight serves here too: two rounds less
            x, suffix = self.unscaled[source], f"{suffix}*%{source}"
            scale, shift = self._affine(self.graph.nodes[source])
            bias = [sum(bias, weight @ shift)] if shift is not None else bias
            weight = weight * scale if scale is not None else weight
        else:
            x = self._symbol(source)
        out = x.linear(self._weight(node.inputs[1], ".T" + suffix, weight.T))
        if not bias:
            return out
        key = node.inputs[2] if len(node.inputs) > 2 and source not in self.unscaled else node.inputs[1]
        # a folded bias depends on the weight, whose name it then takes: weights may share a bias
        return out + self._weight(key, (".bias" if key == node.inputs[1] else "") + suffix, bias[0])

    def _embedding(self, node: Node) -> Symbol:
        ids, table = node.inputs
        rows, width = self.graph.nodes[table].shape
        if self.embedding == "one-hot":
            return self._client(ids, "one-hot", rows, (*self.graph.nodes[ids].shape, rows)).linear(self._weight(table))
        ref = self._weight(table)
        out = self._client(ids, "client-table", rows, (*self.graph.nodes[ids].shape, width))
        key = (ids, "client-table")
        entry = self.client_inputs[key]
        self.client_inputs[key] = ClientInput(entry.name, entry.output, entry.encoding, rows, entry.shape, ref.name)
        return out

    def _cat(self, node: Node) -> Symbol:
        return concatenate([self._symbol(i) for i in node.inputs], node.attrs["dim"])


_HANDLED = (
    "add",
    "sub",
    "mul",
    "matmul",
    "softmax",
    "linear",
    "embedding",
    "layer_norm",
    "rms_norm",
    "l2_normalize",
    "rsqrt",
    "cat",
    "polynomial",
    "polynomial_norm",
    "power",
)


def _subgraph(graph: Graph, outputs: Sequence[int]) -> Graph:
    """The part of a graph that ``outputs`` depend on, renumbered;
    its inputs all stay, so that every client gives the same.
    """
    wanted = {node.id for node in graph.nodes if node.op == "input"}
    stack = list(outputs)
    while stack:
        i = stack.pop()
        if i not in wanted:
            wanted.add(i)
            stack.extend(graph.nodes[i].inputs)
    order = sorted(wanted)
    number = {old: new for new, old in enumerate(order)}
    nodes = []
    for old in order:
        n = graph.nodes[old]
        nodes.append(
            Node(number[old], n.op, tuple(number[i] for i in n.inputs), n.attrs, n.shape, n.dtype, n.visibility, n.path)
        )
    return Graph(tuple(nodes), tuple(number[o] for o in outputs))


Sample = Mapping[str, Tensor]


def trace_inputs(lowered: Lowered, sample: Sample, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = run(lowered.client_graph, sample, {}) if lowered.client_inputs else []
    out = {}
    for spec in lowered.client_inputs:
        value = encode_input(spec, values[spec.output], tables).to(torch.float64)
        out[spec.name] = value.clamp(min=-lowered.clamps[spec.name]) if spec.name in lowered.clamps else value
    return out
