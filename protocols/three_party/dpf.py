"""Distributed point functions (DPF): f(x) = 1 if x == point else 0, for 0 <= x < domain, split into two keys.

Source: Boyle, Gilboa, Ishai, "Function Secret Sharing: Improvements and Extensions", CCS 2016: the tree-based DPF with
early termination, with outputs in Z_2^64. A key is the root of a binary tree of 128-bit seeds, each with a control bit.
Children come from a PRG; if the control bit is set, a word of the level, which both keys hold, corrects them. The two
evaluations agree off the path to the point, so that their outputs there add up to zero. A seed below which LEAF words
remain is not split further but stretched to them, and one output correction of LEAF words puts the 1 in.

Size: a key of one point has 16 (root) + 16 L (seeds) + ceil(L / 8) (control bits) + 8 LEAF (output) bytes, for
L = ceil(log2(ceil(domain / LEAF))) levels: 258 bytes for the 30 522 tokens of BERT.

PRG: AES_k(s) xor s for fixed public keys k, one for each child (Matyas-Meyer-Oseas). The lowest bit of a seed is always
cleared, because the control bit takes its place in a block. Leaves go through AES once more with keys of their own: if
they were output words themselves, their cleared bit would make the output correction show the parity of the point.

Seen by the holder of one key of a pair: the number of points and the domain. It learns nothing else, computationally,
if AES with a fixed public key behaves like a random permutation. Every key of every client is made with the same AES
keys, so guessing any one of N seeds takes about 2^127 / N AES calls.

Nothing here checks that keys are well-formed: any bytes of the right size are keys. The evaluations of malformed keys
add up to a vector of the sender's choice instead of a unit vector. ``sketch`` finds them out; without it the holders
would compute a linear function, chosen by the sender, of the table that they multiply the vector with, and a result
that depends on it would tell the sender about any linear combination of table rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from protocols.kernels import compiled
from protocols.prg import Key, derive_key, fresh_seed
from protocols.wire import FrameError

Array = np.ndarray[Any, np.dtype[Any]]

LEAF = 4  # words that one seed is stretched to; keys are as short as with 2, and there are fewer AES calls
SLICE = 1024  # the rows of the domain evaluated at a time are a multiple of this
_HELD = 1 << 17  # words of output held at a time, if the points allow it: they fit into a cache
_POINTS = 256  # points evaluated at a time
_ONE = np.uint64(1)


def levels(domain: int) -> int:
    """Return the number of levels of the tree; each seed of the last level covers LEAF values."""
    return (-(-domain // LEAF) - 1).bit_length()


def key_bytes(points: int, domain: int) -> int:
    """Return the bytes of one key for each of ``points`` points."""
    return points * sum(_widths(domain))


def _widths(domain: int) -> tuple[int, int, int, int]:
    """Return the bytes a point of the root, the corrections, the control bits and the output."""
    depth = levels(domain)
    return 16, 16 * depth, -(-depth // 8), 8 * LEAF


@dataclass(frozen=True, eq=False, repr=False)
class Keys:
    """One key for each of P points, as arrays of uint64.

    A block is two words; the lowest bit of its first word is the control bit. roots: (P, 2); the lowest bit is not
    used. corrections: (P, L, 2, 2), one block for the left child and one for the right, which differ in the control bit
    alone. outputs: (P, LEAF).
    """

    domain: int
    roots: Array
    corrections: Array
    outputs: Array

    def __repr__(self) -> str:
        return f"Keys({len(self)} points, domain {self.domain})"

    def __len__(self) -> int:
        return len(self.roots)

    def part(self, start: int, stop: int) -> Keys:
        """Return the keys of points start, ..., stop - 1."""
        return Keys(self.domain, *(x[start:stop] for x in (self.roots, self.corrections, self.outputs)))

    def to_bytes(self) -> bytes:
        """Encode to ``key_bytes`` bytes: roots, corrections with left control bits, packed right ones, outputs."""
        bits = np.packbits(self.corrections[:, :, 1, 0] & _ONE != 0, axis=1, bitorder="little")
        return b"".join(x.tobytes() for x in (self.roots, self.corrections[:, :, 0], bits, self.outputs))

    @staticmethod
    def from_bytes(buffer: bytes | memoryview, points: int, domain: int) -> Keys:
        """Decode keys that ``to_bytes`` encoded; raises FrameError on a wrong size."""
        if points < 0 or domain < 1:
            raise ValueError(f"no keys of {points} points in a domain of {domain}")
        if len(buffer) != (expected := key_bytes(points, domain)):
            raise FrameError(f"keys of {points} points, domain {domain}, take {expected} bytes, got {len(buffer)}")
        ends = np.cumsum([points * width for width in _widths(domain)])
        roots, left, packed, outputs = np.split(np.frombuffer(buffer, dtype=np.uint8), ends[:-1])
        depth = levels(domain)
        bits = np.unpackbits(packed.reshape(points, -(-depth // 8)), axis=1, count=depth, bitorder="little")
        corrections = np.repeat(_words(left, (points, depth, 1, 2)), 2, axis=2)
        corrections[:, :, 1, 0] = corrections[:, :, 1, 0] & ~_ONE | bits
        return Keys(domain, _words(roots, (points, 2)), corrections, _words(outputs, (points, LEAF)))


def _words(raw: Array, shape: tuple[int, ...]) -> Array:
    """Copy bytes to words: numba would compile again for an array that is read-only or not aligned."""
    return np.frombuffer(bytearray(raw), dtype=np.uint64).reshape(shape)


# the PRG

Nodes = tuple[Array, Array]  # of one level: seeds (P, n, 2), control bits cleared; control bits (P, n), words of 0 or 1
Prg = list[Callable[[Any, Any], int]]  # ciphers, of one thread: left and right children, then two words of a leaf each


def _prg() -> Prg:
    keys = (hashlib.sha256(f"unseen/dpf/{n}".encode()).digest()[:16] for n in range(2 + LEAF // 2))
    # ECB encrypts every block by itself, so nothing is carried from one call to the next
    return [Cipher(algorithms.AES(key), modes.ECB()).encryptor().update_into for key in keys]


def _encrypted(prg: Prg, which: int, seeds: Array) -> Array:
    """Return AES_k of the seeds; the kernels below do the xor."""
    out = np.empty(seeds.size + 2, dtype=np.uint64)  # the cipher asks for room for one more block
    prg[which](seeds.reshape(-1).view(np.uint8).data, out.view(np.uint8).data)
    return out[:-2].reshape(seeds.shape)


@compiled
def _corrected(nodes: Nodes, left: Array, right: Array, corrections: Array, out: Array, bits: Array) -> None:
    """Make the children of (P, n) nodes, left and right in turn, as many as ``out`` takes."""
    (seeds, controls), one = nodes, np.uint64(1)
    for p in range(out.shape[0]):
        for side in range(2):
            hashed = left[p] if side == 0 else right[p]
            first, second = corrections[p, side, 0], corrections[p, side, 1]
            for i in range((out.shape[1] + 1 - side) // 2):
                mask = np.uint64(0) - controls[p, i]
                low = hashed[i, 0] ^ seeds[p, i, 0] ^ (mask & first)
                bits[p, 2 * i + side] = low & one
                out[p, 2 * i + side, 0] = low & ~one
                out[p, 2 * i + side, 1] = hashed[i, 1] ^ seeds[p, i, 1] ^ (mask & second)


@compiled
def _stretched(nodes: Nodes, hashed: Array, outputs: Array, block: int, negate: bool, out: Array) -> None:
    """Write words 2 block and 2 block + 1 of every leaf, corrected. out: (P, n, LEAF), outputs: (P, LEAF)."""
    seeds, controls = nodes
    for p in range(seeds.shape[0]):
        for w in range(2):
            correction, at = outputs[p, 2 * block + w], 2 * block + w
            for i in range(seeds.shape[1]):
                value = (hashed[p, i, w] ^ seeds[p, i, w]) + controls[p, i] * correction
                out[p, i, at] = np.uint64(0) - value if negate else value


def _start(roots: Array, controls: Array) -> Nodes:
    seeds = roots.reshape(-1, 1, 2).copy()
    seeds[:, :, 0] &= ~_ONE
    return seeds, controls.astype(np.uint64).reshape(-1, 1)


def _children(prg: Prg, nodes: Nodes, corrections: Array, count: int) -> Nodes:
    """Return the first ``count`` children of the nodes. corrections: (P, 2, 2), those of the level."""
    left, right = (_encrypted(prg, side, nodes[0]) for side in range(2))
    out = np.empty((len(left), count, 2), dtype=np.uint64), np.empty((len(left), count), dtype=np.uint64)
    _corrected(nodes, left, right, np.ascontiguousarray(corrections), *out)
    return out


def _leaves(prg: Prg, nodes: Nodes, outputs: Array, *, negate: bool) -> Array:
    out = np.empty((*nodes[1].shape, LEAF), dtype=np.uint64)
    for block in range(LEAF // 2):
        _stretched(nodes, _encrypted(prg, 2 + block, nodes[0]), outputs, block, negate, out)
    return out


# keys


def generate(points: Sequence[int] | Tensor, domain: int) -> tuple[Keys, Keys]:
    """Make the two keys of each point from fresh randomness; the holder of one must never see the other.

    points: P indices below ``domain``, else ValueError.
    """
    at = np.asarray(points.tolist() if isinstance(points, Tensor) else points, dtype=np.int64)
    if at.ndim != 1 or domain < 1 or not ((at >= 0) & (at < domain)).all():
        raise ValueError(f"points are a list of indices below the domain of {domain}")
    count, depth, every = len(at), levels(domain), np.arange(len(at))
    prg, stream = _prg(), Key(derive_key(fresh_seed(), "dpf")).stream(0)
    roots = stream.read(2 * count * 16).view(np.uint64).reshape(2, count, 2)
    pair = _start(roots.reshape(-1, 2), np.repeat([0, 1], count))
    corrections = np.empty((count, depth, 2, 2), dtype=np.uint64)
    nothing = np.zeros((2 * count, 2, 2), dtype=np.uint64)
    for level in range(depth):
        right = at // LEAF >> (depth - 1 - level) & 1
        chosen, children = pair[1].reshape(2, count), _children(prg, pair, nothing, 2)
        seeds, controls = children[0].reshape(2, count, 2, 2), children[1].reshape(2, count, 2)
        # off the path the two evaluations become equal; on the path their control bits stay different
        correction = np.bitwise_xor.reduce(seeds[:, every, 1 - right])
        bits = controls[0] ^ controls[1] ^ (right[:, None] == np.arange(2))
        corrections[:, level] = correction[:, None]
        corrections[:, level, :, 0] |= bits
        seeds = seeds[:, every, right] ^ chosen[:, :, None] * correction
        controls = controls[:, every, right] ^ chosen * bits[every, right]
        pair = seeds.reshape(-1, 1, 2), controls.reshape(-1, 1)
    words = _leaves(prg, pair, np.zeros((2 * count, LEAF), dtype=np.uint64), negate=False).reshape(2, count, LEAF)
    outputs = (at[:, None] % LEAF == np.arange(LEAF)).astype(np.uint64) - words[0] + words[1]
    outputs = np.where(pair[1].reshape(2, count, 1)[1] == _ONE, -outputs, outputs)
    return Keys(domain, roots[0], corrections, outputs), Keys(domain, roots[1], corrections, outputs)


def evaluate(keys: Keys, party: int) -> Tensor:
    """Return additive shares modulo 2^64 of the points' unit vectors, (P, domain) int64; ``party``: which key it is."""
    out = torch.empty((len(keys), keys.domain), dtype=torch.int64)
    for rows, columns, values in slices(keys, party):
        out[rows, columns] = values
    return out


def slices(keys: Keys, party: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Evaluate in pieces, so that little is held at a time: yield (points, values of the domain, their shares).

    Pieces of the domain start at multiples of SLICE. At most max(256 SLICE, 2^17) words are held, and the tree above.
    """
    if party not in (0, 1):
        raise ValueError(f"a pair has keys 0 and 1, not {party}")
    prg, depth, leaves = _prg(), levels(keys.domain), -(-keys.domain // LEAF)
    below = min(depth, levels(SLICE))
    for start in range(0, len(keys), _POINTS):
        part = keys.part(start, start + _POINTS)
        nodes = _start(part.roots, np.full(len(part), party))
        for level in range(depth - below):
            nodes = _children(prg, nodes, part.corrections[:, level], -(-leaves >> (depth - 1 - level)))
        step = max(1, _HELD // (SLICE * len(part)))
        for first in range(0, nodes[1].shape[1], step):
            seeds, controls = (np.ascontiguousarray(x[:, first : first + step]) for x in nodes)
            end = min(leaves, (first + step) << below)
            for level in range(depth - below, depth):
                count = -(-(end - (first << below)) >> (depth - 1 - level))  # those above a leaf before the end
                seeds, controls = _children(prg, (seeds, controls), part.corrections[:, level], count)
            values = _leaves(prg, (seeds, controls), part.outputs, negate=party == 1).reshape(len(part), -1)
            columns = slice(LEAF * first << below, min(keys.domain, LEAF * end))
            shares = torch.from_numpy(values.view(np.int64))[:, : columns.stop - columns.start]
            yield slice(start, start + len(part)), columns, shares
