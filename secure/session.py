"""The one client: a session with whoever serves a model. Every deployment, and the in-process form, is asked this way.

A ``Session`` holds what is the same everywhere: one query at a time, tasks, the answers before a failure, reports, the
threads that a client uses. A ``Link`` is what differs: how a deployment prepares and asks. No sockets here; the links
that have some stand in ``parties``.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from secure.cost.timeline import Timeline
from secure.cost.traffic import Traffic, total, traffic_json
from secure.errors import Error, InvalidInput, PeerLost
from secure.models.tokens import TextTokenizer
from secure.tasks.embed import Embed
from secure.tasks.task import Served, Task

Given = TypeVar("Given")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Report:
    """What one query took, measured at the client.

    rounds: messages that waited for one another, online. traffic: payload bytes by link and phase.
    online_seconds: from the query to its answer. offline_seconds: of its offline phase, ahead or not.
    client_seconds: of both, in which this client computed. dealer_seconds: of the offline phase, in which correlations
    were dealt; 0 where nobody deals. query: its number in the session, from 0.
    """

    rounds: int
    traffic: tuple[Traffic, ...]
    online_seconds: float
    offline_seconds: float
    client_seconds: float
    dealer_seconds: float
    query: int

    def bytes(self, *, sender: str | None = None, receiver: str | None = None, phase: str | None = None) -> int:
        """Bytes of the links that match; by default of all."""
        return total(self.traffic, sender=sender, receiver=receiver, phase=phase)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it, with the same keys in every deployment."""
        return {**asdict(self), "traffic": traffic_json(self.traffic)}


class ClientProgram(Protocol):
    """The client's side of a Program: what every deployment's Programs have."""

    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def digest(self) -> str: ...
    def client_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Inputs as the protocol takes them; ``tables``: the token tables that the owner lets clients hold."""

    def decode(self, results: Sequence[Any]) -> dict[str, Tensor]:
        """Results as float64 tensors by the names of the model's outputs."""


def only(outputs: Mapping[str, Tensor]) -> Any:
    """A model's answer: the tensor itself where there is one output, else all of them by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


class Link(ABC):
    """One deployment's connection, as a Session uses it.

    program, tables, tokenizer: of the model that is served. once: what crossed once, downloads and keys.
    ended: why nothing can be asked any more, "" while it can.
    """

    deployment: str
    program: Any  # a ClientProgram
    tables: Mapping[str, Tensor]
    tokenizer: TextTokenizer | None
    once: tuple[Traffic, ...] = ()
    ended: str = ""
    timeline: Timeline | None = None  # of the last query, where one is kept

    @property
    def ready(self) -> int:
        """Queries that are prepared and not yet used."""
        return 0

    def prepare(self) -> None:  # noqa: B027 - not every deployment has an offline phase
        """The offline phase of one query, ahead of it; nothing where a deployment has none."""

    @abstractmethod
    def ask(self, values: Mapping[str, Any], number: int) -> tuple[Sequence[Any], Report]:
        """Run the session's query ``number``; the results for ``program.decode``, and what it took.

        Raises PeerLost where a party says nothing for longer than the deadline.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back; called once."""


class Session:
    """A connection to a served model; a context manager. Threads may share it: one query runs at a time.

    reports: one of every answered query. threads: torch's threads while this session computes; more than one rarely
    help a client, whose work is many small steps.
    """

    def __init__(self, link: Link, *, threads: int = 1) -> None:
        if threads < 1:
            raise InvalidInput(f"{threads} threads", "give at least one")
        self._link, self._threads, self._lock = link, threads, threading.RLock()
        self._asked = 0
        self.reports: list[Report] = []

    @property
    def deployment(self) -> str:
        """The name of the deployment that answers."""
        return self._link.deployment

    @property
    def program(self) -> Any:
        """The Program that is served, public to all."""
        return self._link.program

    @property
    def length(self) -> int:
        """The padded length of texts in tokens, special ones included; 0 where the model takes no text."""
        return int(self.program.labels.get("length", 0))

    @property
    def once(self) -> tuple[Traffic, ...]:
        """What crossed once for this session: files of the model, keys."""
        return self._link.once

    @property
    def link(self) -> Any:
        """The deployment's own side of this session, for what only it has."""
        return self._link

    @property
    def timeline(self) -> Timeline | None:
        """When this client did what in the last query, where the deployment keeps it."""
        return self._link.timeline

    @property
    def ready(self) -> int:
        """Queries that are prepared and not yet used."""
        return self._link.ready

    def prepare(self) -> None:
        """The offline phase of one query, ahead of it; nothing where the deployment has none."""
        with self._open():
            self._link.prepare()

    def query(self, inputs: Mapping[str, Tensor]) -> Any:
        """The model's answer on its own arguments: a float64 tensor, or a dict of them by name where it has several.

        Raises InvalidInput before anything is sent, where inputs are not what the model takes.
        """
        values = self.program.client_values(inputs, self._link.tables)
        with self._open():
            number, self._asked = self._asked, self._asked + 1
            results, report = self._link.ask(values, number)
            answer = self.program.decode(results)
            self.reports.append(report)
        return only(answer)

    def run(self, task: Task[Given, Answer], given: Sequence[Given]) -> Iterator[Answer]:
        """The task's answers, one by one, so that a failure leaves those before it.

        Everything is checked before the first query is sent; an error names which of several inputs it is about.
        """
        served = Served(self._link.tokenizer, self.length)
        task.check(given, served)
        inputs = []
        for number, each in enumerate(given, 1):
            with _naming(number, len(given), task.noun):
                inputs.append(task.inputs(each, served))
        return self._answers(task, inputs)

    def _answers(self, task: Task[Any, Answer], inputs: Sequence[Mapping[str, Tensor]]) -> Iterator[Answer]:
        for number, each in enumerate(inputs, 1):
            with _naming(number, len(inputs), task.noun):
                result = self.query(each)
            yield task.answer(result)

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding (float64 vector) a text. Too long or empty texts raise before anything is sent."""
        return list(self.run(Embed(), texts))

    def close(self) -> None:
        """End the session; what was prepared and not used is discarded by all sides."""
        self._link.ended = self._link.ended or "it was closed"
        self._link.close()  # without the lock: a query of another thread ends by it

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        """One caller at a time, on a session that has not ended, with this session's threads."""
        with self._lock:
            if self._link.ended:
                raise PeerLost(f"this session has ended: {self._link.ended}", "connect again")
            before = torch.get_num_threads()
            if before != self._threads:
                torch.set_num_threads(self._threads)
            try:
                yield
            finally:
                if before != self._threads:
                    torch.set_num_threads(before)


@contextmanager
def _naming(number: int, of: int, noun: str) -> Iterator[None]:
    """Errors that say which of several inputs they are about."""
    try:
        yield
    except Error as error:
        if of > 1:
            raise type(error)(f"{noun} {number} of {of}: {error}") from None
        raise
