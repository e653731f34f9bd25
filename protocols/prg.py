"""Pseudorandom streams: AES-128 in counter mode, keyed with HKDF-SHA-256 over a fresh seed.

A stream is named by (key, index). The key belongs to one (session, query number, party); the index is that of the
instruction in the Program (or of the weight); the 128-bit counter block is index * 2^64 + position. So two different
names never share a block, whatever was retried or reordered. The caller must never use a name twice: a query burns its
number before anything is drawn.
"""

import math
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

KEY_BYTES = 16
SEED_BYTES = 32

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

BLOCK = 16
_INDICES = 1 << 64
SHORT = 1 << 14  # bytes: what is shorter takes no cipher of its own

_ZEROS = np.zeros(1 << 20, dtype=np.uint8)


def fresh_seed() -> bytes:
    """Draw a seed: 32 bytes from the operating system's generator."""
    return secrets.token_bytes(SEED_BYTES)


def derive_key(seed: bytes, *names: str | int) -> bytes:
    """Derive an AES key for one purpose from a seed; different names give independent keys (HKDF-SHA-256, RFC 5869).

    Raises ValueError if the seed has fewer than 16 bytes.
    """
    return _derive(seed, KEY_BYTES, names)


def derive_seed(seed: bytes, *names: str | int) -> bytes:
    """Derive another seed of SEED_BYTES bytes, which tells nothing about the first."""
    return _derive(seed, SEED_BYTES, names)


def next_seed(seed: bytearray) -> None:
    """Replace a seed, where it lies, by its successor, from which it cannot be computed (HKDF-SHA-256)."""
    seed[:] = _derive(bytes(seed), SEED_BYTES, ("next",))


def _derive(seed: bytes, length: int, names: tuple[str | int, ...]) -> bytes:
    if len(seed) < KEY_BYTES:
        raise ValueError(f"a seed has at least {KEY_BYTES} bytes, got {len(seed)}")
    info = "/".join(["unseen", *map(str, names)]).encode()
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive(seed)


@dataclass(frozen=True, repr=False)
class Key:
    """An AES key whose repr never shows it."""

    value: bytes
    _ciphers: "_Ciphers" = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ciphers", _Ciphers(self.value))

    def __repr__(self) -> str:
        return "Key(...)"

    def stream(self, index: int) -> "Stream":
        """The stream of instruction ``index``; read it once. Raises OverflowError for an index of more than 64 bits."""
        return Stream(self._ciphers, index)

    def streams(self, sizes: Mapping[int, int]) -> "dict[int, Stream]":
        """Return streams by index, of which so many first bytes are made in one call of the cipher."""
        made = self._ciphers.beginnings(sizes)
        return {index: Stream(self._ciphers, index, first) for index, first in zip(sizes, made, strict=True)}


class _Ciphers:
    """AES in counter mode under one key: a cipher that all streams share reads what is short; others are one's own."""

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.AES(key)
        self._shared: CipherContext | None = None
        self._lock = threading.Lock()  # a cipher works for one thread at a time

    def read(self, index: int, at: int, out: Bytes) -> None:
        """Overwrite ``out`` with the bytes of a stream from its byte ``at`` on."""
        first, inside = divmod(at, BLOCK)
        with self._lock:
            if self._shared is None:
                self._shared = self.counting(index, first)
            else:
                self._shared.reset_nonce(_counter(index, first))
            if inside:
                self._shared.update(bytes(inside))
            self._shared.update_into(_ZEROS[: len(out)].data, out.data)

    def beginnings(self, sizes: Mapping[int, int]) -> "list[Bytes]":
        """Return the first bytes of several streams: blocks of counters, encrypted as counter mode does."""
        blocks = np.array([-(-size // BLOCK) for size in sizes.values()], np.int64)
        stops = np.cumsum(blocks)
        counters = np.empty((int(stops[-1]) if len(stops) else 0, 2), ">u8")
        counters[:, 0] = np.repeat(np.array(list(sizes), np.uint64), blocks)
        counters[:, 1] = np.arange(len(counters)) - np.repeat(stops - blocks, blocks)
        out = np.empty(BLOCK * len(counters) + BLOCK - 1, np.uint8)  # the library wants room for a block more
        encryptor = Cipher(self._algorithm, modes.ECB()).encryptor()  # no block of counters comes twice
        encryptor.update_into(counters.data.cast("B") if len(counters) else b"", out.data)
        starts = BLOCK * (stops - blocks)
        return [out[start : start + size] for start, size in zip(starts.tolist(), sizes.values(), strict=True)]

    def counting(self, index: int, first: int) -> CipherContext:
        """Return a cipher that stands at a block of a stream."""
        return Cipher(self._algorithm, modes.CTR(_counter(index, first))).encryptor()


def _counter(index: int, block: int) -> bytes:
    """Return the counter of a stream's block. Raises OverflowError for an index of more than 64 bits."""
    return index.to_bytes(8, "big") + block.to_bytes(8, "big")


class Stream:
    """The bytes of one named stream, read from front to back."""

    def __init__(self, ciphers: _Ciphers, index: int, first: Bytes | None = None) -> None:
        if not 0 <= index < _INDICES:  # another one would have the blocks of a smaller one
            raise OverflowError(f"the stream {index}, where names have 64 bits")
        self._ciphers, self._index = ciphers, index
        self._at, self._first = 0, first  # bytes that are there already
        self._encryptor: CipherContext | None = None  # stands at _at; None until much is read

    def read(self, size: int) -> Bytes:
        """Return the next bytes, in memory that nothing else reads; the first is at a multiple of 8."""
        if self._first is not None and self._encryptor is None and self._at + size <= len(self._first):
            start, self._at = self._at, self._at + size
            here = self._first[start : self._at]
            return here.copy() if start % 8 else here
        out = np.empty(size, dtype=np.uint8)
        if size > SHORT or self._encryptor is not None:
            self.fill(out)
        elif size:
            self._ciphers.read(self._index, self._at, out)
            self._at += size
        return out

    def fill(self, out: Bytes) -> None:
        """Overwrite ``out`` with the next bytes."""
        if self._encryptor is None:
            first, inside = divmod(self._at, BLOCK)
            self._encryptor = self._ciphers.counting(self._index, first)
            self._encryptor.update(bytes(inside))
        for start in range(0, len(out), len(_ZEROS)):
            part = out[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(part)].data, part.data)

    def words(self, shape: tuple[int, ...]) -> Tensor:
        """Read uniform int64 elements of ``shape``: 8 bytes of the stream each, whatever the ring."""
        return torch.from_numpy(as_words(self.read(8 * math.prod(shape))).reshape(shape))

    def planes(self, shape: tuple[int, ...]) -> Tensor:
        """Read uniform bytes of ``shape``."""
        return torch.from_numpy(self.read(math.prod(shape)).reshape(shape))


def as_words(taken: Bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return bytes of a stream as int64, of which compiled code and torch want the first at a multiple of 8."""
    words = taken.view(np.int64)
    return words if words.flags.aligned else words.copy()
