"""Queries from a full store, against queries that are prepared or dealt when a client comes.

    python -m benchmarks.store [--length 128] [--pairs 10] [--directory DIRECTORY] [--on-disk]

One dealer serves two servers of one model, one of them with a store, which is filled first and then left alone. Clients
of both take turns: a prepared query, and one for which nothing was prepared. --on-disk: corrections are read from files
when they are used, whatever their size.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import secure
from benchmarks.sentences import sentences
from parties.limits import memory
from parties.services import hosting
from parties.store import filler
from parties.two_party import stocked
from protocols import kernels
from secure.deployments.two_party import DEALER, SERVER
from secure.models.text import PACKAGED
from secure.session.session import Session

DEADLINE = 600.0
WARM = 1  # queries of each kind that are not counted


def serve(length: int, dealer: str, state: Path, store: Path | None, entries: int, on_disk: bool) -> None:
    """Serve until standard input ends; say where, and when the store is full."""
    compiled = secure.compile_text_model(PACKAGED, length, embedding="client-table")
    if on_disk:
        stocked.IN_MEMORY, memory.RESERVE = 0, 1
    most = compiled.program.cost.dealt * entries * 1.001 / 1e9
    given: dict[str, Any] = {"store": store, "store_gb": most, "store_key": store.parent / "store.key"} if store else {}
    service = secure.serve(compiled, role=SERVER, peers={DEALER: dealer}, state=state, deadline=DEADLINE, **given)
    with service:
        while store and len(list(store.glob("*.entry"))) < entries:
            time.sleep(0.2)
        filler.QUIET, filler.LOW = 1e9, float("inf")  # it makes no more, so that it disturbs nothing
        time.sleep(1.0 if store else 0.0)
        print(json.dumps({"listening": service.address}), flush=True)
        sys.stdin.read()


def timed(session: Session, text: str, server: int) -> tuple[float, float, float]:
    """Seconds of a whole query, of its online part, and of all processors: client and dealer (here) and server."""
    start, used = time.perf_counter(), time.process_time() + processor(server)
    session.embed([text])
    seconds = time.perf_counter() - start
    return seconds, session.reports[-1].online_seconds, time.process_time() + processor(server) - used


def processor(number: int) -> float:
    """Processor seconds of another process so far."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--on-disk", action="store_true")
    for name in ("dealer", "state", "store"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--entries", type=int, help=argparse.SUPPRESS)
    o = parser.parse_args()
    torch.set_num_threads(1)
    kernels.warm_up()
    if o.dealer:
        serve(o.length, o.dealer, Path(o.state), Path(o.store) if o.store else None, o.entries, o.on_disk)
        return
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=o.directory)))
        (where / "store.key").touch(0o600)
        (where / "store.key").write_text(secrets.token_hex(32))
        os.environ["XDG_STATE_HOME"] = str(where)
        dealer = stack.enter_context(secure.serve(role=DEALER, deployment=secure.TwoParty()))
        entries = 2 * (o.pairs + WARM)

        def session(store: Path | None) -> tuple[Session, int]:
            command = [sys.executable, "-m", "benchmarks.store", "--length", str(o.length), "--dealer", dealer.address]
            command += ["--state", str(where / "server"), "--entries", str(entries), "--on-disk" * o.on_disk]
            command += ["--store", str(store)] if store else []
            child = subprocess.Popen(
                [w for w in command if w], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(child.wait)
            stack.callback(child.communicate)
            assert child.stdout is not None
            at = json.loads(child.stdout.readline())["listening"]
            deployment = secure.TwoParty(server=at, dealer=dealer.address)
            dialled = secure.connect(deployment, cache=where / "cache", pace=0.0, deadline=DEADLINE)
            return stack.enter_context(dialled), child.pid

        both = {"without": session(None), "with": session(where / "store")}
        hosting.settle()
        took: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for number, text in enumerate(sentences()[: o.pairs + WARM]):
            for prepared in ("prepared", "at once"):
                for name in ("without", "with") if number % 2 else ("with", "without"):
                    asked, server = both[name]
                    if prepared == "prepared":
                        asked.prepare()
                    row = timed(asked, text, server)
                    if number >= WARM:
                        took.setdefault((name, prepared), []).append(row)
        print(f"{o.length} tokens, {o.pairs} pairs; medians, and the median ratio of a pair")
        for prepared, column, what in (
            ("prepared", 1, "online s, prepared"),
            ("prepared", 2, "processor s of all parties, prepared"),
            ("at once", 0, "s from the call"),
            ("at once", 2, "processor s of all parties from the call"),
        ):
            one, two = ([row[column] for row in took[name, prepared]] for name in ("without", "with"))
            ratio = statistics.median(b / a for a, b in zip(one, two, strict=True))
            print(f"  {what}: without {statistics.median(one):.3f}, with {statistics.median(two):.3f}, {ratio:.3f}")


if __name__ == "__main__":
    main()
