"""The table of architectures: which models compile as ``transformers`` makes them, and how close their answers are.

    python -m benchmarks.architectures [NAME ...] [--write] [--jobs 2]

Every model of ``benchmarks.zoo`` is compiled for two parties and asked once, all parties in this process, at two
spreads of its random weights: as its class initializes it, and wider, so that attention attends. The worst output
counts. --write keeps the results of all, and the page docs/architectures.md that is made from them.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secure
from benchmarks.common import RESULTS, machine
from benchmarks.zoo import CATALOGUE, SPREAD, Tiny

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
SAMPLES = 6  # of which one is not calibrated with
BAR = 0.9999
SECTIONS = {
    "encoder": "Encoders of text",
    "decoder": "Decoders",
    "seq2seq": "Encoder-decoders",
    "vision": "Images",
    "audio": "Audio",
    "other": "Others",
}


@dataclass(frozen=True)
class Answer:
    """What one model gave at one spread of its weights. Raises nothing: a refusal is a message."""

    cosine: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    same: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table; message: why the model was refused, or ""."""

    name: str
    kind: str
    rounds: int = 0
    online_mb: float = 0.0
    offline_mb: float = 0.0
    answers: dict[str, Answer] = field(default_factory=dict)
    message: str = ""

    @property
    def good(self) -> bool:
        """True if the model compiles and every answer is close, or the largest entries are where they are."""
        return not self.message and all(a.cosine >= BAR or a.same for a in self.answers.values())


def outputs_of(result: Any) -> dict[str, Tensor]:
    """Return a module's results by the names that a Program gives them."""
    if isinstance(result, Tensor):
        return {"output": result}
    pairs = result.items() if isinstance(result, Mapping) else enumerate(result)
    found: dict[str, Tensor] = {}
    for name, value in pairs:
        if isinstance(value, Tensor):
            found[str(name)] = value
        elif isinstance(value, tuple | list | Mapping):
            found |= {f"{name}.{inner}": tensor for inner, tensor in outputs_of(value).items()}
    return found


def compare(answer: Any, expected: Mapping[str, Tensor]) -> Answer:
    """Return the worst of the outputs."""
    found = {next(iter(expected)): answer} if isinstance(answer, Tensor) else dict(answer)
    cosine, error, largest, same = 1.0, 0.0, 0.0, True
    for name, value in found.items():
        ours, theirs = value.double().reshape(-1), expected[name].double().reshape(-1)
        cosine = min(cosine, float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)))
        error, largest = max(error, float((ours - theirs).abs().max())), max(largest, float(theirs.abs().max()))
        same &= bool((value.argmax(-1) == expected[name].argmax(-1)).all())
    return Answer(cosine, error, largest, same)


def tried(number: int) -> Row:
    """Compile a model of the catalogue and ask it, at both spreads, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    return row_of(CATALOGUE[number])


def row_of(tiny: Tiny) -> Row:
    """Return the row of a model: what it answered, or why it was refused."""
    try:
        return answered(tiny)
    except secure.Error as error:
        said = str(error).splitlines()
        return Row(tiny.name, tiny.kind, message=f"{said[0]}; {said[-1]}")
    except Exception as error:  # a model that the catalogue makes in a wrong way, or a fault of ours
        return Row(tiny.name, tiny.kind, message=f"FAULT {type(error).__name__}: {error}")


def answered(tiny: Tiny) -> Row:
    """Compile a model and ask it, at both spreads."""
    samples = [tiny.example(seed) for seed in range(SAMPLES)]
    asked, calibration = samples[-2], [*samples[:-2], samples[-1]]
    row, answers = Row(tiny.name, tiny.kind), {}
    for label, spread in (("initialized", None), ("wider", SPREAD)):
        module = tiny.built(spread)
        with torch.no_grad():
            expected = outputs_of(module(**asked))
        compiled = secure.compile(module, calibration[0], calibration=calibration[1:], embedding="client-table")
        with secure.insecure_in_process(compiled) as session:
            answers[label] = compare(session.query(asked), expected)
        cost = compiled.program.cost
        online = (cost.to_first + cost.to_second) / 1e6
        row = Row(tiny.name, tiny.kind, cost.rounds, online, cost.dealt / 1e6, answers)
    return row


def line_of(row: Row) -> str:
    """Return a row as a line of a terminal."""
    if row.message:
        return f"-- {row.name}: {row.message}"
    worst = "; ".join(f"{label} {a.cosine:.6f}{' same' if a.same else ''}" for label, a in row.answers.items())
    return f"{'ok' if row.good else '!!'} {row.name}: {row.rounds} rounds, {worst}"


def page(rows: Sequence[Row]) -> str:
    """Return the page of supported models."""
    good = sum(row.good for row in rows)
    lines = [
        "# Architectures",
        "",
        f"Of {len(rows)} models of `transformers`, {good} compile as their classes make them, without a wrapper, and",
        "answer as floating point does: the cosine of every output is 0.9999 or more, or its largest entry is the",
        "same. The models are tiny (two layers of width 64, twelve tokens, images of 32x32) and have random weights;",
        "architecture, not size, decides whether a model compiles. `python -m benchmarks.architectures --write` makes",
        "this page.",
        "",
        "Rounds and megabytes are of one query by two parties and a dealer. Cosines are those of the worst output,",
        "with weights as the class initializes them, and with wider ones, under which attention attends.",
    ]
    for kind, title in SECTIONS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| model | rounds | MB online / offline | cosine: initialized; wider |",
            "|---|---|---|---|",
        ]
        for row in rows:
            if row.kind != kind:
                continue
            if row.message:
                lines.append(f"| {row.name} | refused | | {row.message.replace('|', '/')} |")
                continue
            cosines = "; ".join(f"{a.cosine:.6f}" for a in row.answers.values())
            mark = "" if row.good else " (below the bar)"
            lines.append(
                f"| {row.name}{mark} | {row.rounds} | {row.online_mb:.2f} / {row.offline_mb:.2f} | {cosines} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models whose names contain one of these; all by default")
    parser.add_argument("--write", action="store_true", help="keep the results and the page of the documentation")
    parser.add_argument("--jobs", type=int, default=2)
    o = parser.parse_args()
    chosen = [
        i for i, t in enumerate(CATALOGUE) if not o.names or any(name.lower() in t.name.lower() for name in o.names)
    ]
    rows, start = [], time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(o.jobs, maxtasksperchild=12) as pool:
        for row in pool.imap(tried, chosen, chunksize=1):
            rows.append(row)
            print(line_of(row), flush=True)
    good = sum(row.good for row in rows)
    print(f"{good} of {len(rows)} models are good ({time.perf_counter() - start:.0f} s)")
    if o.write and not o.names:
        document = {"machine": machine("benchmarks.architectures"), "rows": [asdict(row) for row in rows]}
        (RESULTS / "architectures.json").write_text(json.dumps(document, indent=1) + "\n")
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
