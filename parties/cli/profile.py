"""The command ``unseen profile``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any

import typer

from parties.cli.console import OUT, get_ready, stages
from parties.cli.options import (
    MODEL,
    AnswerBitsOption,
    ApproximationsOption,
    CapacityOption,
    CheckedOption,
    ClustersOption,
    DraftLengthOption,
    EmbeddingOption,
    FractionBitsOption,
    GeluOption,
    IndexOption,
    LengthOption,
    RevealOption,
    TaskOption,
    TemperatureOption,
    ThreadsOption,
    TopOption,
    chosen,
    compile_options,
    dashed,
    refused,
)
from parties.cli.output import TABLE, FormatOption, OutputOption, checked_output, write_report
from parties.reports.tables import profile_tables
from parties.services.hosting import settle
from parties.services.measure import measure_transport
from secure.cost.outline import SHAPES, is_shape
from secure.cost.report import ProfileReport
from secure.deployments.compilation import Compilation
from secure.deployments.compiled import build
from secure.deployments.deployment import CompileOptions, Deployment, ProfileOptions
from secure.errors import InvalidInput
from secure.lowering.client_inputs import GENERATE
from secure.models.text import PACKAGED
from secure.mpc.network import LOOPBACK, NETWORKS, find_network
from secure.progress import Told

KNOWN = f"""{MODEL}; or, without any weights: {", ".join(map(repr, SHAPES))}, or a config.json.
 Models on digits: digits, digits-2, digits-4."""


def profile(
    deployment: Deployment,
    model: Annotated[str, typer.Argument(help=KNOWN)] = PACKAGED,
    length: LengthOption = None,
    capacity: CapacityOption = None,
    temperature: TemperatureOption = None,
    draft_length: DraftLengthOption = None,
    embedding: EmbeddingOption = None,
    gelu: GeluOption = None,
    approximations: ApproximationsOption = None,
    polynomial: Annotated[
        bool, typer.Option("--polynomial", help="A shape as `unseen train` would leave it; a directory is as it is.")
    ] = False,
    fraction_bits: FractionBitsOption = None,
    answer_bits: AnswerBitsOption = None,
    checked: CheckedOption = None,
    task: TaskOption = None,
    reveal: RevealOption = None,
    index: IndexOption = None,
    top: TopOption = None,
    clusters: ClustersOption = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{LOOPBACK}, {', '.join(n.key for n in NETWORKS)}, or MBPS,ROUND_TRIP_MS."
            " With one the model is compiled for it; of several each is shown for the same Program."
        ),
    ] = None,
    time: Annotated[bool, typer.Option(help="Time this machine's kernels, to project seconds.")] = True,
    threads: ThreadsOption = 1,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Parts of a module path to tell apart; 3 by default.")
    ] = None,
    form: FormatOption = TABLE,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    output: OutputOption = None,
) -> None:
    """Say what a query will cost before anything runs: rounds, bytes, memory, and seconds on given networks.

    Of a model that writes text it is one token, with --draft-length a pass, or with --length the prompt; with --index
    a search of it.
    """
    options = compile_options(
        deployment,
        embedding=embedding,
        gelu=gelu,
        approximations=approximations,
        fraction_bits=fraction_bits,
        answer_bits=answer_bits,
        checked=checked,
    )
    if length is not None and draft_length is not None:
        raise InvalidInput("--length is of a prompt, and --draft-length of a pass", "leave one of them out")
    said = {"network": network is not None, "depth": depth is not None, "polynomial": polynomial}
    for name, field in _PROFILED_BY.items():
        if said[name] and field not in deployment.profiled_by:
            raise refused(name, deployment, [n for n, f in _PROFILED_BY.items() if f in deployment.profiled_by])
    if form.value == "html" and "html" not in deployment.profiled_by:
        raise InvalidInput(f"--format html means nothing under {deployment.name}", "table or json")
    networks = {name: find_network(name) for name in network} if network else None
    if network and len(network) == 1:  # several are compared on one Program
        options = replace(options, network=network[0])
    if as_json and form is not TABLE and form.value != "json":
        raise InvalidInput("--json and --format html exclude each other", "give one of them")
    written = "json" if as_json else str(form.value)
    checked_output(output, written)
    settle()
    get_ready(threads)
    measuring = measure_transport if time else None
    wanted = ProfileOptions(networks, depth, measuring)
    with stages("profile") as told:
        given = {"capacity": capacity, "temperature": temperature, "draft_length": draft_length}
        served = chosen(task, reveal, index, top, clusters)
        found = profiled(deployment, model, length, options, polynomial, wanted, told, given, served)
    if written == "table":
        for table in profile_tables(found):
            OUT.print(table)
        for line in found.lines:
            OUT.print(line, markup=False)
        return
    write_report(_rendered(written, found), output)


_PROFILED_BY = {"network": "networks", "depth": "depth", "polynomial": "polynomial"}


def profiled(
    deployment: Deployment,
    model: str,
    length: int | None,
    options: CompileOptions,
    polynomial: bool,
    wanted: ProfileOptions,
    told: Told,
    writing: Mapping[str, Any],
    served: Mapping[str, Any],
) -> ProfileReport:
    """The profile of a shape without weights, or of a model that is loaded and compiled for it.

    writing, served: options of ``Compilation``: for models that write text, and what a model is served for; None, "" or
    0 for those that are not given.
    """
    told(0, 0, f"compiling {model} for {deployment.name}")
    made = deployment.outline(model, length or 0, options, polynomial=polynomial)
    if made is None:
        made = made_of(deployment, model, length, options, told, writing=writing, served=served)
    for what, options_of in (("models that write text", writing), ("a model with weights", served)):
        for name, given in options_of.items():
            if given not in (None, "", 0) and is_shape(model):
                raise InvalidInput(f"{dashed(name)} means nothing for {model}", f"it is for {what}")
    told(0, 0, "timing kernels and messages on this machine" if wanted.transport else "counting")
    return deployment.profile(made, wanted)


def made_of(
    deployment: Deployment,
    model: str,
    length: int | None,
    options: CompileOptions,
    told: Told,
    *,
    batch: int = 1,
    writing: Mapping[str, Any] = MappingProxyType({}),
    served: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Load and compile a model for one size.

    One that writes text is compiled for a step, with a draft length for a pass, and with ``length`` for a prompt of so
    many tokens. writing, served: see ``profiled``.
    """
    lengths = (length,) if length else ()
    own = {name: value for name, value in writing.items() if value is not None}
    compilation = Compilation(model, deployment, lengths, (), options, (batch,), **own, **served)
    if compilation.loader.name == GENERATE:
        sizes = {int(size.program.labels["length"]): size for size in compilation.run(told).sizes}
        return sizes[length or compilation.draft_length or 1].model
    compilation.check()
    loaded = compilation.loader.load(model, length or 0, (), told)
    return build(loaded, deployment, options, {}, (), (batch,), told).model


def _rendered(form: str, found: ProfileReport) -> str:
    if form != "html":
        return json.dumps(found.as_dict(), indent=2) + "\n"
    from parties.reports.html import html_report

    return html_report(found.as_dict())
