"""Translate a Program's circuit for three servers: values, rings and scales stay; who holds the weights changes.

- The client shares its input; the result stays shared, and the client adds the shares up.
- One-hot rows that the client would send, and the table that they are multiplied with, become a ``lookup``.
- A delivery to the server, who knows the weights, becomes an opening, because nobody knows them here. If the same value
  is opened anyway, one opening in the wider ring serves both (reduction commutes with everything that follows).
- If the weights are public, a delivery is not needed at all.
- Unless clients are trusted, a check stands behind each input and each look-up (see ``checks``). An input is opened in
  its whole ring and compared with its clamps. The opening serves the Program's own readers too, and the check takes
  place beside the first layers, so that a query of more than five rounds takes no round more.
- Everything else stays as it is.

A value beyond its clamps ends the query instead of being clamped: clamping would put four rounds before the first
layer, for the honest too. Ending it tells the client that its value was out of range, which it knew. Any value within
the clamps passes, for instance a mask of one half.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from protocols import ring
from protocols.circuit import total_cost
from protocols.flow import Circuit, Flow, Instruction
from protocols.local import Patches
from protocols.protocol import CircuitCost, Protocol, Shape
from protocols.three_party.checks import InRange, UnitVectors
from protocols.three_party.endpoints import FromKeys, KeySketch, LookedUp, SharedInput
from protocols.three_party.linear import OpenedPatches, PublicLinear, SharedLinear
from protocols.three_party.sketch import SUMS
from protocols.two_party import Compare, Deliver, DeliveredPatches, Input, Linear, Open, Reveal
from protocols.wire import Wire


@dataclass(frozen=True, eq=False)
class Translated:
    """A circuit for three servers.

    outputs: the instructions whose shares go to the client. results: the form of each output after the client has added
    its shares, as the Program reveals it. origin: for each instruction, the Program's instruction that it comes from.
    """

    circuit: Circuit
    outputs: tuple[int, ...]
    results: tuple[Wire, ...]
    origin: tuple[int, ...]

    @cached_property
    def cost(self) -> CircuitCost:
        """The cost of parties 0 and 1. to_second: from 0 to 1; to_first: from 1 to 0; dealt, brought: from 2 to 0."""
        return total_cost(self.circuit)

    @cached_property
    def weight_rings(self) -> Mapping[str, int]:
        """The widest ring in which each weight is read, by the weight's name."""
        rings: dict[str, int] = {}
        for instruction in self.circuit:
            if use := instruction.protocol.weight_use:
                rings[use.name] = max(use.ring, rings.get(use.name, 0))
        return rings

    @cached_property
    def inputs(self) -> dict[str, tuple[int, SharedInput]]:
        """Instruction and protocol of each input that the client shares, by name."""
        return {p.name: (i, p) for i, p in self._entries if not isinstance(p, FromKeys)}

    @cached_property
    def lookups(self) -> dict[str, tuple[int, LookedUp]]:
        """Instruction and protocol of each look-up, by name."""
        return {p.name: (i, p) for i, p in self._entries if isinstance(p, LookedUp)}

    @cached_property
    def from_keys(self) -> dict[str, tuple[int, FromKeys]]:
        """Instruction and protocol of each input that comes of look-up keys, rows and sketches, by name."""
        return {p.name: (i, p) for i, p in self._entries if isinstance(p, FromKeys)}

    @property
    def _entries(self) -> list[tuple[int, SharedInput]]:
        return [(i, x.protocol) for i, x in enumerate(self.circuit) if isinstance(x.protocol, SharedInput)]


def translate(
    circuit: Circuit,
    outputs: Sequence[int],
    *,
    public: bool = False,
    one_hot: Collection[str] = (),
    trusted_clients: bool = False,
) -> Translated:
    """Translate a Program's circuit. Raises ValueError if it reveals anything but its outputs.

    outputs: the Program's Reveals. public: True if all three parties know the weights. one_hot: the names of the inputs
    that are one-hot rows. trusted_clients: leave out the checks of what clients send; without it, ValueError is raised
    as well for one-hot rows that are not looked up, and for clamps that take up half of a ring of 64 bits.
    """
    for output in outputs:
        if not isinstance(circuit[output].protocol, Reveal):
            raise ValueError(f"the output, instruction {output}, is not a Reveal")
    translation = _Translation(circuit, public, one_hot, trusted_clients)
    for index, instruction in enumerate(circuit):
        if index not in outputs:
            translation.add(index, instruction)
    shares = tuple(translation.at[x] for output in outputs for x in circuit[output].inputs)
    # in the ring of the Reveal: the share may be in a wider one
    results = tuple(circuit[output].protocol.out for output in outputs)
    return Translated(Flow(translation.circuit), shares, results, tuple(translation.origin))


class _Translation:
    def __init__(self, circuit: Circuit, public: bool, one_hot: Collection[str], trusted: bool) -> None:
        self._public, self._one_hot, self._trusted = public, one_hot, trusted
        self.circuit: list[Instruction] = []
        self.origin: list[int] = []
        self.at: dict[int, int] = {}  # our instruction, by the Program's
        self._opened: dict[int, int] = {}  # our opening, by the instruction that it opens
        opening = (Open,) if public else (Open, Deliver)
        self._rings: dict[int, int] = {}
        self._lookups = _lookups(circuit, one_hot)
        for instruction in circuit:
            p = instruction.protocol
            if isinstance(p, opening):
                (x,) = instruction.inputs
                self._rings[x] = max(p.ring, self._rings.get(x, 0))

    def add(self, index: int, instruction: Instruction) -> None:
        if index in self._lookups:
            found = self._lookups[index]
            if found is not None:
                self.at[index] = self._look_up(index, replace(found, public=self._public))
            return
        p, inputs = instruction.protocol, tuple(self.at[i] for i in instruction.inputs)
        if isinstance(p, Input):
            self.at[index] = self._share(index, p)
        elif isinstance(p, Deliver) and self._public:
            self.at[index] = inputs[0]
        elif isinstance(p, (Deliver, Open)):
            self.at[index] = self._open(index, instruction.inputs[0], p.shape)
        else:
            self.at[index] = self._emit(index, self._of_three(p), inputs)

    def _open(self, index: int, operand: int, shape: Shape) -> int:
        """Open the Program's value ``operand``, unless it is opened already."""
        if (at := self.at[operand]) not in self._opened:
            self._opened[at] = self._emit(index, Open(shape, self._rings[operand]), (at,))
        return self._opened[at]

    def _share(self, index: int, p: Input) -> int:
        """Let the client share an input, and check that it lies within its clamps."""
        if self._trusted:
            return self._emit(index, SharedInput(p.shape, p.ring, p.name), ())
        if p.name in self._one_hot:
            raise ValueError(f"the one-hot rows of {p.name!r} are not looked up, so nothing can check them")
        bits, low, above = _bounds(p)
        self.at[index] = shared = self._emit(index, SharedInput(p.shape, bits, p.name), ())
        self._rings[index] = max(bits, self._rings.get(index, 0))
        below = self._emit(index, Compare(p.shape, bits, 0, (low, above)), (self._open(index, index, p.shape),))
        self._emit(index, InRange(p.name, p.shape, p.low, p.high), (below,))
        return shared

    def _look_up(self, index: int, p: LookedUp) -> int:
        """Look rows up, and check the keys with which the client asks for them."""
        if self._trusted:
            return self._emit(index, p, ())
        name = f"{p.name}/sketch"
        rows = self._emit(index, replace(p, sketch=name), ())
        sketch = KeySketch((p.points, p.pairs + SUMS - 1), ring.WORD, name, public=p.public)
        self._emit(index, UnitVectors(p.name, p.points, p.pairs), (self._emit(index, sketch, ()),))
        return rows

    def _of_three(self, p: Protocol) -> Protocol:
        if isinstance(p, Linear):
            return (PublicLinear if self._public else SharedLinear)(p.shape, p.ring, p.weight, p.diagonal)
        if isinstance(p, DeliveredPatches):
            made = Patches if self._public else OpenedPatches
            return made(p.shape, p.ring, p.kernel, p.stride, p.padding, p.dilation)
        if isinstance(p, Reveal):
            raise ValueError("a Program reveals its outputs alone")
        return p

    def _emit(self, index: int, protocol: Protocol, inputs: tuple[int, ...]) -> int:
        self.circuit.append(Instruction(protocol, inputs))
        self.origin.append(index)
        return len(self.circuit) - 1


def _bounds(p: Input) -> tuple[int, int, int]:
    """Return the ring in which an input is compared with its clamps, its least integer, and that above its greatest.

    The ring is the input's, or wider if the range takes up half of it: see ``InRange``.
    """
    if max(abs(p.low), abs(p.high)) * 2.0**p.fraction >= 2.0 ** (ring.WORD - 2):
        raise ValueError(f"the input {p.name!r} has the clamps {p.low:g} and {p.high:g}, too wide to compare it with")
    low, high = (round(x * 2.0**p.fraction) for x in (p.low, p.high))
    return max(p.ring, (high - low).bit_length() + 1), low, high + 1


def _lookups(circuit: Circuit, one_hot: Collection[str]) -> dict[int, LookedUp | None]:
    """Find the products of one-hot rows with tables, as look-ups; None: the instruction is no longer needed."""
    readers: dict[int, list[int]] = {}
    for index, instruction in enumerate(circuit):
        for i in instruction.inputs:
            readers.setdefault(i, []).append(index)

    def all_of(kind: type[Protocol], found: Sequence[int]) -> bool:
        return bool(found) and all(isinstance(circuit[i].protocol, kind) for i in found)

    out: dict[int, LookedUp | None] = {}
    for index, instruction in enumerate(circuit):
        p = instruction.protocol
        if not isinstance(p, Input) or p.name not in one_hot:
            continue
        delivered = readers.get(index, [])
        products = [i for d in delivered for i in readers.get(d, [])]
        if all_of(Deliver, delivered) and all_of(Linear, products):
            out |= dict.fromkeys([index, *delivered])
            for number, i in enumerate(products):
                linear = circuit[i].protocol
                assert isinstance(linear, Linear)
                name = f"{p.name}/{number}"  # several tables may be read at the same places
                out[i] = LookedUp(linear.shape, linear.ring, name, linear.weight, p.shape[-1])
    return out
