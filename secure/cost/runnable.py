"""Circuits whose cost can be counted: a Program, or its circuit as a deployment runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from protocols.circuit import total_cost
from protocols.flow import Circuit
from protocols.protocol import CircuitCost


class Runnable(Protocol):
    """A circuit whose cost can be counted: a Program, or its circuit as a deployment runs it."""

    @property
    def circuit(self) -> Circuit: ...
    @property
    def revealed(self) -> tuple[int, ...]:
        """The instructions whose results the client gets."""
        ...

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]: ...


@dataclass(frozen=True, eq=False)
class Deployed:
    """A Program's circuit as one deployment runs it.

    names: the first party, which gets corrections ahead of a query, and the second. dealer: the role that sends them.
    """

    circuit: Circuit
    revealed: tuple[int, ...]
    paths: tuple[str, ...]
    weight_shapes: Mapping[str, tuple[int, ...]]
    names: tuple[str, str]
    dealer: str

    @cached_property
    def cost(self) -> CircuitCost:
        """The rounds and bytes of one query."""
        return total_cost(self.circuit)
