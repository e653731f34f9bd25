"""What this machine's processor takes for each step of a Program, measured on random data of the right shapes.

Every distinct instruction is run for both parties, alone, a few times: no weights, no input and no dealer are needed,
and layers that repeat are measured once. In a query an instruction finds some of what it reads in the processor's cache
and some not: one with large operands is timed with warm caches (the median of a few runs) and after all were flushed,
and the figure is the mean of the two; a small one, whose time is the interpreter's, after the inner ones were flushed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from protocols.circuit import Correlations, Instruction
from protocols.prg import KEY_BYTES, Key, fresh_seed
from protocols.protocol import CLIENT, SERVER, Exchange, Opening, Protocol, Weights, count
from protocols.steps import pack_frame, unpack_frame
from protocols.two_party import Input, Linear
from protocols.two_party.polynomial import Powers
from protocols.weights import ServerWeights
from protocols.wire import Wire
from secure.program import Program

REPEATS = 3
_SMALL = 1 << 18  # bytes of operands
_INNER, _ALL = 4 << 20, 48 << 20  # bytes to write, so that those caches hold nothing else
_SIGNED_BITS = 14  # of a made-up weight, as those of a Program have


@dataclass(frozen=True)
class Segment:
    """Seconds of one instruction between two exchanges, and of packing and unpacking what it exchanges then."""

    compute: float
    pack: float = 0.0
    unpack: float = 0.0


Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class Timings:
    """``segments[party][instruction]``; an instruction that exchanges n times has n + 1 segments."""

    segments: tuple[tuple[Segments, ...], tuple[Segments, ...]]

    def compute(self, party: int) -> float:
        """Seconds of computing of one party in one query."""
        return sum(s.compute for segments in self.segments[party] for s in segments)


_known: dict[Any, tuple[Segments, Segments]] = {}  # measured before in this process


def measure(program: Program, repeats: int = REPEATS) -> Timings:
    """Time every distinct instruction of a Program with torch's present number of threads."""
    found: tuple[list[Segments], list[Segments]] = ([], [])
    for instruction in program.circuit:
        key = _key(program, instruction)
        if key not in _known:
            _known[key] = _measure(program, instruction, repeats)
        for party in (SERVER, CLIENT):
            found[party].append(_known[key][party])
    return Timings((tuple(found[SERVER]), tuple(found[CLIENT])))


def _key(program: Program, instruction: Instruction) -> Any:
    p: Any = instruction.protocol
    weight: Any = None
    if hasattr(p, "weight"):
        weight, p = program.weight_shapes.get(p.weight), replace(p, weight="")
    forms = tuple((o.gives, o.out) for o in (program.circuit[i].protocol for i in instruction.inputs))
    return type(p), p, weight, forms, torch.get_num_threads()


def _measure(program: Program, instruction: Instruction, repeats: int) -> tuple[Segments, Segments]:
    p = instruction.protocol
    if isinstance(p, Input):
        return (Segment(0.0),), (Segment(0.0),)
    weights = _weights(program, p)
    operands = tuple(_random_operand(program.circuit[i].protocol) for i in instruction.inputs)
    both: list[Segments] = []
    for party in (SERVER, CLIENT):
        if party == CLIENT and p.finished_offline:
            both.append((Segment(0.0),))
            continue
        kinds: list[list[Segment]] = []
        large = sum(8 * count(program.circuit[i].protocol.out.shape) for i in instruction.inputs) > _SMALL
        _run(party, p, operands, weights, 0)  # to warm up
        for flush in (0, _ALL) if large else (_INNER,):
            runs = [_run(party, p, operands, weights, flush) for _ in range(1 if flush == _ALL else repeats)]
            kinds.append([_over(segments, statistics.median) for segments in zip(*runs, strict=True)])
        both.append(tuple(_over(segments, statistics.fmean) for segments in zip(*kinds, strict=True)))
    return both[SERVER], both[CLIENT]


def _over(segments: tuple[Segment, ...], average: Callable[[tuple[float, ...]], float]) -> Segment:
    return Segment(*(average(column) for column in zip(*map(astuple, segments), strict=True)))


def _run(party: int, p: Protocol, operands: tuple[Any, ...], weights: Weights, flush: int) -> list[Segment]:
    size = sum(d.wire.size for d in p.draws if d.derived)
    corrections = {0: memoryview(fresh_seed() * (size // len(fresh_seed()) + 1))[:size]} if party == SERVER else {}
    correlations = Correlations(party, Key(fresh_seed()[:KEY_BYTES]), corrections)
    if party == CLIENT and type(p).offline is not Protocol.offline:
        correlations.prepare(0, p, operands, weights)
    out: list[Segment] = []
    answer: tuple[Tensor, ...] | None = None
    clock = time.perf_counter
    if flush:
        evict_caches(flush)
    start = clock()
    step = p.run(party, correlations.take(0, p), operands, weights)
    while True:
        try:
            exchange: Exchange = next(step) if answer is None else step.send(answer)
        except StopIteration:
            return [*out, Segment(clock() - start)]
        computed = clock()
        pack_frame(exchange)
        packed = clock()
        if flush:
            evict_caches(flush)
        payload = b"".join(bytes(w.size) for w in exchange.receive)
        received = clock()
        answer = unpack_frame(payload, exchange)
        unpacked = clock()
        out.append(Segment(computed - start, packed - computed, unpacked - received))
        if flush:
            evict_caches(flush)
        start = clock()


def evict_caches(size: int = _ALL) -> None:
    """Fill the processor's caches with something else, ``size`` bytes of it."""
    _something()[:size].fill_(1)


@cache
def _something() -> Tensor:  # made when first needed: most processes time nothing
    return torch.empty(_ALL, dtype=torch.uint8)


class _MadeUp(ServerWeights):
    """Weights of the right shapes; what is added is zero."""

    def plain(self, name: str) -> Tensor:
        return torch.zeros(1, dtype=torch.int64)


def _weights(program: Program, p: Protocol) -> Weights:
    tensors: Mapping[str, Tensor] = {}
    if isinstance(p, Linear):
        high = 1 << (_SIGNED_BITS - 1)
        tensors = {p.weight: torch.randint(-high, high, program.weight_shapes[p.weight])}
    return _MadeUp(tensors)


def _random(form: Wire) -> Tensor:
    if form.planes:
        return torch.randint(0, 256, form.shape, dtype=torch.uint8)
    return torch.randint(-(1 << 62), 1 << 62, form.shape) & ((1 << form.bits) - 1 if form.bits < 63 else -1)


def _random_operand(p: Protocol) -> Any:
    """Something of the kind that protocol ``p`` gives. Not secret, so from torch's generator."""
    value = _random(p.out)
    if p.gives in ("opening", "bit opening"):
        return Opening(value, _random(p.out))
    if isinstance(p, Powers):
        return value, tuple(_random(p.out) for _ in range(p.degree))
    return value
