"""Our works with dealer, server and client as separate processes over loopback gRPC, and peers beside them.

    python -m benchmarks.suite [--work NAME ...] [--runs 3] [--peers spu=DIR crypten=DIR] [--write]
    python -m benchmarks.suite --table            prints Markdown from the results file, and measures nothing

One thread a process of ours. Each work is run by us and then by every peer before the next work starts, one system at
a time, so that a drift of the machine hits all alike; one warm-up each, then the median of ``--runs``. Peers are
environments made by benchmarks/peers/setup.sh. docs/benchmarks.md says what is compared with what.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common, table, works
from secure.mpc.budget import GB

RESULTS = common.RESULTS / "suite.json"
PACKAGES = ("torch", "numpy", "numba", "grpcio", "transformers")

BARS = {
    "compare 393216": {"online s": 0.15, "online bytes an element": 30.0},
    "gelu 128x3072": {"online s": 0.6, "max error": 2e-3},
}
"""What was promised of single operations: not more than this."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def failed(error: common.ChildFailed) -> dict[str, str]:
    """What stands in the results for a work that failed; the whole of it goes to the terminal."""
    say(str(error))
    return {"failed": str(error).partition("\n")[0]}


# ours


def measure(name: str, runs: int) -> dict[str, Any]:
    """One work through dealer, server and client, each a process of its own."""
    job = works.make(name)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        inputs, answer = Path(directory) / "inputs.npz", Path(directory) / "answer.npy"
        np.savez(inputs, **{n: x.numpy() for n, x in job.inputs.items()})  # type: ignore[arg-type]  # as in export_minilm
        budget = ["--budget-memory", f"{job.budget.memory / GB:g}"]
        dealer = common.dealer(*budget)
        stack.callback(dealer.stop)
        server = common.Service("benchmarks.hosting", "serve", name, "--dealer", dealer.address, "--state", directory)
        stack.callback(server.stop)
        command = [sys.executable, "-m", "benchmarks.hosting", "ask", "--server", server.address]
        command += ["--dealer", dealer.address, "--inputs", str(inputs), "--answer", str(answer), "--runs", str(runs)]
        command += budget
        try:
            output, _ = common.run(command)
        except common.ChildFailed as error:
            raise common.ChildFailed(f"{error}\nserver: {server.said()}\ndealer: {dealer.said()}") from None
        found, result = json.loads(output), torch.from_numpy(np.load(answer))
    peaks = {"client": found.pop("peak MB"), "server": round(server.peak), "dealer": round(dealer.peak)}
    row: dict[str, Any] = {"how": works.HOW[job.kind], "elements": max(x.numel() for x in job.inputs.values())}
    for phase in ("online s", "offline s"):
        each = found.pop(f"{phase}, each")
        row |= {phase: round(statistics.median(each), 4), f"{phase}, each": [round(s, 4) for s in each]}
    row |= found | {"peak MB": peaks, "compile s": server.announced["compile s"]}
    row["compile peak MB"] = server.announced["compile peak MB"]
    row["online bytes"] = row["online bytes to server"] + row["online bytes to client"]
    if job.elementwise:
        for what in ("online s", "online bytes"):
            row[f"{what} an element"] = float(f"{row[what] / row['elements']:.4g}")
    row |= accuracy(job, result)
    if name in BARS:
        row["bars"] = {key: {"bar": bar, "met": row[key] <= bar} for key, bar in BARS[name].items()}
    return row


def accuracy(job: works.Job, result: torch.Tensor) -> dict[str, float]:
    """The largest error against float64; of a transformer the cosine too."""
    expected = job.expected()
    out = {"max error": float((result - expected).abs().max())}
    if job.transformer:
        out["cosine"] = float(torch.nn.functional.cosine_similarity(result.flatten(), expected.flatten(), dim=0))
    return out


# peers


@dataclass(frozen=True)
class Peer:
    """A peer in one of its modes."""

    name: str
    python: Path
    arguments: tuple[str, ...]

    def measure(self, work: str, runs: int, weights: Path | None) -> dict[str, Any]:
        """Its own report on one work."""
        command = [str(self.python), "-m", *self.arguments, "--work", work, "--runs", str(runs)]
        output, _ = common.run([*command, *(("--weights", str(weights)) if weights else ())])
        report: dict[str, Any] = json.loads(output[output.index(b"{") :])  # a native library logs before it
        return report


MODES = {
    "spu": (
        ("spu ABY3", ("benchmarks.peers.spu_bench", "--protocol", "ABY3")),
        ("spu SEMI2K", ("benchmarks.peers.spu_bench", "--protocol", "SEMI2K")),
    ),
    "crypten": (("crypten", ("benchmarks.peers.crypten_bench",)),),
}


def parse_peers(given: list[str]) -> Iterator[Peer]:
    for entry in given:
        kind, _, directory = entry.partition("=")
        python = Path(directory).absolute() / "bin" / "python"
        if kind not in MODES:
            raise SystemExit(f"which peer is {entry!r}?\nhint: spu=DIRECTORY or crypten=DIRECTORY")
        if not directory or not python.is_file():
            raise SystemExit(f"no environment in {directory!r}\nhint: benchmarks/peers/setup.sh {kind} DIRECTORY")
        yield from (Peer(name, python, arguments) for name, arguments in MODES[kind])


def add_peers(results: dict[str, Any], peers: list[Peer], work: str, runs: int, weights: Path | None) -> None:
    """Run a peer's work once, also where two of ours are compared with it."""
    for peer in peers:
        rows = results["peers"].setdefault(peer.name, {"work": {}})
        if work in rows["work"]:
            continue
        say(f"{peer.name}: {work} ...")
        try:
            report = peer.measure(work, runs, weights)
        except common.ChildFailed as error:
            rows["work"][work] = failed(error)
            continue
        rows["work"] |= report.pop("work")
        if not work.startswith("minilm"):
            del report["minilm weights"]  # which say nothing of this work
        rows |= report
        say(f"  {rows['work'][work]}")


def export_weights(file: Path) -> Path:
    common.run([sys.executable, "-m", "benchmarks.peers.export_minilm", str(file)])
    return file


# both


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """Return results with those of other works that the file holds; a work that is not of this run says its date.

    What a peer took in an earlier run is not kept beside ours of this one, as ratios are of one run.
    """
    if not RESULTS.is_file():
        return results
    before = json.loads(RESULTS.read_text())
    ours = {name: {"date": before["machine"]["date"], **row} for name, row in before["ours"].items()}
    again = {works.counterpart(name) for name, row in results["ours"].items() if "failed" not in row}
    peers = {}
    for peer in {**before["peers"], **results["peers"]}:
        known, report = before["peers"].get(peer, {"work": {}}), results["peers"].get(peer, {"work": {}})
        rest = {name: row for name, row in known["work"].items() if name not in again}
        peers[peer] = {**known, **report, "work": joined(rest, report["work"])}
    return {**results, "ours": joined(ours, results["ours"]), "peers": peers}


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of both; a work that failed now keeps the row that it had."""
    return {**before, **{name: row for name, row in now.items() if "failed" not in row or name not in before}}


def run(names: list[str], runs: int, peers: list[Peer], weights: Path | None, write: bool) -> dict[str, Any]:
    """Measure, and keep what there is after every work."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    results: dict[str, Any] = {"machine": common.machine("benchmarks.suite"), "runs": runs}
    results |= {"versions": versions | {"unseen": importlib.metadata.version("unseen")}, "ours": {}, "peers": {}}
    for name in names:
        say(f"unseen: {name} ...")
        try:
            results["ours"][name] = measure(name, runs)
        except common.ChildFailed as error:
            results["ours"][name] = failed(error)
        say(f"  {results['ours'][name]}")
        same = works.counterpart(name)
        if same is not None:
            add_peers(results, peers, same, runs, weights)
        if write:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(kept(results), indent=2) + "\n")
    return results


def failures(results: dict[str, Any]) -> list[str]:
    """Works that did not run, and bars of ours that were missed."""
    rows = {("unseen", name): row for name, row in results["ours"].items()}
    rows |= {(peer, name): row for peer, report in results["peers"].items() for name, row in report["work"].items()}
    out = [f"{who}: {name} failed" for (who, name), row in rows.items() if "failed" in row]
    for name, row in results["ours"].items():
        for key, bar in row.get("bars", {}).items():
            if not bar["met"]:
                out.append(f"unseen: {name}: {key} is {row[key]:.3g}, the bar is {bar['bar']:g}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", metavar="NAME", default=list(works.WORKS), choices=works.WORKS)
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs after the warm-up (default 3)")
    parser.add_argument("--peers", nargs="+", metavar="PEER=DIRECTORY", default=[], help="spu=..., crypten=...")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="MiniLM for peers; default: exported for the run")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}, after every work")
    parser.add_argument("--table", action="store_true", help="print Markdown tables from that file")
    options = parser.parse_args()
    if options.table:
        if not RESULTS.is_file():
            raise SystemExit(f"there is no {RESULTS}\nhint: python -m benchmarks.suite --write")
        print(table.markdown(json.loads(RESULTS.read_text())))
        return
    if options.runs < 1:
        raise SystemExit("--runs is at least 1")
    peers = list(parse_peers(options.peers))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        weights = options.weights
        if weights is None and peers and any(name.startswith("minilm") for name in options.work):
            weights = export_weights(Path(directory) / "minilm.npz")
        results = run(options.work, options.runs, peers, weights, options.write)
    table.show(results)
    found = failures(results)
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
