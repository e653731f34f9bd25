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
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from protocols.ckks.circuit import CkksNode, Vector, clear
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import Schedule

SIGMA = 3.2
WORST = 10.0  # the largest error of some ten thousand slots stays below this many standard deviations: roundings times
# a secret have heavier tails than a normal distribution


def errors(schedule: Schedule, parameters: Parameters, inputs: Mapping[str, Vector]) -> list[Vector]:
    """Return the standard deviation of every node's slots, on one sample. Memory: two vectors a node.

    inputs: also the rows that earlier queries kept. A kept slot has the error of a row of its own, and for every query
    that of the rescaling of zeros.
    """
    kept: dict[str, Vector] = {}
    found = _errors(schedule, parameters, inputs, kept)
    return _errors(schedule, parameters, inputs, kept) if kept else found


def _errors(
    schedule: Schedule, parameters: Parameters, inputs: Mapping[str, Vector], kept: dict[str, Vector]
) -> list[Vector]:
    """Return the standard deviations. kept: the variances of kept rows by name, which are replaced by those found."""
    circuit, own = schedule.circuit, _Own(schedule, parameters)
    unit, fresh, rescaling = own.unit, own.fresh, own.rescaling
    values: list[Vector] = []
    variance: list[Vector] = []
    for i, node in enumerate(circuit.nodes):
        switching = own.switching(i)
        x = [values[k] for k in node.inputs]
        v = [variance[k] for k in node.inputs]
        if node.op == "input":
            value, var = inputs[node.name], np.full(circuit.slots, fresh)
        elif node.op == "kept":
            value, var = inputs[node.name], kept.get(node.name, np.full(circuit.slots, fresh))
        elif node.op == "keep":
            value, var = x[0], v[0] + circuit.rows * rescaling + float(np.mean(x[0] ** 2)) * unit / 12
            kept[node.name] = var
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


class _Own:
    """The variances that operations add themselves.

    unit: a slot's variance if each coefficient has variance one. fresh: of a fresh ciphertext; rescaling: of a product.
    """

    def __init__(self, schedule: Schedule, parameters: Parameters) -> None:
        n = parameters.degree
        self._schedule, self._parameters = schedule, parameters
        self.unit = 2.0 ** (-2 * parameters.scale_bits) * n / 2
        self.fresh, self.rescaling = (SIGMA**2 + 1 / 12) * self.unit, n / 18 * self.unit
        half_angle = np.pi / (2 * n) * np.array([pow(3, j, 2 * n) for j in range(schedule.circuit.slots)])
        self._mean = n / 12 + 1 / (2 * np.sin(half_angle)) ** 2

    def switching(self, i: int) -> Vector:
        """Return the variance of switching keys at node i."""
        p = self._parameters
        ratio = 2.0 ** (2 * (p.scale_bits - p.special_bits))
        top = 2.0 ** (2 * (p.base_bits - p.special_bits))  # the contribution of the largest digit
        return (SIGMA**2 * self._mean * (top + self._schedule.levels[i] * ratio) + p.degree / 18) * self.unit

    def of(self, i: int, node: CkksNode, x: Sequence[Vector]) -> Vector | float:
        """Return what node i adds, given the values that it reads."""
        plain = self.unit / 12
        if node.op in ("input", "kept", "refresh"):
            return self.fresh
        if node.op == "rotate":
            return self.switching(i)
        if node.op == "multiply":  # its keys are switched before it is rescaled
            return self.rescaling
        if node.op == "shift":
            return plain
        if node.op == "dot":
            return self.rescaling + plain * sum(float(np.mean(a**2)) for a in x)
        if node.op == "keep":  # a rescaling for every row
            return self._schedule.circuit.rows * self.rescaling + plain * float(np.mean(x[0] ** 2))
        return 0.0


def simulated(
    schedule: Schedule,
    parameters: Parameters,
    inputs: Mapping[str, Vector],
    seed: int,
    observe: Callable[[int, Vector], None],
) -> None:
    """Run in floating point with the errors of ciphertexts, and let ``observe`` hear of every node's slots.

    Each node gets a normal error of its own variance. ``errors`` adds up variances as if errors were independent; in
    deep circuits they are not: those of a polynomial's powers cancel each other, and a normalization takes out what all
    its numbers have in common. There it predicts a thousand times too much and more, and this does not. inputs: also
    the rows that earlier queries kept, with their errors.
    """
    own, generator = _Own(schedule, parameters), np.random.default_rng(seed)  # nothing here is a secret

    def disturbed(i: int, x: Sequence[Vector], value: Vector) -> Vector:
        deviation = np.sqrt(own.of(i, schedule.circuit.nodes[i], x))
        return value + generator.standard_normal(len(value)) * deviation

    clear(schedule.circuit, inputs, observe, disturbed)


def bits(error: float) -> float:
    """Return the bits of precision of an absolute error, -log2(error), at most 60."""
    return -math.log2(max(error, 2.0**-60))
