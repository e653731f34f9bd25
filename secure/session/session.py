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

A model may be served for several padded lengths. Then an input goes to the shortest that holds it, and the parties see
which that is, so about how long the input is; what cannot be used goes to the longest. As the server's tokenizer counts
the tokens, it decides about that length too. With ``fixed_length`` all inputs go to the longest, and nothing shows.

The code of whoever takes the answers of ``run`` or ``stream`` one by one runs between queries, and its time shows. Of
tasks whose answers take longer to make for some texts than for others, it shows in steps of STEP, with their making.
After an input that cannot be used, ``run`` gives no answers to take; so who needs long for an answer should ask for a
list, as ``embed`` does.

Only mistakes that do not depend on a server's bytes and on values end a call before it sends: wrong Python types, names
and shapes of inputs, NaN, a session that has ended, a model that takes no text.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secure.cost.timeline import Timeline
from secure.cost.traffic import Traffic
from secure.errors import (
    Busy,
    Error,
    InvalidInput,
    InvalidProgram,
    OutOfRange,
    QueryError,
    about,
)
from secure.lowering.client_inputs import GENERATE, TASK
from secure.models.decoder import at_temperature, prompt_inputs, step_inputs
from secure.models.draft import Draft
from secure.models.prompts import Prompts, prompts_from
from secure.models.settings import settings_of
from secure.models.tokens import REFUSE, TRUNCATE
from secure.session.generation import (
    Generation,
    Prepared,
    Sizes,
    Wanted,
    chosen,
    drafting,
    hidden_steps,
    room,
    sizes_for,
    steps_of,
    temperature_for,
    wanted,
    writing,
)
from secure.session.link import LOST, Ahead, Link, Offer, Report, only
from secure.session.links import Links
from secure.session.queries import planned
from secure.tasks.answer import Answering
from secure.tasks.classify import Classify
from secure.tasks.embed import Embed
from secure.tasks.generate import Generate
from secure.tasks.rerank import Rerank, ranked
from secure.tasks.search import Search
from secure.tasks.tag import SIMPLE, Tag
from secure.tasks.task import Served, Task, stacked

Given = TypeVar("Given")
Answer = TypeVar("Answer")
Found = TypeVar("Found")

PACE = 0.1
"""Seconds from a call to its first message. The work before it takes 0.2 ms a text for MiniLM at 128 tokens."""

STEP = 0.01
"""Seconds in which a client makes answers of what a query gave, where that takes longer for some than for others.

Whoever takes the answers, and writes them, does so within these seconds; more of them are a multiple of it.
"""

WINDOW = 256
"""Inputs of a stream that are read, and computed on in the clear, before their queries."""

REPORTS = 1 << 10
"""Reports that a session keeps, of some kilobytes each."""

RETRIES = 3
PAUSE = 0.5  # seconds before the first retry; twice as many before each further one

BUSY = 120.0
"""Seconds in all that a query waits for services that say that they are busy."""


@dataclass(frozen=True, eq=False, repr=False)
class _Clear:
    """The clear values of one query. errors: for each of its inputs, the reason why it cannot be used, or None."""

    values: Mapping[str, Any]
    errors: tuple[Error | None, ...]


class Session:
    """A connection to a served model, usable as a context manager. Threads may share it: one thing happens at a time.

    reports: one report per query that ran to its end, the newest last; of more than REPORTS, these are kept. report:
    that of the query which gave the last answer of ``run`` or ``stream``. answered: the queries that ran to their end.
    threads:
    the number of torch's threads while this session computes; more than one rarely helps, as a client's work consists
    of many small steps.

    pace: seconds from a call of ``query``, ``run`` or ``embed`` to the first message. If the work before it takes
    longer, they become twice as many, and again; so a server learns from the clock how often that happened, and no
    more. 0 sends at once: the time of the tokenizer and of the client's graph then shows. Raises InvalidInput if it is
    negative.

    open: opens another link of the same weights to a Program, by its digest: for other sizes, and in ``stream`` when a
    link is lost. offers: the sizes that may be used. fixed_length: of these, only those of the link's own length.
    recorded: makes the receipt of this session.
    """

    def __init__(
        self,
        link: Link,
        *,
        threads: int = 1,
        pace: float = PACE,
        open: Callable[[str], Link] | None = None,
        offers: Sequence[Offer] = (),
        fixed_length: bool = False,
        recorded: Callable[[Session], Any] | None = None,
    ) -> None:
        check_options(threads, pace)
        self._threads, self._pace, self._lock = threads, pace, threading.RLock()
        self._links = Links(link, open, offers)
        if fixed_length:
            labels = self.program.labels
            kept = {self.length} | (steps_of(labels) if labels.get(TASK) == GENERATE else set[int]())
            self._links.offers = tuple(offer for offer in self._links.offers if offer.length in kept)
        self._asked, self._closed, self._last = 0, threading.Event(), link
        self._process = os.getpid()
        self._recorded = recorded
        self.answered = 0
        self.reports: list[Report] = []
        self.report: Report | None = None

    @property
    def _link(self) -> Link:
        return self._links.main

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
        """The greatest length in tokens to which texts are padded, special ones included; 0 if it takes no text."""
        return self._links.size.length

    @property
    def batch(self) -> int:
        """The most inputs that one query carries."""
        return max(offer.batch for offer in self._links.offers)

    @property
    def sizes(self) -> tuple[Offer, ...]:
        """The sizes that queries of this session may have, in the order of length and batch."""
        return tuple(sorted(self._links.offers, key=lambda offer: (offer.length, offer.batch)))

    @property
    def room(self) -> int:
        """The tokens that can be written after any prompt. Raises InvalidProgram for a model that writes no text."""
        return room(self._links.offers, self.program.labels)

    def program_of(self, size: Offer) -> Any:
        """Return the Program of one of ``sizes``, and connect to its server if need be. Raises what connecting does."""
        with self._open():
            return self._once_free(partial(self._links.of, size)).program

    @property
    def once(self) -> tuple[Traffic, ...]:
        """The traffic that happened once for this session: files of the model, and keys."""
        return tuple(traffic for link in self._links.opened for traffic in link.once)

    @property
    def link(self) -> Any:
        """The deployment's own side of this session, for features that only one deployment has."""
        return self._link

    @property
    def timeline(self) -> Timeline | None:
        """The timeline of the last query at this client, if the deployment keeps one."""
        return self._last.timeline

    @property
    def ready(self) -> int:
        """The number of prepared queries that are not yet used."""
        return sum(link.ready for link in self._links.opened)

    def prepare(self, length: int | None = None) -> None:
        """Run the offline phase of one query ahead of it; do nothing if the deployment has no such phase.

        length: the query is for an input of so many tokens; None stands for the greatest length.
        """
        size = self._size_for(length)
        with self._open():
            link = self._once_free(partial(self._links.of, size))
            self._once_free(link.prepare, link)

    def ready_for(self, length: int | None = None) -> int:
        """Return how many queries that ``prepare`` made for this length are not yet used."""
        size = self._size_for(length)
        return 0 if self._links.missing(size) else self._links.of(size).ready

    def _size_for(self, length: int | None) -> Offer:
        holding = [offer for offer in self.sizes if length is None or offer.length >= length]
        if not holding or (length is not None and length < 1):
            raise InvalidInput(f"no query has {length} tokens", f"1 to {self.length}")
        return self._links.size if length is None else holding[0]

    def query(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model on its own keyword arguments; return a float64 tensor, or a dict by name if it has several.

        Positions that an arg-max found are int64. Raises InvalidInput before anything is sent if names, types or shapes
        of the inputs do not fit the model, or one holds NaN. If their values do not fit (a token id outside the table,
        or a number outside its range), the query runs on zeros first.
        """
        self.program.check_inputs(inputs)
        if self.program.labels.get(TASK) == GENERATE:
            raise InvalidInput("this session's model generates text", "use generate")
        with self._open():
            began, values = time.monotonic(), self._clear_values(inputs, self._link)
            if isinstance(values, Error):
                clear = _Clear(self.program.dummy_values(), (values,))
            else:
                clear = _Clear(values, (None,))
            self._wait(began)
            (answer,) = self._answers(clear, _same, self._links.size, whole=True)
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
        served = self.served
        task.fits(served)
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
        served = self.served
        task.fits(served)
        whole = -(-window // self.batch) * self.batch  # inputs of a window

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
                numbers = [number for number, pieces in enumerate(made, first) for _ in pieces]
                places = [self._fitted(task, piece) for pieces in made for piece in pieces]
                queries = planned([length for length, _ in places], self._links.offers)
            if missing := {query.size for query in queries if self._links.missing(query.size)}:
                self._wait(began)
                for size in sorted(missing, key=lambda size: size.length):
                    self._retried(partial(self._once_free, partial(self._links.of, size)), size, retries)
                began = time.monotonic()
            with self._open():
                computed = [self._clear([places[i][1] for i in query.places], query.size) for query in queries]
                self._wait(began)
            answers = dict[int, Any]()  # by place, until all of an input are there
            coming, place = iter(zip(window, made, strict=True)), 0
            own, pieces = next(coming)
            for at, (query, clear) in enumerate(zip(queries, computed, strict=True)):
                again = more or any(later.size == query.size for later in queries[at + 1 :])
                ask = partial(self._answers, clear, task.answer, query.size, ahead=of is None and again)
                with _naming([numbers[i] for i in query.places], of, task.noun):
                    found = self._retried(ask, query.size, retries)
                answers |= {i: (answer, self.reports[-1]) for i, answer in zip(query.places, found, strict=True)}
                came, whole = time.monotonic(), list[tuple[Any, Report]]()
                while pieces and all(i in answers for i in range(place, place + len(pieces))):
                    parts = [answers.pop(i) for i in range(place, place + len(pieces))]
                    asked = [piece for _, piece in places[place : place + len(pieces)]]
                    joined = _joined(task, [answer for answer, _ in parts], asked, own, served)
                    whole.append((joined, parts[-1][1]))
                    place, (own, pieces) = place + len(pieces), next(coming, (own, []))
                for answer, self.report in whole:
                    yield answer
                if not task.steady:  # nor is what was done with the answers, such as writing rows
                    self._wait(came, STEP)
            first += len(window)

    def _fitted(
        self, task: Task[Given, Any], piece: Mapping[str, Tensor] | Error
    ) -> tuple[int, Mapping[str, Tensor] | Error]:
        """Return the shortest length that holds an input, and the input for it; the greatest for what is unusable."""
        for length in sorted({size.length for size in self._links.offers} - {self.length}):
            if not isinstance(piece, Error) and (fitted := task.fitted(piece, length)) is not None:
                return length, fitted
        return self.length, piece

    @property
    def served(self) -> Served:
        """The parts of the served model that tasks use."""
        labels = self.program.labels
        normalized, (task, settings) = labels.get("normalized") == "yes", settings_of(labels)
        return Served(self._link.tokenizer, self.length, normalized, prompts_from(labels), task, settings)

    @property
    def prompts(self) -> Prompts:
        """The prompts that the model's owner offers; the one that it names by default is used unless a call says so."""
        return prompts_from(self.program.labels)

    def _clear(self, given: Sequence[Mapping[str, Tensor] | Error], size: Offer) -> _Clear:
        """Do all work on values for the inputs of one query. What is left empty is filled up with copies."""
        made, link = list(given), self._links.of(size)
        values = self._stacked(made, size.batch, link)
        if isinstance(values, Error) and size.batch > 1:  # of which inputs? each is tried alone
            for i, each in enumerate(made):
                if not isinstance(each, Error) and isinstance(alone := self._stacked([each], size.batch, link), Error):
                    made[i] = alone
            values = self._stacked(made, size.batch, link)
        errors = tuple(each if isinstance(each, Error) else None for each in made)
        if isinstance(values, Error):
            return _Clear(link.program.dummy_values(), tuple(error or values for error in errors))
        return _Clear(values, errors)

    def _stacked(
        self, made: Sequence[Mapping[str, Tensor] | Error], batch: int, link: Link
    ) -> Mapping[str, Any] | Error:
        usable = [each for each in made if not isinstance(each, Error)]
        if not usable:
            return next(each for each in made if isinstance(each, Error))
        rows = [usable[0] if isinstance(each, Error) else each for each in made]
        rows += [usable[0]] * (batch - len(rows))
        return self._clear_values(rows[0] if len(rows) == 1 else stacked(rows), link)

    def _clear_values(self, inputs: Mapping[str, Tensor], link: Link) -> Mapping[str, Any] | Error:
        values: Mapping[str, Any] | Error = _tried(lambda: link.program.clear_values(inputs, link.tables))
        return values

    def _wait(self, began: float, least: float | None = None) -> None:
        """Wait for the time at which the next message leaves, after work on values that began at ``began``.

        least: seconds that the work takes in all, unless it needs more; the session's pace by default.
        """
        if self._pace:
            leaves = began + (least or self._pace)
            while (left := leaves - time.monotonic()) < 0:
                leaves += leaves - began
            time.sleep(left)

    def _retried(self, ask: Callable[[], Found], size: Offer, retries: int) -> Found:
        """Ask, and again on a new link of the size each time that a party is lost, after a pause that doubles.

        A party that is busy, and ends the session with that, is not lost, but the same is done after the time it says.
        """
        for attempt in range(retries + 1):
            try:
                with self._open():
                    return ask()
            except (*LOST, Busy) as error:
                patience_is_over = isinstance(error, Busy) and not self._links.missing(size) and not self._link.ended
                if attempt == retries or not self._links.can_renew or self._closed.is_set() or patience_is_over:
                    raise
                pause = max(PAUSE * 2**attempt, error.after if isinstance(error, Busy) else 0.0)
            self._closed.wait(pause)
            with contextlib.suppress(*LOST, Busy), self._lock:
                self._once_free(partial(self._links.renew, size))
        raise AssertionError("the last attempt returns or raises")

    def _once_free(self, ask: Callable[[], Found], link: Link | None = None) -> Found:
        """Ask, and the same again as often as a service says that it is busy, for BUSY seconds in all.

        Such a service has done nothing for what was asked. link: the one that is asked; if that ended, it is not asked
        again.
        """
        self._require_process()
        until = time.monotonic() + BUSY
        while True:
            try:
                return ask()
            except Busy as error:
                over = self._closed.is_set() or (link is not None and bool(link.ended))
                if over or time.monotonic() + error.after > until:
                    raise
                self._closed.wait(error.after)

    def _answers(
        self, clear: _Clear, read: Callable[[Any], Any], size: Offer, *, ahead: bool = False, whole: bool = False
    ) -> list[Any]:
        """Run one query; return what ``read`` makes of each input's answer, or the reason why there is none.

        whole: the answer is that of all rows together.
        """
        link = self._links.of(size)
        values = link.program.encode(clear.values, link.tables)
        number, self._asked = self._asked, self._asked + 1
        results, report = self._once_free(lambda: link.ask(values, number, ahead=ahead), link)
        self._took(link, replace(report, length=size.length))
        decoded = _tried(lambda: link.program.decode(results))
        wrong = _tried(lambda: link.program.check_results(results))

        def answer(row: int, error: Error | None) -> Any:
            if isinstance(decoded, Error):
                return error or decoded
            own = decoded if whole or size.batch == 1 else {name: v[row : row + 1] for name, v in decoded.items()}
            made = _tried(lambda: read(only(own)))  # whatever the checks say, so that it takes the same time
            return error or wrong or made

        return [answer(row, error) for row, error in enumerate(clear.errors)]

    def embed(self, texts: Sequence[str], *, long: str = REFUSE, prompt: str | None = None) -> list[Tensor]:
        """Return one embedding (a float64 vector) per text.

        long: what becomes of texts with more tokens than ``length``: "refuse", "truncate" or "split"; see
        ``secure.tasks.embed.Embed``, also for what a server sees if texts are split. prompt: the name of one of the
        model's ``prompts``, which goes before each text; None for its default, "" for none. Raises InputTooLong or
        EmptyInput behind the last query, see ``run``; no answer is returned then.
        """
        return list(self.run(Embed(long, prompt), texts))

    def classify(self, inputs: Sequence[Any], *, top_k: int | None = 1, long: str = REFUSE) -> list[Any]:
        """Classify texts, pairs of texts, or images; return for each {"label", "score"}, the most likely one.

        See ``secure.tasks.classify.Classify`` for what inputs may be and what ``top_k`` gives, and ``embed`` for
        exceptions. The score is None where the server's owner reveals labels alone.
        """
        return list(self.run(Classify(long, top_k=top_k), inputs))

    def tag(self, texts: Sequence[str], *, aggregation: str = SIMPLE, long: str = REFUSE) -> list[Any]:
        """Find entities in texts; return a list of them for each text. See ``secure.tasks.tag.Tag``."""
        return list(self.run(Tag(long, aggregation=aggregation), texts))

    def answer(self, question: str | Sequence[str], context: str | Sequence[str], *, long: str = REFUSE) -> Any:
        """Answer a question from a context: {"answer", "start", "end", "score"}; of several, a list of such.

        question, context: texts, or as many of both. See ``secure.tasks.answer.Answering``.
        """
        if isinstance(question, str) and isinstance(context, str):
            (found,) = self.run(Answering(long), [(question, context)])
            return found
        if isinstance(question, str) or isinstance(context, str) or len(question) != len(context):
            raise InvalidInput("questions and contexts do not belong together", "give two texts, or as many of both")
        return list(self.run(Answering(long), list(zip(question, context, strict=True))))

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        long: str = TRUNCATE,
    ) -> list[dict[str, Any]]:
        """Score documents by how well they answer a query; return {"corpus_id", "score"} of each, the best first.

        These are the answers of ``sentence_transformers.CrossEncoder.rank``. top_k: so many of them alone.
        return_documents: with the key "text" too. See ``secure.tasks.rerank.Rerank``. Raises InvalidInput for a text in
        place of a list of documents, and for a ``top_k`` below 1.
        """
        if isinstance(documents, str):
            raise InvalidInput("one text in place of documents", "give a list of them")
        if top_k is not None and top_k < 1:
            raise InvalidInput(f"the {top_k} best documents", "at least 1, or None for all")
        scores = list(self.run(Rerank(long), [(query, document) for document in documents]))
        return ranked(scores, documents if return_documents else None)[:top_k]

    def search(
        self,
        questions: Sequence[str],
        top: int | None = None,
        *,
        passages: bool = False,
        long: str = REFUSE,
        prompt: str | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Find the passages of the server's index that answer each question best, the best first.

        Each is {"id", "passage", "start", "end", "score"}, and "text" where the owner serves passages. The servers
        learn neither the question nor what was found. See ``secure.tasks.search.Search`` for all parameters, and
        ``embed`` for exceptions.
        """
        return list(self.run(Search(top, passages, long, prompt), questions))

    def generate(
        self,
        prompt: Sequence[int] | str | Sequence[Mapping[str, str]],
        max_new_tokens: int,
        *,
        stop: str | Collection[int | str] = (),
        ignore_end: bool = False,
        hide_length: bool = False,
        temperature: float = 0.0,
        draft: nn.Module | str | Path | None = None,
    ) -> Generation:
        """Let the model continue a prompt; return its text, which is written as one iterates over it.

        prompt: a text; chat messages, such as [{"role": "user", "content": "Hello"}], for a model with a chat template;
        or token ids. It may have up to the greatest length of a prompt in tokens. stop: strings before which the text
        ends, and tokens with which it does. So it does with the tokens that end texts of this model, unless
        ``ignore_end``. hide_length: queries go on after that, on zeros, so that the servers see ``max_new_tokens`` of
        them whatever the text is (or where prompts are read token by token, as many as there is room for). They run
        while one iterates to the end. temperature: 0 takes the most likely tokens; more draws them, if the model was
        compiled for that, and nobody else learns at which temperature. The noise is new in every query, and no seed
        repeats it.
        draft: a small public model with the same tokens, the directory of one or a model as its class makes it, which
        runs here and guesses what comes next. One query then checks several tokens, and gives those on which the served
        model agrees and one more; the text is the one that it writes anyway, or a sample with the same probabilities.
        The servers see how many agree each time, which says much about the text, and the client learns what the model
        would choose behind guesses that are wrong. It needs a model with a draft length, and excludes ``hide_length``.

        What is given before a failure of a party counts; the text cannot go on after it, as what the parties keep of it
        is lost with them. A prompt that is too long, has a token outside the vocabulary, or that the tokenizer or the
        template does not take, and a stop string that the model never writes, cost what any other prompt costs before
        InputTooLong or InvalidInput is raised. An empty stop string, and more tokens than there is room for, raise
        InvalidInput at once.
        The servers see to which length the prompt was padded, the number of tokens, and when each was asked for.
        """
        Generate().fits(self.served)
        labels = self.program.labels
        asked = wanted(prompt, stop, labels, self._link.tokenizer, ignore_end=ignore_end)
        sizes = Sizes.of(self._links.offers, labels)
        if not sizes.prompts:
            drafting(draft, self._links.offers, labels, self._link.tokenizer, hidden=hide_length)
            if not 0 <= temperature < math.inf:
                raise InvalidInput(f"a temperature of {temperature}", "0 or more")
            # as below, what is wrong with numbers shows at once, and what a server's tokenizer says of a text does not
            sizes.check_steps([0] if asked.in_text else asked.ids(0), max_new_tokens)
            stepped = partial(
                self._stepped, asked, sizes=sizes, count=max_new_tokens, hidden=hide_length, temperature=temperature
            )
            return Generation(stepped, in_text=asked.in_text)
        # what is wrong with numbers shows at once; what a server's tokenizer says of a text does not
        writing(self._links.offers, labels, [0] if asked.in_text else asked.ids(self.length), max_new_tokens)
        heat = partial(at_temperature, temperature=temperature_for(labels, temperature))
        guesses = drafting(draft, self._links.offers, labels, self._link.tokenizer, hidden=hide_length)
        steps = partial(self._written, asked, count=max_new_tokens, hidden=hide_length, heat=heat, draft=guesses)
        return Generation(steps, in_text=asked.in_text)

    def _stepped(
        self, asked: Wanted, text: Generation, *, sizes: Sizes, count: int, hidden: bool, temperature: float
    ) -> Generator[None]:
        """Run the queries of a text whose prompt is read token by token; yield whenever it has more tokens.

        The server sees their number: the tokens of the prompt and of the text together, or if it is hidden as many as
        there is room for. A prompt that cannot be used takes one step, and is no different in what leaves and when.
        """
        came, pace = time.monotonic(), None
        with self._open():
            prepared = Prepared(asked, sizes.capacity)
            ids = prepared.ids
            failed = ids if isinstance(ids, Error) else _tried(partial(sizes.check_steps, ids, count))
            prompt = [0] if failed or isinstance(ids, Error) else ids
            text.prompt_tokens, over = 0 if failed else len(prompt), False
            last = hidden_steps(self.program.labels, count) if hidden else len(prompt) + count - 1
            link = self._links.of(sizes.step)
            conversation = link.converse(sizes.capacity)
        try:
            for filled in range(last):
                behind = text.ids[-1] if text.ids and not over else 0
                token = prompt[filled] if filled < len(prompt) else behind
                with self._open():
                    values = self._clear_values(step_inputs([token], 0, filled, link.program.rows), link)
                    if isinstance(values, Error):  # a step takes place all the same, as of a prompt
                        failed, values = failed or values, link.program.dummy_values()
                    self._wait(came, pace)  # whatever the prompt, the choice, the text's end and its reader took
                    found = self._answer(link, conversation, values, sizes.step, filled, None)
                came, pace = time.monotonic(), STEP
                if isinstance(found, Error):
                    failed = failed or found
                elif filled >= len(prompt) - 1 and not (over or failed):
                    ended = _tried(partial(_taken, text, prepared, found, temperature, count))
                    over, failed = (False, ended) if isinstance(ended, Error) else (ended, None)
                    if failed is None:
                        yield
                if (over or failed) and not hidden:
                    break
        finally:
            link.leave(conversation)
        if failed is not None:
            raise failed

    def _written(
        self,
        asked: Wanted,
        text: Generation,
        *,
        count: int,
        hidden: bool,
        heat: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        draft: Draft | None,
    ) -> Generator[None]:
        """Run the queries of a text, which takes their tokens; yield whenever it has more of them."""
        began = time.monotonic()
        with self._open():
            prepared = Prepared(asked, self.length)
            text.prompt_tokens = 0 if isinstance(prepared.ids, Error) else len(prepared.ids)
            sizes = sizes_for(self._links.offers, self.program.labels, prepared.ids, count)
            bucket, last = sizes.prompt.length, sizes.prompt.length + count - 1
            if draft is None or draft.rows is not None:
                sizes = replace(sizes, drafted=0 if draft is None else draft.rows or 0)
            used = [sizes.prompt, *({sizes.step, sizes.after(bucket, count - 1)} if count > 1 else ())]
            if any(self._links.missing(size) for size in used):
                self._wait(began)
                for size in used:
                    self._once_free(partial(self._links.of, size))
                began = time.monotonic()
            link = self._links.of(sizes.prompt)
            conversation, places = link.converse(sizes.capacity), link.program.publishes
            if any(self._links.of(size).program.publishes != places for size in used):
                raise InvalidProgram("the server's Programs for a prompt and for a step count positions differently")
            prompt = [0] if sizes.error or isinstance(prepared.ids, Error) else prepared.ids
            inputs = [heat(prompt_inputs(ids, bucket, places=places)) for ids in (prompt, [0])]
            values, failed = self._usable(link, *inputs)
            failed = sizes.error or failed
            drafts = count > 1 and sizes.after(bucket, count - 1) == sizes.verify  # else no pass fits in the draft
            guessing = draft.begin(prompt) if draft is not None and drafts else None
            self._wait(began)

            def following(filled: int) -> Ahead | None:
                if filled >= last:
                    return None
                size = sizes.after(filled, last - filled)
                return Ahead(self._links.of(size), last - filled if size == sizes.step else 1)

            new = self._next(link, conversation, values, sizes.prompt, 1, 0, following(bucket))
        start, filled, over, alone, sure = bucket - len(prompt), bucket, False, False, 0
        while True:
            came, had = time.monotonic(), len(text.ids)
            if not (over or failed):
                found = new if isinstance(new, Error) else _tried(partial(text.take, new, prepared))
                over, failed = (False, found) if isinstance(found, Error) else (found, None)
            if failed is not None and not hidden:
                raise failed
            if len(text.ids) > had:
                yield
            if (over and not hidden) or filled == last:
                break
            with self._open():
                size = sizes.step if alone else sizes.after(filled, last - filled)
                link = self._once_free(partial(self._links.of, size))
                width, guesses, tokens = size.length, list[int](), [0] * size.length
                if not (over or failed):
                    if guessing is not None and width > 1:
                        guesses = guessing.guess([*prompt, *text.ids], width - 1)
                    tokens = [text.ids[-1], *guesses]
                rows = link.program.rows
                inputs = [heat(step_inputs(each, start, filled, rows, places=places)) for each in (tokens, [0] * width)]
                values, wrong = self._usable(link, *inputs)
                failed = failed or (None if guesses else wrong)
                self._wait(came, STEP)  # whatever the token, the graph, the guesses and the text's end took
                # which rows the query behind a pass reads is known beforehand if all agree
                ahead = following(filled + width) if not guesses or sure > 0 else None
                new = self._next(link, conversation, values, size, width, filled, ahead)
            alone = bool(guesses) and (wrong is not None or isinstance(new, OutOfRange))
            if alone:
                new = []  # a guess may be to blame; a step tells whether the text is
            elif not isinstance(new, Error):
                new = text.checked(guesses, new)
                sure += (1 if len(new) == width else -1) if guesses else 0
                new = new[: last - filled]
            filled += 1 if isinstance(new, Error) else len(new)
        if failed is not None:
            raise failed
        if not over:
            text.end(prepared)

    def _usable(
        self, link: Link, inputs: Mapping[str, Tensor], other: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Any], Error | None]:
        """Return the clear values of inputs, or of others and the reason if these have none.

        Both are made from the same positions, which the parties see. Raises that reason if the others have none too,
        whatever the inputs are.
        """
        values, others = (self._clear_values(each, link) for each in (inputs, other))
        if isinstance(others, Error):
            raise others
        return (others, values) if isinstance(values, Error) else (values, None)

    def _next(
        self, link: Link, conversation: Any, values: Any, size: Offer, count: int, rows: int, ahead: Ahead | None
    ) -> list[int] | Error:
        """Run one query of a conversation; return the tokens that it reveals, or why they are not to be trusted.

        count: of the tokens. rows: those that the query reads. ahead: the queries after it, if there may be any.
        """
        decoded = self._answer(link, conversation, values, size, rows, ahead)
        if isinstance(decoded, Error):
            return decoded

        def tokens() -> list[int]:
            found = [int(token) for token in only(decoded).flatten()]
            if len(found) != count:
                raise InvalidProgram(f"the server's Program gives {len(found)} tokens, not {count}")
            return found

        return _tried(tokens)

    def _answer(
        self, link: Link, conversation: Any, values: Any, size: Offer, rows: int, ahead: Ahead | None
    ) -> Mapping[str, Tensor] | Error:
        """Run one query of a conversation; return the decoded outputs, or why they are not to be trusted."""
        encoded = link.program.encode(values, link.tables)
        number, self._asked = self._asked, self._asked + 1
        ask = partial(link.go_on, conversation, encoded, number, rows=rows, ahead=ahead)
        results, report = self._once_free(ask, link)
        self.report = replace(report, length=size.length)
        self._took(link, self.report)
        wrong, decoded = (_tried(partial(each, results)) for each in (link.program.check_results, link.program.decode))
        return wrong or decoded

    def _took(self, link: Link, report: Report) -> None:
        """Note a query that ran to its end."""
        self._last, self.answered = link, self.answered + 1
        self.reports.append(report)
        del self.reports[:-REPORTS]

    def receipt(self) -> Any:
        """Return the receipt of this session so far: a record of every message that left this machine for it.

        It is a ``parties.receipts.receipt.Receipt``: ``write(file)`` and ``as_dict()``; ``unseen verify`` compares it
        with the Programs. Raises InvalidInput if the session was opened without ``receipts=True``, or has sent more
        than a receipt holds.
        """
        if self._recorded is None:
            raise InvalidInput("this session keeps no record of what left", "secure.connect(..., receipts=True)")
        with self._lock:  # between two queries
            return self._recorded(self)

    def close(self) -> None:
        """End the session; all sides discard prepared queries that were not used. A forked child ends nothing."""
        self._closed.set()
        if os.getpid() != self._process:
            return
        self._links.close("it was closed")  # without the lock, so that it ends a query of another thread

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_process(self) -> None:
        """Raise QueryError in a forked child: it has copies of masks that serve once, and no threads to send."""
        if os.getpid() != self._process:
            raise QueryError(
                f"this session belongs to process {self._process}, and this is process {os.getpid()}, forked from it",
                'connect in the process that asks, and start it anew: multiprocessing.get_context("spawn")',
            )

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Admit one caller at a time, refuse an ended session, and set this session's number of threads."""
        self._require_process()
        with self._lock:
            self._links.of(self._links.size)
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
    given: Any,
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
    return _tried(lambda: task.joined(whole, usable, given, served))


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


def _taken(text: Generation, prepared: Prepared, found: Mapping[str, Tensor], temperature: float, count: int) -> bool:
    """Choose the next of ``count`` tokens by its scores, and let the text take it; return True if it is the last."""
    ended = text.take([chosen(only(found).flatten(), temperature)], prepared)
    if not ended and len(text.ids) == count:
        text.end(prepared)
    return ended or len(text.ids) == count


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
def _naming(numbers: Sequence[int], of: int | None, noun: str) -> Iterator[None]:
    """Say in every error which of several inputs it is about; ``of``: how many there are, if that is known."""
    first, last = numbers[0], numbers[-1]
    try:
        yield
    except Error as error:
        if of == 1:
            raise
        which = f"{noun} {first}" if first == last else f"{noun}s {first} to {last}"
        raise about(f"{which}{f' of {of}' if of else ''}", error) from None
