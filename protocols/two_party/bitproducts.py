"""Products of several secret bits in one round: an AND of m bits, each opened once under a mask of its own.

Both parties know v' = v XOR mu of every variable v with mask mu. The product over a set S of variables is the XOR, over
all subsets T of S, of (product of mu over T) AND (product of v' over S minus T). So it is local once the dealer gives
shares of all products of two or more masks. A set of m factors takes 2^m - m - 1 dealt bits; overlapping sets share
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protocols.kernels import Array, compiled
from protocols.protocol import SERVER

Term = frozenset[int]


@lru_cache(maxsize=64)
def mask_products(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """List every subset of two or more variables of any term, in a fixed order; each is one dealt bit an element."""
    subsets = {frozenset(c) for t in terms for size in range(2, len(t) + 1) for c in combinations(sorted(t), size)}
    return tuple(sorted(subsets, key=lambda s: (len(s), sorted(s))))


def deal(terms: tuple[Term, ...], masks: Tensor) -> Tensor:
    """Dealer: compute the mask products, (products, bytes), from the plain masks, (variables, bytes)."""
    if masks.device.type == "cpu":
        subsets = _plan(terms).subsets
        out = np.empty((len(subsets), masks.shape[1]), np.uint8)
        _multiply(masks.numpy(), subsets, out)
        return torch.from_numpy(out)
    return torch.stack([_product(masks, subset) for subset in mask_products(terms)])


def evaluate(terms: tuple[Term, ...], party: int, opened: Tensor, masks: Tensor, dealt: Tensor) -> Sequence[Tensor]:
    """Return this party's share of every term, as planes.

    opened, masks, dealt: stacked planes of the opened variables, of this party's mask shares, and of its dealt shares.
    """
    if opened.device.type == "cpu":
        plan = _plan(terms)
        out = np.zeros((len(terms), opened.shape[1]), np.uint8)
        whole = plan.whole if party == SERVER else plan.whole[:0]
        _evaluate(opened.numpy(), masks.numpy(), dealt.numpy(), plan.known, plan.summands, whole, out)
        return torch.unbind(torch.from_numpy(out))
    shares: dict[Term, Tensor] = {s: dealt[i] for i, s in enumerate(mask_products(terms))}
    shares |= {frozenset((v,)): masks[v] for t in terms for v in t}
    public: dict[Term, Tensor] = {}
    return [_share(term, party, opened, shares, public) for term in terms]


class _Plan(NamedTuple):
    """The products that terms need, as numbers for compiled code.

    subsets: of each mask product the place of the one with a variable less (of a single variable, -1 - it), and that
    variable. known: the same of the products of opened variables, after the empty one. summands: of each share that is
    multiplied, its term, its place among the dealt ones (of a mask, -1 - it), and the place of its factor among the
    known. whole: that of each term itself.
    """

    subsets: Array
    known: Array
    summands: Array
    whole: Array


@lru_cache(maxsize=64)
def _plan(terms: tuple[Term, ...]) -> _Plan:
    dealt = mask_products(terms)
    known: dict[Term, int] = {frozenset(): 0}
    for term in terms:
        for size in range(1, len(term) + 1):
            for chosen in combinations(sorted(term), size):
                known.setdefault(frozenset(chosen), len(known))
    place = {subset: i for i, subset in enumerate(dealt)} | {frozenset((v,)): -1 - v for t in terms for v in t}
    summands = [
        (i, place[frozenset(chosen)], known[term - frozenset(chosen)])
        for i, term in enumerate(terms)
        for size in range(1, len(term) + 1)
        for chosen in combinations(sorted(term), size)
    ]

    def numbers(rows: Iterable[tuple[int, ...]], columns: int) -> Array:
        return np.array(list(rows), np.int64).reshape(-1, columns)

    return _Plan(
        numbers(((place[s - {max(s)}], max(s)) for s in dealt), 2),
        numbers(((known[s - {max(s)}], max(s)) for s in list(known)[1:]), 2),
        numbers(summands, 3),
        np.array([known[term] for term in terms], np.int64),
    )


@compiled
def _multiply(masks: Array, subsets: Array, out: Array) -> None:
    for i in range(len(subsets)):
        before, variable = subsets[i]
        less, last = (masks[-1 - before] if before < 0 else out[before]), masks[variable]
        for j in range(last.size):
            out[i, j] = less[j] & last[j]


@compiled
def _evaluate(
    opened: Array, masks: Array, dealt: Array, known: Array, summands: Array, whole: Array, out: Array
) -> None:
    products = np.empty((len(known) + 1, opened.shape[1]), np.uint8)
    products[0] = 0xFF
    for i in range(len(known)):
        before, last = products[known[i, 0]], opened[known[i, 1]]
        for j in range(last.size):
            products[i + 1, j] = before[j] & last[j]
    for i in range(len(summands)):
        term, place, factor = summands[i]
        share, other, sums = (masks[-1 - place] if place < 0 else dealt[place]), products[factor], out[term]
        for j in range(sums.size):
            sums[j] ^= share[j] & other[j]
    for i in range(len(whole)):
        for j in range(out.shape[1]):
            out[i, j] ^= products[whole[i], j]


def warm_up() -> None:
    """Compile what is compiled here."""
    terms, planes = (frozenset((0, 1)),), torch.zeros(2, 1, dtype=torch.uint8)
    evaluate(terms, SERVER, planes, planes, deal(terms, planes))


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
