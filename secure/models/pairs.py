"""Texts and pairs of texts to a model's inputs, with the place of every token in its text.

Tasks beside sentence embedding need more of a tokenizer than ``tokens.tokenize`` gives: pairs, such as a question and
its context, and offsets, from which spans are cut out of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secure.errors import EmptyInput, InputTooLong, InvalidInput
from secure.models.tokens import (
    LONGER,
    PIECES,
    REFUSE,
    SPLIT,
    TRUNCATE,
    TextTokenizer,
    checked_text,
    guarded,
    library_errors,
)

if TYPE_CHECKING:
    from tokenizers import Encoding

FIRST, SECOND = 0, 1
"""The texts of a pair; NEITHER is a special token's or padding."""
NEITHER = -1
SHORTER = "shorten one of them, or serve a greater length"


@dataclass(frozen=True, eq=False, repr=False)
class Encoded:
    """A text or a pair as tokens, padded on the right.

    ids, mask, segments: int64 (length,): token ids, 1 for tokens and 0 for padding, and the model's token_type_ids.
    texts: of which text each token is: FIRST, SECOND, or NEITHER. offsets: where in that text each begins and ends, in
    characters; of padding (0, 0). words: the number of the word that each is a part of; NEITHER if of none.
    """

    ids: Tensor
    mask: Tensor
    segments: Tensor
    texts: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    words: tuple[int, ...]

    def inputs(self, *, segments: bool) -> dict[str, Tensor]:
        """Return a model's inputs of one row; ``segments``: it takes token_type_ids."""
        found = {"input_ids": self.ids[None], "attention_mask": self.mask[None]}
        return found | ({"token_type_ids": self.segments[None]} if segments else {})

    @property
    def second(self) -> Tensor:
        """1 for each token of the second text, int64 of shape (1, length)."""
        return torch.tensor([[int(which == SECOND) for which in self.texts]])


def encode(
    tokenizer: TextTokenizer,
    first: str,
    second: str | None,
    length: int,
    long: str = REFUSE,
    *,
    stride: int = 0,
    only_second: bool = False,
) -> list[Encoded]:
    """Return the pieces of a text, or of a pair, each padded to ``length`` tokens, special ones included.

    long: what becomes of more tokens. "refuse": InputTooLong. "truncate": as many of the first tokens of a text as fit;
    of a pair the longer text is cut first, as transformers' "longest_first" does. "split": pieces that overlap by
    ``stride`` tokens; of a pair, each has the whole first text, and a part of the second. All other inputs are one
    piece. only_second: the first text of a pair is never cut, whatever ``long`` says.

    Raises EmptyInput for a text without tokens of its own, InputTooLong, and InvalidInput as ``tokens.tokenize`` does.
    """
    plain = [_plain(tokenizer, text, length, long) for text in (first, second) if text is not None]
    for each, which in zip(plain, ("first ", "second ") if second is not None else ("",), strict=True):
        if not each.ids:
            raise EmptyInput(f"the {which}text is empty: it has no tokens\nhint: give at least one word")
    library = tokenizer.tokenizer
    room = length - library.num_special_tokens_to_add(is_pair=second is not None)
    count = sum(len(each.ids) for each in plain)
    if count > room and long == REFUSE:
        said = f"the {'texts have' if second is not None else 'text has'} {count + length - room} tokens"
        hint = LONGER if second is None else SHORTER
        raise InputTooLong(f"{said} (special tokens included), the limit is {length}", hint)
    *kept, last = plain
    held = sum(len(each.ids) for each in kept)
    if count > room and long == TRUNCATE and kept and not only_second:
        most, least = _longest_first(len(kept[0].ids), len(last.ids), room)
        kept[0].truncate(most)
        held, free = most, least
    else:
        free = room - held
    if free < 1 or (long == SPLIT and count > room and free <= stride):
        raise InputTooLong(
            f"{held} tokens of the first text and {length - room} special ones leave no room in {length}",
            "shorten the first text, or serve a greater length",
        )
    if long == SPLIT and count > room:  # before the pieces are made
        _check_pieces(1 + -(-(len(last.ids) - free) // (free - stride)), length)
    if count > room:
        last.truncate(free, stride=stride if long == SPLIT else 0)
    parts = [last, *(last.overflowing if long == SPLIT and count > room else ())]
    _check_pieces(len(parts), length)
    with library_errors():
        whole = [library.post_process(*([kept[0], part] if kept else [part, None])) for part in parts]
    return [_padded(each, tokenizer.pad_id, length) for each in whole]


def _check_pieces(pieces: int, length: int) -> None:
    if pieces > PIECES:
        raise InputTooLong(
            f"the text has {pieces} pieces of {length} tokens, the limit is {PIECES}",
            "divide it into several texts, or use a longer input length",
        )


def _plain(tokenizer: TextTokenizer, text: str, length: int, long: str) -> Encoding:
    """Return the tokens of a text without special ones around them."""
    text = checked_text(text, length, long)
    (found,) = guarded(tokenizer, text, lambda ready: [tokenizer.tokenizer.encode(ready, add_special_tokens=False)])
    return found


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each text are kept, as the tokenizers library decides it ("longest_first")."""
    shorter = min(first, second)
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    return (shorter, longer) if first <= second else (longer, shorter)


def _padded(found: Encoding, pad: int, length: int) -> Encoded:
    if len(found.ids) > length:
        raise InvalidInput("the tokenizer makes more tokens than it says", "ask the server's owner")
    rest = length - len(found.ids)
    texts = [
        NEITHER if special or which is None else which
        for which, special in zip(found.sequence_ids, found.special_tokens_mask, strict=True)
    ]

    def row(values: Sequence[int], fill: int) -> Tensor:
        return torch.tensor([*values, *[fill] * rest], dtype=torch.int64)

    return Encoded(
        row(found.ids, pad),
        row([1] * len(found.ids), 0),
        row(found.type_ids, 0),
        (*texts, *[NEITHER] * rest),
        (*found.offsets, *[(0, 0)] * rest),
        (*(NEITHER if word is None else word for word in found.word_ids), *[NEITHER] * rest),
    )


def pair_samples(
    tokenizer: TextTokenizer, length: int, sentences: Sequence[str], *, segments: bool
) -> list[dict[str, Tensor]]:
    """Make calibration inputs of pairs: of every second sentence and the next, and pairs that fill the whole length.

    A sentence with a tab in it is a pair of its own.
    """
    given = [tuple(text.split("\t", 1)) for text in sentences if "\t" in text]
    alone = [text for text in sentences if "\t" not in text]
    together = " ".join(alone)
    pairs = [*given, *zip(alone[::2], alone[1::2], strict=False), *((text, together) for text in alone[::4])]
    found = [encode(tokenizer, first, second, length, TRUNCATE)[0] for first, second in pairs if first and second]
    return [each.inputs(segments=segments) for each in found]
