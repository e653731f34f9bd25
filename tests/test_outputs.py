"""Models with several outputs: their names, what is revealed, in how many rounds, and the Program that says so."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import secure
from protocols.circuit import Correlations, deal, execute
from protocols.prg import KEY_BYTES, Key, fresh_seed
from protocols.protocol import CLIENT, SERVER
from protocols.steps import run_pair
from protocols.two_party import Reveal
from protocols.weights import ClientWeights, DealerWeights
from protocols.wire import Wire
from secure.capture.capture import capture
from secure.cost.count import profile
from secure.deployments.deployment import Deployment
from secure.errors import UnsupportedOperation
from secure.mpc.compile import MpcModel, compile
from secure.mpc.program import Program
from tests.three import pooled, watched
from tests.uniformity import difference, suspicious


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Returning(nn.Module):
    """Two linear layers, returned in some form."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.form = nn.Linear(8, 4), nn.Linear(8, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.a(x), self.b(x))


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[str, ...]]] = {
    "a tensor": (lambda a, b: a, ("output",)),
    "a tuple": (lambda a, b: (a, b), ("0", "1")),
    "a tuple of one": (lambda a, b: (a,), ("0",)),
    "a list": (lambda a, b: [a, b], ("0", "1")),
    "a dict": (lambda a, b: {"mean": a, "variance": b}, ("mean", "variance")),
    "an ordered dict": (lambda a, b: OrderedDict(z=a, y=b), ("z", "y")),
    "a named tuple": (Pair, ("left", "right")),
    "nested": (lambda a, b: {"both": (a, b), "sum": a.sum() + b.sum()}, ("both.0", "both.1", "sum")),
    "with nothing": (lambda a, b: {"a": a, "none": None, "b": b}, ("a", "b")),
}


def inputs(seed: int, rows: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn((rows, 8), generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_named_as_the_model_names_them(form: str) -> None:
    made, names = FORMS[form]
    graph, _ = capture(Returning(made), inputs(0))
    assert graph.names == names
    assert len(graph.outputs) == len(names)


def test_outputs_of_transformers_have_its_names() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    form = lambda a, b: outputs.BaseModelOutputWithPooling(last_hidden_state=a, pooler_output=b)  # noqa: E731
    assert capture(Returning(form), inputs(0))[0].names == ("last_hidden_state", "pooler_output")


def test_names_that_stand_twice_are_refused() -> None:
    with pytest.raises(UnsupportedOperation, match="no names, or the same one twice\nhint: return"):
        capture(Returning(lambda a, b: {"a": {"b": a}, "a.b": b}), inputs(0))


class Heads(nn.Module):
    """A deep output, a shallow one, and one that is another's too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.deep, self.shallow = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        deep = self.deep(nn.functional.gelu(self.body(x)))
        return {"deep": deep, "shallow": self.shallow(x), "again": deep}


@pytest.fixture(scope="module")
def compiled() -> MpcModel:
    return compile(Heads(), inputs(0), calibration=[inputs(seed) for seed in range(1, 9)])


DEPLOYMENTS = (secure.TwoParty(), secure.ThreeParty(), secure.ThreeParty(public_weights=True))


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=str)
def test_every_output_is_the_models(deployment: Deployment) -> None:
    samples = [inputs(seed) for seed in range(1, 9)]
    model = secure.compile(Heads(), inputs(0), calibration=samples, deployment=deployment)
    with torch.no_grad(), secure.insecure_in_process(model) as session:
        answer, expected = session.query(inputs(3)), Heads()(**inputs(3))
        plain = secure.plain_reference(model, inputs(3))
    assert list(answer) == list(plain) == list(expected) == ["deep", "shallow", "again"]
    for name, value in answer.items():
        assert value.dtype == torch.float64
        assert value.shape == expected[name].shape
        assert float((value - expected[name]).abs().max()) < 5e-3
        assert float((plain[name] - expected[name]).abs().max()) < 5e-3
    assert torch.equal(answer["deep"], answer["again"])


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=str)
def test_services_give_every_output(deployment: Deployment, tmp_path: Path) -> None:
    """The same over the network, where the shares of three parties' outputs lie one after the other."""
    pytest.importorskip("tokenizers")
    from tests.hosts import HOSTS

    model = secure.compile(Heads(), inputs(0), calibration=[inputs(s) for s in range(1, 9)], deployment=deployment)
    with ExitStack() as stack, torch.no_grad():
        at, _ = HOSTS[type(deployment)](stack, model, tmp_path)
        session = stack.enter_context(secure.connect(at, cache=False, deadline=20.0))
        answer, expected = session.query(inputs(3)), Heads()(**inputs(3))
    assert list(answer) == list(expected)
    for name, value in answer.items():
        assert float((value - expected[name]).abs().max()) < 5e-3


def test_outputs_that_are_ready_together_are_revealed_in_one_round() -> None:
    program = compile(Returning(lambda a, b: (a, b)), inputs(0), calibration=[inputs(1)]).program
    assert [type(program.circuit[i].protocol) for i in program.revealed] == [Reveal, Reveal]
    rounds = [[part.index for part in stage.parts] for stage in profile(program).schedules[SERVER] if stage.parts]
    assert rounds[-1] == list(program.revealed)
    alone = compile(Returning(lambda a, b: a), inputs(0), calibration=[inputs(1)]).program
    assert program.cost.rounds == alone.cost.rounds == len(rounds)


def test_an_output_that_stands_twice_is_revealed_once(compiled: MpcModel) -> None:
    deep, shallow, again = compiled.program.outputs
    assert (deep.name, shallow.name, again.name) == ("deep", "shallow", "again")
    assert deep.instruction == again.instruction != shallow.instruction


def test_a_program_with_outputs_decodes_to_itself(compiled: MpcModel) -> None:
    again = Program.from_bytes(compiled.program.encoded)
    assert again.outputs == compiled.program.outputs
    assert again.encoded == compiled.program.encoded


def views(compiled: MpcModel, x: Tensor) -> list[dict[int, Tensor]]:
    """What server and client receive in one query, by the width of its elements; the server's corrections too."""
    program, keys = compiled.program, [Key(fresh_seed()[:KEY_BYTES]) for _ in range(3)]
    dealer = DealerWeights(keys[2], program.weight_shapes)
    client = ClientWeights(dict(compiled.server_weights.masked(dealer, program.weight_rings)))
    corrections = dict(deal(program.circuit, keys[SERVER], keys[CLIENT], dealer))
    seen: tuple[list[tuple[Tensor, Wire]], list[tuple[Tensor, Wire]]] = ([], [])
    server = Correlations(SERVER, keys[SERVER], corrections)
    values = program.client_values({"x": x}, {})
    run_pair(
        watched(execute(program.circuit, program.revealed, SERVER, server, compiled.server_weights), seen[SERVER]),
        watched(
            execute(program.circuit, program.revealed, CLIENT, Correlations(CLIENT, keys[CLIENT]), client, values),
            seen[CLIENT],
        ),
    )
    return [pooled(received) for received in seen]


def test_what_parties_see_of_two_outputs_is_uniform() -> None:
    """Of two inputs that are as different as they can be, and of the two runs together."""
    model = Returning(lambda a, b: {"a": a, "b": b})
    found = compile(model, inputs(0, rows=2000), calibration=[{"x": torch.full((2000, 8), v)} for v in (-4.0, 4.0)])
    runs = [views(found, torch.full((2000, 8), value)) for value in (-4.0, 4.0)]
    for party in (SERVER, CLIENT):
        first, second = (run[party] for run in runs)
        assert first.keys() == second.keys() != set()
        for width in first:
            for received in (first[width], second[width], difference(first[width], second[width])):
                assert suspicious(received, width) is None, (party, width)


def test_ciphertexts_refuse_several_outputs_by_name_of_the_operation() -> None:
    with pytest.raises(UnsupportedOperation, match=r"3 outputs.*\nhint: return one tensor"):
        secure.compile(Heads(), inputs(0), deployment=secure.Ckks())


def test_a_result_too_many_or_too_few_is_refused(compiled: MpcModel) -> None:
    shapes = [compiled.program.circuit[i].protocol.out.shape for i in compiled.program.revealed]
    zeros = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
    assert list(compiled.program.decode(zeros)) == ["deep", "shallow", "again"]
    for wrong in (zeros[:-1], [*zeros, zeros[0]]):
        with pytest.raises(ValueError, match="zip"):
            compiled.program.decode(wrong)
    changed = dataclasses.replace(compiled.program, outputs=compiled.program.outputs[:1])
    with pytest.raises(secure.InvalidProgram, match="not what the circuit reveals"):
        Program.from_bytes(changed.encoded)
