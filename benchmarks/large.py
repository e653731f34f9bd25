"""Large models on a small machine: a LLaMA of random weights on disk, 8 tokens in, one out, from three parties.

    python -m benchmarks.large DIRECTORY [--layers 32] [--hidden 4096] [--intermediate 11008] [--heads 32]
        [--vocabulary 32000] [--prompt 8] [--runs 1] [--threads 1] [--within] [--keep] [--write]

Weights are public to the parties (--public-weights), inputs and the token are not. Each stage is a process of its own:
one writes the checkpoint (float16, sharded safetensors), one compiles it and writes the shares, three are the parties,
and this one is the client. The first query warms the system's cache; --runs more are timed. --within: party 2 deals
within the query, not ahead of it. DIRECTORY takes about four bytes a weight, which are removed at the end without
--keep; what is there already is used again.

Figures: seconds of each stage; online seconds (the client's) with and without dealing; rounds and bytes; for each
process the most memory of its own (anonymous), and what it has mapped of the weights. --write adds them to results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

import secure
from benchmarks import common, three_party
from parties.services import hosting
from parties.three_party.shared_model import share_model
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.three_party import CLIENT, PARTIES, ThreeParty

RESULTS = common.RESULTS / "large.json"
SHARD = 1 << 30  # bytes of one file of weights
TEXT_SEED, WEIGHT_SEED = 7, 11
_OUTLIER = 1000
_PART = 1 << 20  # weights that are drawn at a time
SPREAD = 0.02  # standard deviation of a trained model's matrices, about
DEADLINE = 600.0
POLL = 0.2  # seconds between two looks at the processes' memory
PUMA = {"seconds": 200.5, "bytes": 1.794e9, "machines": "three, of 128 threads and 1 TB each, without a KV cache"}


def configuration(o: argparse.Namespace) -> dict[str, Any]:
    """The model's configuration, as transformers reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": o.hidden,
        "intermediate_size": o.intermediate,
        "num_hidden_layers": o.layers,
        "num_attention_heads": o.heads,
        "num_key_value_heads": o.heads,
        "vocab_size": o.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tensors(o: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights."""
    yield "model.embed_tokens.weight", (o.vocabulary, o.hidden)
    for n in range(o.layers):
        layer = f"model.layers.{n}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{layer}self_attn.{name}.weight", (o.hidden, o.hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"{layer}mlp.{name}.weight", (o.intermediate, o.hidden)
        yield f"{layer}mlp.down_proj.weight", (o.hidden, o.intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{name}.weight", (o.hidden,)
    yield "model.norm.weight", (o.hidden,)
    yield "lm_head.weight", (o.vocabulary, o.hidden)


def write_checkpoint(o: argparse.Namespace, directory: Path) -> None:
    """Write the configuration and the weights, a tensor at a time.

    Matrices are uniform with the spread of a trained model; those that add to the residual stream are divided by
    sqrt(2 layers), as GPT-2 initializes them, so that activations keep their size through the layers. Norms are one.
    """
    from secure.capture.tensor_files import write_tensors

    directory.mkdir(parents=True, exist_ok=True)
    generator, shards, size = np.random.default_rng(WEIGHT_SEED), list[dict[str, tuple[int, ...]]]([{}]), 0
    for name, shape in tensors(o):
        more = 2 * math.prod(shape)
        if size + more > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += more

    def made(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.float16)
        spread = SPREAD
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            spread /= math.sqrt(2 * o.layers)
        out, width = np.empty(math.prod(shape), np.float16), spread * math.sqrt(3) / (1 << 15)
        for start in range(0, out.size, _PART):  # uniform ones are cheap, and have the same spread
            part = out[start : start + _PART]
            part[:] = np.frombuffer(generator.bytes(2 * part.size), np.int16) * np.float32(width)
            part[::_OUTLIER] *= 8  # as trained ones have, which decide how many bits a matrix takes
        return torch.from_numpy(out).reshape(shape)

    places = dict[str, str]()
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as out:
            write_tensors(out, list(shard), ((name, made(name, shape)) for name, shape in shard.items()))
    index = {"metadata": {"total_size": sum(2 * math.prod(s) for _, s in tensors(o))}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(configuration(o)))  # last: the directory is whole


def compile_and_share(o: argparse.Namespace, model: Path, shares: Path) -> dict[str, Any]:
    """Compile for a prompt and steps, and write the three parties' shares."""
    from secure.models.checkpoints import load_checkpoint

    times, start = dict[str, Any](), time.perf_counter()
    loaded = load_checkpoint(model, "AutoModelForCausalLM")
    times["load s"] = round(time.perf_counter() - start, 1)
    text = prompt(o, o.prompt + 1)

    def told(done: int, of: int, what: str) -> None:
        print(f"{time.perf_counter() - start:8.1f} s: {what} {done}/{of}", file=sys.stderr, flush=True)

    compiled = secure.compile_generator(
        loaded,
        prompt=o.prompt,
        capacity=o.prompt + 1,
        calibration=[text],
        deployment=ThreeParty(public_weights=True),
        told=told,
    )
    times["compile s"] = round(time.perf_counter() - start - times["load s"], 1)
    share_model(compiled, shares)
    times["share s"] = round(time.perf_counter() - start - times["load s"] - times["compile s"], 1)
    times["peak MB"] = round(common.peak())
    return times


def prompt(o: argparse.Namespace, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(TEXT_SEED)
    return [1, *torch.randint(3, o.vocabulary, (length - 1,), generator=generator).tolist()]


def memory(pid: int | str) -> dict[str, float]:
    """A process's memory now, in MB: of its own, and of files that it has mapped."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[0].startswith("Rss")}
    return {"own": found.get("RssAnon", 0.0) + found.get("RssShmem", 0.0), "mapped": found.get("RssFile", 0.0)}


class Watched:
    """The most memory of several processes, looked at while a ``with`` block lasts."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids, self._done = pids, threading.Event()
        self.most = {name: {"own MB": 0.0, "mapped MB": 0.0} for name in pids}
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._done.wait(POLL):
            for name, pid in self._pids.items():
                now, most = memory(pid), self.most[name]
                most["own MB"] = max(most["own MB"], round(now["own"]))
                most["mapped MB"] = max(most["mapped MB"], round(now["mapped"]))

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure(o: argparse.Namespace, shares: Path) -> dict[str, Any]:
    """Start the parties, ask once for a warm-up and ``runs`` times more, and say what it took."""
    start = time.perf_counter()
    with ExitStack() as stack:
        running = stack.enter_context(three_party.parties(shares, int(not o.within), o.threads))
        pids = {name: party.pid for name, party in zip(PARTIES, running, strict=True)}
        watched = stack.enter_context(Watched({**pids, CLIENT: os.getpid()}))
        at = tuple(party.address for party in running)
        session = stack.enter_context(secure.connect(ThreeParty(parties=at), cache=False, deadline=DEADLINE, pace=0.0))
        started, given, each, tokens = time.perf_counter() - start, prompt(o, o.prompt), list[float](), list[int]()
        for number in range(1 + o.runs):
            begin = time.perf_counter()
            tokens = list(session.generate(given, 1, ignore_end=True))
            seconds = time.perf_counter() - begin
            print(f"query {number}: {seconds:.2f} s, the token {tokens}", file=sys.stderr, flush=True)
            each.append(seconds)
        report = session.reports[-1]
        moved = {f"{t.sender} to {t.receiver}, {t.phase}": t.bytes for t in report.traffic}
        return {
            "start s": round(started, 1),
            "first query s": round(each[0], 2),
            "each s": [round(s, 2) for s in each[1:]],
            "s": round(statistics.median(each[1:] or each), 2),
            "online s of the report": round(report.online_seconds, 2),
            "dealing s of the report": round(report.dealer_seconds, 2),
            "rounds": report.rounds,
            "online bytes": report.bytes(phase=ONLINE),
            "offline bytes": report.bytes(phase=OFFLINE),
            "traffic": moved,
            "token": tokens,
            "memory": watched.most,
        }


def expected(o: argparse.Namespace, model: Path) -> int:
    """The token that floating point chooses after the prompt, computed a layer at a time."""
    from secure.capture.capture import capture
    from secure.capture.graph import run
    from secure.models.checkpoints import load_checkpoint
    from secure.models.decoder import Decoder, prompt_inputs

    inputs = prompt_inputs(prompt(o, o.prompt), o.prompt)
    graph, parameters = capture(Decoder(load_checkpoint(model, "AutoModelForCausalLM")), inputs)
    (found,) = run(graph, inputs, parameters)
    return int(found)


def stage(o: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run a stage of this script as a process; what it prints, and its seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.large", *sys.argv[1:], "--stage", name]
    output, peak = common.run(command)
    return {**json.loads(output or b"{}"), "s": round(time.perf_counter() - start, 1), "peak MB": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for name, value in (
        ("layers", 32),
        ("hidden", 4096),
        ("intermediate", 11008),
        ("heads", 32),
        ("vocabulary", 32000),
        ("prompt", 8),
        ("runs", 1),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--within", action="store_true", help="party 2 deals within the query")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and shares where they are")
    parser.add_argument("--check", action="store_true", help="compare the token with that of floating point")
    parser.add_argument("--write", action="store_true", help=f"add the figures to {RESULTS.name}")
    parser.add_argument("--stage", choices=("checkpoint", "share", "expected"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    hosting.settle()
    model, shares = o.directory / "checkpoint", o.directory / "shares"
    if o.stage == "checkpoint":
        write_checkpoint(o, model)
        return
    if o.stage == "share":
        print(json.dumps(compile_and_share(o, model, shares)))
        return
    if o.stage == "expected":
        print(json.dumps({"token": expected(o, model)}))
        return
    row: dict[str, Any] = {"weights": sum(math.prod(shape) for _, shape in tensors(o)), "load": os.getloadavg()[0]}
    try:
        if not (model / "config.json").is_file():
            row["checkpoint"] = stage(o, "checkpoint")
        elif json.loads((model / "config.json").read_text()) != configuration(o):
            raise SystemExit(f"{model} is another model: give another directory")
        if not (shares / "party-2" / "manifest.json").is_file():
            row["share"] = stage(o, "share")
        row |= measure(o, shares)
        if o.check:
            row["expected"] = stage(o, "expected")
    finally:
        if not o.keep:
            for each in (model, shares):
                shutil.rmtree(each, ignore_errors=True)
    shape = f"{o.layers} layers of {o.hidden}, {o.intermediate}; {o.heads} heads; vocabulary {o.vocabulary}"
    print(json.dumps({shape: row}, indent=2))
    if o.write:
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"published by PUMA, LLaMA-7B": PUMA}
        results |= {"machine": common.machine("benchmarks.large"), shape: row}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
