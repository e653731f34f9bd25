"""A task: what a person gives, what the model takes, what comes back. It knows no deployment and no network.

A new task is a class here, and a command in ``parties/cli`` if it is to have one; ``Session.run`` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from secure.models.tokens import TextTokenizer

Given = TypeVar("Given")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Served:
    """What a task may use of the model that a session asks: its tokenizer, if it takes text, and its padded length."""

    tokenizer: TextTokenizer | None
    length: int


@dataclass(frozen=True, eq=False, repr=False)
class Loaded:
    """A model ready to be compiled: the module, inputs that calibrate it, and the tokenizer that clients will need.

    about: a line for the model's owner, "" where there is nothing to say.
    """

    name: str
    module: nn.Module
    samples: Sequence[Mapping[str, Tensor]]
    tokenizer: TextTokenizer | None = None
    tokenizer_json: bytes = b""
    length: int = 0
    about: str = ""


class Task(ABC, Generic[Given, Answer]):
    """Subclasses are stateless; ``name`` is how commands and messages call the task."""

    name: ClassVar[str]
    noun: ClassVar[str] = "input"  # what messages call one of several

    def knows(self, model: str) -> bool:
        """Whether the task alone can load a model of this name; directories and other names are for texts."""
        return False

    @abstractmethod
    def load(self, model: str, length: int, sentences: Sequence[str] = ()) -> Loaded:
        """The model of this name or directory, for one padded length; 0: the task's own, where it has lengths.
        ``sentences``: more of them to calibrate with.
        """

    def check(self, given: Sequence[Given], served: Served) -> None:
        """Raise InvalidInput where the model that is served does not fit, or ``given`` as a whole is no input."""

    @abstractmethod
    def inputs(self, given: Given, served: Served) -> Mapping[str, Tensor]:
        """One input as the model's own arguments; raises InvalidInput, InputTooLong, EmptyInput."""

    @abstractmethod
    def answer(self, result: Any) -> Answer:
        """What the caller gets of the model's result (a float64 tensor, or a dict of them by name)."""
