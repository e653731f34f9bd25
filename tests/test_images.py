"""Image classifiers: the processor's work at the client, files from anyone, and private answers."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secure
from parties import deployments
from secure.models import images
from secure.models.images import image_inputs, read_processor, synthetic
from secure.models.settings import ImageSettings
from tests.test_cli import Run, in_words, run

for module in ("transformers", "PIL"):
    pytest.importorskip(module)

__all__ = ["run"]  # the fixture

SIZE = 16
LABELS = ("cat", "dog", "tree")
PLAIN = ImageSettings(3, SIZE, SIZE, (SIZE, SIZE), 2, False, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Any:
    from PIL import Image

    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, *shape[2:]), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), resample=2)


def saved(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


# the processor's work

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessorPil", {"size": {"height": SIZE, "width": SIZE}}),
    "deit": (
        "DeiTImageProcessorPil",
        {"size": {"height": 20, "width": 20}, "crop_size": {"height": SIZE, "width": SIZE}},
    ),
    "clip": (
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 17}, "crop_size": {"height": SIZE, "width": SIZE}},
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (16, 16), (9, 21)])
def test_inputs_are_those_of_the_processor(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    import transformers

    kind, options = PROCESSORS[name]
    processor = getattr(transformers, kind)(**options)
    processor.save_pretrained(tmp_path)
    settings = read_processor(tmp_path, 3)
    for mode in ("RGB", "L", "RGBA"):
        image = picture(*shape, mode=mode)
        theirs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        for given in (image, saved(image), _file(tmp_path, saved(image))):
            torch.testing.assert_close(image_inputs(given, settings)["pixel_values"], theirs, atol=1e-5, rtol=0)


def _file(directory: Path, payload: bytes) -> Path:
    (directory / "image.png").write_bytes(payload)
    return directory / "image.png"


def test_a_photograph_lies_as_it_is_seen() -> None:
    from PIL import Image

    image, exif = picture(20, 10), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = image_inputs(saved(image, "JPEG", exif=exif, quality=100), PLAIN)["pixel_values"]
    upright = image_inputs(image.rotate(-90, expand=True), PLAIN)["pixel_values"]
    assert float((turned - upright).abs().mean()) < 0.05


def test_what_a_processor_does_beside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(secure.ModelNotFound, match=r"no preprocessor_config\.json"):
        read_processor(tmp_path, 3)
    whole = {"size": {"height": SIZE, "width": SIZE}}
    for wrong, message in (
        ({"crop_pct": 0.875}, "'crop_pct', which is not supported"),
        ({"size": {"longest_edge": 8}}, "a size that is not supported"),
        ({"size": {"height": 1 << 20, "width": 8}, "do_center_crop": True, "crop_size": 8}, "cannot be used|refuse"),
        ({"image_std": [0, 0, 0]}, "a deviation is zero"),
        ({"image_mean": [0.5]}, "not those of the channels"),
        ({"do_resize": False}, "no size of the model's input"),
        ({"size": None}, "a size that is not supported"),
        ({"do_center_crop": True}, "a size that is not supported"),
        ({"image_processor_type": "LevitImageProcessorFast"}, "scales or cuts in a way of its own"),
        ({"feature_extractor_type": "PerceiverFeatureExtractor"}, "scales or cuts in a way of its own"),
    ):
        path.write_text(json.dumps({**whole, **wrong}))
        with pytest.raises(secure.InvalidInput, match=message):
            _ = secure_settings(read_processor(tmp_path, 3))


def secure_settings(image: ImageSettings) -> str:
    from secure.models.settings import TaskSettings

    return TaskSettings(image=image).encoded


# files from anyone


def bomb(width: int, height: int) -> bytes:
    """A small file that says that it holds many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(("width", "height"), [(1 << 13, (1 << 13) + 1), (10_000, 9_000), (60_000, 60_000)])
def test_pixels_are_bounded_before_they_are_decoded(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def load(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(secure.InvalidInput, match=r"pixels, at most|damaged"):
        image_inputs(bomb(width, height), PLAIN)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no image",
        b"GIF89a" + bytes(100),
        b"%PDF-1.4",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
    ],
)
def test_a_file_that_is_no_image(payload: bytes) -> None:
    with pytest.raises(secure.InvalidInput) as raised:
        image_inputs(payload, PLAIN)
    assert "hint: a file of the kind PNG, JPEG" in str(raised.value)


def test_kinds_that_are_not_read() -> None:
    for kind in ("TIFF", "GIF", "PPM"):
        with pytest.raises(secure.InvalidInput, match="it is none"):
            image_inputs(saved(picture(20, 20), kind), PLAIN)


def test_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    payload = saved(picture(40, 40))
    monkeypatch.setattr(images, "MAXIMUM_FILE", len(payload) - 1)
    for given in (payload, _file(tmp_path, payload)):
        with pytest.raises(secure.InvalidInput, match=r"more than .* bytes"):
            image_inputs(given, PLAIN)
    with pytest.raises(secure.InvalidInput, match="No such file"):
        image_inputs(tmp_path / "none.png", PLAIN)


def test_a_damaged_file_says_so() -> None:
    whole = saved(picture(40, 40))
    with pytest.raises(secure.InvalidInput, match="ends too early"):
        image_inputs(whole[: len(whole) // 2], PLAIN)
    with pytest.raises(secure.InvalidInput, match="it is none"):
        image_inputs(b"no image", PLAIN)
    generator = np.random.default_rng(0)
    for _ in range(200):
        payload = bytearray(whole[: int(generator.integers(10, len(whole)))] + whole[-12:])
        for place in generator.integers(0, len(payload), 3):
            payload[place] = int(generator.integers(256))
        try:
            found = image_inputs(bytes(payload), PLAIN)["pixel_values"]
        except secure.InvalidInput:
            continue
        assert found.shape == (1, 3, SIZE, SIZE)


def test_a_narrow_image_is_not_blown_up() -> None:
    settings = ImageSettings(3, SIZE, SIZE, (1000,), 2, True, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(secure.InvalidInput, match="too narrow"):
        image_inputs(picture(50_000, 1), settings)


# classification


def test_calibration_spans_the_processors_range() -> None:
    samples = [each["pixel_values"] for each in synthetic(PLAIN)]
    assert all(each.shape == (1, 3, SIZE, SIZE) for each in samples)
    assert min(float(each.min()) for each in samples) == -1.0
    assert max(float(each.max()) for each in samples) == 1.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random vision transformer of one layer, and its processor."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    config = transformers.ViTConfig(image_size=SIZE, patch_size=8, **sizes, **names)  # type: ignore[arg-type]
    model = transformers.ViTForImageClassification(config).eval()
    where = tmp_path_factory.mktemp("vit")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
        samples = torch.cat([each["pixel_values"] for each in synthetic(PLAIN)])
        model.classifier.bias -= model(pixel_values=samples).logits.mean(0)
    model.save_pretrained(where)
    transformers.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(where)
    return where


@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.ThreeParty()], ids=lambda d: d.name)
@pytest.mark.parametrize("reveal", ["label", "probabilities"])
def test_classes_are_those_of_the_model(
    reveal: str, deployment: secure.Deployment, directory: Path, tmp_path: Path
) -> None:
    import transformers

    given = [picture(30, 20, seed) for seed in range(6)]
    model = transformers.ViTForImageClassification.from_pretrained(directory).eval()
    processor = transformers.ViTImageProcessorPil.from_pretrained(directory)
    with torch.no_grad():
        scores = model(**processor(given, return_tensors="pt")).logits.softmax(-1)
    own = [str(_file(tmp_path, saved(given[0])))]  # the owner's calibration
    task = secure_task(reveal)
    compiled = secure_build(task, directory, own, deployment)
    with secure.insecure_in_process(compiled) as session:
        ours = session.classify([*given, saved(given[0]), Path(own[0])])
        assert [each["label"] for each in ours[:6]] == [LABELS[i] for i in scores.argmax(-1)]
        assert ours[6]["label"] == ours[7]["label"]
        assert ours[6]["label"] == ours[0]["label"]
        if reveal == "probabilities":
            for each, row in zip(ours, scores, strict=False):
                assert each["score"] == pytest.approx(float(row.max()), abs=5e-3)
        for wrong in ([1], [Path("no such file.png")], [b"no image"]):
            with pytest.raises(secure.InvalidInput):
                session.classify(wrong)
        sent = len(session.reports)
        with pytest.raises(secure.InvalidInput, match="takes images, not texts"):
            session.classify([own[0]])  # no server makes a text the name of a file
        assert len(session.reports) == sent
        with pytest.raises(secure.InvalidInput, match="not for 'embed'"):
            session.embed(["a text"])


def test_a_number_that_is_no_class_is_revealed_as_it_is(directory: Path, tmp_path: Path) -> None:
    found = shutil.copytree(directory, tmp_path / "m")
    config = json.loads((found / "config.json").read_text())
    (found / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    assert images.load_image_head(str(found), "classify").settings.reveal == "logits"
    with pytest.raises(secure.InvalidInput, match="reveals no label"):
        images.load_image_head(str(found), "classify", "label")


def secure_task(reveal: str) -> Any:
    from secure.tasks.classify import Classify

    return Classify(reveal=reveal)


def secure_build(task: Any, directory: Path, own: list[str], deployment: secure.Deployment) -> secure.Compiled:
    from secure.deployments.compiled import build
    from secure.deployments.deployment import CompileOptions

    return build(task.load(str(directory), 0, own), deployment, CompileOptions(), {})


def test_a_model_of_images_takes_no_length(directory: Path) -> None:
    with pytest.raises(secure.InvalidInput, match="no length"):
        secure.compile_text_model(str(directory), 16)
    with secure.insecure_in_process(secure.compile_text_model(str(directory))) as session:
        assert session.classify([picture(30, 20)])[0]["label"] in LABELS


def test_images_in_polynomial_form_are_refused(directory: Path, tmp_path: Path) -> None:
    found = shutil.copytree(directory, tmp_path / "m")
    (found / "polynomial.json").write_text("{}")
    with pytest.raises(secure.InvalidInput, match="in polynomial form"):
        secure_task("label").load(str(found), 0)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(secure.MissingPackage, match=r"unseen\[images\]"):
        image_inputs(b"", PLAIN)


def test_the_command_takes_names_of_files(
    directory: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = secure_build(secure_task("label"), directory, [], secure.TwoParty())
    monkeypatch.setattr(deployments, "connect", lambda *_, **__: secure.insecure_in_process(compiled))
    name = str(_file(tmp_path, saved(picture(30, 20))))
    ended = run("classify", "--image-files", name, "--json")
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out)
    assert row["text"] == name
    assert row["answer"]["label"] in LABELS
    in_words(run("classify", name), "takes images, not texts", "--image-files")
