"""e^-x of an opened secret x >= 0 in a factor that is public times one that is dealt: e^-(z - r) = e^-z e^r.

x in [0, 2^k - 2^s) is opened modulo 2^k as z = x + r, in units of 2^-f; H = 2^(s-f) is at most 16. The coarse digit j
of x (see ``digits``) is the number of the interval of width H, shifted by the mask, in which x lies. For the low s bits
of z and r, and t = H - z_low in (0, H]:

- j = 0: x = z_low - r_low, so e^-x = e^t P_0 with P_0 = e^(r_low - H) <= 1;
- j = 1: x = H + z_low - r_low, so e^-x = e^t P_1 with P_1 = e^(r_low - 2H) <= 1;
- j < n, for a number n of places that is a power of two: e^-x = e^t P_j with P_j = e^(r_low - (j + 1) H) <= 1;
- j >= n: x > (n - 1) H. If that is CLIP or more, e^-x is below 2^-17 there, and the result is 0: the exponential
  includes its own clip.

The public digit top(z) = top(r) + j tells j by its remainder modulo n. If there are more than n digits, the secret bit
b = [j < n] is opened before, as c = b XOR beta. The dealer gives shares of beta P_j, which is b P_j for c = 0, and of
(1 - beta) P_j, which is b P_j for c = 1. Two places of width 16 take the fewest dealt bytes. Narrower ones take fewer
fraction bits of P, as e^t is smaller, and leave so much more of the ring. Source of the idea: additive shares of an
exponent are multiplicative shares of the power (Kelkar et al., USENIX Security 2022).

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
from protocols.protocol import CircuitCost, Draw, Material, Silent, Weights, bytes_of
from protocols.wire import Wire

CLIP = 12
"""The least x that counts as so large that e^-x, 6.1e-6 or less, is 0."""

MOST_PLACES = 4  # bits of the number of an interval

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


def _powers(low: Tensor, shift: int, fraction: int, scale: int, places: int) -> Tensor:
    """Return P_0, P_1 and so on, one row each, rounded to ``scale`` fraction bits, for the low bits of masks."""
    ends = (torch.arange(places) + 1 << shift).reshape(-1, *[1] * low.dim())
    exponents = (low - ends).to(torch.float64) * 2.0**-fraction
    return torch.round(torch.exp(exponents) * 2.0**scale).to(torch.int64)


@lru_cache(maxsize=2)  # 8 places 2^shift bytes each
def _mask_powers(shift: int, fraction: int, scale: int, places: int) -> Tensor:
    """Return ``_powers`` of all masks."""
    return _powers(torch.arange(1 << shift), shift, fraction, scale, places)


@dataclass(frozen=True)
class Exponential(Silent):
    """[e^-x] modulo 2^64 with ``mask_fraction + public_fraction`` fraction bits, for 0 <= x < 2^ring - 2^shift units.

    H = 2^(shift - fraction) <= 16, and there are n = 2^places places. If ring = shift + places, it reads the opening of
    x alone. If the ring is wider, it reads the opening of the bit [j < n] before (``DigitIn`` of the same ring and
    shift, count n), and the result is 0 where the bit is 0, which needs (n - 1) H >= CLIP. Rounds 0; offline 8 n bytes
    an element to the server, 16 n with the bit.
    Error: at most 2^-(public_fraction + 1) + e^H 2^-(mask_fraction + 1) + 2^-19 absolute (1.4e-5 for 16, 40 and
    H = 16), and e^-(n - 1) H where it is clipped.
    """

    kind: ClassVar[str] = "exponential"
    elementwise: ClassVar[bool] = True
    error: ClassVar[str] = "absolute 2^-(public_fraction + 1) + e^H 2^-(mask_fraction + 1) + 2^-19, and its clip"
    shape: Shape
    ring: Ring  # of the opening
    shift: Bits
    fraction: Bits
    mask_fraction: Bits
    public_fraction: Bits
    places: Bits = 1

    def validate(self) -> None:
        if self.shift - self.fraction > 4:
            raise ValueError(f"intervals of at most 16 are supported, those of {self.shift} bits are wider")
        scales = 0 <= self.fraction <= self.shift and 0 < self.mask_fraction <= 40 and 0 < self.public_fraction <= 20
        places = 1 <= self.places <= MOST_PLACES and self.shift + self.places <= self.ring
        if not (1 <= self.shift <= 22 and scales and places):
            raise ValueError(
                f"ring {self.ring}, intervals of {self.shift} bits, scales {self.fraction}, {self.mask_fraction}, "
                f"{self.public_fraction}, 2^{self.places} places"
            )
        if self._clipped and ((self._count - 1) << self.shift) < CLIP << self.fraction:
            raise ValueError(f"{self._count} intervals of {self.shift} bits end below {CLIP}, too early for a clip")

    @property
    def _clipped(self) -> bool:
        return self.ring > self.shift + self.places

    @property
    def _count(self) -> int:
        """The places."""
        return 1 << self.places

    @property
    def _rows(self) -> int:
        """The factors that are dealt for an element."""
        return (2 if self._clipped else 1) << self.places

    @property
    def operand_kinds(self) -> tuple[str, ...]:
        return ("bit opening", "opening") if self._clipped else ("opening",)

    @property
    def out(self) -> Wire:
        return Wire(self.shape, ring.WORD)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("powers", (self._rows, *self.shape), derived=True),)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if self._clipped and operands[0][0] != 1:
            raise ValueError(f"it reads one bit an element, its operand has {operands[0][0]}")
        return self.shape

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        r = operands[-1]
        low, form = ring.reduce(r, self.shift), (self.shift, self.fraction, self.mask_fraction, self._count)
        if r.numel() > 1 << self.shift:
            powers = _mask_powers(*form).index_select(1, low.reshape(-1)).reshape(self._count, *low.shape)
        else:
            powers = _powers(low, *form)
        last = self._count - 1
        digits = torch.arange(self._count).reshape(-1, *[1] * r.dim())
        by_digit = powers.gather(0, (digits - ring.right(r, self.shift)) & last)
        if not self._clipped:
            return {"powers": by_digit}, None
        beta = bits.unpack(operands[0][0], self.shape)
        return {"powers": torch.cat([by_digit * beta, by_digit * (1 - beta)])}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        z, _ = operands[-1]
        chosen = operands[0].value[0] if self._clipped else None
        coarse, fine = _tables(self.shift, self.fraction)
        excess = _COARSE + _FINE - self.public_fraction
        return kernels.exponential(z, chosen, material["powers"], coarse, fine, self.shift, excess, self.places)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        x = ring.reduce(operands[-1], self.ring).to(torch.float64) * 2.0**-self.fraction
        e = torch.round(torch.exp(-x) * 2.0 ** (self.mask_fraction + self.public_fraction)).to(torch.int64)
        return e * bits.unpack(operands[0][0], self.shape) if self._clipped else e

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=self._rows * bytes_of(self.shape, ring.WORD))
