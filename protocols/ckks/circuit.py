"""A computation on ciphertexts, as a list of nodes with their operands, and its evaluation on plain slot vectors.

Operations: ``input`` (by name); ``rotate`` (slot i takes slot i + step, cyclic); ``add`` (a sum with signs);
``shift`` (adds a plain vector or number); ``multiply`` (the sum of products of pairs, relinearized once); ``dot`` (the
sum of operands times plain vectors or numbers); ``refresh`` (the client re-encrypts, which restores the levels).
``multiply`` and ``dot`` use up one level.

A circuit whose queries follow one another, each reading what earlier ones kept, has two more. ``kept`` reads the rows
that earlier queries kept under a name; ``keep`` adds a new row to them. The new row stands at the place of every row,
and a plain vector says which row each slot belongs to: all slots but those of its own row are multiplied by zero, which
takes a level.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Plain = Vector | float
TAKES_LEVEL = frozenset({"multiply", "dot", "keep"})
GIVEN = frozenset({"input", "kept"})  # ciphertexts that are there before the circuit runs


@dataclass(frozen=True)
class CkksNode:
    """One operation. inputs: node ids; numbers: step (rotate), signs (add), plain operands' ids (shift, dot, keep)."""

    op: str
    inputs: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    name: str = ""


@dataclass(repr=False)  # holds weights
class Circuit:
    """A computation under construction. Equal nodes are one node, so a rotation that two layers need is done once."""

    slots: int
    nodes: list[CkksNode] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)  # by node, the module that it belongs to
    plains: list[Plain] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)  # ids of nodes before which a refresh may be placed
    keeps: dict[str, tuple[int, int]] = field(default_factory=dict)  # new rows by name: node, plain of rows' numbers
    maps: list[range] = field(default_factory=list)  # nodes of each linear map, but for those that were there before
    path: str = ""
    _known: dict[CkksNode, int] = field(default_factory=dict)
    _plain_ids: dict[bytes, int] = field(default_factory=dict)

    def _node(self, op: str, inputs: Sequence[int] = (), numbers: Sequence[int] = (), name: str = "") -> int:
        node = CkksNode(op, tuple(inputs), tuple(numbers), name)
        if node not in self._known:
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
            self.paths.append(self.path)
        return self._known[node]

    def _plain(self, value: Plain) -> int:
        if isinstance(value, np.ndarray) and value.size and bool((value == value[0]).all()):
            value = float(value[0])
        if isinstance(value, np.ndarray):
            if value.shape != (self.slots,):
                raise ValueError(f"a plain vector has {value.shape} numbers, a ciphertext {self.slots} slots")
            key = hashlib.sha256(value.tobytes()).digest()
        else:
            key = np.float64(value).tobytes()
        if key not in self._plain_ids:
            self._plain_ids[key] = len(self.plains)
            self.plains.append(value)
        return self._plain_ids[key]

    def mark(self) -> None:
        if not self.marks or self.marks[-1] != len(self.nodes):
            self.marks.append(len(self.nodes))

    def input(self, name: str) -> int:
        return self._node("input", name=name)

    def kept(self, name: str) -> int:
        return self._node("kept", name=name)

    def keep(self, x: int, name: str, rows: Vector) -> None:
        """Keep x as a new row. rows: the number of the row that each slot belongs to, -1 for none."""
        self.keeps[name] = x, self._plain(rows)

    def rotate(self, x: int, step: int) -> int:
        step %= self.slots
        return self._node("rotate", (x,), (step,)) if step else x

    def add(self, *terms: int, signs: Sequence[int] | None = None) -> int:
        if len(terms) == 1 and (signs is None or signs[0] == 1):
            return terms[0]
        return self._node("add", terms, signs or (1,) * len(terms))

    def shift(self, x: int, value: Plain) -> int:
        if not np.any(value):
            return x
        return self._node("shift", (x,), (self._plain(value),))

    def multiply(self, x: int, y: int) -> int:
        return self.inner([(x, y)])

    def inner(self, pairs: Sequence[tuple[int, int]]) -> int:
        """Add a node for the sum of the products of all pairs."""
        self.mark()
        return self._node("multiply", [i for x, y in pairs for i in ((x, y) if x <= y else (y, x))])

    def dot(self, terms: Sequence[tuple[int, Plain]]) -> int:
        return self._node("dot", [x for x, _ in terms], [self._plain(p) for _, p in terms])

    def gathered(self) -> Circuit:
        """Return the circuit with maps that read the same rotations one behind the other, as early as the first.

        So nothing that is rotated needs to be there when what the first one gives is refreshed.
        """
        places = {i: (i, 0) for i in range(len(self.nodes))}
        for k, part in enumerate(self.maps):
            given = {x for i in part for x in self.nodes[i].inputs if x not in part}
            rotated = {x for x in given if self.nodes[x].op == "rotate"}
            first = next((m for m in self.maps[:k] if rotated & set(m) and max(given) < m.stop), None)
            if first is not None and any(self.nodes[i].op == "multiply" for i in range(first.stop, part.start)):
                places |= {i: (first.stop - 1, i) for i in part}
        order = sorted(places, key=lambda i: places[i])
        place = {old: new for new, old in enumerate(order)}
        out = Circuit(self.slots, plains=self.plains)
        for i in order:
            out.nodes.append(replace(self.nodes[i], inputs=tuple(place[x] for x in self.nodes[i].inputs)))
            out.paths.append(self.paths[i])
        out.outputs = [place[i] for i in self.outputs]
        starts = sorted(places.values())
        out.marks = sorted({bisect_left(starts, (m, 0)) for m in self.marks})
        out.keeps = {name: (place[x], rows) for name, (x, rows) in self.keeps.items()}
        return out

    @property
    def steps(self) -> list[int]:
        """The steps of all rotations, in order; the server needs a key for each."""
        return sorted({n.numbers[0] for n in self.nodes if n.op == "rotate"})

    @property
    def rows(self) -> int:
        """The rows that the queries of one conversation keep; 0 if none are kept."""
        numbers = [self.plains[n.numbers[0]] for n in self.nodes if n.op == "keep"]
        return max((int(np.max(each)) + 1 for each in numbers), default=0)

    def counts(self) -> dict[str, int]:
        """Count operations by kind; a product of a pair, or with a plain vector, counts as one."""
        out = dict.fromkeys(("rotate", "multiply", "plain", "add", "refresh"), 0)
        for node in self.nodes:
            if node.op == "dot":
                out["plain"] += len(node.inputs)
            elif node.op == "multiply":
                out["multiply"] += len(node.inputs) // 2
            elif node.op in out:
                out[node.op] += 1
        return out


def last_readers(circuit: Circuit) -> list[int]:
    """Return, for each node, the id of the last node that reads it: its own if none does, past the end for outputs."""
    last = list(range(len(circuit.nodes)))
    for i, node in enumerate(circuit.nodes):
        for x in node.inputs:
            last[x] = i
    for x in circuit.outputs:
        last[x] = len(circuit.nodes)
    return last


def clear(
    circuit: Circuit,
    inputs: Mapping[str, Vector],
    observe: Callable[[int, Vector], None] | None = None,
    disturb: Callable[[int, Sequence[Vector], Vector], Vector] | None = None,
) -> list[Vector]:
    """Compute the slots of every output in floating point, without encryption: the reference.

    inputs: slot vectors by name, those of kept rows among them. observe: called with every node's id and
    slots, for calibration. disturb: returns what takes the place of a node's slots, given its id, operands and slots.
    """
    values: dict[int, Vector] = {}
    last = last_readers(circuit)
    for i, node in enumerate(circuit.nodes):
        operands = [values[x] for x in node.inputs]
        value = _clear(circuit, node, operands, inputs)
        values[i] = value = value if disturb is None else disturb(i, operands, value)
        if observe is not None:
            observe(i, value)
        for x in {i, *node.inputs}:
            if last[x] <= i:
                del values[x]
    return [values[x] for x in circuit.outputs]


def _clear(circuit: Circuit, node: CkksNode, x: Sequence[Vector], inputs: Mapping[str, Vector]) -> Vector:
    if node.op in GIVEN:
        return inputs[node.name]
    if node.op == "rotate":
        return np.roll(x[0], -node.numbers[0])
    if node.op == "multiply":
        return np.asarray(np.sum([a * b for a, b in zip(x[::2], x[1::2], strict=True)], axis=0))
    if node.op in ("refresh", "keep"):
        return x[0]
    if node.op == "shift":
        return x[0] + circuit.plains[node.numbers[0]]
    weights = node.numbers if node.op == "add" else [circuit.plains[p] for p in node.numbers]
    total = x[0] * weights[0]
    for value, weight in zip(x[1:], weights[1:], strict=True):
        total = total + value * weight
    return total
