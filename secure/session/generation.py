"""A text as it is written: the sizes of a decoder's Programs that it takes, its tokens, and its text.

Whatever a server's tokenizer and chat template make of a prompt shows neither in messages nor in their times: see
``secure.session.session``. So mistakes that they find are kept, and raised after the query of the prompt took place.
"""

from __future__ import annotations

import operator
import re
import secrets
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secure.errors import Error, InputTooLong, InvalidInput, InvalidProgram
from secure.lowering.client_inputs import MOST_ROWS
from secure.models.chat import check_messages, rendered
from secure.models.decoder import DRAFT_LENGTH, MOST_DRAFTED, STEPWISE, TEMPERATURE
from secure.models.detokenizer import Detokenizer, StopStrings
from secure.models.draft import Draft, load_draft
from secure.models.settings import WritingSettings, settings_of
from secure.models.tokens import REFUSE, TextTokenizer, checked_text, guarded, library_errors
from secure.session.link import LOST, Offer

STOP, LENGTH = "stop", "length"
"""The reasons why a text ends: a token or a string that ends it, or the number of tokens that was asked for."""

GO_ON = "hint: what was written is kept; to go on, ask again with all of it behind the prompt"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that writes text: of its prompts, the shortest first, of one more token, and of a pass.

    verify: the pass over a token and drafts of those behind it; None if the model has none. capacity: the rows that a
    conversation takes. vocabulary: the tokens that the model knows. Without sizes for prompts a step reads each of
    their tokens, and tells the scores of the next one.
    """

    prompts: tuple[Offer, ...]
    step: Offer
    verify: Offer | None
    capacity: int
    vocabulary: int

    @classmethod
    def of(cls, offers: Sequence[Offer], labels: Mapping[str, str]) -> Sizes:
        """Tell the sizes by the labels of any of the Programs. Raises InvalidProgram if they are not all there."""
        said = (labels.get(name, "") for name in (MOST_ROWS, "vocabulary", DRAFT_LENGTH))
        capacity, known, drafted = map(_number, said)
        by_length = {offer.length: offer for offer in sorted(offers, key=lambda offer: offer.length)}
        step, verify = by_length.pop(1, None), by_length.pop(drafted, None) if drafted > 1 else None
        verify = verify if drafted <= MOST_DRAFTED else None  # a client guesses so many tokens for it
        prompts = tuple(offer for length, offer in by_length.items() if length)
        stepwise = labels.get(STEPWISE) is not None and not prompts
        if step is None or not (prompts or stepwise) or not capacity or not known:
            raise InvalidProgram(
                "this session has no Programs for a prompt and a step\n"
                "hint: if one Program is pinned (--program-digest), pin all the model's by their digest together"
            )
        return cls(prompts, step, verify, capacity, known)

    def check_steps(self, prompt: Sequence[int], count: int) -> None:
        """Check a prompt that is read token by token, and ``count`` tokens behind it. Raises InvalidInput."""
        if count < 1:
            raise InvalidInput(f"{count} new tokens", "1 or more")
        if not len(prompt):
            raise InvalidInput("the prompt has no token", "begin with the token that begins a text")
        if not all(0 <= token < self.vocabulary for token in prompt):
            raise InvalidInput(
                f"a token id is outside 0..{self.vocabulary - 1}", "use the tokenizer that belongs to the model"
            )
        if (steps := len(prompt) + count - 1) > self.capacity:
            raise InputTooLong(
                f"{count} new tokens after a prompt of {len(prompt)} take {steps} steps",
                f"{self.capacity} at most; shorten the prompt, or compile with a greater capacity",
            )


@dataclass(frozen=True)
class Writing:
    """The sizes that a text takes.

    prompt, step, verify: those of its prompt, of every later token, and of a pass over drafts, if there is one.
    capacity: the rows that its conversation takes. error: the reason why the prompt cannot be used, if any. drafted:
    the rows up to which there are drafts; None: all.
    """

    prompt: Offer
    step: Offer
    verify: Offer | None
    capacity: int
    error: Error | None = None
    drafted: int | None = None

    def after(self, filled: int, count: int) -> Offer:
        """Return the size of the query that reads ``filled`` rows, when ``count`` tokens are still to be written.

        It follows from what all parties see.
        """
        most = self.capacity if self.drafted is None else min(self.capacity, self.drafted)
        if self.verify is None or count < 2 or filled + self.verify.length > most:
            return self.step
        return self.verify


def writing(offers: Sequence[Offer], labels: Mapping[str, str], prompt: Sequence[int], count: int) -> Writing:
    """Choose the sizes for a prompt, and for ``count`` tokens that are written.

    What is wrong with the prompt itself is returned, and its query takes place; a prompt that is too long takes the
    greatest size. Raises InvalidInput for an empty prompt, and for more tokens than there is room for.
    """
    if count < 1:
        raise InvalidInput(f"{count} new tokens", "1 or more")
    if not len(prompt):
        raise InvalidInput("the prompt has no token", "begin with the token that begins a text")
    sizes = Sizes.of(offers, labels)
    found = next((o for o in sizes.prompts if o.length >= len(prompt)), sizes.prompts[-1])
    room = sizes.capacity - found.length + 1
    error: InvalidInput | None = None
    if len(prompt) > found.length:
        error = InputTooLong(f"the prompt has {len(prompt)} tokens, at most {found.length} fit", "shorten it")
    elif not all(0 <= token < sizes.vocabulary for token in prompt):
        error = InvalidInput(
            f"a token id is outside 0..{sizes.vocabulary - 1}", "use the tokenizer that belongs to the model"
        )
    if count > room:
        raise error or InvalidInput(
            f"{count} new tokens after a prompt that is padded to {found.length}",
            f"{room} at most; compile with a greater capacity",
        )
    return Writing(found, sizes.step, sizes.verify, sizes.capacity, error)


def hidden_steps(labels: Mapping[str, str], count: int) -> int:
    """Return the steps that a text of ``count`` tokens takes at most if its length is hidden."""
    return _number(labels.get(MOST_ROWS, "")) if STEPWISE in labels else count


def temperature_for(labels: Mapping[str, str], wanted: float) -> float | None:
    """Return the temperature for the Programs' inputs; None: they take none. Raises InvalidInput for another one."""
    if (written := labels.get(TEMPERATURE)) is None:
        if wanted:
            raise InvalidInput(
                f"a temperature of {wanted}",
                "this model writes the most likely tokens; its owner compiles it with a temperature for samples",
            )
        return None
    most = float(written) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", written) else 0.0
    if not 0 <= wanted <= most:
        raise InvalidInput(f"a temperature of {wanted}", f"0 to {most:g}, for which this model is compiled")
    return wanted


def steps_of(labels: Mapping[str, str]) -> set[int]:
    """Return the lengths of the sizes that are no prompts: of one more token, and of a pass."""
    return {1, _number(labels.get(DRAFT_LENGTH, "")) or 1}


def drafting(
    given: object, offers: Sequence[Offer], labels: Mapping[str, str], tokenizer: TextTokenizer | None, *, hidden: bool
) -> Draft | None:
    """Return the draft for a text; None if none is given. hidden: the length of the text shall not show.

    Raises InvalidInput for one that the Programs, or hiding, do not allow, and what ``load_draft`` raises.
    """
    if given is None:
        return None
    if hidden:
        raise InvalidInput(
            "with a draft a text shows how fast it grows, so its length cannot be hidden",
            "--hide-length (hide_length) or --draft (draft), not both: hidden, a text takes as many passes as tokens",
        )
    sizes = Sizes.of(offers, labels)
    if sizes.verify is None:
        raise InvalidInput(
            "this model has no Program that checks drafts",
            "leave the draft out; the model's owner compiles with --draft-length (draft_length)",
        )
    draft, least = load_draft(given, tokenizer, sizes.vocabulary), sizes.prompts[0].length + sizes.verify.length
    if draft.rows is not None and draft.rows < least:
        raise InvalidInput(f"the draft takes texts of {draft.rows} tokens", f"{least} or more")
    return draft


def _number(text: str) -> int:
    """Read a label that is a number of tokens; 0 if it is none."""
    return int(text) if re.fullmatch("[1-9][0-9]{0,6}", text) else 0


def sizes_for(offers: Sequence[Offer], labels: Mapping[str, str], prompt: Sequence[int] | Error, count: int) -> Writing:
    """Choose the sizes as ``writing`` does, for a prompt that a tokenizer made: all that is wrong with it is returned.

    Then the greatest size is taken after which there is room. Raises InvalidInput for more tokens than there is room
    for after any prompt.
    """
    shortest = writing(offers, labels, [0], count)
    try:
        if isinstance(prompt, Error):
            raise prompt
        return writing(offers, labels, prompt, count)
    except Error as error:
        roomy = [offer for offer in Sizes.of(offers, labels).prompts if offer.length + count - 1 <= shortest.capacity]
        return replace(shortest, prompt=roomy[-1], error=error)


def room(offers: Sequence[Offer], labels: Mapping[str, str]) -> int:
    """Return the number of tokens for which there is room after any prompt. Raises InvalidProgram if there is none."""
    sizes = Sizes.of(offers, labels)
    if not sizes.prompts:  # half of it is left to the prompt
        return max(1, sizes.capacity // 2)
    return max(1, sizes.capacity - sizes.prompts[-1].length + 1)


def chosen(scores: Tensor, temperature: float) -> int:
    """Choose a token by its scores: the most likely one, or at a temperature a sample that nobody can predict."""
    if not temperature:
        return int(scores.argmax())
    shares = torch.softmax(scores.to(torch.float64) / temperature, -1).cumsum(-1)
    drawn = secrets.randbits(53) / 2.0**53
    return min(int((shares <= drawn * shares[-1]).sum()), len(scores) - 1)


@dataclass(frozen=True)
class Wanted:
    """A text that is asked for: its prompt, and what ends it. ``wanted`` makes one.

    prompt: token ids, a text, or chat messages. tokens, strings: those that end the text. ends: the tokens that end
    texts of the model, if they count.
    """

    prompt: Sequence[int] | str | list[dict[str, str]]
    tokens: frozenset[int]
    strings: tuple[str, ...]
    ends: frozenset[int]
    tokenizer: TextTokenizer | None
    settings: WritingSettings

    @property
    def in_text(self) -> bool:
        """True if the prompt is a text or messages, so that the answer is one too."""
        return isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], dict))

    def ids(self, length: int) -> list[int]:
        """Return the tokens of the prompt. length: the most that are taken.

        Raises what the tokenizer and the template of the server have against it: InvalidInput, InputTooLong.
        """
        if not self.in_text:
            return list(self.prompt)  # type: ignore[arg-type]
        assert self.tokenizer is not None  # as ``wanted`` found
        special, text = True, self.prompt
        if not isinstance(text, str):
            special, text = False, rendered(self.settings, text)  # type: ignore[arg-type]
        encode = self.tokenizer.tokenizer.encode
        found = guarded(
            self.tokenizer,
            checked_text(text, length, REFUSE, hint="shorten it"),
            lambda ready: [encode(ready, add_special_tokens=special)],
        )
        return list(found[0].ids)

    def stops(self) -> tuple[frozenset[int], tuple[str, ...]]:
        """Return the tokens and the strings that end the text. A string that is a special token counts as that.

        Raises InvalidInput for a string that the model cannot write.
        """
        tokens, strings = {*self.tokens, *self.ends}, list[str]()
        for stop in self.strings:
            assert self.tokenizer is not None  # as ``wanted`` found
            if (id := _special(self.tokenizer, stop)) is not None:
                tokens.add(id)
            elif _unknown(self.tokenizer, stop):
                raise InvalidInput(
                    f"the model never writes the stop string {stop[:40]!r}", "its tokenizer knows it not"
                )
            else:
                strings.append(stop)
        return frozenset(tokens), tuple(strings)


def wanted(
    prompt: object,
    stop: object,
    labels: Mapping[str, str],
    tokenizer: TextTokenizer | None,
    *,
    ignore_end: bool,
) -> Wanted:
    """Check what is asked by its Python types alone. Raises InvalidInput."""
    settings = settings_of(labels)[1].writing or WritingSettings()
    tokens, strings = _stops(stop)
    found: Any = prompt
    if not isinstance(prompt, str):
        messages = isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
        found = check_messages(prompt) if messages else token_ids(prompt)
    made = Wanted(found, tokens, strings, frozenset(() if ignore_end else settings.ends), tokenizer, settings)
    if (made.in_text or strings) and tokenizer is None:
        raise InvalidInput("this session's model has no tokenizer", "give token ids, and token ids to stop at")
    return made


def _stops(stop: object) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the tokens and the strings of what was given as ``stop``: one string, or a collection of both."""
    hint = 'a string, or a list of strings and token ids, such as ["\\n\\n"]'
    if not isinstance(stop, str | Collection) or isinstance(stop, bytes | Mapping):
        raise InvalidInput(f"stop is a {type(stop).__name__}", hint)
    given = [stop] if isinstance(stop, str) else list(stop)
    if "" in given:
        raise InvalidInput("a stop string is empty: every text would end before it begins", "leave it out")
    if wrong := [each for each in given if isinstance(each, bool) or not isinstance(each, str | int)]:
        raise InvalidInput(f"stop holds a {type(wrong[0]).__name__}", hint)
    tokens = frozenset(each for each in given if isinstance(each, int))
    return tokens, tuple(each for each in given if isinstance(each, str))


def _special(tokenizer: TextTokenizer, text: str) -> int | None:
    with library_errors():
        added = tokenizer.tokenizer.get_added_tokens_decoder()
    return next((id for id, token in added.items() if token.special and token.content == text), None)


def _unknown(tokenizer: TextTokenizer, text: str) -> bool:
    """True if a tokenizer has no tokens for all of a text."""
    known = checked_text(text, len(text), REFUSE)
    found = guarded(tokenizer, known, lambda ready: [tokenizer.tokenizer.encode(ready, add_special_tokens=False)])
    name = getattr(tokenizer.tokenizer.model, "unk_token", None)
    unknown = None if name is None else tokenizer.tokenizer.token_to_id(name)
    return not found[0].ids or unknown in found[0].ids


class Prepared:
    """A prompt as token ids, or why there are none, and the text that is made of the tokens behind it.

    It takes tokens one by one, and says when the text has ended.
    """

    def __init__(self, asked: Wanted, length: int) -> None:
        self.ids: list[int] | Error
        self._tokens, strings = asked.tokens | asked.ends, tuple[str, ...]()
        self._text: Detokenizer | None = None
        try:
            self.ids = asked.ids(length)
            self._tokens, strings = asked.stops()
            made = asked.tokenizer
            if made is not None and (asked.in_text or strings or made.tokenizer.decoder is not None):
                self._text = Detokenizer(made, self.ids)
        except Error as error:
            self.ids = error
        self._held = StopStrings(strings)

    def add(self, token: int) -> tuple[str, bool]:
        """Return the text that became certain with a token, and whether the text has ended."""
        if token in self._tokens:
            return self._held.add(self._text.end() if self._text else "") + self._held.end(), True
        piece = self._held.add(self._text.add(token) if self._text else "")
        return piece, self._held.found

    def end(self) -> tuple[str, bool]:
        """Return the text that was held back, and whether it ends at a string, when no token follows."""
        piece = self._held.add(self._text.end() if self._text else "")
        return piece + self._held.end(), self._held.found


class Generation(Iterator[Any]):
    """A text that is being written: iterate over it, and each piece comes as soon as it is there.

    The pieces are texts that can be printed one behind the other if the prompt is a text or messages, and token ids if
    it is a list of them. ids: the tokens so far, the one that ended the text among them. text: the text so far, without
    that token, and up to a string that stopped it; "" where the model has no tokenizer that makes texts.
    finish_reason: None while more may come, then "stop" or "length". prompt_tokens: the tokens of the prompt, 0 until
    the text has begun. drafted, agreed: the tokens of a draft that passes checked so far, and those of them that the
    model chose too.

    What came before a failure stays in ``ids`` and ``text``. The text cannot go on after it, as what the parties keep
    of it is lost with them; a new one can begin with all of it as its prompt. A text that is left in the middle keeps
    its place at the servers until ``close``, or until nothing holds it.
    """

    def __init__(self, steps: Callable[[Generation], Generator[None]], *, in_text: bool) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.prompt_tokens = 0
        self.finish_reason: str | None = None
        self.drafted = self.agreed = 0
        self._in_text, self._pieces = in_text, deque[Any]()
        # no cycle: a text that nobody holds ends at once, and its place at the servers is free
        self._steps = steps(weakref.proxy(self))

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Any:
        while not self._pieces:
            try:
                next(self._steps)
            except StopIteration:
                if not self._pieces:
                    raise
            except LOST as error:
                if not self.ids:
                    raise
                raise type(error)(f"after {len(self.ids)} tokens: {error}\n{GO_ON}") from None
        return self._pieces.popleft()

    def close(self) -> None:
        """Leave the text where it is: its place at the servers is free, and no more of it comes."""
        self._steps.close()

    def complete(self) -> Generation:
        """Wait for the whole text, and return this."""
        for _ in self:
            pass
        return self

    def take(self, tokens: Sequence[int], prepared: Prepared) -> bool:
        """Take more tokens, for the session alone; return True if the text has ended with one of them."""
        for token in tokens:
            self.ids.append(token)
            piece, over = prepared.add(token)
            self._give(piece, STOP if over else None)
            if not self._in_text:
                self._pieces.append(token)
            if over:
                return True
        return False

    def checked(self, guesses: Sequence[int], chosen: Sequence[int]) -> list[int]:
        """Return those of the model's choices that go on with the text, for the session alone, and count.

        chosen: what the model chooses behind the text, and behind each of the guesses if those before it are right.
        """
        agreed = next((at for at, (a, b) in enumerate(zip(guesses, chosen, strict=False)) if a != b), len(guesses))
        self.drafted, self.agreed = self.drafted + len(guesses), self.agreed + agreed
        return list(chosen[: agreed + 1])

    def end(self, prepared: Prepared) -> None:
        """Take what was held back, for the session alone, as no token follows."""
        piece, stopped = prepared.end()
        self._give(piece, STOP if stopped else LENGTH)

    def _give(self, piece: str, reason: str | None) -> None:
        self.text += piece
        self.finish_reason = reason
        if piece and self._in_text:
            self._pieces.append(piece)


def token_ids(prompt: object) -> list[int]:
    """Return a prompt as a list of integers. Raises InvalidInput for anything else than a sequence of them."""
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        return [operator.index(token) for token in prompt]  # type: ignore[attr-defined]
    except TypeError:
        raise InvalidInput(
            f"the prompt is a {type(prompt).__name__}", "give a text, chat messages, or token ids"
        ) from None
