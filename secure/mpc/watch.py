"""Emission of checks: whether each value of a query lies where its ring, its table or its window holds it.

A value that outgrows its ring wraps, and whatever reads it as a number is wrong. Arithmetic modulo 2^k goes on
regardless, so a value needs a check only where something reads it as a number: where it is extended or lifted, where it
is compared, where a table or a window takes it, and where the client reads the answer. What is opened is checked too,
as that is cheap and near the cause.

- ``within`` asks for the coarse digit of the value in its own ring (``two_party.digits``). A ring has a spare bit, so
  half of its digits must not occur. If the value is opened anyway, a check takes no message and no round, and 1 to 4
  dealt bytes an element. Otherwise its top bits are opened, at 3 to 5 bits an element each way.
- ``between`` compares with both ends of a range, for the arguments of roots and reciprocals: one number a row.

A check never fails for a value within its calibrated range, margin included. It surely fails for a value from its
limit on, where the result may begin to be wrong, up to 3 times the limit, where the ring begins anew with numbers that
look right. Of values beyond that about half are noticed, as if they were random; usually many leave theirs at once.
The argument of a polynomial without knots has less margin: x^4 is sixteen times as large for each bit of it, and would
soon be beyond 3 times its own limit. It passes as far as the result is surely noticed, and at least in its calibrated
range.

The bits of all checks of one part of the model become one number for the client (``two_party.conditions``), which is
revealed with the answer: zero if all is well. The server learns nothing, and the client learns for each part of the
model whether a value left its range, and no more.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from protocols import local
from protocols import two_party as tp
from protocols.bits import plane_bytes
from protocols.protocol import Protocol, Shape, count
from protocols.ring import WORD
from protocols.two_party.conditions import PARITIES
from secure.lowering.ranges import ROUNDED
from secure.lowering.trace import Trace
from secure.mpc.comparing import cheapest_compare
from secure.mpc.plan import Plan
from secure.mpc.share import Share

FEWEST, MOST = 3, 5  # bits of a digit
FINEST = 7  # of one that tells ends closer than a ring's
_SAME = ("bounded", "reshape", "expand", "permute", "slice", "take")
PLACES = 64  # the most parts of a model that are told apart
ELSEWHERE = "(elsewhere)"
_STEPS = 256  # arguments at which a polynomial is looked at
_NOISE = 4  # units by which fixed point may miss the argument of a constant row's root


class Emits(typing.Protocol):
    """The part of ``Emitter`` with which checks are emitted."""

    plan: Plan
    trace: Trace
    path: str

    def emit(self, protocol: Protocol, *inputs: int) -> int: ...
    def get(self, i: int, ring: int) -> Share: ...
    def opened(self, i: int) -> int: ...
    def truncate(self, value: Share, shape: Shape, shift: int) -> Share: ...


def place_of(path: str) -> str:
    """Return the part of a model that a module belongs to: up to the first number in its path, or two names of it."""
    parts = path.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), 1)
    return ".".join(parts[: number + 1]) or "(model)"


def _digit(plan: Plan, i: int) -> tuple[int, int, int]:
    """Return the bits of a digit, and the lowest and the highest digit in which value i may lie.

    A ring has room for an eighth more than a range needs, so that 5 bits always do. What is chosen shows in which part
    of an octave the calibrated range ends: its lower half, the next quarter, or above.
    """
    k = plan.own(i)
    reach = plan.ranges.magnitude(i) * ROUNDED * 2.0 ** plan.fraction[i]
    if (ends := _ends(plan, i)) is not None:
        return _told_apart(k, [end * 2.0 ** plan.fraction[i] for end in ends])
    for bits in range(min(FEWEST, k), min(MOST, k) + 1):
        n = (1 << (bits - 2)) - 1
        if n << (k - bits) >= (reach if bits < k else math.floor(reach)):
            return bits, -n, n
    raise AssertionError(f"a ring of {k} bits for {reach:g} units")


def _ends(plan: Plan, i: int) -> tuple[float, float, float, float] | None:
    """Return the ends that value i may have: the lowest, calibration's own two, and the highest. None: its whole range.

    The first and the last are where a polynomial that reads it reaches 3 times what its result's ring holds, which is
    then noticed; or just what its ring would hold, if nobody sees the polynomial alone (``fused``).
    """
    (low, high), reach = plan.ranges.seen(i), plan.ranges.magnitude(i)
    ends = [-reach, reach]
    for j in plan.readers[i]:
        p = plan.trace.primitives[j]
        if p.op == "polynomial_product" and p.inputs[1] == i:
            of, piece, times = p.attrs["polynomial"], p.attrs["piece"], 1
        elif p.op == "piecewise" and not p.attrs["knots"]:
            of, piece, times = j, p.attrs["pieces"][0], 3
        else:
            continue
        most = times * 2.0 ** (plan.own(of) - 2 - plan.fraction[of]) / ROUNDED
        for side, end in enumerate(ends):
            x = torch.linspace(0.0, end, _STEPS + 1, dtype=torch.float64)
            beyond = (piece(x).abs() > most).nonzero()
            ends[side] = end if not len(beyond) else float(x[max(0, int(beyond[0]) - 1)])
    if ends == [-reach, reach]:
        return None
    low, high = min(low, 0.0) * ROUNDED, max(high, 0.0) * ROUNDED
    return min(ends[0], low), low, high, max(ends[1], high)


def _told_apart(k: int, ends: Sequence[float]) -> tuple[int, int, int]:
    """Return what ``_digit`` does for a ring of k bits and a value's four ``_ends``, in units.

    A digit may be read as the next one. FINEST bits are the most; then a value may end later, by 2^-FINEST of the ring.
    """
    for bits in range(min(FEWEST, k), min(FINEST, k) + 1):
        step = 2.0 ** (k - bits)
        low, high = math.floor(ends[1] / step), math.ceil(ends[2] / step)
        if (low - 1) * step >= ends[0] and (high + 1) * step <= ends[3]:
            break
    return bits, min(low, math.ceil(ends[0] / step) + 1), max(high, math.floor(ends[3] / step) - 1)


@dataclass
class Watch:
    """The checks of a circuit in the making, by the part of the model. on: False to make none."""

    e: Emits
    on: bool
    _planes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # a plane of bits, and how many
    _within: set[int] = field(default_factory=set)

    def within(self, i: int) -> None:
        """Check that value i of the trace lies within its own ring, less the spare bit."""
        if not self.on or i in self._within or self._follows(i):
            return
        e, shape, k = self.e, self.e.trace.primitives[i].shape, self.e.plan.own(i)
        e.path, before = e.trace.primitives[i].path, e.path
        if e.plan.opened[i] >= k:
            self._within.add(i)  # opening it would check it again
            self._inside(i, e.opened(i), e.plan.coarse(i))
        else:
            bits, *_ = _digit(e.plan, i)
            top = e.truncate(e.get(i, k), shape, k - bits)
            self._inside(i, e.emit(tp.Open(shape, bits), top.index), k - bits)
        e.path = before

    def _follows(self, i: int) -> bool:
        """Tell whether a value is in its range if what it is computed from is, which is checked.

        An exponential is at most 1, as no score is above its row's bound. A root is in its range if its argument is;
        that of a constant row is not, and multiplied by nothing.
        """
        while (p := self.e.trace.primitives[i]).op in _SAME:
            (i,) = p.inputs
        return p.op in ("exp_below", "inverse_power", "power")

    def _inside(self, i: int, opening: int, dropped: int = 0) -> None:
        """Check the top digit of value i in its own ring, by an opening without its lowest ``dropped`` bits."""
        self._within.add(i)
        shape, ring = self.e.trace.primitives[i].shape, self.e.plan.own(i) - dropped
        bits, low, high = _digit(self.e.plan, i)
        inside = tp.DigitIn(shape, ring, ring - bits, high - low + 1, low % (1 << bits))
        self._keep(self.e.emit(inside, opening), count(shape))

    def between(self, i: int, low: float, high: float) -> None:
        """Check that value i lies in [low, high], or is what is left of a constant row: the number added before a root.

        For values of which there is one a row, as every one of them is compared.
        """
        if not self.on:
            return
        e, p, k = self.e, self.e.trace.primitives[i], self.e.plan.own(i)
        unit = 2.0 ** e.plan.fraction[i]
        ends = [math.floor(low / ROUNDED * unit), min(math.ceil(high * ROUNDED * unit) + 1, 1 << (k - 2))]
        nothing = math.ceil(p.attrs["value"] * unit) + _NOISE if p.op == "offset" else 0
        if 0 < nothing < ends[0]:
            ends.insert(0, nothing)
        whole = e.plan.opened[i] >= k and not e.plan.coarse(i)
        opened = e.opened(i) if whole else e.emit(tp.Open(p.shape, k), e.get(i, k).index)
        if i not in self._within:  # the comparison alone would take numbers beyond half of the ring for others
            self._inside(i, opened)
        compare = cheapest_compare(p.shape, k, tuple(ends), 0, e.plan.prices.dealt_for_online)
        # one of [x < least] and [x < most], and not both; below ``nothing`` it is all three
        every = local.Indicators(plane_bytes(count(p.shape)), (tuple(range(len(ends))),), (False,))
        self._keep(e.emit(every, e.emit(compare, opened)), count(p.shape))

    def digits(self, opening: int, shape: Shape, ring: int, shift: int, first: int, number: int) -> None:
        """Check that the digit of ``shift`` bits of an opened value is one of ``number`` from ``first`` on."""
        if self.on:
            inside = tp.DigitIn(shape, ring, shift, number, first % (1 << (ring - shift)))
            self._keep(self.e.emit(inside, opening), count(shape))

    def _keep(self, plane: int, size: int) -> None:
        place = place_of(self.e.path)
        if place not in self._planes and len(self._planes) >= PLACES:
            place = ELSEWHERE
        self._planes.setdefault(place, []).append((plane, size))

    def finish(self) -> tuple[int, tuple[str, ...]] | None:
        """Emit what becomes of all checks, and its Reveal; return that with the parts of the model that it names.

        None if there are no checks.
        """
        if not self._planes:
            return None
        e, alarms = self.e, []
        for place, planes in self._planes.items():
            e.path = place
            unmet = e.emit(tp.Unmet(tuple(size for _, size in planes)), *(plane for plane, _ in planes))
            alarms.append(e.emit(tp.Alarm(), e.emit(tp.OpenBits((PARITIES,), 1), unmet)))
        e.path, shape = "", (len(alarms),)
        joined = alarms[0] if len(alarms) == 1 else e.emit(local.Concat(shape, WORD, 0), *alarms)
        return e.emit(tp.Reveal(shape, WORD), joined), tuple(self._planes)
