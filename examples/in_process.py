"""Compile a transformer, run it under the real protocols with all parties in this process, compare with plaintext.

    python -m examples.in_process                            a small random encoder: seconds, needs torch alone
    python -m examples.in_process --model all-MiniLM-L6-v2   a real one, from the `demo` extra

All parties in one memory protect NOTHING, as ``InsecureInProcess`` says by its name. This is for seeing what a model
costs and how exact its answer is; see two_machines.md for the deployment that keeps secrets.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure

Inputs = Mapping[str, Tensor]

TEXTS = (
    "My doctor says the test results are not good.",
    "How do I reset the password of my account?",
    "The treaty of 1648 ended the Thirty Years' War and redrew the map of Europe.",
    "ok",
)


class Block(nn.Module):
    """One transformer layer, as anybody would write it in torch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.first(x + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        out: Tensor = self.second(x + self.down(F.gelu(self.up(x))))
        return out


class SmallEncoder(nn.Module):
    """Token ids and their mask to one unit vector; random weights."""

    def __init__(self, vocabulary: int = 100, length: int = 16, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads=2) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.tokens(input_ids) + self.positions)
        keep = attention_mask.to(x.dtype)  # what follows from the input alone, the client computes in the clear
        mask = ((1.0 - keep) * -1.0e4)[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        weights = keep / keep.sum(-1, keepdim=True)
        return F.normalize((weights.unsqueeze(1) @ x).squeeze(1), dim=-1)


def small_model() -> tuple[nn.Module, list[Inputs]]:
    """A random encoder, and token ids of different true lengths, padded to 16."""
    torch.manual_seed(0)
    samples: list[Inputs] = []
    for count in (9, 16, 3, 12, 6):
        mask = (torch.arange(16) < count).long()
        samples.append({"input_ids": (torch.randint(1, 100, (16,)) * mask)[None], "attention_mask": mask[None]})
    return SmallEncoder().eval(), samples


def sentence_model(name: str, length: int) -> tuple[nn.Module, list[Inputs]]:
    """A sentence encoder from a directory (or the packaged one), and tokenized sentences."""
    from secure.models.sentence_encoder import find_packaged_model, load_sentence_encoder, load_tokenizer, tokenize

    directory = find_packaged_model() if name == "all-MiniLM-L6-v2" else name
    tokenizer = load_tokenizer(directory)
    pairs = [tokenize(tokenizer, text, length) for text in TEXTS]
    return load_sentence_encoder(directory), [{"input_ids": i, "attention_mask": m} for i, m in pairs]


def run(model: nn.Module, samples: Sequence[Inputs]) -> float:
    """Ask for the first sample, with the others for calibration; prints what it took and returns the cosine."""
    query, *calibration = samples
    compiled = secure.compile(model, query, calibration=calibration)
    program = compiled.program
    print(f"Program {program.digest[:16]}: {len(program.circuit)} instructions, {program.cost.rounds} rounds")

    parties = secure.InsecureInProcess(compiled)  # dealer, server and client in this memory: nothing is protected
    answer, report = parties.query(query)
    assert report.cost == program.cost  # the formulas are exact: what was counted is what the Program says

    with torch.no_grad():
        exact = model.double()(**query)
    cosine = float(F.cosine_similarity(answer, exact).min())
    cost = report.cost
    print(f"online    {report.online_seconds:.2f} s for both parties, one after the other")
    print(f"          {cost.to_first / 1e6:.2f} MB to the server, {cost.to_second / 1e6:.2f} MB to the client")
    print(f"offline   {report.dealer_seconds:.2f} s of the dealer, {cost.dealt / 1e6:.2f} MB to the server")
    print(f"cosine to the float64 model {cosine:.7f}, largest difference {float((answer - exact).abs().max()):.1e}")

    fixed = secure.plain_reference(compiled, query)  # the same Program on plain integers: no sharing either
    print(f"the same without sharing    {float((fixed - exact).abs().max()):.1e}  (approximations and fixed point)")
    return cosine


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a model directory, or all-MiniLM-L6-v2; a small random encoder by default")
    parser.add_argument("--length", type=int, default=32, help="padded length in tokens (with --model)")
    chosen = parser.parse_args(arguments)
    run(*(sentence_model(chosen.model, chosen.length) if chosen.model else small_model()))


if __name__ == "__main__":
    main()
