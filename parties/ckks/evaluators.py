"""The server's handle for the process that evaluates (``host``), and for its children, one for each query.

The process is started as a program of its own rather than forked, so the threads, channels and listening sockets of the
server's process do not matter: a notebook may serve here and also be a client of other services.
"""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parties.ckks.pipe import Pipe, send_schedule
from parties.net.hosting import child
from secure.ckks.compile import CkksModel
from secure.errors import Error, ProtocolError


class Evaluators:
    """The process that evaluates. The constructor starts it and waits until the weights are encoded.

    workers: queries computed at a time. key_memory: bytes of evaluation keys held decoded. seconds, bytes: the time and
    memory that encoding the weights took.
    """

    def __init__(self, model: CkksModel, *, workers: int, key_memory: int) -> None:
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(workers)
        ours, theirs = socket.socketpair()
        with theirs:
            command, environment = child("parties.ckks.host", str(theirs.fileno()))
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        self._host = Pipe(ours)
        try:
            with _while_it_runs():
                self._host.send({"key_memory": key_memory})
                send_schedule(self._host, model.schedule, model.program.parameters, list(model.program.views))
                encoded = self._answer()
        except BaseException:
            self.close()
            raise
        self.seconds, self.bytes = float(encoded["seconds"]), int(encoded["bytes"])

    def load(self, digest: str, path: Path) -> None:
        """Load keys into the process; raises ProtocolError if they are not keys of this Program."""
        with self._lock, _while_it_runs():
            self._host.send({"do": "load", "digest": digest, "path": str(path)})
            self._answer()

    def acquire(self, seconds: float) -> bool:
        """Acquire a worker for one query within so many seconds; True if there is one. Then call ``query``."""
        return self._free.acquire(timeout=seconds)

    def query(self, digest: str) -> Running:
        """Start a child process for one query with the keys of this digest; needs an acquired worker."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock, _while_it_runs():
                self._host.send({"do": "fork", "digest": digest})
                socket.send_fds(self._host.socket, [b"."], [theirs.fileno()])
                self._answer()
        except BaseException:
            ours.close()
            self._free.release()
            raise
        return Running(Pipe(ours), self._free.release)

    def close(self) -> None:
        """End the process; its children end with their queries."""
        self._host.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        header, _ = self._host.receive()
        if "error" in header:
            kind = ProtocolError if header.get("invalid") else Error
            raise kind(header["error"])
        return header


@contextmanager
def _while_it_runs() -> Iterator[None]:
    """Turn a broken connection to the process into an Error."""
    try:
        yield
    except (EOFError, OSError):
        raise Error("the process that evaluates is gone", "restart the server") from None


class Running:
    """One query's child process: send the inputs, then read messages until the result."""

    def __init__(self, pipe: Pipe, release: Callable[[], None]) -> None:
        self._pipe, self._release = pipe, release

    def send(self, payloads: Sequence[bytes]) -> None:
        self._pipe.send({}, payloads)

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
