"""Operations as records: each is complete, says the truth about itself, and a new one takes one place."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure
from approximations import choose
from approximations.primitives import ZERO, Piece, piecewise
from secure.capture.builder import Builder, Value
from secure.capture.capture import capture
from secure.capture.graph import Graph, Node
from secure.capture.operation import OPERATIONS, RULES, Operation, operation, rule
from secure.cost.outline import outline
from secure.errors import InvalidInput, UnsupportedOperation
from secure.frontend import lower_model
from secure.lowering.lower import Lowered, Lowering, lower
from secure.lowering.observe import Observed, assume, observe
from secure.lowering.primitives import PRIMITIVES, Primitive
from secure.lowering.trace import Symbol, evaluate
from secure.operations.activations import approximate_softplus
from secure.operations.generation import keep_operation, last_rows_operation
from secure.polynomial.operations import layer_norm_operation, polynomial_operation, power_operation, rms_norm_operation
from tests.helpers import run_function

LENGTH = 4


class Alone(nn.Module):
    """One operation on shared values of shape (2, 4, 4), all around one."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, 16).reshape(4, 4))
        self.v = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.function(x * self.v, self.w, self.v, ids)


def sample(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, LENGTH, 4, generator=generator) + 0.5
    return {"x": x, "ids": torch.randint(0, 4, (2, LENGTH), generator=generator)}


ALONE: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, w, v, ids: x + 1,
    "amax": lambda x, w, v, ids: x.amax(1),
    "cat": lambda x, w, v, ids: torch.cat([x, x], 1),
    "convolution": lambda x, w, v, ids: F.conv1d(x, w[:, :, None].expand(4, 4, 3), v, padding=1),
    "elu": lambda x, w, v, ids: F.elu(x - 1),
    "embedding": lambda x, w, v, ids: F.embedding(ids, w),
    "erf": lambda x, w, v, ids: torch.erf(x),
    "expand": lambda x, w, v, ids: x[:, :1].expand(2, 3, 4),
    "gelu": lambda x, w, v, ids: F.gelu(x),
    "keep": lambda x, w, v, ids: x @ keep_operation(x, "keys", 0).mT,
    "looked_up": lambda x, w, v, ids: F.embedding(x.topk(2).indices, w),
    "l2_normalize": lambda x, w, v, ids: F.normalize(x, dim=-1),
    "last_rows": lambda x, w, v, ids: last_rows_operation(x, 1),
    "largest": lambda x, w, v, ids: x.topk(2).values,
    "largest_of": lambda x, w, v, ids: x.topk(4).indices.gather(-1, x.topk(2).indices),
    "largest_at": lambda x, w, v, ids: x.argmax(-1),
    "layer_norm": lambda x, w, v, ids: F.layer_norm(x, (4,), v, v),
    "linear": lambda x, w, v, ids: F.linear(x, w, v),
    "matmul": lambda x, w, v, ids: x @ x,
    "mean": lambda x, w, v, ids: x.mean(1),
    "mul": lambda x, w, v, ids: x * v,
    "neg": lambda x, w, v, ids: -x,
    "permute": lambda x, w, v, ids: x.permute(1, 0, 2),
    "polynomial": lambda x, w, v, ids: polynomial_operation(x, [1.0, 0.5, 0.25], 0.5),
    "polynomial_norm": lambda x, w, v, ids: layer_norm_operation(x, v, v, 0.1, 1e-3, 4.0, 3, 2),
    "polynomial_rms_norm": lambda x, w, v, ids: rms_norm_operation(x, v, 0.1, 1e-3, 4.0, 3, 2),
    "power": lambda x, w, v, ids: power_operation(x, -0.5, 0.1, 4.0, 3, 2),
    "real": lambda x, w, v, ids: x.argmax(-1).float(),
    "relu": lambda x, w, v, ids: x.relu(),
    "renumbered": lambda x, w, v, ids: x.argmax(-1, keepdim=True) * 3 + torch.arange(3),
    "rows_at": lambda x, w, v, ids: x.gather(-2, x[..., :3].argmax(-1)[:, :2, None].expand(2, 2, 4)),
    "reshape": lambda x, w, v, ids: x.flatten(1),
    "rms_norm": lambda x, w, v, ids: F.rms_norm(x, (4,), v, 1e-5),
    "rsqrt": lambda x, w, v, ids: torch.rsqrt(x),
    "sampled": lambda x, w, v, ids: secure.sample(x, 1e-7),
    "silu": lambda x, w, v, ids: F.silu(x),
    "slice": lambda x, w, v, ids: x[:, 1:3],
    "softmax": lambda x, w, v, ids: x.softmax(-1),
    "softplus": lambda x, w, v, ids: F.softplus(x, 2.0),
    "square": lambda x, w, v, ids: x.square(),
    "sub": lambda x, w, v, ids: x - v,
    "sum": lambda x, w, v, ids: x.sum(1),
    "take": lambda x, w, v, ids: x.flip(1),
    "tanh": lambda x, w, v, ids: x.tanh(),
}


def captured(function: Callable[..., Tensor]) -> tuple[Graph, dict[str, Tensor]]:
    graph, parameters = capture(Alone(function), sample())
    return graph, {name: value.double() for name, value in parameters.items()}


def lowered(function: Callable[..., Tensor]) -> Lowered:
    graph, parameters = captured(function)
    seen = observe(graph, [sample(s) for s in range(4)], parameters)
    return lower(graph, parameters, seen, 1, "one-hot", choose())


def error_of(function: Callable[..., Tensor]) -> float:
    """By how much the trace misses the function."""
    made = lowered(function)
    (output,) = made.outputs.values()
    (result,) = evaluate(made.trace, made.inputs(sample(1)), made.weights, outputs=[output.id])
    with torch.no_grad():
        expected = Alone(function).double()(sample(1)["x"].double(), sample(1)["ids"])
    return float((result - expected).abs().max())


ARITHMETIC = {
    *(
        "input",
        "linear",
        "matmul",
        "mul",
        "polynomial_product",
        "mul_public",
        "rotated",
        "mul_weight",
        "keep",
        "add",
        "add_weight",
        "sub",
        "offset",
        "scale",
        "sum",
    ),
    *("reshape", "expand", "permute", "slice", "cat", "take", "patches", "perturbed", "bounded", "power"),
    *("real", "units"),
}
COMPARISONS = {
    "piecewise",
    "exp_below",
    "maximum",
    "row_bound",
    "top_indices",
    "top_of",
    "top_values",
    "inverse_power",
}  # but for a "piecewise" of one piece, which is a polynomial


def is_comparison(p: Primitive) -> bool:
    return p.op in COMPARISONS and p.attrs.get("knots") != ()


def in_polynomial_company(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same in a model that says that it is in polynomial form."""
    return lambda x, w, v, ids: polynomial_operation(function(x, w, v, ids), [0.0, 1.0], 0.0)


def test_everything_is_here() -> None:
    assert set(ALONE) == set(OPERATIONS)
    assert {"input", *PRIMITIVES} == ARITHMETIC | COMPARISONS


@pytest.mark.parametrize("name", ALONE)
def test_a_record_is_complete(name: str) -> None:
    record = OPERATIONS[name]
    assert record.name == name
    assert record.lowering is not None
    assert (record.measure is None) == (record.assumption is None)


def check_says_whether_it_compares(name: str, function: Callable[..., Tensor]) -> None:
    """In a model that compares nothing else, the trace has a comparison if and only if the operation says so."""
    found = any(map(is_comparison, lowered(in_polynomial_company(function)).trace.primitives))
    assert found == OPERATIONS[name].compares, f"{name!r} {'compares' if found else 'does not compare'}"


@pytest.mark.parametrize(
    "name", sorted({*ALONE} - {"real", "looked_up", "renumbered", "rows_at"})
)  # which read what an arg-max compared
def test_an_operation_says_whether_it_compares(name: str) -> None:
    check_says_whether_it_compares(name, ALONE[name])


@pytest.mark.parametrize("name", ["relu", "softmax", "layer_norm", "square"])
def test_a_forgotten_property_is_noticed(name: str) -> None:
    record = OPERATIONS[name]
    with patch.dict(OPERATIONS, {name: replace(record, compares=not record.compares)}), pytest.raises(AssertionError):
        check_says_whether_it_compares(name, ALONE[name])


@pytest.mark.parametrize("name", ALONE)
def test_a_lowered_operation_computes_what_it_means(name: str) -> None:
    assert name in {node.op for node in captured(ALONE[name])[0].nodes}
    assert error_of(ALONE[name]) < 2e-3


@pytest.mark.parametrize("name", [name for name in ALONE if OPERATIONS[name].measure is not None])
def test_what_is_assumed_is_a_range(name: str) -> None:
    graph, _ = captured(ALONE[name])
    (node,) = (node for node in graph.nodes if node.op == name)
    low, high = assume(graph, 32.0).measured[node.id]
    assert 0 < low < high


# mistakes of whoever writes an operation


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    with patch.dict(OPERATIONS), patch.dict(RULES):
        yield


@pytest.mark.usefixtures("registry")
def test_nothing_is_defined_twice() -> None:
    with pytest.raises(TypeError, match="'relu' is defined twice"):
        operation("relu")
    with pytest.raises(TypeError, match=r"aten\.relu\.default is defined twice"):
        rule("relu.default")(lambda b, x: x)
    with pytest.raises(TypeError, match="the lowering of operation 'relu' is defined twice"):
        OPERATIONS["relu"].lower(lambda to, node: None)


def toy() -> Operation:
    """A new operation that lacks its lowering."""

    @operation("softshrink", compares=True)
    def softshrink(x: Tensor, /, *, width: float) -> Tensor:
        return F.softshrink(x, width)

    @softshrink.aten("softshrink.default")
    def _(b: Builder, x: Value, width: float = 0.5) -> Value:
        return b.shared("softshrink", x, width=float(width))

    return softshrink


def half(x: Tensor, w: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    return F.softshrink(x - 1, 0.25)


@pytest.mark.usefixtures("registry")
def test_an_operation_without_a_lowering_is_refused_by_place() -> None:
    toy()
    with pytest.raises(
        UnsupportedOperation, match=r"model: no protocol for 'softshrink'\nhint: supported are add, amax, cat"
    ):
        lowered(half)


@pytest.mark.usefixtures("registry")
def test_a_lowering_that_gives_something_else_is_refused() -> None:
    @toy().lower
    def _(to: Lowering, node: Node) -> Symbol:
        return to.symbol(node.inputs[0]).sum(-1)

    with pytest.raises(TypeError, match="the lowering of 'softshrink' gives"):
        lowered(half)


@pytest.mark.usefixtures("registry")
def test_an_operation_that_observes_says_what_to_assume() -> None:
    @toy().observes
    def _(x: Tensor, **_: Any) -> Tensor:
        return x

    with pytest.raises(TypeError, match="'softshrink' observes its operand, but does not say what range to assume"):
        assume(captured(half)[0], 32.0)


# a new operation


@pytest.mark.usefixtures("registry")
def test_a_new_operation_takes_one_place() -> None:
    """Registered here and nowhere else, with a range that calibration finds: capture, both ranges, and a query."""
    record = toy()
    ranges: list[tuple[float, float]] = []

    @record.observes
    def _(x: Tensor, *, width: float) -> Tensor:
        return x.abs().amax(-1)

    @record.assumes
    def _(operand: Node, reach: float, *, width: float) -> tuple[float, float]:
        return 0.0, width * reach

    @record.lower
    def _(to: Lowering, node: Node) -> Symbol:
        ranges.append(to.measured(node))
        width = node.attrs["width"]
        pieces = [Piece((width, 1.0)), ZERO, Piece((-width, 1.0))]
        result: Symbol = piecewise(to.symbol(node.inputs[0]), [-width, width], pieces)
        return result

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Softshrink(0.25), nn.Linear(8, 3))
    inputs = [{"input": torch.randn(3, 6)} for _ in range(12)]
    compiled = secure.compile(model, inputs[0], calibration=inputs[1:])
    with torch.no_grad():
        assert ranges[-1][1] == pytest.approx(max(float(model[0](**x).abs().max()) for x in inputs))
        answer = secure.insecure_in_process(compiled).query(inputs[5])
        assert float((answer - model(**inputs[5])).abs().max()) < 5e-3
    outline(model, inputs[0])
    assert ranges[-1] == (0.0, 8.0)
    check_says_whether_it_compares("softshrink", half)


def test_toys_are_gone() -> None:
    assert set(OPERATIONS) == set(ALONE)
    with pytest.raises(UnsupportedOperation, match=r"has no private protocol"):
        captured(half)


def test_softplus_within_its_error() -> None:
    x = torch.linspace(-30, 30, 5001, dtype=torch.float64)
    run = run_function(approximate_softplus, x)
    exact = F.softplus(x)
    assert 4e-4 < float((run.floating - exact).abs().max()) < 5.1e-4
    assert float((run.result - exact).abs().max()) < 8e-4


@pytest.mark.parametrize("beta", [1.0, 0.5, 3.0])
def test_a_model_with_softplus(beta: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Softplus(beta, threshold=25.0), nn.Linear(16, 3))
    inputs = [{"input": 4 * torch.randn(3, 6)} for _ in range(12)]
    compiled = secure.compile(model, inputs[0], calibration=inputs[1:])
    with secure.insecure_in_process(compiled) as session, torch.no_grad():
        for x in inputs[4:6]:
            assert float((session.query(x) - model(**x)).abs().max()) < 2e-3 / beta


@pytest.mark.parametrize(
    ("beta", "threshold", "message"), [(-1.0, 20.0, "beta > 0"), (1.0, 3.0, "a threshold of at least 9")]
)
def test_another_softplus_is_refused(beta: float, threshold: float, message: str) -> None:
    with pytest.raises(UnsupportedOperation, match=f"softplus(.|\n)*hint: .*{message}"):
        captured(lambda x, w, v, ids: F.softplus(x, beta, threshold))


# notes that operations leave for each other


def squared_softmax(x: Tensor, w: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    weights = x.softmax(-1)
    return weights @ weights


def scaled_square(x: Tensor, w: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    y = F.linear(x, w)
    return (y @ y) * 0.25


def attention(x: Tensor, w: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    scores = F.linear(x, w, v) @ F.linear(x, w.T).transpose(1, 2) * 0.25
    return scores.softmax(-1) @ x


@pytest.mark.parametrize("function", [squared_softmax, scaled_square, attention])
def test_products_of_one_value_with_itself(function: Callable[..., Tensor]) -> None:
    """A product that reads a softmax, or a linear layer, as both its operands cannot divide, or scale, but one."""
    assert error_of(function) < 1e-3


def test_a_factor_moves_into_the_linear_layer() -> None:
    made = lowered(attention)
    assert not any(p.op == "scale" and p.attrs["value"] == 0.25 for p in made.trace.primitives)
    assert {name for name in made.weights if "*0.25" in name}


class Tables(nn.Module):
    """Two tables of other sizes that are looked up by the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(5, 3), nn.Embedding(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.first(ids), self.second(ids), self.first(ids)], -1)


@pytest.mark.parametrize("embedding", ["one-hot", "client-table"])
def test_two_tables_of_the_same_ids(embedding: str) -> None:
    torch.manual_seed(0)
    model = Tables()
    inputs = [{"ids": torch.randint(0, 5, (2, 3))} for _ in range(4)]
    compiled = secure.compile(model, inputs[0], calibration=inputs[1:], embedding=embedding)
    with secure.insecure_in_process(compiled) as session, torch.no_grad():
        assert float((session.query(inputs[2]) - model(**inputs[2])).abs().max()) < 1e-3
    assert secure.Program.from_bytes(compiled.program.encoded).digest == compiled.program.digest


# the first half of every compiler


def test_a_model_needs_an_example() -> None:
    with pytest.raises(InvalidInput, match="at least one"):
        lower_model(nn.Linear(2, 2), [], margin_bits=1, embedding="one-hot", functions=choose())


def test_an_unknown_embedding_is_refused() -> None:
    graph, parameters = captured(ALONE["square"])
    with pytest.raises(InvalidInput, match="unknown embedding 'two-hot'\nhint: one of one-hot, client-table"):
        lower(graph, parameters, Observed(), 1, "two-hot", choose())


def test_what_stands_below_the_operations_knows_none_of_them() -> None:
    """Operations register when the front end is imported; the two compilers are siblings on it."""
    root = Path(secure.__file__).parent
    allowed = {"capture": {"errors", "capture"}, "lowering": {"errors", "capture", "lowering"}}
    for wing, below in allowed.items():
        for path in (root / wing).glob("*.py"):
            assert imported(path) <= below, path.name
    for wing, sibling in (("ckks", "mpc"), ("mpc", "ckks")):
        for path in (root / wing).glob("*.py"):
            assert sibling not in imported(path), path.name


def imported(path: Path) -> set[str]:
    names = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names]
    return {name.split(".")[1] for name in names if name.startswith("secure.")}


class Layers(nn.Module):
    """Layers of one matrix behind one normalization, each with a bias of its own or none."""

    def __init__(self) -> None:
        super().__init__()
        self.normalization, self.matrix = nn.LayerNorm(4), nn.Parameter(torch.randn(3, 4))
        self.first, self.second = (nn.Parameter(torch.randn(3)) for _ in range(2))
        nn.init.uniform_(self.normalization.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalization(x)
        layers = [F.linear(x, self.matrix, bias) for bias in (self.first, self.second, None)]
        return torch.cat(layers, -1)


def test_layers_of_one_matrix_behind_one_normalization() -> None:
    """What they absorb of the normalization goes into their biases, which are not one."""
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(1, 5, 4)
    with secure.insecure_in_process(secure.compile(model, {"x": x})) as session, torch.no_grad():
        assert float((session.query({"x": x}) - model(x)).abs().max()) < 2e-3
