"""Predicting how long a query takes on a network, from both parties' schedules and timed kernels.

Each party has a clock. It computes, packs, sends, waits for the peer's message of the same round, unpacks, and goes on.
A message of n bytes that leaves at time t, or when the message before it has passed, arrives latency + n / bandwidth
later. The result has the form of a measured ``Timeline``.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocols.protocol import CLIENT, PARTY_NAMES, SERVER
from secure.cost.count import Profile, Stage
from secure.cost.kernel_times import Segment, Timings
from secure.cost.timeline import Round, Timeline, Work
from secure.mpc.network import NetworkSpeed


@dataclass(frozen=True)
class Transport:
    """The cost of messages between two processes on one machine, in seconds per message and per byte.

    round_work, byte_work: processor seconds that each of the two spends on the message that it sends and the one that
    it gets in a round, whatever their sizes, and on each byte of both. send_work, get_work: processor seconds on a byte
    of a long stream, of its sender, and of its receiver, who keeps it.
    """

    message: float
    byte: float
    round_work: float = 0.0
    byte_work: float = 0.0
    send_work: float = 0.0
    get_work: float = 0.0

    def work(self, rounds: int, size: int) -> float:
        """Return one side's processor seconds of so many rounds, in which it sends and gets ``size`` bytes."""
        return rounds * self.round_work + size * self.byte_work

    def latency(self, network: NetworkSpeed | None) -> float:
        """Return the seconds from handing over an empty payload to its arrival at the other side."""
        return self.message + (network.round_trip / 2 if network else 0.0)

    def passing(self, size: int, network: NetworkSpeed | None) -> float:
        """Return the seconds for which a payload of ``size`` bytes keeps its direction of the link busy."""
        slower = max(self.byte, 1 / network.bandwidth) if network else self.byte  # both overlap: it leaves in parts
        return size * slower


@dataclass(frozen=True)
class Projection:
    """A predicted query: timelines of the server and the client, from the client's first step to its last."""

    server: Timeline
    client: Timeline

    @property
    def seconds(self) -> float:
        return self.client.seconds


def project(
    profile: Profile, timings: Timings, transport: Transport, network: NetworkSpeed | None = None
) -> Projection:
    """Predict one query. Without a ``network`` both parties are on this machine."""
    clocks = [_Clock(party, timings) for party in (SERVER, CLIENT)]
    free = [0.0, 0.0]  # the time at which each party's direction of the link is free again
    latency = transport.latency(network)
    clocks[SERVER].now = latency  # the client's message that begins the query
    for stages in zip(*profile.schedules, strict=True):
        left = [clock.send(stage) for clock, stage in zip(clocks, stages, strict=True)]
        for party, stage in enumerate(stages):
            peer, arrival = 1 - party, 0.0
            if size := sum(part.sent for part in stages[peer].parts):
                free[peer] = max(free[peer], left[peer]) + transport.passing(size, network)
                arrival = free[peer] + latency
            clocks[party].receive(stage, arrival)
    server, client = (clock.end() for clock in clocks)
    return Projection(server, client)


class _Clock:
    """One party's clock, and the timeline that it writes."""

    def __init__(self, party: int, timings: Timings) -> None:
        self.now = 0.0
        self._segments = timings.segments[party]
        self._passed = [0] * len(self._segments)
        self._timeline = Timeline(PARTY_NAMES[party])
        self._began = self._sent_at = 0.0

    def send(self, stage: Stage) -> float:
        """Compute and pack; return the moment when the message leaves."""
        for index in stage.work:
            seconds = self._segments[index][self._passed[index]].compute
            self._timeline.work.append(Work(index, self.now, seconds))
            self._passed[index] += 1
            self.now += seconds
        self._began = self.now
        self.now += sum(self._at(part.index).pack for part in stage.parts)
        self._sent_at = self.now
        return self.now

    def _at(self, index: int) -> Segment:
        return self._segments[index][self._passed[index] - 1]

    def receive(self, stage: Stage, arrival: float) -> None:
        if not stage.parts:
            return
        received_at = max(self.now, arrival)
        self.now = received_at + sum(self._at(part.index).unpack for part in stage.parts)
        sent, received = sum(p.sent for p in stage.parts), sum(p.received for p in stage.parts)
        moments = (self._began, self._sent_at, received_at, self.now)
        self._timeline.rounds.append(Round(stage.parts, *moments, sent, received))

    def end(self) -> Timeline:
        self._timeline.stop = self.now
        return self._timeline
