"""A language model in polynomial form on ciphertexts: steps in one process on one core, against floating point.

    python -m benchmarks.language_encrypted DIRECTORY [--steps 20] [--capacity 32] [--precision 9] [--write]

DIRECTORY is what ``unseen train`` wrote. The model reads a text that it wrote itself, with another seed than those that
calibrate it, token by token, and keeps its rows; at every token its scores are compared with those of floating point.
Seconds of the server are told by kind of operation and by kind of module, without those of the client. --write: keep
them in benchmarks/results/language_encrypted.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secure
from benchmarks.common import RESULTS, machine, peak
from protocols.ckks.cost import account, measure
from protocols.ckks.evaluate import EncodedWeights, EncryptedRows, evaluate
from protocols.ckks.seal import Client, Context, EvaluationKeys
from secure.ckks.client import ClientQuery
from secure.ckks.compile import CkksModel
from secure.deployments.generator import written
from secure.models.causal import load_language_model
from secure.models.decoder import step_inputs

SEED = 7  # of the text that is read; those that calibrate have seed 0
KINDS = {"rotate": "rotations", "dot": "products with plaintexts", "multiply": "products of ciphertexts"}
KINDS |= {"refresh": "refreshes", "keep": "kept rows", "kept": "kept rows", "input": "inputs"}
PARTS = {"self_attn.polynomial": "Power-Softmax", "norm": "normalization", "act_fn": "activation", "mlp": "linear"}
PARTS |= {"self_attn": "linear", "lm_head": "linear"}


def part(path: str) -> str:
    """The kind of the module of a path."""
    return next((kind for name, kind in PARTS.items() if name in path), "residual and others")


class Watch:
    """The seconds between two nodes, by kind of operation and of module; those of the client are taken out."""

    def __init__(self, model: CkksModel) -> None:
        self._circuit, self._at, self._node = model.schedule.circuit, time.perf_counter(), -1
        self.kinds, self.parts = defaultdict[str, float](float), defaultdict[str, float](float)

    def __call__(self, node: int, path: str) -> None:
        now = time.perf_counter()
        if self._node >= 0:
            self.kinds[KINDS.get(self._circuit.nodes[self._node].op, "sums")] += now - self._at
            self.parts[part(self._circuit.paths[self._node])] += now - self._at
        self._at, self._node = now, node

    def skip(self, seconds: float) -> None:
        self._at += seconds


def steps(model: CkksModel, original: nn.Module, text: Sequence[int]) -> list[dict[str, Any]]:
    """Read a text; what each token took, and how far its scores are from those of floating point."""
    program, context = model.program, Context(model.program.parameters)
    client, found = Client(context), list[dict[str, Any]]()
    began = time.perf_counter()
    keys = EvaluationKeys(context, client.evaluation_keys(list(program.steps)), list(program.steps))
    weights, kept = EncodedWeights(context, model.schedule, limit=1 << 34), EncryptedRows()
    weights.prepare()
    print(json.dumps({"keys and weights, s": round(time.perf_counter() - began, 1)}), flush=True)
    with torch.no_grad():
        double: Any = original.double()
        wanted = double(torch.tensor([list(text)])).logits[0]
    for filled, token in enumerate(text):
        began, watch, exchange = time.perf_counter(), Watch(model), ClientQuery(program, client)
        values = program.client_values(step_inputs([token], 0, filled, program.rows), model.client_tables)
        inputs = dict(zip(program.views, exchange.inputs(values), strict=True))
        running, answers = evaluate(weights, keys, inputs, watch, kept), list[bytes]()
        while True:
            try:
                masked = running.send(answers) if answers else next(running)
            except StopIteration as end:
                scores = program.decode(exchange.results(end.value))["output"].flatten()
                break
            before = exchange.seconds
            answers = exchange.refreshed(masked)
            watch.skip(exchange.seconds - before)
        seconds, best = time.perf_counter() - began, wanted[filled].topk(2).values
        found.append(
            {
                "kept rows": filled,
                "s": round(seconds, 2),
                "client s": round(exchange.seconds, 2),
                "server s": round(seconds - exchange.seconds, 2),
                "error": float((scores - wanted[filled]).abs().max()),
                "gap": float(best[0] - best[1]),
                "same": int(scores.argmax()) == int(wanted[filled].argmax()),
                "MB up": exchange.sent / 1e6,
                "MB down": exchange.received / 1e6,
                "rounds": exchange.rounds,
                "kinds": {name: round(taken, 2) for name, taken in watch.kinds.items()},
                "modules": {name: round(taken, 2) for name, taken in watch.parts.items()},
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--capacity", type=int, default=32)
    parser.add_argument("--precision", type=float, default=9.0)
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args()
    torch.set_num_threads(1)
    report, original = machine("benchmarks.language_encrypted"), load_language_model(o.directory)
    began = time.perf_counter()
    compiled = secure.compile_generator(
        original,
        capacity=o.capacity,
        embedding="client-table",
        deployment=secure.Ckks(refresh=True, precision=o.precision),
    )
    model: CkksModel = compiled.model
    program, p = model.program, model.program.parameters
    times = measure(p)
    report |= {
        "compiling s": round(time.perf_counter() - began, 1),
        "parameters": {"N": p.degree, "levels": p.levels, "scale bits": p.scale_bits, "modulus bits": p.total_bits},
        "counts": dict(program.counts),
        "rounds": program.rounds,
        "refreshed": sum(map(len, program.refreshes)),
        "hiding bits": program.hiding,
        "keys MB": program.key_bytes / 1e6,
        "predicted error": model.predicted_error,
        "predicted s": {name: round(s, 2) for name, s in account(model.schedule, p, times).kinds.items()},
    }
    print(json.dumps(report), flush=True)
    text = written(original, o.steps, count=1, seed=SEED)[0]
    report["steps"] = found = steps(model, original, text)
    report["same"] = f"{sum(each['same'] for each in found)} of {len(found)}"
    for name in ("s", "server s", "client s"):
        report[f"median {name}"] = statistics.median(each[name] for each in found)
    report["peak MB"] = peak()
    print(json.dumps({name: value for name, value in report.items() if name != "steps"}, indent=2))
    if o.write:
        file = RESULTS / "language_encrypted.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept[o.directory.name] = report
        file.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
