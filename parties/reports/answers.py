"""What ``unseen embed`` prints: answers, what each took, and who learnt what."""

from __future__ import annotations

import json

import torch
from rich.console import Console
from rich.table import Table

from parties.reports.tables import mb
from parties.two_party.client import Connection
from secure.models.text import model_directory, text_inputs
from secure.models.tokens import load_tokenizer


def as_json(out: Console, texts: list[str], vectors: list[torch.Tensor], connection: Connection) -> None:
    rows = [
        {
            "text": text,
            "embedding": vector.tolist(),
            "rounds": r.cost.rounds,
            "bytes_to_server": r.cost.to_first,
            "bytes_to_client": r.cost.to_second,
            "offline_bytes_to_server": r.cost.dealt,
            "offline_bytes_to_client": r.offline_to_client,
            "online_seconds": r.online_seconds,
            "offline_seconds": r.offline_seconds,
        }
        for text, vector, r in zip(texts, vectors, connection.reports, strict=True)
    ]
    out.file.write(json.dumps(rows) + "\n")


def report(
    out: Console, texts: list[str], vectors: list[torch.Tensor], connection: Connection, compare_with: str | None
) -> None:
    program = connection.program
    exact = plain(compare_with, texts, connection.length) if compare_with else [None] * len(texts)
    for text, vector, reference, r in zip(texts, vectors, exact, connection.reports, strict=True):
        out.print(f"\n{text!r}", markup=False, style="bold")
        if reference is not None:
            cosine = torch.nn.functional.cosine_similarity(vector, reference, dim=0)
            out.print(f"  cosine to the plaintext model   {cosine:.7f}")
        first = " ".join(f"{v:+.4f}" for v in vector[:4].tolist())
        out.print(f"  embedding ({len(vector)} numbers)         {first} …")
        out.print(
            f"  online    {r.online_seconds:6.2f} s   {r.cost.rounds} rounds, {mb(r.cost.to_first)} to the server, "
            f"{mb(r.cost.to_second)} to the client"
        )
        out.print(
            f"  offline   {r.offline_seconds:6.2f} s   {mb(r.cost.dealt)} from the dealer to the server "
            f"({r.dealer_seconds:.2f} s), none to the client (which computes {r.client_seconds:.2f} s)"
        )
    if len(vectors) > 1:
        out.print("\ncosine similarities between the texts:")
        unit = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
        for i, row in enumerate(unit @ unit.T):
            out.print("  " + " ".join(f"{v:7.3f}" for v in row.tolist()) + f"   {texts[i][:40]!r}", markup=False)
    once = ", ".join(f"{name} {mb(size)}" for name, size in connection.files.items())
    out.print(f"\nonce per model, to the client: {once}")
    out.print(
        f"failure probability of a query within its calibrated ranges: {program.failure_bound:g} "
        "(no step is probabilistic)"
    )
    out.print(who_learns(program.labels.get("embedding", "")))


def plain(model: str, texts: list[str], length: int) -> list[torch.Tensor | None]:
    from secure.models.sentence_encoder import load_sentence_encoder

    directory = model_directory(model)
    encoder, tokenizer = load_sentence_encoder(directory).double(), load_tokenizer(directory)
    with torch.no_grad():
        return [encoder(**text_inputs(tokenizer, text, length))[0] for text in texts]


def who_learns(embedding: str) -> Table:
    table = Table(title="who learnt what (semi-honest; the dealer must not collude with either)", title_justify="left")
    for column in ("", "client", "server", "dealer"):
        table.add_column(column)
    table.add_row("texts, tokens, true lengths", "its own", "nothing", "nothing")
    tables = "the token table; of the rest nothing" if embedding == "client-table" else "nothing"
    table.add_row("weights", tables, "its own", "nothing")
    table.add_row("embeddings (the answer)", "its own", "nothing", "nothing")
    table.add_row("architecture, padded length, ranges", "all", "all", "all")
    table.add_row("when and how many queries", "its own", "all", "all")
    return table
