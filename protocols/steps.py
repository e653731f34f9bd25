"""Running protocol steps: merge independent ones into shared rounds,
and drive them against a channel or in one process.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from protocols import wire
from protocols.protocol import CircuitCost, Exchange, Step

T = TypeVar("T")


class ChannelClosed(ConnectionError):
    """The peer is gone, or did not answer within the deadline."""


class Channel(Protocol):
    """Moves byte strings between two parties, in order. ``receive`` raises ChannelClosed when nothing can come."""

    def send(self, payload: bytes) -> None: ...

    def receive(self, size: int) -> bytes: ...


class MemoryChannel:
    """The in-memory twin of the network channel: two queues in one process, for tests, examples and notebooks."""

    def __init__(self, inbox: queue.SimpleQueue[bytes], outbox: queue.SimpleQueue[bytes], timeout: float) -> None:
        self._inbox, self._outbox, self._timeout = inbox, outbox, timeout

    @classmethod
    def pair(cls, timeout: float = 60.0) -> tuple[MemoryChannel, MemoryChannel]:
        """Two connected ends; ``timeout`` seconds without an answer raise ChannelClosed."""
        a: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        b: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        return cls(a, b, timeout), cls(b, a, timeout)

    def send(self, payload: bytes) -> None:
        self._outbox.put(payload)

    def receive(self, size: int) -> bytes:
        try:
            return self._inbox.get(timeout=self._timeout)
        except queue.Empty:
            raise ChannelClosed(f"nothing came within {self._timeout:g} s (waiting for {size} bytes)") from None


def gather(*steps: Step[Any]) -> Step[list[Any]]:
    """Run independent steps side by side: whatever they exchange at the same time leaves as one round."""
    results: list[Any] = [None] * len(steps)
    waiting: list[tuple[int, Step[Any], Exchange]] = []

    def resume(index: int, step: Step[Any], answer: tuple[Tensor, ...] | None) -> None:
        try:
            exchange = next(step) if answer is None else step.send(answer)
        except StopIteration as stop:
            results[index] = stop.value
        else:
            waiting.append((index, step, exchange))

    for index, step in enumerate(steps):
        resume(index, step, None)
    while waiting:
        current, waiting = waiting, []
        answers = yield merge([exchange for _, _, exchange in current])
        start = 0
        for index, step, exchange in current:
            stop = start + len(exchange.receive)
            resume(index, step, answers[start:stop])
            start = stop
    return results


def merge(exchanges: list[Exchange]) -> Exchange:
    """One exchange that carries all of them, in order."""
    return Exchange(tuple(part for e in exchanges for part in e.send), tuple(w for e in exchanges for w in e.receive))


def pack_frame(exchange: Exchange) -> bytes:
    return b"".join(wire.encode(x, form) for x, form in exchange.send)


def unpack_frame(payload: bytes, exchange: Exchange) -> tuple[Tensor, ...]:
    expected = sum(form.size for form in exchange.receive)
    if len(payload) != expected:
        raise wire.FrameError(f"the Program prescribes a frame of {expected} bytes here, got {len(payload)}")
    view, start, out = memoryview(payload), 0, []
    for form in exchange.receive:
        out.append(wire.decode(view[start : start + form.size], form))
        start += form.size
    return tuple(out)


def drive(step: Step[T], channel: Channel) -> T:
    """Run one party's step to its end over a channel. A frame leaves only where there is something to send."""
    answer: tuple[Tensor, ...] | None = None
    while True:
        try:
            exchange = next(step) if answer is None else step.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if exchange.send:
            channel.send(pack_frame(exchange))
        answer = ()
        if exchange.receive:
            answer = unpack_frame(channel.receive(sum(w.size for w in exchange.receive)), exchange)


@dataclass
class PairTraffic:
    """What crossed between the two parties of ``run_pair``: the measured cost, and each party's view if asked for."""

    rounds: int = 0
    to_first: int = 0
    to_second: int = 0
    frames_to_first: list[bytes] | None = None
    frames_to_second: list[bytes] | None = None

    @property
    def cost(self) -> CircuitCost:
        return CircuitCost(self.rounds, self.to_first, self.to_second)


def run_pair(server: Step[Any], client: Step[Any], traffic: PairTraffic | None = None) -> tuple[Any, Any]:
    """Run both parties' steps in this thread, in lockstep, through real byte frames; returns both results."""
    traffic = traffic if traffic is not None else PairTraffic()
    results: list[Any] = []
    answers: list[tuple[Tensor, ...] | None] = [None, None]
    while True:
        exchanges: list[Exchange] = []
        for step, answer in zip((server, client), answers, strict=True):
            try:
                exchanges.append(next(step) if answer is None else step.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
        if len(results) == 2:
            return results[0], results[1]
        if results:
            raise RuntimeError("one party finished while the other waits for a message")
        from_server, from_client = (pack_frame(e) for e in exchanges)
        traffic.rounds += 1
        traffic.to_second += len(from_server)
        traffic.to_first += len(from_client)
        if traffic.frames_to_first is not None:
            traffic.frames_to_first.append(from_client)
        if traffic.frames_to_second is not None:
            traffic.frames_to_second.append(from_server)
        answers[0] = unpack_frame(from_client, exchanges[0])
        answers[1] = unpack_frame(from_server, exchanges[1])
