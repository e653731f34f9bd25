"""One number that tells whether all of many secret bits are one, and nothing else: the end of checks of ranges.

A check gives one bit an element, [the value lies where its ring or its table holds it], as an XOR share. Nobody may see
these bits. They are folded in three steps:
1. ``Unmet``: 64 parities of the bits that are zero. Parities are linear, so each party computes its share alone. If all
   bits are one, all parities are zero. Otherwise each of them is one or zero by public coefficients that look random.
2. These 64 bits are opened under a mask m (``OpenBits``): both parties know c = w XOR m.
3. ``Alarm``: y = sum_b rho_b w_b modulo 2^64, with uniform rho_b that nobody knows. As w_b = c_b + m_b - 2 c_b m_b, it
   is linear in rho_b and rho_b m_b, of which the dealer gives shares.
y is zero if all w_b are, and uniform otherwise, as one of the rho_b then is a summand. So whoever learns y learns one
bit. Its share of y tells a party nothing.

A violation is missed if the coefficients of all violated bits cancel in all 64 parities, or if y happens to be zero.
The latter has probability 2^-64. The former depends on which bits are violated, not on a query's randomness; for
coefficients as random as they look it has probability 2^-64 too.
Seen by a party: c, uniform because its peer's share of m is. By the server also its corrections, masked by the client's
shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from protocols import bits, kernels
from protocols.fields import Operands, Shape
from protocols.protocol import SERVER, CircuitCost, Draw, Local, Material, Protocol, Silent, Weights, bytes_of
from protocols.ring import WORD
from protocols.wire import Wire

PARITIES = 64


@dataclass(frozen=True)
class Unmet(Local):
    """64 parities of the zeros among bits, one plane of shape (1, 8): all zero if every bit is one.

    sizes: the number of bits of each operand, a single plane. Rounds 0; nothing is sent, nothing dealt. Exact.
    """

    kind: ClassVar[str] = "unmet"
    reads: ClassVar[tuple[str, ...]] = ("bits", "...")
    gives: ClassVar[str] = "bits"
    sizes: Operands

    @property
    def out(self) -> Wire:
        return Wire((1, PARITIES // 8), planes=True)

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        if len(operands) != len(self.sizes):
            raise ValueError(f"{len(operands)} planes of bits and {len(self.sizes)} sizes")

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        for shape, size in zip(operands, self.sizes, strict=True):
            if shape != (1, bits.plane_bytes(size)):
                raise ValueError(f"a plane of {size} bits has another shape than {shape}")
        return self.out.shape

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return kernels.parities(operands, self.sizes, zeros=party == SERVER).reshape(self.out.shape)

    def repeated(self) -> int:
        return sum(self.sizes) // 8  # a bit takes about an eighth of what an element of a pass does


@dataclass(frozen=True)
class Alarm(Silent):
    """[y] modulo 2^64, of shape (1,): zero if the 64 bits of an opening are all zero, and uniform if one is not.

    Rounds 0; offline 64 * 8 bytes to the server. Error: a bit that is one is missed with probability 2^-64.
    """

    kind: ClassVar[str] = "alarm"
    reads: ClassVar[tuple[str, ...]] = ("bit opening",)
    error: ClassVar[str] = "zero for zeros, and uniform otherwise"

    @property
    def out(self) -> Wire:
        return Wire((1,), WORD)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("rho", (PARITIES,)), Draw("rho_m", (PARITIES,), derived=True))

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if operands[0] != (1, PARITIES // 8):
            raise ValueError(f"it reads {PARITIES} bits, its operand has the shape {operands[0]}")
        return self.out.shape

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (m,) = operands
        return {"rho_m": masks["rho"] * bits.unpack(m[0], (PARITIES,))}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((opened, _),) = operands
        c = bits.unpack(opened[0], (PARITIES,))
        return (c * material["rho"] + (1 - 2 * c) * material["rho_m"]).sum().reshape(1)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        w: Tensor = bits.unpack(operands[0][0], (PARITIES,))
        return w.sum().reshape(1)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of((PARITIES,), WORD))
