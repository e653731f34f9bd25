"""The price of TLS: the same query with plaintext channels and under mutual TLS 1.3, asked in turn in one run.

    python -m benchmarks.tls [--lengths 128 32] [--pairs 8] [--write]

Dealer and servers of both kinds stay up, each a process of its own on loopback; the clients take turns, so that the
machine's moods reach both, and the one that goes first changes with every pair. Each client asks six texts, of which
the first warms up. The ratio is the median over the pairs of TLS to plaintext. Connecting is timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import RESULTS, Service
from benchmarks.main_job import fitting
from benchmarks.sentences import sentences
from parties.tls.authority import Authority

ASKED = 6
PLAINTEXT, TLS = "plaintext", "TLS"


class Deployed:
    """Dealer and server, under TLS if there is an authority."""

    def __init__(self, length: int, authority: Authority | None, state: Path, stack: ExitStack) -> None:
        self._authority = authority
        common_options = ("--listen", "127.0.0.1:0", "--threads", "1", "--announce")
        dealer = Service("parties.cli", "dealer", *common_options, *self._tls("dealer"))
        stack.callback(dealer.stop)
        self._dealer = dealer.address
        served = ("--dealer", self._dealer, "--length", str(length), "--embedding", "client-table")
        options = (*served, "--state", str(state), *common_options, *self._tls("server"))
        server = Service("parties.cli", "serve", *options)
        stack.callback(server.stop)
        self._server = server.address

    def _tls(self, role: str) -> tuple[str, ...]:
        return ("--tls", str(self._authority.directory / role)) if self._authority else ()

    def ask(self, texts: list[str]) -> dict[str, float]:
        """Embed the texts with a client of its own: medians over all but the first."""
        command = [sys.executable, "-P", "-m", "parties.cli", "embed", "--server", self._server]
        command += ["--dealer", self._dealer, "--json", "--threads", "1", *self._tls("client"), "--", *texts]
        before, begin = os.times(), time.perf_counter()
        said, _ = common.run(command)
        after, seconds = os.times(), time.perf_counter() - begin
        rows = json.loads(said)[1:]
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return {
            "online s": statistics.median(row["online_seconds"] for row in rows),
            "offline s": statistics.median(row["offline_seconds"] for row in rows),
            "client processor s": used,
            "whole command s": seconds,
        }


def measure(length: int, pairs: int, authority: Authority, state: Path) -> dict[str, Any]:
    """Ask in pairs; the times of each, and the median ratios of TLS to plaintext."""
    texts = fitting(sentences(), length)[:ASKED]
    found: list[dict[str, dict[str, float]]] = []
    with ExitStack() as stack:
        kinds = {
            PLAINTEXT: Deployed(length, None, state, stack),
            TLS: Deployed(length, authority, state, stack),
        }
        for each in kinds.values():
            each.ask(texts[:2])  # fills the cache of files
        for number in range(pairs):
            order = list(kinds)[:: 1 if number % 2 == 0 else -1]
            asked = {name: kinds[name].ask(texts) for name in order}
            found.append({name: asked[name] for name in kinds})
    report: dict[str, Any] = {"length": length, "pairs": found}
    for name in found[0][TLS]:
        report[f"{name}: plaintext, TLS"] = [statistics.median(p[kind][name] for p in found) for kind in kinds]
        report[f"{name}: median ratio"] = statistics.median(p[TLS][name] / p[PLAINTEXT][name] for p in found)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="write a results file for each length")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = os.environ["XDG_CONFIG_HOME"] = directory  # nothing of the user's own
        authority = Authority.make(Path(directory) / "certificates")
        for role in ("client", "server", "dealer"):
            authority.issue(role, role)
        for length in options.lengths:
            report = {"machine": common.machine("benchmarks.tls")}
            report |= measure(length, options.pairs, authority, Path(directory))
            print(json.dumps(report, indent=2))
            if options.write:
                (RESULTS / f"tls-{length}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
