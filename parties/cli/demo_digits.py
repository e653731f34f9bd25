"""``unseen demo --digits``: train a small vision transformer, serve it, and ask it about images that it never sees.

The server is a process of its own that trains on scikit-learn's training images; the client asks about test images.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from parties.ckks import hosted as encrypted_hosting
from parties.ckks.server import ServedEncrypted
from parties.cli.demo import process
from parties.net import hosting
from parties.net.endpoints import Endpoint
from parties.reports.tables import mb
from parties.two_party.client import connect
from parties.two_party.masked_model import serve_ready
from parties.two_party.server import InferenceService
from proto.unseen_pb2_grpc import add_InferenceServicer_to_server
from protocols import kernels
from secure.ckks.compile import Encrypted, encrypt
from secure.models.digits import DigitsModel, load_digits, train_digits
from secure.mpc.compile import MpcModel, compile
from secure.polynomial.forms import freeze_untrained

CALIBRATION = 400  # training images from which ranges are taken
SHOWN = 3  # images that are drawn
WANTED = 0.95  # of the answers


def compile_digits(model: DigitsModel) -> MpcModel:
    """For one image a query."""
    images = load_digits().train[0][:CALIBRATION]
    samples = [{"images": image[None]} for image in images]
    return compile(model, samples[0], calibration=samples[1:], labels={"model": "digits"})


def untrained_digits(layers: int) -> DigitsModel:
    """Random weights, with ranges as they come: for costs alone."""
    model = DigitsModel(layers).eval()
    images = load_digits().train[0][:CALIBRATION]
    freeze_untrained(model, lambda: model(images))
    return model


def encrypt_digits(model: DigitsModel, *, mode: str = "pure", precision_bits: float = 9.0) -> Encrypted:
    """For one image a query, under CKKS."""
    images = load_digits().train[0][:CALIBRATION]
    samples = [{"images": image[None]} for image in images]
    labels = {"model": "digits"}
    return encrypt(model, samples[0], calibration=samples[1:], mode=mode, precision_bits=precision_bits, labels=labels)


def serve_encrypted(state: Path, layers: int) -> None:
    """The server process of the CKKS deployment."""
    torch.set_num_threads(1)
    sys.stdout.write(f"training {layers} layer(s) on scikit-learn's digits ...\n")
    sys.stdout.flush()
    model, reached = train_digits(layers)
    encrypted = encrypt_digits(model, mode="pure" if layers == 1 else "refresh")
    sys.stdout.write(f"accuracy on the test images {reached:.4f}; {encrypted_hosting.described(encrypted)}\n")
    sys.stdout.flush()
    server, address = encrypted_hosting.serve(
        ServedEncrypted.of(encrypted), Endpoint("127.0.0.1", 0), state, workers=0, insecure=False, deadline=60.0
    )
    hosting.run_until_stopped(server, lambda: _announce(str(address)))


def run_encrypted(console: Console, count: int, layers: int) -> int:
    """Server as a process, the client here: keys, uploads, encrypted queries."""
    images, labels = load_digits().test
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory(prefix="unseen-digits-"))
        serving = ["ckks", str(Path(state) / "server"), str(layers)]
        server = stack.enter_context(process(console, "server", "blue", serving, module="parties.cli.demo_digits"))
        console.rule("client")
        connection = stack.enter_context(encrypted_hosting.asking(console, server))
        console.print(
            f"keys made in {connection.key_seconds:.1f} s, {mb(connection.key_bytes)} uploaded, once", highlight=False
        )
        right = 0
        for number, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True), 1):
            answer = int(connection.query({"images": image[None]}).argmax())
            right += answer == int(label)
            if number <= SHOWN:
                console.print(_drawn(image), highlight=False, markup=False)
                console.print(f"is a {answer} (label {int(label)})", highlight=False)
        r = sorted(connection.reports, key=lambda r: r.seconds)[len(connection.reports) // 2]
        console.print(
            f"{right} of {count} right; {r.seconds:.2f} s an image, of which the client {r.client_seconds:.2f}; "
            f"{mb(r.to_server)} to the server, {mb(r.to_client)} to the client, {r.rounds} refreshes",
            highlight=False,
        )
    return 0 if right >= WANTED * count else 1


def serve(dealer: str, state: Path, layers: int) -> None:
    """The server process: train, compile, serve; says in one line of JSON where it listens."""
    torch.set_num_threads(1)
    kernels.warm_up()
    sys.stdout.write(f"training {layers} layer(s) on scikit-learn's digits ...\n")
    sys.stdout.flush()
    model, reached = train_digits(layers)
    compiled = compile_digits(model)
    cost = compiled.program.cost
    sys.stdout.write(
        f"accuracy on the test images {reached:.4f}; a query takes {cost.rounds} rounds and "
        f"{mb(cost.to_first + cost.to_second)}, no comparison\n"
    )
    ready = serve_ready(compiled, None, b"", state)
    hosting.settle()
    service = InferenceService(ready, Endpoint.parse(dealer, what="the dealer"))
    server, address = hosting.start(
        Endpoint("127.0.0.1", 0),
        lambda s: add_InferenceServicer_to_server(service, s),
        insecure=False,
        what="the server",
    )
    hosting.run_until_stopped(server, lambda: _announce(str(address)))


def _announce(address: str) -> None:
    sys.stdout.write(json.dumps({"listening": address}) + "\n")
    sys.stdout.flush()


def run(console: Console, count: int, layers: int) -> int:
    """Dealer and server as processes, the client here. The exit code: 1 if fewer than ``WANTED`` answers are right."""
    images, labels = load_digits().test
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory(prefix="unseen-digits-"))
        dealing = ["dealer", "--listen", "127.0.0.1:0", "--threads", "1", "--announce"]
        dealer = stack.enter_context(process(console, "dealer", "magenta", dealing))
        serving = [dealer, str(Path(state) / "server"), str(layers)]
        server = stack.enter_context(process(console, "server", "blue", serving, module="parties.cli.demo_digits"))
        console.rule("client")
        right = 0
        with connect(server, dealer, cache=False) as connection:
            for number, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True), 1):
                answer = int(connection.query({"images": image[None]}).argmax())
                right += answer == int(label)
                if number <= SHOWN:
                    console.print(_drawn(image), highlight=False, markup=False)
                    console.print(f"is a {answer} (label {int(label)})", highlight=False)
            reports = connection.reports[1:] or connection.reports
        seconds = sorted(r.online_seconds for r in reports)[len(reports) // 2]
        cost = reports[-1].cost
        console.print(
            f"{right} of {count} right; online {seconds:.3f} s, {cost.rounds} rounds, "
            f"{mb(cost.to_first + cost.to_second)} an image; offline {mb(cost.dealt)}",
            highlight=False,
        )
    return 0 if right >= WANTED * count else 1


def _drawn(image: torch.Tensor) -> str:
    shades = " .:-=+*#@"
    rows = (image.reshape(8, 8) * (len(shades) - 1)).round().int().tolist()
    return "\n".join("".join(shades[v] * 2 for v in row) for row in rows)


if __name__ == "__main__":
    if sys.argv[1] == "ckks":
        serve_encrypted(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
