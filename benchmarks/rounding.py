"""Repeated queries, with and without rounded answers: what the last place tells, and what rounding costs.

    python -m benchmarks.rounding [--repeats 256] [--bits 12 10 8] [--model all-MiniLM-L6-v2] [--length 32]

Two experiments, in process.

1. A linear layer, whose answer is one truncation. A client that keeps its own share b of the layer's result x (before
   16 to 14 bits of it are truncated) knows by each answer whether low(x) < low(b): N answers narrow low(x), which no
   answer shows, to about 1/N of a unit. Of a rounded answer the same follows only where the carry decides which
   multiple is the nearest. Reported: of how many outputs anything follows, and the bits of low(x) that do.
2. A sentence encoder, asked the same text again and again: how often an answer differs from the first one, how far
   (in units of 2^-16), and by how much the means of both halves of all answers differ, which says how fine an average
   is. With the rounds and bytes of a query, and the least cosine to the same model's float answers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure
from benchmarks.common import machine
from benchmarks.sentences import sentences
from protocols.circuit import Correlations, deal, execute, prepare
from protocols.local import Truncate
from protocols.prg import KEY_BYTES, Key, fresh_seed
from protocols.protocol import CLIENT, SERVER
from protocols.steps import run_pair
from protocols.weights import ClientWeights, DealerWeights
from secure.cost.traffic import OFFLINE, ONLINE
from secure.models.text import load_text_model, text_inputs

UNIT = 2.0**-16


def key() -> Key:
    return Key(fresh_seed()[:KEY_BYTES])


class Channel:
    """A linear layer of the client's 8 numbers, and the client's view of its answers to one input."""

    def __init__(self, outputs: int, bits: int | None) -> None:
        torch.manual_seed(1)
        layer = nn.Linear(8, outputs).eval().requires_grad_(False)
        samples = [{"input": torch.randn(1, 8).clamp(-3, 3)} for _ in range(40)]
        model = secure.compile(layer, samples[0], calibration=samples, answer_bits=bits).model
        self.program, self.server = model.program, model.server_weights
        self.circuit = self.program.circuit
        self.values = self.program.client_values(samples[0], {})
        self.dealer = DealerWeights(key(), self.program.weight_shapes)
        self.client = ClientWeights(dict(self.server.masked(self.dealer, self.program.weight_rings)))
        (self.truncation,) = (i for i, x in enumerate(self.circuit) if isinstance(x.protocol, Truncate))
        protocol = self.circuit[self.truncation].protocol
        assert isinstance(protocol, Truncate)
        self.dropped = protocol.shift
        (self.before,) = self.circuit[self.truncation].inputs

    def ask(self) -> tuple[Tensor, Tensor]:
        """Return the answer, and the low bits of the client's own share before they are dropped."""
        keys, (reveal,) = (key(), key()), self.program.revealed
        corrections = dict(deal(self.circuit, *keys, self.dealer))
        mine = Correlations(CLIENT, keys[CLIENT])
        prepare(self.circuit, mine, self.client)
        theirs = Correlations(SERVER, keys[SERVER], corrections)
        _, (answer, share) = run_pair(
            execute(self.circuit, [reveal, self.before], SERVER, theirs, self.server),
            execute(self.circuit, [reveal, self.before], CLIENT, mine, self.client, self.values),
        )
        return answer.reshape(-1), (share & ((1 << self.dropped) - 1)).reshape(-1)


def told(outputs: int, bits: int | None, repeats: int) -> dict[str, Any]:
    """Ask a layer again and again, and say what the carries tell.

    The larger of two answers says low(x) >= low(b), the smaller one low(x) < low(b). Where all answers are alike, a
    client that knows x's nearest multiple nowhere near a carry learns nothing; without rounding it learns from each.
    """
    channel = Channel(outputs, bits)
    answers, lows = (torch.stack(found) for found in zip(*(channel.ask() for _ in range(repeats)), strict=True))
    smallest, largest = answers.min(0).values, answers.max(0).values
    low, high = torch.zeros(outputs), torch.full((outputs,), 2.0**channel.dropped)
    for answer, b in zip(answers, lows.to(torch.float32), strict=True):
        above = answer == largest
        low = torch.where(above, torch.maximum(low, b), low)
        high = torch.where(~above, torch.minimum(high, b), high)
    known = channel.dropped - torch.log2((high - low).clamp(min=1))
    changed = smallest != largest
    known = torch.where(changed, known, torch.zeros(()))
    return {
        "answer bits": bits or 16,
        "outputs": outputs,
        "repeats": repeats,
        "outputs that tell": float(changed.double().mean()),
        "bits beyond the answer, each of these": float(known[changed].mean()) if bool(changed.any()) else 0.0,
        "bits beyond the answer, mean of all": float(known.mean()),
    }


def repeated(model: str, length: int, bits: int, repeats: int, texts: int) -> dict[str, Any]:
    """Ask an encoder the same text again and again."""
    loaded = load_text_model(model)
    compiled = secure.compile_text_model(model, length, embedding="client-table", answer_bits=bits)
    asked = sentences(texts)
    with secure.insecure_in_process(compiled) as session:
        found = torch.stack(session.embed(asked, long="truncate"))
        answers = torch.stack([session.embed(asked[:1], long="truncate")[0] for _ in range(repeats)])
    exact = []
    for text in asked:
        assert loaded.tokenizer is not None
        with torch.no_grad():
            exact.append(loaded.module(**text_inputs(loaded.tokenizer, text, length, "truncate"))[0].double())
    first, second = answers[: repeats // 2].mean(0), answers[repeats // 2 :].mean(0)
    same = (answers == answers[0]).all(0)
    return {
        "answer bits": bits,
        "rounds": compiled.cost.rounds,
        "online bytes": compiled.cost.bytes(phase=ONLINE),
        "dealt bytes": compiled.cost.bytes(phase=OFFLINE),
        "least cosine to float": float(F.cosine_similarity(found, torch.stack(exact)).min()),
        "repeats": repeats,
        "differs from another answer": float((answers[1:] != answers[:-1]).double().mean()),
        "deviation of an answer, units": float(answers.std(0).square().mean().sqrt() / UNIT),
        "never changes": float(same.double().mean()),
        "halves differ by, units": float((first - second).square().mean().sqrt() / UNIT),
        "halves differ by, units, of those that change": float(
            (first - second)[~same].square().mean().sqrt() / UNIT if bool((~same).any()) else math.nan
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 12, 10, 8])
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--layer", action="store_true", help="the first experiment alone")
    o = parser.parse_args()
    report: dict[str, Any] = machine("benchmarks.rounding")
    report["layer"] = [told(2048, bits if bits < 16 else None, n) for bits in o.bits for n in (16, o.repeats)]
    if not o.layer:
        report["encoder"] = []
        for bits in o.bits:
            report["encoder"].append(repeated(o.model, o.length, bits, o.repeats, o.texts))
            print(report["encoder"][-1], file=sys.stderr, flush=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
