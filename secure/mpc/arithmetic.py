"""Emission of inputs, products, sums and shapes: the rings that they need of their operands, and their protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from protocols import local
from protocols import two_party as tp
from protocols.protocol import Protocol, Shape, count
from protocols.ring import WORD
from secure.errors import DoesNotFit
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import dyadic
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Need, Plan, opened
from secure.mpc.share import Share

TURNED = ".T"  # behind the name of a weight: its transpose, see the lowering of linear layers

# inputs


def input_reach(plan: Plan, i: int, p: Primitive) -> int:
    return WORD


def emit_input(e: Emitter, i: int, p: Primitive) -> Share:
    plan, name = e.plan, p.attrs["name"]
    f, ring = plan.fraction[i], max(plan.own(i), plan.base[i], min(WORD, plan.wish[i]))
    index = e.emit(tp.Input(p.shape, ring, name, f, *e.clamps[name]))
    if p.attrs.get("public"):
        index = e.emit(tp.Publish(p.shape, ring), index)
    return Share(index, ring, f)


# products with weights: the operand is delivered to the server


def _weighted_ring(plan: Plan, i: int, p: Primitive) -> int:
    """Return the ring of the product before truncation."""
    (x,) = p.inputs
    narrowest, excess = _narrowest_weighted(plan, i, p)
    source = plan.trace.primitives[x]
    sent = plan.trace.primitives[source.inputs[0]] if source.op == "patches" else source
    return plan.widened(i, p.inputs, excess, narrowest, count(sent.shape) / 8)


def _narrowest_weighted(plan: Plan, i: int, p: Primitive) -> tuple[int, int]:
    """Return the narrowest ring of the product, and the fraction bits that truncation removes from it."""
    fraction = plan.fraction[p.inputs[0]] + plan.fixed.weight_fraction_bits
    return plan.fitting(i, fraction), fraction - plan.fraction[i]


def weighted_reach(plan: Plan, i: int, p: Primitive) -> int:
    narrowest, excess = _narrowest_weighted(plan, i, p)
    return plan.widest(p.inputs, excess, narrowest)


def weighted_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring = _weighted_ring(plan, i, p)
    return (Need(ring, ring, delivered=ring),)


def emit_weighted(e: Emitter, i: int, p: Primitive, *, diagonal: bool) -> Share:
    (x,) = p.inputs
    ring, fraction = _weighted_ring(e.plan, i, p), e.fixed.weight_fraction_bits
    protocol = tp.Linear(p.shape, ring, weight_key(p.attrs["weight"], fraction), diagonal)
    return Share(e.emit(protocol, e.delivered(x)), ring, e.plan.fraction[x] + fraction)


# products of two secrets: both are opened, matrices in the ring of their product, and others as narrow as they are


def _scales(plan: Plan, p: Primitive) -> int:
    """Return the fraction bits of a product before truncation."""
    return sum(plan.fraction[x] for x in p.inputs)


def _dropped(plan: Plan, p: Primitive) -> tuple[int, int]:
    """Return the fraction bits that are dropped of each operand of a matrix product before it is opened.

    What is multiplied by rows that are kept at fewer bits than usual needs no more of them.
    """
    left, right = (plan.fraction[x] for x in p.inputs)
    if p.inputs[1] in plan.kept:
        usual = min(left, plan.fixed.fraction_bits)
        return 0 if p.inputs[0] in plan.kept else max(0, usual - right), 0
    return 0, max(0, right - p.attrs.get("kept", right))


def _matrix_scale(plan: Plan, p: Primitive) -> int:
    """Return the fraction bits of a matrix product before truncation."""
    return _scales(plan, p) - sum(_dropped(plan, p))


def _matrix_ring(plan: Plan, i: int, p: Primitive) -> int:
    """Return the ring of the product before truncation. A wider one costs bytes of both openings, both ways.

    Raises DoesNotFit if an operand has more bits before it is rounded than a word.
    """
    scale, most = _matrix_scale(plan, p), min(WORD - max(_dropped(plan, p)), plan.most(p.inputs))
    elements = sum(count(plan.trace.primitives[x].shape) for x in p.inputs)
    if (least := plan.fitting(i, scale)) > most:
        raise DoesNotFit(
            f"{p.where}: a product of {least} bits, and {WORD - most} of which an operand is rounded before; a word "
            f"has {WORD}\nhint: fewer fraction bits"
        )
    return plan.widened(i, p.inputs, scale - plan.fraction[i], least, 2 * elements / 8, most)


def matrix_reach(plan: Plan, i: int, p: Primitive) -> int:
    scale = _matrix_scale(plan, p)
    reach = plan.widest(p.inputs, scale - plan.fraction[i], plan.fitting(i, scale))
    return min(reach, plan.most(p.inputs) - scale + plan.fraction[i])


def matrix_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring = _matrix_ring(plan, i, p)
    for drop in _dropped(plan, p):
        yield Need(ring + drop, ring + drop) if drop else opened(ring)


def emit_matrix(e: Emitter, i: int, p: Primitive) -> Share:
    ring, openings = _matrix_ring(e.plan, i, p), []
    for x, drop in zip(p.inputs, _dropped(e.plan, p), strict=True):
        shape = e.trace.primitives[x].shape
        rounded = e.truncate(e.get(x, ring + drop), shape, drop) if drop else None
        openings.append(e.emit(tp.Open(shape, ring), rounded.index) if rounded else e.opened(x))
    return Share(e.emit(tp.Product(p.shape, ring, True), *openings), ring, _matrix_scale(e.plan, p))


def _square_dropped(plan: Plan, i: int, p: Primitive) -> int:
    """Return the fraction bits that a square drops of its operand, so that its result fits a word: 0 for most.

    Activations of a text's first token may be 10,000 times those of all others. Their squares need a word, and have
    significant bits to spare.
    """
    scale, (x, y) = _scales(plan, p), p.inputs
    return max(0, -(-(plan.ranges.bits(i) + scale + 2 - WORD) // 2)) if x == y else 0


def _product_scale(plan: Plan, i: int, p: Primitive) -> int:
    """Return the fraction bits of an elementwise product before truncation."""
    return _scales(plan, p) - 2 * _square_dropped(plan, i, p)


def _product_ring(plan: Plan, i: int, p: Primitive) -> int:
    """Return the ring of the product before truncation: as wide as the readers like, as that costs no message."""
    scale = _product_scale(plan, i, p)
    return max(plan.fitting(i, scale), min(WORD, plan.want(i) + scale - plan.fraction[i]))


def product_reach(plan: Plan, i: int, p: Primitive) -> int:
    return WORD - _product_scale(plan, i, p) + plan.fraction[i]


def product_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring, drop = _product_ring(plan, i, p), _square_dropped(plan, i, p)
    for x in p.inputs:
        own = plan.own(x) if drop else min(ring, plan.own(x))
        yield Need(own, own, opened=own, lifted=0 if drop else ring, coarse=drop)


def emit_product(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit an elementwise product. Operands are lifted unless a reader of theirs opens them in a ring as wide."""
    ring, (x, y), scale = _product_ring(e.plan, i, p), p.inputs, _product_scale(e.plan, i, p)
    if drop := _square_dropped(e.plan, i, p):
        return _square(e, p, e.lifted(x, drop, ring), ring, e.plan.own(x) - drop, scale)
    (a, agreed_a), (b, agreed_b) = (e.opened_or_lifted(x, ring) for x in p.inputs)
    if agreed_a >= ring and agreed_b >= ring:
        index = e.emit(tp.Product(p.shape, ring), a, b)
    elif x == y:
        return _square(e, p, a, ring, agreed_a, scale)
    else:
        index = e.emit(tp.LiftedProduct(p.shape, ring, agreed_a, agreed_b), a, b)
    return Share(index, ring, scale)


def _square(e: Emitter, p: Primitive, lifted: int, ring: int, agreed: int, scale: int) -> Share:
    powers = e.emit(tp.LiftedPowers(p.shape, ring, agreed, 2), lifted)
    return Share(e.emit(tp.Polynomial(p.shape, ring, 0, (0, 0, 1)), powers), ring, scale)


# products with numbers that all parties know: each party multiplies its share


def _public_scale(plan: Plan, p: Primitive) -> int:
    """Return the fraction bits of the result before truncation. All factors have as many, those of weights."""
    x, *factors = (plan.fraction[x] for x in p.inputs)
    (factor,) = set(factors)
    return x + factor


def _public_rings(plan: Plan, i: int, p: Primitive) -> tuple[int, int]:
    """Return the narrowest ring of the product before truncation, and the one that its readers like."""
    scale = _public_scale(plan, p)
    narrowest = plan.fitting(i, scale)
    return narrowest, max(narrowest, min(WORD, plan.want(i) + scale - plan.fraction[i]))


def public_reach(plan: Plan, i: int, p: Primitive) -> int:
    scale = _public_scale(plan, p)
    return plan.widest(p.inputs[:1], scale - plan.fraction[i], plan.fitting(i, scale))


def public_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    """Return the needs: if x must be extended for the product, then as far as spares the product an extension too."""
    narrowest, wide = _public_rings(plan, i, p)
    x, *factors = p.inputs
    return Need(max(narrowest, min(wide, plan.reach[x])), wide), *(Need(plan.own(c), 0) for c in factors)


def emit_public(e: Emitter, i: int, p: Primitive, make: Callable[[Shape, int], Protocol]) -> Share:
    x, *factors = p.inputs
    narrowest, wide = _public_rings(e.plan, i, p)
    ring = max(narrowest, min(wide, e.widest(x)))
    operands = e.get(x, ring).index, *(e.get(c, 0).index for c in factors)
    return Share(e.emit(make(p.shape, ring), *operands), ring, _public_scale(e.plan, p))


# openings that later queries read


def keep_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    ring = _kept_ring(plan, i) + plan.rounded[plan.kept[i]]
    return (Need(ring, ring),)


def _kept_ring(plan: Plan, i: int) -> int:
    name = plan.kept[i]
    found = plan.kept_rings.get(name, plan.opened[i])
    if found < plan.opened[i]:
        raise AssertionError(f"{name} is kept in a ring of {found} bits, read in one of {plan.opened[i]}")
    return found


def emit_keep(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit the opening of the new rows, behind those of earlier queries if there are any."""
    ring, (x,), name, rows = _kept_ring(e.plan, i), p.inputs, e.plan.kept[i], p.attrs["rows"]
    shape = e.trace.primitives[x].shape
    drop = e.plan.rounded[name]
    value = e.truncate(e.get(x, ring + drop), shape, drop)
    found = e.emit(tp.Keep(shape, ring, name), e.emit(tp.Open(shape, ring), value.index))
    if rows:
        earlier = e.emit(tp.Recall((*shape[:-2], rows, shape[-1]), ring, name))
        found = e.emit(tp.OpenedConcat(p.shape, ring, len(p.shape) - 2), earlier, found)
    return Share(found, ring, e.plan.fraction[i])


# operations that each party computes on its own share


def local_reach(plan: Plan, i: int, p: Primitive) -> int:
    return min(plan.reach[x] + plan.fraction[i] - plan.fraction[x] for x in p.inputs)


def local_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    for x in p.inputs:
        lift = plan.fraction[i] - plan.fraction[x]
        if i in plan.kept:
            yield Need(0, 0, opened=plan.opened[i])
        else:
            yield Need(plan.own(i) - lift, plan.want(i) - lift)


Local = Callable[[Primitive, int, int], Protocol]  # takes a primitive, and the ring and scale of its operands


def emit_local(e: Emitter, i: int, p: Primitive, make: Local) -> Share:
    """Emit a protocol without messages: operands at one scale, the result in the narrowest of their rings."""
    if i in e.plan.kept:
        return _emit_opened(e, p)
    operands = _at_one_scale(e, i, p)
    ring, fraction = min(v.ring for v in operands), e.plan.fraction[i]
    return Share(e.emit(make(p, ring, fraction), *(v.index for v in operands)), ring, fraction)


_OF_OPENINGS: dict[str, Callable[..., Protocol]] = {
    "reshape": tp.OpenedReshape,
    "expand": tp.OpenedExpand,
    "permute": tp.OpenedPermute,
}


def _emit_opened(e: Emitter, p: Primitive) -> Share:
    """Emit a move of an opening that is kept."""
    value = e.get(p.inputs[0], 0)
    index = e.emit(_OF_OPENINGS[p.op](p.shape, value.ring, **p.attrs), value.index)
    return Share(index, value.ring, value.fraction)


def patches_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    """Return what the readers of patches need, of that of which they are patches: it has fewer entries to extend."""
    ring = max(plan.own(i), plan.base[i])
    return (Need(ring, max(ring, plan.wish[i]), delivered=plan.delivered[i]),)


def emit_patches(e: Emitter, i: int, p: Primitive) -> Share:
    (x,) = p.inputs
    value = e.get(x, max(e.plan.own(i), e.plan.base[i]))
    return Share(e.emit(local.Patches(p.shape, value.ring, **p.attrs), value.index), value.ring, value.fraction)


def emit_same(e: Emitter, i: int, p: Primitive) -> Share:
    """Return the operand itself, at the planned scale."""
    return _at_one_scale(e, i, p)[0]


def _at_one_scale(e: Emitter, i: int, p: Primitive) -> list[Share]:
    plan, shares = e.plan, []
    lifts = [plan.fraction[i] - plan.fraction[x] for x in p.inputs]
    # the wider forms of the operands only if that spares the result an extension
    wide = all(e.widest(x) + lift >= plan.want(i) for x, lift in zip(p.inputs, lifts, strict=True))
    ring = plan.want(i) if wide else plan.own(i)
    for x, excess in zip(p.inputs, lifts, strict=True):
        value = e.get(x, ring - excess)
        shares.append(e.lift(value, e.trace.primitives[x].shape, excess) if excess else value)
    return shares


# products with public numbers m 2^-q: a product with the integer m, whose result has q more fraction bits


def scale_reach(plan: Plan, i: int, p: Primitive) -> int:
    return plan.reach[p.inputs[0]] - max(0, dyadic(p.attrs["value"])[1])


def scale_needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    extra = max(0, dyadic(p.attrs["value"])[1])
    return (Need(plan.fitting(i, plan.fraction[i] + extra), plan.want(i) + extra),)


def emit_scale(e: Emitter, i: int, p: Primitive) -> Share:
    (x,), (m, q) = p.inputs, dyadic(p.attrs["value"])
    extra = max(0, q)
    value = e.get(x, min(e.widest(x), e.plan.want(i) + extra))
    if q < 0:
        m, q = m << -q, 0
    spare = value.fraction - e.plan.fraction[i]
    if spare > 0 and m % (1 << spare) == 0:  # the same integer, of fewer fraction bits
        m, q = m >> spare, -spare
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


def tied(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Return the keys of matrices that are the transposes of others, each with that of the other one.

    They are the head of a model whose tokens are looked up in the same matrix: see the names of linear layers.
    """
    found = dict[str, str]()
    for key, shape in shapes.items():
        name, fraction = split_weight_key(key)
        other = weight_key(name.removesuffix(TURNED), fraction)
        if name.endswith(TURNED) and len(shape) == 2 and shapes.get(other) == shape[::-1]:
            found[key] = other
    return found
