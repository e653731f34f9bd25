"""Curved pieces less a neighbour's line, in rings of their own: bounds, coefficients, whole functions, faults."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secure
from approximations import Piece, gelu, piecewise, polynomial, puma, silu, tanh
from approximations.primitives import IDENTITY, ZERO
from protocols import two_party as tp
from protocols.fixedpoint import FixedPoint
from secure.lowering.trace import Trace, WeightRef
from secure.mpc import nonlinear, pieces
from secure.mpc.pieces import Curve, Precision, Straight
from secure.mpc.prices import Prices
from secure.operations.activations import approximate_softplus
from secure.polynomial.operations import polynomial_operation
from tests.helpers import FunctionRun, run_function

Function = Callable[[Any], Any]

FREE_ROUNDS = Prices(round_bytes=0)
DEAR_ROUNDS = Prices(round_bytes=1 << 40)

FUNCTIONS: dict[str, tuple[Function, Function, float]] = {
    # the function, what it stands for, its largest error alone
    "gelu": (gelu, F.gelu, 5.6e-4),
    "quartic": (partial(gelu, form="quartic"), F.gelu, 2.0e-3),
    "puma": (puma.gelu, F.gelu, 2.0e-2),
    "silu": (silu, F.silu, 8.1e-4),
    "puma-silu": (puma.silu, F.silu, 7.2e-2),
    "tanh": (tanh, torch.tanh, 2.5e-4),
    "softplus": (approximate_softplus, F.softplus, 5.0e-4),
}


def piecewise_of(function: Function) -> Any:
    trace = Trace()
    function(trace.input("x", (1,)))
    (p,) = (p for p in trace.primitives if p.op == "piecewise")
    return p.attrs


def arguments(knots: tuple[float, ...], reach: float) -> Tensor:
    """Everywhere up to +-reach, both ends, and closely around every knot."""
    near = torch.linspace(-(2.0**-4), 2.0**-4, 65, dtype=torch.float64)
    around = [k + near for k in knots if abs(k) < reach - 1]
    ends = torch.tensor([-reach, reach], dtype=torch.float64)
    return torch.cat([torch.linspace(-reach, reach, 1201, dtype=torch.float64), *around, ends])


def bound(error: float, fraction: int) -> float:
    """A quarter more than the pieces' own error, or 1.25 units; and a unit of rounding x and of its lines."""
    return error + max(error / 4, 1.25 * 2.0**-fraction) + 2.0**-fraction


def off(run: FunctionRun, exact: Tensor) -> float:
    return max(float((value - exact).abs().max()) for value in (run.result, run.fixed))


def extended(run: FunctionRun) -> list[tuple[int, int]]:
    return [(p.ring, p.wide) for p in (i.protocol for i in run.circuit) if isinstance(p, tp.Extend)]


# polynomials on their segments

POLYNOMIALS = st.lists(st.floats(-4, 4), min_size=2, max_size=7).map(tuple)


@given(POLYNOMIALS, st.floats(-8, 8), st.floats(0.05, 4), st.floats(-2, 2), st.floats(-2, 2))
def test_curves_are_pieces_less_a_line(
    coefficients: tuple[float, ...], low: float, length: float, intercept: float, slope: float
) -> None:
    piece, high = Piece(coefficients, low + 0.3), low + length
    curve = Curve.of(piece, low, high, Straight(intercept, slope))
    assert (curve.centre * 2**pieces.COARSEST).is_integer()
    assert curve.centre - curve.half <= low - 2.0**-pieces.COARSEST / 2
    assert curve.centre + curve.half >= high + 2.0**-pieces.COARSEST / 2
    v = torch.linspace(-curve.half, curve.half, 3001, dtype=torch.float64)
    x, value = v + curve.centre, Piece(curve.coefficients)(v)
    size = sum(abs(c) * (length + 1.0) ** j for j, c in enumerate(coefficients)) + 30
    assert torch.allclose(value, piece(x) - intercept - slope * x, rtol=0, atol=1e-11 * size)
    steepness = torch.gradient(value, spacing=float(v[1] - v[0]))[0].abs().max()
    assert float(value.abs().max()) <= curve.largest * (1 + 1e-12) + 1e-300
    assert float(steepness) <= curve.steepest * (1 + 1e-6) + 1e-9


@given(POLYNOMIALS, st.floats(0.1, 4), st.integers(6, 20), st.integers(14, 60))
def test_rounded_coefficients_stay_within_their_bound(
    coefficients: tuple[float, ...], half: float, reads: int, scale: int
) -> None:
    curve = Curve(coefficients, 0.0, half, half)
    rounded = curve.integers(reads, scale)
    v = torch.linspace(-half, half, 501, dtype=torch.float64)
    used = Piece(tuple(n * 2.0 ** (j * reads - scale) for j, n in enumerate(rounded)))
    allowed = curve.coarseness(reads) * 2.0**-scale
    assert float((used(v) - Piece(coefficients)(v)).abs().max()) <= allowed * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("degree", range(8))
def test_chebyshev_polynomials(degree: int) -> None:
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    expected = torch.cos(degree * torch.acos(x))
    assert torch.allclose(Piece(tuple(map(float, pieces._chebyshev(degree))))(x), expected, atol=1e-12)


@given(st.floats(2.0**-20, 2.0**20), st.integers(6, 24))
def test_rings_hold_what_they_must_and_no_more(magnitude: float, fraction: int) -> None:
    ring = pieces.holding(magnitude, fraction)
    assert magnitude * 2.0**fraction < 2.0 ** (ring - 2)
    assert ring == 2 or magnitude * 2.0**fraction >= 2.0 ** (ring - 3)


# whole functions


@pytest.mark.parametrize("prices", [FREE_ROUNDS, DEAR_ROUNDS], ids=["split", "whole"])
@pytest.mark.parametrize("fraction", [10, 16, 20])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_keep_their_error_everywhere(name: str, fraction: int, prices: Prices) -> None:
    """Far ends and both sides of every knot included. 64 bits do not hold PUMA's sixth power unless it is split."""
    function, exact, error = FUNCTIONS[name]
    x = arguments(piecewise_of(function)["knots"], 40.0)
    run = run_function(function, x, fixed_point=FixedPoint(fraction_bits=fraction), prices=prices)
    split = len(extended(run)) > 0
    assert split == (prices is FREE_ROUNDS) or (not split and name == "tanh")
    assert off(run, exact(x)) <= (2.5 * error if name == "puma" and not split else bound(error, fraction))


@pytest.mark.parametrize("reach", [0.1, 0.7, 3.0, 1000.0])
@pytest.mark.parametrize("name", ["gelu", "silu", "softplus"])
def test_functions_over_other_ranges(name: str, reach: float) -> None:
    """Within the curved pieces alone, where the line of the right end exceeds the function; and far beyond."""
    function, exact, error = FUNCTIONS[name]
    x = torch.linspace(-reach, reach, 801, dtype=torch.float64)
    run = run_function(function, x, prices=FREE_ROUNDS)
    assert off(run, exact(x)) <= bound(error, 16)


def test_gelu_takes_narrow_openings_and_no_round_more() -> None:
    """Its result is extended for the layer after it; remainder and line are so instead, in the same round."""
    x = torch.linspace(-27, 27, 600, dtype=torch.float64).reshape(75, 8)
    weights = {"w": torch.eye(8, dtype=torch.float64)}

    def function(v: Any) -> Any:
        return gelu(v).linear(WeightRef("w", (8, 8)))

    run = run_function(function, x, weights=weights, prices=DEAR_ROUNDS)
    openings = [(i.protocol.ring, i.protocol.shape) for i in run.circuit if isinstance(i.protocol, tp.Open)]
    assert openings == [(24, x.shape), (14, (4, *x.shape))]  # x, and its four pieces
    assert [ring for ring, _ in extended(run)] == [24, 14]
    assert run.cost.rounds == 6  # x, the comparison, bits and pieces, extensions; the layer and the answer
    assert max(i.protocol.ring for i in run.circuit if isinstance(i.protocol, tp.Polynomials)) == 52
    assert off(run, F.gelu(x)) <= bound(5.6e-4, 16) + 2.0**-13


def test_a_round_more_is_taken_for_bytes_that_are_worth_it() -> None:
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    near, dear = (run_function(gelu, x, prices=prices) for prices in (FREE_ROUNDS, DEAR_ROUNDS))
    assert near.cost.rounds == dear.cost.rounds + 1
    assert near.cost.to_first < dear.cost.to_first
    assert len(extended(dear)) == 0


CUBIC = Piece((0.3, -0.2, 0.1, 0.05), 0.5)
SHAPES: dict[str, tuple[list[float], list[Piece]]] = {
    "one line on both ends": ([-1.0, 1.0], [IDENTITY, CUBIC, IDENTITY]),
    "zero on both ends": ([-1.0, 0.0, 1.0], [ZERO, CUBIC, CUBIC, ZERO]),
    "a line between curves": ([-2.0, -1.0, 1.0, 2.0], [ZERO, CUBIC, Piece((0.25, -0.5)), CUBIC, IDENTITY]),
    "lines with slopes of seven bits": ([-1.0, 1.0], [Piece((1.0, -113 / 128)), CUBIC, Piece((0.1, 0.375))]),
    "constants": ([-1.0, 0.0, 1.0], [Piece((-3.3,)), CUBIC, CUBIC, Piece((7.7,))]),
    "a curved end": ([-1.0, 1.0], [CUBIC, CUBIC, IDENTITY]),
    "a slope that is not short": ([-1.0, 1.0], [ZERO, Piece((0.2, 0.3)), IDENTITY]),
    "knots beyond the range": ([-9.0, 0.5, 9.0], [ZERO, CUBIC, Piece((0.1, -0.7)), IDENTITY]),
}


@pytest.mark.parametrize("prices", [FREE_ROUNDS, DEAR_ROUNDS], ids=["split", "whole"])
@pytest.mark.parametrize("name", SHAPES)
def test_pieces_of_many_shapes(name: str, prices: Prices) -> None:
    knots, made = SHAPES[name]
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    far = torch.stack([(x - k).abs() > 2**-7 for k in knots]).all(0)
    run = run_function(lambda v: piecewise(v, knots, made), x, prices=prices)
    assert float((run.result - run.floating)[far].abs().max()) <= 1e-4
    assert float((run.fixed - run.floating)[far].abs().max()) <= 1e-4


LINES = st.tuples(st.floats(-4, 4), st.integers(-8, 8).map(lambda n: n / 4))
CURVES = st.tuples(*[st.floats(-1, 1)] * 4)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.floats(0.25, 3), min_size=1, max_size=5),
    made=st.lists(LINES | CURVES, min_size=6, max_size=6),
    error=st.sampled_from([0.0, 1e-3, 1e-2]),
    fraction=st.integers(8, 20),
    split=st.booleans(),
)
@example([1.0, 1.0], [(0.0, 0.0), (0.5, 0.5, 0.5, 0.5), (0.0, 1.0)] * 2, 1e-2, 8, True)
def test_any_pieces_under_the_protocol(
    steps: list[float], made: list[tuple[float, ...]], error: float, fraction: int, split: bool
) -> None:
    """Lines and cubics in any order: within the rounding that was counted, and a line's own, away from the knots."""
    knots = (torch.tensor(steps, dtype=torch.float64).cumsum(0) - 4).tolist()
    chosen = [Piece(c, 0.5) for c in made[: len(knots) + 1]]
    x = torch.linspace(-8, 8, 401, dtype=torch.float64)
    x = torch.round(x * 2.0**fraction) / 2.0**fraction  # what rounding x does to a cubic is not the matter here
    far = torch.stack([(x - k).abs() > 2**-7 + 2.0**-fraction for k in knots]).all(0)
    found: list[Precision] = []

    def choose(*args: Any) -> Precision:
        found.append(pieces.choose(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nonlinear, "choose", choose)
        run = run_function(
            lambda v: piecewise(v, knots, chosen, error=error),
            x,
            fixed_point=FixedPoint(fraction_bits=fraction),
            prices=FREE_ROUNDS if split else DEAR_ROUNDS,
        )
    allowed = max((precision.rounding for precision in found), default=0.0) + 2 * 2.0**-fraction
    for value in (run.result, run.fixed):
        assert float((value - run.floating)[far].abs().max()) <= allowed


QUARTIC = Piece((0.0048, 0.4989, 0.2205, -0.0008, -0.0071))


@pytest.mark.parametrize("fraction", [12, 16])
@pytest.mark.parametrize("margin", [0, 1, 2, 3])
def test_polynomials_without_knots_are_precise_where_values_lie(fraction: int, margin: int) -> None:
    """The margin, in which they are many times as large, takes no bits from it. (Three bits once cost 0.2.)"""
    seen = torch.linspace(-3.9, 3.9, 401, dtype=torch.float64)
    given = torch.cat([seen, torch.linspace(3.9, 5.5 if margin else 3.9, 101, dtype=torch.float64)])
    fixed = FixedPoint(fraction_bits=fraction, margin_bits=margin)
    run = run_function(partial(polynomial, piece=QUARTIC), given, fixed_point=fixed, calibration=[[seen]])
    for value in (run.result, run.fixed):
        # The most that was met in 25 draws of the masks is 0.00134, 0.0020, 0.0031, 0.0039: a truncation is random.
        assert float((value - run.floating).abs().max()) < 0.002 * (1 + margin)


# planted faults


def narrower(magnitude: float, fraction: int) -> int:
    return pieces_holding(magnitude, fraction) - 1


pieces_holding = pieces.holding


def test_faults_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit less, of the pieces' ring, the lines' ring, or the polynomials' ring, breaks the bound by far."""
    x = arguments(piecewise_of(gelu)["knots"], 27.0)

    def error() -> float:
        return off(run_function(gelu, x, prices=FREE_ROUNDS, calibration=[[x / 2]]), F.gelu(x))

    assert error() <= bound(5.6e-4, 16)
    with monkeypatch.context() as patched:
        patched.setattr(pieces, "holding", narrower)
        assert error() > 0.1
    with monkeypatch.context() as patched:
        patched.setattr(nonlinear, "holding", narrower)
        assert error() > 0.1
    with monkeypatch.context() as patched:
        patched.setattr(Precision, "wide", property(lambda p: p.ring + p.scale - p.fraction - 1))
        assert error() > 0.1
    with monkeypatch.context() as patched:  # a reading that is two bits coarser than counted
        patched.setattr(Curve, "steepest", property(lambda c: 0.0))
        patched.setattr(Curve, "coarseness", lambda c, reads: 2.0**-20)
        assert error() > bound(5.6e-4, 16)


class _Scaled(nn.Module):
    """A function of weights times the input; the weights are the server's."""

    def __init__(self, function: Function, weight: float) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4, bias=False), function
        with torch.no_grad():
            self.layer.weight.copy_(weight * torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self.layer(x))
        return out


def quartic(x: Tensor) -> Tensor:
    out: Tensor = polynomial_operation(x, list(QUARTIC.coefficients), 0.0)
    return out


class _Weighed(nn.Module):
    """Polynomials of scores, and their products with values: what Power-Softmax attention computes."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.layer, self.coefficients = nn.Linear(4, 4, bias=False), list(coefficients)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(4))

    def forward(self, scores: Tensor, values: Tensor) -> Tensor:
        out: Tensor = polynomial_operation(self.layer(scores), self.coefficients, 0.0) @ self.layer(values)
        return out


SHIFTED = Piece((0.0, 0.0, 0.0, 0.0, 2.0**-8), -4.0)  # (1 + x / 4)^4
LONG = Piece((0.0, 0.0, 0.0, 0.0, 0.3333 * 2.0**-8), -4.0)


def _expanded(piece: Piece) -> list[float]:
    """The coefficients of powers of x."""
    c = piece.coefficients[-1]
    return [c * math.comb(4, k) * (-piece.centre) ** (4 - k) for k in range(5)]


@pytest.mark.parametrize(("piece", "extensions"), [(SHIFTED, 0), (LONG, 1)])
def test_short_coefficients_spare_an_extension(piece: Piece, extensions: int) -> None:
    """A wider ring leaves fewer bits for coefficients, which a power of a short fraction does not need.

    And as the polynomial reads few fraction bits of its argument, no others are opened.
    """
    scores = 48 * torch.rand((6, 5, 4), generator=torch.Generator().manual_seed(1)) - 8
    values = torch.rand((6, 4, 4), generator=torch.Generator().manual_seed(2))
    samples = [{"scores": s[None], "values": v[None]} for s, v in zip(scores, values, strict=True)]
    model = _Weighed(_expanded(piece))
    fixed = secure.FixedPoint(fraction_bits=12)
    compiled = secure.compile(model, samples[0], calibration=samples[1:], fixed_point=fixed)
    circuit = compiled.program.circuit
    assert [i.protocol.kind for i in circuit].count("extend") == extensions
    (lift,) = (i for i in circuit if isinstance(i.protocol, tp.Lift))
    opening = circuit[lift.inputs[0]].protocol
    assert isinstance(opening, tp.Open)
    assert (opening.ring, lift.protocol.drop) == (lift.protocol.ring, 0)
    assert opening.ring <= 18  # eight fraction bits at most, of magnitudes up to 2^8, with a sign and the spare bit
    with secure.insecure_in_process(compiled) as session:
        for sample in samples:
            with torch.no_grad():
                wanted = model(**sample)
            found = session.query(sample)
            assert float((found - wanted).abs().max()) < 0.01 * float(wanted.abs().max())


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=5), st.integers(8, 16), st.integers(1, 7), st.integers(1, 12))
def test_a_wider_ring_is_about_as_exact(found: list[float], fraction: int, reach: int, wider: int) -> None:
    """By the error that rounded coefficients and arguments really make, wherever the piece is to be precise."""
    curve = Curve.of(Piece(tuple(found)), -(2.0**reach), 2.0**reach)
    allowed, ring = 1.25 * 2.0**-fraction, pieces.holding(curve.largest + 1, fraction)
    if ring > 50:
        return
    narrow = pieces.choose([curve], fraction, fraction, allowed, ring, lambda precision: precision.scale)
    chosen = pieces.wider([curve], fraction, allowed, ring + wider, narrow)
    if chosen is None:
        return
    assert (chosen.ring, chosen.fraction, chosen.wide <= 64) == (ring + wider, narrow.fraction, True)
    x = torch.linspace(-curve.near, curve.near, 1001, dtype=torch.float64)

    def error(precision: Precision) -> float:
        read = torch.floor(x * 2.0**precision.reads) if precision.reads < fraction else x * 2.0**precision.reads
        integers = curve.integers(precision.reads, precision.scale, alone=precision.alone)
        value = Piece(tuple(m * 2.0**-precision.scale for m in integers))(read)
        return float((value - Piece(curve.coefficients)(x)).abs().max())

    assert error(chosen) <= chosen.rounding <= max(allowed, 2.25 * (narrow.rounding + allowed))


def test_a_ring_is_no_wider_where_coefficients_need_its_bits() -> None:
    """A parabola with long coefficients would lose five bits."""
    curve = Curve.of(Piece((0.05316209419811102, 0.013550775158044585, -3.2319610958258973e-05)), -64.0, 64.0)
    ring = pieces.holding(curve.largest, 16)
    narrow = pieces.choose([curve], 16, 16, 1.25 * 2.0**-16, ring, lambda precision: precision.scale)
    assert pieces.wider([curve], 16, 1.25 * 2.0**-16, 42, narrow) is None


@pytest.mark.parametrize("name", ["gelu", "tanh", "silu", "polynomial"])
def test_programs_tell_a_hidden_range_to_its_power_of_two_alone(name: str) -> None:
    """The largest argument of calibration ends a curved segment here, and coefficients follow from the segment."""
    function = quartic if name == "polynomial" else FUNCTIONS[name][1]
    samples = [{"x": x[None]} for x in torch.tensor([[-1.0, -0.5, 0.25, 1.0], [1.0, 0.75, -0.3, -1.0]])]

    def digests(weights: Sequence[float], *, checked: bool) -> set[str]:
        models = (_Scaled(function, weight) for weight in weights)
        made = (secure.compile(m, samples[0], calibration=samples[1:], checked=checked) for m in models)
        return {each.program.digest for each in made}

    assert len(digests((1.3, 1.35, 1.425, 1.6), checked=False)) == 1
    assert len(digests((1.3, 1.35, 1.425), checked=True)) == 1  # whose checks tell thirds of an octave
