"""The lesson of a sentence encoder: its data and its loss; and the agreement of embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secure.errors import InvalidInput
from secure.models.sentence_encoder import SentenceEncoder, load_sentence_encoder, load_tokenizer
from secure.models.tokens import TextTokenizer, tokenize
from secure.training.lesson import Lesson
from secure.training.trainer import Batch

LENGTH, LONG = 32, 128  # tokens of a training sentence, and of a long input of joined sentences
JOINED = 8  # sentences joined into a long input, which is then cut
PADDED = 4  # a batch with much padding keeps one of so many sentences
KINDS = 6  # of so many batches one has long inputs, one strange ones, and one much padding
COSINE, SIMILARITY = 5.0, 10.0  # weights of the loss beside the hidden states' mean square error

Row = Tensor  # the token ids of one sentence, special ones included


@dataclass(frozen=True)
class Agreement:
    """The agreement of two models' embeddings on the same sentences.

    spearman: rank correlation of all pairwise cosine similarities; NaN for fewer than three sentences. nearest: share
    of sentences whose nearest neighbour is the same. mean_cosine, lowest_cosine: between the embeddings of a sentence.
    """

    sentences: int
    spearman: float
    nearest: float
    mean_cosine: float
    lowest_cosine: float


def rows(tokenizer: TextTokenizer, texts: Sequence[str], length: int = LENGTH) -> list[Row]:
    """Return the token ids of each text that is not empty, cut by words to ``length`` tokens."""
    out = []
    for text in texts:
        words = text.split()
        while words:
            try:
                ids, mask = tokenize(tokenizer, " ".join(words), length)
            except ValueError:
                words = words[: min(len(words) - 1, length)]
            else:
                out.append(ids[0][mask[0].bool()])
                break
    return out


@dataclass(frozen=True)
class Collate:
    """A function that pads the sentences of a batch together, and varies some batches.

    The first sentence decides on the kind of a batch. One in ``KINDS`` batches each has long inputs (joined sentences),
    strange ones (words replaced by any in the vocabulary), and much padding, as ranges must hold for texts unlike those
    in the training data.
    """

    pad: int
    longest: int
    vocabulary: Tensor  # ids that may stand for a word

    def __call__(self, chosen: Sequence[Row]) -> Batch:
        generator = torch.Generator().manual_seed(sum(int(row.sum()) for row in chosen))
        kind, width = int(chosen[0].sum()) % KINDS, 0
        if kind == 0 and len(chosen) >= JOINED:
            starts = range(0, len(chosen) - JOINED + 1, JOINED)
            drawn = torch.randint(self.longest // 2, 3 * self.longest // 2, (len(starts),), generator=generator)
            lengths = drawn.clamp_max(self.longest).tolist()  # half have the full length, to meet every position
            chosen = [_joined(chosen[i : i + JOINED], n) for i, n in zip(starts, lengths, strict=True)]
        elif kind == 1:
            chosen = [self._strange(row, generator) for row in chosen]
        elif kind == 2:
            chosen = chosen[: -(-len(chosen) // PADDED)]
            width = int(torch.randint(1, self.longest + 1, (1,), generator=generator))
        width = max(width, *(len(row) for row in chosen))
        ids = torch.full((len(chosen), width), self.pad)
        mask = torch.zeros((len(chosen), width), dtype=torch.int64)
        for i, row in enumerate(chosen):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def _strange(self, row: Row, generator: torch.Generator) -> Row:
        """Replace a random share of a sentence's words; its first and last token stay."""
        drawn = self.vocabulary[torch.randint(len(self.vocabulary), (len(row),), generator=generator)]
        share = torch.empty(1).uniform_(generator=generator)  # for training; nothing here is a secret
        replaced = torch.empty(len(row)).uniform_(generator=generator) < share
        replaced[0] = replaced[-1] = False
        return torch.where(replaced, drawn, row)


def words(tokenizer: TextTokenizer) -> Tensor:
    """Return the ids of a vocabulary without special and unused tokens, whose names are in brackets."""
    vocabulary = tokenizer.tokenizer.get_vocab().items()
    return torch.tensor(sorted(i for token, i in vocabulary if not (token[0] in "[<" and token[-1] in "]>")))


def _joined(parts: Sequence[Row], longest: int) -> Row:
    inner = torch.cat([part[1:-1] for part in parts])[: longest - 2]
    return torch.cat([parts[0][:1], inner, parts[0][-1:]])


def hidden_states(model: SentenceEncoder, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the hidden states of every layer, and the L2-normalized embeddings."""
    out: Any = model.encoder(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].to(out.last_hidden_state.dtype)
    if model.pooling == "cls":
        pooled = out.last_hidden_state[:, 0]
    else:  # without a matrix product, so that it stays in float32 whatever the products' precision
        pooled = ((mask / mask.sum(-1, keepdim=True)).unsqueeze(-1) * out.last_hidden_state).sum(1)
    return out.hidden_states, F.normalize(pooled, dim=-1)


def distillation_loss(teacher: SentenceEncoder, student: SentenceEncoder) -> Callable[[Batch], Any]:
    """Make the loss: hidden states (mean square error), embeddings (cosine), and the similarities within a batch."""

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            theirs, wanted = hidden_states(teacher, batch)
        ours, found = hidden_states(student, batch)
        with torch.autocast(wanted.device.type, enabled=False):
            mask = batch["attention_mask"].to(wanted.dtype).unsqueeze(-1)
            count = mask.sum() * wanted.shape[-1]
            apart = [((a - b).square() * mask).sum() / count for a, b in zip(ours[1:], theirs[1:], strict=True)]
            hidden = torch.stack(apart).mean()
            cosine = 1 - (found * wanted).sum(-1).mean()
            similarity = (found @ found.T - wanted @ wanted.T).square().mean()
        parts = {"hidden": hidden.item(), "cosine": cosine.item(), "similarity": similarity.item()}
        return hidden + COSINE * cosine + SIMILARITY * similarity, parts

    return loss


def lesson(directory: Path, texts: Sequence[str]) -> Lesson:
    """Make the lesson of a sentence encoder. Raises InvalidInput for one that cannot be trained."""
    tokenizer = load_tokenizer(directory)
    teacher, student = load_sentence_encoder(directory), load_sentence_encoder(directory)
    if teacher.pooling not in ("mean", "cls") or len(teacher.then):
        raise InvalidInput(
            f"{directory} pools by {teacher.pooling}, with {len(teacher.then)} modules behind that",
            "a model of mean or cls pooling alone can be trained",
        )
    longest = min(LONG, student.maximum_length)
    data = rows(tokenizer, texts, min(LENGTH, longest))
    return Lesson(
        teacher,
        student,
        student.encoder,
        "encoder.",
        data,
        Collate(tokenizer.pad_id, longest, words(tokenizer)),
        distillation_loss(teacher, student),
        lambda batch: hidden_states(student, batch),
        len,
    )


def agreement_of(a: Tensor, b: Tensor) -> Agreement:
    """Compare L2-normalized embeddings, each (sentences, width)."""
    pairs = torch.triu_indices(len(a), len(a), 1)
    similar, wanted = a @ a.T, b @ b.T
    spearman = math.nan  # undefined for fewer than three sentences
    if len(a) > 2:
        ranks = torch.stack([_ranks(s[pairs[0], pairs[1]]) for s in (similar, wanted)])
        spearman = float(torch.corrcoef(ranks)[0, 1])
    own = torch.eye(len(a), dtype=torch.bool)
    nearest = [s.masked_fill(own, -2).argmax(-1) for s in (similar, wanted)]
    cosines = (a * b).sum(-1)
    same = (nearest[0] == nearest[1]).double().mean()
    return Agreement(len(a), spearman, float(same), float(cosines.mean()), float(cosines.min()))


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()
