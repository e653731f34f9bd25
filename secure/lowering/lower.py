"""From a model's graph to a trace of primitives: every operation becomes its approximation, run on symbolic values.

Nodes that only the server knows are evaluated here, in the clear; nodes that only the client knows become the client's
own graph. The lowering of each operation is defined beside the operation (`secure.capture.operation`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from approximations import Function, Functions
from secure.capture.clear_operations import check_client_operation
from secure.capture.graph import Graph, Node, evaluate
from secure.capture.operation import OPERATIONS
from secure.errors import InvalidInput, InvalidProgram, UnsupportedOperation
from secure.lowering.client_inputs import EMBEDDINGS, ClientInput, clear_values, encode_input
from secure.lowering.made import Made, Room
from secure.lowering.observe import Observed
from secure.lowering.primitives import Shape
from secure.lowering.trace import Symbol, Trace, WeightRef

OPENED = 16
"""The online bytes of an opened number, both ways; at most."""

FEW = 256
"""The most values of which powers may cost more: their largest tables are worth a round, by the usual prices."""

LARGEST_COLUMN = 16.0
"""The largest inverse root of a row that comes late: results lose four bits of precision at most."""

Sample = Mapping[str, Tensor]
"""A module's keyword arguments."""


@dataclass(repr=False)  # holds weights
class Lowered:
    """A model as a trace, the weights that it names (float64), and the recipe by which the client makes its inputs.

    weights: those of a large model are made at each reading, see ``Made``. shapes: theirs, without making them.
    common: weights that are the same at all sizes of the model, as they follow from parameters alone.
    outputs: the results by name, in their order, without those that one party computes alone: what follows from the
    client's input it knows, and what follows from the server's weights is not for clients. clamps: the inputs that are
    additive masks, each with the magnitude down to which its negative values are kept. left_out: names of the other
    results.
    """

    trace: Trace
    outputs: dict[str, Symbol]
    weights: Mapping[str, Tensor]
    client_graph: Graph
    client_inputs: list[ClientInput]
    clamps: dict[str, float]
    left_out: tuple[str, ...] = ()
    common: frozenset[str] = frozenset()
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        """Return the shape of a weight."""
        return self.shapes[name] if name in self.shapes else tuple(self.weights[name].shape)

    @property
    def tables(self) -> dict[str, Tensor]:
        """The weights that clients hold, by name."""
        return {c.table: self.weights[c.table] for c in self.client_inputs if c.encoding == "client-table"}

    def inputs(self, sample: Sample) -> dict[str, Tensor]:
        """Make the trace's inputs from a sample as the client does, in float64."""
        if not self.client_inputs:
            return {}
        values, out = clear_values(self.client_graph, self.client_inputs, sample), {}
        for spec in self.client_inputs:
            value = encode_input(spec, values[spec.name], self.tables).to(torch.float64)
            out[spec.name] = value.clamp(min=-self.clamps[spec.name]) if spec.name in self.clamps else value
        return out


def lower(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    seen: Observed,
    margin_bits: int,
    embedding: str,
    functions: Functions,
    *,
    public: bool = False,
    device: str = "cpu",
    room: Room | None = None,
    fixed: Collection[str] = (),
    rows: Sequence[int] = (),
    most_rows: Sequence[int] = (),
    late_bytes: int = 0,
    stacks: bool = False,
) -> Lowered:
    """Trace the graph through the approximations. ``parameters`` are float64. public: positions are no secret.

    device: "meta" if the parameters are shapes alone. room: for weights that are kept although they can be made again.
    fixed: parameters that are the same at all sizes of the model. rows: of each node the longest row at any size.
    most_rows: of each node the most rows at any size that a query has. late_bytes: the online bytes for which layers
    spare the round before them, see ``Lowering.normalized``; 0: never. stacks: layers of one normalization become one.
    Raises InvalidInput for an unknown embedding, and UnsupportedOperation, which names the module.
    """
    if embedding not in EMBEDDINGS:
        raise InvalidInput(f"unknown embedding {embedding!r}", f"one of {', '.join(EMBEDDINGS)}")
    return Lowering(
        graph,
        parameters,
        seen,
        margin_bits,
        embedding,
        functions,
        public=public,
        device=device,
        room=room,
        fixed=fixed,
        rows=rows,
        most_rows=most_rows,
        late_bytes=late_bytes,
        stacks=stacks,
    ).run()


class Lowering:
    """One pass over a graph, in order. An operation's lowering gets this object and its node, and returns a symbol.

    compares: True if the model compares values; if False, no approximation may compare either.
    functions: the approximations chosen by name. public: positions of tokens are no secret. margin: the factor of room
    over calibrated ranges. stacks: linear layers that read the same normalization are computed as one.

    An operation leaves notes for the operations that read its result:

    - ``units``: results of normalizations before their weight and bias, by node, or the last rows of these: the rows
      that readers multiply by their weight, the column by which they multiply that product, or None, and the
      normalization (see ``normalized``);
    - ``scores``: the argument of a softmax, by node, if its only reader is a product that divides by the sums itself;
    - ``absorbed``: nodes that multiply by a number which the preceding linear layer has taken into its weights;
    - ``beside``: results of linear layers that were computed with an earlier one.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Mapping[str, Tensor],
        seen: Observed,
        margin_bits: int,
        embedding: str,
        functions: Functions,
        *,
        public: bool = False,
        device: str = "cpu",
        room: Room | None = None,
        fixed: Collection[str] = (),
        rows: Sequence[int] = (),
        most_rows: Sequence[int] = (),
        late_bytes: int = 0,
        stacks: bool = False,
    ) -> None:
        self.graph, self.seen, self.margin = graph, seen, 2.0**margin_bits
        # parameters do not count in names: more of them, such as segments of an index, rename no other weight
        self.numbers = list(accumulate(node.op != "parameter" for node in graph.nodes))
        self.embedding, self.functions, self.public = embedding, functions, public
        operations = [OPERATIONS[node.op] for node in graph.nodes if node.visibility == "shared"]
        self.compares = any(o.compares for o in operations) or not any(o.polynomial for o in operations)
        self.units: dict[int, tuple[Symbol, Symbol | None, Node]] = {}
        self.scores: dict[int, Symbol] = {}
        self.absorbed: set[int] = set()
        self.beside: dict[int, Symbol] = {}
        self._parameters = parameters
        self.device = torch.device(device)  # "meta": shapes alone
        self._readers = graph.consumers()
        self._trace = Trace()
        self._symbols: dict[int, Symbol] = {}  # by shared node
        self._fixed, self._common, self._rows = fixed, set[str](), rows
        self._most_rows = most_rows or [math.prod(node.shape[:-1]) for node in graph.nodes]
        self._late_bytes, self.stacks = late_bytes, stacks
        room = room or Room()
        self._known = Made[int](room)  # by node of the server's or public
        self._weights = Made[str](room)
        self._shapes: dict[str, Shape] = {}
        self._client_outputs: list[int] = []
        self._client_inputs: dict[
            tuple[int, str, str], tuple[ClientInput, Symbol]
        ] = {}  # node, encoding, table or reach
        self._clamps: dict[str, float] = {}

    def run(self) -> Lowered:
        """Lower the whole graph."""
        for node in self.graph.nodes:
            if node.visibility in ("public", "server"):
                self._known.add(node.id, partial(self._evaluate, node))
            elif node.visibility == "shared":
                with self._trace.within(node.path):
                    self._symbols[node.id] = self._lower(node)
                if node.id in self.seen.broken:  # after what the operation itself says of its range
                    raise InvalidInput(
                        f"module {node.path!r}: {node.op} gives values that are NaN or infinite on a calibration input",
                        "look at that input, or at the model in floating point",
                    )
        named = dict(zip(self.graph.names, self.graph.outputs, strict=True))
        outputs = {name: self._symbols[output] for name, output in named.items() if output in self._symbols}
        if not outputs:
            raise UnsupportedOperation(
                f"no output ({', '.join(named)}) depends on both the client's input and the server's weights, so the "
                "model needs no protocol",
                "compute it in the clear",
            )
        left_out = tuple(name for name in named if name not in outputs)
        client_graph = _subgraph(self.graph, self._client_outputs)
        client_inputs = [spec for spec, _ in self._client_inputs.values()]
        for node in client_graph.nodes:
            try:
                if node.op == "clear":
                    check_client_operation(node.attrs, secret=node.id not in client_graph.of_positions)
            except InvalidProgram as error:
                message = f"of its inputs alone a client does not compute this: {str(error).partition(chr(10))[0]}"
                raise self.unsupported(node, message, "compute it before the model, as one of its inputs") from None
        return Lowered(
            self._trace,
            outputs,
            self._weights,
            client_graph,
            client_inputs,
            self._clamps,
            left_out,
            frozenset(self._common),
            self._shapes,
        )

    def _evaluate(self, node: Node) -> Tensor:
        if node.op == "parameter":
            return self._parameters[node.attrs["name"]]
        with torch.device(self.device):
            return evaluate(node, [self._known[i] for i in node.inputs], torch.float64)

    def _lower(self, node: Node) -> Symbol:
        lowering = OPERATIONS[node.op].lowering
        if lowering is None:
            supported = sorted(name for name, operation in OPERATIONS.items() if operation.lowering is not None)
            raise self.unsupported(node, f"no protocol for '{node.op}'", f"supported are {', '.join(supported)}")
        symbol = lowering(self, node)
        if not isinstance(symbol, Symbol) or symbol.shape != node.shape:
            raise TypeError(f"the lowering of {node.op!r} gives {symbol!r}, not a symbol of the shape {node.shape}")
        return symbol

    def unsupported(self, node: Node, message: str, hint: str | None = None) -> UnsupportedOperation:
        """Return the error to raise for a node that cannot be lowered."""
        return UnsupportedOperation(f"{node.path or 'model'}: {message}", hint)

    # operands, by their node's number

    def symbol(self, i: int) -> Symbol:
        """Return the symbol of a shared node or of a client's. Raises UnsupportedOperation for other nodes."""
        node = self.graph.nodes[i]
        if node.visibility == "shared":
            return self._symbols[i]
        if node.visibility == "client":
            return self.client_input(i)
        raise self.unsupported(node, f"a {node.visibility} operand cannot stand here")

    def operand(self, i: int) -> Symbol | WeightRef:
        """Return a node of any visibility as an operand: a WeightRef if the server knows it, else a symbol."""
        return self.weight(i) if i in self._known else self.symbol(i)

    def is_public(self, i: int) -> bool:
        """True if a client's node follows from the positions of tokens alone, and those are no secret."""
        return self.public and self.graph.nodes[i].visibility == "client" and i in self.graph.of_positions

    def is_known(self, i: int) -> bool:
        """True if the server knows a node, or everybody does."""
        return i in self._known

    def known(self, i: int) -> Tensor:
        """Return the value of a node that the server knows, in float64; on device "meta" if there are no weights.

        It may be large, and made anew: what needs it for a weight reads it when that is made.
        """
        return self._known[i]

    def name(self, i: int) -> str:
        """Return the name of a node that the server knows: the parameter's, or one that tells it from others."""
        node = self.graph.nodes[i]
        return str(node.attrs["name"]) if node.op == "parameter" else f"%{_content(node) or self.numbers[i]}"

    def within(self, path: str) -> AbstractContextManager[None]:
        """Label what is recorded in this context with the path of another module than the node's."""
        return self._trace.within(path)

    def weight(
        self,
        i: int,
        suffix: str = "",
        value: Tensor | Callable[[], Tensor] | None = None,
        shape: Shape = (),
        of: Sequence[int] = (),
    ) -> WeightRef:
        """Name a weight of the trace: a node that the server knows, or a ``value`` that it computes from that node.

        ``suffix`` tells the names of such values from that of the node. A value that may be large is a function, which
        makes a tensor of this ``shape`` at each reading. ``of``: all nodes from which it follows.
        """
        node = self.graph.nodes[i]
        name = self.name(i) + suffix
        recipe = partial(_float64, partial(self.known, i) if value is None else value)
        shape = node.shape if value is None else tuple(value.shape) if isinstance(value, Tensor) else shape
        if name in self._weights and self.device.type != "meta" and not self._weights[name].equal(recipe()):
            raise AssertionError(f"two weights of the name {name}")
        if name not in self._weights:
            self._weights.add(name, recipe)
        self._shapes[name] = shape
        sources = [self.graph.nodes[n] for n in (of if value is not None else (i,))]
        if sources and all(n.op == "parameter" and n.attrs["name"] in self._fixed for n in sources):
            self._common.add(name)
        return WeightRef(name, shape)

    def client_input(
        self, i: int, encoding: str = "plain", table: WeightRef | None = None, reach: float = math.inf
    ) -> Symbol:
        """Return the input of the circuit that the client makes from node ``i`` of its graph.

        The node enters as it is ("plain"; "public": not even masked), as "one-hot" rows, or as rows of a table
        ("client-table"). reach: clamps an additive mask from below at -reach; each reach makes an input of its own.
        """
        key = (i, encoding, f"{reach:g}" if table is None else table.name)
        if key not in self._client_inputs:
            if i not in self._client_outputs:
                self._client_outputs.append(i)
            shape, name, size = self.graph.nodes[i].shape, f"{encoding}{i}", 0
            if table is not None:
                size, width = table.shape
                shape = (*shape, size if encoding == "one-hot" else width)
            others = sum(other[:2] == key[:2] for other in self._client_inputs)  # the same ids, another table
            name += f".{others}" if others else ""
            spec = ClientInput(name, self._client_outputs.index(i), encoding, size, shape)
            if table is not None and encoding == "client-table":
                spec = replace(spec, table=table.name)
            if reach < math.inf:
                self._clamps[name] = reach
            self._client_inputs[key] = (
                spec,
                self._trace.input(name, shape, integer=encoding == "one-hot", public=encoding == "public"),
            )
        return self._client_inputs[key][1]

    # the surroundings of a node

    def readers(self, node: Node) -> list[Node]:
        """Return the nodes that read this one."""
        return [self.graph.nodes[i] for i in self._readers[node.id]]

    def only_reader(self, node: Node) -> Node | None:
        """Return the only reader of a node if it reads it as its first operand alone; else None."""
        if len(self._readers[node.id]) != 1 or node.id in self.graph.outputs:
            return None
        (reader,) = self.readers(node)
        return reader if reader.inputs[0] == node.id and node.id not in reader.inputs[1:] else None

    def measured(self, node: Node) -> tuple[float, float]:
        """Return the (smallest, largest) entry of the tensor that the node's operation observes."""
        return self.seen.measured[node.id]

    def longest(self, node: Node) -> int:
        """Return the most entries that a row (the last dimension) of a node has at any size of the model."""
        return self._rows[node.id] if self._rows else node.shape[-1]

    def power(self, node: Node) -> Function:
        """Return the function that computes powers of a node of models in polynomial form, one or more a row."""
        few = self._most_rows[node.id] * self.longest(node) <= FEW
        return self.functions.power_of_few if few else self.functions.power

    # normalizations

    def affine(self, node: Node) -> tuple[Tensor | None, Tensor | None]:
        """Return a normalization's weight and bias, each None if it is absent."""
        scale, shift, *_ = (*(self._known[i] for i in node.inputs[1:]), None, None)
        return scale, shift

    def normalized(self, node: Node, rows: Symbol, column: Symbol | None) -> Symbol:
        """Return a normalization's result: rows times column times weight plus bias. column: None if rows have it.

        Linear layers that read it absorb weight and bias. They may also take the rows as they are, while the column is
        still computed, and multiply what they give by the column, y (W x) for W (y x): it spares a round, and costs the
        openings of their results. It is done where a round is worth those bytes, and the column is not so large that it
        would multiply the results' rounding; then, if all readers are such layers, nobody reads what this returns.
        """
        readers = [r for reader in self.readers(node) for r in self._behind_last_rows(reader)]
        layers = [r for r in readers if OPERATIONS[r.op].takes_affine]
        alone = len(layers) == len(readers) > 0 and node.id not in self.graph.outputs
        results = sum(r.shape[-1] * self._most_rows[r.id] for r in layers)
        late = column is not None and bool(layers) and self._comes_late(node, results)
        unit = rows if column is None or (late and alone) else rows * column
        self.units[node.id] = (rows, column, node) if late else (unit, None, node)
        if alone:
            return unit
        # an absent weight is one, an absent bias zero
        weight = self.weight(node.inputs[1]) if len(node.inputs) > 1 else 1.0
        bias = self.weight(node.inputs[2]) if len(node.inputs) > 2 else 0.0
        return unit * weight + bias

    def ties(self, matrix: int) -> bool:
        """True if a matrix is to be there once, as the table in which tokens are looked up and turned as their head.

        The head then does not absorb the weight of a normalization before it. That is worth two rounds where a layer
        takes some, as it does unless all parties know the weights (see ``Prices.late_bytes``).
        """
        readers = self.readers(self.graph.nodes[matrix])
        looked_up = any(reader.op in ("embedding", "looked_up") for reader in readers)
        return looked_up and not self._late_bytes and self.embedding == "one-hot"

    def _behind_last_rows(self, reader: Node) -> list[Node]:
        """Return the readers of a reader that takes the last rows of a text; else itself."""
        if reader.op != "last_rows" or reader.id in self.graph.outputs:
            return [reader]
        return self.readers(reader)

    def _comes_late(self, node: Node, opened: int) -> bool:
        """True if the column of a normalization comes late, for layers with so many results together."""
        low, high = self.measured(node)
        top = min(1.0, high) if self.compares else 1.0  # smaller rows are brought up to it
        column = math.sqrt(top / low) if low > 0 else math.inf
        return opened * OPENED <= self._late_bytes > 0 and column <= LARGEST_COLUMN


def _float64(value: Tensor | Callable[[], Tensor]) -> Tensor:
    return (value if isinstance(value, Tensor) else value()).to(torch.float64)


def _subgraph(graph: Graph, outputs: Sequence[int]) -> Graph:
    """Return the part of a graph that ``outputs`` depend on, renumbered.

    Its inputs all stay, so that every client gives the same inputs.
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
    nodes = tuple(
        replace(graph.nodes[old], id=number[old], inputs=tuple(number[i] for i in graph.nodes[old].inputs))
        for old in order
    )
    return Graph(nodes, tuple(number[o] for o in outputs))


def _content(node: Node) -> str:
    """Return a name of what a public constant holds, which it keeps wherever it stands; "" for another node."""
    if node.op != "constant":
        return ""
    return hashlib.sha256(json.dumps([node.attrs, node.shape], sort_keys=True).encode()).hexdigest()[:16]
