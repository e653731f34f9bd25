"""Checks of what a client sent: the parties compute on only if its look-up keys and inputs are such as they should be.

Both checks end alike. Parties 0 and 1 hold shares that add up to zero if the client kept to the protocol, so that
either share follows from the other: they send each other its SHA-256. If the two differ, both raise ``ClientDeviates``,
and the query ends before an answer leaves. Whatever left before was under a one-time mask.

Seen by a party, of a client that keeps to the protocol: masked openings, which are uniform, and a hash that it knows.
Of one that does not: besides, a hash of shares that differ from its own by what the client chose. Seen by the client:
whether its own message was well-formed, which it knew. The check depends on nothing else: on no weight, no other input.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import bits, ring
from protocols.errors import ClientDeviates
from protocols.protocol import SERVER, CircuitCost, Draw, Material, Protocol, Shape, Step, Weights, count, swap
from protocols.wire import Wire

_DIGEST = Wire((32,), planes=True)
_HINT = "the parties have ended the query; a client of unseen sends no such message"


@dataclass(frozen=True)
class _Check(Protocol):
    """Base of the checks. Its result is empty: nothing reads it."""

    in_programs: ClassVar[bool] = False
    checks: ClassVar[bool] = True
    gives: ClassVar[str] = "nothing"
    name: str  # of the input that is checked

    @property
    def out(self) -> Wire:
        return Wire((0,), planes=True)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return self.out.shape

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return torch.empty((0,), dtype=torch.uint8, device=operands[0].device)

    def _same(self, mine: Tensor, refused: str) -> Step[Tensor]:
        """Compare hashes with the other party. Raises ClientDeviates if they differ. Rounds 1, 32 bytes each way."""
        if mine.is_meta:
            yield swap(torch.empty(_DIGEST.shape, dtype=torch.uint8, device="meta"), _DIGEST)
        else:
            digest = hashlib.sha256(mine.contiguous().numpy().data).digest()
            (theirs,) = yield swap(torch.frombuffer(bytearray(digest), dtype=torch.uint8), _DIGEST)
            if not hmac.compare_digest(digest, theirs.numpy().tobytes()):
                raise ClientDeviates(refused, _HINT)
        return torch.empty((0,), dtype=torch.uint8, device=mine.device)


@dataclass(frozen=True)
class UnitVectors(_Check):
    """A check that a look-up's keys select one row for each index, the same in all ``pairs`` of keys; from a sketch.

    Operand: (points, pairs + 3) words, S of every pair, A, B, Z (see ``sketch``). A and B are opened under masks; their
    product follows as in ``Product``; S - 1 and Z - A B must be zero.
    Rounds 2; 16 bytes an index and 32 bytes each way; 8 bytes an index from party 2 to party 0, ahead.
    Keys of an honest client always pass. Others pass with probability rows / 2^64 an index at most, as far as AES is a
    pseudorandom permutation: 2^-49 for 30,522 tokens.
    """

    kind: ClassVar[str] = "unit_vectors"
    points: int
    pairs: int

    @property
    def operand_ring(self) -> int:
        return ring.WORD

    @property
    def draws(self) -> tuple[Draw, ...]:
        return Draw("r", (self.points, 2)), Draw("rr", (self.points,), derived=True)

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        if operands[0].out.shape != (self.points, self.pairs + 3):
            raise ValueError(f"a sketch of {self.pairs} pairs of {self.points} keys has not {operands[0].out.shape}")

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {"rr": masks["r"].prod(dim=1)}, None

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (sketch,) = operands
        sums, factors, z = sketch[:, : self.pairs], sketch[:, self.pairs : -1], sketch[:, -1]
        r, one = material["r"], 1 if party == SERVER else 0
        mine = factors + r
        (theirs,) = yield swap(mine, Wire((self.points, 2), ring.WORD))
        a, b = (mine + theirs).unbind(1)
        product = a * b * one - a * r[:, 1] - b * r[:, 0] + material["rr"]
        zero = torch.cat([sums - one, (z - product).unsqueeze(1)], dim=1)
        refused = f"the client's keys of the look-up {self.name!r} are malformed: they do not select one row an index"
        return (yield from self._same(zero if one else -zero, refused))

    def cost(self) -> CircuitCost:
        each = 16 * self.points + _DIGEST.size
        return CircuitCost(2, each, each, 8 * self.points)


@dataclass(frozen=True)
class InRange(_Check):
    """A check that every element of an input is within its clamps, from the bits [x < low] and [x < high + 1].

    The first of them must be zero and the second one. Exact for every ring element, if ``Compare`` has the ring's width
    and the range is less than half of the ring: what is not below ``low`` is in the half of the ring from there on.
    Rounds 1; 32 bytes each way; nothing ahead.
    """

    kind: ClassVar[str] = "in_range"
    reads: ClassVar[tuple[str, ...]] = ("bits",)
    shape: Shape
    low: float
    high: float

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (planes,) = operands
        below, inside = planes.clone()
        if party == SERVER:
            inside = ~inside
        zero = torch.stack([below, inside])
        zero[:, -1] &= _last(count(self.shape))
        refused = f"the client's input {self.name!r} is not within its range of {self.low:g} to {self.high:g}"
        return (yield from self._same(zero, refused))

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        if operands[0].out.shape != (2, bits.plane_bytes(count(self.shape))):
            raise ValueError(f"it reads two bits of each of {count(self.shape)} elements")

    def cost(self) -> CircuitCost:
        return CircuitCost(1, _DIGEST.size, _DIGEST.size)


def _last(elements: int) -> int:
    """Return the mask of those bits of a plane's last byte that stand for elements; the others are junk."""
    return (1 << ((elements - 1) % 8 + 1)) - 1
