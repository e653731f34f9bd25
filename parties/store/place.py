"""The place where a store was made, by which one that was restored from a backup is told from the one that went on.

A store that is set back has its entries again which were used since. In a store's directory lies an empty file, of
which the store remembers, under its key, the number (inode) and the time of its last change (ctime): no copy has both,
as no program can choose them. A snapshot of a whole file system or machine keeps them: that is not noticed here.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from parties.store.keys import StoreKey
from secure.errors import InvalidInput

PLACE_FILE = "place"
MARK_BYTES = 32


def place_of(directory: Path, *more: int) -> bytes:
    """Return what is remembered of a store's directory, whose file is made if it is not there. more: numbers as well.

    Raises OSError.
    """
    at = os.open(directory / PLACE_FILE, os.O_RDONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        found = os.fstat(at)
    finally:
        os.close(at)
    return "/".join(map(str, (found.st_ino, found.st_ctime_ns, *more))).encode()


def marks(key: StoreKey, name: bytes, place: bytes) -> bytes:
    """Return what a store keeps beside its name: a mark of its key, and one of its place."""
    return key.mark(name) + key.mark(name + place)


def check_marks(where: Path, key: StoreKey, name: bytes, kept: bytes, place: bytes) -> None:
    """Raise InvalidInput for a store of another key or from another place. where: names it, and what to remove."""
    if not hmac.compare_digest(kept[:MARK_BYTES], key.mark(name)):
        raise InvalidInput(
            f"the store {where} was made under another key",
            f"give that key: --store-key-file; without it what is there is lost: remove {where}",
        )
    if not hmac.compare_digest(kept[MARK_BYTES:], key.mark(name + place)):
        raise InvalidInput(
            f"the store {where} was copied or restored: what is in it may have been used before",
            f"remove {where}: it is made anew, and only work is lost",
        )
