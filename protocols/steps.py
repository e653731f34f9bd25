"""Run protocol steps: merge what is exchanged in a round, pack it into frames of bytes, and resume the step.

``advance`` is the only place that resumes a step. ``Framed`` is the loop that every party runs; ``run_pair`` runs both
parties in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Generic, TypeVar

from torch import Tensor

from protocols import wire
from protocols.protocol import CircuitCost, Exchange, Step

A = TypeVar("A")
T = TypeVar("T")
Y = TypeVar("Y")


@dataclass(frozen=True)
class Done(Generic[T]):
    """A finished step's result."""

    result: T


def advance(step: Generator[Y, A, T], answer: A | None = None) -> Y | Done[T]:
    """Run a step until it yields again or ends. ``answer``: what it waits for; None starts it."""
    try:
        return next(step) if answer is None else step.send(answer)
    except StopIteration as stop:
        return Done(stop.value)


def merge(exchanges: list[Exchange]) -> Exchange:
    """Merge exchanges, in order, into one."""
    return Exchange(tuple(part for e in exchanges for part in e.send), tuple(w for e in exchanges for w in e.receive))


def pack_frame(exchange: Exchange) -> bytes:
    return b"".join(wire.encode(x, form) for x, form in exchange.send)


def unpack_frame(payload: bytes, exchange: Exchange) -> tuple[Tensor, ...]:
    """Decode the tensors of a peer's frame; raises FrameError if it has another size than ``exchange`` prescribes."""
    expected = sum(form.size for form in exchange.receive)
    if len(payload) != expected:
        raise wire.FrameError(f"the Program prescribes a frame of {expected} bytes here, got {len(payload)}")
    return tuple(wire.decode_all(payload, exchange.receive))


class FrameObserver:
    """A listener to one party's frames; its methods are called in this order, once a round. The base ignores them."""

    def packing(self) -> None:
        """A round begins: the party packs the frame that it sends."""

    def sent(self, payload: bytes) -> None:
        """The frame has left; it is empty if the party sends nothing in this round."""

    def received(self, payload: bytes) -> None:
        """The peer's frame is here; it is empty if nothing comes in this round."""

    def unpacked(self) -> None:
        """The round is over, and the party computes again."""


class Framed(Generic[T]):
    """One party's step, run as frames. Iterating runs it and yields each round's frame to send (empty: send nothing)::

        frames = Framed(step, receive)
        for payload in frames:
            send(payload)
        return frames.result

    ``receive(size)`` returns the peer's frame of the round; it must return b"" if ``size`` is 0, because no frame comes
    then. Raises FrameError if the frame has another size. ``result`` is set after the last frame.
    """

    result: T

    def __init__(self, step: Step[T], receive: Callable[[int], bytes], observer: FrameObserver | None = None) -> None:
        self._step, self._receive, self._told = step, receive, observer or FrameObserver()

    def __iter__(self) -> Iterator[bytes]:
        step, told = self._step, self._told
        now = advance(step)
        while not isinstance(now, Done):
            told.packing()
            payload = pack_frame(now)
            yield payload
            told.sent(payload)
            came = self._receive(sum(form.size for form in now.receive))
            told.received(came)
            answer = unpack_frame(came, now)
            told.unpacked()
            now = advance(step, answer)
        self.result = now.result


@dataclass
class PairTraffic(FrameObserver):
    """Measure the traffic between the two parties of ``run_pair``, and record each party's view if asked to.

    It observes the first party's frames. frames_to_first, frames_to_second: lists that collect the frames, or None.
    """

    rounds: int = 0
    to_first: int = 0
    to_second: int = 0
    frames_to_first: list[bytes] | None = None
    frames_to_second: list[bytes] | None = None

    def sent(self, payload: bytes) -> None:
        self.rounds += 1
        self.to_second += len(payload)
        if self.frames_to_second is not None:
            self.frames_to_second.append(payload)

    def received(self, payload: bytes) -> None:
        self.to_first += len(payload)
        if self.frames_to_first is not None:
            self.frames_to_first.append(payload)

    @property
    def cost(self) -> CircuitCost:
        return CircuitCost(self.rounds, self.to_first, self.to_second)


def run_pair(server: Step[Any], client: Step[Any], traffic: PairTraffic | None = None) -> tuple[Any, Any]:
    """Run both parties' steps in this thread, in lockstep, through real byte frames; return both results.

    Raises RuntimeError if one party ends while the other waits for a message.
    """
    crossing: tuple[bytes, bytes] = (b"", b"")
    first = Framed(server, lambda size: crossing[1], traffic)
    second = Framed(client, lambda size: crossing[0])
    for to_second, to_first in zip_longest(first, second):
        if to_second is None or to_first is None:
            raise RuntimeError("one party finished while the other waits for a message")
        crossing = (to_second, to_first)
    return first.result, second.result
