"""The task of sentence embedding: one vector per text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from secure.errors import InvalidInput
from secure.models.text import load_text_model, model_files, text_inputs, text_samples
from secure.progress import Told, silent
from secure.tasks.task import Loaded, Served, Task

LENGTH = 128  # tokens to which texts are padded by default


class Embed(Task[str, Tensor]):
    """The task that maps a text to its embedding, a float64 vector."""

    name: ClassVar[str] = "embed"
    noun: ClassVar[str] = "text"

    def load(self, model: str, length: int = 0, sentences: Sequence[str] = (), told: Told = silent) -> Loaded:
        told(0, 0, "loading the model")
        found, length = load_text_model(model), length or LENGTH
        samples = text_samples(found, length, sentences)
        return Loaded(found.name, found.module, samples, found.tokenizer, found.tokenizer_json, length)

    def files(self, model: str) -> Iterable[Path]:
        return model_files(model)

    def check(self, given: Sequence[str], served: Served) -> None:
        if served.tokenizer is None:
            raise InvalidInput("this server's model takes no text", "use query with the model's own arguments")
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise InvalidInput("embed takes a list of texts", 'for example embed(["A sentence."])')

    def inputs(self, given: str, served: Served) -> Mapping[str, Tensor]:
        assert served.tokenizer is not None  # as ``check`` found
        return text_inputs(served.tokenizer, given, served.length)

    def answer(self, result: Any) -> Tensor:
        vector: Tensor = result[0]
        return vector
