"""Texts a second of one client and of several at once, processor seconds a text by role, fairness, and bulk embedding.

    python -m benchmarks.throughput [--length 32] [--batch 8] [--texts 256] [--clients 1 8] [--plan] [--beside COUNT]
        [--bulk COUNT] [--workers N] [--write]

Dealer, server and clients are processes of their own on this machine, over loopback without TLS, one thread each. All
clients of a run begin at once, after a warm-up; texts a second are all texts by the time until the last client is done.
``--plan`` puts what `unseen plan` says of one client beside what was measured. ``--beside``: the time of single short
texts, one at a time, alone and beside a client that embeds in bulk, both of one server with batches of 1 too.
``--bulk``: `unseen embed --input --output` on so many texts, ended by SIGKILL in the middle and run again; its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.common import RESULTS, ChildFailed, Service
from benchmarks.streaming import sentence
from secure.models.sentence_encoder import load_sentence_encoder
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import PACKAGED, model_directory, text_inputs

ROLES = ("client", "server", "dealer")
SAMPLING = 0.5  # seconds between two looks at a process's memory
ENDLESS = 1 << 40  # texts of a client that is stopped
CHECKED = 20  # rows of a bulk run that are compared with the plain model
CLOSE = 0.999  # the least cosine of such a row


# what processes took


def processor_seconds(pid: int) -> float:
    """The user and system seconds of a process, of its children, and of those of them that have ended."""
    total = ticks(Path(f"/proc/{pid}/stat").read_text()) / os.sysconf("SC_CLK_TCK")
    return total + sum(processor_seconds(child) for child in children(pid))


def ticks(stat: str) -> int:
    """The clock ticks in a line of /proc/PID/stat: its own in user and system mode, and those of waited-for children.

    The second field is the name in parentheses, which may itself hold blanks and parentheses.
    """
    fields = stat.rpartition(")")[2].split()
    return sum(int(fields[i]) for i in (11, 12, 13, 14))


def children(pid: int) -> list[int]:
    """The processes that a process has started, by any of its threads, and that have not ended."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # the thread has ended, or this kernel does not list children
            continue
    return found


def resident(pid: int) -> float:
    """The memory in MB that a process and its children have now."""
    size = 0.0
    for each in (pid, *children(pid)):
        lines = Path(f"/proc/{each}/status").read_text().splitlines()
        size += next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)
    return size


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median of some times, and the time that 95 % of them do not pass."""
    p50, p95 = np.percentile(np.array(seconds), (50, 95))
    return {"p50 s": round(float(p50), 3), "p95 s": round(float(p95), 3), "count": len(seconds)}


def flatness(samples: Sequence[float]) -> dict[str, float]:
    """The memory of a run over time, in MB: its peak, and the median of its second quarter and of its last one.

    The first quarter is left out: files are loaded there, and buffers grow to their size.
    """
    quarter = max(1, len(samples) // 4)
    second, last = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    return {
        "peak MB": round(max(samples)),
        "second quarter MB": round(float(np.median(second))),
        "last quarter MB": round(float(np.median(last))),
    }


# processes


@contextmanager
def hosted(length: int, batches: Sequence[int], model: str, workers: int = 1) -> Iterator[dict[str, Service]]:
    """Dealer and server, which offers these batches, with directories of their own for state and cache."""
    before = dict(os.environ)
    with ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(os.environ.update, before)
        stack.callback(os.environ.clear)
        os.environ.update(XDG_CACHE_HOME=str(state / "cache"), XDG_STATE_HOME=str(state / "state"))
        dealer = common.dealer()
        stack.callback(dealer.stop)
        served = ["serve", model, "--dealer", dealer.address, "--listen", "127.0.0.1:0", "--length", str(length)]
        served += [word for batch in batches for word in ("--batch", str(batch))]
        served += ["--embedding", "client-table", "--same-owner"]
        served += ["--workers", str(workers)] if workers > 1 else ["--threads", "1"]
        server = Service("parties.cli", *served, "--announce")
        stack.callback(server.stop)
        yield {"server": server, "dealer": dealer}


class Client:
    """A process of ``benchmarks.streaming`` that is warm and waits for ``go``."""

    def __init__(self, services: Mapping[str, Service], texts: int, *, alone: bool = False) -> None:
        where = ["--server", services["server"].address, "--dealer", services["dealer"].address]
        command = [sys.executable, "-m", "benchmarks.streaming", *where, "--texts", str(texts)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the child
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._child = subprocess.Popen([*command, *(["--alone"] if alone else [])], stderr=self._log, **pipes)
        self.said = self._line()

    def _line(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._log.seek(0)
            raise ChildFailed(f"a client failed:\n{self._log.read().decode(errors='replace')[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def go(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()

    def found(self) -> dict[str, Any]:
        """What it measured; waits for it."""
        return self._line()

    def ended(self) -> bool:
        return self._child.poll() is not None

    def stop(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.terminate()
        self._child.wait()
        self._log.close()


# measurements


def together(services: Mapping[str, Service], count: int, texts: int) -> dict[str, Any]:
    """Let so many clients embed so many texts each, at once."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(Client(services, texts))
            stack.callback(clients[-1].stop)
        before = {name: processor_seconds(service.pid) for name, service in services.items()}
        start = time.perf_counter()
        for client in clients:
            client.go()
        found = [client.found() for client in clients]
        seconds = time.perf_counter() - start
        used = {name: processor_seconds(service.pid) - before[name] for name, service in services.items()}
    return rates(found, used, seconds, texts) | {"traffic a query": clients[0].said["traffic"]}


def rates(found: Sequence[Mapping[str, Any]], used: Mapping[str, float], seconds: float, texts: int) -> dict[str, Any]:
    """Texts a second, processor seconds a text by role, and fairness, of clients that had ``texts`` texts each."""
    each, total = [client["seconds"] for client in found], texts * len(found)
    by_role = {"client": sum(client["processor s"] for client in found), **used}
    return {
        "clients": len(found),
        "texts": total,
        "texts a second": round(total / seconds, 3),
        "processor s a text": {role: round(by_role[role] / total, 4) for role in ROLES},
        "slowest over fastest": round(max(each) / min(each), 3),
        "each s": [round(s, 2) for s in each],
        "client peak MB": max(client["peak MB"] for client in found),
        "load average": round(os.getloadavg()[0], 2),
    }


def beside(services: Mapping[str, Service], count: int) -> dict[str, Any]:
    """The latency of single texts: alone, and while another client embeds in bulk."""
    with ExitStack() as stack:
        quiet = Client(services, count, alone=True)
        stack.callback(quiet.stop)
        quiet.go()
        alone = percentiles(quiet.found()["each s"])
        single, bulk = Client(services, count, alone=True), Client(services, ENDLESS)
        stack.callback(single.stop)
        stack.callback(bulk.stop)
        bulk.go()
        time.sleep(1.0)  # its first query runs
        single.go()
        busy = percentiles(single.found()["each s"])
        if bulk.ended():
            raise ChildFailed("the bulk client ended before the others")
    return {"alone": alone, "beside a bulk client": busy}


def bulk(services: Mapping[str, Service], count: int, batch: int, length: int, model: str) -> dict[str, Any]:
    """Embed a file in one command that is killed in the middle, and once more with the same command."""
    with tempfile.TemporaryDirectory() as folder:
        texts, output = Path(folder) / "texts.txt", Path(folder) / "embeddings.npy"
        texts.write_text("".join(sentence(n) + "\n" for n in range(count)))
        where = ["--server", services["server"].address, "--dealer", services["dealer"].address]
        command = [sys.executable, "-P", "-m", "parties.cli", "embed", "--input", str(texts), "--output", str(output)]
        part, before = Path(f"{output}.part"), answered(services["server"])
        first = watched([*command, *where], lambda: rows_in(part) >= count // 2)
        kept = rows_in(part)
        second = watched([*command, *where], lambda: False)
        queries = answered(services["server"]) - before
        found = np.load(output)
        right = compared(found, length, model)
    most = -(-kept // batch) + 1 + -(-(count - kept) // batch)  # with the query in flight when it was killed
    return {
        "texts": count,
        "rows when it was killed": kept,
        "seconds": {"until it was killed": first["seconds"], "after that": second["seconds"]},
        "texts a second": round((count - kept) / second["seconds"], 3),
        "memory": {"until it was killed": first["memory"], "after that": second["memory"]},
        "queries answered": queries,
        "at most, if nothing but the query in flight is computed twice": most,
        "nothing was computed twice": queries <= most,
        "complete": bool(len(found) == count and np.isfinite(found).all()),
        "lowest cosine to the plain model": right,
        "right": right >= CLOSE,
    }


def watched(command: list[str], enough: Callable[[], bool]) -> dict[str, Any]:
    """Run a command to its end, or kill it as soon as it is ``enough``; its time and its memory."""
    samples, start = list[float](), time.perf_counter()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        while child.poll() is None:
            try:
                samples.append(resident(child.pid))
            except OSError:  # it has just ended
                break
            if enough():
                child.kill()
                break
            time.sleep(SAMPLING)
        killed, code = child.poll() is None, child.wait()
        log.seek(0)
        if code and not (killed or code < 0):
            raise ChildFailed(f"exit code {code}:\n{log.read().decode(errors='replace')[-2000:]}")
    return {"seconds": round(time.perf_counter() - start, 2), "memory": flatness(samples)}


def rows_in(part: Path, width: int = 384) -> int:
    """The whole rows of float32 in an unfinished file of ``unseen embed``; its header has 128 bytes."""
    return max(0, part.stat().st_size - 128) // (4 * width) if part.exists() else 0


def answered(server: Service) -> int:
    """The queries that a server has answered, of which each left a line in its log."""
    return server.log().count(" answered in ")


def compared(found: NDArray[np.float32], length: int, model: str) -> float:
    """The lowest cosine of some rows to the float64 plain model's embeddings of the same texts."""
    directory = model_directory(model)
    encoder, tokenizer = load_sentence_encoder(directory).double(), load_tokenizer(directory)
    lowest = 1.0
    with torch.no_grad():
        for number in np.linspace(0, len(found) - 1, min(CHECKED, len(found))).astype(int):
            plain = encoder(**text_inputs(tokenizer, sentence(int(number)), length))[0]
            private = torch.from_numpy(found[number].astype(np.float64))
            lowest = min(lowest, float(torch.nn.functional.cosine_similarity(plain, private, dim=0)))
    return round(lowest, 7)


# a plan beside


def planned(length: int, batch: int, model: str) -> dict[str, Any]:
    """What `unseen plan` says of one client on this machine."""
    command = [sys.executable, "-P", "-m", "parties.cli", "plan", model, "--length", str(length), "--batch", str(batch)]
    command += ["--embedding", "client-table", "--clients", "1", "--queries-per-day", "1000", "--json"]
    output, _ = common.run(command)
    found: dict[str, Any] = json.loads(output)
    return found


def ratios(plan: Mapping[str, Any], measured: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Plan, measurement, and measurement over plan: processor seconds a text by role, and bytes a query by link."""
    said = {row["role"]: row["processor_seconds_a_text"] for row in plan["roles"]}
    rows = {
        f"processor s a text, {role}": beside_each_other(said[role], measured["processor s a text"][role])
        for role in ROLES
    }
    links = {(t["sender"], t["receiver"], t["phase"]): t["bytes"] for t in measured["traffic a query"]}
    for link in plan["query"]["traffic"]:
        key = (link["sender"], link["receiver"], link["phase"])
        name = f"bytes a text, {key[2]}, {key[0]} to {key[1]}"
        rows[name] = beside_each_other(link["bytes"] / batch, links.get(key, 0) / batch)
    return rows


def beside_each_other(plan: float, measured: float) -> dict[str, float]:
    """Two figures and the ratio of the measured one to the planned one."""
    return {"plan": plan, "measured": measured, "ratio": round(measured / plan, 3) if plan else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--texts", type=int, default=256, help="of each client")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--plan", action="store_true", help="put what `unseen plan` says beside")
    parser.add_argument("--beside", type=int, default=0, metavar="COUNT", help="single texts beside a bulk client")
    parser.add_argument("--bulk", type=int, default=0, metavar="COUNT", help="texts of one `unseen embed`")
    parser.add_argument("--workers", type=int, default=1, help="processes of the server")
    parser.add_argument("--write", action="store_true", help="write a results file")
    o = parser.parse_args()
    report: dict[str, Any] = {"machine": common.machine("benchmarks.throughput"), "model": Path(o.model).name}
    report |= {"length": o.length, "batch": o.batch, "workers": o.workers, "embedding": "client-table"}
    if o.clients or o.bulk:
        with hosted(o.length, [o.batch], o.model, o.workers) as services:
            report["together"] = [together(services, count, o.texts) for count in o.clients]
            if o.bulk:
                report["bulk"] = bulk(services, o.bulk, o.batch, o.length, o.model)
        report["peak MB"] = {name: round(service.peak) for name, service in services.items()}
    if o.beside:
        with hosted(o.length, sorted({1, o.batch}), o.model) as services:
            report["single texts"] = beside(services, o.beside)
    if o.plan and o.clients:
        report["plan"] = ratios(planned(o.length, o.batch, o.model), report["together"][0], o.batch)
    print(json.dumps(report, indent=2))
    if o.write:
        RESULTS.mkdir(exist_ok=True)
        how = (f"-{o.workers}-workers" if o.workers > 1 else "") + ("" if o.clients or not o.bulk else "-bulk")
        (RESULTS / f"throughput-{o.length}-{o.batch}{how}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
