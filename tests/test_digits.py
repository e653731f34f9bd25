"""Coarse digits, their histograms, and the maximum of a row from them, against Python integers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocols import bits, kernels, local
from protocols import two_party as tp
from protocols.circuit import check, deal
from protocols.fields import ENTRIES
from protocols.flow import Instruction
from protocols.protocol import CircuitCost, Protocol, Shape
from protocols.two_party.digits import DIGIT_BITS, ROW
from protocols.weights import DealerWeights, ServerWeights
from secure.mpc.budget import load_of
from secure.mpc.powers import divided
from secure.mpc.softmax import MOST_BINS, ways
from tests.helpers import Integers, Outcome, combine, integers, key, run_circuit, shared, tensor, words
from tests.test_conformance import plane_bits
from tests.three import run_three


class RowMaximum:
    """The circuit that makes M, the number of suffixes with an element, from numbers of one ring.

    coarser, below: the digit, of so many more bits, that tells what counts, and where it ends. None: all counts.
    """

    def __init__(
        self, shape: Shape, ring: int, shift: int, bins: int, coarser: int = 0, below: int | None = None
    ) -> None:
        self.shape, self.ring, self.shift = shape, ring, shift
        self.circuit: list[Instruction] = []
        rows, counts = (*shape[:-1], 1), (*shape[:-1], bins)
        x = self.add(shared("x", shape, ring, words(np.random.default_rng(7), shape)))
        self.z = self.add(tp.Open(shape, ring), x)
        operands, blocks = [self.z], 1
        if below is not None:
            blocks = (1 << (ring - shift)) // max(below << coarser, bins - 1 + (1 << coarser))
            window = self.add(tp.DigitIn(shape, ring, shift + coarser, below), self.z)
            operands = [self.add(tp.OpenBits(shape, 1), window), self.z] if blocks > 1 else operands
        self.counts = self.add(tp.Histogram(shape, ring, shift, bins, blocks), *operands)
        opened = self.add(tp.Open(counts, 8), self.counts)
        empty = self.add(tp.DigitIn(counts, 8, 0, 1), opened)
        ones = self.add(tp.Select(counts, 16, (0,), (-1,)), self.add(tp.OpenBits(counts, 1), empty))
        self.nonempty = self.add(
            local.AddConstant(rows, 16, bins), self.add(local.Sum(rows, 16, (len(shape) - 1,)), ones)
        )
        check(self.circuit, {})

    def add(self, protocol: Protocol, *inputs: int) -> int:
        self.circuit.append(Instruction(protocol, inputs))
        return len(self.circuit) - 1

    def run(self, x: Integers) -> tuple[Integers, Integers, Integers]:
        """The coarse digits j, the suffix counts, and M, all in the clear."""
        outputs = [self.z, self.counts, self.nonempty]
        found = run_circuit(self.circuit, {"x": tensor(x)}, outputs)
        server, client = found.server[0], found.client[0]
        z, r = integers(server.value, self.ring), integers(combine(server.mask, client.mask), self.ring)
        j = ((z >> self.shift) - (r >> self.shift)) % (1 << (self.ring - self.shift))
        return j, integers(found.value(1), 8), integers(found.value(2), 16)[..., 0]


def random_rows(rng: np.random.Generator, shape: Shape, low: int, high: int) -> Integers:
    """Rows of spreads of all sizes, with ties and with ends of the range."""
    out = np.empty(shape, dtype=object)
    for index in np.ndindex(shape[:-1]):
        reach = 1 << int(rng.integers(0, (high - low).bit_length() + 1))
        centre = int(rng.integers(low, high + 1))
        row = rng.integers(max(low, centre - reach), min(high, centre + reach) + 1, shape[-1])
        row[rng.integers(0, shape[-1])] = row.max()
        row[rng.integers(0, shape[-1])] = rng.choice([row[0], low, high])
        out[index] = row.astype(object)
    return out


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    lead=st.sampled_from([(1,), (5,), (2, 3)]),
    row=st.sampled_from([1, 2, 3, 7, 8, 13, 129, ROW]),
    shift=st.integers(0, 20),
    digits=st.integers(1, 6),
    outside=st.integers(0, 3),
    bins=st.integers(1, 64),
)
def test_the_maximum_of_a_row(
    seed: int, lead: tuple[int, ...], row: int, shift: int, digits: int, outside: int, bins: int
) -> None:
    """M is 1 + the largest coarse digit of those in the window, and that is within one unit of the maximum."""
    rng, unit = np.random.default_rng(seed), 1 << shift
    bins = min(bins, 1 << digits)
    ring = shift + digits + outside
    most = (1 << ring) - unit - 1 if shift else (1 << ring) - 1
    x = random_rows(rng, (*lead, row), 0, most)
    windowed = (1 << (ring - shift)) // bins > 1
    j, counts, nonempty = RowMaximum(x.shape, ring, shift, bins, 0, bins if windowed else None).run(x)
    assert ((j == x >> shift) | ((j == (x >> shift) + 1) & (x % unit > 0))).all()
    inside = j < bins
    for i in range(bins):
        assert (counts[..., i] == (inside & (j >= i)).sum(-1)).all()
    for index in np.ndindex(lead):
        m, counted = nonempty[index], x[index][inside[index]]
        assert m == max(j[index][inside[index]], default=-1) + 1
        if counted.size:
            assert (m - 2) * unit < counted.max() < m * unit


WAYS = [(ring, shift, bins) for ring, shift in ((5, 0), (7, 2), (8, 3)) for bins in range(2, 1 << (ring - shift))]


def whole(protocol: Any, masks: tuple[Any, ...], name: str) -> torch.Tensor:
    """What a protocol deals under a name, in the shape of the draw."""
    dealt, (draw,) = protocol.deal({}, masks, ServerWeights({}))[0][name], protocol.draws
    found: torch.Tensor = dealt.table[dealt.row].reshape(draw.shape)
    return found


@pytest.mark.parametrize(("ring", "shift", "bins"), WAYS)
def test_a_window_holds_its_bins_and_nothing_from_elsewhere(ring: int, shift: int, bins: int) -> None:
    """For every number, every mask and every way to count: what lies in the window counts, in the bin of its digit.

    What lies elsewhere counts in the bin of its digit too, or in none.
    """
    size = 1 << ring
    x, r = (v.reshape(-1) for v in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    z, digits = (x + r) % size, size >> shift
    j = ((z >> shift) - (r >> shift)) % digits
    must = x < (bins - 1) << shift
    tried = 0
    for price, coarser, below, blocks in ways(digits, bins):
        histogram = tp.Histogram((x.numel(), 1), ring, shift, bins, blocks)
        plane = None
        masks: tuple[Any, ...] = (r,)
        table = 0
        if blocks > 1:
            near = tp.DigitIn((x.numel(),), ring, shift + coarser, below)
            plane = kernels.looked_up(z, whole(near, (r,), "table"), near.shift, 1 << (ring - near.shift))
            assert bits.unpack(plane, x.shape)[must].all()
            masks, table = (torch.zeros_like(plane)[None], r), near.cost().dealt // x.numel()
        units = whole(histogram, masks, "units")
        counts = kernels.suffix_counts(z[:, None], plane, units, shift, digits, blocks, bins)
        inside = torch.ones_like(must) if plane is None else bits.unpack(plane, x.shape).bool()
        expected = (j[:, None] >= torch.arange(bins)) & (j < bins)[:, None] & inside[:, None]
        assert torch.equal(counts, expected.to(torch.int64))
        assert price == 2 * table + histogram.cost().dealt // x.numel()
        tried += 1
    assert tried > (2 * bins < digits)  # some have windows


@pytest.mark.parametrize("shift", [0, 11])
def test_a_row_without_any_in_the_window_has_no_maximum(shift: int) -> None:
    ring, bins = shift + 6, 16
    x = np.full((3, 9), bins << shift, dtype=object)
    x[1, 4], x[2, 0] = 0, (bins - 1) * (1 << shift) - 1
    _, counts, nonempty = RowMaximum(x.shape, ring, shift, bins, 0, bins).run(x)
    assert nonempty[0] == 0
    assert nonempty[1] in (1, 1 + bool(shift))
    assert bins - 1 <= nonempty[2] <= bins - (shift == 0)
    assert counts[:, 0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("digits", [2, 16, 512, 1 << DIGIT_BITS])
def test_ways_to_count_keep_the_bounds_of_fields(digits: int) -> None:
    for bins in {2, 3, min(digits, 9), min(digits, MOST_BINS)} - {digits + 1}:
        for _, _, _, blocks in ways(digits, bins):
            assert 1 <= blocks <= ENTRIES
        _, coarser, below, blocks = min(ways(digits, bins))
        tp.Histogram((1, 1), 20, 21 - digits.bit_length(), bins, blocks)
        if blocks > 1:
            tp.DigitIn((1, 1), 20, 21 - digits.bit_length() + coarser, below)


def test_counts_reach_the_longest_row() -> None:
    x = np.full((2, ROW), 3, dtype=object)
    _, counts, _ = RowMaximum(x.shape, 4, 0, 4).run(x)
    assert counts.tolist() == [[ROW] * 4] * 2


def test_the_window_is_one_set_of_digits_for_bits_and_histogram() -> None:
    """The element at the window's end is in both or in neither, whatever its carry."""
    x = np.full((40, 250), (16 << 10) - 1, dtype=object)  # the digit 15, or 16 with a carry, which nearly all have
    x[:, ::2] = (15 << 10) + 512
    j, counts, _ = RowMaximum(x.shape, 16, 10, 16, 0, 16).run(x)
    assert (counts[:, 15] == (j == 15).sum(-1)).all()
    assert 0 < (j == 15).sum() < j.size


@pytest.mark.parametrize("digits", range(1, 10))
def test_bits_of_every_digit(digits: int) -> None:
    size, rng = 1 << digits, np.random.default_rng(digits)
    x = np.arange(4 * size).astype(object) % size
    for count in sorted({1, size // 2, size - 1, int(rng.integers(1, size))}):
        circuit = [
            Instruction(shared("x", x.shape, digits, words(rng, x.shape))),
            Instruction(tp.Open(x.shape, digits), (0,)),
            Instruction(tp.DigitIn(x.shape, digits, 0, count), (1,)),
        ]
        outcome = run_circuit(circuit, {"x": tensor(x)})
        assert (plane_bits(outcome.value(), x.shape)[0] == (x < count)).all()


def test_costs_are_what_the_descriptions_say() -> None:
    assert tp.DigitIn((7,), 8, 0, 1).cost() == CircuitCost(dealt=7 * 32)
    assert tp.DigitIn((7,), 20, 19, 1).cost() == CircuitCost(dealt=7)
    assert tp.Histogram((3, 7), 20, 15, 32, 1).cost() == CircuitCost(dealt=21 * 32)
    assert tp.Histogram((3, 7), 20, 12, 20, 12).cost() == CircuitCost(dealt=21 * 2 * 22)


def test_a_unit_takes_one_byte_of_a_stream() -> None:
    """And of memory, at all parties; shares add up modulo 2^8."""
    protocol = tp.Histogram((4, 100), 20, 15, 32, 1)
    (draw,) = protocol.draws
    assert draw.wire.dtype == torch.uint8
    a, b = torch.tensor([200, 3], dtype=torch.uint8), torch.tensor([100, 4], dtype=torch.uint8)
    assert draw.combine(a, b - a).tolist() == [100, 4]
    circuit = [Instruction(shared("x", (4, 100), 20, torch.zeros(4, 100, dtype=torch.int64)))]
    circuit += [Instruction(tp.Open((4, 100), 20), (0,)), Instruction(protocol, (1,))]
    load = load_of(circuit, {})
    assert load.drawn == 8 * 400 + 32 * 400
    assert load.dealt == 32 * 400
    ((index, correction),) = deal(circuit, key(), key(), DealerWeights(key(), {}))
    assert (index, len(correction)) == (2, 32 * 400)


@pytest.mark.parametrize("protocol", [tp.DigitIn((200, 200), 24, 15, 9), tp.Histogram((200, 200), 24, 17, 128, 1)])
def test_a_table_takes_no_longer_than_its_load_says(protocol: Protocol) -> None:
    circuit = [Instruction(shared("x", (200, 200), 24, torch.zeros(200, 200, dtype=torch.int64)))]
    circuit += [Instruction(tp.Open((200, 200), 24), (0,)), Instruction(protocol, (1,))]

    def taken() -> float:
        start = time.process_time()
        list(deal(circuit, key(), key(), DealerWeights(key(), {})))
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would spin while they wait for a core
    try:
        assert min(taken() for _ in range(3)) < load_of(circuit, {}).seconds
    finally:
        torch.set_num_threads(threads)


def run_in_three(circuit: list[Instruction], x: Integers) -> Tensor:
    found: Outcome = run_three(circuit, {"x": tensor(x)})
    return found.value()


def test_the_maximum_of_a_row_in_three_parties() -> None:
    x = random_rows(np.random.default_rng(3), (6, 50), 0, (1 << 18) - 1)
    made = RowMaximum(x.shape, 20, 13, 61, 1, 31)
    nonempty = integers(run_in_three(made.circuit, x), 16)[..., 0]
    inside = x < 60 << 13
    assert inside.any(-1).all()
    for m, row in zip(nonempty, x, strict=True):
        assert (m - 2) << 13 < row.max() < m << 13


@settings(deadline=None, max_examples=60)
@given(root=st.integers(1, 2), low=st.integers(1 << 10, 1 << 18), octaves=st.floats(0.1, 14))
def test_bands_meet_whatever_their_digits_are(root: int, low: int, octaves: float) -> None:
    """Every number lies in the band that its bits choose, with or without the carry of each digit.

    The bits of coarser bands are ones where that of a finer band may be one: the chosen band is the finest of these.
    """
    high = int(low * 2.0**octaves) + 2
    found = divided(root, low, high, 64)
    if found is None:
        assert high > 2000 * low
        return
    ring, (coarsest, *finer) = found
    assert coarsest.high == high
    assert (finer or [coarsest])[-1].low == low
    edges = [low, high, *(d + (band.count - c << band.digit) for band in finer for c in (0, 1) for d in (-1, 0, 1))]
    for x in (x for x in edges if low <= x <= high):
        surely, perhaps = ([(x >> b.digit) + carry < b.count for b in finer] for carry in (1, 0))
        assert all(x < (1 << ring) - (1 << b.digit) and 1 <= b.count < 1 << (ring - b.digit) for b in finer)
        # ones first, in both; and no finer bit may be one unless all coarser ones surely are
        assert surely == sorted(surely, reverse=True)
        assert all(all(surely[:k]) for k, bit in enumerate(perhaps) if bit)
        for chosen in {sum(surely), sum(perhaps)}:
            band = [coarsest, *finer][chosen]
            assert band.low <= x <= band.high
