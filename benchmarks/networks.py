"""Projected against measured seconds, on loopback and between two network namespaces with limited links.

    python -m benchmarks.networks [--length 32] [--runs 5] [--write]          (the namespaces need root and iproute2)

Client and server run in namespaces of their own that a virtual cable joins. Bandwidth is limited by the kernel (``tc
tbf``, both directions). Delay is the kernel's too where it has ``netem``; where it has not, a relay process before the
server holds every byte for half the round trip, and the row says so. Dealer and server share a namespace, so the
offline phase is not slowed down.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

import secure
from benchmarks.common import RESULTS, machine
from benchmarks.sentences import sentences
from parties.services.hosting import settle
from parties.services.measure import measure_transport
from protocols import kernels
from secure.cost.count import profile
from secure.cost.kernel_times import measure
from secure.cost.projection import project
from secure.models.text import PACKAGED
from secure.mpc.network import NETWORKS, NetworkSpeed, find_network

SERVER_AT, CLIENT_AT = "10.177.77.1", "10.177.77.2"
SPACES = ("unseen-server", "unseen-client")
CHUNK = 1 << 16
BURST = "128kb"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def namespaces(network: NetworkSpeed) -> Iterator[bool]:
    """Two namespaces and their cable; yields whether the kernel delays by itself."""
    try:
        for space in SPACES:
            _ip("netns", "add", space)
        cable = ("link", "add", "cable0", "netns", SPACES[0], "type", "veth", "peer", "name", "cable1", "netns")
        _ip(*cable, SPACES[1])
        delays = True
        for number, (space, address) in enumerate(zip(SPACES, (SERVER_AT, CLIENT_AT), strict=True)):
            device = f"cable{number}"
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
            for link in (device, "lo"):
                _ip("-n", space, "link", "set", link, "up")
            delays = _limit(space, device, network) and delays
        yield delays
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def _limit(space: str, device: str, network: NetworkSpeed) -> bool:
    add = ["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", device]
    rate = f"{network.bandwidth * 8 / 1e6:g}mbit"
    delay = f"{network.round_trip * 500:g}ms"
    both = subprocess.run([*add, "root", "netem", "delay", delay, "rate", rate], check=False, capture_output=True)
    if both.returncode == 0:
        return True
    subprocess.run([*add, "root", "tbf", "rate", rate, "burst", BURST, "latency", "400ms"], check=True)
    return False


def relay(target: tuple[str, int], seconds: float) -> None:
    """Pass connections on, every byte ``seconds`` late in each direction; says in one line of JSON where it listens."""
    listener = socket.create_server((SERVER_AT, 0))
    port = listener.getsockname()[1]
    sys.stdout.write(json.dumps({"listening": f"{SERVER_AT}:{port}"}) + "\n")
    sys.stdout.flush()
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(target)
        for a, b in ((near, far), (far, near)):
            a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            threading.Thread(target=_take, args=(a, late, seconds), daemon=True).start()
            threading.Thread(target=_give, args=(b, late), daemon=True).start()


def _take(source: socket.socket, late: queue.SimpleQueue[tuple[float, bytes]], seconds: float) -> None:
    data = b"start"
    while data:
        try:
            data = source.recv(CHUNK)
        except OSError:
            data = b""
        late.put((time.monotonic() + seconds, data))


def _give(sink: socket.socket, late: queue.SimpleQueue[tuple[float, bytes]]) -> None:
    while True:
        when, data = late.get()
        time.sleep(max(0.0, when - time.monotonic()))
        try:
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(data)
        except OSError:
            return


@contextmanager
def child(space: str, *command: str) -> Iterator[str]:
    """A Python module in a namespace ("" for none); yields where it says that it listens."""
    inside = ["ip", "netns", "exec", space] if space else []
    arguments = [*inside, sys.executable, "-m", *command]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"did not start: {' '.join(command)}")
        yield str(json.loads(line)["listening"])
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def measured(length: int, runs: int, network: NetworkSpeed | None) -> tuple[list[float], str]:
    """Online seconds of warm queries, and what made the delay."""
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["XDG_CACHE_HOME"] = state
        how, host, space, near = "none", "127.0.0.1", "", ""
        if network is not None:
            kernel = stack.enter_context(namespaces(network))
            how, host, (space, near) = ("kernel" if kernel else "relay"), "0.0.0.0", SPACES
        common = ["--threads", "1", "--insecure"]
        dealer = stack.enter_context(
            child(space, "parties.cli", "dealer", "--listen", f"{host}:0", "--announce", *common)
        )
        dealer_port = dealer.rpartition(":")[2]
        served = ["serve", PACKAGED, "--dealer", f"127.0.0.1:{dealer_port}", "--listen", f"{host}:0", "--state", state]
        served += ["--length", str(length), "--embedding", "client-table", "--deadline", "600", "--announce"]
        server = stack.enter_context(child(space, "parties.cli", *served, *common))
        server_port = server.rpartition(":")[2]
        at, dealing = (SERVER_AT if network else host), f"{SERVER_AT if network else host}:{dealer_port}"
        address = f"{at}:{server_port}"
        if network is not None and how == "relay":
            script = (
                f"from benchmarks.networks import relay; relay(('127.0.0.1', {server_port}), {network.round_trip / 2})"
            )
            address = stack.enter_context(_script(space, script))
        client = ["-m", "parties.cli", "embed", "--server", address, "--dealer", dealing, "--json", "--deadline", "600"]
        inside = ["ip", "netns", "exec", near] if near else []
        texts = [text for text in sentences() if len(text) < 2 * length][: runs + 1]
        done = subprocess.run(
            [*inside, sys.executable, *client, *common, "--", *texts], check=True, capture_output=True, text=True
        )
        return [row["online_seconds"] for row in json.loads(done.stdout)][1:], how


@contextmanager
def _script(space: str, text: str) -> Iterator[str]:
    process = subprocess.Popen(
        ["ip", "netns", "exec", space, sys.executable, "-c", text], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield str(json.loads(process.stdout.readline())["listening"])
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def compare(length: int, runs: int, networks: Sequence[NetworkSpeed | None]) -> list[dict[str, Any]]:
    """One row a network."""
    settle()
    torch.set_num_threads(1)
    kernels.warm_up()
    program = secure.compile_text_model(PACKAGED, length, embedding="client-table").program
    found, rows = profile(program), []
    for network in networks:
        timings, transport = measure(program), measure_transport()
        projected = project(found, timings, transport, network).seconds
        times, how = measured(length, runs, network)
        median = statistics.median(times)
        row = {
            "network": network.name if network else "loopback",
            "projected s": round(projected, 3),
            "measured s": round(median, 3),
            "each": [round(t, 3) for t in times],
            "projected / measured": round(projected / median, 3),
            "delay by": how,
        }
        rows.append(row)
        sys.stderr.write(json.dumps(row) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--network", nargs="*", help="names as of unseen profile")
    parser.add_argument("--write", action="store_true", help="write a results file")
    options = parser.parse_args()
    chosen: list[NetworkSpeed | None] = [None]
    if shutil.which("ip") and os.geteuid() == 0:
        chosen += NETWORKS
    if options.network:
        chosen = [find_network(name) for name in options.network]
    report = {"machine": machine("benchmarks.networks"), "length": options.length}
    report["networks"] = compare(options.length, options.runs, chosen)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"networks-{options.length}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
