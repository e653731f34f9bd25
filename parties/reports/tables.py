"""What the command line prints of costs: rich tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from parties.two_party.keys import DEPLOYMENT
from protocols.protocol import PARTY_NAMES, CircuitCost
from protocols.two_party import Input
from secure.cost.count import NETWORKS, Network, Profile, module, total_seconds
from secure.cost.projection import Projection
from secure.cost.timeline import Usage
from secure.mpc.program import Program


def mb(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB"


def embedding_price(program: Program) -> str:
    """What the chosen look-up of tokens costs a query and shows to clients, in words."""
    read = {i: c.protocol.name for i, c in enumerate(program.circuit) if isinstance(c.protocol, Input)}
    one_hot = {spec.name for spec in program.client_inputs if spec.encoding == "one-hot"}
    size = sum(c.protocol.cost().to_first for c in program.circuit if {read.get(i) for i in c.inputs} & one_hot)
    if one_hot:
        return (
            f"one-hot: {mb(size)} of a query's bytes, and shows nothing (client-table: none, but shows the token table)"
        )
    rows = sum(spec.size * spec.shape[-1] for spec in program.client_inputs if spec.encoding == "client-table")
    return f"client-table: no bytes a query, but shows clients the token table ({mb(4 * rows)}, once)"


def _cost(cost: CircuitCost) -> dict[str, int]:
    return {
        "rounds": cost.rounds,
        "bytes_to_server": cost.to_first,
        "bytes_to_client": cost.to_second,
        "offline_bytes_to_server": cost.dealt,
    }


def profile_json(program: Program, profile: Profile, depth: int, deployment: str = DEPLOYMENT) -> dict[str, Any]:
    """The whole profile: totals, by module, by kind, projected waiting times.

    Of three parties "server" is party 0, "client" party 1, and what is offline comes from party 2.
    """

    def rows(found: dict[str, tuple[CircuitCost, int, int]]) -> dict[str, dict[str, int]]:
        return {
            name: {**_cost(cost), "multiply_accumulates": products, "comparisons": comparisons}
            for name, (cost, products, comparisons) in found.items()
        }

    return {
        "program_digest": program.digest,
        "labels": dict(program.labels),
        "deployment": deployment,
        "total": {
            **_cost(profile.total),
            "multiply_accumulates": profile.products,
            "comparisons": profile.comparisons,
        },
        "failure_probability": program.failure_bound,
        "memory": {name: asdict(memory) for name, memory in zip(PARTY_NAMES, profile.memory, strict=True)},
        "correlations": profile.correlations,
        "modules": rows(profile.by(lambda line: module(line.path, depth))),
        "kinds": rows(profile.by(lambda line: line.kind)),
        "waiting_seconds": total_seconds(NETWORKS, profile.total),
    }


def projection_json(name: str, network: Network | None, projection: Projection) -> dict[str, Any]:
    """One network's line of the profile: seconds of a query, and what each party spends them on."""
    return {
        "name": network.name if network else name,
        "round_trip_ms": network.round_trip * 1e3 if network else 0.0,
        "mbps": network.bandwidth * 8 / 1e6 if network else None,
        "seconds": projection.seconds,
        **{timeline.party: _usage(timeline.total) for timeline in (projection.client, projection.server)},
    }


def _usage(usage: Usage) -> dict[str, float]:
    return {"compute": usage.compute, "wire": usage.wire, "waiting": usage.waiting}


def projection_table(networks: Sequence[Mapping[str, Any]], names: tuple[str, str] = PARTY_NAMES) -> Table:
    """Seconds of a query by network; ``names``: of those who compute."""
    server, client = names
    table = Table(title=f"a query, projected from this machine's kernels ({client}'s seconds)", title_justify="left")
    table.add_column("")
    for column in ("seconds", "computing", "packing", "waiting", f"{server} computes"):
        table.add_column(column, justify="right")
    for row in networks:
        client = row["client"]
        figures = (row["seconds"], client["compute"], client["wire"], client["waiting"], row["server"]["compute"])
        table.add_row(row["name"], *(f"{value:.2f}" for value in figures))
    return table


def profile_table(
    title: str, found: dict[str, tuple[CircuitCost, int, int]], names: tuple[str, str] = PARTY_NAMES
) -> Table:
    """One row a module or kind, dearest first; what costs nothing is left out."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("rounds, unmerged", *(f"to {name}" for name in names), "offline", "MMAC", "comparisons"):
        table.add_column(column, justify="right")
    dearest = sorted(found.items(), key=lambda item: -item[1][0].to_first - item[1][0].to_second)
    for name, (cost, products, comparisons) in dearest:
        if cost == CircuitCost() and not products:
            continue
        sizes = (mb(size) for size in (cost.to_first, cost.to_second, cost.dealt))
        table.add_row(name, str(cost.rounds), *sizes, f"{products / 1e6:.0f}", str(comparisons))
    return table
