"""A session's answers to the texts of a run, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from parties.bulk.texts import TextFile
from parties.bulk.unfinished import UnfinishedRows, unfinished
from secure.errors import Error, InvalidInput
from secure.session.session import Session
from secure.tasks.embed import Embed


def vector_width(session: Session) -> int:
    """Return how many numbers a session's answers have. Raises InvalidInput if an answer is no vector."""
    shapes = list(session.program.output_shapes.values())
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise InvalidInput("this server's model does not give a vector for each text", "ask one that embeds texts")
    return int(shapes[0][-1])


@dataclass(frozen=True)
class Embedder:
    """The place where the texts of a run are asked: one session, or several.

    width: the numbers of an answer. program, model: the digest of the served Program, and the name of its weights.
    lengths: those to which texts are padded, which the server sees. stream: answers texts in order, see
    ``Session.stream``.
    """

    width: int
    program: str
    model: str
    lengths: tuple[int, ...]
    stream: Callable[..., Iterator[Tensor | Error]]


def embedder_of(session: Session) -> Embedder:
    """Return a session as a place to ask. Raises InvalidInput if its answers are no vectors."""
    width, lengths = vector_width(session), lengths_of(session)
    return Embedder(width, session.program.digest, session.link.model, lengths, session.stream)


def lengths_of(session: Session) -> tuple[int, ...]:
    """Return the lengths in tokens to which a session pads texts, the shortest first."""
    return tuple(sorted({size.length for size in session.sizes}))


def rows_of(
    embedder: Embedder, task: Embed, texts: TextFile, output: Path, *, overwrite: bool
) -> AbstractContextManager[UnfinishedRows]:
    """Open the rows of the answers to texts; see ``unfinished``."""
    return unfinished(
        output,
        texts,
        width=embedder.width,
        program=embedder.program,
        model=embedder.model,
        long=task.long if task.prompt is None else f"{task.long}, prompt {task.prompt[:99]}",
        overwrite=overwrite,
    )


def embedded(embedder: Embedder, task: Embed, rows: UnfinishedRows, retries: int) -> Iterator[int]:
    """Ask for the texts that are left, and append each answer as it comes; yield how many rows there are then.

    Raises what ``Session.stream`` raises.
    """
    # the row of a text that cannot be used takes the work of another, see ``rows``
    stand_in = np.linspace(-1 / 3, 1 / 7, embedder.width)
    for answer in embedder.stream(task, rows.left, retries=retries, first=rows.rows + 1):
        if isinstance(answer, Error):
            rows.add(stand_in, answer)
        else:
            rows.add(answer.numpy(), None)
        yield rows.rows
