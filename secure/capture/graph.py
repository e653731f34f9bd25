"""The high-level graph of a model: a flat list of typed operations with static shapes, and its float interpreter.

A graph holds no weights: "parameter" nodes name them. Every node has a visibility, which says who knows its value:

- "public": everybody; "client" or "server": that party alone holds the plaintext; "shared": nobody.

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
from typing import Any

import torch
from torch import Tensor

from secure.capture.clear_operations import dtype_of, evaluate_clear, kind_of
from secure.capture.operation import OPERATIONS
from secure.errors import InvalidInput, InvalidProgram

MASKED = -1.0e4
"""What an additive attention mask holds at masked positions: finite, so that it has a fixed-point form."""


@dataclass(frozen=True)
class Node:
    """One operation of a graph and the type of its result."""

    id: int
    op: str
    inputs: tuple[int, ...]
    attrs: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: str
    visibility: str
    path: str

    def __str__(self) -> str:
        operands = ", ".join([f"%{i}" for i in self.inputs] + [f"{k}={v!r}" for k, v in self.attrs.items()])
        if len(operands) > 160:
            operands = operands[:157] + "..."
        return f"%{self.id} = {self.op}({operands}) : {self.visibility} {self.dtype} {self.shape}  # {self.path}"


@dataclass(frozen=True)
class Graph:
    """A static-shape model: nodes in an order in which they can be evaluated, and the ids of the results.

    names: of the outputs, in their order, where a module gave them; they are no part of the canonical text.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    names: tuple[str, ...] = field(default=(), compare=False)

    @property
    def inputs(self) -> dict[str, Node]:
        """The inputs by name."""
        return {str(node.attrs["name"]): node for node in self.nodes if node.op == "input"}

    @property
    def parameters(self) -> dict[str, Node]:
        """The server's parameters and buffers by name."""
        return {str(node.attrs["name"]): node for node in self.nodes if node.op == "parameter"}

    def counts(self, visibility: str = "shared") -> dict[str, int]:
        """How often each operation occurs among the nodes of one visibility, sorted by name."""
        return dict(sorted(collections.Counter(n.op for n in self.nodes if n.visibility == visibility).items()))

    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each node the ids of the nodes that read it, ascending."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for operand in dict.fromkeys(node.inputs):
                readers[operand].append(node.id)
        return tuple(map(tuple, readers))

    def to_json(self) -> str:
        """A canonical text: equal graphs give equal texts."""
        document = {"nodes": [asdict(node) for node in self.nodes], "outputs": list(self.outputs)}
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str | bytes) -> Graph:
        """Read what `to_json` wrote, and validate it; InvalidProgram for anything else."""
        try:
            document = json.loads(text)
            nodes = tuple(
                Node(**{**item, "inputs": tuple(item["inputs"]), "shape": tuple(item["shape"])})
                for item in document["nodes"]
            )
            graph = Graph(nodes, tuple(document["outputs"]))
        except (KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
            raise InvalidProgram(f"not a graph: {error}") from None
        graph.validate()
        return graph

    def validate(self) -> None:
        """Check order, operations, visibilities, types and shapes without any data; InvalidProgram names the node."""
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
            except (ValueError, RuntimeError, TypeError, KeyError, IndexError, NotImplementedError) as error:
                raise InvalidProgram(f"invalid graph: node {position} ({node.op!r}): {error}") from error
        if not self.outputs or not all(0 <= i < len(self.nodes) for i in self.outputs):
            raise InvalidProgram("invalid graph: its outputs are not nodes of it")


def result_visibility(op: str, operands: Sequence[str]) -> str:
    """The visibility that the result of an operation has, given the visibilities of its operands."""
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
    """Check the declared shape and kind of a node."""
    if not all(type(size) is int and size >= 0 for size in node.shape):
        raise InvalidProgram(f"its shape is {node.shape}")
    dtype_of(node.dtype)
    if node.visibility == "shared" and node.dtype != "float":
        raise InvalidProgram("a shared value is a float")


def placeholder(node: Node) -> Tensor:
    """A tensor without data of the type of a node."""
    return torch.empty(node.shape, dtype=dtype_of(node.dtype), device="meta")


def constant_attrs(value: Tensor) -> dict[str, Any]:
    """The attributes of a "constant" node: floats that are not finite are strings, as JSON has none."""
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
    """Evaluate one node in the clear (not "input" or "parameter"); its result must have the declared type."""
    if node.op == "constant":
        result = _constant(node, float_dtype, device)
    elif node.op == "clear":
        result = evaluate_clear(node.attrs, operands, float_dtype)
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
    """Evaluate a graph in the clear, on one machine that sees everything: the reference, not a private inference.

    Computes in float64 if a parameter is float64, else in float32. ``observe`` sees every node's value.
    """
    precise = any(parameters[name].dtype == torch.float64 for name in graph.parameters if name in parameters)
    float_dtype = torch.float64 if precise else torch.float32
    last = {operand: node.id for node in graph.nodes for operand in node.inputs}
    last |= {output: len(graph.nodes) for output in graph.outputs}
    values: dict[int, Tensor] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op in ("input", "parameter"):
                value = _given(node, inputs if node.op == "input" else parameters, float_dtype)
            else:
                value = evaluate(node, [values[i] for i in node.inputs], float_dtype)
            values[node.id] = value
            if observe is not None:
                observe(node, value)
            for operand in {*node.inputs, node.id}:
                if last.get(operand, node.id) <= node.id:
                    del values[operand]
    return [values[output] for output in graph.outputs]


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
