"""Three servers beside SPU's ABY3, on the same works, all parties as processes of this machine.

    python -m benchmarks.three_party [--work NAME ...] [--runs 3] [--peer .venv-spu] [--weights FILE] [--write]

Ours: a model shared by its owner; a client that is none of the parties; one thread a party. Every work is run three
ways: everything within the query (party 2 deals when it is asked), with corrections dealt ahead, and with public
weights. Seconds are the client's, from sharing its input to holding the answer; in brackets the parties', from the
first round to the last, which is what SPU's are: they leave out sharing and revealing.
Bytes are what all parties and the client send, ahead or not. The work runs on ours, then on SPU, one system at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import secure
from benchmarks import common, suite, works
from parties.services import hosting
from parties.three_party.client import Times
from parties.three_party.shared_model import share_model
from secure.deployments.three_party import CLIENT, PARTIES, ThreeParty
from secure.session.session import Session

RESULTS = common.RESULTS / "three_party.json"
WORKS = tuple(name for name in works.WORKS if name not in works.OURS_ALONE and not name.startswith("product"))
MODES = ("within", "ahead", "public weights")
BARS = {"bert layer": (5.0, 0.5), "minilm 128": (5.0, 0.5)}
"""How many times faster than the peer, and what part of its bytes."""

DEADLINE = 300.0


def share(name: str, directory: Path, approximations: str) -> None:
    """Compile and share a work, in a process of its own, as it takes much memory."""
    compiled = works.make(name, approximations).build(ThreeParty())
    for public in (False, True):
        where = directory / ("public" if public else "shared")
        share_model(replace(compiled, deployment=ThreeParty(public_weights=public)), where)


@contextmanager
def parties(directory: Path, ahead: int, threads: int = 1) -> Iterator[list[common.Service]]:
    """Three ``unseen party`` processes, one thread each by default."""
    with ExitStack() as stack:

        def party(number: int, *options: str) -> common.Service:
            command = ["party", "--id", str(number), "--share", str(directory / f"party-{number}"), *options]
            command += ["--listen", "127.0.0.1:0", "--threads", str(threads), "--announce", "--deadline", str(DEADLINE)]
            made = common.Service("parties.cli", *command)
            stack.callback(made.stop)
            return made

        two = party(2)
        zero = party(0, "--party-2", two.address, "--ahead", str(ahead))
        one = party(1, "--party-0", zero.address, "--party-2", two.address)
        yield [zero, one, two]


def ask(session: Session, inputs: dict[str, torch.Tensor], runs: int, pause: float) -> tuple[torch.Tensor, list[Times]]:
    """One warm-up and ``runs`` queries; before each a pause in which party 2 may deal ahead. The last answer, and what
    the parties took for each.
    """
    times = []
    for number in range(1 + runs):
        time.sleep(pause if number else 0.0)
        result = session.query(inputs)
        times.append(session.link.times)
    return result, times[1:]


def measure(name: str, runs: int, approximations: str = "default") -> dict[str, Any]:
    """One work in every mode."""
    job, row = works.make(name, approximations), dict[str, Any]()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.three_party", "--share", name, "--to", directory]
        common.run([*command, "--approximations", approximations])
        for mode in MODES if approximations == "default" else MODES[:1]:
            where = Path(directory) / ("public" if mode == "public weights" else "shared")
            with (
                parties(where, int(mode == "ahead")) as running,
                secure.connect(
                    ThreeParty(parties=tuple(p.address for p in running)),
                    cache=False,
                    deadline=DEADLINE,
                    budget=job.budget,
                ) as session,
            ):
                first = time.perf_counter()
                session.query(job.inputs)
                pause = time.perf_counter() - first if mode == "ahead" else 0.0
                session.reports.clear()
                result, times = ask(session, job.inputs, runs, pause)
                reports = session.reports[1:]
            each, last = [report.online_seconds for report in reports], reports[-1]
            party_0, party_1, party_2 = PARTIES
            row[mode] = {
                "seconds": round(statistics.median(each), 4),
                "each": [round(s, 4) for s in each],
                "seconds of the parties": round(statistics.median(t.computing for t in times), 4),
                "rounds": last.rounds,
                "bytes between 0 and 1": last.bytes(sender=party_0, receiver=party_1)
                + last.bytes(sender=party_1, receiver=party_0),
                "bytes from 2": last.bytes(sender=party_2),
                "bytes of the client": last.bytes(sender=CLIENT) + last.bytes(receiver=CLIENT),
                "waited for corrections": round(statistics.median(t.waited for t in times), 4),
                "peak MB": [round(p.peak) for p in running],
                **suite.accuracy(job, result),
            }
            row[mode]["bytes"] = sum(row[mode][k] for k in row[mode] if k.startswith("bytes "))
    return row


def compared(row: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """The peer's figures in units of ours with everything within the query: the client's seconds, and the parties'."""
    ours = row["within"]
    return {
        "times faster": round(peer["seconds"] / ours["seconds"], 2),
        "times faster, parties alone": round(peer["seconds"] / ours["seconds of the parties"], 2),
        "part of the bytes": round(ours["bytes"] / peer["bytes"], 4),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    head = ["work", "s (parties alone)", "dealt ahead s", "public weights s", "rounds", "MB (of it party 2's)", "error"]
    head += ["SPU s", "SPU MB", "SPU error", "times faster (parties alone)", "part of the bytes"]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, row in results["ours"].items():
        if "failed" in row:
            rows.append(f"| {name} | failed |" + " |" * (len(head) - 2))
            continue
        ours = row["within"]
        cells = [name, f"{ours['seconds']:.3f} ({ours['seconds of the parties']:.3f})"]
        cells += [f"{row[m]['seconds']:.3f}" if m in row else "-" for m in MODES[1:]]
        cells.append(str(ours["rounds"]))
        cells += [f"{ours['bytes'] / 1e6:.2f} ({ours['bytes from 2'] / 1e6:.2f})", _error(ours)]
        peer = results["peer"].get(works.counterpart(name.removesuffix(PUMA)) or "")
        if peer and "failed" not in peer:
            cells += [f"{peer['seconds']:.3f}", f"{peer['bytes'] / 1e6:,.1f}", _error(peer)]
            ratio = row.get("compared") or compared(row, peer)
            alone = f"{ratio['times faster, parties alone']:.1f}x"
            cells += [f"{ratio['times faster']:.1f}x ({alone})", f"{ratio['part of the bytes']:.2f}"]
        else:
            cells += ["-"] * 5
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _error(row: dict[str, Any]) -> str:
    if "cosine" in row:
        return f"cos {row['cosine']:.6f}"
    return f"{row.get('max error', row.get('max_error')):.1e}"


PUMA = " (PUMA's approximations)"


def run(names: list[str], runs: int, peer: suite.Peer | None, weights: Path | None, write: bool) -> dict[str, Any]:
    results: dict[str, Any] = {"machine": common.machine("benchmarks.three_party"), "runs": runs}
    results |= {"ours": {}, "peer": {}}
    jobs = [(name, "default") for name in names]
    jobs += [(name, "puma") for name in names if name.startswith(("gelu", "softmax", "bert", "minilm"))]
    for name, approximations in sorted(jobs, key=lambda job: names.index(job[0])):
        label = name if approximations == "default" else name + PUMA
        suite.say(f"unseen: {label} ...")
        try:
            row = measure(name, runs, approximations)
        except common.ChildFailed as error:
            row = suite.failed(error)
        results["ours"][label] = row
        same = works.counterpart(name)
        if peer is not None and same is not None:
            if same not in results["peer"]:
                suite.say(f"SPU: {same} ...")
                try:
                    report = peer.measure(same, runs, weights)
                    results["peer"] |= report.pop("work")
                    results["peer settings"] = report
                except common.ChildFailed as error:
                    results["peer"][same] = suite.failed(error)
            if "failed" not in row and "failed" not in results["peer"][same]:
                row["compared"] = compared(row, results["peer"][same])
        suite.say(f"  {json.dumps(row)}\n  {results['peer'].get(same or '')}")
        if write:
            RESULTS.write_text(json.dumps(kept(results), indent=2) + "\n")
    return results


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """Return results with those of other works that the file holds; a work that is not of this run says its date."""
    if not RESULTS.is_file():
        return results
    before = json.loads(RESULTS.read_text())
    ours = {name: {"date": before["machine"]["date"], **row} for name, row in before["ours"].items()}
    peer = suite.joined(before["peer"], results["peer"])
    return {**before, **results, "ours": suite.joined(ours, results["ours"]), "peer": peer}


def missed(results: dict[str, Any]) -> list[str]:
    """Works that failed, and bars that were not met."""
    out = [f"{name} failed" for name, row in results["ours"].items() if "failed" in row]
    for name, (faster, part) in BARS.items():
        ratio = results["ours"].get(name, {}).get("compared")
        if ratio and (ratio["times faster"] < faster or ratio["part of the bytes"] > part):
            out.append(f"{name}: {ratio}, the bar is {faster} times faster with {part} of the bytes")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", metavar="NAME", default=list(WORKS), choices=WORKS)
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs after the warm-up (default 3)")
    parser.add_argument("--peer", metavar="DIRECTORY", help="SPU's environment, from benchmarks/peers/setup.sh spu")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="MiniLM for SPU; default: exported for the run")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}, after every work")
    parser.add_argument("--table", action="store_true", help="print Markdown from that file, and measure nothing")
    parser.add_argument("--share", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--approximations", default="default", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    torch.set_num_threads(1)
    if o.share:
        share(o.share, o.to, o.approximations)
        return
    hosting.settle()
    peer = next(suite.parse_peers([f"spu={o.peer}"]), None) if o.peer else None
    with tempfile.TemporaryDirectory() as directory:
        weights = o.weights
        if weights is None and peer and any(name.startswith("minilm") for name in o.work):
            weights = suite.export_weights(Path(directory) / "minilm.npz")
        results = run(o.work, o.runs, peer, weights, o.write)
    print(table(results))
    if found := missed(results):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
