"""Seconds a token over loopback: client, server and dealer as separate processes, on this machine's cores.

    python -m benchmarks.texts COMPILED [--name NAME] [--prompt 16] [--tokens 30] [--texts 3] [--write]
    python -m benchmarks.texts --shape gpt2 --prompt 32 --tokens 9 [--write]

COMPILED is a directory that ``unseen compile`` wrote. ``--shape``: random weights in the shape of GPT-2 base, compiled
first. Prompts are random token ids: costs depend on none of them. A text's first token is the prompt's query; the
others are steps, each of which prepares the next one while it runs. Processor seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import secure
from benchmarks.common import RESULTS, Service, dealer, machine
from benchmarks.generation import SHAPE, gpt2
from parties.services import hosting
from secure.cost.traffic import OFFLINE, ONLINE


def made(shape: str, prompt: int, directory: Path) -> Path:
    """Compile a model of random weights."""
    compiled = secure.compile_generator(gpt2(), prompt=prompt, capacity=prompt + 32)
    secure.save_compiled(compiled, directory / shape)
    return directory / shape


def processor_seconds(process: int) -> float:
    values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def cost(report: secure.Report) -> dict[str, int]:
    moved = {phase: sum(t.bytes for t in report.traffic if t.phase == phase) for phase in (ONLINE, OFFLINE)}
    return {"rounds": report.rounds, "online bytes": moved[ONLINE], "offline bytes": moved[OFFLINE]}


def measured(directory: Path, prompt: int, tokens: int, texts: int) -> dict[str, Any]:
    dealing = dealer()
    serving = Service(
        "parties.cli", "serve", str(directory), "--listen", "127.0.0.1:0", "--dealer", dealing.address,
        "--same-owner", "--announce",
    )  # fmt: skip
    processes = {"client": os.getpid(), "server": serving.pid, "dealer": dealing.pid}
    at = secure.TwoParty(server=serving.address, dealer=dealing.address)
    firsts, gaps, steps, used = [], [], [], []
    try:
        with secure.connect(at) as session:
            for text in range(texts):
                ids = [random.Random(1000 * text + i).randrange(256) for i in range(prompt)]
                began, came, before = time.perf_counter(), [], dict[str, float]()
                for _ in session.generate(ids, tokens, ignore_end=True):
                    came.append(time.perf_counter())
                    before = before or {name: processor_seconds(p) for name, p in processes.items()}
                firsts.append((came[0] - began, session.reports[-tokens]))
                gaps += [after - first for first, after in itertools.pairwise(came)]
                steps += session.reports[1 - tokens :] if tokens > 1 else []
                used += [{name: processor_seconds(p) - before[name] for name, p in processes.items()}]
    finally:
        serving.stop()
        dealing.stop()

    def median(reports: list[secure.Report], name: str) -> float:
        return round(float(statistics.median(getattr(r, name) for r in reports)), 3)

    prompts = [report for _, report in firsts]
    found: dict[str, Any] = {
        "prompt": {
            "tokens": prompt,
            **cost(prompts[0]),
            "s to the first token": round(statistics.median(s for s, _ in firsts), 2),
            **{f"{phase} s": median(prompts, f"{phase}_seconds") for phase in ("online", "offline", "dealer")},
        },
        "peak MB": {"server": round(serving.peak), "dealer": round(dealing.peak)},
    }
    if steps:
        found["step"] = {
            **cost(steps[0]),
            "s a token": round(statistics.median(gaps), 3),
            "s a token, quartiles": [round(q, 3) for q in statistics.quantiles(gaps, n=4)],
            **{f"{phase} s": median(steps, f"{phase}_seconds") for phase in ("online", "offline", "dealer")},
            "processor s": {
                name: round(statistics.median(u[name] for u in used) / (tokens - 1), 3) for name in processes
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compiled", type=Path, nargs="?")
    parser.add_argument("--shape", choices=[SHAPE])
    parser.add_argument("--name")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/texts.json")
    o = parser.parse_args()
    if (o.compiled is None) == (o.shape is None):
        parser.error("give a compiled model's directory, or --shape")
    hosting.settle()  # as unseen generate does
    with tempfile.TemporaryDirectory() as space:
        directory = o.compiled or made(o.shape, o.prompt, Path(space))
        found = {**machine("benchmarks.texts"), **measured(directory, o.prompt, o.tokens, o.texts)}
    print(json.dumps(found, indent=2))
    if o.write:
        file = RESULTS / "texts.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept[o.name or o.shape or o.compiled.name] = found
        file.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
