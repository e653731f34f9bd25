"""Inverse powers in intervals whose places a mask moves: the dealer's fit of each interval, and reading one.

Both have two forms, as all of ``kernels`` have. See ``tabulated``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from protocols import kernels, ring
from protocols.kernels import Array, compiled, flattened


@compiled
def _inverse_power(x: float, root: int, start: Array, centre: float, steps: int) -> float:
    if not start.size:
        return 1.0 / np.sqrt(x) if root == 2 else 1.0 / x
    y = 0.0
    for j in range(start.size - 1, -1, -1):
        y = y * (x - centre) + start[j]
    for _ in range(steps):
        e = 1.0 - x * (y * y if root == 2 else y)
        y *= 1.0 + e * (0.5 + e * (0.375 + e * 0.3125)) if root == 2 else 1.0 + e * (1.0 + e * (1.0 + e))
    return y


@compiled
def _inverses(x: Array, root: int, start: Array, centre: float, steps: int) -> None:
    """Replace every x by its inverse power."""
    if start.size:
        for e in range(x.size):
            x[e] = _inverse_power(x[e], root, start, centre, steps)
    elif root == 2:
        for e in range(x.size):
            x[e] = np.divide(1.0, np.sqrt(x[e]))  # a division by / would look for zeros, and is not vectorized
    else:
        for e in range(x.size):
            x[e] = np.divide(1.0, x[e])


@compiled
def _inverse_powers(
    r: Array,
    bits: int,
    shift: int,
    root: int,
    low: int,
    high: int,
    scale: float,
    start: Array,
    centre: float,
    steps: int,
    nodes: Array,
    fit: Array,
    fine: Array,
    light: float,
) -> Array:
    size, rows, width, mask = fit.shape[0], 1 << (bits - shift), 1 << shift, (1 << bits) - 1
    out = np.empty((r.size, rows, size), np.int64)
    least = _inverse_power(float(low), root, start, centre, steps)
    each = 64  # masks side by side, so that all inner loops are vectorized
    at, begin, u, y, total = np.empty(each), np.empty(each), np.empty(each), np.empty(each), np.empty(each)
    values, basis, right = np.empty((size, each)), np.empty((size, each)), np.empty((size, each))
    system = np.empty((size, size, each))
    for first in range(0, r.size, each):
        here = r[first : first + each]
        n, found = here.size, out[first : first + each]
        for d in range(rows):
            for e in range(n):
                place = (d * width - here[e]) & mask
                at[e] = float(place - (mask + 1 if place > mask + 1 - width else 0))
            for i in range(size):
                value, step = values[i], 0.5 * width * (nodes[i] + 1.0)
                for e in range(n):
                    value[e] = min(max(at[e] + step, float(low)), float(high + width))
                _inverses(value[:n], root, start, centre, steps)
            for j in range(size):
                total[:n] = 0.0
                for i in range(size):
                    value, c = values[i], fit[j, i] * scale
                    for e in range(n):
                        total[e] += c * value[e]
                for e in range(n):
                    found[e, d, j] = np.int64(np.rint(total[e]))
        right[:] = 0.0
        system[:] = 0.0
        for e in range(n):
            begin[e] = float((here[e] + low) & (width - 1))
        for k in range(fine.size):
            part = (fine[k] + 1.0) * 0.5
            for e in range(n):
                t = begin[e] + (width - begin[e]) * part
                u[e], y[e] = t * (2.0 / width) - 1.0, low + t - begin[e]
            _inverses(y[:n], root, start, centre, steps)
            for e in range(n):
                basis[0, e] = np.divide(least, y[e])
                basis[1, e] = u[e] * basis[0, e]
            for j in range(2, size):
                for e in range(n):
                    basis[j, e] = 2.0 * u[e] * basis[j - 1, e] - basis[j - 2, e]
            for j in range(size):
                for e in range(n):
                    right[j, e] += basis[j, e]
                for i in range(j + 1):
                    for e in range(n):
                        system[j, i, e] += basis[j, e] * basis[i, e]
        for j in range(size):  # Cholesky's factor of the system, and the solution of its lower half
            for e in range(n):
                system[j, j, e] += light
            for i in range(j):
                for k in range(i):
                    for e in range(n):
                        system[j, i, e] -= system[j, k, e] * system[i, k, e]
                for e in range(n):
                    system[j, i, e] = np.divide(system[j, i, e], system[i, i, e])
                    system[j, j, e] -= system[j, i, e] * system[j, i, e]
                    right[j, e] -= system[j, i, e] * right[i, e]
            for e in range(n):
                system[j, j, e] = np.sqrt(system[j, j, e])
                right[j, e] = np.divide(right[j, e], system[j, j, e])
        for j in range(size - 1, -1, -1):
            for i in range(j + 1, size):
                for e in range(n):
                    right[j, e] -= system[i, j, e] * right[i, e]
            for e in range(n):
                right[j, e] = np.divide(right[j, e], system[j, j, e])
                found[e, ((here[e] + low) & mask) >> shift, j] = np.int64(np.rint(right[j, e] * scale * least))
    return out


def inverse_power(x: Tensor, root: int, start: tuple[float, ...], centre: float, steps: int) -> Tensor:
    """Return x^(-1/root) for x > 0 (float64), or the polynomial with corrections that stands for it.

    start: the coefficients of that polynomial of x - centre; () is the power itself. See ``approximations.power``.
    """
    if not start:
        return x ** (-1 / root)
    y = torch.zeros_like(x)
    for c in reversed(start):
        y = y * (x - centre) + c
    for _ in range(steps):
        e = 1 - x * y**root
        y = y * (1 + e * (0.5 + e * (0.375 + e * 0.3125)) if root == 2 else 1 + e * (1 + e * (1 + e)))
    return y


def inverse_powers(
    r: Tensor,
    bits: int,
    shift: int,
    root: int,
    low: int,
    high: int,
    scale: float,
    start: tuple[float, ...],
    centre: float,
    steps: int,
    fits: tuple[Tensor, Tensor, Tensor],
    light: float,
) -> Tensor:
    """Return the rounded coefficients, (n, rows, degree + 1), that ``two_party.tabulated`` deals for the n masks r.

    start, centre, steps: the function, as ``inverse_power`` takes it; beyond the row of ``high`` it is constant.
    fits: nodes of an interval, the matrix from values there to coefficients, and the nodes of the lowest row. light:
    what is added to the diagonal of the lowest row's normal equations. The two forms may differ by a rounding: only
    the dealer computes this.
    """
    nodes, fit, fine = (x.to(r.device) for x in fits)
    if kernels.on_cpu(r):
        form = (bits, shift, root, low, high, scale, np.array(start, np.float64), centre, steps)
        return torch.from_numpy(_inverse_powers(flattened(r), *form, nodes.numpy(), fit.numpy(), fine.numpy(), light))
    r, rows, width, size = r.reshape(-1), 1 << (bits - shift), 1 << shift, len(fit)
    at = ring.reduce(torch.arange(rows, device=r.device)[:, None] * width - r, bits)
    at = torch.where(at > (1 << bits) - width, at - (1 << bits), at)
    x = (at[:, None].to(torch.float64) + (width / 2) * (nodes[:, None] + 1)).clamp(float(low), float(high + width))
    table = torch.einsum("ji,nie->nje", fit, scale * inverse_power(x, root, start, centre, steps))
    lowest = (r + low) & ring.low_mask(bits)
    begin = (lowest & (width - 1)).to(torch.float64)[:, None]
    t = begin + (width - begin) * (fine + 1) / 2
    least = inverse_power(torch.full_like(t[:1, :1], low), root, start, centre, steps)
    u, basis = 2 * t / width - 1, [least / inverse_power(low + t - begin, root, start, centre, steps)]
    basis.append(u * basis[0])
    for _ in range(size - 2):
        basis.append(2 * u * basis[-1] - basis[-2])
    system = torch.stack(basis, dim=-1)
    diagonal = light * torch.eye(size, dtype=torch.float64, device=r.device)
    factor = torch.linalg.cholesky(system.mT @ system + diagonal)
    found = torch.cholesky_solve(system.sum(1)[..., None], factor)[..., 0].T * (scale * least)
    table.scatter_(0, ring.right(lowest, shift).expand(1, size, -1), found[None])
    return torch.round(table).to(torch.int64).permute(2, 0, 1)


@compiled
def _from_rows(z: Array, rows: Array, width: int, shift: int, precision: int, excess: int) -> Array:
    out = np.empty_like(z)
    half, low, last = np.int64(1) << (precision - 2), (np.int64(1) << shift) - 1, (np.int64(1) << width) - 1
    rounding = (np.int64(1) << excess) >> 1
    for i in range(z.size):
        row = rows[i, (z[i] & last) >> shift]
        u = (2 * (z[i] & low) - low - 1) << (precision - shift)
        before, basis = np.int64(1) << precision, u
        total = row[0] * ((before + rounding) >> excess) + row[1] * ((u + rounding) >> excess)
        for j in range(2, row.size):
            before, basis = basis, ((u * basis + half) >> (precision - 1)) - before
            total += row[j] * ((basis + rounding) >> excess)
        out[i] = total
    return out


def from_rows(z: Tensor, rows: Tensor, width: int, shift: int, precision: int, public: int) -> Tensor:
    """Return sum_j rows[i, d, j] T_j(2 t / 2^shift - 1) for the digit d and the low part t of every z_i.

    z: n elements, of which the low ``width`` bits count; t are the lowest ``shift`` of them, d those above. rows: (n,
    digits, degree + 1). T_j: see ``chebyshev``. Arithmetic modulo 2^64.
    """
    if kernels.on_cpu(z):
        flat = _from_rows(flattened(z), rows.numpy(), width, shift, precision, precision - public)
        return torch.from_numpy(flat.reshape(z.shape))
    flat = ring.reduce(z.reshape(-1), width)
    row = rows[torch.arange(len(flat), device=z.device), ring.right(flat, shift)]
    basis = chebyshev(flat & ring.low_mask(shift), shift, row.shape[-1] - 1, precision, public)
    return (row * basis).sum(-1).reshape(z.shape)


def chebyshev(t: Tensor, shift: int, degree: int, precision: int, public: int) -> Tensor:
    """Return T_j(2 t / 2^shift - 1) for j = 0..degree, as integers with ``public`` fraction bits.

    |T_j| <= 1 and the recursion adds at most j^2 units of 2^-precision, so only the last rounding counts.
    """
    u = ring.left(2 * t - (1 << shift), precision - shift)
    found = [torch.full_like(u, 1 << precision), u]
    for _ in range(degree - 1):
        double = ring.right(u * found[-1] + (1 << (precision - 2)), precision - 1)
        found.append(double - found[-2])
    excess = precision - public
    return ring.right(torch.stack(found, dim=-1) + ((1 << excess) >> 1), excess)


def warm_up() -> None:
    """Compile what is compiled here, or load it from where it is kept."""
    x = torch.zeros(8, dtype=torch.int64)
    from_rows(x, x.expand(8, 2, 8).contiguous(), 9, 8, 30, 16)
    line = torch.tensor([0.0, 0.5], dtype=torch.float64)
    inverse_powers(x, 8, 6, 1, 64, 128, 1.0, (), 0.0, 0, (line, torch.eye(2, dtype=torch.float64), line), 1.0)
