"""Products with a polynomial of another secret, which is not opened before it is multiplied: a round less.

A normalization's inverse root in a model that compares nothing is a polynomial of one number a row. Its product with
the row needs openings of that number and of the row alone (``two_party.PolynomialProduct``). The polynomial is computed
in a ring that holds the product before truncation, so that few bits are left for either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from approximations.primitives import Piece
from protocols import two_party as tp
from protocols.protocol import count
from protocols.ring import WORD
from secure.lowering.primitives import Primitive, meaning
from secure.lowering.trace import Trace
from secure.mpc.emitter import Emitter
from secure.mpc.pieces import COARSEST, Curve
from secure.mpc.plan import Need, Plan, opened
from secure.mpc.share import Share

_UNITS = 1.25  # of the polynomial's last place: what rounding may add to it
_ROW = 2.0**-7  # what rounding may change one number a row by, in parts of it, as a whole row errs alike
_POINTS = 257  # at which a polynomial is looked at


def fuse(plan: Plan, outputs: Iterable[int]) -> Trace:
    """Return the trace with products of polynomials as primitives, where they save a round and are precise enough.

    A polynomial is left as it is unless products are all that reads it. Its primitive stays in its place unread.
    """
    trace, revealed = plan.trace, set(outputs)
    changed = dict[int, Primitive]()
    for y, p in enumerate(trace.primitives):
        if p.op != "piecewise" or p.attrs["knots"] or y in revealed or not plan.readers[y]:
            continue
        products = dict(_products(plan, y, p))
        if changed.keys() & products.keys():  # products of two polynomials, of which one is opened
            continue
        if len(products) == len(set(plan.readers[y])) and _pays(plan, y, p, products.values()):
            changed |= products
    if not changed:
        return trace
    fused = Trace()
    fused.primitives = [changed.get(i, p) for i, p in enumerate(trace.primitives)]
    return fused


def _products(plan: Plan, of: int, p: Primitive) -> Iterator[tuple[int, Primitive]]:
    """Yield the readers of a polynomial that are products which can be computed from its argument, as such."""
    (x,), (piece,) = p.inputs, p.attrs["pieces"]
    for i in set(plan.readers[of]):
        reader = plan.trace.primitives[i]
        others = [operand for operand in reader.inputs if operand != of]
        if reader.op != "mul" or len(others) != 1 or others[0] in plan.kept:
            continue
        curve, units = _curve(plan, x, piece), _UNITS * 2.0 ** -plan.fraction[of]
        form = _form(plan, i, others[0], x, curve, units)
        if form is None or max(plan.own(x), plan.own(others[0])) >= WORD:
            continue
        a_row = p.shape[-1:] == (1,) and reader.shape[-1] > 1
        if form.rounding <= units or (a_row and _of_a_row(plan, x, curve, form) <= _ROW):
            attrs = {"piece": piece, "curve": curve, "polynomial": of, "reads": form.reads, "scale": form.scale}
            yield i, replace(reader, op="polynomial_product", inputs=(others[0], x), attrs={**reader.attrs, **attrs})


def _pays(plan: Plan, of: int, p: Primitive, products: Iterable[Primitive]) -> bool:
    """True if a round and the openings of a polynomial are worth the bytes that are dealt in their place."""
    dealt = sum(count(product.shape) * 3 * WORD / 8 * product.attrs["curve"].degree for product in products)
    spared = plan.prices.round_bytes + 2 * count(p.shape) * plan.own(of) / 8
    return bool(dealt / plan.prices.dealt_for_online <= spared)


def _curve(plan: Plan, x: int, piece: Piece) -> Curve:
    """Return the polynomial on the range of its argument."""
    likely, reach = plan.ranges.likely(x), 2.0 ** plan.ranges.bits(x)
    return Curve.of(piece, *(likely if _promised(plan, x) else (-reach, reach)), likely=likely)


class _Form(NamedTuple):
    """The fraction bits at which the argument is read, those of the polynomial, and a bound of its error."""

    reads: int
    scale: int
    rounding: float


def _form(plan: Plan, i: int, y: int, x: int, curve: Curve, allowed: float) -> _Form | None:
    """Return the form of a product that is cheapest among those which round by ``allowed``, or the most precise one.

    The result has as wide a ring as its readers like, as an extension would take the round that is saved. None if no
    ring holds that.
    """
    most = WORD - plan.want(i) + plan.fraction[i] - plan.fraction[y]
    found = list[_Form]()
    for reads in range(COARSEST, plan.fraction[x] + 1):
        error = 0.0 if reads == plan.fraction[x] else curve.steepest * 2.0**-reads
        coarse, rest = curve.coarseness(reads), allowed - error
        scale = min(most, max(1, math.ceil(math.log2(coarse / rest)))) if rest > 0 else most
        found.append(_Form(reads, scale, error + coarse * 2.0**-scale))
    return min(found, key=lambda form: (max(form.rounding, allowed), form.scale)) if most > 0 else None


def _of_a_row(plan: Plan, x: int, curve: Curve, form: _Form) -> float:
    """Return a bound of the error in parts of the polynomial, where its argument is promised to be."""
    if not _promised(plan, x):
        return math.inf
    at = torch.linspace(-curve.near, curve.near, _POINTS, dtype=torch.float64)
    slope = Piece(tuple(j * c for j, c in enumerate(curve.coefficients))[1:])(at).abs()
    read = 0.0 if form.reads == plan.fraction[x] else 2.0**-form.reads
    error = slope * read + curve.coarseness(form.reads) * 2.0**-form.scale
    return float((error / Piece(curve.coefficients)(at).abs()).max())


def _promised(plan: Plan, x: int) -> bool:
    return meaning(plan.trace.primitives[x]).promised is not None


def _scale(plan: Plan, p: Primitive) -> int:
    """Return the fraction bits of a product before truncation."""
    return int(p.attrs["scale"]) + plan.fraction[p.inputs[0]]


def _ring(plan: Plan, i: int, p: Primitive) -> int:
    """Return the ring of a product before truncation, wider than the openings that are lifted to it."""
    scale, lifted = _scale(plan, p), 1 + max(map(plan.own, p.inputs))
    return max(plan.fitting(i, scale), lifted, min(WORD, plan.want(i) + scale - plan.fraction[i]))


def needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    y, x = p.inputs
    yield opened(plan.own(y))
    yield opened(plan.own(x), plan.fraction[x] - p.attrs["reads"])


def reach(plan: Plan, i: int, p: Primitive) -> int:
    return WORD - _scale(plan, p) + plan.fraction[i]


def emit(e: Emitter, i: int, p: Primitive) -> Share:
    plan, (y, x), curve = e.plan, p.inputs, p.attrs["curve"]
    ring, reads, scale = _ring(plan, i, p), p.attrs["reads"], p.attrs["scale"]
    drop = plan.fraction[x] - reads
    agreed, of_x, of_y = plan.own(x) - drop, e.lifted(x, drop, ring), e.lifted(y, 0, ring)
    powers = e.emit(tp.LiftedPowers(e.trace.primitives[x].shape, ring, agreed, curve.degree), of_x)
    centre, coefficients = round(curve.centre * 2.0**reads), curve.integers(reads, scale)
    product = tp.PolynomialProduct(p.shape, ring, agreed, plan.own(y), centre, coefficients)
    return Share(e.emit(product, of_x, powers, of_y), ring, _scale(plan, p))
