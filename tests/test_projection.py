"""Projected times: made-up timings give times that can be worked out by hand, real ones those of a machine."""

import pytest
import torch
from torch import nn

import secure
from protocols.protocol import CLIENT, PARTY_NAMES, SERVER
from secure.profile import NETWORKS, Network, Profile, find_network, profile
from secure.projection import Transport, project
from secure.timeline import Timeline
from secure.timing import Segment, Timings, measure


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
    return secure.compile(Model().eval(), samples[0], calibration=samples[1:]).program


@pytest.fixture(scope="module")
def found(program: secure.Program) -> Profile:
    return profile(program)


def made_up(found: Profile, compute: float) -> Timings:
    rows = tuple(tuple(Segment(compute) for _ in range(line.cost.rounds + 1)) for line in found.lines)
    return Timings((rows, rows))


def test_without_computation_a_query_takes_the_networks_time(found: Profile) -> None:
    """Both send at once, so a round takes one way, and so does the message that begins the query."""
    network = Network("test", "test", 0.2, 1e12)
    projection = project(found, made_up(found, 0.0), Transport(0.0, 0.0), network)
    assert projection.seconds == pytest.approx(0.1 * found.total.rounds, rel=0.25)
    assert projection.client.total.compute == 0


def test_bandwidth_is_paid_for_every_byte(found: Profile) -> None:
    slow = project(found, made_up(found, 0.0), Transport(0.0, 0.0), Network("test", "test", 0.0, 1000.0))
    heavier = max(found.total.to_server, found.total.to_client)
    assert heavier / 1000 <= slow.seconds <= (found.total.to_server + found.total.to_client) / 1000 + 1e-9


def test_computation_without_a_network_is_the_slower_partys(found: Profile) -> None:
    projection = project(found, made_up(found, 1.0), Transport(0.0, 0.0))
    work = [sum(len(stage.work) for stage in found.schedules[party]) for party in (SERVER, CLIENT)]
    assert max(work) - 1 <= projection.server.seconds <= sum(work)
    assert projection.client.total.compute == work[CLIENT]


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
    assert server.correlations == found.total.offline_to_server
    assert sum(found.correlations.values()) == found.total.offline_to_server


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
