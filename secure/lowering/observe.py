"""Ranges that approximations ask for, either from a floating-point pass over the calibration inputs or assumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from secure.capture.graph import MASKED, Graph, Node, run
from secure.capture.operation import OPERATIONS
from secure.lowering.rows import Rows, every


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

    def look(self, node: Node, value: Tensor, readers: Iterable[Node]) -> None:
        """Widen the ranges by a node's value. readers: the operations that observe it."""
        if node.op == "parameter" and node.id in self.magnitude:
            return  # the same for every input
        if value.is_floating_point() and value.numel():
            least, most = (float(each) for each in value.aminmax())
            magnitude = max(-least, most)
            if node.visibility == "shared" and not math.isfinite(magnitude):
                self.broken.add(node.id)
            self.magnitude[node.id] = max(self.magnitude.get(node.id, 0.0), magnitude)
            self.highest[node.id] = max(self.highest.get(node.id, 0.0), most)
        for reader in readers:
            measure = OPERATIONS[reader.op].measure
            assert measure is not None
            measured = measure(value, **reader.attrs)
            low, high = self.measured.get(reader.id, (math.inf, -math.inf))
            self.measured[reader.id] = (min(low, float(measured.min())), max(high, float(measured.max())))


def observe(graph: Graph, samples: Iterable[Mapping[str, Tensor]], parameters: Mapping[str, Tensor]) -> Observed:
    """Run the graph on the calibration inputs, in float64 if the parameters are, and keep the ranges."""
    seen = Observed()
    for sample in samples:
        look_at(graph, sample, parameters, [(seen, every)])
    return seen


def look_at(
    graph: Graph,
    sample: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    found: Sequence[tuple[Observed, Rows]],
) -> None:
    """Run the graph on one input, and widen several ranges, each by the part of every value that counts for it."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.visibility == "shared" and OPERATIONS[node.op].measure is not None:
            readers.setdefault(node.inputs[0], []).append(node)

    def look(node: Node, value: Tensor) -> None:
        for seen, rows in found:
            seen.look(node, rows(node.id, value), readers.get(node.id, ()))

    run(graph, sample, parameters, look)


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
