"""Start a service on a port, prepare its process for queries, and end it cleanly on Ctrl-C or SIGTERM."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from parties.limits.meter import Meter
from parties.limits.quotas import Quotas
from parties.limits.tokens import Tokens
from parties.net.caller import Permissions
from parties.net.endpoints import OPTIONS, SERVICE_LIMIT, SHARED, Endpoint
from parties.net.network import Network
from parties.net.peer import Peer
from parties.net.watchdog import check_deadline
from parties.services.allocator import reuse_memory
from parties.services.dealing import Dealing, DealingHere
from parties.services.draining import DRAIN, NOTICE, Draining
from parties.services.guard import Guard
from parties.services.signals import Signals
from parties.services.status import ask_status
from parties.telemetry.counting import Counting
from parties.telemetry.events import Events, Readings
from parties.telemetry.telemetry import DRAINING, SERVING, Telemetry
from secure.errors import EndpointError, InvalidInput, PeerLost
from secure.mpc.budget import Budget
from secure.progress import Told, silent

log = logging.getLogger("unseen.hosting")

STOPPING = (signal.SIGINT, signal.SIGTERM)
IN_USE = "choose another port, or 0 for any free one"
MAXIMUM_AHEAD = 16  # queries whose corrections are kept in memory
STORE_GB, MAXIMUM_STORE = 10.0, 100_000  # GB that a store takes by default, and at most
MAXIMUM_STREAMS = 32  # sessions and calls that are served at a time; each takes a thread


@dataclass(frozen=True)
class HostOptions:
    """Options for hosting a role. A deployment determines which of them a role takes.

    network: the protection of channels. quotas: counts what callers use; None: nothing is counted.
    deadline: seconds that any one wait for a client or peer may last. state: a
    directory for files that must outlive the process (seeds, clients' keys); None: the user's own. traces: a directory
    for timelines of queries. workers: processes that compute queries, 1 or more. ahead: queries whose corrections are
    kept ready, MAXIMUM_AHEAD at most. rotate_mask: days after which the mask of the weights is renewed at a start, by
    its file's age. memory: bytes of queries that are prepared for clients; None: half of what the machine has to spare.
    budget: the most that one Program from somebody else may take. dealing: where a dealer's corrections are computed;
    closed with the service. store: a directory in which correlations are kept ready, encrypted; None: nothing of them
    is kept on a disk. store_gb: the most that it takes, in GB (10^9 bytes); STORE_GB by default. store_key: the file of
    its key; None: UNSEEN_STORE_KEY holds the key. told: hears of progress while the role starts. events: hear of every
    phase of a query that ends. Raises InvalidInput for values out of range.
    """

    network: Network
    quotas: Quotas | None = None
    deadline: float = 60.0
    state: Path | None = None
    traces: Path | None = None
    workers: int = 1
    ahead: int = 1
    rotate_mask: int = 90
    memory: float | None = None
    budget: Budget = field(default_factory=Budget)
    store: Path | None = None
    store_gb: float | None = None
    store_key: Path | None = None
    told: Told = silent
    dealing: Dealing = field(default_factory=DealingHere)
    events: Events = field(default_factory=Events)

    def __post_init__(self) -> None:
        check_deadline(self.deadline)
        if not _is_count(self.workers, 1, math.inf):
            raise InvalidInput(f"{self.workers!r} workers", "give 1 or more")
        if not _is_count(self.ahead, 0, MAXIMUM_AHEAD):
            raise InvalidInput(f"{self.ahead!r} queries ahead", f"0 to {MAXIMUM_AHEAD}")
        if not _is_count(self.rotate_mask, 1, math.inf):
            raise InvalidInput(f"a mask renewed after {self.rotate_mask!r} days", "give 1 or more")
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise InvalidInput(f"{self.memory!r} bytes of memory", "give a positive number")
        if self.store is None and self.store_gb is not None:
            raise InvalidInput("--store-bytes means nothing without a store", "give its directory: --store")
        if self.store is None and self.store_key is not None:
            raise InvalidInput("--store-key-file means nothing without a store", "give its directory: --store")
        if self.store_gb is not None and not 0 < self.store_gb <= MAXIMUM_STORE:
            raise InvalidInput(f"a store of {self.store_gb!r} GB", f"more than 0, {MAXIMUM_STORE} at most")

    @property
    def store_size(self) -> int:
        """The most bytes that the store takes."""
        return int((STORE_GB if self.store_gb is None else self.store_gb) * 1e9)


def _is_count(value: object, least: int, most: float) -> bool:
    return isinstance(value, int) and least <= value <= most


@dataclass(frozen=True)
class Parts:
    """The parts of one role's service. add: functions that add its servicers; close: ends it.

    permissions: the roles that may call each method, said by the servicers; a method that is not listed may be called
    by none where the network has identities. about: lines to show to a person once the service listens. streams: the
    most calls that are served at a time. largest: the most bytes of a message to it. program: the digest of the Program
    that it serves. knows: tells whether it serves or deals a Program, by its digest; by default, whether that is
    ``program``. drain: called when the service begins to end, after which its calls shall end between two pieces of
    work. left: tells whether there is work that is no call. standing: methods whose calls are no work (``Draining``).
    readings: the numbers that it can tell at any time.
    """

    add: Sequence[Callable[[grpc.Server], None]]
    permissions: Permissions
    close: Callable[[], None] = lambda: None
    about: Sequence[str] = ()
    streams: int = MAXIMUM_STREAMS
    program: str = ""
    knows: Callable[[str], bool] | None = None
    largest: int = SERVICE_LIMIT
    drain: Callable[[], None] = lambda: None
    left: Callable[[], bool] = lambda: False
    standing: frozenset[str] = frozenset()
    readings: Readings = lambda: ()


class _Threads(ThreadPoolExecutor):
    """The threads of a server. A call that comes while the process ends is dropped.

    The base raises then, and grpc's own thread would print a traceback for every service that nobody closed.
    """

    def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
        try:
            return super().submit(*arguments, **named)
        except RuntimeError as error:
            if "shutdown" not in str(error):  # such as one of no more threads, which is no reason to drop it
                raise
            dropped = Future[Any]()
            dropped.cancel()
            return dropped


class Service:
    """A running service, as a context manager. address: the address at which it listens, with its real port."""

    def __init__(
        self,
        parts: Parts,
        listen: Endpoint,
        network: Network,
        *,
        what: str,
        role: str,
        quotas: Quotas | None = None,
        tokens: Tokens | None = None,
        draining: Draining | None = None,
        shared: bool = False,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._parts, self._quotas, self._telemetry = parts, quotas, telemetry
        self._draining = draining or Draining(parts.permissions, parts.standing)
        self.about = (*network.about(), *parts.about, *([str(quotas.limits)] if quotas else ()))
        self.about += telemetry.about if telemetry else ()
        try:
            self._server, at = start(
                listen,
                parts.add,
                network=network,
                what=what,
                role=role,
                permissions=parts.permissions,
                meter=Meter(quotas, tokens, parts.permissions) if quotas or tokens else None,
                streams=parts.streams,
                largest=parts.largest,
                draining=self._draining,
                shared=shared,
                events=telemetry.events if telemetry else None,
            )
        except BaseException:
            self._end()
            raise
        self.address = str(at)
        if telemetry is not None:
            telemetry.begin(parts.readings, lambda: DRAINING if self._draining.begun else SERVING)

    def wait(self, drain: float = DRAIN) -> None:
        """Serve until the process is interrupted or terminated. drain: seconds that work may take after SIGTERM."""
        self.wait_announced(lambda: None, drain)

    def wait_announced(self, announce: Callable[[], None], drain: float = DRAIN) -> None:
        """Serve like ``wait``, and call ``announce`` as soon as a signal would end the service cleanly.

        SIGTERM drains the service. After SIGINT, or a second signal, running calls get two seconds to end.
        """
        stopped = Signals(*STOPPING)
        announce()
        if stopped.next() == signal.SIGTERM:
            self.drain(drain, stopped.waits)
        self._server.stop(2).wait()

    def drain(self, seconds: float = DRAIN, hurry: Callable[[], bool] = lambda: False) -> None:
        """Take no new clients, and stop when the work that there is has ended, after ``seconds`` at the latest.

        Clients that come are told that the service is going away, for NOTICE seconds at least; then nobody listens any
        more, unless the work that there is needs calls of peers. hurry: tells that it should stop at once.
        """
        until = time.monotonic() + seconds
        log.info("going away: work that has begun may take %g s", seconds)
        self._draining.begin()
        self._parts.drain()
        notice = until if self._draining.needs_peers else min(until, time.monotonic() + NOTICE)
        self._draining.wait(notice, self._parts.left, hurry)
        ended = self._server.stop(0 if self._draining.needs_peers else max(0.0, until - time.monotonic()))
        while not ended.wait(0.1):
            if hurry():
                self._server.stop(0)

    def close(self) -> None:
        """Stop at once."""
        self._server.stop(0).wait()
        self._end()

    def _end(self) -> None:
        self._parts.close()
        if self._quotas:
            self._quotas.close()
        if self._telemetry is not None:
            self._telemetry.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(
    listen: Endpoint,
    add: Sequence[Callable[[grpc.Server], None]],
    *,
    network: Network,
    what: str,
    role: str,
    permissions: Permissions,
    meter: Meter | None = None,
    streams: int = MAXIMUM_STREAMS,
    largest: int = SERVICE_LIMIT,
    draining: Draining | None = None,
    shared: bool = False,
    events: Events | None = None,
) -> tuple[grpc.Server, Endpoint]:
    """Bind and start a server as ``role``; return it and its address with the real port.

    shared: other processes of this user may listen at the same port. events: hear of all calls.

    Raises EndpointError, naming ``what``.
    """
    network.check(listen, what=what)
    check_free(listen, what=what, shared=shared)  # grpc would write lines of its own about it
    server = grpc.server(
        _Threads(streams),
        options=(*(SHARED if shared else OPTIONS), ("grpc.max_receive_message_length", largest)),
        maximum_concurrent_rpcs=streams,
        # the guard comes first, behind what only counts
        interceptors=[
            *([Counting(events, permissions)] if events else []),
            Guard(network, permissions, draining),
            *([meter] if meter else []),
        ],
    )
    for each in add:
        each(server)
    port = network.bind(server, listen, what=what, role=role)
    if port == 0:
        raise EndpointError(f"{what}: the address {listen} cannot be used; it may be in use", IN_USE)
    server.start()
    return server, Endpoint(listen.host, port)


def check(
    listen: Endpoint,
    peers: Mapping[str, Endpoint],
    network: Network,
    *,
    what: str,
    wait: float = 0.0,
    shared: bool = False,
) -> None:
    """Check, before anything takes long, that the port is free and that every peer answers at its address.

    shared: processes that share ports may listen there already. peers: addresses by role. wait: seconds in which they
    may still start; the log says that it waits. Raises EndpointError for the port, PeerLost or TlsError for a peer.
    """
    until = time.monotonic() + wait
    network.check(listen, what=what)
    for name, at in peers.items():
        network.check(at, what=f"the {name}")
    check_free(listen, what=what, shared=shared)
    for name, at in peers.items():
        said = False
        while not _answers(name, at, network):
            if (left := until - time.monotonic()) <= 0:
                hint = f"start it with: unseen {name} --listen {at}"
                raise PeerLost(f"the {name} at {at} cannot be reached", hint)
            if not said:
                log.info("waiting for the %s at %s, %.0f s at most", name, at, left)
                said = True
            time.sleep(min(0.5, left))


def check_free(listen: Endpoint, *, what: str, shared: bool = False) -> None:
    """Raise EndpointError if the port cannot be used. shared: processes that share ports may listen there already."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind((listen.host, listen.port))
        except OSError:
            raise EndpointError(f"{what}: the address {listen} cannot be used; it may be in use", IN_USE) from None


def _answers(name: str, at: Endpoint, network: Network) -> bool:
    try:
        network.probe(at, what=f"the {name}", role=name)
    except PeerLost:
        return False
    return True


def check_owners(peers: Mapping[str, Endpoint], network: Network) -> None:
    """Check that no peer is run by this process's user on this machine; one that cannot be reached is left out.

    peers: addresses by role. Raises InvalidInput. Two machines, or two users, of one owner are not noticed.
    """
    for name, at in peers.items():
        peer = Peer(f"the {name}", at, network, role=name, start=f"unseen {name}")
        try:
            found = ask_status(peer)
        except PeerLost:
            continue
        finally:
            peer.close()
        if found.same_owner:
            raise InvalidInput(
                f"{peer} is run by this user on this machine: who can read both knows every secret",
                "let another organisation run it; to try things out on one machine, add --same-owner",
            )


def run_until_stopped(server: grpc.Server, announce: Callable[[], None]) -> None:
    """Call ``announce``, then block until SIGINT or SIGTERM; running calls get two seconds to end."""
    stopped = Signals(*STOPPING)
    announce()
    stopped.next()
    server.stop(2).wait()


def child(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment that run one of our modules in a process of its own.

    ``-P`` keeps the working directory off the path: a file there with a module's name must not run in its place.
    """
    ours = str(Path(__file__).resolve().parents[2])
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": ours}


def settle() -> None:
    """Prepare this process for queries: freeze the objects that it holds by now, and keep freed memory for reuse.

    Without freezing, Python's garbage collector searches everything that was ever imported or compiled every few
    queries: a pause of 0.3 seconds on a server of all-MiniLM-L6-v2.
    """
    gc.collect()
    gc.freeze()
    reuse_memory()
