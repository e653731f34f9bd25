"""Run a model without comparisons on ciphertexts alone, all in this process. That protects nothing.

python -m examples.ckks
"""

import torch
from torch import Tensor, nn

import secure


class Squares(nn.Module):
    """Two linear layers around a square: CKKS adds and multiplies, so ReLU or GeLU would be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.hidden(x).square())
        return out


def main() -> None:
    model = Squares().eval().requires_grad_(False)
    samples = [{"x": torch.rand(1, 16) - 0.5} for _ in range(64)]
    compiled = secure.compile(model, samples[0], calibration=samples, deployment=secure.Ckks())
    with secure.insecure_in_process(compiled) as session:
        answer = session.query(samples[0])
    report = session.reports[-1]
    print(f"largest error {float((answer - model(**samples[0])).abs().max()):.1e}")
    print(f"{report.online_seconds:.2f} s, of which the client took {report.client_seconds:.2f} s")


if __name__ == "__main__":
    main()
