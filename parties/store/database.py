"""A store of small entries in an SQLite data base, each in the format of ``sealed``."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parties.net.secret_files import check_private
from parties.store.entries import NAME_BYTES, Level, Taken, goes
from parties.store.keys import StoreKey
from parties.store.place import locked, opened
from parties.store.sealed import open_sealed, seal
from secure.errors import InvalidInput, StoreError

log = logging.getLogger("unseen.store")

MAXIMUM_BODY = 1 << 20  # bytes; larger ones are for ``files``


class DatabaseStore:
    """A ``Store`` in a file in a directory of this user's own, closed to others; several processes may share it.

    ``take`` returns after its transaction is on the disk (``synchronous = FULL``). Raises InvalidInput for a file that
    cannot be used or that others may replace, or whose entries were made under another key or in another place.
    """

    def __init__(self, file: Path, key: StoreKey) -> None:
        self._file, self._key, self._lock = file, key, threading.Lock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_private(file.parent)
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
            self._base = sqlite3.connect(file, timeout=10, isolation_level=None, check_same_thread=False)
            # where nobody closes it: the collector no longer does in silence. At the end threads may still use it
            weakref.finalize(self, self._base.close).atexit = False
            for setting in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                self._base.execute(f"PRAGMA {setting}")
            with locked(file.parent):
                with self._transaction():
                    self._base.execute("CREATE TABLE IF NOT EXISTS name (name BLOB NOT NULL, mark BLOB NOT NULL)")
                    self._base.execute(
                        "CREATE TABLE IF NOT EXISTS entries (made REAL NOT NULL, label TEXT NOT NULL,"
                        " entry BLOB NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (label, entry))"
                    )
                    self._base.execute("DROP INDEX IF EXISTS by_age")  # of earlier versions
                    self._base.execute("CREATE INDEX IF NOT EXISTS by_label ON entries (label)")  # and by rowid
                    self._base.execute("CREATE INDEX IF NOT EXISTS by_time ON entries (made)")
                self.name = self._named()
        except (OSError, sqlite3.Error) as error:
            raise InvalidInput(f"the store {file} cannot be used: {error}", "give another --store") from None

    def _named(self) -> bytes:
        """Return the store's name, which is kept with marks of its key and place, or make one."""
        found = self._base.execute("SELECT name, mark FROM name").fetchone()
        kept = None if found is None else bytes(found[0]) + bytes(found[1])
        return opened(self._file, self._key, kept, self._keep, self._file.stat().st_ino)

    def _keep(self, record: bytes) -> None:
        with self._transaction():
            self._base.execute("DELETE FROM name")
            self._base.execute("INSERT INTO name VALUES (?, ?)", (record[:NAME_BYTES], record[NAME_BYTES:]))
        # out of the log of a process that is killed: it would be written over a file that is put back
        self._base.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def put(self, label: str, entry: bytes, head: bytes, size: int = 0, parts: Iterable[bytes] = ()) -> None:
        if size > MAXIMUM_BODY:
            raise StoreError(f"a body of {size} bytes, {MAXIMUM_BODY} at most in a data base")
        sealed = b"".join(bytes(piece) for piece in seal(self._key, label, entry, head, size, parts))
        try:
            with self._lock, self._transaction():
                self._base.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (time.time(), label, entry, sealed))
        except sqlite3.IntegrityError:
            raise StoreError("an entry with this id is there: it was used before") from None
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def take(self, label: str, entry: bytes | None = None) -> Taken | None:
        while (found := self._burnt(label, entry)) is not None:
            id_, sealed = found

            def read_at(start: int, size: int, sealed: bytes = sealed) -> bytes:
                return sealed[start : start + size]

            try:
                return open_sealed(self._key, label, id_, len(sealed), read_at)
            except StoreError as error:
                log.warning("an entry was dropped: %s", str(error).replace("\n", "; "))
                if entry is not None:
                    raise
        return None

    def _burnt(self, label: str, entry: bytes | None) -> tuple[bytes, bytes] | None:
        """Remove an entry, and return it once that is on the disk. Raises StoreError.

        Rows have numbers that rise, so that the oldest is found whatever clocks did in between.
        """
        which, names = ("ORDER BY rowid LIMIT 1", (label,)) if entry is None else ("AND entry = ?", (label, entry))
        try:
            with self._lock, self._transaction():
                found = self._base.execute(
                    f"SELECT rowid, entry, sealed FROM entries WHERE label = ? {which}", names
                ).fetchone()
                if found is None:
                    return None
                self._base.execute("DELETE FROM entries WHERE rowid = ?", found[:1])
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return bytes(found[1]), bytes(found[2])

    def level(self, label: str | None = None) -> Level:
        try:
            with self._lock:
                count, size = self._base.execute(
                    "SELECT COUNT(*), COALESCE(SUM(LENGTH(sealed)), 0) FROM entries WHERE ? IS NULL OR label = ?",
                    (label, label),
                ).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return Level(int(count), int(size))

    def sweep(self, keep: Collection[str] | None = None, drop: Collection[str] = (), before: float = 0.0) -> int:
        try:
            with self._lock, self._transaction():
                removed = self._base.execute("DELETE FROM entries WHERE made < ?", (before,)).rowcount
                for (label,) in self._base.execute("SELECT DISTINCT label FROM entries").fetchall():
                    if goes(label, keep, drop):
                        removed += self._base.execute("DELETE FROM entries WHERE label = ?", (label,)).rowcount
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return removed

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        return StoreError(f"the store {self._file} cannot be used: {error}", "look at its disk")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._base.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._base.execute("ROLLBACK")
            raise
