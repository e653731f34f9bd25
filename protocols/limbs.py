"""Exact matrix products modulo 2^ring on int64 tensors, computed by float64 matrix products.

A double holds every integer of magnitude up to 2^53.  Each operand is written as a sum of a few *limbs*,
``x = sum_i x_i * 2^(s_i)``, where limb ``i`` of width ``w_i`` is a balanced digit, ``|x_i| <= 2^(w_i - 1)``.  A product
of limbs over ``block`` inner elements is bounded by ``block * 2^(w_i + v_j - 2)``; `_schedule` picks the widths and the
block so that this never exceeds 2^53.  The bound holds for the sum of magnitudes, hence for every partial sum in any
order of summation (with or without fused multiply-add), and so each float64 product is exact and deterministic.  The
blocks are then converted to int64, shifted by ``s_i + t_j`` and added with wrap-around.  Pairs of limbs with
``s_i + t_j >= ring`` vanish modulo 2^ring and are skipped.

Two operands of three limbs, of which six pairs matter, need five products only (Karatsuba on the low two limbs):
``x0*y1 + x1*y0 = (x0 + x1)*(y0 + y1) - x0*y0 - x1*y1``, where ``x1*y1`` is needed anyway.

This pays if torch multiplies int64 matrices with a plain loop.  On x86 processors with AVX-512 torch has a vectorized
kernel (FBGEMM's) for a single thread, which is faster than most products here: `benchmarks/limbs.py` compares them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

Widths = tuple[int, ...]

MANTISSA_BITS = 53
"""Every integer of magnitude at most 2^53 is a double."""
_MAXIMUM_LIMBS = 4
_WIDEST_PACKED = 32
"""Widest limb of a packed matrix: narrow enough for a left operand of any width."""
_CHUNK = 1 << 15
"""Number of elements split at a time, so that the scratch stays in cache."""
_TILE, _LIMBS_TILE, _NARROWEST = 1 << 18, 1 << 20, 128
"""Elements held at a time, of products and of limbs of an unpacked right operand; then the fewest columns of a tile."""
_CONVERT_COST = 30
"""Multiply-accumulates that take as long as converting one float64 to int64 and adding it."""
_SPLIT_COST = 28
"""Multiply-accumulates that take as long as extracting one limb of one element."""
_TYPICAL_ROWS = 128
"""Rows of the partner assumed when a matrix is packed."""


@dataclass(frozen=True, eq=False)
class Packed:
    """The limbs of a matrix, split once to be multiplied many times.

    `limbs` has shape (number of limbs, ..., n, p), float64; `widths` are the widths of the limbs, lowest first, adding
    up to `bits`.  `signed` tells true integers (exact for every ring) from residues mod 2^bits (for rings up to bits).
    """

    limbs: Tensor
    widths: Widths
    bits: int
    signed: bool

    @property
    def shape(self) -> torch.Size:
        """Shape (..., n, p) of the matrix."""
        return self.limbs.shape[1:]


@dataclass(frozen=True)
class _Schedule:
    """A choice of the limbs that are multiplied, and of their order.

    `order` lists the limbs of the left operand as they are stacked, and every group ``(j, start, stop)`` multiplies the
    stacked limbs ``start:stop`` by limb ``j`` of the right operand.  With `karatsuba` both operands have a fourth limb,
    the sum of limbs 0 and 1.  `block` inner elements are summed in floating point.
    """

    a_widths: Widths
    b_widths: Widths
    order: tuple[int, ...]
    groups: tuple[tuple[int, int, int], ...]
    block: int
    karatsuba: bool


def pack(matrix: Tensor, bits: int, *, signed: bool, ring: int | None = None, other_bits: int | None = None) -> Packed:
    """Split `matrix`, int64 of shape (..., n, p), into limbs for use as the right operand of `matmul`.

    `signed` matrices hold true integers in [-2^(bits-1), 2^(bits-1)), and any other element is a ValueError; otherwise
    the elements are residues mod 2^bits whose higher bits are ignored.  `ring` (default: 64, or `bits` for residues)
    and `other_bits` (default: `ring`) are the ring and the width of the left operand for which the split is optimized;
    products are exact with any other.  A limb takes 8 bytes an element; weights of up to 21 bits take one limb.
    """
    _check(matrix, "matrix")
    _check_bits("bits", bits)
    ring = (64 if signed else bits) if ring is None else ring
    other_bits = ring if other_bits is None else other_bits
    _check_bits("ring", ring)
    _check_bits("other_bits", other_bits)
    if not signed and ring > bits:
        raise ValueError(f"residues mod 2^{bits} do not determine a product mod 2^{ring}")
    if signed and bits < 64 and matrix.numel() and not matrix.is_meta:
        low, high = (int(value) for value in torch.aminmax(matrix))
        if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
            raise ValueError(f"elements in [{low}, {high}] are not signed {bits}-bit integers")
    inner, columns = matrix.shape[-2:]
    candidates = tuple(widths for widths in _candidates(bits) if max(widths) <= _WIDEST_PACKED)
    schedule = _schedule(min(other_bits, ring), candidates, ring, inner, _TYPICAL_ROWS, columns, True)
    return Packed(_split(matrix, schedule.b_widths, wrap=not signed), schedule.b_widths, bits, signed)


def matmul(a: Tensor, b: Tensor | Packed, ring: int, *, a_bits: int | None = None, b_bits: int | None = None) -> Tensor:
    """Return ``a @ b`` modulo 2^ring, exactly, as int64: in [0, 2^ring) for ring < 64, any int64 for ring = 64.

    `a` has shape (..., m, n) and `b` (..., n, p), int64 (or packed), with leading dimensions broadcast as by
    `torch.matmul`.  By default elements are residues mod 2^ring, whatever their higher bits.  With `a_bits` (`b_bits`)
    an element stands for the signed integer, in [-2^(bits-1), 2^(bits-1)), that its lowest bits encode in two's
    complement, which takes fewer limbs when this is narrower than the ring.
    """
    _check(a, "a")
    _check_bits("ring", ring)
    candidates: tuple[Widths, ...]
    a_width, a_wrap = _width("a_bits", a_bits, ring)
    if isinstance(b, Packed):
        if b_bits is not None:
            raise ValueError("b_bits is for an unpacked b: a packed matrix has its own width")
        if not b.signed and ring > b.bits:
            raise ValueError(f"residues mod 2^{b.bits} do not determine a product mod 2^{ring}")
        b_wrap, candidates, device = False, (b.widths,), b.limbs.device
    else:
        _check(b, "b")
        b_width, b_wrap = _width("b_bits", b_bits, ring)
        candidates, device = _candidates(b_width), b.device
    inner, columns = a.shape[-1], b.shape[-1]
    if b.shape[-2] != inner:
        raise ValueError(f"cannot multiply shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.device != device:
        raise ValueError(f"a is on {a.device}, b on {device}")
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], columns)
    if a.is_meta or inner == 0 or 0 in shape:
        return torch.zeros(shape, dtype=torch.int64, device=device)
    if len(b.shape) == 2:  # one matrix for every row: all rows and limbs make one product
        a = a.reshape(-1, inner)
    schedule = _schedule(a_width, candidates, ring, inner, a.shape[-2], columns, isinstance(b, Packed))
    stack = _split(a, schedule.a_widths, wrap=a_wrap, order=schedule.order, with_sum=schedule.karatsuba)
    if isinstance(b, Packed):
        return _product(stack, b, schedule, ring).reshape(shape)
    held = min(_TILE * inner // stack.numel(), _LIMBS_TILE // (len(schedule.b_widths) * schedule.block))
    tiles = [_product(stack, tile, schedule, ring, b_wrap) for tile in b.split(max(_NARROWEST, held), dim=-1)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)).reshape(shape)


def _product(stack: Tensor, b: Tensor | Packed, schedule: _Schedule, ring: int, wrap: bool = False) -> Tensor:
    """Multiply the stacked limbs (limbs, ..., m, n) of the left operand by `b`; `wrap` is that of `_split` for `b`."""
    order = (*schedule.order, 3)
    products: dict[tuple[int, int], Tensor] = {}
    for start in range(0, stack.shape[-1], schedule.block):
        inside = slice(start, start + schedule.block)
        if isinstance(b, Packed):
            limbs = list(b.limbs[..., inside, :])
        else:
            limbs = list(_split(b[..., inside, :], schedule.b_widths, wrap=wrap))
        if schedule.karatsuba:
            limbs.append(limbs[0] + limbs[1])
        for j, first, last in schedule.groups:
            for i, product in zip(order[first:last], _multiply(stack[first:last, ..., inside], limbs[j]), strict=True):
                products[i, j] = products[i, j].add_(product) if start else product
    if schedule.karatsuba:
        products[0, 1] = products.pop((3, 3)).sub_(products[0, 0]).sub_(products[1, 1])
    a_shifts, b_shifts = _shifts(schedule.a_widths), _shifts(schedule.b_widths)
    result = products.pop((0, 0))
    for index, ((i, j), product) in enumerate(products.items()):
        product.bitwise_left_shift_(_amount(a_shifts[i] + b_shifts[j], product))
        result = result.add_(product) if index else result + product  # not a view of the stacked products
    return result if ring == 64 else result.bitwise_and_((1 << ring) - 1)


def _multiply(stack: Tensor, limb: Tensor) -> Iterable[Tensor]:
    """Return the product, int64 of shape (..., m, p), of each stacked limb (..., m, k) by a limb (..., k, p)."""
    if limb.dim() == 2 and stack.dim() == 3:
        return torch.unbind((stack.flatten(0, 1) @ limb).to(torch.int64).view(len(stack), -1, limb.shape[-1]))
    return ((part @ limb).to(torch.int64) for part in stack)


def _split(
    values: Tensor, widths: Widths, *, wrap: bool, order: tuple[int, ...] | None = None, with_sum: bool = False
) -> Tensor:
    """Return the balanced limbs, float64 of shape (number of limbs, *values.shape), in the given order.

    Only the lowest sum(widths) bits of a value count.  Adding half a unit of every lower limb before cutting out limb i
    carries exactly when these limbs are negative, so that they all lie in [-2^(w-1), 2^(w-1)).  The highest limb of
    residues (`wrap`) is reduced likewise; that of signed integers is kept whole and may reach 2^(w-1).  `with_sum`
    appends the sum of limbs 0 and 1.
    """
    order = order or tuple(range(len(widths)))
    limbs = torch.empty((len(order) + with_sum, *values.shape), dtype=torch.float64, device=values.device)
    if values.is_meta:
        return limbs
    source, target = values.reshape(-1), limbs.view(len(limbs), -1)
    scratch = torch.empty(min(_CHUNK, source.numel()), dtype=torch.int64, device=values.device)
    total, shifts = sum(widths), _shifts(widths)
    plan = []
    for index, width in enumerate(widths):
        bias = sum(1 << (shift - 1) for shift in shifts[1 : index + 1])
        whole = index == len(widths) - 1 and not wrap
        cut = (64 - total, 64 - total) if whole else (64 - shifts[index] - width, 64 - width)
        up, down = (_amount(bits, values) for bits in cut)
        plan.append((order.index(index), bias, whole, up, down, _amount(shifts[index], values)))
    for start in range(0, source.numel(), _CHUNK):
        part = source[start : start + _CHUNK]
        work = scratch[: part.numel()]
        for position, bias, whole, up, down, low_bits in plan:
            if whole:
                torch.bitwise_left_shift(part, up, out=work).bitwise_right_shift_(down)
                if bias:
                    work.add_(bias).bitwise_right_shift_(low_bits)
            else:
                torch.bitwise_left_shift(torch.add(part, bias, out=work) if bias else part, up, out=work)
                work.bitwise_right_shift_(down)
            target[position, start : start + _CHUNK].copy_(work)
        if with_sum:
            first, second = (target[order.index(index), start : start + _CHUNK] for index in (0, 1))
            torch.add(first, second, out=target[-1, start : start + _CHUNK])
    return limbs


@lru_cache(maxsize=4096)
def _schedule(
    a_width: int, b_candidates: tuple[Widths, ...], ring: int, inner: int, rows: int, columns: int, packed: bool
) -> _Schedule:
    """Choose the limbs that make (rows, inner) @ (inner, columns) cheapest, in multiply-accumulates per output."""
    best: tuple[float, _Schedule] | None = None
    for a_widths in _candidates(a_width):
        for b_widths in b_candidates:
            a_shifts, b_shifts = _shifts(a_widths), _shifts(b_widths)
            pairs = [(i, j) for j, t in enumerate(b_shifts) for i, s in enumerate(a_shifts) if s + t < ring]
            bound = max(1 << (a_widths[i] + b_widths[j] - 2) for i, j in pairs)
            counts = [sum(j == k for _, k in pairs) for j in range(len(b_widths))]
            grid = tuple((j, 0, count) for j, count in enumerate(counts) if count)
            options = [(len(pairs), bound, _Schedule(a_widths, b_widths, tuple(range(len(a_widths))), grid, 0, False))]
            if len(a_widths) == 3 and counts == [3, 2, 1] and a_widths[0] == b_widths[0]:
                # |x0 + x1| <= 2^(w0-1) + 2^(w1-1), likewise for y.
                sums = math.prod((1 << widths[0]) + (1 << widths[1]) for widths in (a_widths, b_widths))
                five = ((0, 0, 2), (2, 0, 1), (1, 2, 3), (3, 3, 4))
                options.append((5, max(bound, -(-sums // 4)), _Schedule(a_widths, b_widths, (0, 2, 1), five, 0, True)))
            splits = len(a_widths) / max(1, columns) + (0 if packed else len(b_widths) / max(1, rows))
            for count, magnitude, schedule in options:
                exact = (1 << MANTISSA_BITS) // magnitude
                if exact:
                    blocks = max(1, -(-inner // exact))
                    cost = count * (inner + _CONVERT_COST * blocks) + _SPLIT_COST * inner * splits
                    if best is None or cost < best[0]:
                        best = cost, replace(schedule, block=max(1, -(-inner // blocks)))
    assert best is not None  # four limbs a side always fit
    return best[1]


@lru_cache(maxsize=64)
def _candidates(width: int) -> tuple[Widths, ...]:
    """Ways to cut `width` bits into up to four limbs of nearly equal widths; limb 1 takes what the others leave."""
    found = []
    for count in range(1, _MAXIMUM_LIMBS + 1):
        for size in sorted({width // count, -(-width // count)}):
            rest = width - (count - 1) * size
            if size > 0 and rest > 0:
                found.append((size,) * min(1, count - 1) + (rest,) + (size,) * max(0, count - 2))
    return tuple(found)


def _shifts(widths: Widths) -> Widths:
    """Return the weights (binary exponents) of limbs of these widths."""
    return tuple(sum(widths[:index]) for index in range(len(widths)))


def _amount(bits: int, like: Tensor) -> Tensor:
    """Return a shift distance as a tensor: torch vectorizes shifts by a tensor, but not always by a Python integer."""
    return torch.full((1,), bits, dtype=torch.int64, device=like.device)


def _width(name: str, bits: int | None, ring: int) -> tuple[int, bool]:
    """Return the width of an operand's elements, and True if they are residues mod 2^ring."""
    if bits is None:
        return ring, True
    _check_bits(name, bits)
    return min(bits, ring), bits >= ring


def _check(matrix: Tensor, name: str) -> None:
    if matrix.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {matrix.dtype}")
    if matrix.dim() < 2:
        raise ValueError(f"{name} must be a matrix or a batch of matrices, not of shape {tuple(matrix.shape)}")


def _check_bits(name: str, bits: int) -> None:
    if not 1 <= bits <= 64:
        raise ValueError(f"{name} must be between 1 and 64, not {bits}")
