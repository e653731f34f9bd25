"""Tables of figures in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from secure.cost import report
from secure.errors import printable


def titled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows of text under headings; what stands after the first column is flush right."""
    table = Table(title=escape(printable(title)), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(escape(printable(column)), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


def profile_tables(found: report.ProfileReport) -> list[Table]:
    """The tables of a profile."""
    return [titled(table.title, table.columns, table.rows) for table in found.tables]
