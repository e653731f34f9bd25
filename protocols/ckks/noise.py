"""Predict the errors of a schedule before it runs: a variance for every slot, propagated on sample values.

Standard deviations of the coefficients, for one real number at scale s in a ring of degree N (canonical embedding: a
polynomial whose coefficients have standard deviation c has slots with c sqrt(N / 2)):

- a fresh ciphertext: sigma = 3.2; encoding: 1 / sqrt(12);
- rescaling: 1 / sqrt(12) on both polynomials, the second times a ternary secret: sqrt(N / 18);
- switching keys (rotations, relinearization): there is one digit for each prime, and the first digit is as large as the
  special prime. It adds sigma sqrt(N / 12), the rounding of the special prime, and the contributions of smaller digits.
  SEAL's digits lie in [0, q), so they have a mean. Its contribution is large in slots whose root of unity is near one
  (above all slot 0): sigma divided by twice the sine of half the root's angle. If a rescaling follows, as after a
  product, all of this is divided by the prime.

Independent errors add up as variances; the same ciphertext on both sides of a product counts twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from protocols.ckks.circuit import Vector
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import Schedule

SIGMA = 3.2
WORST = 10.0  # the largest error of some ten thousand slots stays below this many standard deviations: roundings times
# a secret have heavier tails than a normal distribution


def errors(schedule: Schedule, parameters: Parameters, inputs: Mapping[str, Vector]) -> list[Vector]:
    """Return the standard deviation of every node's slots, on one sample. Memory: two vectors a node."""
    circuit, n = schedule.circuit, parameters.degree
    unit = 2.0 ** (-2 * parameters.scale_bits) * n / 2  # a slot's variance if each coefficient has variance one
    ratio = 2.0 ** (2 * (parameters.scale_bits - parameters.special_bits))
    fresh, rescaling = (SIGMA**2 + 1 / 12) * unit, n / 18 * unit
    half_angle = np.pi / (2 * n) * np.array([pow(3, j, 2 * n) for j in range(circuit.slots)])
    mean = n / 12 + 1 / (2 * np.sin(half_angle)) ** 2
    values: list[Vector] = []
    variance: list[Vector] = []
    for i, node in enumerate(circuit.nodes):
        top = 2.0 ** (2 * (parameters.base_bits - parameters.special_bits))  # the contribution of the largest digit
        switching = (SIGMA**2 * mean * (top + schedule.levels[i] * ratio) + n / 18) * unit
        x = [values[k] for k in node.inputs]
        v = [variance[k] for k in node.inputs]
        if node.op == "input":
            value, var = inputs[node.name], np.full(circuit.slots, fresh)
        elif node.op == "refresh":
            value, var = x[0], v[0] + fresh
        elif node.op == "rotate":
            value, var = np.roll(x[0], -node.numbers[0]), np.roll(v[0], -node.numbers[0]) + switching
        elif node.op == "multiply":
            value, var = np.zeros(circuit.slots), np.full(circuit.slots, rescaling)
            for k in range(0, len(x), 2):
                value = value + x[k] * x[k + 1]
                if node.inputs[k] == node.inputs[k + 1]:
                    var = var + (2 * x[k]) ** 2 * v[k]
                else:
                    var = var + x[k] ** 2 * v[k + 1] + x[k + 1] ** 2 * v[k]
        elif node.op == "shift":
            value, var = x[0] + circuit.plains[node.numbers[0]], v[0] + unit / 12
        elif node.op == "add":
            value = np.sum([a * s for a, s in zip(x, node.numbers, strict=True)], axis=0)
            total: Counter[int] = Counter()
            for k, sign in zip(node.inputs, node.numbers, strict=True):
                total[k] += sign
            var = np.sum([variance[k] * c**2 for k, c in total.items()], axis=0)
        else:
            value, var = np.zeros(circuit.slots), np.full(circuit.slots, rescaling)
            for a, b, p in zip(x, v, node.numbers, strict=True):
                plain = circuit.plains[p]
                value = value + a * plain
                rms = float(np.sqrt(np.mean(a**2)))
                var = var + b * np.square(plain) + rms**2 * unit / 12  # its plain operand is rounded too
        values.append(value)
        variance.append(var)
    return [np.sqrt(v) for v in variance]


def bits(error: float) -> float:
    """Return the bits of precision of an absolute error, -log2(error), at most 60."""
    return -math.log2(max(error, 2.0**-60))
