"""What a cost can be counted of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from protocols.circuit import Circuit


class Runnable(Protocol):
    """What a cost can be counted of: a Program, or what a deployment makes of it."""

    @property
    def circuit(self) -> Circuit: ...
    @property
    def output(self) -> int: ...
    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]: ...


@dataclass(frozen=True, eq=False)
class Deployed:
    """``names``: of the party that gets corrections, and of the other one."""

    circuit: Circuit
    output: int
    paths: tuple[str, ...]
    weight_shapes: Mapping[str, tuple[int, ...]]
    names: tuple[str, str]
