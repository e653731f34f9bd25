"""The front end: modules become graphs that compute the same, with the visibilities that privacy needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure
from secure.capture.capture import capture
from secure.capture.clear_operations import CLEAR_OPERATIONS
from secure.capture.graph import Graph, Node, run
from secure.capture.operation import OPERATIONS
from secure.cost.outline import outline
from secure.errors import InvalidInput, UnsupportedOperation


class Function(nn.Module):
    """A module around a function of x, a mask m (1: keep) and a weight w."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.linspace(-1, 1, 8).reshape(2, 4))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        # x times a weight is shared
        return self.function(x * self.w[0], m, self.w)


def check(model: nn.Module, inputs: dict[str, Tensor], tolerance: float = 1e-6) -> Graph:
    """Capture, compare with the module, and survive a round trip through JSON; gives the graph."""
    model.eval()
    graph, parameters = capture(model, inputs)
    assert set(parameters) == set(graph.parameters)
    read = Graph.from_json(graph.to_json())
    assert read == graph
    for node in graph.nodes:
        json.dumps(dict(node.attrs), allow_nan=False)
        assert node.visibility in ("public", "client", "server", "shared")
    with torch.no_grad():
        expected = model(**inputs)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    results = run(read, inputs, parameters)
    assert len(results) == len(expected)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, atol=tolerance, rtol=tolerance)
    return graph


def example(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, 3, 4, generator=generator), "m": torch.tensor([[1, 1, 0], [1, 0, 0]])}


def additive(m: Tensor) -> Tensor:
    return (1 - m[:, None, :].float()) * torch.finfo(torch.float32).min


def attention_scores(x: Tensor) -> Tensor:
    return x @ x.transpose(1, 2) / 2


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "square": (lambda x, m, w: x * x + x**2, {"square", "add"}),
    "powers": (lambda x, m, w: x**3 - x.pow(4) + x.pow(5), {"square", "mul", "add", "sub"}),
    "scalars": (lambda x, m, w: (2 - x) / 4 + (x - 1) * 3 + x * 1.0 + 0.0, {"neg", "add", "mul"}),
    "scalar tensor": (lambda x, m, w: x / torch.tensor(2.0) - torch.full((4,), 0.5), {"add", "mul"}),
    "alpha": (lambda x, m, w: torch.add(x, x, alpha=3) - torch.sub(x, w[1], alpha=2), {"add", "mul", "sub"}),
    "divide by clear": (lambda x, m, w: x / m.sum(-1, keepdim=True)[:, :, None] / (w[0] + 2), {"mul"}),
    "rsqrt": (lambda x, m, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1), {"rms_norm"}),
    "sqrt": (lambda x, m, w: x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 1), {"rsqrt", "sum"}),
    "rms norm": (lambda x, m, w: F.rms_norm(x, (4,), w[1], 1e-6), {"rms_norm"}),
    "normalize": (lambda x, m, w: F.normalize(x, dim=-1), {"l2_normalize"}),
    "normalize axis 1": (lambda x, m, w: x / x.norm(dim=1, keepdim=True), {"l2_normalize"}),
    "layer norm": (lambda x, m, w: F.layer_norm(x, (3, 4)) + F.layer_norm(x, (4,), w[0], w[1]), {"layer_norm"}),
    "layer norm bias": (lambda x, m, w: F.layer_norm(x, (4,), None, w[1]), {"layer_norm"}),
    "activations": (lambda x, m, w: x.tanh() + x.relu() + F.silu(x) + x.sigmoid(), {"tanh", "relu", "silu"}),
    "gelu": (lambda x, m, w: F.gelu(x) + F.gelu(x, approximate="tanh"), {"gelu"}),
    "gelu by hand": (
        lambda x, m, w: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3)))),
        {"gelu"},
    ),
    "softmax": (lambda x, m, w: x.softmax(1), {"softmax"}),
    "float mask": (lambda x, m, w: (attention_scores(x) + additive(m)).softmax(-1), {"softmax", "add"}),
    "masked fill": (
        lambda x, m, w: attention_scores(x).masked_fill(m[:, None] == 0, float("-inf")).softmax(-1),
        {"softmax", "add"},
    ),
    "where mask": (
        lambda x, m, w: torch.where(m[:, None] == 1, attention_scores(x), -1e30).softmax(-1),
        {"softmax", "add"},
    ),
    "where": (lambda x, m, w: torch.where(m[:, :, None] == 1, x, 2 * x), {"mul", "add"}),
    "masked mean": (
        lambda x, m, w: (x * m[:, :, None].float()).sum(1) / m[:, :, None].float().sum(1).clamp(min=1e-9),
        {"mul", "sum"},
    ),
    "attention": (
        lambda x, m, w: F.scaled_dot_product_attention(x, x, x, attn_mask=m[:, None, :].bool()),
        {"matmul", "mul", "add", "softmax", "permute"},
    ),
    "causal attention": (
        lambda x, m, w: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
        {"matmul", "mul", "add", "softmax", "permute"},
    ),
    "addmm": (lambda x, m, w: torch.addmm(w[0], x[0], w.T @ w), {"linear", "reshape", "slice"}),
    "matrix of the server": (lambda x, m, w: x @ w.T, {"linear"}),
    "matrix of the client": (lambda x, m, w: m[:, None, :].float() @ x, {"matmul"}),
    "einsum": (lambda x, m, w: torch.einsum("bij,bkj->bik", x, x), {"matmul"}),
    "in place": (lambda x, m, w: x.clone().add_(1).mul_(w[1]), {"add", "mul"}),
    "shapes": (
        lambda x, m, w: torch.cat([x.flatten(1).unsqueeze(1), x.reshape(2, 1, -1)], 1).view(2, -1, 3).permute(2, 0, 1),
        {"reshape", "cat", "permute"},
    ),
    "pieces": (
        lambda x, m, w: torch.cat([*x.split(3, -1), *x.chunk(2, -1), x[..., 1:4:2], x[:, -1:].expand(2, 3, 4)], -1),
        {"slice", "cat", "expand"},
    ),
    "unbind": (lambda x, m, w: torch.stack(x.unbind(1), -1) + x[:, 1].unsqueeze(-1), {"slice", "reshape", "cat"}),
    "transposes": (lambda x, m, w: x.mT.transpose(0, 1).transpose(-1, 0), {"permute"}),
    "reductions": (lambda x, m, w: x.sum() + x.mean((0, 2), keepdim=True) + x.mean(-1).sum(1), {"sum", "mean"}),
    "identities": (lambda x, m, w: F.dropout(x, 0.5, False).contiguous().detach().to(torch.float32), set()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name: str) -> None:
    function, operations = FUNCTIONS[name]
    graph = check(Function(function), example())
    assert operations <= set(graph.counts())
    assert "clear" not in graph.counts()
    allowed = operations | {"mul", "add", "reshape", "permute", "matmul", "cat", "slice", "sum", "mean"}
    assert set(graph.counts()) - {"square", "tanh"} <= allowed


def test_mlp_holds_no_weights_and_names_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    graph, parameters = capture(model, {"input": torch.randn(3, 4)})
    assert [node.op for node in graph.nodes if node.visibility == "shared"] == ["linear", "gelu", "linear"]
    assert [node.path for node in graph.nodes if node.visibility == "shared"] == ["0", "1", "2"]
    assert graph.inputs["input"].visibility == "client"
    assert graph.inputs["input"].shape == (3, 4)
    assert set(parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert len(graph.to_json()) < 3000


class PatchTransformer(nn.Module):
    """A small vision transformer with its own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, stride=4)
        self.norm = nn.BatchNorm1d(16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.qkv = nn.Linear(16, 48, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Any:
        x = self.norm(self.patches(image).flatten(2)).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x[:, 0])


def test_vision_transformer() -> None:
    torch.manual_seed(1)
    model = PatchTransformer()
    model(image=torch.randn(8, 1, 8, 8))  # moves the running statistics
    graph = check(model, {"image": torch.randn(2, 1, 8, 8)}, 1e-5)
    client = {node.op for node in graph.nodes if node.visibility == "client"}
    assert client == {"input", "clear"}  # the patches are cut in the clear
    assert all(node.visibility == "shared" for node in graph.nodes if node.op == "linear")


def test_one_tensor_given_for_two_inputs() -> None:
    """They are two inputs all the same: what the model does with each must not be mixed up."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = self.linear(x) - 2 * y
            return result

    x = torch.randn(1, 4)
    model = Difference().eval().requires_grad_(False)
    graph, parameters = capture(model, {"x": x, "y": x})
    other = {"x": x, "y": torch.randn(1, 4)}
    torch.testing.assert_close(run(graph, other, parameters)[0], model(**other))


def test_deterministic_and_leaves_the_model_alone() -> None:
    torch.manual_seed(2)
    model = PatchTransformer().train()
    model.norm.eval()
    first, _ = capture(model, {"image": torch.zeros(2, 1, 8, 8)})
    second, _ = capture(model, {"image": torch.randn(2, 1, 8, 8)})
    assert first == second
    assert first.to_json() == second.to_json()
    assert [model.training, model.qkv.training, model.norm.training] == [True, True, False]


def test_precise_run_and_observation() -> None:
    graph, parameters = capture(Function(lambda x, m, w: x.softmax(-1) + m[:, :, None] / 3), example())
    seen: list[str] = []
    precise = {name: value.double() for name, value in parameters.items()}

    def observe(node: Node, value: Tensor) -> None:
        assert tuple(value.shape) == node.shape
        seen.append(node.op)

    (result,) = run(graph, example(), precise, observe)
    assert result.dtype == torch.float64
    assert sorted(seen) == sorted(node.op for node in graph.nodes)  # parameters when they are read
    torch.testing.assert_close(result, run(graph, example(), parameters)[0].double(), atol=1e-6, rtol=0)


class Tied(nn.Module):
    ids: Tensor
    inv_freq: Tensor
    scale: Tensor
    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("ids", torch.arange(3), persistent=False)
        self.register_buffer("inv_freq", torch.rand(4), persistent=False)
        self.register_buffer("scale", torch.rand(4), persistent=False)
        self.register_buffer("kept", torch.arange(4))

    def forward(self, ids: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids) + self.table(self.ids) * self.inv_freq.cos()
        return self.head(x * self.scale + self.kept), ids + self.ids


def test_leaves_and_their_visibilities() -> None:
    ids = torch.tensor([[1, 2, 3]])
    graph = check(Tied(), {"ids": ids, "unused": ids})
    assert set(graph.parameters) == {"table.weight", "scale", "kept"}  # tied: one
    assert set(graph.inputs) == {"ids", "unused"}
    assert graph.nodes[graph.outputs[1]].visibility == "client"
    public = [node for node in graph.nodes if node.visibility == "public"]
    assert [node.op for node in public] == ["constant"] * len(public)
    graph, _ = capture(Tied(), {"ids": ids, "unused": ids}, public=())
    assert "inv_freq" in graph.parameters


def test_consumers() -> None:
    graph, _ = capture(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), {"input": torch.randn(1, 4)})
    linear = next(node for node in graph.nodes if node.op == "linear")
    assert graph.consumers()[linear.id] == (graph.outputs[0],)
    assert str(linear).startswith(f"%{linear.id} = linear(%")


class Inner(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.scale(x))


class Outer(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(function)])

    def forward(self, x: Tensor) -> Any:
        return self.blocks[0](x)


UNSUPPORTED: dict[str, tuple[Callable[..., Any], str]] = {
    "sort": (lambda x: x.sort(-1)[0], "aten.sort"),
    "division": (lambda x: x / x.sum(-1, keepdim=True), "aten.div.Tensor(shared float (2, 4), shared float (2, 1))"),
    "exponent": (lambda x: x**0.3, "aten.pow.Tensor_Scalar"),
    "norm alone": (lambda x: x.norm(dim=-1, keepdim=True) + 1, "shared norm"),
    "root alone": (lambda x: x.sqrt() + 1, "shared root"),
    "to integers": (lambda x: x.to(torch.int64), "aten.to.dtype"),
    "dropout": (lambda x: F.dropout(x, 0.5, True), "aten.dropout"),
    "random": (lambda x: x + torch.rand(4), "aten.rand"),
    "clamp by a tensor": (lambda x: x.clamp(torch.tensor(-1.0)), "aten.clamp"),
    "mask elsewhere": (lambda x: x.masked_fill(torch.tensor([True, False] * 2), -1e9), "aten.masked_fill"),
    "convolution": (lambda x: F.conv_transpose1d(x[None], torch.ones(2, 1, 2)), "aten.conv"),
    "interpolation": (lambda x: F.interpolate(x[None, None], (99999, 9), mode="bilinear"), "aten.upsample_bilinear2d"),
    "order": (lambda x: x.repeat(1, 5000)[:, torch.arange(20000) ** 2 % 20000], "aten.index"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operations(name: str) -> None:
    function, operation = UNSUPPORTED[name]
    with pytest.raises(UnsupportedOperation) as caught:
        capture(Outer(function), {"x": torch.randn(2, 4)})
    message = str(caught.value)
    for part in ("module 'blocks.0'", operation, "\nhint: "):
        assert part in message
    assert "supported on shared values: " + ", ".join(sorted(OPERATIONS)) in message


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def test_control_flow_that_depends_on_data() -> None:
    with pytest.raises(UnsupportedOperation, match=r"module 'blocks.0' .* depend on data.*\nhint: "):
        capture(Outer(branch), {"x": torch.randn(2, 4)})


@pytest.mark.parametrize(
    "function",
    [
        lambda x, m, w: x[x > 0],
        lambda x, m, w: x * x.max().item(),
        lambda x, m, w: x[m > 0],
        lambda x, m, w: x * m.sum().item(),
        lambda x, m, w: x[:, : int(m.sum())],
    ],
)
def test_shapes_and_numbers_that_depend_on_data(function: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedOperation, match=r"the top-level module(.|\n)*\nhint: "):
        capture(Function(function), example())


class Counter(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_other_errors() -> None:
    with pytest.raises(UnsupportedOperation, match=r"changes its own state.*calls"):
        capture(Counter(), {"x": torch.randn(2)})
    with pytest.raises(UnsupportedOperation, match="cannot be traced"):
        capture(nn.Linear(4, 4), {"x": torch.randn(2, 4)})  # it is called input
    with pytest.raises(UnsupportedOperation, match="returns no tensor"):
        capture(Outer(lambda x: None), {"x": torch.randn(2, 4)})
    with pytest.raises(InvalidInput, match="example input 'input'"):
        capture(nn.Linear(4, 4), {"input": [1.0]})  # type: ignore[dict-item]


def test_run_checks_its_inputs() -> None:
    graph, parameters = capture(nn.Linear(4, 4), {"input": torch.randn(2, 4)})
    with pytest.raises(ValueError, match=r"the input 'input' is missing\nhint: "):
        run(graph, {}, parameters)
    with pytest.raises(ValueError, match=r"the input 'input' is float \(3, 4\)"):
        run(graph, {"input": torch.randn(3, 4)}, parameters)
    with pytest.raises(ValueError, match="the parameter 'bias' is missing"):
        run(graph, {"input": torch.randn(2, 4)}, {"weight": parameters["weight"]})


def edit(position: int, **changes: Any) -> str:
    """A graph with one node changed."""
    graph, _ = capture(Function(lambda x, m, w: x + m.float()[:, :, None].cumsum(1)), example())
    document = json.loads(graph.to_json())
    document["nodes"][position].update(changes)
    return json.dumps(document)


def find(op: str, visibility: str) -> int:
    graph = Graph.from_json(edit(0))
    return next(node.id for node in graph.nodes if (node.op, node.visibility) == (op, visibility))


@pytest.mark.parametrize(
    ("op", "visibility", "changes", "message"),
    [
        ("clear", "client", {"attrs": {"target": "os.system", "args": ["true"]}}, "not among the operations"),
        ("clear", "client", {"attrs": {"target": "aten.rand.default", "args": [[4]]}}, "not among the operations"),
        ("clear", "client", {"attrs": {"target": "aten.cos.default", "args": [{"input": 7}]}}, "malformed argument"),
        ("clear", "client", {"attrs": {"target": "aten.cos.default", "args": [{"x": 7}]}}, "malformed argument"),
        ("clear", "client", {"visibility": "public"}, "visibility is client"),
        ("clear", "client", {"inputs": [99]}, "do not come before"),
        ("mul", "shared", {"shape": [1]}, r"gives float \(2, 3, 4\)"),
        ("mul", "shared", {"visibility": "client"}, "visibility is shared"),
        ("mul", "shared", {"op": "clear"}, "'clear' of operands"),
        ("mul", "shared", {"op": "exec"}, "unknown operation 'exec'"),
        ("mul", "shared", {"op": "permute"}, "invalid graph"),
        ("input", "client", {"shape": [-1]}, "shape.0: Input should be greater than or equal to 0"),
        ("input", "client", {"dtype": "str"}, "unknown kind"),
        ("parameter", "server", {"id": 3}, "do not come before"),
    ],
)
def test_graphs_from_elsewhere_are_checked(op: str, visibility: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph.from_json(edit(find(op, visibility), **changes))


def test_texts_that_are_no_graphs() -> None:
    for text in ("", "{}", "[]", '{"nodes": [{}], "outputs": []}', '{"nodes": [], "outputs": [0]}', "[" * 100000):
        with pytest.raises(ValueError, match=r"not a graph|invalid graph|not a JSON document|of depth"):
            Graph.from_json(text)


OTHER_STRIDES = {"aten.view.default", "aten._unsafe_view.default", "aten.copy.default"}


def test_whitelist_is_of_pure_functions() -> None:
    table: dict[str, Any] = dict(CLEAR_OPERATIONS)
    for name, operation in table.items():
        assert name.startswith("aten.")
        packet, overload = name.removeprefix("aten.").split(".")
        named = getattr(getattr(torch.ops.aten, packet), overload)
        assert operation is named or name in OTHER_STRIDES
        assert not named._schema.is_mutable, name
        assert torch.Tag.nondeterministic_seeded not in named.tags, name


MOVES: dict[str, Callable[..., Tensor]] = {
    "flip": lambda x, m, w: x.flip(1),
    "roll": lambda x, m, w: x.roll((1, -2), (1, 2)),
    "repeat": lambda x, m, w: x.repeat(2, 1, 3),
    "tile": lambda x, m, w: x.tile(2, 2),
    "repeat interleave": lambda x, m, w: x.repeat_interleave(2, -1),
    "index select": lambda x, m, w: x.index_select(1, torch.tensor([2, 0, 0])),
    "indices": lambda x, m, w: x[:, torch.tensor([2, 0]), torch.tensor([1, 3])],
    "negative indices": lambda x, m, w: x[:, [-1, 0]],
    "gather": lambda x, m, w: x.gather(2, torch.tensor([[[0, 3], [1, 1], [2, 0]]] * 2)),
    "padding": lambda x, m, w: F.pad(x, (1, 2, 0, 1)),
    "padding by a number": lambda x, m, w: F.pad(x, (1, 0), value=2.5),
    "reflection": lambda x, m, w: F.pad(x, (2, 1), mode="reflect"),
    "strided": lambda x, m, w: x.as_strided((2, 2, 3), (12, 2, 1), 1),
    "windows of an axis": lambda x, m, w: x.unfold(2, 3, 1),
    "triangle": lambda x, m, w: x.tril() + x.triu(1) * 2,
    "diagonal": lambda x, m, w: x.diagonal(0, 1, 2),
    "shuffled pixels": lambda x, m, w: F.pixel_shuffle(x.reshape(1, 4, 2, 3), 2),
    "an own part": lambda x, m, w: torch.cat([w[:1].expand(2, 1, 4), x, torch.ones(2, 1, 4)], 1),
    "empty parts": lambda x, m, w: torch.cat([x[..., 4:] * 2, x[..., :4]], -1),
    "interpolation": lambda x, m, w: F.interpolate(x[:, None], (6, 5), mode="bilinear"),
    "nearest": lambda x, m, w: F.interpolate(x[:, None], (6, 8), mode="nearest"),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    graph = check(Function(MOVES[name]), example())
    assert not set(graph.counts()) & {"clear", "softmax", "matmul"}


class Wide(Function):
    """The same with a weight of four rows."""

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        return self.function(x * self.w[0], m, self.w.repeat(2, 1))


CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "one dimension": lambda x, m, w: F.conv1d(x, w[:3, :3, None].expand(3, 3, 2), w[0, :3], padding=1),
    "strided": lambda x, m, w: F.conv1d(x, w[:4, :3, None].expand(4, 3, 3), stride=2, padding=2),
    "dilated": lambda x, m, w: F.conv1d(x, w[:4, :3, None].expand(4, 3, 2), dilation=2),
    "of each channel": lambda x, m, w: F.conv1d(x, w[:3, :2][:, None], w[0, :3], groups=3),
    "in groups": lambda x, m, w: F.conv1d(x.repeat(1, 2, 1), w[:4, :3, None].expand(4, 3, 2), groups=2),
    "two dimensions": lambda x, m, w: F.conv2d(x[:, None], w[:, None, :2, None].expand(4, 1, 2, 3), padding=1),
    "same": lambda x, m, w: F.conv2d(x[:, None], w[:, None, :3, None].expand(4, 1, 3, 3), padding="same"),
    "patches": lambda x, m, w: F.conv1d(x, w[:, :3, None].expand(4, 3, 2), stride=2),
    "largest": lambda x, m, w: F.max_pool2d(x[:, None], 2, 1) + F.max_pool2d(x[:, None], 3, 1, 1)[..., 1:, 1:],
    "mean": lambda x, m, w: F.avg_pool1d(x, 2, 2) + F.adaptive_avg_pool1d(x, 2),
    "mean with padding": lambda x, m, w: F.avg_pool2d(x[:, None], 3, 2, 1),
    "maximum": lambda x, m, w: x.amax((1, 2)) + x.max(1)[0].amax(-1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_pools(name: str) -> None:
    check(Wide(CONVOLUTIONS[name]), example())


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "clamp": lambda x, m, w: x.clamp(-0.5, 1.5) + x.clamp(max=0.25) + x.clamp_min(0.5),
    "relu6": lambda x, m, w: F.relu6(x * 8) + F.hardtanh(x),
    "hard": lambda x, m, w: F.hardsigmoid(x) + F.hardswish(x),
    "leaky": lambda x, m, w: F.leaky_relu(x, 0.2) + F.prelu(x, w[0, :3]) + F.prelu(x, w[0, :1]),
    "elu": lambda x, m, w: F.elu(x, 1.5) + F.celu(x, 0.5) + F.selu(x),
    "mish": lambda x, m, w: F.mish(x),
    "erf": lambda x, m, w: torch.erf(x) + x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "group norm": lambda x, m, w: F.group_norm(x.repeat(1, 2, 1), 2, w[0, :3].repeat(2), w[1, :3].repeat(2)),
    "layer norm of two axes": lambda x, m, w: F.layer_norm(x, (3, 4), w[:3], w[:3]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_more_activations_and_norms(name: str) -> None:
    graph = check(Wide(ACTIVATIONS[name]), example())
    if name == "erf":
        assert {"erf", "gelu"} <= set(graph.counts())


class Picks(nn.Module):
    """A row of every text, at a place that the client knows: the last one that is no padding."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = x @ self.weight
        last = (torch.arange(mask.shape[1]) * mask).argmax(-1)
        if self.how == "index":
            return hidden[torch.arange(x.shape[0]), last]
        if self.how == "gather":
            return hidden.gather(1, last[:, None, None].expand(-1, 1, 4))[:, 0]
        return hidden[0].index_select(0, last)


@pytest.mark.parametrize("how", ["index", "gather", "select"])
def test_a_row_at_a_place_that_the_client_knows(how: str) -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    graph = check(Picks(how), {"x": x, "mask": mask})
    assert graph.counts()["matmul"] == 1


class Masks(nn.Module):
    """Scores with a bias of the server's, a causal mask, and the client's padding mask, in an order that models use."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.bias, self.scale = order, nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        low = torch.finfo(torch.float32).min
        x = x * self.scale
        scores = x @ x.transpose(1, 2)
        causal = torch.ones(3, 3, dtype=torch.bool).tril()
        padding = (1 - mask[:, None, :].float()) * low
        if self.order == "bias first":
            scores = scores + (self.bias + padding)
        elif self.order == "twice":
            scores = torch.where(causal, scores + self.bias, low) + padding
        elif self.order == "public":
            scores = scores + (self.bias + torch.where(causal, 0.0, low))
        elif self.order == "masked bias":
            scores = scores + torch.where(mask[:, None, :].bool(), self.bias, low)
        else:
            scores = scores - 1e30 * (1 - mask[:, None, :].float())
        return scores.softmax(-1) @ x


@pytest.mark.parametrize("order", ["bias first", "twice", "public", "masked bias", "subtracted"])
def test_masks_of_several_sources(order: str) -> None:
    """They meet in the clear and are added last, so that the protocol's softmax takes them."""
    samples = [{"x": torch.randn(2, 3, 4), "mask": torch.tensor([[1, 1, 1 - s % 2], [1, 1, 1]])} for s in range(6)]
    model = Masks(order).eval()
    check(model, samples[1])
    compiled = secure.compile(model, samples[0], calibration=samples[1:])
    with torch.no_grad():
        expected = model(**samples[1])
    answer = secure.insecure_in_process(compiled).query(samples[1])
    assert float((answer - expected).abs().max()) < 5e-3


def test_moves_of_what_the_client_knows_stay_in_the_clear() -> None:
    """Padding, copies and maxima of an input alone need no protocol, by whatever name the model calls them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            padded = F.pad(x, (1, 1)).narrow(1, 0, 6)
            return self.w * (padded + F.max_pool1d(x.repeat(1, 2)[None], 2, 1)[0, :, :6] + x.diagonal().sum())

    graph = check(Model(), {"x": torch.randn(4, 5)})
    assert not {"take", "amax"} & set(graph.counts())


class Sums(nn.Module):
    """A sum that no softmax reads, with summands as low as a mask's numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(4, 2)
        self.low: Tensor
        self.register_buffer("low", torch.tensor([-60000.0, 3.0]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        low: Tensor = self.low
        if self.how == "buffer":
            return h + low
        if self.how == "constant":
            return h + torch.tensor([-20000.0, 1.0])
        return h - y if self.how == "difference" else h + y


@pytest.mark.parametrize("how", ["buffer", "constant", "difference", "sum"])
def test_ordinary_summands_are_no_masks(how: str) -> None:
    """They were cut off at the depth of a softmax: 100 and 20,000 both came out as about 32."""
    torch.manual_seed(0)
    samples = [
        {"x": torch.randn(1, 4), "y": torch.tensor([[100.0, 20000.0]]) * (1 if how == "difference" else -1)}
        for _ in range(4)
    ]
    model = Sums(how).eval()
    compiled = secure.compile(model, samples[0], calibration=samples[1:])
    answer = secure.insecure_in_process(compiled).query(samples[1])
    with torch.no_grad():
        torch.testing.assert_close(answer.float(), model(**samples[1]), atol=2e-2, rtol=0)


class Several(nn.Module):
    """One result of both parties, one of the client's and one of the server's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mine": 2 * x, "both": self.layer(x), "theirs": self.layer.weight * 2}


def test_results_of_one_party_are_left_out_and_named() -> None:
    compiled = secure.compile(Several().eval(), {"x": torch.randn(1, 4)}, calibration=[{"x": torch.randn(1, 4)}])
    assert list(compiled.program.output_shapes) == ["both"]
    assert compiled.program.labels["left-out"] == "mine, theirs"


class Token(nn.Module):
    """A class token before the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token, self.layer(x)], 1)


def test_a_class_token_needs_no_weights_for_an_outline() -> None:
    assert outline(Token().eval(), {"x": torch.randn(1, 3, 4)}).cost.rounds > 0


def test_a_place_out_of_range_is_clamped() -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            return (x @ self.weight)[0].index_select(0, i)

    x = torch.randn(1, 3, 4)
    graph, parameters = capture(Row().eval(), {"x": x, "i": torch.tensor([1])})
    for i, row in ((7, 2), (-9, 0), (-1, 2)):
        (found,) = run(graph, {"x": x, "i": torch.tensor([i])}, parameters)
        torch.testing.assert_close(found[0], x[0, row])
