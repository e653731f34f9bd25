"""Sessions in the shapes of sentence-transformers, transformers, LangChain and LlamaIndex, beside these themselves."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secure
from secure.errors import EmptyInput, InputTooLong, InvalidInput
from tests.heads import write_head
from tests.tiny import WORDS, write_model
from tests.writers import write_writer

for module in ("transformers", "tokenizers", "jinja2"):
    pytest.importorskip(module)

LENGTH = 12
TEXTS = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(7)]
LONG = " ".join(WORDS[:30])
QUESTION, CONTEXT = WORDS[2], " ".join(WORDS[3:9])


def session_of(directory: Path, **options: Any) -> secure.Session:
    return secure.insecure_in_process(secure.compile_text_model(str(directory), LENGTH, **options))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embedder(directory: Path) -> Iterator[secure.Session]:
    with session_of(directory, batch=2) as session:
        yield session


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[secure.Session]:
    directory = write_writer(tmp_path_factory.mktemp("writer") / "tiny")
    with secure.insecure_in_process(secure.compile_generator(str(directory), prompt=32, capacity=64)) as session:
        yield session


@pytest.fixture
def model(embedder: secure.Session) -> Any:
    return secure.SentenceTransformer(embedder)


# sentence-transformers


def test_encode(model: Any, embedder: secure.Session) -> None:
    own = torch.stack(embedder.embed(TEXTS))
    found = model.encode(TEXTS, batch_size=3)
    assert (type(found), found.dtype, found.shape) == (np.ndarray, np.float32, (len(TEXTS), 32))
    assert np.allclose(found, own.numpy(), atol=2e-3)
    one = model.encode(TEXTS[0])
    assert (one.shape, one.dtype) == ((32,), np.float32)
    tensors = model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=True)
    assert (type(tensors), tensors.dtype) == (torch.Tensor, torch.float32)
    listed = model.encode(TEXTS[:2], convert_to_numpy=False)
    assert [each.shape for each in listed] == [(32,), (32,)]
    scaled = model.encode(TEXTS, normalize_embeddings=True)
    assert np.allclose(np.linalg.norm(scaled, axis=1), 1)
    assert model.encode([]).shape == (0, 32)
    assert (model.max_seq_length, model.get_sentence_embedding_dimension()) == (LENGTH, 32)
    assert np.allclose(model.encode_query(TEXTS[0]), one, atol=2e-3)
    assert np.allclose(model.encode_document(TEXTS[:2]), found[:2], atol=2e-3)


def test_similarity(model: Any) -> None:
    found = model.encode(TEXTS)
    cosines = model.similarity(found, found)
    assert cosines.shape == (len(TEXTS), len(TEXTS))
    assert torch.allclose(cosines.diagonal(), torch.ones(len(TEXTS)), atol=1e-5)
    assert torch.allclose(model.similarity_pairwise(found, found), torch.ones(len(TEXTS)), atol=1e-5)
    assert torch.allclose(model.similarity(found[0], list(torch.from_numpy(found)))[0], cosines[0])
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers.util import cos_sim

        assert torch.allclose(cosines, cos_sim(found, found), atol=1e-5)


def test_what_encode_cannot_do(model: Any, embedder: secure.Session) -> None:
    (cut,) = embedder.embed([LONG], long="truncate")
    assert np.allclose(model.encode(LONG), cut.numpy(), atol=2e-3)
    with pytest.raises(InputTooLong, match="text 2 of 2"):
        model.encode([TEXTS[0], LONG], long="refuse")
    with pytest.raises(EmptyInput):
        model.encode("")
    for given in (
        {"prompt": "query: "},
        {"precision": "int8"},
        {"output_value": "token_embeddings"},
        {"device": "cuda"},
    ):
        with pytest.raises(InvalidInput, match=next(iter(given))):
            model.encode(TEXTS, **given)
    with pytest.raises(InvalidInput, match="no prompt is called 'query'"):
        model.encode(TEXTS, prompt_name="query")


def test_prompts_of_queries_and_documents(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    named = list[Any]()
    monkeypatch.setattr(type(model), "prompts", {"query": "q: ", "passage": "p: "})
    monkeypatch.setattr(type(model), "encode", lambda self, texts, prompt_name=None, **_: named.append(prompt_name))
    model.encode_query("a")
    model.encode_document("a")
    model.encode_document("a", "query")
    assert named == ["query", "passage", "query"]


def test_in_a_running_event_loop(model: Any, embedder: secure.Session) -> None:
    """As in a notebook: what blocks does its work, and what does not leaves the loop free."""

    async def cell() -> Any:
        blocking = model.encode(TEXTS[:2])
        ticks, coming = 0, asyncio.ensure_future(model.aencode(TEXTS[:2]))
        while not coming.done():
            await asyncio.sleep(0.005)
            ticks += 1
        assert ticks > 1  # of a loop that is blocked it would be one at most
        features = await secure.pipeline("feature-extraction", embedder).acall(TEXTS[:2])
        return blocking, await coming, np.array(features)

    first, *others = asyncio.run(cell())
    assert all(np.allclose(first, other, atol=2e-3) for other in others)


def test_they_connect_as_secure_connect_does(embedder: secure.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    given, closed = list[Any](), list[int]()

    def connect(*arguments: Any, **options: Any) -> secure.Session:
        given.append((arguments, options))
        return embedder

    monkeypatch.setattr("parties.deployments.connect", connect)
    monkeypatch.setattr(type(embedder), "close", lambda self: closed.append(1))
    deployment = secure.TwoParty(server="a:1", dealer="b:1")
    with secure.SentenceTransformer(deployment, network=secure.Plaintext(), pace=0):
        pass
    with secure.pipeline("feature-extraction", deployment, model="m"):
        pass
    assert given == [((deployment,), {"network": secure.Plaintext(), "pace": 0}), ((deployment,), {"model": "m"})]
    assert len(closed) == 2
    with secure.SentenceTransformer(embedder):
        pass
    with pytest.raises(InvalidInput, match="generates no text"):
        secure.pipeline("text-generation", deployment)
    assert len(closed) == 3  # of the one that was opened in vain alone
    with pytest.raises(InvalidInput, match="pace means nothing for a session that is open"):
        secure.SentenceTransformer(embedder, pace=0)
    with pytest.raises(InvalidInput, match="no pipeline is called 'fill-mask'"):
        secure.pipeline("fill-mask", embedder)


# transformers


def original(task: str, directory: Path) -> Any:
    import transformers

    make: Any = transformers.pipeline
    return make(task, model=str(directory), tokenizer=str(directory))


def same(found: Any, expected: Any) -> None:
    """The same shape, keys and words, and almost the same scores."""
    assert type(found) is type(expected) or {type(found), type(expected)} <= {int, float}
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, float):
        assert abs(found - expected) < 1e-2
    else:
        assert found == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_text_classification(tmp_path: Path) -> None:
    directory = write_head(tmp_path / "m", "classify")
    theirs = original("text-classification", directory)
    with session_of(directory, reveal="probabilities") as session:
        ours = secure.pipeline("text-classification", session)
        for given in (TEXTS[0], TEXTS[:3], [TEXTS[0]]):
            same(ours(given), theirs(given))
            same(ours(given, top_k=2), theirs(given, top_k=2))
            same(ours(given, top_k=None), theirs(given, top_k=None))
        pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
        same(ours(pair), theirs(pair))
        with pytest.raises(InputTooLong):
            ours(LONG)
        assert ours(LONG, truncation=True)[0].keys() == {"label", "score"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_token_classification(tmp_path: Path) -> None:
    directory = write_head(tmp_path / "m", "tag")
    theirs = original("token-classification", directory)
    with session_of(directory, reveal="probabilities") as session:
        ours = secure.pipeline("token-classification", session)
        for how in ({}, {"aggregation_strategy": "simple"}):
            for given in (TEXTS[4], TEXTS[:3]):
                expected = theirs(given, **how)
                plain = [[{k: _python(v) for k, v in e.items()} for e in one] for one in _lists(expected)]
                same(_lists(ours(given, **how)), plain)
                assert isinstance(ours(given, **how)[0], list) is isinstance(expected[0], list)


def _lists(found: list[Any]) -> list[list[Any]]:
    return found if isinstance(found[0], list) else [found]


def _python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def test_question_answering(tmp_path: Path) -> None:
    with session_of(write_head(tmp_path / "m", "answer"), reveal="logits") as session:
        ask = secure.pipeline("question-answering", session)
        found = ask(question=QUESTION, context=CONTEXT)
        assert found.keys() == {"score", "start", "end", "answer"}
        assert found["answer"] == CONTEXT[found["start"] : found["end"]]
        given = {"question": QUESTION, "context": CONTEXT}
        assert ask(given)["answer"] == found["answer"]
        assert [each["answer"] for each in ask([given, given])] == [found["answer"]] * 2
        for wrong in ((), ([{"question": QUESTION}],)):
            with pytest.raises(InvalidInput):
                ask(*wrong)


def test_text_generation(writer: secure.Session) -> None:
    write = secure.pipeline("text-generation", writer)
    own = writer.generate("the cat sat", 4).complete().text
    assert write("the cat sat", max_new_tokens=4) == [{"generated_text": "the cat sat" + own}]
    assert write(["the cat sat"], max_new_tokens=4, return_full_text=False) == [[{"generated_text": own}]]
    messages = [{"role": "user", "content": "the cat"}]
    chat = write(messages, max_new_tokens=3)[0]["generated_text"]
    said = writer.generate(messages, 3).complete().text
    assert chat == [*messages, {"role": "assistant", "content": said}]
    with pytest.raises(InvalidInput, match="without do_sample"):
        write("a", temperature=0.5)
    with pytest.raises(InvalidInput, match="a temperature of 1"):
        write("a", do_sample=True)


# LangChain and LlamaIndex


@pytest.mark.filterwarnings("ignore")
def test_langchain(model: Any, embedder: secure.Session, writer: secure.Session) -> None:
    pytest.importorskip("langchain_core")
    from parties.shapes.langchain import ChatUnseen, UnseenEmbeddings

    embeddings = UnseenEmbeddings(embedder)
    expected = model.encode(TEXTS[:3])
    assert np.allclose(embeddings.embed_documents(TEXTS[:3]), expected, atol=2e-3)
    assert np.allclose(embeddings.embed_query(TEXTS[0]), expected[0], atol=2e-3)
    assert np.allclose(asyncio.run(embeddings.aembed_documents(TEXTS[:3])), expected, atol=2e-3)
    chat = ChatUnseen(session=writer, max_tokens=4)
    own = writer.generate([{"role": "user", "content": "the cat"}], 4).complete()
    answer = chat.invoke("the cat")
    assert (answer.content, answer.response_metadata["finish_reason"]) == (own.text, own.finish_reason)
    assert "".join(str(piece.content) for piece in chat.stream([("user", "the cat")])) == own.text
    assert asyncio.run(chat.ainvoke("the cat")).content == own.text
    with pytest.raises(InvalidInput, match="top_p cannot be honoured"):
        chat.invoke("the cat", top_p=0.5)


@pytest.mark.filterwarnings("ignore")
def test_llama_index(model: Any, embedder: secure.Session, writer: secure.Session) -> None:
    pytest.importorskip("llama_index.core")
    from parties.shapes.llama_index import UnseenEmbedding, UnseenLLM

    embeddings = UnseenEmbedding(embedder)
    expected = model.encode(TEXTS[:3])
    assert np.allclose(embeddings.get_text_embedding_batch(TEXTS[:3]), expected, atol=2e-3)
    assert np.allclose(embeddings.get_query_embedding(TEXTS[0]), expected[0], atol=2e-3)
    assert np.allclose(asyncio.run(embeddings.aget_query_embedding(TEXTS[0])), expected[0], atol=2e-3)
    llm = UnseenLLM(session=writer, max_tokens=4)
    own = writer.generate("the cat", 4).complete().text
    assert llm.complete("the cat").text == own
    assert "".join(piece.delta for piece in llm.stream_complete("the cat")) == own
    assert llm.metadata.num_output == 4
