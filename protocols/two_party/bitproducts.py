"""Products of several secret bits in one round: an AND of m bits, each opened once under a mask of its own.

Both parties know v' = v XOR mu of every variable v with mask mu. The product over a set S of variables is the XOR, over
all subsets T of S, of (product of mu over T) AND (product of v' over S minus T). So it is local once the dealer gives
shares of all products of two or more masks. A set of m factors takes 2^m - m - 1 dealt bits; overlapping sets share
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from protocols.protocol import SERVER

Term = frozenset[int]


@lru_cache(maxsize=64)
def mask_products(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """List every subset of two or more variables of any term, in a fixed order; each is one dealt bit an element."""
    subsets = {frozenset(c) for t in terms for size in range(2, len(t) + 1) for c in combinations(sorted(t), size)}
    return tuple(sorted(subsets, key=lambda s: (len(s), sorted(s))))


def deal(terms: tuple[Term, ...], masks: Tensor) -> Tensor:
    """Dealer: compute the mask products, (products, bytes), from the plain masks, (variables, bytes)."""
    return torch.stack([_product(masks, subset) for subset in mask_products(terms)])


def evaluate(terms: tuple[Term, ...], party: int, opened: Tensor, masks: Tensor, dealt: Tensor) -> list[Tensor]:
    """Return this party's share of every term, as planes.

    opened, masks, dealt: stacked planes of the opened variables, of this party's mask shares, and of its dealt shares.
    """
    shares: dict[Term, Tensor] = {s: dealt[i] for i, s in enumerate(mask_products(terms))}
    shares |= {frozenset((v,)): masks[v] for t in terms for v in t}
    public: dict[Term, Tensor] = {}
    return [_share(term, party, opened, shares, public) for term in terms]


def _share(term: Term, party: int, opened: Tensor, shares: Mapping[Term, Tensor], public: dict[Term, Tensor]) -> Tensor:
    def known(subset: Term) -> Tensor:
        if subset not in public:
            first, *rest = sorted(subset)
            public[subset] = opened[first] & known(frozenset(rest)) if rest else opened[first]
        return public[subset]

    total = shares[term]
    for size in range(1, len(term)):
        for chosen in combinations(sorted(term), size):
            subset = frozenset(chosen)
            total = total ^ (shares[subset] & known(term - subset))
    return total ^ known(term) if party == SERVER else total


def _product(planes: Tensor, subset: Sequence[int] | Term) -> Tensor:
    first, *rest = sorted(subset)
    out: Tensor = planes[first]
    for v in rest:
        out = out & planes[v]
    return out
