"""The part of a value that sets ranges, where not all of its rows are ones that a Program will compute.

A step of a decoder never computes a text's first token, whose activations may be 10,000 times those of all others. So
its ranges are those of later rows of texts that were computed as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Rows = Callable[[int, Tensor], Tensor]
"""Takes the place of a value in a graph or in a trace, and the value; returns the part that counts."""


def every(index: int, value: Tensor) -> Tensor:
    """Return the whole value."""
    return value


def later(first: int, shapes: Sequence[tuple[int, ...]]) -> Rows:
    """Return the choice of rows from ``first`` on. shapes: those that the same values have for a single row.

    Rows lie along the dimensions in which such a value has one entry. A value without them, or of which no later row
    is left, counts as a whole.
    """

    def chosen(index: int, value: Tensor) -> Tensor:
        single = shapes[index]
        if len(single) != value.dim():
            return value
        for dim, size in enumerate(single):
            if size == 1 and value.shape[dim] > first:
                value = value.narrow(dim, first, value.shape[dim] - first)
        return value

    return chosen
