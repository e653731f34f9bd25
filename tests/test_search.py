"""Private search: what is found, under every deployment that can; records, questions, ties, and the commands."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secure
from parties import deployments
from parties.cli.demo import unset
from parties.reports.verified import verify
from parties.served.files import MASKED_WEIGHTS, unpack_masked
from parties.three_party.shared_model import share_model
from parties.two_party.keys import mask_key
from parties.two_party.masked_model import MaskedModel, by_file, mask_model
from protocols import two_party as tp
from protocols.circuit import check
from protocols.fixedpoint import FixedPoint
from protocols.flow import Instruction
from protocols.protocol import CircuitCost
from protocols.weights import DealerWeights
from secure.deployments.compilation import Compilation
from secure.deployments.compiled import task_of
from secure.deployments.self_test import self_test
from secure.errors import InputTooLong, InvalidInput, InvalidProgram
from secure.lowering.client_inputs import SETTINGS
from secure.lowering.parts import part_of
from secure.models import clusters as clusters_module
from secure.models import index as index_module
from secure.models.index import Index, build_index, read_index, write_index
from secure.models.passages import Passage, TextDocument
from secure.models.searcher import Searcher, read_record, records_of, shown
from secure.models.settings import TaskSettings, settings_of
from secure.models.text import load_text_model
from secure.mpc.compile import MpcModel
from secure.session.session import Session
from secure.tasks.closeness import Compared
from secure.tasks.search import SameFound, Search
from tests.dealer_key import KEY
from tests.test_cli import Run, in_words, run
from tests.three_parties import running
from tests.tiny import WORDS, Ready, Served, serving, write_model

for module in ("transformers", "tokenizers"):
    pytest.importorskip(module)

__all__ = ["run"]  # the fixture

LENGTH, TOP = 8, 4
QUESTIONS = [" ".join(random.Random(i).choices(WORDS, k=4)) for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder with prompts of its own for questions and passages."""
    directory = write_model(tmp_path_factory.mktemp("search") / "tiny")
    prompts = {"query": f"{WORDS[0]} ", "passage": f"{WORDS[1]} "}
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return str(directory)


def documents(count: int = 12) -> list[TextDocument]:
    return [TextDocument(f"doc-é-{i}", " ".join(random.Random(100 + i).choices(WORDS, k=9))) for i in range(count)]


@pytest.fixture(scope="module")
def index(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of several segments."""
    where = tmp_path_factory.mktemp("index") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "SEGMENT", 10)
        made, _ = build_index(model, load_text_model(model), documents(), length=LENGTH, overlap=1)
    write_index(made, where)
    assert len(made.segments) > 2
    return where


Made = Callable[..., secure.Compiled]


@pytest.fixture(scope="module")
def made(model: str, index: Path) -> Made:
    @cache
    def compiled(reveal: str = "", deployment: Any = None) -> secure.Compiled:
        found = str(index)
        return secure.compile_text_model(model, LENGTH, index=found, top=TOP, reveal=reveal, deployment=deployment)

    return compiled


def plain_scores(model: str, index: Index, question: str) -> dict[tuple[str, int], float]:
    """The score of every passage in the clear."""
    text = load_text_model(model)
    ids = torch.tensor([text.tokenizer.tokenizer.encode(text.prompts.texts["query"] + question).ids])
    vector = F.normalize(text.module(ids, torch.ones_like(ids)), dim=-1)[0]
    scores = (index.embeddings @ vector).tolist()
    return {(each.id, each.number): score for each, score in zip(index.passages, scores, strict=True)}


def check_found(found: list[dict[str, Any]], model: str, index: Index, question: str, top: int = TOP) -> list[float]:
    """Whoever stands at a rank belongs there, or is as good but for fixed point; return the best scores."""
    scores, chosen = plain_scores(model, index, question), names(found)
    best = sorted(scores.values(), reverse=True)[:top]
    assert len({*chosen}) == len(chosen) == top
    assert [scores[each] for each in chosen] == pytest.approx(best, abs=2e-3)
    return best


def names(found: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(each["id"], each["passage"]) for each in found]


# what is found


@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.ThreeParty(), secure.ThreeParty(public_weights=True)])
def test_the_best_passages_are_found(deployment: Any, made: Made, model: str, index: Path) -> None:
    known = read_index(index)
    with secure.insecure_in_process(made("passages-scores", deployment)) as session:
        for question, found in zip(QUESTIONS, session.search(QUESTIONS), strict=True):
            scores = check_found(found, model, known, question)
            assert [each["score"] for each in found] == pytest.approx(scores, abs=2e-3)
            texts = {(p.id, p.number): p for p in known.passages}
            for each in found:
                passage = texts[each["id"], each["passage"]]
                assert (each["start"], each["end"], each["text"]) == (passage.start, passage.end, passage.text)


@pytest.fixture(scope="module")
def in_fours(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index whose clusters have four passages at most, so that there are several; some are filled up."""
    where = tmp_path_factory.mktemp("clusters") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "SEGMENT", 10)
        patch.setattr(clusters_module, "CLUSTER", 4)
        made, _ = build_index(model, load_text_model(model), documents(), length=LENGTH, overlap=1)
    write_index(made, where)
    return where


@pytest.fixture
def small_clusters(in_fours: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(clusters_module, "CLUSTER", 4)
    return in_fours


def looked_into(model: str, index: Index, question: str, clusters: int) -> set[tuple[str, int]]:
    """The passages of the clusters whose means, of length 1, are nearest to a question in the clear."""
    text = load_text_model(model)
    ids = torch.tensor([text.tokenizer.tokenizer.encode(text.prompts.texts["query"] + question).ids])
    vector = F.normalize(text.module(ids, torch.ones_like(ids)), dim=-1)[0]
    sizes = [size for segment in index.segments for size in clusters_module.cluster_sizes(segment)]
    means = [F.normalize(rows.mean(0), dim=0) for rows in index.embeddings.split(sizes)]
    inside = torch.arange(len(index.passages)).split(sizes)
    near = (torch.stack(means) @ vector).topk(clusters).indices
    return {(index.passages[i].id, index.passages[i].number) for at in near.tolist() for i in inside[at].tolist()}


@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.ThreeParty(), secure.ThreeParty(public_weights=True)])
@pytest.mark.parametrize("clusters", [1, 3])
def test_the_best_of_the_nearest_clusters_are_found(
    deployment: Any, clusters: int, model: str, small_clusters: Path
) -> None:
    options: dict[str, Any] = {"index": str(small_clusters), "top": 3, "reveal": "passages-scores"}
    compiled = secure.compile_text_model(model, LENGTH, deployment=deployment, clusters=clusters, **options)
    index = read_index(small_clusters)
    with secure.insecure_in_process(compiled) as session:
        assert session.served.settings.clusters[0] == clusters
        for question, found in zip(QUESTIONS, session.search(QUESTIONS), strict=True):
            inside = looked_into(model, index, question, clusters)
            scores = {place: score for place, score in plain_scores(model, index, question).items() if place in inside}
            best = sorted(scores.values(), reverse=True)[:3]
            assert [scores[each] for each in names(found)] == pytest.approx(best, abs=2e-3)
            assert [each["score"] for each in found] == pytest.approx(best, abs=2e-3)


def test_zeros_that_fill_up_a_cluster_are_no_passages(model: str, small_clusters: Path) -> None:
    """Where all scores are below zero the zeros are found first, and left out of the answer."""
    index = read_index(small_clusters)
    text = load_text_model(model)
    searcher = Searcher(text.module, index, top=4, texts=False, scores=False, clusters=1).eval()  # type: ignore[arg-type]
    assert {len(rows) % searcher.size for rows in searcher.rows.values()} == {0}
    filled = sum(int((rows == 0).all(-1).sum()) for rows in searcher.rows.values())
    assert filled == sum(len(rows) for rows in searcher.rows.values()) - len(index.passages) > 0
    for rows in searcher.rows.values():
        rows.data.neg_()
    for means in searcher.means.values():
        means.data.neg_()
    ids, mask = torch.tensor([[4, 5, 6, 2]]), torch.ones(1, 4, dtype=torch.int64)
    (records,) = searcher(ids, mask)
    read = [read_record(each) for each in records if bool(each.any())]
    assert {each["id"] for each in read} <= {each.id for each in index.passages}


def test_zeros_are_left_out_where_clusters_are_looked_into_and_nowhere_else() -> None:
    table = records_of([Passage("a", 0, 0, 5, "words")], texts=False)
    found = torch.cat([table, torch.zeros_like(table)]).double()

    def read(records: Tensor, **settings: Any) -> list[dict[str, Any]]:
        served: Any = SimpleNamespace(settings=TaskSettings(top=2, **settings))
        return Search().joined([(records, None)], [], "", served)

    assert [each["id"] for each in read(found, clusters=(1, 3))] == ["a"]
    with pytest.raises(InvalidInput, match="no passage of an index"):
        read(found)
    with pytest.raises(InvalidInput, match="no passage of an index"):
        read(found[:1], clusters=(1, 3))


def judged(searcher: Searcher, ids: Tensor, rows: list[int], accept: float = 0.005) -> bool:
    """Whether an answer of these rows is accepted."""
    table = torch.cat(list(searcher.records.values()))
    compared = Compared({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, table[rows][None].double(), 4)
    return SameFound(searcher).judge(searcher, [compared], accept).accepted


def test_only_what_close_clusters_explain_is_accepted(model: str, small_clusters: Path) -> None:
    """The best of the nearest cluster; of the next one only where both are as good as equal; of no two of them."""
    text = load_text_model(model)
    searcher = Searcher(text.module, read_index(small_clusters), top=2, texts=False, scores=False, clusters=1).eval()  # type: ignore[arg-type]
    ids = torch.tensor([[4, 5, 6, 2]])
    scores, means = searcher.scored(ids, torch.ones_like(ids))
    first, second = means[0].topk(2).indices.tolist()
    size = searcher.size

    def best(cluster: int) -> list[int]:
        inside = scores[0, cluster * size : (cluster + 1) * size]
        inside = torch.where(inside == 0, -9.0, inside)  # zeros that fill up
        return [cluster * size + at for at in inside.topk(3).indices.tolist()]

    assert judged(searcher, ids, best(first)[:2])
    assert not judged(searcher, ids, best(second)[:2])
    assert not judged(searcher, ids, best(first)[1::-1])
    assert not judged(searcher, ids, best(first)[1:])
    means_of = {name: rows.data for name, rows in searcher.means.items()}
    whole = torch.cat(list(means_of.values()))
    whole[second] = whole[first]  # as good as equal
    parts = whole.split([len(rows) for rows in means_of.values()])
    for rows, part in zip(searcher.means.values(), parts, strict=True):
        rows.data = part.clone()
    assert judged(searcher, ids, best(first)[:2])
    assert judged(searcher, ids, best(second)[:2])
    assert not judged(searcher, ids, best(second)[1::-1])
    assert not judged(searcher, ids, best(second)[1:])
    assert not judged(searcher, ids, [best(first)[0], best(second)[0]]), "of two clusters"


def test_an_update_with_clusters_renews_no_other_weights(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights but those of segments are the same integers of the same names, whatever the number of segments."""
    monkeypatch.setattr(index_module, "SEGMENT", 10)
    monkeypatch.setattr(clusters_module, "CLUSTER", 4)
    text, found = load_text_model(model), list[str]()
    for count in (4, 6, 12):
        made, _ = build_index(model, text, documents(count), length=LENGTH, overlap=1)
        searcher = Searcher(text.module, made, top=2, texts=False, scores=False, clusters=1).eval()  # type: ignore[arg-type]
        ids = [torch.tensor([[4, 5, 6 + i, 2]]) for i in range(3)]
        masks = [torch.tensor([[1, 1, 1, int(i > 0)]]) for i in range(3)]
        samples = [{"input_ids": x, "attention_mask": mask} for x, mask in zip(ids, masks, strict=True)]
        compiled = secure.compile(searcher, samples[0], calibration=samples)
        assert isinstance(compiled.model, MpcModel)
        found.append(compiled.model.digest_of(name for name in compiled.model.integers if not part_of(name)))
    assert len(set(found)) == 1


def test_clusters_are_told(model: str, small_clusters: Path) -> None:
    loaded = task_of(model, index=str(small_clusters), top=3, clusters=2).load(model, LENGTH)
    assert "2 of 7 clusters are looked into: passages in others are not found" in loaded.about


def test_parties_that_are_services(made: Made, model: str, index: Path, tmp_path: Path) -> None:
    """Three of them over gRPC, with weights that are shared: none of them has the passages, nor what was found."""
    share_model(made("passages", secure.ThreeParty()), tmp_path / "shares")
    with running(tmp_path / "shares") as parties, parties.dial() as session:
        assert session.served.task == "search"
        for question, found in zip(QUESTIONS[:2], session.search(QUESTIONS[:2]), strict=True):
            check_found(found, model, read_index(index), question)
            assert all(each["text"] for each in found)


@pytest.mark.parametrize("reveal", ["", "passages", "ids-scores"])
def test_a_client_learns_what_the_owner_reveals(reveal: str, made: Made, model: str, index: Path) -> None:
    compiled = made(reveal)
    with secure.insecure_in_process(compiled) as session:
        (found,) = session.search(QUESTIONS[:1])
    check_found(found, model, read_index(index), QUESTIONS[0])
    assert {("text" in each, each["score"] is None) for each in found} == {
        ("passages" in reveal, "score" not in reveal)
    }
    outputs = {"": 1, "passages": 1, "ids-scores": 2}[reveal]
    assert len(compiled.program.output_shapes) == outputs, "nothing else is revealed"
    assert settings_of(compiled.program.labels)[1].reveal == (reveal or "ids")


def test_fewer_than_are_found(made: Made) -> None:
    with secure.insecure_in_process(made()) as session:
        (all_of,), (two,) = session.search(QUESTIONS[:1]), session.search(QUESTIONS[:1], 2)
        assert (len(all_of), len(two)) == (TOP, 2)
        with pytest.raises(InvalidInput, match="the 5 best passages: this server finds 4"):
            session.search(QUESTIONS, 5)
        with pytest.raises(InvalidInput, match="the 0 best passages"):
            session.search(QUESTIONS, 0)
        assert not session.reports[2:], "nothing was sent"


def test_several_lengths_and_a_batch(made: Made, model: str, index: Path) -> None:
    compiled = secure.compile_text_model(model, [LENGTH, 12], index=str(index), top=TOP, batch=2)
    long = " ".join(WORDS[:8])
    with secure.insecure_in_process(compiled) as session:
        found = session.search([*QUESTIONS, long])
        assert [report.length for report in session.reports] == [8, 8, 12]
    for question, each in zip([*QUESTIONS, long], found, strict=True):
        check_found(each, model, read_index(index), question)


def test_equal_passages_come_side_by_side(model: str, tmp_path: Path) -> None:
    """In any order: each score is rounded by itself."""
    same = [TextDocument(f"d{i}", QUESTIONS[i % 2]) for i in range(8)]
    made, _ = build_index(model, load_text_model(model), same, length=LENGTH, overlap=1)
    write_index(made, tmp_path / "index")
    with secure.insecure_in_process(secure.compile_text_model(model, LENGTH, index=str(tmp_path / "index"))) as session:
        (found,) = session.search(QUESTIONS[1:2])
    order = [each["id"] for each in found]
    assert len(order) == 8, "top is all of a smaller index"
    assert {*order[:4]} in ({f"d{i}" for i in range(0, 8, 2)}, {f"d{i}" for i in range(1, 8, 2)})


def test_questions_that_are_none(made: Made) -> None:
    with secure.insecure_in_process(made()) as session:
        with pytest.raises(InputTooLong, match="the text has 10 tokens"):
            session.search([" ".join(WORDS[:7])])
        assert len(session.reports) == 1, "it costs what another question costs"
        assert len(session.search([" ".join(WORDS[:30])], long="truncate")[0]) == TOP
        for wrong in ("one text", [3]):
            with pytest.raises(InvalidInput, match="search takes a list of questions"):
                session.search(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="no prompt is called 'x'"):
            session.search(QUESTIONS, prompt="x")
        with pytest.raises(InvalidInput, match="reveals the ids of passages, and not their texts"):
            session.search(QUESTIONS, passages=True)
        with pytest.raises(InvalidInput, match="not taken by 'split'"):
            session.search(QUESTIONS, long="split")
        with pytest.raises(InvalidInput, match="for the task 'search', not for 'embed'"):
            session.embed(QUESTIONS)


def test_a_server_without_an_index(model: str) -> None:
    none = pytest.raises(InvalidInput, match="this server has no index to search")
    with secure.insecure_in_process(secure.compile_text_model(model, LENGTH)) as session, none:
        session.search(QUESTIONS)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more clusters than there are": (
        {"clusters": 3},
        "--clusters 3: the index has 3 clusters of 10 passages at most\nhint: 2 at most, or leave it out",
    ),
    "more than there are": ({"top": 25}, "the 25 best passages: the index has 24 passages\nhint: --top 24 at most"),
    "another task": ({"task": "embed"}, "an index is for the task search"),
    "a form of another task": (
        {"reveal": "label"},
        "a search reveals no label\nhint: one of ids, passages, ids-scores",
    ),
    "rounded": ({"answer_bits": 9}, "answers of 9 bits: those of this task are exact"),
    "few bits": ({"fixed_point": FixedPoint(12)}, "12 fraction bits, 14 of weights: the answers are exact"),
    "no index": ({"index": ""}, "a search without an index"),
    "no index here": ({"index": "/nowhere"}, "/nowhere holds no index"),
    "ciphertexts": ({"deployment": secure.Ckks(), "embedding": "client-table"}, "ciphertexts have no compar"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_search(case: str, model: str, index: Path) -> None:
    options, said = REFUSED[case]
    with pytest.raises(secure.Error) as caught:
        secure.compile_text_model(model, LENGTH, **{"index": str(index), "top": 3, **options})
    assert said in str(caught.value)


def test_a_long_row_is_not_sorted(model: str, tmp_path: Path) -> None:
    many = [TextDocument(f"d{i}", WORDS[i % 96]) for i in range(200)]
    made, _ = build_index(model, load_text_model(model), many, length=LENGTH, overlap=1)
    write_index(made, tmp_path)
    with pytest.raises(InvalidInput, match="the 129 best passages: 128 at most are found"):
        task_of(model, index=str(tmp_path), top=129).load(model, LENGTH)


def test_an_index_is_part_of_a_compilation(model: str, index: Path, tmp_path: Path) -> None:
    def key(**other: Any) -> str:
        return Compilation(model, secure.TwoParty(), **other).key()

    other, _ = build_index(model, load_text_model(model), documents(3), length=LENGTH, overlap=1)
    write_index(other, tmp_path / "other")
    found = [key(), key(index=str(index)), key(index=str(index), top=3), key(index=str(tmp_path / "other"))]
    assert len(set(found)) == 4


# records


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=20).filter(str.isprintable), st.text(min_size=1, max_size=80)),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_a_record_is_read_as_it_was_written(given: list[tuple[str, str]], texts: bool) -> None:
    given = [(name, text) for name, text in given if not any(0xD800 <= ord(c) < 0xE000 for c in name + text)] or [
        ("a", "b")
    ]
    passages = [Passage(name, i, 3, 3 + i, text) for i, (name, text) in enumerate(given)]
    table = records_of(passages, texts=texts)
    assert bool((table.abs() <= 2).all())
    for passage, numbers in zip(passages, table, strict=True):
        found = read_record(numbers.double())
        own = {"id": passage.id, "passage": passage.number, "start": passage.start, "end": passage.end}
        assert found == own | ({"text": passage.text} if texts else {})


WRONG = [
    b"",
    b"[",
    b"[1,2,3,4]",
    b'["a",0,0]',
    b'["a",0,0,0,1]',
    b'["a",0,0,-1]',
    b'["a",0,0,true]',
    b'["a",0,0,1e3]',
    b'["",0,0,0]',
    b'["a\\u0007",0,0,0]',
    b'["' + b"a" * 300 + b'",0,0,0]',
    b'["a",2097153,0,0]',
    b'["a",0,0,0,"\\ud800"]',
    b'{"a":1}',
    b"\xff\xff",
    b"[" * 4000,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_record(wrong: bytes) -> None:
    padded = torch.frombuffer(bytearray(wrong.ljust(-(-len(wrong) // 2) * 2 + 2)), dtype=torch.uint8).view(torch.uint16)
    with pytest.raises(InvalidInput, match="the answer is no passage of an index"):
        read_record((padded.double() - (1 << 15)) / (1 << 14))


@pytest.mark.parametrize("number", [2.0, -2.1, torch.nan, torch.inf])
def test_numbers_that_are_no_bytes(number: float) -> None:
    with pytest.raises(InvalidInput, match="the answer is no passage of an index"):
        read_record(torch.tensor([0.0, number], dtype=torch.float64))


# looking up


class LookUp(nn.Module):
    def __init__(self, rows: int, parts: int) -> None:
        super().__init__()
        torch.manual_seed(rows)
        table = torch.randint(-(1 << 15), 1 << 15, (rows, 3)) / (1 << 14)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.parts = nn.ParameterList(nn.Parameter(part) for part in table.chunk(parts))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(
            (x * self.scale).topk(2).indices, torch.cat(list(self.parts)) if len(self.parts) > 1 else self.parts[0]
        )


@pytest.mark.parametrize("rows", [2, 5, 16, 300])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_table_is_looked_up_exactly(rows: int, parts: int) -> None:
    module = LookUp(rows, parts)
    samples = [{"x": torch.randn(2, rows)} for _ in range(3)]
    compiled = secure.compile(module, samples[0], calibration=samples[1:2])
    with secure.insecure_in_process(compiled) as session:
        for sample in samples:  # also rows that calibration did not find
            assert torch.equal(session.query(sample), module(**sample).double())
    assert compiled.program.weight_shapes.keys() == {"scale@14", *(f"parts.{i}@14" for i in range(parts))}


def test_what_unit_vectors_cost() -> None:
    assert tp.Units((2, 5), 18, 4, 9).cost() == CircuitCost(dealt=10 * 16 * 18 // 8)


IMPOSSIBLE = {
    "no entries": tp.Units((3,), 18, 4, 0),
    "more entries than places": tp.Units((3,), 18, 4, 17),
    "no bits": tp.Units((3,), 18, 0, 1),
    "many bits": tp.Units((3,), 18, 25, 1),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_unit_vectors(case: str) -> None:
    with pytest.raises(ValueError, match="unit vectors of"):
        IMPOSSIBLE[case].validate()


def test_positions_of_another_shape() -> None:
    shared = Instruction(tp.Input((4,), 8, "x", 0, -9, 9), ())
    with pytest.raises(ValueError, match="its operand has"):
        check((shared, Instruction(tp.Open((4,), 8), (0,)), Instruction(tp.Units((2, 2), 18, 4, 9), (1,))), {})


# the self-test


def test_the_self_test_names_the_ranks(model: str, index: Path, made: Made) -> None:
    loaded = Search(index=str(index), found=TOP).load(model, LENGTH)
    tested = self_test(made(), loaded)
    assert "passages are found at the original's rank" in tested.about


@pytest.mark.parametrize("reveal", ["", "ids-scores"])
def test_what_was_not_found_is_no_small_error(reveal: str, model: str, index: Path) -> None:
    loaded = Search(index=str(index), found=TOP, reveal=reveal).load(model, LENGTH)
    measure, inputs = loaded.closeness, dict(loaded.samples[0])
    assert isinstance(measure, SameFound)
    found = loaded.module(**inputs)

    def judged(records: Tensor) -> Any:
        wrong = {**found, "records": records} if reveal else records
        return measure.judge(loaded.module, [Compared(inputs, wrong, LENGTH)], measure.default)

    records = found["records"] if reveal else found
    assert judged(records).words == f"{TOP} of {TOP} passages are found at the original's rank"
    assert not judged(records[:, [0, 1, 1, 3]]).accepted
    assert not judged(records.flip(1)).accepted
    assert not judged(records + 0.25).accepted


# segments, and updates of an index


@dataclasses.dataclass(frozen=True)
class Updated:
    """A search before and after an update of its index, which leaves all segments but the last as they are."""

    before: secure.Compiled
    after: secure.Compiled
    kept: int


@pytest.fixture(scope="module")
def updated(model: str, index: Path, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Updated:
    where, text = tmp_path_factory.mktemp("updated") / "index", load_text_model(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "SEGMENT", 10)
        more = [*documents(), TextDocument("new", " ".join(WORDS[:5]))]
        other, change = build_index(model, text, more, length=LENGTH, overlap=1, before=read_index(index))
    write_index(other, where)
    assert change.kept_segments == len(read_index(index).segments) - 1
    after = secure.compile_text_model(model, LENGTH, index=str(where), top=TOP, reveal="passages-scores")
    return Updated(made("passages-scores"), after, len(read_index(index).segments) - 1)


def opened(masked: MaskedModel) -> dict[str, Tensor]:
    """W = D + B, modulo the rings of D, of what clients and dealer have."""
    program, out = masked.program, dict[str, Tensor]()
    mask = DealerWeights(mask_key(masked.mask_seed, masked.weights_digest), program.weight_shapes)
    for name, part in by_file(program.weight_rings).items():
        for weight, value in unpack_masked(masked.files[name], part, program.weight_shapes).items():
            bits = program.weight_rings[weight]
            out[weight] = (value + mask.mask(weight)).remainder(2**bits)
    return out


def test_an_update_leaves_what_clients_hold(updated: Updated, tmp_path: Path) -> None:
    """The encoder's D and that of each segment without a change stay, byte by byte; a changed one has another mask."""
    first, second = (mask_model(each.model, tmp_path) for each in (updated.before, updated.after))
    same = [name for name in first.files if second.files.get(name) == first.files[name]]
    assert MASKED_WEIGHTS in same
    assert len(same) == 1 + updated.kept
    assert len(second.files.keys() - first.files.keys()) == 1
    for masked, compiled in ((first, updated.before), (second, updated.after)):
        for weight, value in opened(masked).items():
            bits = masked.program.weight_rings[weight]
            assert torch.equal(value, compiled.model.integers[weight].long().remainder(2**bits)), weight
    parts = {part_of(name) for name in first.program.weight_shapes} - {""}
    assert {f"{MASKED_WEIGHTS}-{part}" for part in parts} == first.files.keys() - {MASKED_WEIGHTS}
    assert first.program.digest != second.program.digest


def test_a_client_fetches_new_segments_alone(updated: Updated, dealer: Served, state: Path, tmp_path: Path) -> None:
    found = list[list[str]]()
    for compiled in (updated.before, updated.after):
        masked = mask_model(compiled.model, state)
        with serving(Ready(compiled, masked), dealer.address) as server:
            deployment = secure.TwoParty(server=server.address, dealer=dealer.address, dealer_key=KEY.public.text)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(tmp_path))
                with secure.connect(deployment, network=secure.Plaintext(), pace=0.0, receipts=True) as session:
                    found.append([str(traffic.bytes) for traffic in session.once])
                    assert len(session.search([QUESTIONS[0]])[0]) == TOP
                    verify(session.receipt(), {compiled.program.digest: compiled.program.encoded})
    assert (len(found[0]), len(found[1])) == (2 + updated.kept, 1)


def test_one_mask_never_covers_two_weights(updated: Updated, tmp_path: Path) -> None:
    """Names are made of contents; if one comes with other integers all the same, everything gets another mask."""
    model = updated.before.model
    first = mask_model(model, tmp_path)
    name = next(name for name in model.program.weight_shapes if part_of(name))
    other = dataclasses.replace(model, integers={**model.integers, name: model.integers[name] + 1})
    second = mask_model(other, tmp_path)
    assert second.mask_seed != first.mask_seed
    assert not any(second.files[file] == first.files[file] for file in first.files)
    assert mask_model(other, tmp_path).files == second.files
    assert mask_model(model, tmp_path).mask_seed not in (first.mask_seed, second.mask_seed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}'])
def test_what_is_remembered_of_masks_is_damaged(content: bytes, updated: Updated, tmp_path: Path) -> None:
    """Nobody knows then what was masked, so the mask is a new one."""
    first = mask_model(updated.before.model, tmp_path)
    (file,) = tmp_path.glob("*.apart.json")
    assert file.stat().st_mode & 0o77 == 0
    file.write_bytes(content)
    assert mask_model(updated.before.model, tmp_path).mask_seed != first.mask_seed


def test_a_mask_of_segments_is_renewed_with_the_others(updated: Updated, tmp_path: Path) -> None:
    first = mask_model(updated.before.model, tmp_path, 90)
    for file in tmp_path.iterdir():
        os.utime(file, (time.time() - 91 * 86400,) * 2)
    second = mask_model(updated.before.model, tmp_path, 90)
    assert not any(second.files[file] == first.files[file] for file in first.files)
    assert mask_model(updated.before.model, tmp_path, 90).files == second.files


def test_two_indices_of_one_model_are_not_served_together(
    updated: Updated, model: str, index: Path, tmp_path: Path
) -> None:
    """Whatever the model is called: they would have one mask and one name."""
    copied = str(shutil.copytree(model, tmp_path / "copied"))
    other = secure.compile_text_model(copied, LENGTH, index=str(index))
    with pytest.raises(InvalidInput, match="two indices of one model"):
        deployments.serve(
            [updated.before, other],
            role="server",
            listen="127.0.0.1:0",
            peers={"dealer": "127.0.0.1:9"},
            network=secure.Plaintext(),
            state=tmp_path,
        )


def test_names_of_segments_tell_nothing(index: Path, model: str) -> None:
    """They are made under the index's own key, so that nobody can confirm a guess of the documents."""
    known = read_index(index)
    other = dataclasses.replace(known, key="0" * 64)
    text = load_text_model(model)
    names = [set(Searcher(text.module, each, top=1, texts=True, scores=False).rows) for each in (known, known, other)]  # type: ignore[arg-type]
    assert names[0] == names[1]
    assert not names[0] & names[2]


# the commands


@contextmanager
def hosted(compiled: secure.Compiled, dealer: Served, state: Path) -> Iterator[list[str]]:
    with serving(Ready(compiled, mask_model(compiled.model, state)), dealer.address) as server:
        yield [
            *("--server", server.address, "--dealer", dealer.address, "--dealer-key", KEY.public.text),
            *("--no-cache", "--pace", "0"),
        ]


def test_services_are_asked(made: Made, run: Run, dealer: Served, state: Path, model: str, index: Path) -> None:
    with hosted(made("passages-scores"), dealer, state) as options:
        ended = run("search", QUESTIONS[0], *options, "--json")
        assert ended.code == 0, ended.err
        (row,) = json.loads(ended.out)
        check_found(row["answer"], model, read_index(index), QUESTIONS[0])
        ended = run("search", QUESTIONS[0], *options, "--top", "1", "--passages")
        said = [line.strip() for line in ended.out.splitlines()]
        best, second, *_ = row["answer"]
        assert any(line.startswith(f"1  {best['id']}   passage {best['passage']}, characters") for line in said)
        assert best["text"] in said
        assert second["text"] not in said
        in_words(
            run("search", QUESTIONS[0], *options, "--top", "9"), "the 9 best passages: this server finds 4", "--top"
        )
    with hosted(made(), dealer, state) as options:
        assert "clusters" not in run("search", QUESTIONS[0], *options).err
        in_words(
            run("search", QUESTIONS[0], *options, "--passages"), "reveals the ids of passages", "--reveal passages"
        )


def test_clients_hear_that_not_all_passages_are_looked_at(
    run: Run, dealer: Served, state: Path, model: str, small_clusters: Path
) -> None:
    compiled = secure.compile_text_model(model, LENGTH, index=str(small_clusters), top=3, clusters=2)
    with hosted(compiled, dealer, state) as options:
        ended = run("search", QUESTIONS[0], *options)
        assert ended.code == 0, ended.err
        assert "the server looks into the 2 of 7 clusters of passages that are nearest to a question" in ended.err


@pytest.mark.parametrize("clusters", ["[3]", "[3,3]", "[0,4]", "[1,2,3]", "[1,1048577]", '["1",2]'])
def test_settings_of_clusters_are_bounded(clusters: str) -> None:
    assert settings_of({SETTINGS: '{"clusters": [2, 3]}'})[1].clusters == (2, 3)
    with pytest.raises(InvalidProgram):
        settings_of({SETTINGS: f'{{"clusters": {clusters}}}'})


def test_a_file_of_questions(
    made: Made, run: Run, model: str, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def connect(*_: Any, **__: Any) -> Session:
        return secure.insecure_in_process(made())

    monkeypatch.setattr(deployments, "connect", connect)
    source, output = tmp_path / "questions.txt", tmp_path / "found.jsonl"
    source.write_text("\n".join(QUESTIONS) + "\n")
    ended = run("search", "--input", str(source), "--output", str(output), "--top", "2", "--pace", "0")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row, question in zip(rows, QUESTIONS, strict=True):
        check_found(row["answer"], model, read_index(index), question, 2)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    in_words(run("search"), "no question", "questions as arguments")


def test_a_compiled_search_keeps_its_index(made: Made, model: str, index: Path, run: Run, tmp_path: Path) -> None:
    secure.save_compiled(made("ids-scores"), tmp_path / "compiled")
    loaded = secure.load_compiled(tmp_path / "compiled")
    with secure.insecure_in_process(loaded) as session:
        check_found(session.search(QUESTIONS[:1])[0], model, read_index(index), QUESTIONS[0])
    line = ["serve", str(tmp_path / "compiled"), "--listen", "127.0.0.1:0"]
    in_words(
        run(*line, "--index", str(index)), "holds a compiled model, which has its own index, or none", "leave --index"
    )
    in_words(run(*line, "--top", "3"), "which was compiled with 4", "leave --top out")
    in_words(run(*line, "--reveal", "ids"), "which was compiled with ids-scores", "leave --reveal out")


def test_a_search_is_counted_and_checked(model: str, index: Path, run: Run, tmp_path: Path) -> None:
    def total(*more: str) -> dict[str, Any]:
        ended = run("profile", model, "--length", str(LENGTH), "--no-time", "--json", *more)
        assert ended.code == 0, ended.err
        found: dict[str, Any] = json.loads(ended.out)["total"]
        return found

    one, eight = (total("--index", str(index), "--top", top) for top in ("1", "8"))
    assert total()["rounds"] < one["rounds"]
    assert one != eight
    line = ["check", "serve", "--listen", "127.0.0.1:0", "--state", str(tmp_path), "--index", str(index)]
    rows = len(read_index(index).passages)
    assert f"with the index {index} of {rows} passages, to be compiled for the task search" in run(*line, model).out
    other = str(write_model(tmp_path / "other", 3))
    assert "is an index of another model than" in run(*line, other).out
    shape = ["profile", "bert-base", "--top", "3", "--no-time"]
    in_words(run(*shape), "--top means nothing for bert-base", "with weights")


@pytest.mark.slow
def test_the_demo_searches_documents(model: str, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    for number in range(12):
        (documents / f"{number}.txt").write_text(" ".join(random.Random(100 + number).choices(WORDS, k=9)))
    question = ["--model", model, "--length", str(LENGTH), QUESTIONS[0]]
    command, environment = unset("demo", "--documents", str(documents), *question)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(re.findall(r"^ +[123]  \d+\.txt +passage \d", ended.stdout, re.MULTILINE)) == 3, ended.stdout


def test_serving_an_index_of_another_model(index: Path, run: Run, tmp_path: Path) -> None:
    other = str(write_model(tmp_path / "other", 3))
    line = ["serve", other, "--listen", "127.0.0.1:0", "--no-keep", "--same-owner"]
    ended = run(*line, "--index", str(index))
    assert ended.code == 1
    assert "is an index of another model than" in ended.err


def test_a_passage_cannot_write_to_the_terminal() -> None:
    assert "\x1b" not in shown("a\x1b[2Jb\nc")


def test_options_that_exclude_one_another(run: Run, index: Path) -> None:
    in_words(run("serve", "--index", str(index), "--also", "x"), "--index and --also exclude each other", "by itself")
    in_words(run("serve", "m", "--top", "3", "--listen", "127.0.0.1:0"), "a search without an index", "--index")
