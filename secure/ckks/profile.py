"""The cost of a model on ciphertexts, before anything runs.

The circuit, its levels, keys and bytes are exact. Time is predicted from the times of primitives, which can be measured
on this machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from protocols.ckks.circuit import TAKES_LEVEL
from protocols.ckks.cost import account, live_ciphertexts, measure, seconds, weight_memory
from protocols.ckks.noise import bits
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import depth_by_path
from secure.ckks.compile import CkksModel
from secure.units import in_units

SECURITY = 128  # bits


class Table(NamedTuple):
    """A table for people. The first column holds words, the others numbers; ``lines`` go below it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str]


@dataclass
class ModuleCost:
    """One module's part of the cost.

    levels: those that it takes on the deepest path. lowest, highest: the levels at which its work is done. seconds:
    time of one core of the server. bits: precision left by its largest error, relative to the unit of its ciphertexts.
    """

    lowest: int
    highest: int = 0
    levels: int = 0
    rotations: int = 0
    ciphertext_products: int = 0
    plain_products: int = 0
    seconds: float = 0.0
    bits: float = 0.0


@dataclass(frozen=True)
class CkksProfile:
    """The cost of one query of a compiled model.

    counts: nodes of the circuit by kind. breakdown: predicted seconds of one core, by kind of operation. modules: costs
    by path, with "" for operations outside all modules. predicted_error: absolute error of an output element.
    Bytes: key_bytes are sent once; to_server and to_client are sent in each query; key_memory, weight_memory and
    ciphertext_memory are the server's memory. rounds: messages that wait for one another. hiding: bits by which masks
    hide the refreshed ciphertexts of one query, all together; None without refreshes.
    """

    parameters: Parameters
    mode: str
    counts: Mapping[str, int]
    breakdown: Mapping[str, float]
    modules: Mapping[str, ModuleCost]
    predicted_error: float
    key_bytes: int
    key_memory: int
    weight_memory: int
    ciphertext_memory: int
    to_server: int
    to_client: int
    rounds: int
    hiding: float | None

    @property
    def seconds(self) -> float:
        """The predicted seconds of one core of the server."""
        return sum(self.breakdown.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the profile as JSON values.

        The bytes that travel, the rounds and the predicted error are not among them: the deployment's cost has them.
        """
        p = self.parameters
        modules = {
            path: {
                "rotations": m.rotations,
                "ciphertext products": m.ciphertext_products,
                "plain products": m.plain_products,
                "lowest level": m.lowest,
                "highest level": m.highest,
                "seconds": m.seconds,
                "levels": m.levels,
                "bits": m.bits,
            }
            for path, m in self.modules.items()
        }
        return {
            "parameters": {
                "N": p.degree,
                "levels": p.levels,
                "scale bits": p.scale_bits,
                "modulus bits": p.total_bits,
                "security bits": SECURITY,
            },
            "mode": self.mode,
            "counts": dict(self.counts),
            "seconds": self.seconds,
            "breakdown": dict(self.breakdown),
            "modules": modules,
            "key memory": self.key_memory,
            "weight memory": self.weight_memory,
            "ciphertext memory": self.ciphertext_memory,
            "refresh hiding bits": self.hiding,
        }

    @property
    def _hidden(self) -> tuple[str, ...]:
        if self.hiding is None:
            return ()
        return (
            f"masks hide all refreshed ciphertexts of a query to 2^-{self.hiding:.0f} together, those of a million "
            f"queries to 2^-{self.hiding - math.log2(1e6):.0f}",
        )

    def table(self) -> Table:
        """Return the profile by module, with its sums in words."""
        p = self.parameters
        columns = ("module", "levels", "at", "rotations", "ct x ct", "plain", "s", "bits")
        rows = [
            (
                path or "model",
                str(m.levels),
                f"{m.highest}-{m.lowest}",
                str(m.rotations),
                str(m.ciphertext_products),
                str(m.plain_products),
                f"{m.seconds:.2f}",
                f"{m.bits:.1f}",
            )
            for path, m in self.modules.items()
        ]
        kinds = ", ".join(f"{kind} {spent:.2f}" for kind, spent in sorted(self.breakdown.items()))
        lines = (
            f"N = {p.degree}, {p.levels} levels of {p.scale_bits} bits, modulus of {p.total_bits} bits: "
            f"{SECURITY}-bit security; {self.mode}, {self.rounds} round(s)",
            f"predicted {self.seconds:.2f} s of one core: {kinds}",
            f"to the server {in_units(self.to_server)}, to the client {in_units(self.to_client)}; "
            f"keys {in_units(self.key_bytes)} once; in memory keys {in_units(self.key_memory)}, "
            f"weights {in_units(self.weight_memory)}, ciphertexts {in_units(self.ciphertext_memory)}",
            f"predicted error of an output {self.predicted_error:.2g}",
            *self._hidden,
        )
        return Table(columns, rows, lines)


def profile(model: CkksModel, *, measured: bool = True) -> CkksProfile:
    """Count a compiled model's operations, keys and bytes.

    ``measured``: time the primitives on this machine, which takes some seconds.
    """
    program, schedule = model.program, model.schedule
    p, circuit = program.parameters, schedule.circuit
    spent = account(schedule, p, measure(p) if measured else None)
    modules: dict[str, ModuleCost] = defaultdict(lambda: ModuleCost(p.levels))
    for i, node in enumerate(circuit.nodes):
        module = modules[circuit.paths[i]]
        module.rotations += node.op == "rotate"
        module.ciphertext_products += node.op == "multiply"
        module.plain_products += len(node.inputs) if node.op == "dot" else 0
        module.lowest = min(module.lowest, schedule.levels[i])
        module.highest = max(module.highest, schedule.levels[i] + (node.op in TAKES_LEVEL))
    for path, taken in spent.paths.items():
        modules[path].seconds = taken
    for path, levels in depth_by_path(circuit):
        modules[path].levels = levels
    for path, error in model.layer_errors.items():
        modules[path].bits = bits(error)
    return CkksProfile(
        parameters=p,
        mode=program.labels["mode"],
        counts=dict(program.counts),
        breakdown=dict(spent.kinds),
        modules=dict(modules),
        predicted_error=model.predicted_error,
        key_bytes=program.key_bytes,
        key_memory=p.key_memory * (len(program.steps) + 1),
        weight_memory=weight_memory(schedule, p),
        ciphertext_memory=8 * p.degree * live_ciphertexts(schedule),
        to_server=program.to_server,
        to_client=program.to_client,
        rounds=program.rounds,
        hiding=program.hiding,
    )


def summary(model: CkksModel) -> str:
    """Describe a query's cost in one line."""
    program, p = model.program, model.program.parameters
    refreshed = sum(map(len, program.refreshes))
    rounds = f", {len(program.refreshes)} refreshes of {refreshed} ciphertexts" if refreshed else ", no interaction"
    return (
        f"N = {p.degree}, {p.levels} levels of {p.scale_bits} bits ({SECURITY}-bit security){rounds}; "
        f"{program.counts['rotate']} rotations, {program.counts['multiply']} ciphertext products, "
        f"{program.counts['plain']} plain ones; about {seconds(model.schedule, p):.1f} s of one core a query; "
        f"keys {in_units(program.key_bytes)}"
    )
