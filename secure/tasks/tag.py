"""The task of tagging: texts to the entities in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor

from secure.errors import InvalidInput
from secure.models.heads import TAG
from secure.models.pairs import FIRST
from secure.models.settings import LABEL
from secure.models.tokens import LONG
from secure.tasks.classify import label_of, scores_of
from secure.tasks.headed import Headed, tokens_of
from secure.tasks.task import Served

SIMPLE, NONE = AGGREGATIONS = ("simple", "none")
OUTSIDE = "O"  # the label of tokens that are no part of an entity

Entity = dict[str, Any]


@dataclass(frozen=True)
class Tag(Headed[str, list[Entity]]):
    """The task that maps a text to its entities, as transformers' token-classification pipeline does.

    aggregation: "simple" joins neighbouring tokens of one label (B- begins anew) to {"entity_group", "score", "word",
    "start", "end"}; "none" gives each token of an entity as {"entity", "score", "index", "word", "start", "end"}. start
    and end are characters of the text, and "word" is the text between them. The score is the probability of the label,
    of several tokens the mean; None where the server's owner reveals labels alone.

    long: "split" asks for pieces of a longer text, whose tokens are put together again; see ``Embed`` for what a server
    sees. Raises InvalidInput for another aggregation.
    """

    name: ClassVar[str] = TAG
    ways: ClassVar[tuple[str, ...]] = LONG

    aggregation: str = SIMPLE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation not in AGGREGATIONS:
            raise InvalidInput(f"no aggregation {self.aggregation!r}", f"one of {', '.join(AGGREGATIONS)}")

    def texts(self, given: str) -> tuple[str, str | None]:
        return given, None

    def joined(
        self, answers: Sequence[Tensor], pieces: Sequence[Mapping[str, Tensor]], given: str, served: Served
    ) -> list[Entity]:
        tokens = list[Entity]()
        for found, encoded in zip(answers, map(tokens_of, pieces), strict=True):
            for i, (label, score) in enumerate(_labelled(found, served)):
                if encoded.texts[i] == FIRST:
                    start, end = encoded.offsets[i]
                    token = {"entity": label, "score": score, "index": i, "word": given[start:end]}
                    tokens.append({**token, "start": start, "end": end})
        found_ = list(_grouped(tokens, given)) if self.aggregation == SIMPLE else tokens
        return [entity for entity in found_ if entity.get("entity", entity.get("entity_group")) != OUTSIDE]


def _labelled(found: Tensor, served: Served) -> Iterator[tuple[str, float | None]]:
    """Yield the label of each token, and its probability if that is known."""
    settings = served.settings
    if settings.reveal == LABEL:
        yield from ((label_of(settings, index), None) for index in found)
        return
    best = scores_of(settings, found).max(-1)
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield settings.labels[index], score


def _grouped(tokens: Sequence[Entity], text: str) -> Iterator[Entity]:
    """Join neighbouring tokens of one kind of entity, as "simple" does."""
    group = list[Entity]()
    for token in tokens:
        begins, kind = _kind(token["entity"])
        if group and (begins or kind != _kind(group[-1]["entity"])[1]):
            yield _one(group, text)
            group = []
        group.append(token)
    if group:
        yield _one(group, text)


def _kind(label: str) -> tuple[bool, str]:
    """Return whether a label always begins an entity, and of which kind that is."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label


def _one(group: Sequence[Entity], text: str) -> Entity:
    start, end = group[0]["start"], group[-1]["end"]
    scores = [token["score"] for token in group if token["score"] is not None]
    kind = group[0]["entity"].split("-", 1)[-1]
    found = {"entity_group": kind, "score": fmean(scores) if scores else None}
    return {**found, "word": text[start:end], "start": start, "end": end}
