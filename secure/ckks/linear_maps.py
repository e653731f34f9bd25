"""Everything that is linear in a traced model, as sparse matrices: what ciphertexts leave to plain arithmetic.

A traced value is a sum of matrices times *atoms* (inputs, and results of products and polynomials, which need a
ciphertext of their own) and a constant. Reshapes, permutations, means, biases, residual sums and linear layers in a
row all melt into one matrix an atom, which then costs one level wherever it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from secure.lowering.primitives import Primitive

Matrix = Any  # scipy.sparse.csr_array, float64: (elements of the value, elements of the atom)
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Affine:
    """``terms``: matrices by atom; ``bias``: one number an element. Elements are in the order of the flat tensor."""

    shape: tuple[int, ...]
    terms: Mapping[int, Matrix]
    bias: Array

    @classmethod
    def atom(cls, number: int, shape: tuple[int, ...]) -> Affine:
        size = int(np.prod(shape))
        return cls(shape, {number: sparse.eye_array(size, format="csr")}, np.zeros(size))

    @property
    def only(self) -> tuple[int, Matrix] | None:
        """The one atom and its matrix."""
        return next(iter(self.terms.items())) if len(self.terms) == 1 else None

    def select(self, index: NDArray[np.int64], shape: tuple[int, ...]) -> Affine:
        """The tensor whose elements are those at ``index``."""
        flat = index.reshape(-1)
        return Affine(shape, {a: m[flat] for a, m in self.terms.items()}, self.bias[flat])

    def broadcast(self, shape: tuple[int, ...]) -> Affine:
        if shape == self.shape:
            return self
        return self.select(np.broadcast_to(self.positions(), shape), shape)

    def positions(self) -> NDArray[np.int64]:
        return np.arange(int(np.prod(self.shape))).reshape(self.shape)

    def scaled(self, factor: Array | float) -> Affine:
        """Times one number, or one number an element."""
        if isinstance(factor, np.ndarray):
            terms = {a: sparse.csr_array(sparse.diags_array(factor) @ m) for a, m in self.terms.items()}
        else:
            terms = {a: m * factor for a, m in self.terms.items()}
        return Affine(self.shape, terms, self.bias * factor)

    def reshaped(self, shape: tuple[int, ...]) -> Affine:
        return Affine(shape, self.terms, self.bias)

    def mapped(self, matrix: Matrix, shape: tuple[int, ...]) -> Affine:
        """A matrix times the flat tensor."""
        return Affine(shape, {a: sparse.csr_array(matrix @ m) for a, m in self.terms.items()}, matrix @ self.bias)

    def plus(self, other: Affine, sign: float = 1.0) -> Affine:
        shape = np.broadcast_shapes(self.shape, other.shape)
        x, y = self.broadcast(shape), other.broadcast(shape).scaled(sign)
        terms = dict(x.terms)
        for a, m in y.terms.items():
            terms[a] = terms[a] + m if a in terms else m
        return Affine(shape, terms, x.bias + y.bias)

    def offset(self, value: Array | float) -> Affine:
        return Affine(self.shape, self.terms, self.bias + value)

    def of(self, atoms: Mapping[int, Array]) -> Array:
        """The value in floating point, from the flat values of its atoms."""
        return np.asarray(sum((m @ atoms[a] for a, m in self.terms.items()), self.bias))


def _linear(p: Primitive, x: list[Affine], weight: Array | None) -> Affine:
    assert weight is not None
    rows, (inner, outer) = int(np.prod(x[0].shape[:-1])), weight.shape
    # (that no weight is exactly zero is ``encrypting.blurred``'s affair)
    columns = np.arange(rows)[:, None, None] * inner + np.zeros((1, outer, 1), np.int64) + np.arange(inner)
    starts = np.arange(rows * outer + 1) * inner
    data = np.broadcast_to(weight.T, (rows, outer, inner)).reshape(-1)
    return x[0].mapped(sparse.csr_array((data, columns.reshape(-1), starts), (rows * outer, rows * inner)), p.shape)


def _sum(p: Primitive, x: list[Affine], weight: Array | None) -> Affine:
    target = np.broadcast_to(np.arange(int(np.prod(p.shape))).reshape(p.shape), x[0].shape).reshape(-1)
    ones, source = np.ones(len(target)), np.arange(len(target))
    return x[0].mapped(sparse.csr_array((ones, (target, source)), shape=(int(np.prod(p.shape)), len(target))), p.shape)


def column_sums(x: Affine, shape: tuple[int, ...]) -> Affine:
    """Over the last dimension but one."""
    kept = (*x.shape[:-2], 1, x.shape[-1])
    return _sum(Primitive("sum", (), {}, kept, ""), [x], None).reshaped(shape)


def _cat(p: Primitive, x: list[Affine], weight: Array | None) -> Affine:
    """The parts one after the other, then in the order of the whole."""
    atoms = {a for part in x for a in part.terms}
    sizes = [len(part.bias) for part in x]
    stacked = {}
    for a in atoms:
        width = next(part.terms[a].shape[1] for part in x if a in part.terms)
        stacked[a] = sparse.csr_array(
            sparse.vstack([part.terms.get(a, sparse.csr_array((n, width))) for part, n in zip(x, sizes, strict=True)])
        )
    whole = Affine((sum(sizes),), stacked, np.concatenate([part.bias for part in x]))
    starts = np.cumsum([0, *sizes[:-1]])
    order = np.concatenate(
        [part.positions() + start for part, start in zip(x, starts, strict=True)], axis=p.attrs["dim"]
    )
    return whole.select(order, p.shape)


def _slice(p: Primitive, x: list[Affine], weight: Array | None) -> Affine:
    a = p.attrs
    index = x[0].positions()[(slice(None),) * a["dim"] + (slice(a["start"], a["stop"], a["step"]),)]
    return x[0].select(index, p.shape)


def _spread(weight: Array | None, shape: tuple[int, ...]) -> Array:
    assert weight is not None
    return np.broadcast_to(weight, shape).reshape(-1)


RULES: Mapping[str, Callable[[Primitive, list[Affine], Array | None], Affine]] = {
    "add": lambda p, x, w: x[0].plus(x[1]),
    "sub": lambda p, x, w: x[0].plus(x[1], -1.0),
    "offset": lambda p, x, w: x[0].offset(p.attrs["value"]),
    "scale": lambda p, x, w: x[0].scaled(p.attrs["value"]),
    "bounded": lambda p, x, w: x[0],
    "reshape": lambda p, x, w: x[0].reshaped(p.shape),
    "expand": lambda p, x, w: x[0].broadcast(p.shape),
    "permute": lambda p, x, w: x[0].select(x[0].positions().transpose(p.attrs["dims"]), p.shape),
    "slice": _slice,
    "cat": _cat,
    "sum": _sum,
    "linear": _linear,
    "mul_weight": lambda p, x, w: x[0].broadcast(p.shape).scaled(_spread(w, p.shape)),
    "add_weight": lambda p, x, w: x[0].broadcast(p.shape).offset(_spread(w, p.shape)),
}
"""What every primitive that is linear in its operands makes of them; ``w``: the server's weight."""


class Selection(NamedTuple):
    """A value that is one factor times elements of one atom: element i is factor * atom[column[i]]."""

    atom: int
    factor: float
    column: NDArray[np.int64]


def selection(value: Affine) -> Selection | None:
    if value.only is None:
        return None
    number, matrix = value.only
    if matrix.nnz != matrix.shape[0] or not bool((np.diff(matrix.indptr) == 1).all()):
        return None
    factor = float(matrix.data[0])
    if not factor or np.abs(matrix.data - factor).max() > 1e-12 * abs(factor):
        return None
    return Selection(number, factor, matrix.indices.astype(np.int64))
