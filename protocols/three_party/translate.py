"""A Program's circuit for three servers: the same values, rings and scales; what differs is who holds the weights.

- An input is shared by the client; the result stays shared, for the client to put together.
- One-hot rows that the client would send, and the table that they are multiplied with, become a ``lookup``.
- A delivery to the one who knows the weights becomes an opening, as nobody does; where the same value is opened anyway,
  one opening, in the wider of the rings, serves both (reduction commutes with everything that follows).
- Where the weights are public a delivery is not needed at all.
- Everything else is taken over as it is.
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
    """``outputs``: the shares that go to the client, who gets of each what the Program reveals: ``results``.

    ``origin``: the Program's instruction behind each of ours.
    """

    circuit: Circuit
    outputs: tuple[int, ...]
    results: tuple[Wire, ...]
    origin: tuple[int, ...]

    @cached_property
    def cost(self) -> CircuitCost:
        """``to_second``: party 0 to 1; ``to_first``: 1 to 0; ``dealt``: 2 to 0. Rounds are of 0 and 1."""
        return total_cost(self.circuit)

    @cached_property
    def weight_rings(self) -> Mapping[str, int]:
        """Every weight that is read, and the widest ring in which it is."""
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
    """``outputs``: the Program's Reveals. ``public``: whether all three parties know the weights.

    ``one_hot``: the inputs that are one-hot rows. ValueError where the circuit reveals something else.
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
        self.at: dict[int, int] = {}  # where the Program's instructions went
        self._opened: dict[int, int] = {}  # openings, by what they open
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
    """The products of one-hot rows with tables, as look-ups; None: an instruction that this makes superfluous."""
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
