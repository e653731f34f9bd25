"""What Power-Softmax changes in what small transformers learn: three tasks in context, softmax against powers.

    python -m benchmarks.bias [--task recall induction regression] [--form softmax power-2 ...] [--seeds 3]
        [--steps 1000] [--write]

Recall: keys and values alternate, and all pairs come again in another order: which value is a key's? Induction: a
sequence of random tokens comes twice: what follows each token of the second time? Regression: pairs of x and w.x for an
unknown w, and then an x: what is w.x? Models are of two layers. They see every input beside the one before it, and know
no other positions than the causal mask, so that what differs with the length is the attention alone. They learn from
lengths up to ``--length`` and are asked at this length, and at up to eight times as much.

Forms: softmax; power-P, x^P over its sum; shifted-P, (1 + x/P)^P over its sum. Divisions are exact: what is compared is
the form, not a polynomial of it. A score is the share of right answers, or 1 less the mean square error in parts of
that of guessing zero. Printed are the mean over seeds, the smallest and the largest. --write: keep them in
benchmarks/results/bias.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approximations import power_attend
from benchmarks.common import RESULTS, machine

WIDTH, HEADS, LAYERS, BATCH, RATE = 64, 4, 2, 32, 2e-3
TOKENS, DIMENSIONS, EPS = 32, 4, 1e-3
ASKED, PART = 1024, 64  # sequences on which a score is taken, and how many at a time
FARTHER = (1, 2, 4, 8)  # times the length of training
FORMS = ("softmax", "power-2", "power-4", "power-6", "shifted-2", "shifted-4", "shifted-6")


def attend(form: str, scores: Tensor, values: Tensor) -> Tensor:
    """Attention of a form, causal: scores (B, H, T, T), values (B, H, T, d)."""
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if form == "softmax":
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values
    kind, _, power = form.partition("-")
    weights = seen / seen.sum(-1, keepdim=True)
    shift = float(power) if kind == "shifted" else 0.0
    return power_attend(scores, values, weights, int(power), EPS, shift, stable=True)


class FormLayer(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        scores = parts[0] @ parts[1].transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        x = x + self.out(attend(self.form, scores, parts[2]).transpose(1, 2).flatten(2))
        fed: Tensor = x + self.feed(self.norms[1](x))
        return fed


class FormModel(nn.Module):
    """Layers between a map of the inputs, each beside the one before it, and one to the answers."""

    def __init__(self, form: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * inputs, WIDTH)
        self.layers = nn.Sequential(*(FormLayer(form) for _ in range(LAYERS)))
        self.last = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        out: Tensor = self.last(self.layers(self.first(torch.cat([x, before], -1))))
        return out


@dataclass(frozen=True)
class Exercise:
    """An exercise in context.

    draw: makes sequences of a length, as inputs (B, T, inputs), answers, and which places count. classes: answers are
    tokens, else numbers.
    """

    draw: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
    inputs: int
    outputs: int
    classes: bool


def recall(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    pairs = max(1, length // 4)
    keys = torch.rand(count, 4 * TOKENS, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(TOKENS, (count, pairs), generator=generator)
    asked = torch.rand(count, pairs, generator=generator).argsort(-1)
    known = torch.stack([keys, values + 4 * TOKENS], -1)
    tokens = torch.cat([known, known.gather(1, asked[..., None].expand_as(known))], 1).flatten(1)
    answers, counts = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    answers[:, 2 * pairs :: 2] = values.gather(1, asked)
    counts[:, 2 * pairs :: 2] = True
    return F.one_hot(tokens, 5 * TOKENS).float(), answers, counts


def induction(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    half = max(2, length // 2)
    once = torch.rand(count, 5 * TOKENS, generator=generator).argsort(-1)[:, :half]
    tokens = torch.cat([once, once], 1)
    answers, counts = tokens.roll(-1, 1), torch.zeros_like(tokens, dtype=torch.bool)
    counts[:, half:-1] = True
    return F.one_hot(tokens, 5 * TOKENS).float(), answers, counts


def regression(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    pairs = max(2, length // 2)
    x = torch.randn(count, pairs, DIMENSIONS, generator=generator)
    y = x @ torch.randn(count, DIMENSIONS, 1, generator=generator) / DIMENSIONS**0.5
    given = torch.zeros(count, 2 * pairs, DIMENSIONS + 1)
    given[:, ::2, :-1], given[:, 1::2, -1:] = x, y
    answers, counts = torch.zeros(count, 2 * pairs), torch.zeros(count, 2 * pairs, dtype=torch.bool)
    answers[:, ::2], counts[:, -2] = y[..., 0], True
    return given, answers, counts


TASKS = {
    "recall": Exercise(recall, 5 * TOKENS, TOKENS, True),
    "induction": Exercise(induction, 5 * TOKENS, 5 * TOKENS, True),
    "regression": Exercise(regression, DIMENSIONS + 1, 1, False),
}


def score(task: Exercise, model: nn.Module, length: int) -> float:
    """Ask a model about sequences of a length, the same ones whichever the model."""
    generator, right, of = torch.Generator().manual_seed(1 << 20), 0.0, 0.0
    with torch.no_grad():
        for _ in range(ASKED // PART):
            given, answers, counts = task.draw(PART, length, generator)
            found = model(given)[counts]
            if task.classes:
                right, of = right + float((found.argmax(-1) == answers[counts]).sum()), of + float(counts.sum())
            else:
                error, all_of_it = (found[:, 0] - answers[counts]).square().sum(), answers[counts].square().sum()
                right, of = right + float(all_of_it - error), of + float(all_of_it)
    return right / of


def trained(task: Exercise, form: str, seed: int, steps: int, length: int) -> dict[str, float]:
    """Train a model and return its score at each length, by its factor."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), FormModel(form, task.inputs, task.outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    began = time.perf_counter()
    for _ in range(steps):
        shorter = int(torch.randint(length // 4, length + 1, (1,), generator=generator))
        given, answers, counts = task.draw(BATCH, shorter, generator)
        found = model(given)
        if task.classes:
            loss = F.cross_entropy(found[counts], answers[counts])
        else:
            loss = (found[..., 0] - answers)[:, ::2].square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    out = {"seconds": time.perf_counter() - began}
    return out | {f"x{factor}": score(task, model, factor * length) for factor in FARTHER}


def summary(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of each figure the mean, the smallest and the largest."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    return {name: [round(f, 4) for f in (statistics.mean(v), min(v), max(v))] for name, v in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args()
    report: dict[str, Any] = machine("benchmarks.bias") | {"steps": o.steps, "length": o.length, "seeds": o.seeds}
    for name in o.task:
        for form in o.form:
            runs = [trained(TASKS[name], form, seed, o.steps, o.length) for seed in range(o.seeds)]
            report.setdefault(name, {})[form] = summary(runs)
            print(name, form, report[name][form], flush=True)
    if o.write:
        (RESULTS / "bias.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
