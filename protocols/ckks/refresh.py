"""Client-aided refresh: the client decrypts and re-encrypts a ciphertext, and learns nothing of what it holds.

The server adds a mask to the *coefficients* of the plaintext polynomial: m + r, with r uniform in [-M, M]. The client
decrypts the integers m + r, encodes the same integers further up the chain (brought to that level's scale, which
differs by a thousandth or so, with the rounding of an integer), encrypts; the server takes r off. All of it is integer
arithmetic, so precision is what it was; masks on slots would meet the 53 bits of a double.

M = q/2 - 2^c fills the modulus q of the level but for the room of a message of |m| <= 2^c. So m + r modulo q is within
2^(c+1) / q of uniform *whatever m is*: a value beyond its range costs the answer, not its secrecy. ``reserve`` chooses
q so that N 2^(c+1) / q <= 2^-HIDING: all coefficients of one refreshed ciphertext together. R of them in Q queries: R Q
2^-HIDING. Masks come from the operating system, once each. A fresh encryption of zero under the client's public key is
added too, as the second polynomial is a function of weights (``evaluate``).
The server sees a fresh ciphertext and nothing else: a decryption never comes back to it in the clear.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from tenseal import sealapi

from protocols.ckks.codec import Coefficients, Integers
from protocols.ckks.parameters import Parameters
from protocols.ckks.seal import Client, Context
from protocols.errors import DoesNotFit

HIDING = 40  # statistical distance of one refreshed ciphertext from uniform, at most 2^-HIDING
INTEGER = 6  # values refreshed are below 2^INTEGER; with the scale, their coefficients are too


def message_bits(scale_bits: int) -> int:
    """c: a polynomial whose slots are below 2^INTEGER has coefficients below 2^(scale + INTEGER)."""
    return scale_bits + INTEGER


def reserve(degree: int, scale_bits: int, base_bits: int) -> int:
    """The lowest level whose modulus hides a message; primes may be a little below their bits, hence one more."""
    needed = message_bits(scale_bits) + 1 + HIDING + (degree.bit_length() - 1) + 1
    return max(0, -(-(needed - base_bits) // scale_bits))


def largest_mask(parameters: Parameters, level: int) -> int:
    """M; DoesNotFit where the modulus of the level hides less than HIDING bits."""
    q, room = math.prod(parameters.primes[: level + 1]), 2 ** message_bits(parameters.scale_bits)
    if parameters.degree * 2 * room << HIDING > q:
        raise DoesNotFit(f"level {level} hides a message by less than {HIDING} bits\nhint: refresh at a higher level")
    return int(q // 2 - room)


@dataclass(frozen=True, eq=False)
class Mask:
    """r, drawn for one ciphertext; added once, removed once."""

    coefficients: Coefficients
    integers: Integers
    level: int

    def added(self, ciphertext: Any) -> Any:
        """The ciphertext of m + r: what the client gets to see."""
        return self._combined(ciphertext, self.integers, self.level)

    def removed(self, ciphertext: Any, level: int) -> Any:
        """Of the client's fresh ciphertext of m + r at a level, the one of m."""
        scales = self.coefficients.context.parameters.scales
        return self._combined(ciphertext, -rescaled(self.integers, scales[self.level], scales[level]), level)

    def _combined(self, ciphertext: Any, integers: Integers, level: int) -> Any:
        out = sealapi.Ciphertext()
        self.coefficients.evaluator.add_plain(ciphertext, self.coefficients.plaintext(integers, level), out)
        return out


def rescaled(integers: Integers, scale: float, wanted: float) -> Integers:
    """Integers at one scale as integers at another, the ratio of which is near one: rounded, by half a unit at most;
    the client's and the server's roundings together by one, which is less than a fresh encryption's noise.
    """
    (a, b), (c, d) = wanted.as_integer_ratio(), scale.as_integer_ratio()
    numerator, denominator = a * d, b * c
    return (2 * integers * numerator + denominator) // (2 * denominator)


class Masks:
    """Draws masks for refreshes under some parameters."""

    def __init__(self, context: Context) -> None:
        self.coefficients = Coefficients(context)

    def draw(self, level: int) -> Mask:
        """Uniform in [-M, M] but for 2^-64: 64 bits more than the range has, reduced."""
        parameters = self.coefficients.context.parameters
        n, span = parameters.degree, 2 * largest_mask(parameters, level) + 1
        size = -(-span.bit_length() // 8) + 8
        drawn = secrets.token_bytes(n * size)
        integers = np.array([int.from_bytes(drawn[i : i + size]) for i in range(0, n * size, size)], dtype=object)
        return Mask(self.coefficients, integers % span - span // 2, level)


class Refresher:
    """The client's side: decrypt the masked integers, encrypt the same integers with all levels back."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.coefficients = Coefficients(client.context)

    def refresh(self, masked: bytes, level: int, new_level: int) -> bytes:
        """From a ciphertext at ``level`` to a fresh one at ``new_level``, of the same integers."""
        plain = self.client.decrypt_plain(masked, level)
        scales = self.client.context.parameters.scales
        integers = rescaled(self.coefficients.integers(plain, level), scales[level], scales[new_level])
        return self.client.encrypt_plain(self.coefficients.plaintext(integers, new_level))
