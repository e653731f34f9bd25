"""Compare an opened secret with public thresholds, on as few bits as its range needs.

x = z - r with z public, and |x - t| < 2^(width-1) for every threshold t. Then x < t is the top bit of x - t modulo
2^width. With zeta = z - t, msb(x - t) = msb(zeta) XOR msb(r) XOR [low(zeta) < low(r)], where low is the width - 1 bits
below the top bit.
The last term compares a public number with a secret that the dealer knows, digit by digit, ``digit`` bits each:
1. For each digit rho of low(r) the dealer gives XOR shares of its unary code, the 2^digit bits [d < rho]. Looking up
   the public digit d gives shares of "less", and the neighbouring bit gives shares of "equal", without a message. One
   table serves all thresholds. A 64-bit word holds the codes of four digits of 4 bits, or that of one digit of 6 bits:
   wide digits take more dealt bytes an element, and fewer opened bits a threshold.
2. less = l_3 XOR e_3 l_2 XOR e_3 e_2 l_1 XOR e_3 e_2 e_1 l_0: the products of up to four bits take one round
   (``bitproducts``). With more than four digits, a second round combines groups of four in the same way. One round
   suffices for 16 bits in digits of 4 bits, and for 24 bits in digits of 6.
The lowest ``drop`` bits may be left out. Then x in [t - 2^drop, t) may count as not below t, which is harmless for
continuous piecewise functions.
Seen by a party: masked bits (two to seven for each group of digits and threshold), each under its own one-time mask;
by the server also its corrections of tables, top bits and mask products, masked by the client's shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import bits, kernels, ring
from protocols.fields import Bits, Residues, Shape
from protocols.protocol import (
    SERVER,
    CircuitCost,
    Draw,
    Material,
    Protocol,
    Step,
    Weights,
    count,
    plane_shape,
    swap,
)
from protocols.two_party import bitproducts
from protocols.two_party.bitproducts import Term
from protocols.wire import Wire

DIGITS = (3, 4, 5, 6)  # the bits that a digit may have: its unary code must fit into a 64-bit word
GROUP = 4  # digits combined in one round


@dataclass(frozen=True)
class _Level:
    """One combining round: group g combines ``sizes[g]`` (less, equal) pairs, lowest first.

    A group of m pairs has the variables e_1..e_{m-1} and l_0..l_{m-2}. All groups but the lowest also have e_0, because
    they need "equal" too.
    """

    sizes: tuple[int, ...]

    @cached_property
    def names(self) -> list[list[tuple[str, int]]]:
        """The variables of each group."""
        return [
            [("e", i) for i in range(0 if group else 1, m)] + [("l", i) for i in range(m - 1)] if m > 1 else []
            for group, m in enumerate(self.sizes)
        ]

    @cached_property
    def terms(self) -> list[tuple[Term, ...]]:
        """The products of each group's variables that are needed: "less" from each pair but the last, then "equal"."""
        return [self._terms(group, m) if m > 1 else () for group, m in enumerate(self.sizes)]

    def _terms(self, group: int, m: int) -> tuple[Term, ...]:
        index = {name: i for i, name in enumerate(self.names[group])}
        less = [frozenset([index["l", j], *(index["e", i] for i in range(j + 1, m))]) for j in range(m - 1)]
        equal = [frozenset(index["e", i] for i in range(m))] if group > 0 else []
        return tuple(less + equal)

    @cached_property
    def variables(self) -> int:
        return sum(map(len, self.names))

    @cached_property
    def dealt(self) -> int:
        return sum(len(bitproducts.mask_products(terms)) for terms in self.terms)


@cache
def _levels(digits: int) -> tuple[_Level, ...]:
    levels = []
    while digits > 1:
        sizes = tuple(min(GROUP, digits - start) for start in range(0, digits, GROUP))
        levels.append(_Level(sizes))
        digits = len(sizes)
    return tuple(levels)


@dataclass(frozen=True)
class Compare(Protocol):
    """Bits [x < t] for every threshold t, stacked: planes of shape (thresholds, ceil(n / 8)).

    There are d = ceil((width - 1 - drop) / digit) digits; ``levels`` combine them in one round each (none for one
    digit, one for up to 4, two for up to 16). Rounds: the number of levels. Online: thresholds * variables bits an
    element each way. Offline, to the server: 8 ceil(d 2^digit / 64) bytes and 1 + thresholds * dealt bits an element.
    With 4 digits of 4 bits and one threshold: 6 bits online each way, 8 bytes and 1 + 15 bits offline. With 2 digits of
    6 bits: 2 bits online each way, 16 bytes and 1 + 1 bits offline.
    Error: exact for -2^(width-1) <= x - t < 2^(width-1) - 2^drop, but x in [t - 2^drop, t) may count as not below t.
    """

    kind: ClassVar[str] = "compare"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    gives: ClassVar[str] = "bits"
    error: ClassVar[str] = "exact but for x within 2^drop below a threshold"
    shape: Shape
    width: Bits
    drop: Bits
    thresholds: Residues
    digit: Bits = 4

    @property
    def operand_ring(self) -> int:
        return self.width

    def validate(self) -> None:
        if not 2 <= self.width <= ring.WORD or not 0 <= self.drop < self.width - 1:
            raise ValueError(f"width {self.width}, drop {self.drop}, {len(self.thresholds)} thresholds")
        if self.digit not in DIGITS:
            raise ValueError(f"digits of {self.digit} bits, they have {DIGITS[0]} to {DIGITS[-1]}")

    @property
    def digits(self) -> int:
        return max(1, -(-(self.width - 1 - self.drop) // self.digit))

    @property
    def levels(self) -> tuple[_Level, ...]:
        return _levels(self.digits)

    @property
    def words(self) -> int:
        return -(-(self.digits << self.digit) // ring.WORD)

    @property
    def out(self) -> Wire:
        return Wire(plane_shape(self.shape, len(self.thresholds)), planes=True)

    @property
    def draws(self) -> tuple[Draw, ...]:
        each, levels = plane_shape(self.shape)[1], list(enumerate(self.levels))
        row = each * len(self.thresholds)  # bytes of one bit of every element and threshold
        masks = [Draw(f"mask{i}", (level.variables, row), planes=True) for i, level in levels]
        dealt = [Draw(f"dealt{i}", (level.dealt, row), planes=True, derived=True) for i, level in levels]
        table = Draw("table", (self.words, count(self.shape)), xor=True, derived=True)
        return (*masks, table, Draw("top", (each,), planes=True, derived=True), *dealt)

    @property
    def _first(self) -> int:
        """The constant with a one at the start of every digit's code: [d <= rho] is [d - 1 < rho], and true for 0."""
        return ring.wrap(sum(1 << place for place in range(0, ring.WORD, 1 << self.digit)))

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        (r,) = operands
        table = kernels.unary_codes(r, self.width, self.drop, self.digit, self.digits)
        out = {"table": table, "top": bits.pack(ring.top_bit(r, self.width))}
        for i, level in enumerate(self.levels):
            parts, start = [], 0
            for group in range(len(level.sizes)):
                terms, width = level.terms[group], len(level.names[group])
                if terms:
                    parts.append(bitproducts.deal(terms, masks[f"mask{i}"][start : start + width]))
                start += width
            out[f"dealt{i}"] = torch.cat(parts)
        return out, None

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        ((z, _),) = operands
        first = self._first if party == SERVER else 0
        top, *found = kernels.digit_planes(
            z, material["table"], self.thresholds, self.width, self.drop, self.digit, self.digits, first
        )
        pairs = list(zip(found[::2], found[1::2], strict=True))  # (less, equal) of every digit, lowest first
        for i, level in enumerate(self.levels):
            pairs = yield from self._combine(party, level, pairs, material[f"mask{i}"], material[f"dealt{i}"])
        share = pairs[0][0].reshape(self.out.shape) ^ material["top"]
        return share ^ top.reshape(self.out.shape) if party == SERVER else share

    def _combine(
        self, party: int, level: _Level, pairs: list[tuple[Tensor, Tensor]], masks: Tensor, dealt: Tensor
    ) -> Step[list[tuple[Tensor, Tensor]]]:
        """Combine groups of up to four (less, equal) pairs into one pair each, in one round."""
        named = [(pairs[GROUP * g + i], name) for g, names in enumerate(level.names) for name, i in names]
        mine = torch.stack([equal if name == "e" else less for (less, equal), name in named]) ^ masks
        (theirs,) = yield swap(mine, Wire((level.variables, self.out.size), planes=True))
        opened = mine ^ theirs
        out, at, used = [], 0, 0
        for group, size in enumerate(level.sizes):
            less, equal = pairs[GROUP * group + size - 1]
            terms = level.terms[group]
            if terms:
                here = slice(at, at + len(level.names[group]))
                given = slice(used, used + len(bitproducts.mask_products(terms)))
                shares = bitproducts.evaluate(terms, party, opened[here], masks[here], dealt[given])
                for share in shares[: size - 1]:
                    less = less ^ share
                equal = shares[-1]
                at, used = here.stop, given.stop
            out.append((less, equal))
        return out

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        below = [bits.pack(ring.top_bit(x - ring.wrap(t), self.width)) for t in self.thresholds]
        return torch.stack(below)

    def cost(self) -> CircuitCost:
        each, m = plane_shape(self.shape)[1], len(self.thresholds)
        online = sum(level.variables for level in self.levels) * m * each
        dealt = sum(level.dealt for level in self.levels) * m * each
        return CircuitCost(len(self.levels), online, online, 8 * self.words * count(self.shape) + each + dealt)

    def comparisons(self) -> int:
        return count(self.shape) * len(self.thresholds)
