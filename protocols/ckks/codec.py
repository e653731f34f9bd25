"""Convert between SEAL's objects and numpy arrays, through SEAL's own file format.

A file is a header of 16 bytes (magic, its length, version, compression, size) and a body. A plaintext's body is its
level's id, the count, the scale and an array. A ciphertext's body is the id, its form, three sizes, the scale, a
correction factor (one for CKKS) and an array. An array is a file of its own: a count and 64-bit words.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from tenseal import sealapi

from protocols.ckks.seal import HEADER, PLAIN, Context, saved

MAGIC = 0xA15E

Words = NDArray[np.uint64]
Integers = NDArray[Any]  # Python integers of any size, one a coefficient


@lru_cache(maxsize=1)
def _version() -> bytes:
    return saved(sealapi.Plaintext())[3:5]


def _file(body: bytes) -> bytes:
    return struct.pack("<HB", MAGIC, HEADER) + _version() + struct.pack("<B2xQ", PLAIN, HEADER + len(body)) + body


def _array(words: Words) -> bytes:
    return _file(struct.pack("<Q", len(words)) + words.tobytes())


def _words(item: Any) -> Words:
    """Return the residues of a plaintext, or of both polynomials of a ciphertext; only for objects of this process."""
    data = saved(item)
    body = data[HEADER:] if data[5] == PLAIN else zstandard.ZstdDecompressor().decompressobj().decompress(data[HEADER:])
    start = (40 + 8 if isinstance(item, sealapi.Plaintext) else 32 + 1 + 24 + 8 + 8) + HEADER
    (count,) = struct.unpack_from("<Q", body, start)
    return np.frombuffer(body, np.uint64, count, start + 8)


class Coefficients:
    """Convert plaintexts to integer coefficients and back, exactly.

    sealapi can transform ciphertexts only, so a plaintext is put into the first polynomial of one. The second
    polynomial is a constant, because SEAL refuses a ciphertext without one.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.evaluator = sealapi.Evaluator(context.seal)

    def integers(self, plain: Any, level: int) -> Integers:
        """Return the coefficients of a plaintext at a level, between -q/2 and q/2."""
        n, primes = self.context.parameters.degree, self.context.parameters.primes[: level + 1]
        holder = self._ciphertext(_words(plain), level, ntt=True)
        self.evaluator.transform_from_ntt_inplace(holder)
        rows = _words(holder)[: n * len(primes)].astype(object).reshape(len(primes), n)
        modulus = 1
        total = np.zeros(n, dtype=object)
        for row, prime in zip(rows, primes, strict=True):  # Garner's algorithm: each residue gives one more digit
            digit = (row - total) * pow(modulus, -1, prime) % prime
            total = total + digit * modulus
            modulus *= prime
        return np.where(total > modulus // 2, total - modulus, total)

    def plaintext(self, integers: Integers, level: int) -> Any:
        """Return the plaintext with these coefficients at a level, with that level's scale."""
        p = self.context.parameters
        residues = np.concatenate([(integers % prime).astype(np.uint64) for prime in p.primes[: level + 1]])
        holder = self._ciphertext(residues, level, ntt=False)
        self.evaluator.transform_to_ntt_inplace(holder)
        words = _words(holder)[: len(residues)]
        body = struct.pack("<4QQd", *self.context.ids[level], len(words), p.scales[level]) + _array(words)
        return self.context.load(sealapi.Plaintext, _file(body), "plaintext")

    def _ciphertext(self, residues: Words, level: int, *, ntt: bool) -> Any:
        sizes = (2, self.context.parameters.degree, level + 1)
        body = struct.pack("<4Q?3QdQ", *self.context.ids[level], ntt, *sizes, 1.0, 1)
        both = np.concatenate([residues, np.ones_like(residues)])
        return self.context.load(sealapi.Ciphertext, _file(body + _array(both)), "polynomial")
