"""A Program's circuit for three servers: the same values, rings and scales; what differs is who holds the weights.

- An input is shared by the client; the result stays shared, for the client to put together.
- A delivery to the one who knows the weights becomes an opening, as nobody does; where the same value is opened anyway,
  one opening, in the wider of the rings, serves both (reduction commutes with everything that follows).
- Where the weights are public a delivery is not needed at all.
- Everything else is taken over as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from protocols.circuit import Circuit, Instruction, total_cost
from protocols.local import AddWeight
from protocols.protocol import Cost, Protocol
from protocols.three_party.endpoints import SharedInput
from protocols.three_party.linear import PublicLinear, SharedLinear
from protocols.two_party import Deliver, Input, Linear, Open, Reveal


@dataclass(frozen=True, eq=False)
class Translated:
    """``output``: the share that goes to the client. ``origin``: the Program's instruction behind each of ours."""

    circuit: Circuit
    output: int
    origin: tuple[int, ...]

    @property
    def cost(self) -> Cost:
        """``to_client``: party 0 to 1; ``to_server``: 1 to 0; ``offline_to_server``: 2 to 0. Rounds are of 0 and 1."""
        return total_cost(self.circuit)

    @property
    def weight_rings(self) -> Mapping[str, int]:
        """Every weight that is read, and the widest ring in which it is."""
        rings: dict[str, int] = {}
        for instruction in self.circuit:
            p = instruction.protocol
            if isinstance(p, (SharedLinear, PublicLinear, AddWeight)):
                rings[p.weight] = max(p.ring, rings.get(p.weight, 0))
        return rings

    @property
    def inputs(self) -> dict[str, tuple[int, SharedInput]]:
        """Instruction and protocol of each input, by name."""
        found = [(i, x.protocol) for i, x in enumerate(self.circuit) if isinstance(x.protocol, SharedInput)]
        return {p.name: (i, p) for i, p in found}


def translate(circuit: Circuit, output: int, *, public: bool = False) -> Translated:
    """``output``: the Program's Reveal. ``public``: whether all three parties know the weights."""
    if not isinstance(circuit[output].protocol, Reveal):
        raise ValueError(f"the output, instruction {output}, is not a Reveal")
    translation = _Translation(circuit, public)
    for index, instruction in enumerate(circuit):
        if index != output:
            translation.add(index, instruction)
    (revealed,) = circuit[output].inputs
    return Translated(tuple(translation.circuit), translation.at[revealed], tuple(translation.origin))


class _Translation:
    def __init__(self, circuit: Circuit, public: bool) -> None:
        self._public = public
        self.circuit: list[Instruction] = []
        self.origin: list[int] = []
        self.at: dict[int, int] = {}  # where the Program's instructions went
        self._opened: dict[int, int] = {}  # openings, by what they open
        opening = (Open,) if public else (Open, Deliver)
        self._rings: dict[int, int] = {}
        for instruction in circuit:
            p = instruction.protocol
            if isinstance(p, opening):
                (x,) = instruction.inputs
                self._rings[x] = max(p.ring, self._rings.get(x, 0))

    def add(self, index: int, instruction: Instruction) -> None:
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
            raise ValueError("a Program reveals its output alone")
        return p

    def _emit(self, index: int, protocol: Protocol, inputs: tuple[int, ...]) -> int:
        self.circuit.append(Instruction(protocol, inputs))
        self.origin.append(index)
        return len(self.circuit) - 1
