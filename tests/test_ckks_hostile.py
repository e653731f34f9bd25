"""A CKKS server among hostile clients: bytes that SEAL must not see, processes that die, streams that say nothing."""

from __future__ import annotations

import os
import queue
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import secure
from parties.ckks import evaluators as evaluators_module
from parties.ckks import server as server_module
from parties.ckks.keystore import keys_digest
from parties.ckks.limits import limit, limit_time
from parties.ckks.room import Kept, surplus
from parties.limits import waiting
from parties.net.caller import Caller
from parties.proto import unseen_pb2 as pb
from protocols.ckks.seal import Client
from secure.errors import Error, QueryError
from tests import ckks_server
from tests.ckks_server import RunningCkks, children, dial, is_right, running, upload
from tests.test_ckks_deployment import nested_zstandard, without_a_part
from tests.tiny import wait_until


@pytest.fixture(scope="module")
def compiled() -> secure.Compiled:
    return ckks_server.compiled("tiny")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCkks]:
    with running("tiny", tmp_path_factory.mktemp("tiny")) as server:
        yield server


@contextmanager
def served(compiled: secure.Compiled, state: Path, **options: Any) -> Iterator[tuple[str, int]]:
    """A server in this process: its address, and its host's process."""
    before = set(children(os.getpid()))
    with secure.serve(compiled, role="server", state=state, **options) as service:
        (host,) = set(children(os.getpid())) - before
        yield service.address, host


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not lives(pid), "it is dead")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def memory(pid: int) -> int:
    """Resident kB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


# keys that did harm


@pytest.mark.parametrize("times", [1, 8])
def test_hostile_keys_cost_the_host_nothing(times: int, tiny: RunningCkks) -> None:
    """They are refused, nothing of them comes near the host, and everybody else is served."""
    tiny.works()
    c, host = tiny.link, tiny.host
    made = Client(c.client.context).evaluation_keys(list(c.program.steps))
    nested, short = nested_zstandard(made), without_a_part(c, made)
    before, files, holders = memory(host), tiny.key_files(), len(children(host))
    for _ in range(times):
        with pytest.raises(Error, match="a residue that is not below the prime"):
            upload(c, nested)
        with pytest.raises(Error, match=r"keys of \d+ bytes, where this Program's have"):
            upload(c, short)
    assert tiny.host == host
    assert memory(host) - before < 4 << 10
    assert tiny.key_files() == files
    wait_until(lambda: len(children(host)) == holders, "the processes of refused keys end")
    tiny.works()


def test_keys_that_seal_takes_may_be_wrong_to_who_sent_them(tiny: RunningCkks) -> None:
    """Keys of another secret: the answer is no answer, and it is the sender's."""
    c = tiny.link
    others = Client(c.client.context).evaluation_keys(list(c.program.steps))
    with dial(tiny.address) as session:
        upload(session.link, others)
        session.link.keys_digest = keys_digest(others)
        with pytest.raises(ValueError, match="it is not an answer"):
            session.query(ckks_server.inputs("tiny"))
    tiny.works()


# limits


def test_what_reads_clients_bytes_is_limited(tiny: RunningCkks) -> None:
    tiny.works()
    holders = children(tiny.host)
    assert holders
    for pid in holders:
        for name in ("Max address space", "Max cpu time"):
            assert re.search(rf"{name} +\d+", Path(f"/proc/{pid}/limits").read_text())
    for pid in (*holders, tiny.host):
        assert re.search(r"Max core file size +0 +0", Path(f"/proc/{pid}/limits").read_text())


def ended(work: Callable[[], object]) -> int:
    """How a fork that does this work ends: -signal, or 1 for a MemoryError."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except MemoryError:
            os._exit(1)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def limited(memory: int, seconds: float, then: Callable[[], object]) -> Callable[[], None]:
    def work() -> None:
        limit(memory, seconds)
        then()

    return work


def spin() -> None:
    while True:
        pass


def test_a_process_within_its_limits() -> None:
    assert ended(limited(64 << 20, 60, lambda: bytearray(16 << 20))) == 0
    assert ended(limited(64 << 20, 60, lambda: bytearray(1 << 30))) == 1
    assert ended(limited(64 << 20, 0, spin)) == -signal.SIGXCPU

    def more() -> None:
        limit(16 << 20, 60, children=64 << 20)
        limit(1 << 30, 60)  # no more than was left to it
        limit_time(60)
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        bytearray(512 << 20)

    assert ended(more) == 1


# processes that die


def test_a_host_that_died_is_started_again(
    compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, though nobody asks; queries go on, and none has an error."""
    monkeypatch.setattr(evaluators_module, "PAUSE", 0.0)
    error, before = compiled.model.predicted_error, set(children(os.getpid()))

    def hosts() -> list[int]:
        return [pid for pid in set(children(os.getpid())) - before if lives(pid)]

    with served(compiled, tmp_path) as (address, host), dial(address) as first:
        is_right(first, "tiny", error)
        kill(host)
        is_right(first, "tiny", error)
        wait_until(lambda: len(hosts()) == 1 and hosts() != [host], "another host")
        with dial(address) as second:
            is_right(second, "tiny", error)
            is_right(first, "tiny", error)
            (again,) = hosts()
            for pid in [*children(again), again]:
                kill(pid)
            is_right(first, "tiny", error)
            is_right(second, "tiny", error)
    wait_until(lambda: not hosts(), "no host outlives its server")


def test_a_host_that_is_frozen_is_replaced_when_it_is_needed(
    compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluators_module, "PAUSE", 0.0)
    monkeypatch.setattr(evaluators_module, "ANSWERING", 0.5)
    error = compiled.model.predicted_error
    with served(compiled, tmp_path) as (address, host), dial(address) as first:
        is_right(first, "tiny", error)
        for pid in [*children(host), host]:  # the process that holds the client's keys, too
            os.kill(pid, signal.SIGSTOP)
        is_right(first, "tiny", error)
        assert not lives(host)


def test_a_host_that_dies_is_not_started_all_the_time(
    compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that needs it waits, and is told that it does."""
    monkeypatch.setattr(evaluators_module, "PAUSE", 4.0)
    monkeypatch.setattr(server_module, "WORD", 0.1)
    error = compiled.model.predicted_error
    with served(compiled, tmp_path) as (address, host), dial(address) as session:
        began = time.monotonic()
        for pid in [*children(host), host]:
            kill(pid)
        is_right(session, "tiny", error)
        assert time.monotonic() - began > 1.0


def test_a_holder_that_died_is_replaced(tiny: RunningCkks) -> None:
    tiny.works()
    for holder in children(tiny.host):
        kill(holder)
    tiny.works()


def test_a_query_whose_process_dies_ends_alone(tmp_path: Path) -> None:
    with running("refresh", tmp_path) as server:
        query = ckks_server.Query(server.link)
        query.until_refresh()
        for pid in server.evaluating:
            kill(pid)
        for level in server.link.program.refreshes[0]:
            query.say(*ckks_server.sent(ckks_server.zeros(server.link, level)))
        assert "the evaluation ended without an answer" in query.failure().message
        server.works()


# streams that say nothing


def by_name(context: grpc.ServicerContext) -> Caller:
    """The caller that a test says."""
    name = dict(context.invocation_metadata()).get("name", "alice")
    return Caller(str(name), "client", "here")


def test_silent_streams_keep_nobody_else_out(
    compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (server_module, waiting):
        monkeypatch.setattr(module, "caller", by_name)
    error = compiled.model.predicted_error
    with served(compiled, tmp_path) as (address, _), dial(address) as session:
        for silent in (8, 16, 24):
            boxes, calls = [queue.SimpleQueue[None]() for _ in range(silent)], list[Any]()
            for k, box in enumerate(boxes):
                method = session.link._stub.Query if k % 2 else session.link._stub.Upload
                calls.append(method(iter(box.get, None), metadata=[("name", "mallory")]))
            time.sleep(0.5)
            with dial(address) as other:  # uploads keys
                is_right(other, "tiny", error)
            is_right(session, "tiny", error)
            for call, box in zip(calls, boxes, strict=True):
                call.cancel()
                box.put(None)


def test_a_silent_stream_ends(compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST", 0.5)
    with served(compiled, tmp_path) as (address, _), dial(address) as session:
        for method in (session.link._stub.Query, session.link._stub.Upload):
            box, began = queue.SimpleQueue[None](), time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                list(method(iter(box.get, None)))
            box.put(None)
            assert caught.value.code() == grpc.StatusCode.CANCELLED
            assert time.monotonic() - began < 4


@pytest.mark.parametrize("what", ["upload", "query", "refresh"])
def test_a_trickling_stream_ends(
    what: str, compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message comes well within any deadline; all of them together do not."""
    monkeypatch.setattr(server_module, "FIRST", 1.0)
    monkeypatch.setattr(server_module, "patience", lambda size: 1.0)
    name = "refresh" if what == "refresh" else "tiny"
    served_model = ckks_server.compiled(name) if what == "refresh" else compiled
    with served(served_model, tmp_path, deadline=1.0) as (address, _), dial(address) as session:
        c, began = session.link, time.monotonic()

        def trickling() -> Iterator[Any]:
            if what == "upload":
                yield ckks_server.announced(c, c.client.evaluation_keys(list(c.program.steps)))
                part = pb.UploadPart(data=b"x")
                while time.monotonic() - began < 20:
                    time.sleep(0.1)
                    yield part
            yield ckks_server.start(c)
            if what == "refresh":
                for data in ckks_server.encrypted(c):
                    yield from ckks_server.sent(data)
            time.sleep(20)

        call = (c._stub.Upload if what == "upload" else c._stub.Query)(trickling())
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.CANCELLED
        assert time.monotonic() - began < 8


KEPT = st.lists(st.builds(Kept, st.uuids(), st.sampled_from("abc"), st.floats(0, 9), st.integers(1, 9)), max_size=12)


@given(KEPT, st.integers(0, 40), st.integers(0, 9), st.sampled_from(["", "a", "b"]), st.none() | st.integers(9, 20))
def test_room_is_shared(kept: list[Kept[Any]], room: int, wanted: int, caller: str, each: int | None) -> None:
    gone = surplus(kept, room, wanted=wanted, caller=caller, each=each)
    assert len(set(gone)) == len(gone)
    left = [k for k in kept if k.key not in gone]
    total = sum(k.size for k in left) + wanted
    assert total <= room or not left
    assert each is None or sum(k.size for k in left if k.caller == caller) + wanted <= max(each, wanted)
    for k in kept:  # who loses something kept as much as anybody, or its own part was full
        if k.key in gone:
            assert not [x for x in left if x.caller == k.caller and x.used < k.used]
    assert not gone or sum(k.size for k in kept) + wanted > room or each is not None


def test_keys_are_found_by_their_client_alone(
    compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "caller", by_name)
    with served(compiled, tmp_path) as (address, _), dial(address) as session:
        c = session.link
        request = pb.KeysRequest(digest=c.keys_digest)
        assert c._stub.Keys(request).held
        assert not c._stub.Keys(request, metadata=[("name", "mallory")]).held
        messages = [ckks_server.start(c), *ckks_server.sent(ckks_server.encrypted(c)[0])]
        (reply,) = c._stub.Query(iter(messages), metadata=[("name", "mallory")])
        assert reply.failure.code == QueryError.code
