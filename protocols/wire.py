"""The encoding of tensors as bytes: sizes are fixed and known to both sides, and nothing is ever pickled.

A ring element takes ceil(bits / 8) bytes, little-endian; packed bit planes are sent as they are. The bytes carry no
description of themselves.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocols import kernels, ring


class FrameError(ValueError):
    """A frame does not have the size that the Program prescribes."""


@dataclass(frozen=True)
class Wire:
    """The form of one tensor on the wire: ``shape`` elements of ``bits`` bits, or packed bytes (``planes``)."""

    shape: tuple[int, ...]
    bits: int = 8
    planes: bool = False

    @property
    def element_bytes(self) -> int:
        return 1 if self.planes else -(-self.bits // 8)

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return math.prod(self.shape) * self.element_bytes

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.planes else torch.int64


def encode(x: Tensor, wire: Wire) -> memoryview:
    """Encode one tensor. Ring elements are reduced first, so that junk above the ring is never sent.

    Planes are not copied: the result is a view of the memory of ``x``. Raises FrameError for a tensor of another shape
    than ``wire`` says: if a one-time mask had been broadcast over that tensor, sending it would leak.
    """
    if tuple(x.shape) != wire.shape:
        raise FrameError(f"a tensor of shape {tuple(x.shape)} where one of shape {wire.shape} is to be sent")
    values = x.contiguous().numpy().reshape(-1)
    if not wire.planes:
        values = kernels.stored(values, wire.element_bytes, ring.low_mask(wire.bits))
    return values.view(np.uint8).data


def decode(buffer: bytes | memoryview, wire: Wire) -> Tensor:
    """Decode one tensor; raises FrameError if ``buffer`` has another size than ``wire`` says."""
    if len(buffer) != wire.size:
        raise FrameError(f"a tensor of shape {wire.shape} takes {wire.size} bytes, got {len(buffer)}")
    stored = np.frombuffer(buffer, dtype=np.uint8)
    if wire.planes:
        return torch.from_numpy(stored.copy()).reshape(wire.shape)
    return torch.from_numpy(kernels.loaded(stored, wire.element_bytes)).reshape(wire.shape)
