"""The process that evaluates: ``python -m parties.ckks.host`` with a socket of the server's as its only argument.

It holds the encoded weights, and the evaluation keys of the most recent clients. For each query it forks a child, which
shares both copy-on-write, computes and ends: the backend's library holds the interpreter's lock, so threads could not
run at the same time. This process has one thread and no gRPC, and imports neither torch nor the compiler.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parties.ckks.key_file import read_keys
from parties.ckks.pipe import Pipe, receive_schedule
from protocols.ckks.evaluate import EncodedWeights, evaluate
from protocols.ckks.seal import Context, EvaluationKeys, InvalidCiphertext

log = logging.getLogger("unseen.evaluators")

STEP = 0.25  # seconds between two reports of progress


class Host:
    """The process's main loop: it answers the server's messages until the server is gone.

    key_memory: the most bytes of keys held decoded.
    """

    def __init__(self, pipe: Pipe, key_memory: int) -> None:
        began = time.perf_counter()
        self.pipe = pipe
        schedule, parameters, self.views = receive_schedule(pipe)
        self.steps = schedule.circuit.steps
        self.most = max(1, key_memory // (parameters.key_memory * (len(self.steps) + 1)))
        self.keys: OrderedDict[str, EvaluationKeys] = OrderedDict()
        self.context = Context(parameters)
        self.weights = EncodedWeights(self.context, schedule)
        self.weights.prepare()
        pipe.send({"seconds": time.perf_counter() - began, "bytes": self.weights.bytes})

    def run(self) -> None:
        while True:
            try:
                header, _ = self.pipe.receive()
            except (EOFError, OSError):
                return
            if header["do"] == "load":
                self.pipe.send(self._load(header["digest"], Path(header["path"])))
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
        _, descriptors, _, _ = socket.recv_fds(self.pipe.socket, 1, 1)
        with socket.socket(fileno=descriptors[0]) as at:
            if digest not in self.keys:
                self.pipe.send({"error": "the keys were dropped to make room\nhint: ask again"})
                return
            if os.fork() == 0:
                self.pipe.close()
                _end_with(lambda: self._compute(self.keys[digest], Pipe(at)))
        self.pipe.send({})

    def _compute(self, keys: EvaluationKeys, pipe: Pipe) -> None:
        total, told = len(self.weights.schedule.circuit.nodes), time.perf_counter()

        def progress(done: int, path: str) -> None:
            nonlocal told
            if time.perf_counter() - told > STEP:
                told = time.perf_counter()
                pipe.send({"done": done, "total": total, "path": path})

        try:
            _, payloads = pipe.receive()
            run = evaluate(self.weights, keys, dict(zip(self.views, payloads, strict=True)), progress)
            try:
                masked, stage = next(run), 1
                while True:
                    pipe.send({"refresh": stage}, masked)
                    _, answers = pipe.receive()
                    masked, stage = run.send(answers), stage + 1
            except StopIteration as result:
                pipe.send({"result": True}, result.value)
        except InvalidCiphertext as error:
            pipe.send({"error": str(error)})
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the client is gone
        except Exception as error:
            pipe.send({"error": f"internal error ({type(error).__name__})"})


def _end_with(work: Callable[[], None]) -> None:
    """Run a forked process to its end, because it must not return into its parent's stack."""
    code = 0
    try:
        work()
    except BaseException as error:
        log.error("an evaluating process ended: %s", type(error).__name__)
        code = 1
    finally:
        os._exit(code)


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when this ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    pipe = Pipe(socket.socket(fileno=descriptor))
    try:
        header, _ = pipe.receive()
        host = Host(pipe, header["key_memory"])
    except (EOFError, OSError):
        return  # the server is gone already
    host.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
