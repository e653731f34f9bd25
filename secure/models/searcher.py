"""The model of a private search: an encoder, scores against an index, the best of them, and what is said of these.

What the client learns of a passage stands in a *record*: the JSON list [id, number, start, end], and behind it the text
if the owner serves that, in UTF-8, padded with spaces to the width of all records. Two bytes are one number of the
table of records, (u - 2^15) / 2^14, which 14 fraction bits hold exactly. The protocol looks the table up at positions
that nobody learns, so that the client gets the records of what was found, and of nothing else.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure.errors import InvalidInput, printable
from secure.models import clusters as made_clusters
from secure.models.clusters import cluster_sizes
from secure.models.index import COSINE, MOST_PASSAGES, Index
from secure.models.passages import MAXIMUM_DOCUMENT, MAXIMUM_ID, Passage
from secure.models.sentence_encoder import SentenceEncoder
from secure.models.settings import EXACT
from secure.version import __version__

STEP = 64
"""Records are padded to a multiple of so many bytes: the width, which is public, tells no more of the longest."""

_MIDDLE, _SCALE = 1 << 15, 1 << EXACT


class Searcher(nn.Module):
    """The module that maps a question's tokens to the records of the ``top`` best passages, the best first.

    The result is (batch, top, width / 2) numbers of records; with ``scores`` {"records": that, "scores": (batch, top)}.
    Scores that are closer than some units of 2^-16 come in any order, as each is rounded by itself. Each segment of the
    index is a weight of its own, and so is the part of the table of records that belongs to it.

    clusters: the clusters of the index that are looked into, those whose means have the best scores; 0 for all rows.
    Which ones they are stays as secret as what is found. Clusters then have equally many rows: zeros fill them up,
    whose records are zeros too.
    """

    def __init__(
        self, encoder: SentenceEncoder, index: Index, *, top: int, texts: bool, scores: bool, clusters: int = 0
    ) -> None:
        super().__init__()
        self.encoder, self.top, self.with_scores, self.looked_into = encoder, top, scores, clusters
        self.normalize = index.similarity == COSINE and not encoder.normalized
        table, sizes = records_of(index.passages, texts=texts), list(index.segments)
        parts = list(zip(index.embeddings.split(sizes), table.split(sizes), strict=True))
        means, self.size = list[Tensor](), 1
        if clusters:
            inside = [cluster_sizes(size) for size in sizes]
            unit = index.similarity == COSINE
            means = [_means(rows, each, unit=unit) for (rows, _), each in zip(parts, inside, strict=True)]
            self.size = (
                made_clusters.CLUSTER
            )  # whatever the index is: a change of it changes no other segment's weights
            parts = [
                (_filled(rows, each, self.size), _filled(records, each, self.size))
                for (rows, records), each in zip(parts, inside, strict=True)
            ]
        names = [f"apart_{_tag(index, *part)}" for part in parts]
        self.rows = nn.ParameterDict({name: _fixed(rows) for name, (rows, _) in zip(names, parts, strict=True)})
        self.records = nn.ParameterDict(
            {name: _fixed(records) for name, (_, records) in zip(names, parts, strict=True)}
        )
        self.means = nn.ParameterDict({name: _fixed(mean) for name, mean in zip(names, means, strict=False)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        question = self._question(input_ids, attention_mask)
        scores = _scores(question, self.rows)
        if self.looked_into:
            scores, numbers = self._inside(scores, _scores(question, self.means).topk(self.looked_into).indices)
            best = scores.topk(self.top)
            at = numbers.gather(-1, best.indices)
        else:
            best = scores.topk(self.top)
            at = best.indices
        records = F.embedding(at, torch.cat(list(self.records.values())))
        return {"records": records, "scores": best.values} if self.with_scores else records

    def _question(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x: Tensor = self.encoder(input_ids, attention_mask)
        return F.normalize(x, dim=-1) if self.normalize else x

    def _inside(self, scores: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the rows of clusters, and the numbers of these rows: both (batch, clusters * size)."""
        whole = scores.reshape(scores.shape[0], -1, self.size)
        inside = whole.gather(-2, near.unsqueeze(-1).expand(-1, -1, self.size))
        numbers = near.unsqueeze(-1) * self.size + torch.arange(self.size)
        return inside.flatten(1), numbers.flatten(1)

    def scored(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of all rows, (batch, rows), and of clusters' means, (batch, clusters or none)."""
        question = self._question(input_ids, attention_mask)
        scores = _scores(question, self.rows)
        return scores, _scores(question, self.means) if self.looked_into else scores[:, :0]


def _scores(question: Tensor, rows: nn.ParameterDict) -> Tensor:
    return torch.cat([F.linear(question, each) for each in rows.values()], -1)


def _means(rows: Tensor, sizes: Sequence[int], *, unit: bool) -> Tensor:
    """Return the mean of each cluster, (clusters, width); unit: of length 1."""
    means = torch.stack([cluster.mean(0) for cluster in rows.split(list(sizes))])
    return F.normalize(means, dim=-1) if unit else means


def _filled(rows: Tensor, sizes: Sequence[int], size: int) -> Tensor:
    """Return (clusters * size, width): the rows of each cluster, and zeros up to ``size`` of them."""
    return torch.cat([F.pad(cluster, (0, 0, 0, size - len(cluster))) for cluster in rows.split(list(sizes))])


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=False)


def _tag(index: Index, rows: Tensor, records: Tensor) -> str:
    """Return a name of a segment's content, 32 hexadecimal digits: a MAC under the index's own key.

    So another content has another name, and nobody else can confirm a guess of it. See ``lowering.parts.part_of``.
    """
    made_of = (__version__, index.model_sha256, index.similarity, tuple(rows.shape), tuple(records.shape))
    content = b"".join(part.contiguous().numpy().tobytes() for part in (rows, records))
    return hmac.digest(bytes.fromhex(index.key), f"{made_of}/".encode() + content, "sha256").hex()[:32]


def records_of(passages: Sequence[Passage], *, texts: bool) -> Tensor:
    """Return the table of records, float32 (passages, width / 2). texts: the passages' texts are in it."""
    said = [[p.id, p.number, p.start, p.end, *([p.text] if texts else [])] for p in passages]
    encoded = [json.dumps(each, ensure_ascii=False, separators=(",", ":")).encode() for each in said]
    width = -(-max(map(len, encoded)) // STEP) * STEP
    whole = np.frombuffer(b"".join(each.ljust(width) for each in encoded), dtype="<u2").reshape(len(encoded), -1)
    return torch.from_numpy((whole.astype(np.float32) - _MIDDLE) / _SCALE)


def read_record(numbers: Tensor) -> dict[str, Any]:
    """Read a record, (width / 2) numbers: {"id", "passage", "start", "end"}, and "text" if it has one.

    It comes from a server's Program. Raises InvalidInput for anything else than a record.
    """
    found = (numbers.to(torch.float64) * _SCALE).round() + _MIDDLE
    if not bool(((found >= 0) & (found < 2 * _MIDDLE)).all()):
        raise no_record()
    try:
        said: Any = json.loads(found.to(torch.int32).numpy().astype("<u2").tobytes().decode())
    except (ValueError, RecursionError):
        raise no_record() from None
    if not isinstance(said, list) or len(said) not in (4, 5):
        raise no_record()
    name, numbered, *text = said[0], said[1:4], *said[4:]
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or not 0 < len(name.encode("utf-8", "replace")) <= MAXIMUM_ID
    ):
        raise no_record()
    for number, most in zip(numbered, (MOST_PASSAGES, MAXIMUM_DOCUMENT, MAXIMUM_DOCUMENT), strict=True):
        if type(number) is not int or not 0 <= number <= most:
            raise no_record()
    try:
        for each in (name, *text):
            each.encode()  # a lone half of a pair is no text
    except (AttributeError, UnicodeError):
        raise no_record() from None
    record = dict(zip(("id", "passage", "start", "end"), (name, *numbered), strict=True))
    return record | ({"text": text[0]} if text else {})


def shown(text: str) -> str:
    """Return the text of a passage for a terminal: its lines, without what cannot be printed."""
    return "\n".join(printable(line) for line in text.splitlines())


def no_record() -> InvalidInput:
    return InvalidInput("the answer is no passage of an index", "ask the server's owner")
