"""Texts a second through `unseen proxy`, beside those of a session in Python, of one server in one run.

    python -m benchmarks.endpoint [--length 32] [--batch 8] [--texts 1000] [--some 256] [--write]

Dealer, server, proxy and the Python client are processes of their own on this machine, over loopback without TLS, one
thread each. The Python client reads ``Session.stream``, as `unseen embed --input` does, and the proxy is asked for all
texts in one request. Some of them are asked in three more ways: by ``Session.embed``, in requests of 32 one after
another, and as single texts by 16 callers at once.
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

texts, some = json.load(sys.stdin), int(sys.argv[3])
with secure.connect(secure.TwoParty(server=sys.argv[1], dealer=sys.argv[2])) as session:
    session.embed(texts[:8])
    found = {}
    ways = {"stream": (lambda t: list(session.stream(Embed(), t)), texts), "embed": (session.embed, texts[:some])}
    for name, (ask, given) in ways.items():
        start = time.perf_counter()
        assert len(ask(given)) == len(given)
        found["session." + name] = len(given) / (time.perf_counter() - start)
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


def through(address: str, key: str, texts: Sequence[str], some: int) -> dict[str, float]:
    """Texts a second by each way of asking the proxy; ``some`` of them in the ways of many requests."""
    model, few = model_of(address, key), texts[:some]
    parts = [few[i : i + PART] for i in range(0, len(few), PART)]

    def single() -> int:
        with ThreadPoolExecutor(CALLERS) as pool:
            return sum(len(found) for found in pool.map(lambda text: asked(address, key, model, [text]), few))

    ways: dict[str, Callable[[], int]] = {
        "proxy, one request": lambda: len(asked(address, key, model, texts)),
        f"proxy, requests of {PART}": lambda: sum(len(asked(address, key, model, part)) for part in parts),
        f"proxy, single texts by {CALLERS} callers": single,
    }
    asked(address, key, model, texts[:8])
    found = dict[str, float]()
    for name, way in ways.items():
        start = time.perf_counter()
        answered = way()
        assert answered in (len(texts), len(few))
        found[name] = answered / (time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--some", type=int, default=256, help="of them, in the ways of many requests")
    parser.add_argument("--write", action="store_true", help="write a results file")
    o = parser.parse_args()
    texts = [sentence(number) for number in range(o.texts)]
    with hosted(o.length, [o.batch], o.model) as services, TemporaryDirectory() as folder:
        where = [services["server"].address, services["dealer"].address]
        command = [sys.executable, "-c", API, *where, str(o.some)]
        ended = subprocess.run(command, input=json.dumps(texts), stdout=subprocess.PIPE, text=True, check=True)
        rates: dict[str, float] = json.loads(ended.stdout)
        key = Path(folder) / "key"
        options = ["--server", where[0], "--dealer", where[1], "--listen", "127.0.0.1:0", "--api-key-file", str(key)]
        proxy = Service("parties.cli", "proxy", *options, "--announce")
        try:
            rates |= through(proxy.address, key.read_text().strip(), texts, o.some)
        finally:
            proxy.stop()
    report: dict[str, Any] = {"machine": common.machine("benchmarks.endpoint"), "model": Path(o.model).name}
    report |= {
        "length": o.length,
        "batch": o.batch,
        "texts": o.texts,
        "some": o.some,
        "proxy peak MB": round(proxy.peak),
    }
    report["texts a second"] = {name: round(rate, 3) for name, rate in rates.items()}
    report["beside session.stream"] = {name: round(rate / rates["session.stream"], 3) for name, rate in rates.items()}
    print(json.dumps(report, indent=2))
    if o.write:
        (RESULTS / f"endpoint-{o.length}-{o.batch}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
