"""Integers in the narrowest type that holds them, and matrix products that read them as they are.

A model's weights are integers of some 12 bits. In 64 bits they take four times the memory of 16, and a product of few
rows is as fast as its matrix is read. So weights are held narrow, in memory or in a mapped file, and a product widens
them a block at a time: no process ever has a wide copy of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from protocols import ring
from protocols.kernels import Array, compiled

NARROW = (torch.int8, torch.int16, torch.int32)
BLOCK = 1 << 20  # elements that are widened at a time, of 8 MB
ROWS = 16  # the most for which the loop here is the fastest: it reads a matrix once, but multiplies in 64 bits
_TILE = 64  # rows and columns that are encoded at a time
_WIDE = 512  # columns of a pass, so that the results of all rows stay in the innermost caches


def is_narrow(value: Tensor) -> bool:
    """True for integers of fewer bits than a ring element's word."""
    return value.dtype in NARROW


def narrowed(value: Tensor) -> Tensor:
    """Return integers in the narrowest type that holds them; other numbers, and tensors without data, as they are."""
    if value.is_meta or value.dtype not in (*NARROW, torch.int64):
        return value
    low, high = (int(end) for end in torch.aminmax(value)) if value.numel() else (0, 0)
    for kind in NARROW:
        known = torch.iinfo(kind)
        if known.min <= low and high <= known.max:
            return value.to(kind)
    return value


def widened(value: Tensor) -> Tensor:
    """Return integers as int64; other numbers as they are."""
    return value.to(torch.int64) if is_narrow(value) else value


def is_finite(value: Tensor) -> bool:
    """True unless floating-point numbers have a NaN or an infinity among them; no tensor of their size is made."""
    return not value.numel() or all(bool(end.isfinite()) for end in torch.aminmax(value))


def same(a: Tensor, b: Tensor) -> bool:
    """True if two tensors have the same type, shape and entries. Equal integers that are narrowed have one type."""
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.equal(b))


def blocks(value: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a tensor in blocks of its first dimension, each as int64 and with its place."""
    each = max(1, BLOCK * len(value) // max(1, value.numel())) if value.dim() else 1
    for start in range(0, len(value) if value.dim() else 0, each):
        here = slice(start, start + each)
        yield here, widened(value[here])


@compiled
def _add_product(x: Array, matrix: Array, out: Array) -> None:
    inner, columns = matrix.shape
    fours = inner - inner % 4
    for column in range(0, columns, _WIDE):
        end = min(column + _WIDE, columns)
        for k in range(0, fours, 4):  # four rows of the matrix at a time: one read and write of a result for four terms
            a, b, c, d = (
                matrix[k, column:end],
                matrix[k + 1, column:end],
                matrix[k + 2, column:end],
                matrix[k + 3, column:end],
            )
            for r in range(x.shape[0]):
                s, t, u, v = x[r, k], x[r, k + 1], x[r, k + 2], x[r, k + 3]
                row = out[r, column:end]
                for j in range(row.size):
                    row[j] += s * a[j] + t * b[j] + u * c[j] + v * d[j]
        for k in range(fours, inner):
            for r in range(x.shape[0]):
                for j in range(column, end):
                    out[r, j] += x[r, k] * matrix[k, j]


@compiled
def _encode(x: Array, scale: float, out: Array) -> tuple[float, float]:
    low, high = 0.0, 0.0
    rows, columns = x.shape
    for i in range(0, rows, _TILE):  # in tiles, as x may be a transposed view
        for j in range(0, columns, _TILE):
            for a in range(i, min(i + _TILE, rows)):
                for b in range(j, min(j + _TILE, columns)):
                    value = np.rint(x[a, b] * scale)
                    low, high = min(low, value), max(high, value)
                    out[a, b] = np.int64(value)
    return low, high


def encode(x: Tensor, fraction: int) -> Tensor:
    """Return round(x * 2^fraction) in the narrowest type that holds it, for finite float64 that fit 64 bits.

    A matrix whose integers have at most 32 bits is encoded without copies of it in 64 bits.
    """
    if x.dim() == 2 and x.dtype == torch.float64 and x.device.type == "cpu":
        for kind in (torch.int16, torch.int32):  # most have 16 bits
            out, known = torch.empty(tuple(x.shape), dtype=kind), torch.iinfo(kind)
            low, high = _encode(x.numpy(), 2.0**fraction, out.numpy())
            if known.min <= low and high <= known.max:
                return out.to(torch.int8) if low >= -128 and high <= 127 else out
    return narrowed(ring.encode(x, fraction))


@compiled
def _add_dots(x: Array, turned: Array, out: Array) -> None:
    columns, inner = turned.shape
    fours = columns - columns % 4
    for j in range(0, fours, 4):  # four columns at a time: one read of x for four products
        a, b, c, d = turned[j], turned[j + 1], turned[j + 2], turned[j + 3]
        for r in range(x.shape[0]):
            row, p, q, s, t = x[r], np.int64(0), np.int64(0), np.int64(0), np.int64(0)
            for k in range(inner):
                p += row[k] * a[k]
                q += row[k] * b[k]
                s += row[k] * c[k]
                t += row[k] * d[k]
            out[r, j] += p
            out[r, j + 1] += q
            out[r, j + 2] += s
            out[r, j + 3] += t
    for j in range(fours, columns):
        for r in range(x.shape[0]):
            for k in range(inner):
                out[r, j] += x[r, k] * turned[j, k]


@compiled
def _add_products(x: Array, matrices: Array, out: Array) -> None:
    for i in range(x.shape[0]):
        _add_product(x[i], matrices[i], out[i])


@compiled
def _add_dots_of_each(x: Array, turned: Array, out: Array) -> None:
    for i in range(x.shape[0]):
        _add_dots(x[i], turned[i], out[i])


def in_place(matrix: Tensor) -> bool:
    """True if products read a matrix where it lies: its rows, or its columns, are one behind another."""
    return matrix.is_contiguous() or matrix.T.is_contiguous()


def product_of_rows(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x @ matrix modulo 2^64, for int64 (rows, n) and integers (n, columns), on the CPU; few rows are fast.

    Raises ValueError for shapes that do not fit: compiled code reads memory without a look at its bounds.
    """
    fits = x.dim() == matrix.dim() == 2 and x.shape[1] == matrix.shape[0]
    if not fits or x.dtype != torch.int64 or matrix.dtype not in (*NARROW, torch.int64):
        raise ValueError(f"no product of {x.dtype} {tuple(x.shape)} and {matrix.dtype} {tuple(matrix.shape)}")
    out = torch.zeros(x.shape[0], matrix.shape[1], dtype=torch.int64)
    if not matrix.is_contiguous() and in_place(matrix):
        _add_dots(x.contiguous().numpy(), matrix.T.numpy(), out.numpy())
    else:
        _add_product(x.contiguous().numpy(), matrix.contiguous().numpy(), out.numpy())
    return out


def products_of_rows(x: Tensor, matrices: Tensor) -> Tensor:
    """Return x @ matrices modulo 2^64, for int64 (..., rows, n) and (..., n, columns) of one batch, on the CPU.

    Raises ValueError for shapes that do not fit.
    """
    fits = x.dim() == matrices.dim() > 2 and x.shape[:-2] == matrices.shape[:-2] and x.shape[-1] == matrices.shape[-2]
    if not fits or not x.dtype == matrices.dtype == torch.int64:
        raise ValueError(f"no products of {x.dtype} {tuple(x.shape)} and {matrices.dtype} {tuple(matrices.shape)}")
    out = torch.zeros(*x.shape[:-1], matrices.shape[-1], dtype=torch.int64)
    if not out.numel() or not x.shape[-1]:
        return out
    each, found = x.contiguous().numpy().reshape(-1, *x.shape[-2:]), out.numpy().reshape(-1, *out.shape[-2:])
    turned = matrices.transpose(-1, -2)
    if turned.is_contiguous() and not matrices.is_contiguous():
        _add_dots_of_each(each, turned.numpy().reshape(-1, *turned.shape[-2:]), found)
    else:
        _add_products(each, matrices.contiguous().numpy().reshape(-1, *matrices.shape[-2:]), found)
    return out
