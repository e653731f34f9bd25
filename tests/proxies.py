"""Proxies that run in this process, in front of sessions with all parties in it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import secure
from parties.limits.tokens import Token
from parties.net.endpoints import Endpoint
from parties.proxy.workers import SessionWorkers


class Reply(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


class ServedProxy(NamedTuple):
    """A proxy that runs, and what its answers are compared with."""

    address: str
    token: str
    model: str
    workers: SessionWorkers
    session: secure.Session
    compiled: secure.Compiled

    @property
    def url(self) -> str:
        return f"http://{self.address}/v1"

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
        found = json.loads(text) if answer.headers.get_content_type() == "application/json" else text.decode()
        return Reply(answer.status, found, {name.lower(): value for name, value in answer.getheaders()})


@contextmanager
def running(
    compiled: secure.Compiled, *, sessions: int = 1, connect: Any = None, **options: Any
) -> Iterator[ServedProxy]:
    """A proxy in front of sessions in this process, or of those that ``connect`` opens."""
    from parties.proxy.app import Proxy
    from parties.proxy.hosted import HttpService
    from parties.proxy.metrics import Metrics

    token, metrics = Token.fresh(), Metrics()

    def opened() -> secure.Session:
        return secure.insecure_in_process(compiled)

    workers = SessionWorkers(connect or opened, sessions=sessions, heard=metrics.query)
    try:
        proxy = Proxy(workers, metrics, token, **options)
        with HttpService(proxy.app(), Endpoint("127.0.0.1", 0)) as service, opened() as session:
            yield ServedProxy(service.address, token.text, proxy.model, workers, session, compiled)
    finally:
        workers.close()
