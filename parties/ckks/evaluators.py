"""The server's handle for the processes that evaluate: a host, holders of keys, a child for each query (``host``).

The host is started as a program of its own rather than forked, so the threads, channels and listening sockets of the
server's process do not matter: a notebook may serve here and also be a client of other services. It is started again if
it dies.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parties.ckks.pipe import Pipe, send_schedule
from parties.ckks.room import Kept, surplus
from parties.services.hosting import child
from secure.ckks.compile import CkksModel
from secure.errors import Error, ProtocolError

log = logging.getLogger("unseen.evaluators")

PAUSE = 10.0  # seconds between two starts of the host, at least


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
        self._closed = False
        self._start()

    def load(self, caller: str, digest: str, path: Path) -> None:
        """Load a caller's keys into a process of their own, unless one holds them.

        Raises ProtocolError if they are not keys of this Program, or if the process dies of them.
        """
        with self._lock:
            known = self._holders.get((caller, digest))
        if known is not None:
            with known.lock:
                if _lives(known.pipe):
                    known.used = time.monotonic()
                    return
        holder = _Holder(self._forked_holder(), time.monotonic())
        try:
            holder.pipe.send({"path": str(path)})
            _answer(holder.pipe)
        except (EOFError, OSError):
            holder.pipe.close()
            raise ProtocolError("the process that loaded the keys died of them", "make the keys again") from None
        except BaseException:
            holder.pipe.close()
            raise
        with self._lock:
            kept = [Kept(key, key[0], h.used, 1) for key, h in self._holders.items() if key != (caller, digest)]
            for key in [(caller, digest), *surplus(kept, self.most, wanted=1, caller=caller)]:
                if key in self._holders:
                    self._holders.pop(key).pipe.close()
            self._holders[caller, digest] = holder

    def acquire(self, seconds: float) -> bool:
        """Acquire a worker for one query within so many seconds; True if there is one. Then call ``query``."""
        return self._free.acquire(timeout=seconds)

    def query(self, caller: str, digest: str) -> Running:
        """Start a child process for one query with these keys; needs an acquired worker."""
        try:
            with self._lock:
                holder = self._holders.get((caller, digest))
            if holder is None:
                raise Error("the keys were dropped to make room", "ask again")
            try:
                with holder.lock:
                    return Running(_forked(holder.pipe), self._free.release)
            except (EOFError, OSError):
                raise Error("the process that held the keys is gone", "ask again") from None
        except BaseException:
            self._free.release()
            raise

    def close(self) -> None:
        """End the host and the holders; children end with their queries."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        self._drop_holders()
        self._host.close()
        self._process.wait()

    def _drop_holders(self) -> None:
        with self._lock:
            for holder in self._holders.values():
                holder.pipe.close()
            self._holders.clear()

    def _start(self) -> None:
        self._started = time.monotonic()
        ours, theirs = socket.socketpair()
        with theirs:
            command, environment = child("parties.ckks.host", str(theirs.fileno()))
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        self._host = Pipe(ours)
        try:
            program = self._model.program
            send_schedule(self._host, self._model.schedule, program.parameters, list(program.views))
            encoded = _answer(self._host)
        except (EOFError, OSError):
            self._end()
            raise Error("the process that evaluates ended as it began", "the server may be short of memory") from None
        except BaseException:
            self._end()
            raise
        self.seconds, self.bytes = float(encoded["seconds"]), int(encoded["bytes"])

    def _forked_holder(self) -> Pipe:
        """Return the pipe to a new holder; start the host again if it is gone."""
        with self._starting:
            try:
                return _forked(self._host)
            except (EOFError, OSError):
                self._restart()
            try:
                return _forked(self._host)
            except (EOFError, OSError):
                raise Error("the process that evaluates is gone again", f"try again in {PAUSE:g} s") from None

    def _restart(self) -> None:
        wait = self._started + PAUSE - time.monotonic()
        if self._closed or wait > 0:
            raise Error("the process that evaluates is gone", f"try again in {max(1, round(wait))} s")
        log.error("the process that evaluates is gone (status %s); it is started again", self._process.poll())
        self._process.kill()
        self._end()  # holders too: they share the old process's weights, so memory would hold these twice
        self._start()


def _lives(pipe: Pipe) -> bool:
    """Return whether the process at the other end of an idle pipe is there: it says nothing unless it is asked."""
    try:
        pipe.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _forked(pipe: Pipe) -> Pipe:
    """Ask a process to fork another, and return the pipe to that one."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            pipe.send({})
            socket.send_fds(pipe.socket, [b"."], [theirs.fileno()])
            _answer(pipe)
    except BaseException:
        ours.close()
        raise
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
