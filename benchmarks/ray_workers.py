"""The offline phase of bulk embedding with the dealer's work on one worker of a Ray cluster, and on several.

    python -m benchmarks.ray_workers [--compiled DIRECTORY] [--length 32] [--workers 1 2] [--queries 12] [--repeats 5]

As many queries are asked for at a time as there are workers, as bulk clients do, and their corrections are taken and
dropped in this process, where the dealer's service would send them. So the figures hold the dealer's computing and all
that Ray adds: handing keys over, moving corrections through shared memory, reading them. "here": without Ray.
Worker counts alternate, one pass each, and the medians are compared. Needs the extra ``ray``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import secure
from parties.cluster.dealing import RayDealing
from parties.cluster.joined import Cluster
from parties.services.dealing import Dealing, DealingHere, DealtModel
from parties.services.hosting import settle
from protocols import kernels
from protocols.prg import Key, derive_key, fresh_seed
from secure.models.text import PACKAGED


def seconds(dealing: Dealing, model: DealtModel, queries: int, at_a_time: int) -> float:
    """Seconds in which all corrections of so many queries came."""
    seed = fresh_seed()

    def one(query: int) -> None:
        keys = (Key(derive_key(seed, party, query)) for party in ("server", "client"))
        size = sum(map(len, dealing.corrections(model, *keys)))
        assert size == model.program.cost.dealt, size

    start = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(one, range(queries)))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", help="what `unseen compile` wrote; by default MiniLM is compiled first")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    o = parser.parse_args()
    torch.set_num_threads(1)
    kernels.warm_up()
    if o.compiled:
        program = secure.load_compiled(o.compiled).program
    else:
        program = secure.compile_text_model(PACKAGED, o.length, embedding="client-table").program
    settle()
    model = DealtModel.of(program, Key(fresh_seed()[:16]))
    here = DealingHere()
    seconds(here, model, 1, 1)  # expands B
    took: dict[str, list[float]] = {name: [] for name in ("here", *map(str, o.workers))}
    load = list[float]()
    for _ in range(o.repeats):
        load.append(os.getloadavg()[0])
        took["here"].append(seconds(here, model, o.queries, 1))
        for workers in o.workers:
            dealing = RayDealing(Cluster("local"), workers)
            try:
                seconds(dealing, model, workers, workers)  # each decodes the Program and expands B
                took[str(workers)].append(seconds(dealing, model, o.queries, workers))
            finally:
                dealing.close()
    medians = {name: statistics.median(found) for name, found in took.items()}
    one = medians[str(o.workers[0])]
    document = {
        "corrections of a query, MB": round(program.cost.dealt / 1e6, 1),
        "queries": o.queries,
        "seconds, each": {name: [round(s, 3) for s in found] for name, found in took.items()},
        "queries a second": {name: round(o.queries / s, 3) for name, s in medians.items()},
        "times the first": {name: round(one / s, 2) for name, s in medians.items()},
        "load average before each": [round(x, 1) for x in load],
        "processors": os.cpu_count(),
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
