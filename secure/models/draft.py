"""Drafts: a small public model, which the client runs by itself, guesses how a text goes on.

Any guess is safe: a pass tells which of them the served model chooses too, and no other is kept. So nothing is checked
of a draft but that its tokens are those of the served model. It takes the most likely ones, also where the served model
draws samples: no single guess agrees with a sample more often than the likeliest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secure.capture.graph import MASKED, POSITIONS
from secure.errors import Error, InvalidInput, about, printable
from secure.models.causal import load_language_model
from secure.models.decoder import MASK, TOKENS, most_positions, vocabulary
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import model_directory
from secure.models.tokens import TextTokenizer


class _Cache:
    """A cache as layers of ``transformers`` call it, whose last rows can be forgotten."""

    is_compileable = False

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if (before := self._rows.get(layer)) is not None:
            keys, values = torch.cat((before[0], keys), -2), torch.cat((before[1], values), -2)
        self._rows[layer] = keys, values
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return self._rows[layer][0].shape[-2] if layer in self._rows else 0

    def keep(self, rows: int) -> None:
        """Forget all but the first ``rows``."""
        self._rows = {layer: (k[..., :rows, :], v[..., :rows, :]) for layer, (k, v) in self._rows.items()}


class Draft:
    """A model that guesses. rows: the most tokens of a text that it takes; None: any number.

    vocabulary: the tokens of the served model; others are never guessed.
    """

    def __init__(self, model: nn.Module, known: int) -> None:
        self.rows = most_positions(model)
        self._model: Any = model
        self._own, self._known = vocabulary(model), known

    def begin(self, prompt: Sequence[int]) -> Guessing:
        """Return the guesses about one text, for which the prompt is read already."""
        found = Guessing(self)
        found.guess(prompt, 1)
        return found

    def likeliest(self, ids: Sequence[int], cache: _Cache) -> int:
        """Return the token that is most likely behind those in the cache and ``ids``, which go into it.

        Raises InvalidInput if the model cannot be run.
        """
        rows, count = cache.get_seq_length(), len(ids)
        places = torch.arange(rows, rows + count)
        seen = torch.arange(rows + count)[None] <= places[:, None]
        inputs = {
            TOKENS: torch.tensor([[min(max(token, 0), self._own - 1) for token in ids]]),
            POSITIONS: places[None],
            MASK: torch.where(seen, 0.0, MASKED)[None, None].to(next(self._model.parameters()).dtype),
        }
        try:
            with torch.no_grad():
                scores = self._model(**inputs, past_key_values=cache, use_cache=False).logits
            return int(scores[0, -1, : self._known].argmax())
        except Exception as error:  # of a model that is the client's own
            reason = printable((str(error).strip().splitlines() or [""])[0])[:200]
            raise InvalidInput(
                f"the draft cannot be run: {type(error).__name__}: {reason}",
                "take a model of a kind that can be served",
            ) from None


class Guessing:
    """The guesses of a draft about one text. What it has read of the text is not read again."""

    def __init__(self, draft: Draft) -> None:
        self._draft, self._cache, self._read = draft, _Cache(), list[int]()

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        """Return ``count`` tokens that may follow a text, one or more, which has tokens.

        The work is ``count`` runs of the model, the first of them over what was not read, or guessed wrong.
        """
        pairs = zip(self._read, text[:-1], strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(self._read), len(text) - 1))
        self._cache.keep(same)
        new, found = list(text[same:]), list[int]()
        while len(found) < count:
            found.append(self._draft.likeliest(new, self._cache))
            new = found[-1:]
        self._read = [*text, *found[:-1]]
        return found


def load_draft(given: object, tokenizer: TextTokenizer | None, known: int) -> Draft:
    """Make a draft of a directory that ``save_pretrained`` wrote, or of a model as its class makes it.

    tokenizer, known: of the served model, and the number of its tokens. Raises InvalidInput unless the draft has the
    same tokens: a directory's tokenizer knows each under the same number; where there is none, as many are known.
    Raises what loading a model does.
    """
    if not isinstance(given, nn.Module | str | Path):
        raise InvalidInput(f"the draft is a {type(given).__name__}", "the directory of a model, or the model itself")
    if isinstance(given, nn.Module):
        model, theirs = given, None
    else:
        try:
            directory = model_directory(str(given))
            model = load_language_model(directory)
            theirs = load_tokenizer(directory) if tokenizer is not None else None
        except Error as error:
            raise about("the draft", error) from None
    if tokenizer is not None and theirs is not None:
        ours, other = (each.tokenizer.get_vocab(with_added_tokens=True) for each in (tokenizer, theirs))
        if different := sum(other.get(token) != id for token, id in ours.items()) + len(other.keys() - ours.keys()):
            raise InvalidInput(
                f"the draft has another tokenizer than the served model: {different} tokens differ",
                "a smaller model of the same family has the same one",
            )
    elif vocabulary(model) != known:
        raise InvalidInput(
            f"the draft knows {vocabulary(model)} tokens, the served model {known}", "take one with the same tokens"
        )
    made = Draft(model.eval(), known)
    made.begin([0])  # raises if it cannot be run
    return made
