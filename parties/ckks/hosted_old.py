"""Starting the CKKS deployment, and asking it: what the commands do with ``--deployment ckks``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import grpc
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from parties.ckks.client import EncryptedConnection
from parties.ckks.evaluators import Evaluators
from parties.ckks.server import EncryptedService, ServedEncrypted
from parties.net import hosting
from parties.net.endpoints import Endpoint
from parties.reports.tables import mb
from proto.unseen_pb2_grpc import add_EncryptedServicer_to_server
from protocols.ckks.cost import seconds
from secure.ckks.compile import Encrypted, encrypt
from secure.errors import Error
from secure.models.text import calibration_inputs, model_directory
from secure.models.tokens import load_tokenizer

KEY_MEMORY = 8 << 30  # bytes of evaluation keys held decoded, at most


def described(encrypted: Encrypted) -> str:
    """What a query takes, in a line."""
    p, n = encrypted.program, encrypted.program.parameters
    refreshed = sum(map(len, p.refreshes))
    rounds = f", {len(p.refreshes)} refreshes of {refreshed} ciphertexts" if p.refreshes else ", no interaction"
    return (
        f"N = {n.degree}, {n.levels} levels of {n.scale_bits} bits (128-bit security){rounds}; "
        f"{p.counts['rotate']} rotations, {p.counts['multiply']} ciphertext products, {p.counts['plain']} plain ones; "
        f"about {seconds(encrypted.schedule, n):.1f} s of one core a query; keys {mb(n.key_bytes * (len(p.steps) + 1))}"
    )


def serve(
    served: ServedEncrypted, listen: Endpoint, state: Path, *, workers: int, insecure: bool, deadline: float
) -> tuple[grpc.Server, Endpoint]:
    """Fork the evaluating host, then start the service: in this order, as gRPC's threads must not be forked."""
    evaluators = Evaluators(served.encrypted, workers=workers or os.cpu_count() or 1, key_memory=KEY_MEMORY)
    encoded = evaluators.wait_ready()
    sys.stderr.write(f"unseen serve: weights encoded in {encoded['seconds']:.1f} s, {mb(encoded['bytes'])} in memory\n")
    hosting.settle()
    service = EncryptedService(served, evaluators, state, deadline=deadline)
    return hosting.start(
        listen,
        lambda s: add_EncryptedServicer_to_server(service, s),
        insecure=insecure,
        what="the server",
    )


def compile_text(
    model: str, length: int, mode: str, precision_bits: float, sentences: Sequence[str]
) -> ServedEncrypted:
    """A sentence encoder in polynomial form, for one padded length."""
    from secure.models.calibration import SENTENCES
    from secure.models.sentence_encoder import load_sentence_encoder

    directory = model_directory(model)
    encoder, tokenizer = load_sentence_encoder(directory), load_tokenizer(directory)
    if not 2 < length <= encoder.maximum_length:
        raise Error(f"the model takes no length of {length} tokens", f"3 to {encoder.maximum_length}")
    samples = calibration_inputs(tokenizer, length, [*SENTENCES, *sentences])
    encrypted = encrypt(
        encoder,
        samples[0],
        calibration=samples[1:],
        mode=mode,
        precision_bits=precision_bits,
        labels={"model": Path(model).name, "length": str(length)},
    )
    return ServedEncrypted.of(encrypted, tokenizer, (directory / "tokenizer.json").read_bytes())


@contextmanager
def asking(console: Console, server: str, **options: object) -> Iterator[EncryptedConnection]:
    """A connection whose evaluations show a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("making keys", total=None)

        def told(done: int, total: int, path: str) -> None:
            bar.update(task, completed=done, total=total, description=path or "evaluating")

        with EncryptedConnection(server, told=told, **options) as connection:  # type: ignore[arg-type]
            bar.update(task, description="evaluating", completed=0)
            yield connection


def embed(
    console: Console, texts: Sequence[str], server: str, *, as_json: bool = False, **options: object
) -> list[torch.Tensor]:
    """Embed texts, and say what each took."""
    vectors = []
    with asking(Console(stderr=True) if as_json else console, server, **options) as connection:
        if as_json:
            vectors = [connection.embed(text) for text in texts]
            rows = [
                {"text": text, "embedding": vector.tolist(), "key_bytes": connection.key_bytes, **asdict(report)}
                for text, vector, report in zip(texts, vectors, connection.reports, strict=True)
            ]
            console.file.write(json.dumps(rows) + "\n")
            return vectors
        if connection.key_bytes:
            console.print(f"keys made in {connection.key_seconds:.1f} s, uploaded {mb(connection.key_bytes)}, once")
        for text in texts:
            vectors.append(connection.embed(text))
            r = connection.reports[-1]
            first = " ".join(f"{v:+.4f}" for v in vectors[-1][:4].tolist())
            console.print(f"\n{text!r}", markup=False, style="bold")
            console.print(f"  embedding ({len(vectors[-1])} numbers)   {first} …")
            console.print(
                f"  {r.seconds:.2f} s, of which the client {r.client_seconds:.2f}; {mb(r.to_server)} to the server, "
                f"{mb(r.to_client)} to the client, {r.rounds} refreshes"
            )
    return vectors
