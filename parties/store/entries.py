"""The interface of a store of one-time entries, behind which files, SQLite, memory or an object store stand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from secure.errors import StoreError

ENTRY_BYTES = 16  # of an entry's id
NAME_BYTES = 16  # of a store's name
MAXIMUM_HEAD = 1 << 10  # bytes of an entry's head


def label_of(*names: str | bytes) -> str:
    """Return a label, 64 hexadecimal digits: different names in order, each of any length, give different labels."""
    digest = hashlib.sha256()
    for name in names:
        raw = name.encode() if isinstance(name, str) else name
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()


@dataclass(frozen=True)
class Level:
    """The number of entries, and the bytes that they take where they are kept."""

    entries: int = 0
    size: int = 0


@dataclass(frozen=True)
class Taken:
    """An entry that is in no store any more. head: its small part.

    read: returns the bytes [start, stop) of its body, which has ``size`` bytes, as memory that may be written. It
    raises StoreError if they are not those that were put. Only one thread may read.
    """

    entry: bytes
    head: bytes = field(repr=False)
    size: int
    read: Callable[[int, int], memoryview] = field(repr=False)


class Store(Protocol):
    """A store of entries, each with an id of ENTRY_BYTES bytes, a label, a small head, and a body of any size.

    name: NAME_BYTES random bytes, which stay with the entries: two stores never have the same.

    Every implementation guarantees, also among processes that share it, and if they are killed at any instant:

    - ``take`` gives an entry out once. It is removed durably before any byte of it can be read, so that it does not
      come back after a power failure. A process that is killed loses the entries that it is putting or taking, and
      no others;
    - an entry is whole, or it is not there. What was cut, altered, moved to another id or label, or made under another
      key raises StoreError, or is dropped as if it had never been there; it is never read as something else;
    - where entries leave memory, they lie encrypted.

    None can know that its disk was set back to an earlier state (a restored backup, a snapshot): entries that were
    taken since are there again. Whoever keeps halves of entries in two places is safe as long as not both are set back
    to the same time.

    An object store fits if it has strong consistency and two conditional writes: create if absent (for ``put``), and
    delete if present, which tells the caller whether it was the one that deleted (for ``take``; the object is fetched
    into memory, then deleted, and dropped if somebody else was first). A time of modification serves ``sweep``.
    """

    @property
    def name(self) -> bytes: ...

    def put(self, label: str, entry: bytes, head: bytes, size: int = 0, parts: Iterable[bytes] = ()) -> None:
        """Keep an entry; it is durable, and can be taken, once this returns.

        parts: its body in order; all are taken from the iterator before the entry appears, so one that raises leaves
        nothing. Raises StoreError if they are not ``size`` bytes, if the id is there already, or if nothing can be
        written.
        """

    def take(self, label: str, entry: bytes | None = None) -> Taken | None:
        """Burn the entry with this id, or the oldest one with this label, and return it; None if there is none.

        Raises StoreError if it cannot be burnt durably; then it is lost.
        """

    def level(self, label: str | None = None) -> Level:
        """Return how much there is with a label, or in all."""

    def sweep(self, keep: Collection[str] | None = None, drop: Collection[str] = (), before: float = 0.0) -> int:
        """Remove entries, and what killed writers left; return how many entries were removed.

        keep: all labels but these go; None: those in ``drop``. before: entries that were put before a time, in seconds
        since 1970, go too.
        """

    def close(self) -> None:
        """Free what it holds open. Entries that were taken can still be read."""


def goes(label: str, keep: Collection[str] | None, drop: Collection[str]) -> bool:
    """Tell whether a sweep removes entries with a label."""
    return label in drop or (keep is not None and label not in keep)


def check_entry(label: str, entry: bytes, head: bytes, size: int) -> None:
    """Raise StoreError for an entry of an impossible form."""
    if len(entry) != ENTRY_BYTES or len(label) != 64 or len(head) > MAXIMUM_HEAD or not 0 <= size < 1 << 48:
        raise StoreError(
            f"an entry with an id of {len(entry)} bytes, a label of {len(label)}, a head of {len(head)}, "
            f"a body of {size}"
        )


def wrong_size(found: int, size: int) -> StoreError:
    """Return the error for a body whose parts are not ``size`` bytes together."""
    more = " or more" if found > size else ""
    return StoreError(f"an entry's body has {found}{more} bytes, where {size} were announced")
