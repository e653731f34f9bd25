"""Projected times: made-up timings give times that can be worked out by hand, real ones those of a machine."""

import pytest
import torch
from torch import nn

import secure
from protocols.circuit import Part
from protocols.protocol import CLIENT, PARTY_NAMES, SERVER, CircuitCost
from secure.cost import kernel_times as timing
from secure.cost.count import Memory, Profile, Stage, profile
from secure.cost.kernel_times import Segment, Timings, measure
from secure.cost.projection import Transport, project
from secure.cost.timeline import Timeline
from secure.mpc.network import NETWORKS, NetworkSpeed, find_network


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.up(x))


@pytest.fixture(scope="module")
def program() -> secure.Program:
    samples = [{"x": torch.randn(1, 4, 8)} for _ in range(5)]
    program: secure.Program = secure.compile(Model().eval(), samples[0], calibration=samples[1:]).program
    return program


@pytest.fixture(scope="module")
def found(program: secure.Program) -> Profile:
    return profile(program)


def made_up(found: Profile, compute: float) -> Timings:
    rows = tuple(tuple(Segment(compute) for _ in range(line.cost.rounds + 1)) for line in found.lines)
    return Timings((rows, rows))


def by_hand(*exchanges: tuple[int, int]) -> Profile:
    """One instruction a stage; ``exchanges``: bytes to the server and to the client."""

    def stages(mine: int) -> tuple[Stage, ...]:
        swaps = (Stage((i,), (Part(i, e[mine], e[1 - mine]),)) for i, e in enumerate(exchanges))
        return (*swaps, Stage((len(exchanges),), ()))

    return Profile((), CircuitCost(), (stages(1), stages(0)), (Memory(0, 0), Memory(0, 0)))


def equal(stages: int, server: float, client: float) -> Timings:
    """The same seconds for every stage of a party."""
    return Timings(tuple(((Segment(each),),) * stages for each in (server, client)))  # type: ignore[arg-type]


def test_both_send_at_once_so_a_round_takes_one_way() -> None:
    network = NetworkSpeed("test", "test", 0.2, 1e9)
    projection = project(by_hand((8, 8), (8, 8)), equal(3, 0, 0), Transport(0.001, 0.0), network)
    # The query's first message and the client's first round are at the server after one way. Its answers to the first
    # round and to the second, which needs nothing newer, are back after two. The client's second arrives after three.
    assert projection.seconds == pytest.approx(2 * 0.101, abs=1e-7)
    assert projection.server.seconds == pytest.approx(3 * 0.101, abs=1e-7)
    assert projection.client.total.compute == 0


def test_a_message_waits_for_the_one_before_it_on_its_link() -> None:
    network = NetworkSpeed("test", "test", 0.0, 1000.0)
    projection = project(by_hand((500, 0), (500, 1), (0, 1)), equal(4, 0, 0), Transport(0.0, 0.0), network)
    # the client sends twice 500 bytes at once, half a second each; the server answers the second after a second
    assert [r.received_at for r in projection.server.rounds] == pytest.approx([0.5, 1.0, 1.0])
    assert projection.seconds == pytest.approx(1.0 + 0.001)


def test_each_direction_has_the_bandwidth_for_itself() -> None:
    network = NetworkSpeed("test", "test", 0.0, 1000.0)
    projection = project(by_hand((300, 700)), equal(2, 0, 0), Transport(0.0, 0.0), network)
    assert projection.client.seconds == pytest.approx(0.7)
    assert projection.server.seconds == pytest.approx(0.3)


def test_the_slower_party_sets_the_pace() -> None:
    projection = project(by_hand((8, 8), (8, 8)), equal(3, 3.0, 1.0), Transport(0.0, 0.0))
    # three stages; the client waits for the server's first two and then computes its own last
    assert projection.client.seconds == pytest.approx(3 + 3 + 1)
    assert projection.server.seconds == pytest.approx(9)
    assert projection.client.total.waiting == pytest.approx(4)


def test_projected_traffic_is_the_profiles(found: Profile) -> None:
    projection = project(found, made_up(found, 0.0), Transport(0.0, 0.0))
    for party, timeline in enumerate((projection.server, projection.client)):
        assert timeline.party == PARTY_NAMES[party]
        assert isinstance(timeline, Timeline)
        assert timeline.cost.astuple()[:3] == found.total.astuple()[:3]


def test_every_instruction_is_timed(program: secure.Program, found: Profile) -> None:
    timings = measure(program, repeats=1)
    for party in (SERVER, CLIENT):
        for index, stage_count in enumerate(_segments(found, party)):
            if stage_count:
                assert len(timings.segments[party][index]) == stage_count
    assert timings.compute(SERVER) > 0
    projection = project(found, timings, Transport(1e-4, 1e-9), NETWORKS[0])
    assert projection.seconds > found.total.rounds * NETWORKS[0].round_trip / 2


def test_what_repeats_is_run_a_few_times_and_stood_in_for_after_that(program: secure.Program) -> None:
    alike = ["the same"] * len(program.circuit)
    assert timing._chosen(program, alike, 3) == {0, 1, 2}
    linear = next(i for i, instruction in enumerate(program.circuit) if instruction.protocol.kind == "linear")
    only = [None] * linear + ["this"] + [None] * (len(program.circuit) - linear - 1)
    kept = timing._chosen(program, only, 3)  # with the delivery that it reads, as the client's share comes from there
    assert kept == {linear, *program.circuit[linear].inputs}
    server, client = timing._rehearse(program, kept, timing._MadeUp(program))
    assert set(server) == set(client) == kept
    assert server[linear][0].compute > 0
    assert client[linear] == (Segment(0.0),)  # the client had its share before the query


def _segments(found: Profile, party: int) -> list[int]:
    counts = [0] * len(found.lines)
    for stage in found.schedules[party]:
        for index in stage.work:
            counts[index] += 1
    return counts


def test_live_sets_are_at_least_the_largest_result(program: secure.Program, found: Profile) -> None:
    largest = max(8 * torch.Size(i.protocol.out.shape).numel() for i in program.circuit if not i.protocol.out.planes)
    server, client = found.memory
    assert server.live >= largest
    assert client.live >= largest
    assert server.correlations == found.total.dealt
    assert sum(found.correlations.values()) == found.total.dealt


def test_networks_by_name_and_by_numbers() -> None:
    assert find_network("loopback") is None
    assert find_network("wan") in NETWORKS
    given = find_network("250,20")
    assert given is not None
    assert (given.bandwidth, given.round_trip) == (250e6 / 8, 0.02)


@pytest.mark.parametrize("text", ["", "moon", "0,1", "1..2,3", "10", "-1,2"])
def test_unknown_networks_are_told_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match="loopback, lan, wan, slow-wan"):
        find_network(text)
