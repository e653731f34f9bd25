"""The first half of every compiler: from a torch module and samples to a trace of primitives.

Capture translates the module into a graph, a floating-point pass observes the ranges that approximations ask for, and
lowering replaces every operation by its approximation. The second half depends on the deployment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import secure.operations  # noqa: F401  (the operations register)
from approximations import Functions
from protocols.narrow import is_finite
from secure.capture.capture import capture
from secure.capture.graph import Graph
from secure.capture.operation import OPERATIONS
from secure.errors import InvalidInput
from secure.lowering.lower import Lowered, Sample, lower
from secure.lowering.made import Made, Room, unchanged
from secure.lowering.observe import Observed, assume, look_at
from secure.lowering.ranges import Ranges
from secure.lowering.rows import Rows, every, later
from secure.progress import Told, counted, silent


def exact(name: str, weight: Tensor) -> Tensor:
    """Return the weight itself, in float64."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return (weight.to(torch.float32) if half else weight).to(torch.float64)  # twice is five times as fast as once


def lower_model(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    margin_bits: int,
    embedding: str,
    functions: Functions,
    weight: Callable[[str, Tensor], Tensor] = exact,
    told: Told = silent,
) -> Lowered:
    """Turn a module into a trace, with ranges observed on the samples.

    samples: keyword arguments of the module; the first fixes all shapes, every one sets ranges.
    margin_bits: room above the observed ranges, in bits. embedding: one of ``client_inputs.EMBEDDINGS``.
    weight: makes the float64 tensor that stands for a floating-point parameter, given its name and value.
    told: hears of progress.
    Raises InvalidInput without samples, and UnsupportedOperation, which names the module and the operation.
    """
    if not samples:
        raise InvalidInput("a model is compiled for an example input", "give at least one")
    (lowered,) = lower_sizes(
        model,
        [Size(samples[0], samples)],
        margin_bits=margin_bits,
        embedding=embedding,
        functions=functions,
        weight=weight,
        told=told,
    )
    return lowered


@dataclass(frozen=True, repr=False)
class Size:
    """A size at which a model is compiled.

    example: fixes all shapes. samples: inputs of these shapes that set ranges; none if those of other sizes do.
    group: sizes of one group have ranges in common. firsts: for each sample the first row that sets ranges, if not all
    of them do; rows are told by the group's first size without samples, which computes one.
    """

    example: Sample
    samples: Sequence[Sample]
    group: str = ""
    firsts: Sequence[int] = ()

    def each(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[Sample, Rows]]:
        """Yield each sample with the choice of its rows. shapes: of the group's first size without samples."""
        for number, sample in enumerate(self.samples):
            yield sample, later(self.firsts[number], shapes) if self.firsts else every


def of_group(sizes: Sequence[Size], group: str) -> tuple[list[int], int]:
    """Return the places of a group's sizes, and of the one that tells rows."""
    places = [n for n, size in enumerate(sizes) if size.group == group]
    return places, next((n for n in places if not sizes[n].samples), places[0])


def lower_sizes(
    model: nn.Module,
    sizes: Sequence[Size],
    *,
    margin_bits: int,
    embedding: str,
    functions: Functions,
    weight: Callable[[str, Tensor], Tensor] = exact,
    told: Told = silent,
    public: bool = False,
    late_bytes: int = 0,
    stacks: bool = False,
    queried: Sequence[bool] = (),
) -> list[Lowered]:
    """Turn a module into a trace for each of several sizes, with the ranges that hold the samples of their group.

    So the traces of a group have the same primitives, and all read the same weights. public: the positions of tokens
    are no secret. late_bytes, stacks: see ``lowering.lower``; the most rows that a query of the group has count.
    queried: which sizes queries have; by default all.
    Other arguments and exceptions are those of ``lower_model``. Raises InvalidInput too if the module's graph depends
    on the size, and for weights, or values on a sample, that are NaN or infinite.
    """
    told(0, 0, "capturing the model")
    each = {id(size.example): size.example for size in sizes}  # groups of sizes may have one example
    graphs = {key: capture(model, example) for key, example in each.items()}
    captured = [graphs[id(size.example)] for size in sizes]
    for name, value in model.named_parameters():  # those that the graph reads; a buffer may hold a mask of infinities
        if name in captured[0][1] and not is_finite(value):
            raise InvalidInput(f"the weight {name!r} holds values that are NaN or infinite", "the model is damaged")
    if any([n.op for n in graph.nodes] != [n.op for n in captured[0][0].nodes] for graph, _ in captured):
        raise InvalidInput("the model computes in another way at another size", "compile it for each size on its own")
    room = Room()
    weighted = {
        key: (graph, Made(room, {name: _recipe(name, value, weight) for name, value in parameters.items()}))
        for key, (graph, parameters) in graphs.items()
    }
    made = [weighted[id(size.example)] for size in sizes]
    seen = _observed(sizes, made, told)
    told(0, 0, "lowering")
    fixed = _fixed([parameters for _, parameters in graphs.values()])
    shapes = zip(*([node.shape for node in graph.nodes] for graph, _ in graphs.values()), strict=True)
    rows = [max(max(shape[-1:], default=0) for shape in each) for each in shapes]
    counts = {
        group: _most_rows([made[n][0] for n in of_group(sizes, group)[0] if not queried or queried[n]])
        for group in seen
    }
    return [
        lower(
            graph,
            parameters,
            seen[size.group],
            margin_bits,
            embedding,
            functions,
            public=public,
            room=room,
            fixed=fixed,
            rows=rows,
            most_rows=counts[size.group],
            late_bytes=late_bytes,
            stacks=stacks,
        )
        for (graph, parameters), size in zip(made, sizes, strict=True)
    ]


def _most_rows(graphs: Sequence[Graph]) -> list[int]:
    """Return the most rows that each node has at several sizes."""
    return [
        max(math.prod(node.shape[:-1]) for node in nodes)
        for nodes in zip(*(graph.nodes for graph in graphs), strict=True)
    ]


def _fixed(parameters: Sequence[Mapping[str, Tensor]]) -> frozenset[str]:
    """Return the names that mean the same tensor, by its place in memory, at all sizes that have them."""
    places = dict[str, set[tuple[object, ...]]]()
    for name, value in (item for each in parameters for item in each.items()):
        places.setdefault(name, set()).add((value.data_ptr(), value.dtype, value.shape, value.stride()))
    return frozenset(name for name, found in places.items() if len(found) == 1)


def _recipe(name: str, value: Tensor, weight: Callable[[str, Tensor], Tensor]) -> Callable[[], Tensor]:
    """Return what makes the tensor that stands for a parameter."""
    return unchanged(name, value.detach(), partial(weight, name) if value.is_floating_point() else lambda same: same)


def _observed(
    sizes: Sequence[Size], made: Sequence[tuple[Graph, Mapping[str, Tensor]]], told: Told
) -> dict[str, Observed]:
    """Return the ranges of each group of sizes. A sample that several groups have is run once."""
    seen = {size.group: Observed() for size in sizes}
    runs = dict[int, tuple[int, Sample, list[tuple[Observed, Rows]]]]()
    for group, found in seen.items():
        places, single = of_group(sizes, group)
        shapes = [node.shape for node in made[single][0].nodes]
        for n in places:
            for sample, rows in sizes[n].each(shapes):
                runs.setdefault(id(sample), (n, sample, []))[2].append((found, rows))
    for n, sample, wanted in counted(list(runs.values()), told, "observing ranges"):
        look_at(made[n][0], sample, made[n][1], wanted)
    return seen


def lower_outline(
    model: nn.Module,
    example_inputs: Sample,
    *,
    reach: float,
    embedding: str,
    functions: Functions,
    late_bytes: int = 0,
    stacks: bool = False,
) -> tuple[Lowered, Ranges]:
    """Turn a module into a trace without reading its weights; return also the ranges of its values within ``reach``.

    ``reach`` bounds the magnitude of inputs, matrix products, linear layers and sums (see ``Ranges.assume``). The
    result is good for predicting costs only: nothing may be computed with it.
    """
    graph, parameters = capture(model, example_inputs)
    shapes = {
        name: torch.empty(v.shape, dtype=torch.float64 if v.is_floating_point() else v.dtype, device="meta")
        for name, v in parameters.items()
    }
    seen = assume(graph, reach)
    lowered = lower(graph, shapes, seen, 0, embedding, functions, device="meta", late_bytes=late_bytes, stacks=stacks)
    polynomial = any(OPERATIONS[node.op].polynomial for node in graph.nodes if node.visibility == "shared")
    return lowered, Ranges.assume(lowered.trace, reach, polynomial=polynomial)
