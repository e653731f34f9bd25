"""Products with weights that are shared among the three parties, or that are public.

Shared: x is opened (parties 0 and 1 know z = x + r, party 2 knows r), and W is held in replicated form. Parties 0 and 1
compute their parts of x W (see ``weights``). Party 2's part is u = -r (W_0 + W_2), which depends on no input: it sends
u - s to party 0 ahead, where s comes from its seed with party 1, and party 1 adds s.
Public: every party multiplies its own share.
Seen by party 0: u - s, which is uniform because s is used once. Parties 1 and 2 see nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from protocols.fields import Flag, Name, Ring, Shape
from protocols.local import Windowed
from protocols.protocol import (
    CircuitCost,
    Draw,
    Local,
    Material,
    Opening,
    Silent,
    Weights,
    bytes_of,
    count,
    weighted,
)
from protocols.wire import Wire


@dataclass(frozen=True)
class OpenedPatches(Windowed, Silent):
    """The opening of the patches of x, from an opening of x. Rounds 0; nothing is sent, nothing dealt. Exact."""

    kind: ClassVar[str] = "opened_patches"
    in_programs: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    gives: ClassVar[str] = "opening"

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, self.window.patches(operands[0])

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        value, mask = operands[0]
        return Opening(self.window.patches(value), self.window.patches(mask))

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.window.patches(operands[0])


@dataclass(frozen=True)
class SharedLinear(Silent):
    """[x W] modulo 2^ring from an opening of x; ``diagonal``: the elementwise product with a vector.

    Rounds 0; ring / 8 bytes an output element from party 2 to party 0, ahead. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "shared_linear"
    weight_field: ClassVar[str] = "weight"
    in_programs: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    shape: Shape  # of the result
    ring: Ring
    weight: Name
    diagonal: Flag = False

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("u", self.shape, self.ring, derived=True),)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {"u": -weights.multiply(operands[0], self.weight, self.ring, diagonal=self.diagonal)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((value, mask),) = operands
        product = weights.opened_product(value, mask, self.weight, self.ring, diagonal=self.diagonal)
        return product + material["u"]

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return weights.multiply(operands[0], self.weight, self.ring, diagonal=self.diagonal)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of(self.shape, self.ring))

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return weighted(operands[0], self.weight, weights, diagonal=self.diagonal)

    def products(self, weights: Mapping[str, Shape], operands: Sequence[Shape]) -> int:
        """Count two products a party: one with the opened value, one with its mask."""
        return 0 if self.diagonal else 4 * count(self.shape) * weights[self.weight][0]


@dataclass(frozen=True)
class PublicLinear(Local):
    """[x W] modulo 2^ring for a W that all parties know. Rounds 0, bytes 0; exact modulo 2^ring."""

    kind: ClassVar[str] = "public_linear"
    weight_field: ClassVar[str] = "weight"
    in_programs: ClassVar[bool] = False
    shape: Shape  # of the result
    ring: Ring
    weight: Name
    diagonal: Flag = False

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return weights.multiply(operands[0], self.weight, self.ring, diagonal=self.diagonal)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return weighted(operands[0], self.weight, weights, diagonal=self.diagonal)

    def products(self, weights: Mapping[str, Shape], operands: Sequence[Shape]) -> int:
        return 0 if self.diagonal else 2 * count(self.shape) * weights[self.weight][0]
