"""The self-test of models with heads: scores, labels and spans against the original's; what it says when it cannot."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secure
from secure.deployments.compilation import Compilation
from secure.deployments.compiled import build, task_of
from secure.deployments.deployment import CompileOptions
from secure.deployments.self_test import Accept, self_test
from secure.errors import OutOfRange
from secure.models.calibration import HELD_OUT
from secure.models.images import natural, synthetic
from secure.models.settings import (
    IDENTITY,
    LABEL,
    LOGITS,
    PROBABILITIES,
    SIGMOID,
    SOFTMAX,
    SPAN,
    ImageSettings,
    TaskSettings,
)
from secure.tasks.closeness import COSINE, Compared, Cosine, Judged, ScoreError
from secure.tasks.digits import prepared, untrained
from secure.tasks.embed import Embed
from secure.tasks.task import Loaded
from tests.heads import write_head
from tests.test_images import directory as images  # the fixture
from tests.tiny import sentences, write_model

for module in ("transformers", "tokenizers"):
    pytest.importorskip(module)

__all__ = ["images"]

LENGTH = 12
TEXTS = tuple(sentences(8, LENGTH - 2))
FORMS = [
    *(("classify", form) for form in ("label", "probabilities", "logits")),
    *(("tag", form) for form in ("label", "probabilities", "logits")),
    *(("answer", form) for form in ("span", "logits")),
    ("rerank", "logits"),
]
SAYS = {
    "label": r"self-test: (\d+) of \1 labels are the original's",
    "span": r"self-test: (\d+) of \1 spans are the original's",
    "probabilities": r"self-test: largest error of scores [\d.e-]+ of their spread \(1\)",
    "logits": r"self-test: largest error of scores [\d.e-]+ of their spread \(\d",
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a random model for a task."""
    return cache(lambda task, seed=0: write_head(tmp_path_factory.mktemp("heads") / "m", task, seed))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are calibrated on few texts, of words that their tokenizer knows."""
    for module in ("secure.tasks.headed", "secure.models.text"):
        monkeypatch.setattr(f"{module}.SENTENCES", TEXTS)


def loaded(directory: Path, task: str, reveal: str) -> Loaded:
    return task_of(str(directory), task, reveal).load(str(directory), LENGTH, TEXTS)


def compilation(directory: Path, **options: Any) -> Compilation:
    chosen = {"deployment": secure.TwoParty(), "lengths": (LENGTH,), "sentences": TEXTS, **options}
    return Compilation(str(directory), **chosen)


# models that are what they should be, and others


@pytest.mark.parametrize(("task", "reveal"), FORMS)
def test_a_model_with_a_head_says_how_close_it_is(task: str, reveal: str, heads: Callable[..., Path]) -> None:
    """Scores, labels and spans of other weights are no rounding, and are refused."""
    found = loaded(heads(task), task, reveal)
    compiled = build(found, secure.TwoParty(), CompileOptions(), {})
    about = self_test(compiled, found).about
    assert re.search(SAYS[reveal] + r".*, on [235] texts, one at the full length of each$", about), about
    refusal = r"gives other answers than m: .* at 12 tokens; 0\.05 is accepted\nhint: .*--accept-error raises the bar"
    with pytest.raises(secure.InvalidInput, match=refusal):
        self_test(compiled, replace(found, module=_opposite(found.module)))


def _opposite(model: nn.Module) -> nn.Module:
    """A model whose scores have the other sign."""
    found: Any = copy.deepcopy(model)
    head = found.model.qa_outputs if hasattr(found.model, "qa_outputs") else found.model.classifier
    with torch.no_grad():
        head.weight.neg_()
        head.bias.neg_()
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.ThreeParty()], ids=lambda d: d.name)
def test_several_sizes_are_judged_together(deployment: secure.Deployment, heads: Callable[..., Path]) -> None:
    sizes: dict[str, Any] = {"lengths": (LENGTH, LENGTH - 4)} if deployment.takes_sizes else {}
    compiled = compilation(heads("tag"), deployment=deployment, batches=(2,), **sizes).run()
    assert f"on {3 + len(sizes)} texts" in compiled.about  # three at the greatest length, one at the other
    assert all(size.about == compiled.about for size in compiled.sizes)


@pytest.mark.parametrize("reveal", ["label", "probabilities", "logits"])
def test_images(reveal: str, images: Path) -> None:
    found = Compilation(str(images), secure.TwoParty(), reveal=reveal).run()
    assert "self-test: " in found.about
    assert found.about.endswith("on 5 inputs")
    module = task_of(str(images), "", reveal).load(str(images), 0)
    with pytest.raises(secure.InvalidInput, match="gives other answers"):
        self_test(found, replace(module, module=_opposite(module.module)))


@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.Ckks()], ids=lambda d: d.name)
def test_digits(deployment: secure.Deployment) -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    found = prepared(untrained(1))
    found = replace(found, samples=found.samples[:80])
    compiled = build(found, deployment, CompileOptions(), {})
    assert "largest error of scores" in self_test(compiled, found).about
    with pytest.raises(secure.InvalidInput, match=r"gives other answers than digits: [^;]*spread \([\d.]+\); 0\.05 is"):
        self_test(compiled, replace(found, module=untrained(1)))


# inputs


@pytest.mark.parametrize("task", ["classify", "tag", "answer", "rerank"])
def test_held_out_inputs_fill_the_length_and_are_no_calibration(task: str, heads: Callable[..., Path]) -> None:
    found = loaded(heads(task), task, "")
    assert found.held_out is not None
    for length in (LENGTH, LENGTH - 4):
        made = found.held_out(length)
        lengths = [int(each["attention_mask"].sum()) for each in made]
        assert lengths[0] == length
        assert len(set(lengths)) > 1 or task in ("answer", "rerank")  # whose shortest pair fills so few tokens
        paired = ["token_type_ids" in each and bool(each["token_type_ids"].any()) for each in made]
        assert any(paired) == (task != "tag")
        assert all(paired) == (task in ("answer", "rerank"))
    if task == "answer":
        assert all(each["context"].any() and not each["context"][:, 0].any() for each in found.held_out(LENGTH))
    texts = [text for each in TEXTS for text in each.split("\t")]
    assert not set(texts) & set(HELD_OUT)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_calibrate_nothing(channels: int) -> None:
    """They are of the processor's range, differ from each other and from those that set ranges, and vary smoothly."""
    half = (0.5,) * channels
    settings = ImageSettings(channels, 24, 17, (24, 17), 2, False, 1 / 255, half, half)
    ours, known = ([each["pixel_values"] for each in make(settings)] for make in (natural, synthetic))
    assert all(each.shape == (1, channels, 24, 17) and each.isfinite().all() for each in ours)
    assert min(float(each.min()) for each in ours) == pytest.approx(-1.0)
    assert max(float(each.max()) for each in ours) == pytest.approx(1.0)
    everything = [*ours, *known]
    assert all(not torch.equal(one, other) for i, one in enumerate(ours) for other in everything[i + 1 :])
    for each in ours:
        steps = (each[..., 1:] - each[..., :-1]).abs().mean()
        assert steps < each.flatten()[torch.randperm(each.numel())].diff().abs().mean() * 0.8
    assert torch.equal(ours[0], next(natural(settings))["pixel_values"])  # the same at every start


# the measure


def judged(
    found: Tensor,
    scores: Tensor,
    reveal: str = LOGITS,
    activation: str = SOFTMAX,
    accept: float = 0.01,
    counted: Tensor | None = None,
) -> Judged:
    """What is said of one answer, given the original's scores."""

    class Original(nn.Module):
        def scored(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return scores, counted

    settings = TaskSettings(reveal, activation=activation)
    return ScoreError(settings).judge(Original(), [Compared({"x": torch.zeros(1)}, found)], accept)


def test_scores_are_measured_by_their_spread() -> None:
    scores = torch.tensor([[0.0, 40.0]])
    assert judged(scores + 0.39, scores).accepted
    assert not judged(scores + 0.41, scores).accepted
    small = torch.tensor([[0.0, 0.1]])
    assert judged(small + 0.009, small).accepted  # a hundredth of a logit moves no probability by more than 0.0025
    assert not judged(small + 0.011, small).accepted
    assert not judged(small + 0.009, small, activation=IDENTITY).accepted  # a number of its own unit
    assert judged(small + 0.0009, small, activation=IDENTITY).accepted
    assert judged(torch.full((3, 1), 5.00009), torch.full((3, 1), 5.0), activation=IDENTITY).accepted


def test_probabilities_are_compared_as_such() -> None:
    scores = torch.tensor([[0.0, 3.0], [2.0, 1.0]])
    for activation, made in ((SOFTMAX, scores.softmax(-1)), (SIGMOID, scores.sigmoid())):
        assert judged(made + 0.009, scores, PROBABILITIES, activation).accepted
        assert not judged(made + 0.011, scores, PROBABILITIES, activation).accepted


def test_a_label_counts_as_another_only_if_scores_say_so() -> None:
    scores = torch.tensor([[1.0, 1.019, -9.0], [0.0, 5.0, 1.0]])  # a spread of 14
    same = judged(torch.tensor([1.0, 1.0]), scores, LABEL)
    assert (same.accepted, same.words) == (True, "2 of 2 labels are the original's")
    near = judged(torch.tensor([0.0, 1.0]), scores, LABEL)
    assert near.accepted
    assert near.words.startswith("1 of 2 labels are the original's, others would be with scores wrong by 0.00068 of")
    assert not judged(torch.tensor([1.0, 2.0]), scores, LABEL).accepted
    assert not judged(torch.tensor([1.0, 2.0]), scores, LABEL, accept=0.14).accepted
    assert judged(torch.tensor([1.0, 2.0]), scores, LABEL, accept=0.15).accepted  # half of 4, of 14


def test_of_several_labels_each_is_one() -> None:
    scores = torch.tensor([[-0.01, 0.5, -3.0]])
    assert judged(torch.tensor([[0.0, 1.0, 0.0]]), scores, LABEL, SIGMOID).words == "3 of 3 labels are the original's"
    assert judged(torch.tensor([[1.0, 1.0, 0.0]]), scores, LABEL, SIGMOID).accepted
    assert not judged(torch.tensor([[0.0, 0.0, 0.0]]), scores, LABEL, SIGMOID).accepted


def test_what_clients_do_not_look_at_does_not_count() -> None:
    scores = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [5.0, 0.0]]])
    tokens = torch.tensor([[[1], [1], [0]]])
    found = torch.tensor([[0.0, 1.0, 1.0]])
    assert judged(found, scores, LABEL, counted=tokens).words == "2 of 2 labels are the original's"
    assert not judged(found, scores, LABEL).accepted
    wrong = scores.clone()
    wrong[0, 2] = 99.0
    assert judged(wrong, scores, counted=tokens).accepted
    assert not judged(wrong, scores).accepted
    inside = torch.tensor([[False, True, True]])
    spans = torch.tensor([[9.0, 1.0, 0.0]])
    assert judged(torch.tensor([1.0]), spans, SPAN, counted=inside).accepted
    assert not judged(torch.tensor([0.0]), spans, SPAN, counted=inside, accept=1.0).accepted  # outside of the context


@pytest.mark.parametrize("index", [-1.0, 2.0, 1e30, float("inf"), float("nan")])
def test_what_is_no_choice_is_never_accepted(index: float) -> None:
    scores = torch.zeros(1, 2)
    assert judged(torch.tensor([1.0]), scores, LABEL).accepted  # as good as the other
    assert not judged(torch.tensor([index]), scores, LABEL, accept=1.0).accepted


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("activation", [SOFTMAX, SIGMOID, IDENTITY])
def test_scores_that_are_no_numbers_are_never_accepted(value: float, activation: str) -> None:
    scores = torch.zeros(2, 2)
    for found, wanted in ((scores + value, scores), (scores, scores + value), (scores + value, scores + value)):
        assert not judged(found, wanted, LOGITS, activation, accept=1.0).accepted
    assert not judged(scores + value, scores, PROBABILITIES, activation, accept=1.0).accepted


@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=6),
    st.lists(st.floats(-1, 1), min_size=6, max_size=6),
    st.floats(1e-3, 0.5),
)
def test_a_label_of_scores_that_are_near_is_accepted(values: list[float], moved: list[float], error: float) -> None:
    """Scores that are wrong by so many parts of their spread choose labels that the same bar accepts."""
    scores = torch.tensor([values], dtype=torch.float64)
    spread = max(1.0, float(scores.max() - scores.min()))
    ours = scores + error * spread * torch.tensor([moved[: len(values)]], dtype=torch.float64)
    bar = error * (1 + 1e-9) + 1e-12
    assert judged(ours.argmax(-1).double(), scores, LABEL, accept=bar).accepted
    assert judged(ours, scores, accept=bar).accepted
    both = (ours > 0).double()
    assert judged(both, scores, LABEL, SIGMOID, accept=2 * bar).accepted


def test_cosines_are_told_with_their_length() -> None:
    module, x = nn.Identity(), torch.tensor([[3.0, 4.0]])
    answered = [Compared({"input": x}, found, length) for found, length in ((x, 8), (x.flip(-1), 12))]
    assert Cosine().judge(module, answered, 0.9) == Judged(True, "lowest cosine to the original 0.9600000", 12)
    assert not COSINE.judge(module, answered, 0.97).accepted


# what cannot be tested


def test_a_bar_of_another_measure_means_nothing(heads: Callable[..., Path], tmp_path: Path) -> None:
    told = list[str]()

    def tell(done: int, of: int, what: str) -> None:
        told.append(what)

    with pytest.raises(secure.InvalidInput, match=r"--accept-cosine 0\.5 means nothing .*\nhint: --accept-error"):
        compilation(heads("classify"), accept=Accept(cosine=0.5)).run(tell)
    with pytest.raises(secure.InvalidInput, match=r"--accept-error 0\.5 means nothing .*\nhint: --accept-cosine"):
        compilation(write_model(tmp_path / "m"), lengths=(8,), accept=Accept(error=0.5)).run(tell)
    assert set(told) == {"loading the model"}, "nothing was compiled"
    for wrong in ({"cosine": 1.5}, {"cosine": float("nan")}, {"error": 0.0}, {"error": 2.0}, {"error": float("nan")}):
        with pytest.raises(secure.InvalidInput):
            Accept(**wrong)


def test_a_bar_is_that_of_the_user(heads: Callable[..., Path]) -> None:
    with pytest.raises(secure.InvalidInput, match=r"at 12 tokens; 1e-09 is accepted"):
        compilation(heads("classify"), reveal="logits", accept=Accept(error=1e-9)).run()


def test_a_self_test_that_did_not_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Embed().load(str(write_model(tmp_path / "m")), 8, sentences())
    compiled = build(found, secure.TwoParty(), CompileOptions(embedding="client-table"), {})
    nothing: list[Any] = [None, lambda _: []]
    for none in nothing:
        about = self_test(compiled, replace(found, held_out=none)).about
        assert "self-test: not run (there are no inputs but those that calibrated the model)" in about
    monkeypatch.delattr("secure.deployments.circuits.CircuitDeployment.reference")
    about = self_test(compiled, found).about
    assert "self-test: not run (two-party has no plain arithmetic)" in about


@pytest.mark.parametrize("kind", [secure.InvalidInput, OutOfRange])
def test_a_model_that_answers_no_held_out_input_is_refused(
    kind: type[Exception], heads: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they leave its ranges or are no inputs of it: clients would fare no better."""

    def refused(*_: Any) -> Any:
        raise kind("the input 'x' is refused, as it is\nhint: none")

    monkeypatch.setattr("secure.deployments.self_test.plain_reference", refused)
    said = "left the ranges of calibration" if kind is OutOfRange else "were refused"
    with pytest.raises(
        secure.InvalidInput, match=f"the self-test: 5 of 5 inputs {said}: the input 'x' is refused\nhint"
    ):
        compilation(heads("classify")).run()
