"""The shape of ``sentence_transformers.SentenceTransformer``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from parties.bulk.embedding import vector_width
from parties.shapes.opening import Opened, aside, leave_out
from secure.errors import Error, InvalidInput, about
from secure.models.tokens import TRUNCATE
from secure.tasks.embed import Embed

QUERY, DOCUMENT = ("query",), ("document", "passage", "corpus")
"""The names of prompts that ``encode_query`` and ``encode_document`` look for, as the original does."""

Vectors = NDArray[np.float32] | Tensor | list[Tensor]
log = logging.getLogger("unseen.shapes")


class SentenceTransformer(Opened):
    """A served sentence encoder that is used like ``sentence_transformers.SentenceTransformer``.

    The constructor takes what ``secure.connect`` takes, or a Session. Raises what that raises, and InvalidInput for a
    model that embeds no texts.
    """

    similarity_fn_name = "cosine"

    def __init__(self, deployment: Any, **options: Any) -> None:
        super().__init__(deployment, **options)
        try:
            Embed().fits(self.session.served)
            self._width = vector_width(self.session)
        except BaseException:
            self.close()
            raise

    @property
    def max_seq_length(self) -> int:
        """The most tokens of a text, special ones included."""
        return self.session.length

    @property
    def prompts(self) -> Mapping[str, str]:
        """The model's prompts by name."""
        return self.session.prompts.texts

    def get_sentence_embedding_dimension(self) -> int:
        """Return how many numbers an embedding has."""
        return self._width

    get_embedding_dimension = get_sentence_embedding_dimension

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
        normalize_embeddings: bool = False,
        *,
        long: str = TRUNCATE,
    ) -> Vectors:
        """Return the embeddings of texts, float32: a matrix (texts, width); of one text, a vector.

        Arguments and results are those of the original. prompt_name: see ``prompts``. prompt: must be None, as prompts
        are the owner's. batch_size: texts that are read before their queries, rounded up to whole ones; how many a
        query carries is the server's choice. convert_to_numpy, convert_to_tensor: else a list of tensors.
        normalize_embeddings: scale to length 1 what the model does not. long: what becomes of long texts; the original
        cuts them. See ``Embed`` for that, and for what the servers see.
        Raises InvalidInput for values of the other arguments that are not the defaults, and what ``Session.embed``
        raises. A text without embedding costs as much as any other.
        """
        leave_out(prompt=prompt, device=device)
        for name, given, only in (
            ("output_value", output_value, "sentence_embedding"),
            ("precision", precision, "float32"),
        ):
            if given != only:
                raise InvalidInput(f"{name} is {given!r}", f"{only!r} is all that there is")
        single = isinstance(sentences, str)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        answers = self.session.stream(Embed(long, prompt_name), texts, window=batch_size)
        if show_progress_bar:
            answers = iter(track(answers, description="Texts", total=len(texts)))
        found = list(_usable(answers, len(texts)))
        rows = [F.normalize(each, dim=-1) if normalize_embeddings else each for each in found]
        if single:
            row = rows[0].float()
            return row.numpy() if convert_to_numpy and not convert_to_tensor else row
        if convert_to_tensor or convert_to_numpy:
            matrix = torch.stack(rows).float() if rows else torch.empty(0, self._width)
            return matrix if convert_to_tensor else matrix.numpy()
        return [row.float() for row in rows]

    def encode_query(self, sentences: str | Sequence[str], prompt_name: str | None = None, **how: Any) -> Vectors:
        """Return the embeddings of queries: ``encode`` with the model's prompt for these, if it has one."""
        return self.encode(sentences, self._prompt(QUERY, prompt_name), **how)

    def encode_document(self, sentences: str | Sequence[str], prompt_name: str | None = None, **how: Any) -> Vectors:
        """Return the embeddings of documents: ``encode`` with the model's prompt for these, if it has one."""
        return self.encode(sentences, self._prompt(DOCUMENT, prompt_name), **how)

    async def aencode(self, sentences: str | Sequence[str], *arguments: Any, **how: Any) -> Vectors:
        """Return what ``encode`` does, without blocking the event loop."""
        return await aside(self.encode, sentences, *arguments, **how)

    def similarity(self, first: Any, second: Any) -> Tensor:
        """Return the cosines of all pairs of embeddings, float32 (first, second)."""
        return _unit(first) @ _unit(second).T

    def similarity_pairwise(self, first: Any, second: Any) -> Tensor:
        """Return the cosines of embeddings in the same place, float32."""
        return (_unit(first) * _unit(second)).sum(-1)

    def _prompt(self, names: Sequence[str], given: str | None) -> str | None:
        return given if given is not None else next((name for name in names if name in self.prompts), None)


def _usable(answers: Iterator[Tensor | Error], count: int) -> Iterator[Tensor]:
    """Yield embeddings, and after the last query raise the first error among them."""
    failed: Error | None = None
    for number, answer in enumerate(answers, 1):
        if isinstance(answer, Error):
            failed = failed or (about(f"text {number} of {count}", answer) if count > 1 else answer)
        else:
            yield answer
    if failed is not None:
        raise failed


def _unit(given: Any) -> Tensor:
    """Return embeddings of any kind as rows of length 1."""
    rows = [torch.as_tensor(each) for each in given] if isinstance(given, list) else None
    found = torch.as_tensor(given) if rows is None else torch.stack(rows)
    return F.normalize(torch.atleast_2d(found).float(), dim=-1)
