"""A compiled model as facts (JSON values) and tensors, for a file, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from protocols.protocol import broadcast
from secure.capture.documents import read_tensors
from secure.errors import InvalidInput
from secure.mpc.compile import MpcModel, weight_keys
from secure.mpc.prices import Choice
from secure.mpc.program import Program

NARROW = (torch.int8, torch.int16, torch.int32)  # types in which integers are written that they hold
_CHOICE = TypeAdapter(Choice | None)


def keep(model: MpcModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the facts and the tensors of a model: all of it but its Program and the token tables.

    Each weight is written in the narrowest type that holds its integers.
    """
    choice = dataclasses.asdict(model.choice) if model.choice else None
    return {"choice": choice}, {name: _narrow(value).contiguous() for name, value in model.integers.items()}


def restore(program: Program, tables: Mapping[str, Tensor], facts: Mapping[str, Any], payload: bytes) -> MpcModel:
    """Return the model that ``keep`` was given; payload: the tensors, as a safetensors file.

    Raises InvalidInput unless the weights are those that the Program reads: their names, types and shapes.
    """
    choice, names = _CHOICE.validate_python(facts.get("choice")), weight_keys(program)
    held = read_tensors(payload, names)
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
    return MpcModel(program, {name: held[name].to(torch.int64) for name in names}, dict(tables), choice)


def _narrow(value: Tensor) -> Tensor:
    for kind in NARROW:
        known = torch.iinfo(kind)
        if not value.numel() or known.min <= int(value.min()) <= int(value.max()) <= known.max:
            return value.to(kind)
    return value
