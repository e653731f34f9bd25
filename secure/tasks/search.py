"""The task of private search: questions to the passages of an index that answer them best."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secure.errors import InvalidInput
from secure.lowering.client_inputs import SETTINGS, TASK
from secure.models.clusters import cluster_sizes
from secure.models.heads import REVEALED, SEARCH
from secure.models.index import QUESTION, Index, prompt_for, read_index
from secure.models.searcher import Searcher, no_record, read_record
from secure.models.settings import IDENTITY, PASSAGES, PASSAGES_SCORES, SCORED, TaskSettings
from secure.models.text import (
    TextModel,
    held_out_inputs,
    load_text_model,
    model_files,
    text_inputs,
    text_samples,
)
from secure.models.tokens import REFUSE, TRUNCATE
from secure.operations.choices import TOLERANCE
from secure.progress import Told, silent
from secure.tasks.closeness import Closeness, Compared, Judged
from secure.tasks.embed import Embed
from secure.tasks.task import Loaded, Served, Task

TOP = 10
"""The passages that an answer has by default."""

MOST_TOP = 128
"""The most of them: the protocol finds so many of a long row."""

QUESTION_LENGTH = 32
"""Tokens to which questions are padded by default. They are short, and a query costs in proportion."""

CALIBRATED, TESTED = 8, 2  # passages that calibrate a search, and that test it

Found = list[dict[str, Any]]


@dataclass(frozen=True)
class Search(Task[str, Found]):
    """The task that maps a question to the passages of the server's index that answer it best, the best first.

    Each is {"id": of the document, "passage": its number there, "start", "end": its characters, "score"}, and "text"
    where the server's owner serves passages. The score is the cosine of the passage's embedding and the question's, or
    their product where the model says so; None where the owner does not reveal it.

    top: so many of them, at most as many as the server finds; None for all that it finds. passages: refuse a server
    that gives no texts. long: "refuse" or "truncate" a question that is too long. prompt: the name of the model's
    prompt that goes before questions; by default "query" if there is one, else the model's own default.

    Of a search that is loaded, index is its directory, ``found`` how many passages an answer has (0 for TOP, or all of
    a smaller index), and reveal what clients learn: one of ``REVEALED[SEARCH]``, "" for the least. clusters: how many
    clusters of the index a query looks into, 0 for all of it.
    """

    name: ClassVar[str] = SEARCH
    noun: ClassVar[str] = "question"
    steady: ClassVar[bool] = False

    top: int | None = None
    passages: bool = False
    long: str = REFUSE
    prompt: str | None = None
    index: str = ""
    found: int = 0
    reveal: str = ""
    clusters: int = 0

    def __post_init__(self) -> None:
        if self.long not in (REFUSE, TRUNCATE):
            raise InvalidInput(f"long questions are not taken by {self.long!r}", f"{REFUSE} or {TRUNCATE}")
        if self.top is not None and self.top < 1:
            raise InvalidInput(f"the {self.top} best passages", "at least 1, or None for all that the server finds")

    def load(self, model: str, length: int = 0, sentences: Sequence[str] = (), told: Told = silent) -> Loaded:
        known = REVEALED[SEARCH]
        if (reveal := self.reveal or known[0]) not in known:
            raise InvalidInput(f"a search reveals no {reveal}", f"one of {', '.join(known)}")
        if not self.index:
            raise InvalidInput("a search without an index", "--index DIRECTORY, which unseen index makes")
        told(0, 0, "reading the index")
        index = read_index(Path(self.index), model)
        rows = len(index.passages)
        found = self.found or min(TOP, rows)
        if not 1 <= found <= min(rows, MOST_TOP):
            few = f"the index has {rows} passages" if rows < MOST_TOP else f"{MOST_TOP} at most are found"
            raise InvalidInput(f"the {found} best passages: {few}", f"--top {min(rows, MOST_TOP)} at most")
        within = clusters_within(self.clusters, index, found)
        told(0, 0, "loading the model")
        text = load_text_model(model)
        length = length or min(QUESTION_LENGTH, text.maximum_length)
        settings = TaskSettings(reveal, activation=IDENTITY, top=found, clusters=within)
        searcher = Searcher(
            text.module,  # type: ignore[arg-type]  # as load_text_model makes it
            index,
            top=found,
            texts=reveal in (PASSAGES, PASSAGES_SCORES),
            scores=reveal in SCORED,
            clusters=self.clusters,
        ).eval()
        calibrating, testing = _chosen(index, CALIBRATED, TESTED)
        parts = len(index.segments)
        about = f"index: {rows:,} passages of {len(index.names):,} documents in {parts} segment{'s' * (parts > 1)}"
        if within:
            about += f"; {within[0]} of {within[1]} clusters are looked into: passages in others are not found"
        return Loaded(
            text.name,
            searcher,
            _samples(text, length, sentences, calibrating),
            text.tokenizer,
            text.tokenizer_json,
            length,
            about="; ".join((*text.about, about)),
            samples_at=lambda other: _samples(text, other, sentences, calibrating),
            labels={**text.prompts.labels(), TASK: SEARCH, SETTINGS: settings.encoded},
            held_out=lambda other: [*held_out_inputs(text, other), *_inputs(text, other, testing)],
            closeness=SameFound(searcher),
            exact=True,
        )

    def files(self, model: str) -> Iterable[Path]:
        return model_files(model)

    def fits(self, served: Served) -> None:
        super().fits(served)
        if served.task != self.name:
            raise InvalidInput("this server has no index to search", "ask another server: unseen serve --index")

    def check(self, given: Sequence[str], served: Served) -> None:
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise InvalidInput("search takes a list of questions", 'for example search(["What is it?"])')
        if served.tokenizer is None:
            raise InvalidInput("this server's model takes no text", "ask another server")
        if self.top is not None and self.top > served.settings.top:
            raise InvalidInput(
                f"the {self.top} best passages: this server finds {served.settings.top}",
                "ask for fewer (top; --top of a command), or leave it out",
            )
        if self.passages and served.settings.reveal not in (PASSAGES, PASSAGES_SCORES):
            raise InvalidInput(
                "this server reveals the ids of passages, and not their texts",
                "leave --passages out; its owner may serve them with --reveal passages",
            )
        self._embed(served).check(given, served)

    def _embed(self, served: Served) -> Embed:
        """Return the task that makes the tokens of a question."""
        if self.prompt is not None:
            return Embed(self.long, self.prompt)
        return Embed(self.long, next((name for name in QUESTION if name in served.prompts.texts), None))

    def inputs(self, given: str, served: Served) -> Mapping[str, Tensor]:
        return self._embed(served).inputs(given, served)

    def fitted(self, inputs: Mapping[str, Tensor], length: int) -> Mapping[str, Tensor] | None:
        return Embed().fitted(inputs, length)

    def answer(self, result: Any) -> Any:
        records, scores = (result["records"], result["scores"]) if isinstance(result, Mapping) else (result, None)
        return records[0], None if scores is None else scores[0]

    def joined(
        self, answers: Sequence[Any], pieces: Sequence[Mapping[str, Tensor]], given: str, served: Served
    ) -> Found:
        ((records, scores),) = answers
        values = [None] * len(records) if scores is None else scores.tolist()
        if len(records) != served.settings.top:
            raise no_record()
        filled = bool(served.settings.clusters)
        kept = [(each, score) for each, score in zip(records, values, strict=True) if not filled or bool(each.any())]
        return [{**read_record(each), "score": score} for each, score in kept][: self.top]


def clusters_within(clusters: int, index: Index, found: int) -> tuple[int, ...]:
    """Return how many clusters a query looks into, and how many there are; nothing for 0, which stands for all rows.

    Raises InvalidInput for more clusters than there are, more than the protocol chooses, and too few passages in them.
    """
    if not clusters:
        return ()
    sizes = sorted(size for segment in index.segments for size in cluster_sizes(segment))
    if not 1 <= clusters <= MOST_TOP or clusters >= len(sizes):
        most = min(len(sizes) - 1, MOST_TOP)
        raise InvalidInput(
            f"--clusters {clusters}: the index has {len(sizes)} clusters of {sizes[-1]} passages at most",
            f"{most} at most, or leave it out to look at all passages" if most else "leave it out",
        )
    if sum(sizes[:clusters]) < found:
        raise InvalidInput(
            f"--clusters {clusters}: the {found} best passages of as few as {sum(sizes[:clusters])}",
            "look into more clusters, or find fewer (--top)",
        )
    return clusters, len(sizes)


def _chosen(index: Index, many: int, more: int) -> tuple[list[str], list[str]]:
    """Return passages that calibrate, and others that test: those whose texts have the least digests.

    So an update hardly ever chooses others, and leaves the ranges of the model as they are.
    """
    texts = sorted({each.text for each in index.passages}, key=lambda text: hashlib.sha256(text.encode()).digest())
    return texts[:many], texts[many : many + more]


def _inputs(text: TextModel, length: int, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    prompt = prompt_for(text.prompts, QUESTION)
    return [text_inputs(text.tokenizer, prompt + each, length, TRUNCATE) for each in texts]


def _samples(
    text: TextModel, length: int, sentences: Sequence[str], passages: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Make calibration inputs: those of texts, and passages of the index, whose scores are the greatest."""
    return [*text_samples(text, length, sentences), *_inputs(text, length, passages)]


NO_PASSAGE = -1
"""The row of a record of zeros, which fills up a cluster."""


@dataclass(frozen=True, eq=False)
class SameFound(Closeness):
    """The least error of scores that explains what was found, in parts of the spread of the original's scores.

    At each rank it is half the distance, among the original's scores, of the passage that was found from the one that
    belongs there. So it is 0 for the same passage, and small where two are as good as equal. It is infinite for what is
    no record of the index, and for one that is found twice. Scores that are revealed are judged by the records beside
    them. Where clusters are looked into, either of two whose scores are as good as equal may be; a passage of a third
    one has an infinite error, and so have passages of more clusters than are looked into.
    """

    searcher: Searcher
    rows: dict[bytes, int] = field(default_factory=dict)

    name: ClassVar[str] = "error"
    default: ClassVar[float] = 0.005
    moves: ClassVar[str] = "raises the bar"

    def judge(self, module: nn.Module, answered: Sequence[Compared], accept: float) -> Judged:
        if not self.rows:
            table = torch.cat(list(self.searcher.records.values()))
            self.rows.update({row.numpy().tobytes(): number for number, row in enumerate(table) if bool(row.any())})
            self.rows[torch.zeros_like(table[0]).numpy().tobytes()] = NO_PASSAGE
        with torch.no_grad():
            inputs = [[each.inputs[name] for name in ("input_ids", "attention_mask")] for each in answered]
            scored = [self.searcher.scored(ids, mask) for ids, mask in inputs]
        passages = torch.cat([rows.any(-1) for rows in self.searcher.records.values()])
        whole = torch.cat([scores[:, passages] for scores, _ in scored])
        spread = float(whole.max() - whole.min())
        slack = 2 * max(accept * spread, TOLERANCE)
        worst, length, same, every = 0.0, 0, 0, 0
        for each, (scores, means) in zip(answered, scored, strict=True):
            records = each.found["records"] if isinstance(each.found, Mapping) else each.found
            for row, found in enumerate(records.to(torch.float32)):
                at = [self.rows.get(record.numpy().tobytes()) for record in found]
                best = self._looked_into(scores[row], means[row]).topk(len(at)).indices.tolist()
                same, every = same + sum(a == b for a, b in zip(at, best, strict=True)), every + len(at)
                if (wrong := self._wrong(scores[row], means[row], at, slack)) > worst:
                    worst, length = wrong, each.length
        error = worst / max(spread, accept)
        said = f", others would be with scores wrong by {error:.2g} of their spread ({spread:.3g})" if worst else ""
        words = f"{same} of {every} passages are found at the original's rank{said}"
        return Judged(error <= accept, words, length)

    def _wrong(self, scores: Tensor, means: Tensor, found: Sequence[int | None], slack: float) -> float:
        """Return the error of scores that explains the rows that were found, the best first; NO_PASSAGE is of zeros."""
        places = [at for at in found if at is not None and at != NO_PASSAGE]
        if None in found or len(set(places)) < len(places) or (NO_PASSAGE in found and not self.searcher.looked_into):
            return torch.inf
        inside = self._looked_into(scores, means, places, slack)
        values = torch.tensor([0.0 if at == NO_PASSAGE or at is None else float(inside[at]) for at in found])
        return float((inside.topk(len(found)).values - values).abs().nan_to_num(torch.inf).max()) / 2

    def _looked_into(self, scores: Tensor, means: Tensor, found: Sequence[int] = (), slack: float = 0.0) -> Tensor:
        """Return the scores of rows in the clusters that a query looked into, and -inf for others.

        Whose mean's score is within ``slack`` of those of the last chosen and the first left out may be either. So the
        clusters of what was found are looked into, and of the others those whose best passages are least good.
        """
        searcher = self.searcher
        if not (many := searcher.looked_into):
            return scores
        ordered = means.sort(descending=True).values
        may_be = means >= ordered[many - 1] - slack
        chosen = means > ordered[many] + slack
        chosen[[at // searcher.size for at in found]] = True
        chosen &= may_be
        best = scores.reshape(-1, searcher.size).amax(-1)
        spare = sorted((may_be & ~chosen).nonzero().flatten().tolist(), key=lambda at: float(best[at]))
        chosen[spare[: max(0, many - int(chosen.sum()))]] = True
        if int(chosen.sum()) > many:
            return torch.full_like(scores, -torch.inf)
        return torch.where(chosen.repeat_interleave(searcher.size), scores, -torch.inf)
