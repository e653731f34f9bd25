"""The form of a profile, the same for every deployment: the cost, a document for programs, and text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secure.cost.traffic import Cost


@dataclass(frozen=True)
class ReportTable:
    """A table of text with headings. The first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ProfileReport:
    """The profile of one query of a model, made before anything runs.

    cost: rounds, and bytes by link. document: everything as JSON values; bytes and rounds are exact, seconds are
    projected. tables, lines: the same as text for people.
    """

    cost: Cost
    document: Mapping[str, Any]
    tables: Sequence[ReportTable] = field(default=())
    lines: Sequence[str] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return dict(self.document)
