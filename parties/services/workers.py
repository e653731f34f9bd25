"""Several processes that serve at one address, and the one that started them and only watches.

They are forked from a process that holds what they share: what it has made by then is in their memory without being
copied, as long as nobody writes to it. gRPC does not survive a fork, so that process never opens a channel or a port
of gRPC's. What needs one before (asking peers whether they are there) runs in a process of its own, ``apart``.

Every worker listens at the same port (SO_REUSEPORT), and the system gives each connection to one of them. A client's
session is one connection, so it stays with one worker.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from parties.net.endpoints import Endpoint
from parties.services.signals import Signals
from secure.errors import EndpointError, Error, from_code

log = logging.getLogger("unseen.workers")

DEATHS, WITHIN = 5, 60.0  # workers that may die in so many seconds and be replaced; with one more, all end
LARGEST = 1 << 16  # bytes that a worker says when it is ready
PAUSE = 0.5  # seconds before a worker that died is replaced
IN_USE = "choose another port, or 0 for any free one; several servers share one if all were given --workers"
_PR_SET_PDEATHSIG = 1

Ready = Callable[[Sequence[str]], None]
"""The function that a worker calls once it listens, with lines about itself."""


@dataclass(frozen=True)
class _Worker:
    """A worker. said: the end of a pipe on which it says in one line that it is ready, or why it cannot be."""

    pid: int
    said: int


def supervise(count: int, work: Callable[[Ready], None], announce: Callable[[Sequence[str]], None]) -> None:
    """Fork ``count`` workers, and replace each that dies, until SIGINT or SIGTERM, which are passed on to them.

    work: what a worker does. It calls its argument when it listens, and returns when it was told to end. announce:
    called when all of them are ready, with the lines of one of them. Raises Error if a worker cannot start, or if
    workers keep dying.
    """
    require_single_thread()
    caught = Signals(signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    workers = [_forked(work) for _ in range(count)]
    died: deque[float] = deque(maxlen=DEATHS + 1)
    try:
        lines = [_when_ready(worker) for worker in workers]
        announce(lines[0])
        stopping = False
        while workers:
            if (number := caught.next()) != signal.SIGCHLD:
                stopping = True
                _tell(workers, number)
                continue
            for worker in [worker for worker in workers if _has_ended(worker)]:
                workers.remove(worker)
                if stopping:
                    continue
                died.append(time.monotonic())
                if len(died) > DEATHS and died[-1] - died[0] < WITHIN:
                    raise Error(f"{len(died)} workers died in {WITHIN:.0f} s", "see their log, above")
                log.error("a worker died; another takes its place")
                time.sleep(PAUSE)
                workers.append(_forked(work))
    finally:
        _tell(workers, signal.SIGTERM)
        _tell(workers, signal.SIGTERM)  # twice: at once
        for worker in workers:
            os.waitpid(worker.pid, 0)
            os.close(worker.said)


def require_single_thread() -> None:
    """Raise Error if this process runs several Python threads: only one of them would live on in a fork."""
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others or threading.current_thread() is not threading.main_thread():
        raise Error(
            f"workers cannot be forked from a process with several threads ({', '.join(others)})",
            "serve a directory that `unseen compile` wrote",
        )


def _forked(work: Callable[[Ready], None]) -> _Worker:
    reading, writing = os.pipe()
    ours = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        os.close(writing)
        return _Worker(pid, reading)
    os.close(reading)
    _run(lambda say: work(lambda lines: say({"about": list(lines)})), writing, ours)


def _run(work: Callable[[Callable[[object], None]], None], writing: int, parent: int) -> NoReturn:
    """Do a forked process's work, and end it without returning into its parent's stack."""

    def say(what: object) -> None:
        with suppress(BrokenPipeError):  # nobody reads what a worker that took another's place says
            os.write(writing, json.dumps(what).encode()[: LARGEST - 1] + b"\n")

    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        _end_with_parent(parent)
        work(say)
        code = 0
    except Error as error:
        say({"code": error.code, "error": str(error)})
        log.error("a worker ended: %s", str(error).replace("\n", "; "))
    except BaseException as error:
        say({"code": Error.code, "error": f"internal error ({type(error).__name__})"})
        log.error("a worker ended: %s", type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _end_with_parent(parent: int) -> None:
    """Have the system send SIGTERM to this process when its parent dies. Without Linux, it does nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _when_ready(worker: _Worker) -> list[str]:
    """Wait until a worker listens; return what it says. Raises Error if it cannot."""
    said = b""
    while not said.endswith(b"\n") and len(said) < LARGEST and (part := os.read(worker.said, LARGEST)):
        said += part
    if not said.endswith(b"\n"):
        raise Error("a worker died before it was ready", "see its log, above")
    found = json.loads(said)
    if "error" in found:
        raise from_code(found["code"], found["error"])
    return list(found["about"])


def _has_ended(worker: _Worker) -> bool:
    pid, _ = os.waitpid(worker.pid, os.WNOHANG)
    if pid:
        os.close(worker.said)
    return bool(pid)


def _tell(workers: Sequence[_Worker], number: int) -> None:
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, number)


def apart(work: Callable[[], None]) -> None:
    """Do some work in a process of its own, so that what it leaves behind (gRPC's threads) is not here.

    Raises the Error that it raises.
    """
    require_single_thread()

    def told(ready: Ready) -> None:
        work()
        ready([])

    worker = _forked(told)
    try:
        _when_ready(worker)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)  # gRPC may take its time to end
        os.waitpid(worker.pid, 0)
        os.close(worker.said)


@contextmanager
def reserved(at: Endpoint, *, what: str) -> Iterator[Endpoint]:
    """Hold a port for processes that share it, without listening at it; yields the endpoint with its real port.

    Others can listen there too only if they share ports themselves, and run as the same user. Raises EndpointError.
    """
    port = at.port
    with ExitStack() as stack:
        for address in at.resolved():
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                held = stack.enter_context(socket.socket(family))
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                held.bind((address, port))
            except OSError:
                if port and address != at.resolved()[0]:
                    continue  # as where one listens alone: an address that this machine does not have is left out
                raise EndpointError(f"{what}: the address {at} cannot be used; it may be in use", IN_USE) from None
            port = held.getsockname()[1]
        yield Endpoint(at.host, port)


def share_of(cores: int | None, workers: int) -> int:
    """Return the cores of one of several workers, one at least."""
    return max(1, math.floor((cores or 1) / workers))
