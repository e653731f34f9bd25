"""The processes of a soak: every role of a deployment and its clients, with a relay between each pair that talks."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.throughput import children
from benchmarks.watched import Ledger
from parties.cli.console import announced
from parties.cli.options import arguments
from parties.deployments import hosted, starting_order
from secure.deployments.deployment import SERVE, Deployment
from tests.relay import Relay

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 20.0  # seconds of roles and clients
START, END = 120.0, 60.0  # seconds in which a process starts, and in which it ends after SIGTERM
LEAVING = 120.0  # seconds in which all clients end after their last query
LINES = 60  # of a process's standard error that are kept
OWN = ("Pss_Anon:", "Pss_Shmem:")  # lines of smaps_rollup: memory that is no file's
IDLE = ("models",)  # seats that are taken while nobody asks
TAKEN = ("unseen_seats_taken", "unseen_budget_taken_bytes", "unseen_budget_grants")


class Stuck(RuntimeError):
    """A process that did not start or end in time; the message holds the end of what it said."""


@dataclass
class Query:
    """What a client asked. outcome: "right", "wrong", the name of an error, or "" if its client was killed."""

    client: str
    begin: float
    end: float = 0.0
    outcome: str = ""


@dataclass
class Numbers:
    """What a process and its children have: threads, descriptors, and resident memory in MB.

    That is without pages of files, and what several share counts once: libraries would count for less while many use
    them.
    """

    threads: int = 0
    descriptors: int = 0
    resident: float = 0.0

    @classmethod
    def of(cls, pids: Sequence[int]) -> Numbers:
        found = cls()
        for pid in pids:
            with suppress(OSError):
                of = Path(f"/proc/{pid}")
                pages = [line.split() for line in (of / "smaps_rollup").read_text().splitlines()]
                found.resident += sum(int(line[1]) / 1024 for line in pages if line[0] in OWN)
                found.threads += len(list((of / "task").iterdir()))
                found.descriptors += len(list((of / "fd").iterdir()))
        return found


class Process:
    """A process that can be started again with the same command. environment: what it gets beside ours."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], pipe: int) -> None:
        self.name, self._pipe = name, pipe
        self._command, self._environment = list(command), dict(environment)
        self._said: deque[str] = deque(maxlen=LINES)
        self._child: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def ended(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def said(self) -> str:
        """The end of its standard error, of all its lives."""
        return "\n".join(self._said)

    def family(self) -> list[int]:
        """It and all that it has started, directly or not."""
        found = [self.pid]
        for each in found:
            with suppress(OSError):
                found += children(each)
        return found

    def start(self, **environment: str) -> None:
        """Start it, and return at once."""
        self._child = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env={**self._environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[self._pipe],
            process_group=0,  # Ctrl-C is for this process
        )
        for follow, stream in ((self._hear, self._child.stdout), (self._said.append, self._child.stderr)):
            threading.Thread(target=self._follow, args=(follow, stream), daemon=True).start()

    def _follow(self, follow: Any, stream: Any) -> None:
        with stream:
            for line in stream:
                follow(line.rstrip("\n"))

    def _hear(self, line: str) -> None:
        """Hear a line of its standard output."""

    def signal(self, number: int) -> None:
        """Send a signal to all of its family: SIGSTOP and SIGCONT mean them all."""
        for pid in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, number: int) -> None:
        """Send a signal to it alone, and wait until it has ended."""
        assert self._child is not None
        assert self._child.stdin is not None
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        try:
            self._child.wait(END)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            raise Stuck(f"{self.name} did not end within {END:g} s of signal {number}:\n{self.said()}") from None
        finally:
            with suppress(OSError):
                self._child.stdin.close()


class RoleProcess(Process):
    """A role. metrics: the port of its numbers. writes: whether it keeps anything on a disk."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], pipe: int) -> None:
        self.metrics, self._listens = free_port(), threading.Event()
        super().__init__(name, [*command, "--metrics", str(self.metrics)], environment, pipe)
        self.writes = "--store" in command or "--state" in command

    def start(self, **environment: str) -> None:
        """Start it and wait until it listens."""
        self._listens.clear()
        super().start(**environment)
        until = time.monotonic() + START
        while not self._listens.wait(0.05):
            if self.ended or time.monotonic() > until:
                raise Stuck(f"{self.name} did not start:\n{self.said()}")

    def _hear(self, line: str) -> None:
        if announced(line):
            self._listens.set()

    def taken(self) -> dict[str, float]:
        """What is taken of its seats and budgets, if it is not nothing."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(TAKEN))
        return {
            name: float(value)
            for name, value in found.items()
            if float(value) and not any(f'what="{idle}"' in name for idle in IDLE)
        }


@dataclass
class Asked:
    """What clients have said, all of them together. why: for each error, what the last one said."""

    queries: list[Query] = field(default_factory=list)
    sessions: Counter[str] = field(default_factory=Counter)
    why: dict[str, str] = field(default_factory=dict)
    _open: dict[str, Query] = field(default_factory=dict)

    def hear(self, client: str, line: str) -> None:
        said = json.loads(line)
        what, outcome = said["what"], said["outcome"]
        if said["why"]:
            self.why[outcome] = said["why"]
        if what == "session":
            self.sessions[outcome] += 1
        elif what == "asked":
            self._open[client] = query = Query(client, said["begin"])
            self.queries.append(query)
        else:
            query = self._open.pop(client)
            query.outcome, query.end = outcome, said["end"]

    def right_since(self, moment: float) -> dict[str, float]:
        """By client, when the first right answer came to a query that began after a moment."""
        found: dict[str, float] = {}
        for query in reversed(self.queries):  # the latest are few
            if query.begin < moment - DEADLINE:
                break
            if query.outcome == "right" and query.begin >= moment:
                found[query.client] = query.end
        return found


class ClientProcess(Process):
    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], world: World) -> None:
        super().__init__(name, command, environment, world.ledger.pipe)
        self._asked = world.asked

    def _hear(self, line: str) -> None:
        self._asked.hear(self.name, line)

    def leave(self) -> None:
        """Let it close its session and end."""
        assert self._child is not None
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()


class World:
    """All processes and relays, as a context manager. relays: by ``FROM>TO``, where FROM is a role or ``client``.

    served: the directory of the compiled model; of one that is shared, ``directory`` has the shares. texts, answers:
    what clients ask, and what is right.
    """

    def __init__(
        self,
        deployment: Deployment,
        served: str,
        texts: Sequence[str],
        answers: Sequence[Sequence[float]],
        directory: Path,
        clients: int,
        seed: int,
    ) -> None:
        self.ledger, self.asked = Ledger(), Asked()
        self.roles: dict[str, RoleProcess] = {}
        self.clients: dict[str, ClientProcess] = {}
        self.relays: dict[str, Relay] = {}
        self.family: set[int] = set()  # of roles that were killed; all of it ends with them
        own = {name: value for name, value in os.environ.items() if not name.startswith("UNSEEN_")}
        self._environment = {
            **own,
            "UNSEEN_CONFIG": os.devnull,
            "UNSEEN_STORE_KEY": secrets.token_hex(32),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "XDG_STATE_HOME": str(directory / "state"),
            "PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, sys.path[1:]))),
        }
        self._host(deployment, served, directory)
        self._ask(deployment, texts, answers, directory, clients, seed)

    def _host(self, deployment: Deployment, served: str, directory: Path) -> None:
        found = hosted(deployment)
        for role in starting_order(deployment):
            at = f"127.0.0.1:{free_port()}"
            peers = {name: self.relays[f"{role.name}>{name}"].address for name in role.peers}
            line = [*found.command(role.name, [served], directory, peers), "--listen", at, "--announce"]
            if role.name == deployment.serves:
                line += arguments(deployment, (SERVE,))[2:]
            if "store" in found.takes[role.name]:
                line += ["--store", str(directory / "store" / role.name.replace(" ", "-"))]
            self.roles[role.name] = RoleProcess(
                role.name, self._watched(role.name, "unseen", *line), self._environment, self.ledger.pipe
            )
            for other in deployment.roles():
                if role.name in other.peers:
                    self.relays[f"{other.name}>{role.name}"] = Relay(at)

    def _ask(
        self,
        deployment: Deployment,
        texts: Sequence[str],
        answers: Sequence[Sequence[float]],
        directory: Path,
        clients: int,
        seed: int,
    ) -> None:
        file, options = directory / "work.json", deployment.options().items()
        addresses = {name.split(">")[1]: relay.address for name, relay in self.relays.items() if name[:7] == "client>"}
        work = {
            "deployment": deployment.name,
            "given": {
                name: getattr(deployment, name) for name, (_, of) in options if getattr(deployment, name) != of.default
            },
            "addresses": addresses,
            "texts": texts,
            "answers": answers,
            "cache": str(directory / "cache"),
            "deadline": DEADLINE,
        }
        file.write_text(json.dumps(work))
        for number in range(clients):
            name, line = f"client {number}", ("ask", str(file), str(1000 * seed + number))
            self.clients[name] = ClientProcess(name, self._watched("client", *line), self._environment, self)

    def _watched(self, role: str, *line: str) -> list[str]:
        return [sys.executable, "-m", "benchmarks.watched", str(self.ledger.pipe), role, *line]

    def __iter__(self) -> Iterator[Process]:
        yield from self.roles.values()
        yield from self.clients.values()

    def __getitem__(self, name: str) -> Process:
        return self.roles.get(name) or self.clients[name]

    def __enter__(self) -> World:
        try:
            for each in self:
                each.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def leave(self) -> list[str]:
        """Let all clients close their sessions and end; return those that did not."""
        for client in self.clients.values():
            client.leave()
        until, late = time.monotonic() + LEAVING, list[str]()
        for client in self.clients.values():
            while not client.ended and time.monotonic() < until:
                time.sleep(0.05)
            if not client.ended:
                late.append(client.name)
                client.end(signal.SIGKILL)
        return late

    def close(self) -> None:
        for each in self:
            if not each.ended:
                each.signal(signal.SIGCONT)
                with suppress(Stuck):
                    each.end(signal.SIGKILL)
        for relay in self.relays.values():
            relay.close()
        self.ledger.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
