"""Programs without weights: the same circuits as with them, in no memory."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import secure
from secure.cost.count import profile
from secure.cost.outline import SHAPES, is_shape, outline, outline_shape
from secure.models.hollow import hollow

SMALL = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 3000,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


def test_an_outline_does_what_the_compiled_program_does() -> None:
    """The same layers and matrix products on the same shapes; rings, and how squares are made in them, differ."""
    torch.manual_seed(0)
    samples = [{"x": torch.randn(1, 4, 16)} for _ in range(5)]
    compiled = secure.compile(Block().eval(), samples[0], calibration=samples[1:]).program
    outlined = outline(Block().eval(), samples[0])
    kinds = [
        [
            (i.protocol.kind, i.protocol.out.shape)
            for i in p.circuit
            if i.protocol.kind == "linear" or getattr(i.protocol, "matrix", False)
        ]
        for p in (compiled, outlined)
    ]
    assert kinds[0] == kinds[1]
    assert outlined.weight_shapes == compiled.weight_shapes
    assert profile(outlined).products == profile(compiled).products
    assert outlined.labels["ranges"].startswith("assumed")
    assert compiled.labels["ranges"] == "calibrated"


def test_an_outline_holds_together_as_a_program() -> None:
    program = outline(Block().eval(), {"x": torch.randn(1, 4, 16)})
    assert secure.Program.from_bytes(program.encoded).digest == program.digest
    assert profile(program).total == program.cost


def test_hollow_parameters_take_no_memory_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4096, 4096), nn.Linear(4096, 4096)
            self.b.weight = self.a.weight
            self.small = nn.Buffer(torch.arange(4.0))

    model = hollow(Tied)
    assert isinstance(model, Tied)
    assert model.a.weight is model.b.weight
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) <= 16
    assert model.small.tolist() == [0, 1, 2, 3]  # what a model computes for itself keeps its values


@pytest.mark.parametrize("embedding", ["one-hot", "client-table"])
def test_a_configuration_file_is_enough(tmp_path: Path, embedding: str) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL))
    assert is_shape(str(file))
    program = outline_shape(str(file), 8, embedding=embedding)
    found = profile(program)
    linear = 8 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    attention = 2 * 4 * 2 * 2 * 8 * 8 * 16  # layers, products a matrix, score and value, heads, 8 x 8 x 16
    one_hot = 8 * 3000 * 32 if embedding == "one-hot" else 0
    assert found.products == linear + attention + one_hot
    assert found.total == program.cost


def test_a_decoder_has_an_outline_too() -> None:
    pytest.importorskip("transformers")
    shape = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "small", {**shape, "intermediate_size": 128, "vocab_size": 500})
        program = outline_shape("small", 8, embedding="client-table")
    assert {"linear", "exponential", "compare"} <= {i.protocol.kind for i in program.circuit}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "has no model_type"), ('{"hidden_size": 8}', "model_type")],
)
def test_a_configuration_that_is_none_says_so(tmp_path: Path, text: str, message: str) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        outline_shape(str(file), 8)
    assert "hint:" in str(raised.value)


def test_an_unknown_shape_is_no_shape() -> None:
    assert not is_shape("gpt-17")
    assert not is_shape("/nowhere/config.json")
