"""A store of large entries in a directory: a file for each, in the format of ``sealed``.

An entry is written under a temporary name, flushed to the disk, linked to its name, and the directory is flushed.
Taking it removes the name and flushes the directory; the bytes are then read through the descriptor that is still
open. Removing a name succeeds for one process alone, which is how several share a directory. A writer holds a lock of
its temporary file, so that whoever sweeps removes those of killed writers only.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parties.net.secret_files import check_private, read_secret
from parties.store.entries import Level, Taken, goes
from parties.store.keys import StoreKey
from parties.store.place import flush, locked, opened
from parties.store.sealed import open_sealed, seal
from secure.errors import InvalidInput, StoreError

log = logging.getLogger("unseen.store")

NAME_FILE = "name"
_PART, _ENTRY = ".part-", ".entry"


class FileStore:
    """A ``Store`` in a directory of this user's own, closed to others, which is made if it is not there.

    It must be on a local disk: a network's file system may repeat a removal, or keep it from the disk. Raises
    InvalidInput for a directory that others may enter or replace, or whose entries were made under another
    key or in another place.
    """

    def __init__(self, directory: Path, key: StoreKey) -> None:
        self.directory, self._key = directory, key
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_private(directory)
            self.name = self._named()
        except OSError as error:
            raise InvalidInput(
                f"the store {directory} cannot be used: {error.strerror}", "give another --store"
            ) from None

    def _named(self) -> bytes:
        """Return the store's name, which is kept with marks of its key and place, or make one."""
        path = self.directory / NAME_FILE
        with locked(self.directory):
            return opened(path, self._key, read_secret(path) if path.exists() else None, self._keep)

    def _keep(self, record: bytes) -> None:
        with self._part() as (path, at):
            write_all(at, record)
            os.fsync(at)
            path.rename(self.directory / NAME_FILE)
        flush(self.directory)

    def put(self, label: str, entry: bytes, head: bytes, size: int = 0, parts: Iterable[bytes] = ()) -> None:
        try:
            self._write(_file_of(label, entry), seal(self._key, label, entry, head, size, parts))
        except FileExistsError:
            raise StoreError("an entry with this id is there: it was used before") from None
        except OSError as error:
            raise StoreError(
                f"the store {self.directory} cannot be written: {error.strerror}", "make room on its disk"
            ) from None

    def _write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file whole or not at all. Raises FileExistsError if there is one of this name, OSError."""
        with self._part() as (path, at):
            for piece in pieces:
                write_all(at, piece)
            os.utime(at, (now := time.time(), now))  # on the clock that ``sweep`` is asked by, not the file system's
            os.fsync(at)
            os.link(path, self.directory / name)
        flush(self.directory)

    @contextmanager
    def _part(self) -> Iterator[tuple[Path, int]]:
        """Make a temporary file and hold its lock; it is removed at the end."""
        while True:
            path = self.directory / f"{_PART}{secrets.token_hex(16)}"
            at = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(at, fcntl.LOCK_EX)
            if os.fstat(at).st_nlink:
                break
            os.close(at)  # it was swept before it was locked
        try:
            yield path, at
        finally:
            path.unlink(missing_ok=True)
            os.close(at)

    def take(self, label: str, entry: bytes | None = None) -> Taken | None:
        if entry is not None:
            return self._taken(label, entry)
        for found in self._oldest(label):
            with suppress(StoreError):  # it is gone, and the log says why
                if (taken := self._taken(label, found)) is not None:
                    return taken
        return None

    def _oldest(self, label: str) -> list[bytes]:
        found = [(state.st_mtime_ns, name) for name, state in self._entries() if _has(name, label)]
        return [bytes.fromhex(name.removesuffix(_ENTRY).partition("-")[2]) for _, name in sorted(found)]

    def _taken(self, label: str, entry: bytes) -> Taken | None:
        """Burn an entry and open it; None if it is not there, or if somebody else was first. Raises StoreError."""
        path = self.directory / _file_of(label, entry)
        try:
            at = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from None
        file = OpenFile(at)
        try:
            path.unlink()
            flush(self.directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{path} cannot be burnt: {error.strerror}", "it is lost; look at the disk") from None
        try:
            return open_sealed(self._key, label, entry, os.fstat(at).st_size, file.read_at)
        except StoreError as error:
            log.warning("an entry was dropped: %s", str(error).replace("\n", "; "))
            raise

    def level(self, label: str | None = None) -> Level:
        sizes = [state.st_size for name, state in self._entries() if label is None or _has(name, label)]
        return Level(len(sizes), sum(sizes))

    def sweep(self, keep: Collection[str] | None = None, drop: Collection[str] = (), before: float = 0.0) -> int:
        removed, short = 0, [None if labels is None else [_short(label) for label in labels] for labels in (keep, drop)]
        for name, state in self._entries():
            if goes(name.partition("-")[0], short[0], short[1] or ()) or state.st_mtime < before:
                with suppress(FileNotFoundError):
                    (self.directory / name).unlink()
                    removed += 1
        for path in self.directory.glob(f"{_PART}*"):
            _remove_dead(path)
        flush(self.directory)
        return removed

    def _entries(self) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self.directory) as found:
            for each in found:
                if each.name.endswith(_ENTRY):
                    with suppress(FileNotFoundError):  # somebody took it
                        yield each.name, each.stat(follow_symlinks=False)

    def close(self) -> None:
        """Do nothing: it holds nothing open."""


class OpenFile:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, at: int) -> None:
        self.at = at
        weakref.finalize(self, os.close, at)

    def read_at(self, start: int, size: int) -> bytes:
        pieces, end = [], start + size
        while start < end and (piece := self._read(end - start, start)):
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read(self, size: int, start: int) -> bytes:
        try:
            return os.pread(self.at, size, start)
        except OSError as error:
            raise StoreError(f"an entry cannot be read: {error.strerror}", "look at the store's disk") from None


def _file_of(label: str, entry: bytes) -> str:
    return f"{_short(label)}-{entry.hex()}{_ENTRY}"


def _has(name: str, label: str) -> bool:
    return name.startswith(f"{_short(label)}-")


def _short(label: str) -> str:
    """Return as much of a label as a file's name has; the file itself has all of it."""
    return label[:32]


def write_all(at: int, piece: bytes | memoryview) -> None:
    """Write all of a piece to a descriptor. Raises OSError."""
    view = memoryview(piece)
    while view:
        view = view[os.write(at, view) :]


def _remove_dead(path: Path) -> None:
    """Remove a temporary file, unless its writer lives and so holds its lock."""
    with suppress(OSError):
        at = os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(at)
