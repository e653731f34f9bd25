"""Matrix products modulo 2^ring, by the fastest of four exact kernels.

``madd52`` uses an instruction of some AVX-512 processors for rings of at most 52 bits (20-58 GMAC/s a thread on Zen 5).
torch multiplies int64 matrices with a just-in-time AVX-512 kernel if the processor has it (13-32 GMAC/s there) and with
a plain loop otherwise (0.3 GMAC/s on Zen 3). ``limbs`` uses float64 products and reaches 2-28 GMAC/s on both, once it
has cut matrices into limbs. Without AVX-512, products of pairs, small ones, and those of few rows are loops (``narrow``
reaches 4 GMAC/s). All kernels are exact and agree bit for bit, because integers wrap around, so two parties may choose
differently.
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
    one = torch.zeros(1, 2, 2, dtype=torch.int64)
    for each in (one, one.mT):
        narrow.products_of_rows(one, each)


class Matrix:
    """The right-hand side of many products, kept in the form that the kernel needs.

    value: (n, p) residues modulo 2^ring_bits or, with ``signed``, true integers, whose few bits make products cheaper.
    Narrow integers (``protocols.narrow``) are true ones. They are kept as they are, in a mapped file perhaps, where a
    kernel reads them so, and if they are too many to be packed. Others are packed for the first product that is faster
    so. held: somebody else has ``value`` in memory anyway; else it is let go then. own: it takes memory of its own, or
    will, in another form or order.
    """

    def __init__(self, value: Tensor, ring_bits: int, *, signed: bool, held: bool = True) -> None:
        self._ring, self._shape, self._signed = ring_bits, tuple(value.shape), signed
        self._packed: limbs.Packed | None = None
        narrow_one = narrow.is_narrow(value)
        as_it_lies = narrow_one and narrow.in_place(value)
        self._value: Tensor | None = value if as_it_lies or value.is_meta else value.contiguous()
        self._packs = not (value.is_meta or native() or (narrow_one and value.numel() > _MOST_PACKED))
        self.own = self._packs or self._value is not value
        self._held = held and self._value is value

    def times(self, x: Tensor) -> Tensor:
        """Return x @ self modulo 2^ring, for residues x of shape (..., n)."""
        if x.is_meta:
            return x.new_empty((*x.shape[:-1], self._shape[-1]))
        if x.dim() == 1:
            return self.times(x[None])[0]
        value = self._value
        if value is None or (self._packs and not _loops(x.shape[:-1].numel(), value, self._ring)):
            return limbs.matmul(x, self._pack(), self._ring)
        return (_narrow if narrow.is_narrow(value) else matmul)(x, value, self._ring)

    def pack(self, rows: int) -> None:
        """Pack it now, if products of so many rows will need it so."""
        value = self._value
        if self._packs and value is not None and not _loops(rows, value, self._ring):
            self._pack()

    def _pack(self) -> limbs.Packed:
        held = self._value  # read first: another thread may let it go once it has packed it
        if self._packed is None:
            assert held is not None
            value = narrow.widened(held)
            if self._signed or narrow.is_narrow(held):
                largest = int(value.abs().max()) if value.numel() else 0
                self._packed = limbs.pack(value, largest.bit_length() + 1, signed=True, ring=self._ring)
            else:
                self._packed = limbs.pack(value, self._ring, signed=False, ring=self._ring)
            if not self._held:
                self._value = None
        return self._packed


def matmul(a: Tensor, b: Tensor, ring_bits: int) -> Tensor:
    """Return a @ b modulo 2^ring, batched like ``torch.matmul``."""
    if _few(a, b, ring_bits):
        rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
        return ring.reduce(narrow.product_of_rows(rows, b), ring_bits).reshape(*a.shape[:-1], b.shape[-1])
    if a.is_meta or native():
        fast = not a.is_meta and ring_bits <= madd52.BITS and _fits(a, b) and madd52.available()
        product = madd52.matmul(a, b) if fast else torch.matmul(a.contiguous(), b.contiguous())
        return ring.reduce(product, ring_bits)
    if _are_pairs(a, b):
        return ring.reduce(narrow.products_of_rows(a, b), ring_bits)
    if _is_small(a, b):
        return ring.reduce(torch.matmul(a, b), ring_bits)
    return limbs.matmul(a, b, ring_bits)


def _narrow(a: Tensor, b: Tensor, ring_bits: int) -> Tensor:
    """Return a @ b modulo 2^ring for a narrow matrix b, of which no wide copy is made."""
    if a.is_meta or b.is_meta:
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=torch.int64, device="meta")
    rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
    if len(rows) <= narrow.ROWS or (not native() and _loops(len(rows), b, ring_bits)):
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


def _few(a: Tensor, b: Tensor, ring_bits: int) -> bool:
    """True for few rows and one matrix on the CPU: the loop of ``narrow`` reads it 2 to 3 times as fast as torch does.

    A step of a text multiplies one row by every weight.
    """
    if a.is_meta or b.dim() != 2 or not a.device.type == b.device.type == "cpu" or not b.is_contiguous():
        return False
    rows = a.shape[:-1].numel()
    return 0 < rows < _LEAST_ROWS and b.numel() >= _LEAST_LARGE if native() else _loops(rows, b, ring_bits)


def _loops(rows: int, matrix: Tensor, ring_bits: int) -> bool:
    """True if a loop over so many rows is faster than limbs, of which a matrix has one for every 21 bits."""
    if matrix.device.type != "cpu":
        return False
    count = -(-(_bits(matrix) if narrow.is_narrow(matrix) else ring_bits) // _LIMB_BITS)
    return rows * matrix.numel() <= _MOST_LOOPED or rows < 2 << count


def _are_pairs(a: Tensor, b: Tensor) -> bool:
    """True for two batches of one shape on the CPU, such as those of heads: the loop of ``narrow`` needs no limbs."""
    return a.dim() == b.dim() > 2 and a.shape[:-2] == b.shape[:-2] and a.device.type == b.device.type == "cpu"


def _is_small(a: Tensor, b: Tensor) -> bool:
    """True for products on the CPU for which cutting limbs takes longer than torch's plain loop."""
    if a.dim() < 2 or b.dim() < 2 or not a.device.type == b.device.type == "cpu":
        return False
    rows = a.shape[-2]
    return rows <= _FEW or max(a.shape[:-2].numel(), b.shape[:-2].numel()) * rows * b.shape[-2:].numel() <= _MOST_LOOPED


def _fits(a: Tensor, b: Tensor) -> bool:
    """True for matrices on the CPU that are large enough for ``madd52`` to be the faster one."""
    if a.dim() < 2 or b.dim() < 2 or not a.device.type == b.device.type == "cpu":
        return False
    rows = a.shape[-2] if b.dim() > 2 else a.shape[:-1].numel()
    return rows >= _LEAST_ROWS and a.shape[-1] >= _LEAST_INNER


_LEAST_ROWS, _LEAST_INNER = 8, 64
_LEAST_LARGE = 1 << 12  # elements of a matrix below which a call costs more than the product
_LIMB_BITS = 21  # about the bits of a limb of a packed matrix
_MOST_LOOPED = 1 << 19  # multiplications that take a loop as long as limbs take in any case
_FEW = 4  # rows of each of several products
_MOST_PACKED = 1 << 22  # elements of a narrow matrix that is packed: in limbs they take 8 bytes each, or more
