"""Ranges that approximations ask for, either from a floating-point pass over the calibration inputs or assumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from secure.capture.graph import MASKED, Graph, Node, run
from secure.capture.operation import OPERATIONS


@dataclass
class Observed:
    """Ranges by node.

    measured: the smallest and the largest entry of the tensor that an operation observes (`Operation.observes`).
    magnitude: the largest absolute entry of a node's value. highest: its largest entry, if that is positive, else 0.
    broken: the nodes whose values were NaN or infinite on an input.
    """

    measured: dict[int, tuple[float, float]] = field(default_factory=dict)
    magnitude: dict[int, float] = field(default_factory=dict)
    highest: dict[int, float] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)

    @classmethod
    def united(cls, parts: Sequence[Observed]) -> Observed:
        """Return the ranges that hold those of all parts, which are of graphs with the same nodes."""
        whole = cls()
        for part in parts:
            whole.broken |= part.broken
            for node, (low, high) in part.measured.items():
                least, most = whole.measured.get(node, (low, high))
                whole.measured[node] = min(least, low), max(most, high)
            for ours, theirs in ((whole.magnitude, part.magnitude), (whole.highest, part.highest)):
                ours.update({node: max(value, ours.get(node, value)) for node, value in theirs.items()})
        return whole


def observe(graph: Graph, samples: Iterable[Mapping[str, Tensor]], parameters: Mapping[str, Tensor]) -> Observed:
    """Run the graph on the calibration inputs, in float64 if the parameters are, and keep the ranges."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.visibility == "shared" and OPERATIONS[node.op].measure is not None:
            readers.setdefault(node.inputs[0], []).append(node)
    seen = Observed()

    def look(node: Node, value: Tensor) -> None:
        if value.is_floating_point() and value.numel():
            magnitude = float(value.abs().max())
            if node.visibility == "shared" and not math.isfinite(magnitude):
                seen.broken.add(node.id)
            seen.magnitude[node.id] = max(seen.magnitude.get(node.id, 0.0), magnitude)
            seen.highest[node.id] = max(seen.highest.get(node.id, 0.0), float(value.max()))
        for reader in readers.get(node.id, ()):
            measure = OPERATIONS[reader.op].measure
            assert measure is not None
            measured = measure(value, **reader.attrs)
            low, high = seen.measured.get(reader.id, (math.inf, -math.inf))
            seen.measured[reader.id] = (min(low, float(measured.min())), max(high, float(measured.max())))

    for sample in samples:
        run(graph, sample, parameters, look)
    return seen


def assume(graph: Graph, reach: float) -> Observed:
    """Assume ranges without calibration, for costs only: values stay within ``reach``, masks go down to `MASKED`."""
    seen = Observed(magnitude={node.id: reach for node in graph.nodes})
    readers = graph.consumers()
    for node in graph.nodes:
        if node.visibility != "shared":
            continue
        operation = OPERATIONS[node.op]
        if operation.measure is not None:
            if operation.assumption is None:
                raise TypeError(f"operation {node.op!r} observes its operand, but does not say what range to assume")
            seen.measured[node.id] = operation.assumption(graph.nodes[node.inputs[0]], reach, **node.attrs)
        masked = any(OPERATIONS[graph.nodes[i].op].takes_masks for i in readers[node.id])
        for i in node.inputs if masked else ():
            if graph.nodes[i].visibility == "client":
                seen.magnitude[i] = -MASKED
    return seen
