"""Texts that the workers of a Ray cluster embed, each with a session of its own.

The workers get texts, and the client's token: **the cluster belongs to the client's trust domain**. Certificates are
read on the workers' machines, from the same directory on each. A server sees several clients of one name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parties.bulk.connection import Connection
from parties.bulk.embedding import Embedder, embedder_of
from parties.cluster.joined import Cluster, same_versions
from parties.services.hosting import settle
from protocols import warm
from secure.errors import Error, HandshakeError, PeerLost, from_code
from secure.models.prompts import prompts_from
from secure.session.session import Session
from secure.tasks.embed import Embed
from secure.version import __version__

QUERIES = 16  # of the texts that a worker is given at a time
EACH = 2  # times that a worker is given texts before its answers to the first of them are taken
ENDED = "ended"
AHEAD = 256  # answers that a worker keeps until they are taken

Answer = tuple[str, bytes]
"""An answer as it crosses the cluster: "" and float64 bytes, or the code of an error and its text."""
Facts = tuple[int, int, str, str, tuple[int, ...], tuple[tuple[str, str], ...]]
"""Facts of what is served: numbers of an answer, inputs of a query, Program, weights, lengths, labels of prompts."""


class EmbeddingWorker:
    """An actor with a session of its own, which embeds the texts that it is given."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        warm.warm_up()
        settle()
        self._session: Session | None = None

    def version(self) -> str:
        return __version__

    def connect(self, connection: str) -> Facts | Answer:
        """Open the session of an encoded ``Connection``; return facts of what is served, or an error."""
        try:
            self._session = Connection.decoded(connection).open()
        except Error as error:
            return coded(error)
        embedder = embedder_of(self._session)
        prompts = tuple(embedder.prompts.labels().items())
        return embedder.width, self._session.batch, embedder.program, embedder.model, embedder.lengths, prompts

    def embed(self, options: dict[str, Any], texts: list[str], first: int, retries: int) -> Iterator[Answer]:
        """Yield each text's answer. If an error ends the session, it comes last, behind an answer of the code ENDED."""
        if self._session is None:
            raise RuntimeError("not connected")
        try:
            for answer in self._session.stream(Embed(**options), texts, retries=retries, first=first):
                yield coded(answer)
        except Error as error:
            yield ENDED, b""
            yield coded(error)


def coded(answer: Tensor | Error) -> Answer:
    if isinstance(answer, Error):
        return answer.code, str(answer).encode("utf-8", "replace")
    return "", answer.numpy().astype("<f8").tobytes()


def decoded(answer: Answer) -> Tensor | Error:
    code, raw = answer
    return from_code(code, raw.decode()) if code else torch.from_numpy(np.frombuffer(raw, "<f8").copy())


@dataclass(frozen=True, eq=False, repr=False)
class _Given:
    """Texts that a worker was given. first: the number of the first one. failed: how often a worker died with them."""

    actor: Any
    place: int
    stream: Any
    texts: list[str]
    first: int
    failed: int = 0


class Workers:
    """Workers of a cluster with a session each, as ``rows_of`` and ``embedded`` use one. Use it as a context manager.

    connection: how each of them connects. count: None: one for each processor of the cluster. Raises what connecting
    raises, and HandshakeError if they do not all meet the same Program and weights.
    """

    def __init__(self, cluster: Cluster, connection: Connection, count: int | None = None) -> None:
        self._cluster, self._connection = cluster, connection.encoded
        self._actors = list[Any]()
        try:
            self._actors = cluster.workers(EmbeddingWorker, count)
            same_versions(cluster.get([actor.version.remote() for actor in self._actors]), __version__)
            self._facts = self._connected(*self._actors)
        except BaseException:
            cluster.close()
            raise

    @property
    def embedder(self) -> Embedder:
        """The place where texts are asked, for ``rows_of`` and ``embedded``."""
        width, _, program, model, lengths, prompts = self._facts
        return Embedder(width, program, model, lengths, prompts_from(dict(prompts)), self.stream)

    def _connected(self, *actors: Any) -> Facts:
        """Connect workers; return the facts on which all of them agree."""
        found: list[Any] = self._cluster.get([actor.connect.remote(self._connection) for actor in actors])
        for each in found:
            if len(each) == 2:
                error = decoded(each)
                assert isinstance(error, Error)
                raise error
        if len(set(found)) > 1:
            raise HandshakeError(
                "two workers of the cluster have met servers of different Programs or weights",
                "servers behind one address must share the compiled model and the state directory",
            )
        facts: Facts = found[0]
        return facts

    def stream(self, task: Embed, given: Iterable[str], *, retries: int, first: int) -> Iterator[Tensor | Error]:
        """Answer texts in order, like ``Session.stream``. Workers get QUERIES queries' texts each, in turn.

        If a worker dies, another one takes its place and goes on behind its last answer, ``retries`` times. Then it
        raises PeerLost, and whatever ends a worker's session, both with the number of the text.
        """
        texts, place, running = iter(given), 0, deque[_Given]()
        size, most = QUERIES * self._facts[1], EACH * len(self._actors)
        while True:
            while len(running) < most and (part := list(islice(texts, size))):
                running.append(self._give(task, place, part, first, retries))
                first, place = first + len(part), (place + 1) % len(self._actors)
            if not running:
                return
            now = running.popleft()
            done = yield from self._answers(now)
            if done == len(now.texts):
                continue
            if now.failed == retries:
                raise PeerLost(f"text {now.first + done}: a worker of the cluster is gone", "see the logs of Ray")
            if self._actors[now.place] is now.actor:
                self._replace(now.place)
            rest = self._give(task, now.place, now.texts[done:], now.first + done, retries, now.failed + 1)
            running.appendleft(rest)

    def _give(self, task: Embed, place: int, texts: list[str], first: int, retries: int, failed: int = 0) -> _Given:
        actor = self._actors[place]
        stream = self._cluster.stream(actor.embed, AHEAD, asdict(task), texts, first, retries)
        return _Given(actor, place, stream, texts, first, failed)

    def _answers(self, now: _Given) -> Generator[Tensor | Error, None, int]:
        """Yield a worker's answers; return how many came before it died, or all. Raises what ended its session."""
        done, ended = 0, False
        for answer in self._cluster.taken(now.stream):
            found = decoded(answer) if answer[0] != ENDED else None
            if found is None:
                ended = True
            elif ended and isinstance(found, Error):
                raise found
            else:
                yield found
                done += 1
        return done

    def _replace(self, place: int) -> None:
        """Put a fresh worker, with a fresh session, in the place of one that died."""
        (fresh,) = self._cluster.workers(EmbeddingWorker, 1)
        if self._connected(fresh) != self._facts:
            raise HandshakeError("the server has another Program or other weights now", "run the command again")
        self._actors[place] = fresh

    def __enter__(self) -> Embedder:
        return self.embedder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.close()
