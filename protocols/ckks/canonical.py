"""The one form in which ciphertexts and keys travel: residues packed into bits, and seeds. Nothing in it is parsed.

What an object is (its level, scale, form and number of polynomials) follows from the Program and from the place where
it stands, so its bytes hold numbers alone, and their count is known before the first of them comes. The receiver checks
the count and that every residue is below its prime, and only then writes a file of SEAL's around the numbers. So SEAL
reads no byte that somebody else sent but residues and seeds; it meets no foreign header, size, count or compression.

Form of an object: its seeds, 64 bytes each; then for each prime the residues of its polynomials under this prime, each
in as many bits as the prime has. Bits are packed by columns: the N residues are 64 rows of N/64, and a column of 64
residues of b bits gives b words (64 bits, little-endian). A seed stands for a polynomial that SEAL expands from it with
BLAKE2xb.

SEAL's files: a header of 16 bytes (magic, its length, version, compression, size) and a body. A ciphertext's body is
its level's id, its form, three sizes, the scale, a correction factor (one for CKKS), an array, and a seed's file if a
seed stands for its second polynomial. An array is a file of its own: a count and 64-bit words. A switching key's
body is an id, the number of places, and for each place the number of ciphertexts and their files.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import zstandard
from numpy.typing import NDArray

from protocols.ckks.parameters import SEED, Parameters

HEADER = 16  # bytes of a file of SEAL's: magic, its own length, version, compression, size
PLAIN, ZSTD = 0, 2  # compression
MAGIC, VERSION = 0xA15E, b"\x04\x03"  # of the files of SEAL 4; ``tests`` compare them with the library's own
META = 73  # bytes of a ciphertext's body before its array
BLAKE2XB = 1  # the kind of generator that expands a seed

Words = NDArray[np.uint64]


class InvalidCiphertext(ValueError):
    """The bytes are no ciphertext or key under these parameters."""


@dataclass(frozen=True)
class WireForm:
    """The form of one object: residues of ``polynomials`` polynomials under the first ``limbs`` primes, and ``seeds``.

    Residues are arrays of shape (polynomials, limbs, N).
    """

    parameters: Parameters
    limbs: int
    polynomials: int
    seeds: int = 0

    @cached_property
    def primes(self) -> list[int]:
        return self.parameters.primes[: self.limbs]

    @cached_property
    def size(self) -> int:
        """The exact bytes of such an object."""
        return self.polynomials * self.parameters.packed_bytes(self.limbs) + self.seeds * SEED

    def pack(self, residues: Words, seeds: Sequence[bytes] = ()) -> bytes:
        columns = residues.reshape(self.polynomials, self.limbs, 64, -1)
        packed = [_pack(columns[:, limb], prime.bit_length()) for limb, prime in enumerate(self.primes)]
        return b"".join([*seeds, *(words.astype("<u8").tobytes() for words in packed)])

    def unpack(self, data: bytes | memoryview, what: str) -> tuple[Words, list[bytes]]:
        """Return residues and seeds. Raises InvalidCiphertext, naming ``what``, for data of another form."""
        if len(data) != self.size:
            raise InvalidCiphertext(f"{what}: {len(data)} bytes, where it has {self.size}\nhint: send it again")
        n, at = self.parameters.degree, self.seeds * SEED
        out = np.empty((self.polynomials, self.limbs, n), np.uint64)
        for limb, prime in enumerate(self.primes):
            count = self.polynomials * n // 64 * prime.bit_length()
            words = np.frombuffer(data, "<u8", count, at).reshape(self.polynomials, prime.bit_length(), n // 64)
            out[:, limb] = _unpack(words, prime.bit_length()).reshape(self.polynomials, n)
            if int(out[:, limb].max()) >= prime:
                raise InvalidCiphertext(
                    f"{what}: a residue that is not below the prime {prime}\nhint: keys, ciphertexts and Program must "
                    "belong together"
                )
            at += 8 * count
        return out, [bytes(data[k * SEED : (k + 1) * SEED]) for k in range(self.seeds)]


def fresh(parameters: Parameters, level: int) -> WireForm:
    """Return the form of a ciphertext that the client made: one polynomial, and a seed for the other."""
    return WireForm(parameters, level + 1, 1, 1)


def computed(parameters: Parameters, level: int) -> WireForm:
    """Return the form of a ciphertext that the server computed: two polynomials."""
    return WireForm(parameters, level + 1, 2)


def public_key(parameters: Parameters) -> WireForm:
    return WireForm(parameters, parameters.levels + 2, 2)


def switching_key(parameters: Parameters) -> WireForm:
    """Return the form of a relinearization key or a key of one rotation: a polynomial and a seed for each digit."""
    return WireForm(parameters, parameters.levels + 2, parameters.levels + 1, parameters.levels + 1)


def _pack(rows: Words, bits: int) -> Words:
    """Pack (count, 64, columns) residues below 2^bits into (count, bits, columns) words."""
    out = np.zeros((len(rows), bits, rows.shape[2]), np.uint64)
    for row in range(64):
        word, shift = divmod(row * bits, 64)
        out[:, word] |= rows[:, row] << np.uint64(shift)
        if shift + bits > 64:
            out[:, word + 1] |= rows[:, row] >> np.uint64(64 - shift)
    return out


def _unpack(words: Words, bits: int) -> Words:
    out = np.empty((len(words), 64, words.shape[2]), np.uint64)
    for row in range(64):
        word, shift = divmod(row * bits, 64)
        out[:, row] = words[:, word] >> np.uint64(shift)
        if shift + bits > 64:
            out[:, row] |= words[:, word + 1] << np.uint64(64 - shift)
    out &= np.uint64((1 << bits) - 1)
    return out


# SEAL's files, written


def file(body: bytes) -> bytes:
    return struct.pack("<HB", MAGIC, HEADER) + VERSION + struct.pack("<B2xQ", PLAIN, HEADER + len(body)) + body


def array(words: Words) -> bytes:
    return file(struct.pack("<Q", words.size) + words.tobytes())


def ciphertext_file(
    identity: Sequence[int], residues: Words, scale: float, *, ntt: bool = True, seed: bytes | None = None
) -> bytes:
    """Return the file of a ciphertext of two polynomials.

    residues: (2, limbs, N); with a seed for the second polynomial, (1, limbs, N). A public key's is the same.
    """
    _, limbs, n = residues.shape
    body = struct.pack("<4Q?3QdQ", *identity, ntt, 2, n, limbs, scale, 1) + array(residues)
    return file(body if seed is None else body + file(bytes([BLAKE2XB]) + seed))


def switching_key_file(identity: Sequence[int], residues: Words, seeds: Sequence[bytes], place: int) -> bytes:
    """Return the file of keys with one key, at a place: 0 for relinearization, (g - 1) / 2 for Galois element g."""
    parts = [ciphertext_file(identity, row[None], 1.0, seed=seed) for row, seed in zip(residues, seeds, strict=True)]
    return file(
        struct.pack("<4QQ", *identity, place + 1) + bytes(8 * place) + struct.pack("<Q", len(parts)) + b"".join(parts)
    )


# SEAL's files, read: only those that this process made


def body_of(data: bytes) -> bytes:
    """Return the body of a file that SEAL wrote in this process."""
    if data[5] == PLAIN:
        return data[HEADER:]
    return zstandard.ZstdDecompressor().decompressobj().decompress(data[HEADER:])


def words_of(body: bytes, start: int) -> Words:
    """Return the words of the array whose file begins at ``start`` of a body."""
    (count,) = struct.unpack_from("<Q", body, start + HEADER)
    return np.frombuffer(body, np.uint64, count, start + HEADER + 8)


def pack_ciphertext(parameters: Parameters, data: bytes) -> bytes:
    """Return the canonical form of a ciphertext (or public key) from its file: with a seed if SEAL wrote one."""
    body = body_of(data)
    (limbs,) = struct.unpack_from("<Q", body, 49)
    words = words_of(body, META)
    polynomials = words.size // (limbs * parameters.degree)
    seeds = [body[-SEED:]] if polynomials == 1 else []
    return WireForm(parameters, limbs, polynomials, len(seeds)).pack(words, seeds)


def pack_switching_key(parameters: Parameters, data: bytes) -> bytes:
    """Return the canonical form of the only key in a file of keys."""
    body, at, count = body_of(data), 40, 0
    while not count:
        (count,) = struct.unpack_from("<Q", body, at)
        at += 8
    rows, seeds = list[Words](), list[bytes]()
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", body, at + 8)
        rows.append(words_of(body, at + HEADER + META))
        seeds.append(body[at + size - SEED : at + size])
        at += size
    return switching_key(parameters).pack(np.stack(rows), seeds)
