"""The command ``unseen timeline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parties.cli.console import OUT
from parties.traces.merge import merged


def timeline(
    client: Annotated[Path, typer.Argument(help="The client's trace of a query, from embed --trace.")],
    server: Annotated[Path, typer.Argument(help="The server's trace of the same query, from serve --trace.")],
    output: Annotated[Path, typer.Option(help="The file to write, for Perfetto or chrome://tracing.")],
) -> None:
    """Put both parties' traces of a query on one time line."""
    OUT.print(merged([client, server], output), markup=False, soft_wrap=True)
