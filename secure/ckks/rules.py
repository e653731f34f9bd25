"""The record of every primitive that ciphertexts can compute.

A primitive that is neither linear nor part of a chain takes ciphertexts of its own, which depend on the layout. The
packers handle those themselves: inputs and products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from scipy import sparse

from protocols.windows import Window, take
from secure.ckks.linear_maps import Affine, Array, summed
from secure.errors import UnsupportedOperation
from secure.lowering.primitives import Primitive, meaning

Function = Callable[[Array], Array]


@dataclass(frozen=True)
class Chain:
    """A value that is a polynomial of this degree of one other value, ``root``."""

    root: int
    degree: int
    function: Function


@dataclass(frozen=True)
class CiphertextRule:
    """The computation of a primitive on ciphertexts.

    linear: computes the result from operands as matrices, and from the server's weight if the primitive reads one.
    chain: composes operands that are chains into a longer chain, or returns None.
    unit: returns the best unit of the operand, given the unit of the result.
    """

    linear: Callable[[Primitive, Sequence[Affine], Array | None], Affine] | None = None
    chain: Callable[[Primitive, Sequence[Chain]], Chain | None] | None = None
    unit: Callable[[Primitive, float], float] | None = None


def linear(p: Primitive, operands: Sequence[Affine], weight: Array | None) -> Affine:
    """Apply a primitive to linear values. Raises UnsupportedOperation if it is not linear."""
    rule = RULES.get(p.op)
    if meaning(p).drawn:
        raise UnsupportedOperation(
            f"{p.where}: with ciphertexts nothing is sampled: nobody can deal noise, and nothing is compared",
            "serve it two-party or three-party",
        )
    if rule is None or rule.linear is None:
        raise UnsupportedOperation(
            f"{p.path or 'model'}: '{p.op}' is not a polynomial, and ciphertexts have no comparison",
            "bring the model into polynomial form first (unseen train), or serve it two-party",
        )
    return rule.linear(p, operands, weight)


def chain(p: Primitive, operands: Sequence[Chain]) -> Chain | None:
    """Compose a primitive with its operands' chains into one polynomial; return None if that is impossible."""
    rule = RULES.get(p.op)
    return rule.chain(p, operands) if rule is not None and rule.chain is not None else None


def operand_unit(p: Primitive, unit: float) -> float | None:
    """Return the best unit of the operand, given the unit of the result; None if it does not matter."""
    rule = RULES.get(p.op)
    return rule.unit(p, unit) if rule is not None and rule.unit is not None else None


# linear


def _linear(p: Primitive, x: Sequence[Affine], weight: Array | None) -> Affine:
    assert weight is not None
    rows, (inner, outer) = int(np.prod(x[0].shape[:-1])), weight.shape
    # (``secure.ckks.compile.blurred`` makes sure that no weight is exactly zero, which would show)
    columns = np.arange(rows)[:, None, None] * inner + np.zeros((1, outer, 1), np.int64) + np.arange(inner)
    starts = np.arange(rows * outer + 1) * inner
    data = np.broadcast_to(weight.T, (rows, outer, inner)).reshape(-1)
    return x[0].mapped(sparse.csr_array((data, columns.reshape(-1), starts), (rows * outer, rows * inner)), p.shape)


def _cat(p: Primitive, x: Sequence[Affine], weight: Array | None) -> Affine:
    """Stack the parts, then bring their elements into the order of the whole."""
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


def _slice(p: Primitive, x: Sequence[Affine], weight: Array | None) -> Affine:
    a = p.attrs
    index = x[0].positions()[(slice(None),) * a["dim"] + (slice(a["start"], a["stop"], a["step"]),)]
    return x[0].select(index, p.shape)


def _take(p: Primitive, x: Sequence[Affine], weight: Array | None) -> Affine:
    positions = torch.from_numpy(x[0].positions() + 1)
    return _copied(x[0], take(positions, p.attrs["dim"], p.attrs["runs"]).numpy() - 1, p.shape)


def _patches(p: Primitive, x: Sequence[Affine], weight: Array | None) -> Affine:
    positions = torch.from_numpy(x[0].positions() + 1)
    return _copied(x[0], Window(**p.attrs).patches(positions).numpy() - 1, p.shape)


def _copied(x: Affine, index: NDArray[np.int64], shape: tuple[int, ...]) -> Affine:
    """Return the tensor of the elements at ``index``; -1 stands for zero."""
    flat = index.reshape(-1)
    there = np.flatnonzero(flat >= 0)
    entries = (np.ones(len(there)), (there, flat[there]))
    return x.mapped(sparse.csr_array(entries, shape=(len(flat), len(x.bias))), shape)


def _spread(weight: Array | None, shape: tuple[int, ...]) -> Array:
    assert weight is not None
    return np.broadcast_to(weight, shape).reshape(-1)


# chains


def _polynomial(p: Primitive, x: Sequence[Chain]) -> Chain | None:
    if p.attrs["knots"]:
        return None
    (inner,), (piece,) = x, p.attrs["pieces"]
    shape = Polynomial(piece.coefficients or (0.0,))
    degree = max((j for j, c in enumerate(piece.coefficients) if c), default=0)
    return Chain(inner.root, inner.degree * degree, lambda v: shape(inner.function(v) - piece.centre))


def _scaled(p: Primitive, x: Sequence[Chain]) -> Chain:
    (inner,), value = x, p.attrs["value"]
    return Chain(inner.root, inner.degree, lambda v: inner.function(v) * value)


def _shifted(p: Primitive, x: Sequence[Chain]) -> Chain:
    (inner,), value = x, p.attrs["value"]
    return Chain(inner.root, inner.degree, lambda v: inner.function(v) + value)


def _added(p: Primitive, x: Sequence[Chain], sign: float = 1.0) -> Chain | None:
    f, g = x
    if f.root != g.root:
        return None
    return Chain(f.root, max(f.degree, g.degree), lambda v: f.function(v) + sign * g.function(v))


def _multiplied(p: Primitive, x: Sequence[Chain]) -> Chain | None:
    f, g = x
    if f.root != g.root:
        return None
    return Chain(f.root, f.degree + g.degree, lambda v: f.function(v) * g.function(v))


def _same(p: Primitive, unit: float) -> float:
    return unit


RULES: dict[str, CiphertextRule] = {
    "add": CiphertextRule(lambda p, x, w: x[0].plus(x[1]), chain=_added),
    "sub": CiphertextRule(lambda p, x, w: x[0].plus(x[1], -1.0), chain=lambda p, x: _added(p, x, -1.0)),
    "mul": CiphertextRule(chain=_multiplied),
    "offset": CiphertextRule(lambda p, x, w: x[0].offset(p.attrs["value"]), chain=_shifted, unit=_same),
    "scale": CiphertextRule(
        lambda p, x, w: x[0].scaled(p.attrs["value"]), chain=_scaled, unit=lambda p, unit: unit / abs(p.attrs["value"])
    ),
    "piecewise": CiphertextRule(chain=_polynomial),
    "bounded": CiphertextRule(lambda p, x, w: x[0], chain=lambda p, x: x[0], unit=_same),
    "reshape": CiphertextRule(lambda p, x, w: x[0].reshaped(p.shape), unit=_same),
    "expand": CiphertextRule(lambda p, x, w: x[0].broadcast(p.shape), unit=_same),
    "permute": CiphertextRule(
        lambda p, x, w: x[0].select(x[0].positions().transpose(p.attrs["dims"]), p.shape), unit=_same
    ),
    "slice": CiphertextRule(_slice),
    "cat": CiphertextRule(_cat),
    "take": CiphertextRule(_take),
    "patches": CiphertextRule(_patches),
    "sum": CiphertextRule(lambda p, x, w: summed(x[0], p.shape), unit=_same),
    "linear": CiphertextRule(_linear),
    "mul_weight": CiphertextRule(lambda p, x, w: x[0].broadcast(p.shape).scaled(_spread(w, p.shape))),
    "add_weight": CiphertextRule(lambda p, x, w: x[0].broadcast(p.shape).offset(_spread(w, p.shape))),
}
"""The records, by primitive of ``secure.lowering.primitives``."""
