from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocols import limbs, madd52
from protocols import matmul as products
from protocols.limbs import Packed, matmul, pack

EXTREMES = {
    "zero": 0,
    "minus one": -1,
    "minimum": -(1 << 63),
    "maximum": (1 << 63) - 1,
    "alternating": 0x5555555555555555,
    "alternating negative": -0x5555555555555556,
}
FILLS = ["random", "mixed", "low ones", "high bit", "rounds up", *EXTREMES]


def filled(fill: str, shape: tuple[int, ...], bits: int, seed: int) -> Tensor:
    """Full 64-bit integers, whose low `bits` bits matter."""
    return _filled(fill, shape, bits, seed).clone()


@lru_cache(maxsize=600)  # all operands of the test of long inner dimensions, which come again and again
def _filled(fill: str, shape: tuple[int, ...], bits: int, seed: int) -> Tensor:
    generator = random.Random(f"{seed} {shape}")
    special = [0, -1, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, -(1 << 63), (1 << 63) - 1]

    def element() -> int:
        if fill == "random":
            return generator.getrandbits(64)
        if fill == "mixed":
            return generator.choice(special)
        if fill == "low ones":
            return (1 << generator.randrange(65)) - 1
        if fill == "high bit":
            return 1 << (bits - 1)
        if fill == "rounds up":
            return (1 << (bits - 1)) - 1
        return EXTREMES[fill]

    count = int(np.prod(shape))
    values = [(element() + (1 << 63)) % (1 << 64) - (1 << 63) for _ in range(count)]
    return torch.tensor(values, dtype=torch.int64).reshape(shape)


def signed(values: Tensor, bits: int) -> np.ndarray:
    """Python integers in [-2^(bits-1), 2^(bits-1)) that the low bits stand for."""
    half = 1 << (bits - 1)
    return np.array([(v + half) % (2 * half) - half for v in values.flatten().tolist()], dtype=object).reshape(
        values.shape
    )


def exact(a: Tensor, b: Tensor, ring: int, a_bits: int | None = None, b_bits: int | None = None) -> list[int]:
    """The product of Python integers modulo 2^ring, flattened."""
    product = np.matmul(signed(a, a_bits or ring), signed(b, b_bits or ring))
    return [value % (1 << ring) for value in np.asarray(product).flatten().tolist()]


def check(actual: Tensor, expected: list[int], ring: int) -> None:
    assert actual.dtype == torch.int64
    if ring < 64:
        assert actual.flatten().tolist() == expected
    else:
        assert [value % (1 << 64) for value in actual.flatten().tolist()] == expected


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    m, n, p = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 17, 40])), draw(st.integers(1, 5))
    a_batch, b_batch = draw(
        st.sampled_from(
            [((), ()), ((3,), ()), ((2, 2), ()), ((3,), (3,)), ((), (2,)), ((1, 2), (3, 1)), ((2, 1), (2, 3))]
        )
    )
    return (*a_batch, m, n), (*b_batch, n, p)


widths = st.none() | st.integers(1, 64)


@settings(max_examples=300, deadline=None)
@given(shapes(), st.integers(1, 64), widths, widths, st.sampled_from(FILLS), st.sampled_from(FILLS), st.integers(0, 9))
def test_matmul_is_exact(shape, ring, a_bits, b_bits, a_fill, b_fill, seed):
    a = filled(a_fill, shape[0], min(a_bits or ring, ring), seed)
    b = filled(b_fill, shape[1], min(b_bits or ring, ring), seed + 1)
    actual = matmul(a, b, ring, a_bits=a_bits, b_bits=b_bits)
    assert actual.shape == torch.matmul(a, b).shape
    check(actual, exact(a, b, ring, a_bits, b_bits), ring)


@settings(max_examples=300, deadline=None)
@given(
    shapes(), st.integers(1, 64), widths, st.integers(1, 64), st.booleans(), widths, st.integers(1, 64),
    st.sampled_from(FILLS), st.sampled_from(FILLS), st.integers(0, 9),
)  # fmt: skip
def test_packed_matmul_is_exact(shape, ring, a_bits, bits, is_signed, other_bits, planned, a_fill, b_fill, seed):
    a = filled(a_fill, shape[0], min(a_bits or ring, ring), seed)
    b = filled(b_fill, shape[1], bits, seed + 1)
    if is_signed:
        b = torch.tensor(signed(b, bits).tolist(), dtype=torch.int64).reshape(b.shape)
    else:
        bits, planned = max(bits, ring), min(planned, max(bits, ring))
    packed = pack(b, bits, signed=is_signed, ring=planned, other_bits=other_bits)
    assert packed.shape == b.shape
    assert packed.limbs.numel() == len(packed.widths) * b.numel()
    assert sum(packed.widths) == bits
    check(matmul(a, packed, ring, a_bits=a_bits), exact(a, b, ring, a_bits, bits), ring)


@pytest.mark.parametrize("ring", [24, 38, 40, 44, 45, 46, 48, 52, 58, 63, 64])
@pytest.mark.parametrize("b_bits", [None, 14, 18, 30])
@pytest.mark.parametrize(
    "fill", ["random", "mixed", "high bit", "rounds up", "minus one", "minimum", "alternating negative"]
)
def test_long_inner_dimension(ring, b_bits, fill):
    """Thousands of terms of the largest magnitude, in several blocks: where a sum would first exceed 2^53."""
    for inner in (384, 1536, 3073):
        a, b = filled(fill, (2, inner), ring, 1), filled(fill, (inner, 2), b_bits or ring, 2)
        width = b_bits or ring
        b = torch.tensor(signed(b, width).tolist(), dtype=torch.int64)
        expected = exact(a, b, ring, None, b_bits)
        check(matmul(a, b, ring, b_bits=b_bits), expected, ring)
        check(matmul(a, pack(b, width, signed=b_bits is not None, ring=ring), ring), expected, ring)


@pytest.mark.parametrize(
    ("ring", "b_bits"), [(24, None), (24, 18), (38, None), (45, None), (48, 16), (64, 16), (64, None)]
)
def test_large_matrices_in_tiles(ring, b_bits):
    generator = torch.Generator().manual_seed(ring)
    for batch, m, n, p in (((), 130, 1000, 1100), ((3, 2), 33, 129, 65), ((), 1, 30522, 8)):
        a = torch.randint(-(1 << 63), (1 << 63) - 1, (*batch, m, n), generator=generator)
        b = torch.randint(-(1 << 63), (1 << 63) - 1, (*batch, n, p), generator=generator)
        b = b if b_bits is None else b >> (64 - b_bits)
        expected = a @ b if ring == 64 else (a @ b) & ((1 << ring) - 1)
        packed = pack(b, b_bits or ring, signed=b_bits is not None, ring=ring)
        for right, width in ((b, b_bits), (b.mT.contiguous().mT, b_bits), (packed, None)):
            assert torch.equal(matmul(a, right, ring, b_bits=width), expected)
        assert torch.equal(matmul(a.mT.contiguous().mT, b, ring, b_bits=b_bits), expected)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 40000),
    st.integers(1, 4000),
    st.booleans(),
)
def test_no_partial_sum_exceeds_the_mantissa(a_width, b_width, ring, inner, size, packed):
    """The largest limbs that extreme values produce, times the length of a block, stay below 2^53."""
    a_width, b_width = min(a_width, ring), min(b_width, ring)
    plan = limbs._schedule(a_width, limbs._candidates(b_width), ring, inner, size, size, packed)
    assert 1 <= plan.block <= inner
    assert (sum(plan.a_widths), sum(plan.b_widths)) == (a_width, b_width)
    order = (*plan.order, 3)
    largest = []
    for split in (plan.a_widths, plan.b_widths):
        bounds = [1 << (width - 1) for width in split]
        extremes = filled("mixed", (64,), sum(split), 0)
        for wrap in (False, True):
            parts = limbs._split(extremes, split, wrap=wrap)
            assert all(part.abs().max() <= bound for part, bound in zip(parts, bounds, strict=True))
        largest.append([*bounds, bounds[0] + bounds[1]] if plan.karatsuba else bounds)
    multiplied = {(order[i], j) for j, first, last in plan.groups for i in range(first, last)}
    assert all(plan.block * largest[0][i] * largest[1][j] <= 1 << 53 for i, j in multiplied)
    shifts = limbs._shifts(plan.a_widths), limbs._shifts(plan.b_widths)
    needed = {(i, j) for i, s in enumerate(shifts[0]) for j, t in enumerate(shifts[1]) if s + t < ring}
    assert multiplied == (needed - {(0, 1), (1, 0)} | {(3, 3)} if plan.karatsuba else needed)


def test_numbers_of_products():
    """What the module is for: two or three products for a share by a weight, three or five for two residues."""

    def products(a_width: int, b_width: int, ring: int, inner: int) -> int:
        plan = limbs._schedule(a_width, limbs._candidates(b_width), ring, inner, 128, 768, True)
        return sum(last - first for _, first, last in plan.groups)

    assert [products(40, 16, 40, inner) for inner in (384, 1536, 3072)] == [2, 2, 2]
    assert [products(64, bits, 64, 768) for bits in (14, 16, 18)] == [2, 2, 3]
    assert [products(ring, ring, ring, 768) for ring in (24, 38, 44, 45, 48, 64)] == [1, 3, 3, 3, 3, 5]


@pytest.mark.parametrize("bits", [8, 14, 16, 18, 21])
def test_a_weight_is_one_limb(bits):
    weight = torch.zeros(768, 64, dtype=torch.int64)
    packed = pack(weight, bits, signed=True)
    assert packed.widths == (bits,)
    assert packed.limbs.numel() * packed.limbs.element_size() == 8 * weight.numel()


def test_empty():
    for m, n, p in ((0, 3, 2), (2, 0, 3), (2, 3, 0), (0, 0, 0)):
        a, b = torch.ones(m, n, dtype=torch.int64), torch.ones(n, p, dtype=torch.int64)
        for right in (b, pack(b, 40, signed=False)):
            result = matmul(a, right, 40)
            assert result.shape == (m, p)
            assert not result.any()


def test_meta():
    a, b = torch.empty(5, 2, 3, dtype=torch.int64, device="meta"), torch.empty(3, 4, dtype=torch.int64, device="meta")
    packed = pack(b, 16, signed=True)
    assert isinstance(packed, Packed)
    assert packed.limbs.is_meta
    for right in (b, packed):
        result = matmul(a, right, 40)
        assert result.is_meta
        assert result.shape == (5, 2, 4)
        assert result.dtype == torch.int64


def test_operands_are_left_alone_and_results_are_repeatable():
    a, b = filled("random", (7, 300), 64, 1), filled("random", (300, 9), 64, 2)
    packed = pack(b, 64, signed=False)
    before = a.clone(), b.clone(), packed.limbs.clone()
    first = matmul(a, packed, 64)
    assert torch.equal(first, matmul(a, packed, 64))
    assert torch.equal(first, matmul(a, b, 64))
    assert all(torch.equal(x, y) for x, y in zip(before, (a, b, packed.limbs), strict=True))
    assert first.untyped_storage().nbytes() == 8 * first.numel()


def test_errors():
    a, b = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="a must be int64"):
        matmul(a.double(), b, 40)
    with pytest.raises(TypeError, match="b must be int64"):
        matmul(a, b.int(), 40)
    with pytest.raises(ValueError, match="cannot multiply"):
        matmul(a, a, 40)
    with pytest.raises(ValueError, match="must be a matrix"):
        matmul(a[0], b, 40)
    for bits in (0, 65):
        with pytest.raises(ValueError, match="ring must be between"):
            matmul(a, b, bits)
        with pytest.raises(ValueError, match="a_bits must be between"):
            matmul(a, b, 40, a_bits=bits)
        with pytest.raises(ValueError, match="bits must be between"):
            pack(b, bits, signed=True)
    with pytest.raises(ValueError, match="unpacked"):
        matmul(a, pack(b, 8, signed=True), 40, b_bits=8)
    with pytest.raises(ValueError, match="do not determine"):
        matmul(a, pack(b, 38, signed=False), 40)
    with pytest.raises(ValueError, match="do not determine"):
        pack(b, 38, signed=False, ring=40)
    for value in (8, -9):
        with pytest.raises(ValueError, match="not signed 4-bit"):
            pack(b + value, 4, signed=True)
    with pytest.raises(ValueError, match="meta"):
        matmul(a, b.to("meta"), 40)


needs_madd52 = pytest.mark.skipif(
    not madd52.available(), reason="this processor has no instruction for 52-bit integers"
)


@needs_madd52
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([((), ()), ((3,), ()), ((2, 2), ()), ((3,), (3,)), ((), (2,)), ((1, 2), (3, 1))]),
    st.integers(0, 20), st.sampled_from([0, 1, 7, 383, 384, 385]), st.integers(0, 50), st.integers(1, 52),
    st.sampled_from(FILLS), st.sampled_from(FILLS),
)  # fmt: skip
def test_products_by_52_bit_integers(batches, rows, inner, columns, ring, a_fill, b_fill):
    """All sizes around those of tiles and panels; the other kernel, which python integers check, gives the same."""
    a = filled(a_fill, (*batches[0], rows, inner), ring, 1)
    b = filled(b_fill, (*batches[1], inner, columns), ring, 2)
    found = madd52.matmul(a, b)
    assert found.shape == torch.matmul(a, b).shape
    mask = (1 << ring) - 1
    assert torch.equal(found & mask, matmul(a, b, ring) & mask)


@pytest.mark.parametrize(
    ("a", "b"),
    [((4, 5), (6, 7)), ((2, 4, 5), (2, 6, 7)), ((5,), (5, 7)), ((4, 5), (5,))],
)
def test_shapes_that_do_not_fit_are_refused_before_memory_is_read(a, b):
    zeros = torch.zeros(a, dtype=torch.int64), torch.zeros(b, dtype=torch.int64)
    with pytest.raises(ValueError, match="no product of"):
        madd52.matmul(*zeros)
    with pytest.raises(ValueError, match="no product of"):
        madd52.matmul(torch.zeros(4, 5, dtype=torch.int32), torch.zeros(5, 7, dtype=torch.int64))


@needs_madd52
@pytest.mark.parametrize(
    ("ring", "rows", "inner", "used"), [(52, 8, 64, 1), (53, 8, 64, 0), (40, 7, 64, 0), (40, 8, 63, 0)]
)
def test_where_the_instruction_is_used(monkeypatch, ring, rows, inner, used):
    """For large matrices of narrow rings, transposed ones too; the result is the same."""
    calls, real = [], madd52.matmul

    def noted(a, b):
        calls.append(a.shape)
        return real(a, b)

    monkeypatch.setattr(products, "native", lambda: True)
    monkeypatch.setattr(madd52, "matmul", noted)
    a, b = filled("random", (inner, rows), ring, 1).T, filled("random", (30, inner), ring, 2).T
    check(products.matmul(a, b, ring), exact(a, b, ring), ring)
    assert len(calls) == used
    assert torch.equal(products.Matrix(b, ring, signed=False).times(a), products.matmul(a, b, ring))


def test_without_the_instruction_another_kernel_is_used(monkeypatch):
    monkeypatch.setattr(madd52, "available", lambda: False)
    monkeypatch.setattr(madd52, "matmul", None)
    a, b = filled("random", (64, 64), 40, 1), filled("random", (64, 64), 40, 2)
    check(products.matmul(a, b, 40), exact(a, b, 40), 40)
    products.warm_up()
