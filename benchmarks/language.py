"""A language model in polynomial form beside its original: perplexities, and its texts under the protocol.

    python -m benchmarks.language DIRECTORY --original DIRECTORY [--texts NAME=FILE ...] [--tokens 100] [--capacity 128]
        [--prompt 16] [--fraction-bits 12] [--lengths 64 128 192 256] [--write]

DIRECTORY is what ``unseen train`` wrote. Perplexities: on rows that the original writes with other seeds than those to
learn from, of the usual length and of each of --lengths, and on the files of --texts. Texts: five beginnings are
continued by both models, two parties in this process. ``same``: the tokens of the polynomial model that its own
floating point finds most likely behind the same text. Rounds and bytes of a step are counted, seconds of a token are
medians. --write: keep them in benchmarks/results/language.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secure
from benchmarks.common import RESULTS, machine
from benchmarks.generation import TEXTS, step_cost
from protocols.fixedpoint import FixedPoint
from secure.cost.traffic import ONLINE
from secure.models.causal import load_language_model
from secure.models.served_tokenizer import load_tokenizer
from secure.models.tokens import TextTokenizer
from secure.training.language import HELD_OUT_SEED, perplexities, row_length, rows_of_texts, rows_written, run

ROWS = 64


def told(model: nn.Module, prompt: list[int], ids: list[int]) -> tuple[int, float]:
    """How many tokens the model's own floating point chooses too, and by how much it finds one better at most."""
    with torch.no_grad():
        scores = run(model.double(), {"input_ids": torch.tensor([[*prompt, *ids]])})[0][0, len(prompt) - 1 : -1]
    model.float()
    behind = scores.amax(-1) - scores.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    return int((behind == 0).sum()), float(behind.max())


def texts(model: nn.Module, tokenizer: TextTokenizer, o: argparse.Namespace, bits: int | None) -> dict[str, Any]:
    """The cost of a step, and the texts that a model writes under the protocol."""
    fixed = None if bits is None else FixedPoint(fraction_bits=bits)
    compiled = secure.compile_generator(model, prompt=o.prompt, capacity=o.capacity, fixed_point=fixed)
    found: dict[str, Any] = {"step": step_cost(compiled), "prompt": step_cost(compiled, o.prompt), "texts": []}
    same, asked, seconds, worst = 0, 0, list[float](), 0.0
    with secure.insecure_in_process(compiled) as session:
        for text in TEXTS:
            prompt, before = tokenizer.tokenizer.encode(text).ids, len(session.reports)
            ids = session.generate(prompt, o.tokens, ignore_end=True).complete().ids
            agreed, behind = told(model, prompt, ids)
            same, asked, worst = same + agreed, asked + len(ids), max(worst, behind)
            seconds += [report.online_seconds + report.dealer_seconds for report in session.reports[before + 1 :]]
            found["texts"].append(tokenizer.tokenizer.decode([*prompt, *ids]))
    return found | {
        "same": f"{same} of {asked}",
        "worst gap": round(worst, 5),
        "s a token, all parties": round(statistics.median(seconds), 4),
        "fraction bits": compiled.program.fixed.fraction_bits,
    }


def beside(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """How many times less the first takes than the second."""
    costs = {name: b["step"][name] / a["step"][name] for name in ("rounds", f"{ONLINE} bytes", "dealt bytes")}
    costs["seconds"] = b["s a token, all parties"] / a["s a token, all parties"]
    return {name: round(value, 2) for name, value in costs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--capacity", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--fraction-bits", type=int, default=12)
    parser.add_argument("--lengths", nargs="*", type=int, default=[])
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args()
    model, original, tokenizer = (
        load_language_model(o.directory),
        load_language_model(o.original),
        load_tokenizer(o.original),
    )
    length = row_length(model)
    rows = {"written by the original": rows_written(original, ROWS, length, HELD_OUT_SEED)}
    for each in o.lengths:
        rows[f"written by the original, {each} tokens"] = rows_written(original, ROWS, each, HELD_OUT_SEED)
    for named in o.texts:
        name, _, file = named.partition("=")
        rows[name] = rows_of_texts(tokenizer, Path(file).read_text().splitlines(), length)
    report: dict[str, Any] = machine("benchmarks.language")
    report["perplexities"] = {
        name: {**vars(found := perplexities(model, original, given)), "ratio": found.ratio}
        for name, given in rows.items()
    }
    report["polynomial"] = texts(model, tokenizer, o, o.fraction_bits)
    report["exact"] = texts(original, tokenizer, o, None)
    report["times less"] = beside(report["polynomial"], report["exact"])
    print(json.dumps(report, indent=2))
    if o.write:
        file = RESULTS / "language.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept[o.directory.name] = report
        file.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
