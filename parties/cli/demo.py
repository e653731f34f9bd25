"""``unseen demo``: dealer, server and client as three processes on this machine, on real input."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from parties.net import hosting
from parties.traces.merge import merged
from parties.traces.trace_file import TraceDirectory
from secure.errors import Error

_COLOURS = ("blue", "green", "magenta")

SENTENCES = (
    "My doctor says the test results are not good.",
    "The patient has received bad news about her health.",
    "The stadium sold out within an hour of tickets going on sale.",
)


@contextmanager
def process(
    console: Console, name: str, colour: str, arguments: Sequence[str], module: str = "parties.cli"
) -> Iterator[str]:
    """Run ``unseen ARGUMENTS`` (or another module of ours) until the block ends; yields the address that it announces
    on its standard output.
    """
    command, environment = hosting.child(module, *arguments)
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
        try:
            address = ""
            for line in output:
                _echo(console, name, colour, line)
                if line.startswith("{"):
                    address = json.loads(line)["listening"]
                    break
            if not address:
                raise Error(f"the {name} did not start (exit code {child.wait()})", "see its output above")
            reader = threading.Thread(target=_echo_all, args=(console, name, colour, output), daemon=True)
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
    if not line.startswith("{"):
        console.print(f"[{colour}]{name:>7}[/] │ {escape(line.rstrip())}", highlight=False, soft_wrap=True)


def run(
    console: Console,
    model: str,
    length: int,
    embedding: str,
    gelu: str,
    approximations: str,
    texts: Sequence[str],
    traces: Path | None = None,
) -> int:
    """The client's exit code. ``traces``: where both parties leave theirs, and what they are together."""
    directory = TraceDirectory(traces).path if traces else None
    before = set(directory.iterdir()) if directory else set()
    profiling = ["--profile", str(directory)] if directory else []
    served = _served(length, embedding, gelu, approximations)
    code = _run(console, model, [*served, *profiling], [*texts, *profiling])
    # the server has ended by now, so its last trace is there too
    for path in sorted(set(directory.glob("client-*.json")) - before) if directory else ():
        name = path.name.removeprefix("client-")
        both = merged([path, path.with_name(f"server-{name}")], path.with_name(f"both-{name}"))
        console.print(both, markup=False, soft_wrap=True)
    return code


def _served(length: int, embedding: str, gelu: str, approximations: str) -> list[str]:
    return ["--length", str(length), "--embedding", embedding, "--gelu", gelu, "--approximations", approximations]


def _run(console: Console, model: str, serving: Sequence[str], asking: Sequence[str]) -> int:
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory(prefix="unseen-demo-"))
        dealer = stack.enter_context(
            process(console, "dealer", "magenta", ["dealer", "--listen", "127.0.0.1:0", "--threads", "1", "--announce"])
        )
        served = ["serve", model, "--dealer", dealer, "--listen", "127.0.0.1:0", *serving]
        served += ["--state", str(Path(state) / "server")]
        server = stack.enter_context(process(console, "server", "blue", [*served, "--threads", "1", "--announce"]))
        client = ["embed", *asking, "--server", server, "--dealer", dealer, "--compare-with", model, "--threads", "1"]
        console.rule("client")
        command, environment = hosting.child("parties.cli", *client, "--no-cache")
        return subprocess.call(command, env=environment, stdin=subprocess.DEVNULL)


def run_three(
    console: Console,
    model: str,
    length: int,
    embedding: str,
    gelu: str,
    approximations: str,
    texts: Sequence[str],
) -> int:
    """A model shared among three parties, each a process, and a client; the client's exit code."""
    with ExitStack() as stack:
        shares = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unseen-demo-")))
        command, environment = hosting.child("parties.cli", "share-model", model, "--output", str(shares))
        code = subprocess.call([*command, *_served(length, embedding, gelu, approximations)], env=environment)
        if code:
            return code

        def party(number: int, *options: str) -> str:
            arguments = ["party", "--id", str(number), "--share", str(shares / f"party-{number}"), *options]
            arguments += ["--listen", "127.0.0.1:0", "--threads", "1", "--announce"]
            return stack.enter_context(process(console, f"party {number}", _COLOURS[number], arguments))

        two = party(2)
        zero = party(0, "--party-2", two)
        one = party(1, "--party-0", zero, "--party-2", two)
        client = ["embed", *texts, "--deployment", "three-party", "--parties", f"{zero},{one},{two}"]
        console.rule("client")
        command, environment = hosting.child("parties.cli", *client, "--compare-with", model, "--no-cache")
        return subprocess.call(command, env=environment, stdin=subprocess.DEVNULL)
