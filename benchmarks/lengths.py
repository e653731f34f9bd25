"""A server of several lengths: its start from a compiled directory, its memory, and a text of each length.

    python -m benchmarks.lengths [--lengths 16 32 64 96 128 256] [--starts 3] [--write]

Dealer, server and client are processes of their own on this machine. The model is compiled once; then the server is
started several times. The last one answers a text of each length, which is compared with the plain model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import RESULTS, Service
from benchmarks.throughput import resident
from secure.models.sentence_encoder import load_sentence_encoder
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import PACKAGED, model_directory, text_inputs

CLI = [sys.executable, "-P", "-m", "parties.cli"]


def measured(lengths: list[int], starts: int) -> dict[str, Any]:
    """Compile, start the server ``starts`` times, and ask the last one."""
    options = [word for length in lengths for word in ("--length", str(length))]
    with tempfile.TemporaryDirectory() as place:
        directory, began = Path(place) / "compiled", time.perf_counter()
        common.run([*CLI, "compile", PACKAGED, str(directory), *options, "--embedding", "client-table"])
        found: dict[str, Any] = {"compile s": round(time.perf_counter() - began, 1), "start s": [], "MB": []}
        found["files MB"] = round(sum(file.stat().st_size for file in directory.iterdir()) / 1e6, 1)
        dealer = common.dealer()
        for _ in range(starts):
            where = ["--dealer", dealer.address, "--listen", "127.0.0.1:0", "--same-owner", "--announce"]
            began = time.perf_counter()
            server = Service("parties.cli", "serve", str(directory), *where)
            found["start s"].append(round(time.perf_counter() - began, 2))
            found["MB"].append(round(resident(server.pid)))
            if len(found["MB"]) == starts:
                found["texts"] = asked(lengths, server, dealer)
                found["MB after all lengths"] = round(resident(server.pid))
            server.stop()
        found["peak MB"] = round(server.peak)
        dealer.stop()
    return found


def asked(lengths: list[int], server: Service, dealer: Service) -> list[dict[str, Any]]:
    """A text for each length: online seconds, rounds, and the cosine to the plain model."""
    texts = ["word " * (length - 4) for length in lengths]
    command = [*CLI, "embed", *texts, "--server", server.address, "--dealer", dealer.address, "--json"]
    answers = json.loads(common.run(command)[0])
    encoder, tokenizer = load_sentence_encoder(model_directory(PACKAGED)), load_tokenizer(model_directory(PACKAGED))
    rows = []
    for length, text, answer in zip(lengths, texts, answers, strict=True):
        with torch.no_grad():
            plain = encoder.double()(**text_inputs(tokenizer, text, length))[0]
        cosine = torch.nn.functional.cosine_similarity(torch.tensor(answer["embedding"]).double(), plain, dim=0)
        rows.append({"length": length, "cosine": round(float(cosine), 7), **report(answer)})
    return rows


def report(answer: dict[str, Any]) -> dict[str, Any]:
    """What `unseen embed --json` says of a text's query."""
    said = answer.get("report", answer)
    return {name: said[name] for name in ("length", "rounds", "online_seconds") if name in said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 96, 128, 256])
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write a results file")
    o = parser.parse_args()
    found = {"machine": common.machine("benchmarks.lengths"), "model": PACKAGED, **measured(o.lengths, o.starts)}
    text = json.dumps(found, indent=2)
    print(text)
    if o.write:
        (RESULTS / "lengths.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
