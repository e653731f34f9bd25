"""Translate a Program's circuit for three servers: values, rings and scales stay; who holds the weights changes.

- The client shares its input; the result stays shared, and the client adds the shares up.
- One-hot rows that the client would send, and the table that they are multiplied with, become a ``lookup``.
- A delivery to the server, who knows the weights, becomes an opening, because nobody knows them here. If the same value
  is opened anyway, one opening in the wider ring serves both (reduction commutes with everything that follows).
- If the weights are public, a delivery is not needed at all.
- Everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from protocols.circuit import Circuit, Instruction, total_cost
from protocols.protocol import CircuitCost, Protocol
from protocols.three_party.endpoints import LookedUp, SharedInput
from protocols.three_party.linear import PublicLinear, SharedLinear
from protocols.two_party import Deliver, Input, Linear, Open, Reveal
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
        return {p.name: (i, p) for i, p in self._entries if not isinstance(p, LookedUp)}

    @cached_property
    def lookups(self) -> dict[str, tuple[int, LookedUp]]:
        """Instruction and protocol of each look-up, by name."""
        return {p.name: (i, p) for i, p in self._entries if isinstance(p, LookedUp)}

    @property
    def _entries(self) -> list[tuple[int, SharedInput]]:
        return [(i, x.protocol) for i, x in enumerate(self.circuit) if isinstance(x.protocol, SharedInput)]


def translate(
    circuit: Circuit, outputs: Sequence[int], *, public: bool = False, one_hot: Collection[str] = ()
) -> Translated:
    """Translate a Program's circuit. Raises ValueError if it reveals anything but its outputs.

    outputs: the Program's Reveals. public: True if all three parties know the weights. one_hot: the names of the inputs
    that are one-hot rows.
    """
    for output in outputs:
        if not isinstance(circuit[output].protocol, Reveal):
            raise ValueError(f"the output, instruction {output}, is not a Reveal")
    translation = _Translation(circuit, public, one_hot)
    for index, instruction in enumerate(circuit):
        if index not in outputs:
            translation.add(index, instruction)
    shares = tuple(translation.at[x] for output in outputs for x in circuit[output].inputs)
    # in the ring of the Reveal: the share may be in a wider one
    results = tuple(circuit[output].protocol.out for output in outputs)
    return Translated(tuple(translation.circuit), shares, results, tuple(translation.origin))


class _Translation:
    def __init__(self, circuit: Circuit, public: bool, one_hot: Collection[str]) -> None:
        self._public = public
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
                self.at[index] = self._emit(index, replace(found, public=self._public), ())
            return
        p, inputs = instruction.protocol, tuple(self.at[i] for i in instruction.inputs)
        if isinstance(p, Deliver) and self._public:
            self.at[index] = inputs[0]
        elif isinstance(p, (Deliver, Open)):
            if inputs[0] not in self._opened:
                opening = Open(p.shape, self._rings[instruction.inputs[0]])
                self._opened[inputs[0]] = self._emit(index, opening, inputs)
            self.at[index] = self._opened[inputs[0]]
        else:
            self.at[index] = self._emit(index, self._of_three(p), inputs)

    def _of_three(self, p: Protocol) -> Protocol:
        if isinstance(p, Input):
            return SharedInput(p.shape, p.ring, p.name)
        if isinstance(p, Linear):
            return (PublicLinear if self._public else SharedLinear)(p.shape, p.ring, p.weight, p.diagonal)
        if isinstance(p, Reveal):
            raise ValueError("a Program reveals its outputs alone")
        return p

    def _emit(self, index: int, protocol: Protocol, inputs: tuple[int, ...]) -> int:
        self.circuit.append(Instruction(protocol, inputs))
        self.origin.append(index)
        return len(self.circuit) - 1


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
