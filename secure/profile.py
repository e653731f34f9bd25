"""The cost of a Program before anything runs: its own protocol generators on torch's ``meta`` device, with no data.

What is counted is what the generators really exchange and draw, so it equals a live query's traffic byte for byte
(tests compare them). ``Network`` turns rounds and bytes into seconds of waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from protocols.circuit import Instruction, MetaWeights
from protocols.protocol import CLIENT, PARTY_NAMES, SERVER, Cost, Exchange
from secure.program import Program


@dataclass(frozen=True)
class Network:
    """Round-trip time and bandwidth between the parties; each direction has the bandwidth for itself."""

    name: str
    round_trip: float  # seconds
    bandwidth: float  # bytes a second

    def seconds(self, cost: Cost) -> float:
        """Online waiting: half a round trip a round, as both parties send at once, and the larger direction's bytes."""
        return cost.rounds * self.round_trip / 2 + max(cost.to_server, cost.to_client) / self.bandwidth


NETWORKS = (
    Network("LAN, 5 Gbps, 1 ms", 1e-3, 5e9 / 8),
    Network("WAN, 400 Mbps, 10 ms", 10e-3, 400e6 / 8),
    Network("WAN, 100 Mbps, 80 ms", 80e-3, 100e6 / 8),
)


@dataclass(frozen=True)
class Line:
    """What one instruction takes. ``rounds`` are its own; merged with others' in the total."""

    path: str
    kind: str
    cost: Cost
    products: int  # ring multiply-accumulates of both parties, in matrix products and linear layers
    comparisons: int


@dataclass(frozen=True)
class Profile:
    """``total.rounds`` are those of the merged schedule; every other figure is the sum over ``lines``."""

    lines: tuple[Line, ...]
    total: Cost

    def by(self, key: Callable[[Line], str]) -> dict[str, tuple[Cost, int, int]]:
        """(summed cost, products, comparisons) by any property of a line, e.g. its kind or a prefix of its path."""
        out: dict[str, tuple[Cost, int, int]] = {}
        for line in self.lines:
            cost, products, comparisons = out.get(key(line), (Cost(), 0, 0))
            out[key(line)] = (cost + line.cost, products + line.products, comparisons + line.comparisons)
        return out

    @property
    def products(self) -> int:
        return sum(line.products for line in self.lines)

    @property
    def comparisons(self) -> int:
        return sum(line.comparisons for line in self.lines)


def profile(program: Program) -> Profile:
    """Run both parties of every instruction on ``meta`` tensors and count."""
    weights = MetaWeights(program.weight_shapes)
    values: list[tuple[Any, Any]] = []
    finished: list[int] = []
    lines = []
    for instruction, path in zip(program.circuit, program.paths, strict=True):
        results, cost = _run(instruction, values, weights)
        values.append(results)
        finished.append(max((finished[i] for i in instruction.inputs), default=0) + cost.rounds)
        lines.append(Line(path, instruction.protocol.kind, cost, *_arithmetic(instruction, program)))
    summed = sum((line.cost for line in lines), Cost())
    rounds = max(finished, default=0)
    return Profile(tuple(lines), Cost(rounds, summed.to_server, summed.to_client, summed.offline_to_server))


def _run(instruction: Instruction, values: list[tuple[Any, Any]], weights: MetaWeights) -> tuple[tuple[Any, Any], Cost]:
    """Both parties' results, and what they exchanged and drew."""
    protocol = instruction.protocol
    material = {d.name: torch.empty(d.shape, dtype=d.wire.dtype, device="meta") for d in protocol.draws}
    offline = sum(d.wire.size for d in protocol.draws if d.derived)
    if protocol.kind in ("input", "add_weight"):  # they read what is not in the circuit, and exchange nothing
        shares = torch.empty(protocol.out.shape, dtype=torch.int64, device="meta")
        return (shares, shares), Cost()
    steps = [
        protocol.run(party, material, tuple(values[i][party] for i in instruction.inputs), weights)
        for party in (SERVER, CLIENT)
    ]
    rounds, sent, results = 0, [0, 0], [None, None]
    answers: list[Any] = [None, None]
    while True:
        exchanges: list[Exchange | None] = [None, None]
        for party, step in enumerate(steps):
            try:
                exchanges[party] = step.send(answers[party])
            except StopIteration as stop:
                results[party] = stop.value
        if None in exchanges:
            if exchanges != [None, None]:
                raise AssertionError(f"{protocol.kind}: only the {PARTY_NAMES[exchanges[0] is None]} goes on")
            return (results[0], results[1]), Cost(rounds, sent[CLIENT], sent[SERVER], offline)
        rounds += 1
        for party, exchange in enumerate(exchanges):
            assert exchange is not None
            sent[party] += sum(wire.size for _, wire in exchange.send)
            answers[party] = tuple(torch.empty(w.shape, dtype=w.dtype, device="meta") for w in exchange.receive)


def _arithmetic(instruction: Instruction, program: Program) -> tuple[int, int]:
    """(multiply-accumulates, comparisons) of one instruction."""
    p: Any = instruction.protocol
    elements = torch.Size(p.out.shape).numel()
    if p.kind == "linear" and not p.diagonal:
        return elements * program.weight_shapes[p.weight][0], 0
    if p.kind == "product" and p.matrix:
        inner = program.circuit[instruction.inputs[0]].protocol.out.shape[-1]
        return 4 * elements * inner, 0  # two products a party
    if p.kind == "compare":
        return 0, torch.Size(p.shape).numel() * len(p.thresholds)
    return 0, 0


def module(path: str, depth: int) -> str:
    """The first ``depth`` parts of a module path, numbers counted with what they index ("layer.0" is one part)."""
    parts: list[str] = []
    for part in path.split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return ".".join(parts[:depth]) or "(model)"


def total_seconds(networks: Iterable[Network], cost: Cost) -> dict[str, float]:
    return {n.name: n.seconds(cost) for n in networks}
