"""The main job of this tree and of another one (the commit before), asked in turn in one run.

    git worktree add ../before COMMIT
    python -m benchmarks.before ../before [--length 128] [--pairs 6] [--write]

Dealer and server of both trees stay up; the clients take turns, so that the machine's moods reach both, and every other
pair begins with the other tree. Each client asks six texts, of which the first warms up. The ratio is the median over
the pairs of this tree to the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import RESULTS
from benchmarks.main_job import fitting
from benchmarks.sentences import sentences

HERE = Path(__file__).resolve().parent.parent
ASKED = 6


class Tree:
    """Dealer and server of one tree."""

    def __init__(self, root: Path, length: int, stack: ExitStack) -> None:
        self._root, self._state = root, stack.enter_context(tempfile.TemporaryDirectory())
        dealer = ["dealer", "--listen", "127.0.0.1:0", "--threads", "1", "--announce"]
        self._dealer = self._start(dealer, stack)
        served = ["serve", "--dealer", self._dealer, "--listen", "127.0.0.1:0", "--length", str(length)]
        served += ["--embedding", "client-table", "--state", self._state, "--threads", "1", "--announce"]
        self._server = self._start(served, stack)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self._root), "XDG_CACHE_HOME": self._state}

    def _start(self, arguments: list[str], stack: ExitStack) -> str:
        """Start a service; the address that it announces."""
        command = [sys.executable, "-P", "-m", "parties.cli", *arguments]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self._environment()
        )
        stack.callback(child.wait)
        stack.callback(child.terminate)
        assert child.stdout is not None
        return str(json.loads(child.stdout.readline())["listening"])

    def ask(self, texts: list[str]) -> dict[str, Any]:
        """Embed the texts with a client of this tree: medians over all but the first."""
        command = [sys.executable, "-P", "-m", "parties.cli", "embed", "--server", self._server]
        command += ["--dealer", self._dealer, "--json", "--threads", "1", "--", *texts]
        before = os.times()
        said = subprocess.run(command, capture_output=True, check=True, env=self._environment()).stdout
        after = os.times()
        rows = json.loads(said)[1:]
        return {
            "online s": statistics.median(row["online_seconds"] for row in rows),
            "rounds": rows[0]["rounds"],
            "client processor s": after.children_user + after.children_system - before.children_user
            - before.children_system,
        }  # fmt: skip


def in_turn(new: Tree, old: Tree, texts: list[str], *, first: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask both trees, the old one first if ``first`` is 1: a machine that slows down would favour the first."""
    asked = {tree: tree.ask(texts) for tree in ((new, old), (old, new))[first]}
    return asked[new], asked[old]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other tree's directory")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--write", action="store_true", help="write a results file")
    options = parser.parse_args()
    texts = fitting(sentences(), options.length)[:ASKED]
    revision = ["git", "-C", str(options.before), "rev-parse", "--short", "HEAD"]
    before = subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()
    report: dict[str, Any] = {"machine": common.machine("benchmarks.before"), "before": before}
    with ExitStack() as stack:
        old, new = Tree(options.before.resolve(), options.length, stack), Tree(HERE, options.length, stack)
        pairs = [in_turn(new, old, texts, first=number % 2) for number in range(options.pairs)]
    report |= {"length": options.length, "pairs": [{"this": this, "before": that} for this, that in pairs]}
    for name in ("online s", "client processor s"):
        report[f"{name}: this, before"] = [statistics.median(pair[i][name] for pair in pairs) for i in (0, 1)]
        report[f"{name}: median ratio"] = statistics.median(this[name] / that[name] for this, that in pairs)
    print(json.dumps(report, indent=2))
    if options.write:
        (RESULTS / f"before-{options.length}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
