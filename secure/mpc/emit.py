"""From a float-level trace and its calibrated ranges to a circuit: chooses rings and scales, and places extensions.

The width of a ring is a level, like the modulus in CKKS. A product of scales f and g with a result below 2^m needs
m + f + g + 2 bits. Truncation removes f fraction bits by narrowing the ring; ``Extend`` (one round, one bit per element
each way) widens the ring again.

Products with polynomials are computed at once where that spares a round (``fused``). Two passes over the trace ask the
record of each primitive in ``RULES``:

1. ``Plan`` walks backwards and notes what the readers of a value need: the ring it must have (``base``), the ring
   that would spare its readers extensions of their own (``wish``), the ring in which it is opened, the ring to which
   that opening is lifted, and the ring in which it is delivered to the server. Before, it walks forwards and notes how
   wide a ring can be without an extension (``reach``).
2. ``emit`` walks forwards with an ``Emitter``. It appends protocols, truncates each result to its settled scale, and
   extends a result once if its ring is narrower than ``base``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from protocols import local
from protocols import two_party as tp
from protocols.fixedpoint import FixedPoint
from protocols.flow import Flow
from protocols.protocol import Protocol, Shape
from secure.errors import InvalidInput, UnsupportedOperation
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import Ranges
from secure.lowering.trace import Trace
from secure.mpc import arithmetic, fused, lookup, noise, nonlinear, powers, ranking, softmax
from secure.mpc.emitter import Emitter
from secure.mpc.plan import Plan, Planning, nothing
from secure.mpc.prices import DEFAULT, Prices
from secure.mpc.rounding import rounded
from secure.mpc.share import Share


@dataclass(frozen=True, kw_only=True)
class Emission(Planning):
    """The computation of a primitive on shares. ``emit`` appends the protocols of primitive i of the trace.

    The share that it returns may have more or fewer fraction bits than planned; ``Emitter.settle`` corrects that.
    """

    emit: Callable[[Emitter, int, Primitive], Share]


def _local(make: arithmetic.Local) -> Emission:
    """Make the record of a protocol without messages, whose operands have one scale."""
    return Emission(
        arithmetic.local_needs, arithmetic.local_reach, keeps_scale=True, emit=partial(arithmetic.emit_local, make=make)
    )


def _shaped(protocol: Callable[..., Protocol]) -> Emission:
    """Make the record of a protocol that moves elements, with the attributes of the primitive."""
    return _local(lambda p, ring, fraction: protocol(p.shape, ring, **p.attrs))


def _weighted(*, diagonal: bool) -> Emission:
    return Emission(
        arithmetic.weighted_needs, arithmetic.weighted_reach, emit=partial(arithmetic.emit_weighted, diagonal=diagonal)
    )


def _public(protocol: Callable[[Shape, int], Protocol]) -> Emission:
    """Make the record of a product with numbers that all parties know."""
    return Emission(
        arithmetic.public_needs, arithmetic.public_reach, emit=partial(arithmetic.emit_public, make=protocol)
    )


RULES: dict[str, Emission] = {
    "input": Emission(nothing, arithmetic.input_reach, emit=arithmetic.emit_input),
    "linear": _weighted(diagonal=False),
    "mul_weight": _weighted(diagonal=True),
    "mul_public": _public(local.MulPublic),
    "rotated": _public(local.Rotated),
    "keep": Emission(arithmetic.keep_needs, arithmetic.local_reach, keeps_scale=True, emit=arithmetic.emit_keep),
    "mul": Emission(arithmetic.product_needs, arithmetic.product_reach, emit=arithmetic.emit_product),
    "matmul": Emission(arithmetic.matrix_needs, arithmetic.matrix_reach, emit=arithmetic.emit_matrix),
    "add": _local(lambda p, ring, fraction: local.Add(p.shape, ring)),
    "sub": _local(lambda p, ring, fraction: local.Sub(p.shape, ring)),
    "offset": _local(
        lambda p, ring, fraction: local.AddConstant(p.shape, ring, round(p.attrs["value"] * 2.0**fraction))
    ),
    "add_weight": _local(
        lambda p, ring, fraction: local.AddWeight(p.shape, ring, arithmetic.weight_key(p.attrs["weight"], fraction))
    ),
    "sum": _shaped(local.Sum),
    "reshape": _shaped(local.Reshape),
    "expand": _shaped(local.Expand),
    "permute": _shaped(local.Permute),
    "slice": _shaped(local.Slice),
    "cat": _shaped(local.Concat),
    "take": _shaped(local.Take),
    "patches": Emission(
        arithmetic.patches_needs, arithmetic.local_reach, keeps_scale=True, emit=arithmetic.emit_patches
    ),
    "bounded": Emission(arithmetic.local_needs, arithmetic.local_reach, keeps_scale=True, emit=arithmetic.emit_same),
    "scale": Emission(arithmetic.scale_needs, arithmetic.scale_reach, keeps_scale=True, emit=arithmetic.emit_scale),
    "piecewise": Emission(nonlinear.piecewise_needs, note=nonlinear.note_piecewise, emit=nonlinear.emit_piecewise),
    "row_bound": Emission(softmax.bound_needs, scale=softmax.SCORE_FRACTION, emit=softmax.emit_bound),
    "exp_below": Emission(softmax.exponential_needs, emit=softmax.emit_exponential),
    "inverse_power": Emission(powers.needs, emit=powers.emit),
    "power": Emission(powers.needs, emit=powers.emit),
    "maximum": Emission(nonlinear.maximum_needs, emit=nonlinear.emit_maximum),
    "top_indices": Emission(ranking.needs, emit=ranking.emit_indices),
    "top_of": Emission(ranking.numbered_needs, emit=ranking.emit_numbers),
    "perturbed": Emission(noise.needs, noise.reach, keeps_scale=True, emit=noise.emit),
    "units": Emission(lookup.needs, lookup.reach, emit=lookup.emit),
    "polynomial_product": Emission(fused.needs, fused.reach, emit=fused.emit),
    "real": Emission(arithmetic.local_needs, arithmetic.local_reach, emit=arithmetic.emit_same),
    "top_values": Emission(ranking.needs, keeps_scale=True, emit=ranking.emit_values),
}
"""The record of every primitive of ``secure.lowering.primitives`` for shares."""


@dataclass(frozen=True)
class Emitted:
    """A circuit, the module path of each instruction, and for each output its Reveal and its scale in fraction bits.

    watched: the Reveal of what tells the client whether values left their ranges, and the parts of the model that it
    tells apart; None if nothing does.
    """

    circuit: Flow
    paths: tuple[str, ...]
    outputs: tuple[tuple[int, int], ...]
    watched: tuple[int, tuple[str, ...]] | None


def emit(
    trace: Trace,
    ranges: Ranges,
    fixed: FixedPoint,
    outputs: Sequence[int],
    clamps: Mapping[str, tuple[float, float]],
    prices: Prices = DEFAULT,
    answer_bits: int | None = None,
    kept: Mapping[str, int] | None = None,
    *,
    checked: bool = False,
) -> Emitted:
    """Emit the circuit that reveals ``outputs`` (positions in the trace) to the client.

    ``clamps``: the range to which the client clamps each input, by name. ``prices``: of rounds and bytes.
    ``answer_bits``: the fraction bits to which the outputs are rounded; None: they keep all of theirs. ``kept``: the
    rings of openings that queries keep, see ``Plan``. ``checked``: the client learns, beside the outputs, in which
    parts of the model a value left its range (``watch``).
    Raises UnsupportedOperation (shares cannot compute a primitive; names the module) and DoesNotFit (no ring can hold
    a value).
    """
    plan = _planned(trace, ranges, fixed, outputs, prices, kept)
    if (changed := fused.fuse(plan, outputs)) is not trace:
        trace, plan = changed, _planned(changed, ranges, fixed, outputs, prices, kept)
    e = Emitter(plan, clamps, checked=checked)
    for i, p in enumerate(trace.primitives):
        if not plan.unread(i):
            e.path = p.path
            e.settle(i, _rule(p).emit(e, i, p))
    revealed = []
    for i in outputs:
        shape, value = trace.primitives[i].shape, e.get(i, 0)
        if answer_bits is not None:
            e.path = trace.primitives[i].path
            value = rounded(e, value, shape, answer_bits)
        index = e.emit(tp.Reveal(shape, value.ring), value.index)
        revealed.append((index, value.fraction))
    if answer_bits is not None and not any(e.get(i, 0).fraction for i in outputs):
        raise InvalidInput(
            f"answers of {answer_bits} fraction bits: this model's are whole numbers, such as labels or places",
            "leave answer_bits (--answer-bits) out, or reveal numbers",
        )
    watched = e.watch.finish()
    return Emitted(Flow(e.circuit), tuple(e.paths), tuple(revealed), watched)


def _planned(
    trace: Trace,
    ranges: Ranges,
    fixed: FixedPoint,
    outputs: Sequence[int],
    prices: Prices,
    kept: Mapping[str, int] | None,
) -> Plan:
    return Plan(trace, ranges, fixed, outputs, [_rule(p) for p in trace.primitives], prices, kept)


def _rule(p: Primitive) -> Emission:
    found = RULES.get(p.op)
    if found is None:
        raise UnsupportedOperation(
            f"{p.where}: no record says how shares compute the primitive '{p.op}'",
            "add one to RULES in secure/mpc/emit.py",
        )
    return found
