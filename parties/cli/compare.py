"""The command ``unseen compare``: variants of a model side by side, and the cheapest that is accurate enough."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from parties.cli.console import OUT, say, use_threads, write
from parties.cli.options import Approximations, Embedding, Gelu, TextModelArgument, ThreadsOption, read_texts
from parties.services.hosting import settle
from parties.services.measure import measure_transport
from protocols import warm
from protocols.fixedpoint import FixedPoint
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments import compare as comparison
from secure.deployments.compare import (
    FIRST_DEPLOYMENT,
    FORMS,
    FRACTION_BITS,
    Outcome,
    Samples,
    Seconds,
    Variant,
    cheapest,
    comparable,
    projected,
    variants,
    waiting,
)
from secure.errors import InvalidInput, printable
from secure.lowering.client_inputs import GENERATE
from secure.models.calibration import HELD_OUT, SENTENCES
from secure.models.heads import task_named
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import PACKAGED, calibration_inputs, model_directory, text_inputs
from secure.models.tokens import TextTokenizer
from secure.mpc.network import LOOPBACK, NETWORKS, NetworkSpeed, find_network

LENGTH = 128
MARK = "*"
HEADINGS = {
    "length": "tokens",
    "embedding": "embedding",
    "gelu": "GeLU",
    "approximations": "approximations",
    "fraction_bits": "bits",
    "deployment": "deployment",
    "form": "form",
}


def compare(
    model: TextModelArgument = PACKAGED,
    length: Annotated[list[int] | None, typer.Option(min=3, help=f"Padded length; {LENGTH} by default.")] = None,
    embedding: Annotated[list[Embedding] | None, typer.Option(help="One-hot by default.")] = None,
    gelu: Annotated[list[Gelu] | None, typer.Option(help="Form of GeLU; all of them by default.")] = None,
    approximations: Annotated[
        list[Approximations] | None, typer.Option(help="Ours by default; PUMA's have a GeLU of their own.")
    ] = None,
    deployment: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(comparable())}; {FIRST_DEPLOYMENT} by default.")
    ] = None,
    fraction_bits: Annotated[
        list[int] | None, typer.Option(help=f"Fraction bits of activations; {FRACTION_BITS} by default.")
    ] = None,
    beside: Annotated[
        str | None, typer.Option(help="Its polynomial form, as `unseen train` wrote it; judged by the model's answers.")
    ] = None,
    accuracy: Annotated[float, typer.Option(min=-1, max=1, help="The lowest cosine that will do.")] = 0.9999,
    network: Annotated[
        str,
        typer.Option(
            help=f"Where it shall be cheap: {LOOPBACK}, {', '.join(n.key for n in NETWORKS)} or MBPS,MS. "
            "All are compiled for it."
        ),
    ] = "wan",
    texts: Annotated[
        Path | None, typer.Option(help="A text file, one text a line, to compare answers on, in place of ours.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Compare answers on so many texts at most.")] = None,
    time: Annotated[
        bool, typer.Option(help="Time this machine's kernels, for seconds with computation; a minute a variant.")
    ] = False,
    threads: ThreadsOption = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare variants of a model: cost, seconds and accuracy of each. Give an option again for one more value."""
    asked = find_network(network)
    key = asked.key if asked else LOOPBACK
    if asked is None and not time:
        raise InvalidInput("on loopback a query waits for computation alone", "give --time, or another --network")
    for bits in fraction_bits or ():
        FixedPoint(fraction_bits=bits)
    chosen = variants(
        length or [LENGTH],
        [e.value for e in embedding or [*Embedding][:1]],
        [g.value for g in gelu or Gelu],
        fraction_bits or [FRACTION_BITS],
        approximations=[a.value for a in approximations or [*Approximations][:1]],
        deployments=deployment or [FIRST_DEPLOYMENT],
        forms=FORMS if beside else FORMS[:1],
    )
    held_out = (read_texts(texts, "--texts", "text") if texts else HELD_OUT)[:count]
    directory = model_directory(model)
    if task_named(model) == GENERATE:
        raise InvalidInput(f"{model} writes text, and answers are compared by their cosine", "unseen profile counts it")
    use_threads(threads)
    outcomes: list[Outcome] = []
    try:
        for outcome in _outcomes(directory, model, chosen, held_out, _seconds(asked, time), key, beside):
            outcomes.append(outcome)
    finally:  # also what was found before an interruption
        if outcomes:
            best = cheapest(outcomes, accuracy, key)
            if as_json:
                write(json.dumps(document(outcomes, best, accuracy, key, time)) + "\n")
            else:
                _show(model, outcomes, best, accuracy, key, time)
    if all(o.problem for o in outcomes):
        raise InvalidInput("no variant of the model works", _first_line(outcomes[0].problem or ""))


def _outcomes(
    directory: Path,
    model: str,
    chosen: Sequence[Variant],
    texts: Sequence[str],
    seconds: Seconds,
    network: str,
    beside: str | None,
) -> Iterator[Outcome]:
    from secure.models.sentence_encoder import load_sentence_encoder

    say(f"unseen compare: loading {model} ...")
    encoder, tokenizer = load_sentence_encoder(directory), load_tokenizer(directory)

    def samples(length: int) -> Samples:
        if not 2 < length <= encoder.maximum_length:
            raise InvalidInput(f"the model takes no length of {length} tokens", f"3 to {encoder.maximum_length}")
        held_out = [_cut(tokenizer, text, length) for text in texts]
        if cut := sum(shorter for _, shorter in held_out):
            say(f"unseen compare: {cut} of {len(texts)} texts cut to {length} tokens")
        return Samples(calibration_inputs(tokenizer, length, SENTENCES), [inputs for inputs, _ in held_out])

    polynomial = load_sentence_encoder(model_directory(beside)) if beside else None
    labels = {"model": Path(model).name}
    found = comparison.compare(encoder, chosen, samples, seconds, network=network, labels=labels, polynomial=polynomial)
    for number, variant in enumerate(chosen, 1):
        say(f"unseen compare: {number} of {len(chosen)}: {variant.name} ...")
        yield next(found)


def _cut(tokenizer: TextTokenizer, text: str, length: int) -> tuple[dict[str, Tensor], bool]:
    """As many of a text's words as fit, and whether that is not all of them."""
    words = text.split()
    for kept in range(len(words), 0, -1):
        try:
            return text_inputs(tokenizer, " ".join(words[:kept]), length), kept < len(words)
        except ValueError:
            continue
    raise InvalidInput(f"a text has a first word of more than {length} tokens", "leave it out, or take a larger length")


def _seconds(asked: NetworkSpeed | None, timed: bool) -> Seconds:
    """On the usual networks and the one asked for."""
    networks = {n.key: n for n in (*NETWORKS, *([asked] if asked else ()))}
    if not timed:
        return waiting(networks.values())
    settle()
    say("unseen compare: timing messages on this machine ...")
    warm.warm_up()
    return projected({LOOPBACK: None, **networks}, measure_transport())


def document(
    outcomes: Sequence[Outcome], best: Outcome | None, accuracy: float, network: str, timed: bool
) -> dict[str, Any]:
    """The comparison for programs."""
    return {
        "variants": [_row(outcome, accuracy) for outcome in outcomes],
        "chosen": best.variant.name if best else None,
        "asked_accuracy": accuracy,
        "asked_network": network,
        "seconds_with_computation": timed,
    }


def _row(outcome: Outcome, accuracy: float) -> dict[str, Any]:
    cost = outcome.cost
    return {
        "name": outcome.variant.name,
        "settings": outcome.variant.settings,
        "rounds": cost and cost.rounds,
        "traffic": cost and cost.as_dict()["traffic"],
        "seconds": dict(outcome.seconds),
        "lowest_cosine": outcome.lowest_cosine,
        "meets": outcome.meets(accuracy),
        "problem": outcome.problem,
    }


def _show(
    model: str, outcomes: Sequence[Outcome], best: Outcome | None, accuracy: float, network: str, timed: bool
) -> None:
    OUT.print(table(model, outcomes, best))
    for outcome in outcomes:
        if outcome.problem:
            OUT.print(f"{outcome.variant.name}: {printable(outcome.problem)}", markup=False, soft_wrap=True)
    kind = "a query, with this machine's computation" if timed else "waiting for the network, without computation"
    OUT.print(f"seconds: {kind}; of latencies and bandwidths, not measured on a network")
    if best:
        seconds = best.seconds[network]
        said = f"{MARK} the cheapest on {network} with a lowest cosine of {accuracy:g} or more: {best.variant.name}"
        OUT.print(f"{said} ({seconds:.2f} s)", markup=False, soft_wrap=True)
        return
    OUT.print(f"none has a lowest cosine of {accuracy:g} or more", markup=False, soft_wrap=True)


def table(model: str, outcomes: Sequence[Outcome], best: Outcome | None) -> Table:
    """One row a variant. What all have in common is in the title, what tells them apart has columns."""
    words = [o.variant.words for o in outcomes]
    common = [word for setting, word in words[0].items() if all(w.get(setting) == word for w in words)]
    differing = [k for k in HEADINGS if len({o.variant.settings[k] for o in outcomes}) > 1]
    title = ", ".join([printable(model), *common])
    shown = Table(title=escape(title), title_justify="left", show_edge=False, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.padding = (0, 0, 0, 0)  # the box has a space between columns
    for heading in ("", *(HEADINGS[k] for k in differing)):
        shown.add_column(heading, overflow="fold")
    networks = list(next((o.seconds for o in outcomes if o.seconds), {}))
    places = [n.replace("-", "-\n").replace(LOOPBACK, "loop-\nback") for n in networks]
    columns = ["rounds", "MB on-\nline", "MB off-\nline", *(f"s on\n{place}" for place in places)]
    for heading in (*columns, "lowest\ncosine"):
        shown.add_column(heading, justify="right", overflow="fold")
    for outcome in outcomes:
        exact = outcome.variant.form == FORMS[0]
        own = (str(outcome.variant.settings[k]) if exact or k != "gelu" else "-" for k in differing)
        marked = (MARK, "bold") if outcome is best else ("", "")
        shown.add_row(marked[0], *own, *_cells(outcome, networks), style=marked[1])
    return shown


def _cells(outcome: Outcome, networks: Sequence[str]) -> list[str]:
    cost, cosine = outcome.cost, outcome.lowest_cosine
    if cost is None:
        return ["-"] * (4 + len(networks))
    sizes = (f"{size / 1e6:.1f}" for size in (cost.bytes(phase=phase) for phase in (ONLINE, OFFLINE)))
    times = (f"{outcome.seconds[n]:.2f}" for n in networks)
    return [str(cost.rounds), *sizes, *times, "-" if cosine is None else f"{cosine:.7f}"]


def _first_line(text: str) -> str:
    return printable(text.splitlines()[0]) if text else ""
