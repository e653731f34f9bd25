"""Input and output: the client's private input enters, and the output is revealed to the client alone.

``Publish``: an input that is no secret, such as the position of a token, is sent as it is, and multiplies for nothing.
``Input``: the client's share is the input itself and the server's share is zero, so it costs no message; the first
opening masks it. ``Reveal``: the server sends its share of the output. The client learns the output, including the
noise of truncations, comparisons and tables before it, which depends on shares and masks and is not fresh randomness
(see "the last place" in SECURITY.md; ``rounding`` leaves less of it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from protocols import ring
from protocols.fields import Bits, Name, Real, Ring, Shape
from protocols.protocol import (
    CLIENT,
    SERVER,
    CircuitCost,
    Exchange,
    Material,
    Protocol,
    Silent,
    Step,
    Weights,
    bytes_of,
    receive_one,
    swap,
)
from protocols.wire import Wire


@dataclass(frozen=True)
class Input(Silent):
    """The client's integers, shared as (0, x): the server's share is zero.

    Rounds 0, bytes 0. The client's operand is the tensor; the server has none.
    """

    kind: ClassVar[str] = "input"
    reads: ClassVar[tuple[str, ...]] = ()
    shape: Shape
    ring: Ring
    name: Name
    fraction: Bits
    low: Real  # the client clamps to [low, high] before it encodes, so that a mask's -inf fits
    high: Real

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def input_of(self, party: int) -> str | None:
        return self.name if party == CLIENT else None

    def validate(self) -> None:
        if not (-math.inf < self.low <= self.high < math.inf and 0 <= self.fraction < ring.WORD):
            raise ValueError(f"an input of {self.fraction} fraction bits in [{self.low}, {self.high}]")

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Clamp the client's real numbers to [low, high] and encode them with ``fraction`` fraction bits.

        NaN counts as 0. The result is always within the clamps: parties that check this (see ``three_party.checks``)
        would otherwise learn from their refusal what a Program of theirs made of the client's input.
        """
        return ring.encode(x.to(torch.float64).nan_to_num(0.0).clamp(self.low, self.high), self.fraction)

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        if party == SERVER:
            return torch.zeros(self.shape, dtype=torch.int64)
        (x,) = operands
        if tuple(x.shape) != self.shape:  # compiled loops do not check sizes
            raise ValueError(
                f"the input {self.name!r} has shape {tuple(x.shape)}, the Program is made for {self.shape}"
            )
        return x

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0]


@dataclass(frozen=True)
class Publish(Protocol):
    """Make x, of ``ring`` bits with its sign, known to both parties: it is not masked, and must be no secret.

    Clients accept it for nothing but what follows from positions alone (see ``secure.lowering.client_inputs``).
    Rounds 1; ring / 8 bytes an element each way.
    """

    kind: ClassVar[str] = "publish"
    elementwise: ClassVar[bool] = True
    gives: ClassVar[str] = "public"
    shape: Shape
    ring: Ring

    @property
    def out(self) -> Wire:
        return Wire(self.shape, ring.WORD)

    @property
    def _sent(self) -> Wire:
        return Wire(self.shape, self.ring)

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (x,) = operands
        (theirs,) = yield swap(x, self._sent)
        return ring.signed(x + theirs, self.ring)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return ring.signed(operands[0], self.ring)

    def cost(self) -> CircuitCost:
        size = bytes_of(self.shape, self.ring)
        return CircuitCost(1, size, size)


@dataclass(frozen=True)
class Reveal(Protocol):
    """Reveal x modulo 2^ring to the client.

    Rounds 1; ring / 8 bytes an element to the client. The server gets None.
    """

    kind: ClassVar[str] = "reveal"
    elementwise: ClassVar[bool] = True
    gives: ClassVar[str] = "result"
    shape: Shape
    ring: Ring

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (x,) = operands
        if party == SERVER:
            yield Exchange(((x, self.out),))
            return None
        (theirs,) = yield receive_one(self.out)
        return ring.reduce(x + theirs, self.ring)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return ring.reduce(operands[0], self.ring)

    def cost(self) -> CircuitCost:
        return CircuitCost(1, to_second=bytes_of(self.shape, self.ring))
