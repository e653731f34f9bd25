"""What one floating-point pass over the calibration inputs shows: ranges that approximations ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from secure.capture.graph import Graph, Node, run


@dataclass
class Observed:
    """What calibration on the graph itself showed, by node."""

    variance: dict[int, tuple[float, float]] = field(default_factory=dict)
    magnitude: dict[int, float] = field(default_factory=dict)


def observe(graph: Graph, samples: Sequence[Mapping[str, Tensor]], parameters: Mapping[str, Tensor]) -> Observed:
    """Run the graph in float64 on the calibration inputs and keep the ranges that approximations ask for."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if (
            node.op in ("layer_norm", "rms_norm", "polynomial_norm", "l2_normalize", "rsqrt", "power")
            and node.visibility == "shared"
        ):
            readers.setdefault(node.inputs[0], []).append(node)
    seen = Observed()

    def look(node: Node, value: Tensor) -> None:
        if value.is_floating_point() and value.numel():
            seen.magnitude[node.id] = max(seen.magnitude.get(node.id, 0.0), float(value.abs().max()))
        for reader in readers.get(node.id, ()):
            if reader.op in ("layer_norm", "polynomial_norm"):
                measured = value.var(dim=tuple(reader.attrs.get("axes", (-1,))), unbiased=False)
            elif reader.op == "rms_norm":
                measured = value.square().mean(-1) + reader.attrs["eps"]
            elif reader.op == "l2_normalize":
                measured = value.square().sum(dim=reader.attrs["dim"])
            else:
                measured = value
            low, high = seen.variance.get(reader.id, (math.inf, 0.0))
            seen.variance[reader.id] = (min(low, float(measured.min())), max(high, float(measured.max())))

    for sample in samples:
        run(graph, sample, parameters, look)
    return seen
