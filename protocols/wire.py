"""The encoding of tensors as bytes: sizes are fixed and known to both sides, and nothing is ever pickled.

n ring elements of b bits take n * (b // 8) + (b % 8) * ceil(n / 8) bytes, b / 8 an element if n is a multiple of 8:
first the whole low bytes of every element, little-endian, then a packed plane for each of the bits above them, the
lowest first. Tensors of packed bits are sent as they are. The bytes carry no description of themselves.

A plane's last byte may have bits past the last element. Those of ring elements are sent as zeros, and ignored when they
come; those of tensors of packed bits are sent as they are, and every reader ignores them (see ``bits``).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from protocols import bits, ring
from protocols.kernels import BLOCK, Array, compiled


class FrameError(ValueError):
    """A frame does not have the size that the Program prescribes."""


@dataclass(frozen=True)
class Wire:
    """The form of one tensor on the wire: ``shape`` elements of ``bits`` bits, or packed bytes (``planes``)."""

    shape: tuple[int, ...]
    bits: int = 8
    planes: bool = False

    @cached_property
    def size(self) -> int:
        """Bytes on the wire."""
        n = math.prod(self.shape)
        return n if self.planes else n * (self.bits // 8) + self.bits % 8 * bits.plane_bytes(n)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.planes else torch.int64


def encode(x: Tensor, wire: Wire) -> memoryview:
    """Encode one tensor. Of ring elements only the bits of the ring are taken, so that junk above it is never sent.

    Planes and 64-bit elements are not copied: the result is a view of the memory of ``x``. Raises FrameError for a
    tensor of another shape than ``wire`` says: if a one-time mask had been broadcast over that tensor, sending it would
    leak.
    """
    if tuple(x.shape) != wire.shape:
        raise FrameError(f"a tensor of shape {tuple(x.shape)} where one of shape {wire.shape} is to be sent")
    values = x.numpy().reshape(-1)
    if not wire.planes:
        values = stored(values, wire.bits)
    return values.view(np.uint8).data


def decode(buffer: bytes | memoryview, wire: Wire) -> Tensor:
    """Decode one tensor; raises FrameError if ``buffer`` has another size than ``wire`` says.

    Packed bytes in memory that can be written are not copied: the result is a view of them.
    """
    if len(buffer) != wire.size:
        raise FrameError(f"a tensor of shape {wire.shape} takes {wire.size} bytes, got {len(buffer)}")
    return _decoded(np.frombuffer(buffer, dtype=np.uint8), wire)


def decode_all(buffer: bytes | bytearray | memoryview, wires: Iterable[Wire]) -> list[Tensor]:
    """Decode tensors that stand one behind another, as ``decode`` does.

    The caller has compared the size of ``buffer`` with theirs.
    """
    raw, at, out = np.frombuffer(buffer, dtype=np.uint8), 0, []
    for wire in wires:
        out.append(_decoded(raw[at : at + wire.size], wire))
        at += wire.size
    return out


def _decoded(raw: Array, wire: Wire) -> Tensor:
    if wire.planes:
        return torch.from_numpy((raw if raw.flags.writeable else raw.copy()).reshape(wire.shape))
    return torch.from_numpy(loaded(raw, math.prod(wire.shape), wire.bits).reshape(wire.shape))


# elements of a ring as bytes: a block of them at a time

_SWAPS = (  # the steps that transpose a word as a matrix of 8 x 8 bits: (distance, bits that move down by it)
    (np.uint64(7), np.uint64(0x00AA00AA00AA00AA)),
    (np.uint64(14), np.uint64(0x0000CCCC0000CCCC)),
    (np.uint64(28), np.uint64(0x00000000F0F0F0F0)),
)


@compiled
def _transpose(words: Array) -> None:
    """Exchange bit i of byte k with bit k of byte i in every word: eight elements become their eight planes, or back.

    It costs less than ``kernels._gathered`` for two planes or more.
    """
    (d0, m0), (d1, m1), (d2, m2) = _SWAPS
    for j in range(words.size):
        word = words[j]
        moved = (word ^ (word >> d0)) & m0
        word ^= moved ^ (moved << d0)
        moved = (word ^ (word >> d1)) & m1
        word ^= moved ^ (moved << d1)
        moved = (word ^ (word >> d2)) & m2
        words[j] = word ^ moved ^ (moved << d2)


@compiled
def _store(x: Array, out: Array, n: int, at: int, width: tuple[int, ...], planes: int) -> None:
    """Store the elements ``at``, ``at`` + 1, ... of n, which are ``x``; ``at`` is a multiple of 8."""
    each, whole = (n + 7) >> 3, n * len(width)
    high = np.zeros(BLOCK, np.uint8)
    words = high.view(np.uint64)
    for start in range(0, x.size, BLOCK):
        here = x[start : start + BLOCK]
        low = out[(at + start) * len(width) :]
        for i in range(here.size):
            for k in range(len(width)):
                low[i * len(width) + k] = np.uint8(here[i] >> (8 * k))
        if planes:
            for i in range(here.size):
                high[i] = np.uint8(here[i] >> (8 * len(width)))
            size = (here.size + 7) >> 3
            high[here.size : 8 * size] = 0
            _transpose(words[:size])
            for k in range(planes):
                first, shift = whole + k * each + ((at + start) >> 3), np.uint64(8 * k)
                plane = out[first : first + size]
                for j in range(size):
                    plane[j] = np.uint8(words[j] >> shift)


@compiled
def _store_difference(x: Array, y: Array, out: Array, n: int, at: int, width: tuple[int, ...], planes: int) -> None:
    difference = np.empty(BLOCK, np.int64)
    for start in range(0, x.size, BLOCK):
        size = min(BLOCK, x.size - start)
        for i in range(size):
            difference[i] = x[start + i] - y[start + i]
        _store(difference[:size], out, n, at + start, width, planes)


@compiled
def _loaded(raw: Array, n: int, width: tuple[int, ...], planes: int) -> Array:
    each = (n + 7) >> 3
    whole = n * len(width)
    out = np.empty(n, np.int64)
    high = np.zeros(BLOCK, np.uint8)
    words = high.view(np.uint64)
    for start in range(0, n, BLOCK):
        here, low = out[start : start + BLOCK], raw[start * len(width) :]
        if planes:
            size = (here.size + 7) >> 3
            words[:size] = np.uint64(0)
            for k in range(planes):
                at, shift = whole + k * each + (start >> 3), np.uint64(8 * k)
                plane = raw[at : at + size]
                for j in range(size):
                    words[j] |= np.uint64(plane[j]) << shift
            _transpose(words[:size])
            for i in range(here.size):
                value = np.int64(high[i]) << (8 * len(width))
                for k in range(len(width)):
                    value |= np.int64(low[i * len(width) + k]) << (8 * k)
                here[i] = value
        else:
            for i in range(here.size):
                value = np.int64(0)
                for k in range(len(width)):
                    value |= np.int64(low[i * len(width) + k]) << (8 * k)
                here[i] = value
    return out


_KNOWN = [(0,) * width for width in range(9)]
"""Tuples by their length, which is part of their types: so the compiler knows the width and vectorizes."""


def stored(x: Array, ring_bits: int) -> Array:
    """Store the low ``ring_bits`` bits of every element, n * ring_bits / 8 bytes if n is a multiple of 8.

    First come the whole bytes, ring_bits // 8 an element, little-endian; then a packed plane of ceil(n / 8) bytes for
    each bit above them, the lowest first. Bits of a plane past the last element are zero. Elements of 64 bits are not
    copied: the result is a view of them.
    """
    if ring_bits == ring.WORD:
        return x.view(np.uint8)
    out = np.empty((ring_bits >> 3) * x.size + (ring_bits & 7) * bits.plane_bytes(x.size), np.uint8)
    _store(x, out, x.size, 0, _KNOWN[ring_bits >> 3], ring_bits & 7)
    return out


def store_difference(x: Array, y: Array, ring_bits: int, out: Array, n: int, at: int) -> None:
    """Store x - y, the elements ``at``, ``at`` + 1, ... of n, in ``out`` in the form of ``stored``.

    ``at`` is a multiple of 8, and ``out`` has the bytes of all n elements.
    """
    _store_difference(x, y, out, n, at, _KNOWN[ring_bits >> 3], ring_bits & 7)


def loaded(raw: Array, n: int, ring_bits: int) -> Array:
    """Load n int64 elements from bytes of the form of ``stored``; bits of a plane past the last element are ignored.

    ``raw`` must have the size that ``stored`` gives: this does not check it.
    """
    if ring_bits == ring.WORD:
        return raw.view(np.int64).copy()
    if raw.flags.writeable:  # received bytes mostly are not, and numba would compile both kinds
        raw = raw.view()
        raw.flags.writeable = False
    out: Array = _loaded(raw, n, _KNOWN[ring_bits >> 3], ring_bits & 7)
    return out


def warm_up() -> None:
    """Compile what is compiled here, or load it from where it is kept."""
    x = np.zeros(8, np.int64)
    for width in range(9):
        ring_bits = 8 * width or 1
        loaded(stored(x, ring_bits), x.size, ring_bits)
        store_difference(x, x, ring_bits, np.zeros(64, np.uint8), x.size, 0)
