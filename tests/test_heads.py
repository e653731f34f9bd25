"""Classifiers, taggers, question answerers and rerankers: the answers of the library that people know, privately."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import secure
from secure.deployments.compiled import Compiled
from secure.models import pairs, tokens
from secure.models.heads import best_span, span_at, task_named
from secure.polynomial.recipe import Recipe
from secure.session.session import STEP, Session
from secure.tasks import headed
from secure.tasks.classify import Classify
from secure.tasks.tag import Tag
from secure.training.distil import distil
from secure.training.trainer import Settings
from tests.heads import LABELS, write_head
from tests.tiny import WORDS, sentences

for module in ("transformers", "tokenizers"):
    pytest.importorskip(module)

LENGTH = 12
TEXTS = sentences(8, LENGTH - 2)
PAIRS = list(zip(sentences(6, 4), sentences(9, 5)[3:], strict=True))
DEPLOYMENTS = {"two": secure.TwoParty(), "three": secure.ThreeParty()}

Made = Callable[..., Compiled]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a random model for a task."""
    return cache(lambda task: write_head(tmp_path_factory.mktemp("heads") / task, task))


@pytest.fixture(scope="module")
def made(heads: Callable[[str], Path]) -> Made:
    """A model for a task, compiled once for each choice."""

    @cache
    def compiled(task: str, reveal: str = "", deployment: str = "two", **other: Any) -> Compiled:
        sizes = {"length": LENGTH, **other}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(headed, "SENTENCES", TEXTS)  # of words that the tokenizer knows, and few
            return secure.compile_text_model(
                str(heads(task)), deployment=DEPLOYMENTS[deployment], reveal=reveal, **sizes
            )

    return compiled


@pytest.fixture(scope="module")
def pipelines(heads: Callable[[str], Path]) -> Callable[[str], Any]:
    from transformers import pipeline

    made: Any = pipeline
    names = {"classify": "text-classification", "tag": "token-classification"}
    return cache(lambda task: made(names[task], model=str(heads(task))))


def asked(compiled: Compiled) -> Session:
    return secure.insecure_in_process(compiled)


def near(ours: Any, theirs: Any, tolerance: float = 2e-3) -> None:
    """The same answer, but for the last digits of its scores, and for a score that is not told."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            near(ours[key], theirs[key], tolerance)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            near(one, other, tolerance)
    elif isinstance(theirs, float) or hasattr(theirs, "item"):
        assert ours is None or abs(ours - float(theirs)) < tolerance
    else:
        assert ours == theirs


# classification


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("reveal", ["label", "probabilities", "logits"])
def test_classes_are_those_of_the_pipeline(
    reveal: str, deployment: str, made: Made, pipelines: Callable[[str], Any]
) -> None:
    pipe = pipelines("classify")
    pairs: list[Any] = [{"text": one, "text_pair": other} for one, other in PAIRS]
    theirs = pipe(TEXTS) + [pipe(each) for each in pairs]
    assert len({each["label"] for each in theirs}) > 1, "the model says the same of everything"
    with asked(made("classify", reveal, deployment)) as session:
        ours = session.classify(TEXTS + pairs)
        near(ours, theirs)
        assert {each["score"] is None for each in ours} == {reveal == "label"}
        near(session.classify([PAIRS[0]]), theirs[len(TEXTS) : len(TEXTS) + 1])  # as a pair
        near(session.classify([{"text": TEXTS[0]}, {"text": TEXTS[0], "text_pair": None}]), [theirs[0]] * 2)
        if reveal == "label":
            with pytest.raises(secure.InvalidInput, match="reveals one label a text"):
                session.classify(TEXTS, top_k=2)
        else:
            near(session.classify(TEXTS[:2], top_k=2), pipe(TEXTS[:2], top_k=2))
            near(session.classify(TEXTS[:2], top_k=None), pipe(TEXTS[:2], top_k=None))


def test_an_index_and_nothing_else_is_revealed(made: Made) -> None:
    """The Program of a label has one number a text as its result; the query of a session gives no more."""
    compiled = made("classify", "label")
    assert {tuple(shape) for shape in compiled.program.output_shapes.values()} == {(1,)}
    shapes = {reveal: made("tag", reveal).program.output_shapes for reveal in ("label", "logits")}
    assert [tuple(*each.values()) for each in shapes.values()] == [(1, LENGTH), (1, LENGTH, 5)]
    assert {tuple(shape) for shape in made("answer", "span").program.output_shapes.values()} == {(1,)}


def test_several_labels_that_hold_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import pipeline

    directory = write_head(tmp_path / "m", "classify", seed=3, problem_type="multi_label_classification")
    theirs: Any = pipeline("text-classification", model=str(directory))(TEXTS, top_k=None)
    for reveal in ("label", "probabilities", "logits"):
        monkeypatch.setattr(headed, "SENTENCES", TEXTS)
        compiled = secure.compile_text_model(str(directory), LENGTH, reveal=reveal)
        with asked(compiled) as session:
            if reveal != "label":
                near(session.classify(TEXTS, top_k=None), theirs)
                continue
            ours = [{each["label"] for each in found} for found in session.classify(TEXTS)]
            assert ours == [{each["label"] for each in found if each["score"] > 0.5} for found in theirs]


def test_batches_and_lengths(made: Made, pipelines: Callable[[str], Any]) -> None:
    compiled = made("classify", "label", length=(6, LENGTH), batch=(1, 4))
    with asked(compiled) as session:
        near(session.classify(TEXTS), pipelines("classify")(TEXTS))
        assert {report.length for report in session.reports} == {6, LENGTH}
        assert len(session.reports) < len(TEXTS)


def test_a_long_text(made: Made, pipelines: Callable[[str], Any]) -> None:
    text = " ".join(TEXTS)
    pipe = pipelines("classify")
    with asked(made("classify", "logits")) as session:
        with pytest.raises(secure.InputTooLong, match="the limit is 12"):
            session.classify([text])
        near(session.classify([text], long="truncate"), pipe([text], truncation=True, max_length=LENGTH))
        pair = {"text": text, "text_pair": PAIRS[0][1]}
        near(session.classify([pair], long="truncate"), [pipe(pair, truncation=True, max_length=LENGTH)])
        with pytest.raises(secure.InvalidInput, match="'split' in the task classify"):
            session.classify([text], long="split")
        with pytest.raises(secure.EmptyInput):
            session.classify([""])
        with pytest.raises(secure.EmptyInput):
            session.classify([("zqba", "")])


# tags


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("reveal", ["label", "logits"])
def test_entities_are_those_of_the_pipeline(
    reveal: str, deployment: str, made: Made, pipelines: Callable[[str], Any]
) -> None:
    pipe = pipelines("tag")
    with asked(made("tag", reveal, deployment)) as session:
        theirs = pipe(TEXTS, aggregation_strategy="simple")
        assert len({each["entity_group"] for found in theirs for each in found}) > 1
        near(session.tag(TEXTS), theirs)
        if deployment == "two":
            near(session.tag(TEXTS, aggregation="none"), pipe(TEXTS))
    with pytest.raises(secure.InvalidInput, match="no aggregation 'first'"), asked(made("tag", reveal)) as session:
        session.tag(TEXTS, aggregation="first")


def test_entities_of_a_text_in_pieces(made: Made) -> None:
    """The pieces' entities stand where they are in the whole text."""
    text = " ".join(TEXTS[:4])
    with asked(made("tag", "label")) as session:
        (whole,) = session.tag([text], long="split", aggregation="none")
        words, width = text.split(), LENGTH - 2
        parts = [" ".join(words[i : i + width]) for i in range(0, len(words), width)]
        assert len(parts) > 1
        apart = [each for found in session.tag(parts, aggregation="none") for each in found]
    assert [each["entity"] for each in whole] == [each["entity"] for each in apart]
    assert [text[each["start"] : each["end"]] for each in whole] == [each["word"] for each in apart]


# answers


def reference(directory: Path, question: str, context: str) -> dict[str, Any]:
    """The answer of transformers' question-answering pipeline, which versions up to 4 have, of one piece."""
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForQuestionAnswering.from_pretrained(directory).eval()
    encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        found = model(**encoded)
    inside = torch.tensor([which == 1 for which in encoded.sequence_ids(0)])
    counted = inside | (torch.arange(len(inside)) == 0)
    start, end = (
        torch.where(counted, logits[0].double(), -10000.0).softmax(-1)
        for logits in (found.start_logits, found.end_logits)
    )
    start[0] = end[0] = 0.0
    joint = (start[:, None] * end[None, :]).triu().tril(14)
    first, last = divmod(int(joint.argmax()), len(inside))
    a, b = offsets[first][0], offsets[last][1]
    return {"score": float(joint.max()), "start": a, "end": b, "answer": context[a:b]}


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("reveal", ["span", "logits"])
def test_answers_are_those_of_the_pipeline(
    reveal: str, deployment: str, made: Made, heads: Callable[[str], Path]
) -> None:
    theirs = [reference(heads("answer"), *pair) for pair in PAIRS]
    assert len({(each["start"], each["end"]) for each in theirs}) > 1
    with asked(made("answer", reveal, deployment)) as session:
        near(session.answer(*map(list, zip(*PAIRS, strict=True))), theirs)
        near(session.answer(*PAIRS[0]), theirs[0])
        with pytest.raises(secure.InvalidInput, match="do not belong together"):
            session.answer("zqba", ["zqba"])


def test_an_answer_in_a_long_context(made: Made, heads: Callable[[str], Path]) -> None:
    question, context = WORDS[0], " ".join(TEXTS)
    with asked(made("answer", "logits")) as session:
        ours = session.answer(question, context, long="split")
        assert context[ours["start"] : ours["end"]] == ours["answer"]
        assert len(session.reports) > 2
        words, spans = context.split(), []
        room = LENGTH - 4  # of the context, beside the question and three special tokens
        for first in range(0, len(words), room - LENGTH // 4):
            spans.append(reference(heads("answer"), question, " ".join(words[first : first + room])))
            if first + room >= len(words):
                break
        assert len(spans) == len(session.reports)
        best = max(spans, key=lambda found: found["score"])
        assert ours["answer"] == best["answer"]
        near(ours["score"], best["score"])
        with pytest.raises(secure.InputTooLong, match="no room"):
            session.answer(" ".join(WORDS[:10]), context, long="split")
    with asked(made("answer", "span")) as session:
        with pytest.raises(secure.InvalidInput, match="cannot be compared"):
            session.answer(question, context, long="split")
        assert session.answer(question, context, long="truncate")["end"] <= len(" ".join(words[:room]))


def test_every_span_has_its_index() -> None:
    length = 20
    seen = set()
    for first in range(length):
        for last in range(first, min(first + 15, length)):
            start, end = torch.zeros(1, length), torch.zeros(1, length)
            start[0, first], end[0, last] = 1.0, 1.0
            index = int(best_span(start, end))
            assert span_at(index, length) == (first, last)
            seen.add(index)
    assert seen == set(range(len(seen)))
    for index in (-1, len(seen)):
        with pytest.raises(secure.InvalidInput, match="no span"):
            span_at(index, length)


# rerankers


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_scores_are_those_of_the_cross_encoder(deployment: str, made: Made, heads: Callable[[str], Path]) -> None:
    ranker = pytest.importorskip("sentence_transformers").CrossEncoder(str(heads("rerank")), max_length=LENGTH)
    query, documents = WORDS[5], [*TEXTS, " ".join(TEXTS[:2])]
    theirs = ranker.rank(query, documents, return_documents=True)
    with asked(made("rerank", deployment=deployment)) as session:
        ours = session.rerank(query, documents, return_documents=True)
        by_id = {each["corpus_id"]: each for each in theirs}
        assert {*by_id} == {each["corpus_id"] for each in ours}
        for each in ours:
            near(each, by_id[each["corpus_id"]])
        scores = [each["score"] for each in ours]
        assert scores == sorted(scores, reverse=True)
        assert [each["corpus_id"] for each in session.rerank(query, documents, top_k=2)] == [
            each["corpus_id"] for each in ours[:2]
        ]
        with pytest.raises(secure.InvalidInput, match="one text in place of documents"):
            session.rerank(query, documents[0])
        with pytest.raises(secure.InvalidInput, match="the 0 best documents"):
            session.rerank(query, documents, top_k=0)
        with pytest.raises(secure.EmptyInput, match="the first text is empty"):
            session.rerank("", documents)


def test_a_reranker_reveals_its_score_alone(made: Made) -> None:
    with pytest.raises(secure.InvalidInput, match="the task rerank of this model reveals no label"):
        made("rerank", "label")


# which task


@pytest.mark.parametrize("task", LABELS)
def test_a_directory_says_its_task(task: str, heads: Callable[[str], Path]) -> None:
    assert task_named(str(heads(task))) == task


ASKED: dict[str, Callable[[Session], Any]] = {
    "classify": lambda session: session.classify(TEXTS[:1]),
    "tag": lambda session: session.tag(TEXTS[:1]),
    "answer": lambda session: session.answer(*PAIRS[0]),
    "rerank": lambda session: session.rerank(TEXTS[0], TEXTS[1:2]),
    "embed": lambda session: session.embed(TEXTS[:1]),
}


@pytest.mark.parametrize("task", LABELS)
def test_another_task_is_refused_before_anything_is_sent(task: str, made: Made) -> None:
    with asked(made(task)) as session:
        for other in ASKED.keys() - {task}:
            with pytest.raises(secure.InvalidInput, match=f"is for the task '{task}', not for '{other}'"):
                ASKED[other](session)
        assert session.reports == []
        ASKED[task](session)


def test_a_model_of_few_positions_gets_all_of_them_by_default(heads: Callable[[str], Path]) -> None:
    loaded = Classify().load(str(heads("classify")))
    assert loaded.length == 16


def test_an_encoder_answers_no_other_task(directory: Path) -> None:
    compiled = secure.compile_text_model(str(directory), 8)
    with asked(compiled) as session:
        for other in ASKED.keys() - {"embed"}:
            with pytest.raises(secure.InvalidInput, match=f"not for the task '{other}'"):
                ASKED[other](session)
        assert session.reports == []


def test_tasks_that_a_model_is_not_made_for(heads: Callable[[str], Path], directory: Path) -> None:
    with pytest.raises(secure.InvalidInput, match="there is no task 'sing'"):
        secure.compile_text_model(str(heads("tag")), LENGTH, task="sing")
    with pytest.raises(secure.InvalidInput, match="3 classes, which does not fit"):
        secure.compile_text_model(str(heads("classify")), LENGTH, task="rerank")
    with pytest.raises(secure.InvalidInput, match="classifier"):
        secure.compile_text_model(str(directory), LENGTH, task="classify")
    with pytest.raises(secure.InvalidInput, match="revealed of models with a head alone"):
        secure.compile_text_model(str(directory), LENGTH, reveal="label")
    with pytest.raises(secure.InvalidInput, match="reveals no span"):
        secure.compile_text_model(str(heads("tag")), LENGTH, reveal="span")


@pytest.mark.parametrize("task", ["classify", "answer"])
def test_a_head_on_a_polynomial_form_is_refused(task: str, tmp_path: Path) -> None:
    """Computed with exact functions, weights that were trained for polynomials would give wrong answers in silence."""
    found = write_head(tmp_path / "m", task)
    with pytest.raises(secure.InvalidInput, match=f"for the task {task}: sentence encoders and language models"):
        distil(found, TEXTS, Recipe(), Settings(), tmp_path / "other")
    (found / "polynomial.json").write_text(Recipe().model_dump_json())
    with pytest.raises(
        secure.InvalidInput, match=r"m is in polynomial form \(polynomial\.json\), which models with a head"
    ):
        secure.compile_text_model(str(found), LENGTH)


def test_wrong_types_are_refused(made: Made) -> None:
    with asked(made("classify")) as session:
        wrong: list[Any] = ["a text", [1], [Path("a")], [("a", "b", "c")], [{"text": 1}], [{"pair": "a"}]]
        wrong += [{"text": "a", "text_pair": "b"}, [{"text": "a", "pair": "b"}], [{"text": None, "text_pair": "b"}]]
        for given in wrong:
            with pytest.raises(secure.InvalidInput, match="classify takes texts"):
                session.classify(given)
        with pytest.raises(secure.InvalidInput, match="at least 1"):
            session.classify(TEXTS, top_k=0)


def test_a_stream_of_answers(made: Made, pipelines: Callable[[str], Any]) -> None:
    from secure.tasks.classify import Classify

    with asked(made("classify", "label")) as session:
        found = list(session.stream(Classify(), iter([TEXTS[0], " ".join(TEXTS), TEXTS[1]])))
        assert isinstance(found[1], secure.InputTooLong)
        near([found[0], found[2]], pipelines("classify")(TEXTS[:2]))


def test_a_compiled_classifier_is_kept(made: Made, tmp_path: Path) -> None:
    secure.save_compiled(made("tag", "label"), tmp_path / "kept")
    found = secure.load_compiled(tmp_path / "kept")
    assert found.program.digest == made("tag", "label").program.digest
    with asked(found) as session, asked(made("tag", "label")) as other:
        assert session.tag(TEXTS[:2]) == other.tag(TEXTS[:2])


def test_the_time_of_making_answers_is_rounded(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans take longer to put together in some texts than in others, and the next query would show by how much."""
    slept = list[float]()
    with secure.insecure_in_process(made("tag", "label"), pace=0.5) as session:
        monkeypatch.setattr("secure.session.session.time.sleep", slept.append)
        session.tag(TEXTS[:3])
    assert len(slept) == 1 + 3  # before the first query, and after each
    assert all(0 <= seconds <= STEP for seconds in slept[1:])


def test_the_time_of_taking_answers_is_rounded_too(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is longer to write if more entities are in it; the next query leaves after a whole number of steps."""
    clock, steps = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        steps.append(clock[0])

    with secure.insecure_in_process(made("tag", "label"), pace=0.5) as session:
        monkeypatch.setattr("secure.session.session.time.sleep", sleep)
        monkeypatch.setattr("secure.session.session.time.monotonic", lambda: clock[0])
        for number, _ in enumerate(session.stream(Tag(), TEXTS[:3])):
            clock[0] += [0.001, 1.7 * STEP, 0.4 * STEP][number]  # what writing the row takes
    assert steps == pytest.approx([100.5, 100.5 + STEP, 100.5 + 3 * STEP, 100.5 + 4 * STEP])


@pytest.mark.parametrize("task", LABELS)
def test_a_text_is_divided_once_and_before_the_first_query(
    task: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second time would lie between queries, and last longer for some texts than for others."""
    compiled = made(task)  # which divides texts for calibration
    events, divide, ask = list[str](), tokens.guarded, Session._answers

    def divided(tokenizer: Any, text: str, *more: Any) -> Any:
        events.append(text)
        return divide(tokenizer, text, *more)

    def asking(*arguments: Any, **named: Any) -> Any:
        events.append("a query")
        return ask(*arguments, **named)

    monkeypatch.setattr(pairs, "guarded", divided)
    monkeypatch.setattr(Session, "_answers", asking)
    with asked(compiled) as session:
        if task == "answer":
            session.answer(*map(list, zip(*PAIRS, strict=True)))
        elif task == "rerank":
            session.rerank(WORDS[5], TEXTS)
        else:
            ASKED[task](session)
        queries = len(session.reports)
    texts = {
        "answer": [text for pair in PAIRS for text in pair],
        "rerank": [text for each in TEXTS for text in (WORDS[5], each)],
    }.get(task, TEXTS[:1])
    assert events == [*texts, *["a query"] * queries]


def test_ciphertexts_refuse_in_words(heads: Callable[[str], Path]) -> None:
    with pytest.raises(secure.UnsupportedOperation, match="not a polynomial") as raised:
        secure.compile_text_model(
            str(heads("classify")), 16, deployment=secure.Ckks(), embedding="client-table", reveal="logits"
        )
    assert "hint: bring the model into polynomial form first" in str(raised.value)
