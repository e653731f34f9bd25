"""The command ``unseen generate``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from parties.cli.asking import Printing, connection_of
from parties.cli.console import ERR, OUT, progress, say, write
from parties.reports.who_learns import who_learns
from secure.cost import passes
from secure.cost.traffic import OFFLINE, ONLINE, in_words, total
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.deployment import Deployment
from secure.errors import Error, InvalidInput
from secure.models.chat import CONTENT, ROLE
from secure.mpc.network import NETWORKS, NetworkSpeed, find_apart
from secure.session.generation import STOP, Generation, Sizes, hidden_steps
from secure.session.link import Report
from secure.session.session import Session
from secure.tasks.generate import Generate
from secure.units import in_units

VERB = Generate.name
TOKENS = 64


def generate(
    deployment: Deployment,
    connecting: Printing,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; none: standard input, which other users cannot see.")
    ] = None,
    input: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file that holds the prompt; -: standard input.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"The most tokens to write; {TOKENS} by default, or fewer where the server has no room for so many.",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text. May be given several times.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, which the model's chat template makes a text of.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="With --chat: the message of the system.")] = None,
    ignore_end: Annotated[
        bool, typer.Option("--ignore-end", help="Go on where the model ends its text, up to --max-new-tokens.")
    ] = False,
    hide_length: Annotated[
        bool,
        typer.Option(
            "--hide-length",
            help="Take --max-new-tokens steps (on ciphertexts, the capacity) whatever the text is, so that none shows.",
        ),
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            help="Draw tokens at this temperature, if the server takes one; 0: the most likely ones. It is secret.",
        ),
    ] = 0.0,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="DIRECTORY",
            help="A small public model with the same tokens, which guesses here what comes; one pass checks several "
            "guesses. The servers see how many agree.",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help=f"The network for which the price list names seconds: {', '.join(n.key for n in NETWORKS)}, or "
            "MBPS,ROUND_TRIP_MS."
        ),
    ] = None,
) -> None:
    """Continue a text that the servers never see, and print what comes as it comes."""
    if system is not None and not chat:
        raise InvalidInput("--system means nothing without --chat", "give both, or neither")
    asked = find_apart(network) if network is not None else None
    text = _prompt(prompt, input)
    given: Any = text
    if chat:
        given = [*([{ROLE: "system", CONTENT: system}] if system is not None else []), {ROLE: "user", CONTENT: text}]
    connection = connection_of(VERB, deployment, connecting)
    with ExitStack() as stack, ExitStack() as shown:
        told = shown.enter_context(progress(VERB))
        told(0, 0, "connecting")
        session = stack.enter_context(connection.open(told))
        stack.enter_context(connecting.receipted(session))
        Generate().fits(session.served)
        count = max_new_tokens or min(TOKENS, session.room)
        writing = session.generate(
            given,
            count,
            stop=stop or (),
            ignore_end=ignore_end,
            hide_length=hide_length,
            temperature=temperature,
            draft=draft,
        )
        for line in prices(deployment, session, asked, drafted=draft is not None):
            say(f"unseen {VERB}: {line}")
        if hide_length:
            say(f"unseen {VERB}: {hidden_steps(session.program.labels, count)} steps are taken, whatever the text is")
        told(0, 0, "the prompt")
        began, first = time.monotonic(), 0.0
        with _kept(writing, session, text, as_json=connecting.as_json):
            for piece in writing:
                if not first:
                    shown.close()  # the progress, before anything is printed
                    first = time.monotonic() - began
                if not connecting.as_json:
                    write(_on_terminal(piece) if OUT.is_terminal else piece)
        for line in summary(writing, session.reports, time.monotonic() - began, first):
            say(f"unseen {VERB}: {line}")
        if not connecting.as_json:
            table = bool(session.link.tables)
            ERR.print(who_learns(deployment, token_table=table, drafted=bool(writing.drafted)))


def _prompt(prompt: str | None, file: str | None) -> str:
    """Return the prompt: the argument, a file, or standard input, without the newline at its end."""
    if prompt is not None and file is not None:
        raise InvalidInput("--input and a prompt as an argument exclude each other", "leave one of them out")
    if prompt is not None:
        return prompt
    missing = InvalidInput("no prompt", "give it as an argument, by --input, or on standard input")
    if file is None and sys.stdin.isatty():
        raise missing
    try:
        text = sys.stdin.read() if file in (None, "-") else Path(str(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInput(f"--input: {file} cannot be read: {reason}", "a text file that holds the prompt") from None
    if file is None and not text:
        raise missing
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def _on_terminal(text: str) -> str:
    """Return a text without what a terminal would obey: a server chooses the tokens that it may be made of."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def prices(
    deployment: Deployment, session: Session, network: NetworkSpeed | None, *, drafted: bool = False
) -> Iterator[str]:
    """Say what a prompt and each token after it take, by the Programs' own costs, and with drafts a pass over them."""
    sizes = Sizes.of(session.sizes, session.program.labels)
    if deployment.stepwise:
        cost = deployment.price(session.program)
        online = total(cost.traffic, phase=ONLINE)
        away = (
            f", {cost.rounds * network.round_trip + online / network.bandwidth:.2f} s of waiting on {network.name}"
            if network
            else ""
        )
        yield f"each token of the prompt and behind it: {cost.rounds} rounds, {in_units(online)} online{away}"
        yield "the answers are the scores of all tokens, from which this client chooses"
        return
    assert isinstance(deployment, CircuitDeployment)  # no other writes text
    wanted = [(f"a prompt of up to {sizes.prompts[-1].length} tokens", sizes.prompts[-1])]
    wanted.append(("each token after it", sizes.step))
    if drafted and sizes.verify is not None:
        count = sizes.verify.length
        wanted.append((f"a pass over the last of these and {count - 1} guesses of the draft", sizes.verify))
    for what, size in wanted:
        program = session.program_of(size)
        cost, running = deployment.price(program), deployment.deployed(program).cost
        online, dealt = (total(cost.traffic, phase=phase) for phase in (ONLINE, OFFLINE))
        seconds = f", {network.seconds(running):.2f} s of waiting on {network.name}" if network else ""
        yield f"{what}: {cost.rounds} rounds, {in_units(online)} online, {in_units(dealt)} dealt before{seconds}"
        if length := passes.length_of(program):
            waiting = {f"waiting on {network.name}": network.seconds(running)} if network else {}
            yield from passes.in_words(length, cost.rounds, online, waiting)
            yield "the servers see how many guesses agree in each pass, which says much about the text"
    if len(sizes.prompts) > 1:
        lengths = ", ".join(str(size.length) for size in sizes.prompts)
        yield f"the servers see to which length the prompt is padded: {lengths} tokens"


def summary(writing: Generation, taken: Sequence[Report], seconds: float, first: float) -> Iterator[str]:
    """Say how a text ended, what it took, and what showed of it."""
    count, steps = len(writing.ids), len(taken)
    stepwise = taken[0].length == 1  # the prompt was read by steps
    ended = "at its end or at a stop" if writing.finish_reason == STOP else "at the most tokens that were wanted"
    rate = _rate(count, steps, seconds, first)
    if stepwise:
        rate = f", {count - 1} more in {seconds - first:.1f} s" if count > 1 else ""
    elif steps > count:
        ended += f", which {steps - count} more steps hid"
    yield f"{_counted(count, 'token')} in {seconds:.1f} s, the first after {first:.1f} s{rate}; ended {ended}"
    if writing.drafted:
        share = f"{writing.agreed} of {writing.drafted} guesses of the draft agreed"
        yield f"{share} ({writing.agreed / writing.drafted:.0%}); the servers saw how many in each pass"
    for phase, name in ((ONLINE, "online"), (OFFLINE, "dealt")):
        if said := in_words([each for report in taken for each in report.traffic], phase):
            yield f"{name}: {said}"
    if stepwise:
        yield f"the server saw {steps} steps, a token of the prompt or of the text each, and when each was"
        return
    took = _counted(steps, "step")
    yield f"the servers saw a prompt of up to {taken[0].length} tokens, {took}, and when each was"


def _rate(count: int, steps: int, seconds: float, first: float) -> str:
    """Say how fast tokens came behind the first. Hidden steps take as long as others; a pass gives several tokens."""
    made = max(count, steps)
    return f", {(made - 1) / (seconds - first):.3g} a second after the prompt" if made > 1 and seconds > first else ""


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


@contextmanager
def _kept(writing: Generation, session: Session, prompt: str, *, as_json: bool) -> Iterator[None]:
    """End what is printed well: as JSON all at once, and after a failure with a word on how to go on."""
    whole, failed = False, dict[str, str]()
    try:
        yield
        whole = True
    except Error as error:
        failed = {"error": str(error)}
        raise
    finally:
        if as_json and (whole or writing.ids):
            found: dict[str, Any] = {"prompt": prompt, "text": writing.text, "ids": writing.ids}
            found |= {"finish_reason": writing.finish_reason, "queries": [r.as_dict() for r in session.reports]}
            found |= {"drafted": writing.drafted, "agreed": writing.agreed} if writing.drafted else {}
            found |= failed
            write(json.dumps(found) + "\n")
        elif writing.text:
            write("\n")
        if writing.ids and not whole and not failed:  # an error says so itself
            said = f"{_counted(len(writing.ids), 'token')} of it; to go on, ask again with all of it behind the prompt"
            say(f"unseen {VERB}: {said}")
