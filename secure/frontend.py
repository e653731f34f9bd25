"""The first half of every compiler: from a torch module and samples to a trace of primitives.

Capture translates the module into a graph, a floating-point pass observes the ranges that approximations ask for, and
lowering replaces every operation by its approximation. The second half depends on the deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import secure.operations  # noqa: F401  (the operations register)
from approximations import Functions
from secure.capture.capture import capture
from secure.capture.operation import OPERATIONS
from secure.errors import InvalidInput
from secure.lowering.lower import Lowered, Sample, lower
from secure.lowering.observe import Observed, assume, observe
from secure.lowering.ranges import Ranges
from secure.progress import Told, counted, silent


def exact(name: str, weight: Tensor) -> Tensor:
    """Return the weight itself, in float64."""
    return weight.to(torch.float64)


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
    """

    example: Sample
    samples: Sequence[Sample]


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
) -> list[Lowered]:
    """Turn a module into a trace for each of several sizes, with the ranges that hold the samples of all of them.

    So the traces have the same primitives, and read the same weights. public: the positions of tokens are no secret.
    Other arguments and exceptions are those of ``lower_model``. Raises InvalidInput too if the module's graph depends
    on the size, and for weights, or values on a sample, that are NaN or infinite.
    """
    told(0, 0, "capturing the model")
    captured = [capture(model, size.example) for size in sizes]
    for name, value in model.named_parameters():  # those that the graph reads; a buffer may hold a mask of infinities
        if name in captured[0][1] and not bool(value.isfinite().all()):
            raise InvalidInput(f"the weight {name!r} holds values that are NaN or infinite", "the model is damaged")
    if any([n.op for n in graph.nodes] != [n.op for n in captured[0][0].nodes] for graph, _ in captured):
        raise InvalidInput("the model computes in another way at another size", "compile it for each size on its own")
    made = [
        (graph, {k: weight(k, v.detach()) if v.is_floating_point() else v for k, v in parameters.items()})
        for graph, parameters in captured
    ]
    samples = [(*each, sample) for each, size in zip(made, sizes, strict=True) for sample in size.samples]
    seen = Observed.united(
        [
            observe(graph, [sample], parameters)
            for graph, parameters, sample in counted(samples, told, "observing ranges")
        ]
    )
    told(0, 0, "lowering")
    return [
        lower(graph, parameters, seen, margin_bits, embedding, functions, public=public) for graph, parameters in made
    ]


def lower_outline(
    model: nn.Module, example_inputs: Sample, *, reach: float, embedding: str, functions: Functions
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
    lowered = lower(graph, shapes, assume(graph, reach), 0, embedding, functions)
    polynomial = any(OPERATIONS[node.op].polynomial for node in graph.nodes if node.visibility == "shared")
    return lowered, Ranges.assume(lowered.trace, reach, polynomial=polynomial)
