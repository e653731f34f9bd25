"""Emission of the largest entries of rows, and of where they stand, as rounds of a tournament among groups.

A level cuts every row into groups, ranks the entries of each group by all comparisons (see
``protocols.two_party.ranking``), and keeps the first of each. A level of any size takes the same rounds: larger groups
take more comparisons and longer unit vectors, and spare levels. The sizes are those of the least price. Two entries
alone need no ranks to be opened.

Where every entry has a whole number beside it, the numbers of the largest are found as positions are.

Groups are neighbours, and what a level keeps stands in their order. So of equal entries the first one comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from protocols import local
from protocols import two_party as tp
from protocols.protocol import Protocol, Shape, count
from protocols.two_party.comparison import DIGITS
from protocols.two_party.ranking import MOST_RANKED, pairs_of
from secure.errors import DoesNotFit
from secure.lowering.primitives import Primitive
from secure.mpc.comparing import cheapest_compare
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Need, Plan
from secure.mpc.prices import Prices
from secure.mpc.share import Share

SIZES = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, MOST_RANKED)
"""The sizes of groups that are tried."""

MOST_KEPT = MOST_RANKED // 2
"""The most entries that are asked for of a longer row."""


@dataclass(frozen=True)
class _Task:
    """The ``kept`` largest of each of ``rows`` rows, whose entries have ``width`` bits and positions ``bits`` bits."""

    rows: int
    kept: int
    width: int
    bits: int


def _dropped(plan: Plan, x: int, tolerance: float) -> int:
    """Return the fraction bits that entries lose before they are compared: the fewest that spare a round, or none.

    Truncation moves each of two entries by up to a unit of 2^dropped.
    """
    most = max(0, int(tolerance * 2.0 ** plan.fraction[x]).bit_length() - 2)
    width = plan.own(x) + 1

    def rounds(dropped: int) -> int:
        return min(len(tp.Compare((1,), width - dropped, 0, (0,), digit).levels) for digit in DIGITS)

    return next(dropped for dropped in range(most + 1) if rounds(dropped) == rounds(most))


def needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring = plan.own(p.inputs[0]) + 1  # a difference of two entries has a sign
    return (Need(ring, ring),)


def numbered_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring = _number_bits(plan, i)
    return (*needs(plan, i, p), Need(ring, ring))


def _number_bits(plan: Plan, i: int) -> int:
    """Return the ring of whole numbers that are chosen, which is that of the result as its readers need it."""
    return max(plan.own(i), plan.base[i])


def emit_indices(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit the positions of the largest entries, in the ring that readers need."""
    bits = _number_bits(e.plan, i)
    return Share(_emit(e, p, bits, positions=True), bits, 0)


def emit_numbers(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit the whole numbers beside the largest entries, which take the place of positions in every level."""
    bits = _number_bits(e.plan, i)
    numbers = e.get(p.inputs[1], bits)
    return Share(_emit(e, p, bits, positions=True, numbers=numbers.index), bits, 0)


def emit_values(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit the largest entries themselves."""
    x = p.inputs[0]
    dropped = _dropped(e.plan, x, p.attrs["tolerance"])
    bits = e.trace.primitives[x].shape[-1].bit_length() + 2
    return Share(_emit(e, p, bits, positions=False), e.plan.own(x) + 1 - dropped, e.plan.fraction[x] - dropped)


def _emit(e: Emitter, p: Primitive, bits: int, *, positions: bool, numbers: int | None = None) -> int:
    """Emit all levels; return the positions of the largest entries, or the entries, in the shape of the result.

    numbers: modulo 2^bits, one for each entry, which are returned in place of positions.
    """
    x = p.inputs[0]
    (*_, entries), kept = e.trace.primitives[x].shape, p.shape[-1]
    dropped = _dropped(e.plan, x, p.attrs["tolerance"])
    value = e.truncate(e.get(x, e.plan.own(x) + 1), e.trace.primitives[x].shape, dropped)
    e.watch.within(x)
    task = _Task(count(p.shape[:-1]), kept, e.plan.own(x) + 1 - dropped, bits)
    values = e.emit(local.Reshape((task.rows, entries), task.width), value.index)
    ring = bits if positions else task.width
    if numbers is not None:
        numbers = e.emit(local.Reshape((task.rows, entries), bits), numbers)
    if entries == 1:
        only = e.emit(local.MulConstant((task.rows, 1), bits, 0), values) if numbers is None else numbers
        last = only if positions else values
    elif entries == 2 and kept == 1:
        last = _larger_of_two(e, task, values, numbers, positions=positions)
    else:
        last = _tournament(e, p, task, entries, values, numbers, positions=positions)
    return e.emit(local.Reshape(p.shape, ring), last)


def _larger_of_two(e: Emitter, task: _Task, values: int, numbers: int | None, *, positions: bool) -> int:
    """Emit [x_0 < x_1], which is the position of the larger, or of values or numbers n_0 - [x_0 < x_1] (n_0 - n_1)."""
    shape, width = (task.rows, 1), task.width

    def halves(ring: int, pair: int) -> tuple[int, int]:
        first, second = (e.emit(local.Slice(shape, ring, 1, at, at + 1, 1), pair) for at in (0, 1))
        return first, e.emit(tp.Open(shape, ring), e.emit(local.Sub(shape, ring), first, second))

    first, difference = halves(width, values)
    below = cheapest_compare(shape, width, (0,), 0, e.plan.prices.dealt_for_online)
    second_wins = e.emit(tp.OpenBits(shape, 1), e.emit(below, difference))
    if positions and numbers is None:
        return e.emit(tp.Select(shape, task.bits, (0,), (1,)), second_wins)
    ring = width
    if positions and numbers is not None:
        ring = task.bits
        first, difference = halves(ring, numbers)
    gain = e.emit(tp.Select(shape, ring, (-1,), (0,)), second_wins, difference)
    return e.emit(local.Add(shape, ring), first, gain)


def _tournament(
    e: Emitter, p: Primitive, task: _Task, entries: int, values: int, numbers: int | None, *, positions: bool
) -> int:
    found = _levels(task, entries, e.plan.prices, numbered=numbers is not None)
    if found is None:
        raise DoesNotFit(
            f"{p.where}: the {task.kept} largest of {entries}; the protocol sorts rows of {MOST_RANKED}, and finds "
            f"{MOST_KEPT} of a longer one\nhint: ask for fewer"
        )
    value: int | None = values
    place = numbers
    for groups in found:
        assert value is not None  # the last level alone may have left it out
        parts, start = [], 0
        wanted = groups > 1 or not positions
        for number, size in _groups(entries, groups):
            part = _Part((task.rows, number, size), min(task.kept, size), start, wanted=wanted, placed=positions)
            parts.append(part.emit(e, task, value, place))
            start += number * size
        entries = _left(entries, groups, task.kept)
        value = _joined(e, (task.rows, entries), task.width, [kept for kept, _ in parts])
        place = _joined(e, (task.rows, entries), task.bits, [at for _, at in parts])
    result = place if positions else value
    assert result is not None
    return result


def _joined(e: Emitter, shape: Shape, ring: int, parts: Sequence[int | None]) -> int | None:
    """Emit the parts of a level side by side, if they are wanted."""
    found = [part for part in parts if part is not None]
    return e.emit(local.Concat(shape, ring, 1), *found) if len(found) > 1 else next(iter(found), None)


@dataclass(frozen=True)
class _Part:
    """Groups of one size in a level: shape (rows, groups, size), of the row's entries from ``start`` on.

    wanted: the kept entries are needed. placed: their positions are.
    """

    shape: Shape
    kept: int
    start: int
    wanted: bool
    placed: bool

    @property
    def digit(self) -> int:
        """The bits of a rank."""
        return (self.shape[-1] - 1).bit_length()

    def comparison(self, task: _Task, dealt_for_online: int) -> tp.Compare:
        """Return the comparison of all pairs of each group."""
        pairs = (*self.shape[:-1], pairs_of(self.shape[-1]))
        return cheapest_compare(pairs, task.width, (0,), 0, dealt_for_online)

    def protocols(self, task: _Task, dealt_for_online: int, *, first: bool) -> Iterator[Protocol]:
        """Yield what ``emit`` emits and is not free."""
        shape, digit, kept = self.shape, self.digit, self.kept
        compare = self.comparison(task, dealt_for_online)
        yield tp.Open(shape, task.width)
        yield compare
        yield tp.OpenBits(compare.shape, 1)
        yield tp.Select(compare.shape, digit, (0,), (1,))
        yield tp.Open(shape, digit)
        if self.wanted:
            yield tp.Placed(shape, task.width, digit, kept)
        if self.placed and first:
            yield tp.PlacedPositions(shape, task.bits, digit, kept, self.start)
        elif self.placed:
            yield tp.Open(shape, task.bits)
            yield tp.Placed(shape, task.bits, digit, kept)

    def emit(self, e: Emitter, task: _Task, values: int, places: int | None) -> tuple[int | None, int | None]:
        """Emit the kept entries and their positions, each (rows, groups * kept).

        values, places: the level's entries, (rows, entries), and their positions; None where they are 0, 1, ....
        """
        shape, digit = self.shape, self.digit
        compare = self.comparison(task, e.plan.prices.dealt_for_online)
        opened = self._opened(e, task.width, values)
        below = e.emit(compare, e.emit(tp.OpenedPairs(shape, task.width), opened))
        bits = e.emit(tp.OpenBits(compare.shape, 1), below)
        numbers = e.emit(tp.Select(compare.shape, digit, (0,), (1,)), bits)
        ranks = e.emit(tp.Open(shape, digit), e.emit(tp.Ranks(shape, digit), numbers))
        value = place = None
        if self.wanted:
            value = self._flat(e, task.width, e.emit(tp.Placed(shape, task.width, digit, self.kept), ranks, opened))
        if self.placed and places is None:
            found = e.emit(tp.PlacedPositions(shape, task.bits, digit, self.kept, self.start), ranks)
            place = self._flat(e, task.bits, found)
        elif self.placed and places is not None:
            at = self._opened(e, task.bits, places)
            place = self._flat(e, task.bits, e.emit(tp.Placed(shape, task.bits, digit, self.kept), ranks, at))
        return value, place

    def _opened(self, e: Emitter, ring: int, x: int) -> int:
        rows, stop = self.shape[0], self.start + count(self.shape[1:])
        part = e.emit(local.Slice((rows, stop - self.start), ring, 1, self.start, stop, 1), x)
        return e.emit(tp.Open(self.shape, ring), e.emit(local.Reshape(self.shape, ring), part))

    def _flat(self, e: Emitter, ring: int, x: int) -> int:
        return e.emit(local.Reshape((self.shape[0], self.shape[1] * self.kept), ring), x)


def _groups(entries: int, groups: int) -> list[tuple[int, int]]:
    """Cut a row into groups whose sizes differ by one at most: (number, size) of the larger ones, and of the others."""
    size, larger = divmod(entries, groups)
    return [(larger, size + 1)] * (larger > 0) + [(groups - larger, size)]


def _left(entries: int, groups: int, kept: int) -> int:
    """Return how many entries a level leaves."""
    return sum(number * min(kept, size) for number, size in _groups(entries, groups))


def _levels(task: _Task, entries: int, prices: Prices, *, numbered: bool = False) -> tuple[int, ...] | None:
    """Return the number of groups of each level, the last of which is one, by the least price; None if none will do.

    numbered: the entries come with numbers, as those of later levels do with positions.
    """
    known: dict[int, tuple[float, tuple[int, ...]] | None] = {}

    def best(n: int, *, first: bool) -> tuple[float, tuple[int, ...]] | None:
        if n in known:
            return known[n]
        ways: list[tuple[float, tuple[int, ...]]] = []
        if n <= MOST_RANKED:
            ways.append((_price(task, n, 1, prices, first=first), (1,)))
        for groups in sorted({-(-n // size) for size in SIZES if task.kept < size < n}):
            left = _left(n, groups, task.kept)
            if groups < 2 or n // groups < 2 or left >= n:
                continue
            if (after := best(left, first=False)) is not None:
                ways.append((_price(task, n, groups, prices, first=first) + after[0], (groups, *after[1])))
        known[n] = min(ways, default=None)
        return known[n]

    found = best(entries, first=not numbered)
    return None if found is None else found[1]


def _price(task: _Task, entries: int, groups: int, prices: Prices, *, first: bool) -> float:
    """Return the price of a level, in online bytes. Its groups of both sizes take the same rounds."""
    total, rounds = 0.0, 0
    for number, size in _groups(entries, groups):
        part = _Part((task.rows, number, size), min(task.kept, size), 0, wanted=groups > 1, placed=True)
        costs = [protocol.cost() for protocol in part.protocols(task, prices.dealt_for_online, first=first)]
        rounds = max(rounds, sum(cost.rounds for cost in costs[:5]))  # a position is opened beside its entry
        total += sum(prices.of(replace(cost, rounds=0)) for cost in costs)
    return total + rounds * prices.round_bytes
