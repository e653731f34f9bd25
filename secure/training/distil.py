"""Distil a model into polynomial form, whatever its kind is. ``secure.training.trainer`` has the loop."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secure.errors import InvalidInput
from secure.lowering.client_inputs import GENERATE
from secure.models.heads import task_named
from secure.polynomial.recipe import RECIPE, Recipe
from secure.polynomial.swap import polynomialize
from secure.progress import Told, silent
from secure.training import language, sentences
from secure.training.trainer import Settings, Trainer, TrainingProgress

LAYERS = "num_hidden_layers", "n_layer", "n_layers"  # what configurations call the number of layers
HELD_OUT = 480  # items that a run with patience keeps for checks


def distil(
    directory: Path,
    texts: Sequence[str],
    recipe: Recipe,
    settings: Settings,
    output: Path,
    told: Callable[[TrainingProgress], None] | None = None,
    *,
    samples: int = 0,
    length: int = 0,
    preparing: Told = silent,
) -> Recipe:
    """Train the model of ``directory``, write it to ``output`` with its recipe, ready to be served; return the recipe.

    It is a sentence encoder, or a causal language model, which learns from rows of ``length`` tokens (by default 128):
    those of texts, and ``samples`` that it writes itself. If training is killed and started again with the same
    arguments, it continues from the last checkpoint in ``output``. Raises InvalidInput, Diverged (the loss is not
    finite) and RangeLost (a range could not be held).
    """
    if output.resolve() == directory.resolve():
        raise InvalidInput(f"{output} is the original model's directory\nhint: give another one")
    if (directory / RECIPE).is_file():
        raise InvalidInput(f"{directory} is in polynomial form already\nhint: give the original model")
    task = task_named(str(directory))
    if task not in ("", GENERATE):
        raise InvalidInput(
            f"{directory} is a model for the task {task}: sentence encoders and language models alone are trained into "
            "polynomial form",
            "serve it as it is, by two or three parties",
        )
    _check_powers(directory, recipe)
    if (samples or length) and not task:
        raise InvalidInput("samples or their length of a model that writes no text", "give sentences")
    lesson = (
        language.lesson(directory, texts, samples, length, preparing) if task else sentences.lesson(directory, texts)
    )
    data = lesson.data
    kept = min(HELD_OUT, max(2, len(data) // 20)) if settings.patience else 0
    if len(data) - kept < settings.batch:
        what = "rows" if task else "sentences"
        raise InvalidInput(
            f"{len(data)} {what}, {kept} of them to check on, are fewer than a batch of {settings.batch}",
            f"give more text{', more samples' if task else ''} or a smaller batch",
        )
    lesson.teacher.requires_grad_(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lesson.teacher.to(device)
    lesson.student.to(device)
    polynomialize(lesson.swapped, recipe, prefix=lesson.prefix)
    trainer = Trainer(
        lesson.student,
        recipe,
        lesson.loss,
        data[kept:],
        lesson.collate,
        settings,
        output,
        forward=lesson.forward,
        held_out=data[:kept],
        about=_digest(lesson.teacher, data),
        size=lesson.size,
    )
    found = trainer.run(told)
    _save(lesson.swapped.cpu(), found, directory, output)
    return found


def _check_powers(directory: Path, recipe: Recipe) -> None:
    """Raise InvalidInput for powers of another number of layers than config.json names, before anything takes long."""
    try:
        config = json.loads((directory / "config.json").read_text())
        layers = next((config[name] for name in LAYERS if name in config), 0)
    except (OSError, ValueError, TypeError):
        return  # who reads it next says so
    if isinstance(layers, int) and layers > 0:
        recipe.of_layer(0, layers)


def _digest(teacher: nn.Module, data: Sequence[Tensor]) -> str:
    """Hash the original's weights and the data, with which alone a run may continue."""
    total = hashlib.sha256()
    for tensor in (*teacher.state_dict().values(), *data):
        total.update(f"{tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _save(model: Any, recipe: Recipe, original: Path, output: Path) -> None:
    """Write a model's weights and recipe to ``output``, with the original's other files beside them."""
    ignored = shutil.ignore_patterns(
        "*.safetensors", "*.safetensors.index.json", "*.bin", "*.onnx", "__pycache__", "*.py"
    )
    shutil.copytree(original, output, ignore=ignored, dirs_exist_ok=True)
    model.save_pretrained(output)
    (output / RECIPE).write_text(recipe.model_dump_json(indent=1))
