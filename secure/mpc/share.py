"""A share: a reference to a value that the circuit computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """A share in the circuit: the index of its instruction, the bits of its ring, and its fraction bits."""

    index: int
    ring: int
    fraction: int
