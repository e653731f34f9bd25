"""Cut byte strings into parts of about 1 MB, because larger gRPC messages are slower and very large ones fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

from parties.proto.unseen_pb2 import Chunk, Frame
from protocols.wire import FrameError

PART = 1 << 20


def parts(payload: bytes) -> Iterator[bytes]:
    """Yield the parts in order; an empty byte string gives one empty part."""
    view = memoryview(payload)
    for start in range(0, max(1, len(payload)), PART):
        yield bytes(view[start : start + PART])


def to_frames(payload: bytes) -> Iterator[Frame]:
    if len(payload) <= PART:
        yield Frame(data=payload, last=True)
        return
    total = 0
    for part in parts(payload):
        total += len(part)
        yield Frame(data=part, last=total == len(payload))


def to_chunks(pieces: Iterable[bytes | memoryview], field: int = Chunk.DATA_FIELD_NUMBER) -> Iterator[bytes]:
    """Regroup byte strings of any sizes into messages of PART bytes each, the last one shorter.

    field: the number of the field of bytes in the message, by default that of a Chunk. They are encoded already, which
    spares two copies of gigabytes: ``Guard`` sends bytes as they are.
    """
    gathered, size = list[memoryview](), 0
    for piece in pieces:
        view = memoryview(piece)
        while size + len(view) >= PART:
            gathered.append(view[: PART - size])
            view = view[PART - size :]
            yield b"".join((_head(PART, field), *gathered))
            gathered, size = [], 0
        if view:
            gathered.append(view)
            size += len(view)
    if gathered:
        yield b"".join((_head(size, field), *gathered))


@cache
def _head(size: int, field: int) -> bytes:
    """Return what protobuf writes before a field of bytes: its number with its type, and the size."""
    encoded = bytearray([field << 3 | 2])
    while size > 127:
        encoded.append(size & 127 | 128)
        size >>= 7
    return bytes([*encoded, size])


def field_data(message: bytes, field: int) -> memoryview | None:
    """Return a view of the data of a message that has nothing but one field of bytes; None for any other message."""
    size, at = 0, 1
    for at in range(1, min(len(message), 6)):
        size |= (message[at] & 127) << 7 * (at - 1)
        if message[at] < 128:
            break
    found = message[:1] == bytes([field << 3 | 2]) and at + 1 + size == len(message) and message[at] < 128
    return memoryview(message)[at + 1 :] if found else None


def chunk_data(message: bytes) -> bytes | memoryview:
    """Return the data of an encoded Chunk, without a copy if it is encoded as usual. Raises DecodeError for another."""
    view = field_data(message, Chunk.DATA_FIELD_NUMBER)
    if view is not None:
        return view
    data: bytes = Chunk.FromString(message).data
    return data


class FrameReader:
    """Collect the parts of one frame; refuse more bytes than the Program prescribes, and parts that are too small."""

    def __init__(self, expected: int) -> None:
        self._expected, self._size = expected, 0
        self._parts: list[bytes] = []

    def add(self, frame: Frame) -> bytes | None:
        """Add a part; return the whole payload after the last one, else None. Raises FrameError on a wrong size."""
        data = frame.data  # read once: a message copies its bytes at each access
        self._size += len(data)
        if self._size > self._expected or (frame.last and self._size != self._expected):
            raise FrameError(f"a frame of {self._size} bytes or more, where the Program prescribes {self._expected}")
        if not frame.last and len(data) != PART:
            raise FrameError(f"a part of {len(data)} bytes that is not the last, where it has {PART}")
        self._parts.append(data)
        if not frame.last:
            return None
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
