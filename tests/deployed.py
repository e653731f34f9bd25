"""Tiny models under CKKS and their servers as processes: evaluators are forked, which no process with gRPC's threads may
do. ``python -m tests.deployed NAME STATE`` serves one until it is stopped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from parties import encrypted_hosting, hosting
from parties.demo import process
from parties.encrypted_server import ServedEncrypted
from parties.endpoints import Endpoint
from secure.encrypting import Encrypted, encrypt
from tests.test_encrypted_programs import SAMPLES, digits


class Tiny(nn.Module):
    """Eight numbers to four, so small that its keys are made and used in moments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        out: Tensor = self.last(x + 0.25 * x * x)
        return out


def inputs(name: str, number: int = 0) -> dict[str, Tensor]:
    """One of the inputs that calibrated a model."""
    return SAMPLES[number] if name != "tiny" else {"images": SAMPLES[number]["images"][:, :8]}


def model(name: str) -> nn.Module:
    return Tiny().eval() if name == "tiny" else digits(1)


def build(name: str, precision_bits: float = 8) -> Encrypted:
    """In a ring of 8192, but for a pure DigitsModel, which takes 16384."""
    samples = [inputs(name, k) for k in range(8)]
    mode, degree = ("refresh" if name == "refresh" else "pure"), (16384 if name == "pure" else 8192)
    options: dict[str, Any] = {"mode": mode, "precision_bits": precision_bits, "degrees": [degree]}
    return encrypt(model(name), samples[0], calibration=samples[1:], **options)


@dataclass
class Deployed:
    """A running server; ``error``: predicted, of an output element."""

    name: str
    address: str
    state: Path
    pid: int
    error: float

    @property
    def host(self) -> int:
        """The process that forks the evaluators."""
        (pid,) = children(self.pid)
        return pid

    def key_files(self) -> list[Path]:
        return sorted(self.state.glob("evaluation-keys/*/*.keys"))


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, path.read_text().split())
    return found


@contextmanager
def running(name: str, state: Path) -> Iterator[Deployed]:
    with process(Console(stderr=True), name, "blue", [name, str(state)], module="tests.deployed") as address:
        about = json.loads((state / "about.json").read_text())
        yield Deployed(name, address, state, **about)


def main(name: str, state: Path) -> None:
    torch.set_num_threads(1)
    state.mkdir(parents=True, exist_ok=True)
    encrypted = build(name, 14 if name == "pure" else 8)
    server, address = encrypted_hosting.serve(
        ServedEncrypted.of(encrypted), Endpoint("127.0.0.1", 0), state, workers=2, insecure=False, deadline=20.0
    )
    (state / "about.json").write_text(json.dumps({"pid": os.getpid(), "error": encrypted.predicted_error}))

    def announce() -> None:
        sys.stdout.write(json.dumps({"listening": str(address)}) + "\n")
        sys.stdout.flush()

    hosting.run_until_stopped(server, announce)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
