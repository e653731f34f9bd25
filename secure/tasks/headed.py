"""The base of tasks whose models have a head: they are loaded alike, and their inputs are texts or pairs of texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from secure.errors import InvalidInput
from secure.lowering.client_inputs import SETTINGS, TASK
from secure.models.calibration import SENTENCES
from secure.models.heads import load_head
from secure.models.pairs import Encoded, encode
from secure.models.text import model_files
from secure.models.tokens import REFUSE, TRUNCATE
from secure.progress import Told, silent
from secure.tasks.closeness import ScoreError
from secure.tasks.embed import LENGTH
from secure.tasks.task import PLAIN, Answer_co, Given, Loaded, Served, Task

Pair = tuple[str, str]


def is_pair(given: Any) -> bool:
    """Tell whether an input is a pair of texts."""
    return isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(text, str) for text in given)


class Tokenized(dict[str, Tensor]):
    """The arguments of one place, with the tokens of which they are made.

    Answers are put together from these: if a text were divided again between queries, the time of that would show.
    """

    def __init__(self, inputs: Mapping[str, Tensor], encoded: Encoded) -> None:
        super().__init__(inputs)
        self.encoded = encoded


def tokens_of(piece: Mapping[str, Tensor]) -> Encoded:
    """Return the tokens of a piece that ``Headed.pieces`` made."""
    assert isinstance(piece, Tokenized)
    return piece.encoded


@dataclass(frozen=True)
class Headed(Task[Given, Answer_co]):
    """A task of models with a head.

    long: what becomes of a text of more tokens than the served length: "refuse" (InputTooLong), "truncate", or, of
    tasks that look for places in a text, "split". reveal: what a model is made to reveal when it is loaded, see
    ``secure.models.heads``; "" stands for the task's default. It says nothing about a model that is asked.

    Raises InvalidInput for other words.
    """

    noun: ClassVar[str] = "text"
    steady: ClassVar[bool] = False
    ways: ClassVar[tuple[str, ...]] = (REFUSE, TRUNCATE)

    long: str = REFUSE
    reveal: str = ""

    def __post_init__(self) -> None:
        if self.long not in self.ways:
            known = ", ".join(self.ways)
            raise InvalidInput(f"long texts are not taken by {self.long!r} in the task {self.name}", f"one of {known}")

    def load(self, model: str, length: int = 0, sentences: Sequence[str] = (), told: Told = silent) -> Loaded:
        told(0, 0, "loading the model")
        found = load_head(model, self.name, self.reveal)
        length = length or min(LENGTH, found.maximum_length)
        given = [*SENTENCES, *sentences]
        return Loaded(
            found.name,
            found.module,
            found.samples(self.name, length, given),
            found.tokenizer,
            found.tokenizer_json,
            length,
            found.about,
            samples_at=lambda other: found.samples(self.name, other, given),
            labels={TASK: self.name, SETTINGS: found.settings.encoded},
            held_out=lambda other: found.held_out(self.name, other),
            closeness=ScoreError(found.settings),
        )

    def files(self, model: str) -> Iterable[Path]:
        return model_files(model)

    def fits(self, served: Served) -> None:
        super().fits(served)
        if served.task != self.name:
            raise InvalidInput(f"this server's model is not for the task {self.name!r}", PLAIN)

    def check(self, given: Sequence[Given], served: Served) -> None:
        if isinstance(given, str | Mapping) or not all(self.takes(each) for each in given):
            raise InvalidInput(f"{self.name} takes {self.wanted}", "give a list of them")
        if served.tokenizer is None:
            raise InvalidInput("this server's model takes no text", "ask another server")

    wanted: ClassVar[str] = "texts"

    def takes(self, given: Any) -> bool:
        """Tell whether one input has the right Python types."""
        return isinstance(given, str)

    @abstractmethod
    def texts(self, given: Given) -> tuple[str, str | None]:
        """Return the one or two texts of an input."""

    def encoded(self, given: Given, served: Served) -> list[Encoded]:
        """Return the pieces of an input as tokens, with the places of these in the text."""
        assert served.tokenizer is not None  # as ``check`` found
        first, second = self.texts(given)
        return encode(served.tokenizer, first, second, served.length, self.long)

    def pieces(self, given: Given, served: Served) -> Sequence[Mapping[str, Tensor]]:
        segments = served.settings.segments
        return [Tokenized(each.inputs(segments=segments), each) for each in self.encoded(given, served)]

    def inputs(self, given: Given, served: Served) -> Mapping[str, Tensor]:
        return self.pieces(given, served)[0]

    def fitted(self, inputs: Mapping[str, Tensor], length: int) -> Mapping[str, Tensor] | None:
        if inputs["attention_mask"][:, length:].any():
            return None
        return Tokenized({name: value[:, :length] for name, value in inputs.items()}, tokens_of(inputs))

    def answer(self, result: Any) -> Any:
        return result[0]
