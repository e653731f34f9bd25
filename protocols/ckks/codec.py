"""Convert between SEAL's objects and numpy arrays, through SEAL's own file format.

A plaintext's file has its level's id, the count, the scale and an array; ``canonical`` describes the others.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from protocols.ckks.canonical import META, Words, array, body_of, ciphertext_file, file, words_of
from protocols.ckks.seal import Context, saved

Integers = NDArray[Any]  # Python integers of any size, one a coefficient


def _words(item: Any) -> Words:
    """Return the residues of a plaintext, or of both polynomials of a ciphertext; only for objects of this process."""
    return words_of(body_of(saved(item)), 40 + 8 if isinstance(item, sealapi.Plaintext) else META)


SMALL = 48  # bits of the largest primes whose residues are multiplied by digits of 16 bits within 64


def joined(words: Words) -> Integers:
    """Return the integers of which these are the words of 64 bits, (words, integers), the lowest first."""
    out: Integers = words[-1].astype(object)
    for row in words[-2::-1]:
        out = (out << 64) + row.astype(object)
    return out


def reduced(integers: Integers, primes: Sequence[int]) -> Words:
    """Return integers modulo each prime, (primes, integers), for primes of up to 48 bits by digits of 16 bits.

    A remainder of a Python integer takes ten times as long as the steps of one vector.
    """
    words = max(1, -(-(max(abs(int(integers.max())), abs(int(integers.min()))).bit_length() + 1) // 64))
    low = (1 << 64) - 1
    rows = np.empty((len(integers), words), "<u8")  # the two's complement, which is 2^(64 words) too large below zero
    for k in range(words):
        rows[:, k] = ((integers >> 64 * k) & low).astype(np.uint64)
    digits, negative = rows.view("<u2").T.astype(np.uint64), rows[:, -1] >> 63
    out = np.empty((len(primes), len(integers)), np.uint64)
    for at, prime in enumerate(primes):
        if prime.bit_length() > SMALL:
            out[at] = (integers % prime).astype(np.uint64)
            continue
        total = np.zeros(len(integers), np.uint64)
        for digit in digits[::-1]:
            total = ((total << 16) + digit) % prime
        out[at] = (total + negative * (prime - pow(2, 64 * words, prime))) % prime
    return out


def times(residues: Words, factor: int, prime: int) -> Words:
    """Return residues times a factor modulo a prime of up to 48 bits, by digits of the factor."""
    total: Words = np.zeros_like(residues)
    for shift in range(SMALL - 16, -1, -16):
        digit = np.uint64(factor >> shift & 0xFFFF)
        total = ((total << 16) % prime + residues * digit % prime) % prime
    return total


def combined(rows: Words, primes: Sequence[int]) -> Integers:
    """Return the integers between -q/2 and q/2 that have these residues, q being the product of the primes.

    By Garner's algorithm: each residue gives one more digit, whose place is worth the primes before it. rows: (primes,
    integers).
    """
    digits = list[Any]()
    for row, prime in zip(rows, primes, strict=True):
        inverse = pow(math.prod(primes[: len(digits)]), -1, prime)
        small = max(primes).bit_length() <= SMALL
        total = np.zeros_like(row) if small else np.zeros(len(row), object)
        for digit, place in zip(digits[::-1], primes[: len(digits)][::-1], strict=True):
            total = (times(total, place % prime, prime) + digit) % prime if small else (total * place + digit) % prime
        rest = (row + (prime - total)) % prime
        digits.append(times(rest, inverse, prime) if small else rest * inverse % prime)
    whole = digits[-1].astype(object)
    for digit, place in zip(digits[-2::-1], primes[-2::-1], strict=True):
        whole = whole * place + digit.astype(object)
    modulus = math.prod(primes)
    return np.asarray(np.where(whole > modulus // 2, whole - modulus, whole))


class Coefficients:
    """Convert plaintexts to integer coefficients and back, exactly.

    sealapi can transform ciphertexts only, so a plaintext is put into the first polynomial of one. The second
    polynomial is a constant, because SEAL refuses a ciphertext without one.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.evaluator = sealapi.Evaluator(context.seal)
        self._constants: dict[int, Any] = {}  # zero and the constant second polynomial, by level

    def integers(self, plain: Any, level: int) -> Integers:
        """Return the coefficients of a plaintext at a level, between -q/2 and q/2."""
        n, primes = self.context.parameters.degree, self.context.parameters.primes[: level + 1]
        holder = self._ciphertext(_words(plain), level, ntt=True)
        self.evaluator.transform_from_ntt_inplace(holder)
        return combined(_words(holder)[: n * len(primes)].reshape(len(primes), n), primes)

    def added(self, ciphertext: Any, integers: Integers, level: int) -> Any:
        """Return a ciphertext at a level plus these integer coefficients; the constant polynomial is taken off again.

        A plaintext would have to leave SEAL and come back, which takes as long as all the rest.
        """
        residues, out = reduced(integers, self.context.parameters.primes[: level + 1]), sealapi.Ciphertext()
        if level not in self._constants:
            self._constants[level] = self._transformed(np.zeros_like(residues), level)
        given, constant = self._transformed(residues, level), self._constants[level]
        given.scale = constant.scale = ciphertext.scale
        self.evaluator.add(ciphertext, given, out)
        self.evaluator.sub_inplace(out, constant)
        return out

    def _transformed(self, residues: Words, level: int) -> Any:
        holder = self._ciphertext(residues, level, ntt=False)
        self.evaluator.transform_to_ntt_inplace(holder)
        return holder

    def plaintext(self, integers: Integers, level: int) -> Any:
        """Return the plaintext with these coefficients at a level, with that level's scale."""
        p = self.context.parameters
        residues = reduced(integers, p.primes[: level + 1])
        words = _words(self._transformed(residues, level))[: residues.size]
        body = struct.pack("<4QQd", *self.context.ids[level], len(words), p.scales[level]) + array(words)
        return self.context.load(sealapi.Plaintext, file(body), "plaintext")

    def _ciphertext(self, residues: Words, level: int, *, ntt: bool) -> Any:
        rows = residues.reshape(1, level + 1, self.context.parameters.degree)
        both = np.concatenate([rows, np.ones_like(rows)])
        made = ciphertext_file(self.context.ids[level], both, 1.0, ntt=ntt)
        return self.context.load(sealapi.Ciphertext, made, "polynomial")
