"""Several servers of one model behind a balancer, with one dealer: who answers is the same to a client, and one that is
killed costs its own queries in flight, each repeated under fresh correlations at another.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers")

import secure
from parties.two_party.client import TwoPartyLink
from secure.errors import Error, HandshakeError, PeerLost
from secure.session.links import Links
from secure.session.session import Session
from secure.tasks.embed import Embed
from tests.balancer import Balancer
from tests.test_cli import Process, process
from tests.tiny import LENGTH, TEXT, Ready, call, dealing, expected, ready, sentences, serving

CLIENTS = 8
WAITING = 240.0  # seconds, on a machine that does much else
TEXTS = sentences(12)
HAPROXY = shutil.which("haproxy")
DEPLOY = Path(__file__).resolve().parent.parent / "examples" / "deploy"


# in this process


def test_a_session_goes_on_at_another_server(model: Ready, directory: Path) -> None:
    """Both serve one D under one name, and one dealer deals for both."""
    with dealing() as dealer, serving(model, dealer.address) as one, serving(model, dealer.address) as two:
        assert one.service.models.keys() == two.service.models.keys()
        assert len(dealer.service._models) == 1
        with Balancer(one.address, two.address) as balancer, call(balancer.address, dealer.address) as session:
            answers = list[Tensor | Error]()
            for number, answer in enumerate(session.stream(Embed(), TEXTS[:4]), 1):
                answers.append(answer)
                if number == 2:
                    (at,) = (server for server in (one, two) if server.service.sessions)
                    at.stop()
            assert sorted(balancer.taken.values())[0] >= 1
    check(directory, TEXTS[:4], answers)


def test_each_client_has_a_connection_of_its_own(model: Ready) -> None:
    """Otherwise a balancer could not spread the clients of one process."""
    with ExitStack() as stack:
        dealer = stack.enter_context(dealing())
        servers = [stack.enter_context(serving(model, dealer.address)) for _ in range(2)]
        balancer = stack.enter_context(Balancer(*(server.address for server in servers)))
        for _ in range(4):
            stack.enter_context(call(balancer.address, dealer.address))
        assert [len(server.service.sessions) for server in servers] == [2, 2]


def test_a_server_with_another_mask_is_no_substitute(model: Ready, directory: Path, tmp_path: Path) -> None:
    """Servers that do not share the state directory have different D, and the client does not mix them."""
    other = ready(directory, tmp_path)
    assert other.weights_digest != model.weights_digest
    assert other.program.digest == model.program.digest
    with dealing() as dealer, serving(model, dealer.address) as one, serving(other, dealer.address) as two:  # noqa: SIM117
        with Balancer(one.address, two.address) as balancer, call(balancer.address, dealer.address) as session:
            (at,) = (server for server in (one, two) if server.service.sessions)
            stream = session.stream(Embed(), TEXTS[:2])
            next(stream)
            at.stop()
            with pytest.raises(HandshakeError, match="serves other weights than it did when this client connected"):
                next(stream)


def check(directory: Path, texts: list[str], answers: list[Tensor | Error]) -> None:
    assert len(answers) == len(texts)
    for text, answer in zip(texts, answers, strict=True):
        assert isinstance(answer, Tensor), answer
        torch.testing.assert_close(answer, expected(directory, text), atol=5e-3, rtol=0)


# processes


@dataclass
class Topology:
    servers: list[Process]
    dealer: Process
    address: str
    tmp: Path

    def session(self, **options: Any) -> Session:
        key = str(self.tmp / "dealer" / "dealer.pub")
        deployment = secure.TwoParty(self.address, self.dealer.address, key)
        return secure.connect(deployment, cache=False, pace=0.0, **options)


@contextmanager
def topology(directory: Path, tmp: Path, balancing: Any) -> Iterator[Topology]:
    """Two servers that share a compiled model and a state directory, one dealer, and what balances."""
    texts, compiled = tmp / "calibration.txt", tmp / "compiled"
    texts.write_text("\n".join(sentences()))
    made = secure.compile_text_model(str(directory), LENGTH, calibration=sentences())
    secure.save_compiled(made, compiled)
    with ExitStack() as stack:
        at = ["--listen", "127.0.0.1:0"]
        dealer = stack.enter_context(process(tmp / "dealer.log", "dealer", *at, "--state", str(tmp / "dealer")))
        arguments = ["serve", str(compiled), *at, "--dealer", dealer.address, "--state", str(tmp / "state")]
        arguments += ["--dealer-key", str(tmp / "dealer" / "dealer.pub"), "--same-owner"]
        servers = [stack.enter_context(process(tmp / f"server-{i}.log", *arguments)) for i in range(2)]
        address = stack.enter_context(balancing([server.address for server in servers], tmp))
        yield Topology(servers, dealer, address, tmp)


@contextmanager
def ours(servers: list[str], tmp: Path) -> Iterator[str]:
    with Balancer(*servers) as balancer:
        yield balancer.address


@contextmanager
def haproxy(servers: list[str], tmp: Path) -> Iterator[str]:
    """HAProxy with the very configuration that the compose file gives it."""
    assert HAPROXY is not None
    with Balancer() as unused:  # a free port
        address = unused.address
    given = {"UNSEEN_BIND": address, "UNSEEN_SERVER_1": servers[0], "UNSEEN_SERVER_2": servers[1]}
    command = [HAPROXY, "-db", "-f", str(DEPLOY / "haproxy.cfg")]
    with (tmp / "haproxy.log").open("w") as log:
        child = subprocess.Popen(command, env={**os.environ, **given}, stderr=log, stdout=log)
    try:
        wait_for(address)
        yield address
    finally:
        child.terminate()
        child.wait(timeout=10)


def wait_for(address: str) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(100):
        try:
            socket.create_connection((host, int(port))).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nothing listens at {address}")


BALANCING = [
    pytest.param(ours, id="ours"),
    pytest.param(haproxy, id="haproxy", marks=pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")),
]


@pytest.mark.slow
@pytest.mark.parametrize("balancing", BALANCING)
def test_a_killed_server_costs_its_own_queries(
    balancing: Any, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight clients stream, and one of two servers is killed. Every text is answered once, and right."""
    renewed, opened, lost = Counter[int](), dict[int, Session](), dict[int, list[str]]()
    sessions_of_queries = Counter[tuple[bytes, int]]()
    ask, renew = TwoPartyLink.ask, Links.renew

    def counting(self: TwoPartyLink, *arguments: Any, **options: Any) -> Any:
        number = min((r.query for r in self._ready), default=self._next_query)
        sessions_of_queries[self._session, number] += 1
        try:
            return ask(self, *arguments, **options)
        except Error as error:
            lost.setdefault(threading.get_ident(), []).append(str(error))
            raise

    monkeypatch.setattr(TwoPartyLink, "ask", counting)
    with topology(directory, tmp_path, balancing) as t, ExitStack() as stack:
        for client in range(CLIENTS):
            opened[client] = stack.enter_context(t.session())
        whose = {id(session._links): client for client, session in opened.items()}

        def renewing(self: Links, size: Any) -> None:
            renewed[whose[id(self)]] += 1
            renew(self, size)

        monkeypatch.setattr(Links, "renew", renewing)
        answers: dict[int, list[Tensor | Error]] = {client: [] for client in range(CLIENTS)}
        half = threading.Barrier(CLIENTS + 1)
        failed = list[BaseException]()

        def stream(client: int) -> None:
            try:
                for answer in opened[client].stream(Embed(), TEXTS):
                    answers[client].append(answer)
                    if len(answers[client]) == len(TEXTS) // 2:
                        half.wait(WAITING)
            except BaseException as error:
                failed.append(error)
                half.abort()

        threads = [threading.Thread(target=stream, args=[client]) for client in range(CLIENTS)]
        for thread in threads:
            thread.start()
        half.wait(WAITING)
        t.servers[0].end(signal.SIGKILL)
        for thread in threads:
            thread.join(WAITING)
        assert not failed
        for client in range(CLIENTS):
            check(directory, TEXTS, answers[client])
        assert set(renewed) != set(range(CLIENTS)), "every client was on one server"
        assert renewed, "no client was on the killed server"
        errors = [error for found in lost.values() for error in found]
        assert len(errors) <= sum(renewed.values())
        for error in errors:
            assert re.match("the server at .* (is gone|ended the session); this client waited for ", error), error
        assert max(sessions_of_queries.values()) == 1  # no query number of a session was asked for twice
        with t.session() as late:  # the dealer and the other server serve on
            check(directory, [TEXT], list(late.embed([TEXT])))
    dealt = re.findall(r"dealt query (\d+)", (tmp_path / "dealer.log").read_text())
    assert len(dealt) >= CLIENTS * len(TEXTS) + 1


@pytest.mark.slow
def test_without_retries_the_error_names_the_text(directory: Path, tmp_path: Path) -> None:
    with topology(directory, tmp_path, ours) as t, t.session() as session:
        stream = session.stream(Embed(), TEXTS, retries=0)
        next(stream)
        for server in t.servers:
            server.end(signal.SIGKILL)
        with pytest.raises(PeerLost, match=r"text 2: the server at .* is gone; this client waited for "):
            next(stream)
