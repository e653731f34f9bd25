"""All that commands which ask a served model have in common: options, the connection, texts, files, answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from parties.bulk.connection import Connection
from parties.bulk.embedding import Embedder, embedded, embedder_of, lengths_of, rows_of
from parties.bulk.rows import ANSWERS, FORMATS
from parties.bulk.texts import FIELD, TextFile
from parties.bulk.unfinished import Formats, check_output
from parties.cli.console import ERR, OUT, counting, get_ready, in_time, progress, say, threads_of_all
from parties.cli.options import (
    DeadlineOption,
    InsecureOption,
    PaceOption,
    ThreadsOption,
    TlsOption,
    TraceOption,
    require_traces,
)
from parties.cli.token import TokenFileOption, given_token
from parties.net.caller import CLIENT
from parties.receipts.receipt import check_new_file
from parties.reports import answers
from parties.services import hosting
from parties.tls.choice import network_of
from parties.traces.measured import Measurements
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput, about
from secure.models.prompts import Prompts
from secure.models.tokens import SPLIT
from secure.progress import Told
from secure.session.link import Report
from secure.session.session import RETRIES, Session
from secure.tasks.task import Task

TextsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Texts; none: one a line from standard input, which other users cannot see."),
]


@dataclass(frozen=True)
class Connecting:
    """The options of a command that connects to a served model, by their names on the command line."""

    program_digest: Annotated[
        str | None,
        typer.Option(help="Refuse a server with another Program; a digest of all its Programs together pins them all."),
    ] = None
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model that is meant, if the server offers several.")
    ] = None
    fixed_length: Annotated[
        bool,
        typer.Option(
            "--fixed-length",
            help="Pad all texts to the greatest length. Else the server sees to which of its lengths each was padded.",
        ),
    ] = False
    cache: Annotated[bool, typer.Option(help="Keep the once-per-model files.")] = True
    deadline: DeadlineOption = None
    pace: PaceOption = None
    threads: ThreadsOption = 1
    tls: TlsOption = None
    insecure: InsecureOption = False
    token_file: TokenFileOption = None


@dataclass(frozen=True)
class Printing(Connecting):
    """The options of a command that prints answers."""

    as_json: Annotated[bool, typer.Option("--json", help="Print answers and costs as JSON.")] = False
    receipt: Annotated[
        Path | None,
        typer.Option(
            "--receipt",
            metavar="FILE",
            help="Write a record of what left this machine: kinds and sizes of messages, and to whom; `unseen verify` "
            "checks it.",
        ),
    ] = None

    @contextmanager
    def receipted(self, session: Session) -> Iterator[None]:
        """Write the receipt at the end of a context, also if it fails: what left has left."""
        try:
            yield
        finally:
            if self.receipt is not None:
                session.receipt().write(self.receipt)


@dataclass(frozen=True)
class Asking(Printing):
    """The options of a command that asks a served model about texts."""

    input: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts of a file: a line each; .jsonl, .csv: see --field; -: lines of standard input. With --output.",
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the answers to --input go, by its suffix: .jsonl; of embeddings .npy (float32) or .csv too. A "
            "run that was interrupted goes on where it stopped.",
        ),
    ] = None
    field: Annotated[
        str | None, typer.Option(help=f"The field or column of --input that holds texts; {FIELD} by default.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin --output anew, whatever is there.")] = False
    retries: Annotated[
        int | None,
        typer.Option(
            min=0, help=f"Times that a query of --input is repeated if a party is lost; {RETRIES} by default."
        ),
    ] = None
    trace: TraceOption = None


def connection_of(verb: str, deployment: Deployment, given: Connecting, *, fixed_length: bool = False) -> Connection:
    """Get this process ready, and return the connection that the options say. fixed_length: whatever they say."""
    if isinstance(given, Printing) and given.receipt is not None:
        check_new_file(given.receipt)  # before anything is sent
    get_ready(given.threads)
    hosting.settle()
    timed = {"deadline": given.deadline, "pace": given.pace}
    options: dict[str, Any] = {name: value for name, value in timed.items() if value is not None}
    for line in network_of(CLIENT, directory=given.tls, insecure=given.insecure).about():
        if "warning" in line:
            say(f"unseen {verb}: {line}")
    options |= {"cache": given.cache, "program_digest": given.program_digest}
    fixed_length = fixed_length or given.fixed_length
    options |= {"model": given.model, "fixed_length": fixed_length, "token": given_token(given.token_file)}
    options["threads"] = given.threads or threads_of_all()
    options |= {"receipts": True} if isinstance(given, Printing) and given.receipt is not None else {}
    return Connection(deployment, given.tls, given.insecure, options)


@dataclass(frozen=True)
class Question:
    """A command's own part: the task, what it asks, and how answers are shown.

    verb: the command. give: makes the task's input of a text. also: a text that all inputs have in common, such as a
    query, or that says how they are given. answer: what an answer is called. vectors: answers are vectors. long: what
    becomes of long texts. more: options that need --input, by their names, and apart: those that exclude it; None and
    False stand for one that is not given. texts: what a text is called, and given: how texts are given.
    about: makes a line about the served model's prompts, or "".
    """

    verb: str
    task: Task[Any, Any]
    show: Show
    give: Callable[[str], Any] = str
    also: str = ""
    answer: str = "answer"
    vectors: bool = False
    long: str = ""
    more: Mapping[str, object] | None = None
    apart: Mapping[str, object] | None = None
    texts: str = "text"
    given: str = "texts as arguments"
    about: Callable[[Prompts], str] = lambda _: ""

    @property
    def formats(self) -> Formats:
        """The formats of files of answers."""
        return FORMATS if self.vectors else ANSWERS


class Show(Protocol):
    """Shows answers on standard output; ``as_json``: as one JSON document."""

    def __call__(
        self,
        session: Session,
        texts: Sequence[str],
        found: Sequence[Any],
        taken: Sequence[Report],
        *,
        as_json: bool,
    ) -> None: ...


Opening = Callable[[Told], AbstractContextManager[Embedder]]


def ask(
    question: Question,
    deployment: Deployment,
    asking: Asking,
    texts: Sequence[str] | None,
    opening: Callable[[Connection], Opening] | None = None,
) -> None:
    """Ask a served model, as the options say. opening: opens another place to ask the texts of a file than a session.

    Raises InvalidInput for options that exclude one another, and whatever asking raises.
    """
    verb, fixed_length = question.verb, False
    along: dict[str, object] = {"--output": asking.output, "--field": asking.field, "--retries": asking.retries}
    along |= {**(question.more or {}), "--overwrite": asking.overwrite or None}
    apart: dict[str, object] = {
        question.given.partition(" as ")[0]: texts,
        "--json": asking.as_json,
        **(question.apart or {}),
    }
    apart |= {"--trace": asking.trace, "--receipt": asking.receipt}
    for name in along if asking.input is None else ():
        if along[name] is not None:
            raise InvalidInput(f"{name} means nothing without --input", "--input - reads standard input")
    for name in apart if asking.input is not None else ():
        if apart[name]:
            raise InvalidInput(f"--input and {name} exclude each other", "leave one of them out")
    if asking.input is not None and asking.output is None:
        raise InvalidInput("--input without --output", f"give a file of the suffix {', '.join(question.formats)}")
    if asking.trace is not None:
        require_traces(deployment)
        fixed_length = True  # a trace belongs to one Program
        if question.long == SPLIT:
            raise InvalidInput(f"--trace and --long {SPLIT} exclude each other", "leave one of them out")
    connection = connection_of(verb, deployment, asking, fixed_length=fixed_length)
    if asking.input is None:
        _texts(question, connection.open, texts, asking)
        return
    assert asking.output is not None  # as was found above
    opened = opening(connection) if opening is not None else _one(connection, question)
    retries = RETRIES if asking.retries is None else asking.retries
    _file(question, opened, TextFile(asking.input, asking.field), asking.output, retries, asking.overwrite)


def _inputs(question: Question, texts: Iterable[str]) -> Iterator[Any]:
    """Yield the task's inputs of texts; an error says which of them it is about."""
    for number, text in enumerate(texts, 1):
        try:
            yield question.give(text)
        except InvalidInput as error:
            raise about(f"{question.texts} {number}", error) from None


def _say_lengths(verb: str, lengths: Sequence[int]) -> None:
    """Say what the server sees of a text where it offers several lengths."""
    if len(lengths) > 1:
        known = ", ".join(map(str, lengths))
        say(f"unseen {verb}: the server sees to which length each text is padded: {known} tokens")


def _say_prompts(question: Question, prompts: Prompts) -> None:
    """Say what goes before each text, if the command knows prompts and the model has any."""
    if said := question.about(prompts):
        say(f"unseen {question.verb}: {said}")


def _texts(
    question: Question,
    connect: Callable[[Told], Session],
    texts: Sequence[str] | None,
    asking: Asking,
) -> None:
    """Print the answers to a few texts, and what each took."""
    verb, task, trace, as_json = question.verb, question.task, asking.trace, asking.as_json
    given = texts or ([] if sys.stdin.isatty() else _lines(sys.stdin))
    if not given:
        raise InvalidInput(f"no {question.texts}", f"give {question.given}, or one a line on standard input")
    inputs = list(_inputs(question, given))
    measured = Measurements(trace) if trace else None  # a mistake in it shows before anything is sent
    with ExitStack() as stack, ExitStack() as shown:
        told = shown.enter_context(progress(verb))
        told(0, 0, "connecting")
        session = stack.enter_context(connect(told))
        stack.enter_context(asking.receipted(session))
        answers = session.run(task, inputs)  # a model that is for another task is refused here
        _say_lengths(verb, lengths_of(session))
        _say_prompts(question, session.prompts)
        found, taken = list[Any](), list[Report]()
        try:
            told(0, len(given), "asking")
            for answer in answers:
                report = session.report
                assert report is not None  # the text has an answer
                if measured and (not taken or taken[-1] is not report):
                    measured.add(session)
                found.append(answer)
                taken.append(report)
                told(len(found), len(given), "asking")
        finally:  # answers that came before a failure are paid for, so they are shown
            if done := given[: len(found)]:
                if not as_json:
                    shown.close()
                question.show(session, done, found, taken, as_json=as_json)
            if measured:
                measured.show(ERR if as_json else OUT, session.program)
        if measured:
            measured.check()


def _lines(file: Iterable[str]) -> list[str]:
    """Return the lines of a file, which may begin with a byte order mark. Raises InvalidInput for one that is blank.

    Every line has an answer, so none is left out; blank lines at the end have none.
    """
    found = [line.rstrip("\r\n") for line in file]
    found = [found[0].removeprefix("\ufeff"), *found[1:]] if found else []
    while found and not found[-1].strip():
        found.pop()
    if blank := next((number for number, line in enumerate(found, 1) if not line.strip()), None):
        raise InvalidInput(
            f"line {blank} of standard input is blank, which is no text",
            "leave it out, or use --input - with --output, where a blank line is a row without an embedding",
        )
    return found


def _one(connection: Connection, question: Question) -> Opening:
    """Ask in one session of this process."""

    @contextmanager
    def opened(told: Told) -> Iterator[Embedder]:
        with connection.open(told) as session:
            yield embedder_of(session, None if question.vectors else question.task)

    return opened


def _file(question: Question, opening: Opening, texts: TextFile, output: Path, retries: int, overwrite: bool) -> None:
    """Write the answers to the texts of a file into another, row by row. Ends with code 1 if a text has no answer."""
    verb, task = question.verb, question.task
    check_output(output, overwrite=overwrite, formats=question.formats)
    # which finds a mistake in any line before anything is sent
    total = sum(1 for _ in _inputs(question, texts)) if texts.again else None
    with ExitStack() as stack:
        with progress(verb) as told:
            told(0, 0, "connecting")
            embedder = stack.enter_context(opening(told))
        _say_lengths(verb, embedder.lengths)
        _say_prompts(question, embedder.prompts)
        rows = stack.enter_context(rows_of(embedder, task, texts, output, overwrite=overwrite, also=question.also))
        begun, start = rows.rows, time.monotonic()
        if begun:
            say(f"unseen {verb}: {begun:,} texts are done, this run goes on at text {begun + 1:,}")
        try:
            with counting(verb, "texts", total, begun) as counted:
                for done in embedded(embedder, task, rows, retries, question.give):
                    counted(done)
        except BaseException:
            anew = ", without --overwrite" if overwrite else ""
            say(
                f"unseen {verb}: {rows.rows:,} texts are done and kept; run the same command again{anew}: "
                f"it goes on at text {rows.rows + 1:,}"
            )
            raise
        rows.finish()
    seconds = time.monotonic() - start
    rate = f", {(rows.rows - begun) / seconds:.3g} a second" if rows.rows > begun else ""
    say(f"unseen {verb}: {rows.rows - begun:,} texts in {in_time(seconds)}{rate}; {rows.rows:,} rows in {output}")
    if rows.unusable:
        some = "one of them has" if rows.unusable == 1 else f"{rows.unusable:,} of them have"
        say(f"unseen {verb}: {some} no {question.answer} (texts are numbered from 1):")
        for line in rows.first:
            say(f"  {line}")
        raise typer.Exit(1)


def in_words(
    deployment: Deployment,
    words: Callable[[Any], Sequence[str]],
    order: Callable[[Sequence[Any]], Sequence[int]] | None = None,
) -> Show:
    """Show answers in words, with what they took. order: of the answers; that of the texts by default."""

    def show(
        session: Session, texts: Sequence[str], found: Sequence[Any], taken: Sequence[Report], *, as_json: bool
    ) -> None:
        shown = order(found) if order is not None else range(len(found))
        if as_json:
            answers.answers_as_json(OUT, texts, found, taken, shown)
        else:
            answers.report_answers(OUT, deployment, session, texts, found, taken, words, shown)

    return show
