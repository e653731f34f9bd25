"""The high-level graph of a model: a flat list of typed operations with static shapes, and its float interpreter.

A graph holds no weights: "parameter" nodes name them. Every node has a visibility, which says who knows its value:

- "public": everybody; "client" or "server": that party alone holds the plaintext; "shared": nobody.

Operations:

- "input" (name), "parameter" (name), "constant" (dtype; "values", a nested list, or "fill", one value everywhere);
- "clear": a whitelisted function (see `secure.capture.clear_operations`) of values that one party knows;
- the operations of `SHARED_OPERATIONS` on values of any visibility, whose result is shared.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approximations.norms import polynomial_layer_norm
from approximations.powers import power
from approximations.primitives import Piece
from secure.capture.clear_operations import dtype_of, evaluate_clear, kind_of

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


def _pair(scalar: Callable[[Tensor, float], Tensor], tensor: Callable[[Tensor, Tensor], Tensor]) -> Any:
    def function(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        return scalar(x[0], float(a["scalar"])) if "scalar" in a else tensor(x[0], x[1])

    return function


def _slice(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
    return x[0][(slice(None),) * a["dim"] + (slice(a["start"], a["stop"], a["step"]),)]


def _polynomial_norm(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
    form = (a["eps"], a["low"], a["high"], a["degree"], a["steps"])
    return torch.as_tensor(polynomial_layer_norm(x[0], x[1], x[2], *form))


def _power(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
    return torch.as_tensor(power(x[0], a["exponent"], a["low"], a["high"], a["degree"], a["steps"]))


def _layer_norm(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
    shape = [x[0].shape[axis] for axis in a["axes"]]
    return F.layer_norm(x[0], shape, x[1] if len(x) > 1 else None, x[2] if len(x) > 2 else None, a["eps"])


SHARED_OPERATIONS: Mapping[str, Callable[[Sequence[Tensor], Mapping[str, Any]], Tensor]] = {
    "add": _pair(lambda x, s: x + s, torch.add),
    "cat": lambda x, a: torch.cat(list(x), a["dim"]),
    "embedding": lambda x, a: F.embedding(x[0], x[1]),
    "expand": lambda x, a: x[0].expand(a["shape"]),
    "gelu": lambda x, a: F.gelu(x[0], approximate=a["approximate"]),
    "l2_normalize": lambda x, a: F.normalize(x[0], dim=a["dim"], eps=a["eps"]),
    "layer_norm": _layer_norm,
    "linear": lambda x, a: F.linear(x[0], x[1], x[2] if len(x) > 2 else None),
    "matmul": lambda x, a: torch.matmul(x[0], x[1]),
    "mean": lambda x, a: torch.mean(x[0], a["dims"], a["keepdim"]),
    "mul": _pair(lambda x, s: x * s, torch.mul),
    "neg": lambda x, a: -x[0],
    "permute": lambda x, a: x[0].permute(a["dims"]),
    "polynomial": lambda x, a: Piece(tuple(a["coefficients"]), a["centre"])(x[0]),
    "polynomial_norm": _polynomial_norm,
    "power": _power,
    "relu": lambda x, a: torch.relu(x[0]),
    "reshape": lambda x, a: x[0].reshape(a["shape"]),
    "rms_norm": lambda x, a: F.rms_norm(x[0], x[0].shape[-1:], x[1] if len(x) > 1 else None, a["eps"]),
    "rsqrt": lambda x, a: torch.rsqrt(x[0]),
    "silu": lambda x, a: F.silu(x[0]),
    "slice": _slice,
    "softmax": lambda x, a: torch.softmax(x[0], a["dim"]),
    "square": lambda x, a: torch.square(x[0]),
    "sub": lambda x, a: torch.sub(x[0], x[1]),
    "sum": lambda x, a: torch.sum(x[0], a["dims"], a["keepdim"]),
    "tanh": lambda x, a: torch.tanh(x[0]),
}
"""The operations on shared values and their meaning in the clear. Axes are never negative; "mul" and "add" have
two operands or one and the attribute "scalar"; "linear", "layer_norm" and "rms_norm" may lack their last operands."""


@dataclass(frozen=True)
class Graph:
    """A static-shape model: nodes in an order in which they can be evaluated, and the ids of the results."""

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

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
        """Read what `to_json` wrote, and validate it."""
        try:
            document = json.loads(text)
            nodes = tuple(
                Node(**{**item, "inputs": tuple(item["inputs"]), "shape": tuple(item["shape"])})
                for item in document["nodes"]
            )
            graph = Graph(nodes, tuple(document["outputs"]))
        except (KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not a graph: {error}") from None
        graph.validate()
        return graph

    def validate(self) -> None:
        """Check order, operations, visibilities, types and shapes without any data; ValueError names the node."""
        for position, node in enumerate(self.nodes):
            try:
                if node.id != position or not all(0 <= i < position for i in node.inputs):
                    raise ValueError("its operands do not come before it")
                operands = [self.nodes[i] for i in node.inputs]
                expected = result_visibility(node.op, [operand.visibility for operand in operands])
                if node.visibility != expected:
                    raise ValueError(f"its visibility is {expected} by its operands")
                check_type(node)
                if node.op not in ("input", "parameter"):
                    evaluate(node, [placeholder(operand) for operand in operands], torch.float32, device="meta")
            except (ValueError, RuntimeError, TypeError, KeyError, IndexError, NotImplementedError) as error:
                raise ValueError(f"invalid graph: node {position} ({node.op!r}): {error}") from error
        if not self.outputs or not all(0 <= i < len(self.nodes) for i in self.outputs):
            raise ValueError("invalid graph: its outputs are not nodes of it")


def result_visibility(op: str, operands: Sequence[str]) -> str:
    """The visibility that the result of an operation has, given the visibilities of its operands."""
    if op in (leaves := {"input": "client", "parameter": "server", "constant": "public"}):
        return leaves[op]
    if op != "clear" and op not in SHARED_OPERATIONS:
        raise ValueError(f"unknown operation {op!r}")
    private = sorted(set(operands) - {"public"})
    clear = len(private) == 1 and private[0] in ("client", "server")
    if not private or clear != (op == "clear"):
        raise ValueError(f"{op!r} of operands that are {', '.join(operands) or 'none'}")
    return private[0] if clear else "shared"


def check_type(node: Node) -> None:
    """Check the declared shape and kind of a node."""
    if not all(type(size) is int and size >= 0 for size in node.shape):
        raise ValueError(f"its shape is {node.shape}")
    dtype_of(node.dtype)
    if node.visibility == "shared" and node.dtype != "float":
        raise ValueError("a shared value is a float")


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
        result = SHARED_OPERATIONS[node.op](operands, node.attrs)
    if tuple(result.shape) != node.shape or kind_of(result.dtype) != node.dtype:
        raise ValueError(
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
        raise ValueError(f"the {node.op} {name!r} is missing\nhint: the graph needs {node.dtype} {node.shape}")
    value = source[name].detach()
    if tuple(value.shape) != node.shape or kind_of(value.dtype) != node.dtype:
        raise ValueError(
            f"the {node.op} {name!r} is {kind_of(value.dtype)} {tuple(value.shape)}, "
            f"the graph was made for {node.dtype} {node.shape}\nhint: capture the model again with such an example"
        )
    return value.to(dtype_of(node.dtype, float_dtype))
