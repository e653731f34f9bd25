"""A role or a client of the soak as a process of its own, whose mask streams are watched.

    python -m benchmarks.watched PIPE ROLE unseen serve ...
    python -m benchmarks.watched PIPE ROLE ask FILE SEED

Every correlation is read from streams of a key that serves one query. So each key that anything is drawn from is told
to the pipe, as a hash that names it and tells nothing about it: if one comes twice from one role, in whatever process,
correlations were used twice. Keys of weights are left out, as a model has the same mask in all of its queries.
``ask`` is a client: it connects, asks some of the texts in FILE, compares the answers, closes, and does so again until
its standard input ends. It writes a line of JSON about whatever happened to its standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import secure
from protocols.prg import KEY_BYTES, Key, Stream
from secure.deployments.deployment import find
from secure.errors import Error

CLOCK = "WATCHED_CLOCK"  # the variable with the seconds by which a process's time of day is another one
RECORD = 16  # bytes that name a key on the pipe; a write of so few is never torn
OF_WEIGHTS = ("protocols.weights", "protocols.three_party.weights")
NOTHING = bytes(KEY_BYTES)  # the key of a look-up of no rows
CLOSE = 1e-2  # of an answer to that of floating point; those of two texts differ by ten times as much
QUERIES = (2, 8)  # of a session, at least and at most
PAUSE = 1.0  # seconds after a failure
THINKING = 1.5  # seconds between an answer and the next query, on average: eight clients leave room on two cores


def watch(pipe: int, role: str) -> None:
    """Tell the pipe of every key that this process draws from, from now on, and again for an index that comes twice."""
    one, several, drawn = Key.stream, Key.streams, "_drawn"

    def told(key: Key, indices: Iterable[int]) -> None:
        if key.value == NOTHING or sys._getframe(2).f_globals["__name__"] in OF_WEIGHTS:
            return
        known: set[int] = key.__dict__.setdefault(drawn, set())
        for index in indices:
            if not known or index in known:
                os.write(pipe, hashlib.sha256(role.encode() + key.value).digest()[:RECORD])
            known.add(index)

    def stream(key: Key, index: int) -> Stream:
        told(key, (index,))
        return one(key, index)

    def streams(key: Key, sizes: Mapping[int, int]) -> dict[int, Stream]:
        told(key, sizes)
        return several(key, sizes)

    Key.stream, Key.streams = stream, streams  # type: ignore[assignment,method-assign]


OURS = ("parties", "secure", "protocols")
"""The packages whose clock is moved."""


def set_clock(seconds: float) -> None:
    """Move the time of day that ``time.time`` tells our own code, as on a machine whose clock is set.

    Stores read no other. What is not ours keeps the right time, as do waits: gRPC takes a deadline from ``time.time``
    and compares it with the system's own clock, so that it would wait for hours. libfaketime moves all of it, but makes
    sleeps fail and a service several times slower.
    """
    real = time.time

    def moved() -> float:
        ours = sys._getframe(1).f_globals["__name__"].partition(".")[0] in OURS
        return real() + seconds * ours

    time.time = moved


class Ledger:
    """The keys that have come from a pipe. pipe: what ``watch`` writes to, which children inherit."""

    def __init__(self) -> None:
        self._read, self.pipe = os.pipe()
        os.set_inheritable(self.pipe, True)
        self.keys = Counter[bytes]()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with open(self._read, "rb") as records:
            while record := records.read(RECORD):
                self.keys[record] += 1

    def close(self) -> None:
        """End, once all who write have ended."""
        os.close(self.pipe)
        self._thread.join()

    @property
    def twice(self) -> int:
        """How many keys were drawn from again."""
        return sum(count > 1 for count in self.keys.values())


# a client


def ask(work: dict[str, Any], seed: str) -> None:
    """Ask until standard input ends. work: the deployment, its addresses, a directory, texts and their answers.

    Where clients have keys, this one keeps them, also when it is started again: else every session leaves the server
    keys that are never used again, which fill their bounded memory.
    """
    chance = random.Random(int(seed))
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    kind = find(work["deployment"])
    keys = {"keys": Path(work["cache"]) / f"keys-{seed}"} if "keys" in kind.options() else {}
    deployment = kind(**work["given"], **keys).located(work["addresses"])
    answers = torch.tensor(work["answers"], dtype=torch.float64)
    options = {"cache": Path(work["cache"]), "deadline": work["deadline"], "pace": 0.0}
    while not ended.is_set():
        what, begin = "session", time.monotonic()
        try:
            with secure.connect(deployment, **options) as session:
                _say(what, begin, "open")
                for _ in range(chance.randint(*QUERIES)):
                    number = chance.randrange(len(answers))
                    what, begin = "query", time.monotonic()
                    _say("asked", begin, "")
                    (answer,) = session.embed([work["texts"][number]])
                    right = bool(torch.allclose(answer, answers[number], atol=CLOSE, rtol=0))
                    _say(what, begin, "right" if right else "wrong")
                    what, begin = "session", time.monotonic()
                    if ended.wait(chance.expovariate(1 / THINKING)):
                        break
        except Error as error:
            _say(what, begin, type(error).__name__, str(error).splitlines()[0])
            ended.wait(PAUSE)


def _say(what: str, begin: float, outcome: str, why: str = "") -> None:
    said = {"what": what, "begin": begin, "end": time.monotonic(), "outcome": outcome, "why": why}
    print(json.dumps(said), flush=True)


def main() -> None:
    pipe, role, program, *arguments = sys.argv[1:]
    watch(int(pipe), role)
    set_clock(float(os.environ.get(CLOCK, 0)))
    if program == "unseen":
        from parties.cli.main import app_main

        sys.argv = ["unseen", *arguments]
        app_main()
    else:
        file, seed = arguments
        torch.set_num_threads(1)
        ask(json.loads(Path(file).read_text()), seed)


if __name__ == "__main__":
    main()
