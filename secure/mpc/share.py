"""What an emitted value is: a share somewhere in the circuit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """A share in the circuit: instruction, ring, fraction bits."""

    index: int
    ring: int
    fraction: int
