"""A classifier of film reviews (SST-2), served by ``unseen serve``: labels, and nothing else, as the float model's.

    python -m benchmarks.sst2 TRAIN TEST [--texts 500] [--sentences 6920] [--lengths 32 64] [--batch 4] [--output FILE]

TRAIN, TEST: files of one sentence a line, behind its label 0 or 1 and a space, as ``stsa.binary.train`` has them. The
model is the packaged MiniLM with the head of ``BertForSequenceClassification`` (dense, tanh, linear), which is trained
here on the frozen first token's states, and saved as transformers saves models. Server and dealer are processes of
``unseen``; the client asks for the labels of the first TEST sentences that fit. Sentences of more tokens are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import secure
from benchmarks import common
from secure.models.pairs import encode
from secure.models.sentence_encoder import find_packaged_model
from secure.models.served_tokenizer import load_tokenizer
from secure.tasks.classify import Classify

LABELS = ("negative", "positive")
EPOCHS, TOGETHER, TRAINED = 40, 64, 32  # TRAINED: tokens of a sentence that the head is trained on
DEADLINE = 600.0


def read(path: Path) -> tuple[list[str], Tensor]:
    """The sentences of a file, and their labels."""
    lines = [line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [text for _, text in lines], torch.tensor([int(label) for label, _ in lines])


def batches(texts: Sequence[str], directory: Path, length: int) -> list[dict[str, Tensor]]:
    """The inputs of texts, TOGETHER at a time, cut to a length."""
    tokenizer, out = load_tokenizer(directory), []
    for first in range(0, len(texts), TOGETHER):
        rows = [encode(tokenizer, text, None, length, "truncate")[0] for text in texts[first : first + TOGETHER]]
        made = [row.inputs(segments=True) for row in rows]
        out.append({name: torch.cat([each[name] for each in made]) for name in made[0]})
    return out


def trained(texts: Sequence[str], labels: Tensor, directory: Path) -> None:
    """Write MiniLM with a head that is trained on sentences; its encoder stays as it is."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    found = find_packaged_model()
    names: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification.from_pretrained(found, num_labels=len(LABELS), **names).eval()
    with torch.no_grad():
        states = torch.cat([model.bert(**each).last_hidden_state[:, 0] for each in batches(texts, found, TRAINED)])
    dense, head = model.bert.pooler.dense, model.classifier
    optimizer = torch.optim.AdamW([*dense.parameters(), *head.parameters()], lr=1e-3, weight_decay=1e-2)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels)).split(TOGETHER):
            optimizer.zero_grad()
            F.cross_entropy(head(torch.tanh(dense(states[chosen]))), labels[chosen]).backward()
            optimizer.step()
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(found).save_pretrained(directory)


def float_labels(texts: Sequence[str], directory: Path, length: int) -> tuple[Tensor, Tensor]:
    """The labels that the float model gives, and by how much its logits differ."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = torch.cat([model(**each).logits for each in batches(texts, directory, length)])
    return logits.argmax(-1), (logits[:, 1] - logits[:, 0]).abs()


def private_labels(
    texts: Sequence[str], directory: Path, options: argparse.Namespace
) -> tuple[list[str], dict[str, Any]]:
    """The labels that services give, and what each text took."""
    with tempfile.TemporaryDirectory() as state:
        dealer = common.Service("parties.cli", "dealer", "--listen", "127.0.0.1:0", "--announce", "--state", state)
        sizes = [word for length in options.lengths for word in ("--length", str(length))]
        serving = ["serve", str(directory), *sizes, "--batch", str(options.batch), "--reveal", "label", "--no-keep"]
        at = ["--listen", "127.0.0.1:0", "--dealer", dealer.address, "--announce", "--same-owner", "--state", state]
        key = ["--dealer-key", str(Path(state) / "dealer.pub")]
        server = common.Service("parties.cli", *serving, *at, *key)
        try:
            deployment = secure.TwoParty(server=server.address, dealer=dealer.address, dealer_key=key[1])
            with secure.connect(deployment, deadline=DEADLINE, cache=False) as session:
                list(session.stream(Classify(), texts[: 2 * options.batch]))  # kernels, and memory
                warm, start, found = len(session.reports), time.perf_counter(), []
                for number, answer in enumerate(session.stream(Classify(), texts), 1):
                    if isinstance(answer, secure.Error):
                        raise SystemExit(f"text {number}: {answer}")
                    found.append(answer["label"])
                    if number % 100 == 0:
                        print(f"{number} texts", flush=True)
                seconds, reports = time.perf_counter() - start, session.reports[warm:]
        finally:
            server.stop()
            dealer.stop()
    megabytes = [report.bytes() / 1e6 for report in reports]
    return found, {
        "queries": len(reports),
        "seconds a text": round(seconds / len(texts), 3),
        "MB a text": round(sum(megabytes) / len(texts), 2),
        "rounds a query": statistics.median(report.rounds for report in reports),
        "peak MB": {"server": round(server.peak), "dealer": round(dealer.peak)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--sentences", type=int, default=6920, help="So many of TRAIN are used.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "sst2.json")
    options = parser.parse_args()
    longest = max(options.lengths)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "sst2-minilm"
        texts, labels = read(options.train)
        trained(texts[: options.sentences], labels[: options.sentences], directory)
        texts, labels = read(options.test)
        tokenizer = load_tokenizer(directory).tokenizer
        fitting = [i for i, text in enumerate(texts) if len(tokenizer.encode(text).ids) <= longest][: options.texts]
        texts, labels = [texts[i] for i in fitting], labels[fitting]
        exact, apart = float_labels(texts, directory, longest)
        right = float((exact == labels).double().mean())
        print(f"{len(texts)} texts; the float model is right on {right:.4f}", flush=True)
        found, took = private_labels(texts, directory, options)
    ours = torch.tensor([LABELS.index(label) for label in found])
    other = (ours != exact).nonzero().flatten().tolist()
    document = {
        "machine": common.machine("benchmarks.sst2"),
        "texts": len(texts),
        "sentences trained on": options.sentences,
        "lengths": options.lengths,
        "batch": options.batch,
        "same label as float": float((ours == exact).double().mean()),
        "logits of the others differ by": [round(float(apart[i]), 4) for i in other],
        "right, float": right,
        "right, private": float((ours == labels).double().mean()),
        **took,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
