"""The processes that evaluate: ``python -m parties.ckks.host`` with a socket of the server's as its only argument.

The *host* holds the encoded weights and reads nothing of clients'. For each client at work it forks a *holder*, which
loads that client's evaluation keys. For each query, or conversation of queries that follow one another, the holder
forks a child, which reads the ciphertexts, computes and ends; with it end the rows that it kept. The backend's library
holds the interpreter's lock, so threads could not run at the same time. All share the weights copy-on-write: holders
and children have them in their memory, and nothing of them travels. Holders and children run under limits of memory and
time, and any of them can die without harm to others. None has threads or gRPC, or imports torch or the compiler.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from parties.ckks.limits import limit, limit_time, loading_seconds
from parties.ckks.pipe import Pipe, receive_schedule
from protocols.ckks import cost
from protocols.ckks.canonical import InvalidCiphertext
from protocols.ckks.evaluate import EncodedWeights, EncryptedRows, evaluate
from protocols.ckks.seal import Context, EvaluationKeys, key_forms, split_keys

log = logging.getLogger("unseen.evaluators")

STEP = 0.25  # seconds between two reports of progress
SLACK = 1 << 30  # bytes of memory beyond what keys or ciphertexts take: pools, and numbers on their way
EVALUATING = 300.0  # seconds of CPU time that a query may take in any case
SLOW = 50  # how many times longer than predicted a query may compute


class Host:
    """The host's main loop: it forks a holder whenever the server asks, until the server is gone."""

    def __init__(self, pipe: Pipe) -> None:
        began = time.perf_counter()
        self.pipe = pipe
        schedule, parameters, self.views = receive_schedule(pipe)
        self.context = Context(parameters)
        self.weights = EncodedWeights(self.context, schedule)
        self.weights.prepare()
        pipe.send({"seconds": time.perf_counter() - began, "bytes": self.weights.bytes})

    def run(self) -> None:
        _fork_whenever_asked(self.pipe, lambda pipe: Holder(self.weights, self.views, pipe).run())


class Holder:
    """One client's process: it loads the client's keys under limits, and forks a child for each query."""

    def __init__(self, weights: EncodedWeights, views: list[str], pipe: Pipe) -> None:
        self.weights, self.views, self.pipe = weights, views, pipe

    def run(self) -> None:
        schedule, context = self.weights.schedule, self.weights.context
        p, steps = context.parameters, schedule.circuit.steps
        header, _ = self.pipe.receive()
        forms = key_forms(p, steps)
        size = sum(form.size for form in forms.values())
        decoded = p.key_memory * (len(steps) + 2)
        limit(2 * decoded + size + SLACK, loading_seconds(size), children=self._memory)
        try:
            keys = split_keys(Path(header["path"]).read_bytes(), forms)
            self.keys = EvaluationKeys(context, keys, steps)
        except InvalidCiphertext as error:
            self.pipe.send({"error": str(error), "invalid": True})
            return
        except Exception as error:
            failed = f"the keys cannot be loaded ({type(error).__name__})\nhint: connect again to upload them"
            self.pipe.send({"error": failed, "invalid": not isinstance(error, (OSError, MemoryError))})
            return
        limit_time(EVALUATING)  # for forking
        self.pipe.send({})
        _fork_whenever_asked(self.pipe, self._compute)

    @property
    def _memory(self) -> int:
        """Bytes that a query may take: a few times those of its ciphertexts."""
        schedule, each = self.weights.schedule, 8 * self.weights.context.parameters.degree
        live = cost.live_ciphertexts(schedule) + cost.kept_polynomials(schedule)
        return 4 * live * each + SLACK

    def _compute(self, pipe: Pipe) -> None:
        """Answer a query; of a model that keeps rows, also those of its conversation that follow."""
        schedule, kept = self.weights.schedule, EncryptedRows()
        queries = schedule.circuit.rows + 1
        expected = queries * cost.seconds(schedule, self.weights.context.parameters)
        limit(self._memory, EVALUATING + SLOW * expected)
        total, told = len(schedule.circuit.nodes), time.perf_counter()

        def progress(done: int, path: str) -> None:
            nonlocal told
            if time.perf_counter() - told > STEP:
                told = time.perf_counter()
                pipe.send({"done": done, "total": total, "path": path})

        try:
            for _ in range(queries):
                _, payloads = pipe.receive()
                run = evaluate(self.weights, self.keys, dict(zip(self.views, payloads, strict=True)), progress, kept)
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


def _fork_whenever_asked(pipe: Pipe, work: Callable[[Pipe], None]) -> None:
    """Fork a process that does ``work`` for each socket that comes; return when the other side is gone."""
    while True:
        try:
            pipe.receive()
            _, descriptors, _, _ = socket.recv_fds(pipe.socket, 1, 1)
        except (EOFError, OSError):
            return
        with socket.socket(fileno=descriptors[0]) as at:
            try:
                forked = os.fork()
            except OSError as error:
                pipe.send({"error": f"no process can be started ({error.strerror})\nhint: try again"})
                continue
            if forked == 0:
                pipe.close()
                _end_with(lambda: work(Pipe(at)))
        pipe.send({})


def _end_with(work: Callable[[], None]) -> None:
    """Run a forked process to its end, because it must not return into its parent's stack."""
    code = 0
    try:
        work()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the server is gone, or needs this process no more
    except BaseException as error:
        log.error("an evaluating process ended: %s", type(error).__name__)
        code = 1
    finally:
        os._exit(code)


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when this ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the weights
    try:
        host = Host(Pipe(socket.socket(fileno=descriptor)))
    except (EOFError, OSError):
        return  # the server is gone already
    host.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
