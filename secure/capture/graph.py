"""The high-level graph of a model: a flat list of typed operations with static shapes, and its float interpreter.

A graph holds no weights; its "parameter" nodes name them. Every node has a visibility, which says who knows its value:

- "public": everybody; "client" or "server": that party alone, in plaintext; "shared": nobody.

Operations:

- "input" (name), "parameter" (name), "constant" (dtype; "values", a nested list, or "fill", one value everywhere);
- "clear": a whitelisted function (see `secure.capture.clear_operations`) of values that one party knows;
- those of `secure.capture.operation.OPERATIONS` on values of any visibility, whose result is shared. Axes are never
  negative.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, FailFast, Field, TypeAdapter, ValidationError, with_config
from torch import Tensor

from protocols.fields import MAXIMUM_ELEMENTS, Name, Operands, Shape, Whole
from secure.capture.clear_operations import check_client_operation, clear_type, dtype_of, evaluate_clear, kind_of
from secure.capture.documents import read_document, what_is_wrong
from secure.capture.operation import OPERATIONS
from secure.errors import InvalidInput, InvalidProgram

MAXIMUM_NODES = 1 << 12
"""The most nodes of a graph from somebody else."""

CLIENT_OPERATIONS = ("input", "constant", "clear")
"""The kinds of nodes that a client evaluates for somebody else's Program."""

POSITIONS = "position_ids"
"""The input of a decoder that may be no secret: the positions of tokens, if all parties know them."""

MASKED = -1.0e4
"""The value of an additive attention mask at masked positions. It is finite, so that fixed point can hold it."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Node:
    """One operation of a graph and the type of its result."""

    id: Whole
    op: Name
    inputs: Operands
    attrs: Mapping[str, Any]
    shape: Shape
    dtype: Name
    visibility: Name
    path: Name

    def __str__(self) -> str:
        operands = ", ".join([f"%{i}" for i in self.inputs] + [f"{k}={v!r}" for k, v in self.attrs.items()])
        if len(operands) > 160:
            operands = operands[:157] + "..."
        return f"%{self.id} = {self.op}({operands}) : {self.visibility} {self.dtype} {self.shape}  # {self.path}"


@dataclass(frozen=True)
class Graph:
    """A model with static shapes: its nodes in an order in which they can be evaluated, and the ids of its results.

    names: the outputs' names in their order, if a module gave them; they are no part of the canonical text.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    names: tuple[str, ...] = field(default=(), compare=False)

    @property
    def inputs(self) -> dict[str, Node]:
        """The inputs by name."""
        return {str(node.attrs["name"]): node for node in self.nodes if node.op == "input"}

    @cached_property
    def of_positions(self) -> frozenset[int]:
        """The nodes that follow from the input POSITIONS, from no other input and from nothing else that varies."""
        found, varies = set[int](), set[int]()
        for node in self.nodes:
            if node.op == "input" and node.attrs.get("name") == POSITIONS:
                found.add(node.id)
            elif node.op in ("input", "parameter") or varies.intersection(node.inputs):
                varies.add(node.id)
            elif found.intersection(node.inputs):
                found.add(node.id)
        return frozenset(found)

    @property
    def parameters(self) -> dict[str, Node]:
        """The server's parameters and buffers by name."""
        return {str(node.attrs["name"]): node for node in self.nodes if node.op == "parameter"}

    def counts(self, visibility: str = "shared") -> dict[str, int]:
        """Count each operation among the nodes of one visibility; the result is sorted by name."""
        return dict(sorted(collections.Counter(n.op for n in self.nodes if n.visibility == visibility).items()))

    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """Return for each node the ids of the nodes that read it, in ascending order."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for operand in dict.fromkeys(node.inputs):
                readers[operand].append(node.id)
        return tuple(map(tuple, readers))

    def to_json(self) -> str:
        """Return a canonical text: equal graphs give equal texts."""
        document = {"nodes": [asdict(node) for node in self.nodes], "outputs": list(self.outputs)}
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str | bytes, *, client: bool = False) -> Graph:
        """Read and validate what `to_json` wrote. Raises InvalidProgram for anything else.

        client: a client will evaluate it in the clear for somebody else; then nothing but inputs, constants and the
        operations of `secure.capture.clear_operations.CLIENT_TARGETS` is accepted.
        """
        try:
            document = _DOCUMENT.validate_python(read_document(text))
        except ValidationError as error:
            raise InvalidProgram(f"not a graph: {what_is_wrong(error)}") from None
        graph = Graph(tuple(document.nodes), document.outputs)
        if client:
            graph.check_client()
        graph.validate()
        return graph

    def check_client(self) -> None:
        """Check that a client may evaluate this graph for somebody else. Raises InvalidProgram, which names the node.

        Whatever the client's values are, the operations that are left succeed, and do the same work.
        """
        for node in self.nodes:
            try:
                if node.op not in CLIENT_OPERATIONS:
                    raise InvalidProgram(f"clients evaluate {', '.join(CLIENT_OPERATIONS)} nodes alone")
                if node.op == "clear":
                    check_client_operation(node.attrs, secret=node.id not in self.of_positions)
            except InvalidProgram as error:
                raise InvalidProgram(f"invalid graph: node {node.id} ({node.op!r}): {error}") from None

    def validate(self) -> None:
        """Check order, operations, visibilities, types and shapes without any data.

        Raises InvalidProgram, which names the node.
        """
        for position, node in enumerate(self.nodes):
            try:
                if node.id != position or not all(0 <= i < position for i in node.inputs):
                    raise InvalidProgram("its operands do not come before it")
                operands = [self.nodes[i] for i in node.inputs]
                expected = result_visibility(node.op, [operand.visibility for operand in operands])
                if node.visibility != expected:
                    raise InvalidProgram(f"its visibility is {expected} by its operands")
                check_type(node)
                if node.op not in ("input", "parameter"):
                    evaluate(node, [placeholder(operand) for operand in operands], torch.float32, device="meta")
            except _MALFORMED as error:
                raise InvalidProgram(f"invalid graph: node {position} ({node.op!r}): {what_is_wrong(error)}") from error
        if not self.outputs or not all(0 <= i < len(self.nodes) for i in self.outputs):
            raise InvalidProgram("invalid graph: its outputs are not nodes of it")


_MALFORMED = (ValueError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class _GraphForm:
    """The form of an encoded graph."""

    nodes: Annotated[list[Node], FailFast(), Field(min_length=1, max_length=MAXIMUM_NODES)]
    outputs: Operands


_DOCUMENT = TypeAdapter(_GraphForm)


def result_visibility(op: str, operands: Sequence[str]) -> str:
    """Return the visibility of an operation's result, given those of its operands.

    Raises InvalidProgram for an unknown operation, and for operands of visibilities that the operation cannot take.
    """
    if op in (leaves := {"input": "client", "parameter": "server", "constant": "public"}):
        return leaves[op]
    if op != "clear" and op not in OPERATIONS:
        raise InvalidProgram(f"unknown operation {op!r}")
    private = sorted(set(operands) - {"public"})
    clear = len(private) == 1 and private[0] in ("client", "server")
    if not private or clear != (op == "clear"):
        raise InvalidProgram(f"{op!r} of operands that are {', '.join(operands) or 'none'}")
    return private[0] if clear else "shared"


def check_type(node: Node) -> None:
    """Check the declared shape and kind of a node, before a tensor of that shape is made. Raises InvalidProgram."""
    if math.prod(node.shape) > MAXIMUM_ELEMENTS:
        raise InvalidProgram(f"its shape {node.shape} has more than {MAXIMUM_ELEMENTS} elements")
    dtype_of(node.dtype)
    if node.op in ("input", "parameter"):
        name = node.attrs.get("name")
        if set(node.attrs) != {"name"} or not isinstance(name, str) or not name.isprintable() or len(name) > 512:
            raise InvalidProgram("it has one attribute, a printable name")
    if node.visibility == "shared" and node.dtype == "bool":
        raise InvalidProgram("a shared value is a float or an integer")


def placeholder(node: Node) -> Tensor:
    """Return a tensor without data that has the shape and type of a node."""
    return torch.empty(node.shape, dtype=dtype_of(node.dtype), device="meta")


def constant_attrs(value: Tensor) -> dict[str, Any]:
    """Return the attributes of a "constant" node. Floats that are not finite become strings, as JSON has none."""
    kind = kind_of(value.dtype)
    flat = value.detach().reshape(-1)
    if flat.numel() > 1 and bool((flat == flat[0]).all()):
        flat = flat[:1]
        return {"dtype": kind, "fill": _jsonable(flat[0].item())}
    return {"dtype": kind, "values": _jsonable(value.detach().tolist())}


def _jsonable(value: Any) -> Any:
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) else value


def _constant(node: Node, float_dtype: torch.dtype, device: str) -> Tensor:
    dtype = dtype_of(node.dtype, float_dtype)
    if "fill" in node.attrs:
        return torch.full(node.shape, _numbers(node.attrs["fill"]), dtype=dtype, device=device)
    return torch.tensor(_numbers(node.attrs["values"]), dtype=dtype, device=device)


def evaluate(node: Node, operands: Sequence[Tensor], float_dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Evaluate one node (not "input" or "parameter") in the clear.

    Raises InvalidProgram if the result does not have the declared shape and kind.
    """
    if node.op == "constant":
        result = _constant(node, float_dtype, device)
    elif node.op == "clear":
        evaluated = clear_type if device == "meta" else evaluate_clear
        result = evaluated(node.attrs, operands, float_dtype)
    else:
        result = OPERATIONS[node.op].meaning(*operands, **node.attrs)
    if tuple(result.shape) != node.shape or kind_of(result.dtype) != node.dtype:
        raise InvalidProgram(
            f"node {node.id} ({node.op}, {node.path or 'model'}) gives {kind_of(result.dtype)} "
            f"{tuple(result.shape)}, not {node.dtype} {node.shape}"
        )
    return result


def run(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    observe: Callable[[Node, Tensor], None] | None = None,
) -> list[Tensor]:
    """Evaluate a graph in the clear and return its outputs. This is the reference, not a private inference.

    It runs on one machine that sees everything, in float64 if a parameter is float64, else in float32. ``observe`` is
    called with every node and its value, with a parameter's whenever it is read: where it is needed, as it may be large
    and made anew. Raises InvalidInput for an input or parameter that is missing or of another type.
    """
    named = sorted(graph.parameters.items(), key=lambda each: math.prod(each[1].shape))  # small ones: they may be made
    precise = any(parameters[name].dtype == torch.float64 for name, _ in named if name in parameters)
    float_dtype = torch.float64 if precise else torch.float32
    last = {operand: node.id for node in graph.nodes for operand in node.inputs}
    last |= {output: len(graph.nodes) for output in graph.outputs}
    values: dict[int, Tensor] = {}

    def value_of(i: int) -> Tensor:
        if graph.nodes[i].op != "parameter":
            return values[i]
        value = _given(graph.nodes[i], parameters, float_dtype)
        if observe is not None:
            observe(graph.nodes[i], value)
        return value

    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "parameter":
                continue
            if node.op == "input":
                value = _given(node, inputs, float_dtype)
            else:
                value = evaluate(node, [value_of(i) for i in node.inputs], float_dtype)
            values[node.id] = value
            if observe is not None:
                observe(node, value)
            for operand in {*node.inputs, node.id}:
                if last.get(operand, node.id) <= node.id:
                    values.pop(operand, None)
        return [value_of(output) for output in graph.outputs]


def check_given(graph: Graph, inputs: Mapping[str, Tensor]) -> None:
    """Raise InvalidInput if an input of a graph is missing, or has another shape or kind; no value is read."""
    for node in graph.inputs.values():
        _given(node, inputs, torch.float32)


def _given(node: Node, source: Mapping[str, Tensor], float_dtype: torch.dtype) -> Tensor:
    name = node.attrs["name"]
    if name not in source:
        raise InvalidInput(f"the {node.op} {name!r} is missing", f"the graph needs {node.dtype} {node.shape}")
    value = source[name].detach()
    if tuple(value.shape) != node.shape or kind_of(value.dtype) != node.dtype:
        raise InvalidInput(
            f"the {node.op} {name!r} is {kind_of(value.dtype)} {tuple(value.shape)}, "
            f"the graph was made for {node.dtype} {node.shape}",
            "capture the model again with such an example",
        )
    return value.to(dtype_of(node.dtype, float_dtype))
