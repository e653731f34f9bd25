"""Normalizations whose readers multiply their weight by the rows first, and by the column of inverse roots later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secure
from protocols.circuit import total_cost
from protocols.protocol import CircuitCost
from protocols.two_party import Linear
from secure.deployments.circuits import CircuitDeployment
from secure.frontend import Size
from secure.lowering.lower import LARGEST_COLUMN, OPENED
from secure.mpc.compile import MpcModel, compile_sizes
from secure.mpc.compile import compile as mpc_compile
from secure.mpc.prices import DEFAULT, Prices
from secure.polynomial.forms import PolynomialNorm, PolynomialRMSNorm, freeze_untrained
from secure.polynomial.recipe import Recipe

WIDTH, OUT = 8, 12
NEVER = replace(DEFAULT, late_bytes=0)


class Block(nn.Module):
    """A normalization that layers read: two of them, and with ``residual`` a sum as well."""

    def __init__(self, norm: nn.Module, *, residual: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enter, self.norm, self.residual = nn.Linear(WIDTH, WIDTH), norm, residual
        nn.init.orthogonal_(self.enter.weight)
        self.first, self.second = (nn.Linear(WIDTH, OUT, bias=bias) for _ in range(2))
        self.out = nn.Linear(OUT, WIDTH)

    def forward(self, x: Tensor) -> Any:
        found = self.norm(self.enter(x))
        result = self.out(self.first(found) * self.second(found))
        return result + found if self.residual else result


def norms() -> dict[str, Callable[[], nn.Module]]:
    return {"layer": partial(nn.LayerNorm, WIDTH), "rms": partial(nn.RMSNorm, WIDTH, eps=1e-5)}


def weighed(norm: nn.Module) -> nn.Module:
    """Give a normalization a weight, and a bias if it has one, that are not ones and zeros."""
    generator = torch.Generator().manual_seed(2)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + 1
    return norm


def inputs(seed: int, rows: int = 5, spread: float = 1.5) -> dict[str, Tensor]:
    x = torch.randn((1, rows, WIDTH), generator=torch.Generator().manual_seed(seed))
    return {"x": x * torch.logspace(-math.log2(spread), math.log2(spread), rows, 2.0)[:, None]}


def compiled(module: nn.Module, prices: Prices, *, rows: int = 5, network: str | None = None) -> MpcModel:
    calibration = [inputs(seed, rows) for seed in range(1, 6)]
    return mpc_compile(module, inputs(0, rows), calibration=calibration, prices=prices, network=network)


def cost(made: MpcModel) -> CircuitCost:
    return total_cost(made.program.circuit)


def error(module: nn.Module, deployment: CircuitDeployment, seeds: Sequence[int]) -> float:
    """The largest error of the answers on these inputs."""
    calibration = [inputs(seed) for seed in range(1, 6)]
    made = secure.compile(module, inputs(0), calibration=calibration, deployment=deployment)
    with torch.no_grad(), secure.insecure_in_process(made) as session:
        return max(float((session.query(inputs(s)) - module(**inputs(s))).abs().max()) for s in seeds)


@pytest.mark.parametrize("norm", [*norms()])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_round_is_spared_and_the_result_is_the_same(norm: str, residual: bool, bias: bool) -> None:
    module = Block(weighed(norms()[norm]()), residual=residual, bias=bias).eval()
    late, before = compiled(module, DEFAULT), compiled(module, NEVER)
    assert cost(late).rounds == cost(before).rounds - 1
    read = [i.protocol.weight for i in before.program.circuit if isinstance(i.protocol, Linear)]
    assert read == [i.protocol.weight for i in late.program.circuit if isinstance(i.protocol, Linear)]
    for deployment in (secure.TwoParty(), secure.ThreeParty(), secure.ThreeParty(public_weights=True)):
        assert error(module, deployment, range(6, 10)) < 4e-3


def run_all(module: nn.Module) -> None:
    for seed in range(6):
        module(**inputs(seed))


def test_polynomial_forms_spare_it_too() -> None:
    recipe = Recipe()
    forms = (PolynomialNorm(nn.LayerNorm(WIDTH), recipe), PolynomialRMSNorm(nn.RMSNorm(WIDTH, eps=1e-5), recipe))
    for norm in forms:
        module = Block(weighed(norm)).eval()
        freeze_untrained(module, partial(run_all, module))
        assert cost(compiled(module, DEFAULT)).rounds == cost(compiled(module, NEVER)).rounds - 1
        assert error(module, secure.TwoParty(), [3]) < 4e-3


def test_bytes_that_are_dearer_than_the_round_are_not_paid() -> None:
    module = Block(nn.LayerNorm(WIDTH)).eval()
    most = DEFAULT.late_bytes // (OPENED * 2 * OUT)
    spared = [
        cost(compiled(module, NEVER, rows=rows)).rounds - cost(compiled(module, DEFAULT, rows=rows)).rounds
        for rows in (most, most + 1)
    ]
    assert spared == [1, 0]


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_a_round_costs_no_more_than_its_price(width: int, rows: int) -> None:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, width), nn.Linear(width, 4))
    x = torch.randn((1, rows, 64), generator=torch.Generator().manual_seed(rows))
    late, before = (cost(mpc_compile(module, {"input": x}, prices=prices)) for prices in (DEFAULT, NEVER))
    more = late.to_first + late.to_second - before.to_first - before.to_second
    assert more <= DEFAULT.late_bytes
    assert (late.rounds < before.rounds) == (OPENED * width * rows <= DEFAULT.late_bytes)


@pytest.mark.parametrize("least", [2.0**-6, 2.0**-3, 0.5])
def test_columns_that_would_multiply_the_rounding_do_not_come_late(least: float) -> None:
    """Rows from ``least`` to one, and small weights: what a late column multiplies was rounded before."""
    torch.manual_seed(6)
    module = Block(nn.RMSNorm(WIDTH, eps=1e-7)).eval()
    module.enter.bias.data.zero_()
    rows = torch.logspace(math.log2(least), 0, 9, 2.0)[:, None]
    given = [
        {"x": torch.nn.functional.normalize(torch.randn(1, 9, WIDTH), dim=-1) * WIDTH**0.5 * rows} for _ in range(6)
    ]
    late, before = (mpc_compile(module, given[0], calibration=given[1:], prices=p) for p in (DEFAULT, NEVER))
    assert cost(before).rounds - cost(late).rounds == (1 / least < LARGEST_COLUMN)
    made = secure.compile(module, given[0], calibration=given[1:])
    with torch.no_grad(), secure.insecure_in_process(made) as session:
        assert float((session.query(given[2]) - module(**given[2])).abs().max()) < 4e-3


def test_the_default_choice_of_a_network_is_that_of_none() -> None:
    module = Block(nn.LayerNorm(WIDTH)).eval()
    for network in ("1,0.001", "lan", "1,10000"):
        choice = compiled(module, DEFAULT, network=network).choice
        assert choice is not None
        assert choice.default == cost(compiled(module, DEFAULT))


def test_the_largest_query_of_a_group_decides_for_all_sizes() -> None:
    """Sizes of one group share ranges, so their traces have the same primitives."""
    module = Block(nn.LayerNorm(WIDTH)).eval()
    most = DEFAULT.late_bytes // (OPENED * 2 * OUT)

    def rounds(*sizes: tuple[int, bool], prices: Prices = DEFAULT) -> list[int]:
        """Return the rounds of those sizes that have a Program; the others set ranges."""
        each: list[Any] = []
        for rows, queried in sizes:
            given = inputs(0, rows)
            each.append((Size(given, [given]), {} if queried else None))
        return [cost(made).rounds for made in compile_sizes(module, each, prices=prices)]

    both, for_ranges = ((5, True), (most + 1, True)), ((most + 1, False), (5, True))
    assert rounds(*both) == rounds(*both, prices=NEVER)
    assert rounds(*for_ranges)[0] == rounds(*for_ranges, prices=NEVER)[0] - 1


@pytest.mark.parametrize("public", [False, True])
def test_three_parties_spare_it_where_weights_are_shared(public: bool) -> None:
    """A product with weights that all parties know takes no round that could be spared."""
    deployment, module = secure.ThreeParty(public_weights=public), Block(nn.LayerNorm(WIDTH)).eval()
    found = [total_cost(deployment.translated(compiled(module, prices).program).circuit) for prices in (DEFAULT, NEVER)]
    assert found[0].rounds == found[1].rounds - (0 if public else 1)
    assert deployment.prices.late_bytes == (0 if public else DEFAULT.late_bytes)


def test_rows_of_a_table_are_not_normalized_late() -> None:
    """Their inverse roots are looked up with them, so no round would be spared."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.table, self.norm = nn.Embedding(20, WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
            self.first, self.second = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)

        def forward(self, ids: Tensor) -> Any:
            found = self.norm(self.table(ids))
            return self.first(found) * self.second(found)

    module = Reader().eval()
    module.table.weight.data *= torch.logspace(-1, 1, 20, 2.0)[:, None]
    ids = torch.arange(20)[None, :7]
    late, before = (mpc_compile(module, {"ids": ids}, prices=prices) for prices in (DEFAULT, NEVER))
    assert cost(late) == cost(before)
    made = secure.compile(module, {"ids": ids})
    for given in (ids, torch.arange(13, 20)[None]):
        with torch.no_grad():
            expected = module(given)
        with secure.insecure_in_process(made) as session:
            assert float((session.query({"ids": given}) - expected).abs().max()) < 4e-3
