"""The bias study: what is asked follows from what stands before it, and scores are what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bias

LENGTHS = (8, 32, 256)


def drawn(name: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return bias.TASKS[name].draw(5, length, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", LENGTHS)
def test_recall_asks_for_values_that_were_given(length: int) -> None:
    given, answers, counts = drawn("recall", length)
    for tokens, answer, asked in zip(given.argmax(-1).tolist(), answers.tolist(), counts.tolist(), strict=True):
        known = dict(zip(tokens[: length // 2 : 2], tokens[1 : length // 2 : 2], strict=True))
        assert len(known) == length // 4  # each key once
        places = [i for i, counted in enumerate(asked) if counted]
        assert sorted(tokens[i] for i in places) == sorted(known)
        assert all(known[tokens[i]] == answer[i] + 4 * bias.TOKENS == tokens[i + 1] for i in places)


@pytest.mark.parametrize("length", LENGTHS)
def test_induction_asks_for_what_followed(length: int) -> None:
    given, answers, counts = drawn("induction", length)
    for tokens, answer, asked in zip(given.argmax(-1).tolist(), answers.tolist(), counts.tolist(), strict=True):
        places = [i for i, counted in enumerate(asked) if counted]
        assert len(places) == length // 2 - 1
        assert all(tokens[: length // 2].count(tokens[i]) == 1 for i in places)
        assert all(answer[i] == tokens[tokens.index(tokens[i]) + 1] for i in places)


@pytest.mark.parametrize("length", [32, 256])
def test_regression_asks_for_what_least_squares_finds(length: int) -> None:
    given, answers, counts = drawn("regression", length)
    x, y = given[:, :-2:2, :-1], given[:, 1:-2:2, -1:]
    found = given[:, -2:-1, :-1] @ torch.linalg.lstsq(x, y).solution
    assert counts.sum(1).tolist() == [1] * len(given)
    assert torch.allclose(found[:, 0, 0], answers[counts], atol=1e-4)
    assert not given[:, -2, -1].any()  # the answer is not told before


class Knowing(nn.Module):
    """What gives each place of a sequence a number or the score of a class."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, given: Tensor) -> Tensor:
        x, y = given[:, :-2:2, :-1], given[:, 1:-2:2, -1:]
        found = given[..., :-1] @ torch.linalg.lstsq(x, y).solution
        out: Tensor = found * self.factor
        return out


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias, "ASKED", 128)


def test_scores_are_parts_of_guessing_zero() -> None:
    task = bias.TASKS["regression"]
    assert bias.score(task, Knowing(1.0), 32) == pytest.approx(1, abs=1e-4)
    assert bias.score(task, Knowing(0.5), 32) == pytest.approx(0.75, abs=1e-3)
    assert bias.score(task, Knowing(0.0), 32) == 0
    assert bias.score(task, Knowing(-1.0), 32) == pytest.approx(-3, abs=1e-3)


@pytest.mark.parametrize("form", bias.FORMS)
def test_forms_are_causal_means(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, values = (torch.randn(2, 3, 6, n, generator=generator) for n in (6, 4))
    whole = bias.attend(form, scores, values)
    assert torch.allclose(bias.attend(form, scores[..., :4, :4], values[..., :4, :]), whole[..., :4, :], atol=1e-5)
    total = bias.attend(form, 3 * scores + 4, torch.ones_like(values))
    assert 0.9 < float(total.min()) <= float(total.max()) < 1 + 1e-5  # but for eps in the division
    if form.startswith("power"):
        assert torch.allclose(bias.attend(form, -scores, values), whole, atol=1e-5)


def test_a_run_tells_scores_at_every_length() -> None:
    found = bias.trained(bias.TASKS["recall"], "softmax", 0, 3, 8)
    assert set(found) == {"seconds", *(f"x{factor}" for factor in bias.FARTHER)}
    assert all(0 <= found[f"x{factor}"] <= 1 for factor in bias.FARTHER)
