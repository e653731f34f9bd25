"""The capacity planner: its arithmetic, its refusals, what it measures of every deployment, and the command."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import secure
from parties.cli import plan as planning
from parties.cli.plan import read_prices
from parties.reports.capacity import capacity_lines, capacity_tables
from protocols.circuit import deal_one
from secure.cost.demand import PROCESS, QueryDemand, RoleDemand
from secure.cost.offline_times import measure_offline
from secure.cost.plan import CapacityPlan, PriceList, RolePlan, Workload, plan, queue_wait
from secure.cost.projection import Transport
from secure.cost.traffic import OFFLINE, ONCE, ONLINE, Cost, Traffic
from secure.deployments import deployment as registry
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.deployment import variants
from secure.errors import InvalidInput
from secure.mpc.network import NETWORKS, NetworkSpeed, find_apart
from tests.test_cli import Run, run
from tests.test_profiling import SMALL

__all__ = ["run"]  # the fixture

COST = Cost(
    10,
    (
        Traffic("client", "server", 1_000_000, ONLINE),
        Traffic("server", "client", 2_000_000, ONLINE),
        Traffic("dealer", "server", 8_000_000, OFFLINE),
        Traffic("server", "client", 90_000_000, ONCE),
    ),
)
NETWORK = NetworkSpeed("test", "a test", round_trip=0.01, bandwidth=1e9)
DEMAND = QueryDemand(
    COST,
    (
        RoleDemand("client", 0.2, 0.1, held=1000, session=10, running=100),
        RoleDemand("server", 0.5, 0.3, held=2000, session=20, running=200, files=5_000, stored=8_000_000),
        RoleDemand("dealer", 0.0, 0.4, held=3000, running=300),
    ),
    batch=4,
    network=NETWORK,
    seconds=0.6,
    offline_seconds=0.5,
)
LOAD = Workload(clients=1000, queries_per_day=86_400, texts_per_query=4, peak=2.0)
PRICES = PriceList(core_hour=1.0, gb_hour=2.0, gb_out=3.0, disk_gb_month=4.0)


def role(found: CapacityPlan, name: str) -> RolePlan:
    return next(each for each in found.roles if each.role == name)


# arithmetic


def test_cores_and_machines_by_hand() -> None:
    found = plan(DEMAND, LOAD)  # two queries a second at the busiest time, of one run each
    server, dealer, client = (role(found, name) for name in ("server", "dealer", "client"))
    assert server.cores == pytest.approx(2 * 0.8 / 0.7)
    assert (server.machines, dealer.machines, client.machines) == (1, 1, 1000)
    assert server.busy == pytest.approx(1.6 / 4)
    assert client.busy == pytest.approx(0.6 / 1000)
    assert server.processor_seconds_a_text == pytest.approx(0.8 / 4)
    assert (server.limit, client.limit) == ("", "")
    assert role(plan(DEMAND, replace(LOAD, queries_per_day=800_000)), "server").limit == "cores"
    assert server.peak_in == pytest.approx(2 * 9_000_000 * 8)
    assert server.peak_out == pytest.approx(2 * 2_000_000 * 8)
    assert server.day_out == pytest.approx(86_400 * 2_000_000 + 1000 * 90_000_000 / 30)
    assert dealer.day_out == pytest.approx(86_400 * 8_000_000)
    assert found.latency is not None
    assert found.latency == pytest.approx(1.1 + server.wait + dealer.wait)
    assert found.waiting == pytest.approx(10 * 0.005 + 2_000_000 / 1e9)
    at_once = math.ceil(2 * found.latency)
    assert server.memory == PROCESS + 2000 + 1000 * 20 + at_once * 200
    assert server.disk == 5_000


def test_bytes_of_all_roles_agree() -> None:
    found = plan(DEMAND, LOAD)
    assert sum(r.day_in for r in found.roles) == pytest.approx(sum(r.day_out for r in found.roles))
    assert sum(r.peak_in for r in found.roles) == pytest.approx(sum(r.peak_out for r in found.roles))


def test_twice_the_queries_take_twice_the_cores_and_bytes() -> None:
    once = plan(replace(DEMAND, cost=replace(COST, traffic=COST.traffic[:3])), LOAD)
    twice = plan(once.demand, replace(LOAD, queries_per_day=2 * LOAD.queries_per_day))
    for a, b in zip(once.roles, twice.roles, strict=True):
        for name in ("cores", "peak_in", "peak_out", "day_in", "day_out"):
            assert getattr(b, name) == pytest.approx(2 * getattr(a, name))


def test_more_of_anything_takes_no_less() -> None:
    before = plan(DEMAND, LOAD, PRICES)
    more: dict[str, Any] = {"queries_per_day": 500_000, "peak": 9.0, "clients": 5000, "texts_per_query": 9}
    for name, value in more.items():
        after = plan(DEMAND, replace(LOAD, **{name: value}), PRICES)
        for a, b in zip(before.roles, after.roles, strict=True):
            assert (b.cores or 0) >= (a.cores or 0)
            assert (b.machines or 0) * (b.memory or 0) >= (a.machines or 0) * (a.memory or 0)
        assert after.month_cost is not None
        assert before.month_cost is not None
        assert after.month_cost >= before.month_cost


def test_a_batch_that_is_not_full_costs_as_much() -> None:
    full, one = plan(DEMAND, LOAD), plan(DEMAND, replace(LOAD, texts_per_query=1))
    assert role(one, "server").cores == role(full, "server").cores
    assert role(one, "server").processor_seconds_a_text == pytest.approx(0.8)
    five = plan(DEMAND, replace(LOAD, texts_per_query=5))
    assert role(five, "server").cores == pytest.approx(2 * (role(full, "server").cores or 0))
    assert five.waiting == pytest.approx(2 * full.waiting)


def test_links_that_are_full_take_machines() -> None:
    slow = replace(DEMAND, network=replace(NETWORK, bandwidth=5e6), seconds=2.0)
    server = role(plan(slow, LOAD), "server")
    assert (server.machines, server.limit) == (math.ceil(2 * 9_000_000 / 5e6 / 0.7), "network")


def test_sessions_take_machines_of_those_who_answer() -> None:
    found = plan(DEMAND, replace(LOAD, sessions_per_machine=16))
    server, dealer = role(found, "server"), role(found, "dealer")
    assert (server.machines, server.limit, dealer.machines) == (math.ceil(1000 / 16), "sessions", 1)


def test_prices() -> None:
    found = plan(DEMAND, LOAD, PRICES)
    server = role(found, "server")
    assert server.month_cost is not None
    assert server.memory is not None
    assert server.month_cost == pytest.approx(
        {
            "cores": 4 * 720,
            "memory": 2 * server.memory / 1e9 * 720,
            "traffic out": 3 * server.day_out * 30 / 1e9,
            "disk": 4 * 5000 / 1e9,
        }
    )
    assert role(found, "client").month_cost is None  # clients pay for their own
    bills = [sum(r.month_cost.values()) for r in found.roles if r.month_cost]
    assert found.month_cost == pytest.approx(sum(bills))
    assert found.cost_1000_texts == pytest.approx(sum(bills) / (86_400 * 4 * 30) * 1000)


def test_without_prices_no_cost_is_shown() -> None:
    found = plan(DEMAND, LOAD)
    assert (found.month_cost, found.cost_1000_texts) == (None, None)
    assert all(r.month_cost is None for r in found.roles)


def test_a_store_takes_the_offline_phase_out_of_the_busiest_hours() -> None:
    without, stored = plan(DEMAND, LOAD), plan(DEMAND, replace(LOAD, store_hours=2.0))
    others = 22 * 3600
    rate, made = (86_400 - 2 * 7200) / others, 86_400 / others
    assert role(stored, "server").cores == pytest.approx(max(2 * 0.5, rate * 0.5 + made * 0.3) / 0.7)
    assert role(stored, "dealer").cores == pytest.approx(made * 0.4 / 0.7)
    assert role(stored, "server").disk == 5_000 + 2 * 7200 * 8_000_000
    assert stored.latency is not None
    assert without.latency is not None
    assert stored.latency < without.latency - 0.4
    assert role(stored, "dealer").peak_out == pytest.approx(made * 8_000_000 * 8)


def test_waiting_in_a_queue() -> None:
    assert queue_wait(1, 0.5, 1.0) == pytest.approx(0.5)  # M/D/1: rho / (2 (1 - rho)) of a service
    assert queue_wait(1, 0.9, 1.0) == pytest.approx(0.9 / 0.2)
    # M/M/2 with a load of 1: C = 1/3, so that it waits 1/3, and M/D/2 half of that by this rule
    assert queue_wait(2, 1.0, 1.0) == pytest.approx(1 / 6)
    assert queue_wait(4, 4.0, 1.0) == math.inf
    assert queue_wait(3, 0.0, 1.0) == 0.0
    waits = [queue_wait(8, rate, 1.0) for rate in (1.0, 3.0, 5.0, 7.0, 7.9)]
    assert waits == sorted(waits)


# refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queries_per_day": 0}, "queries per day: 0"),
        ({"queries_per_day": math.nan}, "queries per day: nan"),
        ({"clients": 0}, "clients: 0"),
        ({"texts_per_query": 0}, "texts per query: 0"),
        ({"peak": 0.5}, "peak: 0.5"),
        ({"utilisation": 1.0}, "utilisation: 1.0"),
        ({"store_hours": 24}, "store hours: 24"),
        ({"cores_per_machine": 0}, "cores per machine: 0"),
        ({"latency": 0.0}, "latency: 0.0"),
        ({"sessions_per_machine": 0}, "sessions per machine: 0"),
        ({"latency": math.nan}, "latency: nan"),
    ],
)
def test_workloads_out_of_range(changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        replace(LOAD, **changes)


def test_a_latency_that_the_network_alone_exceeds() -> None:
    with pytest.raises(InvalidInput, match=r"the network alone takes 0\.052 s of a query \(10 rounds on a test\)"):
        plan(DEMAND, replace(LOAD, latency=0.05))


def test_a_latency_that_idle_machines_exceed() -> None:
    with pytest.raises(InvalidInput, match=r"1\.1 s on idle machines, 0\.052 s of it on the network alone"):
        plan(DEMAND, replace(LOAD, latency=1.0))
    assert plan(DEMAND, replace(LOAD, latency=1.0, store_hours=1.0)).latency is not None
    with pytest.raises(InvalidInput, match="nothing predicts"):
        plan(replace(DEMAND, seconds=None), replace(LOAD, latency=1.0))


def test_a_latency_takes_machines() -> None:
    busy = replace(LOAD, queries_per_day=700_000)
    loose = plan(DEMAND, busy)
    assert loose.latency is not None
    bound = 1.1 + (loose.latency - 1.1) / 10
    tight = plan(DEMAND, replace(busy, latency=bound))
    assert tight.latency is not None
    assert tight.latency <= bound
    assert (role(tight, "server").machines or 0) > (role(loose, "server").machines or 0)
    assert role(tight, "server").limit == "latency"


def test_clients_that_cannot_ask_so_much() -> None:
    with pytest.raises(InvalidInput, match=r"2 clients that ask one query at a time, of 1\.12 s"):
        plan(DEMAND, replace(LOAD, clients=2))


def test_a_store_of_more_than_a_day() -> None:
    with pytest.raises(InvalidInput, match="13 hours of 2 times the mean rate are more than the whole day"):
        plan(DEMAND, replace(LOAD, store_hours=13))


def test_numbers_without_measure_are_refused() -> None:
    with pytest.raises(InvalidInput, match="machines of the server"):
        plan(DEMAND, replace(LOAD, queries_per_day=1e15, clients=1 << 40))


def test_roles_of_which_nothing_is_known() -> None:
    unknown = replace(DEMAND, roles=tuple(RoleDemand(r.role) for r in DEMAND.roles), seconds=None)
    found = plan(unknown, LOAD, PRICES)
    server = role(found, "server")
    assert (server.cores, server.machines, server.memory, server.busy, found.latency) == (None,) * 5
    assert server.peak_in == pytest.approx(2 * 9_000_000 * 8)
    assert found.month_cost is None
    json.dumps(found.as_dict(), allow_nan=False)


# prices


def test_prices_from_words_and_files(tmp_path: Path) -> None:
    assert read_prices("core-hour=0.04, gb-out=0.08") == PriceList(core_hour=0.04, gb_out=0.08)
    file = tmp_path / "prices.toml"
    file.write_text("core-hour = 0.04  # of our own machines\ndisk-gb-month = 1\n")
    assert read_prices(str(file)) == PriceList(core_hour=0.04, disk_gb_month=1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("core-hour=x", "could not convert"),
        ("core-hour=-1", "a price of -1.0"),
        ("core-hour=nan", "a price of nan"),
        ("core-hour=0", "no price is given"),
        ("colour=1", "nothing has the price 'colour'"),
        ("core-hour=1,core-hour=2", "twice"),
        ("/nowhere", "cannot be read"),
    ],
)
def test_prices_that_are_none(given: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_prices(given)


def test_files_that_hold_no_prices(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    for text in ("core-hour", "core-hour = []", "[core-hour]\nx = 1"):
        file.write_text(text)
        with pytest.raises(InvalidInput, match="--prices"):
            read_prices(str(file))


# demand


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


class Squares(Tiny):
    """The same in polynomial form, as ciphertexts need it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up(x).square())
        return out


def samples() -> Sequence[Mapping[str, torch.Tensor]]:
    return [{"x": torch.randn(1, 8, generator=torch.Generator().manual_seed(s))} for s in range(9)]


def transport() -> Transport:
    return Transport(1e-4, 1e-9, 1e-4, 1e-9, 1e-9, 1e-9)


@pytest.mark.parametrize("name", variants(CircuitDeployment))
def test_the_demand_of_every_deployment_on_circuits(name: str) -> None:
    deployment = variants(CircuitDeployment)[name]
    example, *calibration = samples()
    compiled = secure.compile(Tiny().eval(), example, calibration=calibration, deployment=deployment)
    demand = deployment.demand(compiled.model, NETWORKS[0], transport)
    assert [r.role for r in demand.roles] == [r.name for r in deployment.roles()]
    assert demand.cost == compiled.cost
    running = deployment.deployed(compiled.program)
    by_name = {r.role: r for r in demand.roles}
    first, second, dealer = (by_name[n] for n in (*running.names, running.dealer))
    assert first.stored == running.cost.dealt
    assert all((r.online or 0) > 0 for r in (first, second))
    assert (dealer.offline or 0) > 1e-9 * running.cost.dealt
    assert min(r.held for r in (first, second)) > 0
    assert (dealer.held > 0) != getattr(deployment, "public_weights", False)  # there is no mask of weights then
    found = plan(demand, Workload(10, 1000))
    assert found.latency is not None
    assert found.latency > demand.waiting
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_demand_of_a_model_on_ciphertexts() -> None:
    example, *calibration = samples()
    compiled = secure.compile(Squares().eval(), example, calibration=calibration, deployment=secure.Ckks())
    demand = compiled.deployment.demand(compiled.model, NETWORKS[0], transport)
    client, server = demand.roles
    assert (client.online, client.role) == (None, "client")
    assert (server.online or 0) > 0
    found = plan(demand, Workload(3, 1000), PRICES)
    assert found.month_cost is not None
    assert role(found, "client").cores is None
    assert role(found, "server").memory is not None


def test_offline_times_grow_with_the_circuit() -> None:
    example, *calibration = samples()
    wide = nn.Sequential(nn.Linear(8, 1 << 16), nn.ReLU(), nn.Linear(1 << 16, 8)).eval()
    narrow = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    named = [{"input": s["x"]} for s in (example, *calibration)]
    found = []
    for module in (narrow, wide):
        compiled = secure.compile(module, named[0], calibration=named[1:])
        deployed = secure.TwoParty().deployed(compiled.program)
        # The least of a few: one run of a millisecond may wait for whatever else the machine does.
        times = [measure_offline(deployed) for _ in range(5)]
        found.append((min(t.dealing for t in times), min(t.preparing for t in times)))
    (dealing, preparing), (more_dealing, more_preparing) = found
    assert 0 < 2 * dealing < more_dealing
    assert 0 < preparing < more_preparing


def test_repeated_layers_are_measured_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from secure.cost import offline_times

    example, *calibration = ({"input": s["x"]} for s in samples())
    calls: list[int] = []

    def counted(index: int, *arguments: Any) -> Any:
        calls.append(index)
        return deal_one(index, *arguments)

    monkeypatch.setattr(offline_times, "deal_one", counted)
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU()) for _ in range(12))).eval()
    circuit = secure.TwoParty().deployed(secure.compile(deep, example, calibration=calibration).program)
    measure_offline(circuit)
    assert 0 < len(calls) < len(circuit.circuit)


def test_a_plan_of_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parties.services.measure.measure_transport", transport)
    example, *calibration = samples()
    compiled = secure.compile(Tiny().eval(), example, calibration=calibration)
    found = secure.plan(compiled, secure.Workload(10, 1000), network="wan", prices=PRICES)
    assert isinstance(found, secure.CapacityPlan)
    assert found.month_cost is not None
    with pytest.raises(InvalidInput, match="loopback is no network between machines"):
        secure.plan(compiled, secure.Workload(10, 1000), network="loopback")


# the documentation

SHOWN = QueryDemand(
    Cost(
        185,
        (
            Traffic("client", "server", 71_000_000, ONLINE),
            Traffic("server", "client", 50_000_000, ONLINE),
            Traffic("dealer", "server", 360_000_000, OFFLINE),
        ),
    ),
    (
        RoleDemand("client", 0.5, 0.15, 180_000_000, 86_000_000, 160_000_000, 97_000_000),
        RoleDemand("server", 0.6, 0.4, 230_000_000, 360_000_000, 430_000_000, 68_000_000, 360_000_000),
        RoleDemand("dealer", 0.0, 0.75, 85_000_000, 0, 97_000_000),
    ),
    batch=8,
    network=NETWORKS[0],
    seconds=1.2,
    offline_seconds=0.8,
)


def test_the_example_in_the_documentation() -> None:
    load = Workload(200, 100_000, texts_per_query=8, peak=2.0)
    found = plan(SHOWN, load, PriceList(core_hour=0.04, gb_hour=0.005, disk_gb_month=0.1))
    told = io.StringIO()
    console = Console(file=told, width=120, color_system=None, highlight=False)
    for table in capacity_tables(found):
        console.print(table)
    for line in capacity_lines(found):
        console.print(line, markup=False, soft_wrap=True)
    lines = "".join(f"    {line}".rstrip() + "\n" for line in told.getvalue().strip().splitlines())
    page = (Path(__file__).parent.parent / "docs/plan.md").read_text(encoding="utf-8")
    assert lines in page, lines


# the command

GIVEN = ("--clients", "10", "--queries-per-day", "5000")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure_transport", transport)


@pytest.fixture
def shape(tmp_path: Path) -> str:
    pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL))
    return str(file)


@pytest.mark.parametrize("deployment", [d.name for d in registry.deployments() if issubclass(d, CircuitDeployment)])
def test_a_shape_needs_no_weights(deployment: str, shape: str, run: Run, quick: None) -> None:
    arguments = (shape, "--length", "8", "--deployment", deployment, "--json", *GIVEN)
    ended = run("plan", *arguments, "--batch", "4", "--prices", "core-hour=0.04")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["deployment"], found["query"]["batch"]) == (deployment, 4)
    assert found["workload"]["texts_per_query"] == 4
    assert found["month_cost"] > 0
    one = json.loads(run("plan", *arguments).out)
    assert one["query"]["rounds"] <= found["query"]["rounds"]
    sizes = [sum(link["bytes"] for link in each["query"]["traffic"]) for each in (one, found)]
    assert 3 * sizes[0] < sizes[1] < 4.5 * sizes[0]


def test_the_tables_and_the_assumptions(shape: str, run: Run, quick: None) -> None:
    ended = run("plan", shape, "--length", "8", *GIVEN, "--store-hours", "2", "--prices", "core-hour=0.04,gb-out=0.1")
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    for words in ("5,000 queries a day of 10 clients", "server", "dealer", "assumptions:", "1,000 texts", "the store"):
        assert words in said
    for line in plan(DEMAND, replace(LOAD, store_hours=1.0), PRICES).assumptions:
        assert line.split(" ")[0] in said
    assert "cost a month" not in run("plan", shape, "--length", "8", *GIVEN).out


def test_a_latency_that_cannot_be_is_refused_in_words(shape: str, run: Run, quick: None) -> None:
    ended = run("plan", shape, "--length", "8", *GIVEN, "--network", "slow-wan", "--latency", "0.1")
    assert ended.code == 1
    assert "the network alone takes" in ended.err
    assert "hint:" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--network", "loopback"), "loopback is no network between machines"),
        (("--deployment", "ckks", "--refresh", "--batch", "2"), "a batch whose ciphertexts are refreshed"),
        (("--peak", "0.1"), "peak: 0.1"),
        (("--prices", "colour=1"), "nothing has the price 'colour'"),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled(
    arguments: Sequence[str], said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Callable[..., Any]:
        pytest.fail("compiled")

    monkeypatch.setattr(planning, "made_of", never)
    for each in registry.deployments():
        monkeypatch.setattr(each, "outline", never)
    ended = run("plan", "bert-base", *GIVEN, *arguments)
    assert ended.code == 1
    assert said in ended.err


def test_networks_between_machines() -> None:
    assert find_apart("lan") is NETWORKS[0]
    with pytest.raises(InvalidInput, match="unknown network 'moon'"):
        find_apart("moon")
