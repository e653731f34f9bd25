"""The server's handle for the processes that evaluate: a host, holders of keys, a child for each query (``host``).

The host is started as a program of its own rather than forked, so the threads, channels and listening sockets of the
server's process do not matter: a notebook may serve here and also be a client of other services. It is started again
as soon as it dies, and where it is frozen as soon as it is needed.
"""

from __future__ import annotations

import logging
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parties.ckks.limits import loading_seconds
from parties.ckks.pipe import Pipe, send_schedule
from parties.ckks.room import Kept, surplus
from parties.services.hosting import child
from secure.ckks.compile import CkksModel
from secure.errors import Error, ProtocolError, QueryError

log = logging.getLogger("unseen.evaluators")

PAUSE = 10.0  # seconds between two starts of the host, at least
ANSWERING = 30.0  # seconds that the host, or a holder, may take to fork a process
ENCODING = 3600.0  # seconds that the host may take to encode the weights
SILENT = 300.0  # seconds between two words of a process that computes: with none, it is frozen
WAITED = 300.0  # seconds that loading keys may take longer than its CPU time: other processes compute as well


@dataclass(eq=False)
class _Holder:
    """A process that holds one client's keys."""

    pipe: Pipe
    used: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Evaluators:
    """The processes that evaluate. The constructor starts the host, and waits until the weights are encoded.

    workers: queries computed at a time. key_memory: bytes of evaluation keys held decoded. seconds, bytes: the time and
    memory that encoding the weights took.
    """

    def __init__(self, model: CkksModel, *, workers: int, key_memory: int) -> None:
        self._model = model
        program = model.program
        self.most = max(1, key_memory // (program.parameters.key_memory * (len(program.steps) + 1)))  # holders
        self._free = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()  # of the holders
        self._holders: dict[tuple[str, str], _Holder] = {}
        self._starting = threading.Lock()  # of the host
        self._closed = threading.Event()
        self._start()
        threading.Thread(target=self._watch, name="unseen-evaluators", daemon=True).start()

    def load(self, caller: str, digest: str, path: Path) -> None:
        """Load a caller's keys into a process of their own, unless one holds them.

        Raises ProtocolError if they are not keys of this Program, or if the process dies of them; Error if it takes too
        long. If the host was started again meanwhile, nobody holds them, and ``query`` says so.
        """
        with self._lock:
            known = self._holders.get((caller, digest))
        if known is not None:
            with known.lock:
                if _lives(known.pipe):
                    known.used = time.monotonic()
                    return
        host, pipe = self._forked_holder()
        holder = _Holder(pipe, time.monotonic())
        limit = loading_seconds(self._model.program.key_bytes) + WAITED
        try:
            holder.pipe.socket.settimeout(limit)
            holder.pipe.send({"path": str(path)})
            _answer(holder.pipe)
            holder.pipe.socket.settimeout(ANSWERING)
        except TimeoutError:  # which says nothing about the keys
            holder.pipe.close()
            raise Error(f"the keys were not loaded within {limit:.0f} s", "ask again, when less is running") from None
        except (EOFError, OSError):
            holder.pipe.close()
            raise ProtocolError("the process that loaded the keys died of them", "make the keys again") from None
        except BaseException:
            holder.pipe.close()
            raise
        with self._lock:
            if host.closed:  # this holder shares its weights, which would be in memory twice
                holder.pipe.close()
                return
            kept = [Kept(key, key[0], h.used, 1) for key, h in self._holders.items() if key != (caller, digest)]
            for key in [(caller, digest), *surplus(kept, self.most, wanted=1, caller=caller)]:
                if key in self._holders:
                    self._holders.pop(key).pipe.close()
            self._holders[caller, digest] = holder

    def acquire(self, seconds: float) -> bool:
        """Acquire a worker for one query within so many seconds; True if there is one. Then call ``query``."""
        return self._free.acquire(timeout=seconds)

    def query(self, caller: str, digest: str) -> Running:
        """Start a child process for one query with these keys; needs an acquired worker.

        Raises QueryError if no process holds them any more: they can be loaded again.
        """
        try:
            with self._lock:
                holder = self._holders.get((caller, digest))
            if holder is None:
                raise QueryError("no process holds the keys any more", "ask again")
            try:
                with holder.lock:
                    return Running(_forked(holder.pipe), self._free.release)
            except (EOFError, OSError):
                self._drop(caller, digest, holder)
                raise QueryError("the process that held the keys is gone", "ask again") from None
        except BaseException:
            self._free.release()
            raise

    def close(self) -> None:
        """End the host and the holders; children end with their queries."""
        self._closed.set()
        self._end()
        with self._starting:  # whoever starts another host at this moment ends it
            pass

    def _end(self) -> None:
        with suppress(OSError):  # who waits for it now waits no longer
            self._host.socket.shutdown(socket.SHUT_RDWR)
        self._host.close()  # before the holders go: one that is loaded after that is not kept
        self._drop_holders()
        self._process.kill()  # while it encodes, or is frozen, it would not see the end of its socket
        self._process.wait()

    def _drop(self, caller: str, digest: str, holder: _Holder) -> None:
        """Forget a holder, unless another has taken its place."""
        with self._lock:
            if self._holders.get((caller, digest)) is holder:
                del self._holders[caller, digest]
        holder.pipe.close()

    def _drop_holders(self) -> None:
        with self._lock:
            for holder in self._holders.values():
                holder.pipe.close()
            self._holders.clear()

    def _start(self) -> None:
        """Start a host, and wait until it has encoded the weights. Raises Error if there is none in the end."""
        self._started = time.monotonic()
        self._process, self._host = _launched()
        try:
            if self._closed.is_set():  # ``close`` may not have seen this host
                raise Error("the server is closed")
            self._host.socket.settimeout(ENCODING)
            program = self._model.program
            send_schedule(self._host, self._model.schedule, program.parameters, list(program.views))
            encoded = _answer(self._host)
            self._host.socket.settimeout(ANSWERING)
        except (EOFError, OSError):
            self._end()
            raise Error(
                f"the process that evaluates ended as it began, or took more than {ENCODING:.0f} s",
                "the server may be short of memory",
            ) from None
        except BaseException:
            self._end()
            raise
        self.seconds, self.bytes = float(encoded["seconds"]), int(encoded["bytes"])

    def _forked_holder(self) -> tuple[Pipe, Pipe]:
        """Return the pipes to the host and to a new holder of it; start the host again if it is gone."""
        with self._starting:
            try:
                return self._host, _forked(self._host)
            except (EOFError, OSError):
                self._restart()
            try:
                return self._host, _forked(self._host)
            except (EOFError, OSError):
                raise Error("the process that evaluates is gone again", "try again") from None

    def _watch(self) -> None:
        """Start the host again whenever it ends, so that the next client need not wait for the weights."""
        while not self._closed.is_set():
            process = self._process
            process.wait()
            with self._starting:
                if process is not self._process:
                    continue  # somebody needed it earlier
                try:
                    self._restart()
                except (Error, OSError, MemoryError) as error:  # it is tried again
                    if not self._closed.is_set():
                        log.error("%s", str(error).replace("\n", "; ") or type(error).__name__)

    def _restart(self) -> None:
        """Start the host again, PAUSE seconds after its last start at the earliest; who asks waits until then."""
        status = self._process.poll()
        if not self._closed.wait(max(0.0, self._started + PAUSE - time.monotonic())):
            log.error("the process that evaluates is gone (status %s); it is started again", status)
        if self._closed.is_set():
            raise Error("the server is closed")
        self._end()  # holders too: they share the old process's weights, so memory would hold these twice
        self._start()


def _lives(pipe: Pipe) -> bool:
    """Return whether the process at the other end of an idle pipe is there: it says nothing unless it is asked."""
    said = select.poll()
    try:
        said.register(pipe.socket, select.POLLIN)
    except ValueError:  # it is closed
        return False
    return not said.poll(0)


def _pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a socket. Raises Error if there are no descriptors: no fault of the other process."""
    try:
        return socket.socketpair()
    except OSError as error:
        raise Error(f"the server cannot open a socket ({error.strerror})", "try again, when less is running") from None


def _launched() -> tuple[subprocess.Popen[bytes], Pipe]:
    """Launch a host, and return it and the pipe to it. Raises Error if the system starts no process."""
    ours, theirs = _pair()
    with theirs:
        command, environment = child("parties.ckks.host", str(theirs.fileno()))
        try:
            return subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()]), Pipe(ours)
        except OSError as error:
            ours.close()
            raise Error(
                f"the process that evaluates cannot be started ({error.strerror})", "the server may be short of memory"
            ) from None


def _forked(pipe: Pipe) -> Pipe:
    """Ask a process to fork another, and return the pipe to that one.

    Raises EOFError or OSError if that process is gone, Error if it lives and forks none.
    """
    ours, theirs = _pair()
    try:
        with theirs:
            pipe.send({})
            socket.send_fds(pipe.socket, [b"."], [theirs.fileno()])
            _answer(pipe)
    except BaseException:
        ours.close()
        raise
    ours.settimeout(SILENT)
    return Pipe(ours)


def _answer(pipe: Pipe) -> dict[str, Any]:
    header, _ = pipe.receive()
    if "error" in header:
        kind = ProtocolError if header.get("invalid") else Error
        raise kind(header["error"])
    return header


class Running:
    """One query's child process: send the inputs, then read messages until the result."""

    def __init__(self, pipe: Pipe, release: Callable[[], None]) -> None:
        self._pipe, self._release = pipe, release

    def send(self, payloads: Sequence[bytes]) -> None:
        try:
            self._pipe.send({}, payloads)
        except OSError:
            raise Error("the evaluation ended without an answer", "the server may be short of memory") from None

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        try:
            header, payloads = self._pipe.receive()
        except (EOFError, OSError):
            raise Error("the evaluation ended without an answer", "the server may be short of memory") from None
        if "error" in header:
            raise ProtocolError(header["error"])
        return header, payloads

    def close(self) -> None:
        """End the child, even if it still computes, and release its worker."""
        self._pipe.close()
        self._release()
