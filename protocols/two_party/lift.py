"""Open narrow, compute wide: elementwise products and polynomials of an opening in a ring wider than the opening's.

x in [-2^(k-2), 2^(k-2)) is opened modulo 2^k as z = x + r. Shifted by 2^(k-2), x' = x + 2^(k-2) lies in [0, 2^(k-1))
and z' = z + 2^(k-2) mod 2^k. Over the integers x' = z' - rho, where rho is r in [0, 2^k) if z' is in the upper half,
and the signed representative of r if z' is in the lower half:
- If r has no top bit, both are r, and x' + r < 2^k does not wrap.
- If r has its top bit, x' + r lies in [2^(k-1), 2^k + 2^(k-1)). Without a wrap z' is in the upper half and rho = r;
  with a wrap z' is in the lower half and rho = r - 2^k.
So the public top bit of z' chooses between two representatives of the mask, and the dealer knows both. Their low bits
agree, so that the dealer gives shares of a function of the upper one, and of the difference between the two functions:
f(upper) - f(lower) = 2^k d, where d takes k bits less than the result. Each party subtracts 2^k times its share of d
where z' is in the lower half, and everything else is as for a wide opening.

The lowest ``drop`` bits can be dropped: x is then read as (z' >> drop) - (rho >> drop) minus the shift. Both floors
lose less than a unit, so the result is off from x / 2^drop by less than one unit, either way; k - drop bits agree.

Seen by the server: its corrections, masked by the client's shares. No message is sent.
If x is out of range (|x| >= 2^(k-2)), the result is off by a multiple of 2^k, which checks of x notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from protocols import kernels, ring
from protocols.fields import Bits, Degree, Ring, Shape
from protocols.protocol import (
    SERVER,
    CircuitCost,
    Draw,
    Material,
    Protocol,
    Silent,
    Weights,
    broadcast,
    bytes_of,
    count,
)
from protocols.wire import Wire


class Lifted(NamedTuple):
    """An opening over the integers: x = value - rho, where ``mask`` is this party's share of rho in the wide ring.

    lower: -1 (int8) for elements of which rho is the lower of the two representatives, else 0. Public, like the value.
    To the dealer, the mask of a lifted opening is the pair of both representatives (upper, lower).
    """

    value: Tensor
    mask: Tensor
    lower: Tensor


@dataclass(frozen=True)
class Lift(Silent):
    """Lift an opening of |x| < 2^(ring-2) modulo 2^ring, or more, to one of x / 2^drop in a ring of ``wide`` bits.

    Rounds 0; offline wide / 8 + (wide - ring + drop) / 8 bytes an element to the server. Exact without
    ``drop``; with it, off by less than one unit of the result.
    """

    kind: ClassVar[str] = "lift"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    gives: ClassVar[str] = "lifted"
    error: ClassVar[str] = "below one unit in the last place; exact without drop"
    shape: Shape
    ring: Ring
    drop: Bits
    wide: Ring

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.wide)

    @property
    def agreed(self) -> int:
        """The low bits in which both representatives of the mask agree."""
        return self.ring - self.drop

    def validate(self) -> None:
        if not 2 <= self.ring - self.drop < self.wide:
            raise ValueError(f"from {self.ring} bits without the lowest {self.drop} to {self.wide}")

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (
            Draw("upper", self.shape, self.wide, derived=True),
            Draw("top", self.shape, self.wide - self.agreed, derived=True),
        )

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        upper = ring.drop_low(ring.reduce(r, self.ring), self.drop, self.ring)
        top = ring.top_bit(r, self.ring)
        return {"upper": upper, "top": top}, (upper, upper - ring.left(top, self.agreed))

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, _),) = operands
        value, lower = kernels.lifted(z, self.ring, self.drop)
        return Lifted(value, kernels.chosen(material["upper"], material["top"], lower, self.agreed), lower)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        half = 1 << (self.drop - 1) if self.drop else 0
        return ring.right(ring.signed(operands[0], self.ring) + half, self.drop)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of(self.shape, self.wide) + bytes_of(self.shape, self.wide - self.agreed))

    def memory(self) -> int:
        """Count the value, the mask, and a byte for the choice."""
        return 17 * count(self.shape)

    def stand_in(self) -> Any:
        value = torch.zeros(self.shape, dtype=torch.int64)
        return Lifted(value, value, value.to(torch.int8))


@dataclass(frozen=True)
class LiftedPowers(Silent):
    """Powers rho^2, ..., rho^degree of a lifted opening's mask, for ``Polynomial``; the result is that of ``Powers``.

    agreed: the low bits in which both representatives of the mask agree (``Lift.agreed``). Rounds 0; offline
    (degree - 1) (ring / 8 + (ring - agreed) / 8) bytes an element to the server. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "lifted_powers"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("lifted",)
    gives: ClassVar[str] = "powers"
    shape: Shape
    ring: Ring
    agreed: Bits
    degree: Degree

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def validate(self) -> None:
        if not self.agreed < self.ring:
            raise ValueError(f"{self.agreed} bits agree in a ring of {self.ring}")

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        _check_agreed(operands[0], self.agreed)

    @property
    def draws(self) -> tuple[Draw, ...]:
        difference = self.ring - self.agreed
        return tuple(
            draw
            for i in range(2, self.degree + 1)
            for draw in (
                Draw(f"r{i}", self.shape, self.ring, derived=True),
                Draw(f"d{i}", self.shape, difference, derived=True),
            )
        )

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        ((upper, lower),) = operands
        out, high, low = {}, upper, lower
        for i in range(2, self.degree + 1):
            high, low = high * upper, low * lower
            out[f"r{i}"], out[f"d{i}"] = high, ring.right(high - low, self.agreed)
        return out, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((value, mask, lower),) = operands
        higher = (
            kernels.chosen(material[f"r{i}"], material[f"d{i}"], lower, self.agreed) for i in range(2, self.degree + 1)
        )
        return value, (mask, *higher)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0]

    def cost(self) -> CircuitCost:
        each = bytes_of(self.shape, self.ring) + bytes_of(self.shape, self.ring - self.agreed)
        return CircuitCost(dealt=(self.degree - 1) * each)

    def memory(self) -> int:
        """Count the opening's value and one mask for each power."""
        return (1 + self.degree) * super().memory()

    def stand_in(self) -> Any:
        value = super().stand_in()
        return value, (value,) * self.degree


@dataclass(frozen=True)
class LiftedProduct(Silent):
    """[x y] modulo 2^ring, elementwise with broadcasting, of lifted openings, or of one and an opening.

    agreed_x, agreed_y: the low bits in which both representatives of an operand's mask agree (``Lift.agreed``). An
    operand of which all bits of the ring agree, so that this is at least ``ring``, is an opening in that ring. The
    result is computed as in ``product``; as rho_x = upper_x - 2^k top_x for a lower representative, the dealer gives
    shares of the products of upper_x or top_x with upper_y or top_y, the latter in narrower rings.
    Rounds 0; offline, for a = agreed_x and b = agreed_y, w / 8 bytes an output element to the server for each w
    among ring, ring - a, ring - b and ring - a - b that is positive. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "lifted_product"
    shape: Shape  # of the result
    ring: Ring
    agreed_x: Bits
    agreed_y: Bits

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def operand_kinds(self) -> tuple[str, ...]:
        return tuple("lifted" if agreed < self.ring else "opening" for agreed in (self.agreed_x, self.agreed_y))

    def validate(self) -> None:
        if min(self.agreed_x, self.agreed_y) >= self.ring:
            raise ValueError(f"neither operand is lifted to {self.ring} bits: that is a product")

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        for operand, agreed in zip(operands, (self.agreed_x, self.agreed_y), strict=True):
            _check_agreed(operand, agreed)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return broadcast(*operands)

    @property
    def _terms(self) -> tuple[tuple[str, int], ...]:
        """The dealt products of masks, and the bits of the ring of each."""
        terms = (
            ("rr", 0),
            ("tr", self.agreed_x),
            ("rt", self.agreed_y),
            ("tt", self.agreed_x + self.agreed_y),
        )
        return tuple((name, self.ring - known) for name, known in terms if known < self.ring)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return tuple(Draw(name, self.shape, bits, derived=True) for name, bits in self._terms)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (ux, tx), (uy, ty) = (
            (operand[0], ring.right(operand[0] - operand[1], agreed)) if isinstance(operand, tuple) else (operand, None)
            for operand, agreed in zip(operands, (self.agreed_x, self.agreed_y), strict=True)
        )
        factors = {"rr": (ux, uy), "tr": (tx, uy), "rt": (ux, ty), "tt": (tx, ty)}
        return {name: factors[name][0] * factors[name][1] for name, _ in self._terms}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x, y) = operands

        def of_y(name: str, of_top: str) -> Tensor:
            """Return shares of the product of a factor with the mask of x that was chosen."""
            share = material[name]
            if not isinstance(x, Lifted) or of_top not in material:
                return share
            return kernels.chosen(share, material[of_top], x.lower.expand(self.shape), self.agreed_x)

        rr = of_y("rr", "tr")
        if isinstance(y, Lifted):
            rr = kernels.chosen(rr, of_y("rt", "tt"), y.lower.expand(self.shape), self.agreed_y)
        # z_x (z_y - r_y) - r_x z_y, where only the server adds z_x z_y
        return x.value * (y.value - y.mask if party == SERVER else -y.mask) - x.mask * y.value + rr

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        x, y = operands
        return x * y

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=sum(bytes_of(self.shape, bits) for _, bits in self._terms))


def _check_agreed(operand: Protocol, agreed: int) -> None:
    if isinstance(operand, Lift) and operand.agreed != agreed:
        raise ValueError(f"representatives that agree in {operand.agreed} bits, read as if in {agreed}")
