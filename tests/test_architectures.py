"""Models of transformers as their classes make them: a part of the table, and the page that is made of the table."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import architectures
from benchmarks.architectures import Answer, Row, compare, outputs_of, page, row_of
from benchmarks.zoo import CATALOGUE, Tiny

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "architectures.json"

OPENED = (  # each by a rule of its own
    "BERT qa",  # several outputs
    "MPNet encoder",  # a padding token of zeros
    "DeBERTa-v2/v3 encoder",  # selections by relative positions, the server's matrix of each head
    "GPT-2 seqcls",  # a row at a place that the client knows
    "GPT-Neo",  # masks of several sources
    "GPT-J",  # layouts in memory
    "Gemma 3",  # two windows, small values before norms
    "Falcon",  # a selection by a public index
    "T5 encoder-decoder",  # a bias that is masked
    "DeiT classification",  # class tokens
    "Swin classification",  # shifted windows
    "ConvNeXt classification",  # convolutions of each channel
    "ResNet classification",  # overlapping convolutions, the largest of a window, batch norms
    "MobileViT classification",  # interpolation
    "Whisper encoder",  # convolutions of one dimension
    "Wav2Vec2 CTC",  # group norms, convolutions in groups
    "PatchTST (time series)",  # outputs that the client computes alone
)
REFUSED = ("Longformer encoder", "FNet encoder", "ViT-MAE encoder", "Mamba")


def named(name: str) -> Tiny:
    (found,) = (tiny for tiny in CATALOGUE if tiny.name == name)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPENED)
def test_models_of_every_rule_compile_and_match_their_float(name: str) -> None:
    row = row_of(named(name))
    assert row.good, row


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_what_is_missing(name: str) -> None:
    tiny = named(name)
    row = row_of(tiny)
    assert tiny.refused
    assert tiny.refused in row.message
    assert not row.good


def test_the_catalogue_is_what_was_asked_for() -> None:
    assert len(CATALOGUE) == len({tiny.name for tiny in CATALOGUE}) == 148
    assert {tiny.kind for tiny in CATALOGUE} == set(architectures.SECTIONS)


def test_the_page_is_made_of_what_was_measured() -> None:
    kept = [
        Row(**{**row, "answers": {n: Answer(**a) for n, a in row["answers"].items()}})
        for row in json.loads(KEPT.read_text())["rows"]
    ]
    assert [row.name for row in kept] == [tiny.name for tiny in CATALOGUE]
    assert sum(row.good for row in kept) >= 135
    assert all(tiny.refused in row.message for row, tiny in zip(kept, CATALOGUE, strict=True))
    assert page(kept) == (ROOT / "docs" / "architectures.md").read_text()


def test_a_wrong_answer_is_seen() -> None:
    """The worst of the outputs counts, and a cosine alone is not enough to be bad where the label is the same."""
    expected = {"logits": torch.tensor([[1.0, 3.0, 2.0]]), "hidden": torch.randn(1, 4, 8)}
    wrong = expected["hidden"].flip(-1)
    worst = compare({"logits": expected["logits"], "hidden": wrong}, expected)
    assert worst.cosine < 0.99
    assert not worst.same
    row = Row("a model", "encoder", answers={"wider": worst})
    assert not row.good
    assert replace(row, answers={"wider": compare(dict(expected), expected)}).good
    assert not replace(row, message="refused", answers={}).good
    assert set(outputs_of((torch.ones(1), [torch.ones(2)]))) == {"0", "1.0"}
