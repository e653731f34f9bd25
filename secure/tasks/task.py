"""The base of tasks. A task turns what a person gives into a model's inputs, and the model's result into an answer.

It knows no deployment and no network. A new task is a class in this package, and a command in ``parties/cli`` if it
should have one; ``Session.run`` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from secure.errors import InvalidInput, printable
from secure.models.prompts import Prompts
from secure.models.settings import NONE, TaskSettings
from secure.models.tokens import TextTokenizer
from secure.progress import Told, silent
from secure.tasks.closeness import COSINE, Closeness

Given = TypeVar("Given")
Answer_co = TypeVar("Answer_co", covariant=True)


PLAIN = "ask for embeddings or a query's results, or another server"
"""The hint where a model was made for no task."""


@dataclass(frozen=True)
class Served:
    """The parts of a served model that a task may use: its tokenizer, if it takes text, and its padded length.

    normalized: the model's answers are vectors of length 1. prompts: what clients may put before their texts. task: the
    name of the task that it was made for; "" if its Program names none. settings: those of that task.
    """

    tokenizer: TextTokenizer | None
    length: int
    normalized: bool = False
    prompts: Prompts = field(default_factory=Prompts)
    task: str = ""
    settings: TaskSettings = NONE


@dataclass(frozen=True, eq=False, repr=False)
class Loaded:
    """A model ready to be compiled: the module, its calibration inputs, and the tokenizer that clients will need.

    about: a line for the model's owner, or "". normalized: the model's answers are vectors of length 1. samples_at:
    makes calibration inputs of another length; None if the model has only one. labels: more labels of its Programs.
    held_out: makes inputs of a length that are no calibration inputs, on which a compiled model is compared with the
    module, the first as long as the model takes; None if there are none. closeness: by what they are compared. exact:
    its answers hold numbers of ``EXACT`` fraction bits that must not be rounded.
    """

    name: str
    module: nn.Module
    samples: Sequence[Mapping[str, Tensor]]
    tokenizer: TextTokenizer | None = None
    tokenizer_json: bytes = b""
    length: int = 0
    about: str = ""
    normalized: bool = False
    samples_at: Callable[[int], Sequence[Mapping[str, Tensor]]] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    held_out: Callable[[int], Sequence[Mapping[str, Tensor]]] | None = None
    closeness: Closeness = COSINE
    exact: bool = False

    def at(self, length: int) -> Self:
        """Return the same model for another length. Raises InvalidInput if it has only one, or does not take this."""
        if length == self.length:
            return self
        if self.samples_at is None:
            raise InvalidInput(f"{self.name} takes no length", "leave it out")
        return replace(self, length=length, samples=self.samples_at(length))

    def batched(self, batch: int) -> Self:
        """Return the same model for ``batch`` inputs at once; its last calibration input is filled up with others."""
        if batch == 1:
            return self
        taken = [self.samples[i % len(self.samples)] for i in range(-(-len(self.samples) // batch) * batch)]
        return replace(self, samples=[stacked(taken[i : i + batch]) for i in range(0, len(taken), batch)])


def stacked(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put inputs of a model, of one row each or more, together along their first dimension."""
    return {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}


class Loader(ABC):
    """The base of what loads models. ``name`` is the name of its task in commands and messages."""

    name: ClassVar[str]
    stored: ClassVar[bool] = True  # its models are directories, or packages that hold one

    def knows(self, model: str) -> bool:
        """True if only this task can load a model of this name. Directories and other names are text models."""
        return False

    @abstractmethod
    def load(self, model: str, length: int, sentences: Sequence[str] = (), told: Told = silent) -> Loaded:
        """Load the model of this name or directory, for one padded length; 0 stands for the task's default, if any.

        ``sentences`` add to the calibration. ``told`` hears of progress.
        """

    @abstractmethod
    def files(self, model: str) -> Iterable[Path]:
        """Return all files that ``load`` may read for a model; none if it follows from the name alone."""

    def fits(self, served: Served) -> None:
        """Raise InvalidInput if the served model was made for another task."""
        if served.task not in ("", self.name):
            raise InvalidInput(
                f"this server's model is for the task {printable(served.task)[:40]!r}, not for {self.name!r}",
                f"unseen {printable(served.task)[:40]}, or ask another server",
            )


class Task(Loader, Generic[Given, Answer_co]):
    """A task that a session can run. Its options are all its state."""

    noun: ClassVar[str] = "input"  # for one of several inputs, in messages
    steady: ClassVar[bool] = True  # ``joined`` takes the same time whatever the answers say

    def check(self, given: Sequence[Given], served: Served) -> None:
        """Raise InvalidInput if the served model does not fit the task, or ``given`` as a whole is no input."""

    @abstractmethod
    def inputs(self, given: Given, served: Served) -> Mapping[str, Tensor]:
        """Turn one input into the model's own arguments. Raises InvalidInput, InputTooLong and EmptyInput."""

    def pieces(self, given: Given, served: Served) -> Sequence[Mapping[str, Tensor]]:
        """Turn one input into the arguments of each query place that it takes: one, for most tasks. Raises alike.

        A server sees how many queries run, so how many places all inputs take together.
        """
        return [self.inputs(given, served)]

    def fitted(self, inputs: Mapping[str, Tensor], length: int) -> Mapping[str, Tensor] | None:
        """Return the arguments of one place for a shorter padded length; None if they do not fit, as is assumed here.

        A model that is served for several lengths gets them at the shortest that holds them, which the parties see.
        """
        return None

    def joined(
        self, answers: Sequence[Any], pieces: Sequence[Mapping[str, Tensor]], given: Given, served: Served
    ) -> Answer_co:
        """Make one answer of those of an input's pieces, which are as many and in the same order.

        pieces: what ``pieces`` returned, or ``fitted`` made of it. This runs between queries, so that its time shows:
        what of the work depends on the input alone belongs to ``pieces``.
        """
        found: Answer_co
        (found,) = answers
        return found

    @abstractmethod
    def answer(self, result: Any) -> Answer_co:
        """Turn the model's result (a float64 tensor, or a dict of them by name) into the caller's answer."""
