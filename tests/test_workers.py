"""Workers: processes that share one address; they are watched, replaced, and taken over from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch

import secure
from parties.net.endpoints import OPTIONS, SHARED, Endpoint
from parties.net.network import Plaintext
from parties.services import hosting, workers
from parties.services.hosting import HostOptions, child
from parties.services.workers import apart, require_single_thread, reserved, share_of
from parties.two_party.hosted import TwoPartyHosted
from protocols import matmul
from secure.deployments.two_party import SERVER
from secure.errors import EndpointError, Error, InvalidInput
from secure.session.session import Session
from secure.tasks.embed import Embed
from tests.tiny import LOOPBACK, TEXT, Ready, Served, call, expected, sentences, wait_until

# watching, with workers that do next to nothing

SCRIPT = """
import os, signal, sys, time
from parties.services import workers
from secure.errors import InvalidInput, Error
workers.PAUSE = 0.05

def working(what):
    def work(ready):
        if what == "refuses":
            raise InvalidInput("no such thing", "give another")
        if what == "breaks":
            raise ZeroDivisionError("secret")
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        ready(["x"])
        while not told and what != "ends":
            time.sleep(0.02)
        if told:
            print("told", flush=True)
    return work

for what in sys.argv[1:]:
    try:
        workers.supervise(2, working(what), lambda lines: print("ready", *lines, flush=True))
    except Error as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


@contextmanager
def watching(*what: str) -> Iterator[subprocess.Popen[str]]:
    _, environment = child("x")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *what],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready x\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return False


def replaced(pid: int) -> None:
    """Kill a worker, and wait for the one that takes its place."""
    before = children(pid)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: before[0] not in (now := children(pid)) and len(now) == 2, "another is there")


def test_who_dies_is_replaced_and_nobody_outlives_who_watches() -> None:
    with watching("waits") as process:
        for _ in range(3):
            replaced(process.pid)
        before = children(process.pid)
        assert all(map(lives, before))
        process.kill()
        wait_until(lambda: not any(map(lives, before)), "they end")


def test_signals_are_passed_on_and_failures_come_back() -> None:
    """Workers are told to end; then some cannot start, and some die again and again."""
    with watching("waits", "refuses", "breaks", "dies", "ends") as process:
        process.terminate()
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert out.splitlines() == [
            "told",
            "told",
            "InvalidInput: no such thing",
            "hint: give another",
            "Error: internal error (ZeroDivisionError)",
            "Error: a worker died before it was ready",
            "hint: see its log, above",
            "ready x",
            f"Error: {workers.DEATHS + 1} workers died in 60 s",
            "hint: see their log, above",
        ]


def test_no_fork_with_threads() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="another")
    thread.start()
    try:
        with pytest.raises(
            Error, match=r"several threads \(.*another.*\)\nhint: serve a directory that `unseen compile`"
        ):
            require_single_thread()
    finally:
        release.set()
        thread.join()


def test_work_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raises comes back, and what it does stays there."""
    monkeypatch.setattr(workers, "require_single_thread", lambda: None)
    done = list[int]()
    apart(lambda: done.append(1))
    assert done == []

    def refuse() -> None:
        raise EndpointError("not here", "there")

    with pytest.raises(EndpointError, match=r"^not here\nhint: there$"):
        apart(refuse)


def test_a_part_of_the_cores() -> None:
    assert [share_of(8, n) for n in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    assert share_of(None, 2) == 1


# one address


def test_a_port_that_is_held() -> None:
    with reserved(LOOPBACK, what="x") as first:
        assert first.port
        with reserved(first, what="x") as second:  # by another that shares
            assert second == first
        with socket.socket() as alone, pytest.raises(OSError, match="in use"):
            alone.bind((first.host, first.port))
        hosting.check(first, {}, Plaintext(), what="x", shared=True)
    with socket.socket() as alone:
        alone.bind(("127.0.0.1", 0))
        alone.listen()
        taken = Endpoint(*alone.getsockname())
        with pytest.raises(EndpointError, match="may be in use"), reserved(taken, what="x"):
            pass


def test_ports_are_shared_on_purpose_alone() -> None:
    assert dict(OPTIONS)["grpc.so_reuseport"] == 0
    assert dict(SHARED) == {**dict(OPTIONS), "grpc.so_reuseport": 1}
    assert len(dict(SHARED)) == len(SHARED)


def test_the_library_forks_nothing(model: Ready, dealer: Served) -> None:
    with pytest.raises(InvalidInput, match="workers means nothing to the server"):
        secure.serve(model.compiled, role="server", peers={"dealer": dealer.address}, workers=2)


@pytest.mark.parametrize("native", [True, False])
def test_what_workers_share_is_made_by_whichever_kernel(
    model: Ready, native: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A processor without AVX-512 packs matrices before the workers are forked; a diagonal is not one."""
    monkeypatch.setattr(matmul, "native", lambda: native)
    options = HostOptions(Plaintext(), state=tmp_path)
    made = TwoPartyHosted().shared(SERVER, [model.compiled], options)
    assert bool(made.models[0].weights._packed) is not native


@pytest.fixture
def kept(model: Ready, tmp_path: Path) -> Path:
    secure.save_compiled(model.compiled, tmp_path / "compiled")
    return tmp_path / "compiled"


@contextmanager
def serving(kept: Path, dealer: str, listen: str, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    line = ["serve", str(kept), "--dealer", dealer, "--listen", listen, "--state", str(kept.parent / "state"), *more]
    command, environment = child("parties.cli", *line, "--same-owner", "--announce")
    log = (kept.parent / "log").open("a")
    with log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())["listening"]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def require_shared(pid: int) -> None:
    """The larger part of a worker's memory is that of the process which forked it."""
    found = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    sizes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in found)}
    assert sizes["Private_Clean"] + sizes["Private_Dirty"] < sizes["Rss"] / 3


def test_a_stream_survives_workers_and_new_versions(kept: Path, dealer: Served) -> None:
    """A worker is killed, then the whole server is replaced by one at the same address: no text is lost."""
    answers: Any = None
    with serving(kept, dealer.address, "127.0.0.1:0", "--workers", "2") as (old, address):
        first = children(old.pid)
        assert len(first) == 2
        with call(address, dealer.address) as session:
            got, texts = list[Any](), iter([TEXT] * 9)
            answers = session.stream(Embed(), texts, window=1)
            got += [next(answers) for _ in range(3)]
            for pid in first:  # whichever serves it
                require_shared(pid)
                os.kill(pid, signal.SIGKILL)
            got += [next(answers) for _ in range(3)]
            wait_until(lambda: len(children(old.pid)) == 2, "they are replaced")
            with serving(kept, dealer.address, address, "--workers", "1") as (new, same):
                assert same == address
                old.terminate()
                got += list(answers)
                assert old.wait(timeout=20) == 0
                assert new.poll() is None
    assert len(got) == 9
    assert not any(isinstance(each, Error) for each in got)
    told = (kept.parent / "log").read_text()
    assert "2 workers; each has: memory for prepared queries" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_eight_clients_while_a_server_is_replaced(kept: Path, dealer: Served, directory: Path) -> None:
    """A new version at the same port, and SIGTERM for the old one: every query is answered, and rightly."""
    clients, texts = 8, sentences(8)
    right = [expected(directory, text) for text in texts]
    got: list[list[Any]] = [[] for _ in range(clients)]
    replaced = threading.Event()

    def ask(session: Session, mine: list[Any], number: int) -> None:
        def given() -> Iterator[str]:
            while not replaced.is_set():
                yield texts[number]
            yield from [texts[number]] * 3

        mine.extend(session.stream(Embed(), given(), window=1))

    def all_have(count: int) -> bool:
        return all(sum(r.rounds > 0 for r in session.reports) >= count for session in sessions)

    with ExitStack() as stack:
        old, address = stack.enter_context(serving(kept, dealer.address, "127.0.0.1:0", "--workers", "2"))
        sessions = [stack.enter_context(call(address, dealer.address)) for _ in range(clients)]
        threads = [threading.Thread(target=ask, args=each) for each in zip(sessions, got, range(clients), strict=True)]
        for thread in threads:
            thread.start()
        wait_until(lambda: all_have(2), "everybody has answers", 60)
        new, same = stack.enter_context(serving(kept, dealer.address, address, "--workers", "2"))
        assert same == address
        old.terminate()
        assert old.wait(timeout=40) == 0
        replaced.set()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert new.poll() is None
    for number, mine in enumerate(got):
        assert len(mine) >= 5
        assert [each for each in mine if isinstance(each, Error)] == []
        for each in mine:
            torch.testing.assert_close(each, right[number], atol=5e-3, rtol=0)


@pytest.mark.slow
def test_a_port_in_use_is_said_before_anything_takes_long(kept: Path, dealer: Served) -> None:
    line = [
        "serve",
        str(kept),
        "--dealer",
        dealer.address,
        "--listen",
        dealer.address,
        "--workers",
        "2",
        "--same-owner",
    ]
    command, environment = child("parties.cli", *line)
    start = time.monotonic()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "may be in use" in ended.stderr
    assert time.monotonic() - start < 60
