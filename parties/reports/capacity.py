"""A capacity plan in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from parties.reports.tables import titled
from secure.cost.plan import DAYS, CapacityPlan, RolePlan

UNKNOWN = "-"


def capacity_tables(plan: CapacityPlan) -> list[Table]:
    """Return tables of machines, of bandwidth and, if prices are known, of costs; a row a role."""
    client = plan.roles[0]
    machines = [
        (
            role.role,
            _number(role.processor_seconds_a_text, ".3g"),
            _number(role.cores, ".2f"),
            f"{role.machines:,}" if role.machines is not None else UNKNOWN,
            role.limit,
            _number(role.busy, ".0%"),
            _size(role.memory),
            _size(role.disk),
        )
        for role in plan.roles
    ]
    load, cores = plan.workload, plan.workload.cores_per_machine
    columns: tuple[str, ...]
    columns = ("", "CPU s a text", "cores", "machines", "by", "busy", "GB memory", "GB disk")
    title = f"{load.queries_per_day:,.10g} queries a day of {load.clients:,} clients, machines of {cores} cores"
    out = [titled(f"{title} (a {client.role}: 1), each:", columns, machines)]
    columns = ("", "Mbit/s in, peak", "Mbit/s out, peak", "GB a day in", "GB a day out")
    out.append(titled("bandwidth of all machines of a role", columns, [_traffic(role) for role in plan.roles]))
    billed = [(role.role, role.month_cost) for role in plan.roles if role.month_cost is not None]
    if billed:
        rows = [
            (name, *(f"{cost:,.2f}" for cost in bill.values()), f"{sum(bill.values()):,.2f}") for name, bill in billed
        ]
        out.append(titled("cost a month, in the prices' currency", ("", *billed[0][1], "sum"), rows))
    return out


def capacity_lines(plan: CapacityPlan) -> Iterable[str]:
    """Yield latency, sums and assumptions in words."""
    d, load = plan.demand, plan.workload
    if plan.latency is not None and d.seconds is not None and d.offline_seconds is not None:
        wait = sum(role.wait for role in plan.roles)
        offline = (
            f", {d.offline_seconds:.3g} s for its correlations" if d.offline_seconds and not load.store_hours else ""
        )
        yield (
            f"an answer takes {plan.latency:.3g} s on average at the busiest time, {plan.waiting:.3g} s of it on the "
            f"network alone: each run {d.seconds:.3g} s on idle machines{offline}, {wait:.3f} s waiting for processors"
        )
    else:
        yield f"an answer takes {plan.waiting:.3g} s on the network alone; nothing predicts the rest"
    if load.store_hours:
        yield f"the store holds the correlations of {load.store_hours:g} h of the busiest time; see the disks"
    if plan.month_cost is not None and plan.cost_1000_texts is not None:
        yield f"a month of {DAYS} days costs {plan.month_cost:,.2f}, 1,000 texts {plan.cost_1000_texts:.3g}"
    yield "assumptions:"
    for line in plan.assumptions:
        yield f"- {line}"


def _traffic(role: RolePlan) -> tuple[str, ...]:
    peaks = (f"{value / 1e6:,.1f}" for value in (role.peak_in, role.peak_out))
    return (role.role, *peaks, *(f"{value / 1e9:,.1f}" for value in (role.day_in, role.day_out)))


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _size(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value / 1e9:,.2f}"
