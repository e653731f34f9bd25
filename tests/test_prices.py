"""Prices of rounds and bytes, and the choice that the compiler makes for a network."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secure
from protocols.circuit import rounds_of, total_cost
from protocols.protocol import CircuitCost
from protocols.two_party import Compare, DigitIn
from secure.cost.outline import outline
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.compare import Variant, compare
from secure.deployments.deployment import CompileOptions, Deployment
from secure.deployments.in_process import plain_reference
from secure.errors import InvalidInput
from secure.mpc.compile import compile as mpc_compile
from secure.mpc.network import LOOPBACK, NETWORKS, NetworkSpeed, find_network
from secure.mpc.prices import DEALT_FOR_ONLINE, DEFAULT, TRIED, Choice, Prices, choose, projected
from tests.helpers import run_function
from tests.test_whatif import Tiny, samples

FAR = NetworkSpeed("far", "far", 10.0, 1e9)
THIN = NetworkSpeed("thin", "thin", 1e-6, 1e4)


class Norm(nn.Module):
    """Layers and norms of their sums, which have rounds that bytes can spare."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.out = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.norm(x)
        return self.norm(self.out(hidden * self.linear(hidden)) + hidden)


def inputs(seed: int) -> dict[str, torch.Tensor]:
    x = torch.randn((1, 6, 16), generator=torch.Generator().manual_seed(seed))
    return {"x": x * torch.linspace(1, 4, 6).reshape(1, 6, 1)}


def compiled(network: str | None, deployment: CircuitDeployment | None = None) -> secure.Compiled:
    calibration = [inputs(seed) for seed in range(1, 6)]
    return secure.compile(Norm().eval(), inputs(0), calibration=calibration, network=network, deployment=deployment)


@pytest.fixture(scope="module")
def near() -> secure.Compiled:
    return compiled(None)


# the choice


class Made:
    """A circuit, whatever it computes."""

    def __init__(self, circuit: Any) -> None:
        self.circuit = circuit


@pytest.mark.parametrize("shortest", [{"round_bytes": 0}, {"coefficients": 4096}, {}])
def test_the_choice_has_the_least_projected_time(near: secure.Compiled, shortest: dict[str, int]) -> None:
    whole = near.program.circuit
    best = replace(DEFAULT, **shortest)
    made: dict[Prices, Made] = {}

    def emit(prices: Prices) -> Made:
        made[prices] = Made(whole[:-4] if prices == best else whole)
        return made[prices]

    found, choice = choose(THIN, emit)
    assert found is made[best]
    assert choice.prices == best
    assert choice.cost == total_cost(found.circuit)
    assert choice.default == total_cost(made[DEFAULT].circuit)
    assert len(made) == 1 + sum(map(len, TRIED.values()))


def test_of_equal_ones_the_default_is_taken(near: secure.Compiled) -> None:
    _, choice = choose(FAR, lambda _: near.program)
    assert choice.prices == DEFAULT
    assert set(TRIED) < {f.name for f in fields(Prices)}


def test_a_dear_round_gives_fewer_rounds_and_a_dear_byte_fewer_bytes(near: secure.Compiled) -> None:
    far, thin = compiled("5000,10000"), compiled("0.1,0.001")
    costs = [total_cost(each.program.circuit) for each in (far, near, thin)]
    assert costs[0].rounds <= costs[1].rounds <= costs[2].rounds
    assert costs[0].rounds < costs[2].rounds
    worth = [max(cost.to_first, cost.to_second) + cost.dealt / DEALT_FOR_ONLINE for cost in costs]
    assert worth[0] >= worth[1] > worth[2]


@pytest.mark.parametrize("network", ["lan", "slow-wan", "0.1,0.001", "5000,10000"])
def test_results_stay_right(network: str) -> None:
    made = compiled(network)
    with torch.no_grad():
        expected = Norm().eval()(**inputs(3))
    with secure.insecure_in_process(made) as session:
        answer = session.query(inputs(3))
    assert float((answer - expected).abs().max()) < 1e-3
    assert float((secure.plain_reference(made, inputs(3)) - expected).abs().max()) < 1e-3


# what deployments say


class Attention(nn.Module):
    """A softmax of rows that are long enough to be halved before they are counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(16, 16)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> Any:
        return torch.softmax(self.query(q) @ k.transpose(-1, -2), -1) @ k


def attention(seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.randn((2, 8, 96, 16), generator=torch.Generator().manual_seed(seed))
    return {"q": drawn[:1], "k": drawn[1:]}


@pytest.fixture(scope="module")
def by_deployment() -> dict[str, secure.Compiled]:
    made = (secure.TwoParty(), secure.ThreeParty(), secure.ThreeParty(public_weights=True))
    return {str(d): secure.compile(Attention(), attention(0), deployment=d) for d in made}


def sent(deployment: CircuitDeployment, made: secure.Compiled) -> int:
    return sum(deployment.price(made.program).bytes(phase=phase) for phase in (ONLINE, OFFLINE))


def test_three_parties_pay_dealt_bytes_like_online_bytes(by_deployment: dict[str, secure.Compiled]) -> None:
    two, three, public = by_deployment.values()
    assert (two.deployment.prices, three.deployment.prices.dealt_for_online) == (DEFAULT, 1)  # type: ignore[attr-defined]
    assert sent(three.deployment, three) < sent(three.deployment, two)  # type: ignore[arg-type]
    rounds = [  # but for the checks of ranges, which go on beside them
        rounds_of(made.program.circuit, [output.instruction for output in made.program.outputs])
        for made in (two, three)
    ]
    assert rounds[1] > rounds[0]
    assert two.program.digest != three.program.digest == public.program.digest
    assert total_cost(two.program.circuit) == total_cost(secure.compile(Attention(), attention(0)).program.circuit)


def test_what_three_parties_compute_stays_right(by_deployment: dict[str, secure.Compiled]) -> None:
    with torch.no_grad():
        expected = Attention()(**attention(0))
    for made in by_deployment.values():
        with secure.insecure_in_process(made) as session:
            answer = session.query(attention(0))
        assert float((answer - expected).abs().max()) < 2e-3


def test_profiles_and_comparisons_are_of_what_the_deployment_compiles() -> None:
    first, *more = samples(5).calibration
    for name, deployment in (("two-party", secure.TwoParty()), ("three-party", secure.ThreeParty())):
        asked = secure.compile(Tiny(), first, calibration=more, deployment=deployment)
        (found,) = compare(Tiny(), [Variant(5, deployment=name)], samples)
        assert found.cost == asked.cost
        said = "compiled where 1 dealt byte is worth an online byte"
        assert (said in secure.profile(asked, networks=[]).lines) == (name == "three-party")
    assert Prices(dealt_for_online=4).words == "compiled where 4 dealt bytes are worth an online byte"


def test_a_network_leaves_the_worth_of_dealt_bytes_as_it_is(near: secure.Compiled) -> None:
    own, tried = Prices(round_bytes=7, dealt_for_online=1), []

    def emit(prices: Prices) -> Made:
        tried.append(prices)
        return Made(near.program.circuit)

    _, choice = choose(FAR, emit, own)
    assert choice.prices == tried[0] == own
    assert {prices.dealt_for_online for prices in tried} == {1}
    dealt = CircuitCost(dealt=10**9)
    assert projected(FAR, dealt, 1) == 16 * projected(FAR, dealt)


# names


def test_the_digest_covers_the_network(near: secure.Compiled) -> None:
    assert compiled(LOOPBACK).program.digest == near.program.digest
    assert "network" not in near.program.labels
    programs = [compiled(network).program for network in ("wan", "slow-wan", "250,20", " 250 , 20 ")]
    assert [p.labels["network"] for p in programs] == ["wan", "slow-wan", "250,20", "250,20"]
    assert programs[2].digest == programs[3].digest
    assert len({near.program.digest, *(p.digest for p in programs)}) == 4


@pytest.mark.parametrize("text", ["moon", "1e9,3", f"{'9' * 400},1", f"1,{'9' * 400}", "0,1", "1,2,3", "wan,lan"])
def test_an_unknown_network_is_refused_before_anything_is_done(text: str) -> None:
    with pytest.raises(InvalidInput, match="unknown network"):
        CompileOptions(network=text)
    with pytest.raises(InvalidInput, match="unknown network"):
        secure.compile(Norm(), inputs(0), network=text)


def test_ckks_has_no_rounds_to_choose() -> None:
    with pytest.raises(InvalidInput, match="network means nothing under ckks"):
        secure.compile(Norm(), inputs(0), deployment=secure.Ckks(), network="wan")


# who is told


def test_the_choice_is_said_with_its_price_and_the_default_s(near: secure.Compiled) -> None:
    made = compiled("0.1,0.001")
    (words,) = made.deployment.choices(made.model)
    cost, default = (each.cost for each in (made, near))
    assert words.startswith(f"for 0.1 Mbps, 0.001 ms: {cost.rounds} rounds, ")
    assert f"; the default choice: {default.rounds} rounds, " in words
    assert words.count(" MB online, ") == words.count(" MB dealt, ") == words.count(" s of waiting") == 2
    assert near.deployment.choices(near.model) == ()
    same = Choice(NETWORKS[0], DEFAULT, made.model.choice.default, made.model.choice.default)
    assert same.words.endswith("; nothing else is cheaper there than the default choice")


def test_profiles_say_it_too() -> None:
    made = compiled("slow-wan")
    report = secure.profile(made, networks=["slow-wan"])
    assert made.deployment.choices(made.model)[0] in report.lines
    assert report.as_dict()["labels"]["network"] == "slow-wan"


@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.ThreeParty()], ids=lambda d: d.name)
def test_all_deployments_by_shares_take_it(deployment: CircuitDeployment) -> None:
    made = compiled("slow-wan", deployment)
    assert made.program.labels["network"] == "slow-wan"
    assert made.cost.rounds <= compiled(None, deployment).cost.rounds


def test_outlines_and_comparisons_are_for_a_network() -> None:
    program = outline(Norm().eval(), inputs(0), network="slow-wan")
    assert program.labels["network"] == "slow-wan"
    assert total_cost(program.circuit).rounds <= total_cost(outline(Norm().eval(), inputs(0)).circuit).rounds
    (found,) = compare(Tiny(), [Variant(5)], samples, network="slow-wan")
    first, *more = samples(5).calibration
    asked = secure.compile(Tiny(), first, calibration=more, network="slow-wan")
    assert found.cost == asked.cost


def test_a_larger_table_spares_the_choice_among_smaller_ones() -> None:
    x = torch.linspace(1, 300, 40, dtype=torch.float64)
    runs = [
        run_function(lambda x: x.inverse_power(2, 1.0, 300.0, 1.0, 0), x, prices=Prices(coefficients=n))
        for n in (0, 4096)
    ]
    assert runs[0].cost.rounds > runs[1].cost.rounds
    assert runs[0].cost.dealt < runs[1].cost.dealt


@pytest.mark.parametrize("root", [1, 2])
@pytest.mark.parametrize("high", [30.0, 3000.0, 300000.0])
def test_a_comparison_spares_tables_of_bits_where_dealt_bytes_are_dear(root: int, high: float) -> None:
    """The bands that it tells apart are right from end to end, at their borders too."""
    x = torch.exp(torch.linspace(0, math.log(high), 4000, dtype=torch.float64))
    extra = round(math.log2(high) / root)  # fraction bits with which the least result is as precise as others
    function = partial(lambda x, root: x.inverse_power(root, 1.0, high, 1.0, extra), root=root)
    near, dear = (
        run_function(function, x, prices=Prices(round_bytes=0, coefficients=0, dealt_for_online=n)) for n in (10**6, 1)
    )
    assert dear.cost.dealt <= near.cost.dealt
    compared = [i.protocol for i in dear.circuit if isinstance(i.protocol, Compare)]
    if high > 1000:
        assert compared
        assert not any(isinstance(i.protocol, DigitIn) for i in dear.circuit)
    for run in (near, dear):
        assert float((run.result * x ** (1 / root) - 1).abs().max()) < 2**-13


def test_names_of_networks() -> None:
    assert [n.key for n in NETWORKS] == ["lan", "wan", "slow-wan"]
    assert find_network("0.5,0") == NetworkSpeed("0.5,0", "0.5 Mbps, 0 ms", 0.0, 62500.0)


class _Inverse(nn.Module):
    """A layer of an inverse root over a wide range, so that its table has bands."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.scale = nn.Linear(8, 8), nn.Linear(1, 8), scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        out: Tensor = self.outer(torch.rsqrt((h * h).sum(-1, keepdim=True) * self.scale + 1e-6))
        return out


@pytest.mark.parametrize(("weight_bits", "scale"), [(14, 1e4), (20, 1.0), (20, 100.0), (20, 1e4)])
@pytest.mark.parametrize("deployment", [secure.TwoParty(), secure.ThreeParty()], ids=lambda d: d.name)
def test_bands_that_a_word_ends_have_one_ring(weight_bits: int, scale: float, deployment: Deployment) -> None:
    """With 20 fraction bits the coarse band would be wider than a word, and the finer ones, which have fewer, not."""
    samples = [{"x": torch.ones(1, 8) * size} for size in (0.5, 8.0)]
    fixed = secure.FixedPoint(fraction_bits=20, weight_fraction_bits=weight_bits)
    model = _Inverse(scale).eval()
    compiled = secure.compile(model, samples[0], calibration=samples[1:], fixed_point=fixed, deployment=deployment)
    for sample in samples:
        found = secure.plain_reference(compiled, sample)
        torch.testing.assert_close(found, model(**sample).double().detach(), atol=5e-3, rtol=0)


# tables that spare rounds where values are few


class Root(nn.Module):
    """A norm without a mean, of rows whose squares differ by a factor of 14."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


@pytest.mark.parametrize(("rows", "spared"), [(1, 1), (64, 0)])
def test_few_values_have_wider_tables(rows: int, spared: int) -> None:
    x = torch.randn((rows, 16), generator=torch.Generator().manual_seed(0))
    samples = [{"x": x * scale} for scale in (0.8, 1.0, 3.0)]
    without, made = (
        mpc_compile(
            Root(), samples[0], calibration=samples[1:], prices=replace(DEFAULT, table_bytes=size), checked=False
        )
        for size in (0, DEFAULT.table_bytes)
    )
    fewer, more = total_cost(made.program.circuit), total_cost(without.program.circuit)
    assert more.rounds - fewer.rounds == spared
    assert (fewer.dealt > more.dealt) == bool(spared)
    assert fewer.dealt <= more.dealt + DEFAULT.table_bytes
    for sample in samples:
        assert plain_reference(made, sample).sub(Root().double()(sample["x"].double())).abs().max() < 2e-3
