"""Secret bits times numbers, local given openings: piecewise linear functions of an opened secret, bits to numbers.

Both parties know c = b XOR beta, and b = c + (1 - 2c) beta. For x = z - r,
b x = c x + (1 - 2c)(z beta - beta r), which is linear in shares of beta and beta r; the dealer gives these.
Seen by the server: its corrections of beta and beta r, masked by the client's shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from protocols import bits, kernels, ring
from protocols.fields import Count, Residues, Ring, Shape
from protocols.protocol import SERVER, CircuitCost, Draw, Material, Silent, Weights, bytes_of
from protocols.wire import Wire


@dataclass(frozen=True)
class Select(Silent):
    """[sum_s b_s (slopes[s] x + offsets[s])] modulo 2^ring, from one opening of the stacked bits b and one of x.

    Slopes and offsets are public integers. One bit with slope 1 is a selection. If all slopes are zero, x is not read,
    and this turns bits into numbers. For S bits of which T have a slope: rounds 0; offline (S + T) * ring / 8 bytes
    an element to the server. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "select"
    elementwise: ClassVar[bool] = True
    shape: Shape
    ring: Ring
    slopes: Residues
    offsets: Residues

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def operand_kinds(self) -> tuple[str, ...]:
        return ("bit opening", "opening") if self._sloped else ("bit opening",)

    @property
    def operand_ring(self) -> int:
        return self.ring if self._sloped else 0

    def validate(self) -> None:
        if len(self.slopes) != len(self.offsets):
            raise ValueError(f"{len(self.slopes)} slopes and {len(self.offsets)} offsets")
        if any(slope and ring.wrap(slope) == 0 for slope in self.slopes):
            raise ValueError("a slope that is a multiple of 2^64")

    @property
    def _sloped(self) -> list[int]:
        return [s for s, slope in enumerate(self.slopes) if slope]

    @property
    def draws(self) -> tuple[Draw, ...]:
        beta = Draw("beta", (len(self.slopes), *self.shape), self.ring, derived=True)
        if not self._sloped:
            return (beta,)
        return (beta, Draw("beta_r", (len(self._sloped), *self.shape), self.ring, derived=True))

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        beta = torch.stack([bits.unpack(plane, self.shape) for plane in operands[0]])
        if not self._sloped:
            return {"beta": beta}, None
        return {"beta": beta, "beta_r": beta[self._sloped] * operands[1]}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        planes, beta, server = operands[0].value, material["beta"], party == SERVER
        opened = None
        if self._sloped:
            z, r = operands[1]
            opened = (z, r, material["beta_r"])
        return kernels.select(planes, self.slopes, self.offsets, beta, opened, server=server)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if operands[0][0] != len(self.slopes):
            raise ValueError(f"it reads {len(self.slopes)} bits, its operand has {operands[0][0]}")
        return self.shape

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        total = torch.zeros(self.shape, dtype=torch.int64, device=operands[0].device)
        for plane, slope, offset in zip(operands[0], self.slopes, self.offsets, strict=True):
            value: Any = ring.wrap(offset)
            if slope:
                value = value + operands[1] * ring.wrap(slope)
            total = total + bits.unpack(plane, self.shape) * value
        return total

    def cost(self) -> CircuitCost:
        stacks = (len(self.slopes), len(self._sloped))
        return CircuitCost(dealt=sum(bytes_of((size, *self.shape), self.ring) for size in stacks))


@dataclass(frozen=True)
class SelectEach(Silent):
    """[sum_s b_s x_s] modulo 2^ring, from one opening of ``count`` stacked bits b and one of as many stacked x.

    Which piece of a function is taken, where each has a value of its own. Rounds 0; offline 2 * count * ring / 8 bytes
    an element to the server. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "select_each"
    reads: ClassVar[tuple[str, ...]] = ("bit opening", "opening")
    shape: Shape  # of the result; that of x has ``count`` before it
    ring: Ring
    count: Count

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def _stacked(self) -> Shape:
        return (self.count, *self.shape)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return tuple(Draw(name, self._stacked, self.ring, derived=True) for name in ("beta", "beta_r"))

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        planes, r = operands
        beta = torch.stack([bits.unpack(plane, self.shape) for plane in planes])
        return {"beta": beta, "beta_r": beta * r}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        (planes, _), (z, r) = operands
        return kernels.select_each(planes, material["beta"], material["beta_r"], z, r, server=party == SERVER)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        planes, x = operands
        if planes[0] != self.count or x != self._stacked:
            raise ValueError(f"it reads {self.count} bits and numbers of shape {self.shape}, got {planes}, {x}")
        return self.shape

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        planes, x = operands
        return (torch.stack([bits.unpack(plane, self.shape) for plane in planes]) * x).sum(0)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=2 * bytes_of(self._stacked, self.ring))
