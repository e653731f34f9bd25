"""Reports in a file or on the terminal: table, JSON or HTML."""

from __future__ import annotations

import importlib.util
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from parties.cli.console import OUT, write
from parties.served.files import store
from secure.errors import InvalidInput, MissingPackage

Format = StrEnum("Format", {f: f for f in ("table", "json", "html")})  # type: ignore[misc]
TABLE = Format["table"]

FormatOption = Annotated[Format, typer.Option("--format", help="What to write.")]
OutputOption = Annotated[Path | None, typer.Option(help="Where to write JSON or HTML; by default the terminal.")]


def checked_output(output: Path | None, form: str) -> None:
    """Raise what would else be found wrong after minutes of work."""
    if output is not None:
        folder = output.absolute().parent
        if not folder.is_dir():
            raise InvalidInput(f"--output: there is no directory {folder}", "make it first")
        if output.is_dir():
            raise InvalidInput(f"--output: {output} is a directory", "give a file")
        if not os.access(output if output.exists() else folder, os.W_OK):
            raise InvalidInput(f"--output: {output} cannot be written", "give a place that you may write to")
    if form == "table" and output is not None:
        raise InvalidInput("--output: tables are for the terminal", "give --format json or html with --output")
    if form == "html":
        if output is None and OUT.is_terminal:
            raise InvalidInput("an HTML page is not for a terminal", "give --output FILE")
        if importlib.util.find_spec("plotly") is None:
            raise MissingPackage("plotly is not installed", "pip install 'unseen[report]'")


def write_report(text: str, output: Path | None) -> None:
    """Write a report to its file, or to the terminal where that fails: it may have taken minutes to make."""
    if output is None:
        write(text)
        return
    try:
        store(output, text.encode())
    except OSError as error:
        write(text)
        raise InvalidInput(f"--output: {output} cannot be written: {error.strerror}", "the report is above") from None
