"""Checkpoints of a training run: one safetensors file, with everything that is no tensor as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secure.errors import InvalidInput

_ABOUT = "unseen"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state


def write_checkpoint(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, about: Mapping[str, Any]
) -> None:
    """Write a checkpoint whole or not at all: it is written to another file, which is then renamed."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).clone().contiguous()
    beside = path.with_name(path.name + ".new")
    save_file(tensors, beside, metadata={_ABOUT: json.dumps(about)})
    beside.replace(path)


def read_about(path: Path) -> dict[str, Any]:
    """Read the JSON in the header of a checkpoint. Raises InvalidInput if the file is no checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()[_ABOUT])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"no checkpoint of a training run: {error}") from None
    if not isinstance(about, dict):
        raise InvalidInput("no checkpoint of a training run")
    return about


def read_state(path: Path, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Read values and the optimizer's state by name.

    The file may come from anyone. Raises InvalidInput if a parameter is missing or has another shape.
    """
    values, states = {}, {}
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name, p in parameters.items():
            wanted = {f"{key}.{name}": p.shape if key != "step" else torch.Size([]) for key in ("model", *_MOMENTS)}
            if f"model.{name}" not in names:
                raise InvalidInput(f"it has no {name}")
            found = {key: file.get_tensor(key) for key in wanted if key in names}
            for key, tensor in found.items():
                if tensor.shape != wanted[key]:
                    raise InvalidInput(f"{key} has the shape {tuple(tensor.shape)}, not {tuple(wanted[key])}")
            values[name] = found.pop(f"model.{name}")
            states[name] = {
                key.split(".", 1)[0]: tensor if key.startswith("step.") else tensor.to(p.device)
                for key, tensor in found.items()
            }
    return values, states
