"""Pseudorandom streams: AES-128 in counter mode, keyed with HKDF-SHA-256 over a fresh seed.

A stream is named by (key, index). The key belongs to one (session, query number, party); the index is that of the
instruction in the Program (or of the weight); the 128-bit counter block is index * 2^64 + position. So two different
names never share a block, whatever was retried or reordered. The caller must never use a name twice: a query burns its
number before anything is drawn.
"""

import math
import secrets
from dataclasses import dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

KEY_BYTES = 16
SEED_BYTES = 32

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

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

    def __repr__(self) -> str:
        return "Key(...)"

    def stream(self, index: int) -> "Stream":
        """The stream of instruction ``index``; read it once."""
        return Stream(self, index)


class Stream:
    """The bytes of one named stream, read from front to back."""

    def __init__(self, key: Key, index: int) -> None:
        counter = index.to_bytes(8, "big") + bytes(8)
        self._encryptor = Cipher(algorithms.AES(key.value), modes.CTR(counter)).encryptor()

    def read(self, size: int) -> Bytes:
        out = np.empty(size, dtype=np.uint8)
        self.fill(out)
        return out

    def fill(self, out: Bytes) -> None:
        """Overwrite ``out`` with the next bytes."""
        for start in range(0, len(out), len(_ZEROS)):
            part = out[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(part)].data, part.data)

    def words(self, shape: tuple[int, ...]) -> Tensor:
        """Read uniform int64 elements of ``shape``: 8 bytes of the stream each, whatever the ring."""
        return torch.from_numpy(self.read(8 * math.prod(shape)).view(np.int64)).reshape(shape)

    def planes(self, shape: tuple[int, ...]) -> Tensor:
        """Read uniform bytes of ``shape``."""
        return torch.from_numpy(self.read(math.prod(shape))).reshape(shape)
