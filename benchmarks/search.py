"""Private search over the docstrings of installed packages: is the same found as in float, and what does it take?

    python -m benchmarks.search INDEX --make [--passages 10000]     once: an index of text that every machine has
    python -m benchmarks.search INDEX --make --made-up --passages 100000      one of random rows
    python -m benchmarks.search INDEX --questions 200 [--write]     all parties in one process: what is found
    python -m benchmarks.search INDEX --queries 5 [--write]         over loopback: seconds, MB, rounds
    python -m benchmarks.search INDEX --count 1000 100000 [--write] what it adds to the encoder, by counting
    python -m benchmarks.search INDEX --near 8 16 32 [--write]      in float: what is found in so many clusters

``--clusters N`` looks into the N nearest clusters alone, with --questions, --queries and --count.

Documents are docstrings of the standard library and of installed packages, read from their sources. Questions are the
first lines of other docstrings, which are not in the index. ``float`` is the same encoder and the same index in the
clear, both in float32.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secure
from benchmarks.common import RESULTS, Service, dealer, machine
from secure.cost.demand import masked_bytes
from secure.cost.traffic import OFFLINE, ONCE, ONLINE
from secure.models.clusters import cluster_sizes
from secure.models.index import (
    COSINE,
    SEGMENT,
    Index,
    build_index,
    is_index,
    model_digest,
    read_index,
    write_index,
)
from secure.models.passages import Passage, TextDocument, passages_of
from secure.models.searcher import Searcher
from secure.models.settings import PASSAGES, SCORED
from secure.models.text import PACKAGED, TextModel, load_text_model, text_inputs
from secure.models.tokens import TRUNCATE
from secure.tasks.search import QUESTION_LENGTH, TOP

LENGTH, OVERLAP = 128, 16
LEAST = 120  # characters of a docstring that counts
WIDTH = 384  # of MiniLM
EQUAL = 1e-6  # by which scores of equal texts differ in float
QUESTIONS = "questions.json"  # beside the index


def sources() -> Iterator[Path]:
    """The sources of the standard library, then those of installed packages."""
    for kind in ("stdlib", "purelib"):
        root = Path(sysconfig.get_paths()[kind])
        for path in sorted(root.rglob("*.py")):
            apart = {"test", "tests", "site-packages"} & set(path.relative_to(root).parts)
            if not apart and path.stat().st_size < 1 << 20:
                yield path


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The names and docstrings in a source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= LEAST:
                yield f"{path.parent.name}/{path.stem}:{getattr(node, 'name', '')}", text


def texts(wanted: int, questions: int) -> tuple[list[TextDocument], list[str]]:
    """Documents for about so many passages, and questions: every 20th docstring gives one, and is no document."""
    documents, asked, seen, size = list[TextDocument](), list[str](), set[str](), 0
    for path in sources():
        for name, text in docstrings(path):
            if text in seen:
                continue
            seen.add(text)
            first = text.split("\n\n")[0].replace("\n", " ").strip()
            if len(seen) % 20 == 0 and 30 < len(first) < 120:
                asked.append(first)
                continue
            documents.append(TextDocument(f"{name[:150]}#{len(documents)}", text))
            size += 1 + len(text) // 380
        if size >= 1.3 * wanted:
            break
    return documents, asked[:: max(1, len(asked) // questions)][:questions]


def make(where: Path, passages: int, questions: int) -> None:
    """Make an index of exactly so many passages."""
    documents, asked = texts(passages, questions)
    loaded = load_text_model(PACKAGED)
    chosen, found = list[TextDocument](), 0
    for document in documents:  # those that still fit
        more = len(passages_of(document, loaded.tokenizer, LENGTH, OVERLAP))
        if found + more <= passages:
            chosen.append(document)
            found += more
        if found == passages:
            break
    index, _ = build_index(PACKAGED, loaded, chosen, length=LENGTH, overlap=OVERLAP)
    write_index(index, where)
    (where / QUESTIONS).write_text(json.dumps(asked))
    print(f"{len(index.passages)} passages of {len(chosen)} docstrings, {len(asked)} questions in {where}")


def vectors(text: TextModel, questions: list[str]) -> Tensor:
    """The questions' embeddings in float, of length 1: (questions, width)."""
    rows = []
    with torch.no_grad():
        for question in questions:
            inputs = text_inputs(text.tokenizer, question, QUESTION_LENGTH, TRUNCATE)
            rows.append(text.module(**inputs)[0])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def agreement(where: Path, count: int, clusters: int) -> dict[str, Any]:
    """How often the same passages are found as in float, which looks into as many clusters."""
    index, text = read_index(where, PACKAGED), load_text_model(PACKAGED)
    questions = json.loads((where / QUESTIONS).read_text())[:count]
    asked = vectors(text, questions)
    scores = asked @ index.embeddings.T
    if clusters:
        scores = torch.where(inside_of(index, asked, clusters), scores, -torch.inf)
    rows = {(each.id, each.number): row for row, each in enumerate(index.passages)}
    compiled = secure.compile_text_model(
        PACKAGED, QUESTION_LENGTH, index=str(where), reveal="ids-scores", clusters=clusters
    )
    same, strictly, ordered, first, distances, errors = 0, 0, 0, 0, list[float](), list[float]()
    with secure.insecure_in_process(compiled, threads=os.cpu_count() or 1) as session:
        for own, question in zip(scores, questions, strict=True):
            (found,) = session.search([question], long=TRUNCATE)
            chosen = [rows[each["id"], each["passage"]] for each in found]
            best = own.topk(TOP)
            strictly += {*chosen} == {*best.indices.tolist()}
            same += all(float(own[row]) >= float(best.values[-1]) - EQUAL for row in chosen)
            ordered += chosen == best.indices.tolist()
            first += chosen[0] == int(best.indices[0])
            distances += [
                float(best.values[-1] - own[row]) for row in chosen if float(own[row]) < float(best.values[-1])
            ]
            errors += [abs(each["score"] - float(own[row])) for each, row in zip(found, chosen, strict=True)]
    return {
        "passages": len(index.passages),
        **({"clusters": clusters} if clusters else {}),
        "questions": len(questions),
        f"same top {TOP}, or of equal scores": same,
        f"same top {TOP}": strictly,
        "same order": ordered,
        "same first": first,
        "largest distance of a passage that float does not find": round(max(distances, default=0.0), 6),
        "error of scores": {"median": round(statistics.median(errors), 6), "largest": round(max(errors), 6)},
    }


def inside_of(index: Index, asked: Tensor, clusters: int) -> Tensor:
    """Which rows are in the clusters that are nearest to questions, in float: (questions, rows)."""
    sizes = [size for segment in index.segments for size in cluster_sizes(segment)]
    means = torch.stack([torch.nn.functional.normalize(rows.mean(0), dim=0) for rows in index.embeddings.split(sizes)])
    near = (asked @ means.T).topk(clusters).indices
    of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return (of[None, :, None] == near[:, None]).any(-1)


def inside(where: Path, clusters: Sequence[int]) -> dict[str, Any]:
    """How much of what is found among all passages is found in the nearest clusters, in float."""
    index, text = read_index(where, PACKAGED), load_text_model(PACKAGED)
    questions = json.loads((where / QUESTIONS).read_text())
    asked = vectors(text, questions)
    best = (asked @ index.embeddings.T).topk(TOP).indices
    there = sum(len(cluster_sizes(segment)) for segment in index.segments)
    found = {}
    for many in clusters:
        seen = inside_of(index, asked, many).gather(1, best)
        found[str(many)] = {
            "of all clusters": round(many / there, 3),
            f"of the {TOP} best": round(float(seen.float().mean()), 3),
            "all of them": round(float(seen.all(-1).float().mean()), 3),
            "the first": round(float(seen[:, 0].float().mean()), 3),
        }
    return {"passages": len(index.passages), "clusters": there, "questions": len(questions), "found in": found}


def over_loopback(where: Path, count: int, reveal: str, clusters: int) -> dict[str, Any]:
    """Seconds, bytes and rounds of queries, with client, server and dealer as processes of their own."""
    questions = json.loads((where / QUESTIONS).read_text())[: count + 1]
    with tempfile.TemporaryDirectory() as space:
        directory = Path(space) / "compiled"
        secure.save_compiled(
            secure.compile_text_model(PACKAGED, QUESTION_LENGTH, index=str(where), reveal=reveal, clusters=clusters),
            directory,
        )
        dealing = dealer()
        serving = Service(
            "parties.cli", "serve", str(directory), "--listen", "127.0.0.1:0", "--dealer", dealing.address,
            "--same-owner", "--announce", "--state", space,
        )  # fmt: skip
        try:
            at = secure.TwoParty(server=serving.address, dealer=dealing.address)
            with secure.connect(at, pace=0.0, cache=False) as session:
                once = sum(traffic.bytes for traffic in session.once)
                for question in questions:
                    session.search([question], long=TRUNCATE)
                reports = session.reports[1:]  # the first one warms up
        finally:
            serving.stop()
            dealing.stop()

    def median(name: str) -> float:
        return round(float(statistics.median(getattr(report, name) for report in reports)), 3)

    moved = {phase: reports[0].bytes(phase=phase) for phase in (ONLINE, OFFLINE)}
    return {
        "passages": len(read_index(where).passages),
        **({"clusters": clusters} if clusters else {}),
        "reveal": reveal,
        "queries": len(reports),
        "tokens": QUESTION_LENGTH,
        "rounds": reports[0].rounds,
        "online MB": round(moved[ONLINE] / 1e6, 2),
        "offline MB": round(moved[OFFLINE] / 1e6, 2),
        f"{ONCE} MB": round(once / 1e6, 1),
        **{f"{phase} s": median(f"{phase}_seconds") for phase in ("online", "offline", "client", "dealer")},
        "peak MB": {"server": round(serving.peak), "dealer": round(dealing.peak)},
    }


def made_up(rows: int) -> Index:
    """An index of random rows, whose records are as wide as those of real passages."""
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(rows, WIDTH), dim=-1)
    passages = [Passage(f"document {i:>9}", 0, 0, 500, "word " * 100) for i in range(rows)]
    sizes = [SEGMENT] * (rows // SEGMENT) + [rows % SEGMENT] * (rows % SEGMENT > 0)
    digest, documents = model_digest(PACKAGED), ["0" * 64] * rows
    return Index("made-up", digest, "0" * 64, LENGTH, OVERLAP, "", COSINE, passages, documents, sizes, vectors)


class StandIn(nn.Module):
    """An encoder of one layer, whose vectors have length 1: it costs next to nothing."""

    normalized = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.layer(input_ids * attention_mask), dim=-1)


def parts(cost: Any) -> dict[str, float]:
    moved = {phase: sum(t.bytes for t in cost.traffic if t.phase == phase) for phase in (ONLINE, OFFLINE)}
    return {"rounds": cost.rounds, **{f"{phase} MB": size / 1e6 for phase, size in moved.items()}}


def counted(rows: int, reveal: str, clusters: int) -> dict[str, Any]:
    """The rounds and bytes that a search adds to its encoder, by the Program, without running it."""
    texts, scored = reveal.startswith(PASSAGES), reveal in SCORED
    stand_in = StandIn().eval()
    options: dict[str, Any] = {"top": TOP, "texts": texts, "scores": scored, "clusters": clusters}
    searcher = Searcher(stand_in, made_up(rows), **options).eval()  # type: ignore[arg-type]
    samples = [{"input_ids": torch.randn(1, 8), "attention_mask": torch.ones(1, 8)} for _ in range(2)]
    whole, alone = (secure.compile(module, samples[0], calibration=samples[1:]) for module in (searcher, stand_in))
    added = {name: each - parts(alone.cost)[name] for name, each in parts(whole.cost).items()}
    once = (masked_bytes(whole.program) - masked_bytes(alone.program)) / 1e6
    return {
        "reveal": reveal,
        "top": TOP,
        **({"clusters": clusters} if clusters else {}),
        "bytes of a record": 2 * next(iter(searcher.records.values())).shape[1],
        **{name: round(each, 2) for name, each in {**added, f"{ONCE} MB": once}.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--made-up", action="store_true")
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--queries", type=int, default=0)
    parser.add_argument("--count", type=int, nargs="*", default=[])
    parser.add_argument("--clusters", type=int, default=0)
    parser.add_argument("--near", type=int, nargs="*", default=[])
    parser.add_argument("--reveal", default="passages")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/search.json")
    o = parser.parse_args()
    found: dict[str, Any] = {}
    if o.make and o.made_up:
        write_index(made_up(o.passages), o.index)
        (o.index / QUESTIONS).write_text(json.dumps(["How do I return an item?"] * (o.questions or 20)))
        return
    if o.make:
        make(o.index, o.passages, o.questions or 200)
        return
    if (o.questions or o.queries or o.near) and not is_index(o.index):
        parser.error("no index there: --make makes one")
    within = f", {o.clusters} clusters" if o.clusters else ""
    if o.questions:
        found[f"agreement{within}"] = agreement(o.index, o.questions, o.clusters)
    if o.queries:
        found[f"loopback, {len(read_index(o.index).passages)}, {o.reveal}{within}"] = over_loopback(
            o.index, o.queries, o.reveal, o.clusters
        )
    for rows in o.count:
        found[f"counted {rows}, {o.reveal}{within}"] = counted(rows, o.reveal, o.clusters)
    if o.near:
        found["clusters"] = inside(o.index, o.near)
    found = {name: {**machine("benchmarks.search"), **each} for name, each in found.items()}
    print(json.dumps(found, indent=2))
    if o.write:
        file = RESULTS / "search.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(kept | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
