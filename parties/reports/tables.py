"""Tables of figures in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.markup import escape
from rich.table import Table

from secure.cost import report
from secure.errors import printable

WHOLE = 28
"""The most characters of a name that is not broken in two."""


def titled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows of text under headings; what stands after the first column is flush right.

    Names in the first column are left whole where that leaves the others room in a narrow terminal.
    """
    table = Table(
        title="\n" + escape(printable(title)),  # what is above it has no edge
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    whole = max((len(row[0]) for row in rows), default=0) <= WHOLE
    for number, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(
            escape(printable(column)), justify=justify, overflow="fold", no_wrap=whole if not number else False
        )
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


def profile_tables(found: report.ProfileReport) -> list[Table]:
    """The tables of a profile."""
    return [titled(table.title, table.columns, table.rows) for table in found.tables]
