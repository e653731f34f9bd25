"""From tokens to text, as they come: pieces that can be printed at once, and the strings that stop a text.

A token may hold a part of a character. What is given is therefore the part of the text that no later token changes. The
pieces together are what the tokenizer makes of all tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from secure.errors import InvalidInput
from secure.models.tokens import TextTokenizer, library_errors

UNKNOWN = "\ufffd"
"""The character that stands for bytes that are none."""


class Detokenizer:
    """The text of tokens that are added one by one. Special tokens are no part of it.

    before: the tokens of the prompt, whose text is not repeated. They matter: a token that begins with a space has it
    everywhere but at the beginning of a text. Raises InvalidInput for a tokenizer that makes no text of tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer.tokenizer
        if self._tokenizer.decoder is None:
            raise InvalidInput(
                "the tokenizer of this model makes no text of tokens, or by a decoder that clients do not run",
                "give token ids",
            )
        with library_errors():
            added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        self._ids = list(before)
        # bytes at the end of the prompt that are no character yet may become one
        self._shown = len(self._decoded(len(self._ids)).rstrip(UNKNOWN))

    def add(self, token: int) -> str:
        """Return the text that has become certain with one more token, which may be "".

        Not certain is a character whose last bytes are to come, and with a tokenizer that falls back to bytes all bytes
        in a row, because one wrong byte makes none of them a character.
        """
        self._ids.append(token)
        end = len(self._ids)
        while end and self._open(self._ids[end - 1]):
            end -= 1
        return self._behind(self._decoded(end).removesuffix(UNKNOWN))

    def end(self) -> str:
        """Return the text that is left when no token follows."""
        return self._behind(self._decoded(len(self._ids)))

    def _behind(self, text: str) -> str:
        """Return what was not yet given of a text."""
        piece = text[self._shown :]
        self._shown += len(piece)
        return piece

    def _open(self, token: int) -> bool:
        """True if a token is a byte, or has no text of its own, so that it does not end a row of bytes."""
        text = self._tokenizer.id_to_token(token)
        return token in self._special or text is None or (len(text) == 6 and text[:3] == "<0x" and text[-1] == ">")

    def _decoded(self, count: int) -> str:
        with library_errors():
            return self._tokenizer.decode(self._ids[:count], skip_special_tokens=True)


class StopStrings:
    """A text that ends where it has the first of several strings; without any it goes on.

    What may be the beginning of such a string is held back until that is decided, so that nothing of it is given. The
    string that is complete first counts, whatever pieces the text comes in; of several that end at one place, the
    longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = tuple(stops), "", False

    def add(self, text: str) -> str:
        """Return what is certain of the text, with one more piece of it. ``found`` is True once it has ended."""
        if self.found:
            return ""
        known = len(self._held)
        self._held += text
        for end in range(known + 1, len(self._held) + 1):
            starts = [end - len(stop) for stop in self._stops if self._held.endswith(stop, 0, end)]
            if starts:
                given, self._held, self.found = self._held[: min(starts)], "", True
                return given
        keep = self._beginning()
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def end(self) -> str:
        """Return what was held back, when no text follows."""
        given, self._held = self._held, ""
        return given

    def _beginning(self) -> int:
        """Return how many characters at the end may begin one of the strings."""
        longest = max(map(len, self._stops), default=0)
        ends = range(min(len(self._held), longest - 1), 0, -1)
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)
