"""The command ``unseen embed``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from parties.bulk.connection import Connection
from parties.bulk.embedding import Embedder, embedded, embedder_of, lengths_of, rows_of
from parties.bulk.rows import FORMATS
from parties.bulk.texts import FIELD, TextFile
from parties.bulk.unfinished import check_output
from parties.cli.console import ERR, OUT, counting, get_ready, in_time, progress, say
from parties.cli.options import (
    DeadlineOption,
    InsecureOption,
    Long,
    LongOption,
    PaceOption,
    PromptOption,
    RayInsecureOption,
    RayOption,
    RayWorkersOption,
    ThreadsOption,
    TlsOption,
    TraceOption,
    along_with_ray,
    require_traces,
)
from parties.cli.token import TokenFileOption, given_token
from parties.cluster.embedding import Workers
from parties.cluster.joined import Cluster
from parties.net.caller import CLIENT
from parties.reports import answers
from parties.services import hosting
from parties.tls.choice import network_of
from parties.traces.measured import Measurements
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput, printable
from secure.models.text import model_directory
from secure.models.tokens import REFUSE, SPLIT
from secure.progress import Told
from secure.session.link import Report
from secure.session.session import RETRIES, Session
from secure.tasks.embed import Embed


def embed(
    deployment: Deployment,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; none: one a line from standard input, which other users cannot see."),
    ] = None,
    input: Annotated[  # as the option is called
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts of a file: a line each; .jsonl, .csv: see --field; -: lines of standard input. With --output.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the embeddings of --input go, by its suffix: .jsonl, .npy (float32) or .csv. A run that was "
            "interrupted goes on where it stopped.",
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help=f"The field or column of --input that holds texts; {FIELD} by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin --output anew, whatever is there.")] = False,
    long: LongOption = Long[REFUSE],
    prompt: PromptOption = None,
    retries: Annotated[
        int | None,
        typer.Option(
            min=0, help=f"Times that a query of --input is repeated if a party is lost; {RETRIES} by default."
        ),
    ] = None,
    compare_with: Annotated[
        str | None, typer.Option(help="Also run this model here, in the clear, and print how close the answers are.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print embeddings and costs as JSON.")] = False,
    program_digest: Annotated[str | None, typer.Option(help="Refuse a server with another Program.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model that is meant, if the server offers several.")
    ] = None,
    fixed_length: Annotated[
        bool,
        typer.Option(
            "--fixed-length",
            help="Pad all texts to the greatest length. Else the server sees to which of its lengths each was padded.",
        ),
    ] = False,
    cache: Annotated[bool, typer.Option(help="Keep the once-per-model files.")] = True,
    trace: TraceOption = None,
    deadline: DeadlineOption = None,
    pace: PaceOption = None,
    threads: ThreadsOption = 1,
    tls: TlsOption = None,
    insecure: InsecureOption = False,
    token_file: TokenFileOption = None,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    ray_insecure: RayInsecureOption = False,
) -> None:
    """Embed texts that the servers never see."""
    if as_json and compare_with:
        raise InvalidInput("--json and --compare-with exclude each other", "leave one of them out")
    along: dict[str, object] = {"--output": output, "--field": field, "--retries": retries, "--ray": ray}
    along["--overwrite"] = overwrite or None
    apart: dict[str, object] = {"texts": texts, "--json": as_json, "--compare-with": compare_with, "--trace": trace}
    for name in along if input is None else ():
        if along[name] is not None:
            raise InvalidInput(f"{name} means nothing without --input", "--input - reads standard input")
    for name in apart if input is not None else ():
        if apart[name]:
            raise InvalidInput(f"--input and {name} exclude each other", "leave one of them out")
    if input is not None and output is None:
        raise InvalidInput("--input without --output", f"give a file of the suffix {', '.join(FORMATS)}")
    along_with_ray(ray, ray_workers, insecure=ray_insecure)
    if trace is not None:
        require_traces(deployment)
        fixed_length = True  # a trace belongs to one Program
        if long == SPLIT:
            raise InvalidInput(f"--trace and --long {SPLIT} exclude each other", "leave one of them out")
    get_ready(threads)
    hosting.settle()
    timed = {"deadline": deadline, "pace": pace}
    options: dict[str, Any] = {name: value for name, value in timed.items() if value is not None}
    for line in network_of(CLIENT, directory=tls, insecure=insecure).about():
        if "warning" in line:
            say(f"unseen embed: {line}")
    options |= {"cache": cache, "program_digest": program_digest, "model": model, "fixed_length": fixed_length}
    options["token"] = given_token(token_file)
    options["threads"] = threads or os.cpu_count() or 1
    task = Embed(str(long), prompt)

    connection = Connection(deployment, tls, insecure, options)

    if input is not None:
        assert output is not None
        opening = _one(connection)
        if ray is not None:
            opening = _several(connection, ray, ray_workers, insecure=ray_insecure)
        _file(opening, task, TextFile(input, field), output, RETRIES if retries is None else retries, overwrite)
    else:
        _texts(connection.open, task, deployment, texts, compare_with, trace, as_json=as_json)


def _say_lengths(lengths: Sequence[int]) -> None:
    """Say what the server sees of a text where it offers several lengths."""
    if len(lengths) > 1:
        known = ", ".join(map(str, lengths))
        say(f"unseen embed: the server sees to which length each text is padded: {known} tokens")


def _say_prompt(session: Session, task: Embed) -> None:
    """Say which prompt goes before each text, where the model has any."""
    if prompts := session.prompts:
        text = prompts.text(task.prompt)
        said = f"{printable(json.dumps(text, ensure_ascii=False))} goes before each text" if text else "none is used"
        say(f"unseen embed: of the model's prompts ({', '.join(prompts.texts)}) {said}; --prompt NAME chooses one")


def _texts(
    connect: Callable[[Told], Session],
    task: Embed,
    deployment: Deployment,
    texts: list[str] | None,
    compare_with: str | None,
    trace: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print the answers to a few texts, and what each took."""
    given = texts or ([] if sys.stdin.isatty() else _lines(sys.stdin))
    if not given:
        raise InvalidInput("no text", "give texts as arguments, or one a line on standard input")
    if compare_with:
        model_directory(compare_with)  # a mistake in it shows before anything is sent
    measured = Measurements(trace) if trace else None  # likewise
    with ExitStack() as stack, ExitStack() as shown:
        told = shown.enter_context(progress("embed"))
        told(0, 0, "connecting")
        session = stack.enter_context(connect(told))
        _say_lengths(lengths_of(session))
        _say_prompt(session, task)
        vectors, taken = list[Tensor](), list[Report]()
        try:
            told(0, len(given), "embedding")
            for vector in session.run(task, given):
                report = session.report
                assert report is not None  # the text has an answer
                if measured and (not taken or taken[-1] is not report):
                    measured.add(session)
                vectors.append(vector)
                taken.append(report)
                told(len(vectors), len(given), "embedding")
        finally:  # answers that came before a failure are paid for, so they are shown
            done = given[: len(vectors)]
            if done and as_json:
                answers.as_json(OUT, done, vectors, taken)
            elif done:
                shown.close()
                if compare_with:
                    say(f"unseen embed: embedding in the clear with {compare_with}, to compare ...")
                answers.report(OUT, deployment, session, done, vectors, taken, task, compare_with)
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


Opening = Callable[[Told], AbstractContextManager[Embedder]]


def _one(connection: Connection) -> Opening:
    """Ask in one session of this process."""

    @contextmanager
    def opened(told: Told) -> Iterator[Embedder]:
        with connection.open(told) as session:
            yield embedder_of(session)

    return opened


def _several(connection: Connection, ray: str, workers: int | None, *, insecure: bool) -> Opening:
    """Ask in the sessions of a cluster's workers."""

    def opened(told: Told) -> Workers:
        told(0, 0, "starting the workers of the cluster")
        return Workers(Cluster(ray, insecure=insecure), connection, workers)

    return opened


def _file(opening: Opening, task: Embed, texts: TextFile, output: Path, retries: int, overwrite: bool) -> None:
    """Write the answers to the texts of a file into another, row by row. Ends with code 1 if a text has no answer."""
    check_output(output, overwrite=overwrite)
    total = sum(1 for _ in texts) if texts.again else None  # which finds a mistake in any line before anything is sent
    with ExitStack() as stack:
        with progress("embed") as told:
            told(0, 0, "connecting")
            embedder = stack.enter_context(opening(told))
        _say_lengths(embedder.lengths)
        rows = stack.enter_context(rows_of(embedder, task, texts, output, overwrite=overwrite))
        begun, start = rows.rows, time.monotonic()
        if begun:
            say(f"unseen embed: {begun:,} texts are done, this run goes on at text {begun + 1:,}")
        try:
            with counting("embed", "texts", total, begun) as counted:
                for done in embedded(embedder, task, rows, retries):
                    counted(done)
        except BaseException:
            anew = ", without --overwrite" if overwrite else ""
            say(
                f"unseen embed: {rows.rows:,} texts are done and kept; run the same command again{anew}: "
                f"it goes on at text {rows.rows + 1:,}"
            )
            raise
        rows.finish()
    seconds = time.monotonic() - start
    rate = f", {(rows.rows - begun) / seconds:.3g} a second" if rows.rows > begun else ""
    say(f"unseen embed: {rows.rows - begun:,} texts in {in_time(seconds)}{rate}; {rows.rows:,} rows in {output}")
    if rows.unusable:
        say(f"unseen embed: {rows.unusable:,} of them have no embedding, the first of them:")
        for line in rows.first:
            say(f"  {line}")
        raise typer.Exit(1)
