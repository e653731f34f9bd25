"""Emission of piecewise functions and the row maximum as openings, comparisons and selections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from operator import itemgetter

from approximations.primitives import Piece
from protocols import local
from protocols import two_party as tp
from protocols.bits import plane_bytes
from protocols.protocol import Shape, count
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import dyadic
from secure.mpc.comparing import cheapest_compare, spare
from secure.mpc.emitter import Emitter
from secure.mpc.pieces import NOTHING, Curve, Precision, Straight, choose, holding, is_linear, wider
from secure.mpc.plan import Need, Plan, opened
from secure.mpc.prices import Prices
from secure.mpc.share import Share

_PART = 0.25  # of the pieces' own error: what rounding curved pieces may add
_UNITS = 1.25  # of the result's last place: what it may add in any case


# piecewise polynomials


def note_piecewise(plan: Plan, p: Primitive) -> None:
    plan.compares(p.inputs[0], p.attrs["knots"], p.attrs["tolerance"])


def piecewise_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    (x,) = p.inputs
    layout = _layout(plan, i, p)
    if not p.attrs["knots"] and layout.precision is not None:
        return (opened(plan.own(x), plan.fraction[x] - layout.precision.reads),)
    ring = max(plan.compare_width(x), layout.selected) if p.attrs["knots"] else 0
    return (opened(max(ring, plan.own(x)) if layout.curves else ring),)


@dataclass(frozen=True)
class _Layout:
    """The parts of a piecewise function and their rings.

    curves: its curved pieces, by their segments. precision: theirs; None if there are none. lines: what is selected of
    x itself, each from a first segment to a last one. selected: the ring of that selection. slope_bits: the fraction
    bits that are truncated from it. result: the ring to which curves and lines are extended before they are added;
    0: they are added in the ring in which they are selected, that of the result.
    """

    curves: Mapping[int, Curve]
    precision: Precision | None
    lines: tuple[tuple[int, int, Straight], ...]
    selected: int
    slope_bits: int
    result: int


def _layout(plan: Plan, i: int, p: Primitive) -> _Layout:
    """Return the cheapest layout: with curved pieces as they are, or less the line of the linear piece next to them.

    The latter takes a round more where the result is not extended anyway, which has its price.
    """
    pieces, (x,) = p.attrs["pieces"], p.inputs
    plain = _arranged(plan, i, p, [Straight.of(piece) if is_linear(piece) else None for piece in pieces])
    if not (plain.curves and is_linear(pieces[0]) and is_linear(pieces[-1])):
        return plain
    split = _arranged(plan, i, p, _nearest_lines(plan, x, p))
    wider = split.selected > max(plain.selected, plan.own(x), plan.compare_width(x))  # then x would be opened wider
    return plain if wider or _price(plan, i, plain) <= _price(plan, i, split) else split


def _nearest_lines(plan: Plan, x: int, p: Primitive) -> list[Straight | None]:
    """Return the line of every linear piece, and for each curved one that of the linear piece before it or after it.

    Of these two it is the one from which the curved piece differs less.
    """
    pieces: Sequence[Piece] = p.attrs["pieces"]

    def last(before: Piece, piece: Piece) -> Piece:
        return piece if is_linear(piece) else before

    before = list(accumulate(pieces, last))
    after = list(accumulate(reversed(pieces), last))[::-1]

    def nearest(s: int) -> Straight:
        return min(
            (Straight.of(before[s]), Straight.of(after[s])), key=lambda line: _curve(plan, x, p, s, line).largest
        )

    return [nearest(s) for s in range(len(pieces))]


def _segment(plan: Plan, x: int, p: Primitive, first: int, last: int) -> tuple[float, float]:
    """Return what may count as the segments ``first`` to ``last`` within x's range; one of its ends if nothing does.

    The range ends two units below the power of two that x's ring shows anyway, so that its lines fit that ring. What
    follows from segments is in the Program, where an exact end would reveal a value of a single calibration input.
    """
    knots, reach = p.attrs["knots"], 2.0 ** plan.ranges.bits(x) - 2.0 ** (1 - plan.fraction[x])
    low = knots[first - 1] - p.attrs["tolerance"] if first else -reach
    high = knots[last] if last < len(knots) else reach
    return min(max(low, -reach), reach), min(max(high, -reach), reach)


def _curve(plan: Plan, x: int, p: Primitive, s: int, line: Straight) -> Curve:
    """Return the curved piece of a segment less a line; one that no knot ends is precise where x is likely to be."""
    likely = () if p.attrs["knots"] else (plan.ranges.likely(x),)
    return Curve.of(p.attrs["pieces"][s], *_segment(plan, x, p, s, s), line, *likely)


def _arranged(plan: Plan, i: int, p: Primitive, lines: Sequence[Straight | None]) -> _Layout:
    """Return the layout that takes ``lines`` from the pieces; None: a curved piece is left as it is."""
    (x,), pieces, settled = p.inputs, p.attrs["pieces"], plan.fraction[i]
    curved = [s for s, piece in enumerate(pieces) if not is_linear(piece)]
    split = any(lines[s] is not None for s in curved)
    curves = {s: _curve(plan, x, p, s, lines[s] or NOTHING) for s in curved}
    runs = _runs(lines) or (() if curves else ((0, 0, NOTHING),))  # something must be selected, if only zero
    lift = settled - plan.fraction[x]
    slope_bits = max([0, *(dyadic(line.slope)[1] - lift for _, _, line in runs if line.slope)])
    own = plan.own(i)
    selected, result = own, 0
    if split:
        largest = max([0.0, *(line.largest(*_segment(plan, x, p, first, last)) for first, last, line in runs)])
        selected = holding(largest + 1.5 * 2.0**-settled, settled)
        result = plan.extended(i) if plan.base[i] > own else own
    layout = _Layout(curves, None, runs, selected + slope_bits, slope_bits, result)
    if not curves:
        return layout
    allowed = max(_PART * p.attrs["error"], _UNITS * 2.0**-settled)
    precision = choose(
        list(curves.values()),
        plan.fraction[x],
        settled,
        allowed,
        0 if split else own,
        lambda precision: _price(plan, i, replace(layout, precision=precision)),
    )
    narrow = replace(layout, precision=precision)
    if split or runs or plan.want(i) <= own:
        return narrow
    found = wider(list(curves.values()), plan.fraction[x], allowed, plan.want(i), precision)
    wide = replace(layout, precision=found or precision)
    spared = plan.prices.round_bytes  # readers extend the narrow one
    return wide if found and _price(plan, i, wide) <= _price(plan, i, narrow) + spared else narrow


def _runs(lines: Sequence[Straight | None]) -> tuple[tuple[int, int, Straight], ...]:
    """Return every line but zero with the first and the last of the neighbouring segments that have it."""
    groups = [(line, [s for s, _ in group]) for line, group in groupby(enumerate(lines), key=itemgetter(1))]
    runs = [(segments[0], segments[-1], line) for line, segments in groups if line not in (None, NOTHING)]
    if runs and runs[0][:2] == (0, len(lines) - 1) and len(lines) > 1:  # no bit says that x is anywhere
        return (0, 0, runs[0][2]), (1, len(lines) - 1, runs[0][2])
    return tuple(runs)


def _price(plan: Plan, i: int, layout: _Layout) -> float:
    """Return what a layout costs but for the comparisons, in online bytes."""
    p = plan.trace.primitives[i]
    (x,), precision = p.inputs, layout.precision
    online, dealt, rounds = 0, 0, 0
    extended = [(plan.own(i), plan.extended(i))] if plan.base[i] > plan.own(i) else []
    if precision is not None:
        top = precision.wide - plan.own(x) + plan.fraction[x] - precision.reads
        degree = max(curve.degree for curve in layout.curves.values())
        online += 2 * precision.ring * len(layout.curves)
        dealt += degree * (precision.wide + top) + 2 * precision.ring * len(layout.curves)
        if layout.result:
            rounds += not extended
            narrow = [precision.ring + plan.fraction[i] - precision.fraction]
            narrow += [layout.selected - layout.slope_bits] if layout.lines else []
            extended = [(ring, layout.result) for ring in narrow if ring < layout.result]
    dealt += sum((1 + (line.slope != 0)) * layout.selected for _, _, line in layout.lines)
    online += 2 * len(extended)
    dealt += sum(wide - ring for ring, wide in extended)
    return count(p.shape) / 8 * (online + dealt / plan.prices.dealt_for_online) + rounds * plan.prices.round_bytes


def emit_piecewise(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit lines as selections of the opened x itself, and curved pieces as selections of polynomials of x."""
    (x,), knots = p.inputs, p.attrs["knots"]
    layout = _layout(e.plan, i, p)
    values = _polynomials(e, i, x, layout)
    if not knots:
        if values is not None:
            return values
        raise AssertionError("a linear function of one piece is written with * and +")
    bits, rows = _below(e, x), [e.plan.knots[x].index(k) for k in knots]
    parts = []
    if layout.lines:
        parts.append(_lines(e, i, x, layout, bits, rows))
    if values is not None:
        chosen = _indicators(e, bits, rows, [(s, s) for s in layout.curves], p.shape)
        at = e.emit(tp.Open((len(layout.curves), *p.shape), values.ring), values.index)
        parts.append(replace(values, index=e.emit(tp.SelectEach(p.shape, values.ring, len(layout.curves)), chosen, at)))
    if layout.result:
        parts = [_extended(e, part, p.shape, layout.result, e.plan.fraction[i]) for part in parts]
    return _sum(e, p.shape, parts)


def _sum(e: Emitter, shape: tuple[int, ...], parts: Sequence[Share]) -> Share:
    """Emit the sum of shares of one scale, in the narrowest of their rings."""
    total, *others = parts
    for value in others:
        ring = min(total.ring, value.ring)
        total = Share(e.emit(local.Add(shape, ring), total.index, value.index), ring, total.fraction)
    return total


def _extended(e: Emitter, value: Share, shape: tuple[int, ...], ring: int, fraction: int) -> Share:
    """Emit the extension of a share to a ring of at least ``ring`` bits at the scale of ``fraction`` bits."""
    lift = fraction - value.fraction
    if value.ring + lift < ring:
        value = e.extend(value, shape, ring - lift)
    return e.lift(value, shape, lift) if lift else value


def _lines(e: Emitter, i: int, x: int, layout: _Layout, bits: int, rows: list[int]) -> Share:
    """Emit the selection among lines of the opened x, at the planned scale."""
    shape, q = e.trace.primitives[i].shape, layout.slope_bits
    scale = e.plan.fraction[i]
    slopes, offsets = [], []
    for _, _, line in layout.lines:
        m, shift = dyadic(line.slope)
        slopes.append(m << (q + scale - e.plan.fraction[x] - shift) if m else 0)
        offsets.append(round(line.intercept * 2.0 ** (scale + q)))
    chosen = _indicators(e, bits, rows, [(first, last) for first, last, _ in layout.lines], shape)
    operands = (chosen, e.opened(x)) if any(slopes) else (chosen,)
    index = e.emit(tp.Select(shape, layout.selected, tuple(slopes), tuple(offsets)), *operands)
    return e.truncate(Share(index, layout.selected, scale + q), shape, q)


def _polynomials(e: Emitter, i: int, x: int, layout: _Layout) -> Share | None:
    """Emit all curved pieces from the only opening of x, stacked; outside of their segments they are meaningless.

    Without knots there is one, which is not stacked; None if there are none.
    """
    precision, shape = layout.precision, e.trace.primitives[i].shape
    if precision is None:
        return None
    drop, degree = e.plan.fraction[x] - precision.reads, max(curve.degree for curve in layout.curves.values())
    ring, agreed = precision.wide, e.plan.own(x) - drop
    if drop or e.plan.opened[x] < ring:
        ring = max(ring, agreed + 1)
        powers = e.emit(tp.LiftedPowers(shape, ring, agreed, degree), e.lifted(x, drop, ring))
    else:
        powers = e.emit(tp.Powers(shape, ring, degree), e.opened(x))
    centres = tuple(round(curve.centre * 2.0**precision.reads) for curve in layout.curves.values())
    coefficients = tuple(
        curve.integers(precision.reads, precision.scale, alone=precision.alone) for curve in layout.curves.values()
    )
    polynomials: tp.Polynomial | tp.Polynomials = tp.Polynomials(shape, ring, centres, coefficients)
    if not e.trace.primitives[i].attrs["knots"]:
        polynomials = tp.Polynomial(shape, ring, centres[0], coefficients[0])
    value = Share(e.emit(polynomials, powers), precision.wide, precision.scale)
    return e.truncate(value, polynomials.out.shape, precision.scale - precision.fraction)


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
    chosen = cheapest_compare(shape, width, thresholds, spare(tolerance), e.plan.prices.dealt_for_online)
    return e.emit(chosen, at)


def _indicators(e: Emitter, bits: int, rows: list[int], runs: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> int:
    """Emit the opening of the bits "x is in one of the segments first to last" for these pairs."""
    end = len(rows)
    chosen = tuple((*rows[max(0, first - 1) : first], *rows[last : last + 1]) for first, last in runs)
    negate = tuple(last == end for _, last in runs)
    stacked = e.emit(local.Indicators(plane_bytes(count(shape)), chosen, negate), bits)
    return e.emit(tp.OpenBits(shape, len(runs)), stacked)


# the row maximum


def maximum_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring = plan.own(p.inputs[0]) + 1
    return (Need(ring, ring),)


def emit_maximum(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit a tournament over the last dimension: each level computes b + [a >= b] (a - b) for its halves a and b."""
    (x,) = p.inputs
    ring, fraction = e.plan.own(x) + 1, e.plan.fraction[x]
    value, shape = e.get(x, ring), e.trace.primitives[x].shape
    e.watch.within(x)
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
    chosen = cheapest_compare(sub, ring, (0,), spare(tolerance), prices.dealt_for_online)
    used = (tp.Open(sub, ring), chosen, tp.OpenBits(sub, 1), tp.Select(sub, ring, (1,), (0,)))
    return sum(prices.of(protocol.cost()) for protocol in used)
