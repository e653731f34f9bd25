"""From a float-level trace and its calibrated ranges to a circuit: rings, scales, and where shares must be extended.

Ring width is a level, like the modulus in CKKS: a product of scales f and g with a result below 2^m needs m + f + g +
2 bits, truncation gives f of them back by narrowing the ring, and ``Extend`` (one round, one bit an element each way)
widens it again.
Two passes over the trace:

1. ``Plan`` walks backwards and notes what every reader of a value needs: the ring it must have (``base``), the ring
   that would spare its readers extensions of their own (``wish``), the ring in which it is opened, the ring in which
   it is delivered to the server.
2. ``Emitter`` walks forwards, emits protocols, truncates each result to its settled scale, and extends it, once,
   where its ring falls short of ``base``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protocols import local
from protocols import two_party as tp
from protocols.circuit import Instruction
from protocols.protocol import Protocol
from protocols.ring import WORD
from secure.lowering.ranges import dyadic
from secure.lowering.trace import Primitive
from secure.mpc.nonlinear import emit_exponential, emit_maximum, emit_piecewise
from secure.mpc.plan import Plan
from secure.mpc.share import Val


class Emitter:
    """Pass 2. ``emit`` appends a protocol (once: equal ones are shared) and labels it with the module path."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.trace = plan, plan.trace
        self.fixed, self.ranges = plan.fixed, plan.ranges
        self.circuit: list[Instruction] = []
        self.paths: list[str] = []
        self._known: dict[Instruction, int] = {}
        self._settled: dict[int, Val] = {}
        self._wide: dict[int, Val] = {}
        self._path = ""

    def emit(self, protocol: Protocol, *inputs: int) -> int:
        instruction = Instruction(protocol, inputs)
        if instruction not in self._known:
            self._known[instruction] = len(self.circuit)
            self.circuit.append(instruction)
            self.paths.append(self._path)
        return self._known[instruction]

    def run(self, inputs: Mapping[str, tuple[float, float]]) -> None:
        """Emit every primitive. ``inputs``: the range to which the client clamps each input."""
        special = {"piecewise": emit_piecewise, "exp_neg": emit_exponential, "maximum": emit_maximum}
        for i, p in enumerate(self.trace.primitives):
            self._path = p.path
            if p.op in special:
                value = special[p.op](self, i, p)
            elif p.op == "input":
                low, high = inputs[p.attrs["name"]]
                f, ring = self.plan.fraction[i], max(self.plan.own(i), self.plan.base[i], min(WORD, self.plan.wish[i]))
                value = Val(self.emit(tp.Input(p.shape, ring, p.attrs["name"], f, low, high)), ring, f)
            elif p.op in ("linear", "mul_weight"):
                value = self._weighted(i, p)
            elif p.op in ("mul", "matmul"):
                value = self._product(i, p)
            else:
                value = self._local(i, p)
            self.settle(i, value)

    # values

    def settle(self, i: int, value: Val) -> None:
        """Truncate to the settled scale; extend if a reader needs it."""
        shape, excess = self.trace.primitives[i].shape, value.fraction - self.plan.fraction[i]
        if excess > 0:
            value = self.truncate(value, shape, excess)
        elif excess < 0:
            value = self.lift(value, shape, -excess)
        self._settled[i] = value
        if value.ring < self.plan.base[i]:
            self._wide[i] = self.extend(value, shape, max(self.plan.base[i], min(WORD, self.plan.wish[i])))

    def get(self, i: int, ring: int) -> Val:
        """Value i in a ring of at least ``ring`` bits."""
        settled = self._settled[i]
        return settled if settled.ring >= ring else self._wide[i]

    def truncate(self, value: Val, shape: tuple[int, ...], shift: int) -> Val:
        if not shift:
            return value
        index = self.emit(local.Truncate(shape, value.ring, shift), value.index)
        return Val(index, value.ring - shift, value.fraction - shift)

    def lift(self, value: Val, shape: tuple[int, ...], shift: int) -> Val:
        """More fraction bits: x 2^d modulo 2^(k+d), exact and free."""
        ring = min(WORD, value.ring + shift)
        return Val(self.emit(local.MulConstant(shape, ring, 1 << shift), value.index), ring, value.fraction + shift)

    def extend(self, value: Val, shape: tuple[int, ...], ring: int) -> Val:
        return Val(self.emit(tp.Extend(shape, value.ring, ring), value.index), ring, value.fraction)

    def opened(self, i: int) -> int:
        """The one opening of value i, as wide as its widest reader needs."""
        ring = self.plan.opened[i]
        return self.emit(tp.Open(self.trace.primitives[i].shape, ring), self.get(i, ring).index)

    # primitives without a file of their own

    def _weighted(self, i: int, p: Primitive) -> Val:
        (x,) = p.inputs
        plan, ring = self.plan, self.plan.product_ring(i)
        delivery = tp.Deliver(self.trace.primitives[x].shape, plan.delivered[x])
        delivered = self.emit(delivery, self.get(x, plan.delivered[x]).index)
        fraction = self.fixed.weight_fraction_bits
        name = weight_key(p.attrs["weight"], fraction)
        index = self.emit(tp.Linear(p.shape, ring, name, p.op == "mul_weight"), delivered)
        return Val(index, ring, plan.fraction[x] + fraction)

    def _product(self, i: int, p: Primitive) -> Val:
        ring = self.plan.product_ring(i)
        index = self.emit(tp.Product(p.shape, ring, p.op == "matmul"), *(self.opened(x) for x in p.inputs))
        return Val(index, ring, sum(self.plan.fraction[x] for x in p.inputs))

    def _local(self, i: int, p: Primitive) -> Val:
        plan, attrs = self.plan, p.attrs
        operands = [self.get(x, self._operand_ring(i, x)) for x in p.inputs]
        fraction = max(v.fraction for v in operands)
        shapes = [self.trace.primitives[x].shape for x in p.inputs]
        operands = [
            self.lift(v, s, fraction - v.fraction) if v.fraction < fraction else v
            for v, s in zip(operands, shapes, strict=True)
        ]
        ring = min(v.ring for v in operands)
        indices = [v.index for v in operands]
        if p.op == "bounded":
            return operands[0]
        protocol: Protocol
        if p.op in ("add", "sub"):
            protocol = (local.Add if p.op == "add" else local.Sub)(p.shape, ring)
        elif p.op == "offset":
            protocol = local.AddConstant(p.shape, ring, round(attrs["value"] * 2.0**fraction))
        elif p.op == "add_weight":
            protocol = local.AddWeight(p.shape, ring, weight_key(attrs["weight"], fraction))
        elif p.op == "sum":
            protocol = local.Sum(p.shape, ring, attrs["dims"])
        elif p.op == "scale":
            m, q = dyadic(attrs["value"])
            if q < 0:
                m, q = m << -q, 0
            index = indices[0] if m == 1 else self.emit(local.MulConstant(p.shape, ring, m), indices[0])
            return Val(index, ring, fraction + q)
        else:
            types: dict[str, Any] = {
                "reshape": local.Reshape,
                "expand": local.Expand,
                "permute": local.Permute,
                "slice": local.Slice,
                "cat": local.Concat,
            }
            protocol = types[p.op](p.shape, ring, **attrs)
        return Val(self.emit(protocol, *indices), ring, plan.fraction[i])

    def _operand_ring(self, i: int, x: int) -> int:
        p, plan = self.trace.primitives[i], self.plan
        extra = max(0, dyadic(p.attrs["value"])[1]) if p.op == "scale" else plan.fraction[x] - plan.fraction[i]
        return plan.own(i) + extra


def weight_key(name: str, fraction: int) -> str:
    """The name of a weight's integers at one scale."""
    return f"{name}@{fraction}"


def split_weight_key(key: str) -> tuple[str, int]:
    name, _, fraction = key.rpartition("@")
    return name, int(fraction)
