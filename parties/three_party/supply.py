"""Corrections at party 0, which party 2 deals: they are used while they still arrive, or were kept ready, in memory
or in a store."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from parties.net.frames import PART
from parties.proto import unseen_pb2 as pb
from parties.store.entries import Taken
from parties.three_party.asked import Progress
from parties.three_party.pair_keys import Seal
from protocols.circuit import ReadWhenUsed, correction_places
from protocols.flow import Circuit
from protocols.prg import SEED_BYTES
from secure.deployments.three_party import PARTIES
from secure.errors import Error, PeerLost, ProtocolError

NUMBER_BYTES = 16


def silent(deadline: float) -> PeerLost:
    """Return the error for corrections that do not come."""
    return PeerLost(f"party 2 sent nothing for {deadline:g} s", "see its log")


class Arriving:
    """One query's corrections. ``pop`` waits until those of an instruction are there.

    It raises PeerLost if nothing comes for ``deadline`` seconds. progress: that of the query that they serve; it hears
    of every wait and of everything that arrives.
    """

    def __init__(self, circuit: Circuit, deadline: float) -> None:
        self.number = secrets.token_bytes(NUMBER_BYTES)
        self._places = correction_places(circuit)
        self.size, self._deadline = max((place.stop for place in self._places.values()), default=0), deadline
        self._parts: list[bytes] = []  # PART bytes each, but for the last; a part whose bytes were all taken is dropped
        self._left: list[int] = []  # bytes of each part that were not taken yet
        self._filled = 0
        self._seed = b""
        self._whole, self._error = False, None
        self._news = threading.Condition()
        self.waited = self.dealing = 0.0
        self.progress = Progress()
        self._then: Callable[[], object] = lambda: None

    _error: Error | None
    _seal: Seal  # once the seed is here

    def receive(self, parts: Iterable[pb.SupplyPart], sealing: Callable[[bytes], Seal]) -> None:
        """Receive all parts, and check the tag over them; whoever waits gets the error if one occurs.

        sealing: returns the running tag of a supply with this seed.
        """
        start = time.perf_counter()
        try:
            for part in parts:
                self._take(part, sealing)
            if not self._whole:
                raise ProtocolError(f"party 2 sent {self._filled} of {self.size} bytes of corrections")
            self.dealing = time.perf_counter() - start
        except Error as error:
            self.fail(error)

    def _take(self, part: pb.SupplyPart, sealing: Callable[[bytes], Seal]) -> None:
        kind, data = part.WhichOneof("content"), part.data  # read once: a message copies its bytes at each access
        if kind == "seed" and not self._seed and len(part.seed) == SEED_BYTES:
            self._seal = sealing(part.seed)
            with self._news:
                self._seed = part.seed
                self._news.notify_all()
        elif kind == "data" and self._seed and len(data) == min(PART, self.size - self._filled) > 0:
            self._seal.update(data)
            with self._news:
                self._parts.append(data)
                self._left.append(len(data))
                self._filled += len(data)
                self._news.notify_all()
        elif kind == "tag" and self._seed and self._filled == self.size and not self._whole:
            self._seal.check(part.tag, "the corrections of party 2")
            self._then()
            with self._news:
                self._whole = True
                self._news.notify_all()
        else:
            raise ProtocolError(f"party 2 sent {kind!r} where it is not expected, or more than the Program prescribes")

    def fail(self, error: Error) -> None:
        with self._news:
            self._error = error
            self._news.notify_all()

    def then(self, action: Callable[[], object]) -> None:
        """Call ``action`` once all have come, before anybody who waits for the end hears of it."""
        with self._news:
            if not self._whole:
                self._then = action
                return
        action()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def _wait(self, ready: Callable[[], bool]) -> None:
        start = time.perf_counter()
        with self._news:
            while not ready():
                if self._error is not None:
                    raise self._error
                before = self._filled
                with self.progress.waiting(PARTIES[2]):
                    came = self._news.wait(self._deadline)
                if not came and self._filled == before:
                    raise silent(self._deadline)
        self.waited += time.perf_counter() - start

    def seed(self) -> bytes:
        self._wait(lambda: bool(self._seed))
        return self._seed

    def pop(self, index: int, default: bytes) -> bytes | memoryview:
        place = self._places.pop(index, None)  # once
        if place is None:
            return default
        start, stop = place.start, place.stop
        self._wait(lambda: self._filled >= stop)
        found = [self._cut(number, start, stop) for number in range(start // PART, (stop - 1) // PART + 1)]
        return found[0] if len(found) == 1 else b"".join(found)

    def _cut(self, number: int, start: int, stop: int) -> memoryview:
        """Take those of the bytes start to stop that lie in part ``number``."""
        before = number * PART
        piece = memoryview(self._parts[number])[max(0, start - before) : stop - before]
        self._left[number] -= len(piece)
        if not self._left[number]:
            self._parts[number] = b""
        return piece

    def finish(self) -> None:
        """Wait for the end, where the tag shows that everything came from party 2 unchanged."""
        self._wait(lambda: self._whole)


class StoredSupply:
    """One query's corrections from a store, in the form of ``Arriving``: all of them are there."""

    waited = dealing = 0.0

    def __init__(self, circuit: Circuit, taken: Taken) -> None:
        self.number, self.size, self._seed = taken.entry, taken.size, taken.head
        self._corrections = ReadWhenUsed(circuit, taken.read)
        self.progress = Progress()

    def seed(self) -> bytes:
        return self._seed

    def pop(self, index: int, default: bytes) -> bytes | memoryview:
        return self._corrections.pop(index, default)

    def finish(self) -> None:
        """Do nothing: the tag over them was checked before they were put into the store."""


def checked(parts: Iterable[pb.SupplyPart], sealing: Callable[[bytes], Seal]) -> tuple[bytes, Iterator[bytes]]:
    """Return party 0's seed, and the corrections as they come; the iterator raises at its end unless the tag is right.

    parts, sealing: those of ``Arriving.receive``. Raises ProtocolError, PartiesDisagree.
    """
    coming = iter(parts)
    seed = next(coming, pb.SupplyPart()).seed
    if len(seed) != SEED_BYTES:
        raise ProtocolError("party 2 does not begin with a seed")

    def corrections() -> Iterator[bytes]:
        seal = sealing(seed)
        for part in coming:
            kind, data = part.WhichOneof("content"), part.data
            if kind == "tag":
                seal.check(part.tag, "the corrections of party 2")
                return
            if kind != "data":
                raise ProtocolError(f"party 2 sent {kind!r} in the middle of corrections")
            seal.update(data)
            yield data
        raise ProtocolError("party 2 stopped in the middle of corrections")

    return seed, corrections()


class Stock:
    """Corrections of queries that are dealt ahead. ahead: for how many queries they are kept; 0 for none."""

    def __init__(self, start: Callable[[], Arriving], ahead: int) -> None:
        self._start, self._ahead = start, ahead
        self._kept: deque[Arriving] = deque()
        self._lock = threading.Lock()

    def take(self) -> Arriving:
        """Return the oldest one that did not fail, or start a new one."""
        with self._lock:
            while self._kept:
                found = self._kept.popleft()
                if not found.failed:
                    return found
        return self._start()

    def __len__(self) -> int:
        return len(self._kept)

    def drop(self) -> None:
        """Forget all that is kept: party 2 no longer holds the seeds that belong to it."""
        with self._lock:
            self._kept.clear()

    def refill(self) -> None:
        with self._lock:
            while len(self._kept) < self._ahead:
                self._kept.append(self._start())
