"""The sizes of a decoder's Programs: which one a prompt takes, and whether what shall be written fits."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secure.errors import InputTooLong, InvalidInput, InvalidProgram
from secure.lowering.client_inputs import GENERATE, MOST_ROWS, TASK
from secure.session.link import Offer


@dataclass(frozen=True)
class Writing:
    """The sizes that a text takes.

    prompt, step: those of its prompt and of every later token. capacity: the rows that its conversation takes. error:
    the reason why the prompt cannot be used, if any.
    """

    prompt: Offer
    step: Offer
    capacity: int
    error: InvalidInput | None = None


def writing(offers: Sequence[Offer], labels: Mapping[str, str], prompt: Sequence[int], count: int) -> Writing:
    """Choose the sizes for a prompt, and for ``count`` tokens that are written.

    What is wrong with the prompt itself is returned, and its query takes place; a prompt that is too long takes the
    greatest size. Raises InvalidInput for a model that generates no text, and for more tokens than there is room for.
    """
    if labels.get(TASK) != GENERATE:
        raise InvalidInput("this session's model generates no text", "compile a decoder with secure.compile_generator")
    if count < 1:
        raise InvalidInput(f"{count} new tokens", "1 or more")
    if not len(prompt):
        raise InvalidInput("the prompt has no token", "begin with the token that begins a text")
    lengths = sorted((o for o in offers if o.length > 1), key=lambda offer: offer.length)
    step = next((o for o in offers if o.length == 1), None)
    capacity, vocabulary = (_number(labels.get(name, "")) for name in (MOST_ROWS, "vocabulary"))
    if step is None or not lengths or not capacity or not vocabulary:
        raise InvalidProgram("the server offers no Programs for a prompt and a step")
    found = next((o for o in lengths if o.length >= len(prompt)), lengths[-1])
    room = capacity - found.length + 1
    if count > room:
        raise InvalidInput(
            f"{count} new tokens after a prompt that is padded to {found.length}",
            f"{room} at most; compile with a greater capacity",
        )
    error: InvalidInput | None = None
    if len(prompt) > found.length:
        error = InputTooLong(f"the prompt has {len(prompt)} tokens, at most {found.length} fit", "shorten it")
    elif not all(0 <= token < vocabulary for token in prompt):
        error = InvalidInput(
            f"a token id is outside 0..{vocabulary - 1}", "use the tokenizer that belongs to the model"
        )
    return Writing(found, step, capacity, error)


def _number(text: str) -> int:
    """Read a label that is a number of tokens; 0 if it is none."""
    return int(text) if re.fullmatch("[1-9][0-9]{0,6}", text) else 0


def token_ids(prompt: object) -> list[int]:
    """Return a prompt as a list of integers. Raises InvalidInput for anything else than a sequence of them."""
    try:
        if isinstance(prompt, str | bytes):
            raise TypeError
        return [operator.index(token) for token in prompt]  # type: ignore[attr-defined]
    except TypeError:
        raise InvalidInput(
            f"the prompt is a {type(prompt).__name__}", "give token ids, as the model's tokenizer makes them"
        ) from None
