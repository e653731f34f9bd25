"""Openings are as narrow as their value, results as wide as their readers need: fewer extensions, in whole circuits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from approximations import gelu
from protocols import two_party as tp
from secure.lowering.trace import WeightRef
from secure.mpc.prices import DEFAULT, Prices
from tests.helpers import FunctionRun, run_function


def kinds(run: FunctionRun) -> Counter[str]:
    return Counter(i.protocol.kind for i in run.circuit)


def rings(run: FunctionRun) -> list[int]:
    return [i.protocol.ring for i in run.circuit if isinstance(i.protocol, tp.Open)]


def test_products_of_products_need_no_extension() -> None:
    x, y = (torch.linspace(low, 3, 60, dtype=torch.float64).reshape(4, 15) for low in (-3, 0.5))

    def function(x: Any, y: Any) -> Any:
        return (x * y).square() * y.sum(-1, keepdim=True) * x

    run = run_function(function, x, y)
    assert kinds(run)["extend"] == 0
    assert kinds(run)["product"] == 0
    assert run.cost.rounds == 5  # four products in a row, and the answer
    assert max(rings(run)) < 40
    assert float((run.result - run.floating).abs().max()) < 2e-5 * float(run.floating.abs().max())


def test_a_value_is_opened_once_for_matrices_and_elements() -> None:
    """The matrix product needs the wide opening, which then serves the elementwise product without a lift."""
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(4, 4)
    run = run_function(lambda x: (x @ x) + x * x, x)
    assert kinds(run)["open"] == 1
    assert kinds(run)["lift"] == 0
    assert float((run.result - run.floating).abs().max()) < 1e-3


def test_gelu_opens_its_argument_once_and_narrow() -> None:
    x = torch.linspace(-8, 8, 500, dtype=torch.float64)
    run = run_function(gelu, x)
    widths = rings(run)
    assert max(widths) <= 24  # of the argument; its four polynomials are opened besides, together
    assert len(widths) == 2
    assert kinds(run)["extend"] == 0
    # x a little below a knot may take the next piece, which is as close to GeLU
    assert float((run.result - torch.nn.functional.gelu(x)).abs().max()) < 7e-4


def test_one_lift_serves_all_products_of_a_value() -> None:
    x, y = (torch.linspace(low, 3, 12, dtype=torch.float64) for low in (-3, 0.5))
    run = run_function(lambda x, y: x.square() + x * y + x * (y * y), x, y)
    lifted = [i.inputs for i in run.circuit if isinstance(i.protocol, tp.Lift)]
    assert len(lifted) == len(set(lifted)) == 3  # x, y and the square of y


@pytest.mark.parametrize("worth", [0, DEFAULT.round_bytes])
def test_a_layer_is_wider_where_that_costs_less_than_a_round(worth: int) -> None:
    """A sum of which 2^9 times is needed: the layer before it is delivered wider, or else its result extended."""
    x, w = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8), torch.eye(8, dtype=torch.float64)

    def function(x: Any) -> Any:
        return (x.linear(WeightRef("w", (8, 8))) * 384.0 - x) * 2.0**-9 * x

    run = run_function(function, x, weights={"w": w}, prices=Prices(round_bytes=worth))
    assert (kinds(run)["extend"] == 0) == bool(worth)
    assert float((run.result - run.floating).abs().max()) < 1e-3
