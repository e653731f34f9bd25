"""Our lowered models on CrypTen's own operations: an implementation of secret sharing that shares no line with ours.

Skipped where CrypTen is not installed; see benchmarks/peers/crypten_check.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers.crypten_check import EVALUATE, Comparison, OutOfRange, cross_check
from secure.lowering.primitives import PRIMITIVES

# looked for, not imported: it imports only after a shim, with warnings, and the parties are processes of their own
needs_crypten = pytest.mark.skipif(importlib.util.find_spec("crypten") is None, reason="CrypTen is not installed")


def close(found: Comparison, tolerance: float) -> None:
    """CrypTen computes what our protocols do, both what the trace says, and that what the model does."""
    scale = float(found.model.abs().max())
    for answer in (found.crypten, found.ours, found.trace):
        assert float((answer - found.model).abs().max()) < tolerance * scale
    assert float((found.crypten - found.ours).abs().max()) < tolerance * scale


def test_every_primitive_has_a_counterpart() -> None:
    assert {"input", *EVALUATE} == set(PRIMITIVES)


@needs_crypten
@pytest.mark.slow
def test_a_tiny_transformer(directory: Path) -> None:
    from secure.models.sentence_encoder import load_sentence_encoder, load_tokenizer, tokenize
    from tests.tiny import LENGTH, TEXT, sentences

    encoder, tokenizer = load_sentence_encoder(directory), load_tokenizer(directory)

    def inputs(text: str) -> dict[str, Tensor]:
        return dict(zip(("input_ids", "attention_mask"), tokenize(tokenizer, text, LENGTH), strict=True))

    found = cross_check(encoder, inputs(TEXT), [inputs(text) for text in sentences()])
    close(found, 2e-3)  # CrypTen 2e-4 in twelve queries
    assert {"linear", "matmul", "piecewise", "exp_below", "row_bound"} <= set(found.errors)


class Tall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.square(1000 * self.linear(x))


@needs_crypten
def test_values_beyond_its_range_are_refused() -> None:
    with pytest.raises(OutOfRange, match="'mul' reaches"):
        cross_check(Tall(), {"x": torch.full((1, 2), 8.0)}, [])
