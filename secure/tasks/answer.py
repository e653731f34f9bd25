"""The task of answering a question from a context, by a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secure.errors import InvalidInput
from secure.models.heads import ANSWER, ANSWER_TOKENS, span_at
from secure.models.pairs import NEITHER, SECOND, Encoded, encode
from secure.models.settings import SPAN
from secure.models.tokens import LONG, SPLIT
from secure.tasks.headed import Headed, Pair, Tokenized, is_pair, tokens_of
from secure.tasks.task import Served

STRIDE = 128  # tokens by which pieces of a context overlap, at most


@dataclass(frozen=True)
class Answering(Headed[Pair, dict[str, Any]]):
    """The task that maps a question and its context to {"answer", "start", "end", "score"}.

    The answer is the part of the context from its character "start" to "end", whole words of at most ANSWER_TOKENS
    tokens. It is found as transformers' question-answering pipeline did: the tokens of the context, and the first one
    of all, share the probability of beginning and of ending the answer, and the score is the product of both. It is
    None where the server's owner reveals the place alone.

    long: "truncate" reads the beginning of a longer context; "split" reads pieces of it that overlap, and takes the
    answer of the greatest score. It needs scores, so a server that reveals places alone refuses it.
    """

    name: ClassVar[str] = ANSWER
    noun: ClassVar[str] = "question"
    ways: ClassVar[tuple[str, ...]] = LONG
    wanted: ClassVar[str] = "pairs of a question and its context"

    def takes(self, given: Any) -> bool:
        return is_pair(given)

    def check(self, given: Sequence[Pair], served: Served) -> None:
        super().check(given, served)
        if self.long == SPLIT and served.settings.reveal == SPAN:
            raise InvalidInput(
                "this server reveals places without scores, so answers of several pieces cannot be compared",
                "give shorter contexts, or cut them: --long truncate (long='truncate')",
            )

    def texts(self, given: Pair) -> tuple[str, str | None]:
        return given[0], given[1]

    def encoded(self, given: Pair, served: Served) -> list[Encoded]:
        assert served.tokenizer is not None  # as ``check`` found
        stride, (question, context) = min(served.length // 4, STRIDE), given
        return encode(served.tokenizer, question, context, served.length, self.long, stride=stride, only_second=True)

    def pieces(self, given: Pair, served: Served) -> Sequence[Mapping[str, Tensor]]:
        found = super().pieces(given, served)
        if served.settings.reveal != SPAN:
            return found
        return [Tokenized({**each, "context": tokens_of(each).second}, tokens_of(each)) for each in found]

    def joined(
        self, answers: Sequence[Tensor], pieces: Sequence[Mapping[str, Tensor]], given: Pair, served: Served
    ) -> dict[str, Any]:
        best: dict[str, Any] | None = None
        for found, piece in zip(answers, pieces, strict=True):
            encoded = tokens_of(piece)
            length = piece["input_ids"].shape[-1]  # of several that are served, the one that was taken
            if served.settings.reveal == SPAN:
                (first, last), score = span_at(round(float(found)), length), None
            else:
                first, last, score = _search(found, encoded)
            if encoded.texts[first] != SECOND or encoded.texts[last] != SECOND:
                raise InvalidInput("the answer is no part of the context", "ask the server's owner")
            if best is None or (score is not None and score > best["score"]):
                start, end = _words(encoded, first)[0], _words(encoded, last)[1]
                best = {"score": score, "start": start, "end": end, "answer": given[1][start:end]}
        assert best is not None  # there is a piece
        return best


def _search(found: Tensor, encoded: Encoded) -> tuple[int, int, float]:
    """Return the first and last token of the likeliest span in the context, and its probability.

    found: logits (2, length) of starts and ends.
    """
    length = found.shape[-1]
    inside = torch.tensor([which == SECOND for which in encoded.texts[:length]])
    counted = inside.clone()
    counted[0] = True  # the first token says that there is no answer
    chances = torch.softmax(found.masked_fill(~counted, -torch.inf), -1).masked_fill(~inside, 0.0)
    joint = torch.outer(chances[0], chances[1]).triu().tril(ANSWER_TOKENS - 1)
    index = int(joint.argmax())
    return index // length, index % length, float(joint.flatten()[index])


def _words(encoded: Encoded, token: int) -> tuple[int, int]:
    """Return where the word of a token begins and ends in its text, in characters."""
    word, text = encoded.words[token], encoded.texts[token]
    if word == NEITHER:
        return encoded.offsets[token]
    same = [o for o, w, t in zip(encoded.offsets, encoded.words, encoded.texts, strict=True) if (w, t) == (word, text)]
    return min(start for start, _ in same), max(end for _, end in same)
