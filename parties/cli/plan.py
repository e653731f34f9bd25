"""The command ``unseen plan``."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from parties.cli.console import OUT, get_ready, stages, write
from parties.cli.options import (
    MODEL,
    ApproximationsOption,
    BatchOption,
    EmbeddingOption,
    FractionBitsOption,
    GeluOption,
    LengthOption,
    compile_options,
)
from parties.cli.profile import made_of
from parties.reports.capacity import capacity_lines, capacity_tables
from parties.services.hosting import settle
from parties.services.measure import measure_transport
from secure.cost.demand import QueryDemand
from secure.cost.outline import SHAPES
from secure.cost.plan import PriceList, Workload
from secure.cost.plan import plan as planned
from secure.deployments.deployment import CompileOptions, Deployment
from secure.errors import InvalidInput
from secure.models.text import PACKAGED
from secure.mpc.network import NETWORKS, NetworkSpeed, find_apart
from secure.progress import Told

KNOWN = f"{MODEL}; or, without any weights: {', '.join(map(repr, SHAPES))}, or a config.json; or digits, digits-2, ..."
PRICES = tuple(field.name.replace("_", "-") for field in fields(PriceList))


def plan(
    deployment: Deployment,
    clients: Annotated[int, typer.Option(min=1, help="Clients that are connected at once at the busiest time.")],
    queries_per_day: Annotated[float, typer.Option(help="Queries of all clients together in a day.")],
    model: Annotated[str, typer.Argument(help=KNOWN)] = PACKAGED,
    texts_per_query: Annotated[
        int | None, typer.Option(min=1, help="Texts that a client asks together; as many as --batch by default.")
    ] = None,
    length: LengthOption = None,
    batch: BatchOption = None,
    embedding: EmbeddingOption = None,
    gelu: GeluOption = None,
    approximations: ApproximationsOption = None,
    fraction_bits: FractionBitsOption = None,
    network: Annotated[
        str | None,
        typer.Option(
            help=f"The network between all roles: {', '.join(n.key for n in NETWORKS)}, or MBPS,ROUND_TRIP_MS. "
            f"{NETWORKS[0].key} by default; with one that is given, the model is compiled for it."
        ),
    ] = None,
    peak: Annotated[
        float, typer.Option(metavar="FACTOR", help="The rate of the busiest time, over the day's mean.")
    ] = Workload.peak,
    utilisation: Annotated[
        float, typer.Option(help="The part of the busiest time for which processors may be busy.")
    ] = Workload.utilisation,
    latency: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="The most that an answer may take on average at the busiest time."),
    ] = None,
    store_hours: Annotated[
        float,
        typer.Option(metavar="HOURS", help="Hours of the busiest time whose correlations are made ahead."),
    ] = Workload.store_hours,
    cores_per_machine: Annotated[int, typer.Option(min=1, help="Cores of a machine.")] = Workload.cores_per_machine,
    sessions_per_machine: Annotated[
        int | None,
        typer.Option(
            min=1, help="Clients that a machine admits at once; any number by default. Each worker of a server: 128."
        ),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME=PRICE,...",
            help=f"Prices in one currency: {', '.join(PRICES)}. A file has a line NAME = PRICE for each (TOML).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a number of clients takes: cores, memory, disk and bandwidth of each role, latency, and cost."""
    options = compile_options(
        deployment,
        embedding=embedding,
        gelu=gelu,
        approximations=approximations,
        fraction_bits=fraction_bits,
    )
    workload = Workload(
        clients,
        queries_per_day,
        texts_per_query or batch or 1,
        peak=peak,
        store_hours=store_hours,
        utilisation=utilisation,
        cores_per_machine=cores_per_machine,
        latency=latency,
        sessions_per_machine=sessions_per_machine,
    )
    priced = read_prices(prices) if prices is not None else None
    apart = find_apart(network or NETWORKS[0].key)
    if network is not None and "network" in deployment.takes:
        options = replace(options, network=network)
    settle()
    get_ready(1)
    with stages("plan") as told:
        demand = demanded(deployment, model, length, options, batch or 1, apart, told)
    found = planned(demand, workload, priced)
    if as_json:
        write(json.dumps({"deployment": deployment.name, "model": model, **found.as_dict()}, indent=2) + "\n")
        return
    for table in capacity_tables(found):
        OUT.print(table)
    for line in capacity_lines(found):
        OUT.print(line, markup=False)


def demanded(
    deployment: Deployment,
    model: str,
    length: int | None,
    options: CompileOptions,
    batch: int,
    network: NetworkSpeed,
    told: Told,
) -> QueryDemand:
    """Return the demand of one query of a shape without weights, or of a model that is loaded and compiled for it."""
    deployment.check_batch(batch)
    told(0, 0, f"compiling {model} for {deployment.name}")
    made = deployment.outline(model, length or 0, options, batch=batch)
    if made is None:
        made = made_of(deployment, model, length, options, told, batch=batch)
    told(0, 0, "timing kernels and messages on this machine")
    return deployment.demand(made, network, measure_transport)


def read_prices(given: str) -> PriceList:
    """Read prices from ``NAME=PRICE,...`` or from a file. Raises InvalidInput."""
    hint = f"{', '.join(f'{name}=0.04' for name in PRICES)}, or a file with such lines"
    found: dict[str, Any]
    if "=" in given:
        pairs = [pair.partition("=") for pair in given.split(",")]
        found = {name.strip(): price.strip() for name, _, price in pairs}
        if len(found) < len(pairs):
            raise InvalidInput("--prices names a price twice", hint)
    else:
        try:
            found = tomllib.loads(Path(given).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InvalidInput(f"--prices: {given} cannot be read: {error}", hint) from None
    for name in found:
        if name not in PRICES:
            raise InvalidInput(f"--prices: nothing has the price {name!r}", hint)
    try:
        return PriceList(**{name.replace("-", "_"): float(price) for name, price in found.items()})
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"--prices: {error}", hint) from None
