"""The main job, measured: private embeddings with dealer, server and client as separate processes over loopback gRPC.

    python -m benchmarks.main_job [--model DIR] [--length 128] [--embedding client-table] [--accuracy FILE|builtin]
        [--write]

Speed: the median of five warm queries. Memory: each process's own peak. Accuracy: every sentence's cosine to the
float64 plaintext model, of the same weights and form.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import RESULTS, Service
from benchmarks.sentences import sentences
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.two_party import CLIENT, DEALER, SERVER
from secure.models.sentence_encoder import load_sentence_encoder
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import PACKAGED, model_directory, text_inputs


def ask(texts: list[str], server: str, dealer: str) -> tuple[list[dict[str, Any]], float]:
    """Run the client process on texts; its rows and its peak memory in MB."""
    command = [sys.executable, "-m", "parties.cli", "embed", "--server", server, "--dealer", dealer, "--json"]
    output, peak = common.run([*command, "--threads", "1", "--", *texts])
    return json.loads(output), peak


def cosines(rows: list[dict[str, Any]], length: int, model: str) -> list[float]:
    directory = model_directory(model)
    encoder, tokenizer = load_sentence_encoder(directory).double(), load_tokenizer(directory)
    out = []
    with torch.no_grad():
        for row in rows:
            plain = encoder(**text_inputs(tokenizer, row["text"], length))[0]
            private = torch.tensor(row["embedding"], dtype=torch.float64)
            out.append(float(torch.nn.functional.cosine_similarity(plain, private, dim=0)))
    return out


def fitting(texts: list[str], length: int) -> list[str]:
    tokenizer = load_tokenizer(model_directory(PACKAGED))
    return [t for t in texts if len(tokenizer.tokenizer.encode(t).ids) <= length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--fraction-bits", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--embedding", default="client-table")
    parser.add_argument("--gelu", default="cubic")
    parser.add_argument("--approximations", default="default", help="default or puma")
    parser.add_argument("--accuracy", help="a file of sentences, one a line, or 'builtin'")
    parser.add_argument("--count", type=int, default=100, help="sentences for accuracy")
    parser.add_argument("--write", action="store_true", help="write a results file")
    options = parser.parse_args()
    length = options.length
    report: dict[str, Any] = {"machine": common.machine("benchmarks.main_job"), "length": length}
    report |= {"embedding": options.embedding, "gelu": options.gelu, "approximations": options.approximations}
    report |= {"model": Path(options.model).name, "fraction bits": options.fraction_bits}
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ["XDG_CACHE_HOME"] = state
        dealer = common.dealer()
        stack.callback(dealer.stop)
        served = [
            "serve",
            options.model,
            "--dealer",
            dealer.address,
            "--listen",
            "127.0.0.1:0",
            "--length",
            str(length),
        ]
        served += ["--embedding", options.embedding, "--gelu", options.gelu, "--state", state]
        served += ["--approximations", options.approximations]
        served += ["--fraction-bits", str(options.fraction_bits)]
        server = Service("parties.cli", *served, "--threads", "1", "--announce")
        stack.callback(server.stop)
        rows, client_peak = ask(fitting(sentences(), length)[:6], server.address, dealer.address)
        report |= summary(rows[1:])
        if options.accuracy:
            builtin = options.accuracy == "builtin"
            texts = sentences() if builtin else Path(options.accuracy).read_text("latin-1").splitlines()
            texts = fitting([t for t in texts if t.strip()], length)[: options.count]
            found = cosines(ask(texts, server.address, dealer.address)[0], length, options.model)
            report["accuracy"] = {
                "source": Path(options.accuracy).name,
                "sentences": len(found),
                "lowest cosine": min(found),
                "mean cosine": statistics.fmean(found),
            }
    report["peak MB"] = {"client": round(client_peak), "server": round(server.peak), "dealer": round(dealer.peak)}
    print(json.dumps(report, indent=2))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        kind = "" if options.model == PACKAGED else "-polynomial"
        name = f"main_job-{length}-{options.embedding}{kind}.json"
        (RESULTS / name).write_text(json.dumps(report, indent=2) + "\n")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str) -> float:
        return float(round(statistics.median(row[name] for row in rows), 3))

    first = rows[0]

    def moved(sender: str, receiver: str, phase: str) -> int:
        links = (t for t in first["traffic"] if (t["sender"], t["receiver"], t["phase"]) == (sender, receiver, phase))
        return sum(link["bytes"] for link in links)

    return {
        "queries": len(rows),
        "online s": median("online_seconds"),
        "online s, each": [round(row["online_seconds"], 3) for row in rows],
        "offline s": median("offline_seconds"),
        "rounds": first["rounds"],
        "online MB to server": moved(CLIENT, SERVER, ONLINE) / 1e6,
        "online MB to client": moved(SERVER, CLIENT, ONLINE) / 1e6,
        "offline MB to server": moved(DEALER, SERVER, OFFLINE) / 1e6,
        "offline bytes to client": moved(SERVER, CLIENT, OFFLINE),
    }


if __name__ == "__main__":
    main()
