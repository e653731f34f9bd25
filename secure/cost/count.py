"""Counting a Program's cost before anything runs, by its own protocol generators on torch's ``meta`` device.

No data is needed. The generators' real exchanges and draws are counted, so that the result equals a live query's
traffic byte for byte (tests compare them). ``NetworkSpeed`` turns rounds and bytes into seconds of waiting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protocols.circuit import Circuit, Correlations, MetaWeights, Observer, Part, execute
from protocols.protocol import CLIENT, PARTY_NAMES, SERVER, CircuitCost, Exchange, Protocol
from protocols.steps import Done, advance
from secure.cost.runnable import Runnable
from secure.errors import InvalidInput


@dataclass(frozen=True)
class NetworkSpeed:
    """The round-trip time and bandwidth of a network between the parties. Each direction has the full bandwidth."""

    key: str
    name: str
    round_trip: float  # seconds
    bandwidth: float  # bytes a second

    def seconds(self, cost: CircuitCost) -> float:
        """Return the seconds of waiting online: half a round trip per round, plus the larger direction's bytes.

        A round takes half a round trip because both parties send at once.
        """
        return cost.rounds * self.round_trip / 2 + max(cost.to_first, cost.to_second) / self.bandwidth


NETWORKS = (
    NetworkSpeed("lan", "LAN, 5 Gbps, 1 ms", 1e-3, 5e9 / 8),
    NetworkSpeed("wan", "WAN, 400 Mbps, 10 ms", 10e-3, 400e6 / 8),
    NetworkSpeed("slow-wan", "WAN, 100 Mbps, 80 ms", 80e-3, 100e6 / 8),
)
LOOPBACK = "loopback"


def find_network(text: str) -> NetworkSpeed | None:
    """Find a network by its short name, or make one from "MBPS,ROUND_TRIP_MS" ("250,20"); None stands for loopback.

    Raises InvalidInput.
    """
    if text == LOOPBACK:
        return None
    for network in NETWORKS:
        if text in (network.key, network.name):
            return network
    numbers = re.fullmatch(r"\s*([0-9.]+)\s*,\s*([0-9.]+)\s*", text)
    try:
        mbps, milliseconds = map(float, numbers.groups()) if numbers else (0.0, 0.0)
    except ValueError:  # two points in a number
        mbps = 0.0
    if mbps <= 0:
        known = ", ".join([LOOPBACK, *(n.key for n in NETWORKS)])
        raise InvalidInput(f"unknown network {text!r}", f"one of {known}, or MBPS,ROUND_TRIP_MS such as 250,20")
    return NetworkSpeed(text, f"{mbps:g} Mbps, {milliseconds:g} ms", milliseconds / 1e3, mbps * 1e6 / 8)


@dataclass(frozen=True)
class Line:
    """The cost of one instruction. Its rounds are its own; in the total they are merged with those of others."""

    path: str
    kind: str
    cost: CircuitCost
    products: int  # ring multiply-accumulates of both parties, in matrix products and linear layers
    comparisons: int


@dataclass(frozen=True)
class Memory:
    """The bytes of memory that a query needs of one party beside the weights.

    live: the most that results take at once between two steps, at 8 bytes per ring element; results that are views of
    others are counted in full. correlations: bytes held ready before the query. Memory that a step needs while it runs
    is not counted.
    """

    live: int
    correlations: int


@dataclass(frozen=True)
class Stage:
    """The instructions that a party computes, in order, before it must exchange, and the parts that it exchanges."""

    work: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Profile:
    """The cost of a query by instruction and in total.

    ``total.rounds`` are those of the merged schedule; every other figure is the sum over ``lines``. ``schedules`` and
    ``memory`` are those of the server (the first party) and of the client (the second).
    """

    lines: tuple[Line, ...]
    total: CircuitCost
    schedules: tuple[tuple[Stage, ...], tuple[Stage, ...]]
    memory: tuple[Memory, Memory]

    def by(self, key: Callable[[Line], str]) -> dict[str, tuple[CircuitCost, int, int]]:
        """Sum (cost, products, comparisons) by any property of a line, such as its kind or a prefix of its path."""
        out: dict[str, tuple[CircuitCost, int, int]] = {}
        for line in self.lines:
            cost, products, comparisons = out.get(key(line), (CircuitCost(), 0, 0))
            out[key(line)] = (cost + line.cost, products + line.products, comparisons + line.comparisons)
        return out

    @property
    def products(self) -> int:
        return sum(line.products for line in self.lines)

    @property
    def comparisons(self) -> int:
        return sum(line.comparisons for line in self.lines)

    @property
    def correlations(self) -> dict[str, int]:
        """The bytes of corrections by the kind of protocol that uses them."""
        found = {kind: cost.dealt for kind, (cost, _, _) in self.by(lambda line: line.kind).items()}
        return {kind: size for kind, size in found.items() if size}


def profile(program: Runnable) -> Profile:
    """Count rounds, bytes and memory of one query by running both computing parties on ``meta`` tensors in lockstep.

    program: a Program between client and server, or its circuit as another deployment runs it (``Deployed``).
    """
    weights, circuit = MetaWeights(program.weight_shapes), program.circuit
    parties = [_Counter(circuit, program.revealed), _Counter(circuit, program.revealed)]
    steps = [
        execute(circuit, program.revealed, party, _NoData(circuit, party), weights, observer=parties[party])
        for party in (SERVER, CLIENT)
    ]
    going = [advance(step) for step in steps]
    while (waiting := [e for e in going if isinstance(e, Exchange)]) and len(waiting) == len(steps):
        answers = (tuple(torch.empty(w.shape, dtype=w.dtype, device="meta") for w in e.receive) for e in waiting)
        going = [advance(step, answer) for step, answer in zip(steps, answers, strict=True)]
    if waiting:
        raise AssertionError(f"only the {PARTY_NAMES[isinstance(going[0], Done)]} goes on")
    for party in parties:
        party.end()
    lines = []
    for index, (instruction, path) in enumerate(zip(circuit, program.paths, strict=True)):
        up, down = parties[CLIENT].sent_bytes[index], parties[SERVER].sent_bytes[index]
        p, operands = instruction.protocol, [circuit[i].protocol.out.shape for i in instruction.inputs]
        cost = CircuitCost(parties[CLIENT].rounds[index], up, down, p.dealt_bytes, p.cost().brought)
        lines.append(Line(path, p.kind, cost, p.products(program.weight_shapes, operands), p.comparisons()))
    summed = sum((line.cost for line in lines), CircuitCost())
    total = replace(summed, rounds=len(parties[SERVER].stages) - 1)
    prepared = sum(i.protocol.memory() for i in circuit if i.protocol.works_offline)
    server, client = parties
    memory = (Memory(server.most, total.dealt), Memory(client.most, prepared))
    return Profile(tuple(lines), total, (tuple(server.stages), tuple(client.stages)), memory)


class _NoData(Correlations):
    """Correlations of the right shapes, on ``meta``. The client's offline results are ready, as after ``prepare``."""

    def __init__(self, circuit: Circuit, party: int) -> None:
        self._circuit, self._client = circuit, party == CLIENT

    def is_finished(self, index: int) -> bool:
        protocol = self._circuit[index].protocol
        return protocol.input_of(CLIENT) is not None or (self._client and protocol.finished_offline)

    def finished(self, index: int) -> Tensor:
        return torch.empty(self._circuit[index].protocol.out.shape, dtype=torch.int64, device="meta")

    def take(self, index: int, protocol: Protocol) -> dict[str, Tensor]:
        return {d.name: torch.empty(d.shape, dtype=d.wire.dtype, device="meta") for d in protocol.draws}


class _Counter(Observer):
    """One party's schedule, and the largest set of results that it holds at a time."""

    def __init__(self, circuit: Circuit, outputs: Sequence[int]) -> None:
        self.rounds, self.sent_bytes = [0] * len(circuit), [0] * len(circuit)
        self.stages: list[Stage] = []
        self.most = 0
        self._circuit, self._work = circuit, list[int]()
        self._held, self._uses = 0, [0] * len(circuit)
        for instruction in circuit:
            for i in instruction.inputs:
                self._uses[i] += 1
        for i in outputs:
            self._uses[i] += 1

    def computing(self, index: int) -> None:
        self._work.append(index)

    def exchanging(self, parts: Sequence[Part]) -> None:
        self.stages.append(Stage(tuple(self._work), tuple(parts)))
        self._work = []
        for part in parts:
            self.rounds[part.index] += 1
            self.sent_bytes[part.index] += part.sent

    def finished(self, index: int) -> None:
        if self._uses[index]:
            self._held += self._circuit[index].protocol.memory()
        self.most = max(self.most, self._held)
        for i in self._circuit[index].inputs:
            self._uses[i] -= 1
            if not self._uses[i]:
                self._held -= self._circuit[i].protocol.memory()

    def end(self) -> None:
        """Add the work after the last exchange as the last stage."""
        self.stages.append(Stage(tuple(self._work), ()))


def module(path: str, depth: int) -> str:
    """Return the first ``depth`` parts of a module path; a number belongs to the part before it ("layer.0" is one)."""
    parts: list[str] = []
    for part in path.split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return ".".join(parts[:depth]) or "(model)"


def total_seconds(networks: Iterable[NetworkSpeed], cost: CircuitCost) -> dict[str, float]:
    return {n.name: n.seconds(cost) for n in networks}
