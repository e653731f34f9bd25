"""Exact matrix products modulo 2^ring, ring <= 52, by an instruction that multiplies 52-bit integers (AVX-512 IFMA).

``vpmadd52luq`` multiplies the low 52 bits of eight pairs of 64-bit words, and adds the low 52 bits of each product to a
third word. A sum of such terms, which wraps around at 2^64, has the right low 52 bits, whatever the higher bits of the
factors. So one instruction does eight multiply-accumulates, and Zen 5 does two of them a cycle, where torch's 64-bit
product takes three instructions: 1.4 to 3 times as many products a second (``python -m benchmarks.limbs``).

Numba has no function for it, so the innermost loop is written in LLVM's own language: a tile of 8 rows and 24 columns
of the result stays in registers while it runs along the inner dimension. The rest is the usual blocking: columns of the
right factor are copied into a panel that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from protocols.kernels import Array, compiled
from protocols.narrow import NARROW

BITS = 52  # of the widest ring
_ROWS, _VECTORS, _LANES = 8, 3, 8  # of a tile: 24 of the 32 registers hold it
_COLUMNS = _VECTORS * _LANES
_DEPTH = 384  # inner elements of a panel, of 72 kB


@cache
def available() -> bool:
    """True if this processor has the instruction."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512ifma"))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, batched like ``torch.matmul``, of which the low BITS bits are right; the others are junk.

    a, b: int64 of two dimensions or more, on the CPU; only their low BITS bits count. b may be narrow: its panels are
    widened. Raises ValueError for any other, and for shapes that do not fit: compiled code reads memory without a look
    at its bounds.
    """
    if (
        a.dtype != torch.int64
        or b.dtype not in (*NARROW, torch.int64)
        or a.dim() < 2
        or b.dim() < 2
        or a.shape[-1] != b.shape[-2]
    ):
        raise ValueError(f"no product of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    if b.dim() == 2:
        out = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.int64)
        if out.numel() and a.shape[-1]:
            _add_product(a.reshape(-1, a.shape[-1]).numpy(), b.numpy(), out.view(-1, b.shape[-1]).numpy())
        return out
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = torch.zeros(*batch, a.shape[-2], b.shape[-1], dtype=torch.int64)
    if out.numel() and a.shape[-1]:
        lefts, rights = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]).numpy() for x in (a, b))
        for left, right, each in zip(lefts, rights, out.view(-1, *out.shape[-2:]).numpy(), strict=True):
            _add_product(left, right, each)
    return out


def _add_product(a: Array, b: Array, out: Array) -> None:
    """Add a @ b to ``out``, all of them matrices whose rows lie one behind another."""
    _accumulated()(np.ascontiguousarray(a), np.ascontiguousarray(b), out)


@cache
def _accumulated() -> Callable[[Array, Array, Array], None]:
    """Return the compiled product; it can be compiled only where the instruction is available."""

    @compiled
    def accumulated(a: Array, b: Array, out: Array) -> None:
        rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
        panel = np.zeros((_DEPTH, _COLUMNS), np.int64)
        left, tile = np.zeros((_ROWS, _DEPTH), np.int64), np.zeros((_ROWS, _COLUMNS), np.int64)
        for at in range(0, inner, _DEPTH):
            depth = min(_DEPTH, inner - at)
            for column in range(0, columns, _COLUMNS):
                wide = min(_COLUMNS, columns - column)  # what lies in the panel beyond it adds to junk alone
                if wide == _COLUMNS:  # a loop of a constant length is compiled to three moves
                    for k in range(depth):
                        for j in range(_COLUMNS):
                            panel[k, j] = b[at + k, column + j]
                else:
                    for k in range(depth):
                        for j in range(wide):
                            panel[k, j] = b[at + k, column + j]
                for row in range(0, rows, _ROWS):
                    high = min(_ROWS, rows - row)
                    if high == _ROWS and wide == _COLUMNS:
                        from_a = a.ctypes.data + 8 * (row * inner + at)
                        to = out.ctypes.data + 8 * (row * columns + column)
                        _tile(from_a, panel.ctypes.data, to, depth, inner, columns)
                        continue
                    for i in range(high):
                        for k in range(depth):
                            left[i, k] = a[row + i, at + k]
                    tile[:] = 0
                    _tile(left.ctypes.data, panel.ctypes.data, tile.ctypes.data, depth, _DEPTH, _COLUMNS)
                    for i in range(high):
                        for j in range(wide):
                            out[row + i, column + j] += tile[i, j]

    found: Callable[[Array, Array, Array], None] = accumulated
    return found


def _emit_tile(_typing: Any, _a: Any, _b: Any, _c: Any, _depth: Any, _a_row: Any, _c_row: Any) -> Any:
    """Add the product of 8 rows of a and a panel of b to a tile of c; ``depth`` is 1 or more.

    The arguments are addresses, and the lengths of a's and c's rows in words.
    """
    word, vector = ir.IntType(64), ir.VectorType(ir.IntType(64), _LANES)

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        a, b, c, depth, a_row, c_row = arguments

        def at(base: Any, words: Any) -> Any:
            return builder.add(base, builder.shl(words, word(3)))

        def loaded(address: Any) -> Any:
            return builder.load(builder.inttoptr(address, vector.as_pointer()), align=8)

        def spread(address: Any) -> Any:
            one = builder.load(builder.inttoptr(address, word.as_pointer()))
            first = builder.insert_element(vector(ir.Undefined), one, ir.IntType(32)(0))
            lanes = ir.VectorType(ir.IntType(32), _LANES)([0] * _LANES)
            return builder.shuffle_vector(first, vector(ir.Undefined), lanes)

        name, kind = "llvm.x86.avx512.vpmadd52l.uq.512", ir.FunctionType(vector, [vector] * 3)
        insert: Any = cgutils.get_or_insert_function
        madd = insert(builder.module, kind, name)
        from_a = [at(a, builder.mul(a_row, word(i))) for i in range(_ROWS)]
        to = [at(at(c, builder.mul(c_row, word(i))), word(_LANES * v)) for i in range(_ROWS) for v in range(_VECTORS)]
        before = [loaded(address) for address in to]

        entry, loop, done = builder.basic_block, *(builder.append_basic_block(n) for n in ("inner", "done"))
        builder.branch(loop)
        builder.position_at_end(loop)
        k, sums = builder.phi(word), [builder.phi(vector) for _ in before]
        right = [loaded(at(b, builder.add(builder.mul(k, word(_COLUMNS)), word(_LANES * v)))) for v in range(_VECTORS)]
        after = []
        for i in range(_ROWS):
            left = spread(at(from_a[i], k))
            after += [builder.call(madd, [sums[i * _VECTORS + v], left, right[v]]) for v in range(_VECTORS)]
        following = builder.add(k, word(1))
        for phi, first, then in zip((k, *sums), (word(0), *before), (following, *after), strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

        builder.position_at_end(done)
        for address, value in zip(to, after, strict=True):
            builder.store(value, builder.inttoptr(address, vector.as_pointer()), align=8)
        return _context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit


_tile: Any = intrinsic(_emit_tile)
