"""Queries that are dealt before a client comes, with server, dealer and client."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.limits import memory as memory_module
from parties.limits.memory import PreparedMemory
from parties.net.endpoints import Endpoint
from parties.net.network import Plaintext
from parties.proto import unseen_pb2 as pb
from parties.store import filler as filler_module
from parties.store.database import DatabaseStore
from parties.store.entries import ENTRY_BYTES, Store
from parties.store.files import FileStore
from parties.store.keys import StoreKey
from parties.store.memory import MemoryStore
from parties.store.sealed import sealed_size
from parties.two_party import assigned as assigned_module
from parties.two_party import stocked as stocked_module
from parties.two_party.client import TwoPartyLink
from parties.two_party.dealer import DealerService
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.keys import (
    SEALED_KEY,
    assign_proof,
    entry_proving_key,
    open_client_key,
    proving_key,
    seal_client_key,
    server_entry_key,
    stock_proof,
)
from parties.two_party.sealing import answer_proof
from parties.two_party.server import InferenceService
from parties.two_party.stocked import Stocked
from protocols.circuit import Correlations, ReadWhenUsed, deal, execute, prepare, split_corrections
from protocols.prg import Key, fresh_seed
from protocols.protocol import CLIENT, SERVER
from protocols.steps import run_pair
from protocols.weights import ClientWeights, DealerWeights
from secure.errors import Busy, DealerError, Error, PeerLost, ProtocolError, QuotaError, StoreError
from secure.session import session as session_module
from secure.tasks.embed import Embed
from tests.dealer_key import KEY
from tests.tiny import TEXT, Raw, Ready, Served, call, dealing, dial, serving, wait_until
from tests.uniformity import suspicious

STORE_KEY = StoreKey(bytes(range(32)))


def link_of(session: Any) -> TwoPartyLink:
    link = session._link
    assert isinstance(link, TwoPartyLink)
    return link


def entry_size(model: Ready) -> int:
    return sealed_size(32, model.program.cost.dealt)


@contextmanager
def stocking(
    model: Ready, dealer: Served, store: Store, entries: int = 3, *, still: bool = False, **options: Any
) -> Iterator[Served]:
    """A server with a store of so many entries, once it is full. still: no more are made then."""
    peer = DealerPeer(dealer.address, Plaintext(), KEY.public.text)
    stocked = Stocked(store, entries * entry_size(model) + 1, peer)
    with serving(model, dealer.address, stocked=stocked, **options) as served:
        try:
            wait_until(lambda: store.level().entries == entries, "the store is full")
            if still:
                stocked._filler.close()
            yield served
        finally:
            peer.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses of the filler."""
    monkeypatch.setattr(filler_module, "QUIET", 0.05)
    monkeypatch.setattr(filler_module, "FIRST_PAUSE", 0.05)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the dealer's methods that give correlations, as they are called."""
    called = list[str]()
    for name in ("_deal", "_stock", "_assign"):
        real = getattr(DealerService, name)

        def noted(self: Any, *arguments: Any, name: str = name, real: Any = real) -> Any:
            called.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(DealerService, name, noted)
    return called


@pytest.fixture(params=["files", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "store", STORE_KEY)


def answer(session: Any) -> torch.Tensor:
    found: torch.Tensor = session.embed([TEXT])[0]
    return found


def test_queries_from_a_store(
    quick: None, model: Ready, dealer: Served, server: Served, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dial(server, dealer) as session:
        expected = answer(session)
    called = counted(monkeypatch)
    with stocking(model, dealer, store) as stocked, dial(stocked, dealer) as session:
        assert link_of(session)._stored
        assert called == ["_stock"] * 3
        for _ in range(5):
            assert torch.allclose(answer(session), expected, atol=1e-2)
            wait_until(lambda: store.level().entries == 3, "it is full again")
        assert called.count("_assign") == 5
        assert "_deal" not in called


def test_without_an_entry_a_query_is_dealt(
    quick: None, model: Ready, dealer: Served, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = counted(monkeypatch)
    with stocking(model, dealer, store, entries=1, still=True) as served, dial(served, dealer) as session:
        for _ in range(3):
            assert answer(session).isfinite().all()
    assert called.count("_assign") == 1
    assert called.count("_deal") == 2


def test_prepared_and_beside(quick: None, model: Ready, dealer: Served, store: Store) -> None:
    """Two queries prepared ahead, and lists whose next query is prepared while another runs."""
    with stocking(model, dealer, store) as served, dial(served, dealer) as session:
        session.prepare()
        session.prepare()
        assert answer(session).isfinite().all()
        assert answer(session).isfinite().all()
        found = list(session.stream(Embed(), iter([TEXT] * 4)))
        assert all(isinstance(each, torch.Tensor) and each.isfinite().all() for each in found)


def test_a_restarted_dealer_without_a_directory(
    quick: None, model: Ready, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its halves are lost: the server drops its own with one line, and goes on."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("parties.two_party.server.RENEWING", 0.1)
    with dealing() as first, stocking(model, first, store) as served:
        before = set(_ids(store))
        first.stop()
        with dealing(listen=first.endpoint):
            wait_until(lambda: "the store dropped 3 queries that can be used no more" in caplog.text, "it says so")
            wait_until(lambda: store.level().entries == 3 and not before & _ids(store), "it is full again")
            with call(served.address, first.address, deadline=20.0) as session:
                assert answer(session).isfinite().all()


def _ids(store: Store) -> set[str]:
    if isinstance(store, FileStore):
        return {path.name for path in store.directory.glob("*.entry")}
    assert isinstance(store, MemoryStore)
    return {id_.hex() for held in store._held.values() for id_ in held}


def test_a_restarted_dealer_with_a_directory(
    quick: None, model: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides are restarted, and every entry is still good, once."""
    called = counted(monkeypatch)

    def service() -> DealerService:
        return DealerService(KEY, store=DatabaseStore(tmp_path / "dealer" / "entries.sqlite", STORE_KEY))

    with dealing(service()) as dealer:
        with stocking(model, dealer, FileStore(tmp_path / "store", STORE_KEY), still=True):
            pass
        dealer.service.close()
    with dealing(service()) as dealer:
        with (
            stocking(model, dealer, FileStore(tmp_path / "store", STORE_KEY), still=True) as served,
            dial(served, dealer) as one,
        ):
            assert answer(one).isfinite().all()
            assert answer(one).isfinite().all()
        dealer.service.close()
    assert called == ["_stock"] * 3 + ["_assign"] * 2


def test_an_entry_that_the_dealer_forgot_is_dropped(
    quick: None, model: Ready, dealer: Served, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = counted(monkeypatch)
    with stocking(model, dealer, store, entries=2, still=True) as served, dial(served, dealer) as session:
        dealer.service.entries._store.sweep(keep=[])
        assert answer(session).isfinite().all()
    assert called.count("_deal") == 1


def test_a_dealer_whose_store_fails_deals(
    quick: None, model: Ready, dealer: Served, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries once failed for as long as its disk was full."""

    def full(label: str, entry: bytes | None = None) -> Any:
        raise StoreError("the store cannot be used: database or disk is full")

    called = counted(monkeypatch)
    with stocking(model, dealer, store, entries=2, still=True) as served, dial(served, dealer) as session:
        monkeypatch.setattr(dealer.service.entries._store, "take", full)
        assert answer(session).isfinite().all()
    assert called.count("_deal") == 1


@pytest.mark.parametrize(("at", "failing"), [(60, False), (110, False), (-5, True)])
@pytest.mark.parametrize("memory", [0, 1 << 40])
def test_a_damaged_entry(
    quick: None,
    model: Ready,
    dealer: Served,
    tmp_path: Path,
    at: int,
    failing: bool,
    memory: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If its header or head is damaged, another one is taken; if that shows later, the query fails, and says why."""
    monkeypatch.setattr(stocked_module, "IN_MEMORY", memory)
    monkeypatch.setattr(memory_module, "RESERVE", 1)  # there is no memory to spare
    store = FileStore(tmp_path / "store", STORE_KEY)
    with stocking(model, dealer, store, still=True) as served:
        for path in store.directory.glob("*.entry"):
            raw = bytearray(path.read_bytes())
            raw[at] ^= 1
            path.write_bytes(raw)
        for _ in range(store.level().entries if failing else 0):
            with dial(served, dealer) as session, pytest.raises(StoreError, match="is damaged"):
                session.embed([TEXT])
        with dial(served, dealer) as session:
            assert answer(session).isfinite().all()


@pytest.mark.parametrize("memory", [0, 1 << 40])
def test_corrections_may_lie_on_a_disk(
    quick: None, model: Ready, dealer: Served, tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an entry, and from the dealer, beyond a threshold: the answers are those of memory."""
    monkeypatch.setattr(stocked_module, "IN_MEMORY", memory)
    monkeypatch.setattr(memory_module, "RESERVE", 1)  # there is no memory to spare
    store = FileStore(tmp_path / "store", STORE_KEY)
    with stocking(model, dealer, store, entries=1, still=True) as served, dial(served, dealer) as session:
        assert torch.allclose(answer(session), answer(session), atol=1e-2)


# the filler


def test_a_budget_is_kept_and_divided(quick: None, model: Ready, dealer: Served, tmp_path: Path) -> None:
    store, made = MemoryStore(), list[str]()

    def make(label: str) -> Callable[[], None]:
        def one() -> None:
            made.append(label)
            store.put(label, fresh_seed()[:16], b"", 100, [bytes(100)])

        return one

    filler = filler_module.Filler(store, 1000, logging.getLogger("test"))
    one, two = "0" * 64, "1" * 64
    filler.serve(filler_module.Shelf("one", one, 100, make(one)))
    wait_until(lambda: store.level(one).entries == 10, "all of it")
    filler.serve(filler_module.Shelf("two", two, 100, make(two)))
    for _ in range(5):
        store.take(one)
    filler.wake()
    wait_until(lambda: (store.level(one).entries, store.level(two).entries) == (5, 5), "half each")
    filler.drop("one")
    wait_until(lambda: (store.level(one).entries, store.level(two).entries) == (0, 10), "its part is free")
    filler.close()
    assert store.level().size <= 1000


def test_it_waits_for_queries_unless_it_is_nearly_empty(quick: None) -> None:
    store, label = MemoryStore(), "0" * 64
    filler = filler_module.Filler(store, 2000, logging.getLogger("test"))
    with filler.paused():
        filler.serve(
            filler_module.Shelf("one", label, 100, lambda: store.put(label, fresh_seed()[:16], b"", 100, [bytes(100)]))
        )
        wait_until(lambda: store.level().entries == 2, "a tenth")
        threading.Event().wait(0.2)
        assert store.level().entries == 2
    wait_until(lambda: store.level().entries == 20, "the rest")
    filler.close()


def test_it_says_its_level_and_why_it_fails(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store, label, fail = MemoryStore(), "0" * 64, threading.Event()
    tried = list[int]()
    fail.set()

    def make() -> None:
        tried.append(1)
        if fail.is_set():
            raise DealerError("the dealer is away")
        store.put(label, fresh_seed()[:16], b"", 100, [bytes(100)])

    filler = filler_module.Filler(store, 2000, logging.getLogger("test"))
    filler.serve(filler_module.Shelf("program 1", label, 100, make))
    wait_until(lambda: len(tried) > 2, "it tries again")
    fail.clear()
    wait_until(lambda: store.level().entries == 20, "it is full")
    wait_until(lambda: "the store has 20 queries left of 20 (program 1, " in caplog.text, "it says so")
    assert caplog.text.count("the store is not filled at present: the dealer is away") == 1
    assert caplog.text.count("queries left of 20") == 11
    filler.close()
    filler = filler_module.Filler(store, 20, logging.getLogger("test"))
    filler.serve(filler_module.Shelf("program 2", "1" * 64, 100, make))
    wait_until(lambda: "the store has no room for a query of program 2" in caplog.text, "nor does it fit")
    filler.close()


def test_what_nobody_serves_makes_room(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first it may belong to a Program that is loaded later; the budget holds all the same."""
    store, label = MemoryStore(), "0" * 64
    for _ in range(8):
        store.put("1" * 64, fresh_seed()[:16], b"", 100, [bytes(100)])
    filler = filler_module.Filler(store, 1000, logging.getLogger("test"))
    filler.serve(
        filler_module.Shelf("one", label, 100, lambda: store.put(label, fresh_seed()[:16], b"", 100, [bytes(100)]))
    )
    wait_until(lambda: store.level().entries == 10, "what is left of the budget")
    assert store.level(label).entries == 2
    monkeypatch.setattr(filler_module, "SETTLED", 0.0)
    filler.wake()
    wait_until(lambda: store.level(label).entries == 10, "all of it")
    assert store.level().entries == 10
    filler.close()


def test_nothing_is_swept_before_a_program_is_served(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Party 0, or a server whose dealer is slow, may serve its Program long after it started."""
    monkeypatch.setattr(filler_module, "SETTLED", 0.0)
    monkeypatch.setattr(filler_module, "LOOKING", 0.01)
    store = MemoryStore()
    store.put("1" * 64, fresh_seed()[:16], b"", 100, [bytes(100)])
    filler = filler_module.Filler(store, 1000, logging.getLogger("test"))
    time.sleep(0.3)
    assert store.level().entries == 1
    filler.serve(filler_module.Shelf("one", "0" * 64, 2000, lambda: None))
    wait_until(lambda: store.level().entries == 0, "what nobody serves is gone")
    filler.close()


def test_a_smaller_budget_trims_the_store(quick: None) -> None:
    store, label = MemoryStore(), "0" * 64
    for _ in range(8):
        store.put(label, fresh_seed()[:16], b"", 100, [bytes(100)])
    filler = filler_module.Filler(store, 350, logging.getLogger("test"))
    filler.serve(filler_module.Shelf("one", label, 100, lambda: None))
    wait_until(lambda: store.level(label).entries == 3, "what the budget holds")
    filler.close()


def test_large_corrections_take_a_budget_of_disk(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give it back; without room the client is told to come back."""
    monkeypatch.setattr(stocked_module, "IN_MEMORY", 100)
    monkeypatch.setattr(memory_module, "RESERVE", 1)  # there is no memory to spare
    monkeypatch.setattr(session_module, "BUSY", 0.2)
    monkeypatch.setattr(memory_module, "WAIT", 0.0)
    size = model.program.cost.dealt
    with (
        serving(model, dealer.address, disk=PreparedMemory(size, *memory_module.DISK)) as served,
        dial(served, dealer) as first,
        dial(served, dealer) as second,
    ):
        first.prepare()
        assert served.service.disk.used == size
        with pytest.raises(Busy, match="no room for temporary files for another query"):
            second.prepare()
        assert served.service.memory.used == stocked_module.memory_of(model.program)  # the first one's alone
        answer(first)
        wait_until(lambda: served.service.disk.used == 0, "it is given back")
        answer(second)


def test_large_corrections_lie_in_memory_where_there_is_room(
    quick: None, model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that finds no room beyond the reserve has its corrections on the disk, and the same answer."""
    monkeypatch.setattr(stocked_module, "IN_MEMORY", 100)
    size = model.program.cost.dealt
    memory, disk = PreparedMemory(size * 3 // 2), PreparedMemory(size, *memory_module.DISK)
    with (
        serving(model, dealer.address, memory=memory, disk=disk) as served,
        dial(served, dealer) as first,
        dial(served, dealer) as second,
    ):
        first.prepare()
        assert (served.service.memory.used, served.service.disk.used) == (size, 0)
        second.prepare()
        assert (served.service.memory.used, disk.used) == (size + stocked_module.memory_of(model.program), size)
        assert torch.allclose(answer(first), answer(second), atol=1e-2)
        wait_until(lambda: not memory.used and not disk.used, "all is given back")


def test_who_is_beyond_a_quota_burns_no_entry(quick: None, model: Ready) -> None:
    used = list[int]()

    def spend(caller: Any, what: str, amount: int) -> None:
        if refusing:
            raise QuotaError("preparations are used up", "tomorrow")
        used.append(amount)

    refusing, store = False, MemoryStore()
    with dealing(DealerService(KEY, spend=spend)) as dealer, stocking(model, dealer, store, still=True) as served:
        with dial(served, dealer) as session:
            answer(session)
        assert sum(used) == 1
        theirs = dealer.service.entries._store
        held, refusing = theirs.level().entries, True
        with dial(served, dealer) as session, pytest.raises(Error, match="preparations are used up"):
            answer(session)
        assert theirs.level().entries == held > 0
        refusing = False
        theirs.sweep(set(), set(), 0)  # what the dealer does not know is dealt, and counts once
        with dial(served, dealer) as session:
            answer(session)
        assert sum(used) == 2


def test_one_model_that_cannot_be_renewed_stops_no_other(model: Ready, dealer: Served) -> None:
    class Failing(DealerPeer):
        failing = False

        def renew(self, program: Any, mask_seed: bytes) -> bool:
            asked.append(program)
            if self.failing and len(asked) == 1:
                raise DealerError("its table is full")
            return super().renew(program, mask_seed)

    asked = list[Any]()
    peer = Failing(dealer.address, Plaintext(), KEY.public.text)
    service = InferenceService([model.masked], peer)
    service._registered["x", "y"] = model.masked
    peer.failing, asked[:] = True, []
    with pytest.raises(DealerError, match="its table is full"):
        service.renew()
    assert len(asked) == 2
    service.close()


# hostile messages


def stock_request(model: Ready, seed: bytes, **other: Any) -> pb.StockRequest:
    names = model.program.digest, model.weights_digest
    fields = {
        "program_digest": names[0],
        "weights_digest": names[1],
        "sealed": KEY.public.seal(seed, "stock", *names),
        "proof": stock_proof(model.masked.mask_seed, *names, seed),
    }
    return pb.StockRequest(**{**fields, **other})


def stock(raw: Raw, request: pb.StockRequest) -> tuple[bytes, bytes]:
    """An entry's id and its corrections."""
    first, *parts, last = raw.dealer.Stock(request)
    assert last.WhichOneof("content") == "done"
    return first.start.entry, b"".join(part.data for part in parts)


def assign_request(raw: Raw, seed: bytes, entry: bytes, query: int, /, **other: Any) -> pb.AssignRequest:
    about = raw.token, query, entry
    fields = {
        "session": raw.token,
        "query": query,
        "entry": entry,
        "proof": assign_proof(proving_key(bytes(32)), *about),
        "entry_proof": assign_proof(entry_proving_key(seed, entry), *about),
    }
    return pb.AssignRequest(**{**fields, **other})


def test_only_the_models_server_gets_entries(server: Served, dealer: Served, model: Ready) -> None:
    seed = fresh_seed()
    names = model.program.digest, model.weights_digest
    with Raw(server, dealer, model) as raw:
        for other, message in (
            ({"proof": stock_proof(bytes(32), *names, seed)}, "only the server of this model"),
            ({"proof": b""}, "only the server of this model"),
            ({"sealed": KEY.public.seal(seed, "join", *names)}, "cannot open the seal"),
            ({"sealed": b""}, "cannot open the seal"),
            ({"program_digest": "0" * 64}, "does not know this model"),
            ({"weights_digest": ""}, "does not know this model"),
        ):
            with pytest.raises(grpc.RpcError, match=message):
                stock(raw, stock_request(model, seed, **other))


def test_an_entry_and_a_number_are_given_once(server: Served, dealer: Served, model: Ready) -> None:
    seed = fresh_seed()
    with Raw(server, dealer, model) as raw:
        entry, _ = stock(raw, stock_request(model, seed))
        with pytest.raises(grpc.RpcError, match="was not joined"):
            raw.dealer.Assign(assign_request(raw, seed, entry, 0))
        raw.dealer.Join(raw.join(model.masked.mask_seed))
        for other in ({"proof": b""}, {"query": 1}, {"entry": bytes(16)}):
            with pytest.raises(grpc.RpcError, match="only the server that joined the session"):
                raw.dealer.Assign(assign_request(raw, seed, entry, 0, **other))
        for unknown in (b"", bytes(15), bytes(16), bytes(1 << 15)):
            assert raw.dealer.Assign(assign_request(raw, seed, unknown, 0)) == pb.AssignReply()
        sealed = raw.dealer.Assign(assign_request(raw, seed, entry, 0)).sealed  # nothing was burnt before
        assert len(sealed) == SEALED_KEY
        assert raw.dealer.Assign(assign_request(raw, seed, entry, 1)) == pb.AssignReply()
        second, _ = stock(raw, stock_request(model, seed))
        with pytest.raises(grpc.RpcError, match="query 0 was already used"):
            raw.dealer.Assign(assign_request(raw, seed, second, 0))
        with pytest.raises(grpc.RpcError, match="query 0 was already used"):
            raw.deal(bytes(32), 0)
        assert raw.dealer.Assign(assign_request(raw, seed, second, 1)) == pb.AssignReply()  # burnt by the attempt
        raw.deal(bytes(32), 1)
        third, _ = stock(raw, stock_request(model, seed))
        with pytest.raises(grpc.RpcError, match="query 1 was already used"):
            raw.dealer.Assign(assign_request(raw, seed, third, 1))
        fourth, _ = stock(raw, stock_request(model, seed))
        with pytest.raises(grpc.RpcError, match="only the server that got an entry"):
            raw.dealer.Assign(assign_request(raw, fresh_seed(), fourth, 2))


def test_an_entry_belongs_to_its_model(server: Served, dealer: Served, model: Ready) -> None:
    from tests.tiny import register_request

    seed, other = fresh_seed(), bytes(range(32))
    with Raw(server, dealer, model) as raw:
        name = raw.dealer.Register(register_request(raw.program.encoded, other)).weights_digest
        names = raw.program.digest, name
        request = stock_request(
            model,
            seed,
            weights_digest=name,
            sealed=KEY.public.seal(seed, "stock", *names),
            proof=stock_proof(other, *names, seed),
        )
        entry, _ = stock(raw, request)
        raw.dealer.Join(raw.join(model.masked.mask_seed))
        assert raw.dealer.Assign(assign_request(raw, seed, entry, 0)) == pb.AssignReply()


def test_only_the_client_opens_its_key(server: Served, dealer: Served, model: Ready) -> None:
    """The key opens for its query, session and entry alone, and fits the corrections."""
    seed, names = fresh_seed(), (model.program.digest, model.weights_digest)
    with Raw(server, dealer, model) as raw:
        entry, corrections = stock(raw, stock_request(model, seed))
        raw.dealer.Join(raw.join(model.masked.mask_seed))
        sealed = raw.dealer.Assign(assign_request(raw, seed, entry, 3)).sealed
        key = raw.keys.key(3)
        client = open_client_key(key, sealed, raw.token, 3, entry, *names)
        mask = dealer.service._models[names].dealt.weights
        keys = server_entry_key(seed, *names, entry), client
        again = deal(model.program.circuit, *keys, mask)
        assert b"".join(bytes(piece) for _, piece in again) == corrections
        wrong: list[tuple[Key, bytes, tuple[Any, ...]]] = [
            (raw.keys.key(4), sealed, (raw.token, 3, entry, *names)),
            (key, sealed, (raw.token, 4, entry, *names)),
            (key, sealed, (bytes(16), 3, entry, *names)),
            (key, sealed, (raw.token, 3, bytes(16), *names)),
            (key, sealed[:-1], (raw.token, 3, entry, *names)),
            (key, sealed + b"x", (raw.token, 3, entry, *names)),
            (key, b"", (raw.token, 3, entry, *names)),
            (key, bytes([sealed[0] ^ 1]) + sealed[1:], (raw.token, 3, entry, *names)),
        ]
        for other_key, payload, about in wrong:
            with pytest.raises(ProtocolError, match="is not what the dealer made for this query"):
                open_client_key(other_key, payload, *about)


def test_what_crosses_is_uniform() -> None:
    """A sealed key, and the corrections of one secret under fresh keys of the client, whoever knows the server's."""
    sealed = b"".join(seal_client_key(Key(fresh_seed()[:16]), Key(bytes(16)), "s", 0) for _ in range(4000))
    assert suspicious(torch.from_numpy(np.frombuffer(sealed, np.uint8).copy()), 8) is None


def test_corrections_of_an_entry_are_uniform_to_the_server(server: Served, dealer: Served, model: Ready) -> None:
    """The same seed of the server and the same model, twice: nothing of one entry is in another."""
    seed = fresh_seed()
    with Raw(server, dealer, model) as raw:
        (one, first), (two, second) = (stock(raw, stock_request(model, seed)) for _ in range(2))
    assert one != two
    a, b = (np.frombuffer(each, np.uint8) for each in (first, second))
    assert abs(int((a == b).sum()) - len(a) / 256) < 8 * (len(a) / 256) ** 0.5 + len(a) * 0.02  # padding bits are zeros


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"query": 7}, "assigned query 7 where 0 was asked for"),
        ({"entry": bytes(16)}, "is not what the dealer made"),
        ({"sealed": b""}, "is not what the dealer made"),
        ({"sealed": bytes(1 << 16)}, "is not what the dealer made"),
    ],
)
def test_a_server_that_says_something_else(
    quick: None, model: Ready, dealer: Served, said: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Stocked.assign

    def lying(self: Any, *arguments: Any) -> Any:
        found = real(self, *arguments)
        assert found is not None
        fields = {"query": found.said.query, "entry": found.said.entry, "sealed": found.said.sealed, **said}
        return stocked_module.Assignment(pb.Assigned(**fields), found.taken)

    monkeypatch.setattr(Stocked, "assign", lying)
    with stocking(model, dealer, MemoryStore(), entries=1) as served, dial(served, dealer) as session:
        with pytest.raises(ProtocolError, match=message):
            session.prepare()
        with pytest.raises(PeerLost, match="has ended"):
            session.prepare()


def test_a_server_without_a_store_assigns_nothing(
    model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parties.two_party import server as server_module

    real = server_module._Session._prepare

    def lying(self: Any, query: int, *about: Any, **options: Any) -> Iterator[pb.ServerMessage]:
        yield pb.ServerMessage(assigned=pb.Assigned(query=query))
        yield from real(self, query, *about, **options)

    monkeypatch.setattr(server_module._Session, "_prepare", lying)
    wrong = pytest.raises(ProtocolError, match="'assigned' where 'prepared' was expected")
    with serving(model, dealer.address) as served, dial(served, dealer) as session, wrong:
        session.prepare()


class Stingy(DealerService):
    """A dealer that stops, sends more, or does not prove who it is."""

    how = ""

    def _stock(self, request: pb.StockRequest) -> Iterator[Any]:
        parts: list[Any] = list(super()._stock(request))
        if self.how == "stops":
            parts = parts[:-1]
        elif self.how == "less":
            parts = [parts[0], *parts[2:]]
        elif self.how == "more":
            parts.insert(1, pb.StockPart(data=b"more"))
        elif self.how == "starts again":
            parts.insert(1, parts[0])
        elif self.how == "proves nothing":
            parts[0].start.proof = bytes(32)
        elif self.how == "short id":
            seed = self._key.open(request.sealed, "stock", request.program_digest, request.weights_digest)
            parts[0].start.entry = b"short"
            parts[0].start.proof = answer_proof(seed, request.sealed, b"short")
        else:
            parts = []
        yield from parts


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("stops", "stopped in the middle of an entry"),
        ("less", "an entry's body has"),
        ("more", "an entry's body has .* or more bytes"),
        ("starts again", "sent 'start' in the middle"),
        ("proves nothing", "did not prove that it could open"),
        ("short id", "an entry with an id of 5 bytes"),
        ("nothing", "did not prove that it could open"),
    ],
)
def test_a_dealer_that_sends_something_else(how: str, message: str, model: Ready) -> None:
    service = Stingy(KEY)
    service.how = how
    with dealing(service) as dealer:
        peer = DealerPeer(Endpoint.parse(dealer.address, what="x"), Plaintext(), KEY.public.text)
        peer.register(model.program, model.masked.mask_seed)
        store = MemoryStore()
        stocked = Stocked(store, 0, peer)
        stocked.serve(model.masked, bytes(16))
        (shelf,) = stocked._filler._shelves.values()
        with pytest.raises((DealerError, StoreError), match=message):
            shelf.make()
        assert store.level().entries == 0
        stocked.close()
        peer.close()


def test_the_dealers_entries_are_bounded(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigned_module, "MODEL_ENTRIES", 3)
    store = MemoryStore()
    keys = assigned_module.ClientKeys(store, 5)
    one, two, three = ("a", "x"), ("b", "x"), ("c", "x")
    ids = [bytes([number]) * ENTRY_BYTES for number in range(9)]
    for number in range(4):
        keys.keep(one, ids[number], Key(ids[number]), ids[number], [one])
    assert keys.take(one, ids[0]) is None  # the oldest made room
    for number in range(4, 6):
        keys.keep(two, ids[number], Key(ids[number]), ids[number], [one, two])
    keys.keep(three, ids[6], Key(ids[6]), ids[6], [two, three])  # those that nobody serves made room
    assert keys.take(one, ids[3]) is None
    assert keys.take(two, ids[4]) == (Key(ids[4]), ids[4])
    assert keys.take(two, ids[6]) is None
    assert keys.take(three, ids[6]) == (Key(ids[6]), ids[6])
    assert store.level().entries == 1
    monkeypatch.setattr(assigned_module, "KEPT", -1.0)
    keys.sweep()
    assert store.level().entries == 0


# corrections that are read when they are used


def test_execute_reads_each_correction_once(model: Ready) -> None:
    circuit, program = model.program.circuit, model.program
    names = (Key(bytes(16)), Key(bytes(range(16))))
    from parties.served.files import MASKED_WEIGHTS, unpack_masked
    from parties.two_party.keys import mask_key

    dealt = DealerWeights(mask_key(model.masked.mask_seed, model.weights_digest), program.weight_shapes)
    payload = bytearray(b"".join(bytes(piece) for _, piece in deal(circuit, *names, dealt)))
    weights = ClientWeights(
        unpack_masked(model.masked.files[MASKED_WEIGHTS], program.weight_rings, program.weight_shapes)
    )
    values, places = program.dummy_values(), list[tuple[int, int]]()

    def read(start: int, stop: int) -> memoryview:
        places.append((start, stop))
        return memoryview(payload)[start:stop]

    found = []
    for source in (split_corrections(circuit, payload), ReadWhenUsed(circuit, read)):
        client = Correlations(CLIENT, names[CLIENT])
        prepare(circuit, client, weights)
        steps = (
            execute(
                circuit, program.revealed, SERVER, Correlations(SERVER, names[SERVER], source), model.masked.weights
            ),
            execute(circuit, program.revealed, CLIENT, client, weights, program.encode(values, {})),
        )
        found.append(run_pair(*steps)[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sum(stop - start for start, stop in places) == len(payload)
    assert len(set(places)) == len(places)
