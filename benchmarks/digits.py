"""Vision transformers on scikit-learn's digits: training time, accuracy, and the whole test set under the protocol.

    python -m benchmarks.digits [--layers 1 2 4] [--write]

Sizes, rate and epochs are those of the one-layer model, whose test accuracy was looked at when they were first chosen;
the present forms, and 2 and 4 layers, were tried on 240 of the training images alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks import common
from secure import insecure_in_process
from secure.deployments.compiled import build
from secure.deployments.deployment import CompileOptions
from secure.deployments.two_party import TwoParty
from secure.models.digits import load_digits, train_digits
from secure.tasks.digits import prepared


def measured(layers: int) -> dict[str, Any]:
    """One model: trained, compiled, and asked about every test image, all parties in this process."""
    began = time.perf_counter()
    model, accuracy = train_digits(layers)
    seconds = time.perf_counter() - began
    compiled = build(prepared(model), TwoParty(), CompileOptions(), {})
    query, (images, labels) = insecure_in_process(compiled), load_digits().test
    with torch.no_grad():
        plain = model(images).argmax(-1)
    found, times = [], []
    for image in images:
        answer = query.query({"images": image[None]})
        report = query.reports[-1]
        found.append(int(answer.argmax()))
        times.append(report.online_seconds)
    private, cost = torch.tensor(found), compiled.program.cost
    return {
        "layers": layers,
        "training s": round(seconds, 1),
        "test images": len(images),
        "accuracy, floating point": accuracy,
        "accuracy, protocol": float((private == labels).double().mean()),
        "same prediction": float((private == plain).double().mean()),
        "rounds": cost.rounds,
        "online MB": (cost.to_first + cost.to_second) / 1e6,
        "offline MB": cost.dealt / 1e6,
        "online s, all parties in one process": round(statistics.median(times), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for layers in options.layers:
        rows.append(measured(layers))
        print(json.dumps(rows[-1]), flush=True)
    if options.write:
        report = {"machine": common.machine("benchmarks.digits"), "models": rows}
        (common.RESULTS / "digits.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
