"""The suite's child processes: a server of one work, and a client that asks it and writes down what it took.

    python -m benchmarks.hosting serve WORK --dealer HOST:PORT --state DIRECTORY
    python -m benchmarks.hosting ask --server HOST:PORT --dealer HOST:PORT --inputs FILE --answer FILE --runs N

Both use the services and the client of ``unseen`` as they are, one thread each; the dealer is ``unseen dealer``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import secure
from benchmarks import common, works
from parties.services import hosting
from protocols import kernels
from protocols.protocol import CircuitCost
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.two_party import CLIENT, DEALER, SERVER
from secure.mpc.budget import GB, Budget
from secure.session.link import Report

DEADLINE = 600.0  # seconds; the offline phase of a large model is one long wait


def serve(name: str, dealer: str, state: Path) -> None:
    start = time.perf_counter()
    compiled = works.make(name).build()
    seconds = time.perf_counter() - start
    service = secure.serve(compiled, role=SERVER, peers={DEALER: dealer}, state=state, deadline=DEADLINE)
    said = {"listening": service.address, "compile s": round(seconds, 2), "compile peak MB": round(common.peak())}
    common.forget_peak()
    service.wait_announced(lambda: print(json.dumps(said), flush=True))


def ask(server: str, dealer: str, inputs: Path, answer: Path, runs: int, budget: Budget) -> None:
    hosting.settle()
    with np.load(inputs) as archive:
        given = {name: torch.from_numpy(archive[name]) for name in archive.files}
    deployment = secure.TwoParty(server=server, dealer=dealer)
    with secure.connect(deployment, cache=False, deadline=DEADLINE, budget=budget) as session:
        for _ in range(1 + runs):
            result = session.query(given)
        reports, predicted = session.reports, session.program.cost
    for report in reports:
        if (took := measured(report)) != predicted:
            raise SystemExit(f"a query took {took}, its Program promises {predicted}")
    np.save(answer, result.numpy())
    document = {
        "online s, each": [report.online_seconds for report in reports[1:]],
        "offline s, each": [report.offline_seconds for report in reports[1:]],
        "offline s of the dealer": round(statistics.median(report.dealer_seconds for report in reports[1:]), 4),
        "offline s of the client": round(statistics.median(report.client_seconds for report in reports[1:]), 4),
        "rounds": predicted.rounds,
        "online bytes to server": predicted.to_first,
        "online bytes to client": predicted.to_second,
        "offline bytes to server": predicted.dealt,
        "offline bytes to client": reports[-1].bytes(receiver=CLIENT, phase=OFFLINE),
        "peak MB": round(common.peak()),
    }
    print(json.dumps(document))


def measured(report: Report) -> CircuitCost:
    """What a query took, of what a Program promises."""
    return CircuitCost(
        report.rounds,
        report.bytes(sender=CLIENT, receiver=SERVER, phase=ONLINE),
        report.bytes(sender=SERVER, receiver=CLIENT, phase=ONLINE),
        report.bytes(sender=DEALER, receiver=SERVER, phase=OFFLINE),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roles = parser.add_subparsers(dest="role", required=True)
    of_server, of_client = roles.add_parser("serve"), roles.add_parser("ask")
    of_server.add_argument("name")
    of_server.add_argument("--state", type=Path, required=True)
    of_client.add_argument("--server", required=True)
    of_client.add_argument("--inputs", type=Path, required=True)
    of_client.add_argument("--answer", type=Path, required=True)
    of_client.add_argument("--runs", type=int, required=True)
    of_client.add_argument("--budget-memory", type=float, metavar="GB", default=Budget().memory / GB)
    for role in (of_server, of_client):
        role.add_argument("--dealer", required=True)
    o = parser.parse_args()
    torch.set_num_threads(1)
    kernels.warm_up()
    if o.role == "serve":
        serve(o.name, o.dealer, o.state)
    else:
        ask(o.server, o.dealer, o.inputs, o.answer, o.runs, Budget(memory=o.budget_memory * GB))


if __name__ == "__main__":
    main()
