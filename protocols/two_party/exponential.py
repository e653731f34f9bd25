"""e^-x of an opened secret x >= 0, without another round: e^-(z - r) = e^-z e^r, a public factor times a dealt one.

x in [0, 2^(k-1)) (units of 2^-f) is opened modulo 2^k as z = x + r. Over the integers x = z - rho, where rho is r if z
is in the upper half, and the signed representative of r if z is in the lower half: x has no top bit, so the top bits of
z and r determine the wrap (as in ``extension``). With H = 2^(k-1) and t = H - (z mod H), in (0, H]:
e^-x = e^(t 2^-f) * P, where P = e^((r - 2^k) 2^-f) for the upper half and e^((signed(r) - H) 2^-f) for the lower half.
The dealer gives shares of both P <= 1 with ``mask_fraction`` fraction bits, and each party picks one by z. Source of
the idea: additive shares of an exponent are multiplicative shares of the power (Kelkar et al., USENIX Security 2022).

Both parties must use the *same integer* for the public factor: their shares of P are uniform, so a difference of one
unit would make the sum random. Hence the factor comes from integer tables made with decimal arithmetic, never from
libm.
Seen by the server: its corrections of both P, masked by the client's shares.
"""

from __future__ import annotations

import decimal
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import ring
from protocols.fields import Bits, Ring, Shape
from protocols.protocol import CircuitCost, Draw, Material, Protocol, Step, Weights, bytes_of
from protocols.wire import Wire

_LOW = 10  # bits of the finer of the two tables
_COARSE, _FINE = 19, 20  # fraction bits of the tables: a product stays below 2^63 for exponents up to 16


@lru_cache(maxsize=16)
def _tables(half_bits: int, fraction: int) -> tuple[Tensor, Tensor]:
    """Return tables of rounded integers, the same on every machine, whose products give e^(t / 2^f).

    Coarse: e^(i 2^LOW / 2^f) for i = 0..2^(k-1-LOW). Fine: e^(j / 2^f) for j < 2^LOW.
    """
    with decimal.localcontext(prec=40):
        unit = decimal.Decimal(2) ** -fraction

        def row(count: int, step: int, bits: int) -> Tensor:
            scale = decimal.Decimal(2) ** bits
            return torch.tensor([int((unit * step * i).exp() * scale + decimal.Decimal("0.5")) for i in range(count)])

        low = min(_LOW, half_bits)
        return row((1 << (half_bits - low)) + 1, 1 << low, _COARSE), row(1 << low, 1, _FINE)


@dataclass(frozen=True)
class Exponential(Protocol):
    """[e^-x] modulo 2^64 with ``mask_fraction + public_fraction`` fraction bits, for 0 <= x < 2^(ring - 1 - fraction).

    That bound is at most 16. Rounds 0; offline 16 bytes an element to the server.
    Error: at most 2^-(public_fraction + 1) + e^16 2^-(mask_fraction + 1) + 2^-19 absolute (1.4e-5 for 16 and 40).
    """

    kind: ClassVar[str] = "exponential"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    error: ClassVar[str] = "absolute 2^-(public_fraction + 1) + e^16 2^-(mask_fraction + 1) + 2^-19"
    shape: Shape
    ring: Ring  # of the opening
    fraction: Bits
    mask_fraction: Bits
    public_fraction: Bits

    def __post_init__(self) -> None:
        if self.ring - 1 - self.fraction > 4:
            raise ValueError(f"an exponent below 16 is supported, the ring of {self.ring} bits allows more")
        scales = 0 <= self.fraction < self.ring and 0 < self.mask_fraction <= 40 and 0 < self.public_fraction <= 20
        if not (2 <= self.ring <= 26 and scales):
            raise ValueError(f"ring {self.ring}, scales {self.fraction}, {self.mask_fraction}, {self.public_fraction}")

    @property
    def out(self) -> Wire:
        return Wire(self.shape, ring.WORD)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("upper", self.shape, derived=True), Draw("lower", self.shape, derived=True))

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        unit, scale, half = 2.0**-self.fraction, 2.0**self.mask_fraction, 1 << (self.ring - 1)

        def power(exponent: Tensor) -> Tensor:
            return torch.round(torch.exp(exponent.to(torch.float64) * unit) * scale).to(torch.int64)

        upper = power(ring.reduce(r, self.ring) - 2 * half)
        lower = power(ring.signed(r, self.ring) - half)
        return {"upper": upper, "lower": lower}, None

    def _factor(self, z: Tensor) -> Tensor:
        half_bits = self.ring - 1
        low_bits = min(_LOW, half_bits)
        coarse, fine = (table.to(z.device) for table in _tables(half_bits, self.fraction))
        t = (1 << half_bits) - (z & ring.low_mask(half_bits))
        if z.is_meta:
            return t
        high, low = ring.right(t, low_bits), t & ring.low_mask(low_bits)
        excess = _COARSE + _FINE - self.public_fraction
        return ring.right(coarse[high] * fine[low] + (1 << (excess - 1)), excess)

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        ((z, _),) = operands
        upper = ring.top_bit(z, self.ring).bool()
        return self._factor(z) * torch.where(upper, material["upper"], material["lower"])
        yield

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        x = ring.reduce(operands[0], self.ring).to(torch.float64) * 2.0**-self.fraction
        return torch.round(torch.exp(-x) * 2.0 ** (self.mask_fraction + self.public_fraction)).to(torch.int64)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=2 * bytes_of(self.shape, ring.WORD))
