"""Fuzzing of the parsers of bytes from outside: ``python -m tests.fuzz TARGET --seconds N`` (or ``all``).

With the package ``atheris`` (libFuzzer) and ``--atheris`` it is guided by coverage; else it changes real files: bits,
lengths, splices, and values inside JSON documents. It reports how many it tried, and stops at a crash with its bytes.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz_targets import SLOW, TARGETS, Target, document

NUMBERS = [
    -(10**12),
    -(1 << 63),
    -2,
    -1,
    0,
    1,
    2,
    3,
    63,
    64,
    65,
    257,
    1 << 20,
    1 << 30,
    10**12,
    1 << 64,
    10**40,
    0.5,
    1e300,
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "\x1b[31m",
    "[/x]",
    "9" * 600,
    [],
    [[]],
    {},
    {"x": 1},
    [0] * 300,
    [1 << 62],
]
MEMORY = 6 << 30  # bytes of address space


def changed_document(value: Any, rng: random.Random) -> Any:
    """A JSON document with one place changed: another number or kind, an entry less, twice, or from elsewhere."""
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        at = stack.pop()
        inner = list(at.items()) if isinstance(at, dict) else list(enumerate(at)) if isinstance(at, list) else []
        places += [(at, key) for key, _ in inner]
        stack += [child for _, child in inner]
    if not places:
        return copy.deepcopy(rng.choice(OTHERS))
    at, key = rng.choice(places)
    match rng.randrange(6):
        case 0 | 1:
            at[key] = rng.choice(NUMBERS)
        case 2:
            at[key] = copy.deepcopy(rng.choice(OTHERS))
        case 3:
            del at[key]
        case 4 if isinstance(at, list):
            at.insert(key, copy.deepcopy(at[key]))
        case _:
            other, place = rng.choice(places)
            fits = place in other if isinstance(other, dict) else place < len(other)
            at[key] = copy.deepcopy(other[place]) if fits else rng.choice(NUMBERS)
    return value


def mutant(seeds: list[bytes], rng: random.Random) -> bytes:
    """A changed copy of a real file."""
    data = rng.choice(seeds)
    if data[:1] in b"{[" and rng.random() < 0.8 and (found := document(data)) is not None:
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            found = changed_document(found, rng)
            if isinstance(found, dict) and isinstance(graph := found.get("client_graph"), str) and rng.random() < 0.3:
                inner = document(graph.encode())
                found["client_graph"] = json.dumps(changed_document(inner, rng)) if inner is not None else graph
        try:
            return json.dumps(found).encode()
        except (ValueError, RecursionError):
            return data
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + rng.choice([1, 2, 8, 64])] = b""
            case 2:
                out[at:at] = rng.randbytes(rng.choice([1, 4, 8, 64]))
            case 3:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                out[at : at + 16] = other[start : start + rng.choice([4, 16, 256])]
            case _:
                out[at : at + 8] = rng.choice([0, 1, 127, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]).to_bytes(8, "little")
    return bytes(out)


def attempt(found: Target, data: bytes) -> bool:
    """Run a target once, and raise AssertionError if it takes too long."""
    start = time.process_time()
    accepted = found.accepts(data)
    taken = time.process_time() - start
    assert taken < SLOW, f"{found.name}: {len(data)} bytes took {taken:.1f} s"
    return accepted


def fuzz(found: Target, seconds: float, seed: int = 0) -> tuple[int, int]:
    """Try mutants for so long; return how many were tried and how many of them were accepted."""
    rng, seeds, tried, accepted = random.Random(seed), found.seeds(), 0, 0
    assert all(attempt(found, data) for data in seeds), f"{found.name}: a real file is refused"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutant(seeds, rng)
        tried += 1
        try:
            accepted += attempt(found, data)
        except BaseException:
            Path(f"crash-{found.name}.bin").write_bytes(data)
            raise
    return tried, accepted


def guided(found: Target, seconds: float) -> None:
    """Let atheris find inputs; it ends the process."""
    atheris: Any = importlib.import_module("atheris")

    corpus = Path(f"corpus-{found.name}")
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(found.seeds()):
        (corpus / f"seed-{number}").write_bytes(data)
    run: Callable[[bytes], bool] = found.accepts
    atheris.instrument_all()
    arguments = [sys.argv[0], str(corpus), f"-max_total_time={int(seconds)}", "-timeout=20", "-rss_limit_mb=6000"]
    atheris.Setup(arguments, lambda data: run(data) and None)
    atheris.Fuzz()


def main() -> None:
    """Fuzz the targets that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=["all", *TARGETS])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; one target")
    given = parser.parse_args()
    if given.atheris:
        guided(TARGETS[given.target], given.seconds)
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name in TARGETS if given.target == "all" else [given.target]:
        tried, accepted = fuzz(TARGETS[name], given.seconds, given.seed)
        print(f"{name}: {tried} inputs in {given.seconds:g} s, {accepted} accepted, no crash", flush=True)


if __name__ == "__main__":
    main()
