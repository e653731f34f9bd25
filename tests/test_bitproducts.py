"""Products of several bits, and intervals of digits: compiled code gives what their definitions say."""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.protocol import CLIENT, SERVER
from protocols.two_party import bitproducts, digits

TERMS = st.lists(st.frozensets(st.integers(0, 6), min_size=2, max_size=4), min_size=1, max_size=5)


def planes(seed: int, rows: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (rows, 3), np.uint8))


@settings(deadline=None)  # it is compiled first
@given(TERMS, st.integers(0, 2**32))
def test_shares_of_products(found: list[frozenset[int]], seed: int) -> None:
    terms = tuple(found)
    x, first, second = (planes(seed + i, 7) for i in range(3))
    dealt = bitproducts.deal(terms, first ^ second)
    for product, subset in zip(dealt, bitproducts.mask_products(terms), strict=True):
        assert product.equal(reduce(torch.bitwise_and, ((first ^ second)[v] for v in subset)))
    other, opened = planes(seed + 3, len(dealt)), x ^ first ^ second
    a = bitproducts.evaluate(terms, SERVER, opened, first, dealt ^ other)
    b = bitproducts.evaluate(terms, CLIENT, opened, second, other)
    for term, mine, theirs in zip(terms, a, b, strict=True):
        assert (mine ^ theirs).equal(reduce(torch.bitwise_and, (x[v] for v in term)))


@settings(deadline=None)
@given(st.integers(1, digits.DIGIT_BITS), st.integers(0, 2**32), st.integers(1, 70))
def test_intervals(width: int, seed: int, n: int) -> None:
    """Around zero too; of more elements than digits one row a digit is kept."""
    size, rng = 1 << width, np.random.default_rng(seed)
    first, below = int(rng.integers(size)), int(rng.integers(1, size))
    top = torch.from_numpy(rng.integers(0, size, n))
    rows = digits._intervals(top, size, first, below)
    assert len(rows.table) == min(n, size)
    found = np.unpackbits(rows.table.numpy()[rows.row.numpy()], axis=1, bitorder="little")
    inside = (np.arange(size) - top.numpy()[:, None] - first) % size < below
    assert (found[:, :size] == inside).all()
    assert not found[:, size:].any()
