"""Packed bits: Boolean shares of many elements are kept, combined and sent with eight bits to a byte.

A *plane* holds one bit of each of n elements in ceil(n / 8) bytes (``torch.uint8``, element i at bit i % 8 of byte
i // 8); a stack of planes has shape (planes, ceil(n / 8)). XOR and AND of planes work on eight elements at a time.
Bits past the last element are junk, which every reader ignores.
"""

import math

import numpy as np
import torch
from torch import Tensor


def plane_bytes(elements: int) -> int:
    """The bytes of a plane of this many elements."""
    return -(-elements // 8)


def pack(bits: Tensor) -> Tensor:
    """Pack the lowest bit of each element of an int64 tensor: n elements give (ceil(n / 8),) uint8."""
    if bits.is_meta:
        return torch.empty(plane_bytes(bits.numel()), dtype=torch.uint8, device="meta")
    low = (bits & 1).to(torch.uint8).reshape(-1).numpy()
    return torch.from_numpy(np.packbits(low, bitorder="little"))


def unpack(plane: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack a plane, (ceil(n / 8),) uint8, to int64 zeros and ones of ``shape``."""
    if plane.is_meta:
        return torch.empty(shape, dtype=torch.int64, device="meta")
    count = math.prod(shape)
    unpacked = np.unpackbits(plane.numpy(), count=count, bitorder="little")
    return torch.from_numpy(unpacked.astype(np.int64)).reshape(shape)
