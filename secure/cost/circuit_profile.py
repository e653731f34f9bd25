"""The profile of a circuit: counted costs, projected seconds, by module and by kind of operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from protocols.circuit import rounds_of
from protocols.protocol import CircuitCost
from protocols.two_party import Input
from secure.cost import passes
from secure.cost.count import Line, Profile, module, profile, total_seconds
from secure.cost.kernel_times import measure
from secure.cost.projection import Projection, Transport, project
from secure.cost.report import ProfileReport, ReportTable
from secure.cost.runnable import Deployed
from secure.cost.timeline import Timeline, Usage
from secure.cost.traffic import ONLINE, Cost, in_words, links, traffic_json
from secure.mpc.network import NetworkSpeed
from secure.mpc.program import Program
from secure.units import in_units

Networks = Mapping[str, NetworkSpeed | None]
"""Networks by name. None stands for both parties on one machine."""

Groups = dict[str, tuple[CircuitCost, int, int]]


@dataclass(frozen=True)
class Weightless:
    """A Program without weights. Its cost and profile are known, but it cannot run."""

    program: Program


def circuit_profile(
    deployment: str,
    program: Program,
    running: Deployed,
    cost: Cost,
    networks: Networks,
    transport: Transport | None,
    depth: int,
    remarks: Sequence[str],
) -> ProfileReport:
    """Profile a deployment's circuit: count its cost and, with a ``transport``, project a query's seconds.

    running: the circuit as the deployment runs it. transport: measured messages between processes here; with it the
    circuit's kernels are timed on this machine. depth: the parts of a module path that the profile tells apart.
    remarks: more lines for people.
    """
    found = profile(running)
    projections: dict[str, Projection] = {}
    if transport is not None:
        timings = measure(running)
        projections = {name: project(found, timings, transport, n) for name, n in networks.items()}
    by_module, by_kind = found.by(lambda line: module(line.path, depth)), found.by(_kind)
    waiting = total_seconds([n for n in networks.values() if n], found.total)
    rows = [_projection(name, networks[name], p, running) for name, p in projections.items()]
    document = {
        "program_digest": program.digest,
        "labels": dict(program.labels),
        "deployment": deployment,
        "total": _row(found.total, found.products, found.comparisons, running),
        "failure_probability": program.failure_bound,
        "memory": {name: asdict(memory) for name, memory in zip(running.names, found.memory, strict=True)},
        "correlations": found.correlations,
        "modules": {name: _row(*row, running) for name, row in by_module.items()},
        "kinds": {name: _row(*row, running) for name, row in by_kind.items()},
        "waiting_seconds": waiting,
        "networks": rows,
    }
    tables = [_table("by module", by_module, running), _table("by protocol", by_kind, running)]
    what = passes.asked(program)
    lines = [*_lines(what, found, cost, running), *remarks]
    if rows:
        tables.append(_projection_table(what, rows, running))
    else:
        lines += [f"waiting for the network, without computation: {s:6.2f} s on {name}" for name, s in waiting.items()]
    if length := passes.length_of(program):
        seconds = {row["name"]: row["seconds"] for row in rows} or {f"waiting on {n}": s for n, s in waiting.items()}
        lines += passes.in_words(length, cost.rounds, cost.bytes(phase=ONLINE), seconds)
        document["tokens"] = {f"{each:g}": round(passes.tokens_of(length, each), 4) for each in passes.AGREEMENTS}
    return ProfileReport(cost, document, tables, lines)


def failure(program: Program) -> str:
    """Say in words how likely a query within its ranges goes wrong."""
    ranges = program.labels.get("ranges", "calibrated")
    return f"failure probability within the ranges ({ranges}): {program.failure_bound:g} (no step is probabilistic)"


def checks_price(program: Program) -> str:
    """Say in words what the checks of ranges cost; a warning if there are none."""
    if program.watched is None:
        return "unchecked: a value that leaves its range makes a wrong answer, and nobody notices"
    needed = {output.instruction for output in program.outputs}
    for index in reversed(range(len(program.circuit))):
        if index in needed:
            needed.update(program.circuit[index].inputs)
    alone = tuple(i for n, i in enumerate(program.circuit) if n not in needed)
    checks = sum((i.protocol.cost() for i in alone), CircuitCost())
    rounds = program.cost.rounds - rounds_of(program.circuit, needed)
    online, whole = checks.to_first + checks.to_second, program.cost.to_first + program.cost.to_second
    dealt = f", {checks.dealt / program.cost.dealt:.1%} of the dealt ones" if program.cost.dealt else ""
    return (
        f"checked: a value that leaves its range is noticed, and the client told; {rounds} rounds and "
        f"{online / whole:.1%} of the online bytes{dealt} are for that"
    )


def embedding_price(program: Program) -> str:
    """Say in words what a look-up of tokens costs between two parties and shows to clients; "" without tokens."""
    read = {i: c.protocol.name for i, c in enumerate(program.circuit) if isinstance(c.protocol, Input)}
    one_hot = {spec.name for spec in program.client_inputs if spec.encoding == "one-hot"}
    if one_hot:
        size = sum(c.protocol.cost().to_first for c in program.circuit if {read.get(i) for i in c.inputs} & one_hot)
        taken = in_units(size)
        return f"embedding one-hot: {taken} of a query's bytes, and shows nothing (client-table: none, but the table)"
    rows = sum(spec.size * spec.shape[-1] for spec in program.client_inputs if spec.encoding == "client-table")
    shown = f"embedding client-table: no bytes a query, but shows clients the token table ({in_units(4 * rows)}, once)"
    return shown if rows else ""


def _kind(line: Line) -> str:
    return line.kind


def _row(cost: CircuitCost, products: int, comparisons: int, running: Deployed) -> dict[str, Any]:
    traffic = traffic_json(links(cost, *running.names, running.dealer))
    return {
        "rounds": cost.rounds,
        "traffic": traffic,
        "multiply_accumulates": products,
        "comparisons": comparisons,
    }


def _projection(name: str, network: NetworkSpeed | None, projection: Projection, running: Deployed) -> dict[str, Any]:
    """Return the seconds of a query on one network, and how each computing party spends them, as JSON values."""
    both: Sequence[Timeline] = (projection.server, projection.client)
    return {
        "name": network.name if network else name,
        "round_trip_ms": network.round_trip * 1e3 if network else 0.0,
        "mbps": network.bandwidth * 8 / 1e6 if network else None,
        "seconds": projection.seconds,
        "parties": {name: _usage(timeline.total) for name, timeline in zip(running.names, both, strict=True)},
    }


def _usage(usage: Usage) -> dict[str, float]:
    return {"compute": usage.compute, "wire": usage.wire, "waiting": usage.waiting}


# for people


def _lines(what: str, found: Profile, cost: Cost, running: Deployed) -> list[str]:
    lines = [f"{what}: {cost.rounds} rounds (merged), {in_words(cost.traffic, 'online')}"]
    lines.append(f"offline: {in_words(cost.traffic, 'offline') or 'nothing'}")
    for party, memory in zip(running.names, found.memory, strict=True):
        lines.append(
            f"memory of {party}, beside the weights: {in_units(memory.live)} of shares at once, "
            f"{in_units(memory.correlations)} of correlations for each prepared query"
        )
    return lines


def _table(title: str, found: Groups, running: Deployed) -> ReportTable:
    """Make a table with one row per module or kind, the dearest first, without those that cost nothing."""
    dearest = sorted(found.items(), key=lambda item: -item[1][0].to_first - item[1][0].to_second)
    rows = [
        (
            *(name, str(cost.rounds)),
            *(in_units(size) for size in (cost.to_first + cost.brought, cost.to_second, cost.dealt)),
            *(f"{products / 1e6:.0f}", str(comparisons)),
        )
        for name, (cost, products, comparisons) in dearest
        if cost != CircuitCost() or products
    ]
    directions = (f"to {name}" for name in running.names)
    return ReportTable(title, ("", "unmerged rounds", *directions, "offline", "MMAC", "compared"), tuple(rows))


def _projection_table(what: str, networks: Sequence[Mapping[str, Any]], running: Deployed) -> ReportTable:
    first, second = running.names
    rows = []
    for row in networks:
        used = row["parties"][second]
        figures = (row["seconds"], used["compute"], used["wire"], used["waiting"], row["parties"][first]["compute"])
        rows.append((str(row["name"]), *(f"{value:.2f}" for value in figures)))
    title = f"{what}, projected from this machine's kernels ({second}'s seconds)"
    return ReportTable(title, ("", "seconds", "computing", "packing", "waiting", f"{first} computes"), tuple(rows))
