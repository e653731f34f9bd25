"""Arg-max and the k largest: against torch, with ties and within the tolerance; what is revealed, and the price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secure
from approximations.primitives import by_size, top_indices, top_of, top_values
from protocols import two_party as tp
from protocols.circuit import check
from protocols.flow import Instruction
from protocols.protocol import CircuitCost
from secure.deployments.deployment import Deployment
from secure.errors import DoesNotFit, InvalidInput, UnsupportedOperation
from secure.mpc.prices import Prices
from secure.operations.choices import TOLERANCE
from tests.helpers import FunctionRun, run_function

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 40, 1000)


def found(x: Tensor, count: int = 1, **options: Any) -> FunctionRun:
    return run_function(lambda s: top_indices(s, count, TOLERANCE), x, **options)


def whole(numbers: Any) -> Any:
    """An input as the whole numbers that a ranking finds: with no fraction bits."""
    p = numbers.trace.primitives[numbers.id]
    numbers.trace.primitives[numbers.id] = replace(p, attrs={**p.attrs, "integer": True})
    return numbers


def integers(shape: tuple[int, ...], reach: int, seed: int) -> Tensor:
    """Whole numbers, which shares hold exactly, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-reach, reach + 1, shape, generator=generator).to(torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_largest_are_those_of_torch(size: int, count: int) -> None:
    if count > size:
        return
    torch.manual_seed(size)
    x = torch.randn(3, size, dtype=torch.float64) * 4
    run = found(x, count)
    assert torch.equal(run.result, x.topk(count).indices.to(torch.float64))
    assert torch.equal(run.fixed, run.result)
    values = run_function(lambda s: top_values(s, count, TOLERANCE), x)
    assert float((values.result - x.topk(count).values).abs().max()) < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_of_equal_entries_the_first_comes_first(size: int) -> None:
    for reach in (0, 1, 3):
        x = integers((5, size), reach, size)
        count = min(size, 4)
        assert torch.equal(found(x, count).result, by_size(x, count).to(torch.float64))
        assert torch.equal(found(x).result[:, 0], x.argmax(-1).to(torch.float64))


@pytest.mark.parametrize("where", [0, 1, 24_999, 49_998, 49_999])
def test_of_fifty_thousand(where: int) -> None:
    x = integers((1, 50_000), 9, 1)
    x[0, where] = 10
    assert int(found(x).result) == where


def test_of_fifty_thousand_equal_entries() -> None:
    assert int(found(torch.zeros(1, 50_000, dtype=torch.float64) - 7).result) == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_numbers_beside_the_largest(size: int, count: int) -> None:
    """Each is the number at the position, also of equal entries, and numbers below zero."""
    if count > size:
        return
    for reach in (1, 1000):
        x, numbers = integers((3, size), reach, size), integers((3, size), 90_000, size + 1)
        beside = run_function(lambda s, n: top_of(s, whole(n), count, TOLERANCE), x, numbers)
        assert torch.equal(beside.result, numbers.gather(-1, by_size(x, count)))


def test_all_entries_are_negative() -> None:
    x = -5 - torch.rand(4, 30, dtype=torch.float64)
    assert torch.equal(found(x, 3).result, x.topk(3).indices.to(torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 70), st.integers(1, 9), st.sampled_from([1.0, 30.0, 300.0]), st.integers(0, 2**31), st.booleans())
def test_any_row(size: int, count: int, reach: float, seed: int, close: bool) -> None:
    """Whatever is chosen is smaller than what is not by less than the tolerance; no entry is chosen twice."""
    count = min(size, count)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(2, size, dtype=torch.float64, generator=generator) * 2 - 1) * reach
    if close:  # differences around the tolerance
        x = reach - torch.randint(0, 5, (2, size), generator=generator) * TOLERANCE / 2
    chosen = found(x, count, calibration=[(torch.full_like(x, reach),)]).result.to(torch.int64)
    ordered = x.gather(-1, chosen)
    units = 2 * 2.0**-16  # of encoding
    for row, of in zip(chosen, x, strict=True):
        assert len(set(row.tolist())) == count
        others = [i for i in range(size) if i not in row.tolist()]
        if others:
            assert float(of[others].max()) < float(of[row].min()) + TOLERANCE + units
    assert float((ordered[:, 1:] - ordered[:, :-1]).max() if count > 1 else 0.0) < TOLERANCE + units


def test_wide_entries_lose_bits_where_that_spares_a_round() -> None:
    near, far = (torch.tensor([[reach, reach - 2 * TOLERANCE, 0.0]], dtype=torch.float64) for reach in (27.0, 300.0))
    narrow, wide = found(near), found(far)
    assert narrow.cost.rounds == wide.cost.rounds
    assert int(narrow.result) == int(wide.result) == 0
    kinds = [[i.protocol.kind for i in run.circuit] for run in (narrow, wide)]
    assert ["truncate" in found for found in kinds] == [False, True]


# rounds and bytes


def test_cost_formulas() -> None:
    assert tp.OpenedPairs((3, 5), 24).cost() == tp.Ranks((3, 5), 3).cost() == CircuitCost()
    assert tp.Placed((3, 5), 24, 3, 2).cost() == CircuitCost(dealt=2 * 15 * 8 * 3)
    assert tp.PlacedPositions((3, 5), 16, 3, 2, 0).cost() == CircuitCost(dealt=15 * 8 * 2)


@pytest.mark.parametrize(("size", "rounds"), [(2, 3), (3, 4), (8, 4), (77, 4), (1000, 8), (50_000, 12)])
def test_rounds(size: int, rounds: int) -> None:
    """Without those of revealing: three for two entries, four for each level of others."""
    assert found(integers((1, size), 9, 0)).cost.rounds == rounds + 1


def test_where_rounds_are_dear_levels_are_few() -> None:
    x = integers((1, 5000), 9, 0)
    dear, cheap = (found(x, prices=Prices(round_bytes=price)) for price in (40_000_000, 1000))
    assert dear.cost.rounds < cheap.cost.rounds
    assert dear.cost.dealt > cheap.cost.dealt
    assert torch.equal(dear.result, cheap.result)


def test_too_many_of_a_long_row() -> None:
    assert torch.equal(
        found(integers((1, 200), 27, 0), 200).result[0],
        integers((1, 200), 27, 0)[0].sort(descending=True, stable=True).indices.to(torch.float64),
    )
    with pytest.raises(DoesNotFit, match="the 300 largest of 400"):
        found(integers((1, 400), 9, 0), 300)


# modules


class Scored(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores, self.form = nn.Linear(8, 7), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.scores(x))


def _rows_at(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(-2, places[..., None].expand(*places.shape, x.shape[-1]))


def _beside(y: Tensor, count: int) -> Tensor:
    """Positions of the smallest entries, beside the largest ones."""
    numbers = (y * -1).topk(y.shape[-1]).indices * 3 + 7
    return numbers.gather(-1, y.topk(count).indices)


def _of_clusters(y: Tensor) -> Tensor:
    """The best of three "clusters" of two, in the two whose first entry is largest: where they stand in the row."""
    clusters = y[:, :6].reshape(4, 3, 2)
    near = y[:, 1:6:2].topk(2).indices
    numbers = (near.unsqueeze(-1) * 2 + torch.arange(2)).flatten(1)
    return numbers.gather(-1, _rows_at(clusters, near).flatten(1).topk(3).indices)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda y: (y.argmax(-1),),
    "argmax of a middle axis": lambda y: (y[:, None].argmax(0, keepdim=True),),
    "argmax of all": lambda y: (y.argmax(), y.argmax(keepdim=True)),
    "argmin": lambda y: (y.argmin(1)[:, None].expand(4, 2),),
    "topk": lambda y: tuple(y.topk(3)),
    "smallest": lambda y: tuple(y.topk(2, 0, largest=False)),
    "joined": lambda y: (torch.stack([y.argmax(-1), y.argmin(-1)], -1), y),
    "rows at places": lambda y: (_rows_at(torch.stack([y, y * 2 - 1, y.flip(0)], -2), y[:, :3].topk(2).indices),),
    "numbers beside": lambda y: (_beside(y, 3),),
    "the number beside the larger of two": lambda y: (_beside(y[:, 3:5], 1),),
    "renumbered": lambda y: (y.topk(3).indices.unsqueeze(-1) * 50 + torch.arange(-3, 3),),
    "looked up side by side": lambda y: (
        nn.functional.embedding(torch.stack([y.argmax(-1), y.argmin(-1)], -1), torch.arange(14.0).reshape(7, 2)),
    ),
    "of clusters": lambda y: (_of_clusters(y),),
    "computed with": lambda y: (y.argmax(-1).float() * 0.5 + y[:, 0],),
}
SAMPLES = [{"x": torch.randn((4, 8), generator=torch.Generator().manual_seed(s))} for s in range(6)]


@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.ThreeParty()], ids=lambda d: d.name)
@pytest.mark.parametrize("form", FORMS)
def test_modules(form: str, deployment: Deployment) -> None:
    """Positions come as int64, as torch gives them; numbers as float64."""
    model = Scored(FORMS[form]).eval().requires_grad_(False)
    compiled = secure.compile(model, SAMPLES[0], calibration=SAMPLES, deployment=deployment)
    with secure.insecure_in_process(compiled) as session:
        for sample in SAMPLES[:2]:
            answer = session.query(sample)
            answers = list(answer.values()) if isinstance(answer, dict) else [answer]
            for ours, theirs in zip(answers, model(**sample), strict=True):
                if theirs.dtype == torch.int64:
                    assert torch.equal(ours, theirs)
                assert ours.dtype == (torch.int64 if theirs.dtype == torch.int64 else torch.float64)
                assert ours.shape == theirs.shape
                assert float((ours - theirs).abs().max()) < 1e-3


def _hardly_two(y: Tensor) -> Tensor:
    """A place of three, of which the samples never have the last."""
    return torch.cat([y[:, :2], y[:, :1] - 50], -1).topk(1).indices


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "rows of whole numbers": (
        lambda y: _rows_at(y.topk(6).indices.reshape(4, 3, 2), y[:, :3].topk(2).indices),
        "gather by an index that nobody knows",
    ),
    "rows cut short": (
        lambda y: torch.stack([y, y], -2).gather(-2, y[:, :2].topk(1).indices[..., None].expand(4, 1, 3)),
        "gather by an index that nobody knows",
    ),
    "of real numbers": (lambda y: y.gather(-1, y.topk(2).indices), "gather by an index that nobody knows"),
    "of what all know": (
        lambda y: torch.ones(4, 3, 2).gather(-2, y[:, :3].topk(2).indices[..., None].expand(4, 2, 2)),
        "gather by an index that nobody knows",
    ),
    "a row that is not there": (
        lambda y: _rows_at(torch.stack([y, y], -2), _hardly_two(y)),
        "places from 0 to 2 among 2 entries",
    ),
    "an entry that is not there": (
        lambda y: nn.functional.embedding(_hardly_two(y) * 30 + 3, torch.ones(40, 2)),
        "places from 3 to 63 among 40 entries",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_no_gather_takes(form: str) -> None:
    function, words = REFUSED[form]
    with pytest.raises((UnsupportedOperation, InvalidInput), match=words):
        secure.compile(Scored(function).eval(), SAMPLES[0], calibration=SAMPLES)


@pytest.mark.parametrize("step", [0, 1, 3, 1 << 20, 16385, 100_003])
def test_steps_are_exact(step: int) -> None:
    """Those that no short constant holds are real numbers, which are exact enough, and no whole ones that are wrong."""
    model = Scored(lambda y: y.topk(3).indices * step).eval().requires_grad_(False)
    compiled = secure.compile(model, SAMPLES[0], calibration=SAMPLES)
    with secure.insecure_in_process(compiled) as session:
        answer, wanted = session.query(SAMPLES[0]), model(**SAMPLES[0])
    if answer.dtype == torch.int64:
        assert torch.equal(answer, wanted)
    else:
        assert float((answer - wanted).abs().max()) <= 2.0**-13 * step * 7


@pytest.mark.parametrize("checked", [True, False])
def test_any_row_may_be_taken(checked: bool) -> None:
    """Calibration takes a row of small numbers always, a query one of numbers a hundred times as large."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Parameter(torch.eye(8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.same  # which is shared
            return _rows_at(torch.stack([x, x * 100], -2), x[:, :2].topk(1).indices)

    samples = [{"x": torch.rand(1, 8, generator=torch.Generator().manual_seed(s))} for s in range(4)]
    for each in samples:
        each["x"][:, 0] = 1.0
    other = {"x": samples[0]["x"].flip(-1).clone()}
    other["x"][:, :2] = torch.tensor([0.1, 0.9])
    compiled = secure.compile(Rows().eval(), samples[0], calibration=samples, checked=checked)
    with secure.insecure_in_process(compiled) as session:
        assert float((session.query(other) - other["x"][:, None] * 100).abs().max()) < 0.05


def test_an_index_is_all_that_is_revealed() -> None:
    compiled = secure.compile(Scored(lambda y: y.argmax(-1)).eval(), SAMPLES[0], calibration=SAMPLES)
    reveals = [i.protocol for i in compiled.program.circuit if isinstance(i.protocol, tp.Reveal)]
    assert reveals == [
        tp.Reveal((4,), 6),
        tp.Reveal((1,), 64),
    ]  # and whether values were in range; a sign, a spare bit, and the margin of positions below seven
    assert secure.plain_reference(compiled, SAMPLES[0]).dtype == torch.int64


def test_what_ciphertexts_cannot_do() -> None:
    with pytest.raises(UnsupportedOperation, match="'top_indices' is not a polynomial, and ciphertexts have no compar"):
        secure.compile(Scored(lambda y: y.argmax(-1)).eval(), SAMPLES[0], calibration=SAMPLES, deployment=secure.Ckks())


def test_modules_that_are_refused() -> None:
    for form, hint in (
        (lambda y: y.topk(0).values, "k from 1 to the 7 entries"),
        (lambda y: y.argmax(-1).bool(), "shared values are real numbers"),
    ):
        with pytest.raises(UnsupportedOperation, match=hint):
            secure.compile(Scored(form).eval(), SAMPLES[0])


# circuits that somebody else made

OPENED = [
    Instruction(tp.Input((2, 5), 20, "x", 0, -1.0, 1.0)),
    Instruction(tp.Open((2, 5), 20), (0,)),
    Instruction(tp.Open((2, 5), 3), (0,)),
]
WRONG: dict[str, Instruction] = {
    "pairs of one entry": Instruction(tp.OpenedPairs((10, 1), 20), (1,)),
    "pairs of no row": Instruction(tp.OpenedPairs((), 20), (1,)),
    "pairs of another shape": Instruction(tp.OpenedPairs((5, 2), 20), (1,)),
    "pairs of too many entries": Instruction(tp.OpenedPairs((2, 257), 20), (1,)),
    "pairs of a wider ring": Instruction(tp.OpenedPairs((2, 5), 21), (1,)),
    "ranks of numbers that are no pairs": Instruction(tp.Ranks((2, 5), 3), (0,)),
    "ranks of too few bits": Instruction(tp.Placed((2, 5), 20, 2, 1), (2, 1)),
    "more ranks than places": Instruction(tp.Placed((2, 5), 20, 3, 9), (2, 1)),
    "ranks of more bits than are opened": Instruction(tp.Placed((2, 5), 20, 4, 1), (2, 1)),
    "entries of a narrow ring": Instruction(tp.Placed((2, 5), 21, 3, 1), (2, 1)),
    "entries of another shape": Instruction(tp.Placed((5, 2), 20, 3, 1), (2, 1)),
    "ranks that are not opened": Instruction(tp.PlacedPositions((2, 5), 20, 3, 1, 0), (0,)),
    "positions without groups": Instruction(tp.PlacedPositions((10,), 20, 4, 1, 0), (2,)),
    "unit vectors of nine bits": Instruction(tp.PlacedPositions((2, 5), 20, 9, 1, 0), (1,)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_hostile_circuits(wrong: str) -> None:
    check(OPENED, {})
    with pytest.raises(ValueError, match="instruction 3"):
        check([*OPENED, WRONG[wrong]], {})
