"""The hot loops over elements and their packed bits, compiled by numba for CPU tensors.

Each function has two forms: one pass over memory in compiled code, and whole-tensor torch operations for other devices,
with which tests compare the first. Both give the same integers, so two parties may use different forms. Only
``parities`` has one form: packed bytes lie in the CPU's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from protocols import bits, ring
from protocols.kept_kernels import KeptKernels

Array = np.ndarray[Any, np.dtype[Any]]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    result: Any = njit(function, nogil=True)
    with suppress(RuntimeError):  # there is no place to keep it: it is compiled at every start
        result._cache = KeptKernels(function)  # as njit(cache=True) sets numba's own
    return result  # type: ignore[no-any-return]


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


@lru_cache(maxsize=1024)
def residues(values: tuple[int, ...]) -> Array:
    """Return integers modulo 2^64 as an array, to be read alone: it is kept."""
    return np.array([ring.wrap(value) for value in values], np.int64)


def flattened(x: Tensor) -> Array:
    return x.numpy().reshape(-1)  # numpy's call costs a tenth of torch's


# packed bits: a block of elements at a time, first one flag a byte, then eight flags a byte; only such loops vectorize

BLOCK = 2048  # elements whose flags stay in the innermost cache
_LOWEST = np.uint64(0x0101010101010101)  # the lowest bit of every byte of a word ...
_GATHER = np.uint64(0x0102040810204080)  # ... times this gives the eight of them side by side in the top byte
_TOP_BYTE = np.uint64(56)


@compiled
def _gathered(flags: Array, bit: int, out: Array, at: int, size: int) -> None:
    """Pack bit ``bit`` of every byte of ``flags`` into out[at : at + size]."""
    words, shift = flags.view(np.uint64), np.uint64(bit)
    for j in range(size):
        out[at + j] = np.uint8((((words[j] >> shift) & _LOWEST) * _GATHER) >> _TOP_BYTE)


@compiled
def _spread(plane: Array, at: int, out: Array, size: int) -> None:
    """Spread the bits of plane[at : at + size] to int64 masks, 0 or -1."""
    for byte in range(size):
        packed = np.int64(plane[at + byte])
        for k in range(8):
            out[8 * byte + k] = -((packed >> k) & 1)


@compiled
def _bit_plane(x: Array, offset: int, bit: int) -> Array:
    out = np.empty((x.size + 7) // 8, np.uint8)
    flags = np.zeros(BLOCK, np.uint8)
    for start in range(0, x.size, BLOCK):
        here = x[start : start + BLOCK]
        for i in range(here.size):
            flags[i] = ((here[i] + offset) >> bit) & 1
        _gathered(flags, 0, out, start >> 3, (here.size + 7) >> 3)
    return out


def bit_plane(x: Tensor, offset: int, bit: int) -> Tensor:
    """Return bit ``bit`` of x + offset as a packed plane."""
    if on_cpu(x):
        return torch.from_numpy(_bit_plane(flattened(x), ring.wrap(offset), bit))
    return bits.pack(ring.right(x + ring.wrap(offset), bit))


# opening


@compiled
def _opened(mine: Array, theirs: Array, mask: int) -> None:
    for i in range(mine.size):
        mine[i] = (mine[i] + theirs[i]) & mask


def opened(mine: Tensor, theirs: Tensor, bits: int) -> Tensor:
    """Return mine + theirs in [0, 2^bits), or signed for 64 bits; ``mine`` may be overwritten."""
    if on_cpu(mine):
        flat = flattened(mine)
        _opened(flat, flattened(theirs), ring.low_mask(bits))
        return torch.from_numpy(flat.reshape(mine.shape))
    return ring.reduce(mine + theirs, bits)


# comparison: look a public digit up in shares of a unary code


@compiled
def _unary_codes(r: Array, width: int, drop: int, digit: int, digits: int) -> Array:
    places = 6 - digit  # a word holds 2^places codes of 2^digit bits
    out = np.zeros((((digits - 1) >> places) + 1, r.size), np.int64)
    mask = (np.int64(1) << (width - 1)) - 1
    for start in range(0, r.size, BLOCK):
        here = r[start : start + BLOCK]
        for d in range(digits):
            codes = out[d >> places, start : start + BLOCK]
            shift, place = digit * d + drop, (d & ((1 << places) - 1)) << digit
            for i in range(here.size):
                rho = ((here[i] & mask) >> shift) & ((1 << digit) - 1)
                codes[i] |= ((np.int64(1) << rho) - 1) << place
    return out


def unary_codes(r: Tensor, width: int, drop: int, digit: int, digits: int) -> Tensor:
    """Return the unary code, the bits [d < rho] for d = 0, 1, ..., of every digit rho of r.

    Digits have ``digit`` bits (3 to 6), lowest first, of the width - 1 lowest bits of r without the ``drop`` lowest.
    The result has shape (words, n); a word holds 64 / 2^digit codes.
    """
    places = 6 - digit
    words = ((digits - 1) >> places) + 1
    if r.is_meta:
        return torch.empty((words, r.numel()), dtype=torch.int64, device="meta")
    if on_cpu(r):
        return torch.from_numpy(_unary_codes(flattened(r), width, drop, digit, digits))
    low = ring.right(r.reshape(-1) & ring.low_mask(width - 1), drop)
    out = torch.zeros((words, r.numel()), dtype=torch.int64, device=r.device)
    for d in range(digits):
        code = (1 << (ring.right(low, digit * d) & ((1 << digit) - 1))) - 1
        out[d >> places] |= ring.left(code, (d & ((1 << places) - 1)) << digit)
    return out


@compiled
def _digit_planes(
    z: Array, table: Array, thresholds: Array, width: int, drop: int, digit: int, digits: int, first: int
) -> Array:
    n = z.size
    each = (n + 7) // 8
    out = np.empty((1 + 2 * digits, thresholds.size * each), np.uint8)
    mask, last, places = (np.int64(1) << (width - 1)) - 1, (1 << digit) - 1, 6 - digit
    low, flags = np.empty(BLOCK, np.int64), np.zeros(BLOCK, np.uint8)
    for t in range(thresholds.size):
        for start in range(0, n, BLOCK):
            here, at = z[start : start + BLOCK], t * each + (start >> 3)
            size = (here.size + 7) >> 3
            for i in range(here.size):
                zeta = here[i] - thresholds[t]
                flags[i] = (zeta >> (width - 1)) & 1
                low[i] = (zeta & mask) >> drop
            _gathered(flags, 0, out[0], at, size)
            for d in range(digits):
                codes, shift = table[d >> places, start : start + BLOCK], digit * d
                place = (d & ((1 << places) - 1)) << digit
                for i in range(here.size):
                    less = codes[i]
                    equal = less ^ ((less << 1) ^ first)
                    position = ((low[i] >> shift) & last) | place
                    flags[i] = ((less >> position) & 1) | (((equal >> position) & 1) << 1)
                _gathered(flags, 0, out[1 + 2 * d], at, size)
                _gathered(flags, 1, out[2 + 2 * d], at, size)
    return out


def digit_planes(
    z: Tensor, table: Tensor, thresholds: tuple[int, ...], width: int, drop: int, digit: int, digits: int, first: int
) -> Tensor:
    """Look the digits of zeta = z - threshold up in ``table``, for every threshold, and pack what is found.

    Returns planes of shape (1 + 2 digits, thresholds * ceil(n / 8)), the thresholds side by side. Plane 0 is bit
    width - 1 of zeta. The bits below it, without the ``drop`` lowest, are cut into digits of ``digit`` bits, lowest
    first; each digit gives two planes, the looked-up bits "less" and "equal".

    z: n elements. table: (words, n), as ``unary_codes`` gives it, or a share of it. first: the constant that turns
    "less" into "at most" (see ``two_party.comparison``).
    """
    if z.is_meta:
        row = len(thresholds) * bits.plane_bytes(z.numel())
        return torch.empty((1 + 2 * digits, row), dtype=torch.uint8, device="meta")
    at = residues(thresholds)
    if on_cpu(z):
        return torch.from_numpy(_digit_planes(flattened(z), table.numpy(), at, width, drop, digit, digits, first))
    rows: list[list[Tensor]] = [[] for _ in range(1 + 2 * digits)]
    places = 6 - digit
    for threshold in at.tolist():
        zeta = z.reshape(-1) - threshold
        low = ring.right(zeta & ring.low_mask(width - 1), drop)
        rows[0].append(bits.pack(ring.top_bit(zeta, width)))
        for d in range(digits):
            less = table[d >> places]
            equal = less ^ (ring.left(less, 1) ^ first)
            position = ring.right(low, digit * d) & ((1 << digit) - 1) | ((d & ((1 << places) - 1)) << digit)
            rows[1 + 2 * d].append(bits.pack(less >> position))
            rows[2 + 2 * d].append(bits.pack(equal >> position))
    return torch.stack([torch.cat(row) for row in rows])


# tables over the coarse digit of an opened value, which are dealt for its mask: see ``two_party.digits``


@compiled
def _looked_up(z: Array, table: Array, shift: int, last: int) -> Array:
    out = np.empty((z.size + 7) // 8, np.uint8)
    flags = np.zeros(BLOCK, np.uint8)
    for start in range(0, z.size, BLOCK):
        here, rows = z[start : start + BLOCK], table[start : start + BLOCK]
        for i in range(here.size):
            digit = (here[i] >> shift) & last
            flags[i] = (rows[i, digit >> 3] >> np.uint8(digit & 7)) & 1
        _gathered(flags, 0, out, start >> 3, (here.size + 7) >> 3)
    return out


def looked_up(z: Tensor, table: Tensor, shift: int, size: int) -> Tensor:
    """Look one bit an element up at its digit (z >> shift) mod size, a power of two, and pack the bits to a plane.

    z: n elements. table: (n, ceil(size / 8)) bytes, in which bit t of an element is bit t % 8 of its byte t // 8.
    """
    if on_cpu(z):
        return torch.from_numpy(_looked_up(flattened(z), table.numpy(), shift, size - 1))
    digit = ring.right(z.reshape(-1, 1), shift) & (size - 1)
    return bits.pack(table.gather(1, digit >> 3).to(torch.int64) >> (digit & 7))


@compiled
def _parities(planes: Array, sizes: Array, number: int, zeros: bool) -> np.uint64:
    total, at, flip = np.uint64(0), 0, np.uint8(255 if zeros else 0)
    for size in sizes:
        for i in range(size):
            word = np.uint64(number + i + 1) * np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word ^= word >> np.uint64(31)
            total ^= word * np.uint64(((planes[at + (i >> 3)] ^ flip) >> np.uint8(i & 7)) & 1)
        number += size
        at += (size + 7) >> 3
    return total


def parities(planes: Sequence[Tensor], sizes: tuple[int, ...], *, start: int = 0, zeros: bool = False) -> Tensor:
    """Return the XOR of the words of all set bits of planes, or of all bits that are not set, as 8 bytes.

    Each plane has so many bits. Bit i of all of them together has the 64-bit word number ``start`` + i of a fixed
    sequence that looks random (SplitMix64, Steele et al. 2014).
    """
    if planes[0].is_meta:
        return torch.empty(8, dtype=torch.uint8, device="meta")
    total = _parities(np.concatenate([flattened(plane) for plane in planes]), np.array(sizes, np.int64), start, zeros)
    return torch.from_numpy(np.array([total], "<u8").view(np.uint8))


@lru_cache(maxsize=64)
def places(digits: int, blocks: int) -> tuple[Array, Array]:
    """Cut 0 .. digits - 1 into blocks, the first ones longer by one; return each number's place in its block.

    Also returned is, for each number, the length of the block before its own, that of the last one before the first.
    """
    lengths = np.full(blocks, digits // blocks, np.int64)
    lengths[: digits % blocks] += 1
    starts = np.cumsum(lengths) - lengths
    return np.arange(digits) - np.repeat(starts, lengths), np.repeat(np.roll(lengths, 1), lengths)


@compiled
def _suffix_counts(
    z: Array, plane: Array, units: Array, shift: int, row: int, places: Array, before: Array, bins: int
) -> Array:
    width = units.shape[2]
    out = np.empty((z.size // row, bins), np.int64)
    # vectors that are turned alike are added up first: by the place, and by the length of the block before. There are
    # two lengths, width and one less
    alike = np.empty((2, width, width), np.uint8)
    # entry width - i of a row: what its own block gives bin i; entry width + length - i: what a block before it of
    # that length does. They are added up at the end of a row: the inner loop has no wrap
    turned = np.empty((2, 2 * width + 1), np.uint8)
    for r in range(out.shape[0]):
        alike[:] = 0
        for i in range(r * row, (r + 1) * row):
            digit = (z[i] >> shift) & (places.size - 1)
            mine = alike[width - before[digit], places[digit]]
            unit = units[(plane[i >> 3] >> np.uint8(i & 7)) & 1, i]
            for e in range(width):
                mine[e] += unit[e]
        turned[:] = 0
        for less in range(2):
            for place in range(width):
                for e in range(max(place + 1, width - less)):
                    turned[less, width - place + e] += alike[less, place, e]
        total = np.uint8(0)
        for e in range(bins - 1, -1, -1):
            found = turned[0, width - e] + turned[1, width - e]
            if e > 0:  # the block before gives nothing to bin 0
                found += turned[0, 2 * width - e] + turned[1, 2 * width - 1 - e]
            total = np.uint8(total + found)
            out[r, e] = total
    return out


def suffix_counts(
    z: Tensor, plane: Tensor | None, units: Tensor, shift: int, digits: int, blocks: int, bins: int
) -> Tensor:
    """Add up, over the last dimension of z, vectors whose entry i is that of the place of digit - i, and sum them.

    Returns (*z.shape[:-1], bins): entry i is the sum of the entries from i on, modulo 2^8, of the sum over elements e
    of units[c_e, e], where c_e is bit e of the packed ``plane`` (None: 0). digit: (z >> shift) mod ``digits``.

    units: (1 or 2, n, ceil(digits / blocks)) bytes, an entry for each of ``places``; bins <= floor(digits / blocks).
    """
    place, before = places(digits, blocks)
    if on_cpu(z):
        chosen = np.zeros(bits.plane_bytes(z.numel()), np.uint8) if plane is None else plane.numpy()
        counts = _suffix_counts(flattened(z), chosen, units.numpy(), shift, z.shape[-1], place, before, bins)
        return torch.from_numpy(counts).reshape(*z.shape[:-1], bins)
    unit = units[0]
    if plane is not None:
        unit = torch.where(bits.unpack(plane, (z.numel(), 1)).bool(), units[1], unit)
    digit = ring.right(z.reshape(-1, 1), shift) - torch.arange(bins, device=z.device)
    found = unit.gather(1, torch.from_numpy(place).to(z.device)[digit & (digits - 1)])
    found = found.to(torch.int64).reshape(*z.shape, bins).sum(-2)
    return found.flip(-1).cumsum(-1).flip(-1) & 0xFF


# selection


@compiled
def _select(
    planes: Array, slopes: Array, offsets: Array, beta: Array, beta_r: Array, z: Array, r: Array, one: int
) -> Array:
    out = np.zeros(beta.shape[1], np.int64)
    chosen = np.empty(BLOCK, np.int64)
    for start in range(0, out.size, BLOCK):
        total = out[start : start + BLOCK]
        sloped = 0
        for s in range(slopes.size):
            slope, offset, constant = slopes[s], offsets[s], one * offsets[s]
            _spread(planes[s], start >> 3, chosen, (total.size + 7) >> 3)
            b = beta[s, start : start + BLOCK]
            # a mask instead of a branch: the processor would mispredict random bits every other time
            if slope != 0:
                br, v, mask = beta_r[sloped, start : start + BLOCK], z[start : start + BLOCK], r[start : start + BLOCK]
                for i in range(total.size):
                    masked = slope * (v[i] * b[i] - br[i]) + offset * b[i]
                    mine = one * v[i] - mask[i]  # the share of x
                    total[i] += masked + ((slope * mine + constant - 2 * masked) & chosen[i])
                sloped += 1
            else:
                for i in range(total.size):
                    masked = offset * b[i]
                    total[i] += masked + ((constant - 2 * masked) & chosen[i])
    return out


def select(
    planes: Tensor,
    slopes: tuple[int, ...],
    offsets: tuple[int, ...],
    beta: Tensor,
    opened: tuple[Tensor, Tensor, Tensor] | None,
    *,
    server: bool,
) -> Tensor:
    """Return this party's share of sum_s b_s (slopes[s] x + offsets[s]) for the bits b_s = planes[s] XOR beta_s.

    planes: the opened bits, known to both parties. beta: (S, *shape), shares of the mask bits. opened: (z, this party's
    share of its mask r, (T, *shape) shares of beta_s r for the T nonzero slopes); None if there are none. Only the
    server adds the public constants. Arithmetic modulo 2^64.
    """
    m, q, one = residues(slopes), residues(offsets), 1 if server else 0
    if on_cpu(beta):
        flat = beta.reshape(len(slopes), -1).numpy()
        z, r, beta_r = opened if opened is not None else (beta, beta, beta)  # not read if there is no slope
        rows = beta_r.reshape(beta_r.shape[0], -1).numpy()
        total = _select(planes.numpy(), m, q, flat, rows, flattened(z), flattened(r), one)
        return torch.from_numpy(total).reshape(beta.shape[1:])
    out, sloped = torch.zeros_like(beta[0]), 0
    for s, slope in enumerate(slopes):
        whole: int | Tensor = one * int(q[s])
        masked = beta[s] * int(q[s])
        if slope and opened is not None:
            z, r, beta_r = opened
            masked, whole = masked + (z * beta[s] - beta_r[sloped]) * int(m[s]), whole + (one * z - r) * int(m[s])
            sloped += 1
        out += torch.where(bits.unpack(planes[s], tuple(out.shape)).bool(), whole - masked, masked)
    return out


@compiled
def _select_each(planes: Array, beta: Array, beta_r: Array, z: Array, r: Array, one: int) -> Array:
    out = np.zeros(beta.shape[1], np.int64)
    chosen = np.empty(BLOCK, np.int64)
    for start in range(0, out.size, BLOCK):
        total = out[start : start + BLOCK]
        for s in range(len(beta)):
            _spread(planes[s], start >> 3, chosen, (total.size + 7) >> 3)
            b, br = beta[s, start : start + BLOCK], beta_r[s, start : start + BLOCK]
            v, mask = z[s, start : start + BLOCK], r[s, start : start + BLOCK]
            for i in range(total.size):
                masked = v[i] * b[i] - br[i]
                total[i] += masked + ((one * v[i] - mask[i] - 2 * masked) & chosen[i])
    return out


def select_each(planes: Tensor, beta: Tensor, beta_r: Tensor, z: Tensor, r: Tensor, *, server: bool) -> Tensor:
    """Return this party's share of sum_s b_s x_s for the bits b_s = planes[s] XOR beta_s and the openings z = x + r.

    All but ``planes`` are stacked like z, (S, *shape); beta and beta_r are shares of the mask bits and of their
    products with r. Arithmetic modulo 2^64.
    """
    if on_cpu(z):
        rows = (np.ascontiguousarray(x.reshape(len(x), -1).numpy()) for x in (beta, beta_r, z, r))
        return torch.from_numpy(_select_each(planes.numpy(), *rows, int(server))).reshape(z.shape[1:])
    masked, whole = z * beta - beta_r, (z if server else 0) - r
    stacked = torch.stack([bits.unpack(plane, tuple(z.shape[1:])) for plane in planes]).bool()
    return torch.where(stacked, whole - masked, masked).sum(0)


# the exponential


@compiled
def _exponential(
    z: Array, bit: Array, powers: Array, coarse: Array, fine: Array, shift: int, excess: int, places: int
) -> Array:
    out = np.empty(z.size, np.int64)
    chosen = np.zeros(BLOCK, np.int64)
    mask, low_bits, count = (np.int64(1) << shift) - 1, 0, np.int64(1) << places
    while (1 << low_bits) < fine.size:
        low_bits += 1
    for start in range(0, z.size, BLOCK):
        here = z[start : start + BLOCK]
        if bit.size:
            _spread(bit, start >> 3, chosen, (here.size + 7) >> 3)
        for i in range(here.size):
            t = (mask + 1) - (here[i] & mask)
            factor = (coarse[t >> low_bits] * fine[t & (fine.size - 1)] + (np.int64(1) << (excess - 1))) >> excess
            row = (count & chosen[i]) | ((here[i] >> shift) & (count - 1))
            out[start + i] = factor * powers[row, start + i]
    return out


def exponential(
    z: Tensor,
    bit: Tensor | None,
    powers: Tensor,
    coarse: Tensor,
    fine: Tensor,
    shift: int,
    excess: int,
    places: int = 1,
) -> Tensor:
    """Return e^t times powers[n c + d]: t = 2^shift - the low bits of z, d the ``places`` bits above them, c its bit.

    powers: (n or 2 n, *shape) with n = 2^places; bit: a packed plane, or None for c = 0. coarse, fine: the tables whose
    products, without their ``excess`` lowest bits, give e^t (see ``two_party.exponential``). Arithmetic modulo 2^64.
    """
    if z.is_meta:
        return torch.empty(z.shape, dtype=torch.int64, device="meta")
    if on_cpu(z):
        plane = np.empty(0, np.uint8) if bit is None else bit.numpy()
        rows = powers.reshape(powers.shape[0], -1).numpy()
        flat = _exponential(flattened(z), plane, rows, coarse.numpy(), fine.numpy(), shift, excess, places)
        return torch.from_numpy(flat.reshape(z.shape))
    t = (1 << shift) - (z & ring.low_mask(shift))
    low_bits = fine.numel().bit_length() - 1
    tables = coarse.to(z.device)[ring.right(t, low_bits)] * fine.to(z.device)[t & ring.low_mask(low_bits)]
    row = ring.right(z, shift) & ((1 << places) - 1)
    if bit is not None:
        row = row + (bits.unpack(bit, tuple(z.shape)) << places)
    return ring.right(tables + (1 << (excess - 1)), excess) * powers.gather(0, row.unsqueeze(0))[0]


# extension


@compiled
def _extended(x: Array, mine: Array, theirs: Array, product: Array, offset: int, width: int, client: bool) -> Array:
    out = np.empty_like(x)
    mask = (np.int64(1) << width) - 1
    own, other = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    for start in range(0, x.size, BLOCK):
        here, given, wide = x[start : start + BLOCK], product[start : start + BLOCK], out[start : start + BLOCK]
        size = (here.size + 7) >> 3
        _spread(mine, start >> 3, own, size)
        _spread(theirs, start >> 3, other, size)
        for i in range(here.size):
            value = (here[i] + offset) & mask
            top = value >> (width - 1)
            sign = own[i] ^ other[i]
            both = other[i] & (top if client else top + own[i])
            both += (given[i] ^ sign) - sign
            wide[i] = value + ((both - top) << width) - offset
    return out


def extended(x: Tensor, mine: Tensor, theirs: Tensor, product: Tensor, width: int, *, client: bool) -> Tensor:
    """Return this party's share in the wide ring: step 2 of ``two_party.extension``."""
    offset = 0 if client else 1 << (width - 2)
    if on_cpu(x):
        flat = _extended(flattened(x), flattened(mine), flattened(theirs), flattened(product), offset, width, client)
        return torch.from_numpy(flat.reshape(x.shape))
    value = ring.reduce(x + offset, width)
    top, shape = ring.top_bit(value, width), tuple(x.shape)
    own, other = bits.unpack(mine, shape), bits.unpack(theirs, shape)
    both = other * (top if client else top - own)
    both = both + torch.where((own ^ other).bool(), -product, product)
    return value + ring.left(both - top, width) - offset


# lifted openings


@compiled
def _lifted(z: Array, offset: int, width: int, drop: int, mask: int, shift: int) -> tuple[Array, Array]:
    value, lower = np.empty_like(z), np.empty(z.size, np.int8)
    for i in range(z.size):
        moved = z[i] + offset
        value[i] = ((moved >> drop) & mask) - shift
        lower[i] = ((moved >> (width - 1)) & 1) - 1
    return value, lower


def lifted(z: Tensor, width: int, drop: int) -> tuple[Tensor, Tensor]:
    """Return the public integer of a lifted opening, and -1 (int8) where it is in the lower half, else 0.

    With z' = z + 2^(width-2) mod 2^width, the integer is (z' >> drop) - 2^(width-2-drop), and z' is in the lower half
    if it has no top bit.
    """
    offset, shift = 1 << (width - 2), 1 << (width - 2 - drop)
    if on_cpu(z):
        value, lower = _lifted(flattened(z), offset, width, drop, ring.low_mask(width - drop), shift)
        return torch.from_numpy(value.reshape(z.shape)), torch.from_numpy(lower.reshape(z.shape))
    moved = z + offset
    whole = ring.right(moved, drop) & ring.low_mask(width - drop)
    return whole - shift, (ring.top_bit(moved, width) - 1).to(torch.int8)


@compiled
def _chosen(upper: Array, difference: Array, lower: Array, shift: int) -> Array:
    out = np.empty_like(upper)
    for i in range(upper.size):
        out[i] = upper[i] - ((difference[i] & np.int64(lower[i])) << shift)
    return out


def chosen(upper: Tensor, difference: Tensor, lower: Tensor, shift: int) -> Tensor:
    """Return upper - 2^shift difference where ``lower`` is -1, and upper where it is 0; modulo 2^64."""
    if on_cpu(upper):
        flat = _chosen(flattened(upper), flattened(difference), flattened(lower), shift)
        return torch.from_numpy(flat.reshape(upper.shape))
    return upper - ring.left(difference & lower.to(torch.int64), shift)


# truncation


@compiled
def _dropped(x: Array, offset: int, shift: int, mask: int) -> Array:
    out = np.empty_like(x)
    for i in range(x.size):
        out[i] = ((x[i] + offset) >> shift) & mask
    return out


def dropped(x: Tensor, offset: int, shift: int, bits: int) -> Tensor:
    """Return floor((x + offset) / 2^shift), with x + offset read as its representative in [0, 2^bits)."""
    if on_cpu(x) and shift:
        flat = _dropped(flattened(x), ring.wrap(offset), shift, ring.low_mask(bits - shift))
        return torch.from_numpy(flat.reshape(x.shape))
    return ring.drop_low(x + ring.wrap(offset), shift, bits)


# polynomials


@compiled
def _cubics(z: Array, r: Array, r2: Array, r3: Array, centres: Array, tables: Array, server: bool) -> Array:
    out = np.empty((len(centres), z.size), np.int64)
    for s in range(len(centres)):
        centre, t, row = centres[s], tables[s], out[s]
        a0, a1, a2, a3 = t[0, 0], t[0, 1], t[0, 2], t[0, 3]
        b1, b2, b3, c2, c3, d3 = t[1, 1], t[1, 2], t[1, 3], t[2, 2], t[2, 3], t[3, 3]
        if not server:
            a0 = a1 = a2 = a3 = np.int64(0)
        for i in range(z.size):  # no calls and no branches: this loop is vectorized
            v = z[i] - centre
            mine = a0 + v * (a1 + v * (a2 + v * a3))
            row[i] = mine + r[i] * (b1 + v * (b2 + v * b3)) + r2[i] * (c2 + v * c3) + r3[i] * d3
    return out


@lru_cache(maxsize=256)
def _binomials(coefficients: tuple[tuple[int, ...], ...]) -> Array:
    """Return (-1)^k C_j binom(j, k) of every polynomial at [polynomial, k, j], of 4 rows and columns at least."""
    size = max(4, *map(len, coefficients))
    tables = np.zeros((len(coefficients), size, size), np.int64)
    for table, own in zip(tables, coefficients, strict=True):
        for j, c in enumerate(own):
            for k in range(j + 1):
                table[k, j] = ring.wrap((-1) ** k * math.comb(j, k) * c)
    return tables


def polynomials(
    z: Tensor,
    powers: tuple[Tensor, ...],
    centres: tuple[int, ...],
    coefficients: tuple[tuple[int, ...], ...],
    first: int,
) -> Tensor:
    """Return sum_{k >= first} (-1)^k r^k sum_{j >= k} C_j binom(j, k) (z - centre)^(j - k); powers[k - 1] holds r^k.

    Each polynomial has a centre and the coefficients C; the results are stacked. first: 0 for the party that adds the
    term without r, 1 for the other. Arithmetic modulo 2^64.
    """
    degree, tables = max(map(len, coefficients)) - 1, _binomials(coefficients)
    if on_cpu(z) and 1 <= degree <= 3:
        r, r2, r3 = (flattened(powers[min(k, degree) - 1]) for k in (1, 2, 3))  # powers above the degree meet zeros
        flat = _cubics(flattened(z), r, r2, r3, residues(centres), tables, first == 0)
        return torch.from_numpy(flat.reshape(len(centres), *z.shape))
    out = []
    for centre, table, own in zip(centres, tables, coefficients, strict=True):
        v, total = z - ring.wrap(centre), torch.zeros_like(z)
        for k in range(first, len(own)):
            inner = torch.zeros_like(z)
            for j in range(len(own) - 1, k - 1, -1):
                inner = inner * v + int(table[k, j])
            total = total + (inner * powers[k - 1] if k else inner)
        out.append(total)
    return torch.stack(out)


def polynomial_passes(coefficients: tuple[tuple[int, ...], ...]) -> int:
    """Count the passes that ``polynomials`` takes over its argument."""
    longest = max(map(len, coefficients))
    return len(coefficients) if 2 <= longest <= 4 else sum(len(own) * (len(own) + 1) // 2 for own in coefficients)


def warm_up() -> None:
    """Compile every kernel, or load it from the cache beside this file, so that no query waits for the compiler."""
    x, plane = torch.zeros(8, dtype=torch.int64), torch.zeros(1, dtype=torch.uint8)
    bit_plane(x, 0, 1)
    digit_planes(x, unary_codes(x, 17, 0, 4, 4), (0,), 17, 0, 4, 4, 0)
    select(plane.reshape(1, 1), (1,), (0,), x.reshape(1, 8), (x, x, x.reshape(1, 8)), server=True)
    select_each(plane.reshape(1, 1), *(4 * [x.reshape(1, 8)]), server=True)
    exponential(x, plane, x.expand(4, 8).contiguous(), torch.ones(2, dtype=torch.int64), x + 1, 3, 1)
    extended(x, plane, plane, x, 8, client=True)
    looked_up(x, plane.expand(8, 1).contiguous(), 0, 8)
    opened(x.clone(), x, 8)
    suffix_counts(x, None, torch.zeros(1, 8, 2, dtype=torch.uint8), 0, 2, 1, 2)
    chosen(x, x, lifted(x, 8, 1)[1], 7)
    dropped(x, 0, 1, 8)
    polynomials(x, (x,), (0,), ((1, 1),), 0)
    parities([plane], (8,))
