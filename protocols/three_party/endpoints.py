"""Where a value enters: the client, who may be none of the three parties, splits it between parties 0 and 1.

x = x_a + x_b modulo 2^ring, x_b expanded from a fresh seed that party 1 gets, x_a = x - x_b sent to party 0. Party 2
gets nothing: its share of the value's opening comes from seeds. The output goes the other way: parties 0 and 1 send
their shares to the client, whose sum it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from protocols.prg import Key
from protocols.protocol import Local, Shape, Weights
from protocols.wire import Wire


@dataclass(frozen=True)
class SharedInput(Local):
    """This party's share of the input ``name``. Rounds 0, bytes 0 between the parties."""

    kind: ClassVar[str] = "shared_input"
    in_programs: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    shape: Shape
    ring: int
    name: str

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def input_of(self, party: int) -> str | None:
        return self.name

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        if tuple(x.shape) != self.shape:  # compiled loops trust sizes
            raise ValueError(f"the input {self.name!r} has shape {tuple(x.shape)}, the Program says {self.shape}")
        return x


def seeded_share(key: Key, index: int, shape: Shape) -> Tensor:
    """x_b of the input that is instruction ``index``."""
    return key.stream(index).words(shape)
