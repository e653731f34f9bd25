"""Moving elements: entries taken along a dimension in runs, and the patches under a window that moves over a tensor.

Both copy elements and compute nothing. So they do the same to shares, masked values and masks, and cost no message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protocols.fields import MAXIMUM_ELEMENTS, Padding, Shape, Sizes

Run = tuple[int, int, int]
"""The positions start, start + step, ... of ``count`` entries; a start of -1 stands for zeros."""


def runs_of(positions: Sequence[int]) -> tuple[Run, ...]:
    """Write positions as few runs; -1 stands for zero."""
    out: list[Run] = []
    i, n = 0, len(positions)
    while i < n:
        start, j = positions[i], i + 1
        step = positions[j] - start if j < n and start >= 0 and positions[j] >= 0 else 0
        while j < n and (positions[j] < 0) == (start < 0) and positions[j] == max(start + step * (j - i), -1):
            j += 1
        if j == i + 2 < n and step not in (0, 1):  # two entries by chance, of which the second begins the next run
            j -= 1
        out.append((start, step if j > i + 1 else 0, j - i))
        i = j
    return tuple(out)


def check_runs(runs: Sequence[Run], size: int) -> int:
    """Return the number of entries that runs take of ``size`` ones; raises ValueError if one is not among them."""
    if not all(count > 0 and ((start >= 0) or (start, step) == (-1, 0)) for start, step, count in runs):
        raise ValueError("a run of no entries, or of a negative start")
    for start, step, count in runs:
        if not max(start, start + step * (count - 1)) < size or start + step * (count - 1) < min(start, 0):
            raise ValueError(f"the entries {start}, {start + step}, ... ({count}) of {size}")
    if (total := sum(count for *_, count in runs)) > MAXIMUM_ELEMENTS:
        raise ValueError(f"more than {MAXIMUM_ELEMENTS} entries")
    return total


CACHED = 1 << 16  # entries of an index that is kept for the next query, at most


def _index(runs: tuple[Run, ...]) -> Tensor:
    return _kept_index(runs) if sum(count for *_, count in runs) <= CACHED else _made_index(runs)


@lru_cache(maxsize=256)
def _kept_index(runs: tuple[Run, ...]) -> Tensor:
    return _made_index(runs)


def _made_index(runs: tuple[Run, ...]) -> Tensor:
    start, step, count = np.array(runs, dtype=np.int64).T
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return torch.from_numpy(np.repeat(start, count) + np.repeat(step, count) * within)


def take(x: Tensor, dim: int, runs: tuple[Run, ...]) -> Tensor:
    """Return the entries along a dimension that the runs name, in their order; zeros where a run starts at -1."""
    index = _index(runs).to(x.device)
    if any(start < 0 for start, *_ in runs):
        zero = x.new_zeros([1 if i == dim % x.dim() else n for i, n in enumerate(x.shape)])
        x, index = torch.cat([x, zero], dim), torch.where(index < 0, x.shape[dim], index)
    return x.index_select(dim, index)


@dataclass(frozen=True)
class Window:
    """A window of ``kernel`` entries in each dimension, ``dilation`` apart, that moves by ``stride``.

    ``padding``: the zeros before and after each dimension.
    """

    kernel: Sizes
    stride: Sizes
    padding: Padding
    dilation: Sizes

    def __post_init__(self) -> None:
        if len({len(self.kernel), len(self.stride), len(self.padding), len(self.dilation)}) != 1:
            raise ValueError("a window whose sizes are of different dimensions")

    def shape(self, x: Shape) -> Shape:
        """Return the shape of the patches; raises ValueError if the window does not fit into x."""
        if len(x) != 2 + len(self.kernel):
            raise ValueError(f"a window of {len(self.kernel)} dimensions in a tensor of {len(x)}")
        places = []
        sizes = zip(x[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        for size, kernel, stride, padding, dilation in sizes:
            if (room := size + 2 * padding - dilation * (kernel - 1)) < 1:
                raise ValueError(f"a window of {kernel} entries does not fit into {size} and {padding} on each side")
            places.append(-(-room // stride))
        if (padded := math.prod(x[:2]) * math.prod(n + 2 * p for n, p in zip(x[2:], self.padding, strict=True))) > (
            MAXIMUM_ELEMENTS
        ):
            raise ValueError(f"{padded} elements with padding, more than {MAXIMUM_ELEMENTS}")
        return (x[0], *places, x[1] * math.prod(self.kernel))

    def room(self, shape: Shape) -> int:
        """Return the most elements that patches of this shape are taken of, padding included."""
        sizes = zip(shape[1:-1], self.kernel, self.stride, self.dilation, strict=True)
        channels = shape[-1] // math.prod(self.kernel)
        return shape[0] * channels * math.prod(places * s + d * (k - 1) for places, k, s, d in sizes)

    def patches(self, x: Tensor) -> Tensor:
        """Return (batch, places in each dimension, channels * entries of the window) of (batch, channels, sizes)."""
        shape, n = self.shape(tuple(x.shape)), len(self.kernel)
        x = F.pad(x, [p for padding in reversed(self.padding) for p in (padding, padding)])
        for i, (kernel, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        order = [0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)]
        return x.permute(order).reshape(shape)
