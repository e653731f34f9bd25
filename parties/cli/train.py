"""``unseen train``: distil a sentence encoder or a language model into polynomial form."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parties.cli.accuracy import measured, measured_texts, show
from parties.cli.console import OUT
from parties.cli.options import TextModelArgument, ThreadsOption, read_texts
from secure.errors import InvalidInput, MissingPackage, RangeLost, printable
from secure.lowering.client_inputs import GENERATE
from secure.models.calibration import HELD_OUT
from secure.models.heads import task_named
from secure.models.text import PACKAGED, model_directory
from secure.polynomial.recipe import Recipe
from secure.training.trainer import Settings, TrainingProgress

Attention = StrEnum("Attention", {a: a for a in ("power", "quad")})  # type: ignore[misc]

KNOWN = "powers are 2, 4, 6 or 8; degrees 2 to 4; shifts 0, or from 1/64 to 64"
SENTENCES, ROWS, LENGTH = 48, 16, 128  # in a batch, and tokens of a row
SAMPLES = 2048  # rows of some hundred tokens
SAID = 100  # steps from one line of a log to the next


def train(
    output: Annotated[Path, typer.Option(help="Where the trained model and its checkpoints go.")],
    model: TextModelArgument = PACKAGED,
    text: Annotated[
        Path | None, typer.Option(help="A file of sentences or texts, one a line, or a saved data set.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=0, help=f"Rows that a language model writes itself, to learn from; {SAMPLES} if there is no text."
        ),
    ] = None,
    attention: Annotated[Attention, typer.Option(help="Power-Softmax, or MPCFormer's 2Quad.")] = Attention["power"],
    power: Annotated[
        str,
        typer.Option(metavar="INTEGER[,INTEGER...]", help="The even power of Power-Softmax, or that of each layer."),
    ] = "4",
    shift: Annotated[float | None, typer.Option(help="c of (1 + x/c)^power; 0: x^power; by default c = power.")] = None,
    activation_degree: Annotated[int, typer.Option(help="Degree of the activations' polynomials.")] = 4,
    steps: Annotated[int, typer.Option(min=1)] = 4500,
    length: Annotated[
        int | None,
        typer.Option(min=2, help=f"Tokens of a row: as many as a text will have under the protocol; {LENGTH}."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=2, help=f"Sentences a step, {SENTENCES} by default; of a language model rows, {ROWS}."),
    ] = None,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1.5e-4,
    narrow: Annotated[
        float, typer.Option(help="Part of the steps over which values are drawn into narrow ranges.")
    ] = 0.3,
    substitute: Annotated[
        float, typer.Option(help="Part of the steps after which ranges are frozen and polynomials take over.")
    ] = 0.45,
    seed: int = 0,
    bfloat16: Annotated[bool, typer.Option(help="Products in bfloat16 until the last steps.")] = False,
    patience: Annotated[
        int, typer.Option(min=0, help="End after so many checks without a better held-out loss; 0: never.")
    ] = 0,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Sentences or texts for the report; by default 8 of ours, or what the original writes."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Of a Hugging Face data set: where its sentences are; text by default.")
    ] = None,
    threads: ThreadsOption = 0,
) -> None:
    """Put a model into polynomial form, so that no private query compares anything. Run again, it goes on."""
    from secure.training.distil import distil

    powers = _powers(power)
    wanted = {"attention": attention.value, "power": powers, "shift": shift, "activation_degree": activation_degree}
    try:
        recipe = Recipe.model_validate(wanted)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise InvalidInput(f"--{option}: {problem['msg']}", KNOWN) from None
    directory = model_directory(model)
    if column is not None and (text is None or not text.is_dir()):
        there = f"with the file {text}" if text else "without --text"
        raise InvalidInput(f"--column means nothing {there}", "it is for a saved data set")
    writes = task_named(str(directory)) == GENERATE
    if text is None and not writes:
        raise InvalidInput("--text is needed", "a file of sentences, one a line, or a saved data set")
    for option, given in (("--samples", samples), ("--length", length)):
        if given and not writes:
            raise InvalidInput(f"{option} is for language models", "a sentence encoder writes no text; give --text")
    if text is None:
        texts, samples = [], SAMPLES if samples is None else samples
    else:
        texts = data_set(text, column or "text") if text.is_dir() else read_texts(text, "--text", "sentence")
    others = read_texts(held_out, "--held-out", "sentence") if held_out else [] if writes else list(HELD_OUT)
    if threads:
        torch.set_num_threads(threads)
    batch = batch or (ROWS if writes else SENTENCES)
    settings = Settings(
        steps=steps,
        batch=batch,
        rate=rate,
        narrow=narrow,
        substitute=substitute,
        seed=seed,
        bfloat16=bfloat16,
        patience=patience,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=OUT) as bar:
        task = bar.add_task("training", total=steps, visible=False)  # until something is done

        def told(step: TrainingProgress) -> None:
            bar.update(task, visible=True, completed=step.step, description=f"{step.stage}, loss {step.loss:.3f}")
            if not OUT.is_terminal and step.step % SAID == 0:  # a log has no bar
                parts = ", ".join(f"{name} {value:.4f}" for name, value in step.parts.items())
                bar.console.print(
                    f"step {step.step} of {steps}, {step.stage}: {parts}; {step.seconds:.0f} s", soft_wrap=True
                )

        OUT.print(f"a checkpoint every {settings.checkpoint_seconds / 60:.0f} minutes in {output}", markup=False)
        distil(
            directory,
            texts,
            recipe,
            settings,
            output,
            told,
            samples=samples or 0,
            length=length or 0,
            preparing=lambda done, total, what: bar.update(task, visible=True, description=f"{done} of {total} {what}"),
        )
    found = (
        measured_texts(output, directory, others, 0, row=length or 0)
        if writes
        else measured(output, directory, others, 0, protocol=0)
    )
    show(found)
    if not found.finite:
        raise RangeLost(
            f"{output}: held-out text leaves the ranges of its polynomials so far that answers are no numbers",
            f"train it anew with more than {steps} steps, or on more text",
        )
    OUT.print(f"serve it with: unseen serve {output}", markup=False)


def _powers(text: str) -> int | tuple[int, ...]:
    """Read --power: one of all layers, or one of each."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(
            f"--power {printable(text)} is no whole number, nor are its parts",
            f"{KNOWN}; several are divided by commas",
        ) from None
    return found if len(found) > 1 else found[0]


def data_set(directory: Path, column: str) -> list[str]:
    """The sentences of a Hugging Face data set that ``save_to_disk`` wrote, of its "train" part if it has parts. Its
    Arrow files are read as they are, by pyarrow.
    """
    try:
        from pyarrow import ArrowException, ipc  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MissingPackage(
            f"--text: {directory} is a directory", "for data sets: pip install 'unseen[data]'"
        ) from None
    hint = "a directory that save_to_disk wrote"
    try:
        if (parts := directory / "dataset_dict.json").is_file():
            splits = json.loads(parts.read_text())["splits"]
            directory = directory / ("train" if "train" in splits else splits[0])
        names = [
            Path(entry["filename"]).name for entry in json.loads((directory / "state.json").read_text())["_data_files"]
        ]
        tables = [ipc.open_stream((directory / name).read_bytes()).read_all() for name in names]
    except (OSError, ValueError, LookupError, TypeError, ArrowException) as error:
        raise InvalidInput(f"--text: {directory} is no data set: {error}", hint) from None
    found: list[str] = []
    for table in tables:
        if column not in table.column_names:
            raise InvalidInput(
                f"--column: {directory} has no column {column!r}", f"it has {', '.join(table.column_names)}"
            )
        values = table.column(column).to_pylist()
        found += [line for value in values if value and (line := " ".join(str(value).split()))]
    if not found:
        raise InvalidInput(f"--text: {directory} has no sentences", hint)
    return found
