"""Texts a second through `unseen proxy`, beside those of a session in Python, of one server in one run.

    python -m benchmarks.endpoint [--length 32] [--batch 8] [--texts 1000] [--write]

Dealer, server, proxy and the Python client are processes of their own on this machine, over loopback without TLS, one
thread each. The Python client calls ``Session.embed``, and reads ``Session.stream``. The proxy is asked for all texts
in one request, in requests of 32 one after another, and for single texts by 16 callers at once.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import common
from benchmarks.common import RESULTS, Service
from benchmarks.streaming import sentence
from benchmarks.throughput import hosted
from secure.models.text import PACKAGED

CALLERS, PART = 16, 32
API = """
import json, sys, time
import secure
from secure.tasks.embed import Embed

texts = json.load(sys.stdin)
with secure.connect(secure.TwoParty(server=sys.argv[1], dealer=sys.argv[2])) as session:
    session.embed(texts[:8])
    found = {}
    for name, ask in (("embed", session.embed), ("stream", lambda t: list(session.stream(Embed(), t)))):
        start = time.perf_counter()
        assert len(ask(texts)) == len(texts)
        found[name] = time.perf_counter() - start
print(json.dumps(found))
"""


def asked(address: str, key: str, model: str, texts: Sequence[str]) -> list[Any]:
    """The embeddings of one request."""
    connection = http.client.HTTPConnection(address, timeout=3600)
    body = json.dumps({"model": model, "input": list(texts), "encoding_format": "base64"})
    connection.request("POST", "/v1/embeddings", body, {"authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    if answer.status != 200:
        raise common.ChildFailed(str(found))
    return list(found["data"])


def model_of(address: str, key: str) -> str:
    """The name of the proxy's model."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
    found = json.loads(connection.getresponse().read())
    connection.close()
    return str(found["data"][0]["id"])


def through(address: str, key: str, texts: Sequence[str]) -> dict[str, float]:
    """The seconds of all texts by each way of asking the proxy."""
    model = model_of(address, key)
    parts = [texts[i : i + PART] for i in range(0, len(texts), PART)]

    def single() -> int:
        with ThreadPoolExecutor(CALLERS) as pool:
            return sum(len(found) for found in pool.map(lambda text: asked(address, key, model, [text]), texts))

    ways: dict[str, Callable[[], int]] = {
        "proxy, one request": lambda: len(asked(address, key, model, texts)),
        f"proxy, requests of {PART}": lambda: sum(len(asked(address, key, model, part)) for part in parts),
        f"proxy, single texts by {CALLERS} callers": single,
    }
    asked(address, key, model, texts[:8])
    found = dict[str, float]()
    for name, way in ways.items():
        start = time.perf_counter()
        assert way() == len(texts)
        found[name] = time.perf_counter() - start
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="write a results file")
    o = parser.parse_args()
    texts = [sentence(number) for number in range(o.texts)]
    with hosted(o.length, [o.batch], o.model) as services, TemporaryDirectory() as folder:
        where = [services["server"].address, services["dealer"].address]
        command = [sys.executable, "-c", API, *where]
        ended = subprocess.run(command, input=json.dumps(texts), stdout=subprocess.PIPE, text=True, check=True)
        seconds = {f"session.{name}": value for name, value in json.loads(ended.stdout).items()}
        key = Path(folder) / "key"
        options = ["--server", where[0], "--dealer", where[1], "--listen", "127.0.0.1:0", "--api-key-file", str(key)]
        proxy = Service("parties.cli", "proxy", *options, "--announce")
        try:
            seconds |= through(proxy.address, key.read_text().strip(), texts)
        finally:
            proxy.stop()
    report: dict[str, Any] = {"machine": common.machine("benchmarks.endpoint"), "model": Path(o.model).name}
    report |= {"length": o.length, "batch": o.batch, "texts": o.texts, "proxy peak MB": round(proxy.peak)}
    report["texts a second"] = {name: round(o.texts / each, 3) for name, each in seconds.items()}
    best = min(each for name, each in seconds.items() if name.startswith("session."))
    report["beside the faster session"] = {name: round(best / each, 3) for name, each in seconds.items()}
    print(json.dumps(report, indent=2))
    if o.write:
        (RESULTS / f"endpoint-{o.length}-{o.batch}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
