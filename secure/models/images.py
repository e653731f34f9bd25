"""Images to a model's inputs, as the image processors of transformers make them, without model code at the client.

A client opens images with Pillow (``pip install 'unseen[images]'``). An image file may come from anyone, so its kind,
its bytes and its pixels are bounded before anything is decoded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secure.errors import InvalidInput, MissingPackage, ModelNotFound
from secure.models.checkpoints import load_checkpoint
from secure.models.heads import activation_of, check_exact, chosen, revealed
from secure.models.settings import MAXIMUM_PIXELS, ImageSettings, TaskSettings
from secure.models.text import model_directory
from secure.models.tokens import read_json

KINDS = ("PNG", "JPEG", "WEBP", "BMP")
MAXIMUM_FILE = 1 << 26  # bytes of an image file
MAXIMUM_IMAGE = 1 << 26  # pixels of an image
ENDING = "ForImageClassification"

_KNOWN = frozenset(
    {
        *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
        *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
        *("image_processor_type", "feature_extractor_type", "processor_class", "data_format", "return_tensors"),
        *("input_data_format", "device", "default_to_square", "disable_grouping"),
    }
)
"""The settings of image processors that are read, or change nothing."""

_OWN_GEOMETRY = ("Levit", "Perceiver")
"""The beginnings of names of image processors that scale or cut otherwise than their settings say."""

_STANDARD = (0.5, 0.5, 0.5)


def image_inputs(given: Any, settings: ImageSettings) -> dict[str, Tensor]:
    """Turn an image into the model's argument, float32 of shape (1, channels, height, width).

    given: the ``Path`` of a file, its bytes, or a ``PIL.Image.Image``. A ``str`` is never a path: a server, which says
    what its model takes, would decide whether a text is opened as a file. Raises MissingPackage without Pillow, and
    InvalidInput for a file that cannot be read, is none of KINDS, or is larger than MAXIMUM_FILE bytes or MAXIMUM_IMAGE
    pixels, and for an image so narrow that it would have more than MAXIMUM_PIXELS when it is scaled.
    """
    image = _scaled(_opened(given), settings)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    found = pixels.reshape(image.height, image.width, settings.channels).permute(2, 0, 1)
    return {"pixel_values": normalized(_cropped(found, settings), settings)[None]}


def normalized(pixels: Tensor, settings: ImageSettings) -> Tensor:
    """Scale, shift and divide pixels (channels, height, width) of 0..255 as the model takes them; float32."""
    mean, deviation = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (settings.mean, settings.deviation))
    return (pixels.to(torch.float32) * settings.scale - mean) / deviation


def is_image(given: Any) -> bool:
    """Tell whether ``image_inputs`` takes values of this type."""
    return isinstance(given, Path | bytes) or type(given).__module__.partition(".")[0] == "PIL"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackage("Pillow is not installed\nhint: pip install 'unseen[images]'") from None
    return Image


def _opened(given: Any) -> Any:
    """Return an image whose pixels are bounded, upright, in grey or colour."""
    library = _pillow()
    from PIL import ImageOps

    if isinstance(given, library.Image):
        image = given
        _check_pixels(image)
    else:
        try:
            payload = given if isinstance(given, bytes) else _read(given)
            _check_bytes(len(payload))
            image = library.open(io.BytesIO(payload), formats=KINDS)
            _check_pixels(image)
            image.load()
            upright: Any = ImageOps.exif_transpose(image)
            return upright
        except InvalidInput:
            raise
        except OSError as error:
            unknown = isinstance(error, library.UnidentifiedImageError)
            reason = error.strerror or ("it is none" if unknown else "it is damaged, or ends too early")
            raise InvalidInput(f"an image cannot be read: {reason}", f"a file of the kind {', '.join(KINDS)}") from None
        except (ValueError, SyntaxError, ArithmeticError, LookupError, MemoryError, library.DecompressionBombError):
            raise InvalidInput("an image file is damaged", f"a file of the kind {', '.join(KINDS)}") from None
    upright = ImageOps.exif_transpose(image)
    return upright


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAXIMUM_FILE + 1)


def _check_bytes(size: int) -> None:
    if size > MAXIMUM_FILE:
        raise InvalidInput(f"an image file has more than {MAXIMUM_FILE} bytes", "make it smaller")


def _check_pixels(image: Any) -> None:
    if not 0 < image.width * image.height <= MAXIMUM_IMAGE:
        raise InvalidInput(
            f"an image has {image.width} by {image.height} pixels, at most {MAXIMUM_IMAGE} are read", "make it smaller"
        )


def _scaled(image: Any, settings: ImageSettings) -> Any:
    """Scale an image in the mode that the model takes."""
    image = image.convert("L" if settings.channels == 1 else "RGB")
    if not settings.resize:
        return image
    if len(settings.resize) == 2:
        height, width = settings.resize
    else:
        (least,) = settings.resize
        shorter, longer = sorted((image.width, image.height))
        most = int(least * longer / shorter)
        height, width = (least, most) if image.height <= image.width else (most, least)
    if height * width > MAXIMUM_PIXELS:
        raise InvalidInput(f"an image of {image.width} by {image.height} pixels is too narrow", "cut it")
    return image.resize((width, height), resample=settings.resample)


def _cropped(pixels: Tensor, settings: ImageSettings) -> Tensor:
    """Cut the model's input out of the middle. Raises InvalidInput for an image that is smaller than that."""
    height, width = pixels.shape[1:]
    top, left = (height - settings.height) // 2, (width - settings.width) // 2
    if min(top, left) < 0 or (not settings.crop and (height, width) != (settings.height, settings.width)):
        raise InvalidInput(
            f"an image has {width} by {height} pixels where the model takes {settings.width} by {settings.height}",
            "scale it first",
        )
    return pixels[:, top : top + settings.height, left : left + settings.width]


# the owner's side


def read_processor(directory: Path, channels: int) -> ImageSettings:
    """Read ``preprocessor_config.json`` of a model's directory.

    Raises ModelNotFound without one, and InvalidInput for a processor that does more than scaling, cutting and
    normalizing, or whose settings clients would refuse.
    """
    path = directory / "preprocessor_config.json"
    said = read_json(path)
    if not said:
        raise ModelNotFound(f"{directory} has no {path.name}\nhint: save_pretrained of the image processor writes it")
    if unknown := sorted(name for name, value in said.items() if name not in _KNOWN and value not in (None, False)):
        raise InvalidInput(f"{path} has the setting {unknown[0]!r}, which is not supported", "scale, cut, normalize")
    kind = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "")
    if kind.startswith(_OWN_GEOMETRY):
        raise InvalidInput(f"{path} is of {kind}, which scales or cuts in a way of its own", "a ViTImageProcessor")
    resize = _size(said.get("size"), path) if said.get("do_resize", True) else ()
    crop = bool(said.get("do_center_crop", False))
    cut = _size(said.get("crop_size"), path) if crop else resize
    normalizes = bool(said.get("do_normalize", True))
    if len(cut) == 1:
        cut = (*cut, *cut)
    if len(cut) != 2:
        raise InvalidInput(f"{path} says no size of the model's input", "do_resize, or do_center_crop")
    try:
        found = ImageSettings(
            channels,
            cut[0],
            cut[1],
            resize,
            int(said.get("resample", 2)),
            crop,
            float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0,
            _channels(said.get("image_mean", _STANDARD), channels) if normalizes else (0.0,) * channels,
            _channels(said.get("image_std", _STANDARD), channels) if normalizes else (1.0,) * channels,
        )
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be used: {str(error).partition(chr(10))[0]}", "see its sizes") from None
    return found


def _size(said: Any, path: Path) -> tuple[int, ...]:
    """Read a size: height and width, or the shorter side alone."""
    if isinstance(said, int):
        return (said, said)
    if isinstance(said, Mapping) and set(said) == {"height", "width"}:
        return (int(said["height"]), int(said["width"]))
    if isinstance(said, Mapping) and set(said) == {"shortest_edge"}:
        return (int(said["shortest_edge"]),)
    raise InvalidInput(f"{path} has a size that is not supported", "height and width, or shortest_edge")


def _channels(said: Any, channels: int) -> tuple[float, ...]:
    values = [said] * channels if isinstance(said, int | float) else list(said)
    return tuple(float(value) for value in values)


def synthetic(settings: ImageSettings) -> Iterator[dict[str, Tensor]]:
    """Make calibration inputs of the range of the processor's: one colour, gradients, stripes, and noise.

    Black, white and grey; gradients from each side, and between two corners in opposite colours; stripes and squares of
    1 to a quarter of the height; noise of every pixel and of squares, of few and of many values.
    """
    generator = torch.Generator().manual_seed(0)
    c, h, w = settings.channels, settings.height, settings.width
    across = torch.linspace(0, 255, w).expand(c, h, w)
    down = torch.linspace(0, 255, h)[:, None].expand(c, h, w)
    images = [torch.full((c, h, w), float(value)) for value in (0, 128, 255)]
    images += [across, 255 - across, down, 255 - down, (across + down) / 2]
    images.append(torch.stack([(across, 255 - across, down)[i % 3][i] for i in range(c)]))
    for side in (1, 2, 4, 8, max(1, h // 4)):
        rows, columns = torch.arange(h) // side % 2, torch.arange(w) // side % 2
        images += [255.0 * rows[:, None].expand(c, h, w), 255.0 * (rows[:, None] ^ columns).expand(c, h, w)]
    for side in (1, 2, 4, 8, 16):
        small = (c, math.ceil(h / side), math.ceil(w / side))
        for values in (2, 256):
            noise = torch.randint(values, small, generator=generator).float() * 255 / (values - 1)
            images.append(noise.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :h, :w])
    for image in images:
        yield {"pixel_values": normalized(image, settings)[None]}


def natural(settings: ImageSettings) -> Iterator[dict[str, Tensor]]:
    """Make inputs that are like photographs, and no calibration inputs: random, of few details and many large shapes.

    As in photographs, amplitudes fall with the frequency, and channels are much alike. Each takes the whole range of
    pixels; the last two have little contrast, a dark and a bright one.
    """
    generator = torch.Generator().manual_seed(1)
    c, h, w = settings.channels, settings.height, settings.width
    frequency = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)).clamp(min=1 / max(h, w))
    for low, high in ((0, 255), (0, 255), (0, 255), (0, 90), (180, 255)):
        # public pictures; nothing here is a secret
        grey, colour = (torch.empty(n, h, w).normal_(generator=generator) for n in (1, c))
        image = torch.fft.irfft2(torch.fft.rfft2(grey + colour / 4) / frequency, s=(h, w))
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
        yield {"pixel_values": normalized(low + (high - low) * image, settings)[None]}


@dataclass(frozen=True, eq=False, repr=False)
class ImageModel:
    """A loaded image classifier. about: a line about how it was loaded, or ""."""

    name: str
    module: nn.Module
    settings: TaskSettings
    about: str = ""

    def samples(self, files: Sequence[str]) -> list[dict[str, Tensor]]:
        """Make calibration inputs: ``synthetic`` ones, and the owner's image files."""
        assert self.settings.image is not None  # as it is loaded
        own = [image_inputs(Path(file), self.settings.image) for file in files]
        return [*synthetic(self.settings.image), *own]

    def held_out(self) -> list[dict[str, Tensor]]:
        """Make inputs that calibrate nothing: ``natural`` ones."""
        assert self.settings.image is not None  # as it is loaded
        return list(natural(self.settings.image))


def sees_images(model: str) -> bool:
    """Tell whether a directory holds an image classifier, by the class that it was saved from."""
    settings = read_json(Path(model) / "config.json")
    return str((settings.get("architectures") or [""])[0]).endswith(ENDING)


def load_image_head(model: str, task: str, reveal: str = "") -> ImageModel:
    """Load an image classifier and the settings of its processor from a directory.

    Raises ModelNotFound, MissingPackage and InvalidInput.
    """
    directory, heard = model_directory(model), list[str]()
    check_exact(directory)
    loaded: Any = load_checkpoint(directory, f"AutoModel{ENDING}", told=heard.append)
    config = loaded.config
    activation = activation_of(config, task)
    reveal = chosen(reveal, task, activation)
    image = read_processor(directory, int(getattr(config, "num_channels", 3)))
    labels = tuple(str(config.id2label[i]) for i in range(int(config.num_labels)))
    settings = TaskSettings(reveal, labels, activation, image=image)
    _ = settings.encoded  # which clients would refuse
    return ImageModel(directory.name, _Seeing(loaded, settings).eval(), settings, "; ".join(heard))


class _Seeing(nn.Module):
    """An image classifier that gives what is revealed of its logits, (batch, classes) or (batch,)."""

    def __init__(self, model: nn.Module, settings: TaskSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, pixel_values: Tensor) -> Tensor:
        return revealed(self.scored(pixel_values)[0], self.settings)

    def scored(self, pixel_values: Tensor) -> tuple[Tensor, None]:
        """Return the logits, which all count."""
        return self.model(pixel_values=pixel_values).logits, None
