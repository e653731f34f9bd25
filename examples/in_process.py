"""Compile a small transformer and run it with all parties in this process. That protects nothing.

python -m examples.in_process
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure


class Block(nn.Module):
    """One transformer layer, as anybody would write it in torch."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.first(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        out: Tensor = self.second(x + self.down(F.gelu(self.up(x))))
        return out


def main() -> None:
    model, samples = Block().eval().requires_grad_(False), [{"x": torch.randn(1, 16, 32)} for _ in range(8)]
    compiled = secure.compile(model, samples[0], calibration=samples, deployment=secure.TwoParty())
    with secure.insecure_in_process(compiled) as session:
        answer = session.query(samples[0])
    print(f"cosine to the plaintext {float(F.cosine_similarity(answer, model(**samples[0]), dim=-1).min()):.7f}")
    report = session.reports[-1]
    print(f"{report.rounds} rounds, {report.bytes() / 1e3:.0f} kB, {report.online_seconds:.2f} s online")


if __name__ == "__main__":
    main()
