"""The command ``unseen index``: an index of documents, which ``unseen serve --index`` serves for private search."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import typer

from parties.cli.console import say, stages, use_threads
from parties.cli.options import MODEL, ThreadsOption
from secure.errors import InvalidInput
from secure.models.index import build_index, is_index, read_index, write_index
from secure.models.passages import OVERLAP, SUFFIXES, read_documents
from secure.models.text import PACKAGED, load_text_model
from secure.tasks.embed import LENGTH

KINDS = ", ".join(SUFFIXES)
DocumentsArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FILE|DIRECTORY",
        help=f"Documents: a file, or all files of a directory with the suffixes {KINDS}; .jsonl has a document a line, "
        '{"id": "...", "text": "..."}.',
    ),
]


def index(
    documents: DocumentsArgument,
    output: Annotated[Path, typer.Option(help="The directory of the index, as secret as the documents.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help=f"The model that embeds. {MODEL}.")] = PACKAGED,
    length: Annotated[
        int | None,
        typer.Option(min=3, help=f"The most tokens of a passage, special ones included. {LENGTH} by default."),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(min=0, help=f"Tokens that neighbouring passages have in common, at most. {OVERLAP} by default."),
    ] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Bring --output to these documents; only what changed is embedded."),
    ] = False,
    threads: ThreadsOption = 0,
) -> None:
    """Divide documents into passages, embed them in the clear, and write an index for private search."""
    use_threads(threads)
    before = None
    if update:
        before = read_index(output, model)
        for name, given, known in (("length", length, before.length), ("overlap", overlap, before.overlap)):
            if given is not None and given != known:
                raise InvalidInput(f"--{name} {given}: the index has passages of {name} {known}", "leave it out")
        length, overlap = before.length, before.overlap
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        hint = "--update brings it to these documents" if is_index(output) else "give a new directory"
        raise InvalidInput(f"{output} is there already", hint)
    found = iter(read_documents(documents))
    first = list(islice(found, 1))  # a path without documents is noticed before the model is read
    with stages("index") as told:
        told(0, 0, "loading the model")
        loaded = load_text_model(model)
        length = length or min(LENGTH, loaded.maximum_length)
        if length > loaded.maximum_length:
            raise InvalidInput(f"passages of {length} tokens", f"{loaded.maximum_length} at most, as the model takes")
        if overlap is None:
            overlap = min(OVERLAP, length // 4)
        made, change = build_index(
            model, loaded, chain(first, found), length=length, overlap=overlap, before=before, told=told
        )
        write_index(made, output)
    say(
        f"unseen index: {len(made.names):,} documents in {len(made.passages):,} passages of at most {length} tokens, "
        f"which overlap by {overlap} at most"
    )
    if update:
        say(
            f"unseen index: {change.added:,} documents added, {change.changed:,} changed, {change.removed:,} removed; "
            f"{change.embedded:,} passages embedded, {change.kept_segments} of {len(made.segments)} segments unchanged"
        )
    say(f"unseen index: {output} is as secret as the documents; serve it with: unseen serve {model} --index {output}")
