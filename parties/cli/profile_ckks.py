"""``unseen profile --deployment ckks``: what a model costs on ciphertexts, before anything runs.

The circuit, its levels, keys and bytes are exact; time is predicted from primitives that this machine was measured on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parties.reports.tables import mb
from protocols.ckks.circuit import TAKES_LEVEL
from protocols.ckks.cost import account, live_ciphertexts, measure, weight_memory
from protocols.ckks.noise import bits
from protocols.ckks.schedule import depth_by_path
from secure.ckks.compile import Encrypted


def profile(encrypted: Encrypted, *, measured: bool = True) -> dict[str, Any]:
    """Everything about a Program's cost as one document. ``measured``: time the primitives here, some seconds."""
    program, schedule = encrypted.program, encrypted.schedule
    p, circuit = program.parameters, schedule.circuit
    spent = account(schedule, p, measure(p) if measured else None)
    modules: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for i, node in enumerate(circuit.nodes):
        row = modules[circuit.paths[i]]
        row["rotations"] += node.op == "rotate"
        row["ciphertext products"] += node.op == "multiply"
        row["plain products"] += len(node.inputs) if node.op == "dot" else 0
        row["lowest level"] = min(row.get("lowest level", p.levels), schedule.levels[i])
        row["highest level"] = max(row["highest level"], schedule.levels[i] + (node.op in TAKES_LEVEL))
    for path, seconds in spent.paths.items():
        modules[path]["seconds"] = seconds
    for path, levels in depth_by_path(circuit):
        modules[path]["levels"] = levels
    for path, error in encrypted.layer_errors.items():
        modules[path]["bits"] = bits(error)
    up = sum(p.polynomial_bytes(level) for _, level, _ in program.views.values())
    refreshed = [level for stage in program.refreshes for level in stage]
    return {
        "parameters": {
            "N": p.degree,
            "levels": p.levels,
            "scale bits": p.scale_bits,
            "modulus bits": p.total_bits,
            "security bits": 128,
        },
        "mode": program.labels["mode"],
        "counts": dict(program.counts),
        "seconds": spent.total,
        "breakdown": dict(spent.kinds),
        "modules": {path: dict(row) for path, row in modules.items()},
        "predicted error": encrypted.predicted_error,
        "key bytes": p.key_bytes * (len(program.steps) + 1),
        "key memory": p.key_memory * (len(program.steps) + 1),
        "weight memory": weight_memory(schedule, p),
        "ciphertext memory": 8 * p.degree * live_ciphertexts(schedule),
        "to server": up + sum(map(p.polynomial_bytes, refreshed)),
        "to client": p.ciphertext_bytes(0) * len(program.output) + p.ciphertext_bytes(program.reserve) * len(refreshed),
        "rounds": 1 + len(program.refreshes),
    }


def show(console: Console, found: dict[str, Any], title: str) -> None:
    p = found["parameters"]
    table = Table(title=title, title_justify="left")
    for column in ("module", "levels", "at", "rotations", "ct x ct", "plain", "s", "bits"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for path, row in found["modules"].items():
        table.add_row(
            path or "model",
            f"{row.get('levels', 0):.0f}",
            f"{row['highest level']:.0f}-{row['lowest level']:.0f}",
            f"{row['rotations']:.0f}",
            f"{row['ciphertext products']:.0f}",
            f"{row['plain products']:.0f}",
            f"{row.get('seconds', 0.0):.2f}",
            f"{row.get('bits', 0.0):.1f}",
        )
    console.print(table)
    console.print(
        f"N = {p['N']}, {p['levels']} levels of {p['scale bits']} bits, modulus of {p['modulus bits']} bits: "
        f"{p['security bits']}-bit security; {found['mode']}, {found['rounds']} round(s)\n"
        f"predicted {found['seconds']:.2f} s of one core: "
        + ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in sorted(found["breakdown"].items()))
        + f"\nto the server {mb(found['to server'])}, to the client {mb(found['to client'])}; keys "
        f"{mb(found['key bytes'])} once; in memory keys {mb(found['key memory'])}, weights "
        f"{mb(found['weight memory'])}, ciphertexts {mb(found['ciphertext memory'])}\n"
        f"predicted error of an output {found['predicted error']:.2g}",
        highlight=False,
    )


def command(console: Console, model: str, length: int, refresh: bool, precision: float, as_json: bool) -> None:
    """``model``: a directory, or digits, digits-2, digits-4 (random weights: costs alone)."""
    torch.set_num_threads(1)
    mode = "refresh" if refresh else "pure"
    name, _, layers = model.partition("-")
    if name == "digits":
        from parties.cli.demo_digits import encrypt_digits, untrained_digits

        encrypted = encrypt_digits(untrained_digits(int(layers or 1)), mode=mode, precision_bits=precision)
    else:
        from parties.ckks.hosted import compile_text

        encrypted = compile_text(model, length, mode, precision, ()).encrypted
    found = profile(encrypted)
    if as_json:
        console.file.write(json.dumps(found) + "\n")
    else:
        show(console, found, f"{model} under CKKS")
