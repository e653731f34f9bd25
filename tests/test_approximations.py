"""Approximations: their error on real numbers, and again under the protocol."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from approximations import (
    Piece,
    absolute,
    attend,
    exp_below,
    gelu,
    l2_normalize,
    layer_norm,
    maximum,
    piecewise,
    reciprocal,
    relu,
    row_bound,
    rsqrt,
    sigmoid,
    silu,
    softmax,
    tanh,
)
from approximations.activations import GELU_FORMS
from approximations.division import reciprocal_error, rsqrt_error
from approximations.fits import minimax
from approximations.primitives import IDENTITY, ZERO, bounded
from approximations.softmax import EXTRA, LOWEST, SLACK
from protocols.fixedpoint import FixedPoint
from protocols.two_party import Compare
from secure.errors import DoesNotFit
from secure.lowering.ranges import Ranges, dyadic
from secure.lowering.trace import Trace, WeightRef, concatenate
from secure.mpc.prices import DEFAULT, Prices
from secure.mpc.softmax import LOSS
from tests.helpers import FunctionRun, run_function

Function = Callable[..., Any]
BIG = 1.5e3

ACTIVATIONS: dict[str, tuple[Function, Function, float, float]] = {
    # the function, what it stands for, its largest error, and what fixed point adds to it on [-8, 8]
    "gelu-cubic": (partial(gelu, form="cubic"), F.gelu, 5.6e-4, 4e-4),
    "gelu-quartic": (partial(gelu, form="quartic"), F.gelu, 2e-3, 1.5e-3),
    "gelu-puma": (partial(gelu, form="puma"), F.gelu, 2.1e-2, 1e-2),
    "silu": (silu, F.silu, 8.1e-4, 4e-4),
    "tanh": (tanh, torch.tanh, 2.5e-4, 4e-4),
    "sigmoid": (sigmoid, torch.sigmoid, 1.3e-4, 2e-4),
    "relu": (relu, torch.relu, 1e-12, 2**-16),
    "absolute": (absolute, torch.abs, 1e-12, 2**-16),
}


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# activations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_their_error(name: str) -> None:
    function, original, error, _ = ACTIVATIONS[name]
    x = torch.linspace(-30, 30, 300_001, dtype=torch.float64)
    assert largest(function(x) - original(x)) <= error
    assert error <= 1e-12 or largest(function(x) - original(x)) > error / 2  # what is declared is what it is


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_under_the_protocol(name: str) -> None:
    function, original, error, added = ACTIVATIONS[name]
    x = torch.cat([torch.linspace(-8, 8, 4001, dtype=torch.float64), normal(96)])
    run = run_function(function, x)
    assert largest(run.result - original(x)) <= error + added
    assert largest(run.fixed - original(x)) <= error + added


@dataclass
class Recorded:
    """Stands for a symbolic value, and keeps what ``piecewise`` would record."""

    knots: tuple[float, ...] = ()
    pieces: tuple[Piece, ...] = ()
    tolerance: float = 0.0

    def piecewise(
        self, knots: tuple[float, ...], pieces: tuple[Piece, ...], tolerance: float, extra: int, error: float
    ) -> Recorded:
        return Recorded(knots, pieces, tolerance)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "sigmoid"])
def test_activations_keep_their_error_whichever_way_comparisons_err(name: str) -> None:
    """Every x within the tolerance below a knot, by the piece above that knot; the last double below it, too."""
    function, original, error, _ = ACTIVATIONS[name]
    made: Recorded = function(Recorded())
    if name in ("relu", "absolute"):
        error = made.tolerance * (2.0 if name == "absolute" else 1.0)  # the pieces meet at an angle
    for knot, piece in zip(made.knots, made.pieces[1:], strict=True):
        below = math.nextafter(knot, -math.inf)
        x = torch.linspace(knot - made.tolerance, below, 20_001, dtype=torch.float64)
        assert largest(piece(x) - original(x)) <= error


@pytest.mark.parametrize(("name", "limit"), [("gelu-cubic", 5.6e-4), ("gelu-quartic", 2e-3), ("silu", 8.1e-4)])
def test_activations_close_to_their_knots_under_the_protocol(name: str, limit: float) -> None:
    """Ranges that make comparisons drop as many bits as the tolerance allows."""
    function, original, _, added = ACTIVATIONS[name]
    made: Recorded = function(Recorded())
    near = [torch.linspace(k - 2 * made.tolerance, k + made.tolerance, 301, dtype=torch.float64) for k in made.knots]
    x = torch.cat([*near, torch.tensor([-63.0, 63.0], dtype=torch.float64)])
    assert largest(run_function(function, x).result - original(x)) <= limit + added


def test_gelu_forms_are_named() -> None:
    assert GELU_FORMS == ("cubic", "quartic", "puma")
    with pytest.raises(ValueError, match=r"unknown GeLU form 'exact'\nhint: one of cubic, quartic, puma"):
        gelu(torch.zeros(1), "exact")


def test_gelu_over_a_wide_range() -> None:
    """Far outside its curved segments, where the ring leaves the polynomial the fewest bits."""
    x = torch.cat([normal(500) * 3, torch.tensor([100.0, -100.0, 63.9, -63.9])])
    assert largest(run_function(gelu, x).result - F.gelu(x)) <= 2e-3


# division


RANGES = ((1.0, 2.0), (0.769, 32.0), (0.1, 5.0), (1e-3, 1e3), (0.25, 0.2501))


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_division_keeps_its_error(low: float, high: float) -> None:
    x = torch.logspace(math.log10(low), math.log10(high), 50_001, dtype=torch.float64).clamp(low, high)
    assert largest(reciprocal(x, low, high) * x - 1) <= reciprocal_error() * 1.01 < 2e-5
    assert largest(rsqrt(x, low, high) * x.sqrt() - 1) <= rsqrt_error() * 1.01 < 1e-5
    assert largest(rsqrt(x, low, high, 3.0) * x.sqrt() - 3) <= 3 * rsqrt_error() * 1.01


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (0.769, 32.0), (0.1, 5.0), (1.0, 1000.0)])
def test_division_under_the_protocol(low: float, high: float) -> None:
    x = torch.logspace(math.log10(low), math.log10(high), 2001, dtype=torch.float64).clamp(low, high)
    input_error = 2**-17 / low  # of rounding x
    for function, original, power in ((reciprocal, torch.reciprocal, 1.0), (rsqrt, torch.rsqrt, 0.5)):
        run = run_function(partial(function, low=low, high=high), x)
        assert largest(run.result / original(x) - 1) <= 8e-5 + power * input_error


@settings(max_examples=60, deadline=None)
@given(
    root=st.sampled_from([1, 2]),
    low=st.floats(-4.0, 8.0),
    ratio=st.floats(0.05, 10.9),
    seed=st.integers(0, 1 << 16),
)
def test_inverse_powers_of_any_range_under_the_protocol(root: int, low: float, ratio: float, seed: int) -> None:
    """In one band or in several: the ends of the range, the places where bands meet, and values between them."""
    least, most = 2.0**low, 2.0 ** (low + ratio)
    power = {1: reciprocal, 2: rsqrt}[root]
    levels = torch.rand(400, dtype=torch.float64, generator=generator(seed))
    x = torch.cat([2.0 ** (low + ratio * levels), torch.tensor([least, most], dtype=torch.float64)])
    x = torch.cat([x, most * 2.0 ** -torch.arange(0, ratio, 0.125, dtype=torch.float64)]).clamp(least, most)
    run = run_function(partial(power, low=least, high=most), x)
    exact = x ** (-1 / root)
    assert torch.equal(run.floating, power(x, least, most))
    # of the table, of rounding the argument, and of the result's fraction bits
    error = 2.0**-15 + 2.0**-15 / root + 2.0**-16 / (root * x) + 1.5 * 2.0**-15 / (exact / exact.min())
    for value in (run.result, run.fixed):
        assert float(((value / exact - 1).abs() / error).max()) <= 1
    assert run.cost.rounds <= 3  # the opening, the choice of a band, the answer
    assert run.cost.dealt <= 6000 * len(x)


def test_a_narrow_range_takes_one_opening() -> None:
    x = torch.linspace(1, 16, 300, dtype=torch.float64)
    run = run_function(lambda v: rsqrt(v, 1.0, 16.0), x)
    assert run.cost.rounds == 2
    assert [i.protocol.kind for i in run.circuit].count("tabulated") == 1


def test_a_division_whose_argument_has_too_few_bits_is_refused() -> None:
    """Its smallest argument would be less than one unit."""
    with pytest.raises(DoesNotFit, match=r"tables of x\^\(-1/1\) on .*coefficients\nhint: narrower"):
        run_function(lambda v: reciprocal(v, 1e-7, 1e-4), torch.full((4,), 1e-5, dtype=torch.float64))


def test_division_needs_a_positive_range() -> None:
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="a positive range is needed"):
            reciprocal(torch.ones(1), low, high)


# maximum, exponential


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 31])
@pytest.mark.parametrize("tolerance", [2.0**-10, 0.125, 1.0])
def test_maximum_is_short_by_its_tolerance_at_most(length: int, tolerance: float) -> None:
    spread = torch.tensor([1e-3, 0.05, 0.3, 5.0, 400.0]).repeat_interleave(40)[:, None]
    x = normal(200, length, seed=length) * spread
    run = run_function(lambda v: maximum(v, tolerance), x)
    short = x.amax(-1, keepdim=True) - run.result
    assert float(short.min()) >= -(2**-16)
    assert float(short.max()) <= tolerance + 2**-16
    assert largest(maximum(x, tolerance) - x.amax(-1, keepdim=True)) == 0


PRICES = (DEFAULT, Prices(round_bytes=0, dealt_for_online=1))
"""The second ones take the larger of each two scores several times before they count the rest."""


@pytest.mark.parametrize("length", [1, 2, 3, 31, 255, 256, 514])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("prices", PRICES, ids=["dealt bytes cheap", "dealt bytes dear"])
def test_bounds_of_rows_are_close(length: int, spread: float, prices: Prices) -> None:
    """Above the maximum, and by 4 at most; rows above 255 are counted in parts."""
    x = normal(30, length, seed=length) * spread
    run = run_function(lambda v: row_bound(v, 4.0), x, prices=prices)
    above = run.result - x.amax(-1, keepdim=True)
    assert 0.0 < float(above.min()) <= float(above.max()) <= 4.0 + LOSS * (prices != DEFAULT) + 2**-12
    if prices == DEFAULT or (spread > 1 and length > 3):
        assert any(isinstance(i.protocol, Compare) for i in run.circuit) == (prices != DEFAULT)
    assert torch.equal(row_bound(x, 4.0), x.amax(-1, keepdim=True))


@pytest.mark.parametrize("depth", [12.0, 40.0, 900.0])
def test_exponentials_below_a_bound_under_the_protocol(depth: float) -> None:
    """Relative to the row's largest term, which the bound's slack may make small."""
    x = torch.tensor([[0.0], [-3.0], [7.0]]) - torch.linspace(0, depth, 667, dtype=torch.float64)
    run = run_function(lambda v: exp_below(v, row_bound(v, 4.0), 4), x)
    largest_term = run.result.amax(-1, keepdim=True)
    assert 0.9 * math.exp(-4) <= float(largest_term.min()) <= float(largest_term.max()) <= 1.0
    assert largest(run.result / largest_term - torch.exp(x - x.amax(-1, keepdim=True))) <= 2.0**-11
    assert torch.equal(exp_below(x, x.amax(-1, keepdim=True)), torch.exp(x - x.amax(-1, keepdim=True)))


# softmax


UNITS = 16 * 2.0**-20 * math.exp(SLACK)
"""Sixteen units of a term's last place, where the bound's slack, which moves with a mask, makes the sum smallest."""


def softmax_run(x: Tensor, **options: Any) -> FunctionRun:
    """Run a softmax five times, under fresh masks: none may be far off, and two must be close.

    About one run in thirty is above the lower bound by the rounding of one mask, so that the middle one may be, too.
    """
    runs = [run_function(softmax, x, **options) for _ in range(5)]
    errors = sorted(largest(run.result - torch.softmax(x, -1)) for run in runs)
    assert errors[1] <= 2.5e-4
    assert errors[4] <= UNITS
    return runs[0]


def score_rows(length: int) -> Tensor:
    """Ordinary rows; rows of equal scores; one huge score; masked scores; all of it shifted."""
    ordinary = normal(30, length) * 4
    equal = torch.full((4, length), -3.0, dtype=torch.float64)
    huge = normal(10, length)
    huge[:, 0] += 100.0
    low = normal(10, length)
    low[:, -1] -= 300.0 if length > 1 else 0.0
    masked = normal(20, length)
    masked[:, (length + 1) // 2 :] -= BIG
    gone = normal(5, length) - 100.0
    return torch.cat([ordinary, ordinary + 50.0, equal, huge, low, masked, gone])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 33])
@pytest.mark.parametrize("prices", PRICES, ids=["dealt bytes cheap", "dealt bytes dear"])
def test_softmax_of_extreme_rows(length: int, prices: Prices) -> None:
    x = score_rows(length)
    expected = torch.softmax(x, -1)
    assert largest(softmax(x) - expected) <= 3e-5
    run = softmax_run(x, prices=prices)
    assert largest(run.result.sum(-1) - 1) <= 2.5e-4 + 2**-16 * length
    if length > 3:
        assert largest(run.result[expected == 0]) <= 2**-15  # what is masked stays out


@pytest.mark.parametrize("length", [540, 544, 1100])
def test_softmax_of_long_rows(length: int) -> None:
    """The sum's reciprocal has no tables above 540; calibration never sees sums as small as the bound's slack makes."""
    softmax_run(normal(8, length) * 6)


@pytest.mark.parametrize("length", [128, 512, 1100])
@pytest.mark.parametrize("fraction_bits", [8, 20])
@pytest.mark.parametrize("prices", PRICES, ids=["dealt bytes cheap", "dealt bytes dear"])
def test_sums_of_terms_are_in_the_range_of_their_reciprocal(length: int, fraction_bits: int, prices: Prices) -> None:
    """Whatever rounding does to terms far below a unit, of which there are many, and to terms near one."""
    x = torch.full((48, length), -30.0, dtype=torch.float64)
    x[:, 0] = torch.linspace(0, 4, 48)
    x[40:] = torch.linspace(0, 4, 8)[:, None]
    fixed = FixedPoint(fraction_bits, 14, 1)
    sums = partial(lambda v, above: exp_below(v, row_bound(v, above), EXTRA).sum(-1, keepdim=True), above=SLACK)
    run = run_function(sums, x, fixed_point=fixed, prices=prices)
    assert math.exp(-SLACK - LOSS) - 1.5e-5 - 2**-12 >= LOWEST
    assert LOWEST <= float(run.result.min()) < 0.1  # nearly the whole slack was met
    assert float(run.result.max()) <= length * (1 + 2**-11)
    assert float(run.result.max()) > length / 8


@pytest.mark.parametrize(
    "scores", [[[0.0, 1.0], [400.0, 0.0]], [[0.0, -5000.0]]], ids=["rows far apart", "a score far below"]
)
def test_softmax_refuses_scores_too_far_apart(scores: list[list[float]]) -> None:
    with pytest.raises(DoesNotFit, match=r"scores of a softmax reach from .* differ by 500, .* differ by 8192\nhint: "):
        run_function(softmax, torch.tensor(scores))


@pytest.mark.parametrize("top", [-30.0, -6.5, 0.0, 5.0, 40.0])
@pytest.mark.parametrize("prices", PRICES, ids=["dealt bytes cheap", "dealt bytes dear"])
def test_softmax_beyond_its_calibration(top: float, prices: Prices) -> None:
    """Row maxima up to twice those of calibration are right, and so are those up to 4 beyond, on both sides."""
    seen = torch.tensor([[top, top - 60.0, top - 1.0], [top - 2.0, top - 3.0, top - 60.0]], dtype=torch.float64)
    highest, lowest = (2 * top if top > 0 else top / 2), (2 * (top - 2) if top < 2 else (top - 2) / 2)
    for maximum_ in (highest, highest + 3.9, lowest, lowest - 3.9):
        x = torch.tensor([[maximum_, maximum_ - 0.5, maximum_ - 20.0]], dtype=torch.float64).expand(2, 3)
        if float(x.abs().max()) <= 2 * float(seen.abs().max()):  # the range of the scores themselves
            run = run_function(softmax, x.contiguous(), calibration=[[seen]], prices=prices)
            assert largest(run.result - torch.softmax(x, -1)) <= 2.5e-4


@pytest.mark.parametrize("length", [1, 2, 3, 5, 33])
@pytest.mark.parametrize("prices", PRICES, ids=["dealt bytes cheap", "dealt bytes dear"])
def test_attention(length: int, prices: Prices) -> None:
    scores = torch.stack([score_rows(length)[i : i + 10] for i in (0, 64, 74, 84)])
    values = normal(4, length, 6, seed=1)
    expected = torch.softmax(scores, -1) @ values
    assert largest(attend(scores, values) - expected) <= 2e-4
    assert largest(run_function(attend, scores, values, prices=prices).result - expected) <= 6e-4


# norms


@pytest.mark.parametrize("width", [1, 2, 7, 16, 48, 384])
@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0])
def test_layer_norm(width: int, scale: float) -> None:
    x = normal(20, width, seed=width) * scale + 1.5
    if width < 3:
        x = torch.tensor([[1.0], [2.5]]) * scale if width == 1 else torch.tensor([[1.0, 2.0], [0.5, -0.3]]) * scale
        x = x.to(torch.float64)
    w, b = normal(width, seed=1), normal(width, seed=2)
    variance = x.var(-1, unbiased=False)
    low, high = float(variance.min()) / 4 + 1e-3 * (width == 1), float(variance.max()) * 4 + 1e-2
    eps = 1e-5
    expected = F.layer_norm(x, (width,), w, b, eps)
    assert largest(layer_norm(x, w, b, eps, low, high) - expected) <= 1e-4
    run = run_function(
        lambda v: layer_norm(v, WeightRef("w", (width,)), WeightRef("b", (width,)), eps, low, high),
        x,
        weights={"w": w, "b": b},
    )
    assert largest(run.result - expected) <= 3e-3


@pytest.mark.parametrize("width", [1, 3, 32])
def test_l2_normalization(width: int) -> None:
    x = normal(20, width, seed=width)
    x = x + torch.sign(x) * 0.3
    squares = x.square().sum(-1)
    low, high = float(squares.min()) / 2, float(squares.max()) * 2
    expected = F.normalize(x, dim=-1)
    assert largest(l2_normalize(x, low, high) - expected) <= 2e-5
    assert largest(run_function(lambda v: l2_normalize(v, low, high), x).result - expected) <= 1e-3


# fits and pieces

FITS: tuple[tuple[Callable[[Tensor], Tensor], float, float, int], ...] = (
    (torch.exp, 0.0, 1.0, 3),
    (torch.tanh, 0.0, 0.7, 3),
    (torch.sin, -1.0, 2.0, 5),
    (torch.rsqrt, 0.5, 1.0, 2),
    (torch.erf, -1.0, 3.0, 6),
)


@pytest.mark.parametrize(("function", "low", "high", "degree"), FITS)
def test_minimax_fits_beat_their_neighbours(
    function: Callable[[Tensor], Tensor], low: float, high: float, degree: int
) -> None:
    piece, error = minimax(function, low, high, degree)
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)
    reached = largest(piece(x) - function(x))
    assert reached == pytest.approx(error, rel=1e-3)
    half = (high - low) / 2
    for seed in range(200):
        noise = normal(degree + 1, seed=seed) * error * 0.1
        near = Piece(
            tuple(c + float(n) / half**j for j, (c, n) in enumerate(zip(piece.coefficients, noise, strict=True))),
            piece.centre,
        )
        assert largest(near(x) - function(x)) > reached * (1 - 1e-4)


@pytest.mark.parametrize(("function", "low", "high", "degree"), FITS)
def test_minimax_errors_alternate(function: Callable[[Tensor], Tensor], low: float, high: float, degree: int) -> None:
    """Chebyshev's criterion: degree + 2 extremes of equal size and alternating sign."""
    piece, error = minimax(function, low, high, degree)
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)
    difference = piece(x) - function(x)
    extreme = difference[difference.abs() > error * (1 - 1e-2)].sign()
    assert int((extreme[1:] != extreme[:-1]).sum()) + 1 >= degree + 2


def test_pieces() -> None:
    x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    p = Piece((1.0, 2.0, 3.0), 0.5)
    assert torch.allclose(p(x), 1 + 2 * (x - 0.5) + 3 * (x - 0.5) ** 2)
    assert torch.allclose(p.mirrored()(x), p(-x))
    assert torch.allclose(p.mirrored(-1.0)(x), -p(-x))
    steps = [Piece(()), Piece((1.0,)), Piece((0.0, 1.0))]
    assert piecewise(x, [-1.0, 1.0], steps).tolist() == [0.0, 1.0, 1.0, 1.0, 3.0]
    for knots, pieces in (([0.0], steps), ([1.0, -1.0], steps), ([], steps)):
        with pytest.raises(ValueError, match="ascending knots take"):
            piecewise(x, knots, pieces)


def test_pieces_under_the_protocol() -> None:
    """Jumps, slopes that are short binary fractions, slopes that are not, and functions that share comparisons."""
    x = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    x = x[((x + 1).abs() > 2**-7) & ((x - 2).abs() > 2**-7)]  # a jump may come early by the tolerance

    def function(v: Any) -> Any:
        first = piecewise(v, [-1.0, 2.0], [Piece((3.0,)), Piece((0.25, -0.375)), Piece((0.0, 0.3))])
        return first + piecewise(v, [-1.0], [Piece(()), Piece((1.0, 2.0, -0.7), 0.5)])

    run = run_function(function, x)
    assert largest(run.result - function(x)) <= 3e-4


def test_linear_pieces_of_finer_and_of_coarser_scales() -> None:
    """The selection of a line happens at the scales of its argument and its result, which may differ."""
    x = torch.linspace(4, 900, 300, dtype=torch.float64)
    assert largest(run_function(lambda v: relu(rsqrt(v, 4.0, 1000.0)), x).result - x.rsqrt()) <= 1e-4
    x = torch.linspace(-4, 4, 800, dtype=torch.float64)

    def function(v: Any) -> Any:
        return piecewise(v, [0.0, 2.0], [ZERO, Piece((0.0, -1 / 32)), IDENTITY], 2**-8, 7)

    near = (x - 2).abs() < 2**-7
    assert largest((run_function(function, x).result - function(x))[~near]) <= 3e-4


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.31), (1.0, 1.0001), (0.99, 1.01), (4.0, 4.5)])
def test_inverse_powers_of_a_range_within_one_segment(low: float, high: float) -> None:
    x = torch.linspace(low, high, 64, dtype=torch.float64)
    assert largest(run_function(lambda v: rsqrt(v, low, high), x).result - x.rsqrt()) <= 2e-4
    assert largest(run_function(lambda v: reciprocal(v, low, high), x).result - 1 / x) <= 4e-4


# ranges


def test_short_binary_fractions() -> None:
    for value in (0.0, 1.0, -1.0, 0.375, -12.0, 1023 / 1024, 2.0**-30):
        m, q = dyadic(value)
        assert m * 2.0**-q == value
        assert m % 2 or value == 0
    for value in (0.3, math.pi, -1e-5, 1e7 / 3):
        m, q = dyadic(value)
        assert abs(m) < 2**14
        assert m * 2.0**-q == pytest.approx(value, rel=2.0**-14)


def test_calibration_needs_an_input() -> None:
    trace = Trace()
    trace.input("x", (3,))
    with pytest.raises(ValueError, match="at least one input"):
        Ranges.calibrate(trace, [], {}, 1)
    ranges = Ranges.calibrate(trace, [{"x": torch.tensor([-3.0, 0, 2])}, {"x": torch.tensor([1.0, 5, 2])}], {}, 2)
    assert ranges.seen(0) == (-3.0, 5.0)
    assert ranges.magnitude(0) == 20.0
    assert ranges.bits(0) == 5


def test_ranges_are_those_of_the_same_primitives() -> None:
    trace, longer = Trace(), Trace()
    trace.input("x", (3,))
    longer.input("x", (5,)).sum(-1)
    parts = [Ranges.calibrate(trace, [{"x": torch.full((3,), value)}], {}, 0) for value in (-2.0, 3.0)]
    assert Ranges.united(parts, trace).seen(0) == (-2.0, 3.0)
    with pytest.raises(ValueError, match="computes in another way at another size\nhint: compile it"):
        Ranges.united(parts, longer)


# primitives of traces


def test_primitives_under_the_protocol() -> None:
    x, y = normal(3, 4), normal(3, 4, seed=1)
    w, v = normal(4, 5, seed=2), normal(4, seed=3)

    def function(a: Any, b: Any) -> Any:
        c = (a * 0.3 - b + 1.25) * a + (2.0 - b).square()
        d = concatenate([c, -a], 1).slice(1, 1, 7, 2)  # (3, 3)
        e = (b.linear(WeightRef("w", (4, 5))) * 0.5).slice(1, 0, 3)
        f = (a * WeightRef("v", (4,)) + WeightRef("v", (4,))).mean(1, keepdim=True)
        return (d @ e.permute((1, 0))) + f.expand((3, 3)) + b.sum(1).reshape((3, 1))

    c = (x * 0.3 - y + 1.25) * x + (2.0 - y) ** 2
    d = torch.cat([c, -x], 1)[:, 1:7:2]
    expected = d @ (y @ w * 0.5)[:, :3].T + (x * v + v).mean(1, keepdim=True) + y.sum(1, keepdim=True)
    run = run_function(function, x, y, weights={"w": w, "v": v})
    assert largest(run.floating - expected) <= 1e-12
    assert largest(run.result - expected) <= 2e-3


@pytest.mark.parametrize("fixed", [FixedPoint(), FixedPoint(12, 10, 2), FixedPoint(18, 16, 0), FixedPoint(8, 6, 1)])
def test_every_fixed_point(fixed: FixedPoint) -> None:
    x = normal(40, 6)
    run = run_function(lambda v: gelu(v * v + 1.0) * 0.5, x, fixed_point=fixed)
    assert largest(run.result - F.gelu(x * x + 1) * 0.5) <= 1e-3 + 40 * 2.0**-fixed.fraction_bits


def test_values_at_the_calibrated_bound_and_its_margin() -> None:
    """A value may grow to twice what calibration saw before a ring overflows: here the cube does, at the end."""
    seen = normal(200)
    x = 1.259 * float(seen.abs().max()) * torch.sign(seen)
    run = run_function(lambda v: (v * v) * v, x, calibration=[[seen]])
    assert largest(run.result - x**3) <= 5e-3


@pytest.mark.parametrize(("margin", "value"), [(0, 1.0), (0, -1.0), (1, 2.0), (1, -2.0)])
def test_a_value_exactly_at_the_bound_is_right(margin: int, value: float) -> None:
    """A power of two, and the weights' rounding pushes past it: five times 3277 / 16384 is above one."""
    rows = 200_000
    weights = {"w": torch.full((5, 1), 0.2 - 1e-7, dtype=torch.float64), "v": torch.full((1, 1), 0.3).double()}
    w, v = WeightRef("w", (5, 1)), WeightRef("v", (1, 1))
    seen, x = torch.ones(1, 5).double().expand(rows, 5), torch.full((rows, 5), value, dtype=torch.float64)
    fixed = FixedPoint(margin_bits=margin)
    run = run_function(lambda u: u.linear(w).linear(v), x, fixed_point=fixed, weights=weights, calibration=[[seen]])
    assert largest(run.result - 0.3 * value) <= 1e-3


@pytest.mark.parametrize("margin", [0, 1, 3])
@pytest.mark.parametrize("seen", [2.0**-20, 0.25, 0.98, 0.99, 1.0, 1.5, 3.99, 4.0, 2.0**20])
def test_rings_have_room_above_what_was_seen(margin: int, seen: float) -> None:
    trace = Trace()
    x = trace.input("x", (1,))
    ranges = Ranges.calibrate(trace, [{"x": torch.tensor([-seen], dtype=torch.float64)}], {}, margin)
    top = 2.0 ** ranges.bits(x.id)
    assert ranges.magnitude(x.id) * 1.16 < top
    assert top == 1 or ranges.magnitude(x.id) * 1.161 >= top / 2  # and not a bit more


def test_an_exponential_at_the_finest_scale() -> None:
    x = normal(3, 8)
    run = run_function(lambda v: softmax(v), x, fixed_point=FixedPoint(20, 20, 0))
    assert largest(run.result - torch.softmax(x, -1)) <= 1e-3


def test_what_no_ring_can_hold_is_refused() -> None:
    with pytest.raises(DoesNotFit, match=r"'mul' reaches .* a ring has 64\nhint: "):
        run_function(lambda v: v * v * 1e9 * v, normal(5) * 1e6)


def test_bounded_replaces_what_was_seen() -> None:
    x = torch.zeros(4, dtype=torch.float64)
    assert torch.equal(bounded(x, -8.0, 8.0), x)
    trace = Trace()
    symbol = bounded(trace.input("x", (4,)), -8.0, 8.0)
    assert symbol.trace.primitives[symbol.id].attrs == {"low": -8.0, "high": 8.0}
