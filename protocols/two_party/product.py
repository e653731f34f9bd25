"""Products of opened secrets: elementwise, and batched matrix products for attention. Local, given openings.

With x = z_x - r_x and y = z_y - r_y, the product is x y = z_x z_y - z_x r_y - r_x z_y + r_x r_y. Both parties know z_x
and z_y, and the dealer gives shares of r_x r_y. A tensor is opened once, however many products read it (Turbospeedz,
ABY2.0; Beaver's triple is the case of one reader). The same opening as both operands gives a square.
Seen by the server: its correction of r_x r_y, masked by the client's share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from protocols.fields import Flag, Ring, Shape
from protocols.matmul import matmul
from protocols.protocol import (
    SERVER,
    CircuitCost,
    Draw,
    Material,
    Silent,
    Weights,
    broadcast,
    bytes_of,
    count,
    matrix_product,
)
from protocols.wire import Wire


@dataclass(frozen=True)
class Product(Silent):
    """[x y] modulo 2^ring, elementwise with broadcasting; with ``matrix``, [x @ y].

    Rounds 0; offline ring / 8 bytes an output element to the server. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "product"
    reads: ClassVar[tuple[str, ...]] = ("opening", "opening")
    shape: Shape  # of the result
    ring: Ring
    matrix: Flag = False

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("rr", self.shape, self.ring, derived=True),)

    def _times(self, a: Any, b: Any) -> Any:
        return matmul(a, b, self.ring) if self.matrix else a * b

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {"rr": self._times(*operands)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        (zx, rx), (zy, ry) = operands
        # z_x (z_y - r_y) - r_x z_y, where only the server adds z_x z_y
        return self._times(zx, zy - ry if party == SERVER else -ry) - self._times(rx, zy) + material["rr"]

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self._times(*operands)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of(self.shape, self.ring))

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return (matrix_product if self.matrix else broadcast)(*operands)

    def products(self, weights: Mapping[str, Shape], operands: Sequence[Shape]) -> int:
        """Count two matrix products a party."""
        return 4 * count(self.shape) * operands[0][-1] if self.matrix else 0
