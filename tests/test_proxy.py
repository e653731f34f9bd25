"""The proxy: OpenAI's endpoints on this machine, in front of sessions; what it honours, refuses and never says."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import secure
from tests.heads import LABELS, write_head
from tests.tiny import WORDS, write_model
from tests.writers import write_writer

for module in ("starlette", "uvicorn", "prometheus_client", "transformers", "tokenizers"):
    pytest.importorskip(module)

from parties.limits.tokens import Token
from parties.proxy.app import Proxy
from parties.proxy.hosted import HttpService
from parties.proxy.metrics import Metrics
from parties.proxy.workers import Workers

TEXTS = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(12)]


class Reply(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


class Served(NamedTuple):
    """A proxy that runs, and what its answers are compared with."""

    address: str
    token: str
    model: str
    workers: Workers
    session: secure.Session

    def ask(self, path: str, body: Any = None, *, token: str | None = None, raw: bytes | None = None) -> Reply:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        headers = {"authorization": f"Bearer {self.token if token is None else token}"}
        if body is not None or raw is not None:
            raw = json.dumps({"model": self.model, **(body or {})}).encode() if raw is None else raw
            headers["content-type"] = "application/json"
        connection.request("GET" if raw is None else "POST", path, raw, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        found = text if answer.headers.get_content_type() != "application/json" else json.loads(text)
        return Reply(answer.status, found, {name.lower(): value for name, value in answer.getheaders()})


@contextmanager
def running(compiled: secure.Compiled, **options: Any) -> Iterator[Served]:
    """A proxy in front of a session with all parties in this process."""
    sessions = options.pop("sessions", 1)
    token, metrics = Token.fresh(), Metrics()

    def connect() -> secure.Session:
        return secure.insecure_in_process(compiled)

    workers = Workers(options.pop("connect", connect), sessions=sessions, heard=metrics.query)
    from parties.net.endpoints import Endpoint

    try:
        proxy = Proxy(workers, metrics, token, **options)
        with HttpService(proxy.app(), Endpoint("127.0.0.1", 0)) as service, connect() as session:
            yield Served(service.address, token.text, proxy.model, workers, session)
    finally:
        workers.close()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> secure.Compiled:
    directory = write_model(tmp_path_factory.mktemp("models") / "tiny")
    return secure.compile_text_model(str(directory), (8, 16), batch=(1, 4))


@pytest.fixture(scope="module")
def embeds(embedder: secure.Compiled) -> Iterator[Served]:
    with running(embedder) as served:
        yield served


def vectors(reply: Reply) -> torch.Tensor:
    assert reply.status == 200, reply.body
    return torch.tensor([each["embedding"] for each in reply.body["data"]], dtype=torch.float64)


def test_embeddings(embeds: Served) -> None:
    own = torch.stack(embeds.session.embed(TEXTS))
    reply = embeds.ask("/v1/embeddings", {"input": TEXTS})
    assert torch.allclose(vectors(reply), own, atol=1e-3)
    assert [each["index"] for each in reply.body["data"]] == list(range(len(TEXTS)))
    assert reply.body["usage"]["prompt_tokens"] == sum(len(text.split()) + 2 for text in TEXTS)
    one = embeds.ask("/v1/embeddings", {"input": TEXTS[3]})
    assert torch.allclose(vectors(one)[0], own[3], atol=1e-3)
    encoded = embeds.ask("/v1/embeddings", {"input": TEXTS[:2], "encoding_format": "base64", "user": "me"})
    found = np.stack([np.frombuffer(base64.b64decode(e["embedding"]), "<f4") for e in encoded.body["data"]])
    assert np.allclose(found, own[:2].numpy(), atol=1e-3)
