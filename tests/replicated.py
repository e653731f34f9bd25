"""Replicated sharing by its definition: the oracle that what three parties hold is compared with.

x = x_0 + x_1 + x_2 modulo 2^64 (or by XOR), where party i holds (x_i, x_(i+1)). Any two parties know x; what one of
them holds is uniform and says nothing of it. Each summand has two holders, which is what lets them notice that one of
the copies was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from protocols.prg import Stream
from protocols.protocol import Opening
from protocols.three_party.sharing import HOLDERS, PARTIES, PARTY_2


class CopiesDiffer(ValueError):
    """Two parties hold different copies of one summand."""


class Pair(NamedTuple):
    """What party i holds of one value: summands i and i + 1 modulo 3."""

    first: Tensor
    second: Tensor


def share(x: Tensor, zero: Stream, two: Stream) -> tuple[Pair, Pair, Pair]:
    """The pairs of parties 0, 1, 2. Only x_1 depends on x; x_0 and x_2 are read from the streams of their holders.

    x: int64, shared modulo 2^64; or uint8 planes, shared by XOR.
    """
    x_0, x_2 = (s.planes(tuple(x.shape)) if x.dtype == torch.uint8 else s.words(tuple(x.shape)) for s in (zero, two))
    x_1 = x ^ x_0 ^ x_2 if x.dtype == torch.uint8 else x - x_0 - x_2
    return Pair(x_0, x_1), Pair(x_1, x_2), Pair(x_2, x_0)


def reconstruct(pairs: Mapping[int, Pair]) -> Tensor:
    """The value behind the pairs of two or three parties, unreduced; CopiesDiffer names a summand and its holders."""
    summands: dict[int, Tensor] = {}
    for party, pair in pairs.items():
        for j, value in zip((party, (party + 1) % PARTIES), pair, strict=True):
            if j in summands and not torch.equal(summands[j], value):
                raise CopiesDiffer(f"parties {HOLDERS[j][0]} and {HOLDERS[j][1]} hold different copies of summand {j}")
            summands[j] = value
    if len(summands) < PARTIES:
        raise ValueError("the pairs of two parties are needed")
    a, b, c = (summands[j] for j in range(PARTIES))
    return a ^ b ^ c if a.dtype == torch.uint8 else a + b + c


def held(party: int, opening: Opening, other: Tensor | None = None) -> Pair:
    """An opening as this party's pair. Parties 0 and 1 hold z and a mask; party 2 both masks (``other``: r_1), no z."""
    value, mask = opening
    if (party == PARTY_2) != (other is not None):
        raise ValueError("party 2 holds both masks of an opening, parties 0 and 1 one each")
    if other is not None:
        return Pair(_negated(other), _negated(mask))
    return Pair(_negated(mask), value) if party == 0 else Pair(value, _negated(mask))


def _negated(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.uint8 else -mask


def product(x: Pair, y: Pair, times: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """This party's summand of x y, for any bilinear ``times`` of numbers (not of bits):
    x_i y_i + x_i y_(i+1) + x_(i+1) y_i (Araki et al.).
    """
    return times(x.first, y.first + y.second) + times(x.second, y.first)
