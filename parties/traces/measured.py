"""A client's queries as they ran, next to what the Program says they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parties.traces.trace_file import TraceDirectory
from protocols.protocol import CircuitCost
from secure.cost.count import Profile, module, profile
from secure.cost.timeline import Timeline, Usage
from secure.errors import Error, ProtocolError, printable
from secure.mpc.program import Program
from secure.session.session import Session

DEPTH = 3  # parts of a module path that the table tells apart
BETWEEN = "(between steps)"


def costs(timeline: Timeline, instructions: int) -> list[CircuitCost]:
    """Count what each instruction really exchanged; offline bytes are not in a timeline."""
    out = [CircuitCost()] * instructions
    for r in timeline.rounds:
        for part in r.parts:
            up, down = (part.received, part.sent) if timeline.party == "server" else (part.sent, part.received)
            out[part.index] += CircuitCost(1, up, down)
    return out


def differences(timeline: Timeline, predicted: Profile) -> list[str]:
    """List where rounds and online bytes differ from the prediction: by instruction, by round and in total."""
    out = []
    measured = costs(timeline, len(predicted.lines))
    for index, (cost, line) in enumerate(zip(measured, predicted.lines, strict=True)):
        if cost != _online(line.cost):
            out.append(f"instruction {index} ({line.kind}, module '{line.path}'): {cost}, predicted {line.cost}")
    for number, r in enumerate(timeline.rounds, 1):
        parts = (sum(part.sent for part in r.parts), sum(part.received for part in r.parts))
        if (r.sent, r.received) != parts:
            out.append(f"round {number}: {(r.sent, r.received)} bytes sent and received, predicted {parts}")
    if timeline.cost != _online(predicted.total):
        out.append(f"the query: {timeline.cost}, predicted {predicted.total}")
    return out


def _online(cost: CircuitCost) -> CircuitCost:
    return CircuitCost(cost.rounds, cost.to_first, cost.to_second)


class Measurements:
    """The traces of one client's run. What goes wrong with them is kept for ``check``: the answers come first."""

    def __init__(self, directory: Path) -> None:
        self._traces = TraceDirectory(directory)
        self._failures: list[Error] = []
        self._predicted: Profile | None = None
        self.traces: list[Path | None] = []  # one a query
        self.timelines: list[Timeline] = []

    def add(self, session: Session) -> None:
        """The session's last query, of a deployment that keeps timelines."""
        report, timeline, program = session.reports[-1], session.timeline, session.program
        assert timeline is not None  # as there was a query
        self._predicted = self._predicted or profile(program)
        path = None
        try:
            path = self._traces.write(timeline, program, report.query, session.link.session_label)
        except Error as error:
            self._failures.append(error)
        if found := differences(timeline, self._predicted):
            self._failures.append(
                ProtocolError(
                    f"query {report.query} did not take what was predicted, in {len(found)} places: "
                    f"{printable(found[0])}",
                    "please report it: they must be equal",
                )
            )
        self.traces.append(path)
        self.timelines.append(timeline)

    def show(self, out: Console, program: Program) -> None:
        """The table, whether measured equals predicted, and where the traces are."""
        if self._predicted is None:
            return
        out.print()
        out.print(table(self.timelines, program, self._predicted))
        wrong = sum(bool(differences(t, self._predicted)) for t in self.timelines)
        total = self._predicted.total
        out.print(
            f"measured against predicted, by instruction: {wrong} of {len(self.timelines)} queries DIFFER"
            if wrong
            else f"measured rounds ({total.rounds}) and bytes equal the prediction, instruction by instruction"
        )
        for path in self.traces:
            if path is not None:
                out.print(f"trace: {path}", markup=False, soft_wrap=True)

    def check(self) -> None:
        """Raise what went wrong first, if anything did."""
        if self._failures:
            raise self._failures[0]


def table(timelines: Sequence[Timeline], program: Program, predicted: Profile) -> Table:
    """One row a module, slowest first. Seconds are means over the queries; bytes are those of the last one."""
    names = [module(path, DEPTH) for path in program.paths]
    rows: dict[str, Usage] = {name: Usage() for name in names}
    for timeline in timelines:
        for name, usage in timeline.by(names.__getitem__).items():
            rows[name].add(Usage(usage.compute, usage.wire, usage.waiting), 1 / len(timelines))
        rest = timeline.seconds - timeline.total.seconds
        rows.setdefault(BETWEEN, Usage()).add(Usage(compute=rest), 1 / len(timelines))
    for name, usage in timelines[-1].by(names.__getitem__).items():
        rows[name].sent, rows[name].received = usage.sent, usage.received
    bytes_of = dict.fromkeys(rows, CircuitCost())
    for name, line in zip(names, predicted.lines, strict=True):
        bytes_of[name] += line.cost
    many = f"mean of {len(timelines)} queries" if len(timelines) > 1 else "one query"
    title = f"the client's online part by module, {many}: seconds, and MB sent and received"
    shown = Table(title=title, title_justify="left", show_footer=True, show_edge=False, box=box.SIMPLE_HEAD)
    shown.padding, shown.pad_edge = (0, 1, 0, 0), False
    whole, cost = Usage(), predicted.total
    for usage in rows.values():
        whole.add(usage)
    shown.add_column("", footer="all", overflow="fold")
    for heading, footer in (
        ("compute", f"{whole.compute:.3f}"),
        ("wire", f"{whole.wire:.3f}"),
        ("wait", f"{whole.waiting:.3f}"),
        ("sent", _mb(whole.sent)),
        ("pre-\ndicted", _mb(cost.to_first)),
        ("received", _mb(whole.received)),
        ("pre-\ndicted", _mb(cost.to_second)),
    ):
        shown.add_column(heading, footer=footer, justify="right")
    for name, usage in sorted(rows.items(), key=lambda item: -item[1].seconds):
        sizes = (usage.sent, bytes_of[name].to_first, usage.received, bytes_of[name].to_second)
        times = (usage.compute, usage.wire, usage.waiting)
        shown.add_row(escape(printable(name)), *(f"{t:.3f}" for t in times), *map(_mb, sizes))
    return shown


def _mb(size: int) -> str:
    return f"{size / 1e6:.3f}"
