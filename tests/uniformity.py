"""Whether many elements are uniform, each and together: what tests ask of everything that a party sees."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

CERTAIN = 1e-10  # a false alarm once in ten thousand million checks
View = tuple[str, Tensor, int]  # name, elements (int64 residues or bytes), bits of each


def upper_tail(chi_square: float, freedom: int) -> float:
    """P(chi-square of that many degrees of freedom >= value), by Wilson and Hilferty's normal approximation."""
    spread = 2 / (9 * freedom)
    return 0.5 * math.erfc(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(2 * spread))


def suspicious(x: Tensor, width: int) -> str | None:
    """What is not uniform about the low ``width`` bits of many elements, or None."""
    values = x.reshape(-1).numpy().view(np.uint64 if x.dtype == torch.int64 else np.uint8).astype(np.uint64)
    for start in range(0, width, 8):
        size = min(8, width - start)
        column = ((values >> np.uint64(start)) & np.uint64((1 << size) - 1)).astype(np.int64)
        counts = np.bincount(column, minlength=1 << size)
        expected = len(values) / (1 << size)
        p = upper_tail(float(((counts - expected) ** 2).sum() / expected), (1 << size) - 1)
        if p < CERTAIN:
            return f"bits {start}..{start + size - 1} are not uniform (p = {p:.1e})"
        for bit in range(size):
            ones = int(((column >> bit) & 1).sum())
            p = math.erfc(abs(ones - len(values) / 2) / math.sqrt(len(values) / 2))
            if p < CERTAIN:
                return f"bit {start + bit} is one {ones} times of {len(values)}"
    return None


def difference(x: Tensor, y: Tensor) -> Tensor:
    return x ^ y if x.dtype == torch.uint8 else x - y


def leaks(views: list[View]) -> list[str]:
    """Every reason to think that a party learns something: of single tensors, of neighbours, of pairs of tensors."""
    found = []
    for name, x, width in views:
        flat = x.reshape(-1)
        for what, values in ((name, flat), (f"{name}, neighbours", difference(flat[1:], flat[:-1]))):
            reason = suspicious(values, width)
            if reason:
                found.append(f"{what}: {reason}")
    for (a, x, p), (b, y, q) in itertools.combinations(views, 2):
        if x.shape == y.shape and x.dtype == y.dtype:
            reason = suspicious(difference(x, y), min(p, q))
            if reason:
                found.append(f"{a} and {b}: {reason}")
    return found
