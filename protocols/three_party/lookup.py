"""Look up rows of a shared table at indices that only the client knows: additive shares of T[ids], without a round.

A table T of (V, d) integers is shared in replicated form, T = T0 + T1 + T2 modulo 2^ring: server i holds T_i (low) and
T_{i+1} (high). For every index and every component T_j the client makes a pair of DPF keys (``dpf``): key 0 goes to
server j, key 1 to server j - 1, the two holders of T_j. A server evaluates both of its keys on all V rows and
multiplies: e_i T_i + e'_{i+1} T_{i+1}, where e_j + e'_j is the unit vector of the index. The three results add up to
T[id] modulo 2^ring, exactly.

A client sends 2 keys an index to each server, ``lookup_bytes``: 6 keys, 1548 bytes an index for V = 30 522. A server
computes 2 V d multiply-accumulates an index.

Seen by a server: one key of each of two independent pairs. So it learns how many indices there are, but not which (see
``dpf``), and of T only its own two components. The client receives nothing. The shares are not uniform (for V < d they
lie in the span of few rows), and another server, which holds one of the two components, could test guesses of the index
against a share: before a server sends its share, it must add its share of zero.

A client may send anything. So the holders of each pair sketch what they evaluate (see ``sketch``), unless clients are
trusted: an index whose keys do not select one row, the same of all three components, ends the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protocols import ring
from protocols.matmul import Matrix
from protocols.prg import KEY_BYTES, Key
from protocols.three_party import dpf
from protocols.three_party.dpf import Keys
from protocols.three_party.sketch import Sketch
from protocols.wire import FrameError

SERVERS = 3


class LookupTable:
    """One component of a shared table, (V, d) residues, packed at most once for products modulo 2^ring.

    It is cut into slices of rows, which takes two thirds of the time of one long product: a slice's shares stay in
    cache.
    """

    def __init__(self, component: Tensor, ring_bits: int) -> None:
        self.domain, self.width = component.shape
        self.ring_bits = ring_bits
        self._slices = [Matrix(rows, ring_bits, signed=False, held=False) for rows in component.split(dpf.SLICE)]

    def __repr__(self) -> str:
        return f"LookupTable({self.domain} rows of {self.width}, {self.ring_bits} bits)"

    def pack(self, points: int) -> None:
        """Make it ready for look-ups of so many rows at a time."""
        for each in self._slices:
            each.pack(points)

    def add_product(self, total: Tensor, shares: Tensor, first: int) -> None:
        """Add shares @ rows to ``total``, in place.

        shares: (P, n), those of rows first, ..., first + n - 1; ``first`` is a multiple of SLICE.
        """
        start = first // dpf.SLICE
        for number, part in enumerate(shares.split(dpf.SLICE, dim=1), start):
            total += self._slices[number].times(part)


@dataclass(frozen=True, eq=False)
class LookupKeys:
    """The client's keys for one server: key 0 of each pair for its low component, key 1 for its high component."""

    low: Keys
    high: Keys

    def to_bytes(self) -> bytes:
        return self.low.to_bytes() + self.high.to_bytes()

    @staticmethod
    def from_bytes(buffer: bytes | memoryview, points: int, domain: int) -> LookupKeys:
        """Decode keys that ``to_bytes`` encoded; raises FrameError on a wrong size."""
        if len(buffer) != lookup_bytes(points, domain):
            expected = lookup_bytes(points, domain)
            raise FrameError(f"a lookup of {points} rows among {domain} takes {expected} bytes, got {len(buffer)}")
        half = len(buffer) // 2
        low, high = (Keys.from_bytes(part, points, domain) for part in (buffer[:half], buffer[half:]))
        return LookupKeys(low, high)


def lookup_bytes(points: int, domain: int) -> int:
    """Return the bytes that the client sends to each server."""
    return 2 * dpf.key_bytes(points, domain)


def lookup_keys(ids: Sequence[int] | Tensor, domain: int) -> tuple[LookupKeys, LookupKeys, LookupKeys]:
    """Client: make fresh keys, by server; raises ValueError if an index is not below ``domain``."""
    pairs = [dpf.generate(ids, domain) for _ in range(SERVERS)]
    first, second, third = (LookupKeys(pairs[i][0], pairs[(i + 1) % SERVERS][1]) for i in range(SERVERS))
    return first, second, third


def lookup_products(
    keys_low: Keys,
    keys_high: Keys,
    table_low: LookupTable,
    table_high: LookupTable,
    ring_bits: int,
    sketch_low: Sketch | None = None,
    sketch_high: Sketch | None = None,
) -> Tensor:
    """Return a server's additive share of T[ids] modulo 2^ring_bits, (P, d); ring_bits is at most that of the tables.

    sketch_low, sketch_high: what the vectors of ``keys_low`` and ``keys_high`` are added to; None: no sketch.
    It holds a few megabytes beside the keys and the result, whatever V and P are (see ``dpf.slices``).
    """
    shape = len(keys_low), table_low.width
    if len(keys_high) != shape[0] or table_high.width != shape[1]:
        raise ValueError(f"{keys_low!r} and {keys_high!r} for {table_low!r} and {table_high!r}")
    total = torch.zeros(shape, dtype=torch.int64)
    _add_rows(total, keys_low, 0, table_low, ring_bits, sketch_low)
    _add_rows(total, keys_high, 1, table_high, ring_bits, sketch_high)
    return ring.reduce(total, ring_bits)


def public_product(keys: Keys, party: int, table: LookupTable, ring_bits: int, sketch: Sketch | None = None) -> Tensor:
    """Return a share of T[ids] for a table that two servers know: one pair of keys, of which this is key ``party``."""
    total = torch.zeros((len(keys), table.width), dtype=torch.int64)
    _add_rows(total, keys, party, table, ring_bits, sketch)
    return ring.reduce(total, ring_bits)


def _add_rows(total: Tensor, keys: Keys, party: int, table: LookupTable, ring_bits: int, sketch: Sketch | None) -> None:
    if keys.domain != table.domain or ring_bits > table.ring_bits:
        raise ValueError(f"{keys!r} for {table!r}, modulo 2^{ring_bits}")
    for points, rows, shares in dpf.slices(keys, party):
        table.add_product(total[points], shares, rows.start)
        if sketch is not None:
            sketch.add(points, rows.start, shares)


def warm_up() -> None:
    """Compile the kernels of a look-up, or load them from the cache, so that no query waits for the compiler."""
    table, domain = LookupTable(torch.zeros((9, 1), dtype=torch.int64), ring.WORD), 9
    stream = Key(bytes(KEY_BYTES)).stream(0)  # of a look-up of nothing
    for keys in lookup_keys([0], domain):
        received = LookupKeys.from_bytes(keys.to_bytes(), 1, domain)
        sketches = Sketch(1, 0, stream), Sketch(1, 1, stream)
        lookup_products(received.low, received.high, table, table, ring.WORD, *sketches)
