"""Measuring the time of each step of a Program on this machine: each party runs its side of a query, alone.

The party gets zeros in place of the messages of its peer and the dealer, so that no input, no weights and no peer are
needed. Instructions run in a query's order, so that the processor's caches hold what they would hold in a query. A
repeated layer runs ``OCCURRENCES`` times; after that zeros replace its results, so that neither the time of measuring
nor its memory grows with a model's depth. Meanwhile another process streams through memory, as the other party does in
a query on the same machine. Parties on separate machines compute up to a third faster than measured here.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from protocols.circuit import Correlations, execute, prepare
from protocols.errors import ClientDeviates
from protocols.flow import Circuit, Instruction
from protocols.matmul import Matrix
from protocols.narrow import narrowed
from protocols.prg import KEY_BYTES, Key, fresh_seed
from protocols.protocol import (
    CLIENT,
    PARTY_NAMES,
    SERVER,
    CircuitCost,
    Draw,
    Local,
    Material,
    Opening,
    Protocol,
    Step,
    Weights,
)
from protocols.steps import Framed
from protocols.weights import ServerWeights
from protocols.wire import Wire
from secure.cost.runnable import Runnable
from secure.cost.timeline import Recorder, Timeline

REPEATS, ENOUGH = 3, 10.0  # runs of each party, and the seconds after which no further run begins
OCCURRENCES = 3  # of the same instruction in a run
_ALL = 48 << 20  # bytes that are too many for the processor's caches
_STREAM = 2 << 20  # eight-byte words that the neighbour reads, twice, and writes over and over
_SIGNED_BITS = 14  # of a made-up weight, as in real Programs


@dataclass(frozen=True)
class Segment:
    """Seconds that one instruction computes between two exchanges, and that it packs and unpacks in the second."""

    compute: float
    pack: float = 0.0
    unpack: float = 0.0


Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class Timings:
    """Measured times: ``segments[party][instruction]``. An instruction that exchanges n times has n + 1 segments."""

    segments: tuple[tuple[Segments, ...], tuple[Segments, ...]]

    def compute(self, party: int) -> float:
        """Sum the seconds that one party computes in one query."""
        return sum(s.compute for segments in self.segments[party] for s in segments)

    def wire(self, party: int) -> float:
        """Sum the seconds that one party packs and unpacks in one query."""
        return sum(s.pack + s.unpack for segments in self.segments[party] for s in segments)


_known: dict[Any, tuple[Segments, Segments]] = {}  # measured before in this process


def measure(program: Runnable, repeats: int = REPEATS) -> Timings:
    """Measure median times of every distinct instruction of a Program, with torch's current number of threads."""
    keys = [step_key(program, instruction) for instruction in program.circuit]
    new = [key if key not in _known else None for key in keys]
    if any(new):
        weights, began = _MadeUp(program), time.monotonic()
        runs: dict[Any, tuple[list[Segments], list[Segments]]] = {key: ([], []) for key in new if key}
        _rehearse(program, _chosen(program, new, 1), weights)  # loads, packs weights, gets memory
        chosen = _chosen(program, new, OCCURRENCES)
        with _neighbour():
            for number in range(repeats):
                if number and time.monotonic() - began > ENOUGH:
                    break
                for party, found in enumerate(_rehearse(program, chosen, weights)):
                    for index, segments in found.items():
                        if key := new[index]:
                            runs[key][party].append(segments)
        _known.update({key: (_median(server), _median(client)) for key, (server, client) in runs.items()})
    both = [_known[key] for key in keys]
    return Timings((tuple(server for server, _ in both), tuple(client for _, client in both)))


def step_key(program: Runnable, instruction: Instruction) -> Any:
    p: Any = instruction.protocol
    weight: Any = None
    if use := p.weight_use:  # weights of the same shape take the same time
        weight, p = program.weight_shapes.get(use.name), replace(p, **{p.weight_field: ""})
    forms = tuple((o.gives, o.out) for o in (program.circuit[i].protocol for i in instruction.inputs))
    return type(p), p, weight, forms, torch.get_num_threads()


def _chosen(program: Runnable, keys: Sequence[Any], occurrences: int) -> set[int]:
    """Choose the first ``occurrences`` instructions of every key that is not None.

    For instructions that the client runs offline, their operands that it computes offline are chosen too.
    """
    circuit, seen = program.circuit, Counter[Any]()
    out: set[int] = set()
    for index, key in enumerate(keys):
        if key is not None and seen[key] < occurrences:
            seen[key] += 1
            out.add(index)
            if circuit[index].protocol.works_offline:
                out |= {i for i in circuit[index].inputs if circuit[i].protocol.works_offline}
    return out


def _median(runs: Sequence[Segments]) -> Segments:
    def over(segments: tuple[Segment, ...]) -> Segment:
        return Segment(*map(statistics.median, zip(*map(astuple, segments), strict=True)))

    return tuple(over(segments) for segments in zip(*runs, strict=True))


# one party alone


@dataclass(frozen=True)
class _StandIn(Local):
    """A protocol that gives a result of the right form at no cost. It has no kind, so that no Program can name it."""

    of: Protocol

    @property
    def out(self) -> Wire:
        return self.of.out

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.of.stand_in()


class _MadeUp(ServerWeights):
    """Random weights of the right shapes, one for all weights of the same shape; weights that are added are zero."""

    def __init__(self, program: Runnable) -> None:
        self._held: dict[str, Tensor] = {}
        super().__init__(self._held)
        self._shapes = program.weight_shapes

    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        self._made(name)
        return super().multiply(x, str(self._shapes[name]), ring_bits, diagonal=diagonal)

    def _made(self, name: str) -> Tensor:
        shape, high = self._shapes[name], 1 << (_SIGNED_BITS - 1)
        if (alike := str(shape)) not in self._held:
            self._held[alike] = narrowed(torch.randint(-high, high, shape))
        return self._held[alike]

    def opened_product(self, value: Tensor, mask: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        if diagonal:
            return value * self._made(name) - mask * self._made(name)
        shape = self._shapes[name]
        if (alike := (f"twice {shape}", ring_bits)) not in self._packed:
            words = Key(fresh_seed()[:KEY_BYTES]).stream(0).words((2 * shape[0], *shape[1:]))
            self._packed[alike] = Matrix(words, ring_bits, signed=False)
        return self._packed[alike].times(torch.cat([value, -mask], dim=-1))

    def summand(self, name: str) -> Tensor:
        return torch.zeros(1, dtype=torch.int64)


@dataclass(frozen=True)
class _Unheeded(Protocol):
    """A check that is timed: zeros are not what it expects of its peer, so that its error is dropped."""

    of: Protocol

    @property
    def out(self) -> Wire:
        return self.of.out

    @property
    def draws(self) -> tuple[Draw, ...]:
        return self.of.draws

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        with suppress(ClientDeviates):
            return (yield from self.of.run(party, material, operands, weights))
        return self.of.stand_in()

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.of.clear(operands, weights)

    def cost(self) -> CircuitCost:
        return self.of.cost()


def _timed(instruction: Instruction) -> Instruction:
    p = instruction.protocol
    return Instruction(_Unheeded(p), instruction.inputs) if p.checks else instruction


def _rehearse(
    program: Runnable, chosen: Collection[int], weights: Weights
) -> tuple[dict[int, Segments], dict[int, Segments]]:
    """Run both parties, one after the other, and return the times of the chosen instructions."""
    circuit = [
        _timed(instruction) if index in chosen else Instruction(_StandIn(instruction.protocol), instruction.inputs)
        for index, instruction in enumerate(program.circuit)
    ]
    inputs = {name: _zero_input(i.protocol) for i in circuit if (name := i.protocol.input_of(CLIENT)) is not None}
    timelines = (_run(party, circuit, program.revealed, weights, inputs) for party in (SERVER, CLIENT))
    server, client = (_segments(timeline, chosen) for timeline in timelines)
    return server, client


def _zero_input(protocol: Protocol) -> Any:
    """Return what enters a circuit by a protocol: a tensor, or an opening that was kept."""
    zeros = torch.zeros(protocol.out.shape, dtype=torch.int64)
    return Opening(zeros, zeros) if protocol.recalls else zeros


def _run(party: int, circuit: Circuit, outputs: Sequence[int], weights: Weights, inputs: Mapping[str, Any]) -> Timeline:
    correlations = Correlations(party, Key(fresh_seed()[:KEY_BYTES]), _corrections(circuit) if party == SERVER else {})
    if party == CLIENT:
        prepare(circuit, correlations, weights)
    alone = torch.get_num_threads() == 1  # then it is busy all the time, and other processes shall not count
    recorder = Recorder(PARTY_NAMES[party], time.process_time if alone else time.perf_counter)
    step = execute(circuit, outputs, party, correlations, weights, inputs, recorder)
    recorder.start()
    for _ in Framed(step, bytes, recorder):
        pass  # the peer's frames are zeros
    recorder.stop()
    return recorder.timeline


def _corrections(circuit: Circuit) -> dict[int, memoryview]:
    """Return corrections of zeros from different places of a large block of memory, so that no cache holds them."""
    memory, at, out = _zeros().numpy().data, 0, dict[int, memoryview]()
    for index, instruction in enumerate(circuit):
        size = instruction.protocol.dealt_bytes
        at = at if at + size <= len(memory) else 0
        out[index] = memory[at : at + size] if size <= len(memory) else memoryview(bytes(size))
        at += size
    return out


def _segments(timeline: Timeline, chosen: Collection[int]) -> dict[int, Segments]:
    """Split a timeline into seconds by instruction; a round's packing is divided among its parts by their bytes."""
    computed: dict[int, list[float]] = {index: [] for index in chosen}
    wire: dict[int, list[tuple[float, float]]] = {index: [] for index in chosen}
    for work in timeline.work:
        if work.index in chosen:
            computed[work.index].append(work.seconds)
    for r in timeline.rounds:
        for part in r.parts:
            pack = (r.sent_at - r.start) * part.sent / max(1, r.sent)
            unpack = (r.stop - r.received_at) * part.received / max(1, r.received)
            wire[part.index].append((pack, unpack))
    return {
        index: tuple(Segment(each, *moved) for each, moved in zip(found, [*wire[index], (0.0, 0.0)], strict=True))
        if found
        else (Segment(0.0),)  # finished before the query
        for index, found in computed.items()
    }


@contextmanager
def _neighbour() -> Iterator[None]:
    code = f"import numpy; a = numpy.zeros({_STREAM}); b = a + 1; print(flush=True)\nwhile True: a += b"
    child = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield
    finally:
        child.kill()
        child.communicate()


@cache
def _zeros() -> Tensor:  # made when first needed: most processes time nothing
    return torch.empty(_ALL, dtype=torch.uint8).zero_()


def evict_caches(size: int = _ALL) -> None:
    """Evict the processor's caches by writing ``size`` bytes."""
    _zeros()[:size].zero_()
