"""The settings of a task: all that clients must know of a model with a head, beside its Program and tokenizer.

They are a JSON document in the Program's labels. So they are public, and all parties agree on them with the Program,
whose digest covers them. A client reads those of a server that it does not trust: everything in them is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, FailFast, Field, TypeAdapter, ValidationError, with_config

from protocols.fields import Flag, Real
from secure.capture.documents import read_document, what_is_wrong
from secure.errors import InvalidInput, InvalidProgram
from secure.lowering.client_inputs import MAXIMUM_SETTINGS, SETTINGS, TASK

LABEL, SPAN, TOKEN, PROBABILITIES, LOGITS, IDS, PASSAGES, IDS_SCORES, PASSAGES_SCORES = REVEALS = (
    *("label", "span", "token", "probabilities", "logits"),
    *("ids", "passages", "ids-scores", "passages-scores"),
)
"""The forms of an answer. See ``secure.models.heads`` for what the client learns by each."""

SCORED = (IDS_SCORES, PASSAGES_SCORES)
"""Those of a search by which clients learn scores."""

SOFTMAX, SIGMOID, IDENTITY = ACTIVATIONS = ("softmax", "sigmoid", "identity")
"""The functions that make scores of a model's logits."""

EXACT = 14
"""Fraction bits of what a model gives exactly, such as the bytes of a text."""

MAXIMUM_CLASSES = 1 << 15
MAXIMUM_CLASS = 256  # characters of the name of a class
MAXIMUM_SIDE = 1 << 12  # pixels
MAXIMUM_PIXELS = 1 << 22  # of an image as the model takes it, and of the one that it is cut from
RESAMPLINGS = 6  # filters of Pillow, which numbers them from 0
CHANNELS = 4
MAXIMUM_ENDS = 64  # tokens that end a text; Llama 3 has three
MAXIMUM_TEMPLATE = 1 << 16  # characters of a chat template; those of models with tools have some ten thousand
MAXIMUM_TOP = 1 << 12  # passages that a search finds
MAXIMUM_CLUSTERS = 1 << 20
MAXIMUM_MARK = 512  # characters of the token that begins or ends a text


def _known(*choices: str) -> AfterValidator:
    def check(text: str) -> str:
        if text not in choices:
            raise InvalidInput(f"none of {', '.join(choices)}")
        return text

    return AfterValidator(check)


def _class_name(text: str) -> str:
    if not text.isprintable():
        raise InvalidInput("it holds characters that cannot be printed")
    return text


ClassName = Annotated[str, Field(min_length=1, max_length=MAXIMUM_CLASS), AfterValidator(_class_name)]
Side = Annotated[int, Field(strict=True, ge=1, le=MAXIMUM_SIDE)]
Channel = Annotated[tuple[Real, ...], FailFast(), Field(min_length=1, max_length=CHANNELS)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ImageSettings:
    """The way from an image to a model's input, as the image processors of transformers go it.

    channels: 3 for colour, 1 for grey. height, width: of the input. resize: the size (height, width) to which an image
    is scaled first; a height alone is that of its shorter side; none if the input is cut out of the image as it is.
    resample: Pillow's number of the filter. crop: the input is cut out of the middle of what was scaled. scale: factor
    of the pixels (0..255). mean, deviation: of each channel, subtracted and divided by after that.
    """

    channels: Annotated[int, Field(strict=True, ge=1, le=CHANNELS)]
    height: Side
    width: Side
    resize: Annotated[tuple[Side, ...], FailFast(), Field(max_length=2)]
    resample: Annotated[int, Field(strict=True, ge=0, lt=RESAMPLINGS)]
    crop: Flag
    scale: Real
    mean: Channel
    deviation: Channel

    def __post_init__(self) -> None:
        """Raise InvalidInput for sizes that do not fit one another, and deviations of zero."""
        sizes = [(self.height, self.width), self.resize or (1, 1)]
        if any(size[0] * size[-1] > MAXIMUM_PIXELS for size in sizes):
            raise InvalidInput(f"more than {MAXIMUM_PIXELS} pixels")
        if not self.crop and self.resize not in ((self.height, self.width), ()):
            raise InvalidInput("the size to which images are scaled is not that of the input")
        if self.channels not in (1, 3):
            raise InvalidInput(f"an image of {self.channels} channels: grey ones have 1, colours 3")
        if {len(self.mean), len(self.deviation)} != {self.channels} or not all(self.deviation):
            raise InvalidInput("mean and deviation are not those of the channels, or a deviation is zero")


Clusters = Annotated[int, Field(strict=True, ge=1, le=MAXIMUM_CLUSTERS)]
Token = Annotated[int, Field(strict=True, ge=0, lt=1 << 30)]
Mark = Annotated[str, Field(strict=True, max_length=MAXIMUM_MARK)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class WritingSettings:
    """The settings of a model that writes text.

    ends: the tokens that end a text. template: the chat template, in Jinja; "" if there is none. bos, eos: the tokens
    that begin and end a text, as templates write them.
    """

    ends: Annotated[tuple[Token, ...], FailFast(), Field(max_length=MAXIMUM_ENDS)] = ()
    template: Annotated[str, Field(strict=True, max_length=MAXIMUM_TEMPLATE)] = ""
    bos: Mark = ""
    eos: Mark = ""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class TaskSettings:
    """The settings of a task. reveal: one of REVEALS, what the Program gives the client. labels: names of the classes.

    activation: makes scores of logits. segments: the model takes token_type_ids. image: how images become inputs; None
    for text. writing: of a model that writes text. top: of a search, the passages that are found; else 0. clusters: of
    a search that does not look at all passages, how many clusters of them it looks into, and how many there are.
    """

    reveal: Annotated[str, _known(*REVEALS)] = LOGITS
    labels: Annotated[tuple[ClassName, ...], FailFast(), Field(max_length=MAXIMUM_CLASSES)] = ()
    activation: Annotated[str, _known(*ACTIVATIONS)] = SOFTMAX
    segments: Flag = False
    image: ImageSettings | None = None
    writing: WritingSettings | None = None
    top: Annotated[int, Field(strict=True, ge=0, le=MAXIMUM_TOP)] = 0
    clusters: Annotated[tuple[Clusters, ...], FailFast(), Field(max_length=2)] = ()

    def __post_init__(self) -> None:
        """Raise InvalidInput for clusters that are not some of more."""
        if self.clusters and not (len(self.clusters) == 2 and self.clusters[0] < self.clusters[1]):
            raise InvalidInput("the clusters are not some of more")

    @property
    def encoded(self) -> str:
        """The settings as the text of a label. Raises InvalidInput if clients would refuse them."""
        text = _DOCUMENT.dump_json(self).decode()
        text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))  # ASCII, which is printable
        try:
            _read(text)
        except InvalidProgram as error:
            raise InvalidInput(f"clients would refuse this model: {error}", "see its config.json") from None
        return text


NONE = TaskSettings()
"""The settings of a task that has none."""

_DOCUMENT = TypeAdapter(TaskSettings)


@lru_cache(maxsize=16)
def _read(text: str) -> TaskSettings:
    if len(text) > MAXIMUM_SETTINGS:
        raise InvalidProgram(f"the settings have {len(text)} characters, {MAXIMUM_SETTINGS} at most are read")
    read_document(text)  # its depth and size
    try:
        return _DOCUMENT.validate_json(text)
    except ValidationError as error:
        raise InvalidProgram(f"the settings of the task: {what_is_wrong(error)}") from None


def settings_of(labels: Mapping[str, str]) -> tuple[str, TaskSettings]:
    """Return the name of the task for which a Program was made, and its settings; "" if its labels name none.

    Raises InvalidProgram for settings out of bounds.
    """
    return labels.get(TASK, ""), _read(labels[SETTINGS]) if SETTINGS in labels else NONE
