"""The four functions that run a circuit (see ``flow``).

``execute``   runs one party's online part, as one step that merges everything ready into one round
``prepare``   runs the client's offline part: results that need no input (its shares of linear layers)
``deal``      runs the dealer's part: corrections for the server, in the circuit's order
``reference`` computes in plain fixed-point arithmetic on residues: INSECURE, for tests and accuracy reports
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from protocols import bits, wire
from protocols.ahead import StreamsAhead
from protocols.flow import Circuit, Flow, Instruction
from protocols.prg import SHORT, Bytes, Key, Stream, as_words
from protocols.protocol import CLIENT, SERVER, CircuitCost, Draw, Exchange, Protocol, Rows, Step, Weights, count
from protocols.steps import Done, FrameObserver, advance, merge


@dataclass(frozen=True)
class Part:
    """The bytes that one instruction (``index``) sends and receives in a round."""

    index: int
    sent: int
    received: int


class Observer(FrameObserver):
    """A listener to one party's ``execute``: it hears of every instruction, but gets no data. The base ignores all.

    The party's ``Framed`` may report its frames to the same observer.
    """

    def computing(self, index: int) -> None:
        """An instruction starts, or continues with the answer to its exchange."""

    def computed(self, index: int) -> None:
        """The instruction stops: it has finished, or it waits for an exchange."""

    def finished(self, index: int) -> None:
        """The instruction's result is there, and operands that nothing else reads have been dropped."""

    def exchanging(self, parts: Sequence[Part]) -> None:
        """A round begins. ``parts``: every instruction that waits, in order, and the bytes that it exchanges."""


class CorrelationReused(RuntimeError):
    """A correlation was asked for twice; the first use has burnt it."""


class Supply(typing.Protocol):
    """Corrections by instruction. Each is taken once; ``pop`` waits for one that is still on its way.

    ``pop`` returns ``default`` for an instruction that has none.
    """

    def pop(self, index: int, default: bytes) -> bytes | memoryview: ...


class Correlations:
    """One party's correlated randomness of one query. Taking an entry burns it."""

    def __init__(
        self, party: int, key: Key, corrections: Mapping[int, bytes | memoryview] | Supply | None = None
    ) -> None:
        """Hold the key of the party's streams, and at the server the dealer's ``corrections`` by instruction."""
        self._party, self._key = party, key
        self._streams: Key | StreamsAhead = key
        self._corrections = dict(corrections or {}) if isinstance(corrections, Mapping | None) else corrections
        self._taken: set[int] = set()
        self._drawn: dict[int, dict[str, Tensor]] = {}
        self._finished: dict[int, Any] = {}

    def take(self, index: int, protocol: Protocol) -> dict[str, Tensor]:
        """Return the material of instruction ``index``, by draw; raises CorrelationReused the second time.

        Raises FrameError if its corrections have another size than its draws.
        """
        if not protocol.draws:
            return {}
        if index in self._drawn:
            return self._drawn.pop(index)
        if index in self._taken:
            raise CorrelationReused(f"the correlation of instruction {index} ({protocol.kind}) was already used")
        self._taken.add(index)
        material = dict[str, Tensor]()
        if taken := protocol.drawn[self._party]:
            shares = drawn(taken, self._streams.stream(index))
            material = {d.name: share for d, share in zip(taken, shares, strict=True)}
        if self._party == SERVER:
            material |= _split(self._corrections.pop(index, b""), protocol)
        return material

    def foresee(self, circuit: Circuit, *, offline: bool) -> None:
        """Make the streams that a circuit will take together; offline: those that are taken before a query."""
        self._streams = StreamsAhead(Flow.of(circuit).short(self._party, offline), self._key)

    def prepare(self, index: int, protocol: Protocol, operands: tuple[Any, ...], weights: Weights) -> Any:
        """Client, before the query: draw an instruction's material, and compute and keep what needs no input."""
        material = self.take(index, protocol)
        value = protocol.offline(material, operands, weights)
        self.keep(index, protocol, material, value)
        return value

    def keep(self, index: int, protocol: Protocol, material: dict[str, Tensor], value: Any) -> None:
        """Client, before the query: keep an instruction's material, or instead its result if that needs no input."""
        if protocol.finished_offline:
            self._finished[index] = value
        elif protocol.drawn_bytes[self._party] <= SHORT:  # it lies in one piece of memory with others, which are spent
            self._drawn[index] = {name: share.clone() for name, share in material.items()}
        else:
            self._drawn[index] = material

    def is_finished(self, index: int) -> bool:
        """True if ``keep`` got the result itself; ``finished`` then returns it, once."""
        return index in self._finished

    def finished(self, index: int) -> Any:
        return self._finished.pop(index)


def drawn(draws: Sequence[Draw], stream: Stream) -> Iterable[Tensor]:
    """Return shares that are read from a stream as one asks for them; short ones at once, in one piece of memory."""
    size = 0
    for d in draws:
        size += d.drawn_bytes
    if size > SHORT:
        return (stream.planes(d.shape) if d.wire.planes else stream.words(d.shape) for d in draws)
    read, at, shares = stream.read(size), 0, []
    for d in draws:
        taken = read[at : at + d.drawn_bytes]
        shares.append(torch.from_numpy((taken if d.wire.planes else as_words(taken)).reshape(d.shape)))
        at += d.drawn_bytes
    return shares


def _split(payload: bytes | memoryview, protocol: Protocol) -> dict[str, Tensor]:
    if len(payload) != protocol.dealt_bytes:
        raise wire.FrameError(f"a correction has {protocol.dealt_bytes} bytes here, got {len(payload)}")
    found = wire.decode_all(payload, [d.wire for d in protocol.derived])
    return {d.name: share for d, share in zip(protocol.derived, found, strict=True)}


class _Values:
    """Results by instruction; each is dropped after its last use."""

    def __init__(self, uses: Sequence[int], outputs: Sequence[int]) -> None:
        """Hold none yet. uses: how many times each is read."""
        self._uses = list(uses)
        for i in outputs:
            self._uses[i] += 1
        self._values: list[Any] = [None] * len(uses)

    def put(self, index: int, value: Any) -> None:
        if self._uses[index]:
            self._values[index] = value

    def take(self, inputs: Sequence[int]) -> tuple[Any, ...]:
        uses, values, out = self._uses, self._values, []
        for i in inputs:
            out.append(values[i])
            uses[i] -= 1
            if not uses[i]:
                values[i] = None
        return tuple(out)


def execute(
    circuit: Circuit,
    outputs: Sequence[int],
    party: int,
    correlations: Correlations,
    weights: Weights,
    inputs: Mapping[str, Tensor] | None = None,
    observer: Observer | None = None,
) -> Step[list[Any]]:
    """Run one party's part of a circuit as dataflow, and return the results of the instructions ``outputs``.

    Every instruction that is ready runs until it must exchange; then all exchanges become one round. The order depends
    on the circuit alone, so both parties merge the same messages. inputs: by name, the client's integers, or this
    party's shares of them if the client is none of the parties; and the openings that earlier queries kept.
    """
    flow, told = Flow.of(circuit), observer or Observer()
    values, finished, named = _Values(flow.uses, outputs), flow.finished, flow.inputs[party]
    correlations.foresee(flow, offline=False)
    waiting: list[tuple[int, Step[Any], Exchange]] = []

    def resume(index: int, step: Step[Any], received: tuple[Tensor, ...] | None) -> None:
        now = advance(step, received)
        told.computed(index)
        if isinstance(now, Done):
            values.put(index, now.result)
            told.finished(index)
        elif rounds < finished[index]:
            waiting.append((index, step, now))
        else:
            raise RuntimeError(f"instruction {index} ({flow[index].protocol.kind}) exchanges more often than its cost")

    def start(index: int) -> None:
        protocol, operands = flow[index].protocol, values.take(flow[index].inputs)
        if correlations.is_finished(index):
            values.put(index, correlations.finished(index))
            told.finished(index)
            return
        if index in named:
            operands = ((inputs or {})[named[index]],)
        told.computing(index)
        material = correlations.take(index, protocol)
        if protocol.exchanges:
            resume(index, protocol.run(party, material, operands, weights), None)
        else:
            value = protocol.compute(party, material, operands, weights)  # type: ignore[attr-defined]
            told.computed(index)
            values.put(index, value)
            told.finished(index)

    for rounds, starting in enumerate(flow.phases):
        if rounds:
            current, waiting = sorted(waiting, key=_place), []
            told.exchanging([_part(index, exchange) for index, _, exchange in current])
            answers = yield merge([exchange for _, _, exchange in current])
            at = 0
            for index, step, exchange in current:
                received = answers[at : at + len(exchange.receive)]
                at += len(exchange.receive)
                told.computing(index)
                resume(index, step, received)
        for index in starting:
            start(index)
    return list(values.take(outputs))


def _place(waiting: tuple[int, Step[Any], Exchange]) -> int:
    return waiting[0]


def _part(index: int, exchange: Exchange) -> Part:
    sent = received = 0
    for _, form in exchange.send:
        sent += form.size
    for form in exchange.receive:
        received += form.size
    return Part(index, sent, received)


def prepare(circuit: Circuit, correlations: Correlations, weights: Weights) -> None:
    """Do the client's work before a query: masks of deliveries, shares of linear layers, kept in ``correlations``."""
    prepare_together(circuit, [correlations], weights)


def prepare_together(circuit: Circuit, correlations: Sequence[Correlations], weights: Weights) -> None:
    """Do what ``prepare`` does, for each of several queries.

    They are prepared side by side, so that each matrix is read once for all of them.
    """
    flow = Flow.of(circuit)
    values: list[dict[int, Any]] = [{} for _ in correlations]
    for each in correlations:
        each.foresee(flow, offline=True)
    for index, kept, dropped in flow.offline:
        protocol, inputs = flow[index].protocol, flow[index].inputs
        materials = [each.take(index, protocol) for each in correlations]
        operands = [tuple(known[i] for i in inputs if i in known) for known in values]
        results = protocol.offline_together(materials, operands, weights)
        for own, material, known, result in zip(correlations, materials, values, results, strict=True):
            own.keep(index, protocol, material, result)
            for i in dropped:
                known.pop(i, None)
            if kept:
                known[index] = result


@dataclass(frozen=True)
class Dealt:
    """A query for which corrections are dealt.

    server, client: the parties' keys of this query. The client's shares mask the corrections, so that they are uniform
    to the server. given: the masks of openings that earlier queries kept, by name; each is asked for when an
    instruction reads it. keeping: gets those of this query.
    """

    server: Key = field(repr=False)
    client: Key = field(repr=False)
    given: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    keeping: dict[str, Tensor] = field(default_factory=dict, repr=False)


def deal(
    circuit: Circuit,
    server: Key,
    client: Key,
    weights: Weights,
    given: Mapping[str, Tensor] | None = None,
    keeping: dict[str, Tensor] | None = None,
) -> Iterator[tuple[int, memoryview]]:
    """Yield the dealer's corrections of one query as (instruction, bytes), in order; the arguments are ``Dealt``'s.

    Raises FrameError if an opening is missing.
    """
    query = Dealt(server, client, {} if given is None else given, {} if keeping is None else keeping)
    for index, (payload,) in deal_together(circuit, [query], weights):
        yield index, payload


def deal_together(
    circuit: Circuit, queries: Sequence[Dealt], weights: Weights
) -> Iterator[tuple[int, list[memoryview]]]:
    """Yield the dealer's corrections of several queries as (instruction, the bytes of each query), in order.

    The corrections of a query are the same as if it were dealt alone. Side by side they cost less: each matrix is read
    once for all of them. A query may read what those before it keep, if the circuit keeps it before it reads. Raises
    FrameError if an opening is missing.
    """
    flow = Flow.of(circuit)
    masks = [_Values(flow.uses_dealt, ()) for _ in queries]
    short = [flow.short(party) for party in (SERVER, CLIENT)]
    streams = [_Streams(*map(StreamsAhead, short, (q.server, q.client))) for q in queries]
    for index in flow.dealt:
        protocol, inputs = flow[index].protocol, flow[index].inputs
        operands = [each.take(inputs) for each in masks]
        if protocol.recalls:
            operands = [(_given(query, index, protocol.recalls),) for query in queries]
        found = _dealt(index, protocol, operands, streams, weights)
        for query, values, (_, mask) in zip(queries, masks, found, strict=True):
            values.put(index, mask)
            if protocol.keeps:
                query.keeping[protocol.keeps] = mask
        if protocol.derived:
            yield index, [payload for payload, _ in found if payload is not None]


class _Streams(NamedTuple):
    """Those of both parties, for one query."""

    server: Key | StreamsAhead
    client: Key | StreamsAhead


def _given(query: Dealt, index: int, name: str) -> Tensor:
    try:
        return query.given[name]
    except KeyError:
        raise wire.FrameError(f"no earlier query kept {name!r}, which instruction {index} reads") from None


def deal_one(
    index: int, protocol: Protocol, operands: tuple[Any, ...], server: Key, client: Key, weights: Weights
) -> tuple[memoryview | None, Any]:
    """Return the dealer's corrections of one instruction, or None if it has none, and its result's mask.

    operands: the masks of what it reads.
    """
    (found,) = _dealt(index, protocol, [operands], [_Streams(server, client)], weights)
    return found


def _dealt(
    index: int,
    protocol: Protocol,
    operands: Sequence[tuple[Any, ...]],
    queries: Sequence[_Streams],
    weights: Weights,
) -> list[tuple[memoryview | None, Any]]:
    """Return what ``deal_one`` returns, for each of several queries."""
    if not protocol.draws:
        return [(None, mask) for _, mask in protocol.deal_together([{}] * len(queries), operands, weights)]
    streams = [query.client.stream(index) for query in queries]
    plain = [_plain(index, protocol, query.server, client) for query, client in zip(queries, streams, strict=True)]
    found = protocol.deal_together(plain, operands, weights)
    if not protocol.derived:
        return [(None, mask) for _, mask in found]
    return [
        (_corrections(protocol, totals, client), mask) for (totals, mask), client in zip(found, streams, strict=True)
    ]


def _plain(index: int, protocol: Protocol, server: Key | StreamsAhead, client: Stream) -> dict[str, Tensor]:
    """Return the masks that a protocol draws, of both parties together. server: its streams; client: its stream."""
    if not protocol.masks:
        return {}
    own = drawn(protocol.held[SERVER], server.stream(index)), drawn(protocol.held[CLIENT], client)
    coming = iter(own[SERVER]), iter(own[CLIENT])
    plain: dict[str, Tensor] = {}
    for d in protocol.masks:  # one after the other: of large ones no more than two shares are in memory
        if d.holder is None:
            plain[d.name] = d.combine(next(coming[SERVER]), next(coming[CLIENT]))
        else:
            plain[d.name] = next(coming[d.holder])
    return plain


def _corrections(protocol: Protocol, totals: Mapping[str, Any], client: Stream) -> memoryview:
    """Return the corrections of one query."""
    payload, at = np.empty(protocol.dealt_bytes, np.uint8), 0
    for d in protocol.derived:
        _correct(d, totals[d.name], client, payload[at : at + d.wire.size])
        at += d.wire.size
    return payload.data


_BLOCK = 1 << 15  # elements corrected at a time, so that the client's share of them stays in the cache


def _correct(spec: Draw, total: Tensor | Rows, client: Stream, out: Bytes) -> None:
    """Write the server's share of ``total``, as bytes on the wire: what is left without the client's share.

    Raises FrameError for a total of another shape than its draw: a share that masked it would have been broadcast.
    """
    for at, here in _blocks(spec, total):
        share = client.read(here.nbytes).view(here.dtype)
        spec.remove(here, share, out, at)


def _blocks(spec: Draw, total: Tensor | Rows) -> Iterable[tuple[int, Any]]:
    """Return the elements of a total in blocks, with the place of each in the whole."""
    shape: tuple[int, ...]
    declared: tuple[int, ...]
    blocks: Iterable[tuple[int, Any]]
    if isinstance(total, Rows):
        table, row, size = total.table.numpy(), total.row.numpy(), total.table.shape[1]
        dtype = total.table.dtype
        rows, step = table.view(f"V{table.strides[0]}")[:, 0], max(8, _BLOCK // size & -8)  # a row is copied at once
        shape, declared = (len(row) * size,), (count(spec.shape),)
        blocks = ((at * size, rows.take(row[at : at + step]).view(table.dtype)) for at in range(0, len(row), step))
    else:
        values, shape, declared = total.numpy().reshape(-1), tuple(total.shape), spec.shape
        dtype = total.dtype
        blocks = [(at, values[at : at + _BLOCK]) for at in range(0, len(values), _BLOCK)]
    if shape != declared or dtype != spec.wire.dtype:
        raise wire.FrameError(f"a correction of shape {shape}, {dtype}, where one of shape {declared} is dealt")
    return blocks


def correction_places(circuit: Circuit) -> dict[int, slice]:
    """Return each instruction's place in the joined bytes of ``deal``; instructions without corrections have none.

    The sizes follow from the circuit alone.
    """
    return dict(Flow.of(circuit).places)


def split_corrections(circuit: Circuit, payload: bytes | bytearray | memoryview) -> dict[int, memoryview]:
    """Cut the joined bytes of ``deal`` by instruction, without copying them."""
    view = memoryview(payload)
    return {index: view[place] for index, place in Flow.of(circuit).places.items()}


class ReadWhenUsed:
    """Corrections that lie elsewhere, such as on a disk: each is read when its instruction takes it.

    read: returns the bytes [start, stop) of the joined bytes of ``deal``. Instructions take theirs roughly in the
    circuit's order. The memory that it needs is that of the instructions which run at a time.
    """

    def __init__(self, circuit: Circuit, read: Callable[[int, int], bytes | memoryview]) -> None:
        self._places, self._read = correction_places(circuit), read

    def pop(self, index: int, default: bytes) -> bytes | memoryview:
        place = self._places.pop(index, None)  # once
        return default if place is None else self._read(place.start, place.stop)


def reference(circuit: Circuit, outputs: Sequence[int], weights: Weights, inputs: Mapping[str, Tensor]) -> list[Any]:
    """INSECURE: run the same circuit on plain residues, as if there were one party. For comparison only.

    inputs: the client's integers by name. Returns the results of the instructions ``outputs``, in exact fixed point.
    """
    values = _Values(Flow.of(circuit).uses, outputs)
    for index, instruction in enumerate(circuit):
        protocol, operands = instruction.protocol, values.take(instruction.inputs)
        name = protocol.input_of(CLIENT)
        if name is not None:
            operands = (inputs[name],)
        values.put(index, protocol.clear(operands, weights))
    return list(values.take(outputs))


def total_cost(circuit: Circuit) -> CircuitCost:
    """Sum the bytes of all instructions, and count the rounds of the dataflow schedule, which ``execute`` takes."""
    total = sum((instruction.protocol.cost() for instruction in circuit), CircuitCost())
    return replace(total, rounds=rounds_of(circuit))


def rounds_of(circuit: Circuit, needed: Collection[int] | None = None) -> int:
    """Count the rounds of the dataflow schedule until the instructions ``needed`` have their results; None: all."""
    finished = Flow.of(circuit).finished
    return max(finished if needed is None else (finished[i] for i in needed), default=0)


class CircuitError(ValueError):
    """An instruction of a circuit does not fit its operands, its weights or itself."""


def check(circuit: Circuit, weight_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check a circuit that somebody else made: fields, kinds, rings and shapes of all operands.

    It computes with shapes alone. Shapes matter for secrecy too: a mask must have the shape of what it hides. The
    fields must be within their own bounds already (see ``protocols.fields``). Raises CircuitError, which names the
    instruction.
    """
    for index, instruction in enumerate(circuit):
        p = instruction.protocol
        try:
            p.validate()
            if not all(0 <= i < index for i in instruction.inputs):
                raise ValueError("it reads a later one")
            _check_operands(circuit, instruction)
            found = p.shape_of([circuit[i].protocol.out.shape for i in instruction.inputs], weight_shapes)
            if found != p.out.shape:
                raise ValueError(f"its result has shape {found}, it declares {p.out.shape}")
        except (ValueError, LookupError) as error:
            raise CircuitError(f"instruction {index} ({p.kind}): {error}") from None


def _check_operands(circuit: Circuit, instruction: Instruction) -> None:
    kinds, p = list(instruction.protocol.operand_kinds), instruction.protocol
    if kinds and kinds[-1] == "...":
        kinds = [kinds[0]] * max(1, len(instruction.inputs))
    if len(kinds) != len(instruction.inputs):
        raise ValueError(f"it reads {len(kinds)} operands, got {len(instruction.inputs)}")
    for kind, i in zip(kinds, instruction.inputs, strict=True):
        operand = circuit[i].protocol
        if operand.gives != kind:
            raise ValueError(f"it reads a {kind}, instruction {i} gives a {operand.gives}")
        if not operand.out.planes and operand.out.bits < p.operand_ring:
            raise ValueError(f"it needs a ring of {p.operand_ring} bits, instruction {i} has {operand.out.bits}")
        if p.elementwise and kind not in ("bits", "bit opening"):
            made_for = getattr(p, "shape", p.out.shape)
            if operand.out.shape != made_for:
                raise ValueError(f"its operand has shape {operand.out.shape}, it is made for {made_for}")
        of_bits = getattr(p, "shape", None) if kind in ("bits", "bit opening") else None
        if of_bits is not None and operand.out.shape[-1] != bits.plane_bytes(count(of_bits)):
            raise ValueError(f"its bits are those of another number of elements than {of_bits}")
    p.check_operands([circuit[i].protocol for i in instruction.inputs])


class MetaWeights(Weights):
    """Weights without data, by their shapes. It adds no weights: the shape of an added weight stays with the server."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        weight = torch.empty(self._shapes[name], dtype=torch.int64, device="meta")
        return x * weight if diagonal else x @ weight

    def opened_product(self, value: Tensor, mask: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        return self.multiply(value, name, ring_bits, diagonal=diagonal)
