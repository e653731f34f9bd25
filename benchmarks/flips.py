"""Single bytes that change between parties, at random places of queries: is each noticed, and is no answer wrong?

    python -m benchmarks.flips [--tries 1000] [--deployment two-party] [--seed 1] [--write]

All parties of a small text model run in this process, each behind a relay that changes one byte of what passes, in one
direction, without TLS. A try is a session of its own: it connects, the byte changes somewhere in its query, and the
answer, if there is one, is compared with that of floating point. ``noticed``: tries that ended in an error.
``as it should be``: those with the right answer, as the byte was none of a message: of a ping, or of room that HTTP/2
grants. ``wrong``: the rest.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import secure
from benchmarks.common import RESULTS, machine
from secure.deployments.deployment import find
from secure.models.text import text_inputs
from tests.hosts import HOSTS, TinyText, compiled_tiny
from tests.relay import DIRECTIONS, Relay
from tests.tiny import LENGTH, TEXT, write_model

DEADLINE = 2.0  # seconds: a byte of HTTP/2's own may let both sides wait for each other
CLOSE = 2e-2  # of an answer to that of floating point


def tried(deployment: secure.Deployment, expected: torch.Tensor, relay: Relay, way: str, at: int, flips: int) -> str:
    """Change a byte in a session's query; return the name of an error, "right", "wrong" or "not met"."""
    try:
        with secure.connect(deployment, cache=False, deadline=DEADLINE, pace=0.0) as session:
            relay.damage(way, at, flips)
            answer = session.embed([TEXT])[0]
    except secure.Error as error:
        return type(error).__name__ if relay.damaged else "failed before it"
    else:
        met = relay.damaged
    finally:
        relay.heal()
        relay.cut()  # both ends may wait for bytes that a frame of HTTP/2 has announced, until pings find out
    if not met:
        return "not met"
    return "right" if torch.allclose(answer, expected, atol=CLOSE, rtol=0) else "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--deployment", default="two-party", choices=[kind.name for kind in HOSTS])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/flips.json")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # gRPC writes a traceback for a header that is no text
    chance, found, began = random.Random(options.seed), collections.Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        directory = write_model(Path(made) / "tiny")
        compiled = compiled_tiny(directory, find(options.deployment)())
        deployment, relays = HOSTS[type(compiled.deployment)](stack, compiled, Path(made) / "state")
        assert compiled.tokenizer is not None
        with torch.no_grad():
            expected = TinyText().eval()(**text_inputs(compiled.tokenizer, TEXT, LENGTH))[0].double()
        with secure.connect(deployment, cache=False, deadline=20.0, pace=0.0) as session:
            before = {relay: dict(relay.passed) for relay in relays.values()}
            session.embed([TEXT])
        places = [(relay, way, relay.passed[way] - before[relay][way]) for relay in before for way in DIRECTIONS]
        while found.total() - found["not met"] < options.tries:
            (relay, way, size), *_ = chance.choices(places, [size for *_, size in places])
            outcome = tried(deployment, expected, relay, way, chance.randrange(size), chance.randrange(1, 256))
            found[outcome] += 1
    errors = {
        name: count
        for name, count in found.most_common()
        if name not in ("right", "wrong", "not met", "failed before it")
    }
    report: dict[str, Any] = {
        **machine("benchmarks.flips"),
        "noticed": sum(errors.values()),
        "errors": errors,
        "as it should be": found["right"],
        "wrong": found["wrong"],
        "failed before it": found["failed before it"],
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(report, indent=2))
    if options.write:
        path = RESULTS / "flips.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**kept, options.deployment: report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
