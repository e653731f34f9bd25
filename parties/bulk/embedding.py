"""A session's answers to the texts of a run, as rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

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


def rows_of(
    session: Session, task: Embed, texts: TextFile, output: Path, *, overwrite: bool
) -> AbstractContextManager[UnfinishedRows]:
    """Open the rows of a session's answers to texts; see ``unfinished``."""
    return unfinished(
        output,
        texts,
        width=vector_width(session),
        program=session.program.digest,
        model=session.link.model,
        long=task.long,
        overwrite=overwrite,
    )


def embedded(session: Session, task: Embed, rows: UnfinishedRows, retries: int) -> Iterator[int]:
    """Ask for the texts that are left, and append each answer as it comes; yield how many rows there are then.

    Raises what ``Session.stream`` raises.
    """
    # the row of a text that cannot be used takes the work of another, see ``rows``
    stand_in = np.linspace(-1 / 3, 1 / 7, vector_width(session))
    for answer in session.stream(task, rows.left, retries=retries, first=rows.rows + 1):
        if isinstance(answer, Error):
            rows.add(stand_in, answer)
        else:
            rows.add(answer.numpy(), None)
        yield rows.rows
