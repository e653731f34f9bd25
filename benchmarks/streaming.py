"""The clients of ``benchmarks.throughput``: processes that stream texts through a session, and say what that took.

    python -m benchmarks.streaming --server HOST:PORT --dealer HOST:PORT --texts 64 [--alone]

A client connects, runs two queries to warm up, prints a line, and begins when it reads one. ``--alone``: it asks one
text at a time, each when the answer before has come, and says how long each took.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from typing import Any

import secure
from benchmarks import common
from secure.tasks.embed import Embed

DEADLINE = 600.0  # seconds; a bulk client may keep the server for long


def sentence(number: int) -> str:
    """A text of its own for each number, of about twenty tokens."""
    return f"sentence number {number} tells of cats and dogs and of the weather in the north"


def stream(session: secure.Session, texts: Iterable[str]) -> dict[str, Any]:
    """Embed all texts as a bulk client does, the next query prepared while one runs."""
    start, used = time.perf_counter(), time.process_time()
    for number, answer in enumerate(session.stream(Embed(), texts)):
        if isinstance(answer, secure.Error):
            raise SystemExit(f"text {number}: {answer}")
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    return {"seconds": seconds, "processor s": processor}


def alone(session: secure.Session, texts: Iterable[str]) -> dict[str, Any]:
    """Embed one text after the other, each by a call of its own."""
    each, used = [], time.process_time()
    for text in texts:
        start = time.perf_counter()
        session.embed([text])
        each.append(time.perf_counter() - start)
    return {"seconds": sum(each), "processor s": time.process_time() - used, "each s": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--dealer", required=True)
    parser.add_argument("--texts", type=int, required=True)
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    deployment = secure.TwoParty(server=options.server, dealer=options.dealer)
    with secure.connect(deployment, deadline=DEADLINE) as session:
        for _ in session.stream(Embed(), [sentence(n) for n in range(2 * session.batch)]):
            pass
        print(json.dumps({"batch": session.batch, "traffic": session.reports[-1].as_dict()["traffic"]}), flush=True)
        if not sys.stdin.readline():
            return  # the benchmark has ended
        texts = map(sentence, range(options.texts))
        found = (alone if options.alone else stream)(session, texts)
        print(json.dumps({**found, "peak MB": round(common.peak())}), flush=True)
        sys.stdin.readline()  # so that its end disturbs nobody's measurement


if __name__ == "__main__":
    main()
