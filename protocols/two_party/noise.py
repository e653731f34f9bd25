"""Gumbel noise that nobody knows: the arg-max of numbers plus such noise is a sample from their softmax.

If G_1, ..., G_n are independent with P(G_i <= g) = exp(-e^-g), the largest x_i + t G_i stands at i with the probability
e^(x_i / t) / sum_j e^(x_j / t) (Gumbel 1954; Maddison and others, "A* sampling", 2014).

1. Both parties draw 64-bit words from their own streams, and use them for nothing else. The dealer adds them up to
   U = u_S + u_C modulo 2^64, which is uniform if one of the two streams is, whatever the other one is.
2. The dealer computes G = -ln(-ln((U + 1/2) / 2^64)) in float64, and rounds t G to a multiple of 2^-fraction.
3. The client's share of that comes from its stream, the server's is a correction.

G lies in [LOWEST, HIGHEST] = [-3.81, 45.06], the values for U = 0 and U = 2^64 - 1. Error against exact noise: half a
unit of 2^-fraction, but for about 2^(63 - fraction) of the words near an end, where neighbours stand wider apart.
``docs/choices.md`` derives the distance between the distribution of a sample and the softmax.

A party gets no message; the server gets its corrections, masked by the client's shares. Server and client each know one
summand of U, which is independent of U, so the noise is unknown to both. The dealer knows it, as it knows all masks,
and sees neither x nor the sample. It adds no randomness of its own: what it deals follows from the two streams, as
every other correction does. So a party that draws its words as it likes does not bias the noise. A dealer that deals
something else is one that makes answers wrong, which the dealer is trusted not to do (see SECURITY.md).

Noise must be used once: of two samples under the same noise, whoever sees both learns how the two rows differ. Equal
instructions of a Program are one instruction, so ``number`` tells those apart which are to be independent.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols.fields import Bits, Real, Ring, Shape, Whole
from protocols.prg import KEY_BYTES, Key
from protocols.protocol import (
    CircuitCost,
    Draw,
    Material,
    Opening,
    Silent,
    Weights,
    bytes_of,
    count,
    expanded,
)
from protocols.wire import Wire

HIGHEST = 65 * math.log(2)
LOWEST = -math.log(HIGHEST)
"""The range of G. The least (U + 1/2) / 2^64 is 2^-65, and so far is the greatest from 1."""

_MOST_BITS = 62
"""The most bits of a noise's integer, sign excluded."""


def gumbel(words: Tensor, scale: float) -> Tensor:
    """Return scale G of 64-bit words as integers, rounded to the nearest."""
    # (U + 1/2) / 2^64 of an unsigned word; in the upper half its distance from 1, which float64 resolves
    upper = words < 0
    tail = (torch.where(upper, ~words, words).to(torch.float64) + 0.5) * 2.0**-64
    exponential = torch.where(upper, -torch.log1p(-tail), -torch.log(tail))
    return torch.round(torch.log(exponential) * -scale).to(torch.int64)


def fresh_words(shape: Shape) -> Tensor:
    """Return 64-bit words from the operating system's generator, by way of a stream of their own."""
    return Key(secrets.token_bytes(KEY_BYTES)).stream(0).words(shape)


@dataclass(frozen=True)
class _Noise(Silent):
    """The base of both: the words, and the size that integers must have."""

    error: ClassVar[str] = "a sample: half a unit in the last place from exact noise"
    shape: Shape
    ring: Ring
    fraction: Bits
    number: Whole

    def validate(self) -> None:
        if not 0 < self._scale * HIGHEST < 2.0**_MOST_BITS:
            raise ValueError(f"noise of the scale {self._scale:g}, which is to be above zero and below 2^56")

    @property
    def _scale(self) -> float:
        """The units of the last place that the noise is multiplied by."""
        return 2.0**self.fraction

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def own_draws(self) -> tuple[Draw, ...]:
        return (Draw("words", self.shape), Draw("noise", self.shape, self.ring, derived=True))

    @property
    def draws(self) -> tuple[Draw, ...]:
        return self.own_draws

    def fitted(self) -> int:
        """Count two logarithms an entry."""
        return 2 * count(self.shape)


@dataclass(frozen=True)
class Gumbel(_Noise):
    """[temperature G] of independent G, as multiples of 2^-fraction, modulo 2^ring.

    Rounds 0; offline ring / 8 bytes an entry to the server. Each entry is within half a unit of the last place.
    """

    kind: ClassVar[str] = "gumbel"
    reads: ClassVar[tuple[str, ...]] = ()
    temperature: Real

    @property
    def _scale(self) -> float:
        return self.temperature * 2.0**self.fraction

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {"noise": gumbel(masks["words"], self._scale)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return material["noise"]

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        """Return fresh noise: it has no other meaning in the clear."""
        return gumbel(fresh_words(self.shape), self._scale)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of(self.shape, self.ring))


@dataclass(frozen=True)
class ScaledGumbel(_Noise):
    """[t G] modulo 2^ring of independent G, multiples of 2^-fraction, from an opening of a secret t, which is expanded.

    The result has the fraction bits of both. z = t + r is known to both parties and G, r G to neither, so that
    t G = z [G] - [r G]: the parties open one number however many entries it multiplies.
    Rounds 0; offline 2 ring / 8 bytes an entry to the server. Exact for the noise that is dealt.
    """

    kind: ClassVar[str] = "scaled_gumbel"
    reads: ClassVar[tuple[str, ...]] = ("opening",)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (*self.own_draws, Draw("masked", self.shape, self.ring, derived=True))

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return expanded(operands[0], self.shape)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        noise = gumbel(masks["words"], self._scale)
        return {"noise": noise, "masked": noise * r}, None

    def compute(self, party: int, material: Material, operands: tuple[Opening, ...], weights: Weights) -> Any:
        ((z, _),) = operands
        return material["noise"] * z - material["masked"]

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        """Return t times fresh noise."""
        (t,) = operands
        return gumbel(fresh_words(self.shape), self._scale).to(t.device) * t

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=2 * bytes_of(self.shape, self.ring))
