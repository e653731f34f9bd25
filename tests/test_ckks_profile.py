"""What the profiler says of ciphertexts, against what keys, ciphertexts and primitives really take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secure
from protocols.ckks import cost
from protocols.ckks.circuit import Circuit, clear
from protocols.ckks.evaluate import EncodedWeights
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import schedule
from protocols.ckks.seal import Client, Context
from secure.ckks.compile import CkksModel, encrypt
from secure.ckks.profile import profile, summary
from secure.errors import DoesNotPack, InvalidInput

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
    found = profile(encrypted, measured=False).as_dict()
    assert found["seconds"] == pytest.approx(sum(found["breakdown"].values()))
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["modules"].values()))
    assert sum(row["rotations"] for row in found["modules"].values()) == found["counts"]["rotate"]
    assert sum(row["plain products"] for row in found["modules"].values()) == found["counts"]["plain"]
    assert sum(row["levels"] for row in found["modules"].values()) == found["parameters"]["levels"] == 3


def test_bytes_are_those_of_real_keys_and_ciphertexts(encrypted: CkksModel) -> None:
    found = profile(encrypted, measured=False)
    p = encrypted.program
    client = Client(Context(p.parameters))
    keys = client.evaluation_keys(p.steps)
    assert sum(map(len, keys.values())) == pytest.approx(found.key_bytes, rel=0.1)
    sent = sum(len(client.encrypt(np.zeros(p.parameters.slots), level)) for _, level, _ in p.views.values())
    assert sent == pytest.approx(found.to_server, rel=0.1)
    weights = EncodedWeights(client.context, encrypted.schedule)
    weights.prepare()
    assert weights.bytes == found.weight_memory


def test_a_compiled_model_shows_no_weights(encrypted: CkksModel) -> None:
    compiled = secure.Compiled(secure.Ckks(), encrypted)
    for held in (compiled, encrypted, encrypted.schedule, encrypted.schedule.circuit):
        assert repr(held) == object.__repr__(held)
        assert str(held) == object.__repr__(held)


def test_memory_is_bounded(encrypted: CkksModel) -> None:
    weights = EncodedWeights(Context(encrypted.program.parameters), encrypted.schedule, limit=1 << 17)
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


def test_a_profile_is_json_and_a_table(encrypted: CkksModel) -> None:
    made = profile(encrypted, measured=False)
    found = made.as_dict()
    assert json.loads(json.dumps(found)) == found
    columns, rows, lines = made.table()
    assert len(rows) == len(found["modules"])
    assert {len(row) for row in rows} == {len(columns)}
    assert "ct x ct" in columns
    assert "128-bit security; pure, 1 round(s)" in lines[0]
    assert "128-bit security), no interaction" in summary(encrypted)


def test_the_cost_of_a_compiled_model_is_that_of_its_profile(encrypted: CkksModel) -> None:
    found, cost = profile(encrypted, measured=False), secure.Compiled(secure.Ckks(), encrypted).cost
    assert cost.bytes(sender="client", phase="once") == found.key_bytes
    assert cost.bytes(sender="client", phase="online") == found.to_server
    assert cost.bytes(sender="server", phase="online") == cost.bytes(sender="server") == found.to_client
    assert (cost.rounds, cost.error) == (found.rounds, found.predicted_error) == (1, encrypted.predicted_error)


def test_a_document_says_what_travels_once(encrypted: CkksModel) -> None:
    """In its total, as under every deployment."""
    compiled = secure.Compiled(secure.Ckks(), encrypted)
    document = secure.profile(compiled).as_dict()
    assert document["total"] == compiled.cost.as_dict()
    names = {name.replace(" ", "_") for name in document}
    assert not names & {"to_server", "to_client", "key_bytes", "rounds", "predicted_error", "error", "traffic"}
    assert document["key memory"] > 0


def test_a_batch_computes_what_the_model_does() -> None:
    rows = torch.cat([s["input"] for s in samples()])
    given = [{"input": rows[i : i + 9]} for i in range(0, len(rows) - 8, 9)]
    batched = encrypt(model(), given[0], calibration=given[1:], batch=9)
    found = batched.program.decode(clear(batched.schedule.circuit, batched.program.client_values(given[0], {})))
    with torch.no_grad():
        plain = model()(given[0]["input"])
    assert torch.allclose(found["output"].float(), plain, atol=batched.predicted_error)
    assert batched.schedule.circuit.counts()["rotate"] == 0
    assert batched.program.steps == ()


class Turned(nn.Module):
    """One that puts the rows of a batch in another order. client: before they are encrypted."""

    def __init__(self, client: bool) -> None:
        super().__init__()
        self.client, self.last = client, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x.flip(0) ** 2) if self.client else self.last(x * x).flip(0)
        return out


def test_what_is_no_batch_is_refused() -> None:
    given = [{"x": torch.randn(2, 4)} for _ in range(4)]
    with pytest.raises(DoesNotPack, match="is not that of its rows"):
        encrypt(Turned(client=True), given[0], calibration=given[1:], batch=2)
    with pytest.raises(DoesNotPack, match="depends on other inputs than its own"):
        encrypt(Turned(client=False), given[0], calibration=given[1:], batch=2)
    several = [{"input": torch.cat([s["input"] for s in samples(2)])} for _ in range(4)]
    with pytest.raises(InvalidInput, match="a batch whose ciphertexts are refreshed"):
        encrypt(model(), several[0], calibration=several[1:], batch=2, mode="refresh")


class Tokens(nn.Module):
    """One that looks tokens up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        out: Tensor = self.last(x * x)
        return out


def test_the_token_table_is_not_shown_unless_it_is_said() -> None:
    given = [{"ids": torch.randint(0, 20, (1, 4))} for _ in range(8)]
    model = Tokens().eval()
    options: dict[str, Any] = {"calibration": given[1:], "deployment": secure.Ckks(precision=6)}
    with pytest.raises(InvalidInput, match=r"clients would hold that table\nhint: .*\(embedding='client-table'\)"):
        secure.compile(model, given[0], **options)
    with pytest.raises(InvalidInput, match=r"embedding 'one-hot' is not to be had under"):
        secure.compile(model, given[0], embedding="one-hot", **options)
    made = secure.compile(model, given[0], embedding="client-table", **options)
    with torch.no_grad():
        assert torch.allclose(secure.plain_reference(made, given[3]).float(), model(**given[3]), atol=0.02)


def test_a_text_model_is_not_even_loaded_until_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"under \w+ clients hold the token table\nhint: --embedding client-table"):
        secure.compile_text_model(str(tmp_path), 8, deployment=secure.Ckks())
    with pytest.raises(secure.ModelNotFound):
        secure.compile_text_model(str(tmp_path), 8, deployment=secure.Ckks(), embedding="client-table")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.last(x * x)


def test_several_outputs_are_refused_in_words() -> None:
    given = [{"x": s["input"]} for s in samples(3)]
    with pytest.raises(secure.UnsupportedOperation, match="the model has 2 outputs, ciphertexts are packed for one"):
        secure.compile(Two().eval(), given[0], calibration=given[1:], deployment=secure.Ckks())


@pytest.mark.parametrize("bits", [0.0, -1.0, float("nan"), 1e9])
def test_precisions_that_mean_nothing_are_refused(bits: float) -> None:
    with pytest.raises(InvalidInput, match=r"a precision of .* bits\nhint: more than 0"):
        secure.compile(model(), samples()[0], deployment=secure.Ckks(precision=bits))


def test_options_of_other_deployments_are_refused() -> None:
    with pytest.raises(InvalidInput, match="gelu means nothing under"):
        secure.compile(model(), samples()[0], deployment=secure.Ckks(), gelu="tanh")
