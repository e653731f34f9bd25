"""Exact division by a power of two, rounded down, from one opening and a dealt table.

x is opened modulo 2^k as z = x + r. With high(v) = floor((v mod 2^k) / 2^s) and low(v) = v mod 2^s,
floor(x / 2^s) = high(z) - high(r) - [low(z) < low(r)] modulo 2^(k-s).
The last term is the borrow, which truncation by each party alone (``local.Truncate``) loses: that result depends on
shares, and may be one unit too high. Here z is public, and the dealer knows r. So it deals shares of the table of
high(r) + [v < low(r)] for all 2^s low parts v. Looking it up takes no message, and the result is a function of x alone.
Seen by the server: its corrections of the table, masked by the client's shares; both parties see nothing else.
Source: shifted tables, as in ``digits``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import ring
from protocols.fields import Bits, Ring, Shape
from protocols.protocol import SERVER, CircuitCost, Draw, Material, Silent, Weights, bytes_of, count
from protocols.wire import Wire

MOST_SHIFT = 12
"""The most bits that one table drops: 4,096 entries an element."""


@dataclass(frozen=True)
class Quotient(Silent):
    """[floor(x / 2^shift)] modulo 2^(ring - shift), from an opening of x modulo 2^ring.

    Rounds 0; offline 2^shift (ring - shift) / 8 bytes an element to the server. Exact for every x, read as signed.
    """

    kind: ClassVar[str] = "quotient"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    shape: Shape
    ring: Ring
    shift: Bits

    def validate(self) -> None:
        if not 1 <= self.shift < self.ring or self.shift > MOST_SHIFT:
            raise ValueError(f"a table that drops {self.shift} of {self.ring} bits")

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring - self.shift)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("table", self._table, self.ring - self.shift, derived=True),)

    @property
    def _table(self) -> Shape:
        return count(self.shape), 1 << self.shift

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return self.shape

    def _high(self, x: Tensor) -> Tensor:
        return ring.drop_low(x, self.shift, self.ring)

    def _low(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1) & ((1 << self.shift) - 1)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        borrows = torch.arange(1 << self.shift) < self._low(r)
        return {"table": self._high(r).reshape(-1, 1) + borrows}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, _),) = operands
        found = material["table"].gather(1, self._low(z)).reshape(self.shape)
        return self._high(z) - found if party == SERVER else -found

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self._high(operands[0])

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of(self._table, self.ring - self.shift))
