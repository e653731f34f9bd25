"""The commands ``unseen share-model`` and ``unseen party``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from parties.cli.options import BEST_GELU, ONE_HOT, OURS, Chosen, Form, Length, Lookup, Threads, read_texts
from parties.net import hosting
from parties.net.endpoints import Endpoint
from parties.reports.tables import mb
from parties.three_party.hosted import described, start
from parties.three_party.shared_model import share_model
from protocols import kernels
from protocols.fixedpoint import FixedPoint
from secure.models.text import PACKAGED, compile_text_model

PARTIES = "127.0.0.1:50060,127.0.0.1:50061,127.0.0.1:50062"

err = Console(stderr=True, highlight=False)


def _say(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


def share_model_command(
    model: Annotated[str, typer.Argument(help=f"A model directory, or {PACKAGED!r}.")] = PACKAGED,
    output: Annotated[Path, typer.Option(help="Where party-0, party-1 and party-2 are written.")] = Path("shares"),
    length: Length = 128,
    embedding: Lookup = ONE_HOT,
    gelu: Form = BEST_GELU,
    approximations: Chosen = OURS,
    fraction_bits: Annotated[int, typer.Option(help="Fraction bits of activations.")] = FixedPoint().fraction_bits,
    public_weights: Annotated[
        bool, typer.Option("--public-weights", help="Let all parties know the weights: cheaper, inputs stay secret.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file, one sentence a line, that widens the ranges.")
    ] = None,
) -> None:
    """Share a model among three parties: one directory for each, to be given to it and to nobody else."""
    torch.set_num_threads(os.cpu_count() or 1)
    sentences = read_texts(calibration, "--calibration", "sentence") if calibration else ()
    _say(f"unseen share-model: compiling {model} for {length} tokens ...")
    fixed = FixedPoint(fraction_bits=fraction_bits)
    compiled, tokenizer, raw = compile_text_model(
        model, length, embedding.value, gelu.value, fixed, sentences, approximations=approximations.value
    )
    for where in share_model(compiled, tokenizer, raw, output, public_weights=public_weights):
        size = sum(file.stat().st_size for file in where.iterdir())
        _say(f"unseen share-model: {where} ({mb(size)}): for {where.name} alone, it holds secrets")


def party_command(
    share: Annotated[Path, typer.Option(help="This party's directory, from share-model.")],
    party: Annotated[int, typer.Option("--id", min=0, max=2, help="Which party this is.")],
    listen: Annotated[str | None, typer.Option(help="host:port; 127.0.0.1:50060 + id by default.")] = None,
    zero: Annotated[str | None, typer.Option("--party-0", help="Party 1: where party 0 listens.")] = None,
    helper: Annotated[str | None, typer.Option("--party-2", help="Parties 0, 1: where party 2 listens.")] = None,
    ahead: Annotated[
        int, typer.Option(min=0, max=16, help="Party 0: queries whose corrections are kept ready, in memory.")
    ] = 1,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds to wait for any one message of a peer.")] = 60.0,
    threads: Threads = 1,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow unencrypted channels that leave this machine.")
    ] = False,
    announce: Annotated[
        bool, typer.Option("--announce", help="Print the address as a JSON line once listening.", hidden=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More log lines.")] = False,
) -> None:
    """Be one of three parties that compute on shares; must not collude with another. Start party 2 first."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    kernels.warm_up()
    hosting.log_to_stderr(verbose)
    at = Endpoint.parse(listen or f"127.0.0.1:{50060 + party}", what="--listen")
    zero, helper = zero or "127.0.0.1:50060", helper or "127.0.0.1:50062"
    made, server, address = start(share, party, at, zero, helper, ahead=ahead, insecure=insecure, deadline=deadline)

    def tell() -> None:
        _say(f"unseen party {party}: {described(made.share)}")
        _say(f"unseen party {party}: listening on {address} (semi-honest: it is assumed to follow the protocol)")
        if announce:
            sys.stdout.write(json.dumps({"listening": str(address)}) + "\n")
            sys.stdout.flush()

    hosting.run_until_stopped(server, tell)
