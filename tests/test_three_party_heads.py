"""Classifiers and taggers shared among three servers over gRPC: labels alone, as the float model has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import secure
from parties.three_party.shared_model import share_model
from secure.session.session import Session
from tests.heads import write_head
from tests.test_heads import PAIRS, TEXTS
from tests.three_parties import running

for module in ("transformers", "tokenizers"):
    pytest.importorskip(module)

LENGTH = 12
PIPELINES = {"classify": "text-classification", "tag": "token-classification"}


@contextmanager
def asked(task: str, where: Path, **sizes: Any) -> Iterator[tuple[Session, Any]]:
    """A session with three services of a random model, and the pipeline of the same model in the clear."""
    from transformers import pipeline

    directory = write_head(where / "model", task)
    options = {"deployment": secure.ThreeParty(), "reveal": "label", "calibration": TEXTS, **sizes}
    compiled = secure.compile_text_model(str(directory), LENGTH, **options)
    share_model(compiled, where / "shares")
    clear: Any = pipeline
    with running(where / "shares") as three, three.dial() as session:
        yield session, clear(PIPELINES[task], model=str(directory))


def check_costs(session: Session) -> None:
    """What crossed the wire between the servers is what the deployment says beforehand."""
    predicted = secure.ThreeParty().price(session.program)
    for report in session.reports:
        assert report.rounds == predicted.rounds
        for link in predicted.traffic:
            assert report.bytes(sender=link.sender, receiver=link.receiver, phase=link.phase) == link.bytes


def test_a_classifier_tells_labels_alone(tmp_path: Path) -> None:
    with asked("classify", tmp_path) as (session, pipe):
        pairs: list[Any] = [{"text": one, "text_pair": other} for one, other in PAIRS[:3]]
        theirs = [each["label"] for each in [*pipe(TEXTS[:4]), *(pipe(pair) for pair in pairs)]]
        assert len(set(theirs)) > 1
        assert session.classify([*TEXTS[:4], *pairs]) == [{"label": label, "score": None} for label in theirs]
        assert {tuple(shape) for shape in session.program.output_shapes.values()} == {(1,)}
        check_costs(session)
        with pytest.raises(secure.InvalidInput, match="reveals one label a text"):
            session.classify(TEXTS[:1], top_k=2)
        with pytest.raises(secure.InvalidInput, match="is for the task 'classify', not for 'tag'"):
            session.tag(TEXTS[:1])


def test_a_tagger_tells_a_label_a_token(tmp_path: Path) -> None:
    with asked("tag", tmp_path) as (session, pipe):
        found = session.tag(TEXTS[:3])
        expected = pipe(TEXTS[:3], aggregation_strategy="simple")
        assert sum(map(len, expected)) > 0
        keys = ("entity_group", "word", "start", "end")
        assert [[tuple(each[key] for key in keys) for each in text] for text in found] == [
            [tuple(each[key] for key in keys) for each in text] for text in expected
        ]
        assert all(each["score"] is None for text in found for each in text)
        assert [tuple(shape) for shape in session.program.output_shapes.values()] == [(1, LENGTH)]
        check_costs(session)
