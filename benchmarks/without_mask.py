"""Linear layers without the mask B: the price of the client's products with encrypted weights, before it is an option.

    python -m benchmarks.without_mask [--tokens 128] [--write]

Today the dealer knows B, and a client holds D = W - B; together they know the weights W. Without B, the server encrypts
W once under a key of its own. Before a query the client computes the ciphertexts of r W - s for its mask r and a fresh
s, the server decrypts them, and the dealer deals nothing for linear layers. This is an exact prototype of that offline
step: every result is compared with r W - s modulo 2^ring.

Encryption: RLWE modulo 2^q in Z[X]/(X^N + 1) with a ternary secret; row k of W stands in the first coefficients of a
ciphertext (a_k, b_k) with b_k = a_k s + e + 2^(q - ring) W_k, of which as many coefficients of b_k are kept as W has
columns. The client sums over k by plain matrix products of coefficients (the outer products of Nimbus, 2024), cut into
limbs whose products a float64 holds exactly. Then the client adds an encryption of zero under the server's public key,
which hides r in the first half, and noise that floods r e in the second; it drops the low bits, and sends.

Two settings, because r has as many bits as the ring, and so does what it does to the noise:

- *wide*: one ciphertext a row; N = 8192. The flooding hides all values of a query within 2^-40.
- *narrow*: N = 4096; three ciphertexts a row, of W, 2^14 W and 2^28 W, for the digits of r. There is room for 2^-40 a
  value alone, so for 2^-19 a query of 2.65 million values.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import fft

from benchmarks import common
from benchmarks.common import RESULTS

Words = npt.NDArray[np.int64]

SIGMA, TAIL = 3.2, 6  # of errors: standard deviation, and the deviations that bound them
GUARD = 10  # bits sent below the ring's, so that rounding them cannot change a result
WEIGHT_BITS = 14
LAYERS = 6
SHAPES = {"query, key, value": (384, 1152), "attention output": (384, 384), "up": (384, 1536), "down": (1536, 384)}
"""The linear layers of one of MiniLM's six blocks: (inputs, outputs). One r serves query, key and value."""


@dataclass(frozen=True)
class Setting:
    """Parameters. modulus: q in bits; limb: bits of a limb, and of a digit of r in one product; digit: bits of r for
    one of the ``copies`` ciphertexts of a row; hiding: bits of flooding beyond the noise that depends on r.
    """

    degree: int
    modulus: int
    limb: int
    copies: int
    digit: int
    hiding: int
    ring: int = 41

    @property
    def limbs(self) -> int:
        return -(-self.modulus // self.limb)

    @property
    def sent(self) -> int:
        """Bits of each value that the client sends."""
        return self.ring + GUARD

    def flood(self, inputs: int) -> int:
        """Bits of the flooding noise: those of sum r e, and ``hiding`` more. Raises ValueError if q has no room."""
        digits = min(self.digit, self.ring)
        noise = math.log2(TAIL * SIGMA / math.sqrt(3)) + digits - 1 + math.log2(inputs * self.copies) / 2
        bits = math.ceil(noise + self.hiding)
        if bits + 2 > self.modulus - self.ring:
            raise ValueError(f"2^{bits} of noise in units of 2^{self.modulus - self.ring}: take a larger modulus")
        return bits


SETTINGS = {
    "wide": Setting(8192, 154, 21, 1, 42, 40 + 21),
    "narrow": Setting(4096, 106, 27, 3, 14, 40),
}

# numbers modulo 2^q, as limbs along the first axis


def carried(s: Setting, limbs: Words) -> Words:
    """Limbs of any size as limbs of ``limb`` bits, modulo 2^q."""
    out, carry = np.empty((s.limbs, *limbs.shape[1:]), np.int64), np.zeros(limbs.shape[1:], np.int64)
    for i in range(s.limbs):
        value = (limbs[i] if i < len(limbs) else 0) + carry
        out[i], carry = value & (1 << s.limb) - 1, value >> s.limb
    out[-1] &= (1 << s.modulus - s.limb * (s.limbs - 1)) - 1
    return out


def shifted(s: Setting, value: Words, bits: int) -> Words:
    """``value`` 2^bits as limbs; values have at most 53 bits."""
    out = np.zeros((s.limbs, *value.shape), np.int64)
    at, inside = divmod(bits, s.limb)
    for i in range(at, s.limbs):
        piece = value & (1 << s.limb) - 1 if i + 1 < s.limbs else value
        out[i], value = piece << inside, value >> s.limb
    return out


def random_limbs(s: Setting, generator: np.random.Generator, *shape: int) -> Words:
    return carried(s, generator.integers(0, 1 << s.limb, (s.limbs, *shape), dtype=np.int64))


def errors(generator: np.random.Generator, *shape: int) -> Words:
    return generator.normal(0, SIGMA, shape).round().astype(np.int64)


def spectrum(s: Setting, values: Words) -> npt.NDArray[np.complex128]:
    return np.asarray(fft.rfft(values.astype(np.float64), 2 * s.degree))


def polynomial_product(s: Setting, a: Words, transformed: npt.NDArray[np.complex128]) -> Words:
    """a times a small polynomial modulo X^N + 1; every limb by itself, as its sums stay below 2^53 / N."""
    long = fft.irfft(fft.rfft(a.astype(np.float64), 2 * s.degree) * transformed, 2 * s.degree)
    return np.asarray(np.rint(long[..., : s.degree] - long[..., s.degree :]), np.int64)


def top(s: Setting, value: Words) -> Words:
    """The ``sent`` top bits of numbers modulo 2^q, rounded."""
    drop = s.modulus - s.sent
    rounded = carried(s, value + shifted(s, np.ones((), np.int64), drop - 1).reshape(-1, *[1] * (value.ndim - 1)))
    out = np.zeros(value.shape[1:], np.int64)
    for i, limb in enumerate(rounded):
        at = i * s.limb - drop
        out += limb << at if at >= 0 else limb >> -at
    return out & (1 << s.sent) - 1


# the parties


class Server:
    """The owner of W, (inputs, outputs) of signed integers. a, b: the ciphertexts of its rows, as limbs."""

    def __init__(self, s: Setting, weights: Words, generator: np.random.Generator) -> None:
        self.s, self.outputs = s, weights.shape[1]
        secret = generator.integers(-1, 2, s.degree, dtype=np.int64)
        self._secret = spectrum(s, secret)
        rows = [shifted(s, weights, s.modulus - s.ring + s.digit * copy) for copy in range(s.copies)]
        message = np.concatenate(rows, axis=1)
        self.a = random_limbs(s, generator, message.shape[1], s.degree)
        self.b = np.empty((s.limbs, message.shape[1], self.outputs), np.int64)
        for k in range(0, message.shape[1], 64):
            part = np.s_[:, k : k + 64]
            product = polynomial_product(s, self.a[part], self._secret)[..., : self.outputs] + message[part]
            product[0] += errors(generator, *product.shape[1:])
            self.b[part] = carried(s, product)
        p = random_limbs(s, generator, s.degree)
        zero = polynomial_product(s, p, self._secret)
        zero[0] += errors(generator, s.degree)
        self.public = carried(s, zero), p

    def decrypt(self, a: Words, b: Words) -> Words:
        """r W - s modulo 2^ring, of what ``Client.product`` sends."""
        s, half, out = self.s, 1 << self.s.sent // 2, np.empty_like(b)
        for row in range(len(a)):
            low, high = (
                polynomial_product(s, x, self._secret)[: self.outputs] for x in (a[row] % half, a[row] // half)
            )
            out[row] = b[row] - low - high * half
        return np.asarray((out + (1 << GUARD - 1) >> GUARD) & (1 << s.ring) - 1, np.int64)


class Client:
    """The holder of the ciphertexts: for a product it needs them, and the server's public key."""

    def __init__(self, server: Server, generator: np.random.Generator) -> None:
        self.s, self.outputs, self._generator = server.s, server.outputs, generator
        self._limbs = [
            torch.from_numpy(np.concatenate(x, 1).astype(np.float64)) for x in zip(server.a, server.b, strict=True)
        ]
        self._public = [spectrum(server.s, part) for part in server.public]

    def product(self, r: Words, mask: Words) -> tuple[Words, Words]:
        """The two halves of encryptions of r W - mask. r: (tokens, inputs), mask: (tokens, outputs), below 2^ring."""
        s, sums = self.s, self._sums(r)
        a, b = sums[..., : s.degree], sums[..., s.degree :]
        generator, flood = self._generator, s.flood(r.shape[1])
        for row in range(len(r)):  # an encryption of zero
            u = spectrum(s, generator.integers(-1, 2, s.degree, dtype=np.int64))
            for half, key in ((b, self._public[0]), (a, self._public[1])):
                long = fft.irfft(key * u, 2 * s.degree)
                zero = np.rint(long[..., : s.degree] - long[..., s.degree :]).astype(np.int64)
                zero[0] += errors(generator, s.degree)
                half[:, row] += zero[:, : half.shape[2]]
        high = generator.integers(-(1 << flood % s.limb), 1 << flood % s.limb, b.shape[1:], dtype=np.int64)
        b[flood // s.limb] += high
        b[: flood // s.limb] += generator.integers(0, 1 << s.limb, (flood // s.limb, *b.shape[1:]), dtype=np.int64)
        b -= shifted(s, mask, s.modulus - s.ring)
        return top(s, carried(s, a)), top(s, carried(s, b))

    def _sums(self, r: Words) -> Words:
        """The sums of ciphertexts with factors r, not carried: (limbs, tokens, N + outputs)."""
        s = self.s
        factors = np.concatenate(digits(r - (r >> s.ring - 1 << s.ring), s.digit, s.copies), axis=1)
        out = np.zeros((s.limbs, len(r), s.degree + self.outputs), np.int64)
        for j, part in enumerate(digits(factors, s.limb, -(-s.digit // s.limb))):
            left = torch.from_numpy(part.astype(np.float64))
            for i in range(s.limbs - j):
                out[i + j] += (left @ self._limbs[i]).numpy().astype(np.int64)
        return out


def digits(value: Words, bits: int, count: int) -> list[Words]:
    """Digits around zero, the lowest first; the last one takes what is left."""
    out = []
    for _ in range(count - 1):
        out.append((value + (1 << bits - 1) & (1 << bits) - 1) - (1 << bits - 1))
        value = value - out[-1] >> bits
    return [*out, value]


# the measurement


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def measure(s: Setting, inputs: int, outputs: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    """One layer: processor seconds of both sides, bytes, and whether every result is exact."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(-(1 << WEIGHT_BITS), 1 << WEIGHT_BITS, (inputs, outputs), dtype=np.int64)
    r, mask = (generator.integers(0, 1 << s.ring, (tokens, n), dtype=np.int64) for n in (inputs, outputs))
    server, encrypting = timed(lambda: Server(s, weights, generator))
    client = Client(server, generator)
    (a, b), computing = timed(lambda: client.product(r, mask))
    result, decrypting = timed(lambda: server.decrypt(a, b))
    exact = (r.astype(np.uint64) @ weights.astype(np.uint64)).astype(np.int64) - mask & (1 << s.ring) - 1
    return {
        "right": bool((result == exact).all()),
        "once": {"server s": encrypting, "MB": server.b[0].size * s.modulus / 8e6},
        "query": {"client s": computing, "server s": decrypting, "MB": (a.size + b.size) * s.sent / 8e6},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--write", action="store_true", help="write a results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": common.machine("benchmarks.without_mask"), "tokens": options.tokens}
    for name, setting in SETTINGS.items():
        found = {layer: measure(setting, *shape, options.tokens) for layer, shape in SHAPES.items()}
        sums = {
            phase: {what: round(LAYERS * sum(f[phase][what] for f in found.values()), 2) for what in keys}
            for phase, keys in {"once": ("server s", "MB"), "query": ("client s", "server s", "MB")}.items()
        }
        right = all(f["right"] for f in found.values())
        report[name] = {"setting": asdict(setting), "right": right, "six blocks": sums, "layers of a block": found}
    print(json.dumps(report, indent=2))
    if options.write:
        (RESULTS / "without_mask.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
