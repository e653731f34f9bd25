"""Bits and histograms of the coarse digit of an opened secret, from dealt tables: the maxima of rows in a few rounds.

x in [0, 2^k - 2^s) is opened modulo 2^k as z = x + r. With top(v) = floor((v mod 2^k) / 2^s) and N = 2^(k-s), its
*coarse digit* is j = (top(z) - top(r)) mod N. The low s bits of x and r carry 0 or 1 into top(z) = top(x) + top(r) +
carry, and top(x) <= N - 2, so j is top(x) or top(x) + 1, without a wrap. With s = 0 nothing carries, and j = x for all
x. Nobody knows j: the parties know top(z), and the dealer knows top(r). Whatever depends on j alone is a table over the
public top(z), which the dealer shifts by its top(r) and shares. Looking it up takes no message.
``DigitIn``: one bit, [j < count], from an XOR-shared table of N bits.
``Histogram``: the unit vector of j follows from that of top(r), which is dealt: j = i if and only if top(z) - i is
top(r). Unit vectors are added up over a row, so that c_i = sum of the entries from i on is the number of elements with
j >= i, for i below ``bins``.

If only j in a window count, the dealt vector need not have an entry for each of the N digits. Cut the circle of digits
into equal blocks, the first ones longer by one if N is no multiple, and let the *place* of a digit be its position in
its block. Digits of one place are at least L = floor(N / blocks) apart, around the circle as well. So if |j - i| < L,
then top(z) - i and top(r) are equal if and only if their places are, and one entry for each place suffices. All i lie
in [0, bins), so L must be above j and above bins - 1 - j for every j that counts.

Whether an element counts can be told from a coarser digit of the same opening. For J, the digit of shift + g, and the
low g bits u and v of top(z) and top(r): j = 2^g J + u - v modulo N, with |u - v| < 2^g. So the bit [J < count] of
``DigitIn`` takes all x in [0, (count - 1) 2^(shift + g)), and no j outside of (-2^g, 2^g count). With g = 0, those are
the digits below ``count``.

The maximum of a row follows from its counts c_i, i < bins:
1. Open c_i modulo 2^8 (``Open``).  2. [c_i = 0] is [j < 1] of a byte with s = 0, where j is the byte itself
(``DigitIn``); open these bits (``OpenBits``).  3. The sum of [c_i > 0] over the bins (``Select``, ``Sum``) is
M = 1 + the largest j, or 0 if no element counts.
With m the largest x that counts, (M - 2) 2^s < m < M 2^s. The j of m is at least top(m), hence m < M 2^s. If
M = top(m) + 1, then m >= (M - 1) 2^s. Otherwise M = top(m) + 2, so some element has top(m) and a carry. Its low s bits
are above 0, as those of r alone do not carry. So it is above top(m) 2^s = (M - 2) 2^s, and m is no smaller.

Seen by the server: its corrections of the tables, masked by the client's shares; both parties see nothing else. The
counts themselves would show how the numbers of a row are spread. But they are shares, which only step 1 opens, under a
fresh uniform mask in all of their 8 bits; bits are opened under masks too.
Source: shifted tables, TinyTable (Damgard et al., CRYPTO 2017) and one-time truth tables (Ishai et al., TCC 2013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols import bits, kernels, ring
from protocols.fields import Bits, Count, Digits, Ring, Shape, Whole
from protocols.kernels import Array
from protocols.protocol import CircuitCost, Draw, Material, Rows, Silent, Weights, count, plane_shape
from protocols.wire import Wire

DIGIT_BITS = 12
"""The most bits of a digit in which ``DigitIn`` looks: a table of 512 bytes an element."""

ROW = 255
"""The most elements that one histogram counts, so that its counts do not wrap modulo 2^8."""

PLACES = 512
"""The most places of an element in a histogram: a vector of 512 bytes, dealt once or twice."""


@kernels.compiled
def _interval_rows(starts: Array, size: int, below: int, out: Array) -> None:
    for i in range(starts.size):
        for turn in (0, size):  # the part that goes on at zero is that of the turn before
            first, last = max(starts[i] - turn, 0), min(starts[i] - turn + below, size) - 1
            for byte in range(first >> 3, (last >> 3) + 1 if last >= first else 0):
                whole = 0xFF
                if byte == first >> 3:
                    whole &= 0xFF << (first & 7)
                if byte == last >> 3:
                    whole &= 0xFF >> (7 - (last & 7))
                out[i, byte] |= np.uint8(whole)


def _intervals(top: Tensor, size: int, first: int, below: int) -> Rows:
    """Return, for every top(r) < size, the packed bits [(t - top(r) - first) mod size < below] for t < size."""
    used, index = (np.arange(size), top) if len(top) > size else (top.numpy(), torch.arange(len(top)))
    rows = np.zeros((len(used), -(-size // 8)), np.uint8)
    _interval_rows((used + first) & (size - 1), size, below, rows)
    return Rows(torch.from_numpy(rows), index)


def warm_up() -> None:
    """Compile what is compiled here."""
    _intervals(torch.zeros(1, dtype=torch.int64), 8, 0, 1)


def _check_digits(ring_bits: int, shift: int, among: int) -> None:
    """Raise ValueError unless ``among`` of the digits above bit ``shift`` can be told from the others."""
    if not 1 <= ring_bits - shift <= DIGIT_BITS or not 1 <= among < 1 << (ring_bits - shift):
        raise ValueError(f"{among} of the digits above bit {shift} in a ring of {ring_bits} bits")


@dataclass(frozen=True)
class DigitIn(Silent):
    """Bits [j in first .. first + count - 1] of the coarse digit j, one plane of shape (1, ceil(n / 8)).

    Digits are counted modulo N, the number of digits, 2 .. 2^12. x in [0, 2^ring - 2^shift) as a residue, or any x if
    shift = 0: with ring = 8 and count = 1, whether a byte is zero. For other x, j is 0 where it would be N.
    Rounds 0; offline ceil(N / 8) bytes an element to the server, from a stream of the same size at each party.
    Error: exact for shift = 0. Otherwise j is top(x) or top(x) + 1; it is the j of every other reader of the opening
    with the same ring and shift.
    """

    kind: ClassVar[str] = "digit_in"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    gives: ClassVar[str] = "bits"
    error: ClassVar[str] = "exact for the digit or the next one"
    shape: Shape
    ring: Ring
    shift: Bits
    count: Whole
    first: Whole = 0

    def validate(self) -> None:
        _check_digits(self.ring, self.shift, self.count)
        if not self.first < self._digits:
            raise ValueError(f"digits from {self.first} on, of {self._digits}")

    @property
    def _digits(self) -> int:
        return 1 << (self.ring - self.shift)

    @property
    def out(self) -> Wire:
        return Wire(plane_shape(self.shape), planes=True)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("table", (count(self.shape), -(-self._digits // 8)), planes=True, derived=True),)

    def _top(self, x: Tensor) -> Tensor:
        return ring.right(x.reshape(-1), self.shift) & (self._digits - 1)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        return {"table": _intervals(self._top(r), self._digits, self.first, self.count)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, _),) = operands
        return kernels.looked_up(z, material["table"], self.shift, self._digits).reshape(self.out.shape)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        inside = (self._top(x) - self.first) % self._digits < self.count
        return bits.pack(inside.to(torch.int64)).reshape(self.out.shape)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=count(self.shape) * -(-self._digits // 8))

    def comparisons(self) -> int:
        return count(self.shape)


@dataclass(frozen=True)
class DigitsIn(Silent):
    """Bits [j < count] of several coarse digits j of x, as ``DigitIn`` gives them: a plane for each, stacked.

    Rounds 0; offline the bytes of all tables. Error: that of each.
    """

    kind: ClassVar[str] = "digits_in"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    gives: ClassVar[str] = "bits"
    error: ClassVar[str] = DigitIn.error
    shape: Shape
    ring: Ring
    digits: Digits

    @cached_property
    def each(self) -> tuple[DigitIn, ...]:
        """The protocol of each digit."""
        return tuple(DigitIn(self.shape, self.ring, shift, below) for shift, below in self.digits)

    def validate(self) -> None:
        for shift, below in self.digits:
            _check_digits(self.ring, shift, below)

    @property
    def out(self) -> Wire:
        return Wire(plane_shape(self.shape, len(self.digits)), planes=True)

    @property
    def _bytes(self) -> list[int]:
        """The bytes of an element's row of each table."""
        return [-(-(1 << (self.ring - shift)) // 8) for shift, _ in self.digits]

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("tables", (count(self.shape), sum(self._bytes)), planes=True, derived=True),)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        found = [digit.deal(masks, operands, weights)[0]["table"] for digit in self.each]
        return {"tables": torch.cat([rows.table[rows.row] for rows in found], 1)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        tables = material["tables"].split(self._bytes, 1)
        planes = [
            digit.compute(party, {"table": table.contiguous()}, operands, weights)
            for digit, table in zip(self.each, tables, strict=True)
        ]
        return torch.cat(planes)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return torch.cat([digit.clear(operands, weights) for digit in self.each])

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=count(self.shape) * sum(self._bytes))

    def comparisons(self) -> int:
        return count(self.shape) * len(self.digits)

    def scratch(self) -> int:
        """Return the bytes of all tables, which the dealer makes one by one and joins."""
        return count(self.shape) * sum(self._bytes)


@dataclass(frozen=True)
class Histogram(Silent):
    """Suffix counts of a row's coarse digits, c_i = #{elements with i <= j < bins}, modulo 2^8, for i < bins.

    A row is the last dimension of ``shape``, of at most 255 elements, so that no count wraps; the result has the shape
    (*shape[:-1], bins). x in [0, 2^ring - 2^shift) as a residue, or any x if shift = 0.
    With one block every element counts, and j in [0, N) of the N digits. With more, it reads the opening of one bit b
    an element too, and elements with b = 0 do not count. Those with b = 1 must have a j, as an integer modulo N, in
    (bins - 1 - L, L), L = floor(N / blocks) >= bins: for instance b = [j < L], or the bit of a coarser digit.
    Step: the dealer gives shares of the unit vector of the place of top(r) for b = 1, zeros for b = 0. It knows
    b = c XOR beta but for the public c, and deals one vector for each c.
    Rounds 0; offline ceil(N / blocks) bytes an element to the server, twice that with a bit, from streams of the same
    size. Error: exact for shift = 0. Otherwise j is top(x) or top(x) + 1, the same as for ``DigitIn``.
    """

    kind: ClassVar[str] = "histogram"
    elementwise: ClassVar[bool] = True
    error: ClassVar[str] = "exact for the digits or the next ones"
    shape: Shape  # of the opening
    ring: Ring
    shift: Bits
    bins: Count
    blocks: Count

    def validate(self) -> None:
        if not self.shape or not 1 <= self.shape[-1] <= ROW:
            raise ValueError(f"a row of {self.shape[-1:]} elements, 1 to {ROW} are counted")
        if not 1 <= self.ring - self.shift <= DIGIT_BITS:
            raise ValueError(f"the digits above bit {self.shift} in a ring of {self.ring} bits")
        if self.bins > self._digits // self.blocks or self._places > PLACES:
            raise ValueError(f"{self.bins} bins of {self._digits} digits in {self.blocks} blocks")

    @property
    def _digits(self) -> int:
        return 1 << (self.ring - self.shift)

    @property
    def _places(self) -> int:
        return -(-self._digits // self.blocks)

    @property
    def _sets(self) -> int:
        """The dealt vectors of an element."""
        return 2 if self.blocks > 1 else 1

    @property
    def operand_kinds(self) -> tuple[str, ...]:
        return ("bit opening", "opening") if self.blocks > 1 else ("opening",)

    @property
    def out(self) -> Wire:
        return Wire((*self.shape[:-1], self.bins), 8)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("units", (self._sets, count(self.shape), self._places), 8, octets=True, derived=True),)

    def _digit(self, x: Tensor) -> Tensor:
        return ring.right(x, self.shift) & (self._digits - 1)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (*beta, r) = operands
        places, _ = kernels.places(self._digits, self.blocks)
        place = torch.from_numpy(places)[self._digit(r.reshape(-1))]
        units = torch.eye(self._places + 1, self._places, dtype=torch.uint8)  # and a row of zeros
        if beta:
            one = bits.unpack(beta[0][0], place.shape).bool()  # then b = 1 if c = 0; zeros where b = 0
            place = torch.cat([torch.where(one, place, self._places), torch.where(one, self._places, place)])
        return {"units": Rows(units, place)}, None

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        (*opened, (z, _)) = operands
        plane = opened[0].value[0] if opened else None
        return kernels.suffix_counts(z, plane, material["units"], self.shift, self._digits, self.blocks, self.bins)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if self.blocks > 1 and operands[0][0] != 1:
            raise ValueError(f"it reads one bit an element, its operand has {operands[0][0]}")
        return self.out.shape

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        (*planes, x) = operands
        digit = self._digit(x)
        if planes:
            digit = digit - (1 - bits.unpack(planes[0][0], tuple(x.shape))) * self._digits  # in no suffix
        return ((digit[..., None] >= torch.arange(self.bins, device=x.device)) & (digit[..., None] < self.bins)).sum(-2)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=self._sets * count(self.shape) * self._places)
