"""e^-x of an opened secret x >= 0 in a factor that is public times one that is dealt: e^-(z - r) = e^-z e^r.

x in [0, 2^k - 2^s) is opened modulo 2^k as z = x + r, in units of 2^-f; H = 2^(s-f) is at most 16. The coarse digit j
of x (see ``digits``) is the number of the interval of width H, shifted by the mask, in which x lies. For the low s bits
of z and r, and t = H - z_low in (0, H]:

- j = 0: x = z_low - r_low, so e^-x = e^t P_0 with P_0 = e^(r_low - H) <= 1;
- j = 1: x = H + z_low - r_low, so e^-x = e^t P_1 with P_1 = e^(r_low - 2H) <= 1;
- j > 1: x > H. If H = 16, e^-x is below 2^-23 there, and the result is 0: the exponential includes its own clip.

The public digit top(z) = top(r) + j tells j = 0 from j = 1 by its parity. If there are more than two digits, the
secret bit b = [j < 2] is opened before, as c = b XOR beta. The dealer gives shares of beta P_j, which is b P_j for
c = 0, and of (1 - beta) P_j, which is b P_j for c = 1. Source of the idea: additive shares of an exponent are
multiplicative shares of the power (Kelkar et al., USENIX Security 2022).

Both parties must use the *same integer* for the public factor: their shares of P are uniform, so a difference of one
unit would make the sum random. Hence the factor comes from integer tables made with decimal arithmetic, never from
libm.
Seen by the server: its corrections of all P, masked by the client's shares.
"""

from __future__ import annotations

import decimal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import bits, kernels, ring
from protocols.fields import Bits, Ring, Shape
from protocols.protocol import CircuitCost, Draw, Material, Protocol, Step, Weights, bytes_of
from protocols.wire import Wire

_LOW = 10  # bits of the finer of the two tables
_COARSE, _FINE = 19, 20  # fraction bits of the tables: a product stays below 2^63 for exponents up to 16


@cache  # there are few, see ``Exponential.validate``
def _tables(width: int, fraction: int) -> tuple[Tensor, Tensor]:
    """Return tables of rounded integers, the same on every machine, whose products give e^(t / 2^f) for t <= 2^width.

    Coarse: e^(i 2^LOW / 2^f) for i = 0..2^(width-LOW). Fine: e^(j / 2^f) for j < 2^LOW.
    """
    with decimal.localcontext(prec=40):
        unit = decimal.Decimal(2) ** -fraction

        def row(count: int, step: int, scale_bits: int) -> Tensor:
            scale = decimal.Decimal(2) ** scale_bits
            return torch.tensor([int((unit * step * i).exp() * scale + decimal.Decimal("0.5")) for i in range(count)])

        low = min(_LOW, width)
        return row((1 << (width - low)) + 1, 1 << low, _COARSE), row(1 << low, 1, _FINE)


def _powers(low: Tensor, shift: int, fraction: int, scale: int) -> tuple[Tensor, Tensor]:
    """Return P_0 and P_1, rounded to ``scale`` fraction bits, for the low bits of masks."""
    width = 1 << shift
    exponents = ((low - places * width).to(torch.float64) * 2.0**-fraction for places in (1, 2))
    first, second = (torch.round(torch.exp(exponent) * 2.0**scale).to(torch.int64) for exponent in exponents)
    return first, second


@lru_cache(maxsize=2)  # 2^(shift + 4) bytes each
def _mask_powers(shift: int, fraction: int, scale: int) -> tuple[Tensor, Tensor]:
    """Return ``_powers`` of all masks."""
    return _powers(torch.arange(1 << shift), shift, fraction, scale)


@dataclass(frozen=True)
class Exponential(Protocol):
    """[e^-x] modulo 2^64 with ``mask_fraction + public_fraction`` fraction bits, for 0 <= x < 2^ring - 2^shift units.

    H = 2^(shift - fraction) <= 16. If ring = shift + 1, it reads the opening of x alone. If the ring is wider, it reads
    the opening of the bit [j < 2] before (``DigitIn`` of the same ring and shift, count 2), and the result is 0 where
    the bit is 0, which needs H = 16. Rounds 0; offline 16 bytes an element to the server, 32 with the bit.
    Error: at most 2^-(public_fraction + 1) + e^16 2^-(mask_fraction + 1) + 2^-19 absolute (1.4e-5 for 16 and 40).
    """

    kind: ClassVar[str] = "exponential"
    elementwise: ClassVar[bool] = True
    error: ClassVar[str] = "absolute 2^-(public_fraction + 1) + e^16 2^-(mask_fraction + 1) + 2^-19"
    shape: Shape
    ring: Ring  # of the opening
    shift: Bits
    fraction: Bits
    mask_fraction: Bits
    public_fraction: Bits

    def validate(self) -> None:
        if self.shift - self.fraction > 4:
            raise ValueError(f"intervals of at most 16 are supported, those of {self.shift} bits are wider")
        scales = 0 <= self.fraction <= self.shift and 0 < self.mask_fraction <= 40 and 0 < self.public_fraction <= 20
        if not (1 <= self.shift < self.ring and self.shift <= 22 and scales):
            raise ValueError(
                f"ring {self.ring}, intervals of {self.shift} bits, scales {self.fraction}, {self.mask_fraction}, "
                f"{self.public_fraction}"
            )
        if self._clipped and self.shift - self.fraction != 4:
            raise ValueError("only intervals of 16 are wide enough to be clipped after two of them")

    @property
    def _clipped(self) -> bool:
        return self.ring > self.shift + 1

    @property
    def operand_kinds(self) -> tuple[str, ...]:
        return ("bit opening", "opening") if self._clipped else ("opening",)

    @property
    def out(self) -> Wire:
        return Wire(self.shape, ring.WORD)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("powers", (4 if self._clipped else 2, *self.shape), derived=True),)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if self._clipped and operands[0][0] != 1:
            raise ValueError(f"it reads one bit an element, its operand has {operands[0][0]}")
        return self.shape

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        r = operands[-1]
        low, odd = ring.reduce(r, self.shift), (ring.right(r, self.shift) & 1).bool()
        if r.numel() > 1 << self.shift:
            tables = _mask_powers(self.shift, self.fraction, self.mask_fraction)
            first, second = (table.index_select(0, low.reshape(-1)).reshape(low.shape) for table in tables)
        else:
            first, second = _powers(low, self.shift, self.fraction, self.mask_fraction)
        by_parity = torch.stack([torch.where(odd, second, first), torch.where(odd, first, second)])
        if not self._clipped:
            return {"powers": by_parity}, None
        beta = bits.unpack(operands[0][0], self.shape)
        return {"powers": torch.cat([by_parity * beta, by_parity * (1 - beta)])}, None

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        z, _ = operands[-1]
        chosen = operands[0].value[0] if self._clipped else None
        coarse, fine = _tables(self.shift, self.fraction)
        excess = _COARSE + _FINE - self.public_fraction
        return kernels.exponential(z, chosen, material["powers"], coarse, fine, self.shift, excess)
        yield

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        x = ring.reduce(operands[-1], self.ring).to(torch.float64) * 2.0**-self.fraction
        e = torch.round(torch.exp(-x) * 2.0 ** (self.mask_fraction + self.public_fraction)).to(torch.int64)
        return e * bits.unpack(operands[0][0], self.shape) if self._clipped else e

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=(4 if self._clipped else 2) * bytes_of(self.shape, ring.WORD))
