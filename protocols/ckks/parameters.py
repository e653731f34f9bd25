"""Encryption parameters: ring degree and primes at 128-bit security, and the exact scale of every level.

A chain of primes has one base prime (the modulus of level 0, at which results are decrypted), one prime for each level,
which the rescaling after a product drops, and one special prime for key switching. ``MAXIMUM_BITS`` is the bound on all
primes together, for ternary secrets and 128 bits against classical attacks, by Bossuat et al., Security Guidelines for
Implementing Homomorphic Encryption (2024, eprint 2024/463). It is lower than that of the Homomorphic Encryption
Standard of 2018 (218 and 438 for N = 8192 and 16384), which SEAL checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from protocols.errors import DoesNotFit

MAXIMUM_BITS = {2048: 53, 4096: 106, 8192: 214, 16384: 430, 32768: 868}
SMALLEST_SCALE, LARGEST_PRIME = 22, 60
SEED = 64  # bytes that stand for a uniform polynomial


@dataclass(frozen=True)
class Parameters:
    """Encryption parameters; raises DoesNotFit if they are out of range or exceed 128-bit security.

    degree: N; a ciphertext has N/2 slots. levels: the number of products that can follow each other. scale_bits: the
    scale of every value (and every prime but the base and the special one). base_bits: the prime of level 0.
    spare_bits: by how much the special prime is larger than the base prime, so that key switching adds less noise than
    rescaling.
    """

    degree: int
    levels: int
    scale_bits: int
    base_bits: int
    spare_bits: int = 0

    def __post_init__(self) -> None:
        if self.degree not in MAXIMUM_BITS:
            raise DoesNotFit(f"ring degree {self.degree}\nhint: one of {', '.join(map(str, MAXIMUM_BITS))}")
        if not (
            SMALLEST_SCALE <= self.scale_bits < self.base_bits <= self.special_bits <= LARGEST_PRIME
            and 0 <= self.levels <= 64
        ):
            raise DoesNotFit(
                f"scale of {self.scale_bits} bits, base prime of {self.base_bits}, {self.levels} levels\n"
                f"hint: scales have {SMALLEST_SCALE} bits or more, the base prime more than that and at most "
                f"{LARGEST_PRIME}"
            )
        most, taken = MAXIMUM_BITS[self.degree], float(self.total_bits)
        if taken < most:  # leaves one bit for primes above their power of two; small ones are rare and may take more
            taken = math.log2(math.prod(self.primes))
        if taken >= most:
            raise DoesNotFit(
                f"{self.levels} levels of {self.scale_bits} bits take a modulus of {taken:.4g} bits; at 128-bit "
                f"security N = {self.degree} has {most}\n"
                "hint: fewer levels, less precision, or a larger ring"
            )

    @property
    def slots(self) -> int:
        return self.degree // 2

    @property
    def special_bits(self) -> int:
        return self.base_bits + self.spare_bits

    @property
    def prime_bits(self) -> list[int]:
        return [self.base_bits, *[self.scale_bits] * self.levels, self.special_bits]

    @property
    def total_bits(self) -> int:
        return sum(self.prime_bits)

    @cached_property
    def _chain(self) -> tuple[list[int], list[float]]:
        """Primes and scales, chosen together from the top level down.

        A level's prime is the one nearest to scale^2 / 2^scale_bits, so that the primes' distance from their powers of
        two does not double from level to level.
        """
        special = _nearest(self.degree, 2.0**self.special_bits, set(), below=True)
        base = _nearest(self.degree, 2.0**self.base_bits, {special}, below=True)
        used, primes, scales = {special, base}, list[int](), [2.0**self.scale_bits]
        for _ in range(self.levels):
            primes.append(_nearest(self.degree, scales[-1] ** 2 / 2.0**self.scale_bits, used))
            used.add(primes[-1])
            scales.append(scales[-1] ** 2 / primes[-1])
        return [base, *primes[::-1], special], scales[::-1]

    @property
    def primes(self) -> list[int]:
        """The primes themselves, the special one last."""
        return self._chain[0]

    @property
    def scales(self) -> list[float]:
        """The exact scale of values at each level.

        A product at level l has scale[l]^2 and is rescaled by that level's prime, so scale[l - 1] =
        scale[l]^2 / prime[l] exactly, and the operands of a sum always have equal scales.
        """
        return self._chain[1]

    def largest(self, level: int) -> float:
        """Return a number at which every vector of smaller ones can be encoded at a level, by 64-bit arithmetic.

        SEAL refuses values whose coefficients do not fit the level's modulus, and takes longer for larger ones.
        """
        bits = min(math.prod(self.primes[: level + 1]).bit_length() - 2, 62)
        return 2.0**bits / self.scales[level] * (1 - 2.0**-20)

    def limbs(self, level: int) -> int:
        return level + 1

    def packed_bytes(self, limbs: int) -> int:
        """Return the bytes of a polynomial's residues under the first primes: as many bits each as the prime has."""
        return sum(prime.bit_length() for prime in self.primes[:limbs]) * self.degree // 8

    def fresh_bytes(self, level: int) -> int:
        """Return the bytes of a fresh ciphertext on the wire: one polynomial, and a seed for the other."""
        return self.packed_bytes(level + 1) + SEED

    def ciphertext_bytes(self, level: int) -> int:
        """Return the bytes of a computed ciphertext on the wire: two polynomials."""
        return 2 * self.packed_bytes(level + 1)

    @property
    def public_key_bytes(self) -> int:
        return 2 * self.packed_bytes(self.levels + 2)

    @property
    def key_bytes(self) -> int:
        """Bytes of one rotation key (or the relinearization key): a polynomial over all primes and a seed a digit."""
        return (self.levels + 1) * (self.packed_bytes(self.levels + 2) + SEED)

    @property
    def key_memory(self) -> int:
        """Bytes of the same key in memory: two polynomials a digit, eight bytes a residue."""
        return 16 * self.degree * (self.levels + 1) * (self.levels + 2)


def _nearest(degree: int, target: float, used: set[int], *, below: bool = False) -> int:
    """Find the nearest prime to a number (or below it) that is 1 mod 2N, as a number-theoretic transform needs."""
    from sympy import isprime  # half a second, which no client without ciphertexts should wait for

    step = 2 * degree
    start = int(target) // step
    for distance in range(1 << 16):
        for k in (start - distance,) if below else (start - distance, start + distance + 1):
            candidate = k * step + 1
            if candidate > step and candidate not in used and (not below or candidate < target) and isprime(candidate):
                return candidate
    raise DoesNotFit(f"no prime near {target:.4g} for N = {degree}")
