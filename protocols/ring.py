"""Arithmetic in Z_2^k on ``torch.int64`` tensors.

A ring element of ``bits`` bits is an int64 of which only the low ``bits`` bits count. The bits above are junk that
every function here ignores, so sums and products need no reduction. int64 wraps around modulo 2^64, so the arithmetic
is exact for every ring of at most 64 bits.
"""

from functools import lru_cache

import torch
from torch import Tensor

WORD = 64  # the widest ring


@lru_cache(maxsize=256)
def _amount(shift: int, device: torch.device) -> Tensor:
    # torch vectorizes a shift by a tensor of one element; a shift by a Python integer takes 70 times as long
    return torch.full((1,), shift, dtype=torch.int64, device=device)


def left(x: Tensor, shift: int) -> Tensor:
    """Return x * 2^shift modulo 2^64."""
    return x << _amount(shift, x.device) if shift else x


def right(x: Tensor, shift: int) -> Tensor:
    """Return floor(x / 2^shift), with x read as a signed 64-bit number."""
    return x >> _amount(shift, x.device) if shift else x


def low_mask(bits: int) -> int:
    """Return the int64 whose low ``bits`` bits are set."""
    return -1 if bits >= WORD else (1 << bits) - 1


def reduce(x: Tensor, bits: int) -> Tensor:
    """Return the representative in [0, 2^bits); for 64 bits the signed one, because int64 holds no other."""
    return x if bits >= WORD else x & low_mask(bits)


def signed(x: Tensor, bits: int) -> Tensor:
    """Return the representative in [-2^(bits-1), 2^(bits-1))."""
    if bits >= WORD:
        return x
    return right(left(x, WORD - bits), WORD - bits).reshape(x.shape)  # the amount of a shift has one dimension


def drop_low(x: Tensor, shift: int, bits: int) -> Tensor:
    """Return floor(x / 2^shift) of the representative in [0, 2^bits), an element of the ring of bits - shift bits."""
    if shift == 0:
        return x
    return right(x, shift) & low_mask(bits - shift)


def top_bit(x: Tensor, bits: int) -> Tensor:
    """Return bit ``bits`` - 1 of each element, as int64 zeros and ones."""
    return right(x, bits - 1) & 1


def wrap(value: int, bits: int = WORD) -> int:
    """Reduce a Python integer modulo 2^bits and return the signed int64 that represents it."""
    value &= (1 << bits) - 1
    return value - (1 << WORD) if value >= 1 << (WORD - 1) else value


def encode(x: Tensor, fraction: int) -> Tensor:
    """Return round(x * 2^fraction) as int64; the caller has checked that it fits."""
    return torch.round(x.to(torch.float64) * 2.0**fraction).to(torch.int64)


def decode(x: Tensor, bits: int, fraction: int) -> Tensor:
    """Decode residues of a ``bits``-bit ring with ``fraction`` fraction bits to float64."""
    return signed(x, bits).to(torch.float64) * 2.0**-fraction
