"""The one client: a session with the servers of a model, the same for every deployment and for the in-process form.

A ``Session`` does everything that deployments have in common: it runs one query at a time and tasks of several queries,
delivers the answers that came before a failure, keeps reports, and limits the threads that the client uses. A ``Link``
does the rest: it prepares and runs one query in its deployment. Links that use sockets are in ``parties``.
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
    """The time and traffic of one query, measured at the client.

    rounds: messages of the online phase that waited for one another. traffic: payload bytes by link and phase.
    online_seconds: time from the query to its answer. offline_seconds: time of its offline phase, whether that ran
    ahead of the query or not. client_seconds: the part of both in which this client computed. dealer_seconds: the part
    of the offline phase in which correlations were dealt; 0 where nobody deals. query: its number in the session, from
    0.
    """

    rounds: int
    traffic: tuple[Traffic, ...]
    online_seconds: float
    offline_seconds: float
    client_seconds: float
    dealer_seconds: float
    query: int

    def bytes(self, *, sender: str | None = None, receiver: str | None = None, phase: str | None = None) -> int:
        """Sum the bytes of the links that match; by default of all links."""
        return total(self.traffic, sender=sender, receiver=receiver, phase=phase)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, with the same keys in every deployment."""
        return {**asdict(self), "traffic": traffic_json(self.traffic)}


class ClientProgram(Protocol):
    """The client's side of a Program, which the Programs of every deployment have."""

    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def digest(self) -> str: ...
    def client_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Encode inputs for the protocol. ``tables`` are the token tables that the owner lets clients hold."""

    def decode(self, results: Sequence[Any]) -> dict[str, Tensor]:
        """Decode results into float64 tensors, by the names of the model's outputs."""


def only(outputs: Mapping[str, Tensor]) -> Any:
    """Return a model's answer: the tensor itself if there is one output, else a dict of all outputs by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


class Link(ABC):
    """One deployment's connection, as a Session uses it.

    program, tables, tokenizer: those of the served model. once: traffic that happens once per session (downloads,
    keys). ended: the reason why no query can run any more; "" while queries can run.
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
        """The number of prepared queries that are not yet used."""
        return 0

    def prepare(self) -> None:  # noqa: B027 - not every deployment has an offline phase
        """Run the offline phase of one query ahead of it; do nothing if the deployment has no such phase."""

    @abstractmethod
    def ask(self, values: Mapping[str, Any], number: int) -> tuple[Sequence[Any], Report]:
        """Run the session's query ``number``; return the results for ``program.decode``, and the query's report.

        Raises PeerLost if a party stays silent for longer than the deadline.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything that the link holds. It is called once."""


class Session:
    """A connection to a served model, usable as a context manager. Threads may share it: one query runs at a time.

    reports: one report per answered query. threads: the number of torch's threads while this session computes; more
    than one rarely helps, as a client's work consists of many small steps.
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
        """The served Program, which is public to all parties."""
        return self._link.program

    @property
    def length(self) -> int:
        """The length in tokens to which texts are padded, special tokens included; 0 if the model takes no text."""
        return int(self.program.labels.get("length", 0))

    @property
    def once(self) -> tuple[Traffic, ...]:
        """The traffic that happened once for this session: files of the model, and keys."""
        return self._link.once

    @property
    def link(self) -> Any:
        """The deployment's own side of this session, for features that only one deployment has."""
        return self._link

    @property
    def timeline(self) -> Timeline | None:
        """The timeline of the last query at this client, if the deployment keeps one."""
        return self._link.timeline

    @property
    def ready(self) -> int:
        """The number of prepared queries that are not yet used."""
        return self._link.ready

    def prepare(self) -> None:
        """Run the offline phase of one query ahead of it; do nothing if the deployment has no such phase."""
        with self._open():
            self._link.prepare()

    def query(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model on its own keyword arguments; return a float64 tensor, or a dict by name if it has several.

        Raises InvalidInput before anything is sent if the inputs do not fit the model.
        """
        with self._open():
            values = self.program.client_values(inputs, self._link.tables)
            number, self._asked = self._asked, self._asked + 1
            results, report = self._link.ask(values, number)
            answer = self.program.decode(results)
            self.reports.append(report)
        return only(answer)

    def run(self, task: Task[Given, Answer], given: Sequence[Given]) -> Iterator[Answer]:
        """Run a task on several inputs and yield answers one by one, so that a failure leaves the answers before it.

        All inputs are checked before the first query is sent. An error says which of several inputs it is about.
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
        """Return one embedding (a float64 vector) per text.

        Raises InputTooLong or EmptyInput before anything is sent.
        """
        return list(self.run(Embed(), texts))

    def close(self) -> None:
        """End the session; all sides discard prepared queries that were not used."""
        self._link.ended = self._link.ended or "it was closed"
        self._link.close()  # without the lock, so that it ends a query of another thread

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Admit one caller at a time, refuse an ended session, and set this session's number of threads."""
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
    """Say in every error which of several inputs it is about."""
    try:
        yield
    except Error as error:
        if of > 1:
            raise type(error)(f"{noun} {number} of {of}: {error}") from None
        raise
