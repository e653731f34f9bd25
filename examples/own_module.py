"""Compile a torch module of your own, and see how exact the private answer is before you serve it.

python -m examples.own_module
"""

import torch
from torch import Tensor, nn

import secure


class Scorer(nn.Module):
    """Sixteen secret numbers to three probabilities; random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.out(nn.functional.gelu(self.hidden(x))), dim=-1)


def main() -> None:
    model = Scorer().eval().requires_grad_(False)
    calibration = [{"x": torch.randn(1, 16)} for _ in range(32)]  # like the inputs that you expect: they set the ranges
    compiled = secure.compile(model, calibration[0], calibration=calibration, deployment=secure.TwoParty())
    inputs = {"x": calibration[0]["x"] * 0.9}
    exact, fixed = model(**inputs), secure.plain_reference(compiled, inputs)
    with secure.insecure_in_process(compiled) as session:  # protects nothing
        private = session.query(inputs)
    print(f"approximations and fixed point add {float((fixed - exact).abs().max()):.1e}")
    print(f"the private answer differs by      {float((private - exact).abs().max()):.1e}")


if __name__ == "__main__":
    main()
