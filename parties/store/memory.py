"""A store in memory: nothing of it outlives the process."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from parties.store.entries import NAME_BYTES, Level, Taken, check_entry, goes, wrong_size
from secure.errors import StoreError


@dataclass(frozen=True)
class _InMemory:
    label: str
    head: bytes = field(repr=False)
    body: bytearray = field(repr=False)
    made: float

    @property
    def size(self) -> int:
        return len(self.head) + len(self.body)


class MemoryStore:
    """A ``Store`` in this process's memory."""

    def __init__(self) -> None:
        self.name = secrets.token_bytes(NAME_BYTES)
        self._lock = threading.Lock()
        self._held: dict[str, dict[bytes, _InMemory]] = {}

    def put(self, label: str, entry: bytes, head: bytes, size: int = 0, parts: Iterable[bytes] = ()) -> None:
        check_entry(label, entry, head, size)
        body = bytearray()
        for part in parts:
            body += part
            if len(body) > size:
                break
        if len(body) != size:
            raise wrong_size(len(body), size)
        with self._lock:
            held = self._held.setdefault(label, {})
            if entry in held:
                raise StoreError("an entry with this id is there: it was used before")
            held[entry] = _InMemory(label, head, body, time.time())

    def take(self, label: str, entry: bytes | None = None) -> Taken | None:
        with self._lock:
            held = self._held.get(label, {})
            entry = next(iter(held), None) if entry is None else entry  # dictionaries are in the order of putting
            found = None if entry is None else held.pop(entry, None)
        if entry is None or found is None:
            return None
        body = memoryview(found.body)
        return Taken(entry, found.head, len(body), lambda start, stop: body[start:stop])

    def level(self, label: str | None = None) -> Level:
        with self._lock:
            of = self._held.values() if label is None else [self._held.get(label, {})]
            found = [each for held in of for each in held.values()]
        return Level(len(found), sum(each.size for each in found))

    def sweep(self, keep: Collection[str] | None = None, drop: Collection[str] = (), before: float = 0.0) -> int:
        with self._lock:
            total = sum(map(len, self._held.values()))
            for label, held in list(self._held.items()):
                left = {id_: each for id_, each in held.items() if each.made >= before}
                if left and not goes(label, keep, drop):
                    self._held[label] = left
                else:
                    del self._held[label]
            return total - sum(map(len, self._held.values()))

    def close(self) -> None:
        with self._lock:
            self._held.clear()
