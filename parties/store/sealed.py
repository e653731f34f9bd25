"""The format of an entry on a disk: a header, its head, and its body in chunks, each encrypted for its place alone.

    header  MAGIC, id (16), label (32), salt (32, random), bytes of the head (4) and of the body (8), big-endian
    head    AES-256-GCM, nonce 0
    body    AES-256-GCM in chunks of CHUNK bytes, the last one shorter, nonces 1, 2, 3, ...

The key is that of the entry: HKDF-SHA-256 of the store's key over the whole header, with a fresh salt, so every file
has its own and no nonce comes twice under one. An altered header gives another key, with which nothing opens. So a
chunk opens in its own file and place alone, and the header says how long the file is: what is cut, lengthened, altered,
swapped or moved is refused. Chunks can be read in any order, each of them checked before a byte of it is used. The
header shows who reads the disk the label (a digest), the id (random) and the sizes, which follow from the public
Program.
"""

from __future__ import annotations

import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parties.store.entries import MAXIMUM_HEAD, Taken, check_entry, wrong_size
from parties.store.keys import StoreKey
from secure.errors import StoreError

MAGIC = b"unseen-1"
CHUNK = 1 << 18
TAG = 16
_HEADER = struct.Struct(">8s16s32s32sIQ")
_KEPT = 4  # opened chunks that are kept because only a part of each was read

ReadAt = Callable[[int, int], bytes]
"""Returns up to ``size`` bytes of a file from ``start``."""


@dataclass(frozen=True)
class _Header:
    entry: bytes
    label: str
    salt: bytes
    head: int
    body: int

    @property
    def encoded(self) -> bytes:
        return _HEADER.pack(MAGIC, self.entry, bytes.fromhex(self.label), self.salt, self.head, self.body)

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        return _HEADER.size + self.head + TAG + self.body + -(-self.body // CHUNK) * TAG


def sealed_size(head: int, body: int) -> int:
    """Return the bytes that an entry takes on a disk."""
    return _Header(b"", "", b"", head, body).total


def seal(
    key: StoreKey, label: str, entry: bytes, head: bytes, size: int, parts: Iterable[bytes]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of an entry's file; each piece is valid until the next. Raises StoreError like ``Store.put``."""
    check_entry(label, entry, head, size)
    header = _Header(entry, label, secrets.token_bytes(32), len(head), size).encoded
    cipher = AESGCM(key.of_entry(header))
    yield header
    yield cipher.encrypt(_nonce(0), head, None)
    out = memoryview(bytearray(CHUNK + TAG))
    for number, chunk in enumerate(_chunks(parts, size), 1):
        yield out[: cipher.encrypt_into(_nonce(number), chunk, None, out[: len(chunk) + TAG])]


def _chunks(parts: Iterable[bytes], size: int) -> Iterator[memoryview]:
    """Regroup parts into chunks; raises StoreError if they are not ``size`` bytes together."""
    chunk, filled, total = memoryview(bytearray(CHUNK)), 0, 0
    for part in parts:
        view = memoryview(part)
        total += len(view)
        if total > size:
            raise wrong_size(total, size)
        while view:
            piece, view = view[: CHUNK - filled], view[CHUNK - filled :]
            chunk[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == CHUNK:
                yield chunk
                filled = 0
    if total != size:
        raise wrong_size(total, size)
    if filled:
        yield chunk[:filled]


def open_sealed(key: StoreKey, label: str, entry: bytes, total: int, read_at: ReadAt) -> Taken:
    """Open an entry's file. total: its bytes. Raises StoreError unless it is the entry of this id and label.

    The header and the head are checked at once, a chunk of the body whenever a byte of it is read.
    """
    raw = read_at(0, _HEADER.size)
    if len(raw) != _HEADER.size:
        raise damaged(entry)
    magic, *fields = _HEADER.unpack(raw)
    found = _Header(fields[0], fields[1].hex(), *fields[2:])
    if magic != MAGIC or (found.entry, found.label) != (entry, label):
        raise damaged(entry)
    if found.head > MAXIMUM_HEAD or found.total != total:  # before anything is read or made of that size
        raise damaged(entry)
    cipher = AESGCM(key.of_entry(raw))
    try:
        head = cipher.decrypt(_nonce(0), read_at(_HEADER.size, found.head + TAG), None)
    except InvalidTag:
        raise damaged(entry) from None
    body = _Body(cipher, found, read_at)
    return Taken(entry, head, found.body, body.read)


class _Body:
    """The body of an open file, whose chunks are opened as they are read."""

    def __init__(self, cipher: AESGCM, header: _Header, read_at: ReadAt) -> None:
        self._cipher, self._header, self._read_at = cipher, header, read_at
        self._start = _HEADER.size + header.head + TAG
        self._kept: OrderedDict[int, memoryview] = OrderedDict()

    def read(self, start: int, stop: int) -> memoryview:
        if not 0 <= start <= stop <= self._header.body:
            raise StoreError(f"bytes {start} to {stop} of an entry that has {self._header.body}")
        out = np.empty(stop - start, np.uint8).data
        for number in range(start // CHUNK, -(-stop // CHUNK)):
            low, high = number * CHUNK, min((number + 1) * CHUNK, self._header.body)
            if start <= low and high <= stop:
                self._open(number, out[low - start : high - start])
            else:
                first, last = max(start, low), min(stop, high)
                out[first - start : last - start] = self._partly(number, high - low)[first - low : last - low]
        return out

    def _partly(self, number: int, size: int) -> memoryview:
        """Return a chunk of which only a part is read now; the next read often takes the rest."""
        if number not in self._kept:
            self._kept[number] = np.empty(size, np.uint8).data
            self._open(number, self._kept[number])
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[number]

    def _open(self, number: int, out: memoryview) -> None:
        sealed = self._read_at(self._start + number * (CHUNK + TAG), len(out) + TAG)
        try:
            if len(sealed) != len(out) + TAG:
                raise InvalidTag
            self._cipher.decrypt_into(_nonce(number + 1), sealed, None, out)
        except InvalidTag:
            self._kept.pop(number, None)
            raise damaged(self._header.entry) from None


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def damaged(entry: bytes) -> StoreError:
    return StoreError(
        f"the entry {entry.hex()[:12]} of the store is damaged, or not what was put there",
        "nothing of it was used; look at the disk, and at who may write to it",
    )
