"""The curved pieces of a piecewise function: the lines taken from them, and the rings that suffice for what is left.

A piece counts on its own segment alone: elsewhere a selection discards it, and it need only be right modulo its ring.
So a ring for curved pieces holds what they reach *on their segments*. Less a line that a neighbour has anyway, that is
little: GeLU is 0 or x but for 0.17. Such a *remainder* is selected in a ring of its own, and extended afterwards.

The fraction bits are the cheapest with which rounding stays below a stated bound (``choose``). A polynomial of x read
at ``reads`` fraction bits is computed with ``scale`` fraction bits in a ring of ``wide`` bits: truncation by
scale - fraction bits leaves the piece in ``ring`` bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from approximations.primitives import Piece
from protocols.ring import WORD
from secure.lowering.ranges import dyadic

COARSEST = 6  # the fewest fraction bits at which a polynomial reads x
_SHORT = 8  # bits of a slope that is applied exactly
_AS_EXACT = 2.25  # by how much the bound of the error may be larger where a wider ring spares an extension
_RELATIVE = 2.0**-9  # by how much rounded coefficients may change a value then
_CELLS = 128  # between the points on each side of a centre at which polynomials are bounded


@dataclass(frozen=True)
class Straight:
    """The function intercept + slope x."""

    intercept: float
    slope: float

    @staticmethod
    def of(piece: Piece) -> Straight:
        """Return a piece of degree one at most as a line."""
        c = (*piece.coefficients, 0.0, 0.0)
        return Straight(c[0] - c[1] * piece.centre, c[1])

    def largest(self, low: float, high: float) -> float:
        """Return the largest magnitude on [low, high]."""
        return max(abs(self.intercept + self.slope * x) for x in (low, high))


NOTHING = Straight(0.0, 0.0)


def is_linear(piece: Piece) -> bool:
    """Return True if the degree is at most one and the slope a short binary fraction, which can be applied exactly."""
    if len(piece.coefficients) < 2:
        return True
    slope, *higher = piece.coefficients[1:]
    return not higher and dyadic(slope)[0].bit_length() <= _SHORT


@dataclass(frozen=True)
class Curve:
    """The polynomial sum_j coefficients[j] (x - centre)^j on |x - centre| <= half, the segment of a curved piece.

    The centre is a multiple of 2^-COARSEST, so that it is exact at every scale. near: at most ``half``; what the result
    is precise for. In a margin beyond a polynomial is many times as large and as steep, and would leave few bits for
    the coefficients.
    """

    coefficients: tuple[float, ...]
    centre: float
    half: float
    near: float

    @staticmethod
    def of(
        piece: Piece,
        low: float,
        high: float,
        line: Straight = NOTHING,
        likely: tuple[float, float] = (-math.inf, math.inf),
    ) -> Curve:
        """Return a piece less a line on [low, high], and one unit of x beyond on either side, as x is rounded.

        likely: where most of x is.
        """
        unit = 2.0**-COARSEST
        centre = round((low + high) / 2 / unit) * unit
        c, moved = list(piece.coefficients), centre - piece.centre
        for i in range(len(c) - 1):  # Taylor's shift by Horner's rule
            for j in reversed(range(i, len(c) - 1)):
                c[j] += moved * c[j + 1]
        c += [0.0] * (2 - len(c))
        c[0] -= line.intercept + line.slope * centre
        c[1] -= line.slope
        least, most = (min(max(edge, low), high) for edge in likely)
        near = max(most - centre, centre - least) + unit
        return Curve(tuple(c), centre, max(high - centre, centre - low) + unit, near)

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1

    @cached_property
    def largest(self) -> float:
        """A bound of the polynomial's magnitude."""
        return _bound(self.coefficients, self.half)

    @cached_property
    def steepest(self) -> float:
        """A bound of the magnitude of the derivative, as far as the result is precise."""
        return _bound(tuple(j * c for j, c in enumerate(self.coefficients))[1:], self.near)

    def coarseness(self, reads: int) -> float:
        """Return the bound of the error that rounded coefficients (see ``integers``) make, in units of the result."""
        reach = self.near * 2.0**reads
        return 0.5 + sum(2.0**-j * reach**j for j in range(1, self.degree + 1))

    def integers(self, reads: int, scale: int, *, alone: bool = False) -> tuple[int, ...]:
        """Return the coefficients for x of ``reads`` fraction bits, and a result of ``scale``.

        Rounding a coefficient by d adds d v^j, for v = x - centre. Lower coefficients take up all of it but
        d 2^(1-j) h^j T_j(v / h), for |v| <= h = ``near`` and Chebyshev's T_j, the smallest that it can be made. alone:
        they do not, so that what is added is small where v is.
        """
        c, out = list(self.coefficients), []
        for j in reversed(range(len(c))):
            unit = 2.0 ** (j * reads - scale)
            out.append(round(c[j] / unit))
            rest = 0.0 if alone else c[j] - out[-1] * unit
            for k, t in enumerate(_chebyshev(j)[:-1]):
                c[k] -= rest * t * 2.0 ** (1 - j) * self.near ** (j - k)
        return tuple(reversed(out))


def _bound(coefficients: Sequence[float], half: float) -> float:
    """Bound a polynomial on [-half, half]: its largest value at points, and the most that it grows between them."""
    grid = torch.linspace(-half, half, 2 * _CELLS + 1, dtype=torch.float64)
    growth = sum(j * abs(c) * half ** (j - 1) for j, c in enumerate(coefficients) if j)
    return float(Piece(tuple(coefficients))(grid).abs().max()) + growth * half / (2 * _CELLS)


def _chebyshev(degree: int) -> tuple[int, ...]:
    """Return the coefficients of Chebyshev's polynomial T_degree, lowest first."""
    current: tuple[int, ...] = (1,)
    after: tuple[int, ...] = (0, 1)
    for _ in range(degree):
        following = tuple(2 * a - b for a, b in zip((0, *after), (*current, 0, 0), strict=True))
        current, after = after, following
    return current


def holding(magnitude: float, fraction: int) -> int:
    """Return the narrowest ring for values below ``magnitude``, with the sign and the spare bit of extension."""
    return max(2, math.frexp(magnitude)[1] + fraction + 2)


@dataclass(frozen=True)
class Precision:
    """The fraction bits of x as polynomials read it, of polynomials, and of the pieces, and the ring of the pieces.

    rounding: a bound of the error of a piece, as far as it is to be precise. alone: coefficients are rounded each by
    itself.
    """

    reads: int
    scale: int
    fraction: int
    ring: int
    rounding: float
    alone: bool = False

    @property
    def wide(self) -> int:
        """The ring in which polynomials are computed."""
        return self.ring + self.scale - self.fraction


def choose(
    curves: Sequence[Curve],
    given: int,
    settled: int,
    allowed: float,
    ring: int,
    price: Callable[[Precision], float],
) -> Precision:
    """Return the cheapest precision among those that round by at most ``allowed``; the best if there is none.

    given: the fraction bits of x. settled: those of the result, and the most that a piece has. ring: of the pieces;
    0: that which holds the curves, which may then have fewer fraction bits, if truncation to these takes half of
    ``allowed`` at most.
    """
    coarsest = settled if ring else min(settled, math.ceil(1 - math.log2(allowed)))
    readings = range(COARSEST, given + 1)
    precisions = (
        _precision(curves, given, allowed, ring, reads, f) for reads in readings for f in range(coarsest, settled + 1)
    )
    found = [precision for precision in precisions if precision is not None]
    return min(found, key=lambda precision: (max(precision.rounding, allowed), price(precision)))


def wider(curves: Sequence[Curve], given: int, allowed: float, ring: int, narrow: Precision) -> Precision | None:
    """Return a precision that leaves the pieces in a wider ring than ``narrow``, and is about as exact, or None.

    x may be read a bit coarser. Fewer bits are left for coefficients, which matters where they are no short binary
    fractions. Each is rounded by itself: a power of 1 + x / c is exact where it is small, and must not become negative
    there by more than a unit. The arguments are those of ``choose``.
    """
    most = max(allowed, _AS_EXACT * max(_loss(curve, given, narrow) for curve in curves))
    for reads in range(narrow.reads, max(COARSEST, narrow.reads - 1) - 1, -1):
        found = _precision(curves, given, allowed, ring, reads, narrow.fraction)
        if found is None:
            continue
        found = replace(found, alone=True)
        found = replace(found, rounding=max(_loss(curve, given, found) for curve in curves))
        if found.rounding <= most and all(_keeps(curve, found) for curve in curves):
            return found
    return None


def _changed(curve: Curve, precision: Precision) -> tuple[float, ...]:
    """Return by how much the coefficients of a precision differ from a curve's."""
    reads, scale = precision.reads, precision.scale
    rounded = curve.integers(reads, scale, alone=precision.alone)
    return tuple(
        m * 2.0 ** (j * reads - scale) - c for j, (m, c) in enumerate(zip(rounded, curve.coefficients, strict=True))
    )


def _loss(curve: Curve, given: int, precision: Precision) -> float:
    """Return a bound of a piece's error with the very coefficients of a precision, not with any that are rounded so."""
    unit = 0.0 if precision.reads == given else 2.0**-precision.reads
    return curve.steepest * unit + 2.0**-precision.fraction + _bound(_changed(curve, precision), curve.near)


def _keeps(curve: Curve, precision: Precision) -> bool:
    """True if rounded coefficients change a piece by a unit, and a small part of its value, at most: at points."""
    grid = torch.linspace(-curve.near, curve.near, 2 * _CELLS + 1, dtype=torch.float64)
    exact, changed = Piece(curve.coefficients)(grid), Piece(_changed(curve, precision))(grid)
    return bool((changed.abs() <= 2.0**-precision.fraction + _RELATIVE * exact.abs()).all())


def _precision(
    curves: Sequence[Curve], given: int, allowed: float, ring: int, reads: int, fraction: int
) -> Precision | None:
    """Return the narrowest precision of these fraction bits; None if no ring holds it."""
    unit = 0.0 if reads == given else 2.0**-reads
    # reading x is off by less than a unit, and so is truncation
    errors = [(curve.steepest * unit + 2.0**-fraction, curve.coarseness(reads)) for curve in curves]
    rests = [(allowed - error, coarse) for error, coarse in errors]
    enough = max(math.ceil(math.log2(coarse / rest)) if rest > 0 else WORD for rest, coarse in rests)
    largest = max(curve.largest for curve in curves)
    for narrow in [ring] if ring else range(holding(largest + allowed, fraction), WORD + 1):
        scale = min(max(enough, fraction), WORD - narrow + fraction)
        if scale < fraction:
            return None
        rounding = max(error + coarse * 2.0**-scale for error, coarse in errors)
        if ring or holding(largest + rounding, fraction) <= narrow:
            return Precision(reads, scale, fraction, narrow, rounding)
    return None
