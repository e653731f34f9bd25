"""Inputs of three parties: the client, who may be none of the three, splits its input between parties 0 and 1.

x = x_a + x_b modulo 2^ring. Party 1 expands x_b from a fresh seed that the client sends; party 0 gets x_a = x - x_b.
Party 2 gets nothing: its share of the value's opening comes from seeds. For the output, parties 0 and 1 add a zero
share that party 2 does not know, and send their shares to the client, who adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from protocols.fields import Flag, Name, Ring, Shape, Whole
from protocols.prg import Key
from protocols.protocol import CircuitCost, Local, Weights, bytes_of, count
from protocols.three_party import dpf
from protocols.three_party.lookup import (
    LookupKeys,
    LookupTable,
    lookup_bytes,
    lookup_keys,
    lookup_products,
    public_product,
)
from protocols.wire import Wire


class Tabled(Protocol):
    """Weights whose tables can be used for look-ups."""

    def tables(self, name: str, ring_bits: int) -> tuple[LookupTable, LookupTable]: ...


@dataclass(frozen=True)
class SharedInput(Local):
    """This party's share of the input ``name``. Rounds 0, bytes 0 between the parties."""

    kind: ClassVar[str] = "shared_input"
    in_programs: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    shape: Shape
    ring: Ring
    name: Name

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def input_of(self, party: int) -> str | None:
        return self.name

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        if tuple(x.shape) != self.shape:  # compiled loops do not check sizes
            raise ValueError(f"the input {self.name!r} has shape {tuple(x.shape)}, the Program says {self.shape}")
        return x


@dataclass(frozen=True)
class LookedUp(SharedInput):
    """This party's share of rows of the weight ``table`` at indices that only the client knows (see ``lookup``).

    The three parties look up before the circuit begins. Party 2 adds to its part a zero share, known to it and party 1,
    and sends it to party 0: ceil(ring / 8) bytes an element. If the table is public, parties 0 and 1 need no party 2.
    """

    kind: ClassVar[str] = "looked_up"
    weight_field: ClassVar[str] = "table"
    table: Name
    rows: Whole
    public: Flag = False

    @property
    def source(self) -> str:
        """The Program's input whose one-hot rows this look-up replaces."""
        return self.name.rpartition("/")[0]

    @property
    def points(self) -> int:
        """The number of rows that are looked up."""
        return count(self.shape[:-1])

    @property
    def key_bytes(self) -> int:
        """The bytes of the keys that the client sends to each party that takes part."""
        return (dpf.key_bytes if self.public else lookup_bytes)(self.points, self.rows)

    def keys(self, ids: Tensor) -> list[bytes]:
        """Client: make fresh keys of its indices, for parties 0, 1 and (unless the table is public) 2."""
        keys = (dpf.generate if self.public else lookup_keys)(ids.reshape(-1), self.rows)
        return [k.to_bytes() for k in keys]

    def rows_of(self, party: int, keys: bytes | memoryview, weights: Tabled) -> Tensor:
        """Return this party's additive share of the rows; raises FrameError if the keys have another size."""
        low, high = weights.tables(self.table, self.ring)
        if self.public:
            found = public_product(dpf.Keys.from_bytes(keys, self.points, self.rows), party, low, self.ring)
        else:
            both = LookupKeys.from_bytes(keys, self.points, self.rows)
            found = lookup_products(both.low, both.high, low, high, self.ring)
        return found.reshape(self.shape)

    def zero_share(self, key: Key, index: int) -> Tensor:
        """Return the mask that party 1 adds and party 2 subtracts: uniform words.

        key: party 1's key of the query; index: the instruction. If the table is public, it is zero: parties 0 and 1
        keep their shares, and nobody sends one.
        """
        return torch.zeros(self.shape, dtype=torch.int64) if self.public else key.stream(index).words(self.shape)

    def cost(self) -> CircuitCost:
        return CircuitCost() if self.public else CircuitCost(brought=bytes_of(self.shape, self.ring))


def seeded_share(key: Key, index: int, shape: Shape) -> Tensor:
    """Return party 1's share x_b of the input at instruction ``index``."""
    return key.stream(index).words(shape)
