"""The command ``unseen embed``."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from torch import Tensor

from parties import deployments
from parties.cli.console import ERR, OUT, get_ready, progress, say
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
from parties.reports import answers
from parties.services import hosting
from parties.tls.choice import network_of
from parties.traces.measured import Measurements
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput
from secure.models.text import model_directory
from secure.tasks.embed import Embed


def embed(
    deployment: Deployment,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; none: one a line from standard input, which other users cannot see."),
    ] = None,
    compare_with: Annotated[
        str | None, typer.Option(help="Also run this model here, in the clear, and print how close the answers are.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print embeddings and costs as JSON.")] = False,
    program_digest: Annotated[str | None, typer.Option(help="Refuse a server with another Program.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep the once-per-model files.")] = True,
    trace: TraceOption = None,
    deadline: DeadlineOption = None,
    pace: PaceOption = None,
    threads: ThreadsOption = 1,
    tls: TlsOption = None,
    insecure: InsecureOption = False,
    token_file: TokenFileOption = None,
) -> None:
    """Embed texts that the servers never see."""
    if as_json and compare_with:
        raise InvalidInput("--json and --compare-with exclude each other", "leave one of them out")
    if trace is not None:
        require_traces(deployment)
    get_ready(threads)
    hosting.settle()
    typed = [] if texts or sys.stdin.isatty() else sys.stdin
    given = texts or [line.strip() for line in typed if line.strip()]
    if not given:
        raise InvalidInput("no text", "give texts as arguments, or one a line on standard input")
    if compare_with:
        model_directory(compare_with)  # a mistake in it shows before anything is sent
    measured = Measurements(trace) if trace else None  # likewise
    timed = {"deadline": deadline, "pace": pace}
    options: dict[str, Any] = {name: value for name, value in timed.items() if value is not None}
    network = network_of(CLIENT, directory=tls, insecure=insecure)
    for line in network.about():
        if "warning" in line:
            say(f"unseen embed: {line}")
    options |= {"network": network, "cache": cache, "program_digest": program_digest}
    options["token"] = given_token(token_file)
    options["threads"] = threads or os.cpu_count() or 1
    with (
        progress("preparing") as told,
        deployments.connect(deployment, told=told, **options) as session,
    ):
        vectors: list[Tensor] = []
        try:
            for vector in session.run(Embed(), given):
                vectors.append(vector)
                if measured:
                    measured.add(session)
        finally:  # answers that came before a failure are paid for, so they are shown
            done = given[: len(vectors)]
            if done and as_json:
                answers.as_json(OUT, done, vectors, session.reports[: len(done)])
            elif done:
                answers.report(OUT, deployment, session, done, vectors, compare_with)
            if measured:
                measured.show(ERR if as_json else OUT, session.program)
        if measured:
            measured.check()
