"""Shared weights W = W_0 + W_1 + W_2 modulo 2^64: each party's part, in the form that products need.

Parties 2 and 0 expand W_0 from their seed, and parties 1 and 2 expand W_2 from theirs. The model's owner writes
W_1 = W - W_0 - W_2 once, for parties 0 and 1. So party 2 stores two seeds, whatever the model's size.

For x W with x opened as z = x + r, r = r_0 + r_1:  x W = (z - r)(W_0 + W_1 + W_2) is the sum of

    party 0    z W_0 - r_0 W_1                = [z, -r_0] [W_0; W_1]
    party 1    z (W_1 + W_2) - r_1 W_1        = [z, -r_1] [W_1 + W_2; W_1]
    party 2    -r (W_0 + W_2)

Parties 0 and 1 each compute one matrix product of twice the inner dimension; its right side is stacked and packed for
the matrix kernel once. (Compared with the product of pairs of Araki et al., party 2 computes x_0 W_0 and x_2 W_2 here,
so that it needs only r and W_0 + W_2.)
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from protocols import ring
from protocols.matmul import Matrix
from protocols.prg import Key
from protocols.protocol import Shape, Weights
from protocols.three_party.lookup import LookupTable
from protocols.weights import DealerWeights, ServerWeights


def summand(key: Key, name: str, shape: Shape) -> Tensor:
    """Return W_0 or W_2 of one weight: uniform 64-bit words from its holders' key; the name determines the stream."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return key.stream(number).words(shape)


def masked(
    integers: Mapping[str, Tensor], zero: Key, two: Key, rings: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, W_1 = W - W_0 - W_2) for every weight in ``rings``, reduced to its bits there.

    zero, two: the keys of W_0 and W_2. W_1 is uniform to everyone who lacks one of these keys.
    """
    for name, bits in rings.items():
        w, shape = integers[name], tuple(integers[name].shape)
        yield name, ring.reduce(w - summand(zero, name, shape) - summand(two, name, shape), bits)


class _Tables:
    """Pairs of token tables, each packed once; a look-up waits for a packing that is under way."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[LookupTable, LookupTable]] = {}
        self._lock = threading.Lock()

    def get(
        self, name: str, ring_bits: int, pair: Callable[[str], tuple[Tensor, Tensor]]
    ) -> tuple[LookupTable, LookupTable]:
        with self._lock:
            if (name, ring_bits) not in self._known:
                low, high = pair(name)
                first = LookupTable(low, ring_bits)
                self._known[name, ring_bits] = first, first if high is low else LookupTable(high, ring_bits)
            return self._known[name, ring_bits]


class SharedWeights(Weights):
    """The weights of party 0 or 1: W_1 (``masked``) and its own summand, W_0 or W_2, expanded from ``key``."""

    def __init__(self, party: int, key: Key, masked: Mapping[str, Tensor]) -> None:
        self._party, self._key, self._masked = party, key, dict(masked)
        self._packed: dict[tuple[str, int], Matrix] = {}
        self._tables = _Tables()

    def opened_product(self, value: Tensor, mask: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        """Return this party's summand of x W (or x * W) modulo 2^ring_bits, from an opening of x."""
        if diagonal:
            left, w_1 = self._left(name), self._masked[name]
            return value * left - mask * w_1
        return self._stacked(name, ring_bits).times(torch.cat([value, -mask], dim=-1))

    def pack(self, name: str, ring_bits: int, rows: int) -> None:
        """Make a matrix ready for products of so many rows modulo 2^ring_bits."""
        self._stacked(name, ring_bits).pack(rows)

    def _stacked(self, name: str, ring_bits: int) -> Matrix:
        """Return the factors of z and of r, one below the other, ready for products modulo 2^ring_bits."""
        if (found := self._packed.get((name, ring_bits))) is None:
            stacked = torch.cat([self._left(name), self._masked[name]])
            found = self._packed[name, ring_bits] = Matrix(stacked, ring_bits, signed=False, held=False)
        return found

    def _left(self, name: str) -> Tensor:
        """Return the factor of z: W_0 (party 0) or W_1 + W_2 (party 1)."""
        own = summand(self._key, name, tuple(self._masked[name].shape))
        return own + self._masked[name] if self._party else own

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return this party's pair of summands, (W_i, W_(i+1))."""
        own = summand(self._key, name, tuple(self._masked[name].shape))
        return (self._masked[name], own) if self._party else (own, self._masked[name])

    def tables(self, name: str, ring_bits: int) -> tuple[LookupTable, LookupTable]:
        """Return the pair of summands of a token table, packed for look-ups on first use."""
        return self._tables.get(name, ring_bits, self.pair)

    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        raise LookupError(f"{name!r} is shared: nobody multiplies with it alone")

    def summand(self, name: str) -> Tensor:
        """Return this party's summand of an added weight: W_0 + W_1 (party 0) or W_2 (party 1)."""
        own = summand(self._key, name, tuple(self._masked[name].shape))
        return own if self._party else own + self._masked[name]


class Party2Weights(DealerWeights):
    """The weights of party 2: W_0 + W_2, expanded on first use from the keys of W_0 and W_2."""

    def __init__(self, zero: Key, two: Key, shapes: Mapping[str, Shape]) -> None:
        super().__init__(zero, shapes)
        self._zero, self._two = zero, two
        self._tables = _Tables()

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return this party's pair of summands, (W_2, W_0)."""
        shape = self._shapes[name]
        return summand(self._two, name, shape), summand(self._zero, name, shape)

    def tables(self, name: str, ring_bits: int) -> tuple[LookupTable, LookupTable]:
        return self._tables.get(name, ring_bits, self.pair)

    def mask(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return summand(self._zero, name, shape) + summand(self._two, name, shape)


class PublicWeights(ServerWeights):
    """Weights that all three parties know, because the deployment declares them public."""

    def __init__(self, party: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._party, self._tables = party, _Tables()

    def tables(self, name: str, ring_bits: int) -> tuple[LookupTable, LookupTable]:
        """Return the table itself, twice."""
        return self._tables.get(name, ring_bits, lambda n: (self._tensors[n],) * 2)

    def summand(self, name: str) -> Tensor | None:
        return None if self._party else super().summand(name)
