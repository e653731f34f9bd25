"""A compiled model as facts (JSON values) and tensors, for a file, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from protocols.narrow import NARROW
from protocols.protocol import broadcast
from secure.errors import InvalidInput
from secure.mpc.compile import MpcModel, weight_keys
from secure.mpc.prices import Choice
from secure.mpc.program import Program

_CHOICE = TypeAdapter(Choice | None)


def keep(model: MpcModel) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Return the facts and the tensors of a model: all of it but its Program and the token tables."""
    choice = dataclasses.asdict(model.choice) if model.choice else None
    return {"choice": choice}, model.integers


def restore(
    program: Program, tables: Mapping[str, Tensor], facts: Mapping[str, Any], held: Mapping[str, Tensor]
) -> MpcModel:
    """Return the model that ``keep`` was given; held: its tensors.

    Raises InvalidInput unless the weights are those that the Program reads: their names, types and shapes.
    """
    choice, names = _CHOICE.validate_python(facts.get("choice")), weight_keys(program)
    if set(held) != set(names):
        raise InvalidInput("the weights are not those that the Program reads")
    for name, value in held.items():
        if value.dtype not in (*NARROW, torch.int64):
            raise InvalidInput(f"the weight {name!r} is no integers")
        if name in program.weight_shapes and tuple(value.shape) != program.weight_shapes[name]:
            raise InvalidInput(f"the weight {name!r} has the shape {tuple(value.shape)}")
    for instruction in program.circuit:
        use, out = instruction.protocol.weight_use, instruction.protocol.out.shape
        if use and not use.multiplied and broadcast(out, tuple(held[use.name].shape)) != out:
            raise InvalidInput(f"the weight {use.name!r} has the shape {tuple(held[use.name].shape)}")
    return MpcModel(program, {name: held[name] for name in names}, dict(tables), choice)
