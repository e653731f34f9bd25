"""``unseen train``: distil a sentence encoder into polynomial form."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parties.errors import PartyError
from parties.model import PACKAGED, calibration_inputs, model_directory
from parties.options import Threads, read_texts
from secure.calibration import HELD_OUT
from secure.polynomial import Recipe
from secure.training import Progress as Step
from secure.training import Settings

Attention = StrEnum("Attention", {a: a for a in ("power", "quad")})  # type: ignore[misc]

out = Console(highlight=False)


def train_command(
    text: Annotated[Path, typer.Option(help="Training sentences, one a line.")],
    output: Annotated[Path, typer.Option(help="Where the trained model and its checkpoints go.")],
    model: Annotated[str, typer.Argument(help=f"A model directory, or {PACKAGED!r}.")] = PACKAGED,
    attention: Annotated[Attention, typer.Option(help="Power-Softmax, or MPCFormer's 2Quad.")] = Attention["power"],
    power: Annotated[int, typer.Option(help="The even power of Power-Softmax.")] = 4,
    activation_degree: Annotated[int, typer.Option(help="Degree of the activations' polynomials.")] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    batch: Annotated[int, typer.Option(min=2, help="Sentences a step.")] = 48,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 4e-4,
    seed: int = 0,
    held_out: Annotated[Path | None, typer.Option(help="Sentences for the report; 100 of ours by default.")] = None,
    threads: Threads = 0,
) -> None:
    """Put a model into polynomial form, so that no private query compares anything. Run again, it goes on."""
    from secure.distillation import agreement, distil
    from secure.models import load_sentence_encoder, load_tokenizer

    wanted = {"attention": attention.value, "power": power, "activation_degree": activation_degree}
    try:
        recipe = Recipe.model_validate(wanted)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise PartyError(f"--{option}: {problem['msg']}", "powers are 2, 4, 6 or 8; degrees 2 to 4") from None
    directory = model_directory(model)
    texts = read_texts(text, "--text", "sentence")
    others = read_texts(held_out, "--held-out", "sentence") if held_out else list(HELD_OUT)
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(steps=steps, batch=batch, rate=rate, seed=seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out) as bar:
        task = bar.add_task("training", total=steps)

        def told(step: Step) -> None:
            bar.update(task, completed=step.step, description=f"{step.stage}, loss {step.loss:.3f}")

        distil(directory, texts, recipe, settings, output, told)
    tokenizer = load_tokenizer(directory)
    trained, original = load_sentence_encoder(output), load_sentence_encoder(directory)
    inputs = calibration_inputs(tokenizer, min(LENGTH, original.maximum_length), others)[: len(others)]
    found = agreement(trained, original, inputs)
    table = Table(title=f"against the original, on {found.sentences} held-out sentences")
    for column in ("Spearman of similarities", "same nearest neighbour", "mean cosine", "lowest cosine"):
        table.add_column(column)
    table.add_row(*(f"{v:.4f}" for v in (found.spearman, found.nearest, found.mean_cosine, found.lowest_cosine)))
    out.print(table)
    out.print(f"serve it with: unseen serve {output}", markup=False)
