"""The command ``unseen verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parties.cli.console import OUT, get_ready, say
from parties.cli.options import InsecureOption, TlsOption
from parties.net.caller import CLIENT
from parties.receipts.receipt import Receipt
from parties.reports.verified import asked_for, found_in, table
from parties.reports.verified import verify as compare
from parties.tls.choice import network_of
from secure.errors import InvalidInput, ReceiptError


def verify(
    receipt: Annotated[Path, typer.Argument(help="What --receipt of a command wrote.")],
    program: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Where the Program is: a directory of `unseen compile`, or a file. May be given several times.",
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A service that tells the Program; its digest is compared.")
    ] = None,
    tls: TlsOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Compare a record of what left a client's machine with what the Programs prescribe."""
    if not program and server is None:
        raise InvalidInput("no Program to compare with", "give its directory (--program) or a server of it (--server)")
    if server is None and (tls is not None or insecure):
        raise InvalidInput("--tls and --insecure mean nothing without --server", "leave them out")
    get_ready(1)
    found = Receipt.read(receipt)
    programs = found_in(program or (), found.used)
    if server is not None:
        programs |= asked_for(found, server, network_of(CLIENT, directory=tls, insecure=insecure))
    OUT.print(table(found))
    try:
        compare(found, programs)
    except ReceiptError as error:
        say(f"unseen verify: it differs. {error}")
        raise typer.Exit(1) from None
    for digest in sorted(found.used):
        OUT.print(f"Program {digest}", markup=False, highlight=False, soft_wrap=True)
    OUT.print(
        f"All {found.messages:,} messages ({found.size:,} bytes, {found.answered:,} answered queries) have the kinds, "
        "the order and the sizes that these Programs prescribe.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    OUT.print(
        "The client's own software wrote this receipt, and contents are not in it: docs/receipts.md says how to check "
        "it against the network.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
