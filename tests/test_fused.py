"""Products with polynomials, computed without an opening of the polynomial: where, how precisely, and for how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from approximations import polynomial, power
from approximations.primitives import Piece, bounded
from protocols.fixedpoint import FixedPoint
from secure.mpc.prices import Prices
from tests.helpers import FunctionRun, run_function

LOW, HIGH = 0.2, 5.0  # of a mean square, about one
Function = Callable[..., Any]


def root(x: Any) -> Any:
    return power(x, -0.5, LOW, HIGH)


def product(rows: Any, column: Any) -> Any:
    return rows * root(column)


def kinds(run: FunctionRun) -> list[str]:
    return [i.protocol.kind for i in run.circuit]


def arguments(seed: int, rows: int = 5, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    column = LOW * (HIGH / LOW) ** torch.rand((rows, 1), generator=generator, dtype=torch.float64)
    return 6 * torch.rand((rows, width), generator=generator, dtype=torch.float64) - 3, column


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1 << 20), st.sampled_from([10, 12, 14, 16]))
def test_a_column_need_not_be_opened(seed: int, bits: int) -> None:
    """One round for the openings of both factors; a row errs as a whole, by less than a hundredth."""
    x, column = arguments(seed)
    run = run_function(product, x, column, fixed_point=FixedPoint(fraction_bits=bits))
    assert "polynomial_product" in kinds(run)
    assert kinds(run).count("open") == 2
    assert run.cost.rounds == 2  # and the answer's
    factor = run.result / x
    assert float((run.result - run.floating).abs().max()) < 0.01 * float(run.floating.abs().max()) + 4 * 2.0**-bits
    sure = x.abs() > 0.5
    spread = [row[of].max() - row[of].min() for row, of in zip(factor, sure, strict=True) if of.any()]
    assert max(spread) < 2.0 ** (4 - bits)


def test_it_is_one_round_less_than_with_an_opening_of_the_polynomial() -> None:
    """A polynomial that something else reads is opened for it anyway, and the products read that opening."""

    def twice(rows: Any, column: Any) -> Any:
        y = root(column)
        return rows * y + y.expand((5, 8))

    x, column = arguments(1)
    alone, other = run_function(product, x, column), run_function(twice, x, column)
    assert "polynomial_product" not in kinds(other)
    assert other.cost.rounds == alone.cost.rounds + 1
    assert float((other.result - other.floating).abs().max()) < 1e-3


def test_all_products_of_a_polynomial_are_computed_so() -> None:
    def both(rows: Any, column: Any) -> Any:
        y = root(column)
        return (rows * y) + (rows + 1.0) * y

    run = run_function(both, *arguments(2))
    assert kinds(run).count("polynomial_product") == 2
    assert "polynomial" not in kinds(run)  # the primitive that nobody reads is not computed
    assert float((run.result - run.floating).abs().max()) < 0.02 * float(run.floating.abs().max())


def test_a_product_whose_reader_needs_a_wide_ring_is_not() -> None:
    """It would be extended, which takes the round that was saved."""

    def weighed(rows: Any, column: Any, others: Any) -> Any:
        return product(rows, column) @ others

    x, column = arguments(3)
    run = run_function(weighed, x, column, torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4))
    assert "polynomial_product" not in kinds(run)
    assert float((run.result - run.floating).abs().max()) < 1e-2


def test_one_number_for_each_element_is_held_to_its_last_place() -> None:
    """Only what a whole row errs by alike may be large: a quartic of each element is opened as before."""
    piece = Piece((0.1, -0.5, 0.25, 0.125, -0.0625))

    def elementwise(x: Any, y: Any) -> Any:
        return y * polynomial(bounded(x, -4.0, 4.0), piece)

    x = torch.linspace(-4, 4, 40, dtype=torch.float64).reshape(5, 8)
    run = run_function(elementwise, x, x.flip(0))
    assert "polynomial_product" not in kinds(run)

    parabola = Piece((0.1, -0.5, 0.25))

    def short(x: Any, y: Any) -> Any:
        return y * polynomial(bounded(x, -4.0, 4.0), parabola)

    run = run_function(short, x, x.flip(0), fixed_point=FixedPoint(fraction_bits=12))
    assert "polynomial_product" in kinds(run)
    assert float((run.result - run.floating).abs().max()) < 16 * 2.0**-12


@pytest.mark.parametrize("round_bytes", [0, 4_000_000])
def test_it_has_its_price(round_bytes: int) -> None:
    """Where bytes count alone, the polynomial is opened: nothing is dealt for each element and power."""
    x, column = arguments(4, rows=64, width=256)
    prices = Prices(round_bytes=round_bytes)
    assert ("polynomial_product" in kinds(run_function(product, x, column, prices=prices))) == bool(round_bytes)


def test_a_polynomial_of_a_value_without_a_promise_is_held_to_its_last_place() -> None:
    """What its ring can hold beside what was seen is many times as large, and says nothing of the values that come."""
    series = Piece((1.0, 1.0, 0.5, 1 / 6, 1 / 24, 1 / 120, 1 / 720))

    def grown(rows: Any, column: Any) -> Any:
        return rows * polynomial(column, series)

    x, _ = arguments(5)
    column = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    run = run_function(grown, x, column)
    assert "polynomial_product" not in kinds(run)
    assert float((run.result - run.floating).abs().max()) < 0.03 * float(run.floating.abs().max())


def test_a_ring_is_wider_than_what_is_lifted_to_it() -> None:
    def narrow(rows: Any, column: Any) -> Any:
        return rows * polynomial(bounded(column, 0.0, 2.0**-5), Piece((0.0, 2.0**-6, 2.0**-7)))

    column = torch.linspace(0, 2.0**-5, 5, dtype=torch.float64)[:, None]
    rows = torch.linspace(-256, 256, 40, dtype=torch.float64).reshape(5, 8)
    run = run_function(narrow, rows, column, fixed_point=FixedPoint(fraction_bits=8))
    assert float((run.result - run.floating).abs().max()) < 256 * 2.0**-7


def test_the_product_of_two_polynomials() -> None:
    """One of them is opened, and the other not."""

    def squared(x: Any, y: Any) -> Any:
        return root(x) * root(y)

    _, x = arguments(6)
    run = run_function(squared, x, x.flip(0), fixed_point=FixedPoint(fraction_bits=12))
    assert float((run.result - run.floating).abs().max()) < 0.05
