"""Networks between two parties, by name or by their figures."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from protocols.protocol import CircuitCost
from secure.errors import InvalidInput


@dataclass(frozen=True)
class NetworkSpeed:
    """The round-trip time and bandwidth of a network between the parties. Each direction has the full bandwidth."""

    key: str
    name: str
    round_trip: float  # seconds
    bandwidth: float  # bytes a second

    def seconds(self, cost: CircuitCost) -> float:
        """Return the seconds of waiting online: half a round trip per round, plus the larger direction's bytes.

        A round takes half a round trip because both parties send at once.
        """
        return cost.rounds * self.round_trip / 2 + max(cost.to_first, cost.to_second) / self.bandwidth


NETWORKS = (
    NetworkSpeed("lan", "LAN, 5 Gbps, 1 ms", 1e-3, 5e9 / 8),
    NetworkSpeed("wan", "WAN, 400 Mbps, 10 ms", 10e-3, 400e6 / 8),
    NetworkSpeed("slow-wan", "WAN, 100 Mbps, 80 ms", 80e-3, 100e6 / 8),
)
LOOPBACK = "loopback"


def find_network(text: str) -> NetworkSpeed | None:
    """Find a network by its short name, or make one from "MBPS,ROUND_TRIP_MS" ("250,20"); None stands for loopback.

    Raises InvalidInput.
    """
    if text == LOOPBACK:
        return None
    for network in NETWORKS:
        if text in (network.key, network.name):
            return network
    numbers = re.fullmatch(r"\s*([0-9.]+)\s*,\s*([0-9.]+)\s*", text)
    try:
        mbps, milliseconds = map(float, numbers.groups()) if numbers else (0.0, 0.0)
    except ValueError:  # two points in a number
        mbps = milliseconds = 0.0
    if not 0 < mbps < math.inf or not milliseconds < math.inf or numbers is None:
        known = ", ".join([LOOPBACK, *(n.key for n in NETWORKS)])
        raise InvalidInput(f"unknown network {text!r}", f"one of {known}, or MBPS,ROUND_TRIP_MS such as 250,20")
    key, name = ",".join(numbers.groups()), f"{mbps:g} Mbps, {milliseconds:g} ms"
    return NetworkSpeed(key, name, milliseconds / 1e3, mbps * 1e6 / 8)


def find_apart(text: str) -> NetworkSpeed:
    """Find a network between separate machines. Raises InvalidInput, for loopback too."""
    found = find_network(text)
    if found is None:
        raise InvalidInput(f"{text} is no network between machines", f"one of {', '.join(n.key for n in NETWORKS)}")
    return found
