"""``unseen profile --deployment ckks``: prints what ``secure.ckks.profile`` counts."""

from __future__ import annotations

import json

import torch
from rich.console import Console
from rich.table import Table

from secure.ckks.profile import CkksProfile, profile
from secure.deployments.ckks import CLIENT_TABLE, Ckks
from secure.deployments.compiled import build
from secure.deployments.deployment import CompileOptions
from secure.tasks.digits import NAME, layers_of, prepared, untrained
from secure.tasks.embed import Embed


def show(console: Console, found: CkksProfile, title: str) -> None:
    """A table of modules, and lines below it."""
    columns, rows, lines = found.table()
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print("\n".join(lines), highlight=False)


def command(console: Console, model: str, length: int, refresh: bool, precision: float, as_json: bool) -> None:
    """``model``: a directory, or digits, digits-2, digits-4 (random weights: costs alone)."""
    torch.set_num_threads(1)
    deployment = Ckks(refresh=refresh, precision=precision)
    if model.partition("-")[0] == NAME:
        loaded = prepared(untrained(layers_of(model)))
    else:
        loaded = Embed().load(model, length)
    compiled = build(loaded, deployment, CompileOptions(embedding=CLIENT_TABLE), {})  # nobody gets the table here
    found = profile(compiled.model)
    if as_json:
        console.file.write(json.dumps(found.as_dict()) + "\n")
    else:
        show(console, found, f"{model} under CKKS")
