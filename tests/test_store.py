"""Stores of one-time entries: every implementation gives each entry once, whole or not at all."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from parties.store.database import MAXIMUM_BODY, DatabaseStore
from parties.store.entries import ENTRY_BYTES, MAXIMUM_HEAD, Level, Store, Taken, label_of
from parties.store.files import NAME_FILE, FileStore
from parties.store.keys import VARIABLE, StoreKey, read_store_key
from parties.store.memory import MemoryStore
from parties.store.sealed import CHUNK, open_sealed, seal, sealed_size
from secure.errors import InvalidInput, StoreError

KEY = StoreKey(bytes(range(32)))
LABELS = tuple(label_of("test", str(i)) for i in range(3))


def file_store(where: Path, key: StoreKey = KEY) -> FileStore:
    return FileStore(where / "files", key)


def database_store(where: Path, key: StoreKey = KEY) -> DatabaseStore:
    return DatabaseStore(where / "base" / "entries.sqlite", key)


ON_DISK: dict[str, Callable[..., Store]] = {"files": file_store, "database": database_store}
KINDS: dict[str, Callable[..., Store]] = {**ON_DISK, "memory": lambda where: MemoryStore()}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = KINDS[request.param](tmp_path)
    yield made
    made.close()


def fresh() -> bytes:
    return secrets.token_bytes(ENTRY_BYTES)


def whole(taken: Taken | None) -> tuple[bytes, bytes, bytes] | None:
    return None if taken is None else (taken.entry, taken.head, bytes(taken.read(0, taken.size)))


def test_an_entry_comes_out_once(store: Store) -> None:
    entry, body = fresh(), os.urandom(3 * CHUNK + 5)
    store.put(LABELS[0], entry, b"head", len(body), [body[:7], b"", body[7:]])
    assert store.level(LABELS[0]).entries == store.level().entries == 1
    assert store.level().size >= len(body)
    assert store.take(LABELS[1], entry) is None
    assert store.take(LABELS[1]) is None
    assert whole(store.take(LABELS[0], entry)) == (entry, b"head", body)
    assert store.take(LABELS[0], entry) is None
    assert store.take(LABELS[0]) is None
    assert store.level() == Level()


def test_the_oldest_comes_first(store: Store) -> None:
    entries = [fresh() for _ in range(5)]
    for number, entry in enumerate(entries):
        store.put(LABELS[0], entry, bytes([number]))
    for entry in entries:
        taken = store.take(LABELS[0])
        assert taken is not None
        assert taken.entry == entry


def test_parts_are_read_in_any_order(store: Store) -> None:
    body = os.urandom(2 * CHUNK + 77)
    store.put(LABELS[0], fresh(), b"", len(body), [body])
    taken = store.take(LABELS[0])
    assert taken is not None
    generator = secrets.SystemRandom()
    places = sorted(generator.sample(range(len(body)), 20))
    pairs = list(itertools.pairwise(places))
    generator.shuffle(pairs)
    for start, stop in [*pairs, (0, len(body)), (5, 5)]:
        found = taken.read(start, stop)
        assert bytes(found) == body[start:stop]
        assert not found.readonly


@pytest.mark.parametrize("size", [0, 3, 5])
def test_a_body_of_another_size_leaves_nothing(store: Store, size: int) -> None:
    with pytest.raises(StoreError, match=f"where {size} were announced"):
        store.put(LABELS[0], fresh(), b"", size, [b"ab", b"cd"])
    assert store.level() == Level()


def test_a_writer_that_fails_leaves_nothing(store: Store) -> None:
    def failing() -> Iterator[bytes]:
        yield b"ab"
        raise RuntimeError("the dealer is gone")

    entry = fresh()
    with pytest.raises(RuntimeError):
        store.put(LABELS[0], entry, b"", 2, failing())
    assert store.level() == Level()
    store.put(LABELS[0], entry, b"", 2, [b"cd"])
    assert whole(store.take(LABELS[0])) == (entry, b"", b"cd")


def test_an_id_is_not_replaced(store: Store) -> None:
    entry = fresh()
    store.put(LABELS[0], entry, b"first")
    with pytest.raises(StoreError, match="used before"):
        store.put(LABELS[0], entry, b"second")
    assert whole(store.take(LABELS[0])) == (entry, b"first", b"")


@pytest.mark.parametrize(
    "change", [{"entry": b"short"}, {"label": "x"}, {"head": bytes(MAXIMUM_HEAD + 1)}, {"size": -1}]
)
def test_impossible_entries(store: Store, change: dict[str, Any]) -> None:
    fields = {"label": LABELS[0], "entry": fresh(), "head": b"", "size": 0, **change}
    with pytest.raises(StoreError, match="an entry with an id"):
        store.put(**fields)
    assert store.level() == Level()


def test_a_sweep(store: Store) -> None:
    for label in LABELS:
        store.put(label, fresh(), b"")
    assert store.sweep(keep=LABELS[:2]) == 1
    assert [store.level(label).entries for label in LABELS] == [1, 1, 0]
    assert store.sweep() == 0
    assert store.sweep(keep=[]) == 2
    store.put(LABELS[0], fresh(), b"")
    assert store.sweep(before=1.0) == 0
    assert store.sweep(before=2.0**40) == 1


def test_a_sweep_reads_the_clock_of_put(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a store on a disk whose clock is another one would lose each entry at once."""
    store.put(LABELS[0], fresh(), b"")
    later = time.time() + 400 * 86400.0
    monkeypatch.setattr(time, "time", lambda: later)
    store.put(LABELS[0], kept := fresh(), b"")
    assert store.sweep(before=later - 86400.0) == 1
    assert whole(store.take(LABELS[0])) == (kept, b"", b"")


def test_the_oldest_comes_first_after_the_clock_was_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(database_store(tmp_path)) as store:
        store.put(LABELS[0], first := fresh(), b"")
        monkeypatch.setattr(time, "time", lambda: 1000.0)
        store.put(LABELS[0], second := fresh(), b"")
        assert [taken.entry for taken in iter(lambda: store.take(LABELS[0]), None)] == [first, second]


def test_many_threads_take_each_entry_once(store: Store) -> None:
    entries = {fresh() for _ in range(40)}
    for entry in entries:
        store.put(LABELS[0], entry, entry)
    taken = list[bytes]()

    def take() -> None:
        while (found := store.take(LABELS[0])) is not None:
            assert found.entry == found.head
            taken.append(found.entry)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 40
    assert set(taken) == entries


class Machine(RuleBasedStateMachine):
    """Any store against a dictionary."""

    kind = "memory"

    @initialize()
    def start(self) -> None:
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        os.chmod(self.directory.name, 0o700)
        self.where = Path(self.directory.name)
        self.store, self.held = KINDS[self.kind](self.where), dict[tuple[str, bytes], tuple[bytes, bytes]]()

    @rule(label=st.sampled_from(LABELS), head=st.binary(max_size=9), body=st.binary(max_size=99))
    def put(self, label: str, head: bytes, body: bytes) -> None:
        entry = fresh()
        self.store.put(label, entry, head, len(body), [body])
        self.held[label, entry] = head, body

    @rule(label=st.sampled_from(LABELS))
    def take(self, label: str) -> None:
        taken = whole(self.store.take(label))
        expected = next((key for key in self.held if key[0] == label), None)
        if expected is None:
            assert taken is None
        else:
            assert taken == (expected[1], *self.held.pop(expected))

    @rule(label=st.sampled_from(LABELS), data=st.data())
    def take_one(self, label: str, data: st.DataObject) -> None:
        if self.held:
            _, entry = data.draw(st.sampled_from(sorted(self.held)))
            taken, expected = whole(self.store.take(label, entry)), self.held.pop((label, entry), None)
            assert taken == (None if expected is None else (entry, *expected))

    @rule(keep=st.none() | st.sets(st.sampled_from(LABELS)))
    def sweep(self, keep: set[str] | None) -> None:
        left = {key: value for key, value in self.held.items() if keep is None or key[0] in keep}
        assert self.store.sweep(keep) == len(self.held) - len(left)
        self.held = left

    @rule()
    def again(self) -> None:
        """Another process opens it."""
        if self.kind in ON_DISK:
            name = self.store.name
            self.store.close()
            self.store = KINDS[self.kind](self.where)
            assert self.store.name == name

    @rule()
    def count(self) -> None:
        for label in LABELS:
            assert self.store.level(label).entries == sum(key[0] == label for key in self.held)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()


class FilesMachine(Machine):
    kind = "files"


class DatabaseMachine(Machine):
    kind = "database"


FEW = settings(max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck))
TestMemory, TestFiles, TestDatabase = Machine.TestCase, FilesMachine.TestCase, DatabaseMachine.TestCase
TestMemory.settings = TestFiles.settings = TestDatabase.settings = FEW


# on a disk


def sealed(
    body: bytes = b"body", entry: bytes = bytes(ENTRY_BYTES), head: bytes = b"head", label: str = LABELS[0]
) -> bytes:
    return b"".join(bytes(piece) for piece in seal(KEY, label, entry, head, len(body), [body]))


def opened(raw: bytes, entry: bytes = bytes(ENTRY_BYTES), label: str = LABELS[0], key: StoreKey = KEY) -> bytes:
    taken = open_sealed(key, label, entry, len(raw), lambda start, size: raw[start : start + size])
    return taken.head + bytes(taken.read(0, taken.size))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_sizes_of_the_format(size: int) -> None:
    body = os.urandom(size)
    raw = sealed(body)
    assert len(raw) == sealed_size(4, size)
    assert opened(raw) == b"head" + body
    assert sealed(body) != raw  # a fresh salt each time
    if size > 64:
        assert body[:64] not in raw


SAMPLE = sealed(os.urandom(2 * CHUNK + 9))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(SAMPLE) - 1) | st.integers(0, 140), st.integers(1, 255))
def test_an_altered_byte_is_refused(at: int, change: int) -> None:
    raw = bytearray(SAMPLE)
    raw[at] ^= change
    with pytest.raises(StoreError, match="is damaged, or not what was put there"):
        opened(bytes(raw))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(SAMPLE) - 1) | st.integers(0, 140), st.binary(max_size=40))
def test_a_cut_or_lengthened_file_is_refused(at: int, tail: bytes) -> None:
    for raw in (SAMPLE[:at], SAMPLE + b"x" + tail):
        with pytest.raises(StoreError, match="damaged"):
            opened(raw)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_no_other_file_is_read(raw: bytes) -> None:
    for start in (b"", SAMPLE[:8], SAMPLE[:104]):
        with pytest.raises(StoreError, match="damaged"):
            opened(start + raw)


def test_chunks_belong_to_their_place_and_file() -> None:
    one, two = sealed(os.urandom(3 * CHUNK)), sealed(os.urandom(3 * CHUNK))
    start, step = sealed_size(4, 0), CHUNK + 16
    for raw in (
        one[:start] + one[start + step : start + 2 * step] + one[start : start + step] + one[start + 2 * step :],
        one[:start] + two[start:],
        two[:start] + one[start:],
        one[: start + step] + two[start + step :],
        one[:start] + one[start : start + step] * 3,
    ):
        with pytest.raises(StoreError, match="damaged"):
            opened(raw)
    for other in ({"entry": fresh()}, {"label": LABELS[1]}, {"key": StoreKey(bytes(32))}):
        with pytest.raises(StoreError, match="damaged"):
            opened(one, **other)


def test_a_later_chunk_is_checked_when_it_is_read() -> None:
    body = os.urandom(3 * CHUNK)
    raw = bytearray(sealed(body))
    raw[-1] ^= 1
    taken = open_sealed(KEY, LABELS[0], bytes(16), len(raw), lambda start, size: bytes(raw[start : start + size]))
    assert bytes(taken.read(0, 2 * CHUNK)) == body[: 2 * CHUNK]
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            taken.read(3 * CHUNK - 1, 3 * CHUNK)


@pytest.mark.parametrize("kind", ON_DISK)
def test_a_store_stays_with_its_key_and_name(kind: str, tmp_path: Path) -> None:
    store = ON_DISK[kind](tmp_path)
    store.put(LABELS[0], bytes(16), b"secret" * 20)
    name = store.name
    store.close()
    with pytest.raises(InvalidInput, match="was made under another key"):
        ON_DISK[kind](tmp_path, StoreKey(bytes(32)))
    store = ON_DISK[kind](tmp_path)
    assert store.name == name
    assert whole(store.take(LABELS[0])) == (bytes(16), b"secret" * 20, b"")
    store.close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert b"secret" not in path.read_bytes()


def place_in(where: Path) -> str:
    (path,) = where.glob("*.place-*")
    return path.name


def copied(where: Path) -> None:
    """As a backup restores a directory: with all that a copy can keep."""
    kept = where.with_name("backup")
    shutil.copytree(where, kept, copy_function=shutil.copy2)
    shutil.rmtree(where)
    shutil.move(kept, where)


def copied_over(where: Path) -> None:
    """The same over what is there."""
    kept = where.with_name("backup")
    shutil.copytree(where, kept, copy_function=shutil.copy2)
    shutil.copytree(kept, where, copy_function=shutil.copy2, dirs_exist_ok=True)


RESTORED: dict[str, Callable[[Path], object]] = {
    "copied": copied,
    "copied over": copied_over,
    "without the file": lambda where: next(where.glob("*.place-*")).unlink(),
}


@pytest.mark.parametrize("how", RESTORED)
@pytest.mark.parametrize("kind", ON_DISK)
def test_a_store_that_is_restored_is_refused(kind: str, how: str, tmp_path: Path) -> None:
    """Its entries that were used since are there again."""
    for _ in range(2):  # one that goes on is none
        store = ON_DISK[kind](tmp_path)
        store.put(LABELS[0], fresh(), b"x")
        store.close()
    (directory,) = tmp_path.iterdir()
    RESTORED[how](directory)
    with pytest.raises(InvalidInput, match=r"was copied or restored: .*\nhint: remove .*: it is made anew"):
        ON_DISK[kind](tmp_path)
    shutil.rmtree(directory)
    ON_DISK[kind](tmp_path).close()


def written_over(backup: Path, where: Path) -> None:
    """As cp and rsync --inplace do it: each file keeps its number. What is empty looks unchanged."""
    for path in backup.iterdir():
        if path.stat().st_size:
            (where / path.name).write_bytes(path.read_bytes())
            shutil.copystat(path, where / path.name)


def replaced(backup: Path, where: Path) -> None:
    """As rsync does it: what seems unchanged stays, and what it writes replaces a file."""
    for path in backup.iterdir():
        shutil.copy2(path, where / "new")
        (where / "new").rename(where / path.name)


def by_sqlite(backup: Path, where: Path) -> None:
    for path in backup.glob("*.sqlite"):
        with closing(sqlite3.connect(path)) as kept, closing(sqlite3.connect(where / path.name)) as base:
            kept.backup(base)


SET_BACK = [(kind, how) for kind in ON_DISK for how in (written_over, replaced)] + [("database", by_sqlite)]


@pytest.mark.parametrize(("kind", "how"), SET_BACK)
def test_a_store_that_is_set_back_in_part_is_refused(
    kind: str, how: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """What was copied before the last opening does not come back, whichever of the files do."""
    home, backup = tmp_path / "home", tmp_path / "backup"
    store = ON_DISK[kind](home)
    store.put(LABELS[0], bytes(16), b"x")
    store.close()
    (where,) = home.iterdir()
    shutil.copytree(where, backup, copy_function=shutil.copy2)
    store = ON_DISK[kind](home)
    assert store.take(LABELS[0]) is not None
    store.close()
    how(backup, where)
    with pytest.raises(InvalidInput, match="was copied or restored"):
        ON_DISK[kind](home)


KILLED = """
import os, sys
from pathlib import Path
from parties.store.database import DatabaseStore
from parties.store.keys import StoreKey

store = DatabaseStore(Path(sys.argv[1]), StoreKey(bytes(range(32))))
assert store.take(sys.argv[2]) is not None
os._exit(0)
"""


def test_a_data_base_of_a_killed_process_that_is_set_back(tmp_path: Path) -> None:
    """Its log is still there, and sqlite writes what is in it over the file that was put back."""
    store, where, backup = database_store(tmp_path), tmp_path / "base", tmp_path / "backup"
    for number in range(2):
        store.put(LABELS[0], bytes([number]) * 16, b"x")
    store.close()
    shutil.copytree(where, backup, copy_function=shutil.copy2)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", KILLED, str(where / "entries.sqlite"), LABELS[0]]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert (where / "entries.sqlite-wal").stat().st_size
    written_over(backup, where)
    with pytest.raises(InvalidInput, match="was copied or restored"):
        database_store(tmp_path)


@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_crash_while_a_store_is_opened_costs_nothing(
    kind: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is killed beside the instant at which the record changes."""
    store = ON_DISK[kind](tmp_path)
    store.put(LABELS[0], bytes(16), b"x")
    store.close()
    real = type(store)._keep  # type: ignore[attr-defined]

    def crashing(self: Any, record: bytes) -> None:
        if not before:
            real(self, record)
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(type(store), "_keep", crashing)
            with pytest.raises(KeyboardInterrupt):
                ON_DISK[kind](tmp_path)
    store = ON_DISK[kind](tmp_path)
    assert place_in(next(tmp_path.iterdir()))  # and one alone: what was left is gone
    assert store.take(LABELS[0]) is not None
    store.close()


@pytest.mark.parametrize("kind", ON_DISK)
def test_processes_that_open_a_store_at_one_moment(kind: str, tmp_path: Path) -> None:
    first = ON_DISK[kind](tmp_path)
    with ThreadPoolExecutor(8) as threads:
        stores = list(threads.map(lambda _: ON_DISK[kind](tmp_path), range(24)))
    assert {store.name for store in stores} == {first.name}
    first.put(LABELS[0], bytes(16), b"x")
    assert [store.take(LABELS[0]) is not None for store in stores].count(True) == 1
    for store in (first, *stores):
        store.close()
    assert place_in(next(tmp_path.iterdir()))


def earlier_record(store: Store, where: Path, *places: bytes) -> None:
    """Write a store's record as earlier versions did, with marks of its key and of places."""
    marks = KEY.mark(store.name) + b"".join(KEY.mark(store.name + place) for place in places)
    if isinstance(store, FileStore):
        (where / NAME_FILE).write_bytes(store.name + marks)
    else:
        with closing(sqlite3.connect(where / "entries.sqlite")) as base, base:
            base.execute("UPDATE name SET mark = ?", (marks,))
    store.close()


@pytest.mark.parametrize("kind", ON_DISK)
def test_stores_of_earlier_versions(kind: str, tmp_path: Path) -> None:
    store = ON_DISK[kind](tmp_path)
    (where,) = tmp_path.iterdir()
    place = where / place_in(where)
    place = place.rename(where / "place")
    base = "" if kind == "files" else f"/{(where / 'entries.sqlite').stat().st_ino}"
    earlier_record(store, where, f"{place.stat().st_ino}/{place.stat().st_ctime_ns}{base}".encode())
    store = ON_DISK[kind](tmp_path)  # it goes on
    assert not place.exists()
    earlier_record(store, where)
    with pytest.raises(InvalidInput, match=r"was made by an earlier version\nhint: remove .*only work is lost"):
        ON_DISK[kind](tmp_path)


@pytest.mark.parametrize("kind", ON_DISK)
def test_a_store_that_others_may_enter(kind: str, tmp_path: Path) -> None:
    ON_DISK[kind](tmp_path).close()
    (directory,) = tmp_path.iterdir()
    directory.chmod(0o755)
    with pytest.raises(InvalidInput, match="others may enter"):
        ON_DISK[kind](tmp_path)


def test_damaged_and_foreign_files_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = file_store(tmp_path)
    for number in range(3):
        store.put(LABELS[0], bytes([number]) * 16, b"", 4, [b"good"])
    one, two, _ = sorted(store.directory.glob("*.entry"))
    raw = one.read_bytes()
    one.write_bytes(raw[:-1])
    two.write_bytes(raw)  # moved to another id
    os.utime(one, (1, 1))
    os.utime(two, (2, 2))
    assert whole(store.take(LABELS[0])) == (bytes([2]) * 16, b"", b"good")
    assert caplog.text.count("an entry was dropped: the entry") == 2
    assert store.level() == Level()
    (store.directory / one.name).symlink_to(tmp_path)
    with pytest.raises(StoreError, match="cannot be read"):
        store.take(LABELS[0], bytes(16))


def test_what_killed_writers_left_is_swept_and_living_ones_are_not(tmp_path: Path) -> None:
    store, other = file_store(tmp_path), file_store(tmp_path)
    (store.directory / ".part-dead").write_bytes(b"x")

    def parts() -> Iterator[bytes]:
        yield b"ab"
        assert other.sweep() == 0
        assert len(list(store.directory.glob(".part-*"))) == 1
        yield b"cd"

    store.put(LABELS[0], bytes(16), b"", 4, parts())
    assert sorted(p.name for p in store.directory.iterdir()) == sorted(
        [NAME_FILE, place_in(store.directory), f"{LABELS[0][:32]}-{'00' * 16}.entry"]
    )


def test_an_entry_is_burnt_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is on the disk without the entry before the file's first byte is read."""
    store, done = file_store(tmp_path), list[str]()
    store.put(LABELS[0], bytes(16), b"", 4, [b"body"])
    real = {name: getattr(os, name) for name in ("fsync", "pread")}
    for name, function in real.items():

        def noted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            done.append(name)
            assert not list(store.directory.glob("*.entry"))
            return function(*arguments)

        monkeypatch.setattr(os, name, noted)
    assert whole(store.take(LABELS[0])) is not None
    assert done[0] == "fsync"
    assert "pread" in done[1:]


def test_an_entry_that_cannot_be_burnt_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = file_store(tmp_path)
    store.put(LABELS[0], bytes(16), b"", 4, [b"body"])

    def failing(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StoreError, match="cannot be burnt: Input/output error"):
            store.take(LABELS[0], bytes(16))
    assert store.take(LABELS[0]) is None


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = file_store(tmp_path)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="No space left on device\nhint: make room"):
            store.put(LABELS[0], bytes(16), b"")
    assert {p.name for p in store.directory.iterdir()} == {NAME_FILE, place_in(store.directory)}


def test_large_bodies_are_not_for_a_data_base(tmp_path: Path) -> None:
    store = database_store(tmp_path)
    with pytest.raises(StoreError, match="at most in a data base"):
        store.put(LABELS[0], bytes(16), b"", MAXIMUM_BODY + 1, [])
    store.close()


# the key


def test_a_key_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, text = tmp_path / "store.key", bytes(range(32)).hex()
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(
        InvalidInput, match=f"a store needs a key\nhint: --store-key-file FILE, or the key itself in {VARIABLE}; make"
    ):
        read_store_key(None)
    with pytest.raises(InvalidInput, match=f"there is no file {path}\nhint: make one.*openssl rand -hex 32"):
        read_store_key(path)
    with pytest.raises(InvalidInput, match="the store's key is given where its file should be") as leak:
        read_store_key(tmp_path / text)
    assert text not in str(leak.value)
    path.write_text(f"{text}\n")
    path.chmod(0o644)
    with pytest.raises(InvalidInput, match="others may read"):
        read_store_key(path)
    path.chmod(0o600)
    monkeypatch.setenv(VARIABLE, text)
    header = b"header"
    assert read_store_key(path).of_entry(header) == read_store_key(None).of_entry(header) == KEY.of_entry(header)
    assert repr(read_store_key(path)) == "StoreKey(...)"
    for wrong in ("", text[:-1], text + "00", "x" * 64):
        path.write_text(wrong)
        with pytest.raises(InvalidInput, match="is no key of a store") as caught:
            read_store_key(path)
        assert not wrong or wrong not in str(caught.value)
    monkeypatch.setenv(VARIABLE, "x")
    with pytest.raises(InvalidInput, match=f"{VARIABLE} is no key of a store"):
        read_store_key(None)
