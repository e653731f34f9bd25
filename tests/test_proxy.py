"""The proxy: what it answers, honours, refuses and never says, and that it stays on this machine."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import secure
from parties.cli.proxy import own_token
from parties.net.endpoints import Endpoint
from parties.proxy import answers, bodies, workers
from parties.proxy.bodies import (
    ABOUT,
    NEUTRAL,
    ChatBody,
    ClassifyBody,
    CompletionsBody,
    EmbeddingsBody,
    RequestRefused,
    read_body,
    refused,
)
from parties.proxy.tasks import Counted
from parties.proxy.workers import SessionWorkers
from parties.services.hosting import child
from secure.errors import Busy, DealerError, InvalidInput, OutOfRange, PeerLost, QuotaError
from secure.models.index import build_index, write_index
from secure.models.passages import TextDocument
from secure.models.settings import IDS, PASSAGES_SCORES, TaskSettings
from secure.models.text import load_text_model
from secure.tasks.task import Served
from tests.heads import LABELS, write_head
from tests.proxies import ServedProxy, running
from tests.test_cli import Run, run
from tests.tiny import WORDS, wait_until, write_model
from tests.writers import write_writer

__all__ = ["run"]  # the fixture

for module in ("transformers", "tokenizers", "jinja2"):
    pytest.importorskip(module)
app = pytest.importorskip("parties.proxy.app")
hosted = pytest.importorskip("parties.proxy.hosted")

TEXTS = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(12)]
LONG = " ".join(WORDS[:20])
PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> secure.Compiled:
    directory = write_model(tmp_path_factory.mktemp("models") / "tiny")
    return secure.compile_text_model(str(directory), (8, 16), batch=4)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> secure.Compiled:
    directory = write_writer(tmp_path_factory.mktemp("writer") / "tiny")
    return secure.compile_generator(str(directory), prompt=(16, 32), capacity=64)


@pytest.fixture(scope="module")
def embeds(embedder: secure.Compiled) -> Iterator[ServedProxy]:
    with running(embedder) as served:
        yield served


@pytest.fixture(scope="module")
def writes(writer: secure.Compiled) -> Iterator[ServedProxy]:
    with running(writer) as served:
        yield served


def vectors(reply: Any) -> torch.Tensor:
    assert reply.status == 200, reply.body
    return torch.tensor([each["embedding"] for each in reply.body["data"]], dtype=torch.float64)


def said(reply: Any, status: int, *words: str) -> dict[str, Any]:
    """The error of a reply, which has OpenAI's form and these words."""
    assert reply.status == status, reply.body
    error: dict[str, Any] = reply.body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    return error


# embeddings


def test_embeddings(embeds: ServedProxy) -> None:
    own = torch.stack(embeds.session.embed(TEXTS))
    reply = embeds.ask("/v1/embeddings", {"input": TEXTS})
    assert torch.allclose(vectors(reply), own, atol=2e-3)
    assert [each["index"] for each in reply.body["data"]] == list(range(len(TEXTS)))
    tokens = sum(len(text.split()) + 2 for text in TEXTS)
    assert reply.body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (reply.body["object"], reply.body["model"]) == ("list", embeds.model)
    one = embeds.ask("/v1/embeddings", {"input": TEXTS[3]})
    assert torch.allclose(vectors(one)[0], own[3], atol=2e-3)
    encoded = embeds.ask("/v1/embeddings", {"input": TEXTS[:2], "encoding_format": "base64", "user": "me"})
    found = np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in encoded.body["data"]])
    assert np.allclose(found, own[:2].numpy(), atol=2e-3)


def test_long_texts(embeds: ServedProxy) -> None:
    error = said(embeds.ask("/v1/embeddings", {"input": [TEXTS[0], LONG, "  "]}), 400, "input 2 of 3", "22 tokens")
    assert (error["type"], error["code"]) == ("invalid_request_error", "input")
    said(embeds.ask("/v1/embeddings", {"input": ["", TEXTS[0]]}), 400, "input 1 of 2: the text is empty")
    for long in ("truncate", "split"):
        (own,) = embeds.session.embed([LONG], long=long)
        assert torch.allclose(vectors(embeds.ask("/v1/embeddings", {"input": LONG, "long": long}))[0], own, atol=2e-3)
    said(embeds.ask("/v1/embeddings", {"input": TEXTS[0], "prompt_name": "query"}), 400, "no prompt is called 'query'")


def test_requests_at_once_share_queries(embeds: ServedProxy) -> None:
    own = torch.stack(embeds.session.embed(TEXTS))

    def queries() -> float:
        text = embeds.ask("/metrics").body
        return sum(
            float(line.split()[-1]) for line in text.splitlines() if line.startswith("unseen_proxy_queries_total")
        )

    before = queries()
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        replies = list(pool.map(lambda text: embeds.ask("/v1/embeddings", {"input": text}), TEXTS))
    assert torch.allclose(torch.cat([vectors(reply) for reply in replies]), own, atol=2e-3)
    assert queries() - before < len(TEXTS)


def test_token_arrays(embedder: secure.Compiled, embeds: ServedProxy) -> None:
    tokenizer = embeds.session.served.tokenizer
    assert tokenizer is not None
    ids = [tokenizer.tokenizer.encode(text).ids for text in TEXTS[:3]]
    said(embeds.ask("/v1/embeddings", {"input": ids}), 400, "no arrays of tokens", "check_embedding_ctx_length=False")
    own = torch.stack(embeds.session.embed(TEXTS[:3]))
    with running(embedder, token_ids=True) as served:
        for given in (ids, [each[1:-1] for each in ids]):  # with the special tokens and without
            assert torch.allclose(vectors(served.ask("/v1/embeddings", {"input": given})), own, atol=2e-3)
        assert torch.allclose(vectors(served.ask("/v1/embeddings", {"input": ids[0]}))[0], own[0], atol=2e-3)
        for wrong in ([1, 1], [99_999], [2, 2, 3]):
            said(served.ask("/v1/embeddings", {"input": wrong}), 400, "not those that this model's tokenizer makes")


def test_dimensions(embedder: secure.Compiled, embeds: ServedProxy) -> None:
    own = torch.stack(embeds.session.embed(TEXTS[:2]))
    assert vectors(embeds.ask("/v1/embeddings", {"input": TEXTS[:2], "dimensions": 32})).shape == (2, 32)
    error = said(embeds.ask("/v1/embeddings", {"input": TEXTS[0], "dimensions": 8}), 400, "gives 32 numbers")
    assert error["param"] == "dimensions"
    with running(embedder, matryoshka=True) as served:
        assert torch.allclose(
            vectors(served.ask("/v1/embeddings", {"input": TEXTS[:2], "dimensions": 8})), own[:, :8], atol=2e-3
        )
        said(served.ask("/v1/embeddings", {"input": TEXTS[0], "dimensions": 33}), 400, "gives 32 numbers")
    whole = torch.nn.functional.normalize(own, dim=-1)
    assert torch.allclose(answers.shortened(whole[0], 8, normalized=True).norm(), torch.tensor(1.0).double())


# texts


def test_chat_and_completions(writes: ServedProxy) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": PROMPT}]
    own = writes.session.generate(messages, 5, ignore_end=True).complete()
    given = {"messages": messages, "max_tokens": 5, "ignore_eos": True}
    reply = writes.ask("/v1/chat/completions", given)
    assert reply.status == 200, reply.body
    (choice,) = reply.body["choices"]
    assert choice["message"] == {"role": "assistant", "content": own.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    usage = {"prompt_tokens": own.prompt_tokens, "completion_tokens": 5, "total_tokens": own.prompt_tokens + 5}
    assert reply.body["usage"] == usage
    parts = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    again = writes.ask("/v1/chat/completions", {**given, "messages": parts, "hide_length": True, "seed": 3})
    assert again.body["choices"] == reply.body["choices"]
    prompts = [PROMPT, "once upon"]
    texts = [writes.session.generate(each, 3, ignore_end=True).complete().text for each in prompts]
    both = writes.ask("/v1/completions", {"prompt": prompts, "max_tokens": 3, "ignore_eos": True})
    assert [each["text"] for each in both.body["choices"]] == texts
    stop = texts[0][1:3]
    cut = writes.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, "stop": [stop]})
    assert cut.body["choices"][0]["text"] == texts[0].partition(stop)[0]
    assert cut.body["choices"][0]["finish_reason"] == "stop"


def events(served: ServedProxy, path: str, body: dict[str, Any]) -> list[Any]:
    reply = served.ask(path, {**body, "stream": True})
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"].startswith("text/event-stream")
    *found, last = [line.removeprefix("data: ") for line in reply.body.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(each) for each in found]


def test_streams(writes: ServedProxy) -> None:
    given = {"messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 4, "ignore_eos": True}
    whole = writes.ask("/v1/chat/completions", given).body
    *found, end, usage = events(writes, "/v1/chat/completions", {**given, "stream_options": {"include_usage": True}})
    deltas = [each["choices"][0]["delta"] for each in found]
    assert deltas[0]["role"] == "assistant"
    assert "".join(each["content"] for each in deltas) == whole["choices"][0]["message"]["content"]
    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["usage"] == whole["usage"]
    assert {each["object"] for each in (*found, end, usage)} == {"chat.completion.chunk"}
    assert len({each["id"] for each in found}) == 1
    two = events(writes, "/v1/completions", {"prompt": [PROMPT, "a"], "max_tokens": 2, "ignore_eos": True})
    assert {each["choices"][0]["index"] for each in two} == {0, 1}
    assert {each["object"] for each in two} == {"text_completion"}


def test_what_a_text_cannot_have(writes: ServedProxy) -> None:
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    said(writes.ask("/v1/chat/completions", {**chat, "temperature": 0.5}), 400, "a temperature of 0.5")
    said(writes.ask("/v1/chat/completions", {**chat, "max_tokens": 1000}), 400, "1000 new tokens")
    said(writes.ask("/v1/chat/completions", {**chat, "stream": True, "max_tokens": 1000}), 400, "1000 new tokens")
    said(writes.ask("/v1/completions", {"prompt": "the " * 60}), 400, "at most 32 fit")
    said(writes.ask("/v1/completions", {"prompt": [1, 2]}), 400, "no arrays of tokens")
    said(writes.ask("/v1/embeddings", {"input": "a"}), 400, "for the task 'generate'")
    with running_ids(writes) as served:
        own = served.session.generate([5, 6], 2, ignore_end=True).complete()
        reply = served.ask("/v1/completions", {"prompt": [5, 6], "max_tokens": 2, "ignore_eos": True})
        assert reply.body["choices"][0]["text"] == own.text


def running_ids(served: ServedProxy) -> Any:
    return running(served.compiled, token_ids=True)


class Slow:
    """A session whose text never ends by itself. steps: tokens that were taken."""

    def __init__(self, session: secure.Session) -> None:
        self._session, self.steps = session, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def generate(self, *_: Any, **__: Any) -> Any:
        steps = self

        class Endless:
            ids: list[int] = []  # noqa: RUF012
            text, finish_reason, prompt_tokens = "", "length", 3

            def __iter__(self) -> Iterator[str]:
                while steps.steps < 1000:
                    time.sleep(0.01)
                    steps.steps += 1
                    self.ids.append(1)
                    self.text += "a"
                    yield "a"

        return Endless()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_caller_who_leaves_ends_a_text(writer: secure.Compiled, hidden: bool) -> None:
    """Unless its length is to be hidden."""
    slow = list[Slow]()

    def connect() -> Any:
        slow.append(Slow(secure.insecure_in_process(writer)))
        return slow[-1]

    with running(writer, connect=connect) as served:
        connection = http.client.HTTPConnection(served.address, timeout=30)
        body = {"model": served.model, "prompt": "a", "stream": True, "hide_length": hidden}
        connection.request("POST", "/v1/completions", json.dumps(body), {"authorization": f"Bearer {served.token}"})
        answer = connection.getresponse()
        assert answer.read(20)
        answer.close()
        connection.close()
        time.sleep(0.3)
        before = slow[0].steps
        time.sleep(0.2)
        assert (slow[0].steps > before) is hidden
        slow[0].steps = 1000


# reranking and classes


def test_rerank(tmp_path: Path) -> None:
    documents = [WORDS[3], f"{WORDS[4]} {WORDS[5]}", WORDS[6]]
    with running(secure.compile_text_model(str(write_head(tmp_path / "m", "rerank")), 8)) as served:
        own = served.session.rerank(WORDS[0], documents)
        given = {"query": WORDS[0], "documents": [documents[0], {"text": documents[1]}, documents[2]]}
        reply = served.ask("/v1/rerank", {**given, "return_documents": True})
        assert reply.status == 200, reply.body
        results = reply.body["results"]
        assert [each["index"] for each in results] == [each["corpus_id"] for each in own]
        scores = [each["relevance_score"] for each in results]
        assert np.allclose(scores, [each["score"] for each in own], atol=2e-3)
        assert [each["document"]["text"] for each in results] == [documents[each["index"]] for each in results]
        assert reply.body["usage"]["total_tokens"] == 3 * 4 + 4
        short = served.ask("/v1/rerank", {**given, "top_n": 1}).body["results"]
        assert [each.keys() for each in short] == [{"index", "relevance_score"}]
        said(served.ask("/v1/classify", {"input": "a"}), 400, "for the task 'rerank'")


def test_search(tmp_path: Path) -> None:
    """OpenAI's form of a search in a vector store, with the passages that a session finds."""
    model = str(write_model(tmp_path / "m"))
    documents = [TextDocument(f"doc/{i}", " ".join(WORDS[i : i + 5])) for i in range(0, 12, 2)]
    made, _ = build_index(model, load_text_model(model), documents, length=8, overlap=1)
    write_index(made, tmp_path / "index")
    for reveal, texts, scored in ((IDS, False, False), (PASSAGES_SCORES, True, True)):
        compiled = secure.compile_text_model(model, 8, index=str(tmp_path / "index"), top=3, reveal=reveal)
        with running(compiled) as served:
            (own,) = served.session.search([TEXTS[0]])
            path = f"/v1/vector_stores/{served.model}/search"
            reply = served.ask(path, {"query": TEXTS[0], "model": None})
            assert reply.status == 200, reply.body
            assert reply.body["search_query"] == [TEXTS[0]]
            data = reply.body["data"]
            assert [(e["file_id"], e["attributes"]["passage"]) for e in data] == [(e["id"], e["passage"]) for e in own]
            assert [bool(e["content"]) for e in data] == [texts] * 3
            assert [e["score"] is not None for e in data] == [scored] * 3
            if texts:
                assert [e["content"][0]["text"] for e in data] == [e["text"] for e in own]
            short = served.ask(path, {"query": [TEXTS[0]], "max_num_results": 1, "model": None}).body["data"]
            assert [e["file_id"] for e in short] == [own[0]["id"]]
            said(served.ask(path, {"query": TEXTS[0], "max_num_results": 9, "model": None}), 400, "finds 3")
            said(served.ask(path, {"query": TEXTS[:2], "model": None}), 400, "query")
            said(served.ask(path, {"query": TEXTS[0], "filters": {"a": 1}, "model": None}), 400, "filters")
            other = served.ask("/v1/vector_stores/other/search", {"query": TEXTS[0], "model": None})
            said(other, 404, "no such model")
            said(served.ask("/v1/embeddings", {"input": "a"}), 400, "search")


def test_classify(tmp_path: Path) -> None:
    compiled = secure.compile_text_model(str(write_head(tmp_path / "m", "classify")), 8, reveal="probabilities")
    with running(compiled) as served:
        given = [*TEXTS[:3], [WORDS[0], WORDS[1]]]
        reply = served.ask("/v1/classify", {"input": given[:3]})
        pair = served.ask("/v1/classify", {"input": given[3:]})
        assert (reply.status, pair.status) == (200, 200), (reply.body, pair.body)
        own = served.session.classify([*TEXTS[:3], (WORDS[0], WORDS[1])])
        data = [*reply.body["data"], *pair.body["data"]]
        assert [each["label"] for each in data] == [each["label"] for each in own]
        for each, answer in zip(data, own, strict=True):
            assert each["num_classes"] == 3
            assert abs(each["probs"][LABELS["classify"].index(each["label"])] - answer["score"]) < 5e-3


def test_classes_without_scores() -> None:
    settings = TaskSettings(reveal="label", labels=("a", "b"))
    (one,) = answers.classes([Counted({"label": "b", "score": None}, 3)], "m", settings)["data"]
    assert one == {"index": 0, "label": "b", "probs": None, "num_classes": 2}
    several = [Counted([{"label": "a", "score": None}, {"label": "b", "score": None}], 3), Counted([], 2)]
    found = answers.classes(several, "m", settings)
    assert [(each["label"], each["labels"]) for each in found["data"]] == [(None, ["a", "b"]), (None, [])]
    assert found["usage"]["total_tokens"] == 5


def test_tasks_without_an_endpoint_are_refused() -> None:
    for task, word in (("tag", "no endpoint for the task 'tag'"), ("", "takes no text")):
        session: Any = SimpleNamespace(served=Served(None, 0, task=task), length=0)
        with pytest.raises(InvalidInput, match=word):
            app.check_servable(session)


# parameters


def body(**given: Any) -> bytes:
    return json.dumps({"model": "m", **given}).encode()


@pytest.mark.parametrize("name", NEUTRAL)
def test_parameters_that_cannot_be_honoured(name: str) -> None:
    """Are taken with values that change nothing, and refused by name with any other."""
    for value in (*NEUTRAL[name], None):
        assert read_body(CompletionsBody, body(prompt="a", **{name: value})).prompt == "a"
    for value in (2, 0.5, True, "a secret", {"type": "json_object"}, [{"a": 1}]):
        if value in NEUTRAL[name] and type(value) in {type(each) for each in NEUTRAL[name]}:
            continue
        with pytest.raises(RequestRefused, match=f"{name} cannot be honoured") as found:
            read_body(CompletionsBody, body(prompt="a", **{name: value}))
        assert found.value.param == name
        assert "a secret" not in str(found.value)


def test_parameters_about_the_caller_change_nothing() -> None:
    plain = read_body(EmbeddingsBody, body(input="a"))
    assert read_body(EmbeddingsBody, body(input="a", **{name: {"a": "b"} for name in ABOUT})) == plain


@pytest.mark.parametrize(
    ("kind", "given", "word"),
    [
        (EmbeddingsBody, {"input": "a", "inputs": "b"}, "no parameter 'inputs' is known"),
        (EmbeddingsBody, {}, "input: Field required"),
        (EmbeddingsBody, {"input": []}, "input: List should have at least 1 item"),
        (EmbeddingsBody, {"input": [[]]}, "input: List should have at least 1 item"),
        (EmbeddingsBody, {"input": 5}, "input: "),
        (EmbeddingsBody, {"input": ["a"] * 2049}, "input: List should have at most 2048 items"),
        (EmbeddingsBody, {"input": ["a", 1]}, "input: "),
        (EmbeddingsBody, {"input": "a", "dimensions": 0}, "dimensions: "),
        (EmbeddingsBody, {"input": "a", "encoding_format": "int8"}, "encoding_format: "),
        (EmbeddingsBody, {"input": "a", "long": "cut"}, "long: "),
        (CompletionsBody, {"prompt": "a", "max_tokens": "3"}, "max_tokens: "),
        (CompletionsBody, {"prompt": "a", "temperature": -1}, "temperature: "),
        (CompletionsBody, {"prompt": "a", "stop": ["a"] * 17}, "stop"),
        (ClassifyBody, {"input": [["a", "b"]] * 2049}, "input"),
        (CompletionsBody, {"prompt": "a", "seed": 1, "temperature": 0.5}, "no seed repeats"),
        (CompletionsBody, {"prompt": "a", "stream_options": {"include_usage": True}}, "nothing without stream"),
        (ChatBody, {"messages": []}, "messages: "),
        (ChatBody, {"messages": [{"role": "user", "content": "a", "name": "me"}]}, "messages: "),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages: "),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 2},
            "same",
        ),
    ],
)
def test_bodies_that_are_refused(kind: type[bodies.Body], given: dict[str, Any], word: str) -> None:
    with pytest.raises(RequestRefused, match=word):
        read_body(kind, body(**given))


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b'"a"', b"\xff", b"[" * 100_000, b'{"model": 1' + b"0" * 5000 + b"}"]
)
def test_bodies_that_are_no_objects(raw: bytes) -> None:
    with pytest.raises(RequestRefused):
        read_body(EmbeddingsBody, raw)


def test_a_lone_surrogate_is_refused_in_words(embeds: ServedProxy) -> None:
    raw = b'{"model": "%s", "input": "\\ud800"}' % embeds.model.encode()
    said(embeds.ask("/v1/embeddings", raw=raw), 400, "half a surrogate pair")


# who may ask, and how much


def test_the_token(embeds: ServedProxy) -> None:
    for token in ("", "x", embeds.token[:-1], embeds.token + "x", "unseen_" + "a" * 43):
        for path, given in (("/v1/models", None), ("/metrics", None), ("/v1/embeddings", {"input": "a"})):
            words = "this is not the token that this proxy asks for" if token else "this proxy asks for its token"
            error = said(embeds.ask(path, given, token=token), 401, words)
            assert error["code"] == "invalid_api_key"
    assert embeds.ask("/healthz", token="").body == {"status": "ok"}
    connection = http.client.HTTPConnection(embeds.address, timeout=30)
    for headers in ({}, {"authorization": embeds.token}, {"authorization": f"Basic {embeds.token}"}):
        connection.request("GET", "/v1/models", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 401
        assert b"this proxy asks for its token" in answer.read()
    connection.close()


def test_models(embeds: ServedProxy) -> None:
    reply = embeds.ask("/v1/models")
    assert [each["id"] for each in reply.body["data"]] == [embeds.model]
    assert embeds.ask(f"/v1/models/{embeds.model}").body == reply.body["data"][0]
    for asked in (embeds.ask("/v1/models/x"), embeds.ask("/v1/embeddings", {"model": "x", "input": "a"})):
        assert said(asked, 404, "no such model")["code"] == "model_not_found"
    said(embeds.ask("/v1/nothing"), 404, "a base URL ends in /v1")
    said(embeds.ask("/embeddings", {"input": "a"}), 404, "a base URL ends in /v1")
    said(embeds.ask("/v1/embeddings"), 405, "the endpoints and their methods")


def test_bounds(embeds: ServedProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_BODY", 1000)
    said(embeds.ask("/v1/embeddings", {"input": "a" * 1000}), 413, "more than 1000 bytes")
    monkeypatch.setattr(app, "MOST_BODY", 1 << 24)
    monkeypatch.setattr(workers, "MOST_WAITING", 1)
    reply = embeds.ask("/v1/embeddings", {"input": TEXTS})
    assert said(reply, 503, "wait already")["type"] == "server_error"
    assert int(reply.headers["retry-after"]) >= 1
    monkeypatch.setattr(app, "MOST_REQUESTS", 0)
    said(embeds.ask("/v1/models"), 503, "are being answered")


def test_a_stream_is_a_request_until_it_ends(writes: ServedProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": writes.model, "prompt": "a", "stream": True, "max_tokens": 4}
    connection = http.client.HTTPConnection(writes.address, timeout=60)
    headers = {"authorization": f"Bearer {writes.token}", "content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
    answer = connection.getresponse()
    answer.read(1)
    monkeypatch.setattr(app, "MOST_REQUESTS", 1)
    said(writes.ask("/v1/models"), 503, "are being answered")
    answer.read()
    connection.close()
    wait_until(lambda: writes.ask("/v1/models").status == 200, "the stream's end")


def test_a_connection_that_asks_nothing_ends(embeds: ServedProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "FIRST", 0.2)
    host, port = embeds.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        assert connection.recv(100) == b""


def test_a_body_that_does_not_come(embeds: ServedProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    connection = http.client.HTTPConnection(embeds.address, timeout=30)
    connection.putrequest("POST", "/v1/embeddings")
    connection.putheader("authorization", f"Bearer {embeds.token}")
    connection.putheader("content-length", "100")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408
    connection.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput("a"), 400),
        (OutOfRange("a"), 422),
        (QuotaError("a"), 429),
        (PeerLost("a"), 502),
        (Busy("a", after=7), 503),
        (refused(InvalidInput("a", "b"), status=413, param="p"), 413),
    ],
)
def test_errors_have_openais_form(error: Any, status: int) -> None:
    code, document, headers = answers.failure(error)
    assert code == status
    assert document["error"].keys() == {"message", "type", "param", "code"}
    if status in (400, 413, 422, 429):
        assert headers["x-should-retry"] == "false"
    if status == 503:
        assert headers["retry-after"] == "7"


# sessions


class Losing:
    """A session that fails, once, in the way that it is told to."""

    def __init__(self, session: secure.Session, error: Exception) -> None:
        self._session, self._error = session, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def _lost(self, *_: Any, **__: Any) -> Any:
        self._session.close()
        raise self._error

    stream = generate = _lost


def test_a_session_that_has_ended_is_opened_again(embedder: secure.Compiled, writer: secure.Compiled) -> None:
    opened = list[secure.Session]()

    def connect() -> secure.Session:
        opened.append(secure.insecure_in_process(embedder))
        return opened[-1]

    with running(embedder, connect=connect) as served:
        opened[0].close()
        assert served.ask("/healthz").status == 200  # it rested for long, and is opened when somebody asks
        assert vectors(served.ask("/v1/embeddings", {"input": TEXTS[0]})).shape == (1, 32)
        assert len(opened) == 2
        assert served.ask("/healthz").status == 200
    others = iter([embedder, writer])
    with running(embedder, connect=lambda: secure.insecure_in_process(next(others))) as served:
        served.workers.session.close()
        said(served.ask("/v1/embeddings", {"input": TEXTS[0]}), 502, "another Program than before")
    lost = iter([Losing(secure.insecure_in_process(writer), DealerError("gone")), secure.insecure_in_process(writer)])
    with running(writer, connect=lambda: next(lost)) as served:
        reply = served.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
        assert reply.status == 200, reply.body


def test_a_lost_session_is_opened_again_before_anybody_asks(
    embedder: secure.Compiled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever heeds a probe that says no does not ask."""
    monkeypatch.setattr("parties.proxy.workers.AGAIN", 0.05)
    back, tried = threading.Event(), threading.Semaphore(0)
    first = [Losing(secure.insecure_in_process(embedder), PeerLost("the server is gone"))]

    def connect() -> Any:
        if first:
            return first.pop()
        tried.release()
        if not back.is_set():
            raise PeerLost("the server is not there yet")
        return secure.insecure_in_process(embedder)

    with running(embedder, connect=connect) as served:
        assert served.ask("/healthz").status == 200
        said(served.ask("/v1/embeddings", {"input": TEXTS[0]}), 502, "the server is gone")
        assert all(tried.acquire(timeout=20) for _ in range(3))
        assert served.ask("/healthz").status == 503
        assert caplog.text.count("the session could not be opened: the server is not there yet") == 1
        back.set()
        until = time.monotonic() + 20
        while served.ask("/healthz").status != 200 and time.monotonic() < until:
            time.sleep(0.02)
        assert served.ask("/healthz").status == 200
        assert vectors(served.ask("/v1/embeddings", {"input": TEXTS[0]})).shape == (1, 32)


@pytest.mark.parametrize("error", [PeerLost("the server is gone"), RuntimeError("a secret of the text")])
def test_what_fails_is_said_without_what_it_holds(
    embedder: secure.Compiled, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with running(embedder, connect=lambda: Losing(secure.insecure_in_process(embedder), error)) as served:
        reply = served.ask("/v1/embeddings", {"input": TEXTS[0]})
    text = said(reply, 502)["message"]
    assert ("the server is gone" in text) is isinstance(error, PeerLost)
    assert "secret" not in text + caplog.text


def test_sessions_side_by_side(embedder: secure.Compiled) -> None:
    meeting = threading.Barrier(2, timeout=20)

    class Meeting:
        def __init__(self, session: secure.Session) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def stream(self, *arguments: Any, **named: Any) -> Any:
            meeting.wait()
            return self._session.stream(*arguments, **named)

    with running(embedder, sessions=2, connect=lambda: Meeting(secure.insecure_in_process(embedder))) as served:
        tasks = ({"input": TEXTS[0]}, {"input": TEXTS[1], "long": "truncate"})
        with ThreadPoolExecutor(2) as pool:
            assert all(r.status == 200 for r in pool.map(lambda given: served.ask("/v1/embeddings", given), tasks))


def test_the_next_query_is_prepared_while_nobody_asks(embedder: secure.Compiled) -> None:
    prepared = threading.Event()

    class Preparing:
        def __init__(self, session: secure.Session) -> None:
            self._session, self.made = session, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def ready_for(self, length: int | None = None) -> int:
            return self.made

        def prepare(self, length: int | None = None) -> None:
            assert length == 8
            self.made += 1
            if self.made == 2:
                prepared.set()

    session = Preparing(secure.insecure_in_process(embedder))
    made = SessionWorkers(lambda: session, ahead=2)  # type: ignore[arg-type,return-value]
    assert prepared.wait(10)
    time.sleep(0.05)
    assert session.made == 2
    made.close()
    with pytest.raises(PeerLost, match="being stopped"):
        made.ask(None, [1])  # type: ignore[arg-type]


def test_services_prepare_the_next_query(embedder: secure.Compiled, writer: secure.Compiled, tmp_path: Path) -> None:
    def ready(served: ServedProxy, count: int) -> bool:
        until = time.monotonic() + 20
        while served.workers.ready < count and time.monotonic() < until:
            time.sleep(0.05)
        return served.workers.ready == count

    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": TEXTS[0]}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}),
    ]
    for compiled, (path, given) in zip((embedder, writer), asked, strict=True):
        state = tmp_path / path.rpartition("/")[2]
        with (
            secure.serve(role="dealer", deployment=secure.TwoParty()) as dealer,
            secure.serve(compiled, role="server", peers={"dealer": dealer.address}, state=state) as server,
        ):
            deployment = secure.TwoParty(server=server.address, dealer=dealer.address)

            def connect(deployment: secure.TwoParty = deployment) -> secure.Session:
                return secure.connect(deployment, cache=False)

            with running(compiled, connect=connect) as served:
                for _ in range(2):
                    assert ready(served, 1)
                    reply = served.ask(path, given)
                    assert reply.status == 200, reply.body


# what it says, and where


def test_nothing_of_a_request_is_logged(
    embeds: ServedProxy, writes: ServedProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    embeds.ask("/v1/embeddings", {"input": [TEXTS[4], LONG]})
    writes.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "n": 3})
    writes.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
    numbers = embeds.ask("/metrics").body
    assert 'unseen_proxy_requests_total{endpoint="/v1/embeddings",status="400"}' in numbers
    assert "unseen_proxy_bytes_total{" in numbers
    for secret in (TEXTS[4], PROMPT, embeds.token, writes.token):
        assert secret not in caplog.text + numbers


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_it_stays_on_this_machine(host: str) -> None:
    with pytest.raises(secure.EndpointError, match="--unencrypted-beyond-loopback"):
        hosted.check_stays(Endpoint(host, 0), beyond_loopback=False)
    with pytest.raises(secure.EndpointError, match="can be reached from other machines"):
        hosted.HttpService(None, Endpoint(host, 0))
    assert hosted.check_stays(Endpoint(host, 0), beyond_loopback=True) == (host,)


def test_a_port_in_use(embeds: ServedProxy, run: Run) -> None:
    with pytest.raises(secure.EndpointError, match="in use"):
        hosted.HttpService(None, Endpoint.parse(embeds.address, what="it"))
    nobody = ["--server", "127.0.0.1:1", "--dealer", "127.0.0.1:1"]  # the port is looked at first
    ended = run("proxy", "--listen", embeds.address, *nobody)
    assert ended.code == 1
    assert "it may be in use" in ended.err


def test_the_file_of_the_token(tmp_path: Path) -> None:
    file = tmp_path / "key"
    made, fresh = own_token(file)
    assert fresh
    assert (file.stat().st_mode & 0o777, own_token(file)) == (0o600, (made, False))
    file.chmod(0o644)
    with pytest.raises(InvalidInput, match="--api-key-file: others may read"):
        own_token(file)
    file.chmod(0o600)
    file.write_text("hunter2\n")
    with pytest.raises(InvalidInput, match="no token of unseen"):
        own_token(file)
    with pytest.raises(InvalidInput, match="cannot be made"):
        own_token(tmp_path / "none" / "key")
    assert own_token(None)[0] != own_token(None)[0]


@pytest.mark.slow
def test_the_command(embedder: secure.Compiled, tmp_path: Path) -> None:
    """As a process in front of services, until it is terminated."""
    with (
        secure.serve(role="dealer", deployment=secure.TwoParty()) as dealer,
        secure.serve(embedder, role="server", peers={"dealer": dealer.address}, state=tmp_path / "state") as server,
    ):
        options = ["--server", server.address, "--dealer", dealer.address, "--listen", "127.0.0.1:0", "--announce"]
        key = tmp_path / "key"
        command, environment = child("parties.cli", "proxy", *options, "--no-cache", "--api-key-file", str(key))
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            address = json.loads(process.stdout.readline())["listening"]
            connection = http.client.HTTPConnection(address, timeout=60)
            given = json.dumps({"model": "tiny", "input": TEXTS})
            headers = {"authorization": f"Bearer {key.read_text().strip()}"}
            connection.request("POST", "/v1/embeddings", given, headers)
            answer = connection.getresponse()
            assert answer.status == 200
            assert len(json.loads(answer.read())["data"]) == len(TEXTS)
            connection.close()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert f"base URL http://{address}/v1" in err
        assert key.read_text().strip() not in out + err
