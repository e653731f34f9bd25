"""Open a secret under a fresh mask: one message, after which everything that multiplies the tensor is local.

[x] is shared in Z_2^k; the dealer knows r = r_S + r_C (each party draws its summand from its own stream).
1. Each party sends x_p + r_p.  2. Both know z = x + r mod 2^k.
All readers of x (products, powers, selections, exponentials, the first step of comparisons) are then local, given
correlations of r.
Seen by a party: its peer's x_p + r_p, uniform because the peer's r_p is uniform and used in this opening alone.

Openings add up: z_a - z_b is an opening of a - b under the mask r_a - r_b (``OpenedSum``). It is a function of what was
opened before, so nobody sees anything new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from protocols import kernels, ring
from protocols.fields import Count, Residue, Ring, Shape, Signs
from protocols.protocol import (
    CircuitCost,
    Draw,
    Material,
    Opening,
    Protocol,
    Silent,
    Step,
    Weights,
    broadcast,
    bytes_of,
    plane_shape,
    swap,
)
from protocols.wire import Wire


@dataclass(frozen=True)
class Open(Protocol):
    """Open z = x + r modulo 2^ring. Rounds 1; ring / 8 bytes an element each way; nothing offline. Exact."""

    kind: ClassVar[str] = "open"
    elementwise: ClassVar[bool] = True
    gives: ClassVar[str] = "opening"
    shape: Shape
    ring: Ring

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("r", self.shape, self.ring),)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, masks["r"]

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (x,) = operands
        mine = x + material["r"]
        (theirs,) = yield swap(mine, self.out)
        return Opening(kernels.opened(mine, theirs, self.ring), material["r"])

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return ring.reduce(operands[0], self.ring)

    def cost(self) -> CircuitCost:
        size = bytes_of(self.shape, self.ring)
        return CircuitCost(1, size, size)


@dataclass(frozen=True)
class OpenedSum(Silent):
    """The opening of sum_i +-x_i + constant, broadcast, from openings of the x_i modulo 2^ring or wider.

    minus: for each operand, True if it is subtracted. Rounds 0; nothing is sent, nothing dealt. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "opened_sum"
    reads: ClassVar[tuple[str, ...]] = ("opening", "...")
    gives: ClassVar[str] = "opening"
    shape: Shape
    ring: Ring
    minus: Signs
    constant: Residue

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        if len(operands) != len(self.minus):
            raise ValueError(f"{len(operands)} openings and {len(self.minus)} signs")

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        out: Shape = ()
        for shape in operands:
            out = broadcast(out, shape)
        return out

    def _sum(self, parts: Sequence[Any]) -> Any:
        first, *rest = (-x if minus else x for x, minus in zip(parts, self.minus, strict=True))
        for x in rest:
            first = first + x
        return first

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, self._sum(operands).expand(self.shape)

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        value = self._sum([z for z, _ in operands]) + ring.wrap(self.constant)
        return Opening(ring.reduce(value, self.ring), self._sum([r for _, r in operands]))

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return ring.reduce(self._sum(operands) + ring.wrap(self.constant), self.ring)


@dataclass(frozen=True)
class OpenBits(Protocol):
    """Open c = b XOR beta for ``planes`` stacked bits of each element.

    Rounds 1; ``planes`` bits an element each way; nothing offline. Exact.
    """

    kind: ClassVar[str] = "open_bits"
    reads: ClassVar[tuple[str, ...]] = ("bits",)
    gives: ClassVar[str] = "bit opening"
    shape: Shape  # of the tensor whose bits these are
    planes: Count

    @property
    def out(self) -> Wire:
        return Wire(plane_shape(self.shape, self.planes), planes=True)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("beta", self.out.shape, planes=True),)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, masks["beta"]

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (b,) = operands
        mine = b ^ material["beta"]
        (theirs,) = yield swap(mine, self.out)
        return Opening(mine ^ theirs, material["beta"])

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0]

    def cost(self) -> CircuitCost:
        size = self.out.size
        return CircuitCost(1, size, size)
