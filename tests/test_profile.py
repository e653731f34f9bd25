"""The profiler: what it counts without data is what a query takes."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import secure
from parties.reports import tables as reports
from protocols.protocol import CircuitCost
from secure.cost.count import NETWORKS, Network, module, profile


class Tiny(nn.Module):
    """A layer of everything: linear, layer norm, attention, GeLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = torch.softmax(h @ h.transpose(-1, -2), -1) @ h
        out: torch.Tensor = self.down(nn.functional.gelu(self.up(h)))
        return out


def inputs(seed: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn((1, 5, 8), generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def compiled() -> secure.Compiled:
    return secure.compile(Tiny().eval(), inputs(0), calibration=[inputs(s) for s in range(1, 9)])


def test_predicted_is_measured(compiled: secure.Compiled) -> None:
    found = profile(compiled.program)
    _, report = secure.InsecureInProcess(compiled).query(inputs(3))
    assert found.total == report.cost == compiled.program.cost


def test_every_line_is_what_its_protocol_declares(compiled: secure.Compiled) -> None:
    found = profile(compiled.program)
    for line, instruction in zip(found.lines, compiled.program.circuit, strict=True):
        assert line.cost == instruction.protocol.cost()
        assert line.kind == instruction.protocol.kind


def test_sums_by_module_and_kind_agree(compiled: secure.Compiled) -> None:
    found = profile(compiled.program)
    for key in (lambda line: line.kind, lambda line: module(line.path, 1)):
        summed = [cost for cost, _, _ in found.by(key).values()]
        assert sum(c.to_first for c in summed) == found.total.to_first
        assert sum(c.to_second for c in summed) == found.total.to_second
        assert sum(c.dealt for c in summed) == found.total.dealt
    linear = 5 * 8 * 16 * 2
    attention = 4 * 2 * 5 * 5 * 8
    assert found.products == linear + attention
    assert found.comparisons > 5 * 16 * 5  # GeLU alone has five thresholds an element


def test_a_network_waits_half_a_round_trip_a_round() -> None:
    network = Network("test", "test", round_trip=0.1, bandwidth=1000)
    assert network.seconds(CircuitCost(10, 500, 2000, 10**9)) == pytest.approx(10 * 0.05 + 2)


@pytest.mark.parametrize(
    ("path", "depth", "expected"),
    [("", 3, "(model)"), ("a.b.c", 2, "a.b"), ("a.layer.0.b", 2, "a.layer.0"), ("a", 5, "a")],
)
def test_module_paths_are_cut(path: str, depth: int, expected: str) -> None:
    assert module(path, depth) == expected


def test_reports(compiled: secure.Compiled) -> None:
    found = profile(compiled.program)
    document = json.loads(json.dumps(reports.profile_json(compiled.program, found, 1)))
    assert document["total"]["bytes_to_server"] == found.total.to_first
    assert set(document["waiting_seconds"]) == {n.name for n in NETWORKS}
    assert reports.profile_table("by protocol", found.by(lambda line: line.kind)).row_count > 5


def test_the_command_names_a_missing_model() -> None:
    from parties.cli.main import app

    result = CliRunner().invoke(app, ["profile", "/nowhere"])
    assert result.exit_code != 0
    assert "no model at '/nowhere'" in str(result.exception)
