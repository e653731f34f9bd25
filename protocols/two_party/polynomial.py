"""Polynomials with public coefficients of one opened secret: a single opening gives all powers, without another round.

x = z - r; with a public centre a and v = z - a, sum_j C_j (x - a)^j = sum_i r^i (-1)^i sum_{j>=i} C_j binom(j, i)
v^(j-i). This is linear in the powers of r, of which the dealer gives shares (r itself is the opening's mask). All
arithmetic is on integers modulo 2^ring: the caller chooses scales so that the true value fits. If it does not fit
(outside of a segment), the result is junk, which a selection must discard.
Seen by the server: its corrections of r^2, ..., r^d, masked by the client's shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from protocols import kernels, ring
from protocols.fields import Degree, Residue, Residues, Ring, Shape
from protocols.protocol import SERVER, CircuitCost, Draw, Material, Protocol, Step, Weights, bytes_of
from protocols.two_party.lift import LiftedPowers
from protocols.wire import Wire


@dataclass(frozen=True)
class Powers(Protocol):
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

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        ((z, r),) = operands
        return z, (r, *(material[f"r{i}"] for i in range(2, self.degree + 1)))
        yield

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
class Polynomial(Protocol):
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

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        ((z, powers),) = operands
        return kernels.polynomial(z, powers, self.centre, self.coefficients, 0 if party == SERVER else 1)
        yield

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        v = operands[0] - ring.wrap(self.centre)
        total = torch.zeros_like(v)
        for c in reversed(self.coefficients):
            total = total * v + ring.wrap(c)
        return total
