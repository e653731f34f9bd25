"""Rings, bits, bytes, streams and fixed point against Python integers and published definitions."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import bits, kernels, matmul, ring, wire
from protocols.fixedpoint import FixedPoint
from protocols.prg import KEY_BYTES, Key, derive_key, fresh_seed
from protocols.protocol import bytes_of
from protocols.wire import FrameError, Wire
from secure.errors import FixedPointError
from tests.helpers import integers, octets, tensor, words

WORDS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**62, -(2**62), 2**32])
)
TENSORS = st.lists(WORDS, min_size=1, max_size=9).map(lambda v: torch.tensor(v, dtype=torch.int64))
RINGS = st.integers(1, 64)


# ring


@settings(deadline=None)
@given(x=TENSORS, k=RINGS)
def test_representatives(x: torch.Tensor, k: int) -> None:
    exact = [int(v) for v in x]
    half = 1 << (k - 1)
    if k < 64:
        assert ring.reduce(x, k).tolist() == [v % (1 << k) for v in exact]
    assert (integers(ring.reduce(x, k)) % (1 << k)).tolist() == [v % (1 << k) for v in exact]
    assert ring.signed(x, k).tolist() == [(v + half) % (1 << k) - half for v in exact]
    assert ring.top_bit(x, k).tolist() == [(v >> (k - 1)) & 1 for v in exact]
    assert ring.low_mask(k) == ((1 << k) - 1 if k < 64 else -1)


@settings(deadline=None)
@given(x=TENSORS, k=RINGS, data=st.data())
def test_shifts(x: torch.Tensor, k: int, data: st.DataObject) -> None:
    shift = data.draw(st.integers(0, k - 1))
    exact = [int(v) for v in x]
    assert integers(ring.left(x, shift)).tolist() == [(v << shift) % 2**64 for v in exact]
    assert ring.right(x, shift).tolist() == [v >> shift for v in exact]
    if shift:
        dropped = integers(ring.drop_low(x, shift, k)).tolist()
        assert dropped == [(v % (1 << k)) >> shift for v in exact]
    else:
        assert torch.equal(ring.drop_low(x, 0, k), x)


@given(value=st.integers(-(2**70), 2**70), k=RINGS)
def test_wrap(value: int, k: int) -> None:
    wrapped = ring.wrap(value, k)
    assert -(2**63) <= wrapped < 2**63
    assert (wrapped - value) % (1 << k) == 0


@given(k=st.integers(20, 64), f=st.integers(0, 16), v=st.integers(-(2**18), 2**18 - 1))
def test_real_numbers(k: int, f: int, v: int) -> None:
    x = torch.tensor([v * 2.0**-f])
    assert ring.decode(ring.encode(x.to(torch.float64), f), k, f).tolist() == [v * 2.0**-f]
    assert ring.decode(ring.reduce(ring.encode(x, f), k), k, f).tolist() == [v * 2.0**-f]


def test_encoding_rounds_to_nearest() -> None:
    assert ring.encode(torch.tensor([0.24, 0.26, -0.26, 1.75]), 1).tolist() == [0, 1, -1, 4]


def test_shapes_without_data() -> None:
    x = torch.empty(3, 5, dtype=torch.int64, device="meta")
    assert ring.drop_low(ring.signed(ring.left(x, 3), 20), 4, 20).shape == (3, 5)
    assert bits.pack(x).shape == (2,)
    assert bits.unpack(bits.pack(x), (3, 5)).shape == (3, 5)


# matrix products


@pytest.mark.parametrize("native", [True, False])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 64), signed=st.booleans())
def test_matrix_products_by_either_kernel(native: bool, seed: int, k: int, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    n, p, m = (int(v) for v in rng.integers(1, 40, 3))
    x, w = words(rng, (2, m, n)), words(rng, (n, p))
    if signed:
        w = ring.right(w, int(rng.integers(40, 63)))
    expected = (integers(x) @ integers(w)) % (1 << k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "native", lambda: native)
        packed = matmul.Matrix(w, k, signed=signed).times(x)
        direct = matmul.matmul(x, w.expand(2, n, p), k)
    assert (integers(packed, k) == expected).all()
    assert (integers(direct, k) == expected).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(60, 130), st.integers(60, 130), st.integers(1, 64), st.booleans(), st.booleans())
def test_products_of_few_rows_by_one_large_matrix(rows: int, n: int, p: int, k: int, turned: bool, flat: bool) -> None:
    rng = np.random.default_rng(rows + 10 * n + 10000 * p)
    x, w = (
        words(rng, (n,) if flat and rows == 1 else (1, rows, n)),
        words(rng, (p, n)).T if turned else words(rng, (n, p)),
    )
    expected = ring.reduce((x[..., :, None] * w).sum(-2), k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "native", lambda: True)
        assert matmul.matmul(x, w, k).equal(expected)
        assert matmul.Matrix(w, k, signed=False).times(x).equal(expected)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]),
    st.integers(1, 64),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_loops_and_limbs_agree(seed: int, kind: torch.dtype, k: int, rows: int, signed: bool, looped: bool) -> None:
    """Without AVX-512 one matrix is multiplied in a loop or in limbs, as is faster, before it is packed and after."""
    rng = np.random.default_rng(seed)
    n, p = (int(v) for v in rng.integers(1, 40, 2))
    x, w = words(rng, (rows, n)), words(rng, (n, p))
    if kind != torch.int64:
        w = w.to(kind)
    elif signed:
        w = ring.right(w, 30)
    expected = ring.reduce((x[:, :, None] * w.to(torch.int64)).sum(1), k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "native", lambda: False)
        patch.setattr(matmul, "_loops", lambda *_: looped)
        for held in (True, False):
            matrix = matmul.Matrix(w, k, signed=signed, held=held)
            assert matrix.times(x).equal(expected)
            patch.setattr(matmul, "_loops", lambda *_: False)
            matrix.pack(rows)
            assert (matrix._value is None) is not held
            patch.setattr(matmul, "_loops", lambda *_: looped)
            assert matrix.times(x).equal(expected)
            assert matrix.times(x[0]).equal(expected[0])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32), st.integers(1, 64), st.integers(1, 12), st.booleans(), st.booleans(), st.sampled_from([1, 2])
)
def test_batches_of_small_products(seed: int, k: int, rows: int, small: bool, turned: bool, outer: int) -> None:
    """Of pairs, and of every matrix on the left with every one on the right."""
    rng = np.random.default_rng(seed)
    n, p, batch = (int(v) for v in rng.integers(1, 20, 3))
    before = () if outer == 1 else (2,)
    x = words(rng, (2, 1 if outer == 1 else batch, rows, n))
    w = words(rng, (*before, batch, p, n)).mT if turned else words(rng, (*before, batch, n, p))
    expected = ring.reduce((x[..., None] * w[..., None, :, :]).sum(-2), k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "native", lambda: False)
        patch.setattr(matmul, "_is_small", lambda *_: small)
        assert matmul.matmul(x, w, k).equal(expected)


@pytest.mark.parametrize(
    "shapes", [((2, 0, 4), (2, 4, 5)), ((2, 3, 0), (2, 0, 5)), ((2, 3, 4), (2, 4, 0)), ((0, 3, 4), (0, 4, 5))]
)
def test_products_of_nothing(shapes: tuple[tuple[int, ...], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "native", lambda: False)
    a, b = (torch.ones(shape, dtype=torch.int64) for shape in shapes)
    assert matmul.matmul(a, b, 64).equal(torch.matmul(a, b))


@pytest.mark.parametrize(
    ("rows", "bits", "looped"), [(3, 15, True), (4, 15, False), (7, 40, True), (8, 40, False), (15, 60, True)]
)
def test_few_rows_are_multiplied_in_a_loop(rows: int, bits: int, looped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512. Few are fewer for integers of fewer bits, which limbs multiply faster. Small products always."""
    called: list[int] = []
    monkeypatch.setattr(matmul, "native", lambda: False)

    def noted(x: torch.Tensor, *_: object) -> torch.Tensor:
        called.append(len(x))
        return x.new_zeros(len(x), 600)

    monkeypatch.setattr("protocols.limbs.matmul", noted)
    large = torch.zeros(600, 600, dtype=torch.int16 if bits < 16 else torch.int64)
    matmul.Matrix(large, max(bits, 20), signed=False).times(torch.zeros(rows, 600, dtype=torch.int64))
    assert called == ([] if looped else [rows])
    matmul.Matrix(large[:60, :60], 20, signed=False).times(torch.zeros(99, 60, dtype=torch.int64))
    assert len(called) == (not looped)


# bits


@given(st.lists(WORDS, min_size=1, max_size=40))
def test_packed_bits(values: list[int]) -> None:
    plane = bits.pack(torch.tensor(values, dtype=torch.int64))
    assert plane.dtype == torch.uint8
    assert plane.shape == (bits.plane_bytes(len(values)),) == (math.ceil(len(values) / 8),)
    assert all((int(plane[i // 8]) >> (i % 8)) & 1 == v & 1 for i, v in enumerate(values))
    assert bits.unpack(plane, (len(values),)).tolist() == [v & 1 for v in values]


# compiled kernels


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), width=st.integers(2, 64), data=st.data())
def test_compiled_kernels_are_the_portable_ones(seed: int, n: int, width: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    drop = data.draw(st.integers(0, width - 2))
    digit = data.draw(st.integers(3, 6))
    digits = max(1, -(-(width - 1 - drop) // digit))
    thresholds = tuple(data.draw(st.lists(WORDS, min_size=1, max_size=3)))
    slopes = tuple(data.draw(st.lists(WORDS, min_size=1, max_size=4)))
    offsets = tuple(data.draw(WORDS) for _ in slopes)
    sloped = sum(slope != 0 for slope in slopes)
    coefficients = tuple(data.draw(st.lists(WORDS, min_size=1, max_size=6)))
    z, x, product = (words(rng, (n,)) for _ in range(3))
    beta, beta_r = words(rng, (len(slopes), n)), words(rng, (sloped, n))
    each = [words(rng, (len(slopes), n)) for _ in range(3)]
    powers = tuple(words(rng, (n,)) for _ in range(6))
    table, planes = words(rng, (-(-(digits << digit) // 64), n)), octets(rng, (len(slopes), bits.plane_bytes(n)))
    mine, theirs = (octets(rng, (bits.plane_bytes(n),)) for _ in range(2))
    tables, units = {size: octets(rng, (n, -(-size // 8))) for size in (2, 8, 512)}, octets(rng, (2, n, 32))

    def results() -> list[torch.Tensor]:
        out = [kernels.bit_plane(z, offsets[0], width - 1)]
        out.append(kernels.unary_codes(z, width, drop, digit, digits))
        out += [*kernels.lifted(z, width, drop), kernels.chosen(z, x, kernels.lifted(x, width, drop)[1], width - drop)]
        for first in (0, 0x0001_0001_0001_0001):
            out.append(kernels.digit_planes(z, table, thresholds, width, drop, digit, digits, first))
        for server in (False, True):
            opened = (z, x, beta_r) if sloped else None
            out.append(kernels.select(planes, slopes, offsets, beta, opened, server=server))
            out.append(kernels.extended(x, mine, theirs, product, min(width, 63), client=server))
            several = tuple(coefficients[: s + 1] for s in range(len(offsets)))
            out.append(kernels.polynomials(z, powers, offsets, several, int(server)))
            out.append(kernels.select_each(planes, beta, *each, server=server))
        for size, codes in tables.items():
            out.append(kernels.looked_up(z, codes, drop, size))
        for size, blocks, bins in (
            (4, 1, 4),
            (16, 1, 9),
            (16, 4, 4),
            (32, 1, 32),
            (128, 5, 22),
            (128, 6, 21),
            (64, 2, 1),
        ):
            chosen, places = (planes[0], -(-size // blocks)) if blocks > 1 else (None, size)
            vectors = units[: 1 + (blocks > 1), :, :places].contiguous()
            out.append(kernels.suffix_counts(z.reshape(1, 1, n), chosen, vectors, drop, size, blocks, bins))
        return out

    fast = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_cpu", lambda x: False)
        slow = results()
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# wire


def spelled_out(x: torch.Tensor, k: int) -> bytes:
    """The layout on the wire by whole-tensor operations: whole bytes of each element, then a plane a bit."""
    whole = b"".join(int(v).to_bytes(k // 8, "little") for v in integers(x, 8 * (k // 8)).reshape(-1))
    planes = [bits.pack(ring.right(x, bit)) for bit in range(8 * (k // 8), k)]
    return whole + b"".join(plane.numpy().tobytes() for plane in planes)


def read_back(data: bytes, n: int, k: int) -> torch.Tensor:
    """The inverse of ``spelled_out``."""
    width, each = k // 8, bits.plane_bytes(n)
    total = tensor(np.array([int.from_bytes(data[i * width : (i + 1) * width], "little") for i in range(n)], object))
    for index in range(k % 8):
        start = n * width + index * each
        plane = torch.frombuffer(bytearray(data[start : start + each]) or bytearray(1), dtype=torch.uint8)
        total = total + ring.left(bits.unpack(plane[:each], (n,)), 8 * width + index)
    return total


@pytest.mark.parametrize("k", range(1, 65))
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 70))
def test_ring_elements_as_bytes(k: int, seed: int, n: int) -> None:
    """What is sent is the layout of the docstring, junk above the ring changes nothing, and what is read is x."""
    rng = np.random.default_rng(seed)
    form, x = Wire((n,), k), words(rng, (n,))
    data = bytes(wire.encode(x, form))
    assert len(data) == form.size == bytes_of((n,), k) == n * (k // 8) + (k % 8) * math.ceil(n / 8)
    if n % 8 == 0:
        assert 8 * len(data) == n * k
    assert data == spelled_out(x, k)
    if k < 64:
        assert data == wire.encode(x ^ ring.left(words(rng, (n,)), k), form)  # no junk above the ring
    back = wire.decode(data, form)
    assert back.shape == (n,)
    assert back.dtype == form.dtype == torch.int64
    assert (integers(back, 64) == integers(x, k)).all()
    assert torch.equal(back, read_back(data, n, k))
    assert torch.equal(wire.decode(memoryview(b"\0" + data)[1:], form), back)  # wherever in a frame it stands


@pytest.mark.parametrize("k", [*range(1, 9), 21, 31, 46, 63, 64])
@pytest.mark.parametrize("n", [kernels.BLOCK - 1, kernels.BLOCK, kernels.BLOCK + 1, 2 * kernels.BLOCK + 13])
def test_several_blocks_of_elements_as_bytes(k: int, n: int) -> None:
    form, x = Wire((n,), k), words(np.random.default_rng(n), (n,))
    data = wire.encode(x, form)
    assert data == spelled_out(x, k)
    assert torch.equal(wire.decode(data, form), ring.reduce(x, k))


@settings(deadline=None)
@given(n=st.integers(1, 70), k=RINGS, junk=st.integers(0, 255))
def test_bits_past_the_last_element(n: int, k: int, junk: int) -> None:
    """They are sent as zeros, and whatever comes there is ignored."""
    form, past = Wire((n,), k), 255 << n % 8 & 255 if n % 8 else 0
    last = [n * (k // 8) + (index + 1) * bits.plane_bytes(n) - 1 for index in range(k % 8)]
    data = bytearray(wire.encode(torch.full((n,), -1), form))
    assert all(data[at] == 255 ^ past for at in last)
    for at in last:
        data[at] |= junk & past
    assert torch.equal(wire.decode(bytes(data), form), ring.reduce(torch.full((n,), -1), k))


@settings(deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=3).map(tuple), k=RINGS)
def test_elements_as_bytes_keep_their_shape(shape: tuple[int, ...], k: int) -> None:
    x = words(np.random.default_rng(k), shape)
    back = wire.decode(wire.encode(x, Wire(shape, k)), Wire(shape, k))
    assert back.shape == shape
    assert torch.equal(back, ring.reduce(x, k))


def test_strided_tensors_as_bytes() -> None:
    x = torch.arange(-12, 12).reshape(4, 6)
    for k in (8, 20, 32, 64):
        turned = x.t()
        assert wire.encode(turned, Wire((6, 4), k)) == wire.encode(turned.contiguous(), Wire((6, 4), k))
        grown = x[:1].expand(4, 6)
        assert wire.encode(grown, Wire((4, 6), k)) == wire.encode(grown.contiguous(), Wire((4, 6), k))


def test_planes_as_bytes() -> None:
    x = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    form = Wire((2, 3), planes=True)
    assert wire.encode(x, form) == bytes(range(6))
    assert torch.equal(wire.decode(bytes(range(6)), form), x)


@pytest.mark.parametrize("form", [Wire((3,), 20), Wire((3,), 64), Wire((3,), 32), Wire((2, 2), planes=True)])
def test_wrong_sizes_are_refused(form: Wire) -> None:
    check_sizes(form)


@settings(deadline=None)
@given(n=st.integers(1, 70), k=RINGS)
def test_elements_of_wrong_sizes_are_refused(n: int, k: int) -> None:
    check_sizes(Wire((n,), k))


def check_sizes(form: Wire) -> None:
    for size in (0, form.size - 1, form.size + 1):
        with pytest.raises(FrameError, match=rf"takes {form.size} bytes, got {size}"):
            wire.decode(bytes(size), form)


def test_tensors_of_another_shape_do_not_leave() -> None:
    with pytest.raises(FrameError):
        wire.encode(torch.zeros(4, dtype=torch.int64), Wire((1,), 32))


def test_decoded_tensors_can_be_written() -> None:
    for form in (Wire((3,), 24), Wire((3,), 64), Wire((3,), planes=True)):
        x = wire.decode(bytes(form.size), form)
        x += 1
        assert x.tolist() == [1, 1, 1]


# streams


def test_streams_are_counter_mode_with_the_index_on_top() -> None:
    key, index = bytes(range(16)), 5
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = b"".join(encryptor.update((index << 64 | i).to_bytes(16, "big")) for i in range(20))
    assert bytes(Key(key).stream(index).read(320)) == blocks
    stream = Key(key).stream(index)
    assert bytes(stream.read(7)) + bytes(stream.read(0)) + bytes(stream.read(100)) == blocks[:107]
    assert Key(key).stream(index).words((2, 3)).numpy().tobytes() == blocks[:48]
    assert Key(key).stream(index).planes((4, 5)).numpy().tobytes() == blocks[:20]


def test_long_reads_are_one_stream() -> None:
    size = (1 << 20) + 17
    whole = Key(bytes(16)).stream(0).read(2 * size)
    stream = Key(bytes(16)).stream(0)
    assert bytes(whole) == bytes(stream.read(size)) + bytes(stream.read(size))


def test_streams_do_not_overlap() -> None:
    keys = [Key(bytes([i] * 16)) for i in range(3)]
    indices = (0, 1, 2, 2**32, 2**64 - 1)
    blocks = [bytes(k.stream(i).read(4096)) for k in keys for i in indices]
    pieces = {b[j : j + 16] for b in blocks for j in range(0, 4096, 16)}
    assert len(pieces) == 256 * len(keys) * len(indices)


def test_an_index_is_64_bits() -> None:
    for index in (-1, 2**64):
        with pytest.raises(OverflowError):
            Key(bytes(16)).stream(index)


def test_keys_are_derived_by_hkdf() -> None:
    """RFC 5869 with SHA-256, written out."""
    seed = bytes(range(32))
    extracted = hmac.digest(bytes(32), seed, hashlib.sha256)
    expected = hmac.digest(extracted, b"unseen/query/7/server\x01", hashlib.sha256)[:KEY_BYTES]
    assert derive_key(seed, "query", 7, "server") == expected
    names = [("a",), ("b",), ("a", 1), ("a", 2), ()]
    assert len({derive_key(seed, *n) for n in names}) == len(names)
    with pytest.raises(ValueError, match="at least 16 bytes, got 15"):
        derive_key(bytes(15), "a")


def test_seeds_are_fresh() -> None:
    assert len(fresh_seed()) == 32
    assert len({fresh_seed() for _ in range(100)}) == 100


def test_keys_do_not_show_themselves() -> None:
    secret = b"0123456789abcdef"
    for text in (repr(Key(secret)), str(Key(secret)), f"{Key(secret)}"):
        assert text == "Key(...)"


# fixed point


def test_fixed_point_defaults_and_limits() -> None:
    assert FixedPoint().as_dict() == {"fraction_bits": 16, "weight_fraction_bits": 14, "margin_bits": 1}
    assert FixedPoint(12, 10, 2) == FixedPoint(fraction_bits=12, weight_fraction_bits=10, margin_bits=2)


@pytest.mark.parametrize("name", ["fraction_bits", "weight_fraction_bits", "margin_bits"])
@pytest.mark.parametrize("value", [-1, 21, 16.0, "16", None])
def test_fixed_point_refuses(name: str, value: object) -> None:
    with pytest.raises(FixedPointError, match=f"{name} is an integer from"):
        FixedPoint(**{name: value})  # type: ignore[arg-type]


def test_helpers_are_exact() -> None:
    x = np.array([2**63, -(2**63) - 1, 5], dtype=object)
    assert (integers(tensor(x), 64) == x % 2**64).all()


def test_compiled_loops_of_several_processes_share_a_cache(tmp_path: Path) -> None:
    """Widths that different processes compiled must not be taken for one another."""
    script = (
        "import sys, numpy as np\n"
        "from protocols import wire\n"
        "x = np.arange(-9, 99)\n"
        "for k in map(int, sys.argv[1:]):\n"
        "    raw = np.frombuffer(wire.stored(x, k).tobytes(), np.uint8)\n"
        "    assert (wire.loaded(raw, x.size, k) == x & (1 << k) - 1).all(), k\n"
    )
    here = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    for widths in ("32 45", "7 56", "45 61 33"):
        subprocess.run([sys.executable, "-c", script, *widths.split()], env=environment, check=True)
