"""Assign a level to every value of a circuit, and choose the places at which the client refreshes ciphertexts.

A value's level is the number of products that can still follow it. All levels are known before anything is encrypted. A
stage is what the server computes between two refreshes. Within a stage every node gets the lowest level that its
readers allow, because ciphertexts are smallest and operations cheapest there. If a reader needs a value at a lower
level, the value drops: at no cost if the reader is ``dot`` (its plain operand makes up for the difference in scale),
else by a product with one.

A row that is kept is refreshed too, with the next refresh of its query or one of its own at the end, as the next query
reads it at the same level as this one reads those of before.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from protocols.ckks.circuit import GIVEN, TAKES_LEVEL, Circuit, CkksNode, Plain, Vector, last_readers
from protocols.errors import DoesNotFit

ROUND = 3  # the cost of a round when cuts are chosen, in refreshed ciphertexts


@dataclass(frozen=True, repr=False)  # holds weights
class Schedule:
    """A circuit with refreshes and drops in it. levels: by node, the level of its result; stages: by node."""

    circuit: Circuit
    levels: tuple[int, ...]
    stages: tuple[int, ...]
    reserve: int  # the level at which values are sent for a refresh, so that their masks fit

    @property
    def depth(self) -> int:
        return max(self.levels, default=0)

    @property
    def rounds(self) -> int:
        """The number of refreshes one after another."""
        return max(self.stages, default=0)

    def refreshes(self, stage: int) -> list[int]:
        """Return the refresh nodes that begin a stage, in order."""
        return [i for i, n in enumerate(self.circuit.nodes) if n.op == "refresh" and self.stages[i] == stage]

    def inputs(self) -> dict[str, int]:
        """Return the level at which the client encrypts each input, by name."""
        return {n.name: self.levels[i] for i, n in enumerate(self.circuit.nodes) if n.op == "input"}


@dataclass(frozen=True)
class Price:
    """The seconds that cuts cost: of a node at a level, of a refreshed ciphertext, and of a round."""

    node: Callable[[CkksNode, int], float]
    refreshed: float
    round: float


def schedule(circuit: Circuit, levels: int | None = None, reserve: int = 0, price: Price | None = None) -> Schedule:
    """Schedule a circuit; with ``levels``, refreshes are placed so that no stage needs more levels than that.

    reserve: the level that values keep for a refresh. price: counts what is computed between refreshes too, which is
    cheap at low levels, so that they come behind large maps rather than before; it takes seconds. Raises DoesNotFit if
    the circuit is deeper than ``levels`` between two places for a refresh.
    """
    circuit = _trimmed(circuit)
    cuts = [] if levels is None else _cuts(circuit, levels, reserve, price)
    return _leveled(*_with_refreshes(circuit, cuts), reserve)


def taken_apart(schedule: Schedule) -> tuple[dict[str, Any], list[Vector]]:
    """Return a schedule as JSON values and the plain vectors of its circuit, which hold weights."""
    circuit = schedule.circuit
    header = {
        "slots": circuit.slots,
        "nodes": [[n.op, n.inputs, n.numbers, n.name] for n in circuit.nodes],
        "paths": circuit.paths,
        "plains": [None if isinstance(p, np.ndarray) else float(p) for p in circuit.plains],
        "outputs": circuit.outputs,
        "levels": schedule.levels,
        "stages": schedule.stages,
        "reserve": schedule.reserve,
    }
    return header, [p for p in circuit.plains if isinstance(p, np.ndarray)]


def put_together(header: Mapping[str, Any], vectors: Sequence[Vector]) -> Schedule:
    """Return the schedule of ``taken_apart``.

    Raises LookupError, TypeError, ValueError or StopIteration if it is none.
    """
    rest = iter(vectors)
    plains: list[Plain] = [next(rest) if p is None else float(p) for p in header["plains"]]
    nodes = [CkksNode(op, tuple(inputs), tuple(numbers), name) for op, inputs, numbers, name in header["nodes"]]
    circuit = Circuit(header["slots"], nodes, header["paths"], plains, header["outputs"])
    return Schedule(circuit, tuple(header["levels"]), tuple(header["stages"]), header["reserve"])


def depth_by_path(circuit: Circuit) -> list[tuple[str, int]]:
    """Count the levels that each module takes along the deepest chain of products, as (path, levels)."""
    depth, before = [0] * len(circuit.nodes), [-1] * len(circuit.nodes)
    for i, node in enumerate(circuit.nodes):
        if node.inputs:
            before[i] = max(node.inputs, key=lambda x: depth[x])
            depth[i] = depth[before[i]] + (node.op in TAKES_LEVEL)
    at, taken = max(circuit.outputs, key=lambda i: depth[i]), Counter[str]()
    while at >= 0:
        taken[circuit.paths[at]] += circuit.nodes[at].op in TAKES_LEVEL
        at = before[at]
    return [(path, n) for path, n in reversed(taken.items()) if n]


def _cuts(circuit: Circuit, levels: int, reserve: int, price: Price | None) -> list[int]:
    """Choose the marks at which all values still needed are refreshed.

    Dynamic programming minimizes the number of refreshed ciphertexts, plus ROUND for each round; or the seconds by a
    price.
    """
    work = None if price is None else _Work(circuit, levels, reserve, price)
    each, turn = (1.0, float(ROUND)) if price is None else (price.refreshed, price.round)
    end = len(circuit.nodes)
    places = [0, *[m for m in circuit.marks if 0 < m < end], end]
    last = last_readers(circuit)
    live = {
        m: sum(1 for i in range(m) if last[i] >= m and circuit.nodes[i].op not in GIVEN) if m < end else 0
        for m in places
    }
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for a, start in enumerate(places[:-1]):
        if start not in best:
            continue
        depth: dict[int, int] = {}
        deepest = 0
        at = start
        for stop in places[a + 1 :]:
            for i in range(at, stop):
                node = circuit.nodes[i]
                depth[i] = max((depth.get(x, _least(circuit, x)) for x in node.inputs), default=0)
                depth[i] += node.op in TAKES_LEVEL
                deepest = max(deepest, depth[i])
            at = stop
            if deepest > levels:
                break
            if stop < end and deepest > levels - reserve:
                continue
            cost, cuts = best[start]
            cost += live[stop] * each + (turn if stop < end else 0) + (work.between(start, stop) if work else 0)
            if stop not in best or cost < best[stop][0]:
                best[stop] = (cost, [*cuts, stop] if stop < end else cuts)
    if end not in best:
        taken = ", ".join(f"{path or 'model'} {n}" for path, n in depth_by_path(circuit))
        raise DoesNotFit(
            f"{levels} levels, {reserve} of them kept for masks, are too few for one step between refreshes; levels by "
            f"module: {taken}\nhint: a larger ring, or less precision"
        )
    return best[end][1]


class _Work:
    """The seconds of what is computed between two refreshes, where every node runs at the lowest level it can."""

    def __init__(self, circuit: Circuit, levels: int, reserve: int, price: Price) -> None:
        self._nodes, self._last, self._reserve = circuit.nodes, last_readers(circuit), reserve
        kept = {x for x, _ in circuit.keeps.values()}
        self._refreshed = [i in kept for i in range(len(circuit.nodes))]
        self._table = [[price.node(node, level) for level in range(levels + reserve + 1)] for node in circuit.nodes]
        self._level = [0] * len(circuit.nodes)

    def between(self, start: int, stop: int) -> float:
        level, total = self._level, 0.0
        end = len(self._nodes)
        for i in range(start, stop):
            level[i] = self._reserve if self._refreshed[i] or self._last[i] >= stop < end else 0
        for i in range(stop - 1, start - 1, -1):
            node = self._nodes[i]
            total += self._table[i][level[i]]
            wanted = level[i] + (node.op in TAKES_LEVEL)
            for x in node.inputs:
                if x >= start and level[x] < wanted:
                    level[x] = wanted
        return total


def _least(circuit: Circuit, i: int) -> int:
    """Return the levels below the highest at which a value is at most: what is kept is multiplied once before."""
    return int(circuit.nodes[i].op == "kept")


def _trimmed(circuit: Circuit) -> Circuit:
    """Remove the nodes that neither an output needs nor a row that is kept."""
    needed = [False] * len(circuit.nodes)
    for i in (*circuit.outputs, *(x for x, _ in circuit.keeps.values())):
        needed[i] = True
    for i in range(len(circuit.nodes) - 1, -1, -1):
        if needed[i]:
            for x in circuit.nodes[i].inputs:
                needed[x] = True
    place = list(itertools.accumulate(needed, initial=0))
    out = Circuit(circuit.slots, plains=circuit.plains)
    for node, path, kept in zip(circuit.nodes, circuit.paths, needed, strict=True):
        if kept:
            out.nodes.append(replace(node, inputs=tuple(place[x] for x in node.inputs)))
            out.paths.append(path)
    out.outputs = [place[i] for i in circuit.outputs]
    out.marks = sorted({place[m] for m in circuit.marks})
    read = {node.name for node in out.nodes if node.op == "kept"}
    out.keeps = {name: (place[x], rows) for name, (x, rows) in circuit.keeps.items() if name in read}
    return out


def _with_refreshes(circuit: Circuit, cuts: list[int]) -> tuple[Circuit, list[int]]:
    """Insert refreshes before the nodes ``cuts``, and keep rows; return the circuit and the stage of every node."""
    last = last_readers(circuit)
    out, stages, place = Circuit(circuit.slots, plains=circuit.plains), list[int](), dict[int, int]()

    def append(node: CkksNode, path: str, stage: int) -> int:
        out.nodes.append(node)
        out.paths.append(path)
        stages.append(stage)
        return len(out.nodes) - 1

    def keep(before: int, stage: int) -> None:
        """Keep the rows of nodes before this one which were not kept yet."""
        ready = [name for name, (x, _) in waiting.items() if x < before]
        fresh = {}
        for x in sorted({waiting[name][0] for name in ready}):
            if out.nodes[place[x]].op == "refresh" and stages[place[x]] == stage:
                fresh[x] = place[x]
            else:
                fresh[x] = append(CkksNode("refresh", (place[x],)), circuit.paths[x], stage)
        for name in ready:
            x, rows = waiting.pop(name)
            append(CkksNode("keep", (fresh[x],), (rows,), name), circuit.paths[x], stage)

    remaining, stage, waiting = list(cuts), 0, dict(circuit.keeps)
    for i, node in enumerate(circuit.nodes):
        if remaining and i == remaining[0]:
            remaining.pop(0)
            stage += 1
            for x in range(i):
                if last[x] >= i and circuit.nodes[x].op not in GIVEN:
                    place[x] = append(CkksNode("refresh", (place[x],)), circuit.paths[x], stage)
            keep(i, stage)
        inputs = tuple(place[x] for x in node.inputs)
        place[i] = append(replace(node, inputs=inputs), circuit.paths[i], stage)
    if waiting:
        keep(len(circuit.nodes), stage + 1)
    out.outputs = [place[i] for i in circuit.outputs]
    return out, stages


def _leveled(circuit: Circuit, stages: list[int], reserve: int) -> Schedule:
    levels = [0] * len(circuit.nodes)
    for i in range(len(circuit.nodes) - 1, -1, -1):
        node = circuit.nodes[i]
        for x in node.inputs if node.op != "keep" else ():
            wanted = reserve if node.op == "refresh" else levels[i] + (node.op in TAKES_LEVEL)
            levels[x] = max(levels[x], wanted)
    kept = {node.name: levels[i] for i, node in enumerate(circuit.nodes) if node.op == "kept"}
    for i, node in enumerate(circuit.nodes):
        if node.op == "keep":
            levels[i] = kept[node.name]
            levels[node.inputs[0]] = max(levels[node.inputs[0]], levels[i] + 1)
    out = Circuit(circuit.slots, plains=circuit.plains)
    new_levels, new_stages = list[int](), list[int]()
    place, dropped = dict[int, int](), dict[tuple[int, int], int]()
    one = len(circuit.plains)
    out.plains.append(1.0)

    def append(node: CkksNode, path: str, level: int, stage: int) -> int:
        out.nodes.append(node)
        out.paths.append(path)
        new_levels.append(level)
        new_stages.append(stage)
        return len(out.nodes) - 1

    def operand(i: int, x: int) -> int:
        """Return operand x of node i, dropped to the level at which the node reads it."""
        node = circuit.nodes[i]
        level = reserve if node.op == "refresh" else levels[i] + (node.op in TAKES_LEVEL)
        if node.op == "dot" or levels[x] == level:
            return place[x]
        if (x, level) not in dropped:
            dropped[x, level] = append(CkksNode("dot", (place[x],), (one,)), circuit.paths[i], level, stages[i])
        return dropped[x, level]

    for i, node in enumerate(circuit.nodes):
        if node.op == "refresh":  # a stage's refreshes leave together, so all their drops come before the first of them
            for j in range(i, len(circuit.nodes)):
                if circuit.nodes[j].op != "refresh":
                    break
                operand(j, circuit.nodes[j].inputs[0])
        inputs = tuple(operand(i, x) for x in node.inputs)
        place[i] = append(replace(node, inputs=inputs), circuit.paths[i], levels[i], stages[i])
    for i in circuit.outputs:  # results leave at level 0, whatever other nodes read them
        last = place[i]
        if levels[i]:
            last = append(CkksNode("dot", (place[i],), (one,)), circuit.paths[i], 0, stages[i])
        out.outputs.append(last)
    return Schedule(out, tuple(new_levels), tuple(new_stages), reserve)
