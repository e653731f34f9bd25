"""Client-aided refresh: the client decrypts and re-encrypts a ciphertext, and learns nothing about its value.

The server adds a mask to the *coefficients* of the plaintext polynomial: m + r, with r uniform in [-M, M]. The client
decrypts the integers m + r and encodes the same integers at a higher level (brought to that level's scale, which
differs by a thousandth or so, and rounded to an integer). It encrypts them, and the server subtracts r. All of this is
integer arithmetic, so no precision is lost; masks on slots would be limited to the 53 bits of a double.

M = q/2 - 2^c fills the modulus q of the level up to the room that a message |m| <= 2^c needs. So m + r modulo q is
within 2^(c+1) / q of uniform *whatever m is*: if a value exceeds its range, the answer is wrong, but it stays secret.
``reserve`` chooses q so that N 2^(c+1) / q <= 2^-HIDING, which covers all coefficients of one refreshed ciphertext; R
of them in Q queries are within R Q 2^-HIDING (``hiding`` says by how much those of one query are). Masks come from the
operating system's generator, and each is used once.
The server also adds a fresh encryption of zero under the client's public key, because the second polynomial is a
function of the weights (see ``evaluate``).
Seen by the server: a fresh ciphertext and nothing else; a decryption never comes back to it in the clear.
Seen by the client: m + r, within that distance of uniform.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from protocols.ckks.codec import Coefficients, Integers, joined
from protocols.ckks.parameters import Parameters
from protocols.ckks.seal import Client, Context
from protocols.errors import DoesNotFit

HIDING = 40  # statistical distance of one refreshed ciphertext from uniform, at most 2^-HIDING
INTEGER = 6  # refreshed values are below 2^INTEGER, and so are their coefficients, divided by the scale


def message_bits(scale_bits: int) -> int:
    """Return c: a polynomial whose slots are below 2^INTEGER has coefficients below 2^c, c = scale_bits + INTEGER."""
    return scale_bits + INTEGER


def reserve(degree: int, scale_bits: int, base_bits: int) -> int:
    """Return the lowest level whose modulus hides a message, with a spare bit for primes that are below their bits."""
    needed = message_bits(scale_bits) + 1 + HIDING + (degree.bit_length() - 1) + 1
    return max(0, -(-(needed - base_bits) // scale_bits))


def largest_mask(parameters: Parameters, level: int) -> int:
    """Return M; raises DoesNotFit if the modulus of the level hides less than HIDING bits."""
    q, room = math.prod(parameters.primes[: level + 1]), 2 ** message_bits(parameters.scale_bits)
    if parameters.degree * 2 * room << HIDING > q:
        raise DoesNotFit(f"level {level} hides a message by less than {HIDING} bits\nhint: refresh at a higher level")
    return int(q // 2 - room)


def hiding(parameters: Parameters, level: int, count: int) -> float:
    """Return b: ``count`` masked ciphertexts together are within 2^-b of uniform. Q times as many lose log2 Q bits."""
    q, room = math.prod(parameters.primes[: level + 1]), 2 ** message_bits(parameters.scale_bits)
    return math.log2(q) - math.log2(2 * room * parameters.degree * count)


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask r, drawn for one ciphertext: added once, removed once."""

    coefficients: Coefficients
    integers: Integers
    level: int

    def added(self, ciphertext: Any) -> Any:
        """Return the ciphertext of m + r, which the client decrypts."""
        return self._combined(ciphertext, self.integers, self.level)

    def removed(self, ciphertext: Any, level: int) -> Any:
        """Return the ciphertext of m, from the client's fresh ciphertext of m + r at ``level``."""
        scales = self.coefficients.context.parameters.scales
        return self._combined(ciphertext, -rescaled(self.integers, scales[self.level], scales[level]), level)

    def _combined(self, ciphertext: Any, integers: Integers, level: int) -> Any:
        return self.coefficients.added(ciphertext, integers, level)


def rescaled(integers: Integers, scale: float, wanted: float) -> Integers:
    """Rescale integers from one scale to another whose ratio is near one, rounding by half a unit at most.

    The client's and the server's roundings differ by one unit at most, which is less than the noise of a fresh
    encryption.
    """
    (a, b), (c, d) = wanted.as_integer_ratio(), scale.as_integer_ratio()
    numerator, denominator = a * d, b * c
    return (2 * integers * numerator + denominator) // (2 * denominator)


class Masks:
    """A source of masks for refreshes under one set of parameters."""

    def __init__(self, context: Context) -> None:
        self.coefficients = Coefficients(context)

    def draw(self, level: int) -> Mask:
        """Draw a mask uniform in [-M, M] up to 2^-64: random integers of 64 bits more than the range, reduced."""
        parameters = self.coefficients.context.parameters
        n, span = parameters.degree, 2 * largest_mask(parameters, level) + 1
        words = -(-span.bit_length() // 64) + 1
        integers = joined(np.frombuffer(secrets.token_bytes(8 * n * words), "<u8").reshape(words, n))
        return Mask(self.coefficients, integers % span - span // 2, level)


class Refresher:
    """The client's side of a refresh: it decrypts the masked integers and encrypts them again at a higher level."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.coefficients = Coefficients(client.context)

    def refresh(self, masked: bytes, level: int, new_level: int) -> bytes:
        """Re-encrypt a masked ciphertext at ``level`` as a fresh one at ``new_level``, of the same integers.

        Raises InvalidCiphertext if the bytes are no ciphertext at that level.
        """
        plain = self.client.decrypt_plain(masked, level)
        scales = self.client.context.parameters.scales
        integers = rescaled(self.coefficients.integers(plain, level), scales[level], scales[new_level])
        return self.client.encrypt_plain(self.coefficients.plaintext(integers, new_level))
