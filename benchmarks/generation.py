"""A decoder's text against floating point, token by token; rounds, bytes and seconds of a step, in process.

    python -m benchmarks.generation DIRECTORY [--text "Once upon a time" ...] [--tokens 100] [--capacity 128]
        [--prompt 16] [--deployment two-party] [--network lan] [--draft-length 4 [--draft DIRECTORY]]
        [--costs [--capacities 32 128 512 1024] [--write]]
    python -m benchmarks.generation gpt2 --costs --capacities 32 128 512 1023 --write

DIRECTORY is a causal language model as save_pretrained of transformers writes it, with its tokenizer; gpt2: random
weights in the shape of GPT-2 base. A token that differs ends the comparison of its text: what follows has another past.
``gap``: by how much the best score of the float model exceeds the second best at the closest token. --costs: counts a
step at several capacities, without running, beside what ``growth`` predicts from the one before. --write: keep them in
benchmarks/results/steps.json, of which ``benchmarks.pictures`` draws a picture. --draft-length: with
passes over so many tokens, whose guesses are those of --draft, or of the model itself.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secure
from benchmarks.common import RESULTS, machine
from protocols.two_party import Open
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.deployment import find
from secure.deployments.generator import written
from secure.models.causal import load_language_model
from secure.mpc.program import Program

TEXTS = ("Once upon a time", "Lily and Tom", "The dog was", "One day, a little girl", "There was a big red ball")
CAPACITIES = (32, 128, 512, 1024)
SHAPE = "gpt2"


def expected(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], float]:
    """The tokens that float64 chooses, each from the whole text, and the smallest gap between the best two scores."""
    found: Any = model.double()
    ids, gap = list(prompt), float("inf")
    with torch.no_grad():
        for _ in range(count):
            best = found(torch.tensor([ids])).logits[0, -1].topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
    model.float()
    return ids[len(prompt) :], gap


def compared(
    session: secure.Session, model: nn.Module, tokenizer: Any, text: str, count: int, draft: nn.Module | None = None
) -> dict[str, Any]:
    """Write ``count`` tokens and compare them; median costs are those of steps, or with a draft mostly of passes."""
    prompt, before = tokenizer(text)["input_ids"], len(session.reports)
    began = time.perf_counter()
    written = session.generate(prompt, count, ignore_end=True, draft=draft).complete()
    found, seconds, steps = written.ids, time.perf_counter() - began, session.reports[before + 1 :]
    wanted, gap = expected(model, prompt, count)
    same = next((i for i, (x, y) in enumerate(zip(found, wanted, strict=True)) if x != y), count)
    return {
        "text": text,
        "tokens": len(prompt),
        "same": f"{same} of {count}",
        "gap": round(gap, 5),
        "agreed": f"{written.agreed} of {written.drafted}",
        "rounds a token": round(sum(r.rounds for r in steps) / (count - 1), 1),
        "online kB a token": round(sum(r.bytes(phase=ONLINE) for r in steps) / (count - 1) / 1e3, 1),
        "dealt kB a token": round(sum(r.bytes(phase=OFFLINE) for r in steps) / (count - 1) / 1e3, 1),
        "s a token": round(seconds / count, 4),
        "online s": round(statistics.median(r.online_seconds for r in steps), 4),
        "dealing s": round(statistics.median(r.dealer_seconds for r in steps), 4),
        "written": tokenizer.decode(found),
    }


def step_cost(compiled: secure.Compiled, length: int = 1) -> dict[str, Any]:
    """Count a step, or the Program of another length, such as a pass."""
    cost = next(size.cost for size in compiled.sizes if size.program.labels["length"] == str(length))
    online, dealt = (cost.bytes(phase=phase) for phase in (ONLINE, OFFLINE))
    return {"rounds": cost.rounds, "online bytes": online, "dealt bytes": dealt}


def growth(program: Program) -> float:
    """Predict by how many online bytes a step grows with each row that it reads, from its own openings.

    Scores and their exponentials are opened, both ways: one number each for a head and a row; and about a byte of
    single bits.
    """
    opened, rows = 0.0, program.rows + 1
    for p in (i.protocol for i in program.circuit if isinstance(i.protocol, Open)):
        heads, each = p.shape[1] if len(p.shape) > 3 else 1, math.prod(p.shape)
        if len(p.shape) > 3 and rows <= each // heads < 1.02 * rows + 2:  # long rows are cut into equal parts
            opened += heads * (2 * p.ring / 8 + 0.5)
    return opened


def gpt2() -> nn.Module:
    """Random weights in the shape of GPT-2 base."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config())
    return model.eval()


def steps(model: nn.Module, capacities: list[int], given: dict[str, Any]) -> list[dict[str, Any]]:
    """The cost of a step at several capacities, and what is predicted from the next smaller one."""
    found = list[dict[str, Any]]()
    for capacity in capacities:
        compiled = secure.compile_generator(model, capacity=capacity, calibration=written(model, capacity)[:2], **given)
        step = next(size.program for size in compiled.sizes if size.program.kept_rows == 1)
        row = {"capacity": capacity, **step_cost(compiled), "bytes a row": round(growth(step), 1)}
        if given["draft_length"]:
            row["pass"] = step_cost(compiled, given["draft_length"])
        if found:
            last = found[-1]
            row["predicted online bytes"] = round(
                last["online bytes"] + last["bytes a row"] * (capacity - last["capacity"])
            )
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", nargs="+", default=list(TEXTS))
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--capacity", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--deployment", default="two-party")
    parser.add_argument("--network")
    parser.add_argument("--draft-length", type=int, default=0)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--capacities", type=int, nargs="+", default=CAPACITIES)
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args()
    model = gpt2() if str(o.directory) == SHAPE else load_language_model(o.directory)
    given = {"prompt": o.prompt, "deployment": find(o.deployment)(), "network": o.network}
    given |= {"draft_length": o.draft_length}
    report: dict[str, Any] = machine("benchmarks.generation")
    if o.costs:
        most = getattr(model.config, "max_position_embeddings", max(CAPACITIES) + 1) - 1
        report["steps"] = steps(model, sorted({min(c, most) for c in o.capacities}), given)
        print(json.dumps(report, indent=2))
        if o.write:
            file = RESULTS / "steps.json"
            kept = json.loads(file.read_text()) if file.exists() else {}
            kept[o.directory.name] = report
            file.write_text(json.dumps(kept, indent=2) + "\n")
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(o.directory)
    compiled = secure.compile_generator(model, capacity=o.capacity, **given)
    report["step"], draft = step_cost(compiled), None
    if o.draft_length:
        report["pass"] = step_cost(compiled, o.draft_length)
        draft = load_language_model(o.draft) if o.draft else model
    with secure.insecure_in_process(compiled) as session:
        report["texts"] = [compared(session, model, tokenizer, text, o.tokens, draft) for text in o.text]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
