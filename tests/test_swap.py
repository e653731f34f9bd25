"""Polynomial forms in Hugging Face models of several architectures, and in models without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure
from secure.cost.outline import outline_shape
from secure.polynomial.forms import PolynomialActivation, PolynomialRMSNorm, PowerAttention, forms, freeze_untrained
from secure.polynomial.recipe import Recipe, read_recipe
from secure.polynomial.swap import mask_weights, polynomialize

COMPARING = {"compare", "indicators", "select", "open_bits", "exponential"}
WIDTH, LENGTH = 32, 6


def _models() -> dict[str, nn.Module]:
    import transformers as t

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    wide: dict[str, Any] = {"intermediate_size": 48}
    tokens: dict[str, Any] = {"vocab_size": 60, "max_position_embeddings": 16}
    grouped: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 16}
    return {
        "bert": t.BertModel(t.BertConfig(**shape, **wide, **tokens), add_pooling_layer=False),
        "roberta": t.RobertaModel(t.RobertaConfig(**shape, **wide, **tokens), add_pooling_layer=False),
        "distilbert": t.DistilBertModel(t.DistilBertConfig(dim=WIDTH, n_layers=1, n_heads=2, hidden_dim=48, **tokens)),
        "gpt2": t.GPT2Model(t.GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, n_positions=16, vocab_size=60)),
        "llama": t.LlamaModel(t.LlamaConfig(**shape, **grouped, **wide, **tokens)),
    }


class Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.first = model, nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        config: Any = self.model.config
        options = {"use_cache": False} if hasattr(config, "use_cache") else {}
        out: Tensor = self.model(inputs_embeds=self.first(hidden), **options).last_hidden_state
        return out


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_an_architecture_in_polynomial_form_under_the_protocol(name: str) -> None:
    model = Hidden(_models()[name].eval())
    names = set(model.state_dict())
    polynomialize(model.model, Recipe())
    assert set(model.state_dict()) == names
    samples = [{"hidden": torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(i))} for i in range(12)]
    with torch.no_grad():
        exact = model(**samples[3])
        freeze_untrained(model, lambda: [model(**sample) for sample in samples])
        plain = model(**samples[3])
    assert not torch.equal(exact, plain)
    compiled = secure.compile(model, samples[0], calibration=samples[1:], checked=False)
    assert not {i.protocol.kind for i in compiled.program.circuit} & COMPARING
    session = secure.insecure_in_process(compiled)
    answer, report = session.query(samples[3]), session.reports[-1]
    assert (report.rounds, report.traffic) == (compiled.cost.rounds, compiled.cost.traffic)
    assert float(F.cosine_similarity(answer.float(), plain, dim=-1).min()) > 0.9999


def test_grouped_queries_share_keys_and_values() -> None:
    model = _models()["llama"].eval()
    polynomialize(model, Recipe())
    kinds = {type(form) for _, form in forms(model)}
    assert kinds == {PowerAttention, PolynomialRMSNorm, PolynomialActivation}
    x = torch.randn(1, LENGTH, WIDTH)
    changed = x.clone()
    changed[:, -1] += 1.0
    with torch.no_grad():
        a, b = (model(inputs_embeds=v, use_cache=False).last_hidden_state for v in (x, changed))
    assert torch.equal(a[:, :-1], b[:, :-1])  # causal: no position sees a later one
    assert not torch.equal(a[:, -1], b[:, -1])


def test_rms_norm_is_what_it_replaces_until_its_range_is_frozen() -> None:
    original = nn.RMSNorm(WIDTH, eps=1e-5)
    norm = PolynomialRMSNorm(original, Recipe())
    x = torch.randn(5, WIDTH)
    assert torch.allclose(norm(x), original(x), atol=1e-6)
    norm.assume()
    with torch.no_grad():
        near = (norm(x) - original(x)).abs().max() / original(x).abs().max()
    assert 1e-6 < float(near) <= norm.error() * 1.01


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_a_shape_in_polynomial_form_has_a_price(tmp_path: Path, model_type: str) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": model_type, "vocab_size": 100, **shape}))
    exact = outline_shape(str(config), 16, embedding="client-table")
    polynomial = outline_shape(str(config), 16, embedding="client-table", recipe=Recipe(), checked=False)
    assert not {i.protocol.kind for i in polynomial.circuit} & COMPARING
    assert polynomial.cost.rounds < 0.7 * exact.cost.rounds
    assert polynomial.cost.to_first < exact.cost.to_first


@pytest.mark.parametrize(
    "layers",
    [
        {"a": {"low": 0.0, "high": 1.0, "steps": 1}},
        {"a": {"low": 1.0, "high": 0.5, "steps": 1}},
        {"a": {"low": 1.0, "high": float("inf"), "steps": 1}},
        {"a": {"low": 0.1, "high": 1.0, "steps": 1000}},
        {"a": {"coefficients": [0.0] * 100}},
        {"a": {"coefficients": [float("nan")]}},
        {"a": {"surprise": 1.0}},
        {"a": {"low": "0.1", "high": "0.9", "steps": "1"}},
        {"a": {"low": None, "high": None, "steps": 1}},
        {"a": {"low": 0.1, "high": 0.9}},
        {"a": {"coefficients": [], "seen": 1.0}},
        {"a": {"coefficients": [1.0]}},
        {"a": {"coefficients": [1e300], "seen": 1.0}},
        {"a": {"low": 1e-300, "high": 1e300, "steps": 1}},
    ],
)
def test_a_recipe_file_that_cannot_be_is_refused(tmp_path: Path, layers: dict[str, Any]) -> None:
    path = tmp_path / "polynomial.json"
    path.write_text(json.dumps({"layers": layers}))
    with pytest.raises(ValueError, match="is no recipe") as caught:
        read_recipe(path)
    assert "hint:" in str(caught.value)
    path.write_text(json.dumps({"shift": 1e-300}))
    with pytest.raises(ValueError, match="is no recipe"):
        read_recipe(path)
    path.write_text(Recipe(layers={"a": {"low": 0.1, "high": 1.0, "steps": 1, "centre": 0.5}}).model_dump_json())
    assert read_recipe(path).layers["a"]["low"] == 0.1


class Tied(nn.Module):
    """Two linear layers behind one norm that share a bias and not their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.bias = self.a.bias
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        out: Tensor = self.a(h) + self.b(h)
        return out


def test_a_norm_folds_into_layers_that_share_a_bias() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    samples = [{"x": torch.randn(1, 4, 8)} for _ in range(20)]
    compiled = secure.compile(model, samples[0], calibration=samples[1:])
    with torch.no_grad():
        assert float((secure.plain_reference(compiled, samples[0]) - model(**samples[0])).abs().max()) < 2e-3


def test_masks() -> None:
    query = torch.zeros(1)
    summand = torch.tensor([[[[0.0, -1e4, 0.0]]], [[[-1e4, -1e4, -1e4]]]])
    weights = mask_weights(summand, query)
    assert weights is not None
    assert weights.flatten().tolist() == [0.5, 0.0, 0.5, 0.0, 0.0, 0.0]
    assert torch.equal(weights, torch.as_tensor(mask_weights(summand == 0, query)))
    assert mask_weights(None, query) is None


def test_a_recipe_for_another_model_is_refused() -> None:
    recipe = Recipe(layers={"elsewhere": {"low": 0.1, "high": 1.0, "steps": 1}})
    with pytest.raises(ValueError, match="'elsewhere'"):
        polynomialize(_models()["bert"], recipe)
