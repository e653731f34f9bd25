"""Count what a query will cost, link by link, before anything runs; and compare two deployments.

python -m examples.costs
"""

import torch
from torch import nn

import secure


def main() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).eval()
    samples = [{"input": torch.randn(16, 64)} for _ in range(8)]
    for deployment in (secure.TwoParty(), secure.ThreeParty()):
        compiled = secure.compile(model, samples[0], calibration=samples, deployment=deployment)
        print(f"{type(deployment).__name__}: {compiled.cost.rounds} rounds")
        for link in compiled.cost.traffic:
            print(f"  {link.sender} -> {link.receiver}, {link.phase}: {link.bytes / 1e3:.1f} kB")
        print(*secure.profile(compiled, networks=["lan", "wan"]).lines, sep="\n")


if __name__ == "__main__":
    main()
