"""Pseudorandom streams: AES-128 in counter mode, keyed with HKDF-SHA-256 over a fresh seed.

A stream is named by (key, index). The key belongs to one (session, query number, party); the index is that of the
instruction in the Program (or of the weight); the 128-bit counter block is index * 2^64 + position. So two different
names never share a block, whatever was retried or reordered. The caller must never use a name twice: a query burns its
number before anything is drawn.
"""

import math
import secrets
import threading
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
SHORT = 1 << 14  # bytes: what is shorter is read faster from one cipher of the key than from a new one of the stream

_ZEROS = np.zeros(1 << 20, dtype=np.uint8)
_POSITIONS = np.arange(SHORT // BLOCK + 1, dtype=np.uint64)


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


class _Ciphers:
    """AES under one key: of counter blocks, from a cipher that all streams share, or in counter mode."""

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.AES(key)
        self._blocks: CipherContext | None = None
        self._lock = threading.Lock()  # a cipher works for one thread at a time

    def blocks(self, index: int, first: int, number: int) -> Bytes:
        """Return few blocks of a stream, of SHORT bytes and a block at most."""
        counters = np.empty((number, 2), ">u8")
        counters[:, 0], counters[:, 1] = index, _POSITIONS[:number]
        if first:
            counters[:, 1] += np.uint64(first)
        out = np.empty(BLOCK * (number + 1), np.uint8)  # the library wants room for one block more
        with self._lock:
            if self._blocks is None:
                self._blocks = Cipher(self._algorithm, modes.ECB()).encryptor()
            self._blocks.update_into(counters.data.cast("B"), out.data)
        return out[: BLOCK * number]

    def counting(self, index: int, first: int) -> CipherContext:
        """Return the cipher of a stream in counter mode, from a block on."""
        counter = index.to_bytes(8, "big") + first.to_bytes(8, "big")
        return Cipher(self._algorithm, modes.CTR(counter)).encryptor()


class Stream:
    """The bytes of one named stream, read from front to back."""

    def __init__(self, ciphers: _Ciphers, index: int) -> None:
        index.to_bytes(8, "big")  # raises: another index would have the blocks of a smaller one
        self._ciphers, self._index = ciphers, index
        self._at = 0
        self._encryptor: CipherContext | None = None  # stands at _at; None until much is read

    def read(self, size: int) -> Bytes:
        """Return the next bytes."""
        if size > SHORT or self._encryptor is not None:
            out = np.empty(size, dtype=np.uint8)
            self.fill(out)
            return out
        if not size:
            return np.empty(0, dtype=np.uint8)
        (first, inside), end = divmod(self._at, BLOCK), self._at + size
        self._at = end
        return self._ciphers.blocks(self._index, first, -(-end // BLOCK) - first)[inside : inside + size]

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
