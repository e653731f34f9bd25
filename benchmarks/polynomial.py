"""A model that ``unseen train`` wrote, against its original: similarities, the protocol, and a classifier on SST-2.

    python -m benchmarks.polynomial MODEL [--texts NAME=FILE]... [--sst2 DIR] [--write]

"documentation" are the first sentences of the docstrings of Python's own library, a kind of text that every machine
has; --texts adds files, one sentence a line. SST-2: a directory of stsa.binary.train and .test ("label text" a line).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure
from benchmarks import common
from parties.cli.accuracy import cut
from secure import insecure_in_process
from secure.models.calibration import SENTENCES
from secure.models.sentence_encoder import SentenceEncoder, load_sentence_encoder, load_tokenizer
from secure.models.text import PACKAGED, calibration_inputs, model_directory
from secure.models.tokens import TextTokenizer
from secure.mpc.compile import MpcModel, compile
from secure.polynomial.forms import forms
from secure.polynomial.recipe import CHECKPOINT
from secure.training.checkpoint import read_about
from secure.training.fidelity import fidelity
from secure.training.sentences import agreement_of, hidden_states

LENGTH = 32
SST2_LENGTH, SST2_ASKED = 64, 200


def documentation(count: int) -> list[str]:
    """First lines of docstrings of the standard library, of four words or more, in a fixed order."""
    found: dict[str, None] = {}
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in ("antigravity", "this", "idlelib", "turtledemo"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception:  # not on this system
            continue
        for line in _first_lines(module):
            found.setdefault(line)
    lines = sorted(found)
    random.Random(0).shuffle(lines)
    return lines[:count]


def _first_lines(module: Any) -> Iterator[str]:
    for _, thing in inspect.getmembers(module, lambda x: inspect.isclass(x) or inspect.isroutine(x)):
        text = (inspect.getdoc(thing) or "").strip().splitlines()
        if text and len(text[0].split()) >= 4 and text[0][0].isupper() and text[0].endswith("."):
            yield text[0]


def embedded(model: SentenceEncoder, tokenizer: TextTokenizer, texts: list[str], length: int) -> Tensor:
    """In floating point, some at a time, padded to one length."""
    inputs = [x for text in texts if (x := cut(tokenizer, text, length)) is not None]
    out = []
    with torch.no_grad():
        for start in range(0, len(inputs), 64):
            rows = inputs[start : start + 64]
            together = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
            width = int(together["attention_mask"].sum(-1).max())
            out.append(hidden_states(model, {k: v[:, :width] for k, v in together.items()})[1])
    return torch.cat(out).double()


class Classifier(nn.Module):
    """A linear layer on an encoder's embedding."""

    def __init__(self, encoder: SentenceEncoder, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask))
        return out


def fitted(x: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression by L-BFGS, with a little weight decay."""
    head = nn.Linear(x.shape[1], 2)
    nn.init.zeros_(head.weight)
    x = x.float()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def sst2(
    directory: Path, original: SentenceEncoder, model: SentenceEncoder, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Accuracy of a head on each encoder, and of the polynomial one under the protocol."""
    (train, train_labels), (test, test_labels) = (_labelled(directory / f"stsa.binary.{p}") for p in ("train", "test"))
    report: dict[str, Any] = {"test sentences": len(test)}
    for name, encoder in (("original", original), ("polynomial", model)):
        head = fitted(embedded(encoder, tokenizer, train, SST2_LENGTH), train_labels)
        answers = head(embedded(encoder, tokenizer, test, SST2_LENGTH).float()).argmax(-1)
        report[f"{name}, floating point"] = float((answers == test_labels).double().mean())
    classifier = Classifier(model, head).eval()
    samples = calibration_inputs(tokenizer, SST2_LENGTH, [*SENTENCES, *train[:100]])
    compiled = secure.compile(classifier, samples[0], calibration=samples[1:], embedding="client-table")
    query, right, same = insecure_in_process(compiled), 0, 0
    for text, label, plain in zip(test[:SST2_ASKED], test_labels[:SST2_ASKED], answers[:SST2_ASKED], strict=True):
        inputs = cut(tokenizer, text, SST2_LENGTH)
        assert inputs is not None
        answer = query.query(inputs).argmax(-1)
        right, same = right + int(answer == label), same + int(answer == plain)
    report["asked under the protocol"] = SST2_ASKED
    report["polynomial, protocol"] = right / SST2_ASKED
    report["polynomial, floating point, those asked"] = float(
        (answers[:SST2_ASKED] == test_labels[:SST2_ASKED]).double().mean()
    )
    report["same answer as floating point"] = same / SST2_ASKED
    return report


def _labelled(path: Path) -> tuple[list[str], Tensor]:
    rows = [line.split(" ", 1) for line in path.read_text("latin-1").splitlines() if " " in line]
    return [text for _, text in rows], torch.tensor([int(label) for label, _ in rows])


def compiled_for(model: SentenceEncoder, tokenizer: TextTokenizer, length: int) -> MpcModel:
    """Calibrated on the public sentences, as ``unseen serve`` does."""
    samples = calibration_inputs(tokenizer, length, SENTENCES)
    return compile(model, samples[0], calibration=samples[1:], embedding="client-table")


def training(directory: Path) -> dict[str, Any]:
    """What the run's own record says, if it is still there."""
    path = directory / CHECKPOINT
    if not path.is_file():
        return {}
    about = read_about(path)
    history = about["history"]
    every = max(1, len(history) // 45)
    means = [
        {"step": part[-1]["step"], "loss": sum(h["loss"] for h in part) / len(part)}
        for part in (history[i : i + every] for i in range(0, len(history), every))
    ]
    return {"settings": about["settings"], "loss, means": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--original", default=PACKAGED)
    parser.add_argument("--texts", action="append", default=[], help="NAME=FILE")
    parser.add_argument("--count", type=int, default=600, help="sentences of a kind, in floating point")
    parser.add_argument("--fixed", type=int, default=100, help="of those, in fixed point")
    parser.add_argument("--protocol", type=int, default=50, help="of those, under the protocol")
    parser.add_argument("--sst2", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, original = load_sentence_encoder(options.model), load_sentence_encoder(model_directory(options.original))
    tokenizer = load_tokenizer(options.model)
    recipe = next(form for _, form in forms(model)).recipe.model_dump(exclude={"layers"})
    report: dict[str, Any] = {"machine": common.machine("benchmarks.polynomial"), "recipe": recipe}
    report["training"] = training(options.model)
    compiled = compiled_for(model, tokenizer, LENGTH)
    given = {"documentation": documentation(options.count)}
    for named in options.texts:
        name, _, path = named.partition("=")
        given[name] = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()][: options.count]
    for name, texts in given.items():
        both = agreement_of(*(embedded(m, tokenizer, texts, LENGTH) for m in (model, original)))
        inputs = [x for text in texts[: options.fixed] if (x := cut(tokenizer, text, LENGTH)) is not None]
        found = fidelity(model, original, compiled, inputs, options.protocol)
        report[name] = {"floating point, all": asdict(both), **asdict(found)}
        print(name, json.dumps(report[name]["floating point, all"]))
        for way in found.ways:
            print("  ", way)
    if options.sst2:
        report["SST-2"] = sst2(options.sst2, original, model, tokenizer)
        print("SST-2", json.dumps(report["SST-2"]))
    if options.write:
        (common.RESULTS / "polynomial.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
