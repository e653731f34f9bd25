"""Options that several commands take, and what a person may give for them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from approximations import APPROXIMATIONS
from approximations.activations import GELU_FORMS
from secure.errors import Error
from secure.lowering.client_inputs import EMBEDDINGS

# Enums for typer's choices; their members come from the library.
Embedding = StrEnum("Embedding", {e: e for e in EMBEDDINGS})  # type: ignore[misc]
Gelu = StrEnum("Gelu", {g: g for g in GELU_FORMS})  # type: ignore[misc]
Approximations = StrEnum("Approximations", {a: a for a in APPROXIMATIONS})  # type: ignore[misc]


class Deployment(StrEnum):
    TWO_PARTY = "two-party"
    THREE_PARTY = "three-party"
    CKKS = "ckks"


ONE_HOT, BEST_GELU = Embedding[EMBEDDINGS[0]], Gelu[GELU_FORMS[0]]
OURS = Approximations[APPROXIMATIONS[0]]

Where = Annotated[Deployment, typer.Option("--deployment", help="Who computes on what.")]
Precision = Annotated[float, typer.Option("--precision", help="ckks: bits of the answer, of its largest value.")]
Lookup = Annotated[Embedding, typer.Option("--embedding", help="How a client's tokens are looked up.")]
Form = Annotated[Gelu, typer.Option("--gelu", help="The approximation of GeLU.")]
Chosen = Annotated[Approximations, typer.Option("--approximations", help="Ours, or PUMA's, its GeLU among them.")]
Length = Annotated[int, typer.Option(min=3, help="Padded length in tokens; public.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of local arithmetic; 0: one a processor.")]


def read_texts(path: Path, option: str, what: str) -> list[str]:
    """The lines of a file that are not blank; ``what`` they are called. Error names the option."""
    hint = f"a text file, one {what} a line"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Error(f"{option}: {path} cannot be read: {reason}", hint) from None
    if not lines:
        raise Error(f"{option}: {path} has no {what}s", hint)
    return lines
