"""Counting a Program's cost before anything runs, by its own protocol generators on torch's ``meta`` device.

No data is needed. The generators' real exchanges and draws are counted, so that the result equals a live query's
traffic byte for byte (tests compare them). ``NetworkSpeed`` turns rounds and bytes into seconds of waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from protocols.circuit import Correlations, MetaWeights, Observer, Part, execute
from protocols.flow import Circuit
from protocols.protocol import CLIENT, PARTY_NAMES, SERVER, CircuitCost, Exchange, Opening, Protocol
from protocols.steps import Done, advance
from secure.cost.runnable import Runnable
from secure.mpc.network import NetworkSpeed


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

    def finished(self, index: int) -> Any:
        p = self._circuit[index].protocol
        value = torch.empty(p.out.shape, dtype=torch.int64, device="meta")
        return Opening(value, value) if p.gives == "opening" else value

    def foresee(self, circuit: Circuit, *, offline: bool) -> None:
        pass

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
