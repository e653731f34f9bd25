"""The clients that people have, as they install them, against the proxy: nothing but a base URL and a key is said."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import secure
from secure.models.index import build_index, write_index
from secure.models.passages import TextDocument
from secure.models.settings import PASSAGES_SCORES
from secure.models.text import load_text_model
from tests.heads import write_head
from tests.proxies import ServedProxy, running
from tests.tiny import WORDS, write_model
from tests.writers import write_writer

for module in ("starlette", "uvicorn", "prometheus_client", "transformers", "tokenizers", "jinja2"):
    pytest.importorskip(module)

TEXTS = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(9)]
PROMPT, COUNT = "the cat sat", 6
pytestmark = pytest.mark.filterwarnings("ignore")  # what these packages warn of, and the sockets that they leave open


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def embeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProxy]:
    directory = write_model(tmp_path_factory.mktemp("models") / "tiny")
    with running(secure.compile_text_model(str(directory), 8, batch=4)) as served:
        yield served


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProxy]:
    directory = write_writer(tmp_path_factory.mktemp("writer") / "tiny")
    with running(secure.compile_generator(str(directory), prompt=(16, 32), capacity=64)) as served:
        yield served


@pytest.fixture(scope="module")
def expected(embeds: ServedProxy) -> torch.Tensor:
    return torch.stack(embeds.session.embed(TEXTS))


@pytest.fixture(scope="module")
def written(writes: ServedProxy) -> str:
    return str(writes.session.generate(PROMPT, COUNT, ignore_end=True).complete().text)


@pytest.fixture(scope="module")
def said(writes: ServedProxy) -> str:
    messages = [{"role": "user", "content": PROMPT}]
    return str(writes.session.generate(messages, COUNT, ignore_end=True).complete().text)


def close(found: Any, expected: torch.Tensor) -> bool:
    return torch.allclose(torch.tensor(found, dtype=torch.float64), expected, atol=2e-3)


# openai


@pytest.fixture
def openai(embeds: ServedProxy) -> Any:
    module = pytest.importorskip("openai")
    return module.OpenAI(base_url=embeds.url, api_key=embeds.token)


@pytest.fixture
def writer(writes: ServedProxy) -> Any:
    module = pytest.importorskip("openai")
    return module.OpenAI(base_url=writes.url, api_key=writes.token)


def test_openai_embeds(openai: Any, embeds: ServedProxy, expected: torch.Tensor) -> None:
    for given in ({}, {"encoding_format": "float"}, {"user": "me"}):
        found = openai.embeddings.create(model=embeds.model, input=TEXTS, **given)
        assert close([each.embedding for each in found.data], expected)
    assert found.usage.prompt_tokens == sum(len(text.split()) + 2 for text in TEXTS)
    assert [model.id for model in openai.models.list()] == [embeds.model]
    assert openai.models.retrieve(embeds.model).id == embeds.model


def test_openai_asks_at_once(embeds: ServedProxy, expected: torch.Tensor) -> None:
    module = pytest.importorskip("openai")

    async def all_of_them() -> list[Any]:
        async with module.AsyncOpenAI(base_url=embeds.url, api_key=embeds.token) as client:
            return await asyncio.gather(*(client.embeddings.create(model=embeds.model, input=text) for text in TEXTS))

    assert close([found.data[0].embedding for found in asyncio.run(all_of_them())], expected)


def test_openai_is_refused_in_words(openai: Any, embeds: ServedProxy) -> None:
    module = pytest.importorskip("openai")
    with pytest.raises(module.BadRequestError, match="input 2 of 2: the text has 10 tokens") as refused:
        openai.embeddings.create(model=embeds.model, input=["zqba", " ".join(WORDS[:8])])
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(module.AuthenticationError, match="not the token that this proxy asks for"):
        module.OpenAI(base_url=embeds.url, api_key="other").models.list()
    with pytest.raises(module.NotFoundError, match="no such model"):
        openai.embeddings.create(model="text-embedding-3-small", input="zqba")


def test_openai_chats(writer: Any, writes: ServedProxy, said: str) -> None:
    given: dict[str, Any] = {
        "model": writes.model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_completion_tokens": COUNT,
        "extra_body": {"ignore_eos": True},
    }
    whole = writer.chat.completions.create(**given)
    assert whole.choices[0].message.content == said
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", COUNT)
    pieces = list(writer.chat.completions.create(stream=True, stream_options={"include_usage": True}, **given))
    assert "".join(each.choices[0].delta.content or "" for each in pieces if each.choices) == said
    assert len(pieces) > 3
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens


def test_openai_completes(writer: Any, writes: ServedProxy, written: str) -> None:
    given = {"model": writes.model, "prompt": PROMPT, "max_tokens": COUNT, "extra_body": {"ignore_eos": True}}
    assert writer.completions.create(**given).choices[0].text == written
    assert "".join(each.choices[0].text for each in writer.completions.create(stream=True, **given)) == written


def test_openai_searches(tmp_path: Path) -> None:
    """A vector store of the official client, in which the server searches without seeing the question."""
    module = pytest.importorskip("openai")
    model = str(write_model(tmp_path / "m"))
    documents = [TextDocument(f"doc/{i}", " ".join(WORDS[i : i + 5])) for i in range(0, 12, 2)]
    made, _ = build_index(model, load_text_model(model), documents, length=8, overlap=1)
    write_index(made, tmp_path / "index")
    index, reveal = str(tmp_path / "index"), PASSAGES_SCORES
    with running(secure.compile_text_model(model, 8, index=index, top=3, reveal=reveal)) as served:
        (own,) = served.session.search([TEXTS[0]])
        client = module.OpenAI(base_url=served.url, api_key=served.token)
        found = list(client.vector_stores.search(served.model, query=TEXTS[0], max_num_results=2))
        assert [(each.filename, each.content[0].text) for each in found] == [(e["id"], e["text"]) for e in own[:2]]
        assert [each.score for each in found] == pytest.approx([each["score"] for each in own[:2]], abs=2e-3)


# LangChain


def test_langchain_embeds(embeds: ServedProxy, expected: torch.Tensor) -> None:
    module = pytest.importorskip("langchain_openai")
    given = {"base_url": embeds.url, "api_key": embeds.token, "model": embeds.model}
    client = module.OpenAIEmbeddings(check_embedding_ctx_length=False, **given)
    assert close(client.embed_documents(TEXTS), expected)
    assert close(client.embed_query(TEXTS[0]), expected[0])
    assert close(asyncio.run(client.aembed_query(TEXTS[1])), expected[1])


def test_langchain_chats(writes: ServedProxy, said: str) -> None:
    module = pytest.importorskip("langchain_openai")
    chat = module.ChatOpenAI(
        base_url=writes.url,
        api_key=writes.token,
        model=writes.model,
        max_tokens=COUNT,
        extra_body={"ignore_eos": True},
    )
    assert chat.invoke(PROMPT).content == said
    assert "".join(piece.content for piece in chat.stream(PROMPT)) == said
    assert asyncio.run(chat.ainvoke(PROMPT)).content == said


# LlamaIndex


def test_llama_index_embeds(embeds: ServedProxy, expected: torch.Tensor) -> None:
    module = pytest.importorskip("llama_index.embeddings.openai_like")
    client = module.OpenAILikeEmbedding(model_name=embeds.model, api_base=embeds.url, api_key=embeds.token)
    assert close(client.get_text_embedding_batch(TEXTS), expected)
    assert close(client.get_query_embedding(TEXTS[0]), expected[0])
    assert close(asyncio.run(client.aget_text_embedding(TEXTS[1])), expected[1])


def test_llama_index_writes(writes: ServedProxy, said: str, written: str) -> None:
    module = pytest.importorskip("llama_index.llms.openai_like")
    types = pytest.importorskip("llama_index.core.llms")
    given = {"model": writes.model, "api_base": writes.url, "api_key": writes.token, "temperature": 0}
    more = {"max_tokens": COUNT, "additional_kwargs": {"extra_body": {"ignore_eos": True}}}
    chat = module.OpenAILike(is_chat_model=True, **given, **more)
    message = types.ChatMessage(role="user", content=PROMPT)
    assert chat.chat([message]).message.content == said
    assert "".join(piece.delta or "" for piece in chat.stream_chat([message])) == said
    assert module.OpenAILike(is_chat_model=False, **given, **more).complete(PROMPT).text == written


# LiteLLM


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it fetches a list of prices when it is imported
    return pytest.importorskip("litellm")


def test_litellm(litellm: Any, embeds: ServedProxy, writes: ServedProxy, expected: torch.Tensor, said: str) -> None:
    given: dict[str, Any] = {"model": f"openai/{embeds.model}", "api_base": embeds.url, "api_key": embeds.token}
    found = litellm.embedding(input=TEXTS, **given)
    assert close([each["embedding"] for each in found.data], expected)
    given = {"model": f"openai/{writes.model}", "api_base": writes.url, "api_key": writes.token, "max_tokens": COUNT}
    given |= {"messages": [{"role": "user", "content": PROMPT}], "extra_body": {"ignore_eos": True}}
    assert litellm.completion(**given).choices[0].message.content == said
    pieces = litellm.completion(stream=True, **given)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said


def test_litellm_reranks(litellm: Any, tmp_path: Path) -> None:
    with running(secure.compile_text_model(str(write_head(tmp_path / "m", "rerank")), 8)) as served:
        expected = served.session.rerank(WORDS[0], list(WORDS[1:4]))
        found = litellm.rerank(
            model=f"hosted_vllm/{served.model}",
            query=WORDS[0],
            documents=list(WORDS[1:4]),
            api_base=served.url,
            api_key=served.token,
        )
        assert [each["index"] for each in found.results] == [each["corpus_id"] for each in expected]
