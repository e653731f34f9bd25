"""Products with a polynomial of another secret, which is not opened before it is multiplied: a round less.

A normalization's inverse root in a model that compares nothing is a polynomial of one number a row. Its product with
the row needs openings of that number and of the row alone (``two_party.PolynomialProduct``). The polynomial is computed
in a ring that holds the product before truncation, so that few bits are left for either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from approximations.primitives import Piece
from protocols import two_party as tp
from protocols.protocol import Shape, count
from protocols.ring import WORD
from secure.lowering.primitives import Primitive, meaning
from secure.lowering.trace import Trace
from secure.mpc.emitter import Emitter
from secure.mpc.pieces import COARSEST, Curve
from secure.mpc.plan import Need, Plan, opened
from secure.mpc.share import Share

_UNITS = 1.25  # of the polynomial's last place: what rounding may add to it
_ROW = 2.0**-7  # of its largest value: what rounding may change one number a row by, as a whole row errs alike


@dataclass(frozen=True)
class _Form:
    """The computation of y P(x): x is read at ``reads`` fraction bits, P has ``scale``, and y P(x) ``ring`` bits.

    rounding: a bound of P's error.
    """

    curve: Curve
    reads: int
    scale: int
    ring: int
    rounding: float


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
        if len(products) == len(set(plan.readers[y])) and _pays(plan, y, products.values()):
            changed |= products
    if not changed:
        return trace
    fused = Trace()
    fused.primitives = [changed.get(i, p) for i, p in enumerate(trace.primitives)]
    return fused


def _products(plan: Plan, y: int, p: Primitive) -> Iterator[tuple[int, Primitive]]:
    """Yield the readers of a polynomial that are products which can be computed from its argument, as such."""
    (x,), (piece,) = p.inputs, p.attrs["pieces"]
    for i in set(plan.readers[y]):
        reader = plan.trace.primitives[i]
        others = [operand for operand in reader.inputs if operand != y]
        if reader.op != "mul" or len(others) != 1 or others[0] in plan.kept:
            continue
        attrs = {**reader.attrs, "piece": piece, "fraction": plan.fraction[y], "shape": p.shape}
        fused = replace(reader, op="polynomial_product", inputs=(others[0], x), attrs=attrs)
        found = _form(plan, i, fused)
        if found is None:
            continue
        left = found.ring - found.scale - plan.fraction[others[0]] + plan.fraction[i]
        if plan.want(i) <= left:  # else its readers would extend it, which takes the round that is saved
            yield i, fused


def _pays(plan: Plan, y: int, products: Iterable[Primitive]) -> bool:
    """True if a round and the openings of a polynomial are worth the bytes that are dealt in their place."""
    dealt = sum(count(p.shape) * 3 * WORD / 8 * (len(p.attrs["piece"].coefficients) - 1) for p in products)
    spared = plan.prices.round_bytes + 2 * count(plan.trace.primitives[y].shape) * plan.own(y) / 8
    return dealt / plan.prices.dealt_for_online <= spared


def _form(plan: Plan, i: int, p: Primitive) -> _Form | None:
    """Return the most precise form of a product; None if it is not precise enough."""
    y, x = p.inputs
    piece: Piece = p.attrs["piece"]
    likely, promised = plan.ranges.likely(x), meaning(plan.trace.primitives[x]).promised is not None
    reach = 2.0 ** plan.ranges.bits(x)
    curve = Curve.of(piece, *(likely if promised else (-reach, reach)), likely=likely)
    most = WORD - 2 - plan.ranges.bits(i) - plan.fraction[y]
    allowed = _UNITS * 2.0 ** -p.attrs["fraction"]
    found = list[_Form]()
    for reads in range(COARSEST, plan.fraction[x] + 1):
        error = 0.0 if reads == plan.fraction[x] else curve.steepest * 2.0**-reads
        coarse, rest = curve.coarseness(reads), allowed - error
        scale = min(most, math.ceil(math.log2(coarse / rest))) if rest > 0 else most
        if scale < 1:
            continue
        ring = plan.fitting(i, scale + plan.fraction[y])
        wide = max(ring, min(WORD, plan.want(i) + scale + plan.fraction[y] - plan.fraction[i]))
        found.append(_Form(curve, reads, scale, wide, error + coarse * 2.0**-scale))
    best = min(found, key=lambda form: (max(form.rounding, allowed), form.scale), default=None)
    a_row = _one_a_row(p.attrs["shape"], p.shape)
    enough = max(allowed, _ROW * curve.largest if a_row else 0.0)
    return best if best is not None and best.rounding <= enough else None


def _one_a_row(shape: Shape, of: Shape) -> bool:
    """True if a shape has one number for each row of another."""
    return shape[-1:] == (1,) and of[-1] > 1


def _planned(plan: Plan, i: int, p: Primitive) -> _Form:
    found = _form(plan, i, p)
    assert found is not None  # ``fuse`` saw to it, with the same ranges and scales
    return found


def needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    form, (y, x) = _planned(plan, i, p), p.inputs
    own = plan.own(y)
    yield Need(own, own, opened=own)
    yield opened(plan.own(x), plan.fraction[x] - form.reads)


def reach(plan: Plan, i: int, p: Primitive) -> int:
    form = _form(plan, i, p)
    return plan.own(i) if form is None else WORD - form.scale - plan.fraction[p.inputs[0]] + plan.fraction[i]


def emit(e: Emitter, i: int, p: Primitive) -> Share:
    plan, (y, x) = e.plan, p.inputs
    form = _planned(plan, i, p)
    drop, degree, shape = plan.fraction[x] - form.reads, form.curve.degree, e.trace.primitives[x].shape
    of_x, of_y = e.lifted(x, drop, form.ring), e.lifted(y, 0, form.ring)
    agreed = plan.own(x) - drop
    powers = e.emit(tp.LiftedPowers(shape, form.ring, agreed, degree), of_x)
    centre = round(form.curve.centre * 2.0**form.reads)
    coefficients = form.curve.integers(form.reads, form.scale)
    product = tp.PolynomialProduct(p.shape, form.ring, agreed, plan.own(y), centre, coefficients)
    return Share(e.emit(product, of_x, powers, of_y), form.ring, form.scale + plan.fraction[y])
