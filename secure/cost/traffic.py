"""Traffic in bytes by link and phase, in which both predicted costs and measured reports are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from protocols.protocol import CircuitCost
from secure.units import in_units

ONCE, OFFLINE, ONLINE = PHASES = ("once", "offline", "online")
"""The phases: once per model or session; once per query before its input is known; once per query with its input."""


@dataclass(frozen=True)
class Traffic:
    """Payload bytes on one link in one phase; ``sender`` and ``receiver`` are roles of a deployment."""

    sender: str
    receiver: str
    bytes: int
    phase: str


def total(
    traffic: Iterable[Traffic], *, sender: str | None = None, receiver: str | None = None, phase: str | None = None
) -> int:
    """Sum the bytes of every link that matches."""
    return sum(
        t.bytes
        for t in traffic
        if sender in (None, t.sender) and receiver in (None, t.receiver) and phase in (None, t.phase)
    )


@dataclass(frozen=True)
class Cost:
    """The cost of one query of a compiled model, known before anything runs.

    rounds: messages of the online phase that wait for one another. traffic: bytes by link and phase.
    failure_probability: the probability that a query within its ranges goes wrong; 0 if no step is probabilistic.
    error: the predicted absolute error of an output element (CKKS); None if only fixed point bounds it.
    """

    rounds: int
    traffic: tuple[Traffic, ...]
    failure_probability: float = 0.0
    error: float | None = None

    def bytes(self, *, sender: str | None = None, receiver: str | None = None, phase: str | None = None) -> int:
        """Sum the bytes of the links that match; by default of all links."""
        return total(self.traffic, sender=sender, receiver=receiver, phase=phase)

    def as_dict(self) -> dict[str, Any]:
        """Return the cost as JSON values."""
        return {"rounds": self.rounds, "traffic": traffic_json(self.traffic)}


def traffic_json(traffic: Sequence[Traffic]) -> list[dict[str, Any]]:
    """Return links as JSON values."""
    return [{"sender": t.sender, "receiver": t.receiver, "phase": t.phase, "bytes": t.bytes} for t in traffic]


def in_words(traffic: Iterable[Traffic], phase: str) -> str:
    """Say in words how much each link carries in one phase; "" if no link carries anything."""
    found: dict[tuple[str, str], int] = {}
    for t in traffic:
        if t.phase == phase and t.bytes:
            found[t.sender, t.receiver] = found.get((t.sender, t.receiver), 0) + t.bytes
    return ", ".join(f"{in_units(size)} from {sender} to {receiver}" for (sender, receiver), size in found.items())


def links(cost: CircuitCost, first: str, second: str, dealer: str) -> tuple[Traffic, ...]:
    """Return the traffic of a circuit: between its first and second party, and from the dealer to the first."""
    found = (
        Traffic(second, first, cost.to_first, ONLINE),
        Traffic(first, second, cost.to_second, ONLINE),
        Traffic(dealer, first, cost.dealt, OFFLINE),
    )
    return (*found, Traffic(dealer, first, cost.brought, ONLINE)) if cost.brought else found
