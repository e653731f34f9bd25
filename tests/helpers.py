"""What the tests share: small circuits dealt and run in one process, exact integers, functions under the protocol."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols import ring
from protocols.circuit import Correlations, deal, execute, prepare, reference
from protocols.fixedpoint import FixedPoint
from protocols.flow import Circuit, Instruction
from protocols.prg import Key
from protocols.protocol import CLIENT, SERVER, CircuitCost, Material, Opening, Shape, Step, Weights
from protocols.steps import PairTraffic, run_pair
from protocols.two_party import Input, Linear
from protocols.weights import ClientWeights, DealerWeights, ServerWeights
from protocols.wire import Wire
from secure.lowering.ranges import Ranges
from secure.lowering.trace import Trace, evaluate
from secure.mpc.arithmetic import split_weight_key
from secure.mpc.emit import emit
from secure.mpc.prices import DEFAULT, Prices

Integers = np.ndarray[Any, np.dtype[Any]]  # of Python integers


# inputs of a circuit whose sharing a test chooses; without a ``kind``, so that no Program can name them


@dataclass(frozen=True, eq=False)
class Shared(Input):
    """The integers ``name`` of the client's inputs, of which the server's share is ``mask``."""

    mask: Tensor

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.mask if party == SERVER else operands[0] - self.mask


@dataclass(frozen=True, eq=False)
class SharedBits(Shared):
    """The same for packed bits, shared by XOR."""

    gives: ClassVar[str] = "bits"

    @property
    def out(self) -> Wire:
        return Wire(self.shape, planes=True)

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.mask if party == SERVER else operands[0] ^ self.mask


def shared(name: str, shape: Shape, ring_bits: int, mask: Tensor) -> Shared:
    return Shared(shape=shape, ring=ring_bits, name=name, fraction=0, low=-1.0, high=1.0, mask=mask)


def shared_bits(name: str, shape: Shape, mask: Tensor) -> SharedBits:
    return SharedBits(shape=shape, ring=8, name=name, fraction=0, low=-1.0, high=1.0, mask=mask)


def words(rng: np.random.Generator, shape: Shape) -> Tensor:
    """Uniform 64-bit words."""
    return torch.from_numpy(rng.integers(-(2**63), 2**63, size=shape, dtype=np.int64))


def octets(rng: np.random.Generator, shape: Shape) -> Tensor:
    """Uniform bytes."""
    return torch.from_numpy(rng.integers(0, 256, size=shape, dtype=np.uint8))


# Python integers


def integers(x: Tensor, bits: int = ring.WORD, *, signed: bool = False) -> Integers:
    """The residues of a tensor as Python integers in [0, 2^bits), or in [-2^(bits-1), 2^(bits-1))."""
    out = x.numpy().astype(object) % (1 << bits)
    return centred(out, bits) if signed else out


def centred(x: Integers, bits: int) -> Integers:
    half = 1 << (bits - 1)
    return (x + half) % (1 << bits) - half


def tensor(x: Integers) -> Tensor:
    """Python integers modulo 2^64."""
    return torch.from_numpy(centred(np.asarray(x, dtype=object), ring.WORD).astype(np.int64))


# running circuits


@dataclass(frozen=True)
class Outcome:
    """Both parties' results, and what it took."""

    server: list[Any]
    client: list[Any]
    traffic: PairTraffic
    corrections: dict[int, memoryview]

    @property
    def cost(self) -> CircuitCost:
        offline = sum(map(len, self.corrections.values()))
        return dataclasses.replace(self.traffic.cost, dealt=offline)

    def value(self, position: int = 0) -> Tensor:
        """The secret behind one result, unreduced."""
        return combine(self.server[position], self.client[position])


def combine(server: Any, client: Any) -> Tensor:
    """What two parties' shares, bits or openings stand for."""
    if isinstance(server, Opening):
        assert torch.equal(server.value, client.value), "both parties know the opened value"
        mask = combine(server.mask, client.mask)
        return server.value ^ mask if mask.dtype == torch.uint8 else server.value - mask
    out: Tensor = server ^ client if server.dtype == torch.uint8 else server + client
    return out


def key() -> Key:
    return Key(secrets.token_bytes(16))


@dataclass(frozen=True)
class Dealt:
    """One query, dealt: what either party needs to take part."""

    circuit: Circuit
    outputs: Sequence[int]
    inputs: Mapping[str, Tensor]
    corrections: dict[int, memoryview]
    keys: tuple[Key, Key]
    server_weights: Weights
    client_weights: Weights

    def server(self) -> Step[list[Any]]:
        correlations = Correlations(SERVER, self.keys[SERVER], self.corrections)
        return execute(self.circuit, self.outputs, SERVER, correlations, self.server_weights)

    def client(self, *, prepared: bool = False) -> Step[list[Any]]:
        correlations = Correlations(CLIENT, self.keys[CLIENT])
        if prepared:
            prepare(self.circuit, correlations, self.client_weights)
        return execute(self.circuit, self.outputs, CLIENT, correlations, self.client_weights, self.inputs)


def deal_circuit(
    circuit: Circuit,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[int] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Dealt:
    """Fresh keys, a fresh mask of the weights, the dealer's corrections. ``outputs``: by default the last result."""
    weights = weights or {}
    rings: dict[str, int] = {}
    for instruction in circuit:
        p = instruction.protocol
        if isinstance(p, Linear):
            rings[p.weight] = max(p.ring, rings.get(p.weight, 0))
    dealer = DealerWeights(key(), {name: tuple(w.shape) for name, w in weights.items()})
    server = ServerWeights(weights)
    client = ClientWeights(dict(server.masked(dealer, rings)))
    keys = (key(), key())
    corrections = dict(deal(circuit, *keys, dealer))
    chosen = outputs if outputs is not None else [len(circuit) - 1]
    return Dealt(circuit, chosen, inputs, corrections, keys, server, client)


def run_circuit(
    circuit: Circuit,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[int] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    prepared: bool = False,
    views: bool = False,
) -> Outcome:
    """Deal a circuit and run both parties. ``views`` keeps every frame."""
    dealt = deal_circuit(circuit, inputs, outputs, weights)
    traffic = PairTraffic(frames_to_first=[], frames_to_second=[]) if views else PairTraffic()
    server, client = run_pair(dealt.server(), dealt.client(prepared=prepared), traffic)
    return Outcome(server, client, traffic, dealt.corrections)


# functions of real numbers


@dataclass(frozen=True)
class FunctionRun:
    """A function's value under the protocol, in plain fixed point, and in floating point (the approximation alone)."""

    result: Tensor
    fixed: Tensor
    floating: Tensor
    cost: CircuitCost
    circuit: Circuit


def run_function(
    function: Callable[..., Any],
    *inputs: Tensor,
    fixed_point: FixedPoint | None = None,
    weights: Mapping[str, Tensor] | None = None,
    calibration: Sequence[Sequence[Tensor]] = (),
    prices: Prices = DEFAULT,
) -> FunctionRun:
    """Trace a function of symbols, calibrate it, make a circuit of it, and run that on the inputs.

    ``calibration``: inputs that set the ranges, by default these themselves. The function's arguments are one symbol
    for each input; weights stand in it as ``WeightRef``.
    """
    fixed, weights = fixed_point or FixedPoint(), weights or {}
    names = [f"x{i}" for i in range(len(inputs))]
    trace = Trace()
    out = function(*(trace.input(name, tuple(x.shape)) for name, x in zip(names, inputs, strict=True)))
    samples = [dict(zip(names, (x.to(torch.float64) for x in s), strict=True)) for s in (calibration or (inputs,))]
    given = dict(zip(names, (x.to(torch.float64) for x in inputs), strict=True))
    real = {name: w.to(torch.float64) for name, w in weights.items()}
    ranges = Ranges.calibrate(trace, samples, real, fixed.margin_bits)
    emitted = emit(trace, ranges, fixed, [out.id], dict.fromkeys(names, (-1000000000.0, 1000000000.0)), prices)
    ((last, fraction),) = emitted.outputs
    assert last == len(emitted.circuit) - 1
    bits = emitted.circuit[last].protocol.out.bits
    used = [use.name for i in emitted.circuit if (use := i.protocol.weight_use)]
    held = {key: ring.encode(real[name], f) for key in used for name, f in [split_weight_key(key)]}
    encoders = {i.protocol.name: i.protocol for i in emitted.circuit if isinstance(i.protocol, Input)}
    encoded = {name: encoders[name].encode(given[name]) for name in names if name in encoders}
    circuit = randomize(emitted.circuit)
    outcome = run_circuit(circuit, encoded, weights=held, prepared=True)
    (plain,) = reference(circuit, [len(circuit) - 1], ServerWeights(held), encoded)
    return FunctionRun(
        ring.decode(outcome.client[0], bits, fraction),
        ring.decode(plain, bits, fraction),
        evaluate(trace, given, real, outputs=[out.id])[0],
        outcome.cost,
        circuit,
    )


def randomize(circuit: Circuit) -> list[Instruction]:
    """The same circuit with uniformly shared inputs instead of (0, x)."""
    rng = np.random.default_rng(secrets.randbits(64))
    out = []
    for instruction in circuit:
        p = instruction.protocol
        if type(p) is Input:
            instruction = Instruction(shared(p.name, p.shape, p.ring, words(rng, p.shape)), instruction.inputs)
        out.append(instruction)
    return out
