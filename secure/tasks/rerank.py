"""The task of reranking: a query and a document to a score of how well they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from secure.models.heads import RERANK
from secure.models.tokens import TRUNCATE
from secure.tasks.classify import scores_of
from secure.tasks.headed import Headed, Pair, is_pair
from secure.tasks.task import Served


@dataclass(frozen=True)
class Rerank(Headed[Pair, float]):
    """The task that maps a pair (query, document) to its score, as ``sentence_transformers.CrossEncoder`` gives it.

    By default the longer of both texts is cut, as there.
    """

    name: ClassVar[str] = RERANK
    noun: ClassVar[str] = "document"
    wanted: ClassVar[str] = "pairs of a query and a document"

    long: str = TRUNCATE

    def takes(self, given: Any) -> bool:
        return is_pair(given)

    def texts(self, given: Pair) -> tuple[str, str | None]:
        return given[0], given[1]

    def joined(
        self, answers: Sequence[Tensor], pieces: Sequence[Mapping[str, Tensor]], given: Pair, served: Served
    ) -> float:
        (found,) = answers
        return float(scores_of(served.settings, found.reshape(1)))


def ranked(scores: Sequence[float], documents: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return {"corpus_id", "score"} of each score, the greatest first; with "text" if ``documents`` are given."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    found: list[dict[str, Any]] = [{"corpus_id": i, "score": scores[i]} for i in order]
    if documents is None:
        return found
    return [{**each, "text": documents[each["corpus_id"]]} for each in found]
