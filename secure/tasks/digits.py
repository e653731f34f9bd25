"""The demonstration on images: a small vision transformer recognizes the digit on an 8x8 image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from secure.errors import InvalidInput
from secure.models.digits import EPOCHS, DigitsModel, load_digits, train_digits
from secure.models.settings import NONE
from secure.polynomial.forms import freeze_untrained
from secure.progress import Told, silent
from secure.tasks.closeness import ScoreError
from secure.tasks.task import Loaded, Served, Task

CALIBRATION = 400  # training images from which ranges are taken
HELD_OUT = 8  # test images on which a compiled model is compared with the original
NAME = "digits"


class Digits(Task[Tensor, int]):
    """The task that maps an image (64 pixels in 0..1) to its digit.

    Models are named by their layers: "digits" (one layer), "digits-2" and so on.
    """

    name: ClassVar[str] = NAME
    noun: ClassVar[str] = "image"
    stored: ClassVar[bool] = False

    def load(self, model: str, length: int = 0, sentences: Sequence[str] = (), told: Told = silent) -> Loaded:
        """Train the model from scratch, which takes half a minute at most. Raises InvalidInput."""
        if length or sentences:
            raise InvalidInput("images take no length and no sentences", "leave them out for a model on digits")
        trained, reached = train_digits(
            layers_of(model), epochs=EPOCHS, told=lambda epoch, _: told(epoch, EPOCHS, "training the model")
        )
        return replace(prepared(trained), about=f"accuracy on the test images {reached:.4f}")

    def files(self, model: str) -> Iterable[Path]:
        return ()

    def knows(self, model: str) -> bool:
        return is_digits(model)

    def inputs(self, given: Tensor, served: Served) -> Mapping[str, Tensor]:
        return {"images": given[None]}

    def answer(self, result: Any) -> int:
        return int(result.argmax())


def is_digits(model: str) -> bool:
    """True if a name is "digits" or begins with "digits-", unless there is a directory of that name."""
    return model.partition("-")[0] == NAME and not Path(model).is_dir()


def layers_of(model: str) -> int:
    """Return the number of layers in a model's name. Raises InvalidInput."""
    name, _, layers = model.partition("-")
    if name != NAME or (layers and not layers.isdigit()) or not 1 <= int(layers or 1) <= 4:
        raise InvalidInput(f"no model {model!r} on digits", "digits, digits-2, digits-3 or digits-4: the layers")
    return int(layers or 1)


def prepared(model: DigitsModel) -> Loaded:
    """Return a digits model with its calibration images, one per query."""
    data = load_digits()
    taken = data.train[0][:CALIBRATION], data.test[0][:HELD_OUT]
    samples, others = ([{"images": image[None]} for image in images] for images in taken)
    return Loaded(NAME, model, samples, held_out=lambda _: others, closeness=ScoreError(NONE))


def untrained(layers: int) -> DigitsModel:
    """Make a model with random weights, and ranges frozen without training. For costs only."""
    model = DigitsModel(layers).eval()
    images = load_digits().train[0][:CALIBRATION]
    freeze_untrained(model, lambda: model(images))
    return model
