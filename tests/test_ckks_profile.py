"""What the profiler says of ciphertexts, against what keys, ciphertexts and primitives really take."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from parties.cli import profile_ckks as encrypted_profiling
from parties.cli.main import app
from protocols.ckks import cost
from protocols.ckks.circuit import Circuit, clear
from protocols.ckks.evaluate import Weights
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import schedule
from protocols.ckks.seal import Client, Context
from secure.ckks.compile import Batched, CkksModel, encrypt, encrypt_batch
from secure.errors import Error

SIZES = (4, 8, 3)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), Square(), nn.Linear(SIZES[1], SIZES[2])).eval()


def samples(count: int = 12) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input": torch.empty(1, SIZES[0]).uniform_(-1, 1)} for _ in range(count)]


@pytest.fixture(scope="module")
def encrypted() -> CkksModel:
    given = samples()
    return encrypt(model(), given[0], calibration=given[1:], precision_bits=8.0)


def test_a_profile_adds_up(encrypted: CkksModel) -> None:
    found = encrypted_profiling.profile(encrypted, measured=False)
    assert found["seconds"] == pytest.approx(sum(found["breakdown"].values()))
    assert found["seconds"] == pytest.approx(sum(row.get("seconds", 0.0) for row in found["modules"].values()))
    assert sum(row["rotations"] for row in found["modules"].values()) == found["counts"]["rotate"]
    assert sum(row["plain products"] for row in found["modules"].values()) == found["counts"]["plain"]
    assert sum(row.get("levels", 0) for row in found["modules"].values()) == found["parameters"]["levels"] == 3
    assert found["rounds"] == 1


def test_bytes_are_those_of_real_keys_and_ciphertexts(encrypted: CkksModel) -> None:
    found = encrypted_profiling.profile(encrypted, measured=False)
    p = encrypted.program
    client = Client(Context(p.parameters))
    keys = client.evaluation_keys(p.steps)
    assert sum(map(len, keys.values())) == pytest.approx(found["key bytes"], rel=0.1)
    sent = sum(len(client.encrypt(np.zeros(p.parameters.slots), level)) for _, level, _ in p.views.values())
    assert sent == pytest.approx(found["to server"], rel=0.1)
    weights = Weights(client.context, encrypted.schedule)
    weights.prepare()
    assert weights.bytes == found["weight memory"]


def test_memory_is_bounded(encrypted: CkksModel) -> None:
    weights = Weights(Context(encrypted.program.parameters), encrypted.schedule, limit=1 << 17)
    weights.prepare()
    assert 0 < weights.bytes <= 1 << 17


def test_primitives_that_were_measured_are_interpolated() -> None:
    p = Parameters(8192, 3, 28, 36)
    times = cost.measure(p)
    for kind in ("plain", "add", "rescale", "multiply", "switch", "input"):
        assert times.of(kind, p.degree, 3) > 0
    low, middle, high = (times.of("switch", p.degree, limbs) for limbs in (1, 2, 4))
    assert low <= times.of("switch", p.degree, 2) <= high
    assert middle < high
    assert times.of("refresh", p.degree, 3) > 0
    assert cost.Measured({kind: {} for kind in cost.KINDS}).of("plain", 8192, 2) == cost.Formula().of("plain", 8192, 2)


def test_more_operations_cost_more() -> None:
    c = Circuit(4096)
    x = c.input("x")
    y = c.multiply(x, c.rotate(x, 1))
    c.outputs = [y]
    one = cost.account(schedule(c), p := Parameters(8192, 3, 28, 36))
    assert set(one.kinds) == {"inputs", "rotations", "ciphertext products", "rescaling"}
    c.outputs = [c.add(y, c.multiply(c.rotate(x, 2), x))]
    assert cost.seconds(schedule(c), p) > 1.5 * one.total


def test_the_command_prints_json_and_a_table(encrypted: CkksModel) -> None:
    found = encrypted_profiling.profile(encrypted, measured=False)
    assert json.loads(json.dumps(found)) == found
    console = Console(file=io.StringIO(), width=200)
    encrypted_profiling.show(console, found, "a model")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "128-bit security; pure, 1 round(s)" in text
    assert "ct x ct" in text


@pytest.fixture(scope="module")
def batched() -> Batched:
    given = samples()
    return encrypt_batch(model(), given[0], calibration=given[1:])


def test_a_batch_computes_what_the_model_does(batched: Batched) -> None:
    given = samples(9)
    slots = clear(batched.schedule.circuit, batched.slots(given))
    with torch.no_grad():
        plain = torch.cat([model()(s["input"]) for s in given])
    assert torch.allclose(batched.answers(slots, 9).float(), plain, atol=1e-5)
    assert batched.schedule.circuit.counts()["rotate"] == 0
    assert batched.parameters.slots >= 4096


def test_the_token_table_is_not_shown_unless_it_is_said() -> None:
    result = CliRunner().invoke(app, ["serve", "all-MiniLM-L6-v2", "--deployment", "ckks", "--length", "16"])
    assert isinstance(result.exception, Error)
    assert "clients hold the token table\nhint: --embedding client-table" in str(result.exception)
