"""The output of commands that ask: answers, what each took, who learnt what. It is the same for every deployment."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from parties.reports.who_learns import who_learns
from secure.cost.traffic import OFFLINE, ONCE, ONLINE, in_words
from secure.deployments.deployment import Deployment
from secure.models.text import load_text_model
from secure.session.link import Report
from secure.session.session import Session
from secure.tasks.embed import Embed
from secure.tasks.task import Served


def as_json(out: Console, texts: Sequence[str], vectors: Sequence[Tensor], taken: Sequence[Report]) -> None:
    """One row a text, with the same keys in every deployment: text, embedding, and those of ``Report.as_dict``.

    ``taken``: the report of each text's query, which other texts may share.
    """
    rows = [
        {"text": text, "embedding": vector.tolist(), **report.as_dict()}
        for text, vector, report in zip(texts, vectors, taken, strict=True)
    ]
    out.file.write(json.dumps(rows) + "\n")


def answers_as_json(
    out: Console, texts: Sequence[str], answers: Sequence[Any], taken: Sequence[Report], order: Sequence[int]
) -> None:
    """One row a text, as ``as_json``, with the key "answer": whatever its task makes of it. order: of the rows."""
    rows = [{"text": texts[i], "answer": answers[i], **taken[i].as_dict()} for i in order]
    out.file.write(json.dumps(rows) + "\n")


def report_answers(
    out: Console,
    deployment: Deployment,
    session: Session,
    texts: Sequence[str],
    answers: Sequence[Any],
    taken: Sequence[Report],
    words: Callable[[Any], Sequence[str]],
    order: Sequence[int],
) -> None:
    """Every text with its answer in words, and as ``report``. order: of the texts."""
    last = {id(taken[i]): i for i in order}
    for i in order:
        out.print(f"\n{texts[i]!r}", markup=False, style="bold", soft_wrap=True)
        for line in words(answers[i]):
            out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        if last[id(taken[i])] == i:
            for line in lines(taken[i]):
                out.print(f"  {line}", soft_wrap=True)
    _around(out, deployment, session)


def _around(out: Console, deployment: Deployment, session: Session) -> None:
    """Say what crossed once, remarks, and who learnt what."""
    out.print(f"\nonce: {in_words(session.once, ONCE) or 'nothing'}", soft_wrap=True)
    for line in deployment.remarks(session.program):
        out.print(line, markup=False, soft_wrap=True)
    out.print(who_learns(deployment, token_table=bool(session.link.tables)))


def report(
    out: Console,
    deployment: Deployment,
    session: Session,
    texts: Sequence[str],
    vectors: Sequence[Tensor],
    taken: Sequence[Report],
    task: Embed,
    compare_with: str | None,
) -> None:
    """Every text with its answer, cosines, what crossed once, remarks, and the table of who learnt what.

    ``taken``: the report of each text's query, which is said once, below the last of its texts.
    """
    last = {id(each): i for i, each in enumerate(taken)}
    exact = plain(compare_with, texts, session.length, task) if compare_with else [None] * len(texts)
    for i, (text, vector, reference) in enumerate(zip(texts, vectors, exact, strict=True)):
        out.print(f"\n{text!r}", markup=False, style="bold", soft_wrap=True)
        if reference is not None:
            cosine = torch.nn.functional.cosine_similarity(vector, reference, dim=0)
            out.print(f"  cosine to the plaintext model   {cosine:.7f}")
        first = " ".join(f"{v:+.4f}" for v in vector[:4].tolist())
        out.print(f"  embedding ({len(vector)} numbers)         {first} …")
        if last[id(taken[i])] == i:
            for line in lines(taken[i]):
                out.print(f"  {line}", soft_wrap=True)
    if len(vectors) > 1:
        out.print("\ncosine similarities between the texts:")
        unit = torch.nn.functional.normalize(torch.stack(list(vectors)), dim=-1)
        for i, row in enumerate(unit @ unit.T):
            out.print("  " + " ".join(f"{v:7.3f}" for v in row.tolist()) + f"   {texts[i][:40]!r}", markup=False)
    _around(out, deployment, session)


def lines(taken: Report) -> list[str]:
    """Say what one query took, for people: a line a phase."""
    padded = f", padded to {taken.length} tokens" if taken.length else ""
    online = f"{taken.rounds} rounds, {in_words(taken.traffic, ONLINE)}{padded}"
    out = [f"online    {taken.online_seconds:6.2f} s   {online}"]
    offline = in_words(taken.traffic, OFFLINE)
    if offline or taken.offline_seconds:
        dealt = f"; {taken.dealer_seconds:.2f} s of dealing" if taken.dealer_seconds else ""
        out.append(f"offline   {taken.offline_seconds:6.2f} s   {offline or 'nothing'}{dealt}")
    out.append(f"of both   {taken.client_seconds:6.2f} s   of computing at this client")
    return out


def plain(model: str, texts: Sequence[str], length: int, task: Embed) -> list[Tensor]:
    """The answers of a model that runs here, in the clear."""
    found = load_text_model(model)
    encoder, served = found.module.double(), Served(found.tokenizer, length, found.normalized, found.prompts)
    out = []
    with torch.no_grad():
        for text in texts:
            pieces = task.pieces(text, served)
            out.append(task.joined([encoder(**piece)[0] for piece in pieces], pieces, text, served))
    return out
