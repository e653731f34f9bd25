"""Models packed for CKKS: what the circuit computes, what is refused, and the Program as a document."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from protocols.ckks.circuit import clear
from secure.ckks.compile import CkksModel, encrypt
from secure.ckks.program import CkksProgram
from secure.errors import DoesNotFit, InvalidProgram, UnsupportedOperation
from secure.models.digits import DigitsModel
from secure.polynomial.forms import freeze_untrained

Change = Callable[[dict[str, Any]], object]


def images(seed: int) -> dict[str, Tensor]:
    return {"images": torch.rand(1, 64, generator=torch.Generator().manual_seed(seed))}


SAMPLES = [images(seed) for seed in range(8)]


def digits(layers: int) -> DigitsModel:
    """Untrained, with frozen ranges; BatchNorm is no identity."""
    torch.manual_seed(layers)
    model = DigitsModel(layers, width=16, heads=2).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    with torch.no_grad():
        freeze_untrained(model, lambda: [model(**sample) for sample in SAMPLES])
    return model


def packed(model: nn.Module, mode: str, degree: int) -> CkksModel:
    return encrypt(model, SAMPLES[0], calibration=SAMPLES[1:], mode=mode, precision_bits=8, degrees=[degree])


@pytest.fixture(scope="module")
def refreshed() -> CkksModel:
    return packed(digits(2), "refresh", 8192)


@pytest.mark.parametrize(
    ("layers", "mode", "degree"), [(1, "pure", 16384), (2, "refresh", 8192), (2, "refresh", 16384)]
)
def test_a_packed_model_is_the_model(layers: int, mode: str, degree: int) -> None:
    model = digits(layers)
    made = packed(model, mode, degree)
    program = made.program
    assert (program.parameters.degree, program.labels) == (degree, {"mode": mode})
    assert (len(program.refreshes) > 0) == (mode == "refresh")
    assert made.schedule.depth <= program.parameters.levels
    assert set(made.schedule.inputs()) == set(program.views)
    assert all(made.schedule.levels[x] == 0 for x in made.schedule.circuit.outputs)
    assert 0 < made.predicted_error <= program.output_unit * 2.0**-8 + program.grain
    for sample in SAMPLES[:3]:
        slots = clear(made.schedule.circuit, program.client_values(sample, made.client_tables))
        with torch.no_grad():
            wanted = model(**sample)
        answer = program.decode(slots)["output"]
        assert (answer.shape, answer.dtype) == (wanted.shape, torch.float64)
        assert torch.allclose(answer, wanted.double(), atol=1e-3)
        assert wanted.abs().max() > 0.05


def test_what_does_not_fit_is_said_by_module() -> None:
    with pytest.raises(DoesNotFit, match=r"N = 8192: .*deepest path: blocks.0.polynomial \d.*\nhint: --refresh"):
        packed(digits(1), "pure", 8192)
    with pytest.raises(ValueError, match="unknown mode 'fast'\nhint: one of pure, refresh"):
        packed(digits(1), "fast", 8192)


class Small(nn.Module):
    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(64, 8), function, nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(self.function(self.first(images)))
        return out


@pytest.mark.parametrize("function", [nn.GELU(), nn.Softmax(-1), nn.ReLU(), nn.Tanh()])
def test_a_model_with_comparisons_is_refused(function: nn.Module) -> None:
    with pytest.raises(UnsupportedOperation, match=r"function: '\w+' is not a polynomial(.|\n)*\nhint: "):
        packed(Small(function).eval(), "pure", 8192)


def test_a_document_comes_back(refreshed: CkksModel) -> None:
    program = refreshed.program
    back = CkksProgram.from_bytes(program.encoded)
    assert (back.encoded, back.digest) == (program.encoded, program.digest)
    assert back.parameters == program.parameters
    assert back.refreshes == program.refreshes
    assert (back.output == program.output).all()
    assert set(back.views) == set(program.views)
    for name, (source, level, content) in program.views.items():
        assert back.views[name][:2] == (source, level)
        assert (back.views[name][2] == content).all()
    values = program.client_values(SAMPLES[0], refreshed.client_tables)
    for name, slots in back.client_values(SAMPLES[0], refreshed.client_tables).items():
        assert (slots == values[name]).all()


def content(numbers: list[int]) -> str:
    return base64.b64encode(zlib.compress(np.array(numbers, dtype="<i4").tobytes())).decode()


def emptied(d: dict[str, Any]) -> None:
    """The output without its first element."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(d["output"][0])), "<i4")
    d["output"][0] = content([-1 if v == 0 else v for v in raw])


def doubled(d: dict[str, Any]) -> None:
    raw = np.frombuffer(zlib.decompress(base64.b64decode(d["output"][0])), "<i4").copy()
    raw[np.flatnonzero(raw == -1)[0]] = 3
    d["output"][0] = content(raw.tolist())


def view(d: dict[str, Any], place: int, value: Any) -> None:
    next(iter(d["views"].values()))[place] = value


def enlarged(text: str) -> str:
    """The client's graph with an input of 2^40 elements."""
    graph = json.loads(text)
    graph["nodes"][0]["shape"] = [1 << 40]
    return json.dumps(graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "has version 2, this is 1"),
        (lambda d: view(d, 1, 64), "do not hold together"),
        (lambda d: view(d, 1, 65), "less than or equal to 64"),
        (lambda d: view(d, 1, -1), "greater than or equal to 0"),
        (lambda d: view(d, 0, "other"), "do not hold together"),
        (lambda d: d["refreshes"][0].__setitem__(0, 9), "do not hold together"),
        (lambda d: d.update(steps=[0]), "do not hold together"),
        (lambda d: d.update(steps=[4096]), "do not hold together"),
        (lambda d: d.update(output_shape=[4097, 10]), "do not hold together"),
        (lambda d: d.update(output_shape=[1, 11]), "missing or stand twice"),
        (emptied, "missing or stand twice"),
        (doubled, "missing or stand twice"),
        (lambda d: d.update(reserve=1), "masks of its refreshes do not fit the modulus\nhint: do not trust"),
        (lambda d: d.update(reserve=64), "do not hold together"),
        (lambda d: view(d, 2, content([0] * 4095)), "a content of 4095 slots, ciphertexts have 4096"),
        (lambda d: view(d, 2, content([0] * 40960)), r"a content of \d+ slots, ciphertexts have 4096"),
        (lambda d: view(d, 2, content([-2] * 4096)), "a content of negative elements"),
        (lambda d: view(d, 2, "***"), "not a valid Program"),
        (lambda d: view(d, 2, base64.b64encode(b"no").decode()), "not a valid Program"),
        (lambda d: d["parameters"].update(levels=9), "not a valid Program: 9 levels of 26 bits take a modulus"),
        (lambda d: d["parameters"].update(surprise=1), "not a valid Program"),
        (lambda d: d["parameters"].update(degree=8192.0), "Input should be a valid integer"),
        (lambda d: d["parameters"].update(spare_bits=True), "Input should be a valid integer"),
        (lambda d: d.update(output=[]), "not a valid Program"),
        (lambda d: d.pop("views"), "not a valid Program"),
        (lambda d: d.update(views=[]), "not a valid Program"),
        (lambda d: d.update(ranges={}), "do not hold together"),
        # a value that SEAL's encoder refuses would end some queries before they are sent
        (lambda d: d.update(ranges={k: [-1e40, 1e40] for k in d["ranges"]}), "which level . cannot hold: encoding it"),
        (lambda d: d["labels"].update(length="1000000000000"), "the label length is '1000000000000', no number of"),
        (lambda d: d["labels"].update(length="x"), "the label length is 'x', no number of"),
        (lambda d: d["client_inputs"][0].update(output=7), "not made from an output of the client's graph"),
        (lambda d: d["client_inputs"][0].update(output="x"), "not a valid Program"),
        (lambda d: d["client_inputs"][0].update(encoding="x"), "not made from an output of the client's graph"),
        (lambda d: d["client_inputs"][0].update(size=3), "looks up 3 rows of the table ''"),
        (lambda d: d["client_inputs"][0].update(shape=[1, 1 << 20]), "it is made from"),
        (lambda d: d.update(client_graph=enlarged(d["client_graph"])), "less than or equal to 1073741824"),
        (lambda d: d.update(output=d["output"] * 9_000), "not a valid Program|9000 results: too many|a document of"),
        (lambda d: d.update(views={str(n): ["", 0, ""] for n in range(9_000)}), "not a valid Program|9000 inputs"),
    ],
)
def test_a_document_that_was_changed_is_refused(change: Change, message: str, refreshed: CkksModel) -> None:
    document = json.loads(refreshed.program.encoded)
    CkksProgram.from_bytes(json.dumps(document).encode())
    change(document)
    with pytest.raises(InvalidProgram, match=message):
        CkksProgram.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda d: view(d, 2, content([64] * 4096)), id="an element that the input does not have"),
        pytest.param(lambda d: d.update(output_unit=float("nan")), id="no unit"),
        pytest.param(lambda d: d.update(output_unit=-1.0), id="a negative unit"),
        pytest.param(
            lambda d: d.update(ranges={k: [-float("inf"), float("inf")] for k in d["ranges"]}), id="any input"
        ),
    ],
)
def test_a_document_that_cannot_be_used_is_refused(change: Change, refreshed: CkksModel) -> None:
    document = json.loads(refreshed.program.encoded)
    change(document)
    with pytest.raises(InvalidProgram):
        CkksProgram.from_bytes(json.dumps(document).encode())


def test_bytes_that_are_no_document_are_refused() -> None:
    for data in (b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"):
        with pytest.raises(InvalidProgram):
            CkksProgram.from_bytes(data)


@pytest.mark.parametrize("value", [3.0, -1.0, float("nan"), float("inf")])
def test_inputs_out_of_range_are_refused(value: float, refreshed: CkksModel) -> None:
    image = images(3)["images"].clone()
    image[0, 5] = value
    outside = r"has values in \[.*\], the Program was made for \[.*\]\nhint: scale"
    said = rf"input '.+' ({outside}|holds values that are no number)"
    with pytest.raises(ValueError, match=said):
        refreshed.program.client_values({"images": image}, refreshed.client_tables)


@pytest.mark.parametrize("value", [10.0, -10.0, float("nan"), float("inf")])
def test_absurd_outputs_are_refused(value: float, refreshed: CkksModel) -> None:
    program = refreshed.program
    slots = [np.full(program.parameters.slots, 0.5) for _ in program.output]
    assert program.decode(slots)["output"] == pytest.approx(torch.full(program.output_shape, 0.5 * program.output_unit))
    row, slot = np.argwhere(program.output == 4)[0]
    unread = int(np.flatnonzero(program.output[0] == -1)[0])
    slots[0][unread] = value  # nobody's business
    program.decode(slots)
    slots[row][slot] = value
    with pytest.raises(ValueError, match=r"the result decrypts to .* it is not an answer\nhint: "):
        program.decode(slots)
    with pytest.raises(ValueError, match="zip"):
        program.decode([])


def test_which_weights_are_zero_or_equal_does_not_show() -> None:
    """Rotations, operations and what stands where are public, so they may depend on the architecture alone."""
    found = []
    for change in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), Square(), nn.Linear(8, 3))
        with torch.no_grad():
            for layer in (model[0], model[2]):
                assert isinstance(layer, nn.Linear)
                if change:
                    layer.weight[:, 1] = 0.0
                    layer.weight[2] = 0.25
                    layer.bias.zero_()
        samples = [{"input": torch.empty(1, 4).uniform_(-1, 1)} for _ in range(8)]
        encrypted = encrypt(model.eval(), samples[0], calibration=samples[1:], degrees=[8192], precision_bits=6)
        p = encrypted.program
        views = [(name, level, content.tolist()) for name, level, content in p.views.values()]
        found.append((p.steps, p.counts, views, len(encrypted.schedule.circuit.nodes)))
    assert found[0] == found[1]


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x
