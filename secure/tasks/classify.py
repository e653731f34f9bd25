"""The task of classification: texts or pairs of texts to the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secure.errors import InvalidInput
from secure.lowering.client_inputs import SETTINGS, TASK
from secure.models.heads import CLASSIFY
from secure.models.images import image_inputs, is_image, load_image_head, sees_images
from secure.models.settings import LABEL, LOGITS, SIGMOID, SOFTMAX, TaskSettings
from secure.progress import Told, silent
from secure.tasks.closeness import ScoreError
from secure.tasks.headed import Headed, is_pair
from secure.tasks.task import Loaded, Served

Classified = Any
"""{"label": str, "score": float | None}, or a list of such; see ``Classify``."""


@dataclass(frozen=True)
class Classify(Headed[Any, Classified]):
    """The task that maps a text, or a pair of texts, to the name of its class.

    An input is a text, a pair (text, text), or {"text": ..., "text_pair": ...}, where the pair may be None or left
    out, as the pipeline takes them; of a model of images, the ``Path`` of
    an image file, its bytes, or a ``PIL.Image.Image``. top_k: 1 gives the most likely class of
    each input, {"label": its name, "score": its probability}, as transformers' pipeline does; another number a list of
    so many, the most likely first; None a list of all. Where the server's owner reveals labels alone, there is no score
    (None) and no second class, so that only 1 is taken; of a model of several labels, the answer is then the list of
    those that hold, whose probabilities are above 1/2.

    Raises InvalidInput for a ``top_k`` below 1.
    """

    name: ClassVar[str] = CLASSIFY
    wanted: ClassVar[str] = "texts, or pairs of texts, from this server's model"

    top_k: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_k < 1:
            raise InvalidInput(f"the {self.top_k} most likely classes", "at least 1, or None for all")

    def takes(self, given: Any) -> bool:
        if isinstance(given, Mapping):
            return given.keys() <= {"text", "text_pair"} and all(isinstance(each, str) for each in self._texts(given))
        return isinstance(given, str) or is_pair(given)

    def load(self, model: str, length: int = 0, sentences: Sequence[str] = (), told: Told = silent) -> Loaded:
        """Load a classifier of texts, or of images; ``sentences`` of the latter are names of image files."""
        if not sees_images(model):
            return super().load(model, length, sentences, told)
        if length:
            raise InvalidInput("images have no length in tokens", "leave it out for a model of images")
        told(0, 0, "loading the model")
        found = load_image_head(model, self.name, self.reveal)
        samples, labels = found.samples(sentences), {TASK: self.name, SETTINGS: found.settings.encoded}
        return Loaded(
            found.name,
            found.module,
            samples,
            about=found.about,
            labels=labels,
            held_out=lambda _: found.held_out(),
            closeness=ScoreError(found.settings),
        )

    def check(self, given: Sequence[Any], served: Served) -> None:
        if served.settings.image is None:
            super().check(given, served)
        elif isinstance(given, str | bytes) or not all(is_image(each) for each in given):
            hint = "pathlib.Path of image files, their bytes, or PIL images; unseen classify --image-files"
            raise InvalidInput("this server's model takes images, not texts", hint)
        if served.settings.reveal == LABEL and self.top_k != 1:
            raise InvalidInput("this server reveals one label a text, and nothing of other classes", "leave top_k out")

    def pieces(self, given: Any, served: Served) -> Sequence[Mapping[str, Tensor]]:
        image = served.settings.image
        return super().pieces(given, served) if image is None else [image_inputs(given, image)]

    def texts(self, given: Any) -> tuple[str, str | None]:
        if isinstance(given, str):
            return given, None
        if isinstance(given, Mapping):
            first, *second = self._texts(given)
            return first, second[0] if second else None
        return given[0], given[1]

    @staticmethod
    def _texts(given: Mapping[str, Any]) -> list[Any]:
        second = given.get("text_pair")
        return [given.get("text"), *([] if second is None else [second])]

    def joined(
        self, answers: Sequence[Tensor], pieces: Sequence[Mapping[str, Tensor]], given: Any, served: Served
    ) -> Classified:
        (found,), settings = answers, served.settings
        if settings.reveal == LABEL:
            if settings.activation == SIGMOID:
                return [
                    {"label": settings.labels[i], "score": None} for i in found.round().nonzero().flatten().tolist()
                ]
            return {"label": label_of(settings, found), "score": None}
        scores = scores_of(settings, found)
        if self.top_k == 1:
            best = int(scores.argmax())
            return {"label": settings.labels[best], "score": float(scores[best])}
        order = scores.argsort(descending=True, stable=True)[: self.top_k].tolist()
        return [{"label": settings.labels[i], "score": float(scores[i])} for i in order]


def label_of(settings: TaskSettings, index: Tensor) -> str:
    """Return the name of the class that a revealed index (a number) names. Raises InvalidInput if it names none."""
    if not 0 <= (i := round(float(index))) < len(settings.labels):
        raise InvalidInput("the answer is no class of the model", "ask the server's owner")
    return settings.labels[i]


def scores_of(settings: TaskSettings, found: Tensor) -> Tensor:
    """Return the probability of each class, (..., classes), from what was revealed of it.

    Raises InvalidInput for a result that has not as many classes as there are names.
    """
    if settings.labels and found.shape[-1] != len(settings.labels):
        raise InvalidInput("the answer has not the model's number of classes", "ask the server's owner")
    if settings.reveal != LOGITS:
        return found
    if settings.activation == SOFTMAX:
        return torch.softmax(found, -1)
    return torch.sigmoid(found) if settings.activation == SIGMOID else found
