"""The place where a store was last opened, by which one that was set back is told from the one that went on.

A store that is set back has its entries again which were used since. So each time it is opened, an empty file is made
beside its record, and the one before is removed. The record remembers, under the store's key, the new file's number
(inode) and the time of its last change (ctime): no copy has both, as no program can choose them. So a record that is
put back names a file that is gone, and a file that is put back is another one.

Not noticed: entries that are put back beside a record that is left as it is; a record that was copied since the store
was last opened; a snapshot of a whole file system or machine.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parties.store.entries import NAME_BYTES
from parties.store.keys import StoreKey
from secure.errors import InvalidInput

MARK_BYTES = 32
_BEFORE = "place"  # the file's name in earlier versions


def opened(record: Path, key: StoreKey, kept: bytes | None, keep: Callable[[bytes], None], *more: int) -> bytes:
    """Check what a store keeps in its record, renew it, and return the store's name. Call it under ``locked``.

    kept: the name, a mark of its key and one of its place; None: a new store. keep: puts the same into the record, on
    the disk when it returns. Until then the place before is there as well, so a crash at any instant leaves one that
    fits. more: numbers that belong to the place, too. Raises InvalidInput for a record of another key, place or
    version, OSError.
    """
    found = [*record.parent.glob(f"{record.name}.place-*"), record.parent / _BEFORE]
    if kept is None:
        name = secrets.token_bytes(NAME_BYTES)
    else:
        name = kept[:NAME_BYTES]
        _check(record, key, name, kept[NAME_BYTES:], [_place(path, *more) for path in found if path.exists()])
    fresh = record.with_name(f"{record.name}.place-{secrets.token_hex(8)}")
    at = os.open(fresh, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.fsync(at)
    finally:
        os.close(at)
    flush(record.parent)
    keep(name + key.mark(name) + key.mark(name + _place(fresh, *more)))
    for path in found:
        path.unlink(missing_ok=True)
    return name


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, in which several processes may open a store at the same moment. Raises OSError."""
    at = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(at, fcntl.LOCK_EX)
        yield
    finally:
        os.close(at)


def flush(directory: Path) -> None:
    """Return once a directory's names are on the disk. Raises OSError."""
    at = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def _place(path: Path, *more: int) -> bytes:
    found = path.lstat()
    return "/".join(map(str, (found.st_ino, found.st_ctime_ns, *more))).encode()


def _check(record: Path, key: StoreKey, name: bytes, marks: bytes, places: list[bytes]) -> None:
    where = record.parent
    if not hmac.compare_digest(marks[:MARK_BYTES], key.mark(name)):
        raise InvalidInput(
            f"the store {where} was made under another key",
            f"give that key: --store-key-file; without it what is there is lost: remove {where}",
        )
    if len(marks) == MARK_BYTES:
        raise InvalidInput(
            f"the store {where} was made by an earlier version",
            f"remove {where}: it is made anew, and only work is lost",
        )
    if not any(hmac.compare_digest(marks[MARK_BYTES:], key.mark(name + place)) for place in places):
        raise InvalidInput(
            f"the store {where} was copied or restored: what is in it may have been used before",
            f"remove {where}: it is made anew, and only work is lost",
        )
