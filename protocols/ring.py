"""Arithmetic in Z_2^k on ``torch.int64`` tensors.

A ring element of ``bits`` bits is an int64 whose low ``bits`` bits matter; whatever stands above them is junk
that every function here ignores, so additions and products need no reduction. int64 wraps around modulo 2^64,
which is what makes this exact for every ring of at most 64 bits.
"""

from functools import lru_cache

import torch
from torch import Tensor

WORD = 64  # the widest ring


@lru_cache(maxsize=256)
def _amount(shift: int, device: torch.device) -> Tensor:
    # torch vectorizes a shift by a tensor of one element, and takes 70 times as long for a Python integer
    return torch.full((1,), shift, dtype=torch.int64, device=device)


def left(x: Tensor, shift: int) -> Tensor:
    """x * 2^shift, modulo 2^64."""
    return x << _amount(shift, x.device) if shift else x


def right(x: Tensor, shift: int) -> Tensor:
    """floor(x / 2^shift) of the signed 64-bit number."""
    return x >> _amount(shift, x.device) if shift else x


def low_mask(bits: int) -> int:
    """The int64 with the low ``bits`` bits set."""
    return -1 if bits >= WORD else (1 << bits) - 1


def reduce(x: Tensor, bits: int) -> Tensor:
    """The representative in [0, 2^bits); for 64 bits the signed one, as int64 holds no other."""
    return x if bits >= WORD else x & low_mask(bits)


def signed(x: Tensor, bits: int) -> Tensor:
    """The representative in [-2^(bits-1), 2^(bits-1))."""
    return x if bits >= WORD else right(left(x, WORD - bits), WORD - bits)


def drop_low(x: Tensor, shift: int, bits: int) -> Tensor:
    """floor(x / 2^shift) of the representative in [0, 2^bits): an element of the ring of bits - shift bits."""
    if shift == 0:
        return x
    return right(x, shift) & low_mask(bits - shift)


def top_bit(x: Tensor, bits: int) -> Tensor:
    """Bit ``bits`` - 1, as an int64 of zeros and ones."""
    return right(x, bits - 1) & 1


def wrap(value: int, bits: int = WORD) -> int:
    """A Python integer modulo 2^bits, as the signed int64 that stands for it."""
    value &= (1 << bits) - 1
    return value - (1 << WORD) if value >= 1 << (WORD - 1) else value


def encode(x: Tensor, fraction: int) -> Tensor:
    """round(x * 2^fraction) as int64; the caller has checked that it fits."""
    return torch.round(x.to(torch.float64) * 2.0**fraction).to(torch.int64)


def decode(x: Tensor, bits: int, fraction: int) -> Tensor:
    """The float64 number that a residue of a ``bits``-bit ring with ``fraction`` fraction bits stands for."""
    return signed(x, bits).to(torch.float64) * 2.0**-fraction
