"""Share a model among three parties and ask them, all in this process. That protects nothing.

python -m examples.three_parties
"""

import torch
from torch import nn

import secure


def main() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval().requires_grad_(False)
    samples = [{"input": torch.randn(1, 16)} for _ in range(16)]
    for public_weights in (False, True):
        deployment = secure.ThreeParty(public_weights=public_weights)
        compiled = secure.compile(model, samples[0], calibration=samples, deployment=deployment)
        with secure.insecure_in_process(compiled) as session:
            answer = session.query(samples[0])
        sent = session.reports[-1].bytes()
        error = float((answer - model(**samples[0])).abs().max())
        print(f"weights {'public' if public_weights else 'secret'}: {sent} bytes in all, largest error {error:.1e}")


if __name__ == "__main__":
    main()
