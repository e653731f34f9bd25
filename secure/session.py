"""The one client: a session with the servers of a model, the same for every deployment and for the in-process form.

A ``Session`` does everything that deployments have in common: it runs one query at a time and tasks of several queries,
delivers the answers that came before a failure, keeps reports, and limits the threads that the client uses. A ``Link``
does the rest: it prepares and runs one query in its deployment. Links that use sockets are in ``parties``.

A server chooses the tokenizer and the graph that its clients run in the clear. So neither their time nor their outcome
may show in what a client sends, and when. ``Session.run`` and ``Session.query`` therefore have three parts:

1. What depends on values runs first, for all inputs of a run, or of a part of a stream: tokenizer, graph, checks of
   the results.
2. The session waits until a time that was fixed beforehand (``pace``).
3. Every input has its place in a query, in order: a query carries ``batch`` of them. What runs between messages takes
   the same steps whatever the values are. Where part 1 failed, the place carries a copy of another input, or zeros if
   there is none; its answer is dropped, and the error stands in its place.

The code of whoever takes the answers of ``run`` or ``stream`` one by one runs between queries, and its time shows.
After an input that cannot be used, ``run`` gives no answers to take; so who needs long for an answer should ask for a
list, as ``embed`` does.

Only mistakes that do not depend on a server's bytes and on values end a call before it sends: wrong Python types, names
and shapes of inputs, NaN, a session that has ended, a model that takes no text.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from secure.cost.timeline import Timeline
from secure.cost.traffic import Traffic, total, traffic_json
from secure.errors import Busy, DealerError, Error, InvalidInput, InvalidProgram, PeerLost, about
from secure.models.tokens import REFUSE, TextTokenizer
from secure.tasks.embed import Embed
from secure.tasks.task import Served, Task, stacked

Given = TypeVar("Given")
Answer = TypeVar("Answer")
Found = TypeVar("Found")

PACE = 0.1
"""Seconds from a call to its first message. The work before it takes 0.2 ms a text for MiniLM at 128 tokens."""

WINDOW = 256
"""Inputs of a stream that are read, and computed on in the clear, before their queries."""

REPORTS = 1 << 10
"""Reports that a session keeps, of some kilobytes each."""

RETRIES = 3
PAUSE = 0.5  # seconds before the first retry; twice as many before each further one
LOST = (PeerLost, DealerError)
"""The errors after which a query is asked again on a new connection."""

BUSY = 120.0
"""Seconds in all that a query waits for services that say that they are busy."""


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
    @property
    def output_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each of the model's outputs, by name."""

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise InvalidInput for wrong names, types and shapes of inputs, and for NaN."""

    def clear_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Compute and check all that the client computes in the clear.

        tables: the token tables that the owner lets clients hold.
        """

    def dummy_values(self) -> Mapping[str, Any]:
        """Return zeros in place of ``clear_values``."""

    def encode(self, values: Mapping[str, Any], tables: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Encode clear values for the protocol, in steps that do not depend on them."""

    def decode(self, results: Sequence[Any]) -> dict[str, Tensor]:
        """Decode results into float64 tensors, by the names of the model's outputs."""


def only(outputs: Mapping[str, Tensor]) -> Any:
    """Return a model's answer: the tensor itself if there is one output, else a dict of all outputs by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


class Link(ABC):
    """One deployment's connection, as a Session uses it.

    program, tables, tokenizer: those of the served model. model: a name of its weights; "" if there is none. once:
    traffic that happens once per session (downloads, keys). ended: the reason why no query can run any more; ""
    while queries can run.
    """

    deployment: str
    program: Any  # a ClientProgram
    tables: Mapping[str, Tensor]
    tokenizer: TextTokenizer | None
    model: str = ""
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
    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Any], Report]:
        """Run the session's query ``number``; return the results for ``program.decode``, and the query's report.

        values: those of ``program.encode``. Neither messages nor their times may depend on them. ahead: another query
        follows, and may be prepared while this one runs.
        Raises PeerLost if a party stays silent for longer than the deadline; Busy if a service has no room for it, and
        then the same may be asked again unless ``ended`` says otherwise.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything that the link holds. It is called once."""


@dataclass(frozen=True, eq=False, repr=False)
class _Clear:
    """The clear values of one query. errors: for each of its inputs, the reason why it cannot be used, or None."""

    values: Mapping[str, Any]
    errors: tuple[Error | None, ...]


class Session:
    """A connection to a served model, usable as a context manager. Threads may share it: one thing happens at a time.

    reports: one report per query that ran to its end, the newest last; of more than REPORTS, these are kept. threads:
    the number of torch's threads while this session computes; more than one rarely helps, as a client's work consists
    of many small steps.

    pace: seconds from a call of ``query``, ``run`` or ``embed`` to the first message. If the work before it takes
    longer, they become twice as many, and again; so a server learns from the clock how often that happened, and no
    more. 0 sends at once: the time of the tokenizer and of the client's graph then shows. Raises InvalidInput if it is
    negative. renew: opens another link to the same Program; ``stream`` uses it when this one is lost.
    """

    def __init__(
        self, link: Link, *, threads: int = 1, pace: float = PACE, renew: Callable[[], Link] | None = None
    ) -> None:
        check_options(threads, pace)
        self._link, self._threads, self._pace, self._lock = link, threads, pace, threading.RLock()
        self._asked, self._renew, self._closed = 0, renew, threading.Event()
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
    def batch(self) -> int:
        """The number of inputs that one query carries."""
        return int(self.program.labels.get("batch", 1))

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
            self._once_free(self._link.prepare)

    def query(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model on its own keyword arguments; return a float64 tensor, or a dict by name if it has several.

        Raises InvalidInput before anything is sent if names, types or shapes of the inputs do not fit the model, or one
        holds NaN. If their values do not fit (a token id outside the table, a number outside its range), the query runs
        on zeros first.
        """
        self.program.check_inputs(inputs)
        with self._open():
            began, values = time.monotonic(), self._clear_values(inputs)
            if isinstance(values, Error):
                clear = _Clear(self.program.dummy_values(), (values,))
            else:
                clear = _Clear(values, (None,))
            self._wait(began)
            (answer,) = self._answers(clear, _same, whole=True)
        if isinstance(answer, Error):
            raise answer
        return answer

    def run(self, task: Task[Given, Answer], given: Sequence[Given]) -> Iterator[Answer]:
        """Run a task on several inputs and yield answers one by one, so that a failure leaves the answers before it.

        All work on values is done before the first query. Every input has its place in a query, also if it cannot be
        used: its query and those behind it run, their answers are dropped, and then the error is raised. It says which
        of several inputs it is about. A server chooses the tokenizer that finds a text too long; if the client stopped
        there, the server would learn something about the text. So a text that is too long costs as much as any other.

        Only a failure of a party ends a run at once.
        """
        served = self._served
        task.check(given, served)
        return self._run(task, served, given)

    def _run(self, task: Task[Given, Answer], served: Served, given: Sequence[Given]) -> Iterator[Answer]:
        failed: Error | None = None
        for number, answer in enumerate(self._outcomes(task, served, [given], retries=0, of=len(given)), 1):
            if failed is not None:
                continue
            if isinstance(answer, Error):
                failed = _named(answer, number, len(given), task.noun)
            else:
                yield answer
        if failed is not None:
            raise failed

    def stream(
        self,
        task: Task[Given, Answer],
        given: Iterable[Given],
        *,
        retries: int = RETRIES,
        window: int = WINDOW,
        first: int = 1,
    ) -> Iterator[Answer | Error]:
        """Run a task on inputs as they come; yield for each, in order, its answer, or the error why there is none.

        given: a list, a generator, a file of lines, or whatever else can be iterated over, of any length. Inputs are
        read ``window`` at a time, rounded up to whole queries, and all work on their values is done before the first of
        their queries; no more than two windows are kept. While a query runs, the next one is prepared.
        retries: how often a query is asked again on a new connection, under fresh correlations, if a party is lost.
        After that the error is raised, and says which inputs it is about, where ``first`` is the number of the first.

        Answers come query by query: those of one query at once, then those of the next. Nothing runs ahead of whoever
        takes them but the preparation of one query.
        """
        if retries < 0 or window < 1:
            raise InvalidInput(f"{retries} retries, a window of {window} inputs", "0 retries or more, a window of 1")
        served = self._served
        whole = -(-window // self.batch) * self.batch

        def windows() -> Iterator[Sequence[Given]]:
            inputs = iter(given)
            while part := list(islice(inputs, whole)):
                task.check(part, served)
                yield part

        return self._outcomes(task, served, windows(), retries=retries, first=first)

    def _outcomes(
        self,
        task: Task[Given, Answer],
        served: Served,
        windows: Iterable[Sequence[Given]],
        *,
        retries: int,
        first: int = 1,
        of: int | None = None,
    ) -> Iterator[Any]:
        """Yield the answer or the error of each input.

        of: how many there are, if that is known. Then no query is prepared while another runs: few queries are asked
        for their answers' sake, each as soon as can be, and two phases at once take longer on one machine.
        """
        for window, more in _with_more(filter(None, windows)):
            began = time.monotonic()
            with self._open():
                made = [_pieces(task, each, served) for each in window]
                places = [(number, piece) for number, pieces in enumerate(made, first) for piece in pieces]
                parts = [places[i : i + self.batch] for i in range(0, len(places), self.batch)]
                computed = [self._clear([piece for _, piece in part]) for part in parts]
                self._wait(began)
            coming, answers = iter(made), list[Any]()
            pieces = next(coming)
            for part, clear in zip(parts, computed, strict=True):
                ask = partial(self._answers, clear, task.answer, ahead=of is None and (more or part is not parts[-1]))
                with _naming(part[0][0], part[-1][0], of, task.noun):
                    answers += self._retried(ask, retries)
                while pieces and len(answers) >= len(pieces):
                    yield _joined(task, answers[: len(pieces)], pieces, served)
                    answers, pieces = answers[len(pieces) :], next(coming, [])
            first += len(window)

    @property
    def _served(self) -> Served:
        normalized = self.program.labels.get("normalized") == "yes"
        return Served(self._link.tokenizer, self.length, normalized)

    def _clear(self, given: Sequence[Mapping[str, Tensor] | Error]) -> _Clear:
        """Do all work on values for the inputs of one query. What is left empty is filled up with copies."""
        made = list(given)
        values = self._stacked(made)
        if isinstance(values, Error) and self.batch > 1:  # of which inputs? each is tried alone
            for i, each in enumerate(made):
                if not isinstance(each, Error) and isinstance(alone := self._stacked([each]), Error):
                    made[i] = alone
            values = self._stacked(made)
        errors = tuple(each if isinstance(each, Error) else None for each in made)
        if isinstance(values, Error):
            return _Clear(self.program.dummy_values(), tuple(error or values for error in errors))
        return _Clear(values, errors)

    def _stacked(self, made: Sequence[Mapping[str, Tensor] | Error]) -> Mapping[str, Any] | Error:
        usable = [each for each in made if not isinstance(each, Error)]
        if not usable:
            return next(each for each in made if isinstance(each, Error))
        rows = [usable[0] if isinstance(each, Error) else each for each in made]
        rows += [usable[0]] * (self.batch - len(rows))
        return self._clear_values(rows[0] if len(rows) == 1 else stacked(rows))

    def _clear_values(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Any] | Error:
        return _tried(lambda: self.program.clear_values(inputs, self._link.tables))

    def _wait(self, began: float) -> None:
        """Wait for the time at which the first message leaves, after work on values that began at ``began``."""
        if self._pace:
            leaves = began + self._pace
            while (left := leaves - time.monotonic()) < 0:
                leaves += leaves - began
            time.sleep(left)

    def _retried(self, ask: Callable[[], Found], retries: int) -> Found:
        """Ask, and again on a new link each time that a party is lost, after a pause that doubles.

        A party that is busy, and ends the session with that, is not lost, but the same is done after the time it says.
        """
        for attempt in range(retries + 1):
            try:
                with self._open():
                    return ask()
            except (*LOST, Busy) as error:
                patience_is_over = isinstance(error, Busy) and not self._link.ended
                if attempt == retries or self._renew is None or self._closed.is_set() or patience_is_over:
                    raise
                pause = max(PAUSE * 2**attempt, error.after if isinstance(error, Busy) else 0.0)
            self._closed.wait(pause)
            with contextlib.suppress(*LOST, Busy), self._lock:
                link = self._once_free(self._renew)
                if self._closed.is_set():  # meanwhile, and the old link with it
                    link.close()
                else:
                    lost, self._link = self._link, link
                    lost.close()
        raise AssertionError("the last attempt returns or raises")

    def _once_free(self, ask: Callable[[], Found]) -> Found:
        """Ask, and the same again as often as a service says that it is busy, for BUSY seconds in all.

        Such a service has done nothing for what was asked. An ``ask`` that ended the link is not repeated.
        """
        until, link, ended = time.monotonic() + BUSY, self._link, self._link.ended
        while True:
            try:
                return ask()
            except Busy as error:
                over = self._closed.is_set() or link.ended != ended
                if over or time.monotonic() + error.after > until:
                    raise
                self._closed.wait(error.after)

    def _answers(
        self, clear: _Clear, read: Callable[[Any], Any], *, ahead: bool = False, whole: bool = False
    ) -> list[Any]:
        """Run one query; return what ``read`` makes of each input's answer, or the reason why there is none.

        whole: the answer is that of all rows together.
        """
        values = self.program.encode(clear.values, self._link.tables)
        number, self._asked = self._asked, self._asked + 1
        results, report = self._once_free(lambda: self._link.ask(values, number, ahead=ahead))
        self.reports.append(report)
        del self.reports[:-REPORTS]
        decoded = _tried(lambda: self.program.decode(results))

        def answer(row: int, error: Error | None) -> Any:
            if error is not None or isinstance(decoded, Error):
                return error or decoded
            own = decoded if whole or self.batch == 1 else {name: v[row : row + 1] for name, v in decoded.items()}
            return _tried(lambda: read(only(own)))

        return [answer(row, error) for row, error in enumerate(clear.errors)]

    def embed(self, texts: Sequence[str], *, long: str = REFUSE) -> list[Tensor]:
        """Return one embedding (a float64 vector) per text.

        long: what becomes of texts with more tokens than ``length``: "refuse", "truncate" or "split"; see
        ``secure.tasks.embed.Embed``, also for what a server sees if texts are split. Raises InputTooLong or EmptyInput
        behind the last query, see ``run``; no answer is returned then.
        """
        return list(self.run(Embed(long), texts))

    def close(self) -> None:
        """End the session; all sides discard prepared queries that were not used."""
        self._closed.set()
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


def check_options(threads: int, pace: float) -> None:
    """Raise InvalidInput for a number of threads or a pace that no session can have."""
    if threads < 1:
        raise InvalidInput(f"{threads} threads", "give at least one")
    if not 0 <= pace < math.inf:
        raise InvalidInput(f"a pace of {pace} seconds", f"0 or more; {PACE} is the default")


def _same(answer: Any) -> Any:
    return answer


def _pieces(task: Task[Given, Any], given: Given, served: Served) -> Sequence[Mapping[str, Tensor] | Error]:
    """Return the model's arguments for each place that an input takes; an error takes one."""
    found = _tried(lambda: task.pieces(given, served))
    return [found] if isinstance(found, Error) else found


def _joined(
    task: Task[Any, Answer],
    answers: Sequence[Answer | Error],
    pieces: Sequence[Mapping[str, Tensor] | Error],
    served: Served,
) -> Answer | Error:
    """Return the answer to an input from those of its pieces, or the first error among them."""
    whole, usable = list[Answer](), list[Mapping[str, Tensor]]()
    for answer, piece in zip(answers, pieces, strict=True):
        if isinstance(answer, Error):
            return answer
        assert not isinstance(piece, Error)  # its answer would be it
        whole.append(answer)
        usable.append(piece)
    return _tried(lambda: task.joined(whole, usable, served))


def _tried(work: Callable[[], Found]) -> Found | Error:
    """Return what some work gives, or the error that it raises, as one of the one family.

    The text of a foreign error is left out: it may hold a value.
    """
    try:
        return work()
    except Error as error:
        return error
    except Exception as error:  # what the graph of a server runs into
        reason = f"the server's Program fails on this input: {type(error).__name__}"
        return InvalidProgram(reason, "ask the server's owner")


def _with_more(items: Iterable[Found]) -> Iterator[tuple[Found, bool]]:
    """Pair each item with whether another follows."""
    iterator = iter(items)
    for current in iterator:
        for following in iterator:
            yield current, True
            current = following
        yield current, False


def _named(error: Error, number: int, of: int, noun: str) -> Error:
    """Say in an error which of several inputs it is about."""
    return about(f"{noun} {number} of {of}", error) if of > 1 else error


@contextmanager
def _naming(first: int, last: int, of: int | None, noun: str) -> Iterator[None]:
    """Say in every error which of several inputs it is about; ``of``: how many there are, if that is known."""
    try:
        yield
    except Error as error:
        if of == 1:
            raise
        which = f"{noun} {first}" if first == last else f"{noun}s {first} to {last}"
        raise about(f"{which}{f' of {of}' if of else ''}", error) from None
