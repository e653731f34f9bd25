"""``unseen demo``: everybody who takes part as a process of its own on this machine, on real input."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from parties import deployments
from parties.cli.config import PREFIX
from parties.cli.console import OUT, announced, progress
from parties.cli.options import (
    MODEL,
    ApproximationsOption,
    EmbeddingOption,
    FractionBitsOption,
    GeluOption,
    LengthOption,
    TraceOption,
    arguments,
    compile_options,
    require_traces,
)
from parties.net.caller import CLIENT
from parties.reports.answers import lines
from parties.services import hosting
from parties.tls.authority import Authority
from parties.tls.naming import dashed
from parties.tls.tls import Tls
from parties.traces.merge import merged
from parties.traces.trace_file import TraceDirectory
from secure.cost.traffic import ONCE, in_words
from secure.deployments.deployment import COMPILE, CONNECT, Deployment
from secure.errors import Error, InvalidInput
from secure.lowering.client_inputs import MAXIMUM_BATCH
from secure.models.digits import load_digits
from secure.models.settings import PASSAGES
from secure.models.text import PACKAGED
from secure.tasks.digits import NAME, Digits

SENTENCES = (
    "My doctor says the test results are not good.",
    "The patient has received bad news about her health.",
    "The stadium sold out within an hour of tickets going on sale.",
)
IMAGES, SHOWN = 50, 3  # test images that are asked about, and how many are drawn
WANTED = 0.95  # of the answers
_COLOURS = ("magenta", "blue", "green", "cyan")


def demo(
    deployment: Deployment,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to embed, three of ours by default; with --documents questions, at least one."),
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"{MODEL}, which is the default.")] = None,
    length: LengthOption = None,
    embedding: EmbeddingOption = None,
    gelu: GeluOption = None,
    approximations: ApproximationsOption = None,
    fraction_bits: FractionBitsOption = None,
    trace: TraceOption = None,
    documents: Annotated[
        Path | None,
        typer.Option(metavar="FILE|DIRECTORY", help="Index these documents, serve the index, and search it privately."),
    ] = None,
    digits: Annotated[
        bool, typer.Option("--digits", help="Train and serve a small vision transformer on scikit-learn's digits.")
    ] = False,
    layers: Annotated[int | None, typer.Option(min=1, max=4, help="Layers of that model; 1 by default.")] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAXIMUM_BATCH,
            help=f"Test images to ask it about, again and again if they are more than 360; {IMAGES} by default.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=MAXIMUM_BATCH, help="Images of one query; all --images are that many then.")
    ] = None,
) -> None:
    """Run everybody who takes part as processes on this machine, and embed a few sentences privately, or search."""
    given: dict[str, Any] = {
        "embedding": embedding,
        "gelu": gelu,
        "approximations": approximations,
        "fraction_bits": fraction_bits,
    }
    compile_options(deployment, **given)  # what means nothing is refused
    if trace is not None:
        require_traces(deployment)
    of_texts: dict[str, Any] = {
        "TEXTS": texts,
        "--model": model,
        "--length": length,
        **{f"--{n}": v for n, v in given.items()},
    }
    of_texts |= {"--trace": trace, "--documents": documents}
    of_images = {"--layers": layers, "--images": images, "--batch": batch}
    for name, value in (of_texts if digits else of_images).items():
        if value:
            raise InvalidInput(
                f"{name.replace('_', '-')} means nothing in the demo of {'digits' if digits else 'texts'}"
            )
    compiling = [f"--{n.replace('_', '-')}={v}" for n, v in (*given.items(), ("length", length)) if v is not None]
    compiling += arguments(deployment, (COMPILE,))[2:]
    if digits:
        named = NAME if layers in (None, 1) else f"{NAME}-{layers}"
        compiling += [] if batch is None else [f"--batch={batch}"]
        with hosted(OUT, deployment, [named, *compiling]) as (located, tls):
            raise typer.Exit(ask_digits(OUT, located, images or batch or IMAGES, tls))
    if model is None and not deployment.runs_packaged:
        raise InvalidInput(
            f"{PACKAGED} does not run under {deployment.name} as it is", "add --digits, or --model and its directory"
        )
    model = model or PACKAGED
    if documents is not None:
        if not texts:
            raise InvalidInput(
                "--documents without a question", 'such as: unseen demo --documents docs "How do I start?"'
            )
        with indexed(documents, model) as index:
            serving = [model, "--index", str(index), "--reveal", PASSAGES, *compiling]
            raise typer.Exit(ask_texts(OUT, deployment, serving, ["search", "--passages", "--top", "3"], texts, trace))
    asking = ["embed", "--compare-with", model]
    raise typer.Exit(ask_texts(OUT, deployment, [model, *compiling], asking, texts or SENTENCES, trace))


@contextmanager
def indexed(documents: Path, model: str) -> Iterator[Path]:
    """Make an index of documents, as their owner would; it is deleted when the block ends."""
    with tempfile.TemporaryDirectory(prefix="unseen-demo-") as made:
        index = Path(made) / "index"
        _owner("index", str(documents), "--output", str(index), "--model", model)
        yield index


def _owner(*line: str) -> None:
    """Run ``unseen LINE``, the owner's part, to its end."""
    command, environment = unset(*line)
    if code := subprocess.call(command, env=environment, stdin=subprocess.DEVNULL):
        raise Error(f"the owner's part failed (exit code {code})", "see its output above")


@contextmanager
def hosted(
    console: Console, deployment: Deployment, compiling: Sequence[str], *, serving: Sequence[str] = ()
) -> Iterator[tuple[Deployment, Path]]:
    """Everybody but the client, each a process, until the block ends; yields the deployment and the client's network.

    They use TLS, as they would across machines, with certificates that are made for this run and deleted after it.

    compiling: the model and how it is compiled, as arguments. serving: more of them for the role that serves it.
    """
    found = deployments.hosted(deployment)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unseen-demo-")))
        if first := found.owner(compiling, directory):
            _owner(*first)
        authority = Authority.make(directory / "certificates", days=1)
        client = authority.issue(CLIENT, CLIENT, days=1)
        addresses: dict[str, str] = {}
        for number, role in enumerate(deployments.starting_order(deployment)):
            peers = {name: addresses[name] for name in role.peers}
            more = serving if role.name == deployment.serves else ()
            command_line = [*found.command(role.name, compiling, directory, peers), *more]
            command_line += ["--listen", "127.0.0.1:0", "--announce"]
            command_line += ["--tls", str(authority.issue(role.name, dashed(role.name), days=1))]
            started = process(console, role.name, _COLOURS[number % len(_COLOURS)], command_line)
            addresses[role.name] = stack.enter_context(started)
        console.rule("client")
        yield deployment.located(addresses), client


def unset(*line: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment that run ``unseen LINE`` by itself: no settings of the user's services."""
    command, environment = hosting.child("parties.cli", *line)
    kept = {name: value for name, value in environment.items() if not name.startswith(f"{PREFIX}_")}
    return command, {**kept, f"{PREFIX}_CONFIG": os.devnull}


@contextmanager
def process(console: Console, name: str, colour: str, line: Sequence[str]) -> Iterator[str]:
    """Run ``unseen LINE`` until the block ends; yields the address that it announces on its standard output."""
    command, environment = unset(*line)
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout as output:
        reader = threading.Thread(target=_echo_all, args=(console, name, colour, output), daemon=True)
        address: str | None = None
        try:
            for said in output:
                if address := announced(said):
                    break
                _echo(console, name, colour, said)
            if not address:
                raise Error(f"the {name} did not start (exit code {child.wait()})", "see its output above")
            reader.start()
            yield address
        finally:
            child.terminate()
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if address:
                reader.join()


def _echo_all(console: Console, name: str, colour: str, lines: Iterable[str]) -> None:
    for line in lines:
        _echo(console, name, colour, line)


def _echo(console: Console, name: str, colour: str, line: str) -> None:
    console.print(f"[{colour}]{name:>7}[/] │ {escape(line.rstrip())}", highlight=False, soft_wrap=True)


# texts


def ask_texts(
    console: Console,
    deployment: Deployment,
    compiling: Sequence[str],
    asking: Sequence[str],
    texts: Sequence[str],
    trace: Path | None,
) -> int:
    """Return the exit code of the client, a process too.

    compiling: the model and how it is compiled. asking: the client's command, and how it asks. trace: where both
    parties leave theirs, put together.
    """
    directory = TraceDirectory(trace).path if trace else None
    before = set(directory.iterdir()) if directory else set()
    tracing = ["--trace", str(directory)] if directory else []
    with hosted(console, deployment, compiling, serving=tracing) as (located, tls):
        where = [*arguments(located, (CONNECT,)), "--tls", str(tls), "--no-cache"]
        command, environment = unset(*asking, *where, *tracing, "--", *texts)
        code = subprocess.call(command, env=environment, stdin=subprocess.DEVNULL)
    # the server has ended by now, so its last trace is there too
    for path in sorted(set(directory.glob("client-*.json")) - before) if directory else ():
        name = path.name.removeprefix("client-")
        both = merged([path, path.with_name(f"server-{name}")], path.with_name(f"both-{name}"))
        console.print(both, markup=False, soft_wrap=True)
    return code


# images


def ask_digits(console: Console, deployment: Deployment, count: int, tls: Path) -> int:
    """Ask about test images from this process. tls: the client's certificates.

    The exit code: 1 if fewer than ``WANTED`` of the answers are right.
    """
    hosting.settle()
    images, labels = load_digits().test
    taken = torch.arange(count) % len(images)
    images, labels = images[taken], labels[taken]
    right = 0
    with (
        progress("demo") as told,
        deployments.connect(deployment, network=Tls(tls), cache=False, told=told) as session,
    ):
        if once := in_words(session.once, ONCE):
            console.print(f"once: {once}", highlight=False, soft_wrap=True)
        for number, answer in enumerate(session.run(Digits(), list(images))):
            right += answer == int(labels[number])
            if number < SHOWN:
                console.print(drawn(images[number]), highlight=False, markup=False)
                console.print(f"is a {answer} (label {int(labels[number])})", highlight=False)
        reports = session.reports[1:] or session.reports  # the first one warms up
        together = min(session.batch, count)
    seconds = statistics.median(report.online_seconds for report in reports)
    each = f"online {seconds / together:.3f} s an image"
    each += f" ({seconds:.1f} s for {together} of them)" if together > 1 else ""
    console.print(f"{right} of {count} right; {each}; the last query:", highlight=False)
    for line in lines(reports[-1]):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    return 0 if right >= WANTED * count else 1


def drawn(image: Tensor) -> str:
    """An image of a digit in characters."""
    shades = " .:-=+*#@"
    rows = (image.reshape(8, 8) * (len(shades) - 1)).round().int().tolist()
    return "\n".join("".join(shades[v] * 2 for v in row) for row in rows)
