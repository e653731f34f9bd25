"""Measure how close a polynomial model is to its original, and its Program to its own floating point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protocols.fixedpoint import FixedPoint
from secure.deployments.compiled import insecure_in_process
from secure.deployments.generator import compile_generator
from secure.deployments.in_process import plain_reference
from secure.deployments.two_party import TwoParty
from secure.lowering.lower import Sample
from secure.models.sentence_encoder import SentenceEncoder
from secure.mpc.compile import MpcModel
from secure.polynomial.forms import Form, forms
from secure.session.session import Session
from secure.training.language import Perplexities, perplexities, run
from secure.training.sentences import Agreement, agreement_of, hidden_states


@dataclass(frozen=True)
class Computed:
    """The agreement of embeddings, computed in one way, with the original's and with the model's floating point.

    agreement: with the original's. lowest_own_cosine: to those that the model computes in floating point.
    """

    how: str
    agreement: Agreement
    lowest_own_cosine: float


@dataclass(frozen=True)
class Held:
    """The range that a module's polynomial allows, the range of arguments met, and its error to the exact function.

    For activations, whose polynomials allow everything, ``low`` and ``high`` are None, and the met range is that of
    |argument|. error: for inverse powers the largest relative error on the allowed range; for activations the root mean
    square of the fit.
    """

    path: str
    kind: str
    low: float | None
    high: float | None
    met_low: float
    met_high: float
    corrections: int
    error: float

    @property
    def used(self) -> float | None:
        """The share of the allowed range, in logarithms, that was met; above one if the range was left."""
        if self.low is None or self.high is None:
            return None
        edges = torch.tensor([self.low, self.high, self.met_low, self.met_high], dtype=torch.float64).log()
        middle, half = (edges[0] + edges[1]) / 2, (edges[1] - edges[0]) / 2
        return float((edges[2:] - middle).abs().max() / half)


@dataclass(frozen=True)
class Fidelity:
    """The fidelity of a polynomial model. ``layers``: relative root mean square error of each layer's hidden states."""

    ways: tuple[Computed, ...]
    layers: tuple[float, ...]
    ranges: tuple[Held, ...]

    @property
    def finite(self) -> bool:
        """True if the model answers all of these texts with numbers."""
        return all(math.isfinite(way.lowest_own_cosine) for way in self.ways)


def fidelity(
    model: SentenceEncoder,
    original: SentenceEncoder,
    compiled: MpcModel,
    inputs: Sequence[Sample],
    protocol: int,
    told: Callable[[str], None] = lambda _: None,
) -> Fidelity:
    """Measure a polynomial model in floating point, in fixed point and under the protocol.

    inputs: tokens padded to the compiled length, one sentence each. protocol: the number of inputs that run under the
    protocol too, with all parties in this process; none below 2. told: called with the name of each part as it begins.
    """
    told("floating point")
    apart, size = torch.zeros(()), torch.zeros(())
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for _, form in forms(model):
        form.watching = True
        form.seen.clear()
    with torch.no_grad():
        for x in inputs:
            (states, mine), (wanted_states, wanted) = hidden_states(model, x), hidden_states(original, x)
            mask = x["attention_mask"].to(mine.dtype).unsqueeze(-1)
            pairs = list(zip(states, wanted_states, strict=True))
            squares = torch.stack([((a - b).square() * mask).sum() for a, b in pairs])
            sizes = torch.stack([(b.square() * mask).sum() for _, b in pairs])
            apart, size = apart + squares, size + sizes
            ours.append(mine.double())
            theirs.append(wanted.double())
    ranges = tuple(_held(path, form) for path, form in forms(model) if form.seen)
    for _, form in forms(model):
        form.watching = False
        form.seen.clear()
    floating, wanted = torch.cat(ours), torch.cat(theirs)
    ways = [_computed("floating point", floating, floating, wanted)]
    told("fixed point")
    fixed = _unit([plain_reference(compiled, x) for x in inputs])
    ways.append(_computed("fixed point", fixed, floating, wanted))
    if protocol > 1:
        told(f"protocol, {protocol} sentences")
        with Session(TwoParty().insecure(compiled, None), pace=0.0) as session:
            asked = _unit([session.query(x) for x in inputs[:protocol]])
        ways.append(_computed("protocol", asked, floating, wanted))
    return Fidelity(tuple(ways), tuple((apart / size).sqrt().tolist()[1:]), ranges)


@dataclass(frozen=True)
class TextFidelity:
    """The fidelity of a polynomial language model.

    steps, same: the tokens that it wrote under the protocol, and how many of them its own floating point finds most
    likely behind the same text.
    """

    perplexities: Perplexities
    steps: int
    same: int
    ranges: tuple[Held, ...]

    @property
    def finite(self) -> bool:
        """True if the model answers all of these texts with numbers."""
        return math.isfinite(self.perplexities.model)


def written_fidelity(
    model: nn.Module,
    original: nn.Module,
    rows: Sequence[Tensor],
    protocol: int,
    fixed: FixedPoint | None = None,
    length: int = 32,
    told: Callable[[str], None] = lambda _: None,
) -> TextFidelity:
    """Measure a polynomial language model on rows of tokens, in floating point and under the protocol.

    protocol: the number of tokens to write under the protocol, with all parties in this process, behind the first half
    of ``length`` tokens of the first row; none for 0. told: as for ``fidelity``.
    """
    told("floating point")
    for _, form in forms(model):
        form.watching = True
        form.seen.clear()
    found = perplexities(model, original, rows)
    ranges = tuple(_held(path, form) for path, form in forms(model) if form.seen)
    for _, form in forms(model):
        form.watching = False
        form.seen.clear()
    if not protocol:
        return TextFidelity(found, 0, 0, ranges)
    told(f"protocol, {protocol} tokens")
    prompt = rows[0][: length // 2].tolist()
    compiled = compile_generator(model, prompt=length, capacity=length + protocol, fixed_point=fixed)
    with insecure_in_process(compiled) as session:
        ids = session.generate(prompt, protocol, ignore_end=True).complete().ids
    with torch.no_grad():
        scores, _ = run(model, {"input_ids": torch.tensor([[*prompt, *ids]])})
    own = scores[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    return TextFidelity(found, len(ids), sum(a == b for a, b in zip(ids, own, strict=True)), ranges)


def _unit(answers: Sequence[Tensor]) -> Tensor:
    return F.normalize(torch.cat(list(answers)).double(), dim=-1)


def _computed(how: str, found: Tensor, own: Tensor, wanted: Tensor) -> Computed:
    count = len(found)
    cosines = (found * own[:count]).sum(-1)
    return Computed(how, agreement_of(found, wanted[:count]), float(cosines.min()))


def _held(path: str, form: Form) -> Held:
    low, high = form.range_seen()
    return Held(
        path,
        form.kind,
        form.found.get("low"),
        form.found.get("high"),
        low,
        high,
        int(form.found.get("steps", 0)),
        form.error(),
    )
