"""Emission of inputs, products, sums and shapes: the rings that they need of their operands, and their protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from protocols import local
from protocols import two_party as tp
from protocols.protocol import Protocol
from protocols.ring import WORD
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import dyadic
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Need, Plan, opened
from secure.mpc.share import Share

# inputs


def emit_input(e: Emitter, i: int, p: Primitive) -> Share:
    plan, name = e.plan, p.attrs["name"]
    f, ring = plan.fraction[i], max(plan.own(i), plan.base[i], min(WORD, plan.wish[i]))
    return Share(e.emit(tp.Input(p.shape, ring, name, f, *e.clamps[name])), ring, f)


# products with weights: the operand is delivered to the server


def _weighted_ring(plan: Plan, i: int, p: Primitive) -> int:
    """Return the ring of the product before truncation."""
    return plan.fitting(i, plan.fraction[p.inputs[0]] + plan.fixed.weight_fraction_bits)


def weighted_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring = _weighted_ring(plan, i, p)
    return (Need(ring, ring, delivered=ring),)


def emit_weighted(e: Emitter, i: int, p: Primitive, *, diagonal: bool) -> Share:
    (x,) = p.inputs
    ring, fraction = _weighted_ring(e.plan, i, p), e.fixed.weight_fraction_bits
    protocol = tp.Linear(p.shape, ring, weight_key(p.attrs["weight"], fraction), diagonal)
    return Share(e.emit(protocol, e.delivered(x)), ring, e.plan.fraction[x] + fraction)


# products of two secrets: both are opened


def _product_ring(plan: Plan, i: int, p: Primitive) -> int:
    """Return the ring of the product before truncation."""
    return plan.fitting(i, sum(plan.fraction[x] for x in p.inputs))


def product_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    return [opened(_product_ring(plan, i, p))] * len(p.inputs)


def emit_product(e: Emitter, i: int, p: Primitive, *, matrix: bool) -> Share:
    ring = _product_ring(e.plan, i, p)
    index = e.emit(tp.Product(p.shape, ring, matrix), *(e.opened(x) for x in p.inputs))
    return Share(index, ring, sum(e.plan.fraction[x] for x in p.inputs))


# operations that each party computes on its own share


def local_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    for x in p.inputs:
        lift = plan.fraction[i] - plan.fraction[x]
        yield Need(plan.own(i) - lift, plan.want(i) - lift)


Local = Callable[[Primitive, int, int], Protocol]  # takes a primitive, and the ring and scale of its operands


def emit_local(e: Emitter, i: int, p: Primitive, make: Local) -> Share:
    """Emit a protocol without messages: operands at one scale, the result in the narrowest of their rings."""
    operands = _at_one_scale(e, i, p)
    ring, fraction = min(v.ring for v in operands), e.plan.fraction[i]
    return Share(e.emit(make(p, ring, fraction), *(v.index for v in operands)), ring, fraction)


def emit_same(e: Emitter, i: int, p: Primitive) -> Share:
    """Return the operand itself, at the planned scale."""
    return _at_one_scale(e, i, p)[0]


def _at_one_scale(e: Emitter, i: int, p: Primitive) -> list[Share]:
    plan, shares = e.plan, []
    for x in p.inputs:
        excess = plan.fraction[i] - plan.fraction[x]
        value = e.get(x, plan.own(i) - excess)
        shares.append(e.lift(value, e.trace.primitives[x].shape, excess) if excess else value)
    return shares


# products with public numbers m 2^-q: a product with the integer m, whose result has q more fraction bits


def scale_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    extra = max(0, dyadic(p.attrs["value"])[1])
    return (Need(plan.fitting(i, plan.fraction[i] + extra), plan.want(i) + extra),)


def emit_scale(e: Emitter, i: int, p: Primitive) -> Share:
    (x,), (m, q) = p.inputs, dyadic(p.attrs["value"])
    value = e.get(x, e.plan.own(i) + max(0, q))
    if q < 0:
        m, q = m << -q, 0
    index = value.index if m == 1 else e.emit(local.MulConstant(p.shape, value.ring, m), value.index)
    return Share(index, value.ring, value.fraction + q)


# weights


def weight_key(name: str, fraction: int) -> str:
    """Name a weight's integers at one scale (fraction bits)."""
    return f"{name}@{fraction}"


def split_weight_key(key: str) -> tuple[str, int]:
    """Split a key of `weight_key` into the weight's name and its fraction bits."""
    name, _, fraction = key.rpartition("@")
    return name, int(fraction)
