"""Matrix products modulo 2^ring, by the fastest of three exact kernels.

``madd52`` uses an instruction of some AVX-512 processors for rings of at most 52 bits (20-58 GMAC/s a thread on Zen 5).
torch multiplies int64 matrices with a just-in-time AVX-512 kernel if the processor has it (13-32 GMAC/s there) and with
a plain loop otherwise (0.3 GMAC/s on Zen 3). ``limbs`` uses float64 products and reaches 2-28 GMAC/s on both. All
kernels are exact and agree bit for bit, because integers wrap around, so two parties may choose differently.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from protocols import limbs, madd52, narrow, ring


@cache
def native() -> bool:
    """True if torch's int64 product is the faster kernel on this processor."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def warm_up() -> None:
    """Compile what is compiled here."""
    if native() and madd52.available():
        one = torch.zeros(1, 1, dtype=torch.int64)
        madd52.matmul(one, one)
        madd52.matmul(one, one.to(torch.int16))
    for kind in (torch.int16, torch.int64):
        narrow.product_of_rows(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=kind))


class Matrix:
    """The right-hand side of many products, kept in the form that the kernel needs.

    value: (n, p) residues modulo 2^ring_bits or, with ``signed``, true integers, whose few bits make products cheaper.
    Narrow integers (``protocols.narrow``) are true ones. They are kept as they are, in a mapped file perhaps, where a
    kernel reads them so, and if they are too many to be packed. packed: it is held in another form, or another order,
    which takes memory of its own.
    """

    def __init__(self, value: Tensor, ring_bits: int, *, signed: bool) -> None:
        self._ring, self._shape = ring_bits, tuple(value.shape)
        self._value: Tensor | limbs.Packed
        held_narrow = narrow.is_narrow(value)
        if value.is_meta or native() or (held_narrow and value.numel() > _MOST_PACKED):
            self._value = value if held_narrow and narrow.in_place(value) else value.contiguous()
            self.packed = self._value is not value
            return
        self.packed = True
        value, signed = narrow.widened(value), signed or held_narrow
        if signed:
            largest = int(value.abs().max()) if value.numel() else 0
            self._value = limbs.pack(value, largest.bit_length() + 1, signed=True, ring=ring_bits)
        else:
            self._value = limbs.pack(value, ring_bits, signed=False, ring=ring_bits)

    def times(self, x: Tensor) -> Tensor:
        """Return x @ self modulo 2^ring, for residues x of shape (..., n)."""
        if isinstance(self._value, Tensor):
            return (_narrow if narrow.is_narrow(self._value) else matmul)(x, self._value, self._ring)
        if x.is_meta:
            return x.new_empty((*x.shape[:-1], self._shape[-1]))
        if x.dim() == 1:
            return limbs.matmul(x[None], self._value, self._ring)[0]
        return limbs.matmul(x, self._value, self._ring)


def matmul(a: Tensor, b: Tensor, ring_bits: int) -> Tensor:
    """Return a @ b modulo 2^ring, batched like ``torch.matmul``."""
    if native() and _few(a, b):
        rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
        return ring.reduce(narrow.product_of_rows(rows, b), ring_bits).reshape(*a.shape[:-1], b.shape[-1])
    if a.is_meta or native():
        fast = not a.is_meta and ring_bits <= madd52.BITS and _fits(a, b) and madd52.available()
        product = madd52.matmul(a, b) if fast else torch.matmul(a.contiguous(), b.contiguous())
        return ring.reduce(product, ring_bits)
    return limbs.matmul(a, b, ring_bits)


def _narrow(a: Tensor, b: Tensor, ring_bits: int) -> Tensor:
    """Return a @ b modulo 2^ring for a narrow matrix b, of which no wide copy is made."""
    if a.is_meta or b.is_meta:
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=torch.int64, device="meta")
    rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
    if len(rows) <= narrow.ROWS:
        product = narrow.product_of_rows(rows, b)
    elif b.is_contiguous() and native() and ring_bits <= madd52.BITS and _fits(rows, b) and madd52.available():
        product = madd52.matmul(rows, b)
    else:
        product = torch.zeros(len(rows), b.shape[-1], dtype=torch.int64)
        for here, part in narrow.blocks(b):
            left, part = rows[:, here], part.contiguous()
            product += left.contiguous() @ part if native() else limbs.matmul(left, part, ring_bits, b_bits=_bits(b))
    return ring.reduce(product, ring_bits).reshape(*a.shape[:-1], b.shape[-1])


def _bits(b: Tensor) -> int:
    return torch.iinfo(b.dtype).bits


def _few(a: Tensor, b: Tensor) -> bool:
    """True for few rows and one large matrix on the CPU: the loop of ``narrow`` reads it 2 to 3 times as fast as torch.

    A step of a text multiplies one row by every weight.
    """
    if a.is_meta or b.dim() != 2 or not a.device.type == b.device.type == "cpu" or not b.is_contiguous():
        return False
    return 0 < a.shape[:-1].numel() < _LEAST_ROWS and b.numel() >= _LEAST_LARGE


def _fits(a: Tensor, b: Tensor) -> bool:
    """True for matrices on the CPU that are large enough for ``madd52`` to be the faster one."""
    if a.dim() < 2 or b.dim() < 2 or not a.device.type == b.device.type == "cpu":
        return False
    rows = a.shape[-2] if b.dim() > 2 else a.shape[:-1].numel()
    return rows >= _LEAST_ROWS and a.shape[-1] >= _LEAST_INNER


_LEAST_ROWS, _LEAST_INNER = 8, 64
_LEAST_LARGE = 1 << 12  # elements of a matrix below which a call costs more than the product
_MOST_PACKED = 1 << 22  # elements of a narrow matrix that is packed: in limbs they take 8 bytes each, or more
