"""Cut byte strings into parts of about 1 MB, because larger gRPC messages are slower and very large ones fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from proto.unseen_pb2 import Chunk, Frame
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


def to_chunks(pieces: Iterable[bytes | memoryview]) -> Iterator[Chunk]:
    """Regroup byte strings of any sizes into chunks of PART bytes, the last one shorter."""
    rest = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        if rest:
            missing = PART - len(rest)
            rest += view[:missing]
            view = view[missing:]
            if len(rest) == PART:
                yield Chunk(data=bytes(rest))
                rest.clear()
        while len(view) >= PART:  # straight from the piece
            yield Chunk(data=bytes(view[:PART]))
            view = view[PART:]
        rest += view
    if rest:
        yield Chunk(data=bytes(rest))


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
