"""Unit vectors of secret positions, from one opening of them: the rows by which a table is looked up.

1. A position p < entries is opened modulo N = 2^digit >= entries as y = p + rho.
2. The dealer gives shares of the unit vector e of rho, which has N entries.
3. (``Units``) The entry of e at the public place y - j modulo N is [p = j], for each j < entries. No message is sent.
A linear layer multiplies the vector with a table of the server: the result is the row at the secret position.

Seen by a party: y, under a one-time mask as wide as the position; by the server also its correction, masked by the
client's share. Source: shifted unit vectors as in ``digits`` and ``ranking``; here they are the result itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols.fields import Bits, Ring, Shape, Whole
from protocols.protocol import CircuitCost, Draw, Material, Silent, Weights, bytes_of, count
from protocols.wire import Wire

MOST_DIGITS = 24
"""The most bits of a position: a vector of 16,777,216 entries."""


@dataclass(frozen=True)
class Units(Silent):
    """[unit vector of each position] modulo 2^ring, (*shape, entries), from an opening of positions, residues mod N.

    A position of ``entries`` or more gives a vector of zeros. Rounds 0; offline N ring / 8 bytes a position to the
    server, N = 2^digit. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "units"
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    shape: Shape  # of the positions
    ring: Ring
    digit: Bits
    entries: Whole

    def validate(self) -> None:
        if not 1 <= self.digit <= MOST_DIGITS or not 1 <= self.entries <= self._places:
            raise ValueError(f"unit vectors of {self.entries} entries at positions of {self.digit} bits")

    @property
    def _places(self) -> int:
        return 1 << self.digit

    @property
    def operand_ring(self) -> int:
        return self.digit

    @property
    def out(self) -> Wire:
        return Wire((*self.shape, self.entries), self.ring)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if operands[0] != self.shape:
            raise ValueError(f"it is made for the shape {self.shape}, its operand has {operands[0]}")
        return self.out.shape

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("units", (count(self.shape), self._places), self.ring, derived=True),)

    def _rows(self, places: Tensor, width: int) -> Tensor:
        """Return the unit vectors of plain places, residues modulo N: (places, width)."""
        at = places.reshape(-1, 1) & (self._places - 1)
        whole = torch.zeros((at.shape[0], self._places), dtype=torch.int64, device=at.device)
        return whole.scatter_(1, at, 1)[:, :width]

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {"units": self._rows(operands[0], self._places)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((y, _),) = operands
        at = (y.reshape(-1, 1) - torch.arange(self.entries, device=y.device)) & (self._places - 1)
        return material["units"].gather(1, at).reshape(self.out.shape)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self._rows(operands[0], self.entries).reshape(self.out.shape)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of((count(self.shape), self._places), self.ring))
