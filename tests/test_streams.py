"""Streams are AES in counter mode, whatever the sizes in which they are read, and by how many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.ahead import TOGETHER, StreamsAhead, short_draws
from protocols.circuit import drawn
from protocols.flow import Instruction
from protocols.local import Truncate
from protocols.prg import SHORT, Key, fresh_seed
from protocols.protocol import Draw
from protocols.two_party.linear import Deliver
from protocols.two_party.opening import Open
from protocols.two_party.product import Product

SIZES = st.lists(st.one_of(st.integers(0, 70), st.integers(SHORT - 40, SHORT + 40), st.just(3 * SHORT)), max_size=8)
INDICES = st.one_of(st.integers(0, 9), st.integers(2**63, 2**64 - 1))


def key() -> Key:
    return Key(fresh_seed()[:16])


def counting(named: Key, index: int, size: int) -> bytes:
    """The bytes of a stream by the library's own counter mode."""
    cipher = Cipher(algorithms.AES(named.value), modes.CTR(index.to_bytes(8, "big") + bytes(8))).encryptor()
    return cipher.update(bytes(size))


@given(SIZES, INDICES)
def test_reads_of_any_sizes_are_the_bytes_of_counter_mode(sizes: list[int], index: int) -> None:
    named = key()
    stream = named.stream(index)
    assert b"".join(bytes(stream.read(size)) for size in sizes) == counting(named, index, sum(sizes))


@settings(deadline=None)
@given(st.dictionaries(INDICES, st.integers(0, 100), max_size=6), st.lists(st.integers(0, 70), max_size=4))
def test_streams_begun_together_are_those_of_counter_mode(begun: dict[int, int], sizes: list[int]) -> None:
    """Whatever was made at first, and whatever is read: its bytes or others, from memory of its own."""
    named = key()
    streams = named.streams(begun)
    assert list(streams) == list(begun)
    found: dict[int, list[np.ndarray[tuple[int], np.dtype[np.uint8]]]] = {
        index: [stream.read(size) for size in (*sizes, SHORT + 1, 5)] for index, stream in streams.items()
    }
    for index, parts in found.items():
        assert b"".join(map(bytes, parts)) == counting(named, index, sum(sizes) + SHORT + 6)
        assert all(part.ctypes.data % 8 == 0 for part in parts if len(part))
        parts[0][:] = 0
    for index, parts in found.items():  # no other part has changed
        rest = b"".join(map(bytes, parts[1:]))
        assert rest == counting(named, index, sum(sizes) + SHORT + 6)[-len(rest) :]


@settings(deadline=None)
@given(st.data(), st.sampled_from([None, True, False]), st.integers(0, 1))
def test_instructions_have_their_streams_in_any_order(data: st.DataObject, offline: bool | None, party: int) -> None:
    """Made ahead or not, the streams of a circuit's instructions are those of the key."""
    kinds = [Open((5,), 40), Deliver((3,), 33), Product((2,), 20), Truncate((2,), 20, 3), Open((SHORT,), 64)]
    circuit = [Instruction(kind) for kind in data.draw(st.lists(st.sampled_from(kinds), max_size=2 * TOGETHER))]
    named, order = key(), data.draw(st.permutations(range(len(circuit))))
    ahead = StreamsAhead(short_draws(circuit, party, offline), named)
    for index in order:
        size = circuit[index].protocol.drawn_bytes[party]
        assert bytes(ahead.stream(index).read(size)) == bytes(named.stream(index).read(size))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([1, 3, 8, 200, SHORT // 8 + 1])), max_size=5))
def test_draws_read_together_are_those_read_one_by_one(kinds: list[tuple[bool, int]]) -> None:
    named = key()
    draws = [Draw(f"d{i}", (size,), planes=planes) for i, (planes, size) in enumerate(kinds)]
    found, stream = list(drawn(draws, named.stream(4))), named.stream(4)
    for spec, share in zip(draws, found, strict=True):
        wanted = stream.planes(spec.shape) if spec.planes else stream.words(spec.shape)
        assert share.dtype == wanted.dtype
        assert share.equal(wanted)
        assert share.data_ptr() % 8 == 0 or spec.planes


def test_a_share_may_be_overwritten_without_a_trace_in_another() -> None:
    named = key()
    draws = [Draw("a", (5,)), Draw("b", (5,))]
    first, second = drawn(draws, named.stream(0))
    first.add_(1)
    assert second.equal([*drawn(draws, named.stream(0))][1])


def test_threads_read_streams_of_one_key_at_a_time() -> None:
    named = key()

    def read(index: int) -> bytes:
        return b"".join(bytes(named.stream(index).read(48)) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(16)))
    assert found == [counting(named, index, 48) * 200 for index in range(16)]


def test_words_fill_their_shape() -> None:
    stream = key().stream(1)
    stream.planes((3,))
    words = stream.words((2, 5))
    assert words.shape == (2, 5)
    assert words.dtype == torch.int64
    assert np.unique(words.numpy()).size == 10
