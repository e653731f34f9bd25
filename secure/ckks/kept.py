"""A compiled model as facts (JSON values) and tensors, for a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from protocols.ckks.circuit import Circuit
from protocols.ckks.schedule import Schedule, put_together, taken_apart
from secure.ckks.compile import CkksModel
from secure.ckks.program import CkksProgram
from secure.errors import InvalidInput

VECTORS = "plain-vectors"
OPERANDS = {  # inputs and numbers of operations
    "input": (0, 0),
    "rotate": (1, 1),
    "refresh": (1, 0),
    "shift": (1, 1),
    "kept": (0, 0),
    "keep": (1, 1),
}
_ERRORS, _FORM = TypeAdapter(dict[str, float]), TypeAdapter(dict[str, Any])


def keep(model: CkksModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the facts and the tensors of a model: all of it but its Program and the token tables.

    The facts are as secret as the weights, as the schedule's numbers are among them.
    """
    header, vectors = taken_apart(model.schedule)
    stacked = np.stack(vectors) if vectors else np.empty((0, model.schedule.circuit.slots))
    facts = {
        "predicted_error": model.predicted_error,
        "layer_errors": dict(model.layer_errors),
        "schedule": header,
    }
    return facts, {VECTORS: torch.from_numpy(np.ascontiguousarray(stacked, np.float64))}


def restore(
    program: CkksProgram, tables: Mapping[str, Tensor], facts: Mapping[str, Any], held: Mapping[str, Tensor]
) -> CkksModel:
    """Return the model that ``keep`` was given; held: its tensors.

    Raises InvalidInput unless the schedule is one and fits the Program: slots, levels, inputs, rotations and results.
    """
    header, vectors = _FORM.validate_python(facts.get("schedule")), held.get(VECTORS)
    slots = program.parameters.slots
    if vectors is None or vectors.dtype != torch.float64 or vectors.dim() != 2 or vectors.shape[1] != slots:
        raise InvalidInput("the weights are not those of the Program")
    try:
        schedule = put_together(header, list(vectors.numpy()))
        wrong = None if len(vectors) == sum(p is None for p in header["plains"]) else "vectors"
        wrong = wrong or _misfit(schedule, program)
    except (LookupError, TypeError, AttributeError, StopIteration) as error:
        wrong = type(error).__name__
    if wrong:
        raise InvalidInput(f"the schedule is none of the Program: {wrong}")
    errors = _ERRORS.validate_python(facts.get("layer_errors"))
    return CkksModel(program, schedule, float(facts["predicted_error"]), dict(tables), errors)


def _misfit(schedule: Schedule, program: CkksProgram) -> str | None:
    """Return the part of a schedule that does not fit itself or its Program, or None."""
    circuit = schedule.circuit
    count = len(circuit.nodes)
    if not len(circuit.paths) == len(schedule.levels) == len(schedule.stages) == count:
        return "lengths"
    if not all(0 <= level <= program.parameters.levels for level in schedule.levels):
        return "levels"
    if not all(0 <= i < count for i in circuit.outputs) or len(circuit.outputs) != len(program.output):
        return "results"
    if not all(_is_operation(circuit, i) for i in range(count)):
        return "operations"
    if circuit.slots != program.parameters.slots or tuple(circuit.steps) != program.steps:
        return "rotations"
    if schedule.inputs() != {name: level for name, (_, level, _) in program.views.items()}:
        return "inputs"
    return None if dict(circuit.counts()) == dict(program.counts) else "counts"


def _is_operation(circuit: Circuit, index: int) -> bool:
    """Tell whether a node is an operation on nodes before it, with as many numbers as that takes."""
    node = circuit.nodes[index]
    inputs, numbers = len(node.inputs), len(node.numbers)
    if node.op in OPERANDS:
        sound = (inputs, numbers) == OPERANDS[node.op]
    elif node.op == "multiply":
        sound = inputs > 0 and inputs % 2 == 0 and numbers == 0
    else:
        sound = node.op in ("add", "dot") and inputs == numbers > 0
    plains = node.numbers if node.op in ("shift", "dot", "keep") else ()
    return sound and all(0 <= i < index for i in node.inputs) and all(0 <= p < len(circuit.plains) for p in plains)
