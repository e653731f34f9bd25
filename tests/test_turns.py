"""A server that uses its machine and says no clearly: memory, turns, draining, workers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties.cli import check
from parties.limits import memory as memory_module
from parties.limits import turns as turns_module
from parties.limits.memory import Grant, PreparedMemory, available_memory, memory_budget
from parties.limits.seats import Seat
from parties.limits.turns import Turns
from parties.net.calls import AFTER, CODE, failed, failure, refusal
from parties.net.endpoints import Endpoint
from parties.net.network import Plaintext
from parties.net.peer import Peer
from parties.proto import unseen_pb2 as pb
from parties.services import hosting
from parties.services.draining import Draining
from parties.services.status import Answered, ask_status
from parties.two_party.server import InferenceService
from secure.deployments.deployment import deployments
from secure.errors import (
    LEAST_AFTER,
    MOST_AFTER,
    Busy,
    DealerError,
    Error,
    GoingAway,
    InvalidInput,
    PeerLost,
    QuotaError,
    about,
    from_code,
)
from secure.session import session as session_module
from secure.version import WIRE_VERSION
from tests.tiny import TEXT, Raw, Ready, Served, call, dial, run_query, serving, session_count, wait_until, works

# errors that say when to come back


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (2.5, 2.5),
        (0.0, LEAST_AFTER),
        (-1.0, LEAST_AFTER),
        (1e9, MOST_AFTER),
        (math.inf, MOST_AFTER),
        (math.nan, MOST_AFTER),
    ],
)
def test_a_peer_bounds_nobodys_patience(said: float, heard: float) -> None:
    found = failed(pb.Failure(code="busy", message="full", after=said), "the server")
    assert isinstance(found, Busy)
    assert found.after == heard
    assert str(found) == "the server reports: full"


def test_only_busy_has_a_time() -> None:
    assert failure(QuotaError("x")).after == 0
    assert failure(Busy("x", after=3)).after == 3
    assert not hasattr(from_code("quota", "x", 3.0), "after")
    named = about("text 3", Busy("x", "y", after=3))
    assert isinstance(named, Busy)
    assert (named.after, str(named)) == (3, "text 3: x\nhint: y")


class Refused(grpc.RpcError, grpc.Call):
    """A call that a service refused."""

    def __init__(self, status: grpc.StatusCode, details: str, **said: str) -> None:
        self._status, self._details, self._said = status, details, said

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return tuple((name.replace("_", "-"), value) for name, value in self._said.items())

    initial_metadata = is_active = time_remaining = cancel = add_callback = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("after", "heard"),
    [("2.5", 2.5), ("x", LEAST_AFTER), ("nan", MOST_AFTER), ("1" * 400, LEAST_AFTER), ("", LEAST_AFTER)],
)
def test_a_refusal_says_when_to_come_back(after: str, heard: float) -> None:
    assert (CODE, AFTER) == ("unseen-code", "unseen-after")
    call: Any = Refused(grpc.StatusCode.UNAVAILABLE, "full\nhint: later", unseen_code="busy", unseen_after=after)
    found = refusal(call, "the dealer refused", "see its log")
    assert isinstance(found, Busy)
    assert found.after == heard
    assert str(found) == "the dealer refused: full\nhint: later"


def test_a_service_without_a_free_thread_is_busy() -> None:
    call: Any = Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
    assert isinstance(refusal(call, "the server refused", "x"), Busy)
    large: Any = Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max")
    assert type(refusal(large, "the server refused", "x")) is PeerLost


# the budget of what is prepared


def seat(caller: str = "") -> Seat:
    return Seat(0, caller, lambda: None)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits."""
    monkeypatch.setattr(memory_module, "WAIT", 0.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "give back", "leave"]), st.integers(0, 5), st.integers(1, 60)), max_size=60
    )
)
@settings(deadline=None)
def test_the_budget_is_never_passed(actions: list[tuple[str, int, int]]) -> None:
    """Nor is a caller's part; and what is there is given to who asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_module, "WAIT", 0.0)
        memory, seats, grants = (
            PreparedMemory(100),
            [seat(name) for name in ("", "", "a", "a", "b", "b")],
            list[Grant](),
        )
        for action, who, size in actions:
            mine = [g for g in grants if g.seat.caller == seats[who].caller]
            if action == "take":
                fits = memory.used + size <= 100
                allowed = not seats[who].caller or not mine or sum(g.size for g in mine) + size <= 50
                if fits and allowed:
                    grants.append(memory.take(seats[who], size))
                else:
                    with pytest.raises(Busy, match="no memory for another query"):
                        memory.take(seats[who], size)
            elif action == "leave":
                memory.leave(seats[who])
                grants = [g for g in grants if g.seat is not seats[who]]
                with pytest.raises(Busy):
                    memory.take(seats[who], 1)  # by a thread of the session that has ended
                seats[who] = seat(seats[who].caller)
            elif grants:
                memory.give_back(grant := grants.pop(size % len(grants)))
                memory.give_back(grant)  # once more is harmless
            assert memory.used == sum(g.size for g in grants) <= 100
        for each in seats:
            memory.leave(each)
        assert (memory.used, memory._came, memory._waiting) == (0, {}, {})


@pytest.mark.parametrize("full", [True, False])
def test_who_leaves_while_a_thread_of_its_own_asks_harms_nobody(full: bool) -> None:
    """The other gets what it waits for, and nothing stays taken."""
    memory, leaver, other = PreparedMemory(10), seat(), seat()
    held = memory.take(seat(), 10) if full else None
    failed, got = list[BaseException](), list[Grant]()

    def ask(who: Seat) -> None:
        try:
            got.append(memory.take(who, 10))
        except BaseException as error:
            failed.append(error)

    if not full:
        memory.leave(leaver)
    threads = [threading.Thread(target=ask, args=(who,)) for who in (leaver, other)]
    for thread, who in zip(threads, (leaver, other), strict=True):
        thread.start()
        if full:
            wait_until(lambda who=who: who in memory._waiting, "it waits")  # type: ignore[misc]
    if held is not None:
        memory.leave(leaver)
        memory.give_back(held)
    for thread in threads:
        thread.join(10)
    assert [type(error) for error in failed] == [Busy]
    assert [grant.seat for grant in got] == [other]
    assert memory.used == 10


def taking(memory: PreparedMemory, who: Seat, got: list[Seat]) -> threading.Thread:
    def take() -> None:
        memory.take(who, 1)
        got.append(who)

    thread = threading.Thread(target=take)
    thread.start()
    wait_until(lambda: who in memory._waiting, "it waits")
    return thread


def test_who_has_least_then_who_waited_longest_comes_first() -> None:
    memory, got = PreparedMemory(3), list[Seat]()
    bulk, first, second = seat(), seat(), seat()
    held = [memory.take(bulk, 1) for _ in range(3)]
    threads = [taking(memory, who, got) for who in (bulk, first, second)]
    for grant in held:
        time.sleep(0.05)
        memory.give_back(grant)
    for thread in threads:
        thread.join(5)
    assert got == [first, second, bulk]


def test_who_was_told_to_come_back_keeps_its_time(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    memory, got = PreparedMemory(1), list[Seat]()
    holder, early, late = seat(), seat(), seat()
    grant = memory.take(holder, 1)
    with pytest.raises(Busy) as caught:
        memory.take(early, 1)
    assert memory_module.SOON <= caught.value.after <= memory_module.LATE
    monkeypatch.setattr(memory_module, "WAIT", 10.0)
    threads = [taking(memory, who, got) for who in (late, early)]
    memory.give_back(grant)
    wait_until(lambda: len(got) == 1, "one gets it")
    assert got == [early]
    memory.leave(early)
    for thread in threads:
        thread.join(5)
    assert got == [early, late]


def test_a_session_that_is_away_keeps_nobody_waiting(quick: None) -> None:
    memory = PreparedMemory(1)
    grant = memory.take(seat(), 1)
    with pytest.raises(Busy):
        memory.take(seat(), 1)
    memory.give_back(grant)
    memory.take(seat(), 1)  # though another was told to come back before


def test_an_idle_session_makes_room(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    left = list[str]()
    idle, working = Seat(0, "", lambda: left.append("idle")), Seat(1, "", lambda: left.append("working"))
    memory = PreparedMemory(2)
    memory.take(idle, 1), memory.take(working, 1)
    idle.rest(60.0)
    with pytest.raises(Busy):
        memory.take(seat(), 1)
    idle.rest(0.0)
    monkeypatch.setattr(memory_module, "WAIT", 5.0)
    memory.take(seat(), 1)
    assert left == ["idle"]
    assert idle.gone


def test_who_leaves_waits_no_longer() -> None:
    memory = PreparedMemory(1)
    memory.take(seat(), 1)
    start = time.monotonic()
    with pytest.raises(Busy):
        memory.take(seat(), 1, here=lambda: False)
    assert time.monotonic() - start < 1


def test_the_default_is_half_of_what_is_there() -> None:
    assert 0 < available_memory() < 1 << 50
    assert memory_budget(5e9) == 5_000_000_000
    assert memory_budget(None) == pytest.approx(available_memory() / 2, rel=0.5)


def test_a_query_that_never_fits_is_refused_at_the_start(model: Ready, dealer: Served) -> None:
    size = model.program.cost.dealt
    with pytest.raises(
        InvalidInput, match=r"one prepared query takes .* GB of memory, and the budget is .* GB\nhint: lower"
    ):
        secure.serve(model.compiled, role="server", peers={"dealer": dealer.address}, memory=size - 1.0)
    with pytest.raises(InvalidInput, match="bytes of memory"):
        secure.serve(model.compiled, role="server", peers={"dealer": dealer.address}, memory=math.nan)
    with secure.serve(model.compiled, role="server", peers={"dealer": dealer.address}, memory=3.5 * size) as service:
        assert any("memory for prepared queries" in line and ", 3 of " in line for line in service.about)


@pytest.fixture
def one(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server with memory for one query, and no patience."""
    monkeypatch.setattr(memory_module, "WAIT", 0.1)
    with serving(model, dealer.address, memory=PreparedMemory(model.program.cost.dealt)) as server:
        yield server


def test_a_busy_server_ends_no_session(one: Served, dealer: Served, model: Ready) -> None:
    """Nothing happened to the number: it is prepared, and used, later."""
    with Raw(one, dealer, model) as holder, Raw(one, dealer, model) as raw:
        holder.greet()
        holder.prepare(0)
        raw.greet()
        for _ in range(3):
            raw.say(prepare=pb.Prepare(query=0))
            told = raw.hear()
            assert (told.code, told.goes_on) == ("busy", True)
            assert memory_module.SOON <= told.after <= memory_module.LATE
        holder.say(query=pb.Query(query=0))
        run_query(holder, 0)
        raw.prepare(0)
        raw.say(query=pb.Query(query=0))
        run_query(raw, 0)
    service: InferenceService = one.service
    wait_until(lambda: service.memory.used == 0, "memory is given back")


def test_a_client_waits_for_a_busy_server(one: Served, dealer: Served, model: Ready) -> None:
    with Raw(one, dealer, model) as holder, dial(one, dealer) as session:
        holder.greet()
        holder.prepare(0)
        opened = session.link._session

        def release() -> None:
            time.sleep(0.8)
            holder.say(query=pb.Query(query=0))
            run_query(holder, 0)

        thread = threading.Thread(target=release)
        thread.start()
        assert session.embed([TEXT])[0].isfinite().all()
        thread.join()
        assert session.link._session == opened  # it did not connect again
        assert [report.query for report in session.reports] == [0]


def test_a_client_gives_up_in_the_end(
    one: Served, dealer: Served, model: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "BUSY", 1.5)
    with Raw(one, dealer, model) as holder, dial(one, dealer) as session:
        holder.greet()
        holder.prepare(0)
        with pytest.raises(Busy, match="the server reports: the server has no memory for another query"):
            session.prepare()
        with pytest.raises(Busy):
            session.embed([TEXT])
        assert session.ready == 0
        holder.say(query=pb.Query(query=0))
        run_query(holder, 0)
        assert session.embed([TEXT])[0].isfinite().all()  # the same session


def test_one_query_of_memory_serves_streams_of_several(one: Served, dealer: Served) -> None:
    """They prepare ahead, beside their running queries, of which each waits for the other's."""
    answers = dict[int, int]()

    def ask(number: int) -> None:
        with dial(one, dealer) as session:
            got = list(session.stream(secure_task(), [TEXT] * 4, retries=0))
            answers[number] = sum(not isinstance(each, Error) for each in got)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {0: 4, 1: 4, 2: 4}


def secure_task() -> Any:
    from secure.tasks.embed import Embed

    return Embed()


def test_prepared_queries_survive_a_busy_answer(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that a client wants to prepare, the first is there: it is used, and the second is asked for later."""
    monkeypatch.setattr(memory_module, "WAIT", 0.05)
    monkeypatch.setattr(session_module, "BUSY", 0.2)
    with (
        serving(model, dealer.address, memory=PreparedMemory(model.program.cost.dealt)) as server,
        dial(server, dealer) as session,
    ):
        session.prepare()
        with pytest.raises(Busy):
            session.prepare()
        assert session.ready == 1
        assert len(session.embed([TEXT, TEXT])) == 2
        assert [report.query for report in session.reports] == [0, 1]


@pytest.mark.parametrize("code", ["busy", "query"])
def test_a_failure_that_goes_on_where_nothing_was_prepared(code: str, model: Ready, dealer: Served) -> None:
    """A server cannot keep a session in a state that the protocol does not have."""

    class Wrong(InferenceService):
        def Session(self, requests: Any, context: Any) -> Iterator[pb.ServerMessage]:
            for message in super().Session(requests, context):
                frame = message.WhichOneof("content") == "frame"
                yield pb.ServerMessage(failure=pb.Failure(code=code, goes_on=True)) if frame else message

    with serving(model, dealer.address, Wrong) as server, dial(server, dealer) as session:
        with pytest.raises(Error):
            session.embed([TEXT])
        assert session.link.ended


def test_a_full_table_says_when_to_come_back(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parties.two_party.server.MAXIMUM_SESSIONS", 1)
    with serving(model, dealer.address) as server:
        with dial(server, dealer):
            with pytest.raises(Busy) as caught:
                dial(server, dealer)
            assert caught.value.after == 5.0
        wait_until(lambda: session_count(server) == 0, "the session is freed")
        works(server, dealer)


def test_a_lost_session_waits_until_it_is_let_in(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that must connect again to a server whose table is full comes back after the time it is told."""
    monkeypatch.setattr("parties.two_party.server.MAXIMUM_SESSIONS", 1)
    monkeypatch.setattr("parties.limits.seats.AFTER", 0.3)
    monkeypatch.setattr(session_module, "PAUSE", 0.1)
    with serving(model, dealer.address) as server, dial(server, dealer) as session:
        answers = session.stream(secure_task(), iter([TEXT] * 2), window=1)
        assert not isinstance(next(answers), Error)
        session.link._call.cancel()
        wait_until(lambda: session_count(server) == 0, "the session is freed")
        with dial(server, dealer) as other:
            threading.Timer(1.5, other.close).start()
            assert not isinstance(next(answers), Error)


# turns


def shares(turns: Turns, queries: dict[str, tuple[int, float]], seconds: float) -> dict[str, float]:
    """The seconds that each caller gets of one slot, if it always has work. queries: how many, and of what steps."""
    got, lock = dict.fromkeys(queries, 0.0), threading.Lock()
    started = threading.Barrier(sum(many for many, _ in queries.values()))

    def run(who: str, step: float) -> None:
        started.wait()
        while sum(got.values()) < seconds:
            turns.enter(who)
            with lock:
                got[who] += step
            time.sleep(0.001)  # others come to wait meanwhile
            turns.leave(who, step)

    threads = [
        threading.Thread(target=run, args=(who, step)) for who, (many, step) in queries.items() for _ in range(many)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return got


def test_callers_get_equal_time_whatever_they_run() -> None:
    """One has eight queries of long steps, one three of short steps."""
    got = shares(Turns(1), {"bulk": (8, 0.05), "short": (3, 0.01)}, 5.0)
    assert got["short"] > 0.8 * got["bulk"]
    assert got["bulk"] > 0.8 * got["short"]


def test_a_newcomer_has_no_claim_to_the_past() -> None:
    turns, order = Turns(2), list[str]()
    turns.enter("a long step")  # somebody is always there
    for _ in range(100):
        turns.enter("old")
        turns.leave("old", 1.0)
    turns.enter("new")
    turns.leave("new", 1.0)
    turns.enter("another")

    def wait(who: str) -> None:
        turns.enter(who)
        order.append(who)
        turns.leave(who, 1.0)

    threads = [threading.Thread(target=wait, args=(who,)) for who in ("new", "new", "new", "old", "old")]
    for number, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda number=number: len(turns._waiting) == number, "it waits")  # type: ignore[misc]
    turns.leave("another", 1.0)
    for thread in threads:
        thread.join(5)
    assert order == ["new", "old", "new", "old", "new"]  # and not the newcomer a hundred times


def test_callers_of_the_past_are_forgotten() -> None:
    """When nobody is left, and while somebody always is there."""
    turns = Turns(2)
    for _ in range(2):
        turns.enter(-1)
        for number in range(3 * turns_module.MANY):
            turns.leave(number - 1, 1.0)
            turns.enter(number)
            turns.enter("another")
            turns.leave("another", 0.1)
            assert len(turns._flows) <= turns_module.MANY + 2
        turns.leave(number, 1.0)
        assert not turns._flows
        assert turns._free == 2


class Counting(Turns):
    """Counts steps, and how many compute at once."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.steps, self.most = 0, 0

    def enter(self, who: Hashable) -> None:
        super().enter(who)
        self.steps += 1
        self.most = max(self.most, self.slots - self._free)


def test_as_many_steps_at_a_time_as_there_are_slots(model: Ready, dealer: Served) -> None:
    turns = Counting(1)
    with serving(model, dealer.address, turns=turns) as server:

        def ask() -> None:
            with dial(server, dealer) as session:
                session.embed([TEXT] * 3)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert turns.most == 1
        assert turns.steps == 9 * (model.program.cost.rounds + 1)
        wait_until(lambda: turns._free == 1, "all turns have ended")
        assert not turns._waiting


@pytest.mark.parametrize("how", ["cancels", "ends", "is silent"])
def test_who_is_gone_is_not_computed_for(how: str, model: Ready, dealer: Served) -> None:
    """No further step of its query runs, nobody waits for its turn, and its memory is free."""
    turns = Counting(1)
    deadline = 1.0 if how == "is silent" else 20.0
    with serving(model, dealer.address, turns=turns, deadline=deadline) as server:
        service: InferenceService = server.service
        with Raw(server, dealer, model) as raw:
            raw.start()
            raw.hear()  # the server's part of the first round
            steps = turns.steps
            assert service.memory.used == model.program.cost.dealt
            assert turns._free == 1  # nobody keeps a turn while it waits for a client
            if how == "cancels":
                raw.call.cancel()
            elif how == "ends":
                raw.outbox.put(None)
            wait_until(lambda: session_count(server) == 0, "the session is freed")
        assert turns.steps == steps < model.program.cost.rounds
        assert service.memory.used == 0
        assert (turns._free, turns._waiting) == (1, [])
        works(server, dealer)


def test_who_leaves_while_it_waits_for_a_turn_is_not_computed_for(model: Ready, dealer: Served) -> None:
    turns = Counting(1)
    with serving(model, dealer.address, turns=turns) as server:
        with Raw(server, dealer, model) as raw:
            turns.enter("somebody")
            raw.start()
            wait_until(lambda: bool(turns._waiting), "it waits")
            raw.call.cancel()
            time.sleep(0.2)
            turns.leave("somebody", 0.1)
            wait_until(lambda: session_count(server) == 0, "the session is freed")
        assert turns.steps <= 2
        works(server, dealer)


def test_who_leaves_while_it_waits_for_memory(one: Served, dealer: Served, model: Ready) -> None:
    service: InferenceService = one.service
    with Raw(one, dealer, model) as holder, Raw(one, dealer, model) as raw:
        holder.greet()
        holder.prepare(0)
        raw.greet()
        raw.say(prepare=pb.Prepare(query=0))
        raw.call.cancel()
        wait_until(lambda: session_count(one) == 1, "the session is freed")
        assert service.memory.used == model.program.cost.dealt
        assert not service.memory._waiting
        assert not service.memory._came


# draining


@pytest.fixture
def hosted(model: Ready, dealer: Served, state: Path) -> Iterator[secure.Service]:
    """A server with all that a service has around it."""
    with secure.serve(model.compiled, role="server", peers={"dealer": dealer.address}, state=state) as service:
        yield service


def draining(service: secure.Service, seconds: float = 20.0) -> threading.Thread:
    thread = threading.Thread(target=service.drain, args=(seconds,))
    thread.start()
    return thread


def test_an_idle_service_ends_at_once(hosted: secure.Service, dealer: Served) -> None:
    start = time.monotonic()
    with call(hosted.address, dealer.address) as session:
        session.embed([TEXT])
        session.prepare()
        draining(hosted).join(10)
        assert time.monotonic() - start < 5
        with pytest.raises(GoingAway, match="the server reports: this server is going away\nhint: connect again"):
            session.embed([TEXT])
        assert session.ready == 0


def test_new_clients_hear_that_it_goes(
    hosted: secure.Service, dealer: Served, model: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a query runs, which ends as it should."""
    monkeypatch.setattr(hosting, "NOTICE", 2.0)
    with Raw(Addressed(hosted), dealer, model) as raw:
        raw.start()
        time.sleep(0.5)  # the server has begun it
        thread = draining(hosted)
        peer = Peer("the server", hosted.address, Plaintext(), role="server", start="x")
        wait_until(lambda: ask_status(peer).draining, "it says so")
        peer.close()
        with pytest.raises(GoingAway, match=r"this service is going away\nhint: connect again"):
            call(hosted.address, dealer.address)
        with Raw(Addressed(hosted), dealer, model) as late:
            late.say(hello=late.hello())
            with pytest.raises(grpc.RpcError, match="this service is going away"):
                late.hear()
        run_query(raw, 0)
        failure = raw.hear_failure()
        assert (failure.code, failure.goes_on) == ("going-away", False)
        thread.join(10)
        assert not thread.is_alive()


def test_check_says_that_a_service_goes(
    hosted: secure.Service, dealer: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = dict[str, Answered]()
    needs = SimpleNamespace(deployment=secure.TwoParty())
    found = Answered(WIRE_VERSION, "two-party", "server", "", True, 0.0, False)
    for said in (found, replace(found, draining=True)):
        monkeypatch.setattr(check, "ask_status", lambda peer, said=said: said)
        if said.draining:
            with pytest.raises(GoingAway, match=r"^it is going away"):
                check._peer(needs, Plaintext(), "server", hosted.address, answered)  # type: ignore[arg-type]
        else:
            check._peer(needs, Plaintext(), "server", hosted.address, answered)  # type: ignore[arg-type]
    assert answered == {"server": found}


def test_draining_has_an_end(hosted: secure.Service, dealer: Served, model: Ready) -> None:
    with Raw(Addressed(hosted), dealer, model) as raw:
        raw.start()
        time.sleep(0.5)
        start = time.monotonic()
        draining(hosted, 1.0).join(10)
        assert 0.9 < time.monotonic() - start < 4
        with pytest.raises(grpc.RpcError):
            list(raw.call)


def test_hurry(hosted: secure.Service, dealer: Served, model: Ready) -> None:
    with Raw(Addressed(hosted), dealer, model) as raw:
        raw.start()
        time.sleep(0.5)
        start = time.monotonic()
        hosted.drain(60.0, lambda: time.monotonic() - start > 1)
        assert time.monotonic() - start < 5


def test_a_stream_goes_on_with_the_next_server(model: Ready, dealer: Served) -> None:
    """A server is replaced by another at its address, and no text is lost."""
    peers = {"dealer": dealer.address}
    with ExitStack() as stack:
        old = stack.enter_context(secure.serve(model.compiled, role="server", peers=peers))
        session = stack.enter_context(call(old.address, dealer.address))
        answers, got = session.stream(secure_task(), iter([TEXT] * 6), window=1), list[Any]()
        for number in range(6):
            got.append(next(answers))
            if number == 2:
                draining(old).join(10)
                stack.enter_context(secure.serve(model.compiled, role="server", peers=peers, listen=old.address))
        assert not any(isinstance(each, Error) for each in got)


def test_a_dealer_goes_on_while_it_is_asked(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens no new session, and deals those that there are what they ask for."""
    monkeypatch.setattr("parties.two_party.dealer.QUIET", 1.0)
    with (
        secure.serve(role="dealer", deployment=secure.TwoParty()) as dealer,
        secure.serve(model.compiled, role="server", peers={"dealer": dealer.address}) as server,
        call(server.address, dealer.address) as session,
    ):
        session.prepare()
        thread = draining(dealer)
        with pytest.raises(GoingAway, match="opening a session"):
            call(server.address, dealer.address)
        for _ in range(3):
            session.embed([TEXT])
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises((PeerLost, DealerError)):
            session.embed([TEXT])


class Addressed:
    """A service, as ``Raw`` takes it."""

    def __init__(self, service: secure.Service) -> None:
        self.endpoint = Endpoint.parse(service.address, what="x")


class Context:
    """As far as ``Draining`` uses it."""

    def set_trailing_metadata(self, said: Any) -> None:
        self.said = dict(said)

    def abort(self, status: grpc.StatusCode, details: str) -> None:
        raise RuntimeError(f"{status.name}: {details}")


@pytest.mark.parametrize("name", [d.name for d in deployments()])
def test_every_service_closes_what_clients_begin_with(name: str) -> None:
    """And nothing else, whatever the deployment: all methods that clients alone may call, and none of peers."""
    from parties.ckks.server import CkksService
    from parties.served.published import Published
    from parties.three_party.party_0 import Party0Service
    from parties.two_party.dealer import DealerService

    services: dict[str, list[Any]] = {
        "two-party": [InferenceService, Published, DealerService],
        "three-party": [Party0Service, Published],
        "ckks": [CkksService, Published],
    }
    refused = set[str]()
    for service in services[name]:
        state, context = Draining(service.permissions), Context()
        for method in service.permissions:
            with state.call(method, context):  # type: ignore[arg-type]
                pass
        state.begin()
        for method in service.permissions:
            try:
                with state.call(method, context):  # type: ignore[arg-type]
                    pass
            except RuntimeError:
                refused.add(method.rpartition("/")[2])
        assert context.said == {"unseen-code": "going-away"}
        assert state.needs_peers == (service in (DealerService, Party0Service))
        assert not state._calls
    first = {"two-party": {"Session", "Open"}, "three-party": {"Ask"}, "ckks": {"Keys", "Upload", "Query"}}
    assert refused == {"Describe", "Download", *first[name]}
