"""Emission of piecewise functions and the row maximum as openings, comparisons and selections."""

from __future__ import annotations

import math
from collections.abc import Iterable

from approximations.primitives import Piece
from protocols import local
from protocols import two_party as tp
from protocols.bits import plane_bytes
from protocols.protocol import Shape, count
from protocols.ring import WORD
from protocols.two_party.comparison import DIGITS
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import dyadic
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Need, Plan, opened
from secure.mpc.prices import Prices
from secure.mpc.share import Share

_SHORT = 8  # bits of a slope that is applied exactly


# piecewise polynomials


def note_piecewise(plan: Plan, p: Primitive) -> None:
    plan.compares(p.inputs[0], p.attrs["knots"], p.attrs["tolerance"])


def piecewise_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    (x,) = p.inputs
    ring = max(plan.compare_width(x), _linear_ring(plan, i, p)) if p.attrs["knots"] else 0
    return (opened(ring if all(map(_is_linear, p.attrs["pieces"])) else max(ring, plan.own(x))),)


def _slope_bits(plan: Plan, i: int, p: Primitive) -> int:
    """Return the fraction bits, beyond those of the result, that the linear pieces have from x and their slopes."""
    lift = plan.fraction[i] - plan.fraction[p.inputs[0]]
    slopes = [piece.coefficients[1] for piece in p.attrs["pieces"] if len(piece.coefficients) == 2]
    return max([0, *(dyadic(slope)[1] - lift for slope in slopes if slope)])


def _linear_ring(plan: Plan, i: int, p: Primitive) -> int:
    """Return the ring of a selection of linear pieces, before the slopes' bits are truncated."""
    return plan.own(i) + _slope_bits(plan, i, p)


def emit_piecewise(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit linear pieces as selections of the opened x itself, and others as polynomials of x.

    The polynomials read x at a scale at which its powers fit 64 bits.
    """
    (x,) = p.inputs
    pieces, knots = p.attrs["pieces"], p.attrs["knots"]
    curved = [s for s, piece in enumerate(pieces) if not _is_linear(piece)]
    polynomials = _polynomials(e, i, x, [pieces[s] for s in curved], [_span(e, x, knots, s) for s in curved])
    if not knots:
        if polynomials:
            return polynomials[0]
        raise AssertionError("a linear function of one piece is written with * and +")
    bits = _below(e, x)
    rows = [e.plan.knots[x].index(k) for k in knots]
    total: Share | None = None

    def add(value: Share) -> None:
        nonlocal total
        if total is None:
            total = value
            return
        ring = min(total.ring, value.ring)
        total = Share(e.emit(local.Add(p.shape, ring), total.index, value.index), ring, total.fraction)

    straight = [s for s, piece in enumerate(pieces) if _is_linear(piece) and any(piece.coefficients)]
    if straight:
        q = _slope_bits(e.plan, i, p)
        ring, scale = _linear_ring(e.plan, i, p), e.plan.fraction[i]
        lift = scale - e.plan.fraction[x]
        slopes, offsets = [], []
        for s in straight:
            intercept, slope = _line(pieces[s])
            m, shift = dyadic(slope)
            slopes.append(m << (q + lift - shift) if m else 0)
            offsets.append(round(intercept * 2.0 ** (scale + q)))
        chosen = _indicators(e, bits, rows, straight, p.shape)
        operands = (chosen, e.opened(x)) if any(slopes) else (chosen,)
        index = e.emit(tp.Select(p.shape, ring, tuple(slopes), tuple(offsets)), *operands)
        add(e.truncate(Share(index, ring, scale + q), p.shape, q))
    for s, value in zip(curved, polynomials, strict=True):
        ring = min(value.ring, e.plan.own(i))
        at = e.emit(tp.Open(p.shape, ring), value.index)
        chosen = _indicators(e, bits, rows, [s], p.shape)
        add(Share(e.emit(tp.Select(p.shape, ring, (1,), (0,)), chosen, at), ring, value.fraction))
    assert total is not None
    return total


def _is_linear(piece: Piece) -> bool:
    """True if the degree is at most one and the slope is a short binary fraction, which can be applied exactly."""
    if len(piece.coefficients) < 2:
        return True
    slope, *higher = piece.coefficients[1:]
    return not higher and dyadic(slope)[0].bit_length() <= _SHORT


def _line(piece: Piece) -> tuple[float, float]:
    c = (*piece.coefficients, 0.0, 0.0)
    return c[0] - c[1] * piece.centre, c[1]


def _span(e: Emitter, x: int, knots: tuple[float, ...], s: int) -> tuple[float, float]:
    """Return the segment of piece s; an unbounded one ends at x's range."""
    reach = e.ranges.magnitude(x)
    return (knots[s - 1] if s else -reach), (knots[s] if s < len(knots) else reach)


def _polynomials(e: Emitter, i: int, x: int, pieces: list[Piece], spans: list[tuple[float, float]]) -> list[Share]:
    """Emit all curved pieces from the only opening of x, lifted and read at ``fx`` fraction bits.

    Results are at the planned scale; outside its segment a piece's result is meaningless.
    """
    if not pieces:
        return []
    shape, settled = e.trace.primitives[i].shape, e.plan.fraction[i]
    scale = WORD - e.plan.own(i) + settled  # the ring that truncation leaves must still hold the result
    fx = min(
        range(6, e.plan.fraction[x] + 1),
        key=lambda f: max(_rounding(p, a, b, f, scale) for p, (a, b) in zip(pieces, spans, strict=True)),
    )
    drop, degree = e.plan.fraction[x] - fx, max(len(p.coefficients) - 1 for p in pieces)
    if drop or e.plan.opened[x] < WORD:
        agreed = e.plan.own(x) - drop
        powers = e.emit(tp.LiftedPowers(shape, WORD, agreed, degree), e.lifted(x, drop, WORD))
    else:
        powers = e.emit(tp.Powers(shape, WORD, degree), e.opened(x))
    out = []
    for piece in pieces:
        centre = round(piece.centre * 2**fx)
        coefficients = tuple(round(c * 2.0 ** (scale - j * fx)) for j, c in enumerate(piece.coefficients))
        index = e.emit(tp.Polynomial(shape, WORD, centre, coefficients), powers)
        out.append(e.truncate(Share(index, WORD, scale), shape, scale - settled))
    return out


def _rounding(piece: Piece, low: float, high: float, fx: int, scale: int) -> float:
    """Bound the error on [low, high] from rounding x to ``fx`` fraction bits and the coefficients to their scales."""
    reach = max(abs(low - piece.centre), abs(high - piece.centre))
    slope = sum(j * abs(c) * reach ** (j - 1) for j, c in enumerate(piece.coefficients) if j)
    return slope * 2.0**-fx + sum((2.0 ** (j * fx - scale - 1)) * reach**j for j in range(len(piece.coefficients)))


def _below(e: Emitter, x: int) -> int:
    """Emit stacked bits [x < t] for all knots t of x, from its only opening."""
    fraction, shape = e.plan.fraction[x], e.trace.primitives[x].shape
    thresholds = tuple(round(k * 2.0**fraction) for k in e.plan.knots[x])
    return compare(e, e.opened(x), shape, e.plan.compare_width(x), thresholds, e.plan.tolerance[x] * 2.0**fraction)


def compare(
    e: Emitter, at: int, shape: tuple[int, ...], width: int, thresholds: tuple[int, ...], tolerance: float
) -> int:
    """Emit the bits that tell whether the opened value ``at`` is below each of ``thresholds``.

    Low bits worth at most ``tolerance`` units are dropped where that makes the comparison cheaper.
    """
    chosen = cheapest_compare(shape, width, thresholds, _spare(tolerance), e.plan.prices.dealt_for_online)
    return e.emit(chosen, at)


def _spare(tolerance: float) -> int:
    """Return the low bits that are worth at most ``tolerance`` units."""
    return max(0, math.floor(math.log2(max(tolerance, 1.0))))


def cheapest_compare(
    shape: tuple[int, ...], width: int, thresholds: tuple[int, ...], spare: int, dealt_for_online: int
) -> tp.Compare:
    """Return the comparison with the fewest rounds, then the fewest bytes, that drops at most ``spare`` low bits.

    A dealt byte counts for 1/dealt_for_online of an online one. Of equally cheap ones it returns the most exact.
    """

    def price(compare: tp.Compare) -> tuple[int, int, int]:
        cost = compare.cost()
        online = cost.to_first + cost.to_second
        return cost.rounds, dealt_for_online * online + cost.dealt, compare.drop

    drops = range(min(spare, width - 2) + 1)
    return min((tp.Compare(shape, width, drop, thresholds, digit) for drop in drops for digit in DIGITS), key=price)


def _indicators(e: Emitter, bits: int, rows: list[int], segments: list[int], shape: tuple[int, ...]) -> int:
    """Emit the opening of the bits "x is in segment s" for these segments."""
    last = len(rows)
    chosen = tuple((rows[0],) if s == 0 else (rows[-1],) if s == last else (rows[s - 1], rows[s]) for s in segments)
    negate = tuple(s == last for s in segments)
    stacked = e.emit(local.Indicators(plane_bytes(count(shape)), chosen, negate), bits)
    return e.emit(tp.OpenBits(shape, len(segments)), stacked)


# the row maximum


def maximum_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring = plan.own(p.inputs[0]) + 1
    return (Need(ring, ring),)


def emit_maximum(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit a tournament over the last dimension: each level computes b + [a >= b] (a - b) for its halves a and b."""
    (x,) = p.inputs
    ring, fraction = e.plan.own(x) + 1, e.plan.fraction[x]
    value, shape = e.get(x, ring), e.trace.primitives[x].shape
    levels = max(1, math.ceil(math.log2(shape[-1])))
    tolerance = p.attrs["tolerance"] / levels * 2.0**fraction
    current = value.index
    while shape[-1] > 1:
        current, shape = larger_halves(e, current, shape, ring, tolerance)
    return Share(current, ring, fraction)


def larger_halves(e: Emitter, x: int, shape: Shape, ring: int, tolerance: float) -> tuple[int, Shape]:
    """Emit the larger of each two numbers in the last dimension, its halves side by side; return it and its shape.

    Numbers differ by less than 2^(ring - 1). The smaller of two may be taken if it is less than ``tolerance`` below.
    """
    width, dim = shape[-1], len(shape) - 1
    half = width // 2
    sub = (*shape[:-1], half)

    def part(start: int, stop: int) -> int:
        return e.emit(local.Slice((*shape[:-1], stop - start), ring, dim, start, stop, 1), x)

    a, b = part(0, half), part(half, 2 * half)
    difference = e.emit(tp.Open(sub, ring), e.emit(local.Sub(sub, ring), a, b))
    below = compare(e, difference, sub, ring, (0,), tolerance)
    above = e.emit(local.Indicators(plane_bytes(count(sub)), ((0,),), (True,)), below)
    gain = e.emit(tp.Select(sub, ring, (1,), (0,)), e.emit(tp.OpenBits(sub, 1), above), difference)
    best, wide = e.emit(local.Add(sub, ring), b, gain), (*shape[:-1], width - half)
    if width % 2:
        best = e.emit(local.Concat(wide, ring, dim), best, part(2 * half, width))
    return best, wide


def price_of_halves(shape: Shape, ring: int, tolerance: float, prices: Prices) -> float:
    """Return the price of ``larger_halves``, in online bytes."""
    sub = (*shape[:-1], shape[-1] // 2)
    chosen = cheapest_compare(sub, ring, (0,), _spare(tolerance), prices.dealt_for_online)
    used = (tp.Open(sub, ring), chosen, tp.OpenBits(sub, 1), tp.Select(sub, ring, (1,), (0,)))
    return sum(prices.of(protocol.cost()) for protocol in used)
