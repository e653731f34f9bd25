"""Processes that put and take entries of one store, each killed at a random instant, again and again.

    python -m tests.store_crash KIND DIRECTORY POINTS [PROCESSES]

Prints one line of JSON: what was put, used, lost and wrong, and how many takes were cut short. The ledger is a file to
which every process appends a line after each call has returned; SIGKILL does not lose what the system has taken. An
entry's body follows from its id, so that a wrong one is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from parties.store.database import DatabaseStore
from parties.store.entries import ENTRY_BYTES, Store, Taken, label_of
from parties.store.files import FileStore, OpenFile
from parties.store.keys import StoreKey
from parties.store.sealed import open_sealed

KEY, LABEL = StoreKey(bytes(range(32))), label_of("crash")
LONGEST = 0.1  # seconds that a process lives once its store is open
EARLY = 0.1  # the part of the points at which one is killed whenever it may be, also while it opens the store
FULL = 24  # entries from which on a process takes more than it puts
TALES = {"files": 600_000, "database": 20_000, "both": 200_000, "late": 20_000}  # bytes of the largest bodies


class Both:
    """The two halves of an entry, as server and dealer hold them: the dealer's is kept before the server's appears, and
    the server's is burnt before the dealer's. An entry is used once both are taken."""

    def __init__(self, directory: Path) -> None:
        self.server, self.dealer = files(directory), database(directory)

    def put(self, label: str, entry: bytes, head: bytes, size: int, parts: list[bytes]) -> None:
        def coming() -> Iterator[bytes]:
            yield from parts
            self.dealer.put(label, entry, head)

        self.server.put(label, entry, head, size, coming())

    def take(self, label: str) -> Taken | None:
        taken = self.server.take(label)
        if taken is not None and self.dealer.take(label, taken.entry) is None:
            raise AssertionError("the dealer does not know an entry that the server had")
        return taken


class Late(FileStore):
    """The fault that the check must find: an entry is burnt when the next one is taken."""

    used: Path | None = None

    def take(self, label: str, entry: bytes | None = None) -> Taken | None:
        if self.used is not None:
            self.used.unlink(missing_ok=True)
        for oldest in self._oldest(label)[:1]:
            self.used = next(self.directory.glob(f"*{oldest.hex()}*"))
            file = OpenFile(os.open(self.used, os.O_RDONLY))
            return open_sealed(self._key, label, oldest, self.used.stat().st_size, file.read_at)
        return None


def files(directory: Path) -> FileStore:
    return FileStore(directory / "files", KEY)


def database(directory: Path) -> DatabaseStore:
    return DatabaseStore(directory / "base" / "entries.sqlite", KEY)


def late(directory: Path) -> Late:
    return Late(directory / "files", KEY)


def opened(kind: str, directory: Path) -> Store | Both:
    kinds: dict[str, Callable[[Path], Store | Both]]
    kinds = {"files": files, "database": database, "both": Both, "late": late}
    return kinds[kind](directory)


def halves(store: Store | Both) -> list[Store]:
    return [store.server, store.dealer] if isinstance(store, Both) else [store]


def body_of(entry: bytes, most: int) -> bytes:
    size = int.from_bytes(entry[:4], "big") % most
    return hashlib.shake_128(entry).digest(size)


def whole(taken: Taken, most: int) -> bool:
    return taken.head == taken.entry and bytes(taken.read(0, taken.size)) == body_of(taken.entry, most)


def work(kind: str, directory: Path, ledger: int, ready: int) -> None:
    """Put and take until somebody kills this process. ready: a pipe that hears when the store is open."""
    generator, most = random.Random(secrets.randbits(64)), TALES[kind]
    store = opened(kind, directory)
    os.write(ready, b".")
    halves(store)[0].sweep()  # as at every start
    while True:
        level = halves(store)[0].level(LABEL).entries
        if generator.random() < (0.3 if level > FULL else 0.7):
            entry = secrets.token_bytes(ENTRY_BYTES)
            body = body_of(entry, most)
            store.put(LABEL, entry, entry, len(body), [body])
            os.write(ledger, b"put %s\n" % entry.hex().encode())
        else:
            os.write(ledger, b"taking one\n")
            taken = store.take(LABEL)
            if taken is None:
                os.write(ledger, b"none there\n")
            else:
                said = b"used" if whole(taken, most) else b"wrong"
                os.write(ledger, b"%s %s\n" % (said, taken.entry.hex().encode()))


def child(kind: str, directory: Path, ledger: int, ready: int) -> int:
    if (number := os.fork()) == 0:
        try:
            work(kind, directory, ledger, ready)
        except BaseException as error:
            os.write(ledger, f"failed {type(error).__name__}: {error}\n".replace("\n", " ").encode() + b"\n")
        finally:
            os._exit(1)
    return number


def crash(kind: str, directory: Path, points: int, processes: int = 1) -> dict[str, object]:
    generator, kills = random.Random(secrets.randbits(64)), 0
    ledger = os.open(directory / "ledger", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    for _ in range(points):
        heard, ready = os.pipe()
        begun = [(generator.uniform(0, LONGEST), child(kind, directory, ledger, ready)) for _ in range(processes)]
        if generator.random() > EARLY:
            os.read(heard, 1)
        start = time.perf_counter()
        for seconds, number in sorted(begun):
            time.sleep(max(0.0, start + seconds - time.perf_counter()))
            os.kill(number, signal.SIGKILL)
            kills += 1
        for _, number in begun:
            os.waitpid(number, 0)
        os.close(heard)
        os.close(ready)
    store, most = opened(kind, directory), TALES[kind]
    for half in halves(store):
        half.sweep()
    left, wrong = Counter[str](), 0
    while (taken := store.take(LABEL)) is not None:
        left[taken.entry.hex()] += 1
        wrong += not whole(taken, most)
    lines = [line.split(" ", 1) for line in (directory / "ledger").read_text().splitlines()]
    said = {kind: Counter(rest for word, rest in lines if word == kind) for kind in ("put", "used", "wrong", "failed")}
    used = said["used"] + left
    count = Counter(word for word, _ in lines)
    taking = count["taking"] - count["used"] - count["wrong"] - count["none"]
    parts = [path.name for path in directory.rglob(".part-*")]
    return {
        "kind": kind,
        "points": points,
        "kills": kills,
        "put": len(said["put"]),
        "used": len(said["used"]),
        "left": len(left),
        "twice": sum(count > 1 for count in used.values()),
        "lost": len(said["put"] - used),
        "taking": taking,
        "wrong": wrong + len(said["wrong"]),
        "failed": sorted(said["failed"]),
        "parts": parts,
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(crash(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))))
