"""Extend shares from Z_2^k to a wider ring Z_2^K, exactly.

x lies in [-2^(k-2), 2^(k-2)), so x' = x + 2^(k-2) lies in [0, 2^(k-1)): its top bit is zero. Over the integers,
x' = x'_S + x'_C - w 2^k, and the wrap w is a OR b for a = msb(x'_S), b = msb(x'_C): if both are zero, the sum is below
2^k; if both are one, it is not; if exactly one of them is one, the sum can only be x' + 2^k, because x' itself has no
top bit (Cheetah and SIRNN use the same fact under the name "known MSB"). a is the server's bit and b the client's, so
w = a + b - ab costs one product of private bits:
1. The server sends s = a XOR alpha, the client t = b XOR beta (alpha, beta each known to one party).
2. ab = (s XOR alpha)(t XOR beta), linear in alpha (server's), beta (client's) and alpha beta (dealt shares modulo
   2^(K-k)).
Seen by a party: one bit an element under the peer's one-time mask; by the server also its correction of alpha beta,
masked by the client's share.
If x is out of range (|x| >= 2^(k-2)), the result may be off by 2^k, and it is out of range too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from protocols import bits, kernels, ring
from protocols.fields import Ring, Shape
from protocols.protocol import (
    CLIENT,
    SERVER,
    CircuitCost,
    Draw,
    Material,
    Protocol,
    Step,
    Weights,
    bytes_of,
    plane_shape,
    swap,
)
from protocols.wire import Wire


@dataclass(frozen=True)
class Extend(Protocol):
    """Extend [x] modulo 2^ring to [x] modulo 2^wide, for |x| < 2^(ring-2); exact.

    Rounds 1; one bit an element each way; offline (wide - ring) / 8 bytes an element to the server.
    """

    kind: ClassVar[str] = "extend"
    elementwise: ClassVar[bool] = True
    shape: Shape
    ring: Ring
    wide: Ring

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.wide)

    def validate(self) -> None:
        if not 2 <= self.ring < self.wide <= ring.WORD:
            raise ValueError(f"from {self.ring} to {self.wide} bits")

    @property
    def draws(self) -> tuple[Draw, ...]:
        plane = plane_shape(self.shape)[1:]
        return (
            Draw("alpha", plane, planes=True, holder=SERVER),
            Draw("beta", plane, planes=True, holder=CLIENT),
            Draw("product", self.shape, self.wide - self.ring, derived=True),
        )

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {"product": bits.unpack(masks["alpha"] & masks["beta"], self.shape)}, None

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (x,) = operands
        client = party == CLIENT
        plane = kernels.bit_plane(x, 0 if client else 1 << (self.ring - 2), self.ring - 1)
        mine = plane ^ material["beta" if client else "alpha"]
        (theirs,) = yield swap(mine, Wire(plane_shape(self.shape)[1:], planes=True))
        # in step 2 the client's term is s b and the server's is t a - s t = t (a - s); both add their share of
        # alpha beta times (1 - 2s)(1 - 2t), whose sign depends on s XOR t alone
        return kernels.extended(x, mine, theirs, material["product"], self.ring, client=client)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return ring.signed(operands[0], self.ring)

    def cost(self) -> CircuitCost:
        size = plane_shape(self.shape)[1]
        return CircuitCost(1, size, size, bytes_of(self.shape, self.wide - self.ring))
