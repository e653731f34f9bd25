"""Rows that a run appends to a file, so that whoever kills it at any instant loses no whole row.

While a run goes on there are two files beside its output. ``OUTPUT.part`` has the rows. ``OUTPUT.part.json`` says which
Program, model and options they come from, and holds the number and a SHA-256 of the texts that were read: always at
least of those whose rows are in the other file, as it is written first. A run that finds them, and the same texts,
counts the whole rows, cuts off what is torn behind them, and goes on there. The output appears when all rows are there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from parties.bulk.rows import FORMATS, RowFormat
from parties.served.files import store
from secure.errors import Error, InvalidInput, printable

VERSION = 1
KNOWN = 1 << 16  # bytes of a ``.part.json``, at most
ANEW = "--overwrite begins anew, another --output leaves it alone"

Word = Annotated[str, Field(max_length=200)]
Formats = Mapping[str, type[RowFormat]]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Origin:
    """The origin of rows: the Program's digest, its model's name (which stands for the weights), options, and texts.

    long: what was done with long texts, and whatever else decides what rows hold. texts, sha256: how many texts were
    read, and the digest of ``Texts`` over them.
    """

    version: int
    program: Word
    model: Word
    long: Word
    texts: Annotated[int, Field(ge=0, lt=1 << 62)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    def check(self, other: Origin, what: str) -> None:
        """Raise InvalidInput unless rows of ``other``, which are in the file ``what``, can be continued by ours."""
        ours, theirs = asdict(self), asdict(other)
        for name in ("version", "program", "model", "long"):
            if ours[name] != theirs[name]:
                shown = f"{printable(str(theirs[name]))[:12]!r}, not {printable(str(ours[name]))[:12]!r}"
                raise InvalidInput(f"{what} was begun with another {name}: {shown}", ANEW)


class Texts:
    """The texts of a run as they are read. It counts them, and keeps a running SHA-256 of them and their lengths."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self._sha, self.read = iter(texts), hashlib.sha256(), 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            raw = text.encode("utf-8", "surrogatepass")
            self._sha.update(len(raw).to_bytes(8, "little") + raw)
            self.read += 1
            yield text

    @property
    def sha256(self) -> str:
        """The digest of all texts that were read."""
        return self._sha.hexdigest()

    def again(self, origin: Origin, rows: int) -> Iterator[str]:
        """Read the texts that an earlier run had read; return those behind the first ``rows``, and all further ones.

        Raises InvalidInput if they are not the same texts.
        """
        coming = iter(self)
        kept = [text for number, text in enumerate(islice(coming, origin.texts)) if number >= rows]
        if (self.read, self.sha256) != (origin.texts, origin.sha256):
            raise InvalidInput(f"the first {origin.texts} texts are not those of the run that is not finished", ANEW)
        return chain(kept, coming)


def check_output(output: Path, *, overwrite: bool, formats: Formats = FORMATS) -> None:
    """Raise InvalidInput for an output that cannot be written, or is there already, before anything takes long."""
    if output.suffix.lower() not in formats:
        raise InvalidInput(f"--output: {output} has no known suffix", f"one of {', '.join(formats)}")
    for path in (output, *beside(output)):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InvalidInput(f"--output: {path} is no ordinary file", "give another name")
    if not output.absolute().parent.is_dir():
        raise InvalidInput(f"--output: there is no directory {output.absolute().parent}", "make it first")
    if output.exists() and not overwrite:
        raise InvalidInput(f"--output: {output} is there already", "give another name, or --overwrite to replace it")


def beside(output: Path) -> tuple[Path, Path]:
    """Return the files of a run that is not finished: its rows, and where they come from."""
    return Path(f"{output}.part"), Path(f"{output}.part.json")


class UnfinishedRows:
    """The rows of a run, which are appended one by one. Use it as ``with unfinished(...)``.

    rows: those in the file, the whole ones of earlier runs included. unusable: how many of them have no embedding.
    first: the numbers of the first of these, from 1, each with the reason if this run found it.
    """

    FIRST = 3

    def __init__(self, output: Path, file: BinaryIO, form: RowFormat, origin: Origin, texts: Texts) -> None:
        self._output, self._file, self._form = output, file, form
        self._origin, self._texts = origin, texts
        self.rows, self.unusable, self.first = 0, 0, list[str]()
        self.left: Iterable[str] = texts

    def begin(self) -> None:
        """Begin with no row, whatever the files hold."""
        self._file.truncate(0)
        self._note()
        self._file.seek(0)
        self._file.write(self._form.header(0))
        self._file.flush()

    def go_on(self) -> None:
        """Go on behind the last whole row of the file. Raises InvalidInput if it has another origin."""
        rows, known = beside(self._output)
        found = read_origin(known)
        self._origin.check(found, str(rows))
        self._file.seek(0)
        size = len(self._form.header(0))
        if (end := len(self._file.read(size))) < size:
            self.begin()
            return
        for size, usable in self._form.whole(self._file):
            if self.rows == found.texts:
                raise InvalidInput(f"{rows} has more rows than {known} has texts", ANEW)
            end += size
            self._count(usable, "")
        self.left = self._texts.again(found, self.rows)
        self._origin = found
        self._file.truncate(end)
        self._file.seek(end)

    def add(self, vector: Any, error: Error | None) -> None:
        """Append the next row. vector: the answer as its format takes it; any if there is none, for ``error``."""
        if self.rows == self._origin.texts:
            self._note()
        reason = None if error is None else printable(str(error)).partition("\n")[0]
        self._file.write(self._form.row(self.rows, vector, reason))
        self._file.flush()
        self._count(error is None, f": {reason}")

    def finish(self) -> None:
        """Put the output in its place. Raises InvalidInput if something else came there meanwhile."""
        rows, known = beside(self._output)
        self._file.seek(0)
        self._file.write(self._form.header(self.rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._output.exists():
            raise InvalidInput(f"{self._output} came into being meanwhile", f"move it away: the rows are in {rows}")
        os.replace(rows, self._output)
        known.unlink()

    def _count(self, usable: bool, reason: str) -> None:
        self.rows += 1
        if not usable:
            self.unusable += 1
            if len(self.first) < self.FIRST:
                self.first.append(f"text {self.rows:,}{reason}")

    def _note(self) -> None:
        """Say which texts were read, before the row of the first that is not yet said is written."""
        os.fsync(self._file.fileno())
        self._origin = replace(self._origin, texts=self._texts.read, sha256=self._texts.sha256)
        store(beside(self._output)[1], json.dumps(asdict(self._origin)).encode())


def read_origin(path: Path) -> Origin:
    """Read a ``.part.json``. Raises InvalidInput if there is none that was written whole."""
    try:
        with path.open("rb") as file:
            raw = file.read(KNOWN)
        return TypeAdapter(Origin).validate_json(raw, strict=True)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", ANEW) from None
    except ValidationError:
        raise InvalidInput(f"{path} does not say where the rows beside it come from", ANEW) from None


@contextmanager
def unfinished(
    output: Path,
    texts: Iterable[str],
    *,
    width: int,
    program: str,
    model: str,
    long: str,
    overwrite: bool,
    formats: Formats = FORMATS,
) -> Iterator[UnfinishedRows]:
    """Open the rows of a run, and go on where an earlier one stopped, unless that is to be overwritten.

    ``left`` of the result are the texts whose rows are not there yet. width: the numbers of an embedding. formats:
    those of the answers. For others see ``Origin``. Raises InvalidInput if what is there cannot be continued, or
    another process writes it.
    """
    check_output(output, overwrite=overwrite, formats=formats)
    rows, _ = beside(output)
    form = formats[output.suffix.lower()](width)
    read = Texts(texts)
    origin = Origin(VERSION, program, model, long, 0, read.sha256)
    with ExitStack() as stack:
        try:
            number = os.open(rows, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidInput(f"--output: {rows} cannot be written: {error.strerror}", "give another place") from None
        file = stack.enter_context(os.fdopen(number, "r+b"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidInput(f"--output: another command writes {rows}", "wait for it, or give another") from None
        made = UnfinishedRows(output, file, form, origin, read)
        if overwrite or os.fstat(number).st_size == 0:
            made.begin()
            output.unlink(missing_ok=True)
        else:
            made.go_on()
        yield made
