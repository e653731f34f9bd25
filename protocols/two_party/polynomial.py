"""Polynomials with public coefficients of one opened secret: a single opening gives all powers, without another round.

x = z - r; with a public centre a and v = z - a, sum_j C_j (x - a)^j = sum_i r^i (-1)^i sum_{j>=i} C_j binom(j, i)
v^(j-i). This is linear in the powers of r, of which the dealer gives shares (r itself is the opening's mask). All
arithmetic is on integers modulo 2^ring: the caller chooses scales so that the true value fits. If it does not fit
(outside of a segment), the result is junk, which a selection must discard.
Seen by the server: its corrections of r^2, ..., r^d, masked by the client's shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from protocols import kernels, ring
from protocols.fields import ENTRIES, Bits, Degree, Residue, ResidueRows, Residues, Ring, Shape
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
from protocols.two_party.lift import Lift, LiftedPowers
from protocols.wire import Wire

PASS = 1000
"""The elements that take as long as it takes to begin a pass over a tensor."""


@dataclass(frozen=True)
class Powers(Silent):
    """Shares of r^2, ..., r^degree of an opening's mask, so that any polynomial of that degree is local.

    Rounds 0; offline (degree - 1) * ring / 8 bytes an element to the server. The result is (z, (r, r^2, ...)).
    """

    kind: ClassVar[str] = "powers"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    gives: ClassVar[str] = "powers"
    shape: Shape
    ring: Ring
    degree: Degree

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return tuple(Draw(f"r{i}", self.shape, self.ring, derived=True) for i in range(2, self.degree + 1))

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        out, power = {}, r
        for i in range(2, self.degree + 1):
            power = power * r
            out[f"r{i}"] = power
        return out, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, r),) = operands
        return z, (r, *(material[f"r{i}"] for i in range(2, self.degree + 1)))

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0]

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=(self.degree - 1) * bytes_of(self.shape, self.ring))

    def memory(self) -> int:
        """Count the opening's value and one mask for each power."""
        return (1 + self.degree) * super().memory()

    def stand_in(self) -> Any:
        value = super().stand_in()
        return value, (value,) * self.degree


@dataclass(frozen=True)
class Polynomial(Silent):
    """[sum_j coefficients[j] (x - centre)^j] modulo 2^ring, from ``Powers`` or ``LiftedPowers`` of x.

    Rounds 0, bytes 0; exact modulo 2^ring.
    """

    kind: ClassVar[str] = "polynomial"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("powers",)
    shape: Shape
    ring: Ring
    centre: Residue
    coefficients: Residues

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        (powers,) = operands
        if isinstance(powers, Powers | LiftedPowers) and powers.degree < len(self.coefficients) - 1:
            raise ValueError(f"degree {len(self.coefficients) - 1} of powers up to {powers.degree}")

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, powers),) = operands
        return kernels.polynomials(z, powers, (self.centre,), (self.coefficients,), party)[0]

    def repeated(self) -> int:
        return kernels.polynomial_passes((self.coefficients,)) * (count(self.shape) + PASS)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return _value(operands[0], self.centre, self.coefficients)


def _value(x: torch.Tensor, centre: int, coefficients: tuple[int, ...]) -> torch.Tensor:
    v, total = x - ring.wrap(centre), torch.zeros_like(x)
    for c in reversed(coefficients):
        total = total * v + ring.wrap(c)
    return total


@dataclass(frozen=True)
class Polynomials(Silent):
    """Several polynomials of one x, stacked: [sum_j coefficients[s][j] (x - centres[s])^j] modulo 2^ring for each s.

    What ``Polynomial`` computes, with one instruction for all pieces of a function. Rounds 0, bytes 0; exact.
    """

    kind: ClassVar[str] = "polynomials"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("powers",)
    shape: Shape  # of x
    ring: Ring
    centres: Residues
    coefficients: ResidueRows

    @property
    def out(self) -> Wire:
        return Wire((len(self.centres), *self.shape), self.ring)

    def validate(self) -> None:
        if len(self.centres) != len(self.coefficients):
            raise ValueError(f"{len(self.centres)} centres of {len(self.coefficients)} polynomials")
        if (terms := sum(map(len, self.coefficients))) > ENTRIES:
            raise ValueError(f"polynomials of {terms} terms, at most {ENTRIES}")

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        (powers,), degree = operands, max(map(len, self.coefficients)) - 1
        if isinstance(powers, Powers | LiftedPowers) and powers.degree < degree:
            raise ValueError(f"degree {degree} of powers up to {powers.degree}")

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, powers),) = operands
        return kernels.polynomials(z, powers, self.centres, self.coefficients, party)

    def repeated(self) -> int:
        return kernels.polynomial_passes(self.coefficients) * (count(self.shape) + PASS)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return torch.stack([_value(x, *own) for own in zip(self.centres, self.coefficients, strict=True)])


@dataclass(frozen=True)
class PolynomialProduct(Silent):
    """[y sum_j coefficients[j] (x - centre)^j] modulo 2^ring, with broadcasting, of lifted openings of x and of y.

    The polynomial need not be opened before it is multiplied. For y = w - s, x = z - r and v = z - centre, the product
    is sum_i (-1)^i B_i(v) (w r^i - r^i s) with the polynomials B_i = sum_{j>=i} C_j binom(j, i) v^(j-i), and the dealer
    gives shares of r^i s. r and s each are one of two representatives of a mask (``lift``), and the dealer gives shares
    of all four products. The operands are x, its ``LiftedPowers``, and y. agreed_x, agreed_y: see ``LiftedProduct``.
    Rounds 0; offline, for a = agreed_x and b = agreed_y, (len(coefficients) - 1) w / 8 bytes an output element to the
    server for each w among ring, ring - a, ring - b and ring - a - b that is positive. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "polynomial_product"
    reads: ClassVar[tuple[str, ...]] = ("lifted", "powers", "lifted")
    shape: Shape  # of the result
    ring: Ring
    agreed_x: Bits
    agreed_y: Bits
    centre: Residue
    coefficients: Residues

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def validate(self) -> None:
        if max(self.agreed_x, self.agreed_y) >= self.ring:
            raise ValueError(f"{self.agreed_x} and {self.agreed_y} bits agree in a ring of {self.ring}")
        if not self.degree:
            raise ValueError("a polynomial of degree zero")

    def check_operands(self, operands: Sequence[Protocol]) -> None:
        x, powers, y = operands
        for lift, agreed in ((x, self.agreed_x), (y, self.agreed_y)):
            if isinstance(lift, Lift) and lift.agreed != agreed:
                raise ValueError(f"representatives that agree in {lift.agreed} bits, read as if in {agreed}")
        if not isinstance(powers, LiftedPowers):
            raise ValueError(f"powers of an opening that is not lifted, of '{powers.kind}'")
        if powers.degree < self.degree or powers.agreed != self.agreed_x:
            raise ValueError(f"powers up to {powers.degree} whose representatives agree in {powers.agreed} bits")
        if powers.out.shape != x.out.shape:
            raise ValueError(f"powers of shape {powers.out.shape} of an opening of shape {x.out.shape}")

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return broadcast(operands[0], operands[2])

    @property
    def _terms(self) -> Iterator[tuple[str, int, int]]:
        """Each dealt product: its name, the power of the mask of x, and the bits of its ring."""
        for i in range(1, self.degree + 1):
            for name, known in (
                ("rr", 0),
                ("tr", self.agreed_x),
                ("rt", self.agreed_y),
                ("tt", self.agreed_x + self.agreed_y),
            ):
                if known < self.ring:
                    yield f"{name}{i}", i, self.ring - known

    @property
    def draws(self) -> tuple[Draw, ...]:
        return tuple(Draw(name, self.shape, bits, derived=True) for name, _, bits in self._terms)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (upper_x, lower_x), _, (upper_y, lower_y) = operands
        top_y = ring.right(upper_y - lower_y, self.agreed_y)
        powers, high, low = [(upper_x, upper_x)], upper_x, lower_x
        for _ in range(self.degree):
            powers.append((high, ring.right(high - low, self.agreed_x)))
            high, low = high * upper_x, low * lower_x

        def product(name: str, i: int) -> torch.Tensor:
            of_x, of_y = powers[i][name[0] == "t"], (upper_y, top_y)[name[1] == "t"]
            return torch.as_tensor(of_x * of_y)

        return {name: product(name, i) for name, i, _ in self._terms}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        x, (z, powers), y = operands
        of_x, of_y = x.lower.expand(self.shape), y.lower.expand(self.shape)

        def by_x(name: str, i: int) -> torch.Tensor:
            """Return shares of the product of the power that was chosen with a factor of y."""
            top = material.get(f"t{name}{i}")
            share = material[f"r{name}{i}"]
            return share if top is None else kernels.chosen(share, top, of_x, self.agreed_x)

        v = z - ring.wrap(self.centre)
        total = self._factor(v, 0) * (y.value - y.mask if party == SERVER else -y.mask)
        for i in range(1, self.degree + 1):
            both = kernels.chosen(by_x("r", i), by_x("t", i), of_y, self.agreed_y)
            total = total + self._factor(v, i) * (powers[i - 1] * y.value - both)
        return total

    def _factor(self, v: torch.Tensor, i: int) -> torch.Tensor:
        """Return (-1)^i B_i(v), which the polynomial has before r^i."""
        total = torch.zeros_like(v)
        for j in range(self.degree, i - 1, -1):
            total = total * v + ring.wrap((-1) ** i * math.comb(j, i) * self.coefficients[j])
        return total

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        x, _, y = operands
        v = x - ring.wrap(self.centre)
        total = torch.zeros_like(v)
        for c in reversed(self.coefficients):
            total = total * v + ring.wrap(c)
        return total * y

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=sum(bytes_of(self.shape, bits) for _, _, bits in self._terms))
