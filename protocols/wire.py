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

from protocols import bits, kernels


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
        values = kernels.stored(values, wire.bits)
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
    stored, at, out = np.frombuffer(buffer, dtype=np.uint8), 0, []
    for wire in wires:
        out.append(_decoded(stored[at : at + wire.size], wire))
        at += wire.size
    return out


def _decoded(stored: kernels.Array, wire: Wire) -> Tensor:
    if wire.planes:
        return torch.from_numpy((stored if stored.flags.writeable else stored.copy()).reshape(wire.shape))
    return torch.from_numpy(kernels.loaded(stored, math.prod(wire.shape), wire.bits).reshape(wire.shape))
