"""Tables of the suite's results: Markdown for the documentation, rich for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import works

Row = list[str]
FAILED = "failed"
NONE = "-"

OURS = (
    "work",
    "online s",
    "offline s",
    "rounds",
    "online MB",
    "offline MB",
    "error",
    "peak MB: client, server, dealer",
)


def seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}" if size < 10e6 else f"{size / 1e6:,.1f}"


def ratio(theirs: float, ours: float) -> str:
    value = theirs / ours
    return f"{value:.2f}x" if value < 10 else f"{value:,.0f}x"


def error(row: Mapping[str, Any]) -> str:
    """Of a transformer one minus the cosine, else the largest error."""
    if "cosine" in row:
        return f"1 - cos {max(0.0, 1 - row['cosine']):.0e}"
    largest = row["max error"] if "max error" in row else row["max_error"]
    return f"{largest:.1e}"


def own_rows(results: Mapping[str, Any]) -> Iterable[Row]:
    """Our works: what each takes."""
    for name, row in results["ours"].items():
        if "failed" in row:
            yield [name, FAILED, *[NONE] * (len(OURS) - 2)]
            continue
        peaks = ", ".join(str(row["peak MB"][party]) for party in ("client", "server", "dealer"))
        sizes = (megabytes(row["online bytes"]), megabytes(row["offline bytes to server"]))
        times = (seconds(row["online s"]), seconds(row["offline s"]))
        yield [name, *times, str(row["rounds"]), *sizes, error(row), peaks]


def side_by_side(results: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Header and rows. A peer's figure, and in brackets how many times ours it is: online, and with our offline
    seconds added.
    """
    names = list(results["peers"])
    header = ["work", "unseen s (and offline)", "unseen MB"]
    header += [f"{name} {what}" for name in names for what in ("s", "MB", "error")]
    rows = []
    for name, row in results["ours"].items():
        same = works.counterpart(name)
        if same is None or "failed" in row:
            continue
        cells = [name, f"{seconds(row['online s'])} (+ {seconds(row['offline s'])})", megabytes(row["online bytes"])]
        for peer in names:
            theirs = results["peers"][peer]["work"].get(same)
            cells += [NONE] * 3 if theirs is None else compared(row, theirs)
        rows.append(cells)
    return header, rows


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Row:
    if "failed" in theirs:
        return [FAILED, NONE, NONE]
    online, whole = ours["online s"], ours["online s"] + ours["offline s"]
    times = f"{seconds(theirs['seconds'])} ({ratio(theirs['seconds'], online)}, {ratio(theirs['seconds'], whole)})"
    return [times, f"{megabytes(theirs['bytes'])} ({ratio(theirs['bytes'], ours['online bytes'])})", error(theirs)]


def origin(results: Mapping[str, Any]) -> str:
    """What was measured where, as a paragraph."""
    machine, versions = results["machine"], results["versions"]
    peers = [
        f"{name}: {report.get('peer', name)} {report.get('version', '?')}, {report.get('parties', '?')} parties, "
        f"{report.get('threads a party', '?')} thread(s) each"
        for name, report in results["peers"].items()
    ]
    parts = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, {machine['simd']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"medians of {results['runs']} after one warm-up",
        *peers,
        f"`{machine['command']}`",
    ]
    return "; ".join(parts) + "."


def _markdown(header: Iterable[str], rows: Iterable[Row]) -> str:
    lines = [list(header), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(results: Mapping[str, Any]) -> str:
    """Both tables, and where they come from."""
    parts = [origin(results), _markdown(OURS, own_rows(results))]
    if results["peers"]:
        parts.append(_markdown(*side_by_side(results)))
    return "\n\n".join(parts)


def _rich(title: str, header: Iterable[str], rows: Iterable[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number, min_width=5)
    for row in rows:
        table.add_row(*row)
    return table


def show(results: Mapping[str, Any]) -> None:
    """The same for a person at a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width of its own
    console.print(_rich("unseen, two parties and a dealer over loopback", OURS, own_rows(results)))
    if results["peers"]:
        console.print(_rich("side by side; in brackets: times ours online, times ours in all", *side_by_side(results)))
