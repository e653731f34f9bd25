"""CrypTen on the works: two parties over loopback TCP, one thread each, weights and input secret-shared.

    python -m benchmarks.peers.crypten_bench [--gelu default|tanh|sigmoid] [--work NAME ...] [--runs N] [--weights FILE]

Party 0 makes all triples (CrypTen's default provider, which is insecure and costs less than any dealer). CrypTen's
settings are its defaults: 16 fraction bits in a ring 2^64. Its own GeLU takes erf by a Taylor series, wrong beyond
|x| = 1.2, so GeLU here is the tanh form, good to |x| = 19, or for MiniLM, where values are larger, x sigmoid(1.702 x).
Bytes and rounds are CrypTen's own count, of the warm-up; sharing is not timed.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import crypten_import
from benchmarks.peers.works import LAYER, Work, accuracy, free_ports, make, options, print_report, say, seconds

Function = Callable[[dict[str, Any]], tuple[Any, ...]]


# the functions; Any is CrypTen's tensor


def tanh_gelu(x: Any) -> Any:
    inner = (x + x.square() * x * 0.044715) * math.sqrt(2 / math.pi)
    return x * (inner.tanh() + 1) * 0.5


def sigmoid_gelu(x: Any) -> Any:
    return x * (x * 1.702).sigmoid()


GELUS: dict[str, Callable[[Any], Any]] = {"tanh": tanh_gelu, "sigmoid": sigmoid_gelu}


def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    d = x - x.mean(-1, keepdim=True)
    return d * d.square().mean(-1, keepdim=True).inv_sqrt() * weight + bias


def linear(x: Any, w: dict[str, Any], name: str) -> Any:
    return x.matmul(w[name]) + w[f"{name}.bias"]


def attention(x: Any, w: dict[str, Any], mask: Any, heads: int) -> Any:
    rows = x.size(0)
    q, k, v = (linear(x, w, n).reshape(rows, heads, -1).transpose(0, 1) for n in ("query", "key", "value"))
    scores = q.matmul(k.transpose(1, 2)) * (1 / math.sqrt(q.size(-1))) + mask
    return linear(scores.softmax(-1).matmul(v).transpose(0, 1).reshape(rows, -1), w, "output")


def decoder(a: dict[str, Any], heads: int, layers: int, gelu: Callable[[Any], Any]) -> tuple[Any]:
    x = a["x"]
    for i in range(layers):
        w = {name: a[f"{i}.{name}"] for name in LAYER}
        x = x + attention(layer_norm(x, w["attention norm"], w["attention norm.bias"]), w, a["mask"], heads)
        x = x + linear(gelu(linear(layer_norm(x, w["norm"], w["norm.bias"]), w, "up")), w, "down")
    scores = layer_norm(x[-1:], a["norm"], a["norm.bias"]).matmul(a["head"])
    return (scores.argmax(dim=-1, one_hot=False),)


def encoder(a: dict[str, Any], heads: int, layers: int, gelu: Callable[[Any], Any]) -> tuple[Any, Any]:
    x = a["x"]
    if "norm" in a:
        # MiniLM's embeddings have variances from 0.004, where CrypTen's inverse square root is 60 % off (it is good
        # from 0.1 to 150). Eight times as large they normalize to the same, within its range.
        x = layer_norm(x * 8, a["norm"], a["norm.bias"])
    for i in range(layers):
        w = {name: a[f"{i}.{name}"] for name in LAYER}
        x = layer_norm(x + attention(x, w, a["mask"], heads), w["attention norm"], w["attention norm.bias"])
        x = layer_norm(x + linear(gelu(linear(x, w, "up")), w, "down"), w["norm"], w["norm.bias"])
    return x, a["pool"].matmul(x)


LAYERED: dict[str, Callable[..., tuple[Any, ...]]] = {"encoder": encoder, "decoder": decoder}


def function(work: Work, gelu: str) -> Function:
    if work.kind in LAYERED:
        return lambda a: LAYERED[work.kind](a, work.heads, work.layers, GELUS[gelu])
    return {
        "matmul": lambda a: (a["x"].matmul(a["y"]),),
        "multiply": lambda a: (a["x"] * a["y"],),
        "compare": lambda a: (a["x"] > 0,),
        "reciprocal": lambda a: (a["x"].reciprocal(all_pos=True),),
        "rsqrt": lambda a: (a["x"].inv_sqrt(),),
        "gelu": lambda a: (GELUS[gelu](a["x"]),),
        "softmax": lambda a: (a["x"].softmax(-1),),
        "argmax": lambda a: (a["x"].argmax(dim=-1, one_hot=False),),
        "layernorm": lambda a: (layer_norm(a["x"], a["weight"], a["bias"]),),
        "head": lambda a: (head(a).argmax(dim=-1, one_hot=False),),
    }[work.kind]


def head(a: dict[str, Any]) -> Any:
    return (a["x"].matmul(a["dense"]) + a["dense.bias"]).tanh().matmul(a["out"]) + a["out.bias"]


def chosen_gelu(name: str, option: str) -> str:
    return option if option != "default" else "sigmoid" if name.startswith("minilm") else "tanh"


# the parties


def party(rank: int, port: int, names: list[str], weights: Path | None, gelu: str, runs: int, pipe: Connection) -> None:
    """One party's process. Both know every input here, as the benchmark makes them; only its owner's copy is shared."""
    crypten = crypten_import.load(rank, port)
    communicator = crypten.communicator.get()
    for name in names:
        work = make(name, weights)
        run = function(work, chosen_gelu(name, gelu))
        owner = {array: 0 if array in work.owned else 1 for array in work.arrays}
        shared = {n: crypten.cryptensor(value, src=owner[n]) for n, value in crypten_import.tensors(work.arrays)}
        communicator.reset_communication_stats()
        with crypten.cfg.temp_override({"communicator.verbose": True}):
            outputs = run(shared)
        spent, times = communicator.get_communication_stats(), []
        for _ in range(runs):
            communicator.barrier()
            start = time.perf_counter()
            run(shared)
            times.append(time.perf_counter() - start)
        pipe.send((times, spent["bytes"], spent["rounds"], [crypten_import.revealed(out) for out in outputs]))
    crypten.uninit()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--gelu", choices=("default", *GELUS), default="default")
    chosen = parser.parse_args()
    context, (port,) = multiprocessing.get_context("spawn"), free_ports(1)
    pipes, children = [], []
    for rank in range(crypten_import.PARTIES):
        mine, theirs = context.Pipe(duplex=False)
        arguments = (rank, port, chosen.work, chosen.weights, chosen.gelu, chosen.runs, theirs)
        children.append(context.Process(target=party, args=arguments, daemon=True))
        pipes.append(mine)
        children[-1].start()
        theirs.close()
    rows: dict[str, Any] = {}
    for name in chosen.work:
        try:
            answers = [pipe.recv() for pipe in pipes]
        except EOFError:
            raise SystemExit("a party failed: see above") from None
        rows[name] = seconds([answer[0] for answer in answers])
        # every party counts what it sends and what it receives
        rows[name] |= {"bytes": round(sum(answer[1] for answer in answers) / 2), "rounds": answers[0][2]}
        work = make(name, chosen.weights)
        rows[name] |= accuracy(work, [np.asarray(out) for out in answers[0][3]])
        if work.kind in ("gelu", *LAYERED):
            rows[name]["gelu"] = chosen_gelu(name, chosen.gelu)
        say(f"{name}: {rows[name]}")
    for child in children:
        child.join(20)
    print_report(
        {
            "peer": "crypten",
            "version": version("crypten"),
            "protocol": "Beaver triples made by party 0",
            "parties": crypten_import.PARTIES,
            "threads a party": 1,
            "minilm weights": "real" if chosen.weights else "random",
            "work": rows,
        }
    )


if __name__ == "__main__":
    main()
