"""A circuit, and what follows from it alone: the schedule of its rounds, and who reads what.

A circuit is a flat list of protocols with the results that each one reads. See ``circuit`` for what runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from protocols.ahead import short_draws
from protocols.protocol import CLIENT, SERVER, Protocol


@dataclass(frozen=True)
class Instruction:
    """A protocol, and the positions of the instructions whose results it reads."""

    protocol: Protocol
    inputs: tuple[int, ...] = ()


Circuit = Sequence[Instruction]


class Flow(tuple[Instruction, ...]):
    """A circuit whose schedule, and whatever else follows from it alone, is found out once and not in every query."""

    @classmethod
    def of(cls, circuit: Iterable[Instruction]) -> Flow:
        """Return a circuit as a Flow: itself, if it is one."""
        return circuit if isinstance(circuit, cls) else cls(circuit)

    @cached_property
    def uses(self) -> list[int]:
        """The number of times that each result is read."""
        return self._uses(range(len(self)))

    @cached_property
    def dealt(self) -> list[int]:
        """The instructions in which the dealer has a part."""
        return [index for index, instruction in enumerate(self) if instruction.protocol.deals]

    @cached_property
    def uses_dealt(self) -> list[int]:
        """The number of times that the dealer reads the mask of each result."""
        return self._uses(self.dealt)

    def _uses(self, readers: Iterable[int]) -> list[int]:
        uses = [0] * len(self)
        for reader in readers:
            for i in self[reader].inputs:
                uses[i] += 1
        return uses

    @cached_property
    def finished(self) -> list[int]:
        """The rounds of the dataflow schedule after which each result is there."""
        finished = [0] * len(self)
        for index, instruction in enumerate(self):
            before = max((finished[i] for i in instruction.inputs), default=0)
            finished[index] = before + instruction.protocol.cost().rounds
        return finished

    @cached_property
    def phases(self) -> list[list[int]]:
        """The instructions that start after 0, 1, ... rounds, in order: as soon as their operands are there."""
        phases: list[list[int]] = [[] for _ in range(max(self.finished, default=0) + 1)]
        for index, instruction in enumerate(self):
            phases[max((self.finished[i] for i in instruction.inputs), default=0)].append(index)
        return phases

    @cached_property
    def inputs(self) -> tuple[dict[int, str], dict[int, str]]:
        """The names of the inputs that each party must have, by instruction."""
        server, client = (
            {index: name for index, i in enumerate(self) if (name := i.protocol.input_of(party)) is not None}
            for party in (SERVER, CLIENT)
        )
        return server, client

    @cached_property
    def offline(self) -> list[tuple[int, bool, list[int]]]:
        """The instructions at which the client works before a query.

        With each: whether a later one of these reads its result, and which results none reads any more.
        """
        working = [index for index, instruction in enumerate(self) if instruction.protocol.works_offline]
        last = {i: index for index in working for i in self[index].inputs}
        return [(n, n in last, sorted({i for i in self[n].inputs if last[i] == n})) for n in working]

    @cached_property
    def keeps(self) -> dict[str, int]:
        """The instructions whose openings are kept for later queries, by name."""
        return {name: index for index, i in enumerate(self) if (name := i.protocol.keeps)}

    @cached_property
    def recalls(self) -> dict[str, int]:
        """The instructions that read what earlier queries kept, by name."""
        return {name: index for index, i in enumerate(self) if (name := i.protocol.recalls)}

    def short(self, party: int, offline: bool | None = None) -> list[dict[int, int]]:
        """Return which streams of a party are made together: see ``short_draws``."""
        if (found := self._short.get((party, offline))) is None:
            found = self._short[party, offline] = short_draws(self, party, offline)
        return found

    @cached_property
    def _short(self) -> dict[tuple[int, bool | None], list[dict[int, int]]]:
        return {}

    @cached_property
    def places(self) -> dict[int, slice]:
        """Each instruction's place in the joined bytes of ``deal``; instructions without corrections have none."""
        places, start = dict[int, slice](), 0
        for index, instruction in enumerate(self):
            if size := instruction.protocol.dealt_bytes:
                places[index] = slice(start, start + size)
                start += size
        return places
