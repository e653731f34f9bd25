"""The timeline of one party in one query: measured by a ``Recorder``, or predicted (``secure.cost.projection``).

Times are seconds on the party's own monotonic clock. The order, the sizes and the kinds of all steps follow from the
public Program. Durations do not depend on inputs, but a server's durations may depend on its weights: without AVX-512
the number of limbs of a matrix product follows from the layer's largest weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocols.circuit import Observer, Part
from protocols.protocol import CircuitCost


@dataclass(slots=True)
class Work:
    """The local computation of one instruction, or the part of it between two exchanges."""

    index: int
    start: float
    seconds: float


@dataclass(slots=True)
class Round:
    """One exchange: packing began at ``start``, the payload left at ``sent_at``, the peer's payload had arrived by
    ``received_at``, and was unpacked by ``stop``.

    ``sent``, ``received``: bytes of the payloads. If nothing is sent or received, the two moments around it are equal.
    """

    parts: tuple[Part, ...]
    start: float
    sent_at: float
    received_at: float
    stop: float
    sent: int
    received: int


@dataclass
class Usage:
    """The seconds and bytes that a module, a kind of protocol or a whole query took of one party."""

    compute: float = 0.0
    wire: float = 0.0  # packing and unpacking
    waiting: float = 0.0  # for the peer and the network
    sent: int = 0
    received: int = 0

    def add(self, other: Usage, share: float = 1.0) -> None:
        """Add a share of another's seconds, and all of its bytes."""
        self.compute += other.compute * share
        self.wire += other.wire * share
        self.waiting += other.waiting * share
        self.sent += other.sent
        self.received += other.received

    @property
    def seconds(self) -> float:
        return self.compute + self.wire + self.waiting


@dataclass
class Timeline:
    """The timeline of one party in one query; ``party`` is "server" or "client"."""

    party: str
    start: float = 0.0
    stop: float = 0.0
    work: list[Work] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.stop - self.start

    @property
    def total(self) -> Usage:
        waiting = sum(r.received_at - r.sent_at for r in self.rounds)
        return Usage(
            sum(w.seconds for w in self.work),
            sum(r.stop - r.start for r in self.rounds) - waiting,
            waiting,
            sum(part.sent for r in self.rounds for part in r.parts),
            sum(part.received for r in self.rounds for part in r.parts),
        )

    @property
    def cost(self) -> CircuitCost:
        """The rounds and bytes of the query, for comparison with a profile."""
        sent, received = sum(r.sent for r in self.rounds), sum(r.received for r in self.rounds)
        up, down = (received, sent) if self.party == "server" else (sent, received)
        return CircuitCost(len(self.rounds), up, down)

    def by(self, key: Callable[[int], str]) -> dict[str, Usage]:
        """Sum usage by any property of an instruction; a round's time is divided equally among its instructions."""
        out: dict[str, Usage] = {}
        for work in self.work:
            out.setdefault(key(work.index), Usage()).compute += work.seconds
        for r in self.rounds:
            packing = (r.sent_at - r.start) + (r.stop - r.received_at)
            for part in r.parts:
                usage = out.setdefault(key(part.index), Usage())
                share = 1 / len(r.parts)
                waiting = r.received_at - r.sent_at
                usage.add(Usage(0.0, packing, waiting, part.sent, part.received), share)
        return out


class Recorder(Observer):
    """An observer that records the timeline of a query as it runs.

    It costs about a microsecond per instruction, so that it is always on. Both ``execute`` and ``Framed`` report to it;
    their caller calls ``start`` and ``stop``.
    """

    def __init__(self, party: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.timeline, self._clock = Timeline(party), clock
        self._parts: tuple[Part, ...] = ()
        self._since = 0.0
        self._began = self._sent_at = self._received_at = 0.0
        self._sent = self._received = 0

    def start(self) -> None:
        self.timeline.start = self._clock()

    def stop(self) -> None:
        self.timeline.stop = self._clock()

    @property
    def waiting(self) -> int:
        """The first instruction of the current round; -1 before the first round."""
        return self._parts[0].index if self._parts else -1

    def computing(self, index: int) -> None:
        self._since = self._clock()

    def computed(self, index: int) -> None:
        self.timeline.work.append(Work(index, self._since, self._clock() - self._since))

    def exchanging(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)

    def packing(self) -> None:
        self._began = self._clock()

    def sent(self, payload: bytes) -> None:
        self._sent_at, self._sent = self._clock(), len(payload)

    def received(self, payload: bytes) -> None:
        self._received_at, self._received = self._clock(), len(payload)

    def unpacked(self) -> None:
        moments = (self._began, self._sent_at, self._received_at, self._clock())
        self.timeline.rounds.append(Round(self._parts, *moments, self._sent, self._received))
