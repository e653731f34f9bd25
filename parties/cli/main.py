"""The command ``unseen``: a few verbs, errors in words, no traceback for a user's mistake."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import grpc
import torch
import typer
from rich.console import Console

import secure
from parties.ckks import hosted as encrypted_hosting
from parties.cli import demo as demonstration
from parties.cli.accuracy import accuracy_command
from parties.cli.compare import compare_command
from parties.cli.options import (
    BEST_GELU,
    ONE_HOT,
    OURS,
    Chosen,
    Deployment,
    Form,
    Length,
    Lookup,
    Precision,
    Threads,
    Where,
    read_texts,
)
from parties.cli.party import PARTIES, party_command, share_model_command
from parties.cli.profile import profile_command
from parties.cli.train import train_command
from parties.net import hosting
from parties.net.endpoints import Endpoint
from parties.reports import answers
from parties.reports import tables as reports
from parties.reports.tables import mb
from parties.served.files import cache_directory
from parties.three_party.client import connect_three
from parties.three_party.hosted import embed as embed_three
from parties.traces.measured import Measurements
from parties.traces.merge import merged
from parties.traces.trace_file import TraceDirectory
from parties.two_party.client import connect
from parties.two_party.dealer import DealerService
from parties.two_party.masked_model import serve_ready, state_directory
from parties.two_party.server import InferenceService
from proto.unseen_pb2_grpc import add_DealerServicer_to_server, add_InferenceServicer_to_server
from protocols import kernels
from protocols.fixedpoint import FixedPoint
from secure.errors import Error
from secure.models.text import PACKAGED, compile_text_model, model_directory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Private transformer inference: the server never sees the input, "
    "the client never gets the weights (semi-honest parties).",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    if show:
        out.print(f"unseen {secure.__version__}")
        raise typer.Exit


out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Insecure = Annotated[bool, typer.Option("--insecure", help="Allow unencrypted channels that leave this machine.")]
Announce = Annotated[
    bool, typer.Option("--announce", help="Print the address as a JSON line once listening.", hidden=True)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More log lines.")]
Deadline = Annotated[float, typer.Option(min=1, help="Seconds to wait for any one message of the peer.")]
Model = Annotated[str, typer.Argument(help=f"A model directory, or {PACKAGED!r}.")]
Traces = Annotated[
    Path | None,
    typer.Option("--profile", metavar="DIRECTORY", help="Write what each query did when to a trace file there."),
]


def _threads(count: int) -> None:
    """How this process computes: its threads, and kernels that are compiled before the first query waits for them."""
    torch.set_num_threads(count or os.cpu_count() or 1)
    kernels.warm_up()


def _run(server: grpc.Server, address: Endpoint, what: str, announce: bool) -> None:
    def tell() -> None:
        _say(f"unseen {what}: listening on {address} (semi-honest: it is assumed to follow the protocol)")
        if announce:
            out.file.write(json.dumps({"listening": str(address)}) + "\n")
            out.file.flush()

    hosting.run_until_stopped(server, tell)


def _say(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


@app.command()
def dealer(
    listen: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:50052",
    threads: Threads = 1,
    insecure: Insecure = False,
    announce: Announce = False,
    verbose: Verbose = False,
) -> None:
    """Hand out correlated randomness; sees no input, no weight, no share. Must not collude with either party."""
    _threads(threads)
    hosting.settle()
    hosting.log_to_stderr(verbose)
    service = DealerService()
    server, address = hosting.start(
        Endpoint.parse(listen, what="--listen"),
        lambda s: add_DealerServicer_to_server(service, s),
        insecure=insecure,
        what="the dealer",
    )
    _run(server, address, "dealer", announce)


@app.command()
def serve(
    model: Model = PACKAGED,
    dealer: Annotated[str, typer.Option(help="The dealer's host:port.")] = "127.0.0.1:50052",
    listen: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:50051",
    length: Length = 128,
    embedding: Lookup = ONE_HOT,
    gelu: Form = BEST_GELU,
    approximations: Chosen = OURS,
    fraction_bits: Annotated[int, typer.Option(help="Fraction bits of activations.")] = FixedPoint().fraction_bits,
    deployment: Where = Deployment.TWO_PARTY,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="ckks: the client re-encrypts where the levels end.")
    ] = False,
    precision: Precision = 9.0,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file, one sentence a line, that widens the ranges.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Where the weight-mask seed is kept.")] = None,
    traces: Traces = None,
    deadline: Deadline = 60.0,
    threads: Threads = 1,
    insecure: Insecure = False,
    announce: Announce = False,
    verbose: Verbose = False,
) -> None:
    """Serve a model that nobody gets to see."""
    if deployment is Deployment.THREE_PARTY:
        raise Error("three parties serve a model together", "`unseen share-model`, then `unseen party` three times")
    _threads(threads)
    hosting.log_to_stderr(verbose)
    listening, dealing = Endpoint.parse(listen, what="--listen"), Endpoint.parse(dealer, what="--dealer")
    if deployment is Deployment.CKKS:
        if embedding is ONE_HOT:  # there is no other way of looking tokens up here, and it shows weights: by name alone
            raise Error("under ckks clients hold the token table", "--embedding client-table, if they may see it")
        listening.require_private(insecure=insecure, what="the server")
        more = read_texts(calibration, "--calibration", "sentence") if calibration else ()
        _say(f"unseen serve: packing {model} for {length} tokens ...")
        served = encrypted_hosting.compile_text(model, length, "refresh" if refresh else "pure", precision, more)
        where = state or state_directory()
        _say(f"unseen serve: {encrypted_hosting.described(served.encrypted)}")
        running, address = encrypted_hosting.serve(
            served, listening, where, workers=threads, insecure=insecure, deadline=deadline
        )
        _run(running, address, "serve --deployment ckks", announce)
        return
    listening.require_private(insecure=insecure, what="the server")  # these two before the model is compiled
    dealing.require_private(insecure=insecure, what="the dealer")
    fixed = FixedPoint(fraction_bits=fraction_bits)
    sentences = read_texts(calibration, "--calibration", "sentence") if calibration else ()
    model_directory(model)  # what can be seen to be wrong, before the model is compiled
    hosting.check(listening, dealing)
    directory = TraceDirectory(traces) if traces else None
    _say(f"unseen serve: compiling {model} for {length} tokens ...")
    form = (embedding.value, gelu.value, fixed, sentences)
    compiled, tokenizer, raw = compile_text_model(model, length, *form, approximations=approximations.value)
    ready = serve_ready(compiled, tokenizer, raw, state or state_directory())
    hosting.settle()  # from here on: what compiling took is given back
    service = InferenceService(ready, dealing, insecure=insecure, deadline=deadline, traces=directory)
    server, address = hosting.start(
        listening, lambda s: add_InferenceServicer_to_server(service, s), insecure=insecure, what="the server"
    )
    cost = compiled.program.cost
    _say(
        f"unseen serve: {model}, {length} tokens: {cost.rounds} rounds, "
        f"{mb(cost.to_first + cost.to_second)} online, {mb(cost.dealt)} offline a query; "
        f"Program {compiled.program.digest}"
    )
    _say(f"unseen serve: embedding {reports.embedding_price(compiled.program)}")
    _run(server, address, "serve", announce)


@app.command()
def embed(
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; none: one a line from standard input, which other users cannot see."),
    ] = None,
    server: Annotated[str, typer.Option(help="The server's host:port.")] = "127.0.0.1:50051",
    dealer: Annotated[str, typer.Option(help="The dealer's host:port.")] = "127.0.0.1:50052",
    parties: Annotated[str, typer.Option(help="three-party: host:port of parties 0, 1, 2, with commas.")] = PARTIES,
    compare_with: Annotated[
        str | None, typer.Option(help="Also run this model here, in the clear, and print how close the answers are.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print embeddings and costs as JSON.")] = False,
    program_digest: Annotated[str | None, typer.Option(help="Refuse a server with another Program.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep the once-per-model files.")] = True,
    deployment: Where = Deployment.TWO_PARTY,
    keys: Annotated[
        Path | None, typer.Option(help="ckks: keep the secret key in this directory, so that keys are uploaded once.")
    ] = None,
    traces: Traces = None,
    deadline: Deadline = 60.0,
    threads: Threads = 1,
    insecure: Insecure = False,
) -> None:
    """Embed texts that the server never sees."""
    _threads(threads)
    hosting.settle()
    typed = [] if texts or sys.stdin.isatty() else sys.stdin
    given = texts or [line.strip() for line in typed if line.strip()]
    if not given:
        raise Error("no text", "give texts as arguments, or one a line on standard input")
    if deployment is Deployment.CKKS:
        if compare_with or traces:
            raise Error("--compare-with and --profile are not for ckks", "`unseen accuracy` compares models")
        options = {"insecure": insecure, "deadline": deadline, "keys": keys, "program_digest": program_digest}
        where = cache_directory() if cache else None
        encrypted_hosting.embed(out, given, server, as_json=as_json, cache=where, **options)
        return
    if compare_with:
        model_directory(compare_with)  # a mistake in it shows before anything is sent
    if deployment is Deployment.THREE_PARTY:
        if traces:
            raise Error("--profile is for two parties", "`unseen profile --deployment three-party` predicts")
        connected = connect_three(
            parties.split(","), insecure=insecure, deadline=deadline, cache=cache, program_digest=program_digest
        )
        embed_three(out, given, connected, compare_with, as_json=as_json)
        return
    measured = Measurements(traces) if traces else None  # likewise
    with connect(
        server, dealer, insecure=insecure, deadline=deadline, cache=cache, program_digest=program_digest
    ) as connection:
        vectors: list[torch.Tensor] = []
        try:
            for vector in connection.embed_each(given):
                vectors.append(vector)
                if measured:
                    measured.add(connection)
        finally:  # answers that came before a failure are paid for, so they are shown
            done = given[: len(connection.reports)]
            if done and as_json:
                answers.as_json(out, done, vectors, connection)
            elif done:
                answers.report(out, done, vectors, connection, compare_with)
            if measured:
                measured.show(err if as_json else out, connection.program)
        if measured:
            measured.check()


app.command(name="party")(party_command)
app.command(name="share-model")(share_model_command)
app.command(name="profile")(profile_command)
app.command(name="compare")(compare_command)
app.command(name="train")(train_command)
app.command(name="accuracy")(accuracy_command)


@app.command()
def timeline(
    client: Annotated[Path, typer.Argument(help="The client's trace of a query, from embed --profile.")],
    server: Annotated[Path, typer.Argument(help="The server's trace of the same query, from serve --profile.")],
    output: Annotated[Path, typer.Option(help="The file to write, for Perfetto or chrome://tracing.")],
) -> None:
    """Put both parties' traces of a query on one time line."""
    out.print(merged([client, server], output), markup=False, soft_wrap=True)


@app.command()
def demo(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to embed; three of ours by default.")] = None,
    model: Annotated[str, typer.Option(help=f"A model directory, or {PACKAGED!r}.")] = PACKAGED,
    length: Length = 128,
    embedding: Lookup = ONE_HOT,
    gelu: Form = BEST_GELU,
    approximations: Chosen = OURS,
    traces: Traces = None,
    deployment: Where = Deployment.TWO_PARTY,
    digits: Annotated[
        bool, typer.Option("--digits", help="Train and serve a small vision transformer on scikit-learn's digits.")
    ] = False,
    layers: Annotated[int, typer.Option(min=1, max=4, help="Layers of that model.")] = 1,
    images: Annotated[int, typer.Option(min=1, max=360, help="Test images to ask it about.")] = 50,
) -> None:
    """Run dealer, server and client as three processes on this machine and embed a few sentences privately."""
    if digits:
        from parties.cli import demo_digits as on_digits

        on = on_digits.run_encrypted if deployment is Deployment.CKKS else on_digits.run
        raise typer.Exit(on(out, images, layers))
    if deployment is Deployment.CKKS:
        raise Error("the demo of the ckks deployment is the one on digits", "add --digits")
    chosen = texts or list(demonstration.SENTENCES)
    form = (embedding.value, gelu.value, approximations.value)
    if deployment is Deployment.THREE_PARTY:
        raise typer.Exit(demonstration.run_three(out, model, length, *form, chosen))
    raise typer.Exit(demonstration.run(out, model, length, *form, chosen, traces))


def app_main() -> None:
    """Entry point: errors that a user can cause end with a message and code 1."""
    try:
        app()
    except (Error, ValueError, ImportError, OSError) as error:
        first, *rest = str(error).splitlines() or [type(error).__name__]
        _say(f"unseen: error: {first}")
        for line in rest:
            _say(line)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    app_main()
