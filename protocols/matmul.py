"""Matrix products modulo 2^ring, by the faster of two exact kernels.

torch multiplies int64 matrices with a just-in-time AVX-512 kernel if the processor has it (13-32 GMAC/s a thread on
Zen 5) and with a plain loop otherwise (0.3 GMAC/s on Zen 3). ``limbs`` uses float64 products and reaches 2-28 GMAC/s
on both. Both kernels are exact and agree bit for bit, because integers wrap around, so two parties may choose
differently.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from protocols import limbs, ring


@cache
def native() -> bool:
    """True if torch's int64 product is the faster kernel on this processor."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


class Matrix:
    """The right-hand side of many products, kept in the form that the kernel needs.

    value: (n, p) residues modulo 2^ring_bits or, with ``signed``, true integers, whose few bits make products cheaper.
    """

    def __init__(self, value: Tensor, ring_bits: int, *, signed: bool) -> None:
        self._ring, self._shape = ring_bits, tuple(value.shape)
        self._value: Tensor | limbs.Packed
        if value.is_meta or native():
            self._value = value.contiguous()
        elif signed:
            largest = int(value.abs().max()) if value.numel() else 0
            self._value = limbs.pack(value, largest.bit_length() + 1, signed=True, ring=ring_bits)
        else:
            self._value = limbs.pack(value, ring_bits, signed=False, ring=ring_bits)

    def times(self, x: Tensor) -> Tensor:
        """Return x @ self modulo 2^ring, for residues x of shape (..., n)."""
        if isinstance(self._value, Tensor):
            return matmul(x, self._value, self._ring)
        if x.is_meta:
            return x.new_empty((*x.shape[:-1], self._shape[-1]))
        if x.dim() == 1:
            return limbs.matmul(x[None], self._value, self._ring)[0]
        return limbs.matmul(x, self._value, self._ring)


def matmul(a: Tensor, b: Tensor, ring_bits: int) -> Tensor:
    """Return a @ b modulo 2^ring, batched like ``torch.matmul``."""
    if a.is_meta or native():
        return ring.reduce(torch.matmul(a.contiguous(), b.contiguous()), ring_bits)
    return limbs.matmul(a, b, ring_bits)
