"""A store of corrections at party 0, whose other halves lie at party 2."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import secure

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.proto import unseen_pb2 as pb
from parties.store import filler as filler_module
from parties.store.database import DatabaseStore
from parties.store.entries import Store
from parties.store.files import FileStore
from parties.store.keys import StoreKey
from parties.store.memory import MemoryStore
from parties.store.sealed import sealed_size
from parties.three_party import party_0 as party_0_module
from parties.three_party import party_2 as party_2_module
from parties.three_party.agreement import KeyOfCaller
from parties.three_party.conversations import WantedProgram
from parties.three_party.party_2 import Party2Service
from parties.three_party.shared_model import load_share
from secure.errors import Error
from secure.tasks.embed import Embed
from tests.three_parties import Three, running, shared
from tests.tiny import TEXT, expected, wait_until

KEY = StoreKey(bytes(range(32)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filler_module, "QUIET", 0.05)
    monkeypatch.setattr(filler_module, "FIRST_PAUSE", 0.05)


@pytest.fixture(scope="module", params=["one-hot", "client-table"])
def shares(request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(directory, tmp_path_factory.mktemp("shares"), request.param)


def room(shares: Path, entries: int) -> int:
    return entries * sealed_size(32, load_share(shares / "party-0").circuit.cost.dealt) + 1


def on_disk(where: Path) -> dict[int, Callable[[], Store]]:
    return {
        0: lambda: FileStore(where / "zero", KEY),
        2: lambda: DatabaseStore(where / "two" / "seeds.sqlite", KEY),
    }


def level(three: Three, party: int = 0) -> int:
    store: Store = three.parties[party].service._store  # type: ignore[attr-defined]
    return store.level().entries


def ask(three: Three, directory: Path) -> None:
    with three.dial() as session:
        (answer,) = session.embed([TEXT])
    assert float((answer - expected(directory, TEXT)).abs().max()) < 0.05


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The numbers that party 2 deals."""
    dealt, real = list[bytes](), Party2Service._supply

    def noted(self: Any, number: bytes, *about: Any) -> Iterator[Any]:
        dealt.append(number)
        return real(self, number, *about)

    monkeypatch.setattr(Party2Service, "_supply", noted)
    return dealt


@pytest.mark.parametrize("disk", [False, True])
def test_queries_from_a_store(
    disk: bool, shares: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = counted(monkeypatch)
    memory: dict[int, Callable[[], Store]] = {0: MemoryStore}
    with running(shares, stores=on_disk(tmp_path) if disk else memory, most=room(shares, 2)) as three:
        for _ in range(3):
            wait_until(lambda: level(three) == 2, "it is full")
            ask(three, directory)
        wait_until(lambda: level(three) == 2, "it is full again")
    assert len(dealt) == len(set(dealt)) == 5


def test_entries_outlive_all_three_parties(
    shares: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = counted(monkeypatch)
    stores = on_disk(tmp_path)
    with running(shares, stores=stores, most=room(shares, 2)) as three:
        wait_until(lambda: level(three) == 2, "it is full")
    with running(shares, stores=stores, most=room(shares, 2)) as three:
        three.parties[0].service._filler.close()  # type: ignore[attr-defined]
        ask(three, directory)
        three.parties[2].restart()
        three.meet()
        ask(three, directory)
        assert level(three) == 0
        assert len(dealt) == 2
        ask(three, directory)  # and one that is dealt as it was before
        assert len(dealt) == 3


def test_a_party_2_that_keeps_nothing(
    shares: Path, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is restarted, party 0 drops its halves with one line, and fills its store again."""
    caplog.set_level(logging.INFO)
    with running(shares, stores={0: on_disk(tmp_path)[0]}, most=room(shares, 2)) as three:
        wait_until(lambda: level(three) == 2, "it is full")
        store = three.parties[0].service._store  # type: ignore[attr-defined]
        before = {path.name for path in store.directory.glob("*.entry")}
        three.parties[2].restart()

        def said() -> bool:
            three.meet()
            return "the store dropped 2 queries that can be used no more" in caplog.text

        wait_until(said, "it says so")
        wait_until(lambda: level(three) == 2, "it is full again")
        assert not before & {path.name for path in store.directory.glob("*.entry")}
        ask(three, directory)


class Wrong(Party2Service):
    """A party 2 whose corrections, or whose store's name, come from somebody else."""

    how = ""

    def _supply(self, number: bytes, *about: Any) -> Iterator[Any]:
        found = super()._supply(number, *about)
        parts = [pb.SupplyPart.FromString(part) if isinstance(part, bytes) else part for part in found]
        if self.how == "altered":
            parts[1].data = bytes([parts[1].data[0] ^ 1]) + parts[1].data[1:]
        elif self.how == "cut":
            parts = parts[:-1]
        elif self.how == "no seed":
            parts = parts[1:]
        elif self.how == "two seeds":
            parts.insert(1, parts[0])
        elif self.how == "no tag":
            parts[-1].tag = bytes(16)
        elif self.how == "less":
            parts = [parts[0], *parts[2:]]
        yield from parts


@pytest.mark.parametrize("how", ["altered", "cut", "no seed", "two seeds", "no tag", "less"])
def test_what_did_not_come_whole_from_party_2_is_not_kept(
    how: str, shares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wrong, "how", how)
    with running(shares, {2: Wrong}, stores={0: MemoryStore}, most=room(shares, 1)) as three:
        wait_until(lambda: "the store is not filled at present" in caplog.text, "it says so")
        assert level(three) == 0


def test_a_damaged_entry_gives_no_answer_and_the_next_does(shares: Path, directory: Path, tmp_path: Path) -> None:
    with running(shares, stores=on_disk(tmp_path), most=room(shares, 1)) as three:
        wait_until(lambda: level(three) == 1, "it is full")
        store = three.parties[0].service._store  # type: ignore[attr-defined]
        three.parties[0].service._filler.close()  # type: ignore[attr-defined]
        (path,) = store.directory.glob("*.entry")
        with path.open("r+b") as file:
            file.seek(-20, 2)
            file.write(b"xxx")
        with three.dial() as session, pytest.raises(Error, match="is damaged"):
            session.embed([TEXT])
        ask(three, directory)


def test_a_store_is_named_with_a_proof(
    shares: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody on the path who names another store cannot have party 0 drop its halves."""
    real = KeyOfCaller.serve

    def lying(self: Any, *arguments: Any) -> Iterator[pb.AgreeMessage]:
        for message in real(self, *arguments):
            if message.done.store:
                message.done.store = bytes(16)
            yield message

    monkeypatch.setattr(KeyOfCaller, "serve", lying)
    with running(shares, stores={0: MemoryStore}, most=room(shares, 1)) as three:
        wait_until(lambda: "did not name its store" in caplog.text, "it says so")
        assert level(three) == 0


def test_numbers_are_burnt_at_party_2(shares: Path, directory: Path, tmp_path: Path) -> None:
    """A copy of party 0's store from before a query is of no use: party 1's seed was given."""
    with running(shares, stores=on_disk(tmp_path), most=room(shares, 1)) as three:
        wait_until(lambda: level(three) == 1, "it is full")
        three.parties[0].service._filler.close()  # type: ignore[attr-defined]
        store = three.parties[0].service._store  # type: ignore[attr-defined]
        (path,) = store.directory.glob("*.entry")
        raw = path.read_bytes()
        ask(three, directory)
        path.write_bytes(raw)
        path.chmod(0o600)
        with three.dial() as session, pytest.raises(Error, match=r"no such query was dealt|looked up before"):
            session.embed([TEXT])
        assert torch.is_tensor(expected(directory, TEXT))


def stocked(three: Three) -> list[Any]:
    """What party 0 keeps in memory."""
    return [each for stock in three.parties[0].service._stocks.values() for each in stock._kept]  # type: ignore[attr-defined]


@contextmanager
def forgetful(shares: Path, where: Path, ahead: int, *, stored: bool) -> Iterator[Three]:
    """Three parties, of which party 2 has lost its halves of all that was dealt ahead, as if its clock was set."""
    stores = on_disk(where)
    given = {"stores": stores, "most": room(shares, 3)} if stored else {"stores": {2: stores[2]}}
    with running(shares, ahead=ahead, **given) as three:
        if stored:
            wait_until(lambda: level(three) == 3, "it is full")
        wait_until(lambda: all(each._whole for each in stocked(three)) and len(stocked(three)) == ahead, "all came")
        assert level(three, 2) >= ahead + 3 * stored
        assert three.parties[2].service._store.sweep(before=2.0**40) >= ahead + 3 * stored  # type: ignore[attr-defined]
        yield three


@pytest.mark.parametrize(("ahead", "is_stored"), [(0, True), (1, True), (3, True), (3, False)])
def test_party_2_lost_its_halves_and_one_query_fails(
    ahead: int, is_stored: bool, shares: Path, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with forgetful(shares, tmp_path, ahead, stored=is_stored) as three:
        before = {path.name for path in tmp_path.rglob("*.entry")}
        with three.dial() as session:
            with pytest.raises(secure.NotDealt, match="no such query was dealt"):
                session.embed([TEXT])
            for _ in range(4):
                session.embed([TEXT])
        assert caplog.text.count("what was dealt ahead is dropped") == 1
        if is_stored:
            wait_until(lambda: level(three) == 3, "it is full again")
            assert not before & {path.name for path in tmp_path.rglob("*.entry")}
            three.parties[0].service._filler.close()  # type: ignore[attr-defined]
            ask(three, directory)
            assert level(three) == 2  # what is kept now is good


def test_many_texts_hear_nothing_of_it(shares: Path, directory: Path, tmp_path: Path) -> None:
    """A stream asks again, with other correlations."""
    with forgetful(shares, tmp_path, 2, stored=True) as three, three.dial() as session:
        answers = list(session.stream(Embed(), [TEXT, TEXT]))
    for answer in answers:
        assert isinstance(answer, torch.Tensor)
        assert float((answer - expected(directory, TEXT)).abs().max()) < 0.05


def test_party_0_drops_what_was_dealt_once_a_minute(
    shares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can make it believe that party 2 lost something has it drop no more than that."""
    with running(shares, ahead=1, stores=on_disk(tmp_path), most=room(shares, 1)) as three:
        service: Any = three.parties[0].service
        for _ in range(3):
            service.not_dealt()
        assert caplog.text.count("what was dealt ahead is dropped") == 1
        monkeypatch.setattr(party_0_module, "DROPPING", 0.0)
        service.not_dealt()
        assert caplog.text.count("what was dealt ahead is dropped") == 2


def test_seeds_of_one_program_push_out_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shares: Path) -> None:
    """Each Program has its own bound at party 2: what clients leave behind of one is no matter for the others."""
    with running(shares, stores={2: on_disk(tmp_path)[2]}) as three:
        service: Any = three.parties[2].service
        own = service._digests()
        store, number = service._store, bytes(16)
        monkeypatch.setattr(service, "_digests", lambda: [*own, "another"])
        store.put(service._label("seed", "another"), number, b"kept")
        monkeypatch.setattr(party_2_module, "MAXIMUM_SEEDS", 1)
        for _ in range(3):
            with three.parties[0].service._supplying(  # type: ignore[attr-defined]
                secrets.token_bytes(16), WantedProgram(own[0]), b""
            ) as (parts, _):
                list(parts)
        assert store.level(service._label("seed", own[0])).entries == 1
        assert service._taken("seed", number).head == b"kept"
