"""Linear maps of slots by their diagonals (Halevi and Shoup), in baby steps and giant steps.

A map y = sum_r D_r * rot(x, r) over the offsets r is evaluated as sum_g rot(sum_b rot(D_{g+b}, -g) * rot(x, b), g).
Each baby step is made from the one before, and giant steps are summed from the last one on (Horner). So both take as
many rotations as there are steps, but few different keys; a key takes megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from protocols.ckks.circuit import Circuit, Vector

Diagonals = Mapping[tuple[int, int], Vector]  # diagonals by (number of the operand, offset)


@dataclass(frozen=True)
class Split:
    """A split of every offset r into giant + baby, modulo the slots. parts: (giant, baby) by offset."""

    parts: dict[int, tuple[int, int]]

    @property
    def babies(self) -> list[int]:
        return sorted({b for _, b in self.parts.values()})

    @property
    def giants(self) -> list[int]:
        return sorted({g for g, _ in self.parts.values()})

    def rotations(self, operands: int) -> int:
        """Bound the rotations that ``apply`` takes, not counting its last one if giants lie on both sides of zero."""
        return operands * sum(b != 0 for b in self.babies) + sum(g != 0 for g in self.giants)


def split(offsets: set[int], slots: int, operands: int = 1) -> Split:
    """Find the split with the fewest rotations. Giants are multiples of one stride; all strides of a layout are tried.

    Offsets beyond half of the slots count as negative.
    """
    signed = sorted(r - slots if r > slots // 2 else r for r in offsets)
    found: Split | None = None
    strides = {1 << k for k in range(slots.bit_length())}
    unit = math.gcd(*signed, slots)
    strides |= {unit * k for k in range(1, 65) if unit * k <= slots}
    for stride in sorted(strides):
        for centre in (0, stride // 2):
            parts = {r % slots: (((r + centre) // stride) * stride, (r + centre) % stride - centre) for r in signed}
            candidate = Split(parts)
            if found is None or candidate.rotations(operands) < found.rotations(operands):
                found = candidate
    assert found is not None
    return found


def apply(circuit: Circuit, operands: list[int], diagonals: Diagonals) -> int:
    """Apply a linear map and return the node of y. It takes one level, whatever the number of diagonals."""
    if not diagonals:
        raise ValueError("a linear map without a single diagonal")
    start = len(circuit.nodes)
    parts = split({r for _, r in diagonals}, circuit.slots, len({i for i, _ in diagonals})).parts
    inner: dict[int, list[tuple[int, int, Vector]]] = {}
    for (operand, r), vector in sorted(diagonals.items(), key=lambda item: item[0]):
        giant, baby = parts[r]
        inner.setdefault(giant, []).append((operand, baby, np.roll(vector, giant)))
    rotated = {
        operand: _chain(
            circuit, operands[operand], {b for items in inner.values() for o, b, _ in items if o == operand}
        )
        for operand in sorted({i for i, _ in diagonals})
    }
    total, at = -1, 0
    for giant in sorted(inner, reverse=True):  # Horner: rotate the sum so far by the difference, then add
        node = circuit.dot([(rotated[operand][baby], vector) for operand, baby, vector in inner[giant]])
        total = node if total < 0 else circuit.add(circuit.rotate(total, at - giant), node)
        at = giant
    result = circuit.rotate(total, at)
    circuit.maps.append(range(start, len(circuit.nodes)))
    return result


def _chain(circuit: Circuit, x: int, babies: set[int]) -> dict[int, int]:
    """Rotate x by every baby step, outwards from zero, each from the one before; return the nodes by step."""
    out = {0: x}
    for side in (sorted(b for b in babies if b > 0), sorted((b for b in babies if b < 0), reverse=True)):
        before = 0
        for b in side:
            out[b] = circuit.rotate(out[before], b - before)
            before = b
    return out


def sum_axis(circuit: Circuit, x: int, stride: int, size: int) -> int:
    """Replace slot i by the sum of slots i, i + stride, ..., i + (size - 1) stride: log2(size) rotations, no level.

    size: a power of two, else ValueError.
    """
    _power_of_two(size)
    step = 1
    while step < size:
        x = circuit.add(x, circuit.rotate(x, stride * step))
        step *= 2
    return x


def spread_axis(circuit: Circuit, x: int, stride: int, size: int) -> int:
    """Copy the first of ``size`` places to all of them; the other places must hold zero."""
    return sum_axis(circuit, x, -stride, size)


def _power_of_two(size: int) -> None:
    if size < 1 or size & (size - 1):
        raise ValueError(f"rotations double: they sum 1, 2, 4, ... places, not {size}")
