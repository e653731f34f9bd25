"""Pass 2 over a trace, forwards: this module builds the circuit and keeps the shares that it computes."""

from __future__ import annotations

from collections.abc import Mapping

from protocols import local
from protocols import two_party as tp
from protocols.flow import Instruction
from protocols.protocol import Protocol
from protocols.ring import WORD
from secure.mpc.plan import Plan
from secure.mpc.share import Share
from secure.mpc.watch import Watch


class Emitter:
    """A circuit in the making.

    ``emit`` appends a protocol, or finds an equal instruction that exists, and labels it with ``path``, the current
    module. ``clamps``: the range to which the client clamps each input, by name. ``checked``: emit the checks of
    ranges (``watch``) too.
    """

    def __init__(self, plan: Plan, clamps: Mapping[str, tuple[float, float]], *, checked: bool = False) -> None:
        self.plan, self.trace, self.clamps = plan, plan.trace, clamps
        self.fixed, self.ranges = plan.fixed, plan.ranges
        self.circuit: list[Instruction] = []
        self.paths: list[str] = []
        self.path = ""
        self.watch = Watch(self, checked)
        self._known: dict[Instruction, int] = {}
        self._settled: dict[int, Share] = {}
        self._wide: dict[int, Share] = {}

    def emit(self, protocol: Protocol, *inputs: int) -> int:
        instruction = Instruction(protocol, inputs)
        if instruction not in self._known:
            self._known[instruction] = len(self.circuit)
            self.circuit.append(instruction)
            self.paths.append(self.path)
        return self._known[instruction]

    def settle(self, i: int, value: Share) -> None:
        """Bring value i of the trace to its planned scale, and extend its ring if a reader needs a wider one."""
        shape, excess = self.trace.primitives[i].shape, value.fraction - self.plan.fraction[i]
        if excess > 0:
            value = self.truncate(value, shape, excess)
        elif excess < 0:
            value = self.lift(value, shape, -excess)
        self._settled[i] = value
        if value.ring < self.plan.base[i]:
            self._wide[i] = self.extend(value, shape, self.plan.extended(i))
            self.watch.within(i)

    def get(self, i: int, ring: int) -> Share:
        """Return value i in a ring of at least ``ring`` bits."""
        settled = self._settled[i]
        return settled if settled.ring >= ring else self._wide[i]

    def widest(self, i: int) -> int:
        """Return the bits of the widest ring in which value i is there."""
        return (self._wide.get(i) or self._settled[i]).ring

    def truncate(self, value: Share, shape: tuple[int, ...], shift: int) -> Share:
        if not shift:
            return value
        index = self.emit(local.Truncate(shape, value.ring, shift), value.index)
        return Share(index, value.ring - shift, value.fraction - shift)

    def lift(self, value: Share, shape: tuple[int, ...], shift: int) -> Share:
        """Add d fraction bits: x 2^d modulo 2^(k+d), which is exact and needs no messages."""
        ring = min(WORD, value.ring + shift)
        return Share(self.emit(local.MulConstant(shape, ring, 1 << shift), value.index), ring, value.fraction + shift)

    def extend(self, value: Share, shape: tuple[int, ...], ring: int) -> Share:
        return Share(self.emit(tp.Extend(shape, value.ring, ring), value.index), ring, value.fraction)

    def opened(self, i: int) -> int:
        """Return the only opening of value i, as wide as its readers need, but for its ``coarse`` lowest bits."""
        if i in self.plan.kept:
            return self._settled[i].index
        ring, drop, shape = self.plan.opened[i], self.plan.coarse(i), self.trace.primitives[i].shape
        value = self.truncate(self.get(i, ring), shape, drop)
        index = self.emit(tp.Open(shape, ring - drop), value.index)
        self.watch.within(i)
        return index

    def opened_or_lifted(self, i: int, ring: int) -> tuple[int, int]:
        """Return value i modulo 2^ring, as its opening if that is as wide and else lifted; and its bits that are exact.

        Both representatives of the mask agree in these bits (see ``two_party.lift``).
        """
        if self.plan.opened[i] >= ring:
            return self.opened(i), ring
        return self.lifted(i, 0, self.plan.lifted[i]), self.plan.own(i)

    def lifted(self, i: int, drop: int, ring: int) -> int:
        """Return the only opening of value i without its lowest ``drop`` bits, lifted to a ring of ``ring`` bits."""
        gone = self.plan.coarse(i)
        lift = tp.Lift(self.trace.primitives[i].shape, self.plan.own(i) - gone, drop - gone, ring)
        return self.emit(lift, self.opened(i))

    def delivered(self, i: int) -> int:
        """Return the only delivery of value i to the server, as wide as its widest reader needs.

        Patches are taken from the delivery of what they are patches of.
        """
        ring, p = self.plan.delivered[i], self.trace.primitives[i]
        if p.op == "patches":
            return self.emit(tp.DeliveredPatches(p.shape, ring, **p.attrs), self.delivered(p.inputs[0]))
        return self.emit(tp.Deliver(self.trace.primitives[i].shape, ring), self.get(i, ring).index)
