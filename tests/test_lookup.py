"""Distributed point functions, and rows of a table that three servers share, at indices that none of them learns."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from protocols import matmul, ring, wire
from protocols.three_party import dpf, lookup
from protocols.three_party.dpf import Keys
from protocols.three_party.endpoints import LookedUp
from protocols.three_party.lookup import LookupKeys, LookupTable, lookup_keys, lookup_products
from protocols.wire import FrameError
from tests.helpers import key
from tests.three import held_weights
from tests.uniformity import leaks

EDGES = sorted({size for k in range(9) for size in (2**k - 1, 2**k, 2**k + 1) if size})
DOMAINS = st.sampled_from(EDGES) | st.integers(1, 300)
FALSE_ALARM = 1e-9  # of each statistical test


@st.composite
def points_and_domain(draw: st.DrawFn) -> tuple[list[int], int]:
    domain = draw(DOMAINS)
    points = st.sampled_from([0, domain - 1]) | st.integers(0, domain - 1)
    return draw(st.lists(points, max_size=6)), domain


def unit_vectors(points: list[int], domain: int) -> Tensor:
    out = torch.zeros((len(points), domain), dtype=torch.int64)
    out[torch.arange(len(points)), torch.tensor(points, dtype=torch.int64)] = 1
    return out


def uniform(*shape: int) -> Tensor:
    words = np.frombuffer(bytearray(secrets.token_bytes(8 * int(np.prod(shape)))), dtype=np.int64)
    return torch.from_numpy(words).reshape(shape)


# point functions


def check_pair(points: list[int], domain: int) -> None:
    pair = dpf.generate(points, domain)
    received = [Keys.from_bytes(keys.to_bytes(), len(points), domain) for keys in pair]
    shares = [dpf.evaluate(keys, party) for party, keys in enumerate(received)]
    assert shares[0].shape == (len(points), domain)
    assert shares[0].dtype == torch.int64
    assert torch.equal(shares[0] + shares[1], unit_vectors(points, domain))
    for party, keys in enumerate(pair):  # neither the bytes nor a second evaluation change anything
        assert torch.equal(dpf.evaluate(keys, party), shares[party])
        assert received[party].to_bytes() == keys.to_bytes()


@settings(deadline=None)
@given(points_and_domain())
@example(([0], 1))
@example(([0, 1], 2))
@example(([2, 1, 0], 3))
@example(([], 7))
def test_shares_add_up_to_unit_vectors(case: tuple[list[int], int]) -> None:
    check_pair(*case)


@pytest.mark.parametrize("domain", EDGES)
def test_every_point_of_a_domain(domain: int) -> None:
    check_pair(list(range(domain)), domain)


S = dpf.SLICE


@pytest.mark.parametrize("domain", [S - 1, S, S + 1, 2 * S + 3, 4 * S, 5 * S - 2])
@pytest.mark.parametrize("count", [1, 40, 300])
def test_slices(domain: int, count: int) -> None:
    """Domains of several slices, few points (many slices at once) and more points than are evaluated at a time."""
    edges = [0, domain - 1, domain // 2, S - 2]
    check_pair((edges * 75)[:count], domain)
    seen = torch.zeros((count, domain), dtype=torch.int64)
    for rows, columns, values in dpf.slices(dpf.generate([0] * count, domain)[0], 0):
        assert columns.start % S == 0
        assert values.numel() <= max(256 * S, 1 << 17)
        seen[rows, columns] += 1
    assert (seen == 1).all()


def test_points_may_be_a_tensor() -> None:
    first, second = dpf.generate(torch.tensor([4, 2]), 5)
    assert torch.equal(dpf.evaluate(first, 0) + dpf.evaluate(second, 1), unit_vectors([4, 2], 5))


@settings(deadline=None)
@given(points_and_domain(), st.integers(0, 10**6))
def test_sizes(case: tuple[list[int], int], junk: int) -> None:
    points, domain = case
    depth = max(0, (domain - 1).bit_length() - 2)
    size = len(points) * (16 + 16 * depth + -(-depth // 8) + 32)
    assert dpf.key_bytes(len(points), domain) == size
    raw = dpf.generate(points, domain)[0].to_bytes()
    assert len(raw) == size
    wrong = junk if junk != size else size + 1
    for other in (bytes(wrong), raw + b"\0", raw[:-1] if raw else b"\0"):
        with pytest.raises(FrameError, match=rf"take {size} bytes, got"):
            Keys.from_bytes(other, len(points), domain)


def test_size_of_a_token() -> None:
    assert dpf.key_bytes(1, 30522) == 258
    assert lookup.lookup_bytes(1, 30522) == 516


@pytest.mark.parametrize(("points", "domain"), [([3], 3), ([-1], 3), ([0, 9], 9), ([0], 0), ([[0]], 3)])
def test_points_outside_the_domain(points: list[int], domain: int) -> None:
    with pytest.raises(ValueError, match="points are a list of indices below the domain"):
        dpf.generate(points, domain)


def test_wrong_arguments() -> None:
    keys, _ = dpf.generate([0], 3)
    with pytest.raises(ValueError, match="keys 0 and 1, not 2"):
        dpf.evaluate(keys, 2)
    for points, domain in ((-1, 3), (1, 0)):
        with pytest.raises(ValueError, match="no keys of"):
            Keys.from_bytes(b"", points, domain)


def test_repr_hides_content() -> None:
    keys, _ = dpf.generate([5, 5], 77)
    assert repr(keys) == str(keys) == "Keys(2 points, domain 77)"
    sent = lookup_keys([5, 5], 77)[0]
    assert repr(sent) == f"LookupKeys(low={keys!r}, high={keys!r})"
    assert repr(LookupTable(uniform(77, 2), 64)) == "LookupTable(77 rows of 2, 64 bits)"


# what one key shows


def bytes_without_padding(keys: Keys) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """(P, bytes): the control bits, which do not fill their bytes, looked at apart."""
    raw, depth = np.frombuffer(keys.to_bytes(), dtype=np.uint8), dpf.levels(keys.domain)
    ends = len(keys) * np.cumsum([16, 16 * depth, -(-depth // 8)])
    roots, corrections, _, outputs = np.split(raw, ends)
    return np.concatenate([part.reshape(len(keys), -1) for part in (roots, corrections, outputs)], axis=1)


def control_bits(keys: Keys) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return (keys.corrections[:, :, :, 0] & np.uint64(1)).reshape(len(keys), -1)


@pytest.mark.parametrize("party", [0, 1])
@pytest.mark.parametrize("point", [0, 1, 2, 3, 36, 99])
def test_a_key_is_uniform_whatever_its_point(point: int, party: int) -> None:
    """Every byte over many keys of one point, by chi-square; so keys of two points look the same."""
    keys, count = dpf.generate([point] * 4096, 100)[party], 4096
    raw = bytes_without_padding(keys)
    p_values = [stats.chisquare(np.bincount(column, minlength=256)).pvalue for column in raw.T]
    assert min(p_values) > FALSE_ALARM / raw.shape[1]
    # each bit, control bits too, is as often one as zero: not so if a leaf's cleared bit came through
    bits = np.concatenate([np.unpackbits(raw, axis=1), control_bits(keys)], axis=1).sum(axis=0, dtype=np.int64)
    assert stats.binom.sf(abs(bits - count / 2).max() + count / 2, count, 0.5) > FALSE_ALARM / bits.size


@pytest.mark.parametrize("party", [0, 1])
@pytest.mark.parametrize("point", [0, 5, 8])
def test_one_share_is_uniform(point: int, party: int) -> None:
    """Every byte of the share of every value, the point's as the others'."""
    shares = dpf.evaluate(dpf.generate([point] * 4096, 9)[party], party)
    raw = shares.numpy().view(np.uint8)
    p_values = [stats.chisquare(np.bincount(column, minlength=256)).pvalue for column in raw.T]
    assert min(p_values) > FALSE_ALARM / raw.shape[1]
    assert len(torch.unique(shares)) == shares.numel()


def test_keys_are_fresh() -> None:
    """Equal points, in one call or two, and the two keys of a pair have no root and no correction in common."""
    first, second = dpf.generate([3, 3], 50), dpf.generate([3, 3], 50)
    roots = [keys.roots[p].tobytes() for keys in (*first, *second) for p in range(2)]
    assert len(set(roots)) == 8
    for part in ("corrections", "outputs"):
        rows = [getattr(keys, part)[p].tobytes() for keys in (first[0], second[0]) for p in range(2)]
        assert len(set(rows)) == 4


# lookups


def share(table: Tensor) -> list[Tensor]:
    first, second = uniform(*table.shape), uniform(*table.shape)
    return [first, second, table - first - second]


def looked_up(keys: list[LookupKeys], parts: list[Tensor], ring_bits: int) -> list[Tensor]:
    tables = [LookupTable(part, ring_bits) for part in parts]
    return [
        lookup_products(sent.low, sent.high, tables[i], tables[(i + 1) % 3], ring_bits) for i, sent in enumerate(keys)
    ]


def check_lookup(ids: list[int], table: Tensor, ring_bits: int) -> None:
    domain = len(table)
    sent = [keys.to_bytes() for keys in lookup_keys(ids, domain)]
    assert {len(raw) for raw in sent} == {lookup.lookup_bytes(len(ids), domain)}
    received = [LookupKeys.from_bytes(raw, len(ids), domain) for raw in sent]
    shares = looked_up(received, share(table), ring_bits)
    for part in shares:
        assert part.shape == (len(ids), table.shape[1])
        assert torch.equal(part, ring.reduce(part, ring_bits))
    expected = ring.reduce(table[torch.tensor(ids, dtype=torch.int64)], ring_bits)
    assert torch.equal(ring.reduce(shares[0] + shares[1] + shares[2], ring_bits), expected)


@settings(deadline=None)
@given(points_and_domain(), st.integers(1, 5), st.sampled_from([8, 31, 48, 63, 64]))
def test_lookup(case: tuple[list[int], int], width: int, ring_bits: int) -> None:
    ids, domain = case
    check_lookup(ids, uniform(domain, width), ring_bits)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("ring_bits", [44, 64])
@pytest.mark.parametrize("count", [1, 300])
def test_lookup_in_slices(monkeypatch: pytest.MonkeyPatch, native: bool, ring_bits: int, count: int) -> None:
    monkeypatch.setattr(matmul, "native", lambda: native)
    domain = 2 * S + 5
    check_lookup([secrets.randbelow(domain) for _ in range(count)], uniform(domain, 3), ring_bits)


def test_a_narrower_ring_than_the_tables() -> None:
    table = uniform(10, 2)
    parts = [LookupTable(part, 64) for part in share(table)]
    keys = lookup_keys([7], 10)
    shares = [lookup_products(k.low, k.high, parts[i], parts[(i + 1) % 3], 20) for i, k in enumerate(keys)]
    assert torch.equal(ring.reduce(sum(shares, torch.zeros(1, 2).long()), 20), ring.reduce(table[7:8], 20))


def test_no_server_holds_both_keys_of_a_pair() -> None:
    """The two keys of a pair have their corrections in common; those that a server holds have not."""
    keys = lookup_keys([3], 40)
    for i in range(3):
        assert keys[i].low.outputs.tobytes() == keys[i - 1].high.outputs.tobytes()
        assert keys[i].low.roots.tobytes() != keys[i - 1].high.roots.tobytes()
        assert keys[i].low.outputs.tobytes() != keys[i].high.outputs.tobytes()
        assert keys[i].low.outputs.tobytes() != keys[i - 2].high.outputs.tobytes()


def test_lookups_that_do_not_fit() -> None:
    keys, table = lookup_keys([3], 40)[0], LookupTable(uniform(40, 2), 48)
    with pytest.raises(ValueError, match="modulo 2\\^64"):
        lookup_products(keys.low, keys.high, table, table, 64)
    with pytest.raises(ValueError, match="41 rows"):
        lookup_products(keys.low, keys.high, table, LookupTable(uniform(41, 2), 48), 48)
    with pytest.raises(ValueError, match="of 3"):
        lookup_products(keys.low, keys.high, table, LookupTable(uniform(40, 3), 48), 48)
    with pytest.raises(ValueError, match="2 points"):
        lookup_products(keys.low, lookup_keys([3, 3], 40)[0].high, table, table, 48)
    raw = keys.to_bytes()
    for wrong in (raw[:-1], raw + raw, b""):
        with pytest.raises(FrameError, match="a lookup of 1 rows among 40 takes"):
            LookupKeys.from_bytes(wrong, 1, 40)
    with pytest.raises(ValueError, match="below the domain"):
        lookup_keys([40], 40)


def test_warm_up() -> None:
    lookup.warm_up()


# as an input of a circuit


def input_of(p: LookedUp, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shares of parties 0 and 1, and what party 2 sends party 0."""
    held: Any = held_weights({"t": table}, {"t": p.ring}, public=p.public)
    keys, one = p.keys(ids), key()
    assert [len(k) for k in keys] == [p.key_bytes] * (2 if p.public else 3)
    rows = [p.shares(party, own, held[party], {}, 5)[p.name] for party, own in enumerate(keys)]
    sent = ring.reduce(rows[2] - p.zero_share(one, 5), p.ring) if not p.public else torch.zeros(p.shape).long()
    return rows[0] + sent, rows[1] + p.zero_share(one, 5), sent


@settings(deadline=None, max_examples=30)
@given(ids=st.lists(st.integers(0, 40), min_size=1, max_size=7), bits=st.integers(2, 64), public=st.booleans())
def test_looked_up_rows_are_an_input(ids: list[int], bits: int, public: bool) -> None:
    table, points = uniform(41, 3), torch.tensor([ids])
    p = LookedUp((1, len(ids), 3), bits, "one-hot0/0", "t", 41, public=public)
    if public:
        table = ring.signed(table, bits)
    zero, one, sent = input_of(p, points, table)
    assert torch.equal(ring.reduce(zero + one, bits), ring.reduce(table[points], bits))
    assert p.source == "one-hot0"
    assert p.cost().brought == (0 if public else wire.Wire(tuple(sent.shape), bits).size)


@pytest.mark.parametrize("bits", [64, 37])
def test_what_party_2_contributes_is_uniform(bits: int) -> None:
    """Of two extreme indices of a table with extreme rows alike."""
    table = torch.zeros((300, 4), dtype=torch.int64)
    table[299] = -1
    p = LookedUp((2000, 4), bits, "one-hot0/0", "t", 300)
    seen = [input_of(p, torch.full((2000,), index), table)[2] for index in (0, 299)]
    assert not leaks([("first", seen[0], bits), ("last", seen[1], bits)])
