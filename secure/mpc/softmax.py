"""Emission of a softmax's exponentials: one opening of the scores serves the bound of each row and the exponential.

Scores are opened with SCORE_FRACTION fraction bits, which changes e^x by 2^-SCORE_FRACTION of its value at most.
Openings subtract (``OpenedSum``), so that bound minus score is opened as soon as the row's bound is: one number a row.

A histogram takes dealt bytes for every score. Where these are dear, the larger of each two scores is taken before, once
or several times, at three rounds each: only what is left is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from protocols import local
from protocols import two_party as tp
from protocols.fields import ENTRIES
from protocols.protocol import CircuitCost, Protocol, Shape
from protocols.ring import WORD
from protocols.two_party.digits import DIGIT_BITS, PLACES, ROW
from secure.errors import DoesNotFit
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import ROUNDED
from secure.mpc.emitter import Emitter
from secure.mpc.nonlinear import larger_halves, price_of_halves
from secure.mpc.plan import Need, Plan
from secure.mpc.prices import Prices
from secure.mpc.share import Share

SCORE_FRACTION = 13
INTERVAL = 16  # of the exponential, in units of the exponent
MASK_FRACTION, PUBLIC_FRACTION = 40, 16  # scales of the exponential's two factors
NARROW, NARROW_PLACES = 4, 2  # narrower intervals, of which 2^2 count: up to e^-12
NARROW_MASKS = (
    22,
    28,
)  # the fewest fraction bits of the factor that is dealt for them, for an error of 7e-6, and the most
LOST = 2.0**-11  # the most by which what lies beyond the narrower intervals may add to a row's sum of 1 or more
MOST_BINS = 256  # of a histogram
ROOM = 4.0  # by how much a row's maximum may lie beyond all that are expected
LOSS = 2.0**-6  # by how much the larger of two scores may be missed, in all levels together; LOWEST has room for it
_EXPONENT = SCORE_FRACTION + int(math.log2(INTERVAL))  # the bits of an interval


@dataclass(frozen=True)
class _Window:
    """The scores' opening: modulo 2^ring, less ``start``; the row's maxima lie in ``bins`` digits of ``shift`` bits.

    Those count whose digit, of ``coarser`` more bits, is below ``below``; places repeat in ``blocks`` of digits.
    halves: how often the larger of each two scores is taken before.
    """

    ring: int
    shift: int
    bins: int
    start: int
    coarser: int
    below: int
    blocks: int
    halves: int = 0

    @property
    def wide(self) -> int:
        """The ring of the scores: a difference of two, which is compared, has a sign."""
        return self.ring + (self.halves > 0)

    @property
    def tolerance(self) -> float:
        """The units by which each level of halves may miss the larger score."""
        return LOSS * 2.0**SCORE_FRACTION / max(1, self.halves)


def _window(plan: Plan, bound: int) -> _Window:
    """Choose the window of a row's bound. Raises DoesNotFit if no histogram holds it.

    It holds twice the largest and half the smallest maximum of calibration, and ROOM beyond on both sides. Its ends
    are multiples of a bin's width: exact ones, which are public, would reveal scores of single calibration sentences.
    """
    p = plan.trace.primitives[bound]
    (x,), slack = p.inputs, p.attrs["slack"]
    shift = SCORE_FRACTION + math.floor(math.log2(slack / 2))
    width = 2.0 ** (shift - SCORE_FRACTION)
    low, high = plan.ranges.span(x)
    lowest, highest = plan.ranges.interval(bound)
    least = math.floor((lowest - ROOM) / width)
    most = math.ceil((min(highest + ROOM, high) + 2**-SCORE_FRACTION) / width)
    bins, start = most - least + 1, least * width  # a digit may be one too high, and has a bin then
    reach = max(high, most * width) + slack - min(low, start) + INTERVAL + 1
    # room for scores of three times the window's end, so that none that is too large looks like a small one
    reach = max(reach, 3 * most * width - min(low, start) + width)
    ring = math.ceil(math.log2(reach)) + SCORE_FRACTION
    if bins > MOST_BINS or ring - shift > DIGIT_BITS or _rows(plan.trace.primitives[x].shape)[-2] > ROW:
        raise DoesNotFit(
            f"{p.where}: the scores of a softmax reach from {low:.4g} to {high:.4g}, the largest of a row of "
            f"{plan.trace.primitives[x].shape[-1]} from {lowest:.4g} to {highest:.4g}; the protocol takes rows of "
            f"{ROW**2}, whose largest differ by {(MOST_BINS - 2) * width - 2 * ROOM:g}, and scores that differ by "
            f"{2.0 ** (shift + DIGIT_BITS - SCORE_FRACTION):g}\n"
            "hint: narrower calibration inputs; masks of the client's are clamped, others count as scores"
        )
    found = []
    for _, coarser, below, blocks in sorted(ways(1 << (ring - shift), bins)):
        counted = below << coarser if blocks > 1 else bins  # every bin of the digits that count
        window = _Window(ring, shift, counted, round(start * 2**SCORE_FRACTION), coarser, below, blocks)
        _, number = _passing(low, window)
        told = number < 1 << (ring - shift - coarser)  # or nothing would tell the largest scores from the smallest
        if told and -(-(1 << (ring - shift)) // blocks) <= PLACES:
            found.append(window)
    if not found:
        raise DoesNotFit(
            f"{p.where}: the scores of a softmax reach from {low:.4g} to {high:.4g}, the largest of a row from "
            f"{lowest:.4g} to {highest:.4g}, and no digits tell them apart\nhint: narrower calibration inputs"
        )
    rows = _rows(plan.trace.primitives[x].shape)
    dealt = [_dealt(rows, window) for window in found]
    may = [window for window, bytes_ in zip(found, dealt, strict=True) if bytes_ <= dealt[0] + plan.prices.table_bytes]
    halved = (replace(window, halves=n) for window in may for n in range(rows[-1].bit_length()))
    return min(halved, key=lambda each: _price(rows, each, plan.prices))


def _price(rows: Shape, window: _Window, prices: Prices) -> float:
    """Return the price of halves, and of counting what they leave, in online bytes."""
    total = 0.0
    for _ in range(window.halves):
        total += price_of_halves(rows, window.wide, window.tolerance, prices)
        rows = (*rows[:-1], -(-rows[-1] // 2))
    counted = [
        protocol.cost() for protocol in (tp.Open(rows, window.ring), *_counters(rows, window), *_checks(rows, window))
    ]
    spared = CircuitCost() if window.halves else counted[0]  # the exponential opens all scores anyway
    return total + sum(map(prices.of, counted)) - prices.of(spared)


def _dealt(rows: Shape, window: _Window) -> int:
    """Return the dealt bytes of counting, and of checking what counts."""
    return sum(protocol.cost().dealt for protocol in (*_counters(rows, window), *_checks(rows, window)))


def _counters(rows: Shape, w: _Window) -> tuple[Protocol, ...]:
    """Return the protocols that count opened scores in bins; those before the last one tell which ones count."""
    histogram = tp.Histogram(rows, w.ring, w.shift, w.bins, w.blocks)
    if w.blocks == 1:
        return (histogram,)
    return tp.DigitIn(rows, w.ring, w.shift + w.coarser, w.below), tp.OpenBits(rows, 1), histogram


def _checks(rows: Shape, w: _Window) -> tuple[Protocol, ...]:
    """Return what checks the digits that tell which scores count: another table of each."""
    return (tp.DigitIn(rows, w.ring, w.shift + w.coarser, w.below),) if w.blocks > 1 else ()


def ways(digits: int, bins: int) -> Iterable[tuple[int, int, int, int]]:
    """Return the ways to count those below bin ``bins`` - 1 at least: bytes of a score, coarser bits, below, blocks.

    With one block all scores count, and nothing tells those of the window. It is a way because the ring holds all
    scores and more, so that none has the digit of another one's bin. See ``two_party.digits`` for the others.
    """
    yield digits, 0, 0, 1
    coarser = 0
    while digits >> coarser > 1:
        below = -(-(bins - 1) // (1 << coarser)) + 1
        counted = below << coarser
        blocks = min(ENTRIES, digits // (counted - 1 + (1 << coarser)))
        if blocks > 1 and below < digits >> coarser and counted <= MOST_BINS:
            tables = 2 * -(-(digits >> coarser) // 8)  # one tells what counts, another one checks it
            yield 2 * -(-digits // blocks) + tables, coarser, below, blocks
        coarser += 1


def bound_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    (x,) = p.inputs
    ring = _window(plan, i).wide + plan.fraction[x] - SCORE_FRACTION
    return (Need(ring, ring),)


def exponential_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    scores, bound = p.inputs
    window = _window(plan, bound)
    return Need(window.wide + plan.fraction[scores] - SCORE_FRACTION, 0), Need(window.ring, window.ring)


def _rows(shape: Shape) -> Shape:
    """Cut rows that are too long for a histogram into equal parts, the last one filled up: (..., parts, size)."""
    n = shape[-1]
    parts = -(-n // ROW)
    return (*shape[:-1], parts, -(-n // parts))


def _in_rows(e: Emitter, x: int, window: _Window) -> int:
    """Emit the scores in rows, counted from the window's start."""
    shape, excess = e.trace.primitives[x].shape, e.plan.fraction[x] - SCORE_FRACTION
    value = e.get(x, window.wide + excess)
    value = e.truncate(value, shape, excess) if excess > 0 else e.lift(value, shape, -excess)
    rows, last = _rows(shape), len(shape) - 1
    index = e.emit(local.AddConstant(shape, value.ring, -window.start), value.index)
    if fill := rows[-2] * rows[-1] - shape[-1]:  # the row's first entries stand twice, which is no matter to its bound
        first = e.emit(local.Slice((*shape[:-1], fill), value.ring, last, 0, fill, 1), index)
        index = e.emit(local.Concat((*shape[:-1], shape[-1] + fill), value.ring, last), index, first)
    return e.emit(local.Reshape(rows, value.ring), index)


def emit_bound(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit the number of bins up to the largest score of each row (see ``two_party.digits``) times their width.

    Counted from the window's start, that is an upper bound of the row, at most two bins too high, and LOSS if halves of
    the row were compared before.
    """
    (x,) = p.inputs
    w = _window(e.plan, i)
    scores, rows = _in_rows(e, x, w), _rows(e.trace.primitives[x].shape)
    _watch(e, x, e.emit(tp.Open(rows, w.ring), scores), rows, w)  # which the exponential opens anyway
    for _ in range(w.halves):
        scores, rows = larger_halves(e, scores, rows, w.wide, w.tolerance)
    at = e.emit(tp.Open(rows, w.ring), scores)
    *telling, histogram = _counters(rows, w)
    operands: tuple[int, ...] = (at,)
    if telling:
        inside, opening = telling
        operands = (e.emit(opening, e.emit(inside, at)), at)
    counted = e.emit(histogram, *operands)
    shape = (*rows[:-1], w.bins)
    if rows[-2] > 1:  # a bin of the row is filled if it is in one of the parts
        filled = _filled(e, counted, shape, rows[-1], 8, 1)
        shape = (*shape[:-2], 1, w.bins)
        counted = e.emit(local.Sum(shape, 8, (len(shape) - 2,)), filled)
    filled = _filled(e, counted, shape, rows[-2] if rows[-2] > 1 else rows[-1], w.ring, 1 << w.shift)
    shape = (*shape[:-1], 1)
    total = e.emit(local.Sum(shape, w.ring, (len(shape) - 1,)), filled)
    lost = round(LOSS * 2**SCORE_FRACTION) if w.halves else 0
    moved = e.emit(local.AddConstant(shape, w.ring, w.start + lost), total)
    return Share(e.emit(local.Reshape(p.shape, w.ring), moved), w.ring, SCORE_FRACTION)


def _watch(e: Emitter, x: int, at: int, rows: Shape, w: _Window) -> None:
    """Check that every score, opened as ``at``, is one that the histogram counts, or lies below the window.

    A row that lies below the window as a whole shows in the sum of its exponentials: its reciprocal checks it.
    """
    e.watch.digits(at, rows, w.ring, w.shift + w.coarser, *_passing(e.plan.ranges.span(x)[0], w))


def _passing(low: float, w: _Window) -> tuple[int, int]:
    """Return the first coarse digit of scores down to ``low``, and how many digits there are up to the last bin."""
    first = min(0, (math.floor(low * ROUNDED * 2**SCORE_FRACTION) - w.start) >> (w.shift + w.coarser))
    return first, (w.bins >> w.coarser) - first


def _filled(e: Emitter, counts: int, shape: Shape, most: int, ring: int, unit: int) -> int:
    """Emit [count > 0] times ``unit`` for counts up to ``most``, at most 255."""
    width = most.bit_length()
    empty = e.emit(tp.DigitIn(shape, width, 0, 1), e.emit(tp.Open(shape, width), counts))
    number = e.emit(tp.Select(shape, ring, (0,), (-unit,)), e.emit(tp.OpenBits(shape, 1), empty))
    return e.emit(local.AddConstant(shape, ring, unit), number)


def emit_exponential(e: Emitter, i: int, p: Primitive) -> Share:
    scores, bound = p.inputs
    w = _window(e.plan, bound)
    rows = _rows(p.shape)
    top = e.get(bound, w.ring).index
    single = (*rows[:-2], 1, 1)
    at = e.emit(tp.Open(single, w.ring), e.emit(local.Reshape(single, w.ring), top))
    opened = e.emit(tp.Open(rows, w.ring), _in_rows(e, scores, w))
    below = e.emit(tp.OpenedSum(rows, w.ring, (False, True), -w.start), at, opened)
    operands: tuple[int, ...] = (below,)
    power = _power(e.plan, i, rows, w.ring)
    if w.ring > power.shift + power.places:
        near = e.emit(tp.DigitIn(rows, w.ring, power.shift, 1 << power.places), below)
        operands = (e.emit(tp.OpenBits(rows, 1), near), below)
    whole = (*p.shape[:-1], rows[-2] * rows[-1])
    index = e.emit(local.Reshape(whole, WORD), e.emit(power, *operands))
    if whole != p.shape:
        index = e.emit(local.Slice(p.shape, WORD, len(whole) - 1, 0, p.shape[-1], 1), index)
    return Share(index, WORD, power.mask_fraction + PUBLIC_FRACTION)


def _power(plan: Plan, i: int, rows: Shape, ring: int) -> tp.Exponential:
    """Choose the intervals of an exponential: narrow ones if that spares an extension, and few bytes more are dealt.

    Their factors have fewer fraction bits, which are truncated: as many as leave the ring that readers need.
    """
    usual = tp.Exponential(rows, ring, _EXPONENT, SCORE_FRACTION, MASK_FRACTION, PUBLIC_FRACTION)
    mask = WORD + plan.fraction[i] - plan.base[i] - PUBLIC_FRACTION
    if not NARROW_MASKS[0] <= mask < MASK_FRACTION:  # it needs no extension, or one anyway
        return usual
    shift = SCORE_FRACTION + int(math.log2(NARROW))
    if ring < shift + NARROW_PLACES:
        return usual
    if rows[-2] * rows[-1] * math.exp(-NARROW * (2**NARROW_PLACES - 1)) > LOST:
        return usual
    form = shift, SCORE_FRACTION, min(mask, NARROW_MASKS[1]), PUBLIC_FRACTION, NARROW_PLACES
    narrow = tp.Exponential(rows, ring, *form)
    return narrow if narrow.cost().dealt - usual.cost().dealt <= plan.prices.table_bytes else usual
