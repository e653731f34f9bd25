"""The server's evaluation of a schedule on ciphertexts: one process, one core."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tenseal import sealapi

from protocols.ckks import canonical
from protocols.ckks.circuit import CkksNode, last_readers
from protocols.ckks.refresh import Mask, Masks
from protocols.ckks.schedule import Schedule
from protocols.ckks.seal import Context, EvaluationKeys

CACHE = 4 << 30  # bytes of encoded weights kept, by default


class EncodedWeights:
    """The plain vectors of a schedule, encoded once at the level and scale at which they are read.

    limit: bytes that encoded vectors may take; a vector that does not fit is encoded at every use.
    """

    def __init__(self, context: Context, schedule: Schedule, limit: int = CACHE) -> None:
        self.context, self.schedule, self.limit = context, schedule, limit
        self.bytes = 0
        self._cache: dict[tuple[int, int, float], Any] = {}

    def prepare(self) -> None:
        for i, node in enumerate(self.schedule.circuit.nodes):
            if node.op in ("dot", "shift"):
                for place in range(len(node.numbers)):
                    self.operand(i, node, place)

    def operand(self, i: int, node: CkksNode, place: int) -> Any:
        """Return the encoded plain operand ``place`` of node i."""
        s, level = self.context.parameters.scales, self.schedule.levels[i]
        if node.op == "dot":  # the product must rescale to scales[level], whatever scale its operand has
            scale = s[level] * self.context.parameters.primes[level + 1] / s[self.schedule.levels[node.inputs[place]]]
            level += 1
        else:
            scale = s[level]
        value = self.schedule.circuit.plains[node.numbers[place]]
        if not isinstance(value, np.ndarray):
            return self.context.encode(value, level, scale)
        key = (node.numbers[place], level, scale)
        if key not in self._cache:
            encoded, size = self.context.encode(value, level, scale), 8 * (level + 1) * self.context.parameters.degree
            if self.bytes + size > self.limit:
                return encoded
            self._cache[key] = encoded
            self.bytes += size
        return self._cache[key]


@dataclass
class EncryptedRows:
    """The rows that the queries of one conversation have kept. filled: their number; ciphertexts: by name."""

    filled: int = 0
    ciphertexts: dict[str, Any] = field(default_factory=dict)


def evaluate(
    weights: EncodedWeights,
    keys: EvaluationKeys,
    inputs: Mapping[str, bytes],
    progress: Callable[[int, str], None] | None = None,
    kept: EncryptedRows | None = None,
) -> Generator[list[bytes], list[bytes], list[bytes]]:
    """Run the whole schedule, and return the encrypted outputs.

    It yields the masked ciphertexts of each refresh and must be resumed with the client's fresh ones. Raises
    InvalidCiphertext for inputs that do not belong to the parameters.

    progress: called before each node runs, with its id and its module's path. kept: the rows of earlier queries, to
    which this one adds its own when it is done; none by default.
    """
    kept = EncryptedRows() if kept is None else kept
    run = _Run(weights, keys, kept)
    schedule, circuit = weights.schedule, weights.schedule.circuit
    last = last_readers(circuit)
    stage = 0
    fresh: dict[int, Any] = {}
    masks = Masks(weights.context)
    for i, node in enumerate(circuit.nodes):
        if progress is not None:
            progress(i, circuit.paths[i])
        if node.op == "input":
            form = canonical.fresh(weights.context.parameters, schedule.levels[i])
            run.values[i] = weights.context.ciphertext(inputs[node.name], form, f"input {node.name!r}")
        elif node.op == "refresh":
            if schedule.stages[i] > stage:
                stage = schedule.stages[i]
                fresh = yield from _refreshed(run, masks, schedule, stage)
            run.values[i] = fresh.pop(i)
        else:
            run.values[i] = run.node(i, node)
        for x in {i, *node.inputs}:
            if last[x] <= i:
                run.forget(x)
    results = [run.leaving(run.values[x]) for x in circuit.outputs]
    kept.ciphertexts, kept.filled = run.rows, kept.filled + 1
    return results


def _refreshed(
    run: _Run, masks: Masks, schedule: Schedule, stage: int
) -> Generator[list[bytes], list[bytes], dict[int, Any]]:
    nodes = schedule.refreshes(stage)
    masked: list[bytes] = []
    drawn: list[Mask] = []
    for i in nodes:
        mask = masks.draw(schedule.reserve)
        masked.append(run.leaving(mask.added(run.at(schedule.circuit.nodes[i].inputs[0], schedule.reserve))))
        drawn.append(mask)
    answers = yield masked
    if len(answers) != len(nodes):
        raise ValueError(f"a refresh of {len(nodes)} ciphertexts came back with {len(answers)}")
    out = {}
    for i, mask, answer in zip(nodes, drawn, answers, strict=True):
        level = schedule.levels[i]
        form = canonical.fresh(run.context.parameters, level)
        out[i] = mask.removed(run.context.ciphertext(answer, form, "refreshed ciphertext"), level)
    return out


class _Run:
    def __init__(self, weights: EncodedWeights, keys: EvaluationKeys, kept: EncryptedRows) -> None:
        self.weights, self.keys, self.context = weights, keys, weights.context
        self.kept, self.rows = kept, dict(kept.ciphertexts)
        self.schedule = weights.schedule
        self.evaluator = sealapi.Evaluator(self.context.seal)
        self.values: dict[int, Any] = {}
        self.dropped: dict[int, dict[int, Any]] = {}

    def forget(self, x: int) -> None:
        self.values.pop(x, None)
        self.dropped.pop(x, None)

    def at(self, x: int, level: int) -> Any:
        """Return value x with the limbs of a level; its scale stays."""
        if self.schedule.levels[x] == level:
            return self.values[x]
        dropped = self.dropped.setdefault(x, {})
        if level not in dropped:
            dropped[level] = sealapi.Ciphertext()
            self.evaluator.mod_switch_to(self.values[x], self.context.ids[level], dropped[level])
        return dropped[level]

    def leaving(self, x: Any) -> bytes:
        """Add a fresh encryption of zero under the client's public key to x; return the bytes that leave the server.

        So the client sees the plaintext and noise of x, but not its second polynomial, which is a function of the
        weights and would let the client test a guess of them.
        """
        zero, out = sealapi.Ciphertext(), sealapi.Ciphertext()
        self.keys.zeros.encrypt_zero(x.parms_id(), zero)
        zero.scale = x.scale
        self.evaluator.add(x, zero, out)
        return self.context.packed(out)

    def node(self, i: int, node: CkksNode) -> Any:
        e, out, level = self.evaluator, sealapi.Ciphertext(), self.schedule.levels[i]
        if node.op == "rotate":
            step = node.numbers[0]
            e.rotate_vector(self.at(node.inputs[0], level), step, self.keys.galois[step], out)
        elif node.op == "add":
            return self._add(node, level)
        elif node.op == "shift":
            e.add_plain(self.at(node.inputs[0], level), self.weights.operand(i, node, 0), out)
        elif node.op == "multiply":
            return self._products(node, level)
        elif node.op == "kept":
            return self._kept(node, level)
        elif node.op == "keep":
            return self._keep(node, level)
        else:
            return self._dot(i, node, level)
        return out

    def _kept(self, node: CkksNode, level: int) -> Any:
        """Return the rows that earlier queries kept, at first an encryption of zeros."""
        if node.name not in self.kept.ciphertexts:
            zeros = sealapi.Ciphertext()
            self.keys.zeros.encrypt_zero(self.context.ids[level], zeros)
            zeros.scale = self.context.parameters.scales[level]
            self.rows[node.name] = zeros
            return zeros
        return self.kept.ciphertexts[node.name]

    def _keep(self, node: CkksNode, level: int) -> Any:
        """Add a row to those that are kept, and return all of them; the last query of a full conversation adds none."""
        e, s, (x,) = self.evaluator, self.context.parameters.scales, node.inputs
        own = np.asarray(self.schedule.circuit.plains[node.numbers[0]] == self.kept.filled, dtype=np.float64)
        if not own.any():
            return self.rows[node.name]
        scale = s[level] * self.context.parameters.primes[level + 1] / s[self.schedule.levels[x]]
        row, out = sealapi.Ciphertext(), sealapi.Ciphertext()
        e.multiply_plain(self.at(x, level + 1), self.context.encode(own, level + 1, scale), row)
        e.add(self.rows[node.name], self._rescaled(row, level), out)
        self.rows[node.name] = out
        return out

    def _products(self, node: CkksNode, level: int) -> Any:
        e, total, part = self.evaluator, sealapi.Ciphertext(), sealapi.Ciphertext()
        for place in range(0, len(node.inputs), 2):
            x, y = node.inputs[place : place + 2]
            out = part if place else total
            if x == y:
                e.square(self.at(x, level + 1), out)
            else:
                e.multiply(self.at(x, level + 1), self.at(y, level + 1), out)
            if place:
                e.add_inplace(total, part)
        e.relinearize_inplace(total, self.keys.relin)
        return self._rescaled(total, level)

    def _add(self, node: CkksNode, level: int) -> Any:
        e, out = self.evaluator, sealapi.Ciphertext()
        operands = [self.at(x, level) for x in node.inputs]
        signs = list(node.numbers)
        if signs[0] < 0:
            e.negate(operands[0], out)
        for k, (x, sign) in enumerate(zip(operands[1:], signs[1:], strict=True)):
            function = e.add if sign > 0 else e.sub
            if k == 0 and signs[0] > 0:
                function(operands[0], x, out)
            else:
                (e.add_inplace if sign > 0 else e.sub_inplace)(out, x)
        return out

    def _dot(self, i: int, node: CkksNode, level: int) -> Any:
        e, total, part = self.evaluator, sealapi.Ciphertext(), sealapi.Ciphertext()
        for place, x in enumerate(node.inputs):
            e.multiply_plain(self.at(x, level + 1), self.weights.operand(i, node, place), part if place else total)
            if place:
                e.add_inplace(total, part)
        return self._rescaled(total, level)

    def _rescaled(self, x: Any, level: int) -> Any:
        self.evaluator.rescale_to_next_inplace(x)
        x.scale = self.context.parameters.scales[level]  # the same up to the rounding of a double
        return x
