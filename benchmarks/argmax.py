"""Arg-max, samples and the largest k of rows: rounds, bytes and seconds of a query, in process.

    python -m benchmarks.argmax [--entries 2 8 1000 50000] [--count 1 | --temperature 1] [--runs 3]
                                [--deployment two-party]

The client's numbers, to which the server adds its own, so that nobody knows their sums; the positions of the largest
are all that is revealed. Peers on the same: ``python -m benchmarks.peers.crypten_bench --work "argmax 1x1000"``, and
``spu_bench``. Their triples cost less than a dealer's, see there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from torch import Tensor, nn

import secure
from benchmarks.common import machine
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.deployment import find


class Largest(nn.Module):
    """Where the largest entries of x + b stand, or where a sample at a temperature above zero does."""

    def __init__(self, entries: int, count: int, temperature: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.b, self.count, self.temperature = nn.Parameter(torch.randn(entries)), count, temperature

    def forward(self, x: Tensor) -> Tensor:
        scores = x + self.b
        if self.temperature:
            return secure.sample(scores, self.temperature)
        return scores.argmax(-1) if self.count == 1 else scores.topk(self.count).indices


def measured(entries: int, count: int, temperature: float, runs: int, deployment: str) -> dict[str, Any]:
    """Ask ``runs`` times for other rows; all answers but samples are compared with torch's."""
    model = Largest(entries, count, temperature).eval().requires_grad_(False)
    samples = [{"x": 4 * torch.randn(1, entries)} for _ in range(runs + 1)]
    compiled = secure.compile(model, samples[0], calibration=samples, deployment=find(deployment)())
    right = 0
    with secure.insecure_in_process(compiled) as session:
        session.query(samples[0])
        for sample in samples[1:]:
            right += int(torch.equal(session.query(sample), model(**sample)))
        reports = list(session.reports)[-runs:]
    return {
        "entries": entries,
        "count": count,
        **({"temperature": temperature} if temperature else {"right": f"{right} of {runs}"}),
        "rounds": compiled.cost.rounds,
        "online MB": compiled.cost.bytes(phase=ONLINE) / 1e6,
        "dealt MB": compiled.cost.bytes(phase=OFFLINE) / 1e6,
        "online s": round(statistics.median(r.online_seconds for r in reports), 4),
        "dealing s": round(statistics.median(r.dealer_seconds for r in reports), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[2, 8, 1000, 50_000])
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--deployment", default="two-party")
    o = parser.parse_args()
    report: dict[str, Any] = machine("benchmarks.argmax")
    report["rows"] = [measured(n, o.count, o.temperature, o.runs, o.deployment) for n in o.entries]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
