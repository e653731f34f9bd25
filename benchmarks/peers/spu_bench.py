"""SecretFlow SPU on the works: PUMA's GeLU and softmax, weights and input secret-shared, parties over loopback TCP.

    python -m benchmarks.peers.spu_bench [--protocol ABY3|SEMI2K] [--work NAME ...] [--runs N] [--weights FILE]

ABY3 has three parties, SEMI2K two, of which the first makes all triples (SPU's default, which is insecure and cheaper
than any dealer). Ring 2^64, 18 fraction bits, e^x by five squarings, as SPU's published PUMA examples configure it.
Threads as SPU comes (as many as the machine has cores, for each party) unless ``--threads`` says otherwise.
Bytes and messages are those that SPU's own profile reports; compilation and sharing are not timed.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from benchmarks.peers.works import LAYER, Work, accuracy, free_ports, make, options, print_report, say, seconds

# by name, so that type checks do without these packages
jax: Any = import_module("jax")
jnp: Any = import_module("jax.numpy")
spu: Any = import_module("spu")
libspu: Any = import_module("spu.libspu")
frontend: Any = import_module("spu.utils.frontend")

PARTIES = {"ABY3": 3, "SEMI2K": 2}
FRACTION_BITS = 18
SECRET = libspu.Visibility.VIS_SECRET
_LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes \d+, send actions (\d+)")


# the functions; Any is jax's array


def gelu(x: Any) -> Any:
    """PUMA, arXiv 2307.12533, eq. 2; the coefficients and the shared comparisons are SPU's published example's."""
    below4, below2, above3 = x < -4.0, x < -1.95, x > 3.0
    middle, left = below2 ^ above3 ^ True, below4 ^ below2
    x2 = jnp.square(x)
    x3, x4 = x * x2, jnp.square(x2)
    x6 = jnp.square(x3)
    cubic = -0.011034134030615728 * x3 - 0.11807612951181953 * x2 - 0.42226581151983866 * x - 0.5054031199708174
    sextic = 0.0018067462606141187 * x6 - 0.037688200365904236 * x4 + 0.3603292692789629 * x2 + 0.5 * x
    return above3 * x + left * cubic + middle * (sextic + 0.008526321541038084)


def softmax(x: Any) -> Any:
    """PUMA's: terms below e^-14 are cut off before the sum, and one reciprocal serves a row."""
    x = x - jnp.max(x, -1, keepdims=True)
    e = jnp.exp(x) * (x > -14)
    return e / jnp.sum(e, -1, keepdims=True)


def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    d = x - jnp.mean(x, -1, keepdims=True)
    return d * jax.lax.rsqrt(jnp.mean(jnp.square(d), -1, keepdims=True) + 1e-12) * weight + bias


def linear(x: Any, w: dict[str, Any], name: str) -> Any:
    return x @ w[name] + w[f"{name}.bias"]


def attention(x: Any, w: dict[str, Any], mask: Any, heads: int) -> Any:
    q, k, v = (
        jnp.transpose(jnp.reshape(linear(x, w, n), (x.shape[0], heads, -1)), (1, 0, 2))
        for n in ("query", "key", "value")
    )
    scores = jnp.matmul(q / np.sqrt(q.shape[-1]), jnp.transpose(k, (0, 2, 1)))
    context = jnp.reshape(jnp.transpose(jnp.matmul(softmax(scores + mask), v), (1, 0, 2)), x.shape)
    return linear(context, w, "output")


def feed_forward(x: Any, w: dict[str, Any]) -> Any:
    return linear(gelu(linear(x, w, "up")), w, "down")


def encoder(heads: int, layers: int) -> Callable[[dict[str, Any]], Any]:
    def encode(a: dict[str, Any]) -> Any:
        x = layer_norm(a["x"], a["norm"], a["norm.bias"]) if "norm" in a else a["x"]
        for i in range(layers):
            w = {name: a[f"{i}.{name}"] for name in LAYER}
            x = layer_norm(x + attention(x, w, a["mask"], heads), w["attention norm"], w["attention norm.bias"])
            x = layer_norm(x + feed_forward(x, w), w["norm"], w["norm.bias"])
        return x, a["pool"] @ x

    return encode


def decoder(heads: int, layers: int) -> Callable[[dict[str, Any]], Any]:
    def decode(a: dict[str, Any]) -> Any:
        x = a["x"]
        for i in range(layers):
            w = {name: a[f"{i}.{name}"] for name in LAYER}
            x = x + attention(layer_norm(x, w["attention norm"], w["attention norm.bias"]), w, a["mask"], heads)
            x = x + feed_forward(layer_norm(x, w["norm"], w["norm.bias"]), w)
        return jnp.argmax(layer_norm(x[-1:], a["norm"], a["norm.bias"]) @ a["head"], -1)

    return decode


LAYERED = {"encoder": encoder, "decoder": decoder}

FUNCTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "matmul": lambda a: a["x"] @ a["y"],
    "multiply": lambda a: a["x"] * a["y"],
    "compare": lambda a: a["x"] > 0,
    "reciprocal": lambda a: jnp.reciprocal(a["x"]),
    "rsqrt": lambda a: jax.lax.rsqrt(a["x"]),
    "gelu": lambda a: gelu(a["x"]),
    "softmax": lambda a: softmax(a["x"]),
    "argmax": lambda a: jnp.argmax(a["x"], -1),
    "layernorm": lambda a: layer_norm(a["x"], a["weight"], a["bias"]),
    "head": lambda a: jnp.argmax(jnp.tanh(a["x"] @ a["dense"] + a["dense.bias"]) @ a["out"] + a["out.bias"], -1),
}


# the parties


def configuration(protocol: str, threads: int | None) -> Any:
    kind = getattr(libspu.ProtocolKind, protocol)
    config = libspu.RuntimeConfig(protocol=kind, field=libspu.FieldType.FM64, fxp_fraction_bits=FRACTION_BITS)
    config.fxp_exp_iters = 5
    config.enable_pphlo_profile = True  # a few counters an operation; the only way to learn what was sent
    if threads:
        config.max_concurrency = threads
    return config


def party(rank: int, ports: list[int], protocol: str, threads: int | None, log: str, pipe: Connection) -> None:
    """One party's process: it runs what the parent sends and answers with times and its shares of the outputs."""
    # SPU logs to its standard output from C++, the profile too; the parent's output is for the report
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        description = libspu.link.Desc()
        description.recv_timeout_ms = 120_000
        for i, port in enumerate(ports):
            description.add_party(f"party{i}", f"127.0.0.1:{port}")
        link = libspu.link.create_brpc(description, rank)
        runtime = spu.Runtime(link, configuration(protocol, threads))
        while (job := pipe.recv()) is not None:
            code, shares, outputs, runs = job
            for name, share in shares.items():
                runtime.set_var(name, share)
            executable = libspu.Executable(name="work", input_names=list(shares), output_names=outputs, code=code)
            times = []
            for _ in range(1 + runs):
                link.barrier()
                start = time.perf_counter()
                runtime.run(executable)
                times.append(time.perf_counter() - start)
            pipe.send((times[1:], [runtime.get_var(name) for name in outputs]))
            for name in (*shares, *outputs):
                runtime.del_var(name)
        link.barrier()
        link.stop_link()
    except BaseException:
        traceback.print_exc()  # into the log, which the parent shows
        raise


class Parties:
    """All parties of one protocol, as child processes."""

    def __init__(self, protocol: str, threads: int | None, directory: Path) -> None:
        count = PARTIES[protocol]
        self._io = spu.Io(count, configuration(protocol, threads))
        self._logs = [directory / f"party{rank}.log" for rank in range(count)]
        self._children, self._pipes = [], []
        context, ports = multiprocessing.get_context("spawn"), free_ports(count)
        for rank, log in enumerate(self._logs):
            log.touch()
            mine, theirs = context.Pipe()
            arguments = (rank, ports, protocol, threads, str(log), theirs)
            self._children.append(context.Process(target=party, args=arguments, daemon=True))
            self._pipes.append(mine)
            self._children[-1].start()
            theirs.close()

    def run(self, work: Work, runs: int) -> dict[str, Any]:
        layered = LAYERED.get(work.kind)
        function = layered(work.heads, work.layers) if layered else FUNCTIONS[work.kind]
        names = sorted(work.arrays)  # the order in which jax flattens a dict

        def output_names(flat: list[Any]) -> list[str]:
            return [f"out{i}" for i in range(len(flat))]

        copts = libspu.CompilerOptions()
        copts.enable_optimize_denominator_with_broadcast = True  # x / broadcast(y) as x * broadcast(1 / y), as PUMA has
        executable, _ = frontend.compile(
            frontend.Kind.JAX, function, [work.arrays], {}, names, [SECRET] * len(names), output_names, copts=copts
        )
        shares = {name: self._io.make_shares(work.arrays[name], SECRET) for name in names}
        outputs = list(executable.output_names)
        for rank in range(len(self._pipes)):
            self._send(rank, (executable.code, {name: shares[name][rank] for name in names}, outputs, runs))
        answers = [self._receive(rank) for rank in range(len(self._pipes))]
        results = [np.asarray(self._io.reconstruct([out[i] for _, out in answers])) for i in range(len(outputs))]
        sent = [self._sent(log) for log in self._logs]
        row = seconds([times for times, _ in answers])
        row |= {"bytes": sum(b for b, _ in sent), "messages": max(m for _, m in sent)}
        return row | accuracy(work, [r.astype(np.float64) for r in results])

    def _send(self, rank: int, job: Any) -> None:
        try:
            self._pipes[rank].send(job)
        except BrokenPipeError:
            self._fail(rank)

    def _receive(self, rank: int) -> Any:
        try:
            return self._pipes[rank].recv()
        except EOFError:
            self._fail(rank)

    def _fail(self, rank: int) -> NoReturn:
        say(self._logs[rank].read_text()[-4000:])
        self._children[rank].join(5)
        raise SystemExit(f"party {rank} failed with exit code {self._children[rank].exitcode}: see above") from None

    @staticmethod
    def _sent(log: Path) -> tuple[int, int]:
        """Bytes and messages that a party sent in the last run."""
        found = _LINK.findall(log.read_text())
        if not found:
            raise SystemExit(f"SPU reported no traffic:\n{log.read_text()[-1000:]}")
        return int(found[-1][0]), int(found[-1][1])

    def stop(self) -> None:
        for rank in range(len(self._pipes)):
            self._send(rank, None)
        for child in self._children:
            child.join(20)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--protocol", choices=PARTIES, default="ABY3")
    parser.add_argument("--threads", type=int, metavar="N", help="threads a party (default: SPU's own choice)")
    chosen = parser.parse_args()
    # SPU logs to standard output here too, which is for the report alone
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        parties = Parties(chosen.protocol, chosen.threads, Path(directory))
        for name in chosen.work:
            rows[name] = parties.run(make(name, chosen.weights), chosen.runs)
            say(f"{name}: {rows[name]}")
        parties.stop()
    print_report(
        {
            "peer": "spu",
            "version": spu.__version__,
            "protocol": chosen.protocol,
            "parties": PARTIES[chosen.protocol],
            "threads a party": chosen.threads or os.cpu_count(),
            "minilm weights": "real" if chosen.weights else "random",
            "work": rows,
        },
        report,
    )


if __name__ == "__main__":
    main()
