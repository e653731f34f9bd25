"""The closeness of a compiled model's answers to those of the module from which it was made.

The self-test judges by it. What is compared follows from the answers: directions of vectors by their cosine; scores,
and labels and spans that are chosen by scores, by the error of these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secure.models.heads import revealed
from secure.models.settings import IDENTITY, LABEL, PROBABILITIES, SIGMOID, SPAN, TOKEN, TaskSettings


@dataclass(frozen=True, eq=False, repr=False)
class Compared:
    """Inputs of one padded length, a row each, and what a compiled model made of them. length: 0 if there is none."""

    inputs: Mapping[str, Tensor]
    found: Any
    length: int = 0


@dataclass(frozen=True)
class Judged:
    """The result of a comparison. words: it, for people, without a semicolon. length: of the answers at its worst."""

    accepted: bool
    words: str
    length: int = 0


class Closeness(ABC):
    """A measure of how close answers come. name: it is in ``--accept-NAME``, which sets what is accepted.

    default: what is accepted if nothing is set. moves: where ``--accept-NAME`` puts the bar, in hints.
    """

    name: ClassVar[str]
    default: ClassVar[float]
    moves: ClassVar[str]

    @abstractmethod
    def judge(self, module: nn.Module, answered: Sequence[Compared], accept: float) -> Judged:
        """Compare answers, of which there is at least one, with those of the module. NaN is never accepted."""


class Cosine(Closeness):
    """The lowest cosine of answers to the original's, of each row alone; of several outputs the lowest."""

    name: ClassVar[str] = "cosine"
    default: ClassVar[float] = 0.999
    moves: ClassVar[str] = "lowers the bar"

    def judge(self, module: nn.Module, answered: Sequence[Compared], accept: float) -> Judged:
        with torch.no_grad():
            lowest, length = min((_cosine(each.found, module(**each.inputs)), each.length) for each in answered)
        return Judged(lowest >= accept, f"lowest cosine to the original {lowest:.7f}", length)


COSINE = Cosine()


@dataclass(frozen=True)
class ScoreError(Closeness):
    """The largest error of scores (logits or probabilities), in parts of the spread of the original's.

    The spread is the distance of the greatest from the least of the original's scores, over all answers together. Where
    softmax or sigmoid makes probabilities of scores, it counts as 1 at least, elsewhere as the error that is accepted:
    a model that says nearly the same of everything is not held to the last digits.

    Of a label, a span or a token it is the least error of scores that explains the choice: half the distance, among the
    original's scores, of the original's choice from the one that was made. So it is 0 for the same choice, and small
    where two are as good as equal. It is infinite for what the original never chooses.

    settings: those of the task. The module's method ``scored`` gives its scores, (rows, ..., choices), and which of
    them count; the results of a module without it are scores that all count.
    """

    settings: TaskSettings

    name: ClassVar[str] = "error"
    default: ClassVar[float] = 0.05
    moves: ClassVar[str] = "raises the bar"

    def judge(self, module: nn.Module, answered: Sequence[Compared], accept: float) -> Judged:
        chosen, proper = self.settings.reveal in (LABEL, SPAN, TOKEN), self.settings.activation != IDENTITY
        errors, seen = list[Tensor](), list[Tensor]()
        for each in answered:
            scores, counted = self._scored(module, each.inputs)
            found = torch.as_tensor(each.found).double()
            wrong = _explaining(found, scores.masked_fill(~counted, -torch.inf)) if chosen else (found - scores).abs()
            errors.append(wrong[counted.any(-1) if chosen else counted].nan_to_num(torch.inf))
            seen.append(scores[counted])
        worst, length = max((float(each.max()), one.length) for each, one in zip(errors, answered, strict=True))
        spread = max(float(torch.cat(seen).max() - torch.cat(seen).min()), 1.0 if proper else accept)
        error = worst / spread
        parts = f"{error:.2g} of their spread ({spread:.3g})"
        if not chosen:
            return Judged(error <= accept, f"largest error of scores {parts}", length)
        every = torch.cat(errors)
        words = f"{int((every == 0).sum())} of {len(every)} {self.settings.reveal}s are the original's"
        said = f", others would be with scores wrong by {parts}" if error else ""
        return Judged(error <= accept, words + said, length)

    def _scored(self, module: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the original's scores in the form that answers have, and which of them count."""
        with torch.no_grad():
            scores, counted = module.scored(**inputs) if hasattr(module, "scored") else (module(**inputs), None)
        scores = scores.double()
        counted = torch.ones_like(scores, dtype=torch.bool) if counted is None else counted.bool().expand_as(scores)
        if self.settings.reveal == PROBABILITIES:
            return revealed(scores, self.settings), counted
        if self.settings.reveal == LABEL and self.settings.activation == SIGMOID:  # of each class, whether it holds
            return torch.stack([-scores, scores], -1), torch.stack([counted, counted], -1)
        return scores, counted


def _explaining(found: Tensor, scores: Tensor) -> Tensor:
    """Return the least errors of scores, (..., choices), that explain the choices ``found``, (...), their indices."""
    index = found.round()
    known = (index >= 0) & (index < scores.shape[-1])  # NaN is no choice either
    made = scores.gather(-1, torch.where(known, index, 0.0).long()[..., None])[..., 0]
    return torch.where(known, (scores.amax(-1) - made) / 2, torch.inf)


def _cosine(found: Any, wanted: Any) -> float:
    """Return the lowest cosine of a model's outputs to the module's, of each row alone; NaN counts as -1."""
    pairs = zip(_outputs(found), _outputs(wanted), strict=True)
    cosines = [torch.cosine_similarity(a.double().flatten(1), b.double().flatten(1), dim=-1).min() for a, b in pairs]
    return float(torch.stack(cosines).min().nan_to_num(-1.0))


def _outputs(result: Any) -> Sequence[Tensor]:
    return list(result.values()) if isinstance(result, Mapping) else [result]
