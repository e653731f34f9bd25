"""Emission of unit vectors of secret positions, with which tables of the server are looked up."""

from __future__ import annotations

from collections.abc import Iterable

from protocols import two_party as tp
from protocols.ring import WORD
from secure.lowering.primitives import Primitive
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Need, Plan, opened
from secure.mpc.share import Share


def _digit(p: Primitive) -> int:
    """Return the bits of a position."""
    return max(1, (p.shape[-1] - 1).bit_length())


def reach(plan: Plan, i: int, p: Primitive) -> int:
    """Return the widest ring of the result: the dealer makes unit vectors in any."""
    return WORD


def needs(plan: Plan, i: int, p: Primitive) -> Iterable[Need]:
    return (opened(_digit(p)),)


def emit(e: Emitter, i: int, p: Primitive) -> Share:
    """Emit the opening of positions, and unit vectors in the ring that the product with a table needs."""
    ring, (x,) = max(e.plan.own(i), e.plan.base[i]), p.inputs
    return Share(e.emit(tp.Units(e.trace.primitives[x].shape, ring, _digit(p), p.shape[-1]), e.opened(x)), ring, 0)
