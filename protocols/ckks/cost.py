"""Predict time, memory and bytes of a schedule, from the ring degree and the limbs of every operation.

``Formula`` scales one machine's figures; use it to choose between rings and plans. ``Measured`` interpolates times that
this machine took for the very parameters; use it to predict.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from tenseal import sealapi

from protocols.ckks.canonical import fresh
from protocols.ckks.circuit import CkksNode, last_readers
from protocols.ckks.parameters import Parameters
from protocols.ckks.refresh import Masks, reserve
from protocols.ckks.schedule import Schedule
from protocols.ckks.seal import Client, Context, EvaluationKeys

KINDS = ("plain", "add", "rescale", "multiply", "switch", "input", "refresh")
REPEATS = 5  # measurements of which the median counts


class PrimitiveTimes(Protocol):
    """Seconds of one core for one operation, by its kind, the ring degree and the ciphertexts' limbs."""

    def of(self, kind: str, degree: int, limbs: int) -> float: ...


@dataclass(frozen=True)
class Formula:
    """Seconds for each residue, of which there are N * limbs (``switch``: N log2 N limbs (limbs + 1), a digit a prime).

    Measured on one core of a two-core Zen 5 machine at N = 16384.
    """

    plain: float = 5.6e-9
    add: float = 2.4e-9
    rescale: float = 2.6e-8
    multiply: float = 1.2e-8
    switch: float = 8.5e-10
    input: float = 8.0e-8
    refresh: float = 5.0e-7

    def of(self, kind: str, degree: int, limbs: int) -> float:
        work = degree * limbs * ((limbs + 1) * math.log2(degree) if kind == "switch" else 1)
        return float(getattr(self, kind)) * work


@dataclass(frozen=True)
class Measured:
    """Measured seconds by kind and limbs, interpolated linearly."""

    table: Mapping[str, Mapping[int, float]]

    def of(self, kind: str, degree: int, limbs: int) -> float:
        row = self.table[kind]
        if not row:  # no level of these parameters allows this operation
            return Formula().of(kind, degree, limbs)
        return float(np.interp(limbs, sorted(row), [row[n] for n in sorted(row)]))


@dataclass
class Account:
    """Seconds by kind of operation and by module; the latter is the latency breakdown of Power-Softmax's paper."""

    kinds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    paths: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, kind: str, path: str, seconds: float) -> None:
        self.kinds[kind] += seconds
        self.paths[path] += seconds

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def account(schedule: Schedule, parameters: Parameters, times: PrimitiveTimes | None = None) -> Account:
    """Add up the seconds of the server's evaluation of a schedule, operation by operation. times: default Formula."""
    out, by = Account(), times or Formula()
    for i, node in enumerate(schedule.circuit.nodes):
        for kind, spent in node_seconds(node, schedule.levels[i], parameters.degree, by).items():
            out.add(kind, schedule.circuit.paths[i], spent)
    return out


def node_seconds(node: CkksNode, level: int, degree: int, by: PrimitiveTimes) -> dict[str, float]:
    """Return the seconds of a node whose result has this level, by kind of operation."""
    limbs, count = level + 1, len(node.inputs)

    def of(kind: str, limbs: int = limbs) -> float:
        return by.of(kind, degree, limbs)

    if node.op == "rotate":
        return {"rotations": of("switch")}
    if node.op in ("add", "shift"):
        return {"sums": of("add") * max(1, count - 1)}
    rescaled = {"rescaling": of("rescale", limbs + 1)}
    if node.op == "multiply":
        each = of("multiply", limbs + 1) * (count // 2) + of("add", limbs + 1) * 1.5 * (count // 2 - 1)
        return {"ciphertext products": each + of("switch", limbs + 1), **rescaled}
    if node.op == "dot":
        return {"plain products": of("plain", limbs + 1) * count + of("add", limbs + 1) * (count - 1), **rescaled}
    if node.op == "keep":  # a product, and a sum with the rows before
        return {"kept rows": of("plain", limbs + 1) + of("add"), **rescaled}
    kinds = {"input": "inputs", "refresh": "refreshes"}
    return {kinds[node.op]: of(node.op)} if node.op in kinds else {}


def seconds(schedule: Schedule, parameters: Parameters, times: PrimitiveTimes | None = None) -> float:
    """Predict the seconds of the server's evaluation on one core."""
    return account(schedule, parameters, times).total


def weight_memory(schedule: Schedule, parameters: Parameters) -> int:
    """Count the bytes of the encoded plain vectors, each at the level at which it is read."""
    kept = set()
    for i, node in enumerate(schedule.circuit.nodes):
        if node.op in ("dot", "shift"):
            for x, p in zip(node.inputs, node.numbers, strict=True):
                if isinstance(schedule.circuit.plains[p], np.ndarray):
                    kept.add((p, schedule.levels[i], schedule.levels[x] if node.op == "dot" else -1))
    return sum(8 * parameters.degree * (level + (2 if x >= 0 else 1)) for _, level, x in kept)


def live_ciphertexts(schedule: Schedule) -> int:
    """Count the most residue polynomials of ciphertexts that are held at once; a ciphertext has two for each limb."""
    circuit, now, most = schedule.circuit, 0, 0
    last = last_readers(circuit)
    for i, node in enumerate(circuit.nodes):
        now += 2 * (schedule.levels[i] + 1)
        most = max(most, now)
        now -= sum(2 * (schedule.levels[x] + 1) for x in {i, *node.inputs} if last[x] <= i)
    return most


def kept_polynomials(schedule: Schedule) -> int:
    """Count the residue polynomials of the ciphertexts in which a conversation keeps its rows."""
    nodes = schedule.circuit.nodes
    return sum(2 * (level + 1) for node, level in zip(nodes, schedule.levels, strict=True) if node.op == "kept")


def measure(parameters: Parameters, points: Sequence[int] | None = None) -> Measured:
    """Measure this machine's times at some levels (``points``) of these parameters; this takes some seconds."""
    context = Context(parameters)
    client, evaluator = Client(context), sealapi.Evaluator(context.seal)
    keys = EvaluationKeys(context, client.evaluation_keys([1]), [1])
    masks, kept = Masks(context), reserve(parameters.degree, parameters.scale_bits, parameters.base_bits)
    vector = np.linspace(-1, 1, parameters.slots)
    table: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    levels = points or sorted({0, 1, parameters.levels // 3, 2 * parameters.levels // 3, parameters.levels})
    for level in levels:
        form = fresh(parameters, level)
        data, limbs = client.encrypt(vector, level), level + 1
        x, out = context.ciphertext(data, form), sealapi.Ciphertext()
        plain = context.encode(vector, level, parameters.scales[level])
        evaluator.add(x, x, out)
        functions: dict[str, Callable[[], Any]] = {
            "add": partial(evaluator.add_inplace, out, x),
            "switch": partial(evaluator.rotate_vector, x, 1, keys.galois[1], sealapi.Ciphertext()),
            "input": partial(context.ciphertext, data, form),
        }
        if level >= kept:
            functions["refresh"] = partial(_refreshed, masks, x, data, level)
        if level:  # there is a prime left to drop
            product = sealapi.Ciphertext()
            evaluator.multiply_plain(x, plain, product)
            functions["plain"] = partial(evaluator.multiply_plain, x, plain, sealapi.Ciphertext())
            functions["multiply"] = partial(evaluator.multiply, x, x, sealapi.Ciphertext())
            functions["rescale"] = partial(evaluator.rescale_to_next, product, sealapi.Ciphertext())
        for kind, function in functions.items():
            table[kind][limbs] = _median(function)
    return Measured(table)


def _refreshed(masks: Masks, x: Any, data: bytes, level: int) -> None:
    """Do the server's part of a refresh."""
    mask = masks.draw(level)
    masks.coefficients.context.packed(mask.added(x))
    context = masks.coefficients.context
    mask.removed(context.ciphertext(data, fresh(context.parameters, level)), level)


def _median(function: Callable[[], Any], repeats: int = REPEATS) -> float:
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)
