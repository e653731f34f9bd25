"""Rounded answers: exact, of few fraction bits, and what repeated queries tell of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secure
from benchmarks.rounding import told
from protocols import two_party as tp
from protocols.circuit import check
from protocols.flow import Instruction
from protocols.protocol import CircuitCost
from secure.deployments.compiled import ANSWER_COSINE, answer_bits_for, build
from secure.deployments.deployment import CompileOptions, Deployment
from secure.errors import InvalidInput
from secure.mpc.prices import Prices
from secure.mpc.rounding import _shifts
from secure.tasks.task import Loaded


class Shifted(nn.Module):
    """x + b, which shares compute without any error; by axis 1, so that it also has integers."""

    def __init__(self, *, positions: bool = False) -> None:
        super().__init__()
        self.b, self.positions = nn.Parameter(torch.linspace(-2, 2, 300)), positions

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = x + self.b
        return (y, y.argmax(-1)) if self.positions else y


def samples(count: int = 4) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn((2, 300), generator=torch.Generator().manual_seed(s)).clamp(-3, 3)} for s in range(count)]


def encoded(x: Tensor) -> Tensor:
    return torch.round(x.double() * 2**16)


def nearest(x: Tensor, b: Tensor, bits: int) -> Tensor:
    """The integers x + b, rounded to the nearest multiple, a half upwards."""
    unit = 2 ** (16 - bits)
    return torch.floor((encoded(x) + encoded(b) + unit / 2) / unit) * 2.0**-bits


@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.ThreeParty()], ids=lambda d: d.name)
@pytest.mark.parametrize("bits", [1, 8, 10, 15])
def test_rounding_is_a_function_of_the_number_alone(bits: int, deployment: Deployment) -> None:
    """The same of any sharing, and without a unit of error; what parties round alone differs from query to query."""
    model = Shifted().eval().requires_grad_(False)
    compiled = secure.compile(model, samples()[0], calibration=samples(), deployment=deployment, answer_bits=bits)
    plain = secure.compile(model, samples()[0], calibration=samples(), deployment=deployment)
    tables = 1 if bits > 3 else 2
    assert compiled.program.cost.rounds == plain.program.cost.rounds + tables  # three parties check inputs meanwhile
    with secure.insecure_in_process(compiled) as session:
        for sample in samples(2):
            expected = nearest(sample["x"], model.b, bits)
            for _ in range(3):
                assert torch.equal(session.query(sample), expected)
            assert torch.equal(secure.plain_reference(compiled, sample), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 15), st.floats(-7.9, 7.9), st.integers(0, 2**31))
def test_any_number(bits: int, number: float, seed: int) -> None:
    """Near a tie too, where a unit decides."""
    unit = 2.0 ** -(bits + 1)
    ties = (torch.arange(-150, 150) * 2 + 1) * unit
    near = torch.randint(-2, 3, (300,), generator=torch.Generator().manual_seed(seed)) * 2.0**-16
    x = torch.stack([ties.clamp(-7, 7) + near, torch.full((300,), number)]).float()
    model = Shifted().eval().requires_grad_(False)
    compiled = secure.compile(model, {"x": x}, calibration=[{"x": torch.full((2, 300), 8.0)}], answer_bits=bits)
    with secure.insecure_in_process(compiled) as session:
        assert torch.equal(session.query({"x": x}), nearest(x, model.b, bits))


def test_integers_stay_what_they_are() -> None:
    model = Shifted(positions=True).eval().requires_grad_(False)
    compiled = secure.compile(model, samples()[0], calibration=samples(), answer_bits=8)
    assert [output.fraction for output in compiled.program.outputs] == [8, 0]
    with secure.insecure_in_process(compiled) as session:
        numbers, positions = session.query(samples()[0]).values()
    assert torch.equal(numbers, nearest(samples()[0]["x"], model.b, 8))
    assert torch.equal(positions, model(**samples()[0])[1])


def test_all_fraction_bits_are_no_rounding() -> None:
    model = Shifted().eval()
    for bits in (16, 17, 0):
        if bits == 16:
            compiled = secure.compile(model, samples()[0], answer_bits=bits)
            assert "quotient" not in [i.protocol.kind for i in compiled.program.circuit]
            continue
        with pytest.raises(InvalidInput, match=f"answers of {bits} fraction bits"):
            secure.compile(model, samples()[0], answer_bits=bits)


def test_ciphertexts_take_none() -> None:
    with pytest.raises(InvalidInput, match="answer_bits means nothing under ckks"):
        secure.Ckks().check(CompileOptions(answer_bits=8))


def test_whole_numbers_are_not_rounded() -> None:
    class Largest(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    example, largest = {"x": torch.arange(6.0)[None]}, Largest(6, 5)
    secure.compile(largest, example)
    with pytest.raises(InvalidInput, match=r"this model's are whole numbers.*\nhint: leave answer_bits"):
        secure.compile(largest, example, answer_bits=4)


def test_the_program_says_so_and_files_keep_it(tmp_path: Path) -> None:
    compiled = secure.compile(Shifted().eval(), samples()[0], answer_bits=9)
    assert compiled.program.labels["answer_bits"] == "9"
    secure.save_compiled(compiled, tmp_path / "model")
    found = secure.load_compiled(tmp_path / "model")
    assert found.options.answer_bits == 9
    assert found.program.digest == compiled.program.digest


@pytest.mark.parametrize(
    ("normalized", "options", "bits"),
    [
        (True, CompileOptions(), answer_bits_for(300)),
        (True, CompileOptions(answer_bits=16), 16),
        (True, CompileOptions(answer_bits=7), 7),
        (True, CompileOptions(fixed_point=secure.FixedPoint(fraction_bits=9)), None),
        (False, CompileOptions(), None),
    ],
)
def test_embeddings_of_length_one_are_rounded_by_default(
    normalized: bool, options: CompileOptions, bits: int | None
) -> None:
    loaded = Loaded("a model", Shifted().eval().requires_grad_(False), samples(), normalized=normalized)
    compiled = build(loaded, secure.TwoParty(), options, {})
    assert compiled.options.answer_bits == bits
    assert compiled.program.labels.get("answer_bits") == (None if bits is None else str(bits))


@pytest.mark.parametrize(
    ("width", "bits"), [(4, 8), (128, 9), (384, 10), (768, 10), (1024, 10), (4096, 11), (10**6, 12)]
)
def test_default_bits_keep_the_cosine(width: int, bits: int) -> None:
    assert answer_bits_for(width) == bits
    if width <= 4096:
        x = F.normalize(torch.randn(20, width, dtype=torch.float64), dim=-1)
        rounded = torch.round(x * 2**bits) * 2.0**-bits
        assert float(F.cosine_similarity(x, rounded).mean()) > ANSWER_COSINE


# what repeated queries tell


def test_repeated_queries_tell_less() -> None:
    """The experiment of SECURITY.md: a client that knows its shares, and one linear layer.

    Of each output 32 answers narrow the dropped bits to about 1/32 of a unit. Rounded to 2^-10, that is so of one
    output in 64, where the carry decides.
    """
    before, after = told(2048, None, 32), told(2048, 10, 32)
    assert before["bits beyond the answer, mean of all"] > 3.5
    assert after["outputs that tell"] < 0.03
    assert after["bits beyond the answer, mean of all"] < 0.2


# prices, and circuits that somebody else made


def test_costs() -> None:
    assert tp.Quotient((3, 5), 20, 4).cost() == CircuitCost(dealt=15 * 16 * 2)
    assert _shifts((384,), 20, 8, Prices()) == [8]
    assert len(_shifts((100_000,), 20, 8, Prices())) > 1
    assert _shifts((100_000,), 20, 8, Prices(round_bytes=400_000_000)) == [8]
    assert sum(_shifts((1,), 40, 30, Prices())) == 30
    assert max(_shifts((1,), 40, 30, Prices())) <= 12


OPENED = [Instruction(tp.Input((2, 5), 20, "x", 0, -1.0, 1.0)), Instruction(tp.Open((2, 5), 20), (0,))]
WRONG = {
    "no bits": tp.Quotient((2, 5), 20, 0),
    "all bits": tp.Quotient((2, 5), 20, 20),
    "a table of 8,192 entries": tp.Quotient((2, 5), 20, 13),
    "a wider ring": tp.Quotient((2, 5), 21, 4),
    "another shape": tp.Quotient((10,), 20, 4),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_hostile_circuits(wrong: str) -> None:
    with pytest.raises(ValueError, match="instruction 2"):
        check([*OPENED, Instruction(WRONG[wrong], (1,))], {})
