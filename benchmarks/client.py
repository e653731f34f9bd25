"""Processor seconds of a client, a text: the Python API beside the command, asking the same server in one run.

    python -m benchmarks.client [--length 128] [--texts 6] [--runs 3] [--write]

Both are processes of their own. A run embeds one text, and then one and ``--texts`` more; what the second takes beyond
the first, by text, leaves out imports, downloads and the first query's warm-up.
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
from typing import Any

from benchmarks import common
from benchmarks.common import RESULTS, Service
from benchmarks.main_job import fitting
from benchmarks.sentences import sentences

API = """
import sys, secure
deployment = secure.TwoParty(server=sys.argv[1], dealer=sys.argv[2])
with secure.connect(deployment) as session:
    session.embed(sys.argv[3:])
"""


def processor_seconds(command: list[str]) -> float:
    """User and system seconds of a child and of all that it starts."""
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write a results file")
    options = parser.parse_args()
    texts = fitting(sentences(), options.length)[: options.texts + 1]
    found: dict[str, list[float]] = {"command": [], "Python API": []}
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["XDG_CACHE_HOME"] = state
        dealer = common.dealer()
        stack.callback(dealer.stop)
        served = ["serve", "--dealer", dealer.address, "--listen", "127.0.0.1:0", "--length", str(options.length)]
        served += ["--embedding", "client-table", "--state", state, "--threads", "1", "--announce"]
        server = Service("parties.cli", *served)
        stack.callback(server.stop)
        embed = [sys.executable, "-m", "parties.cli", "embed", "--server", server.address, "--dealer", dealer.address]
        ways = {
            "command": [*embed, "--json", "--"],
            "Python API": [sys.executable, "-c", API, server.address, dealer.address],
        }
        processor_seconds([*ways["command"], texts[0]])  # fills the cache of files
        for _ in range(options.runs):
            for name, command in ways.items():
                one, all_ = (processor_seconds([*command, *texts[:n]]) for n in (1, len(texts)))
                found[name].append((all_ - one) / (len(texts) - 1))
    medians = {name: round(statistics.median(each), 3) for name, each in found.items()}
    report: dict[str, Any] = {"machine": common.machine("benchmarks.client"), "length": options.length}
    report |= {"processor s a text": medians, "each": {k: [round(x, 3) for x in v] for k, v in found.items()}}
    report["Python API to command"] = round(medians["Python API"] / medians["command"], 3)
    print(json.dumps(report, indent=2))
    if options.write:
        (RESULTS / f"client-{options.length}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
