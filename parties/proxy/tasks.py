"""The tasks of requests: those of ``secure.tasks``, whose answers come with the number of tokens of their inputs.

Tokens are counted, and arrays of them read, where a session does all of its work on values: before the first query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from secure.errors import InvalidInput
from secure.models.tokens import TextTokenizer, library_errors
from secure.tasks.classify import Classify
from secure.tasks.embed import Embed
from secure.tasks.rerank import Rerank
from secure.tasks.search import Search
from secure.tasks.task import Served

OTHER_TOKENS = "these tokens are not those that this model's tokenizer makes of a text"


class Counted(NamedTuple):
    """An answer, and the tokens of its input, special ones included."""

    answer: Any
    tokens: int


def tokens_in(pieces: Sequence[Mapping[str, Tensor]]) -> int:
    """Return the number of tokens in the arguments of an input's places."""
    return sum(int(piece["attention_mask"].sum()) for piece in pieces)


@dataclass(frozen=True)
class Embedding(Embed):
    """Embedding of texts, or of arrays of the model's own tokens."""

    def check(self, given: Sequence[Any], served: Served) -> None:
        super().check([each if isinstance(each, str) else "" for each in given], served)

    def inputs(self, given: Any, served: Served) -> Mapping[str, Tensor]:
        assert served.tokenizer is not None  # as ``check`` found
        text = given if isinstance(given, str) else text_of(served.tokenizer, given)
        return super().inputs(text, served)

    def joined(
        self, answers: Sequence[Tensor], pieces: Sequence[Mapping[str, Tensor]], given: Any, served: Served
    ) -> Any:
        return Counted(super().joined(answers, pieces, given, served), tokens_in(pieces))


@dataclass(frozen=True)
class Classification(Classify):
    """Classification of texts or pairs."""

    def joined(
        self, answers: Sequence[Tensor], pieces: Sequence[Mapping[str, Tensor]], given: Any, served: Served
    ) -> Any:
        return Counted(super().joined(answers, pieces, given, served), tokens_in(pieces))


@dataclass(frozen=True)
class Reranking(Rerank):
    """Scores of pairs of a query and a document."""

    def joined(
        self, answers: Sequence[Tensor], pieces: Sequence[Mapping[str, Tensor]], given: Any, served: Served
    ) -> Any:
        return Counted(super().joined(answers, pieces, given, served), tokens_in(pieces))


@dataclass(frozen=True)
class Searching(Search):
    """Search for the passages that answer a question."""

    def joined(self, answers: Sequence[Any], pieces: Sequence[Mapping[str, Tensor]], given: Any, served: Served) -> Any:
        return Counted(super().joined(answers, pieces, given, served), tokens_in(pieces))


def text_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """Return the text of which the tokenizer makes these tokens, with or without the special ones around it.

    Raises InvalidInput where it makes others of it. That is no proof that they are the model's: a few tokens of another
    tokenizer may happen to be words of this one.
    """
    size = tokenizer.tokenizer.get_vocab_size(with_added_tokens=True)
    if all(0 <= token < size for token in ids):
        with library_errors():
            first, last = tokenizer.around
            for inner, special in ((list(ids), False), (list(ids[first : len(ids) - last]), True)):
                text = tokenizer.tokenizer.decode(inner, skip_special_tokens=False)
                given = text.lower() if tokenizer.lowercase else text
                if tokenizer.tokenizer.encode(given, add_special_tokens=special).ids == list(ids):
                    return text
    raise InvalidInput(OTHER_TOKENS, "give texts; in LangChain: check_embedding_ctx_length=False")
