"""A CKKS server among hostile clients: bytes that SEAL must not see, processes that die, streams that say nothing."""

from __future__ import annotations

import errno
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import threading
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
from parties.ckks.evaluators import Evaluators
from parties.ckks.keystore import keys_digest
from parties.ckks.limits import limit, limit_time
from parties.ckks.room import Kept, surplus
from parties.limits import waiting
from parties.net.caller import Caller
from parties.proto import unseen_pb2 as pb
from parties.services.hosting import child
from protocols.ckks.seal import Client, Context
from secure.errors import Error, QueryError
from tests import ckks_server
from tests.ckks_server import RunningCkks, children, dial, is_right, running, upload, uploaded
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


def test_keys_that_load_too_slowly_are_kept(
    compiled: secure.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is busy says nothing about a client's keys: they are loaded later, and not uploaded again."""
    error = compiled.model.predicted_error
    with served(compiled, tmp_path) as (address, host), dial(address) as session:
        is_right(session, "tiny", error)
        before = uploaded(session)
        for holder in children(host):
            kill(holder)
        with monkeypatch.context() as patched:
            patched.setattr(evaluators_module, "loading_seconds", lambda size: 0.0)
            patched.setattr(evaluators_module, "WAITED", 1e-4)
            with pytest.raises(Error, match="the keys were not loaded within 0 s"):
                session.query(ckks_server.inputs("tiny"))
        is_right(session, "tiny", error)
        assert uploaded(session) == before


@contextmanager
def alone(compiled: secure.Compiled) -> Iterator[Evaluators]:
    """The processes without a service."""
    made = Evaluators(compiled.model, workers=1, key_memory=8 << 30)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def shared(compiled: secure.Compiled) -> Iterator[Evaluators]:
    with alone(compiled) as made:
        yield made


@pytest.fixture
def evaluators(shared: Evaluators, monkeypatch: pytest.MonkeyPatch) -> Evaluators:
    """The same for several tests; a host that dies is started again at once."""
    monkeypatch.setattr(evaluators_module, "PAUSE", 0.05)
    shared._drop_holders()
    return shared


@pytest.fixture
def closing(compiled: secure.Compiled, monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluators]:
    """Those of a test that closes them; another host would be frozen while it encodes."""
    monkeypatch.setattr(evaluators_module, "PAUSE", 0.05)
    with alone(compiled) as made:
        monkeypatch.setattr(evaluators_module, "child", silent)
        yield made


@pytest.fixture(scope="module")
def keys(compiled: secure.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program, file = compiled.model.program, tmp_path_factory.mktemp("keys") / "one.keys"
    file.write_bytes(b"".join(Client(Context(program.parameters)).evaluation_keys(list(program.steps)).values()))
    return file


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def silent(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command of a host that is frozen while it encodes: it holds its socket, and reads and says nothing."""
    return ["sleep", "600"], child(module, *arguments)[1]


def test_a_host_that_cannot_be_started_is_tried_again(
    evaluators: Evaluators, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, start, codes = descriptors(), subprocess.Popen, [errno.ENOMEM, errno.EMFILE]

    def popen(*arguments: Any, **options: Any) -> Any:
        if codes:
            raise OSError(codes[0], os.strerror(codes.pop(0)))
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    kill(evaluators._process.pid)
    wait_until(lambda: not codes and evaluators._process.poll() is None, "another host")
    evaluators._forked_holder()[1].close()
    for code in (errno.ENOMEM, errno.EMFILE):
        assert f"the process that evaluates cannot be started ({os.strerror(code)})" in caplog.text
    wait_until(lambda: descriptors() <= before, "nothing stays open")


def test_a_host_is_not_to_blame_for_missing_descriptors(
    evaluators: Evaluators, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    evaluators.load("alice", "x", keys)
    host = evaluators._process
    with monkeypatch.context() as patched:
        patched.setattr(socket, "socketpair", none)
        with pytest.raises(Error, match=r"the server cannot open a socket \(Too many open files\)"):
            evaluators.load("bob", "x", keys)
        assert evaluators.acquire(1)
        with pytest.raises(Error, match="the server cannot open a socket"):
            evaluators.query("alice", "x")
    assert evaluators._process is host
    assert host.poll() is None
    assert evaluators.acquire(1)
    evaluators.query("alice", "x").close()


def test_keys_that_are_loaded_while_the_host_is_started_again_are_not_held(
    evaluators: Evaluators, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their process shares the weights of a host that is gone."""
    forked = evaluators._forked_holder

    def restarted() -> Any:
        found = forked()
        with evaluators._starting:
            evaluators._restart()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(evaluators, "_forked_holder", restarted)
        evaluators.load("alice", "x", keys)
    assert evaluators.acquire(1)
    with pytest.raises(QueryError, match="no process holds the keys any more"):
        evaluators.query("alice", "x")
    evaluators.load("alice", "x", keys)
    assert evaluators.acquire(1)
    evaluators.query("alice", "x").close()


def ends(evaluators: Evaluators) -> bool:
    """Whether ``close`` comes back, and leaves no host."""
    thread = threading.Thread(target=evaluators.close, daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive() and evaluators._process.poll() is not None


def test_a_host_that_is_frozen_while_it_encodes(
    compiled: secure.Compiled, closing: Evaluators, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for, and does not outlive its server."""
    first = closing._process
    kill(first.pid)
    wait_until(lambda: closing._process is not first, "another host")
    assert ends(closing)
    before = set(children(os.getpid()))
    monkeypatch.setattr(evaluators_module, "ENCODING", 0.1)
    with pytest.raises(Error, match="ended as it began, or took more than 0 s"):
        Evaluators(compiled.model, workers=1, key_memory=8 << 30)
    assert set(children(os.getpid())) == before


def test_a_server_that_closes_while_a_host_is_started(closing: Evaluators, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new host, which ``close`` has not seen, ends as well."""
    launched, first, result = evaluators_module._launched, closing._process, list[bool]()
    thread = threading.Thread(target=lambda: result.append(ends(closing)))

    def late() -> Any:
        thread.start()
        wait_until(lambda: closing._closed.is_set() and closing._host.closed, "it is closed")
        return launched()

    monkeypatch.setattr(evaluators_module, "_launched", late)
    kill(first.pid)
    wait_until(lambda: result == [True], "all is ended")
    assert closing._process is not first


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
