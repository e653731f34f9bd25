"""Ranks within a row, and the first entries by rank, from one opening of the row.

The row x_0, ..., x_(n-1) is opened modulo 2^k as z_i = x_i + r_i. Entry j is *before* entry i if x_j > x_i, or if they
are equal and j < i. The rank of i is the number of entries before it: ranks are 0, ..., n - 1, each once.
1. (``OpenedPairs``) z_i - z_j is an opening of x_i - x_j under the mask r_i - r_j, for each of the n (n - 1) / 2
   pairs i < j. No message is sent.
2. ``Compare`` gives the bit [x_i < x_j] of every pair, ``OpenBits`` opens it under a mask, and ``Select`` makes a
   number of it. The other bit, whether i is before j, is one less that number.
3. (``Ranks``) Sums of these numbers are the ranks. They need a ring of ceil(log2 n) bits.
4. Ranks are opened modulo N = 2^digit >= n as y_i = rank_i + rho_i. The dealer gives shares of the unit vector e of
   rho_i: the entry of e at the public place y_i - t modulo N is [rank_i = t]. (``PlacedPositions``) So the sum of
   e_(y_i - t) i over a row is the position of its entry of rank t. (``Placed``) The dealer gives shares of e r_i too,
   and the sum of e_(y_i - t) z_i - (e r_i)_(y_i - t) is that entry. No message is sent.
Every comparison is exact, so that ranks are a permutation. If a bit were one of two at random within a tolerance, three
entries could be before each other in a circle, and no entry would be the first.

Seen by a party: z, the bits and the ranks, each under a one-time mask as wide as its ring; by the server also its
corrections, masked by the client's shares. Nobody learns a rank, nor whether entries are equal.
Source: ranks by all comparisons (Chao and others); shifted unit vectors as in ``digits``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import ring
from protocols.fields import Bits, Count, Ring, Shape, Whole
from protocols.protocol import (
    SERVER,
    CircuitCost,
    Draw,
    Local,
    Material,
    Opening,
    Protocol,
    Rows,
    Silent,
    Weights,
    bytes_of,
    count,
)
from protocols.wire import Wire

MOST_RANKED = 256
"""The most entries that are ranked among each other: 32,640 comparisons, and unit vectors of 256 entries."""


def pairs_of(entries: int) -> int:
    """Return the number of pairs i < j of a row."""
    return entries * (entries - 1) // 2


def _pairs(entries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and the second entries of all pairs i < j, in order."""
    first, second = torch.triu_indices(entries, entries, 1, device=device)
    return first, second


@dataclass(frozen=True)
class OpenedPairs(Silent):
    """The openings of x_i - x_j for all pairs i < j of a row, the last dimension, from an opening of x.

    Its result has the shape (..., n (n - 1) / 2), in the order (0, 1), (0, 2), ..., (n - 2, n - 1). Rounds 0; nothing
    is sent, nothing dealt. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "opened_pairs"
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    gives: ClassVar[str] = "opening"
    shape: Shape  # of the opening that it reads
    ring: Ring

    def validate(self) -> None:
        _check_row(self.shape)

    @property
    def out(self) -> Wire:
        return Wire((*self.shape[:-1], pairs_of(self.shape[-1])), self.ring)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if operands[0] != self.shape:
            raise ValueError(f"it is made for the shape {self.shape}, its operand has {operands[0]}")
        return self.out.shape

    def _differences(self, x: Tensor) -> Tensor:
        first, second = _pairs(self.shape[-1], x.device)
        return x[..., first] - x[..., second]

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, self._differences(operands[0])

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, r),) = operands
        return Opening(ring.reduce(self._differences(z), self.ring), self._differences(r))

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return ring.reduce(self._differences(operands[0]), self.ring)


@dataclass(frozen=True)
class Ranks(Local):
    """[rank of each entry of a row] modulo 2^ring, from the numbers [x_i < x_j] of all pairs i < j, in order.

    Rounds 0; no bytes. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "ranks"
    shape: Shape  # of the result
    ring: Ring

    def validate(self) -> None:
        _check_row(self.shape)

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if operands[0] != (*self.shape[:-1], pairs_of(self.shape[-1])):
            raise ValueError(f"numbers of shape {operands[0]} are not those of the pairs of {self.shape}")
        return self.shape

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (below,) = operands
        entries = self.shape[-1]
        first, second = _pairs(entries, below.device)
        whole = torch.zeros((*self.shape, entries), dtype=torch.int64, device=below.device)
        whole[..., first, second] = below
        ranks = whole.sum(-1) - whole.sum(-2)  # whom an entry is below, less those who are below it
        return ranks + torch.arange(entries, device=below.device) if party == SERVER else ranks


@dataclass(frozen=True)
class _ByRank(Silent):
    """The base of both: look the first ``count`` ranks of a row, of n entries, up in dealt unit vectors."""

    elementwise: ClassVar[bool] = True
    shape: Shape  # of the openings
    ring: Ring
    digit: Bits
    count: Count

    def validate(self) -> None:
        _check_row(self.shape)
        if not 1 <= self.digit <= 8 or max(self.shape[-1], self.count) > self._places:
            raise ValueError(f"{self.count} ranks of {self.shape[-1]} entries in {self.digit} bits")

    @property
    def _places(self) -> int:
        return 1 << self.digit

    @property
    def operand_ring(self) -> int:
        return min(self.ring, self.digit)

    @property
    def out(self) -> Wire:
        return Wire((*self.shape[:-1], self.count), self.ring)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return self.out.shape

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        for operand, bits in zip(operands, (self.digit, self.ring), strict=False):
            if operand.out.bits < bits:
                raise ValueError(f"it needs a ring of {bits} bits, an operand has {operand.out.bits}")

    def _vectors(self, *names: str) -> tuple[Draw, ...]:
        return tuple(Draw(name, (count(self.shape), self._places), self.ring, derived=True) for name in names)

    def _dealt_bytes(self, vectors: int) -> int:
        return vectors * bytes_of((count(self.shape), self._places), self.ring)

    def _units(self, mask: Tensor) -> Rows:
        """Return the unit vectors of the masks of ranks."""
        place = mask.reshape(-1) & (self._places - 1)
        return Rows(torch.eye(self._places, dtype=torch.int64), place)

    def _places_of(self, opened: Tensor) -> Tensor:
        """Return the place of each rank in an entry's unit vector: (entries, count)."""
        return (opened.reshape(-1, 1) - torch.arange(self.count, device=opened.device)) & (self._places - 1)

    def _summed(self, found: Tensor) -> Tensor:
        """Sum (entries, count) over the entries of each row."""
        return found.reshape(*self.shape, self.count).sum(-2)

    def _is(self, ranks: Tensor) -> Tensor:
        """Return [rank = t] for t < count, of plain ranks: (entries, count)."""
        wanted = torch.arange(self.count, device=ranks.device)
        return ((ranks.reshape(-1, 1) & (self._places - 1)) == wanted).to(torch.int64)


@dataclass(frozen=True)
class Placed(_ByRank):
    """[x of rank 0], ..., [x of rank count - 1] of each row, from an opening of its ranks and one of x.

    Ranks are residues modulo 2^digit. The result has the shape (*shape[:-1], count).
    Rounds 0; offline 2 2^digit ring / 8 bytes an entry to the server. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "placed"
    reads: ClassVar[tuple[str, ...]] = ("opening", "opening")

    @property
    def draws(self) -> tuple[Draw, ...]:
        return self._vectors("units", "masked")

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        rho, r = operands
        units = self._units(rho)
        return {"units": units, "masked": units.table[units.row] * r.reshape(-1, 1)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        (ranks, _), (z, _) = operands
        at = self._places_of(ranks)
        found = material["units"].gather(1, at) * z.reshape(-1, 1) - material["masked"].gather(1, at)
        return self._summed(found)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        ranks, x = operands
        return self._summed(self._is(ranks) * x.reshape(-1, 1))

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=self._dealt_bytes(2))


@dataclass(frozen=True)
class PlacedPositions(_ByRank):
    """[position of the entry of rank 0], ..., [of rank count - 1] of each row, from an opening of its ranks.

    ``shape`` is (..., groups, n): the entries of a row of groups n have the positions ``first``, ``first`` + 1, ....
    Rounds 0; offline 2^digit ring / 8 bytes an entry to the server. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "placed_positions"
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    first: Whole

    def validate(self) -> None:
        super().validate()
        if len(self.shape) < 2:
            raise ValueError(f"no groups of rows in the shape {self.shape}")

    @property
    def draws(self) -> tuple[Draw, ...]:
        return self._vectors("units")

    def _positions(self, device: torch.device) -> Tensor:
        """Return the position of every entry: (entries, 1)."""
        groups = torch.arange(self.first, self.first + count(self.shape[-2:]), device=device)
        return groups.reshape(self.shape[-2:]).expand(self.shape).reshape(-1, 1)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {"units": self._units(operands[0])}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((ranks, _),) = operands
        found = material["units"].gather(1, self._places_of(ranks))
        return self._summed(found * self._positions(found.device))

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        (ranks,) = operands
        return self._summed(self._is(ranks) * self._positions(ranks.device))

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=self._dealt_bytes(1))


def _check_row(shape: Shape) -> None:
    if not shape or not 2 <= shape[-1] <= MOST_RANKED:
        raise ValueError(f"a row of {shape[-1:]} entries, 2 to {MOST_RANKED} are ranked")
