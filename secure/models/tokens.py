"""From text to token ids, with the ``tokenizers`` library alone, so that a client needs no model code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secure.errors import EmptyInput, InputTooLong, InvalidInput

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

LONGER = "shorten it, cut or split it (long; --long of a command) where texts are embedded, or serve a greater length"
REFUSE, TRUNCATE, SPLIT = LONG = ("refuse", "truncate", "split")
"""The ways to take a text of more tokens than the padded length; see ``tokenize``."""

CHARACTERS = 256  # of a text for each token of the padded length, at most
LONGEST = 1 << 18  # characters of a text that is truncated or split, or as many as of one that is refused, if more
PIECES = 64  # of a text that is split, at most
GROWTH, GROWN = 8, 64  # times and characters by which a normalizer may make a text longer


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that neither truncates nor pads. pad_id: the padding token. lowercase: text is lowercased first."""

    tokenizer: Tokenizer = field(repr=False)
    pad_id: int
    lowercase: bool = False

    @property
    def around(self) -> tuple[int, int]:
        """The numbers of special tokens before and behind a text."""
        mask = self.tokenizer.encode("a").special_tokens_mask
        first = next((i for i, special in enumerate(mask) if not special), len(mask))
        return first, mask[first:].count(1)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, with or without a byte order mark; return {} if there is no such file.

    Raises InvalidInput for other contents.
    """
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidInput(f"{path} does not hold a JSON object")
    return document


def tokenize(tokenizer: TextTokenizer, text: str, length: int, long: str = REFUSE) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of a text, int64 of shape (pieces, length) each, padded on the right.

    long: what becomes of a text that has more than ``length`` tokens together with the special ones around it. "refuse"
    raises InputTooLong. "truncate" takes as many of its first tokens as fit, with special tokens around them, as
    sentence-transformers does; of a text of more than LONGEST characters it takes these first. "split" divides its
    tokens into as few pieces as possible, all but the last full, each with special tokens around it. All other texts,
    and these but for "split", are one piece.

    Raises EmptyInput (no tokens of its own), InputTooLong (more than ``length`` tokens, or more than CHARACTERS times
    ``length`` characters; if it is split, more than PIECES pieces, or than LONGEST characters), and InvalidInput (not
    Unicode text, or one on which the tokenizer fails, or which it makes GROWTH times longer: the time that this takes
    would tell the tokenizer's maker which words are in it).
    """
    text = checked_text(text, length, long)
    pieces = guarded(tokenizer, text, lambda ready: _pieces(tokenizer.tokenizer, ready, length, long))
    count = max(len(piece.ids) for piece in pieces)
    if count == sum(pieces[0].special_tokens_mask):
        raise EmptyInput("the text is empty: it has no tokens\nhint: give at least one word")
    if len(pieces) > PIECES:
        raise InputTooLong(
            f"the text has {len(pieces)} pieces of {length} tokens, the limit is {PIECES}",
            "divide it into several texts, or use a longer input length",
        )
    if count > length:
        raise InputTooLong(
            f"the text has {count} tokens (special tokens included), the limit is {length}",
            LONGER,
        )
    ids = torch.full((len(pieces), length), tokenizer.pad_id, dtype=torch.int64)
    mask = torch.zeros((len(pieces), length), dtype=torch.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece.ids)] = torch.tensor(piece.ids, dtype=torch.int64)
        mask[row, : len(piece.ids)] = 1
    return ids, mask


def checked_text(text: str, length: int, long: str, *, hint: str = LONGER) -> str:
    """Return a text, or as much of it as is read before it is truncated. hint: what to do about one that is too long.

    Raises InputTooLong and InvalidInput as ``tokenize`` does.
    """
    most = CHARACTERS * length if long == REFUSE else max(CHARACTERS * length, LONGEST)
    if long == TRUNCATE:
        text = text[:most]
    if len(text) > most:
        raise InputTooLong(
            f"the text has {len(text)} characters, the limit is {most}",
            hint if long == REFUSE else "divide it into several texts",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if 0xDC80 <= ord(text[error.start]) <= 0xDCFF:  # as Python decodes files and arguments ("surrogateescape")
            raise InvalidInput("the text holds bytes that are not UTF-8", "encode it in UTF-8") from None
        raise InvalidInput("the text holds half a surrogate pair, which is no character", "decode it again") from None
    return text


def guarded(tokenizer: TextTokenizer, text: str, encode: Callable[[str], list[Encoding]]) -> list[Encoding]:
    """Return what the tokenizer makes of a text that is checked, in lower case if it wants that.

    Raises InvalidInput where the library fails, and for a text that the tokenizer makes GROWTH times longer.
    """
    text = text.lower() if tokenizer.lowercase else text
    with library_errors():
        normalizer = tokenizer.tokenizer.normalizer
        grown = len(normalizer.normalize_str(text)) if normalizer is not None else 0
        pieces = encode(text) if grown <= GROWTH * len(text) + GROWN else []
    if not pieces:
        raise InvalidInput(
            f"the tokenizer makes {grown} characters of the text's {len(text)}", "write it without ligatures"
        )
    return pieces


@contextmanager
def library_errors() -> Iterator[None]:
    """Raise InvalidInput where the tokenizers library fails, or panics, without what it says: it may hold the text."""
    try:
        yield
    except BaseException as error:  # a library in Rust, which raises a BaseException where it panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InvalidInput("the tokenizer fails on this text", "ask the server's owner") from None


def _pieces(tokenizer: Tokenizer, text: str, length: int, long: str) -> list[Encoding]:
    """Return the encodings of a text's pieces, special tokens included; one of all tokens where these leave no room."""
    if long == REFUSE:
        return [tokenizer.encode(text)]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if (room := length - tokenizer.num_special_tokens_to_add(is_pair=False)) > 0:
        encoding.truncate(room)
    encoding = tokenizer.post_process(encoding)
    return [encoding, *encoding.overflowing] if long == SPLIT else [encoding]
