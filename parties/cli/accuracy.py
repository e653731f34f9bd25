"""``unseen accuracy``: how close a model in polynomial form is to its original, and under the protocol to itself."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from parties.cli.console import ERR, OUT, say, use_threads
from parties.cli.options import MODEL, ThreadsOption, read_texts
from parties.cli.output import TABLE, FormatOption, OutputOption, checked_output, write_report
from parties.reports.tables import titled
from protocols.fixedpoint import FixedPoint
from secure.errors import InvalidInput
from secure.lowering.client_inputs import GENERATE
from secure.models.calibration import HELD_OUT, SENTENCES
from secure.models.heads import task_named
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import PACKAGED, calibration_inputs, model_directory, text_inputs
from secure.models.tokens import TextTokenizer
from secure.polynomial.forms import forms
from secure.training.fidelity import Computed, Fidelity, Held, TextFidelity

LENGTH = 32  # tokens of a sentence, if nothing else is asked for

WAYS = ("computed in", "sentences", "Spearman", "same nearest", "mean cosine", "lowest", "lowest to own float")
PERPLEXITIES = (
    *("tokens", "perplexity of the original", "of the model", "ratio", "same likeliest token", "divergence, nats"),
    "protocol: tokens as in own float",
)
WRITTEN = 32  # rows that the original writes, if no text is given
RANGES = ("module", "met", "allowed", "used (log)", "corrections", "error to exact")


def accuracy(
    model: Annotated[str, typer.Argument(help="A model directory that `unseen train` wrote.")],
    original: Annotated[str, typer.Option(help=f"The model that it was made of. {MODEL}.")] = PACKAGED,
    texts: Annotated[
        Path | None,
        typer.Option(help="Sentences or texts, one a line; by default 8 of ours, or what the original writes."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=3, help="Padded length in tokens; public.", show_default=str(LENGTH))
    ] = None,
    fraction_bits: Annotated[
        int | None, typer.Option(help="Fraction bits of activations.", show_default=str(FixedPoint().fraction_bits))
    ] = None,
    protocol: Annotated[
        int,
        typer.Option(min=0, help="How many of them to ask under the protocol as well; of a language model, tokens."),
    ] = 10,
    form: FormatOption = TABLE,
    output: OutputOption = None,
    threads: ThreadsOption = 0,
) -> None:
    """Compare a polynomial model with its original: in floating point, in fixed point, and under the protocol."""
    checked_output(output, form.value)
    use_threads(threads)
    given = read_texts(texts, "--texts", "sentence") if texts else []
    asked = {"--length": length is not None, "--fraction-bits": fraction_bits is not None}
    length = LENGTH if length is None else length
    fixed = FixedPoint() if fraction_bits is None else FixedPoint(fraction_bits=fraction_bits)
    both = model_directory(model), model_directory(original)
    found: Fidelity | TextFidelity
    if task_named(str(both[0])) == GENERATE:
        if task_named(str(both[1])) != GENERATE:
            raise InvalidInput(
                f"{model} writes text, and {original} does not", "--original is the model it was made of"
            )
        for name, is_given in asked.items():
            if is_given and not protocol:
                raise InvalidInput(f"{name} means nothing with --protocol 0", "leave it out, or --protocol")
        found = measured_texts(*both, given, protocol, fixed, length)
    else:
        found = measured(*both, given or list(HELD_OUT), length, protocol, fixed)
    about = {"length": length, "fraction_bits": fixed.fraction_bits}
    document = numbered(asdict(found) | {"model": Path(model).name, "original": Path(original).name} | about)
    if form.value == "table":
        show(found)
        return
    warn(found)
    if form.value == "json":
        write_report(json.dumps(document, indent=1, allow_nan=False) + "\n", output)
    else:
        write_report(_page(document, found), output)


def numbered(value: Any) -> Any:
    """For JSON, which knows no NaN: None in its place."""
    if isinstance(value, dict):
        return {k: numbered(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [numbered(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(found: Fidelity | TextFidelity) -> None:
    """Warn of ranges that were left: answers are wrong there, and nothing under the protocol would notice."""
    for held in found.ranges:
        if held.used is not None and not held.used <= 1:
            met = f"met {held.met_low:.3g} to {held.met_high:.3g}, made for {held.low:.3g} to {held.high:.3g}"
            ERR.print(f"unseen accuracy: warning: {held.path}: {met}; answers on such texts are wrong", soft_wrap=True)
    if not found.finite:
        ERR.print("unseen accuracy: warning: some of these texts are answered with what are no numbers", soft_wrap=True)


def measured(
    trained: Path, original: Path, texts: list[str], length: int, protocol: int, fixed: FixedPoint | None = None
) -> Fidelity:
    """Compiled for one padded length on the public sentences and a sample of the texts' kind."""
    from secure.models.sentence_encoder import load_sentence_encoder
    from secure.mpc.compile import compile
    from secure.training.fidelity import fidelity

    say("unseen accuracy: loading the models ...")
    model, teacher, tokenizer = load_sentence_encoder(trained), load_sentence_encoder(original), load_tokenizer(trained)
    if not any(forms(model)):
        raise InvalidInput(f"{trained} is not in polynomial form", "give a directory that `unseen train` wrote")
    length = length or min(LENGTH, model.maximum_length)
    if not 2 < length <= model.maximum_length:
        raise InvalidInput(f"the model takes no length of {length} tokens", f"3 to {model.maximum_length}")
    samples = calibration_inputs(tokenizer, length, SENTENCES)
    say("unseen accuracy: compiling ...")
    labels = {"model": trained.name, "length": str(length)}
    compiled = compile(
        model, samples[0], calibration=samples[1:], embedding="client-table", fixed_point=fixed, labels=labels
    )
    inputs = [x for text in texts if (x := cut(tokenizer, text, length)) is not None]
    return fidelity(
        model, teacher, compiled, inputs, min(protocol, len(inputs)), lambda line: say(f"unseen accuracy: {line} ...")
    )


def measured_texts(
    trained: Path,
    original: Path,
    texts: list[str],
    protocol: int,
    fixed: FixedPoint | None = None,
    length: int = LENGTH,
    row: int = 0,
) -> TextFidelity:
    """The same of a language model, on these texts, or on some that the original writes. row: tokens of a row."""
    from secure.models.causal import load_language_model
    from secure.training.fidelity import written_fidelity
    from secure.training.language import HELD_OUT_SEED, row_length, rows_of_texts, rows_written

    say("unseen accuracy: loading the models ...")
    model, teacher = load_language_model(trained), load_language_model(original)
    if not any(forms(model)):
        raise InvalidInput(f"{trained} is not in polynomial form", "give a directory that `unseen train` wrote")
    each = row_length(model, row)
    if texts:
        rows = rows_of_texts(load_tokenizer(trained), texts, each)
    else:
        rows = rows_written(teacher, WRITTEN, each, HELD_OUT_SEED)
    told = lambda line: say(f"unseen accuracy: {line} ...")  # noqa: E731
    return written_fidelity(model, teacher, rows, protocol, fixed, length, told)


def cut(tokenizer: TextTokenizer, text: str, length: int) -> dict[str, torch.Tensor] | None:
    """As many of a text's words as fit, as the model's arguments; None if not one does."""
    words = text.split()
    for kept in range(len(words), 0, -1):
        try:
            return text_inputs(tokenizer, " ".join(words[:kept]), length)
        except ValueError:
            continue
    return None


def show(found: Fidelity | TextFidelity) -> None:
    """As tables in the terminal. "used" of a range: in logarithms, from its middle."""
    warn(found)
    for title, heads, rows in _tables(found):
        OUT.print(titled(title, heads, [[str(cell) for cell in row] for row in rows]))


def _tables(found: Fidelity | TextFidelity) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    ranges = ("ranges of the polynomials", RANGES, [_range(held) for held in found.ranges])
    if isinstance(found, TextFidelity):
        p = found.perplexities
        own = f"{found.same} of {found.steps}" if found.steps else ""
        row = (p.tokens, *(f"{value:.4f}" for value in (p.original, p.model, p.ratio, p.same, p.divergence)), own)
        return [("against the original", PERPLEXITIES, [row]), ranges]
    layers = [(f"layer {i}", f"{error:.4f}") for i, error in enumerate(found.layers)]
    return [
        ("against the original", WAYS, [_way(way) for way in found.ways]),
        ("hidden states behind each layer", ("", "relative error"), layers),
        ranges,
    ]


def _way(way: Computed) -> tuple[str, ...]:
    a = way.agreement
    own = "" if way.how == "floating point" else f"{way.lowest_own_cosine:.7f}"
    figures = (a.spearman, a.nearest, a.mean_cosine, a.lowest_cosine)
    return (way.how, str(a.sentences), *(f"{value:.4f}" for value in figures), own)


def _range(held: Held) -> tuple[str, ...]:
    if held.used is None:
        return (held.path, f"up to {held.met_high:.3g}", "any", "", "", f"{held.error:.2g}")
    met, allowed = (f"{a:.3g} to {b:.3g}" for a, b in ((held.met_low, held.met_high), (held.low, held.high)))
    return (held.path, met, allowed, f"{held.used:.0%}", str(held.corrections), f"{held.error:.2g}")


def _page(document: dict[str, Any], found: Fidelity | TextFidelity) -> str:
    from parties.reports.html import bar_chart, escaped, page, table_html

    charts: list[dict[str, Any]] = []
    body = []
    layers = [] if isinstance(found, TextFidelity) else list(found.layers)
    names = [f"layer {i}" for i in range(len(layers))]
    pictures = [
        "",
        *([bar_chart(charts, names, {"hidden states": layers}, "relative error")] if layers else []),
        bar_chart(
            charts,
            [held.path for held in found.ranges if held.used is not None],
            {"met": [held.used for held in found.ranges if held.used is not None]},
            "share of the allowed range, in logarithms",
        ),
    ]
    for (title, heads, rows), picture in zip(_tables(found), pictures, strict=True):
        body.append(f"<h2>{escaped(title)}</h2>{picture}{table_html(heads, rows)}")
    return page(f"unseen accuracy: {document['model']} of {document['original']}", body, charts)
