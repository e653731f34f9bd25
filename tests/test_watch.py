"""Values that leave their ranges are noticed: planted at every kind of operation, and never without a cause."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure
from approximations import Piece, power
from protocols import bits, kernels, ring
from protocols import two_party as tp
from protocols.flow import Instruction
from protocols.two_party.conditions import PARITIES
from secure import InvalidInput, InvalidProgram, OutOfRange, Program
from secure.cost.circuit_profile import checks_price
from secure.deployments.deployment import CompileOptions
from secure.mpc.watch import PLACES, place_of
from secure.polynomial.operations import polynomial_operation, power_operation
from tests.helpers import run_circuit, shared_bits

DEPLOYMENTS = [secure.TwoParty(), secure.ThreeParty()]
WIDTH = 16


class Grown(nn.Module):
    """A linear layer whose results grow beyond calibration though its inputs do not, and what reads them."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.read = nn.Linear(WIDTH, WIDTH, bias=False), read
        nn.init.orthogonal_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.first(x))


def attention(x: Tensor) -> Tensor:
    return F.softmax(x @ x.transpose(-1, -2), -1) @ x


def heavy(x: Tensor) -> Tensor:
    """Two layers of products, each of which takes the other's result."""
    return (x * x) @ (x * 0.5).transpose(-1, -2)


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x * x.flip(-1),
    "square": torch.square,
    "cube": lambda x: x * x * x,
    "matrix product": lambda x: x @ x.transpose(-1, -2),
    "products of products": heavy,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "relu": F.relu,
    "relu of a product": lambda x: F.relu(x * x - 0.1),
    "softmax": lambda x: F.softmax(4 * x, -1),
    "attention": attention,
    "layer norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "rms norm": lambda x: F.rms_norm(x, (WIDTH,)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "maximum": lambda x: x.amax(-1, keepdim=True),
    "softplus": F.softplus,
    "sum": lambda x: F.gelu(x.sum(-1, keepdim=True)),
}
"""What may read a value that is too large, by its name."""

SCALES = (0.02, 0.2, 1.0, 1.5, 2.5, 4.0, 5.0, 6.0, 7.0)  # of what calibration met


def inputs(model: Grown, scale: float, seed: int) -> dict[str, Tensor]:
    """Inputs whose products with the first layer have rows of the size ``scale``; they are small one by one."""
    rows = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
    rows = rows / rows.norm(dim=-1, keepdim=True) * 4 * scale
    return {"x": (rows @ model.first.weight).detach()[None]}


def compiled(model: Grown, deployment: secure.Deployment | None = None, **options: Any) -> secure.Compiled:
    """The model, calibrated on small rows, and on single large inputs: what grows is within the layer."""
    samples = [inputs(model, 1.0, seed) for seed in range(20)]
    made = secure.compile(model, samples[0], calibration=samples[1:], deployment=deployment, **options)
    return made


@pytest.mark.parametrize("name", READ)
def test_an_answer_is_right_or_an_error(name: str) -> None:
    """Whatever the size of what an operation reads: within its range nothing is said, and nothing wrong is answered."""
    torch.manual_seed(0)
    model = Grown(READ[name]).eval().requires_grad_(False)
    process, found = secure.insecure_in_process(unclamped(compiled(model))), []
    for scale in SCALES:
        for seed in (100, 101, 102):
            given = inputs(model, scale, seed)
            expected = model(**given)
            try:
                answer = process.query(given)
            except OutOfRange:
                found.append(scale)
            else:
                allowed = 0.02 * float(expected.abs().max()) + 5e-3
                assert float((answer - expected).abs().max()) <= allowed, (scale, answer, expected)
    assert all(scale > 1 or "norm" in name for scale in found)  # whose rows may be too small
    if name not in ("sigmoid", "tanh"):  # which are flat: their rings hold anything that these inputs make
        assert {6.0, 7.0} & set(found), found


def unclamped(made: secure.Compiled) -> secure.Compiled:
    """The same with an input that is never clamped, so that the first layer's results may grow."""
    document = json.loads(made.program.encoded)
    (given,) = (i for i in document["instructions"] if i[0] == "input")
    given[1].update(low=-1e3, high=1e3)
    program = Program.from_bytes(json.dumps(document).encode())
    return dataclasses.replace(made, model=dataclasses.replace(made.model, program=program))


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=["two-party", "three-party"])
def test_the_part_of_the_model_is_named(deployment: secure.Deployment) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList(Grown(F.gelu) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layer:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Layers().eval().requires_grad_(False)
    samples = [{"x": torch.randn(1, 4, WIDTH) * 0.3} for _ in range(20)]
    made = unclamped(secure.compile(model, samples[0], calibration=samples[1:], deployment=deployment))
    assert made.program.watched.places == ("layer.0", "layer.1", "layer.2")
    with secure.insecure_in_process(made) as session:
        torch.testing.assert_close(session.query(samples[3]), model(**samples[3]).double(), atol=2e-3, rtol=0)
        with pytest.raises(OutOfRange, match=r"a value left its range in layer\.0.*\nhint: ask the model's owner"):
            session.query({"x": samples[3]["x"] * 6})
        torch.testing.assert_close(session.query(samples[4]), model(**samples[4]).double(), atol=2e-3, rtol=0)


def test_what_would_be_clamped_is_an_error_before_a_query() -> None:
    model = Grown(F.gelu).eval().requires_grad_(False)
    process = secure.insecure_in_process(compiled(model))
    with pytest.raises(OutOfRange, match=r"an input of shape \(1, 4, 16\) has numbers beyond"):
        process.query({"x": torch.full((1, 4, WIDTH), -50.0)})


def test_constant_rows_are_no_alarm() -> None:
    """A padding row, of which the variance is nothing, is multiplied by zero whatever its root is."""
    model = nn.LayerNorm(8).eval().requires_grad_(False)
    samples = [{"input": torch.randn(2, 8)} for _ in range(20)]
    samples[0]["input"][1] = 0
    made = secure.compile(model, samples[0], calibration=samples[1:])
    process = secure.insecure_in_process(made)
    for row in (0.0, 0.5):
        given = {"input": samples[1]["input"].clone()}
        given["input"][1] = row
        assert float((process.query(given) - model(**given)).abs().max()) < 5e-3
    with pytest.raises(OutOfRange):
        process.query({"input": samples[1]["input"] * torch.tensor([[1.0], [0.01]])})


@pytest.mark.parametrize("width", [48, 384])
def test_the_root_of_a_constant_row_is_no_alarm(width: int) -> None:
    """It is an entry of a table that means nothing, so that a check of it would fail by chance: asked twenty times."""
    model = nn.LayerNorm(width).eval().requires_grad_(False)
    samples = [{"input": torch.randn(2, width, generator=torch.Generator().manual_seed(s))} for s in range(12)]
    samples[0]["input"][1] = 0
    process = secure.insecure_in_process(secure.compile(model, samples[0], calibration=samples[1:]))
    for given in (samples[0], {"input": torch.zeros(2, width)}):
        for _ in range(20):
            assert float((process.query(given) - model(**given)).abs().max()) < 5e-3


def test_norms_of_rows_that_grow_though_their_entries_do_not() -> None:
    """Calibrated on rows of one large entry, asked with flat ones: up to three times the limit all are noticed."""
    model = Grown(lambda x: F.normalize(x, dim=-1)).eval().requires_grad_(False)
    spiky = [{"x": (torch.eye(WIDTH)[i % WIDTH :][:1].expand(4, WIDTH) @ model.first.weight)[None]} for i in range(16)]
    process = secure.insecure_in_process(unclamped(secure.compile(model, spiky[0], calibration=spiky[1:])))
    flat, noticed = (torch.ones(4, WIDTH) / WIDTH**0.5 @ model.first.weight)[None], 0
    for size in np.sqrt(np.linspace(0.6, 11.5, 40)):  # squares to 2.9 times the limit of 4
        given = {"x": flat * float(size)}
        try:
            assert float((process.query(given) - model(**given)).abs().max()) < 1e-2, size
        except OutOfRange:
            noticed += 1
    assert noticed > 20


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=["two-party", "three-party"])
@pytest.mark.parametrize("top", [4.0, 10.0, 13.3])
def test_scores_beyond_the_window_are_noticed(top: float, deployment: secure.Deployment) -> None:
    """A large score among others: what passes is counted, and what is too large does not look small."""
    model = Grown(lambda x: F.softmax(x, -1)).eval().requires_grad_(False)

    def given(largest: float, seed: int) -> dict[str, Tensor]:
        scores = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1) - top
        scores[:, seed % WIDTH] = largest
        return {"x": (scores @ model.first.weight)[None]}

    made = secure.compile(
        model, given(top, 0), calibration=[given(top, s) for s in range(1, 20)], deployment=deployment
    )
    process, noticed = secure.insecure_in_process(unclamped(made)), 0
    for step, largest in enumerate(np.linspace(top, 5.5 * top, 50)):
        x = given(float(largest), step)
        try:
            assert float((process.query(x) - model(**x)).abs().max()) < 5e-3, largest
        except OutOfRange:
            noticed += 1
    assert noticed > 15


def test_an_unchecked_model_says_so_and_is_cheaper() -> None:
    torch.manual_seed(0)
    model = Grown(F.gelu).eval().requires_grad_(False)
    checked, unchecked = compiled(model), compiled(model, checked=False)
    assert unchecked.program.watched is None
    assert "nobody notices" in checks_price(unchecked.program)
    assert checked.cost.rounds == unchecked.cost.rounds
    assert "a value that leaves its range is noticed, and the client told; 0 rounds" in checks_price(checked.program)
    with pytest.raises(InvalidInput, match="checked means nothing under ckks"):
        secure.Ckks().check(CompileOptions(checked=True))


def test_the_price_is_the_difference() -> None:
    torch.manual_seed(0)
    model = Grown(attention).eval().requires_grad_(False)
    checked, unchecked = (compiled(model, checked=on).program.cost for on in (True, False))
    said = checks_price(compiled(model).program)
    dealt = checked.dealt - unchecked.dealt
    assert f"{dealt / checked.dealt:.1%} of the dealt ones" in said
    online = checked.to_first + checked.to_second
    assert f"{(online - unchecked.to_first - unchecked.to_second) / online:.1%} of the online bytes" in said


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("encoder.layer.3.attention.self.query", "encoder.layer.3"),
        ("layer.0", "layer.0"),
        ("0", "0"),
        ("embeddings.norm.inner", "embeddings.norm"),
        ("head", "head"),
        ("", "(model)"),
    ],
)
def test_parts_of_a_model(path: str, place: str) -> None:
    assert place_of(path) == place


def test_a_model_of_many_parts_names_some() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(PLACES + 5))).eval()
    samples = [{"input": torch.randn(1, 4)} for _ in range(3)]
    places = secure.compile(model, samples[0], calibration=samples).program.watched.places
    assert (len(places), places[-1]) == (PLACES + 1, "(elsewhere)")


TAMPERED: dict[str, Callable[[Any], Any]] = {
    "no Reveal": lambda d: d.update(watched=[0, d["watched"][1]]),
    "an output": lambda d: d.update(watched=[d["outputs"][0][1], d["watched"][1]]),
    "none at all": lambda d: d.update(watched=None),
    "more parts": lambda d: d["watched"][1].append("another"),
    "no parts": lambda d: d["watched"].__setitem__(1, []),
    "too many parts": lambda d: d["watched"].__setitem__(1, ["x"] * 257),
    "a name that cannot be printed": lambda d: d["watched"][1].__setitem__(0, "\x1b[2J"),
    "no place": lambda d: d.update(watched=[10**6, d["watched"][1]]),
    "another form": lambda d: d.update(watched="all"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_program_that_is_not_watched_as_it_says(name: str) -> None:
    torch.manual_seed(0)
    document = json.loads(compiled(Grown(F.gelu).eval().requires_grad_(False)).program.encoded)
    TAMPERED[name](document)
    with pytest.raises(InvalidProgram):
        Program.from_bytes(json.dumps(document).encode())


# the number that tells


def uniform_bits(octets: Any, size: int = 64) -> None:
    """Each of ``size`` bits is one about half of the time, within 5 standard deviations."""
    found = np.unpackbits(octets).reshape(-1, size)
    assert (abs(found.mean(0) - 0.5) < 5 * 0.5 / np.sqrt(len(found))).all()


def alarm_of(plane: Tensor, mask: Tensor) -> tuple[Any, int]:
    circuit = [
        Instruction(shared_bits("b", tuple(plane.shape), mask)),
        Instruction(tp.OpenBits((PARITIES,), 1), (0,)),
        Instruction(tp.Alarm(), (1,)),
    ]
    outcome = run_circuit(circuit, {"b": plane})
    return outcome, int(ring.reduce(outcome.server[0] + outcome.client[0], 64))


@pytest.mark.parametrize("place", [None, 0, 17, 63])
def test_an_alarm_is_zero_or_uniform(place: int | None) -> None:
    """A single bit that is set makes the number uniform; without one it is zero, whatever the masks are."""
    rng, numbers = np.random.default_rng(0), []
    plane = torch.zeros((1, 8), dtype=torch.uint8)
    if place is not None:
        plane[0, place // 8] = 1 << (place % 8)
    for _ in range(300):
        mask = torch.from_numpy(rng.integers(0, 256, (1, 8), dtype=np.uint8))
        numbers.append(alarm_of(plane, mask)[1])
    if place is None:
        assert not any(numbers)
    else:
        assert all(numbers)
        uniform_bits(np.array(numbers, dtype=np.int64).view(np.uint8))


@pytest.mark.parametrize("bit", [0, 1])
def test_what_the_server_gets_for_an_alarm_is_uniform(bit: int) -> None:
    plane = torch.full((1, 8), 255 * bit, dtype=torch.uint8)
    seen = b"".join(alarm_of(plane, torch.zeros_like(plane))[0].corrections[2] for _ in range(60))
    uniform_bits(np.frombuffer(seen, np.uint8))


def test_parities_tell_any_single_bit_and_any_two() -> None:
    """No word of the sequence is zero, and no two are equal: the first 2^20, of which one query may use as many."""
    n = 1 << 12
    words = set()
    for i in range(n):
        plane = torch.zeros(n // 8, dtype=torch.uint8)
        plane[i // 8] = 1 << (i % 8)
        words.add(bytes(kernels.parities([plane], (n,)).numpy()))
    assert len(words) == n
    assert bytes(8) not in words
    shifted = torch.zeros(2, dtype=torch.uint8)
    shifted[1] = 1
    whole = torch.zeros(64, dtype=torch.uint8)
    whole[6] = 1
    assert torch.equal(kernels.parities([shifted], (9,), start=40), kernels.parities([whole], (512,)))  # bit 48 of both


def test_bits_that_are_looked_at_count() -> None:
    """One plane may be named many times, and is gone over as often."""
    assert tp.Unmet((1 << 20,) * 4000).repeated() == 4000 << 17


def test_parities_are_linear_and_leave_padding_out() -> None:
    rng = np.random.default_rng(1)
    a, b = (torch.from_numpy(rng.integers(0, 256, 9, dtype=np.uint8)) for _ in range(2))
    both = kernels.parities([a], (67,), start=5) ^ kernels.parities([b], (67,), start=5)
    assert torch.equal(kernels.parities([a ^ b], (67,), start=5), both)
    padded = a.clone()
    padded[-1] ^= 0b11111000
    assert torch.equal(kernels.parities([padded], (67,), start=5), kernels.parities([a], (67,), start=5))
    assert not torch.equal(kernels.parities([padded], (72,), start=5), kernels.parities([a], (72,), start=5))
    assert bits.plane_bytes(67) == 9


# no alarm without a cause


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_inputs_within_the_ranges_are_never_alarmed(seed: int) -> None:
    """1,000 inputs in 100 queries of a small transformer layer, as large as those of calibration."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, activation="gelu", batch_first=True).eval().requires_grad_(False)

    def given(n: int) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + n)
        return {"src": torch.randn(10, 4, WIDTH, generator=generator).clamp(-3, 3)}

    made = secure.compile(layer, given(0), calibration=[given(n) for n in range(1, 40)])
    process = secure.insecure_in_process(made)
    worst = max(float((process.query(x) - layer(**x)).abs().max()) for x in (given(n) for n in range(100, 200)))
    assert worst < 1e-2


POLYNOMIALS = {
    "x^2": [0.0, 0.0, 1.0],
    "x^4": [0.0, 0.0, 0.0, 0.0, 1.0],
    "(1 + x/4)^4": [1.0, 1.0, 0.375, 0.0625, 0.00390625],
    "x^3": [0.0, 0.0, 0.0, 1.0],
    "gelu": [0.0048, 0.4989, 0.2205, -0.0008, -0.0071],
}


@pytest.mark.parametrize("margin", [1, 2, 3])
@pytest.mark.parametrize("name", [*POLYNOMIALS])
def test_a_polynomial_is_never_wrong_within_its_arguments_margin(name: str, margin: int) -> None:
    """Its value grows faster than its argument, and would be noticed no more where both are within their margins."""
    piece = Piece(tuple(POLYNOMIALS[name]))

    class Polynomial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(1, 1, bias=False)
            nn.init.ones_(self.first.weight)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = polynomial_operation(self.first(x), list(piece.coefficients), 0.0)
            return out

    seen = torch.tensor([[-2.0], [1.7], [0.3]])
    fixed = secure.FixedPoint(fraction_bits=12, margin_bits=margin)
    compiled = secure.compile(
        Polynomial(), {"x": seen[:1]}, calibration=[{"x": x[None]} for x in seen], fixed_point=fixed
    )
    most = 2.0 * 2**margin
    noticed = 0
    with secure.insecure_in_process(compiled) as session:
        for x in (*seen.flatten().tolist(), *torch.linspace(-most, most, 61).tolist()):
            wanted = float(piece(torch.tensor(x)))
            try:
                found = float(session.query({"x": torch.tensor([[x]])}))
            except (OutOfRange, InvalidInput):
                assert not -2.0 <= x <= 1.7, "what calibration met passes"
                noticed += 1
                continue
            assert abs(found - wanted) <= 0.02 + 0.02 * abs(wanted), (x, found, wanted)
    assert noticed or margin == 1


@pytest.mark.parametrize("narrow", [True, False])
def test_the_argument_of_a_polynomial_that_nobody_sees_is_noticed(narrow: bool) -> None:
    """A product with a polynomial of one number a row is computed at once; its factor alone is never opened."""
    low, high = (0.2, 5.0) if narrow else (0.1, 10.0)

    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.column = nn.Linear(8, 8, bias=False), nn.Linear(1, 1, bias=False)
            nn.init.eye_(self.rows.weight)
            nn.init.ones_(self.column.weight)

        def forward(self, rows: Tensor, column: Tensor) -> Tensor:
            out: Tensor = self.rows(rows) * power_operation(self.column(column), -0.5, low, high, 3, 0)
            return out

    rows = torch.linspace(-3, 3, 8)[None]
    samples = [{"rows": rows * sign, "column": torch.tensor([[c]])} for sign in (1, -1) for c in (low, 1.0, high)]
    fixed = secure.FixedPoint(fraction_bits=12)
    compiled = secure.compile(Divided(), samples[0], calibration=samples, fixed_point=fixed)
    assert "polynomial_product" in [i.protocol.kind for i in compiled.program.circuit]
    noticed = 0
    with secure.insecure_in_process(compiled) as session:
        for at in [low, 1.0, high, *torch.linspace(0.05, 1.99 * high, 40).tolist()]:
            wanted = rows * power(torch.tensor([[at]]), -0.5, low, high)
            try:
                found = session.query({"rows": rows, "column": torch.tensor([[at]])})
            except (OutOfRange, InvalidInput):
                assert not low <= at <= high, at
                noticed += 1
                continue
            assert float((found - wanted).abs().max()) <= 0.02 * float(wanted.abs().max()) + 0.02, at
    assert noticed
