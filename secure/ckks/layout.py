"""The layout of tensors in slots: contents, and linear maps between them as diagonals.

A *content* says for every slot of a ciphertext which element of a tensor it holds. ``EMPTY`` means none: the slot is
zero, or holds something that must not be read. Several slots may hold the same element.

The cube: slots have the axes (d, u, h, t), t fastest: features of a head, keys, heads, queries (tokens). With d
outermost, a sum over d is cyclic in the whole ciphertext, so that every slot gets it. Its result does not depend on d,
so that a sum over u, whose carry goes into d, is right everywhere too. Neither sum takes a mask or a level. Heads or
keys that do not fit go to further ciphertexts. (Attention takes T^2 d slots for all heads; the d-outermost order is
ours.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocols.ckks.diagonals import Diagonals
from secure.ckks.linear_maps import Matrix
from secure.errors import DoesNotPack

EMPTY = -1
SAMPLE = 256  # entries still to be served, on which offsets are compared

Content = NDArray[np.int64]  # (ciphertexts, slots)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Cube:
    """The axes of a ciphertext. d, u, h, t: sizes within one ciphertext. heads, keys: totals over all ciphertexts."""

    slots: int
    d: int
    u: int
    h: int
    t: int
    heads: int
    keys: int

    @classmethod
    def fitting(cls, slots: int, features: int, keys: int, heads: int, tokens: int) -> Cube:
        """Choose the cube with the fewest ciphertexts; among those, keys are divided before heads.

        ``keys`` and ``tokens`` must be powers of two, as sums are computed by doubling. Raises DoesNotPack.
        """
        for name, n in (("keys", keys), ("tokens", tokens)):
            if n != power_of_two(n):
                raise DoesNotPack(f"{n} {name} in an attention\nhint: pad the input to {power_of_two(n)} tokens")
        d, t = power_of_two(features), tokens
        best: tuple[tuple[int, int], Cube] | None = None
        for h in {1 << k for k in range(power_of_two(heads).bit_length())}:
            for u in {1 << k for k in range(keys.bit_length())}:
                if d * u * h * t <= slots:
                    count = -(-heads // h) * (keys // u)
                    cube = cls(slots, d, u, h, t, heads, keys)
                    if best is None or (count, -h) < best[0]:
                        best = (count, -h), cube
        if best is None:
            raise DoesNotPack(f"{tokens} tokens of {features} features a head exceed {slots} slots")
        return best[1]

    @property
    def strides(self) -> dict[str, int]:
        return {"t": 1, "h": self.t, "u": self.t * self.h, "d": self.t * self.h * self.u}

    @property
    def head_groups(self) -> int:
        return -(-self.heads // self.h)

    @property
    def key_groups(self) -> int:
        return self.keys // self.u

    @property
    def axes(self) -> dict[str, NDArray[np.int64]]:
        """The coordinates of every slot by axis. Beyond d * u * h * t slots the pattern repeats."""
        place = np.arange(self.slots)
        sizes = {"t": self.t, "h": self.h, "u": self.u, "d": self.d}
        return {name: place // stride % sizes[name] for name, stride in self.strides.items()}

    def attention(self, index: str, shape: tuple[int, ...]) -> Content:
        """Return the content of an attention's tensor (heads, ...), with one row per (head group, key group).

        index: the axes of its last two dimensions, out of "t" (queries), "u" (keys), "d" (features). Elements repeat
        along the third of these axes.
        """
        axes, rows = self.axes, []
        for group in range(self.head_groups):
            for keys in range(self.key_groups):
                head = axes["h"] + group * self.h
                at = {"t": axes["t"], "u": axes["u"] + keys * self.u, "d": axes["d"]}
                first, second = at[index[0]], at[index[1]]
                inside = (head < shape[0]) & (first < shape[1]) & (second < shape[2])
                rows.append(np.where(inside, (head * shape[1] + first) * shape[2] + second, EMPTY))
        return np.stack(rows)

    def summed(self, index: str, shape: tuple[int, ...]) -> Content:
        """Return the content that a sum over keys leaves: elements where u is zero, with one row per head group.

        If the tensor has keys, they are along t.
        """
        content = self.attention(index.replace("u", "t"), shape)[:: self.key_groups]
        return first_only(content, self.strides["u"], self.u)

    def once(self, index: str, shape: tuple[int, ...]) -> Content:
        """Return a content of the same tensor with every element once, in as few ciphertexts as possible."""
        if self.head_groups == 1:
            return self.summed(index, shape)
        heads, features = shape[0], shape[1 + index.index("d")]
        dense = self.dense(self.t, heads * features)
        token, head, feature = dense // (heads * features), dense // features % heads, dense % features
        order = (feature, token) if index[0] == "d" else (token, feature)
        return np.where(dense >= 0, (head * shape[1] + order[0]) * shape[2] + order[1], EMPTY)

    def kept(self, shape: tuple[int, ...]) -> tuple[Content, Content]:
        """Return the content of rows that are kept, (heads, rows, features), and the row of each slot, -1 for none.

        It is that in which attention reads them. Several heads of queries may have keys and values in common.
        """
        heads, rows, features = shape
        content, number = list[Content](), list[Content]()
        for group in range(self.head_groups):
            for keys in range(self.key_groups):
                head, row = self.axes["h"] + group * self.h, self.axes["u"] + keys * self.u
                own, feature = head * heads // self.heads, self.axes["d"]
                inside = (head < self.heads) & (row < rows) & (feature < features)
                content.append(np.where(inside, (own * rows + row) * features + feature, EMPTY))
                number.append(np.where(inside, row, EMPTY))
        return np.stack(content), np.stack(number)

    def natural(self, shape: tuple[int, ...]) -> Content:
        """Return the default content of a tensor: tokens by features, of all heads together or of every head.

        With one token everything is a row of features.
        """
        rows, heads = int(np.prod(shape[:-1])), int(np.prod(shape[:-2]))
        if rows not in (1, self.t) and heads == self.heads and shape[-2] == self.t and shape[-1] <= self.d:
            return self.once("td", (heads, *shape[-2:]))
        return self.dense(1, int(np.prod(shape))) if self.t == 1 else self.dense(rows, shape[-1])

    def dense(self, rows: int, features: int) -> Content:
        """Return the content of a matrix (rows, features).

        Rows lie along t; features along d, then h, then u, then further ciphertexts. The features of a single token
        repeat with the next power of two, so that maps between them take offsets which are cyclic. Raises DoesNotPack.
        """
        if rows not in (1, self.t):
            raise DoesNotPack(f"{rows} rows of {features} features among {self.t} tokens")
        axes = self.axes
        each = self.d * self.h * self.u
        period = (np.arange(self.slots) < each * self.t) | (self.t == 1)
        place = (axes["u"] * self.h + axes["h"]) * self.d + axes["d"]
        place = place % power_of_two(features) if self.t == 1 else place
        out = []
        for part in range(-(-features // each)):
            feature = place + part * each
            inside = (feature < features) & (axes["t"] < rows) & period
            out.append(np.where(inside, axes["t"] * features + feature, EMPTY))
        return np.stack(out)


def diagonals(matrix: Matrix, target: Content, source: Content, limit: int) -> Diagonals | None:
    """Return the diagonals of a map from the elements in ``source`` (all its ciphertexts) to those in ``target`` (one).

    matrix: (elements of the result, elements of the source). Offsets are chosen greedily. Of all places of an element,
    the one is taken whose offset also serves most of a sample of the remaining entries; ties go to offsets along an
    outer axis, then to the nearest. The result is None if there were more than ``limit`` diagonals, or if no slot holds
    an element.
    """
    slots = target.shape[-1]
    rows = np.flatnonzero(target >= 0)
    picked = matrix[target[rows]]
    if len(rows) and int(np.diff(picked.indptr).max()) > limit:  # a diagonal gives a slot one element
        return None
    wanted = picked.tocoo()
    slot, element, value = rows[wanted.coords[0]], wanted.coords[1].astype(np.int64), wanted.data
    size = matrix.shape[1]
    keys = slot * size + element
    order = np.argsort(keys)
    keys, slot, element, value = keys[order], slot[order], element[order], value[order]
    places = _Places(source, size)
    left, out = np.ones(len(keys), dtype=bool), dict[tuple[int, int], NDArray[np.float64]]()
    generator = np.random.default_rng(0)
    while left.any():
        if len(out) >= limit:
            return None
        waiting = np.flatnonzero(left)
        first = waiting[0]
        part, place = places.of(int(element[first]))
        if not len(part):
            return None
        sample = generator.choice(waiting, SAMPLE) if len(waiting) > SAMPLE else waiting
        offset = (place - slot[first]) % slots
        served = source[part[:, None], (slot[sample] + offset[:, None]) % slots] == element[sample]
        aligned = np.where(offset, offset & -offset, slots)  # an offset along an outer axis crosses no edge of others
        best = np.lexsort((np.minimum(offset, slots - offset), -aligned, -served.sum(1)))[0]
        where = int(part[best]), int(offset[best])
        found = source[where[0]][(rows + where[1]) % slots]
        at = np.minimum(np.searchsorted(keys, rows * size + found), len(keys) - 1)
        hits = at[(found >= 0) & (keys[at] == rows * size + found)]
        hits = hits[left[hits]]
        vector = out.setdefault(where, np.zeros(slots))
        vector[slot[hits]] = value[hits]
        left[hits] = False
    return out


class _Places:
    """An index of the places (ciphertext, slot) of every element."""

    def __init__(self, source: Content, size: int) -> None:
        self.slots = source.shape[1]
        flat = source.reshape(-1)
        self.order = np.argsort(flat, kind="stable")
        self.starts = np.searchsorted(flat[self.order], np.arange(size + 1))

    def of(self, element: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        found = self.order[self.starts[element] : self.starts[element + 1]]
        return found // self.slots, found % self.slots


def repeated(content: Content, stride: int, size: int) -> bool:
    """True if the element in a slot does not depend on the slot's coordinate on this axis."""
    base = np.arange(content.shape[-1]) // stride % size * stride
    return size > 1 and bool((content == content[..., np.arange(content.shape[-1]) - base]).all())


def first_only(content: Content, stride: int, size: int) -> Content:
    """Return the content with all slots empty except for the first place on this axis."""
    return np.where(np.arange(content.shape[-1]) // stride % size == 0, content, EMPTY)


def once(content: Content) -> Content:
    """Return the content with all places of an element empty but the first."""
    flat = content.reshape(-1)
    _, first = np.unique(flat, return_index=True)
    out = np.full(flat.shape, EMPTY)
    out[first] = flat[first]
    return out.reshape(content.shape)


def at(flat: NDArray[np.float64], content: Content) -> NDArray[np.float64]:
    """Fill the slots of one ciphertext: elements as the content says, zero elsewhere."""
    return np.where(content >= 0, flat[np.maximum(content, 0)], 0.0)
