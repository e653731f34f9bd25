"""Samples from a softmax: the arg-max of scores plus noise that nobody knows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from approximations.primitives import by_size, perturbed, top_indices
from protocols.protocol import expanded
from secure.capture.builder import Builder, Value, scalar_of, shape_of
from secure.capture.graph import Node
from secure.capture.operation import operation
from secure.errors import InvalidInput
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol

TOLERANCE = 2.0**-12
"""By how much a perturbed score may be smaller than another one and still be chosen."""


def sample(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Draw one index of the last axis with probabilities softmax(logits / temperature), for use in a model.

    logits: (..., entries). Returns int64 of the shape (...). Compiled, the index alone is revealed. The noise that
    draws it is new in every query, and unknown to all who compute and to the client. Rounds and online bytes are those
    of an arg-max; the noise is dealt before. In plain torch it draws from torch's generator.

    temperature: a number is a public part of the Program, zero for the arg-max itself. A tensor, which expands to the
    shape of the result, is the client's input, or computed of inputs, and as secret: the client may choose another one
    in every query, and only it knows which. Give calibration inputs with the greatest that clients may choose: greater
    ones are OutOfRange, or cut to the range of a Program that is unchecked, as every input is.

    Raises InvalidInput for a number below zero or not finite.
    """
    if isinstance(temperature, Tensor):
        drawn: Tensor = _sample_at(logits, temperature)
        return drawn
    if not 0 <= temperature < math.inf:
        raise InvalidInput(f"a temperature of {temperature}", "a number of zero or more; zero takes the largest entry")
    return _sample(logits, float(temperature)) if temperature else logits.argmax(-1)


@torch.library.custom_op("unseen::sample", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _sample(logits: Tensor, temperature: float) -> Tensor:
    return by_size(perturbed(logits, temperature), 1)[..., 0].clone()


@torch.library.custom_op("unseen::sample_at", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _sample_at(logits: Tensor, temperature: Tensor) -> Tensor:
    return by_size(perturbed(logits, 1.0, temperature[..., None]), 1)[..., 0].clone()


@_sample.register_fake
def _(logits: Tensor, temperature: float) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


@_sample_at.register_fake
def _(logits: Tensor, temperature: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


@operation("sampled", compares=True)
def sampled(x: Tensor, by: Tensor | None = None, /, *, temperature: float) -> Tensor:
    """Draw an index of the last axis with probabilities softmax(x / temperature), or softmax(x / by)."""
    return by_size(perturbed(x, temperature, by), 1)[..., 0]


@sampled.aten("sample.default", namespace="unseen")
def _(b: Builder, logits: Value, temperature: float) -> Value:
    return b.shared("sampled", logits, temperature=temperature)


@sampled.aten("sample_at.default", namespace="unseen")
def _(b: Builder, logits: Value, temperature: Value) -> Value:
    if (number := scalar_of(temperature)) is not None and number > 0:
        return b.shared("sampled", logits, temperature=number)
    if not isinstance(temperature, Node) or temperature.visibility not in ("client", "shared"):
        b.unsupported("the temperature is a number above zero, or an input of the client's")
    rows, given = shape_of(logits)[:-1], shape_of(temperature)
    try:
        expanded(given, rows)
    except ValueError:
        b.unsupported(f"temperatures of the shape {given} do not expand to that of the rows, {rows}")
    return b.shared("sampled", logits, b.reshape(temperature, (*given, 1)), temperature=1.0)


@sampled.lower
def _(to: Lowering, node: Node) -> Symbol:
    x, *by = map(to.symbol, node.inputs)
    chosen: Symbol = top_indices(perturbed(x, float(node.attrs["temperature"]), *by), 1, TOLERANCE)
    return chosen.reshape(node.shape)
