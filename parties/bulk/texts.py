"""Texts of a file, one after another: a line each, a field of JSON lines, or a column of CSV.

A file is its user's own, so only single lines are bounded, not their number. Bytes that are no UTF-8 stay in the text
("surrogateescape"): the tokenizer refuses that text alone, in its place.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from secure.errors import InvalidInput, printable

STANDARD_INPUT = "-"
FIELD = "text"
LINE = 1 << 24  # bytes of a line; CSV fields have 131,072 characters, the limit of Python's reader


@dataclass(frozen=True)
class TextFile:
    """The texts of a file, or of standard input if its name is "-". Each iteration reads it anew, line by line.

    The suffix says what the file is. ``.jsonl``: a JSON object a line, whose field ``field`` is the text; blank lines
    are skipped. ``.csv``: a first line of names, and rows whose column ``field`` is the text. Anything else: a text a
    line, blank ones too, so that text n is line n. Raises InvalidInput, which names the line but not what it says.
    """

    name: str
    field: str | None = None

    def __post_init__(self) -> None:
        if self.field is not None and self._suffix not in (".jsonl", ".csv"):
            raise InvalidInput(f"--field means nothing for {self.name}", "it is for .jsonl and .csv")

    @property
    def again(self) -> bool:
        """True if it can be read more than once."""
        path = Path(self.name)
        return self.name != STANDARD_INPUT and not path.is_fifo() and not path.is_char_device()

    def __iter__(self) -> Iterator[str]:
        with ExitStack() as stack:
            if self.name == STANDARD_INPUT:
                file = sys.stdin.buffer
            else:
                try:
                    file = stack.enter_context(open(self.name, "rb"))
                except OSError as error:
                    raise self._wrong(f"cannot be read: {error.strerror}", "give a file that can") from None
            lines = self._lines(file)
            if self._suffix == ".jsonl":
                yield from self._fields(lines)
            elif self._suffix == ".csv":
                yield from self._column(lines)
            else:
                yield from (line.removesuffix("\n").removesuffix("\r") for line in lines)

    @property
    def _suffix(self) -> str:
        return Path(self.name).suffix.lower()

    def _wrong(self, what: str, hint: str) -> InvalidInput:
        return InvalidInput(f"--input: {self.name} {what}", hint)

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        number = 1
        while line := file.readline(LINE + 1):
            if len(line) > LINE:
                raise self._wrong(f"line {number} has more than {LINE} bytes", "give a text file of shorter lines")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield line.decode(errors="surrogateescape")
            number += 1

    def _fields(self, lines: Iterator[str]) -> Iterator[str]:
        name = FIELD if self.field is None else self.field
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                raise self._wrong(f"line {number} is not JSON", "give a JSON object a line") from None
            text = found.get(name) if isinstance(found, dict) else None
            if not isinstance(text, str):
                raise self._wrong(f"line {number} has no text in the field {printable(name)!r}", "name it with --field")
            yield text

    def _column(self, lines: Iterator[str]) -> Iterator[str]:
        name = FIELD if self.field is None else self.field
        reader = csv.reader(lines, strict=True)
        try:
            names = next(reader, [])
            if names.count(name) != 1:
                known = printable(", ".join(names))[:200] or "none"
                raise self._wrong(f"has no column {printable(name)!r}", f"name one with --field; its columns: {known}")
            at = names.index(name)
            for row in reader:
                if len(row) <= at:
                    raise self._wrong(f"line {reader.line_num} has no column {printable(name)!r}", "see that line")
                yield row[at]
        except csv.Error as error:
            raise self._wrong(f"line {reader.line_num} is not CSV: {error}", "see RFC 4180 for its rules") from None
