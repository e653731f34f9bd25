"""The benchmark of throughput: what it reads from the system, and what it makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import throughput
from benchmarks.common import ChildFailed

TRAFFIC = [
    {"sender": "client", "receiver": "server", "phase": "online", "bytes": 800},
    {"sender": "dealer", "receiver": "server", "phase": "offline", "bytes": 4000},
]


def test_the_name_of_a_process_may_hold_anything() -> None:
    fields = ["S", *map(str, range(1, 45))]
    line = f"12 (a) b) (c) {' '.join(fields)}"
    assert throughput.ticks(line) == 11 + 12 + 13 + 14
    assert throughput.ticks(Path("/proc/self/stat").read_text()) >= 0


def test_processor_seconds_count_children_and_those_that_have_ended() -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    before = throughput.processor_seconds(os.getpid())
    subprocess.run([sys.executable, "-I", "-c", busy], check=True)
    assert throughput.processor_seconds(os.getpid()) - before >= 0.25
    child = subprocess.Popen([sys.executable, "-I", "-c", f"{busy}\nprint(flush=True)\ninput()"], **PIPES)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in throughput.children(os.getpid())
        assert throughput.processor_seconds(os.getpid()) - before >= 0.5
        assert throughput.resident(os.getpid()) > throughput.resident(child.pid) > 1
    finally:
        child.kill()
        child.communicate()


PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def test_percentiles() -> None:
    assert throughput.percentiles([float(n) for n in range(1, 101)]) == {"p50 s": 50.5, "p95 s": 95.05, "count": 100}
    assert throughput.percentiles([2.0]) == {"p50 s": 2.0, "p95 s": 2.0, "count": 1}


def test_memory_that_grows_is_seen_and_loading_is_not() -> None:
    flat = throughput.flatness([10.0, 400.0, *[500.0] * 6])
    assert flat == {"peak MB": 500, "second quarter MB": 500, "last quarter MB": 500}
    growing = throughput.flatness([100.0 * n for n in range(16)])
    assert growing["last quarter MB"] > 2 * growing["second quarter MB"]
    assert throughput.flatness([7.0]) == {"peak MB": 7, "second quarter MB": 7, "last quarter MB": 7}


def test_rates_of_two_clients() -> None:
    found = [
        {"seconds": 4.0, "processor s": 1.0, "peak MB": 10},
        {"seconds": 5.0, "processor s": 3.0, "peak MB": 20},
    ]
    rates = throughput.rates(found, {"server": 2.0, "dealer": 6.0}, 8.0, 10)
    assert rates["texts a second"] == 2.5
    assert rates["processor s a text"] == {"client": 0.2, "server": 0.1, "dealer": 0.3}
    assert (rates["slowest over fastest"], rates["client peak MB"], rates["clients"]) == (1.25, 20, 2)


@pytest.mark.parametrize("width", [384, 5])
def test_rows_of_an_unfinished_file(tmp_path: Path, width: int) -> None:
    part = tmp_path / "out.npy.part"
    assert throughput.rows_in(part, width) == 0
    np.save(tmp_path / "whole.npy", np.zeros((3, width), np.float32))
    whole = (tmp_path / "whole.npy").read_bytes()
    for cut, rows in ((0, 3), (1, 2), (4 * width, 2), (len(whole), 0)):
        part.write_bytes(whole[: len(whole) - cut])
        assert throughput.rows_in(part, width) == rows


def test_what_a_plan_says_stands_beside_what_was_measured() -> None:
    plan = {
        "roles": [{"role": role, "processor_seconds_a_text": 0.1} for role in throughput.ROLES],
        "query": {"traffic": TRAFFIC},
    }
    measured = {"processor s a text": dict.fromkeys(throughput.ROLES, 0.12), "traffic a query": TRAFFIC[:1]}
    rows = throughput.ratios(plan, measured, batch=8)
    assert rows["processor s a text, server"] == {"plan": 0.1, "measured": 0.12, "ratio": 1.2}
    assert rows["bytes a text, online, client to server"] == {"plan": 100, "measured": 100, "ratio": 1.0}
    assert rows["bytes a text, offline, dealer to server"]["ratio"] == 0.0
    assert throughput.beside_each_other(0.0, 1.0)["ratio"] == 0.0


def test_a_command_that_is_killed_in_the_middle_and_one_that_fails() -> None:
    start = time.monotonic()
    found = throughput.watched([sys.executable, "-I", "-c", "import time; time.sleep(60)"], lambda: True)
    assert time.monotonic() - start < 30
    assert found["memory"]["peak MB"] >= 0
    done = throughput.watched([sys.executable, "-I", "-c", ""], lambda: False)
    assert done["seconds"] < 30
    with pytest.raises(ChildFailed, match="exit code 3"):
        throughput.watched([sys.executable, "-I", "-c", "import time; time.sleep(0.2); raise SystemExit(3)"], never)


def never() -> bool:
    return False
