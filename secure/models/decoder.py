"""Decoders as they generate text: one module for the prompt and each later token, and the inputs that a client makes.

The padded prompt has *bucket* tokens, and stands at the end of its bucket: what pads it comes first, and no token
attends to it. So the place of every later token is public, while the prompt's own length stays with the client, in the
mask that it adds to scores. Rotary positions are places: scores depend on differences of places alone. Models that
look their positions up get the text's own ones, from the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secure.capture.graph import MASKED, POSITIONS
from secure.errors import InputTooLong, InvalidInput
from secure.operations.generation import keep_operation, last_rows_operation
from secure.operations.sampling import sample
from secure.polynomial.forms import SPARE, SPARE_OF_KEYS, forms, weighed_values
from secure.polynomial.swap import seen_keys

TOKENS, MASK, TEMPERATURE = "input_ids", "attention_mask", "temperature"

DRAFT_LENGTH = "draft_length"
"""The label of Programs that write text by which they have a pass over so many tokens, the last one and drafts."""

STEPWISE = "stepwise"
"""The label of Programs that read a prompt token by token, as they write, and tell the client the scores of tokens."""

MOST_DRAFTED = 16
"""The most tokens of a pass."""


class _Rows:
    """A cache as layers of ``transformers`` call it: it gives the rows of earlier queries, and keeps the new ones."""

    is_compileable = False

    def __init__(self, rows: int, own: Tensor | None, *, polynomial: bool) -> None:
        """own: (1, 1, n, 1), by which values are multiplied before they are kept; None: they are kept as they are.

        polynomial: keys and values can do without some fraction bits.
        """
        self._rows, self._own = rows, own
        self._spare = {"keys": SPARE_OF_KEYS, "values": SPARE} if polynomial else {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        values = values if self._own is None else values * self._own
        return self._kept(keys, "keys", layer), self._kept(values, "values", layer)

    def _kept(self, x: Tensor, what: str, layer: int) -> Tensor:
        kept: Tensor = keep_operation(x, f"{layer}.{what}", self._rows, self._spare.get(what, 0))
        return kept

    def get_seq_length(self, layer: int = 0) -> int:
        return self._rows


class Decoder(nn.Module):
    """A causal language model of ``transformers`` that returns the token which it finds most likely next, or a sample.

    Its inputs: ``input_ids`` and ``position_ids`` (1, n), and ``attention_mask`` (1, 1, n, rows + n), which is added to
    scores. The first ``rows`` rows of keys are those of earlier queries. With ``temperature`` (1,) it draws the token
    with the probabilities softmax(scores / temperature). Returns integers: (1, 1), the token after a prompt; if there
    are earlier rows (1, n), the token after each of those that are given, from the text up to it.
    """

    def __init__(self, model: nn.Module, *, padded: bool = True) -> None:
        """padded: some of the tokens may be padding."""
        super().__init__()
        self.model, self.padded = model, padded

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, temperature: Tensor | None = None
    ) -> Tensor:
        logits, _ = self.scored(input_ids, position_ids, attention_mask)
        return logits.argmax(-1) if temperature is None else sample(logits, temperature)

    def scored(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, temperature: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the scores of these tokens, (1, 1 or n, vocabulary), all of which count; they have no temperature."""
        model: Any = self.model
        attention_mask = attention_mask.to(model.dtype)  # of a mapped checkpoint, its own
        rows = attention_mask.shape[-1] - input_ids.shape[-1]
        own, polynomial = None, any(forms(self.model))
        if self.padded and polynomial:  # which of these tokens are no padding, as the last row of masks says
            own = seen_keys(attention_mask[..., -1:, rows:], model.dtype).transpose(-1, -2)
        count, head = input_ids.shape[-1] if rows else 1, model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (last_rows_operation(given[0], count), *given[1:]))
        try:
            with weighed_values(model):
                found = model(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    attention_mask=attention_mask,
                    past_key_values=_Rows(rows, own, polynomial=polynomial),
                    use_cache=False,
                )
        finally:
            hook.remove()
        return found.logits, None


class ScoringDecoder(Decoder):
    """A decoder that returns the scores of the next token: (1, 1, vocabulary) behind a prompt or a step.

    None of its tokens is padding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, padded=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, temperature: Tensor | None = None
    ) -> Tensor:
        return self.scored(input_ids, position_ids, attention_mask)[0]


def prompt_inputs(prompt: Sequence[int], bucket: int, *, pad: int = 0, places: bool = True) -> dict[str, Tensor]:
    """Make a decoder's inputs of a prompt, padded at its beginning to ``bucket`` tokens.

    places: positions are the places in the bucket; else those in the prompt. Raises InputTooLong, and InvalidInput for
    an empty prompt.
    """
    length = len(prompt)
    if not length:
        raise InvalidInput("the prompt has no token", "begin with the token of the text's beginning")
    if length > bucket:
        raise InputTooLong(f"the prompt has {length} tokens, at most {bucket} fit", "shorten it")
    start = bucket - length
    rows, columns = torch.arange(bucket)[:, None], torch.arange(bucket)[None]
    # what pads attends to what is before it, for a row of scores without any entry has no maximum
    seen = (columns <= rows) & ((columns >= start) | (rows < start))
    ids = torch.tensor([[pad] * start + list(prompt)])
    return {TOKENS: ids, POSITIONS: _positions(torch.arange(bucket), start, places), MASK: _additive(seen)}


def step_inputs(tokens: Sequence[int], start: int, filled: int, rows: int, *, places: bool = True) -> dict[str, Tensor]:
    """Make a decoder's inputs of the next tokens, each of which attends to those before it.

    start: the place of the text's first token. filled: the rows that are kept so far, of the ``rows`` that are read.
    """
    count = len(tokens)
    own, columns = torch.arange(count)[:, None], torch.arange(rows + count)[None]
    seen = ((columns >= start) & (columns < filled)) | ((columns >= rows) & (columns <= rows + own))
    positions = _positions(torch.arange(filled, filled + count), start, places)
    return {TOKENS: torch.tensor([list(tokens)]), POSITIONS: positions, MASK: _additive(seen)}


def at_temperature(inputs: dict[str, Tensor], temperature: float | None) -> dict[str, Tensor]:
    """Return a decoder's inputs with the temperature at which the token is drawn; None: it takes none."""
    return inputs if temperature is None else {**inputs, TEMPERATURE: torch.tensor([temperature])}


def _positions(places: Tensor, start: int, public: bool) -> Tensor:
    return (places if public else (places - start).clamp(min=0))[None]


def _additive(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, MASKED)[None, None]


def looks_positions_up(model: nn.Module) -> bool:
    """True if a model has a table of positions, so that the text's own positions matter, not differences of places."""
    configuration: Any = getattr(model, "config", None)
    return not (getattr(configuration, "rope_parameters", None) or getattr(configuration, "rope_theta", None))


def vocabulary(model: nn.Module) -> int:
    """Return the number of tokens that a model knows."""
    found: Any = model
    return int(found.get_input_embeddings().weight.shape[0])


def most_positions(model: nn.Module) -> int | None:
    """Return the most tokens that a model can attend to; None if its configuration names no number."""
    configuration: Any = getattr(model, "config", None)
    named = [getattr(configuration, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((number for number in named if isinstance(number, int)), default=None)
