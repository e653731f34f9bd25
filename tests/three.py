"""Circuits of tests under three parties: translated, dealt by party 2 and run by parties 0 and 1 in one process.

A test's inputs ``Shared`` and ``SharedBits`` keep the sharing that the test chose: party 0 holds ``mask``, party 1 the
rest. Any circuit serves, whatever its last result is: only a Program's must be revealed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import ring
from protocols.circuit import Correlations, deal, execute, prepare
from protocols.flow import Circuit, Instruction
from protocols.prg import Key
from protocols.protocol import CircuitCost, Protocol, Shape, Step, Weights
from protocols.steps import PairTraffic, run_pair
from protocols.three_party import SharedInput, Translated, translate
from protocols.three_party.endpoints import seeded_share
from protocols.three_party.sharing import PARTIES, PARTY_2
from protocols.three_party.weights import Party2Weights, PublicWeights, SharedWeights, masked
from protocols.two_party import Input, Reveal
from protocols.wire import Wire
from tests.helpers import Outcome, Shared, SharedBits, key

Received = list[tuple[Tensor, Wire]]


@dataclass(frozen=True)
class SharedBitsInput(SharedInput):
    """This party's share of packed bits. Without a ``kind``, as in ``helpers``."""

    gives: ClassVar[str] = "bits"

    @property
    def out(self) -> Wire:
        return Wire(self.shape, planes=True)


def translated(circuit: Circuit, *, public: bool = False) -> Translated:
    """The same circuit for three parties. Its result is that of the last instruction; of a Reveal, what it reads.

    Clients are trusted: the inputs of tests go beyond their clamps.
    """
    last = circuit[-1].protocol
    if isinstance(last, Reveal):
        made = translate(circuit, [len(circuit) - 1], public=public, trusted_clients=True)
    else:
        revealed = Instruction(Reveal(last.out.shape, last.out.bits), (len(circuit) - 1,))
        made = translate([*circuit, revealed], [len(circuit)], public=public, trusted_clients=True)
    new = [
        replace(i, protocol=SharedBitsInput(p.shape, p.ring, p.name))
        if isinstance(p := circuit[origin].protocol, SharedBits)
        else i
        for i, origin in zip(made.circuit, made.origin, strict=True)
    ]
    return replace(made, circuit=tuple(new))


def cost_of(circuit: Translated, index: int) -> CircuitCost:
    """What a Program's instruction costs among three parties."""
    parts = [i.protocol.cost() for i, origin in zip(circuit.circuit, circuit.origin, strict=True) if origin == index]
    return sum(parts, CircuitCost())


def held_weights(
    weights: Mapping[str, Tensor], rings: Mapping[str, int], *, public: bool = False
) -> tuple[Weights, Weights, Weights]:
    """What parties 0, 1 and 2 hold of a model's weights, under fresh seeds."""
    if public:
        zero, one, two = (PublicWeights(party, weights) for party in range(PARTIES))
        return zero, one, two
    zero_key, two_key = key(), key()
    common = dict(masked(weights, zero_key, two_key, rings))
    shapes: dict[str, Shape] = {name: tuple(w.shape) for name, w in common.items()}
    seeded = Party2Weights(zero_key, two_key, shapes)
    return SharedWeights(0, zero_key, common), SharedWeights(1, two_key, common), seeded


def shared_inputs(
    protocols: Mapping[str, Protocol], inputs: Mapping[str, Tensor], made: Translated
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the client sends to parties 0 and 1. ``protocols``: the inputs as the circuit has them for two parties."""
    split = key()
    shares: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, (index, p) in made.inputs.items():
        original, x = protocols[name], inputs[name]
        mask = original.mask if isinstance(original, Shared) else seeded_share(split, index, p.shape)
        rest = x ^ mask if isinstance(original, SharedBits) else x - mask
        # a test's own sharing names the share of party 0, a client's seed gives that of party 1
        shares[0][name], shares[1][name] = (mask, rest) if isinstance(original, Shared) else (rest, mask)
    return shares


@dataclass(frozen=True)
class Query:
    """One query, shared and dealt: what parties 0 and 1 need for it."""

    translated: Translated
    corrections: dict[int, memoryview]
    keys: tuple[Key, Key]
    weights: tuple[Weights, Weights, Weights]
    shares: tuple[dict[str, Tensor], dict[str, Tensor]]

    def party(self, party: int, *, prepared: bool = False) -> Step[list[Any]]:
        circuit, own = self.translated.circuit, self.weights[party]
        correlations = Correlations(party, self.keys[party], None if party else self.corrections)
        if prepared:
            prepare(circuit, correlations, own)
        return execute(circuit, self.translated.outputs, party, correlations, own, self.shares[party])


def query(
    circuit: Circuit,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    *,
    public: bool = False,
    made: Translated | None = None,
) -> Query:
    """Fresh keys and seeds; party 2 deals. ``made``: another translation of the circuit."""
    made = made or translated(circuit, public=public)
    held = held_weights(weights or {}, made.weight_rings, public=public)
    keys = (key(), key())
    protocols = {i.protocol.name: i.protocol for i in circuit if isinstance(i.protocol, Input)}
    dealt = dict(deal(made.circuit, *keys, held[PARTY_2]))
    return Query(made, dealt, keys, held, shared_inputs(protocols, inputs, made))


def run_three(
    circuit: Circuit,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    *,
    public: bool = False,
    prepared: bool = False,
    views: bool = False,
    made: Translated | None = None,
) -> Outcome:
    """Deal a circuit and run parties 0 and 1 ("server" and "client"); after a Reveal the client has its result."""
    asked = query(circuit, inputs, weights, public=public, made=made)
    traffic = PairTraffic(frames_to_first=[], frames_to_second=[]) if views else PairTraffic()
    zero, one = run_pair(asked.party(0), asked.party(1, prepared=prepared), traffic)
    last = circuit[-1].protocol
    if isinstance(last, Reveal):
        zero, one = [None], [ring.reduce(zero[0] + one[0], last.ring)]
    return Outcome(zero, one, traffic, asked.corrections)


def watched(step: Step[Any], received: Received) -> Step[Any]:
    """The same step, which notes everything that its party receives."""
    try:
        exchange = next(step)
        while True:
            answer = yield exchange
            received.extend(zip(answer, exchange.receive, strict=True))
            exchange = step.send(answer)
    except StopIteration as stop:
        return stop.value


def pooled(received: Iterable[tuple[Tensor, Wire]]) -> dict[int, Tensor]:
    """Everything of one width, flat."""
    parts: dict[int, list[Tensor]] = {}
    for x, wire in received:
        parts.setdefault(8 if wire.planes else wire.bits, []).append(x.reshape(-1).to(torch.int64))
    return {bits: torch.cat(found) for bits, found in parts.items()}
