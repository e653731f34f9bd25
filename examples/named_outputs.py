"""A model with two outputs: a query returns both by name. All parties run in this process, which protects nothing.

python -m examples.named_outputs
"""

import torch
from torch import Tensor, nn

import secure


class TwoHeads(nn.Module):
    """One hidden layer, and two answers that are made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.label, self.value = nn.Linear(16, 32), nn.Linear(32, 3), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.hidden(x))
        return {"label": self.label(hidden), "value": self.value(hidden)}


def main() -> None:
    model, samples = TwoHeads().eval().requires_grad_(False), [{"x": torch.randn(1, 16)} for _ in range(16)]
    compiled = secure.compile(model, samples[0], calibration=samples, deployment=secure.TwoParty())
    with secure.insecure_in_process(compiled) as session:
        answers = session.query(samples[0])
    for name, exact in model(**samples[0]).items():
        print(f"{name}: {answers[name].tolist()}, largest error {float((answers[name] - exact).abs().max()):.1e}")


if __name__ == "__main__":
    main()
