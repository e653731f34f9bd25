"""The settings of a task, which come from a server that the client does not trust, and pairs of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import secure
from secure.lowering.client_inputs import MAXIMUM_LABEL, MAXIMUM_SETTINGS, SETTINGS, TASK
from secure.models import pairs as pairs_module
from secure.models.pairs import NEITHER, encode
from secure.models.served_tokenizer import load_tokenizer
from secure.models.settings import MAXIMUM_CLASS, MAXIMUM_CLASSES, ImageSettings, TaskSettings, settings_of
from secure.models.tokenizer_document import read_tokenizer
from secure.models.tokens import TextTokenizer
from secure.mpc.program import Program
from secure.tasks.classify import Classify
from secure.tasks.task import Served
from tests.heads import write_tokenizer
from tests.tiny import WORDS

for module in ("transformers", "tokenizers"):
    pytest.importorskip(module)

LABELS = ("negative", "positive")
IMAGE = ImageSettings(3, 8, 8, (10,), 2, True, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def document(**other: Any) -> str:
    return json.dumps({**json.loads(TaskSettings("label", LABELS).encoded), **other})


def test_settings_come_back() -> None:
    for each in (
        TaskSettings(),
        TaskSettings("label", LABELS, "sigmoid", True),
        TaskSettings("logits", ("ä", "日本"), image=IMAGE),
    ):
        assert each.encoded.isascii()
        assert settings_of({TASK: "tag", SETTINGS: each.encoded}) == ("tag", each)
    assert settings_of({}) == ("", TaskSettings())


@pytest.mark.parametrize(
    "hostile",
    [
        "",
        "no JSON",
        "[]",
        "[" * 1000,
        '{"labels": NaN}',
        document(more=1),
        document(reveal="weights"),
        document(reveal=1),
        document(activation="exec"),
        document(segments=1),
        document(labels=["a\x1b[2J"]),
        document(labels=["a\nb"]),
        document(labels=[""]),
        document(labels=["a" * (MAXIMUM_CLASS + 1)]),
        document(labels=["a"] * (MAXIMUM_CLASSES + 1)),
        document(labels="ab"),
        document(labels=[1]),
        document(labels={"0": "a"}),
        document(labels=["a" * MAXIMUM_SETTINGS]),
        document(image=[]),
        document(image=json.loads(TaskSettings(image=IMAGE).encoded)["image"] | {"height": 1 << 20}),
        document(image=json.loads(TaskSettings(image=IMAGE).encoded)["image"] | {"height": 4096, "width": 4096}),
        document(image=json.loads(TaskSettings(image=IMAGE).encoded)["image"] | {"resize": [4096, 4096]}),
        document(image=json.loads(TaskSettings(image=IMAGE).encoded)["image"] | {"resize": [0]}),
        document(image=json.loads(TaskSettings(image=IMAGE).encoded)["image"] | {"resample": 9}),
        document(image=json.loads(TaskSettings(image=IMAGE).encoded)["image"] | {"deviation": [0, 0, 0]}),
        document(image=json.loads(TaskSettings(image=IMAGE).encoded)["image"] | {"mean": [0.5] * 100}),
        document(image=json.loads(TaskSettings(image=IMAGE).encoded)["image"] | {"scale": "1"}),
    ],
)
def test_hostile_settings_are_refused(hostile: str) -> None:
    with pytest.raises(secure.InvalidProgram) as raised:
        settings_of({TASK: "classify", SETTINGS: hostile})
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=20,
    ),
    st.sampled_from(["reveal", "labels", "activation", "segments", "image"]),
)
def test_settings_are_right_or_refused(value: Any, field: str) -> None:
    try:
        _, found = settings_of({SETTINGS: document(**{field: value})})
    except secure.InvalidProgram:
        return
    assert len(found.labels) <= MAXIMUM_CLASSES
    assert all(label.isprintable() and 0 < len(label) <= MAXIMUM_CLASS for label in found.labels)


def test_an_owner_hears_of_labels_that_clients_would_refuse() -> None:
    with pytest.raises(secure.InvalidInput, match="clients would refuse this model"):
        _ = TaskSettings("label", ("a\x07",)).encoded


# in a Program


@pytest.fixture(scope="module")
def linear() -> secure.Compiled:
    model = nn.Linear(4, 2).requires_grad_(False)
    return secure.compile(model, {"input": torch.randn(1, 4)}, labels={TASK: "classify", SETTINGS: document()})


def encoded_with(compiled: secure.Compiled, **labels: str) -> bytes:
    found = json.loads(compiled.program.encoded)
    found["labels"] |= labels
    return json.dumps(found, sort_keys=True, separators=(",", ":")).encode()


def test_labels_of_a_program_are_bounded(linear: secure.Compiled) -> None:
    assert Program.from_bytes(encoded_with(linear, model="m")).labels["model"] == "m"
    Program.from_bytes(encoded_with(linear, settings="x" * MAXIMUM_SETTINGS))
    for hostile in (
        {"model": "m" * (MAXIMUM_LABEL + 1)},
        {"settings": "x" * (MAXIMUM_SETTINGS + 1)},
        {"settings": "a\x00"},
        {"m" * (MAXIMUM_LABEL + 1): "m"},
        {str(i): "" for i in range(64)},
    ):
        with pytest.raises(secure.InvalidProgram):
            Program.from_bytes(encoded_with(linear, **hostile))


def test_a_session_refuses_hostile_settings_before_it_sends(linear: secure.Compiled) -> None:
    with secure.insecure_in_process(linear) as session:
        session.program.labels[SETTINGS] = document(labels=["\x1b"])
        with pytest.raises(secure.InvalidProgram, match="cannot be printed"):
            session.classify(["a"])
        assert session.reports == []


@pytest.mark.parametrize(
    ("settings_", "result"),
    [
        (TaskSettings("label", LABELS), torch.tensor(2.0)),
        (TaskSettings("label", LABELS), torch.tensor(-1.0)),
        (TaskSettings("label", LABELS), torch.tensor(float("nan"))),
        (TaskSettings("logits", LABELS), torch.zeros(3)),
        (TaskSettings("probabilities", LABELS), torch.zeros(1)),
    ],
)
def test_an_answer_that_is_none(settings_: TaskSettings, result: torch.Tensor) -> None:
    """A server's Program may reveal whatever it likes."""
    with pytest.raises((secure.InvalidInput, ValueError)):
        Classify().joined([result], [], "a text", Served(None, 8, task="classify", settings=settings_))


# pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("oracle")
    write_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words, st.none() | words, st.integers(6, 24))
def test_texts_are_cut_as_the_library_cuts_them(
    tokenizer: TextTokenizer, oracle: Any, first: str, second: str | None, length: int
) -> None:
    theirs = oracle(first, second, truncation=True, max_length=length, padding="max_length")
    (ours,) = encode(tokenizer, first, second, length, "truncate")
    found = ours.inputs(segments=True)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert found[name].tolist() == [theirs[name]], name
    both = (first, second or "")
    inside = [both[which][slice(*ours.offsets[i])] for i, which in enumerate(ours.texts) if which != NEITHER]
    kept = [word for text in both for word in text.split()]
    assert all(word in kept for word in inside)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words, words, st.integers(8, 24), st.integers(0, 6))
def test_pieces_of_a_context_overlap_and_hold_all_of_it(
    tokenizer: TextTokenizer, oracle: Any, question: str, context: str, length: int, stride: int
) -> None:
    options: dict[str, Any] = {"stride": stride, "only_second": True}
    try:
        ours = encode(tokenizer, question, context, length, "split", **options)
    except secure.InputTooLong:
        assert len(question.split()) + 3 + stride >= length
        return
    theirs = oracle(
        question,
        context,
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        padding="max_length",
    )
    assert [each.ids.tolist() for each in ours] == theirs["input_ids"]


def test_a_template_of_pairs_is_bounded(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    read_tokenizer(json.dumps(raw).encode())
    pair = raw["post_processor"]["pair"]
    special = next(piece for piece in pair if "SpecialToken" in piece)
    for hostile in (pair * 2, [*pair, *[special] * 100]):
        raw["post_processor"]["pair"] = hostile
        with pytest.raises(secure.InvalidInput, match="template of pairs"):
            read_tokenizer(json.dumps(raw).encode())


def test_too_many_pieces(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "PIECES", 2)
    with pytest.raises(secure.InputTooLong, match="pieces of 8 tokens"):
        encode(tokenizer, "zqba", " ".join(WORDS[:30]), 8, "split")
