"""Clients that stream through a balancer to two servers with one dealer, and what a killed server costs them.

    python -m benchmarks.topology [--compiled DIRECTORY] [--clients 8] [--texts 6] [--balancer haproxy]

Every role is a process, and so is each client: `unseen dealer`, `unseen serve` twice on one state directory, a balancer
(HAProxy with `examples/deploy/haproxy.cfg`, or the tests' own), and this module as a client. All clients embed some
texts; then, in a second pass, one server gets SIGKILL when half of all answers are there. Printed are texts a second of
both passes, the longest wait for an answer, and how many queries were asked again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import secure
from benchmarks.common import Service
from parties.services.hosting import settle
from secure.models.text import PACKAGED
from secure.session.links import Links
from secure.tasks.embed import Embed
from tests.balancer import Balancer

CONFIGURATION = Path(__file__).resolve().parent.parent / "examples" / "deploy" / "haproxy.cfg"
SENTENCE = "The weather in the mountains changes quickly, so take a coat with you, number {}."


def ask(server: str, dealer: str, key: str, texts: int) -> None:
    """A client: one line of JSON for each answer, with the seconds since the last."""
    settle()
    again, renew = 0, Links.renew

    def counted(self: Links, size: Any) -> None:
        nonlocal again
        again += 1
        renew(self, size)

    Links.renew = counted  # type: ignore[method-assign]
    with secure.connect(secure.TwoParty(server, dealer, key), pace=0.0) as session:
        print(json.dumps({"connected": True}), flush=True)
        sys.stdin.readline()  # until all are connected
        last = time.monotonic()
        for answer in session.stream(Embed(), [SENTENCE.format(i) for i in range(texts)]):
            if isinstance(answer, secure.Error):
                raise answer
            now = time.monotonic()
            print(json.dumps({"waited": now - last, "again": again}), flush=True)
            last = now


@contextmanager
def haproxy(servers: list[str]) -> Iterator[str]:
    """HAProxy on a free port, with the configuration of the deployment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"127.0.0.1:{free.getsockname()[1]}"
    given = {"UNSEEN_BIND": at, "UNSEEN_SERVER_1": servers[0], "UNSEEN_SERVER_2": servers[1]}
    command = ["haproxy", "-db", "-f", str(CONFIGURATION)]
    child = subprocess.Popen(command, env={**os.environ, **given}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(2.0)  # two checks of health
        yield at
    finally:
        child.terminate()
        child.wait()


@contextmanager
def ours(servers: list[str]) -> Iterator[str]:
    with Balancer(*servers) as balancer:
        yield balancer.address


def run(address: str, dealer: str, key: str, o: argparse.Namespace, victim: int | None) -> dict[str, Any]:
    """Let all clients stream. victim: the process that is killed when half of the answers are there."""
    command = [sys.executable, "-m", "benchmarks.topology", "--ask", address, dealer, key, "--texts", str(o.texts)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    clients = [subprocess.Popen(command, **pipes) for _ in range(o.clients)]  # type: ignore[call-overload]
    try:
        for client in clients:
            assert json.loads(client.stdout.readline())["connected"]
        start, waited, again, answers = time.monotonic(), 0.0, 0, 0
        for client in clients:
            client.stdin.write("\n")
            client.stdin.flush()
        killed: float | None = None
        for number in range(o.texts):
            for client in clients:  # each has as many answers, in about the same time
                line = client.stdout.readline()
                if not line:
                    raise SystemExit("a client failed, see above")
                found = json.loads(line)
                waited, answers = max(waited, found["waited"]), answers + 1
                if number == o.texts - 1:
                    again += found["again"]
                if victim is not None and killed is None and 2 * answers >= o.clients * o.texts:
                    killed = time.monotonic() - start
                    os.kill(victim, signal.SIGKILL)
        seconds = time.monotonic() - start
    finally:
        for client in clients:
            client.kill()
            client.wait()
    return {
        "seconds": round(seconds, 2),
        "texts a second": round(o.clients * o.texts / seconds, 3),
        "longest wait for an answer, s": round(waited, 2),
        "queries asked again": again,
        **({"killed after, s": round(killed, 2)} if killed else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", nargs=3, metavar=("SERVER", "DEALER", "KEY"), help=argparse.SUPPRESS)
    parser.add_argument("--compiled", help="what `unseen compile` wrote; by default MiniLM is compiled first")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--texts", type=int, default=6, help="of each client")
    installed = "haproxy" if shutil.which("haproxy") else "ours"
    parser.add_argument("--balancer", choices=("haproxy", "ours"), default=installed)
    o = parser.parse_args()
    if o.ask:
        server, dealer, key = o.ask
        ask(server, dealer, key, o.texts)
        return
    with ExitStack() as stack:
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not o.compiled:
            made = secure.compile_text_model(PACKAGED, o.length, embedding="client-table")
            secure.save_compiled(made, tmp / "compiled")
        at, key = ("--listen", "127.0.0.1:0", "--threads", "1", "--announce"), str(tmp / "dealer" / "dealer.pub")
        dealing = Service("parties.cli", "dealer", *at, "--state", str(tmp / "dealer"))
        stack.callback(dealing.stop)
        serving = ("serve", o.compiled or str(tmp / "compiled"), *at, "--dealer", dealing.address, "--dealer-key", key)
        servers = list[Service]()
        for _ in range(2):
            servers.append(Service("parties.cli", *serving, "--state", str(tmp / "state"), "--same-owner"))
            stack.callback(servers[-1].stop)
        balancing = {"haproxy": haproxy, "ours": ours}[o.balancer]
        address = stack.enter_context(balancing([server.address for server in servers]))
        document: dict[str, Any] = {"balancer": o.balancer, "clients": o.clients, "texts of each": o.texts}
        document["load average before"] = round(os.getloadavg()[0], 1)
        document["two servers"] = run(address, dealing.address, key, o, None)
        document["one is killed"] = run(address, dealing.address, key, o, servers[0].pid)
        print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
