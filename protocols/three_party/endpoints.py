"""Inputs of three parties: the client, who may be none of the three, splits its input between parties 0 and 1.

x = x_a + x_b modulo 2^ring. Party 1 expands x_b from a fresh seed that the client sends; party 0 gets x_a = x - x_b.
Party 2 gets nothing: its share of the value's opening comes from seeds. For the output, parties 0 and 1 add a zero
share that party 2 does not know, and send their shares to the client, who adds them up.

A client can share any ring element, and send any bytes as look-up keys: see ``checks`` for what the parties do about
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from protocols.three_party.sharing import PARTIES
from protocols.three_party.sketch import Sketch, joined
from protocols.wire import Wire

Coins = Mapping[int, Key]
"""By another party, the key with which the two sketch pairs of look-up keys; the client must not know it."""


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
class FromKeys(SharedInput):
    """Base of the inputs that come of look-up keys: the parties compute their shares before the circuit begins.

    Party 2 adds to its part a zero share, known to it and party 1, and sends it to party 0: ring / 8 bytes an
    element. If the table is public, parties 0 and 1 need no party 2.
    """

    public: Flag = field(default=False, kw_only=True)

    def zero_share(self, key: Key, index: int) -> Tensor:
        """Return the mask that party 1 adds and party 2 subtracts: uniform words.

        key: party 1's key of the query; index: the instruction. If the table is public, it is zero: parties 0 and 1
        keep their shares, and nobody sends one.
        """
        return torch.zeros(self.shape, dtype=torch.int64) if self.public else key.stream(index).words(self.shape)

    def cost(self) -> CircuitCost:
        return CircuitCost() if self.public else CircuitCost(brought=bytes_of(self.shape, self.ring))


@dataclass(frozen=True)
class KeySketch(FromKeys):
    """This party's share of the sketch of a look-up's keys (see ``sketch``): what ``checks.UnitVectors`` reads.

    Shape: (points, pairs of keys + 3), words.
    """

    kind: ClassVar[str] = "key_sketch"


@dataclass(frozen=True)
class LookedUp(FromKeys):
    """This party's share of rows of the weight ``table`` at indices that only the client knows (see ``lookup``).

    sketch: the name of the ``KeySketch`` of its keys; "" if clients are trusted.
    """

    kind: ClassVar[str] = "looked_up"
    weight_field: ClassVar[str] = "table"
    table: Name
    rows: Whole
    sketch: Name = field(default="", kw_only=True)

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

    @property
    def pairs(self) -> int:
        """The pairs of keys of each index."""
        return 1 if self.public else PARTIES

    def shares(
        self, party: int, keys: bytes | memoryview, weights: Tabled, coins: Coins, index: int
    ) -> dict[str, Tensor]:
        """Return this party's additive shares of the rows and of the sketch, by the names of these inputs.

        coins: keys of this query; index: the instruction, which names a stream of each. Any bytes of the right size
        give shares; raises FrameError if the keys have another size.
        """
        low, high = weights.tables(self.table, self.ring)
        sketches = {}
        if self.sketch:
            sketches = {
                pair: Sketch(self.points, key, coins[other].stream(index)) for pair, key, other in self._held(party)
            }
        if self.public:
            own = dpf.Keys.from_bytes(keys, self.points, self.rows)
            found = public_product(own, party, low, self.ring, *sketches.values())
        else:
            both = LookupKeys.from_bytes(keys, self.points, self.rows)
            found = lookup_products(both.low, both.high, low, high, self.ring, *sketches.values())
        rows = {self.name: found.reshape(self.shape)}
        return rows | {self.sketch: joined(sketches, self.pairs)} if sketches else rows

    def _held(self, party: int) -> list[tuple[int, int, int]]:
        """List the pairs of keys of which this party has one: the pair, which key of it, and who has the other."""
        if self.public:
            return [(0, party, 1 - party)]
        after = (party + 1) % PARTIES
        return [(party, 0, (party - 1) % PARTIES), (after, 1, after)]


def seeded_share(key: Key, index: int, shape: Shape) -> Tensor:
    """Return party 1's share x_b of the input at instruction ``index``."""
    return key.stream(index).words(shape)
