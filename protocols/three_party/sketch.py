"""A sketch of additively shared vectors, by which their holders find out whether each is a unit vector.

The client of a look-up gives two holders keys that should evaluate to shares of a unit vector e_id, and may give them
anything (see ``dpf``). So let a vector v of V words be any at all: w holds at the holder of key 0 and w' at that of
key 1, v = w - w' modulo 2^64. The two know a key of this query that the client does not know, and for every place x

    delta_x = F(x, w_x) - F(x, w'_x)        F: the first word of AES_k(w_x, x)

is zero where v_x = 0. Elsewhere it is uniform, and independent of all other places, as far as AES is a pseudorandom
permutation. The sketch of v is four sums over x, of which each holder computes its share alone:

    sum S = sum v_x        place A = sum x v_x        mark B = sum delta_x        product Z = sum x delta_x

If v = e_id, then S = 1, A = id and Z = A B. If v is no unit vector, S = 1 and Z = A B hold together with probability
V / 2^64 at most. For S = 1 says that some v_x is not zero. If it is only one, it is 1, and v a unit vector. If there
are two, x and y, then x - A and y - A differ by less than V, so one of them is no multiple of any power of two above V;
and Z - A B = sum (x - A) delta_x, of which that term is uniform over 2^64 / V values at least.

Vectors that should be the same (a look-up has one for each summand of the table) are checked together: A from the first
of them, B and Z from their sum, and an S from each. Then Z = A B makes all of them zero everywhere but at place A.

Source: sketches of shared vectors are of Boyle, Gilboa, Ishai (CCS 2016, section 4) and Boneh et al. ("Lightweight
Techniques for Private Heavy Hitters", S&P 2021): <t, v>^2 = <t^2, v> for random t, over a field. Modulo 2^64 that test
is worth little: v = e_id + 2^63 e_x passes it for every even t_x. The marks delta are what replaces the field: they are
uniform words, however many times two divides v_x. Verifiable DPFs (de Castro, Polychroniadou, Eurocrypt 2022) need no
message of a third party, but 64 bytes more a key, and a hash in which nobody finds four values that add up to zero.

Nothing is known of how v was made, so keys of other trees, keys that do not belong together, and corrections that the
two holders got differently are found like all others.

The client must not know the key before both holders have its keys. A client that works together with one of the three
servers may know those of this server's two pairs. The vector of the third pair is a unit vector even then, but to the
row's third summand the two can add any combination of rows of the other two summands, which that server holds anyway.

Seen by a holder: nothing; the sums stay shared (see ``checks`` for what becomes of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from protocols.kernels import compiled
from protocols.prg import KEY_BYTES, Stream

Array = np.ndarray[Any, np.dtype[Any]]

SUMS = 4  # words of a vector's sketch: S, A, B, Z
_HELD = 1 << 15  # words that are encrypted at a time: with their blocks they fit into a cache


@compiled
def _blocks(shares: Array, first: int, negate: bool, out: Array) -> None:
    """Write a block (w, x) for every word of (P, n) shares, of which column 0 is place ``first``."""
    for p in range(shares.shape[0]):
        for i in range(shares.shape[1]):
            value = shares[p, i]
            out[p, i, 0] = np.uint64(0) - value if negate else value
            out[p, i, 1] = np.uint64(first + i)


@compiled
def _summed(shares: Array, marks: Array, first: int, negate: bool, out: Array) -> None:
    """Add the sums of (P, n) shares and of their marks, the first words of (P, n, 2) blocks, to ``out``, (P, 4)."""
    for p in range(shares.shape[0]):
        total, place, mark, product = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
        for i in range(shares.shape[1]):
            x, value, f = np.uint64(first + i), shares[p, i], marks[p, i, 0]
            total += value
            place += x * value
            mark += f
            product += x * f
        out[p, 0] += total
        out[p, 1] += place
        out[p, 2] += np.uint64(0) - mark if negate else mark
        out[p, 3] += np.uint64(0) - product if negate else product


class Sketch:
    """One holder's share of the sketches of P vectors, summed up while they are evaluated.

    party: 0 or 1, which key of the pair it holds. stream: of a key that the two holders of the pair know, and that
    nobody else knows; it serves this sketch alone. sums: (P, 4) words, shares of S, A, B, Z.
    """

    def __init__(self, points: int, party: int, stream: Stream) -> None:
        key = stream.read(KEY_BYTES).tobytes()
        self._encrypt = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update_into
        self._negate = party == 1
        self._sums = np.zeros((points, SUMS), dtype=np.uint64)

    @property
    def sums(self) -> Tensor:
        return torch.from_numpy(self._sums.view(np.int64))

    def add(self, points: slice, first: int, shares: Tensor) -> None:
        """Add (P, n) shares of places first, ..., first + n - 1 of some of the vectors; each place is added once."""
        words, into = shares.numpy().view(np.uint64), self._sums[points]
        step = max(1, _HELD // max(1, len(words)))
        for start in range(0, words.shape[1], step):
            part = np.ascontiguousarray(words[:, start : start + step])
            blocks = np.empty((*part.shape, 2), dtype=np.uint64)
            _blocks(part, first + start, self._negate, blocks)
            marks = np.empty(blocks.size + 2, dtype=np.uint64)  # the cipher asks for room for one more block
            self._encrypt(blocks.reshape(-1).view(np.uint8).data, marks.view(np.uint8).data)
            _summed(part, marks[:-2].reshape(blocks.shape), first + start, self._negate, into)


def joined(sketches: Mapping[int, Sketch], pairs: int) -> Tensor:
    """Return this holder's share of S of every pair, A of pair 0, and B and Z of all pairs: (P, pairs + 3) words.

    sketches: by pair, those of which this party holds a share; it adds zero to the others.
    """
    (points, _), *_ = (s.sums.shape for s in sketches.values())
    out = torch.zeros((points, pairs + 3), dtype=torch.int64)
    for pair, sketch in sketches.items():
        total, place, mark, product = sketch.sums.unbind(1)
        out[:, pair] = total
        if pair == 0:
            out[:, pairs] = place
        out[:, pairs + 1] += mark
        out[:, pairs + 2] += product
    return out
