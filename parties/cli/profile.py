"""``unseen profile``: what a query of a model will cost, and how long it will take, before anything runs."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from parties.cli.options import (
    BEST_GELU,
    ONE_HOT,
    OURS,
    Chosen,
    Deployment,
    Form,
    Length,
    Lookup,
    Precision,
    Threads,
    Where,
)
from parties.net.hosting import settle
from parties.net.measure import measure_transport
from parties.reports import tables as reports
from parties.reports.tables import mb
from parties.served.files import store
from protocols import kernels
from protocols.fixedpoint import FixedPoint
from protocols.protocol import PARTY_NAMES
from secure.cost.count import LOOPBACK, NETWORKS, Profile, find_network, module, profile, total_seconds
from secure.cost.kernel_times import measure
from secure.cost.outline import SHAPES, is_shape, outline_shape
from secure.cost.projection import Projection, project
from secure.cost.runnable import Deployed
from secure.deployments.three_party import THREE_PARTY_PUBLIC, deployed
from secure.errors import Error
from secure.models.text import PACKAGED, compile_text_model
from secure.mpc.program import Program
from secure.polynomial.recipe import Recipe

Format = StrEnum("Format", {f: f for f in ("table", "json", "html")})  # type: ignore[misc]

out = Console(highlight=False)

KNOWN = f"""A model directory, {PACKAGED!r}; or, without any weights: {", ".join(map(repr, SHAPES))}, or a config.json.
 Under ckks also digits, digits-2, digits-4."""


def profile_command(
    model: Annotated[str, typer.Argument(help=KNOWN)] = PACKAGED,
    length: Length = 128,
    embedding: Lookup = ONE_HOT,
    gelu: Form = BEST_GELU,
    approximations: Chosen = OURS,
    polynomial: Annotated[
        bool, typer.Option(help="A shape as `unseen train` would leave it; a trained directory is so by itself.")
    ] = False,
    fraction_bits: Annotated[int, typer.Option(help="Fraction bits of activations.")] = FixedPoint().fraction_bits,
    deployment: Where = Deployment.TWO_PARTY,
    public_weights: Annotated[
        bool, typer.Option("--public-weights", help="three-party: all parties know the weights.")
    ] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="ckks: the client re-encrypts where levels end.")] = False,
    precision: Precision = 9.0,
    network: Annotated[
        list[str] | None,
        typer.Option(help=f"{LOOPBACK}, {', '.join(n.key for n in NETWORKS)}, or MBPS,ROUND_TRIP_MS; may be repeated."),
    ] = None,
    time: Annotated[bool, typer.Option(help="Time this machine's kernels, to project seconds.")] = True,
    threads: Threads = 1,
    depth: Annotated[int, typer.Option(min=1, help="Parts of a module path to tell apart.")] = 3,
    form: Annotated[Format, typer.Option("--format", help="What to write.")] = Format["table"],
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where to write JSON or HTML; by default the terminal.")] = None,
) -> None:
    """What a query will cost, before anything runs: rounds, bytes and memory exactly, seconds on given networks."""
    if public_weights and deployment is not Deployment.THREE_PARTY:
        raise Error("--public-weights is for three parties", "--deployment three-party")
    if deployment is Deployment.CKKS:
        from parties.cli.profile_ckks import command

        command(out, model, length, refresh, precision, as_json or form.value == "json")
        return
    networks = {name: find_network(name) for name in network or [LOOPBACK, *(n.key for n in NETWORKS)]}
    if as_json and form.value == "html":
        raise Error("--json and --format html exclude each other", "give one of them")
    chosen = "json" if as_json else form.value
    checked_output(output, chosen)
    settle()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    program = _program(
        model,
        length,
        FixedPoint(fraction_bits=fraction_bits),
        polynomial,
        embedding.value,
        gelu.value,
        approximations.value,
    )
    named = THREE_PARTY_PUBLIC if public_weights else deployment.value
    running = deployed(program, named)
    found = profile(running)
    projections: dict[str, Projection] = {}
    if time:
        kernels.warm_up()
        timings, transport = measure(running), measure_transport()
        projections = {name: project(found, timings, transport, n) for name, n in networks.items()}
    document = reports.profile_json(program, found, depth, named)
    if network:
        document["waiting_seconds"] = total_seconds([n for n in networks.values() if n], found.total)
    document["networks"] = [reports.projection_json(name, networks[name], p) for name, p in projections.items()]
    if chosen == "table":
        _print_tables(program, running, found, depth, document)
        return
    write_report(_rendered(chosen, document), output)


def _program(
    model: str, length: int, fixed: FixedPoint, polynomial: bool, embedding: str, gelu: str, approximations: str
) -> Program:
    if is_shape(model):
        recipe = Recipe() if polynomial else None
        form = {"embedding": embedding, "gelu": gelu, "approximations": approximations}
        return outline_shape(model, length, **form, fixed_point=fixed, recipe=recipe)
    if polynomial:
        raise Error("--polynomial is for shapes", f"a trained model's directory, or one of {', '.join(SHAPES)}")
    return compile_text_model(model, length, embedding, gelu, fixed, approximations=approximations)[0].program


def _rendered(form: str, document: Mapping[str, Any]) -> str:
    if form != "html":
        return json.dumps(document, indent=2) + "\n"
    from parties.reports.html import html_report

    return html_report(document)


def checked_output(output: Path | None, form: str) -> None:
    """What would be found wrong after minutes of work."""
    if output is not None:
        folder = output.absolute().parent
        if not folder.is_dir():
            raise Error(f"--output: there is no directory {folder}", "make it first")
        if output.is_dir():
            raise Error(f"--output: {output} is a directory", "give a file")
        if not os.access(output if output.exists() else folder, os.W_OK):
            raise Error(f"--output: {output} cannot be written", "give a place that you may write to")
    if form == "table" and output is not None:
        raise Error("tables are for the terminal", "give --format json or html with --output")
    if form == "html":
        if output is None and out.is_terminal:
            raise Error("an HTML page is not for a terminal", "give --output FILE")
        if importlib.util.find_spec("plotly") is None:
            raise Error("plotly is not installed", "pip install 'unseen[report]'")


def write_report(text: str, output: Path | None) -> None:
    """What cannot be written where it should be goes to the terminal: it may have taken minutes to make."""
    if output is None:
        out.file.write(text)
        return
    try:
        store(output, text.encode())
    except OSError as error:
        out.file.write(text)
        raise Error(f"--output: {output} cannot be written: {error.strerror}", "the report is above") from None


def _print_tables(program: Program, running: Deployed, found: Profile, depth: int, document: Mapping[str, Any]) -> None:
    names = running.names
    out.print(reports.profile_table("by module", found.by(lambda line: module(line.path, depth)), names))
    out.print(reports.profile_table("by protocol", found.by(lambda line: line.kind), names))
    total = found.total
    if names == PARTY_NAMES:
        out.print(f"embedding {reports.embedding_price(program)}")
        server, client = (f"the {name}" for name in names)
        offline = f"offline {mb(total.dealt)} to the server, none to the client"
    else:
        server, client = names
        offline = f"{mb(total.dealt)} from party 2 to party 0, ahead"
    out.print(
        f"a query: {total.rounds} rounds (merged), {mb(total.to_first)} to {server}, {mb(total.to_second)} to "
        f"{client}; {offline}"
    )
    for party, memory in zip((server, client), found.memory, strict=True):
        out.print(
            f"memory of {party}, beside the weights: {mb(memory.live)} of shares at once, "
            f"{mb(memory.correlations)} of correlations for each prepared query"
        )
    out.print(
        f"failure probability within the ranges ({program.labels.get('ranges', 'calibrated')}): "
        f"{program.failure_bound:g} (no step is probabilistic)"
    )
    if document["networks"]:
        out.print(reports.projection_table(document["networks"], names))
        return
    for name, seconds in document["waiting_seconds"].items():
        out.print(f"waiting for the network, without computation: {seconds:6.2f} s on {name}")
