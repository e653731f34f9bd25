"""Emission of inverse powers as one narrow opening and dealt tables of polynomials (``two_party.tabulated``).

A table has three coefficients (1 / sqrt(x)) or five (1 / x) for each multiple of the smallest argument in its range, so
a wide range takes several tables, each of a band of it. All are looked up from one opening, in rings of their own, and
so are bits that tell how fine a band x is in: [j < count] for a coarse digit j of x (``two_party.digits``), for each
band one of its own width. With tables A_0 (coarse), A_1, ... the result is A_0 + sum_k [j_k < count_k] (A_k - A_(k-1)),
a second round. As j_k may be one above the digit of x, a band ends where the next one still holds for one digit more:
the wider the digits, the more the bands overlap, and the fewer bits are dealt.

Where a dealt byte is dear, the bits come from one comparison of x with the ends of all bands
(``two_party.comparison``). It takes one more round, and 8 dealt bytes instead of up to 512 a band. It drops the bits of
the narrowest digit, and so errs by at most a digit as well.

The primitive "power", of models in polynomial form, is the polynomial with corrections for which the model was trained.
Its table is of that very function, always a single one, so that nothing is compared and no bit is looked up.

The opening keeps the fraction bits that the smallest argument needs, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from approximations.powers import power, starting
from approximations.primitives import Value
from protocols import local
from protocols import two_party as tp
from protocols.fixedpoint import LEAST_FRACTION
from protocols.protocol import Protocol, Shape
from protocols.protocol import count as elements_of
from protocols.ring import WORD
from protocols.two_party.digits import DIGIT_BITS
from protocols.two_party.tabulated import PUBLIC, ROWS, smallest
from secure.errors import DoesNotFit
from secure.lowering.primitives import Primitive
from secure.mpc.comparing import cheapest_compare
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Need, Plan
from secure.mpc.prices import Prices
from secure.mpc.share import Share

COUNTS = range(2, 10)  # of the digits at which a band ends; the ends of two widths ascend by an eighth at least
ROUNDING = 17  # bits to which the opening rounds the smallest argument
ROOM = 1 + 2.0**-7  # by how much rounding may push an argument beyond its range
GUARD = 1  # fraction bits of the coefficients beyond those of the result
COEFFICIENT, JOIN = 6, 136  # dealt bytes that a coefficient takes, and another band beside its tables: a selection


def tabulated_power(
    x: Value,
    exponent: float,
    low: float,
    high: float,
    degree: int = 3,
    steps: int = 0,
    scale: float = 1.0,
    *,
    few: bool = False,
) -> Value:
    """Return the same function as ``approximations.power``, looked up in one table where that spares rounds.

    A table takes one opening of x and compares nothing. Its relative error to the *corrected polynomial*, for which a
    model was trained, is 2^-15. That polynomial may itself miss the power by ``power_error``, 0.3 in a usual recipe, so
    that a table of the power would be another model. A start without corrections takes one opening anyway, and wide
    ranges have no table: these are computed as ``power`` does. few: a table may be as large as any.
    """
    form = (exponent, low, high, degree, steps)
    if isinstance(x, Tensor) or not steps or not 0 < low < high or not _has_table(*form, few):
        return power(x, *form, scale)
    return x.power(*form, scale)


@dataclass(frozen=True)
class _Band:
    """A table for low <= x <= high, taken if the digit of ``digit`` bits is below ``count``; 0: taken by default."""

    low: int
    high: int
    ring: int
    shift: int
    degree: int
    digit: int = 0
    count: int = 0

    @property
    def table(self) -> tuple[int, int, int, int, int]:
        """The table as a protocol has it: see ``protocols.fields.Bands``."""
        return self.ring, self.shift, self.degree, self.low, self.high

    @property
    def size(self) -> int:
        """The coefficients of one value."""
        return (self.degree + 1) << (self.ring - self.shift)


@dataclass(frozen=True)
class _Bands:
    """The bands of x = low..high, integers of ``fraction`` bits, from coarse to fine.

    ring: of the digits. compared: the bits that choose among bands come from a comparison, not from tables.
    """

    fraction: int
    ring: int
    bands: tuple[_Band, ...]
    compared: bool = False

    @property
    def opened(self) -> int:
        """The ring of the opening: a difference of two numbers, which is compared, has a sign."""
        return max(self.ring + self.compared, *(band.ring for band in self.bands))

    def choosing(self, shape: Shape, dealt_for_online: int) -> Protocol:
        """Return the protocol that gives the bits of all bands but the coarsest: of digits, or a comparison."""
        finer = self.bands[1:]
        if not self.compared:
            return tp.DigitsIn(shape, self.ring, tuple((band.digit, band.count) for band in finer))
        ends, spare = tuple(band.count << band.digit for band in finer), min(band.digit for band in finer)
        return cheapest_compare(shape, self.ring + 1, ends, spare, dealt_for_online)

    def price(self, shape: Shape, prices: Prices) -> float:
        """Return the price of tables and bits, in online bytes."""
        dealt = COEFFICIENT * elements_of(shape) * sum(band.size for band in self.bands)
        bits = prices.of(self.choosing(shape, prices.dealt_for_online).cost()) if len(self.bands) > 1 else 0.0
        return dealt / prices.dealt_for_online + bits


@dataclass(frozen=True)
class _Way:
    """Bands for all x < high, from coarse to fine, and their dealt bytes. The next coarser one begins at ``start``."""

    start: int
    high: int
    cost: int = 0
    bands: tuple[_Band, ...] = ()


@lru_cache(maxsize=256)
def divided(
    root: int, low: int, high: int, few: int, *, compared: bool = False
) -> tuple[int, tuple[_Band, ...]] | None:
    """Return the ring of the digits and the bands, from coarse to fine, that take the fewest dealt bytes.

    It is one band if that has at most ``few`` coefficients, and None if no tables hold the range. compared: there are
    no tables of bits.
    """
    ring = high.bit_length()
    ring += (1 << ring) - (1 << max(0, ring - DIGIT_BITS)) <= high

    def extended(way: _Way, most: int, digit: int = 0, count: int = 0) -> _Way | None:
        """Return the way with another band, up to ``most``."""
        try:
            band = _Band(way.start, most, *smallest(root, way.start, most), digit, count)
        except ValueError:
            return None
        table = (0 if compared else -(-(1 << (ring - digit)) // 8)) + JOIN if count else 0
        return _Way((count - 1) << digit, most + 1, way.cost + COEFFICIENT * band.size + table, (band, *way.bands))

    whole = extended(_Way(low, low), high)
    if whole is not None and whole.bands[0].size <= few:
        return ring, whole.bands
    # a band ends below ``count`` digits, the next coarser one begins a digit lower, and above the end of the next finer
    widths = [digit for digit in range(max(0, ring - DIGIT_BITS), ring) if high < (1 << ring) - (1 << digit)]
    ends = sorted((count << digit, digit, count) for digit in widths for count in COUNTS)
    ways = [_Way(low, low)]
    for end, digit, count in ends:
        if (count - 1) << digit > low and end <= high:
            found = (extended(way, end - 1, digit, count) for way in ways if way.high <= (count - 1) << digit)
            ways += sorted((way for way in found if way is not None), key=lambda way: way.cost)[:1]
    found = (extended(way, high) for way in ways)
    best = min((way for way in found if way is not None), key=lambda way: way.cost, default=None)
    return None if best is None else (ring, best.bands)


@lru_cache(maxsize=256)
def whole(root: int, low: int, high: int, start: tuple[float, ...], centre: float, steps: int) -> _Band | None:
    """Return the only band of a polynomial with corrections, and None if no table holds the range."""
    try:
        return _Band(low, high, *smallest(root, low, high, start, centre, steps))
    except ValueError:
        return None


@dataclass(frozen=True)
class _Function:
    """x^(-1/root), or the polynomial of x - centre with ``steps`` corrections that stands for it (``start`` not ())."""

    root: int
    start: tuple[float, ...] = ()
    centre: float = 0.0
    steps: int = 0

    @staticmethod
    def corrected(exponent: float, low: float, high: float, degree: int, steps: int, fraction: int) -> _Function:
        """Return a polynomial with corrections as a function of integers with ``fraction`` bits."""
        root, unit, piece = round(-1 / exponent), 2.0**-fraction, starting(exponent, low, high, degree)
        start = tuple(c * unit ** (j + 1 / root) for j, c in enumerate(piece.coefficients))
        return _Function(root, start, piece.centre / unit, steps)


def _function(p: Primitive, fraction: int) -> _Function:
    """Return the function of integers with ``fraction`` bits that a primitive computes, but for its scale."""
    if "root" in p.attrs:
        return _Function(p.attrs["root"])
    a = p.attrs
    return _Function.corrected(a["exponent"], a["low"], a["high"], a["degree"], a["steps"], fraction)


def _integers(low: float, high: float, fraction: int) -> tuple[int, int]:
    """Return a range as integers of ``fraction`` bits, with the room that rounding needs."""
    return max(1, math.floor(low / ROOM * 2.0**fraction)), math.ceil(high * ROOM * 2.0**fraction)


def _finest(low: float) -> int:
    """Return the most fraction bits that an opening keeps of an argument of at least ``low``."""
    return ROUNDING - math.floor(math.log2(low))


@lru_cache(maxsize=256)
def _has_table(exponent: float, low: float, high: float, degree: int, steps: int, few: bool) -> bool:
    """Return True if a polynomial with corrections has a table.

    The fraction bits of its argument are not known yet. They change the table's bounds by a rounding. So it has a
    factor of two to spare; or, of few values, it has a table at any fraction bits that there may be.
    """

    def size(fraction: int) -> int:
        f = _Function.corrected(exponent, low, high, degree, steps, fraction)
        band = whole(f.root, *_integers(low, high, fraction), f.start, f.centre, f.steps)
        return ROWS + 1 if band is None else band.size

    finest = _finest(low)
    if 2 * size(finest) <= ROWS:
        return True
    return few and all(size(fraction) <= ROWS for fraction in range(min(LEAST_FRACTION, finest), finest + 1))


def _bands(plan: Plan, p: Primitive) -> _Bands:
    """Choose the bands of a primitive. Raises DoesNotFit for a range that no tables hold."""
    a, given = p.attrs, plan.fraction[p.inputs[0]]
    fraction = min(given, _finest(a["low"]))
    (low, high), f = _integers(a["low"], a["high"], fraction), _function(p, fraction)
    if f.start:
        band = whole(f.root, low, high, f.start, f.centre, f.steps)
        ways = [] if band is None else [_Bands(fraction, band.ring, (band,))]
    else:
        few = plan.prices.table_bytes // (COEFFICIENT * elements_of(p.shape))
        few = max(plan.prices.coefficients, min(ROWS, few))
        found = [divided(f.root, low, high, few, compared=compared) for compared in (False, True)]
        ways = [_Bands(fraction, *way, len(way[1]) > 1 and n == 1) for n, way in enumerate(found) if way is not None]
    if not ways:
        raise DoesNotFit(
            f"{p.where}: tables of x^(-1/{f.root}) on [{a['low']:.3g}, {a['high']:.3g}], in units of 2^-{fraction}, "
            f"have more than {ROWS} coefficients\nhint: narrower calibration inputs, or more fraction bits"
        )
    return min(ways, key=lambda way: way.price(p.shape, plan.prices))


def needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    bands = _bands(plan, p)
    ring = bands.opened + plan.fraction[p.inputs[0]] - bands.fraction
    return (Need(ring, ring),)


def emit(e: Emitter, i: int, p: Primitive) -> Share:
    (x,), plan, bands = p.inputs, e.plan, _bands(e.plan, p)
    e.watch.between(x, p.attrs["low"], p.attrs["high"])
    drop = plan.fraction[x] - bands.fraction
    value = e.truncate(e.get(x, bands.opened + drop), p.shape, drop)
    at = e.emit(tp.Open(p.shape, bands.opened), value.index)
    fraction, wide = plan.fraction[i] + GUARD, min(WORD, plan.want(i) + GUARD + PUBLIC)
    f = _function(p, bands.fraction)
    scale = p.attrs["scale"] * 2.0 ** (fraction + bands.fraction / f.root)
    coarsest, *finer = bands.bands
    if not finer:
        form = (*coarsest.table[:3], f.root, *coarsest.table[3:], scale, PUBLIC, wide, f.start, f.centre, f.steps)
        index = e.emit(tp.Tabulated(p.shape, *form), at)
        return e.truncate(Share(index, wide, fraction + PUBLIC), p.shape, GUARD + PUBLIC)
    size, tables = len(finer), tuple(band.table for band in bands.bands)
    index, stacked = e.emit(tp.TabulatedBands(p.shape, tables, f.root, scale, PUBLIC, wide), at), (size + 1, *p.shape)
    found = e.truncate(Share(index, wide, fraction + PUBLIC), stacked, GUARD + PUBLIC)
    bits = e.emit(bands.choosing(p.shape, plan.prices.dealt_for_online), at)
    gains = e.emit(
        tp.Open((size, *p.shape), found.ring), e.emit(local.Differences((size, *p.shape), found.ring), found.index)
    )
    chosen = e.emit(tp.SelectEach(p.shape, found.ring, size), e.emit(tp.OpenBits(p.shape, size), bits), gains)
    first = e.emit(local.Slice((1, *p.shape), found.ring, 0, 0, 1, 1), found.index)
    first = e.emit(local.Reshape(p.shape, found.ring), first)
    return replace(found, index=e.emit(local.Add(p.shape, found.ring), first, chosen))
