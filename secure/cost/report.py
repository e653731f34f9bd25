"""A profile as every deployment gives it: the cost, a document for programs, tables and lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secure.cost.traffic import Cost


@dataclass(frozen=True)
class ReportTable:
    """Rows of text under headings; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ProfileReport:
    """What a query of a model will take, before anything runs.

    cost: rounds, and bytes by link. document: everything as JSON has it; bytes and rounds are exact, seconds are
    projected. tables, lines: the same for people.
    """

    cost: Cost
    document: Mapping[str, Any]
    tables: Sequence[ReportTable] = field(default=())
    lines: Sequence[str] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The profile as JSON has it."""
        return dict(self.document)
