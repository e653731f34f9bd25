"""The task of sentence embedding: one vector per text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from secure.errors import EmptyInput, InvalidInput
from secure.models.text import held_out_inputs, load_text_model, model_files, text_inputs, text_samples
from secure.models.tokens import LONG, REFUSE, TRUNCATE
from secure.progress import Told, silent
from secure.tasks.task import Loaded, Served, Task

LENGTH = 128  # tokens to which texts are padded by default


@dataclass(frozen=True)
class Embed(Task[str, Tensor]):
    """The task that maps a text to its embedding, a float64 vector.

    long: what becomes of a text of more tokens than the served length, special ones included.

    - "refuse": it is an error, InputTooLong.
    - "truncate": its first tokens count, as many as fit, as in sentence-transformers.
    - "split": its tokens are divided into pieces of the length, each with special tokens around it. The answer is the
      mean of their embeddings, each weighted by the number of its tokens with the special ones, and scaled to length 1
      if the model's are. Each piece takes the place of a text in a query, so the number of queries shows the server how
      many pieces all texts have together, and the time between queries may show where texts end.

    Raises InvalidInput for any other word.

    prompt: the name of one of the model's prompts, which is put before each text; None for the default that the model
    names, if any, and "" for none. dimensions: of a model that is loaded, the first numbers of an embedding that are
    its answer (Matryoshka); 0 for all.
    """

    name: ClassVar[str] = "embed"
    noun: ClassVar[str] = "text"

    long: str = REFUSE
    prompt: str | None = None
    dimensions: int = 0

    def __post_init__(self) -> None:
        if self.long not in LONG:
            raise InvalidInput(f"long texts are not taken by {self.long!r}", f"one of {', '.join(LONG)}")

    def load(self, model: str, length: int = 0, sentences: Sequence[str] = (), told: Told = silent) -> Loaded:
        told(0, 0, "loading the model")
        found = load_text_model(model, self.dimensions)
        length = length or min(LENGTH, found.maximum_length)
        samples = text_samples(found, length, sentences)
        return Loaded(
            found.name,
            found.module,
            samples,
            found.tokenizer,
            found.tokenizer_json,
            length,
            about="; ".join(found.about),
            normalized=found.normalized,
            samples_at=lambda other: text_samples(found, other, sentences),
            labels=found.prompts.labels() | ({"dimensions": str(self.dimensions)} if self.dimensions else {}),
            held_out=lambda other: held_out_inputs(found, other),
        )

    def files(self, model: str) -> Iterable[Path]:
        return model_files(model)

    def check(self, given: Sequence[str], served: Served) -> None:
        if served.tokenizer is None:
            raise InvalidInput("this server's model takes no text", "use query with the model's own arguments")
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise InvalidInput("embed takes a list of texts", 'for example embed(["A sentence."])')
        served.prompts.text(self.prompt)  # raises for a name that is none

    def inputs(self, given: str, served: Served) -> Mapping[str, Tensor]:
        assert served.tokenizer is not None  # as ``check`` found
        if not given.strip():
            raise EmptyInput("the text is empty: it has no tokens\nhint: give at least one word")
        if prompt := served.prompts.text(self.prompt):  # with it, a text without tokens would have an answer
            text_inputs(served.tokenizer, given, served.length, TRUNCATE)
        return text_inputs(served.tokenizer, prompt + given, served.length, self.long)

    def pieces(self, given: str, served: Served) -> Sequence[Mapping[str, Tensor]]:
        found = self.inputs(given, served)
        rows = len(next(iter(found.values())))
        return [{name: value[row : row + 1] for name, value in found.items()} for row in range(rows)]

    def fitted(self, inputs: Mapping[str, Tensor], length: int) -> Mapping[str, Tensor] | None:
        if inputs["attention_mask"][:, length:].any():
            return None
        return {name: value[:, :length] for name, value in inputs.items()}

    def joined(
        self, answers: Sequence[Tensor], pieces: Sequence[Mapping[str, Tensor]], given: str, served: Served
    ) -> Tensor:
        if len(answers) == 1:
            return answers[0]
        tokens = torch.stack([piece["attention_mask"].sum() for piece in pieces]).to(answers[0].dtype)
        mean = torch.tensordot(tokens / tokens.sum(), torch.stack(list(answers)), 1)
        return F.normalize(mean, dim=-1) if served.normalized else mean

    def answer(self, result: Any) -> Tensor:
        vector: Tensor = result[0]
        return vector
