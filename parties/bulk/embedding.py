"""A session's answers to the texts of a run, as rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from parties.bulk.rows import ANSWERS, FORMATS
from parties.bulk.texts import TextFile
from parties.bulk.unfinished import Formats, UnfinishedRows, unfinished
from secure.errors import Error, InvalidInput
from secure.models.prompts import Prompts
from secure.session.session import Session
from secure.tasks.task import Task


def vector_width(session: Session) -> int:
    """Return how many numbers a session's answers have. Raises InvalidInput if an answer is no vector."""
    shapes = list(session.program.output_shapes.values())
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise InvalidInput("this server's model does not give a vector for each text", "ask one that embeds texts")
    return int(shapes[0][-1])


@dataclass(frozen=True)
class Embedder:
    """The place where the texts of a run are asked: one session, or several.

    width: the numbers of an answer; 0 if it is no vector. program, model: the digest of the served Program, and the
    name of its weights. lengths: those to which texts are padded, which the server sees. prompts: those of the model.
    stream: answers texts in order, see ``Session.stream``.
    """

    width: int
    program: str
    model: str
    lengths: tuple[int, ...]
    prompts: Prompts
    stream: Callable[..., Iterator[Tensor | Error]]


def embedder_of(session: Session, task: Task[Any, Any] | None = None) -> Embedder:
    """Return a session as a place to ask. task: one whose answers are no vectors; None for embedding.

    Raises InvalidInput where answers should be vectors and are none.
    """
    width, lengths = vector_width(session) if task is None else 0, lengths_of(session)
    return Embedder(width, session.program.digest, session.link.model, lengths, session.prompts, session.stream)


def lengths_of(session: Session) -> tuple[int, ...]:
    """Return the lengths in tokens to which a session pads texts, the shortest first."""
    return tuple(sorted({size.length for size in session.sizes}))


def formats_of(embedder: Embedder) -> Formats:
    """Return the formats of files that hold the answers."""
    return FORMATS if embedder.width else ANSWERS


def how(task: Task[Any, Any], also: str = "") -> str:
    """Return, as a word, all of a task that decides what rows hold; ``also``: a text that all inputs have in common.

    Options that have their defaults are left out.
    """
    known = {each.name: each.default for each in fields(task)}  # type: ignore[arg-type]
    options = {name: getattr(task, name) for name in known if name not in ("reveal", "dimensions")}
    others = [f"{name} {str(value)[:99]}" for name, value in options.items() if name != "long" and value != known[name]]
    return " ".join([str(options["long"]), *others, *([hashlib.sha256(also.encode()).hexdigest()] if also else [])])


def rows_of(
    embedder: Embedder, task: Task[Any, Any], texts: TextFile, output: Path, *, overwrite: bool, also: str = ""
) -> AbstractContextManager[UnfinishedRows]:
    """Open the rows of the answers to texts; see ``unfinished``, and ``how`` for ``also``."""
    return unfinished(
        output,
        texts,
        width=embedder.width,
        program=embedder.program,
        model=embedder.model,
        long=how(task, also),
        overwrite=overwrite,
        formats=formats_of(embedder),
    )


def embedded(
    embedder: Embedder,
    task: Task[Any, Any],
    rows: UnfinishedRows,
    retries: int,
    give: Callable[[str], Any] = str,
) -> Iterator[int]:
    """Ask for the texts that are left, and append each answer as it comes; yield how many rows there are then.

    give: makes the task's input of a text. Raises what ``Session.stream`` raises.
    """
    # the row of a text that cannot be used takes the work of another, see ``rows``
    stand_in = np.linspace(-1 / 3, 1 / 7, embedder.width)
    for answer in embedder.stream(task, map(give, rows.left), retries=retries, first=rows.rows + 1):
        if isinstance(answer, Error):
            rows.add(stand_in, answer)
        else:
            rows.add(answer.numpy() if embedder.width else answer, None)
        yield rows.rows
