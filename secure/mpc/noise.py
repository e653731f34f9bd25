"""Emission of values plus noise that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from protocols import local
from protocols import two_party as tp
from protocols.ring import WORD
from secure.lowering.primitives import Primitive
from secure.mpc import arithmetic
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Need, Plan, opened
from secure.mpc.share import Share


def _alone(p: Primitive) -> Primitive:
    """Return the primitive without its temperature."""
    return replace(p, inputs=p.inputs[:1])


def _scaled_ring(plan: Plan, i: int, t: int) -> int:
    """Return the ring of the noise times the secret ``t``, before truncation."""
    extra = plan.fraction[t]
    return max(plan.fitting(i, plan.fraction[i] + extra), min(WORD, plan.want(i) + extra))


def reach(plan: Plan, i: int, p: Primitive) -> int:
    found = arithmetic.local_reach(plan, i, _alone(p))
    return min([found, *(WORD - plan.fraction[t] for t in p.inputs[1:])])


def needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    yield from arithmetic.local_needs(plan, i, _alone(p))
    for t in p.inputs[1:]:
        yield opened(_scaled_ring(plan, i, t))


def emit(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit the noise and its sum with the value. ``i`` numbers the noise, so that no other instruction equals it."""
    x = arithmetic.emit_same(e, i, _alone(p))
    if len(p.inputs) == 1:
        dealt = tp.Gumbel(p.shape, x.ring, x.fraction, i, float(p.attrs["temperature"]))
        noise = Share(e.emit(dealt), x.ring, x.fraction)
    else:
        (_, t), extra = p.inputs, e.plan.fraction[p.inputs[1]]
        ring = _scaled_ring(e.plan, i, t)
        index = e.emit(tp.ScaledGumbel(p.shape, ring, x.fraction, i), e.opened(t))
        noise = e.truncate(Share(index, ring, x.fraction + extra), p.shape, extra)
    ring = min(x.ring, noise.ring)
    return Share(e.emit(local.Add(p.shape, ring), x.index, noise.index), ring, x.fraction)
