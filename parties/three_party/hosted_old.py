"""What the commands do for the three-party deployment: share a model, start a party, ask them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import grpc
import torch
from rich.console import Console
from rich.table import Table

from parties.net import hosting
from parties.net.endpoints import Endpoint
from parties.reports.answers import plain
from parties.reports.tables import mb
from parties.served.files import TOKEN_TABLE
from parties.three_party.client import ThreePartyConnection
from parties.three_party.party import PartyService
from parties.three_party.party_0 import ZeroService
from parties.three_party.party_1 import OneService
from parties.three_party.party_2 import HelperService
from parties.three_party.shared_model import PartyShare, load_share
from proto.unseen_pb2_grpc import add_PartyServicer_to_server
from secure.errors import Error


def service(
    share: PartyShare, zero: str | None, helper: str | None, *, ahead: int, insecure: bool, deadline: float
) -> PartyService:
    """The service of this share's party; ``zero`` and ``helper`` are the addresses that it needs of the others."""

    def at(address: str | None, party: int) -> Endpoint:
        if address is None:
            raise Error(f"party {share.party} needs the address of party {party}", f"--party-{party} host:port")
        return Endpoint.parse(address, what=f"--party-{party}")

    if share.party == 2:
        return HelperService(share, deadline=deadline)
    if share.party == 1:
        return OneService(share, at(zero, 0), at(helper, 2), insecure=insecure, deadline=deadline)
    return ZeroService(share, at(helper, 2), ahead=ahead, insecure=insecure, deadline=deadline)


def start(
    directory: Path,
    party: int | None,
    listen: Endpoint,
    zero: str | None,
    helper: str | None,
    *,
    ahead: int,
    insecure: bool,
    deadline: float,
) -> tuple[PartyService, grpc.Server, Endpoint]:
    """Load a share and serve it. ``party``: which one it is expected to be."""
    share = load_share(directory)
    if party is not None and share.party != party:
        raise Error(f"{directory} is the share of party {share.party}, not {party}", f"--share .../party-{party}")
    listen.require_private(insecure=insecure, what=f"party {share.party}")
    made = service(share, zero, helper, ahead=ahead, insecure=insecure, deadline=deadline)
    hosting.settle()
    running, address = hosting.start(
        listen,
        lambda s: add_PartyServicer_to_server(made, s),
        insecure=insecure,
        what=f"party {share.party}",
    )
    return made, running, address


def described(share: PartyShare) -> str:
    """What a query takes between the parties, in a line."""
    cost, held = share.circuit.cost, "public weights" if share.manifest.public_weights else "shared weights"
    return (
        f"{held}; a query takes {cost.rounds} rounds, {mb(cost.to_second + cost.to_first)} between parties 0 and 1, "
        f"{mb(cost.dealt)} from party 2 to party 0 ahead; Program {share.program.digest}"
    )


def embed(
    console: Console,
    texts: Sequence[str],
    connection: ThreePartyConnection,
    compare_with: str | None,
    *,
    as_json: bool,
) -> None:
    """Embed texts, and say what each took. ``compare_with``: a model to run here in the clear as well."""
    with connection:
        vectors = connection.embed(texts)
        if as_json:
            rows = [
                {"text": text, "embedding": vector.tolist(), **asdict(report)}
                for text, vector, report in zip(texts, vectors, connection.reports, strict=True)
            ]
            console.file.write(json.dumps(rows) + "\n")
            return
        exact = plain(compare_with, list(texts), connection.length) if compare_with else [None] * len(texts)
        for text, vector, reference, r in zip(texts, vectors, exact, connection.reports, strict=True):
            console.print(f"\n{text!r}", markup=False, style="bold")
            if reference is not None:
                cosine = torch.nn.functional.cosine_similarity(vector, reference, dim=0)
                console.print(f"  cosine to the plaintext model   {cosine:.7f}")
            first = " ".join(f"{v:+.4f}" for v in vector[:4].tolist())
            console.print(f"  embedding ({len(vector)} numbers)         {first} …")
            console.print(
                f"  {r.seconds:.2f} s; {r.cost.rounds} rounds of {mb(r.cost.to_second)} from party 0 to 1, "
                f"{mb(r.cost.to_first)} back"
            )
            console.print(f"  {mb(r.cost.dealt)} from party 2 to 0 (who waited {r.waited_seconds:.2f} s for them)")
            console.print(f"  {r.sent / 1e3:,.0f} kB from this client, {r.received / 1e3:,.1f} kB to it")
        console.print(_who_learns(connection))


def _who_learns(connection: ThreePartyConnection) -> Table:
    table = Table(title="who learnt what (semi-honest; no two parties may collude)", title_justify="left")
    for column in ("", "client", "each party alone", "any two parties"):
        table.add_column(column)
    shown = "all" if connection.public_weights else "nothing"
    tables = "the token table" if TOKEN_TABLE in connection.files else shown
    table.add_row("texts, tokens, true lengths", "its own", "nothing", "all")
    table.add_row("weights", tables, shown, "all")
    table.add_row("embeddings (the answer)", "its own", "nothing", "all")
    table.add_row("architecture, padded length, ranges", "all", "all", "all")
    return table


@contextmanager
def running(made: PartyService, server: grpc.Server) -> Iterator[None]:
    """A party until the block ends; for tests and notebooks."""
    try:
        yield
    finally:
        server.stop(0).wait()
        close = getattr(made, "close", None)
        if close is not None:
            close()
