"""A soak under faults: is an answer wrong, a correlation used twice, anything leaked, and how soon is all well again?

    python -m benchmarks.chaos [--deployment two-party] [--minutes 30] [--clients 8] [--kills N] [--seed 1] [--write]

Every role of a small text model is a process, as an operator runs it, with its store where it has one; so is each
client, which connects, asks some texts whose answers are known from floating point, closes, and begins again. Each
pair that talks does so through a relay. First nothing happens for a while; then faults come at random moments, one
after the other: processes are killed, terminated (both are started again at once) and frozen, connections are cut,
silenced, delayed and changed by a byte, a disk takes no more, a restarted role has another time of day. In the end the
clients leave, and after a quiet minute the roles are looked at.
``--kills``: in place of all that, so many kills of roles, of their children and of clients, each as soon as any client
is answered after the last one.

Printed are a table of faults with seconds from the end of each to the first right answer to a later query, and until
every client had one; what came of the queries; and what must be zero or within its bound. Exit status 1 if it is not.
Ctrl-C, or SIGTERM, ends the faults early, and all is reported.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import math
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import secure
from benchmarks.chaos_faults import Fault, Injector, deck
from benchmarks.chaos_world import Numbers, Query, Stuck, World
from benchmarks.common import RESULTS, machine
from parties.deployments import hosted
from parties.three_party.shared_model import share_model
from secure.deployments.deployment import deployments, find
from secure.models.text import text_inputs
from tests.hosts import TinyText, compiled_tiny
from tests.tiny import LENGTH, expected, sentences, write_model

WARM = 3  # right answers of each client before anything is measured
CALM = (30.0, 1 / 6)  # seconds without faults at least, and as a part of those with them
GAP = 3.0  # seconds between faults, on average
RECOVERED = 60.0  # seconds within which every client has a right answer again
QUIET = 100.0  # seconds without clients before the roles are looked at: a session that nobody joins ends within 90
SLOWER = 1.5  # the p99 of queries that no fault touched, in parts of that without faults
MEMORY = (1.25, 32.0)  # the most of the resident memory of a role at the end: in parts of that before, and MB more
THREADS, DESCRIPTORS = 8, 16  # the same, more than before


@dataclass
class Watch:
    """What is found while the world runs. died: processes that ended by themselves, with what they said. enough: set
    when no more faults are wanted."""

    world: World
    faults: list[Fault] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)
    calm: tuple[float, float] = (0.0, 0.0)
    before: dict[str, Numbers] = field(default_factory=dict)

    def answered(self, since: float, seconds: float, clients: int) -> tuple[float, float]:
        """Wait until so many clients have a right answer to a query that began after a moment.

        Returns the seconds from then to the first one and to the last one; infinity where that takes too long.
        """
        while True:
            answered, late = self.world.asked.right_since(since), time.monotonic() - since > seconds
            if len(answered) >= clients or late:
                times = [at - since for at in answered.values()]
                return min(times, default=math.inf), math.inf if late else max(times)
            self.look()
            time.sleep(0.05)

    def look(self) -> None:
        """Start again whatever has ended by itself."""
        for each in self.world:
            if each.ended:
                self.died.append(f"{each.name}: {each.said()}")
                each.start()

    def numbers(self) -> dict[str, Numbers]:
        return {name: Numbers.of(role.family()) for name, role in self.world.roles.items()}


# figures


def percentile(queries: Sequence[Query]) -> float:
    """The seconds that 99 % of right answers did not pass; infinity if there are none."""
    took = [query.end - query.begin for query in queries if query.outcome == "right"]
    return float(np.percentile(took, 99)) if took else math.inf


def untouched(queries: Sequence[Query], faults: Sequence[Fault], now: float) -> list[Query]:
    """Those that had nothing to do with a fault: none was there while they ran, or was not yet recovered from."""
    spans = [(fault.begin, min(fault.over + fault.all, now)) for fault in faults]
    return [q for q in queries if q.end and not any(q.begin <= over and q.end >= begin for begin, over in spans)]


def by_kind(faults: Sequence[Fault]) -> dict[str, dict[str, float]]:
    """For each kind of fault and whom it met: how many, and the seconds of recovery, median and greatest."""
    out: dict[str, dict[str, float]] = {}
    for name in sorted({named(fault) for fault in faults}):
        these = [fault for fault in faults if named(fault) == name]
        out[name] = {"count": len(these)}
        for of, times in (("first", [f.first for f in these]), ("all", [f.all for f in these])):
            out[name] |= {f"{of} s": round(statistics.median(times), 2), f"{of}, most s": round(max(times), 2)}
    return out


def named(fault: Fault) -> str:
    return f"{fault.kind}: {fault.on}" if not fault.on.startswith("client ") else fault.kind


def growth(before: Numbers, after: Numbers, lives: Sequence[float] = ()) -> list[str]:
    """What a role has more of than it may: in the end, and of memory when one of its earlier lives ended."""
    most = MEMORY[0] * before.resident + MEMORY[1]
    bounds = {
        "MB": (max(after.resident, *lives, 0.0), most),
        "threads": (after.threads, before.threads + THREADS),
        "descriptors": (after.descriptors, before.descriptors + DESCRIPTORS),
    }
    return [f"{value:.0f} {what}, bound {bound:.0f}" for what, (value, bound) in bounds.items() if value > bound]


# the run


def soak(world: World, chance: random.Random, seconds: float, kills: int, quiet: float) -> dict[str, Any]:
    """Run all of it on a world that has started; return the report."""
    watch, injector, everyone = Watch(world), Injector(world, chance), len(world.clients)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: watch.enough.set())
    begun = time.monotonic()
    for _ in range(WARM):
        if watch.answered(time.monotonic(), 2 * RECOVERED, everyone)[1] == math.inf:
            raise Stuck("not every client is answered, though nothing has happened yet:\n" + "\n".join(watch.died))
    start = time.monotonic()
    time.sleep(max(CALM[0], CALM[1] * seconds) if not kills else CALM[0])
    watch.calm, watch.before = (start, time.monotonic()), watch.numbers()
    print(f"warm after {start - begun:.0f} s; {watch.calm[1] - start:.0f} s without faults, then faults", flush=True)
    targets = injector.targets()
    if kills:
        targets = {kind: on for kind, on in targets.items() if kind.startswith("kill")}
    begun = time.monotonic()
    inject(watch, injector, deck(chance, targets), begun + seconds, kills)
    ended = time.monotonic()
    if watch.answered(ended, RECOVERED, everyone)[1] == math.inf:
        watch.died.append("a client that is not answered any more")
    late = world.leave()
    time.sleep(quiet)
    return report(watch, injector, late, ended - begun, bool(kills))


def inject(watch: Watch, injector: Injector, faults: Iterator[Fault], until: float, kills: int) -> None:
    """Do one fault after the other, until a moment, or until there were so many kills."""
    begun, chance, everyone = time.monotonic(), injector.chance, len(watch.world.clients)
    for fault in faults:
        if len(watch.faults) >= kills if kills else time.monotonic() > until:
            return
        if watch.enough.wait(chance.random() if kills else chance.expovariate(1 / GAP)):
            return
        watch.look()
        try:
            injector.do(fault)
        except Stuck as error:
            fault.over = time.monotonic()
            watch.died.append(str(error))
            watch.look()
        fault.first, fault.all = watch.answered(fault.over, RECOVERED, 1 if kills else everyone)
        watch.faults.append(fault)
        print(f"{fault.begin - begun:6.0f} s  {named(fault):32} {fault.first:6.2f} {fault.all:6.2f}", flush=True)


def report(watch: Watch, injector: Injector, late: Sequence[str], seconds: float, killing: bool) -> dict[str, Any]:
    world, queries, now = watch.world, watch.world.asked.queries, time.monotonic()
    quiet = untouched(queries, watch.faults, now)
    calm = [q for q in quiet if watch.calm[0] <= q.begin and q.end <= watch.calm[1]]
    rest = [q for q in quiet if q.begin > watch.calm[1]]
    outcomes = collections.Counter(query.outcome or "gone with its client" for query in queries)
    after, taken = watch.numbers(), {name: found for name, role in world.roles.items() if (found := role.taken())}
    lives = {name: [mb for on, mb in injector.lives if on == name] for name in world.roles}
    ratio = percentile(rest) / percentile(calm)
    apart = {
        "failed without a fault": sum(q.outcome not in ("right", "wrong") for q in quiet),
        "p99 outside of faults, too slow": [round(ratio, 2)] if ratio > SLOWER else [],
    }
    must: dict[str, Any] = {
        "wrong answers": outcomes["wrong"],
        "correlations used twice": world.ledger.twice,
        "faults without recovery": sum(fault.all == math.inf for fault in watch.faults),
        "processes that ended by themselves": watch.died,
        "clients that did not end": list(late),
        "children that outlived a killed role": injector.orphans,
        "left taken": taken,
        "grown": {name: more for name, was in watch.before.items() if (more := growth(was, after[name], lives[name]))},
        **({} if killing else apart),
    }
    return {
        "seconds": round(seconds),
        "clients": len(world.clients),
        "faults": len(watch.faults),
        "recovery": by_kind(watch.faults),
        "queries": {"asked": len(queries), **dict(outcomes.most_common())},
        "sessions": dict(world.asked.sessions.most_common()),
        "keys of streams": len(world.ledger.keys),
        "p99 s": {
            "without faults": round(percentile(calm), 3),
            "outside of faults": round(percentile(rest), 3),
            "ratio": round(ratio, 2),
            "queries": [len(calm), len(rest)],
        },
        "roles": {
            name: {"before": vars(was), "after": vars(after[name]), "most MB": max(lives[name], default=0.0)}
            for name, was in watch.before.items()
        },
        "errors": world.asked.why,
        "must be nothing": must,
        "as it must be": not any(must.values()),
    }


def show(found: dict[str, Any]) -> None:
    """Print a report as plain tables."""
    row = "{:34}{:>7}{:>10}{:>10}{:>10}{:>10}".format
    print(row("fault", "count", "first s", "most", "all s", "most"))
    for name, of in found["recovery"].items():
        print(row(name, *of.values()))
    for title in ("queries", "sessions", "p99 s"):
        print(f"\n{title}: " + ", ".join(f"{name} {value}" for name, value in found[title].items()))
    print(f"keys of streams: {found['keys of streams']}\n")
    for name, of in found["roles"].items():
        for when in ("before", "after"):
            print(f"{name:10} {when:7}" + ", ".join(f"{value:.0f} {what}" for what, value in of[when].items()))
    for name, said in found["errors"].items():
        print(f"{name}: {said}")
    print()
    for name, value in found["must be nothing"].items():
        print(f"{name}: {value or 'none'}")


def prepared(kind: str, directory: Path) -> tuple[secure.Compiled, list[str], list[list[float]]]:
    """A small model for a deployment, texts, and their answers in floating point."""
    deployment, texts = find(kind)(), sentences()
    model = write_model(directory / "model")
    if deployment.runs_packaged:
        compiled = secure.compile_text_model(
            str(model), LENGTH, embedding="client-table", calibration=texts, deployment=deployment
        )
        answers = [expected(model, text) for text in texts]
    else:
        compiled, net = compiled_tiny(model, deployment), TinyText().double().eval()
        assert compiled.tokenizer is not None
        with torch.no_grad():
            answers = [net(**text_inputs(compiled.tokenizer, text, LENGTH))[0] for text in texts]
    return compiled, texts, [answer.tolist() for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", default="two-party", choices=[kind.name for kind in deployments()])
    parser.add_argument("--minutes", type=float, default=30.0, help="with faults")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quiet", type=float, default=QUIET, help="seconds without clients in the end")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/chaos.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="unseen-chaos-") as made:
        directory = Path(made)
        compiled, texts, answers = prepared(options.deployment, directory)
        if hosted(compiled.deployment).owner((), directory):
            share_model(compiled, directory)
        else:
            secure.save_compiled(compiled, directory / "compiled")
        served = str(directory / "compiled")
        deployment = find(options.deployment)()
        if "dealer_key" in deployment.options():
            key: dict[str, Any] = {"dealer_key": str(directory / "dealer" / "dealer.pub")}
            deployment = replace(deployment, **key)
        with World(deployment, served, texts, answers, directory, options.clients, options.seed) as world:
            found = soak(world, chance, 60 * options.minutes, options.kills, options.quiet)
    found = {**machine("benchmarks.chaos"), **found}
    show(found)
    if options.write:
        path = RESULTS / "chaos.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        name = f"{options.deployment}, kills" if options.kills else options.deployment
        path.write_text(json.dumps({**kept, name: found}, indent=2) + "\n")
    raise SystemExit(not found["as it must be"])


if __name__ == "__main__":
    main()
