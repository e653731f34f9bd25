"""Programs without weights, for predicting the cost of models that are too large to load here.

``outline`` lowers a module whose parameters take no memory. Nothing is calibrated, so that ranges are assumed. The
result is for counting costs and nothing else: rings, and so bytes, may differ by a few bits from those of a real model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from approximations import APPROXIMATIONS
from approximations.activations import GELU_FORMS
from protocols.fixedpoint import FixedPoint
from secure.errors import InvalidInput, MissingPackage
from secure.frontend import lower_outline
from secure.models.hollow import hollow
from secure.mpc.compile import check_answer_bits, chosen, emit_program
from secure.mpc.network import LOOPBACK, find_network
from secure.mpc.prices import DEFAULT, Prices
from secure.mpc.program import Program
from secure.polynomial.forms import forms
from secure.polynomial.recipe import Recipe
from secure.polynomial.swap import polynomialize

REACH = 32.0

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "bert-base": {"model_type": "bert"},
    "bert-large": {
        "model_type": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "llama-7b": {"model_type": "llama"},
}
"""Well-known shapes as Hugging Face configurations; other settings have the library's defaults."""


def outline(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor],
    *,
    reach: float = REACH,
    embedding: str = "one-hot",
    gelu: str = GELU_FORMS[0],
    approximations: str = APPROXIMATIONS[0],
    fixed_point: FixedPoint | None = None,
    network: str | None = None,
    answer_bits: int | None = None,
    checked: bool = True,
    labels: Mapping[str, str] | None = None,
    prices: Prices = DEFAULT,
) -> Program:
    """Return the Program of a module for values within ``reach``. It reads no weight, so that ``hollow`` ones suffice.

    Raises UnsupportedOperation and DoesNotFit as ``secure.compile`` does.
    """
    fixed, functions = fixed_point or FixedPoint(), chosen(approximations, gelu)
    check_answer_bits(answer_bits, fixed)
    lowered, ranges = lower_outline(
        model,
        example_inputs,
        reach=reach,
        embedding=embedding,
        functions=functions,
        late_bytes=prices.late_bytes,
        stacks=True,
    )
    named = {"embedding": embedding, **functions.labels, **(labels or {}), "ranges": f"assumed, up to {reach:g}"}
    found = find_network(network or LOOPBACK)
    return emit_program(lowered, ranges, fixed, named, found, prices, answer_bits, checked=checked)


def is_shape(model: str) -> bool:
    """True if ``outline_shape`` takes it: one of SHAPES, or a configuration file."""
    return model in SHAPES or (model.endswith(".json") and Path(model).is_file())


def outline_shape(
    shape: str,
    length: int,
    *,
    embedding: str = "one-hot",
    gelu: str = GELU_FORMS[0],
    approximations: str = APPROXIMATIONS[0],
    fixed_point: FixedPoint | None = None,
    network: str | None = None,
    answer_bits: int | None = None,
    checked: bool = True,
    recipe: Recipe | None = None,
    prices: Prices = DEFAULT,
    batch: int = 1,
) -> Program:
    """Return the Program that computes hidden states for ``length`` tokens of ``batch`` texts, without weights.

    shape: one of SHAPES, or the path of a Hugging Face ``config.json``. recipe: put the model into polynomial form,
    with the ranges that training aims at. Raises MissingPackage and InvalidInput too.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise MissingPackage("transformers is not installed", "pip install 'unseen[models]'") from None
    if shape in SHAPES:
        settings = dict(SHAPES[shape])
    else:
        settings = _read(Path(shape))
    configuration = AutoConfig.for_model(**settings)
    inner = hollow(lambda: AutoModel.from_config(configuration, trust_remote_code=False, attn_implementation="eager"))
    if recipe is not None:
        polynomialize(inner, recipe)
        for _, form in forms(inner):
            form.assume()
    model = _Encoder(inner)
    inputs = {"input_ids": torch.zeros((batch, length), dtype=torch.int64)}
    labels = {"model": shape if shape in SHAPES else Path(shape).parent.name, "length": str(length)}
    labels |= {"batch": str(batch)} if batch > 1 else {}
    return outline(
        model,
        inputs,
        embedding=embedding,
        gelu=gelu,
        approximations=approximations,
        fixed_point=fixed_point,
        network=network,
        answer_bits=answer_bits,
        checked=checked,
        labels=labels,
        prices=prices,
    )


def _read(path: Path) -> dict[str, Any]:
    hint = "give a Hugging Face config.json, whose model_type says what it is"
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read as JSON: {error}", hint) from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise InvalidInput(f"{path} has no model_type", hint)
    return settings


class _Encoder(nn.Module):
    """A model from token ids to hidden states, without cache or padding. A decoder keeps its causal mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes_cache = hasattr(model.config, "use_cache")

    def forward(self, input_ids: Tensor) -> Tensor:
        options = {"use_cache": False} if self.takes_cache else {}
        hidden: Tensor = self.model(input_ids=input_ids, **options).last_hidden_state
        return hidden
