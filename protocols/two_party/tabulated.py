"""An inverse power of an opened secret, from one opening and no message: dealt polynomials, shifted by the mask.

x in [low, high] is opened modulo 2^k as z = x + r. Both parties know z's top digit d = z >> shift, one of
N = 2^(k - shift), and its low part t. Over the integers x = a_d + t, where a_d = d 2^shift - r modulo 2^k, or 2^k less
in the one row that would pass 2^k (x itself stays below 2^k - 2^shift). So the digit selects an interval of known
width, of which the mask moves the place:

1. For every d the dealer, who knows r and so a_d, fits x^(-1/root) on that very interval by a polynomial of t, and
   deals the N (degree + 1) coefficients of the Chebyshev polynomials T_j(2 t / 2^shift - 1) as shares.
2. Each party picks row d and adds up its shares times the public integers T_j.

A row that lies within [low, 2^k) interpolates at Chebyshev nodes. For x^-1 and x^-1/2 the relative error is then at
most 1 / T_(degree + 1)(1 + 2 low / 2^shift): for 1/x the error is (T_(n)(u) / T_(n)(u_0)) / x, where u_0 is the place
of x = 0, and x^-1/2 is an integral of 1/(x + s) over s >= 0, each of which errs relatively less. The one row that holds
``low`` is fitted on its part above ``low`` by least squares with a small weight on the coefficients, because the
polynomial that interpolates there may be huge below, and the T_j are rounded. ``WIDEST`` has the widths for which both
errors together stay below ``ACCURACY`` (measured in tests over every place of ``low``).

With ``start`` the function is a polynomial with corrections (``approximations.power``) in the place of the power. No
bound of its derivatives is at hand, so ``smallest`` measures the error of each table, and takes the smallest one within
``ACCURACY``. The row that holds ``high`` is fitted to the polynomial's course beyond it.

The T_j must be the *same integers* at both parties: their shares are uniform, so a difference of one unit would make
the sum random. Hence they come from integer arithmetic alone. The coefficients are the dealer's, who may use floats.
Seen by the server: its corrections of the coefficients, masked by the client's shares. Nothing is sent otherwise, and
both parties know z from the opening. A value outside of [low, high] gives a wrong result, which checks of x
notice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import ring
from protocols.fields import Bands, Bits, Corrections, Degree, Real, Residue, Ring, Root, Shape, Start
from protocols.protocol import CircuitCost, Draw, Material, Silent, Weights, bytes_of, count
from protocols.ring import WORD
from protocols.two_party import intervals
from protocols.wire import Wire

ROWS = 1 << 12
"""The most coefficients of one element, N (degree + 1): 32 kB."""

ACCURACY, PUBLIC = 2.0**-15, 16
"""The relative error of tables whose rows are as wide as ``WIDEST``, with T_j of ``PUBLIC`` fraction bits or more."""

WIDEST = {
    1: {4: 0.52, 5: 0.83, 6: 1.21, 7: 1.61, 8: 1.76, 9: 1.81},
    2: {4: 0.74, 5: 1.18, 6: 1.71, 7: 2.32, 8: 2.94, 9: 3.11},
}
"""The widest row, 2^shift / low, by root and degree."""

_DEGREES = range(3, 13)  # of the tables of polynomials
_CLOSELY = ((4, 50), (33, 400))  # places of rows, and arguments, at which the error of such a table is measured

_PRECISION = 30  # bits of the T_j while they are computed: their products stay below 2^62
_WEIGHT = 8e-6  # of the coefficients in the fit of the lowest row, relative to its values
_EXCESS = 3  # nodes of that fit for each coefficient


@dataclass(frozen=True)
class Tabulated(Silent):
    """[scale x^(-1/root)] modulo 2^wide with ``public`` fraction bits, for integers low <= x <= high of an opening.

    Rounds 0; offline 2^(ring - shift) (degree + 1) wide / 8 bytes an element to the server. x and the bounds are
    integers, and so is the result in units of 2^-public: ``scale`` holds the factors of all fixed points.
    Error: relative ``ACCURACY`` if the rows are at most as wide as ``WIDEST``, and half a unit for each coefficient.
    """

    kind: ClassVar[str] = "tabulated"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    error: ClassVar[str] = "relative 2^-15 for rows as wide as WIDEST + (degree + 1) / 2 units, of 2^public"
    shape: Shape
    ring: Ring  # of the opening
    shift: Bits
    degree: Degree
    root: Root
    low: Residue
    high: Residue
    scale: Real
    public: Bits
    wide: Ring
    start: Start = ()  # coefficients of a polynomial of x - centre that, with corrections, stands for the power
    centre: Real = 0.0
    steps: Corrections = 0

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.wide)

    @property
    def rows(self) -> int:
        """The intervals, one for each value of the top digit."""
        return 1 << (self.ring - self.shift)

    def validate(self) -> None:
        if self.steps and not self.start:
            raise ValueError(f"{self.steps} corrections of no polynomial")
        _check(self, (self.ring, self.shift, self.degree, self.low, self.high))

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("rows", (*self.shape, self.rows, self.degree + 1), self.wide, derived=True),)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        return {"rows": self.rows_for(r)}, None

    def rows_for(self, r: Tensor) -> Tensor:
        """Return the coefficients for masks r, of the shape of ``shape`` and then rows and degrees."""
        fits = (*_interpolation(self.degree), _interpolation(_EXCESS * (self.degree + 1) - 1)[0])
        form = (self.ring, self.shift, self.root, self.low, self.high, self.scale, self.start, self.centre, self.steps)
        rows = intervals.inverse_powers(r, *form, fits, _WEIGHT**2 * len(fits[2]))
        return rows.reshape(*self.shape, self.rows, self.degree + 1)

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, _),) = operands
        rows = material["rows"].reshape(-1, self.rows, self.degree + 1)
        return intervals.from_rows(z, rows, self.ring, self.shift, _PRECISION, self.public)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        x = ring.reduce(operands[0], self.ring).clamp(self.low, self.high).to(torch.float64)
        power = intervals.inverse_power(x, self.root, self.start, self.centre, self.steps)
        return ring.left(torch.round(self.scale * power).to(torch.int64), self.public)

    def fitted(self) -> int:
        size = self.degree + 1
        return count(self.shape) * size * (self.rows + _EXCESS * size)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of((self.rows * (self.degree + 1), *self.shape), self.wide))


@dataclass(frozen=True)
class TabulatedBands(Silent):
    """[scale x^(-1/root)] modulo 2^wide as ``Tabulated`` gives it, from a table for each band, stacked in front.

    A result is right where x is in its band. Rounds 0; offline the bytes of all tables. Error: that of each.
    """

    kind: ClassVar[str] = "tabulated_bands"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    error: ClassVar[str] = Tabulated.error
    shape: Shape  # of x
    bands: Bands
    root: Root
    scale: Real
    public: Bits
    wide: Ring

    @cached_property
    def tables(self) -> tuple[Tabulated, ...]:
        """The table of each band."""
        return tuple(
            Tabulated(self.shape, bits, shift, degree, self.root, low, high, self.scale, self.public, self.wide)
            for bits, shift, degree, low, high in self.bands
        )

    @property
    def operand_ring(self) -> int:
        return max(band[0] for band in self.bands)

    @property
    def out(self) -> Wire:
        return Wire((len(self.bands), *self.shape), self.wide)

    def validate(self) -> None:
        for band in self.bands:
            _check(self, band)

    @property
    def _sizes(self) -> list[int]:
        """The coefficients of an element in each table."""
        return [(degree + 1) << (bits - shift) for bits, shift, degree, *_ in self.bands]

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("rows", (count(self.shape), sum(self._sizes)), self.wide, derived=True),)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        found = [table.rows_for(r) for table in self.tables]
        rows = [each.reshape(-1, size) for each, size in zip(found, self._sizes, strict=True)]
        return {"rows": torch.cat(rows, 1)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        found = [
            table.compute(party, {"rows": rows.contiguous()}, operands, weights)
            for table, rows in zip(self.tables, material["rows"].split(self._sizes, 1), strict=True)
        ]
        return torch.stack(found)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return torch.stack([table.clear(operands, weights) for table in self.tables])

    def fitted(self) -> int:
        sizes = zip(self._sizes, (band[2] + 1 for band in self.bands), strict=True)
        return count(self.shape) * sum(size + _EXCESS * terms**2 for size, terms in sizes)

    def scratch(self) -> int:
        """Return the bytes of all tables, which the dealer makes one by one and joins."""
        return 8 * count(self.shape) * sum(self._sizes)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of((count(self.shape), sum(self._sizes)), self.wide))


def _check(p: Tabulated | TabulatedBands, band: tuple[int, int, int, int, int]) -> None:
    """Raise ValueError unless the table of a band (ring, shift, degree, low, high) is a possible one."""
    bits, shift, degree, low, high = band
    if not 0 < shift <= _PRECISION or not shift < bits <= 52:
        raise ValueError(f"rows of 2^{shift} in a ring of {bits} bits")
    if (degree + 1) << (bits - shift) > ROWS:
        raise ValueError(f"{1 << (bits - shift)} rows of degree {degree} have more than {ROWS} coefficients")
    if not 0 < low < high < (1 << bits) - (1 << shift):
        raise ValueError(f"[{low}, {high}] in a ring of {bits} bits with rows of 2^{shift}")
    if not 0 < p.public <= _PRECISION:
        raise ValueError(f"{p.public} public fraction bits")
    if not 0 < p.scale * low ** (-1 / p.root) < 2.0 ** (p.wide - 1 - p.public):
        raise ValueError(f"results do not fit a ring of {p.wide} bits with {p.public} fraction bits")


def smallest(
    root: int, low: int, high: int, start: tuple[float, ...] = (), centre: float = 0.0, steps: int = 0
) -> tuple[int, int, int]:
    """Return ring, shift and degree of the smallest table for integers from low to high.

    start, centre, steps: as in ``Tabulated``. The error of the table of a polynomial is measured here, over every
    place of its rows. Raises ValueError if the table has too many coefficients.
    """
    if start:
        scale = 2.0**40 * low ** (1 / root)
        shifts = range(1, min(_PRECISION, high.bit_length()) + 1)
        for size, bits, shift, degree in sorted(_table(low, high, s, degree) for s in shifts for degree in _DEGREES):
            if size > ROWS:
                break
            table = Tabulated((1,), bits, shift, degree, root, low, high, scale, PUBLIC, WORD, start, centre, steps)
            if all(_measured(table, *closely) <= ACCURACY for closely in _CLOSELY):
                return bits, shift, degree
    else:
        widths = ((min(_PRECISION, math.floor(math.log2(w * low))), degree) for degree, w in WIDEST[root].items())
        found = [_table(low, high, shift, degree) for shift, degree in widths if shift > 0]
        size, bits, shift, degree = min(found, default=(ROWS + 1, 0, 0, 0))
        if size <= ROWS:
            return bits, shift, degree
    raise ValueError(f"a table of x^(-1/{root}) on [{low}, {high}] has more than {ROWS} coefficients")


def _table(low: int, high: int, shift: int, degree: int) -> tuple[int, int, int, int]:
    """Return the coefficients, ring, shift and degree of the table with rows of 2^shift."""
    bits = max(shift + 1, high.bit_length())
    bits += (1 << bits) - (1 << shift) <= high
    return (degree + 1) << (bits - shift), bits, shift, degree


def _measured(table: Tabulated, places: int, points: int) -> float:
    """Return the largest relative error of a table, with its rounded T_j, over so many masks and arguments."""
    table = replace(table, shape=(places,))
    r = torch.arange(places, dtype=torch.int64) * (1 << table.shift) // places
    part, low, high = torch.linspace(0, 1, points, dtype=torch.float64), table.low, table.high
    x = torch.cat([low * (high / low) ** part, low + (high - low) * part]).round().to(torch.int64).clamp(low, high)
    z = ring.reduce(x[:, None] + r, table.ring)
    row = table.rows_for(r)[torch.arange(places), ring.right(z, table.shift)].to(torch.float64)
    basis = intervals.chebyshev(z & ring.low_mask(table.shift), table.shift, table.degree, _PRECISION, table.public)
    found = (row * basis.to(torch.float64)).sum(-1)
    exact = intervals.inverse_power(x.to(torch.float64), table.root, table.start, table.centre, table.steps)
    return float((found / (table.scale * 2.0**table.public * exact[:, None]) - 1).abs().max())


@lru_cache(maxsize=64)
def _interpolation(degree: int) -> tuple[Tensor, Tensor]:
    """Return the Chebyshev nodes of (-1, 1), and the matrix from values there to coefficients of T_0..T_degree."""
    n = degree + 1
    angles = math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    matrix = torch.cos(torch.arange(n, dtype=torch.float64)[:, None] * angles) * (2 / n)
    matrix[0] /= 2
    return torch.cos(angles), matrix
