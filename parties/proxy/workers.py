"""The sessions of a proxy, one for each worker, and the requests that wait for them.

A session does one thing at a time, and each worker does all of that for its own. Inputs of requests that wait share
queries. Where nothing waits, a worker prepares the next query.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from secure.errors import Busy, Error, HandshakeError, PeerLost, printable
from secure.lowering.client_inputs import GENERATE
from secure.session.link import LOST, Report
from secure.session.session import WINDOW, Session
from secure.tasks.task import Task

GATHER = 0.005
"""Seconds for which a worker that has nothing to do waits for more inputs of a query that carries several."""

MOST_WAITING = 1 << 14
"""Inputs that wait at most; a text that is to be written counts as one."""

AGAIN = 5.0  # seconds after a query could not be prepared, or a session not opened, until that is tried again
REFUSED = 300.0  # the same after a server that serves something else

ENDING = 10.0  # seconds that a worker gets to end

log = logging.getLogger("unseen.proxy")


@dataclass(eq=False, repr=False)
class Inquiry:
    """A request for the answers to some inputs. answers: those that have come."""

    task: Task[Any, Any]
    inputs: Sequence[Any]
    future: Future[list[Any]] = field(default_factory=Future)
    answers: list[Any] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.inputs)

    def take(self, answer: Any) -> None:
        """Take the next answer, or the error in its place."""
        self.answers.append(answer)
        if len(self.answers) == len(self.inputs):
            self.future.set_result(self.answers)


class Text(Protocol):
    """A request for a text. future: set when it has ended. begun: something of it has been given to the caller."""

    size: int
    future: Future[None]
    begun: bool

    def write(self, session: Session, heard: Callable[[], None]) -> int:
        """Write it; return the tokens of its prompt. heard: called after queries. Raises what the session raises."""


Opening = Callable[[], Session]
Heard = Callable[[Report], None]


class SessionWorkers:
    """The workers. open: connects. sessions: their number. ahead: queries that each prepares while nothing waits.

    heard: called with the report of each query. The first sessions are opened here, so this raises what ``open`` does.
    """

    def __init__(self, open: Opening, *, sessions: int = 1, ahead: int = 1, heard: Heard = lambda _: None) -> None:
        self._open, self._ahead, self._heard = open, ahead, heard
        self._jobs, self._changed, self._closed = deque[Inquiry | Text](), threading.Condition(), False
        self._held = list[_SessionWorker]()
        try:
            for number in range(sessions):
                self._held.append(_SessionWorker(self, open(), number))
        except BaseException:
            self.close()
            raise
        self.session = self._held[0].session  # whose Program and labels are those of all
        for each in self._held:
            each.start()

    def ask(self, task: Task[Any, Any], inputs: Sequence[Any]) -> Future[list[Any]]:
        """Ask for inputs' answers; each is an answer or the error in its place. Raises Busy.

        The future raises what ends a query for all of its inputs.
        """
        asked = Inquiry(task, inputs)
        self._put(asked)
        return asked.future

    def write(self, text: Text) -> None:
        """Have a text written. Raises Busy."""
        self._put(text)

    @property
    def waiting(self) -> int:
        """Inputs that no worker has taken yet."""
        with self._changed:
            return sum(job.size for job in self._jobs)

    @property
    def alive(self) -> int:
        """The number of sessions that can be asked, as far as is known: one that rested for long is opened again."""
        return sum(not each.lost for each in self._held)

    @property
    def all(self) -> int:
        """The number of sessions."""
        return len(self._held)

    @property
    def ready(self) -> int:
        """The number of prepared queries that are not yet used."""
        return sum(each.session.ready for each in self._held)

    def close(self) -> None:
        """End the sessions; what waits fails."""
        with self._changed:
            self._closed = True
            left = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for each in self._held:
            each.session.close()
        for job in left:
            _fail(job, PeerLost("the proxy is being stopped", "ask again later"))
        for each in self._held:
            each.end()

    def _put(self, job: Inquiry | Text) -> None:
        with self._changed:
            if self._closed:
                raise PeerLost("the proxy is being stopped", "ask again later")
            if sum(each.size for each in self._jobs) + job.size > MOST_WAITING:
                raise Busy(f"{MOST_WAITING} inputs wait already", "ask again later, or in smaller parts")
            self._jobs.append(job)
            self._changed.notify_all()

    def _next(self, batch: int, rest: Callable[[], float | None]) -> list[Inquiry | Text] | None:
        """Return what a worker does next; [] where it may prepare a query, and None at the end.

        rest: seconds after which it wants to prepare one; None: it does not.
        """
        with self._changed:
            idle = not self._jobs
            if idle and not self._closed:
                self._changed.wait(rest())
            if idle and batch > 1:
                self._changed.wait_for(lambda: self._closed or not 0 < self._inputs() < batch, GATHER)
            if self._closed:
                return None
            if not self._jobs:  # nothing came, or another worker took it
                return []
            first = self._jobs.popleft()
            taken, inputs = [first], first.size
            if isinstance(first, Inquiry):
                for job in [job for job in self._jobs if isinstance(job, Inquiry) and job.task == first.task]:
                    if inputs + job.size <= WINDOW:
                        self._jobs.remove(job)
                        taken.append(job)
                        inputs += job.size
            return taken

    def _inputs(self) -> int:
        return sum(job.size for job in self._jobs)


class _SessionWorker:
    """One session, and the thread that asks it.

    lost: the session ended while it was used, and is not open again. The thread opens it by itself, as whoever heeds a
    probe does not ask. One that ended while it rested, to make room for others, stays so until somebody asks.
    """

    def __init__(self, workers: SessionWorkers, session: Session, number: int) -> None:
        self._all, self.session = workers, session
        self._digest = session.program.digest
        self._seen: Report | None = None
        lengths = sorted({size.length for size in session.sizes if size.length > 1})
        self._length = lengths[0] if lengths else None
        self._again, self.lost, self._why = 0.0, False, ""
        self._thread = threading.Thread(target=self._run, name=f"proxy-{number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        if self._thread.ident is not None:
            self._thread.join(ENDING)  # a connect that is under way cannot be cancelled, and closes its session itself

    def _run(self) -> None:
        while (jobs := self._all._next(self.session.batch, self._rest)) is not None:
            if not jobs:
                self._prepare()
            elif jobs := [job for job in jobs if job.future.set_running_or_notify_cancel()]:
                try:
                    self._work(jobs)
                except Exception as error:
                    if not isinstance(error, Error):
                        log.error("a request failed: %s", type(error).__name__)
                        error = Error("the proxy failed at this request", "see its log")
                    for job in jobs:
                        _fail(job, error)
                self._look()

    def _look(self) -> None:
        """Look whether the session has ended while it was used."""
        if self.session.link.ended and not self.lost and not self._all._closed:
            log.warning("the session has ended; connecting again")
            self.lost = True

    def _work(self, jobs: Sequence[Inquiry | Text]) -> None:
        self._open()
        if not isinstance(first := jobs[0], Inquiry):
            self._write(first)
            return
        asked = [job for job in jobs if isinstance(job, Inquiry)]
        inputs = [each for job in asked for each in job.inputs]
        owners = [job for job in asked for _ in job.inputs]
        for job, answer in zip(owners, self.session.stream(first.task, inputs), strict=True):
            job.take(answer)
            self._hear()
        if self.session.report is not None:
            self._length = self.session.report.length or None

    def _write(self, text: Text) -> None:
        """Write a text. A session that was lost before anything of it came is opened again once."""
        for attempt in range(2):
            try:
                tokens = text.write(self.session, self._hear)
            except LOST:
                if attempt or text.begun:
                    raise
                self._open()
            else:
                holding = [size.length for size in self.session.sizes if size.length >= max(2, tokens)]
                self._length = holding[0] if holding else self._length
                break
            finally:
                self._hear()
        with suppress(Exception):  # the caller has left
            text.future.set_result(None)

    def _open(self) -> None:
        """Connect again if the session has ended. Raises what connecting raises, HandshakeError for another Program."""
        if not self.session.link.ended or self._all._closed:
            return
        session = self._all._open()
        if session.program.digest != self._digest:
            session.close()
            raise HandshakeError("the server serves another Program than before", "start this proxy again")
        log.info("connected again")
        self.session, self._seen, self.lost, self._why = session, None, False, ""
        if self._all._closed:
            session.close()

    def _rest(self) -> float | None:
        """Return the seconds until a query may be prepared, or a lost session opened; None if nothing is to be done."""
        if self.lost:
            return max(0.0, self._again - time.monotonic())
        if not self._all._ahead or self.session.link.ended:
            return None
        if self.session.ready_for(self._length) >= self._all._ahead:
            return None
        return max(0.0, self._again - time.monotonic())

    def _prepare(self) -> None:
        """Prepare a query, or connect again; what fails here fails again at the next request, and is said there."""
        if self._rest() != 0.0:
            return
        try:
            if self.lost:
                self._open()
                return
            before = self.session.ready_for(self._length)
            self.session.prepare(self._length)
        except Exception as error:
            self._said(error)
            self._again = time.monotonic() + (REFUSED if isinstance(error, HandshakeError) else AGAIN)
            self._look()
        else:
            self._why = ""
            if self.session.ready_for(self._length) == before:  # the deployment has nothing to prepare
                self._all._ahead = 0

    def _said(self, error: Exception) -> None:
        """Log why the thread's own try failed: once for each reason, as it goes on trying for as long as it takes."""
        why = printable(str(error)).partition("\n")[0] if isinstance(error, Error) else type(error).__name__
        if why != self._why and not self._all._closed:
            what = "the session could not be opened" if self.lost else "a query could not be prepared"
            log.warning("%s: %s", what, why)
        self._why = why

    def _hear(self) -> None:
        """Tell of the queries that have ended since."""
        fresh = list[Report]()
        for report in reversed(self.session.reports):
            if report is self._seen:
                break
            fresh.append(report)
        if fresh:
            self._seen = fresh[0]
        for report in reversed(fresh):
            self._all._heard(report)


def _fail(job: Inquiry | Text, error: BaseException) -> None:
    """Set the error of a request that has no answer yet."""
    with suppress(Exception):  # it has one, or the caller has left
        if not job.future.done():
            job.future.set_exception(error)


def writes(session: Session) -> bool:
    """Tell whether a session's model writes text."""
    return bool(session.served.task == GENERATE)
