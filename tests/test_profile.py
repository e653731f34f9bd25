"""The profiler: what it counts without data is what a query takes."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import secure
from parties.reports.tables import profile_tables, titled
from protocols.flow import Instruction
from protocols.protocol import (
    PARTY_NAMES,
    CircuitCost,
    Draw,
    Material,
    Protocol,
    Shape,
    Step,
    Weights,
    WeightUse,
    bytes_of,
    count,
    swap,
)
from protocols.two_party import Input
from protocols.wire import Wire
from secure.cost.count import module, profile
from secure.cost.runnable import Deployed
from secure.cost.traffic import links
from secure.deployments.two_party import CLIENT, DEALER, SERVER
from secure.mpc.network import NETWORKS, NetworkSpeed
from secure.units import in_units


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
    with secure.insecure_in_process(compiled) as session:
        session.query(inputs(3))
    (report,) = session.reports
    assert found.total == compiled.program.cost
    assert report.rounds == compiled.cost.rounds == found.total.rounds
    assert report.traffic == compiled.cost.traffic == links(found.total, SERVER, CLIENT, DEALER)


def test_every_line_is_what_its_protocol_declares(compiled: secure.Compiled) -> None:
    found = profile(compiled.program)
    for line, instruction in zip(found.lines, compiled.program.circuit, strict=True):
        assert line.cost == instruction.protocol.cost()
        assert line.kind == instruction.protocol.kind


@dataclass(frozen=True)
class Mixed(Protocol):
    """A protocol that nobody has heard of: the product with a weight, and its square, as one result of three parts."""

    kind: ClassVar[str] = "mixed"
    weight_field: ClassVar[str] = "matrix"
    shape: Shape
    ring: int
    matrix: str

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("a", self.shape, self.ring), Draw("b", self.shape, self.ring, derived=True))

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        x = operands[0] @ torch.empty(8, 4, dtype=torch.int64, device="meta")
        (y,) = yield swap(x, self.out)
        return x, y, y

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        raise AssertionError("nothing is computed")

    def cost(self) -> CircuitCost:
        size = bytes_of(self.shape, self.ring)
        return CircuitCost(1, size, size)

    def memory(self) -> int:
        return 3 * super().memory()

    def products(self, weights: Mapping[str, Shape], operands: Sequence[Shape]) -> int:
        return 7 * count(operands[0]) * weights[self.matrix][1]

    def comparisons(self) -> int:
        return 11


Protocol.registry.pop("mixed")  # of this test alone: no Program may name it


def test_a_protocol_of_ones_own_is_counted_by_what_it_says() -> None:
    shape, out = (5, 8), (5, 4)
    entry, mixed = Input(shape, 32, "x", 8, -1.0, 1.0), Mixed(out, 32, "m")
    circuit = (Instruction(entry), Instruction(mixed, (0,)))
    program = Deployed(circuit, (1,), ("", "own"), {"m": (8, 4)}, PARTY_NAMES, "dealer")
    found = profile(program)
    line = found.lines[1]
    assert line.cost == CircuitCost(1, 5 * 4 * 4, 5 * 4 * 4, 5 * 4 * 4)
    assert (line.products, line.comparisons) == (7 * 40 * 4, 11)
    assert [m.live for m in found.memory] == [8 * (40 + 3 * 20)] * 2  # the input and the result
    assert (mixed.dealt_bytes, mixed.weight_use) == (80, WeightUse("m", 32, multiplied=True))


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
    network = NetworkSpeed("test", "test", round_trip=0.1, bandwidth=1000)
    assert network.seconds(CircuitCost(10, 500, 2000, 10**9)) == pytest.approx(10 * 0.05 + 2)


@pytest.mark.parametrize(
    ("path", "depth", "expected"),
    [("", 3, "(model)"), ("a.b.c", 2, "a.b"), ("a.layer.0.b", 2, "a.layer.0"), ("a", 5, "a")],
)
def test_module_paths_are_cut(path: str, depth: int, expected: str) -> None:
    assert module(path, depth) == expected


def test_a_profile_says_the_same_to_programs_and_to_people(compiled: secure.Compiled) -> None:
    found = secure.profile(compiled, depth=1)
    document = json.loads(json.dumps(found.as_dict()))
    assert document["total"]["traffic"] == compiled.cost.as_dict()["traffic"]
    assert document["total"]["rounds"] == found.cost.rounds == compiled.cost.rounds
    assert set(document["waiting_seconds"]) == {n.name for n in NETWORKS}
    assert document["networks"] == []
    assert set(document["memory"]) == {SERVER, CLIENT}
    by_module, by_kind = profile_tables(found)
    assert by_kind.row_count > 5
    assert by_module.row_count < by_kind.row_count
    assert f"{compiled.cost.rounds} rounds" in found.lines[0]


def test_parties_have_the_names_of_their_deployment() -> None:
    example = [inputs(s) for s in range(4)]
    model = secure.compile(Tiny().eval(), example[0], calibration=example[1:], deployment=secure.ThreeParty())
    text = json.dumps(secure.profile(model).as_dict())
    assert '"party 0"' in text
    assert '"server"' not in text


def test_networks_are_found_by_name(compiled: secure.Compiled) -> None:
    document = secure.profile(compiled, networks=["lan", "250,20"]).as_dict()
    assert list(document["waiting_seconds"]) == [NETWORKS[0].name, "250 Mbps, 20 ms"]
    with pytest.raises(secure.InvalidInput, match="moon"):
        secure.profile(compiled, networks=["moon"])


def test_the_command_names_a_missing_model() -> None:
    from parties.cli.main import app

    result = CliRunner().invoke(app(), ["profile", "/nowhere"])
    assert result.exit_code != 0
    assert "no model at '/nowhere'" in str(result.exception)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_940, "99.9 kB"), (155_300, "155 kB")),
        *((31_949_000, "31.9 MB"), (4 << 30, "4.29 GB")),
    ],
)
def test_bytes_have_a_unit_in_which_they_are_not_small(size: int, said: str) -> None:
    assert in_units(size) == said


def test_names_of_modules_stay_whole_in_a_narrow_terminal() -> None:
    columns = ["", "unmerged rounds", "to server", "to client", "offline", "MMAC", "compared"]
    name, figures = "model.model.layers.27", ["68", "30.3 kB", "101 kB", "31.9 MB", "4", "275328"]
    console = Console(width=80, file=io.StringIO())
    console.print(titled("by module", columns, [[name, *figures]]))
    assert isinstance(console.file, io.StringIO)
    (row,) = [line for line in console.file.getvalue().splitlines() if name in line]
    assert re.split(" {2,}", row.strip()) == [name, *figures]
    assert {"unmerged", "rounds", "compared"} <= set(console.file.getvalue().split())  # headings are cut between words
    console.print(titled("long names", columns, [["a" * 70, *figures]]))
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
