"""Predicted time, memory and bytes of a schedule: every operation by its ring degree and level.

Times are those of ``REFERENCE``, seconds of one core of a two-core Zen 5 machine at N = 16384 (by ``measure``), scaled:
products with plain vectors and sums by N and limbs, key switching by N and limbs times limbs + 1 (one digit a prime).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import Schedule

KINDS = ("plain", "add", "rescale", "multiply", "switch", "scalar")


@dataclass(frozen=True)
class Times:
    """Seconds per unit of work: of N * limbs residues, or (``switch``) of N * limbs * (limbs + 1) log2 N."""

    plain: float = 7.0e-9
    add: float = 2.6e-9
    rescale: float = 3.2e-8
    multiply: float = 1.4e-8
    switch: float = 1.1e-9
    scalar: float = 7.0e-9


REFERENCE = Times()


@dataclass
class Account:
    """Seconds by kind of operation and by module."""

    kinds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    paths: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def account(schedule: Schedule, parameters: Parameters, times: Times = REFERENCE) -> Account:
    """What a schedule costs, operation by operation."""
    out, n = Account(), parameters.degree
    for i, node in enumerate(schedule.circuit.nodes):
        limbs = schedule.levels[i] + 1
        residues, switching = n * limbs, n * limbs * (limbs + 1) * math.log2(n)
        above = n * (limbs + 1)
        parts: dict[str, float] = {}
        if node.op == "rotate":
            parts = {"rotations": times.switch * switching}
        elif node.op == "add":
            parts = {"sums": times.add * residues * (len(node.inputs) - 1)}
        elif node.op == "shift":
            parts = {"sums": times.add * residues / 2}
        elif node.op == "multiply":
            relinearizing = times.switch * n * (limbs + 1) * (limbs + 2) * math.log2(n)
            parts = {"ciphertext products": times.multiply * above + relinearizing, "rescaling": times.rescale * above}
        elif node.op == "dot":
            each = times.plain * above
            parts = {
                "plain products": each * len(node.inputs) + times.add * above * (len(node.inputs) - 1),
                "rescaling": times.rescale * above,
            }
        for kind, spent in parts.items():
            out.kinds[kind] += spent
            out.paths[schedule.circuit.paths[i]] += spent
    return out


def seconds(schedule: Schedule, parameters: Parameters, times: Times = REFERENCE) -> float:
    """Of one core of the server."""
    return account(schedule, parameters, times).total
