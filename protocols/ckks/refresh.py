"""Client-aided refresh: the client decrypts and re-encrypts a ciphertext, and learns nothing of what it holds.

The server adds a mask to the *coefficients* of the plaintext polynomial: m + r, with r uniform in [-2^b, 2^b). The
client decrypts the integers m + r, encodes the same integers further up the chain (brought to that level's scale, which
differs by a thousandth or so, with the rounding of an integer), encrypts; the server takes r off. All of it is integer
arithmetic, so precision is what it was; masks on slots would meet the 53 bits of a double.

What the client sees of one coefficient is m + r with |m| <= 2^c (message and noise), at a statistical distance of at
most 2^(c - b - 1) from r alone. b = c + HIDING + log2(N) + 1 leaves 2^-HIDING for all N coefficients of a ciphertext
together (union bound); and m + r must not wrap: 2^b + 2^c < q / 2. Masks come from the operating system, once each.
The server sees a fresh ciphertext and nothing else: a decryption never comes back to it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from tenseal import sealapi

from protocols.ckks.codec import Coefficients, Integers
from protocols.ckks.parameters import Parameters
from protocols.ckks.seal import Client, Context

HIDING = 40  # statistical security of one refreshed ciphertext, in bits
INTEGER = 6  # values refreshed are below 2^INTEGER; with the scale, their coefficients are too


def mask_bits(parameters: Parameters) -> int:
    """b: masks are uniform in [-2^b, 2^b)."""
    return message_bits(parameters.scale_bits) + HIDING + (parameters.degree.bit_length() - 1) + 1


def message_bits(scale_bits: int) -> int:
    """c: a polynomial whose slots are below 2^INTEGER has coefficients below 2^(scale + INTEGER)."""
    return scale_bits + INTEGER


def reserve(degree: int, scale_bits: int, base_bits: int) -> int:
    """The lowest level whose modulus holds message and mask without wrapping."""
    needed = message_bits(scale_bits) + HIDING + degree.bit_length() + 2
    return max(0, -(-(needed + 1 - base_bits) // scale_bits))


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
    """Integers at one scale as integers at another, the ratio of which is near one: rounded, by half a unit at most,
    which is less than a fresh encryption's noise.
    """
    (a, b), (c, d) = wanted.as_integer_ratio(), scale.as_integer_ratio()
    numerator, denominator = a * d, b * c
    return (2 * integers * numerator + denominator) // (2 * denominator)


class Masks:
    """Draws masks for refreshes under some parameters."""

    def __init__(self, context: Context) -> None:
        self.coefficients = Coefficients(context)
        self.bits = mask_bits(context.parameters)

    def draw(self, level: int) -> Mask:
        n, width = self.coefficients.context.parameters.degree, self.bits + 1
        size = -(-width // 8)
        drawn = secrets.token_bytes(n * size)
        integers = np.array([int.from_bytes(drawn[i : i + size]) for i in range(0, n * size, size)], dtype=object)
        return Mask(self.coefficients, (integers & ((1 << width) - 1)) - (1 << self.bits), level)


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
