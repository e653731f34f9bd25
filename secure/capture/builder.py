"""Building a model's graph: visibilities, folding of public values, and the methods that translation rules compose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from secure.capture.clear_operations import CLEAR_OPERATIONS, encode_argument, evaluate_clear, kind_of
from secure.capture.graph import MASKED, Graph, Node, constant_attrs, placeholder, result_visibility
from secure.capture.operation import OPERATIONS, RULES
from secure.errors import UnsupportedOperation

HUGE = 1.0e30
"""Constants beyond this number stand for infinity."""


_OTHERWISE = (
    "replace it by supported operations, or leave it to the client, before or after the model; docs/architectures.md "
    "lists models that are known to work"
)

INSTEAD = {
    "sort": "mixtures of experts send each token to experts by its scores, which would show them; use a dense model",
    "unique_consecutive": "let the model take the end of the text by argmax, as CLIP does, or use another classifier",
    "exp": "exponentials are supported within softmax, sigmoid, tanh and ELU; state-space models need others",
    "multinomial": "sample outside of the model",
}
"""Hints for operations that no rule translates, by name: other ways to the same end."""


@dataclass(frozen=True)
class Norm:
    """The Euclidean norm of a shared value, which exists only as the denominator of an L2 normalization."""

    value: Node
    dim: int
    shape: tuple[int, ...]
    eps: float = 0.0


@dataclass(frozen=True)
class Root:
    """The square root of a shared value, which exists only as a denominator."""

    value: Node


Value = Any
"""A value during translation: a `Node`, a Tensor (public, known at capture time), a Python number, `Norm` or `Root`, or
a list of these."""


def leaves(value: Value) -> Iterator[Value]:
    """Yield the values in nested arguments that are not plain Python constants."""
    if isinstance(value, Node | Tensor | Norm | Root):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))


def is_private(value: Value) -> bool:
    """True if a protocol is needed to compute with these values: one is shared, or different parties hold them."""
    held = {"shared" if isinstance(v, Norm | Root) else v.visibility for v in leaves(value) if not _public(v)}
    return "shared" in held or len(held) > 1


def _public(value: Value) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, Node) and value.visibility == "public")


def shape_of(value: Value) -> tuple[int, ...]:
    """Return the shape of a value; a number has the shape ()."""
    return tuple(value.shape) if isinstance(value, Node | Tensor | Norm) else ()


def scalar_of(value: Value) -> float | None:
    """Return the number that all entries of a value equal if it is public and uniform, else None."""
    if isinstance(value, Tensor) and value.numel():
        flat = value.reshape(-1)
        return float(flat[0]) if bool((flat == flat[0]).all()) else None
    return float(value) if isinstance(value, bool | int | float) else None


def describe(value: Value) -> str:
    """Describe a value's type for messages."""
    if isinstance(value, Node):
        return f"{value.visibility} {value.dtype} {value.shape}"
    if isinstance(value, Tensor):
        return f"public {kind_of(value.dtype)} {tuple(value.shape)}"
    if isinstance(value, Norm | Root):
        return f"shared {type(value).__name__.lower()}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(describe, value)) + "]"
    return str(value)


class Builder:
    """A graph in the making. Its methods take and return values of any visibility and append clear or shared nodes.

    A method refuses what it cannot translate by `unsupported`, which raises UnsupportedOperation.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.path = ""
        self.target = ""  # the operation that is being translated and its arguments, for messages
        self.arguments: Sequence[Value] = ()
        self.operation = ""  # the operation whose rule runs, which may be part of the target's
        self.takes_masks = False  # whether the target's result is read by softmax alone, which ignores masked entries
        self._known: dict[str, Node] = {}  # clear operations and constants already there
        self._huge: set[int] = set()  # clear nodes that may hold an "infinite" value
        self._deep: set[int] = set()  # public and server nodes that hold additive masks

    def add(
        self, op: str, inputs: Sequence[Node], attrs: dict[str, Any], shape: Sequence[int], kind: str, visibility: str
    ) -> Node:
        """Append a node and return it, or return an equal leaf or clear node that exists already."""
        key = json.dumps([op, [node.id for node in inputs], attrs, list(shape), kind])
        if visibility != "shared" and key in self._known:
            return self._known[key]
        operands = tuple(node.id for node in inputs)
        node = Node(len(self.nodes), op, operands, attrs, tuple(map(int, shape)), kind, visibility, self.path)
        self.nodes.append(node)
        self._known[key] = node
        return node

    def unsupported(self, hint: str) -> NoReturn:
        """Raise UnsupportedOperation for the operation that is being translated."""
        operands = ", ".join(map(describe, self.arguments))
        where = f"module {self.path!r}" if self.path else "the top-level module"
        raise UnsupportedOperation(
            f"{where}: {self.target}({operands}) has no private protocol\n"
            f"supported on shared values: {', '.join(sorted(OPERATIONS))}\nhint: {hint}"
        )

    def operand(self, value: Value) -> Node:
        """Return a value as a node; public tensors and numbers become "constant" nodes."""
        if isinstance(value, Norm | Root):
            self.unsupported("norms and square roots are supported as denominators (F.normalize, x / sqrt(v)) only")
        if isinstance(value, Node):
            return value
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        node = self.add("constant", [], constant_attrs(tensor), tensor.shape, kind_of(tensor.dtype), "public")
        if tensor.is_floating_point() and bool((tensor.abs() >= HUGE).any()):
            self._huge.add(node.id)
        if _is_deep(tensor):
            self._deep.add(node.id)
        return node

    def shared(self, op: str, *operands: Value, **attrs: Any) -> Node:
        """Append an operation on shared values. The party that holds an operand converts it to floats if needed."""
        nodes, operation = [self.operand(value) for value in operands], OPERATIONS[op]
        stays = operation.moves and all(node.visibility == "shared" for node in nodes)
        if not (operation.takes_integers or stays):
            nodes = [self.operand(self.cast(node, torch.float32)) for node in nodes]
        if not is_private(nodes):
            self.unsupported("it is supported on shared values only; compute it outside of the model")
        visibility = result_visibility(op, [node.visibility for node in nodes])
        result = operation.meaning(*map(placeholder, nodes), **attrs)
        return self.add(op, nodes, attrs, result.shape, kind_of(result.dtype), visibility)

    def clear(self, target: str, *args: Value, **kwargs: Value) -> Value:
        """Append a clear operation on values that one party knows, or evaluate it right away if all are public."""
        found = list(leaves((args, kwargs)))
        if all(isinstance(value, Tensor) for value in found):
            return self._folded(target, args, kwargs)
        if target not in CLEAR_OPERATIONS:
            self.unsupported(INSTEAD.get(target.split(".")[1], "compute it outside of the model"))
        if target == "aten.gather.default" and isinstance(args[0], Tensor) and scalar_of(args[0]) is not None:
            return torch.full(shape_of(args[2]), args[0].reshape(-1)[0].item(), dtype=args[0].dtype)
        nodes: list[Node] = []

        def position(value: Value) -> int | None:
            if not isinstance(value, Node | Tensor):
                return None
            node = self.operand(value)
            if node not in nodes:
                nodes.append(node)
            return nodes.index(node)

        encoded = [encode_argument(value, position) for value in args]
        attrs = {
            "target": target,
            "args": encoded,
            "kwargs": {name: encode_argument(value, position) for name, value in sorted(kwargs.items())},
        }
        visibility = result_visibility("clear", [node.visibility for node in nodes])
        result = evaluate_clear(attrs, [placeholder(node) for node in nodes], torch.float32)
        node = self.add("clear", nodes, attrs, result.shape, kind_of(result.dtype), visibility)
        if self.takes_masks and any(operand.id in self._deep for operand in nodes):
            self._deep.add(node.id)
        huge = any(isinstance(v, float) and abs(v) >= HUGE for v in (*args, *kwargs.values()))
        if huge or any(operand.id in self._huge for operand in nodes):
            self._huge.add(node.id)
        return node

    def _folded(self, target: str, args: Sequence[Value], kwargs: dict[str, Value]) -> Value:
        """Evaluate an operation on values that are public and known now. It is no part of the graph."""
        if target in CLEAR_OPERATIONS:
            return CLEAR_OPERATIONS[target](*args, **kwargs)
        name, _, overload = target.removeprefix("aten.").partition(".")
        operation = getattr(getattr(torch.ops.aten, name, None), overload, None)
        if operation is None:
            self.unsupported(INSTEAD.get(target.split(".")[1], "compute it outside of the model"))
        if torch.Tag.nondeterministic_seeded in operation.tags:
            self.unsupported("the model draws random numbers; give them as an input, or use a model that draws none")
        return operation(*args, **kwargs)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Convert a value to the kind (float, int, bool) of ``dtype``; a value of that kind stays as it is."""
        if isinstance(value, Tensor):
            return value.to(dtype)
        if not isinstance(value, Node) or value.dtype == kind_of(dtype):
            return value
        if value.visibility == "shared" and value.dtype == "int" and dtype.is_floating_point:
            return self.shared("real", value)
        if value.visibility == "shared":
            self.unsupported("shared values are real numbers; keep conversions to integers out of the model")
        return self.clear("aten.to.dtype", value, dtype)

    def finite(self, value: Value) -> Value:
        """Raise the "infinities" (masks) in a clear operand of a shared sum to `MASKED`, which fixed point can hold."""
        if isinstance(value, Tensor) and value.is_floating_point() and bool((value <= -HUGE).any()):
            return value.clamp_min(MASKED)
        if isinstance(value, Node) and value.id in self._huge:
            bounded: Node = self.clear("aten.clamp_min.default", value, MASKED)
            self._deep.add(bounded.id)
            return bounded
        return value

    def call(self, target: str, *args: Value, **kwargs: Value) -> Value:
        """Apply an operation of torch by its rule, or in the clear if that is possible."""
        rule = RULES.get(target)
        if rule is None or not rule.structural:
            found = list(leaves((args, kwargs)))
            public = bool(found) and all(isinstance(value, Tensor) for value in found)
            if not is_private(found) and (public or target in CLEAR_OPERATIONS or rule is None):
                return self.clear(target, *args, **kwargs)
            if rule is None:
                self.unsupported(INSTEAD.get(target.split(".")[1], _OTHERWISE))
        outer, self.operation = self.operation, target
        try:
            return rule.function(self, *args, **kwargs)
        finally:
            self.operation = outer

    # Operations of any visibility.

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Change the shape."""
        if shape_of(value) == tuple(shape):
            return value
        if not is_private(value):
            return self.clear("aten.reshape.default", value, list(shape))
        if isinstance(value, Node) and value.op == "reshape":
            return self.reshape(self.nodes[value.inputs[0]], shape)
        return self.shared("reshape", value, shape=list(shape))

    def permute(self, value: Value, dims: Sequence[int]) -> Value:
        """Permute the axes."""
        rank = len(shape_of(value))
        order = [dim % rank for dim in dims]
        if order == list(range(rank)):
            return value
        if not is_private(value):
            return self.clear("aten.permute.default", value, order)
        if isinstance(value, Node) and value.op == "permute":
            return self.permute(self.nodes[value.inputs[0]], [value.attrs["dims"][dim] for dim in order])
        return self.shared("permute", value, dims=order)

    def transpose(self, value: Value, first: int, second: int) -> Value:
        """Exchange two axes."""
        order = list(range(len(shape_of(value))))
        order[first], order[second] = order[second], order[first]
        return self.permute(value, order)

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """Broadcast to a shape."""
        if shape_of(value) == tuple(shape):
            return value
        if not is_private(value):
            return self.clear("aten.expand.default", value, list(shape))
        return self.shared("expand", value, shape=list(shape))

    def slice(self, value: Value, dim: int, start: int, stop: int, step: int = 1) -> Value:
        """Take a range of an axis; all numbers must be in bounds."""
        if (start, stop, step) == (0, shape_of(value)[dim], 1):
            return value
        if not is_private(value):
            return self.clear("aten.slice.Tensor", value, dim, start, stop, step)
        return self.shared("slice", value, dim=dim, start=start, stop=stop, step=step)

    def plus(self, a: Value, b: Value) -> Value:
        """Add two values. A public number becomes an attribute of the node; adding zero appends no node."""
        if not is_private((a, b)):
            return self.clear("aten.add.Tensor", a, b)
        a, b = self.finite(a), self.finite(b)
        if self.takes_masks:
            (rest, mask), (other, its) = self._without_mask(a), self._without_mask(b)
            masks, rests = ([v for v in found if v is not None] for found in ((mask, its), (rest, other)))
            if masks and rests:
                whole = rests[0] if len(rests) == 1 else self.plus(*rests)
                total = masks[0] if len(masks) == 1 else self.plus(*masks)
                return self.shared("add", whole, total, mask=True)
        if scalar_of(a) is not None:
            a, b = b, a
        number = scalar_of(b)
        if number is not None and _absorbs(a, b):
            return a if number == 0 else self.shared("add", a, scalar=number)
        return self.shared("add", a, b)

    def _without_mask(self, value: Value) -> tuple[Value | None, Value | None]:
        """Split a summand of scores into the rest and the additive mask in it; None for what is not there.

        Masks of several sources then meet in the clear, and are added last, to whole scores: that is where they are cut
        off at the depth that a softmax needs.
        """
        if self._is_mask(value):
            return None, value
        if isinstance(value, Node) and value.op == "add" and value.attrs.get("mask"):
            rest, mask = (self.nodes[i] for i in value.inputs)
            return rest, mask
        return value, None

    def _is_mask(self, value: Value) -> bool:
        """True if a summand of scores is the client's, or holds numbers of a mask that everybody knows."""
        if isinstance(value, Node):
            return value.visibility == "client" or value.id in self._deep
        return isinstance(value, Tensor) and _is_deep(value)

    def times(self, a: Value, b: Value) -> Value:
        """Multiply two values. A public number becomes an attribute of the node; a product with itself is a square."""
        if not is_private((a, b)):
            return self.clear("aten.mul.Tensor", a, b)
        if scalar_of(a) is not None:
            a, b = b, a
        number = scalar_of(b)
        if number is not None and _absorbs(a, b):
            if number == 1:
                return a
            return self.shared("mul", a, scalar=number)
        if isinstance(a, Node) and a == b:
            return self.shared("square", a)
        for operation in OPERATIONS.values():
            if operation.recognition is not None:
                known: Node | None = operation.recognition(self, a, b) or operation.recognition(self, b, a)
                if known is not None:
                    return known
        return self.shared("mul", a, b)

    def finish(self, outputs: Sequence[Value]) -> Graph:
        """Return the graph of these results, without the nodes that none of them needs; inputs all stay."""
        wanted = [self.operand(value).id for value in outputs]
        alive = set(wanted)
        for node in reversed(self.nodes):
            if node.id in alive:
                alive.update(node.inputs)
        kept = [node for node in self.nodes if node.id in alive or node.op == "input"]
        number = {node.id: position for position, node in enumerate(kept)}
        nodes = tuple(replace(node, id=number[node.id], inputs=tuple(number[i] for i in node.inputs)) for node in kept)
        return Graph(nodes, tuple(number[i] for i in wanted))


def _absorbs(a: Value, b: Value) -> bool:
    """True if b broadcasts to the shape of a, so that a uniform b can be replaced by its number."""
    try:
        return tuple(torch.broadcast_shapes(shape_of(a), shape_of(b))) == shape_of(a)
    except RuntimeError:
        return False


def _is_deep(value: Tensor) -> bool:
    """True if a public tensor has entries that mark absent ones."""
    return value.is_floating_point() and value.numel() > 1 and bool((value <= MASKED).any())
