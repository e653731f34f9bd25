"""Processes that evaluate on ciphertexts: one forked for each query, sharing weights and keys copy-on-write.

The library of the backend holds the interpreter's lock, so threads would take turns. A *host* process, forked before
any thread of gRPC exists, holds the encoded weights and the evaluation keys of the clients seen last; for each query it
forks a child, which computes and ends. Host and children speak over sockets, in JSON lines and counted bytes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from protocols.ckks.evaluate import Weights, evaluate
from protocols.ckks.seal import Context, EvaluationKeys, InvalidCiphertext
from secure.ckks.compile import Encrypted
from secure.errors import Error, ProtocolError

log = logging.getLogger("unseen.evaluators")

STEP = 0.25  # seconds between two reports of progress
MAXIMUM_MESSAGE = 1 << 32


class InvalidKeys(Error):
    """Keys that are none of this Program's."""

    code = "invalid-keys"


class Channel:
    """Messages over a socket: a JSON header and byte strings."""

    def __init__(self, at: socket.socket) -> None:
        self.socket = at

    def send(self, header: dict[str, Any], payloads: Sequence[bytes] = ()) -> None:
        text = json.dumps({**header, "sizes": [len(p) for p in payloads]}).encode()
        self.socket.sendall(struct.pack("<Q", len(text)) + text)
        for payload in payloads:
            self.socket.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        """EOFError where the other side is gone."""
        (size,) = struct.unpack("<Q", self._exactly(8))
        header = json.loads(self._exactly(size))
        return header, [self._exactly(n) for n in header.pop("sizes")]

    def _exactly(self, size: int) -> bytes:
        if size > MAXIMUM_MESSAGE:
            raise ProtocolError(f"a message of {size} bytes between processes")
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = self.socket.recv_into(view[filled:])
            if not count:
                raise EOFError
            filled += count
        return bytes(data)

    def close(self) -> None:
        self.socket.close()


class Evaluators:
    """The server's handle of its host process. ``workers``: queries computed at a time; ``key_memory``: bytes of
    evaluation keys held decoded.
    """

    def __init__(self, encrypted: Encrypted, *, workers: int, key_memory: int) -> None:
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(workers)
        ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _end_with(lambda: _Host(encrypted, Channel(theirs), key_memory).run())
        theirs.close()
        self._host = Channel(ours)

    def wait_ready(self) -> dict[str, Any]:
        """What encoding the weights took."""
        return self._answer()

    def load(self, digest: str, path: Path) -> None:
        """Have the host hold these keys. Error where they are none of this Program's."""
        with self._lock:
            self._host.send({"do": "load", "digest": digest, "path": str(path)})
            self._answer()

    def acquire(self, seconds: float) -> bool:
        """A worker for one query, within so many seconds; ``query`` or nothing follows."""
        return self._free.acquire(timeout=seconds)

    def query(self, digest: str) -> Running:
        """A child process for one query, with the keys of this digest, for an acquired worker."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                self._host.send({"do": "fork", "digest": digest})
                socket.send_fds(self._host.socket, [b"."], [theirs.fileno()])
                self._answer()
        except BaseException:
            ours.close()
            self._free.release()
            raise
        return Running(Channel(ours), self._free.release)

    def close(self) -> None:
        self._host.close()
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _answer(self) -> dict[str, Any]:
        try:
            header, _ = self._host.receive()
        except (EOFError, OSError):
            raise Error("the process that evaluates is gone", "restart the server") from None
        if "error" in header:
            raise (InvalidKeys if header.get("invalid") else Error)(header["error"])
        return header


class Running:
    """One query's child process: send the inputs, then read messages until the result."""

    def __init__(self, channel: Channel, release: Callable[[], None]) -> None:
        self.channel, self._release = channel, release

    def send(self, payloads: Sequence[bytes]) -> None:
        self.channel.send({}, payloads)

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        try:
            header, payloads = self.channel.receive()
        except (EOFError, OSError):
            raise Error("the evaluation ended without an answer", "the server may be short of memory") from None
        if "error" in header:
            raise ProtocolError(header["error"])
        return header, payloads

    def close(self) -> None:
        """End the child, whatever it does."""
        self.channel.close()
        self._release()


class _Host:
    def __init__(self, encrypted: Encrypted, channel: Channel, key_memory: int) -> None:
        self.encrypted, self.channel = encrypted, channel
        self.parameters, self.steps = encrypted.program.parameters, list(encrypted.program.steps)
        self.most = max(1, key_memory // (self.parameters.key_memory * (len(self.steps) + 1)))
        self.keys: OrderedDict[str, EvaluationKeys] = OrderedDict()

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when this ends
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
        began = time.perf_counter()
        self.context = Context(self.parameters)
        self.weights = Weights(self.context, self.encrypted.schedule)
        self.weights.prepare()
        self.channel.send({"seconds": time.perf_counter() - began, "bytes": self.weights.bytes})
        while True:
            try:
                header, _ = self.channel.receive()
            except (EOFError, OSError):
                return
            if header["do"] == "load":
                self.channel.send(self._load(header["digest"], Path(header["path"])))
            else:
                self._fork(header["digest"])

    def _load(self, digest: str, path: Path) -> dict[str, Any]:
        if digest in self.keys:
            self.keys.move_to_end(digest)
            return {}
        try:
            while len(self.keys) >= self.most:
                self.keys.popitem(last=False)
            self.keys[digest] = EvaluationKeys(self.context, read_keys(path), self.steps)
        except InvalidCiphertext as error:
            return {"error": str(error), "invalid": True}
        except Exception as error:
            failed = f"the keys cannot be loaded ({type(error).__name__})\nhint: connect again to upload them"
            return {"error": failed, "invalid": not isinstance(error, (OSError, MemoryError))}
        return {}

    def _fork(self, digest: str) -> None:
        _, descriptors, _, _ = socket.recv_fds(self.channel.socket, 1, 1)
        with socket.socket(fileno=descriptors[0]) as at:
            if digest not in self.keys:
                self.channel.send({"error": "the keys were dropped to make room\nhint: ask again"})
                return
            if os.fork() == 0:
                self.channel.close()
                _end_with(lambda: _compute(self.weights, self.keys[digest], Channel(at), self.encrypted))
        self.channel.send({})


def _end_with(work: Callable[[], None]) -> None:
    """Run a forked process to its end; it must not return into its parent's stack."""
    code = 0
    try:
        work()
    except BaseException as error:
        log.error("an evaluating process ended: %s", type(error).__name__)
        code = 1
    finally:
        os._exit(code)


def _compute(weights: Weights, keys: EvaluationKeys, channel: Channel, encrypted: Encrypted) -> None:
    total, told = len(encrypted.schedule.circuit.nodes), time.perf_counter()

    def progress(done: int, path: str) -> None:
        nonlocal told
        if time.perf_counter() - told > STEP:
            told = time.perf_counter()
            channel.send({"done": done, "total": total, "path": path})

    try:
        _, payloads = channel.receive()
        inputs = dict(zip(encrypted.program.views, payloads, strict=True))
        run = evaluate(weights, keys, inputs, progress)
        try:
            masked, stage = next(run), 1
            while True:
                channel.send({"refresh": stage}, masked)
                _, answers = channel.receive()
                masked, stage = run.send(answers), stage + 1
        except StopIteration as result:
            channel.send({"result": True}, result.value)
    except InvalidCiphertext as error:
        channel.send({"error": str(error)})
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the client is gone
    except Exception as error:
        channel.send({"error": f"internal error ({type(error).__name__})"})


def write_keys(path: Path, keys: dict[str, bytes]) -> None:
    """A file of named keys: a JSON line, then the bytes of each in its order."""
    header = json.dumps({name: len(data) for name, data in keys.items()}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for data in keys.values():
            file.write(data)


def read_keys(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        sizes = json.loads(file.read(size))
        return {str(name): file.read(count) for name, count in sizes.items()}
