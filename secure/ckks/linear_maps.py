"""The linear parts of a traced model as sparse matrices, so that consecutive linear steps cost one level together.

A traced value is a constant plus a sum of matrices times *atoms*. Atoms are the inputs and the results of products and
polynomials, which need ciphertexts of their own. Consecutive reshapes, permutations, means, biases, residual sums and
linear layers are merged into one matrix per atom, which then costs one level wherever it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Matrix = Any  # scipy.sparse.csr_array, float64: (elements of the value, elements of the atom)
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Affine:
    """An affine function of atoms. ``terms``: matrices by atom. ``bias``: one number per element of the flat tensor."""

    shape: tuple[int, ...]
    terms: Mapping[int, Matrix]
    bias: Array

    @classmethod
    def atom(cls, number: int, shape: tuple[int, ...]) -> Affine:
        size = int(np.prod(shape))
        return cls(shape, {number: sparse.eye_array(size, format="csr")}, np.zeros(size))

    @property
    def only(self) -> tuple[int, Matrix] | None:
        """The atom and its matrix if there is exactly one, else None."""
        return next(iter(self.terms.items())) if len(self.terms) == 1 else None

    def select(self, index: NDArray[np.int64], shape: tuple[int, ...]) -> Affine:
        """Return the tensor whose elements are those at ``index``."""
        flat = index.reshape(-1)
        return Affine(shape, {a: m[flat] for a, m in self.terms.items()}, self.bias[flat])

    def broadcast(self, shape: tuple[int, ...]) -> Affine:
        if shape == self.shape:
            return self
        return self.select(np.broadcast_to(self.positions(), shape), shape)

    def positions(self) -> NDArray[np.int64]:
        return np.arange(int(np.prod(self.shape))).reshape(self.shape)

    def scaled(self, factor: Array | float) -> Affine:
        """Multiply by one number, or by one number per element."""
        if isinstance(factor, np.ndarray):
            terms = {a: sparse.csr_array(sparse.diags_array(factor) @ m) for a, m in self.terms.items()}
        else:
            terms = {a: m * factor for a, m in self.terms.items()}
        return Affine(self.shape, terms, self.bias * factor)

    def reshaped(self, shape: tuple[int, ...]) -> Affine:
        return Affine(shape, self.terms, self.bias)

    def mapped(self, matrix: Matrix, shape: tuple[int, ...]) -> Affine:
        """Multiply the flat tensor by a matrix."""
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
        """Evaluate in floating point, from the flat values of the atoms."""
        return np.asarray(sum((m @ atoms[a] for a, m in self.terms.items()), self.bias))


def summed(x: Affine, shape: tuple[int, ...]) -> Affine:
    """Sum over the dimensions that have length one in ``shape``."""
    size = int(np.prod(shape))
    target = np.broadcast_to(np.arange(size).reshape(shape), x.shape).reshape(-1)
    ones, source = np.ones(len(target)), np.arange(len(target))
    return x.mapped(sparse.csr_array((ones, (target, source)), shape=(size, len(target))), shape)


def column_sums(x: Affine, shape: tuple[int, ...]) -> Affine:
    """Sum over the last dimension but one."""
    return summed(x, (*x.shape[:-2], 1, x.shape[-1])).reshaped(shape)


class Selection(NamedTuple):
    """A value made of elements of one atom times one factor: element i is factor * atom[column[i]]."""

    atom: int
    factor: float
    column: NDArray[np.int64]


def selection(value: Affine) -> Selection | None:
    """Return a value as a selection of one atom's elements, or None if it is none."""
    if value.only is None:
        return None
    number, matrix = value.only
    if matrix.nnz != matrix.shape[0] or not bool((np.diff(matrix.indptr) == 1).all()):
        return None
    factor = float(matrix.data[0])
    if not factor or np.abs(matrix.data - factor).max() > 1e-12 * abs(factor):
        return None
    return Selection(number, factor, matrix.indices.astype(np.int64))
