"""Rows of answers as bytes, in the formats of output files: JSON lines, and of embeddings npy and CSV too.

A row is whole or not: its end can be told from its bytes, so rows can be counted in a file whose writer was killed.

The work that a row takes is the same whether its text could be used or not. It is done between queries, and a server
that sees when they come should not learn which texts its tokenizer refused.
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

NUMBER = 32  # bytes that a number takes as text, at most
MESSAGE = 300  # characters of an error


@dataclass(frozen=True)
class RowFormat(ABC):
    """A format of rows. width: the numbers of an embedding. A row without an embedding has an error in its place."""

    suffix: ClassVar[str]
    width: int

    @abstractmethod
    def header(self, rows: int) -> bytes:
        """Return the beginning of a file of ``rows`` rows; its size is the same for every number of them."""

    @abstractmethod
    def row(self, index: int, vector: NDArray[np.float64], error: str | None) -> bytes:
        """Return one row. vector: float64 (width,); if there is an error, numbers of any value that are not written."""

    @abstractmethod
    def whole(self, file: BinaryIO) -> Iterator[tuple[int, bool]]:
        """Yield the bytes of each whole row from the file's position on, and whether it has an embedding.

        It ends before the first row that is torn, or that is not the row of its place.
        """


class LineRows(RowFormat):
    """Rows that are lines of text. ``begin``: how a row begins, up to what differs if it holds an error."""

    def whole(self, file: BinaryIO) -> Iterator[tuple[int, bool]]:
        index = 0
        while (line := file.readline(self.most)).endswith(b"\n") and line.startswith(begin := self.begin(index)):
            yield len(line), line.startswith(begin + self.usable)
            index += 1

    usable: ClassVar[bytes]

    @property
    def most(self) -> int:
        """The bytes of a row, at most."""
        return NUMBER * self.width + 12 * MESSAGE

    @abstractmethod
    def begin(self, index: int) -> bytes:
        """Return the first bytes of a row; ``usable`` follows in those with an embedding alone."""


class JsonRows(LineRows):
    """A JSON object a line: ``index`` from 0, and ``embedding`` (float64) or ``error``."""

    suffix: ClassVar[str] = ".jsonl"
    usable: ClassVar[bytes] = b'"embedding"'

    def header(self, rows: int) -> bytes:
        return b""

    def begin(self, index: int) -> bytes:
        return b'{"index": %d, ' % index

    def row(self, index: int, vector: NDArray[np.float64], error: str | None) -> bytes:
        usable = json.dumps({"index": index, "embedding": vector.tolist()})
        chosen = usable if error is None else json.dumps({"index": index, "error": error[:MESSAGE]})
        return chosen.encode() + b"\n"


class AnswerRows(JsonRows):
    """A JSON object a line: ``index`` from 0, and ``answer``, whatever its task makes of it, or ``error``."""

    usable: ClassVar[bytes] = b'"answer"'

    @property
    def most(self) -> int:
        return 1 << 24

    def row(self, index: int, vector: Any, error: str | None) -> bytes:
        found = {"answer": vector} if error is None else {"error": error[:MESSAGE]}
        return json.dumps({"index": index, **found}).encode() + b"\n"


class CsvRows(LineRows):
    """A first line of names, then rows of ``index`` from 0, ``error`` (empty if there is none) and the numbers."""

    suffix: ClassVar[str] = ".csv"
    usable: ClassVar[bytes] = b","

    def header(self, rows: int) -> bytes:
        return self._line(["index", "error", *range(self.width)])

    def begin(self, index: int) -> bytes:
        return b"%d," % index

    def row(self, index: int, vector: NDArray[np.float64], error: str | None) -> bytes:
        usable = self._line([index, "", *vector.tolist()])
        return usable if error is None else self._line([index, error[:MESSAGE], *[""] * self.width])

    @staticmethod
    def _line(cells: list[object]) -> bytes:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue().encode()


class NpyRows(RowFormat):
    """A matrix of float32, as ``numpy.load`` reads it; a row of NaN where there is no embedding."""

    suffix: ClassVar[str] = ".npy"

    def header(self, rows: int) -> bytes:
        file = io.BytesIO()  # numpy leaves room for more rows
        shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, self.width)}
        np.lib.format.write_array_header_1_0(file, shape)
        return file.getvalue()

    def row(self, index: int, vector: NDArray[np.float64], error: str | None) -> bytes:
        usable, empty = vector.astype("<f4"), np.full(self.width, np.nan, "<f4")
        return (usable if error is None else empty).tobytes()

    def whole(self, file: BinaryIO) -> Iterator[tuple[int, bool]]:
        while len(raw := file.read(4 * self.width)) == 4 * self.width:
            yield len(raw), not np.isnan(np.frombuffer(raw, "<f4")[0])


FORMATS: dict[str, type[RowFormat]] = {each.suffix: each for each in (JsonRows, NpyRows, CsvRows)}
"""All formats of embeddings by the suffixes of their files."""

ANSWERS: dict[str, type[RowFormat]] = {AnswerRows.suffix: AnswerRows}
"""The same of answers that are no embeddings."""
