"""The task of writing text. It loads a model; ``Session.generate`` asks it, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from secure.errors import InvalidInput
from secure.lowering.client_inputs import GENERATE, SETTINGS, TASK
from secure.models.causal import load_causal
from secure.models.settings import TOKEN
from secure.models.text import model_files
from secure.progress import Told, silent
from secure.tasks.task import PLAIN, Loaded, Loader, Served


@dataclass(frozen=True)
class Generate(Loader):
    """The task that continues a text. reveal: what clients learn of each step, which is the token alone.

    Raises InvalidInput for another word.
    """

    name: ClassVar[str] = GENERATE

    reveal: str = TOKEN

    def __post_init__(self) -> None:
        if self.reveal not in ("", TOKEN):
            raise InvalidInput(f"the task {self.name} reveals no {self.reveal}", f"{TOKEN}, and nothing of the others")

    def load(self, model: str, length: int = 0, sentences: Sequence[str] = (), told: Told = silent) -> Loaded:
        """Load the model; ``length`` and ``sentences`` mean nothing here, as ``build_generator`` makes its inputs."""
        told(0, 0, "loading the model")
        found = load_causal(model)
        return Loaded(
            found.name,
            found.module,
            [],
            found.tokenizer,
            found.tokenizer_json,
            about="; ".join(found.about),
            labels={TASK: self.name, SETTINGS: found.settings.encoded},
        )

    def files(self, model: str) -> Iterable[Path]:
        return model_files(model)

    def fits(self, served: Served) -> None:
        super().fits(served)
        if served.task != self.name:
            raise InvalidInput("this server's model generates no text", PLAIN)
