"""Small encoded Programs and other files, as the tests of parsers change them."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import secure
from protocols.ckks.parameters import Parameters
from protocols.protocol import Protocol
from secure.capture.clear_operations import CLIENT_TARGETS, dtype_of, evaluate_clear, kind_of
from secure.capture.graph import Graph, Node, placeholder
from secure.ckks.program import CkksProgram
from secure.lowering.client_inputs import ClientInput, clear_values

EXTREMES: dict[str, list[Any]] = {
    "int": [-(1 << 63), -(1 << 63) + 1, -(1 << 31), -2, -1, 0, 1, 2, (1 << 31), (1 << 62), (1 << 63) - 1],
    "float": [float("-inf"), -3e38, -1e-45, -0.0, 0.0, 1e-40, 0.5, 1.0, 3e38, float("inf"), float("nan")],
    "bool": [False, True],
}


def extreme(shape: tuple[int, ...], kind: str, turn: int = 0) -> Tensor:
    """Values at the ends of a type, in turn."""
    dtype = {"int": torch.int64, "float": torch.float32, "bool": torch.bool}[kind]
    count = torch.Size(shape).numel()
    values = EXTREMES[kind]
    return torch.tensor([values[(i + turn) % len(values)] for i in range(count)], dtype=dtype).reshape(shape)


def evaluate_on_extremes(graph: Graph) -> None:
    """Run a client's graph on values at the ends of their types, if it is small."""
    if sum(torch.Size(node.shape).numel() for node in graph.nodes) > 1 << 20:
        return
    for turn in range(3):
        values = {name: extreme(node.shape, node.dtype, turn) for name, node in graph.inputs.items()}
        values = {name: v.nan_to_num(0.0) if v.is_floating_point() else v for name, v in values.items()}  # refused
        clear_values(graph, [], values)


class Model(nn.Module):
    """A model whose Program has nearly every protocol; its client computes some of it in the clear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = nn.functional.gelu(self.norm(self.first(x)))
        a = h.reshape(1, 3, 2, 4).permute(0, 2, 1, 3)
        scores = torch.softmax(a @ a.transpose(-1, -2) + (1.0 - mask)[:, None, None, :] * -1e4, -1)
        out: Tensor = self.last((scores @ a).permute(0, 2, 1, 3).reshape(1, 3, 8))
        return out


def windowed(instructions: list[Any], share: int) -> dict[str, Any]:
    """The patches of a share of three dimensions, and of a delivery, if one of these has three."""
    ones = {"kernel": [1], "stride": [1], "padding": [0], "dilation": [1]}
    delivery = next(n for n, i in enumerate(instructions) if i[0] == "deliver" and len(i[1]["shape"]) == 3)
    made = {}
    for kind, source in (("patches", share), ("delivered_patches", delivery)):
        shape, bits = (instructions[source][1][k] for k in ("shape", "ring"))
        turned = [shape[0], shape[2], shape[1]]
        made[kind] = [kind, {**ones, "shape": turned, "ring": bits}, [source], 0]
    return made


TABLE = ("ring", "shift", "degree", "low", "high")


@cache
def every_protocol() -> bytes:
    """The encoding of a Program that has an instruction of every protocol, and some nodes in its client's graph."""
    torch.manual_seed(0)
    samples = [
        {"x": torch.randn(1, 3, 6).clamp(-3, 3), "mask": torch.tensor([[1.0, 1.0, float(i % 2)]])} for i in range(6)
    ]
    encoded = secure.compile(Model().eval(), samples[0], calibration=samples[1:]).program.encoded
    d = json.loads(encoded)
    d["labels"] |= {"task": "generate", "capacity": "4096"}  # as it keeps openings
    have = {i[0] for i in d["instructions"]}
    share = next(n for n, i in enumerate(d["instructions"]) if i[0] == "input" and len(i[1]["shape"]) == 3)
    shape, bits = (d["instructions"][share][1][k] for k in ("shape", "ring"))
    opening = next(n for n, i in enumerate(d["instructions"]) if i[0] == "open")
    opened = {k: d["instructions"][opening][1][k] for k in ("shape", "ring")}
    powers = next(n for n, i in enumerate(d["instructions"]) if i[0] == "lifted_powers")
    raised, (lift,) = d["instructions"][powers][1:3]
    fused = {
        **{k: raised[k] for k in ("shape", "ring")},
        "agreed_x": raised["agreed"],
        "agreed_y": raised["agreed"],
        "centre": 1,
        "coefficients": [3, -1, 5],
    }
    stacked = len(d["instructions"])
    d["instructions"].append(["concat", {"dim": 0, "ring": bits, "shape": [3, *shape[1:]]}, [share] * 3, 0])
    table = [opened["ring"], opened["ring"] - 5, 5, 1 << (opened["ring"] - 5), 2 << (opened["ring"] - 5)]
    inverse = {"shape": opened["shape"], "root": 1, "scale": 2.0 ** opened["ring"], "public": 16, "wide": 64}
    doubled = [2 * opened["shape"][0], *opened["shape"][1:]]
    more = {
        "digit_in": ["digit_in", {**opened, "shift": opened["ring"] - 5, "count": 9}, [opening], 0],
        "digits_in": ["digits_in", {**opened, "digits": [[opened["ring"] - 5, 9]] * 2}, [opening], 0],
        "tabulated": ["tabulated", {**inverse, **dict(zip(TABLE, table, strict=True))}, [opening], 0],
        "tabulated_bands": ["tabulated_bands", {**inverse, "bands": [table, table]}, [opening], 0],
        "histogram": ["histogram", {**opened, "shift": opened["ring"] - 5, "bins": 32}, [opening], 0],
        "opened_sum": ["opened_sum", {**opened, "minus": [True], "constant": 3}, [opening], 0],
        "opened_pairs": ["opened_pairs", {**opened}, [opening], 0],
        "quotient": ["quotient", {**opened, "shift": 3}, [opening], 0],
        "ranks": ["ranks", {"ring": bits, "shape": [*shape[:-1], 4]}, [share], 0],
        "placed": ["placed", {**opened, "digit": 4, "count": 2}, [opening, opening], 0],
        "placed_positions": ["placed_positions", {**opened, "digit": 4, "count": 2, "first": 0}, [opening], 0],
        "units": ["units", {**opened, "digit": 4, "entries": 9}, [opening], 0],
        "gumbel": ["gumbel", {"shape": shape, "ring": bits, "fraction": 3, "number": 0, "temperature": 0.5}, [], 0],
        "scaled_gumbel": ["scaled_gumbel", {**opened, "fraction": 3, "number": 1}, [opening], 0],
        "keep": ["keep", {**opened, "name": "k"}, [opening], 0],
        "recall": ["recall", {**opened, "name": "k"}, [], 0],
        "opened_concat": ["opened_concat", {**opened, "shape": doubled, "dim": 0}, [opening, opening], 0],
        "opened_expand": ["opened_expand", {**opened, "shape": [2, *opened["shape"]]}, [opening], 0],
        "opened_permute": ["opened_permute", {**opened, "dims": list(range(len(doubled)))}, [opening], 0],
        "opened_reshape": ["opened_reshape", {**opened, "shape": [1, *opened["shape"]]}, [opening], 0],
        "polynomial_product": ["polynomial_product", fused, [lift, powers, lift], 0],
        "powers": ["powers", {"degree": 3, **opened}, [opening], 0],
        "extend": ["extend", {"ring": bits, "shape": shape, "wide": 64}, [share], 0],
        "differences": ["differences", {"ring": bits, "shape": [2, *shape[1:]]}, [stacked], 0],
        "expand": ["expand", {"ring": bits, "shape": [2, *shape]}, [share], 0],
        "slice": ["slice", {"dim": 0, "ring": bits, "shape": shape, "start": 0, "step": 1, "stop": 1}, [share], 0],
        "take": ["take", {"dim": 0, "ring": bits, "shape": [2, *shape[1:]], "runs": [[0, 0, 2]]}, [share], 0],
        **windowed(d["instructions"], share),
        "add": ["add", {"ring": bits, "shape": shape}, [share, share], 0],
        "add_constant": ["add_constant", {"constant": 5, "ring": bits, "shape": shape}, [share], 0],
        "mul_constant": ["mul_constant", {"constant": 5, "ring": bits, "shape": shape}, [share], 0],
    }
    graph = json.loads(d["client_graph"])
    place = {"attrs": {"name": "position_ids"}, "dtype": "int", "inputs": [], "op": "input", "path": ""}
    graph["nodes"].append({**place, "id": len(graph["nodes"]), "shape": shape, "visibility": "client"})
    graph["outputs"].append(len(graph["nodes"]) - 1)
    d["client_graph"] = json.dumps(graph)
    public = {"encoding": "public", "name": "places", "output": len(graph["outputs"]) - 1, "size": 0, "table": ""}
    d["client_inputs"].append({**public, "shape": shape})
    numbers = {"fraction": 0, "high": 8.0, "low": 0.0, "name": "places", "ring": bits, "shape": shape}
    d["instructions"].append(["input", numbers, [], 0])
    more["publish"] = ["publish", {"ring": bits, "shape": shape}, [len(d["instructions"]) - 1], 0]
    d["instructions"] += [more[kind] for kind in more if kind not in have]
    published = next(n for n, i in enumerate(d["instructions"]) if i[0] == "publish")
    d["instructions"].append(["mul_public", {"ring": bits, "shape": shape}, [share, published], 0])
    d["instructions"].append(["rotated", {"ring": bits, "shape": shape}, [share, published, published], 0])
    wanted = {kind for kind, p in Protocol.registry.items() if p.in_programs and p.__module__.startswith("protocols.")}
    assert {i[0] for i in d["instructions"]} == wanted
    return json.dumps(d, sort_keys=True, separators=(",", ":")).encode()


def identity(name: str, *shape: int) -> Graph:
    return Graph((Node(0, "input", (), {"name": name}, shape, "float", "client", ""),), (0,))


def document(*instructions: list[Any], weights: dict[str, list[int]] | None = None, width: int = 4) -> dict[str, Any]:
    """A Program of one input of ``width`` numbers (instruction 0), these instructions, and a Reveal of the input."""
    circuit = [
        ["input", {"shape": [width], "ring": 32, "name": "x", "fraction": 0, "low": -1.0, "high": 1.0}, [], 0],
        *instructions,
        ["reveal", {"shape": [width], "ring": 32}, [0], 0],
    ]
    return {
        "version": 4,
        "instructions": circuit,
        "paths": [""],
        "outputs": [["y", len(circuit) - 1, 0]],
        "watched": None,
        "fixed": {"fraction_bits": 16, "weight_fraction_bits": 14, "margin_bits": 1},
        "client_graph": identity("x", width).to_json(),
        "client_inputs": [{"name": "x", "output": 0, "encoding": "plain", "size": 0, "shape": [width], "table": ""}],
        "weight_shapes": weights or {},
        "labels": {},
    }


def encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def small() -> bytes:
    """The smallest Program: it reveals its input."""
    return encoded(document())


def large_weights(rows: int, columns: int) -> bytes:
    """A valid Program of some 800 bytes with one linear layer of any size."""
    return encoded(
        document(
            ["deliver", {"shape": [rows], "ring": 32}, [0], 0],
            ["linear", {"shape": [columns], "ring": 32, "weight": "w", "diagonal": False}, [1], 0],
            weights={"w": [rows, columns]},
            width=rows,
        )
    )


def client_graph() -> bytes:
    return json.loads(every_protocol())["client_graph"].encode()  # type: ignore[no-any-return]


_ONE, _TWO = [{"input": 0}], [{"input": 0}, {"input": 1}]
_UNARY = dict.fromkeys(("abs.default", "floor.default", "neg.default", "reciprocal.default", "relu.default"), _ONE)
_UNARY |= dict.fromkeys(("round.default", "rsqrt.default", "sign.default", "sqrt.default", "square.default"), _ONE)
_UNARY |= dict.fromkeys(("amax.default", "amin.default", "mean.default", "sum.default", "t.default"), _ONE)
_UNARY |= dict.fromkeys(("logical_not.default", "tril.default", "triu.default", "squeeze.default"), _ONE)
_SCALARS: tuple[str, ...] = ("add.Scalar", "div.Scalar", "mul.Scalar", "sub.Scalar", "rsub.Scalar", "clamp_max.default")
_SCALARS += ("clamp_min.default", "eq.Scalar", "ge.Scalar", "gt.Scalar", "le.Scalar", "lt.Scalar", "ne.Scalar")
_PAIRS: tuple[str, ...] = (
    "add.Tensor",
    "div.Tensor",
    "mul.Tensor",
    "sub.Tensor",
    "rsub.Tensor",
    "maximum.default",
    "max.other",
)
_PAIRS += ("minimum.default", "min.other", "eq.Tensor", "ge.Tensor", "gt.Tensor", "le.Tensor", "lt.Tensor", "ne.Tensor")
_PAIRS += ("logical_and.default", "logical_or.default", "expand_as.default")
_LOGIC = ("__and__.Tensor", "__or__.Tensor", "bitwise_and.Tensor", "bitwise_or.Tensor")
_OF_INDEX = [{"input": 0}, 0, {"input": 1}]

CALLS: dict[str, list[list[Any]]] = {
    **{f"aten.{name}": [args] for name, args in _UNARY.items()},
    **{f"aten.{name}": [[{"input": 0}, 2], [{"input": 0}, 0]] for name in _SCALARS},
    **{f"aten.{name}": [_TWO] for name in (*_PAIRS, *_LOGIC)},
    "aten.bitwise_not.default": [_ONE],
    "aten.ceil.default": [_ONE],
    "aten.argmax.default": [_ONE, [{"input": 0}, -1], [{"input": 0}, 0, True]],
    "aten.copy.default": [_TWO],
    "aten.slice_scatter.default": [[*_TWO, 0, 0, 4], [*_TWO, 1, 0, 9]],
    "aten.unfold.default": [[{"input": 0}, 1, 2, 1], [{"input": 0}, 0, 4, 2]],
    "aten.clamp.default": [[{"input": 0}, -1, 1]],
    "aten.cumsum.default": [[{"input": 0}, 0], [{"input": 0}, 1]],
    "aten.pow.Tensor_Scalar": [[{"input": 0}, n] for n in range(5)],
    "aten.to.dtype": [[{"input": 0}, {"dtype": kind}] for kind in EXTREMES],
    "aten.masked_fill.Scalar": [[{"input": 0}, {"input": 2}, 3]],
    "aten.where.self": [[{"input": 2}, {"input": 0}, {"input": 1}]],
    "aten.where.ScalarOther": [[{"input": 2}, {"input": 0}, 1]],
    "aten.where.ScalarSelf": [[{"input": 2}, 1, {"input": 0}]],
    "aten.cat.default": [[_TWO, 0]],
    "aten.stack.default": [[_TWO]],
    "aten.constant_pad_nd.default": [[{"input": 0}, [1, 1]], [{"input": 0}, [-1, 2], 7]],
    "aten.expand.default": [[{"input": 0}, [2, 4, 4]]],
    "aten.flatten.using_ints": [[{"input": 0}]],
    "aten.flip.default": [[{"input": 0}, [0]]],
    "aten.gather.default": [_OF_INDEX],
    "aten.index_select.default": [[{"input": 0}, 1, {"input": 3}]],
    "aten.index.Tensor": [[{"input": 0}, [{"input": 1}]], [{"input": 0}, [None, {"input": 3}]]],
    "aten.permute.default": [[{"input": 0}, [1, 0]]],
    "aten.repeat.default": [[{"input": 0}, [2, 1]]],
    "aten.reshape.default": [[{"input": 0}, [16]]],
    "aten.view.default": [[{"input": 0}, [2, 8]]],
    "aten._unsafe_view.default": [[{"input": 0}, [2, 8]]],
    "aten.roll.default": [[{"input": 0}, [1]]],
    "aten.select.int": [[{"input": 0}, 0, -1]],
    "aten.slice.Tensor": [[{"input": 0}, 0, 1, 3]],
    "aten.squeeze.dim": [[{"input": 0}, 0]],
    "aten.squeeze.dims": [[{"input": 0}, [0, 1]]],
    "aten.transpose.int": [[{"input": 0}, 0, 1]],
    "aten.unflatten.int": [[{"input": 0}, 1, [2, 2]]],
    "aten.unsqueeze.default": [[{"input": 0}, 0]],
    "aten.mean.dim": [[{"input": 0}, [1], True]],
    "aten.sum.dim_IntList": [[{"input": 0}, [-1], True]],
}
"""Calls of every operation that clients evaluate. Their operands: two alike of (4, 4), a bool, and four indices."""


def _call(target: str, args: list[Any], kind: str) -> Graph:
    """A graph of one call on operands of one kind; raises ValueError or RuntimeError if torch has no such one."""
    kinds = [kind, "int" if target == "aten.gather.default" or args[1:] == [[{"input": 1}]] else kind, "bool", "int"]
    inputs = [
        Node(i, "input", (), {"name": f"x{i}"}, (4, 4) if i < 3 else (4,), k, "client", "") for i, k in enumerate(kinds)
    ]
    attrs = {"target": target, "args": args, "kwargs": {}}
    meta = evaluate_clear(attrs, [placeholder(node) for node in inputs], torch.float32)
    made = Node(4, "clear", (0, 1, 2, 3), attrs, tuple(meta.shape), kind_of(meta.dtype), "client", "")
    return Graph((*inputs, made), (4,))


def calls(target: str) -> list[Graph]:
    """A graph of each call of an operation, for each kind of operand that torch takes."""
    out = []
    for args in CALLS[target]:
        for kind in EXTREMES:
            try:
                graph = _call(target, args, kind)
                clear_values(
                    graph, [], {n: torch.zeros(v.shape, dtype=dtype_of(v.dtype)) for n, v in graph.inputs.items()}
                )
            except (ValueError, RuntimeError, TypeError, NotImplementedError):
                continue
            out.append(graph)
    return out


@cache
def every_operation() -> bytes:
    """The encoding of a client's graph with a call of every operation."""
    nodes: list[Node] = []
    for target in sorted(CLIENT_TARGETS):
        graph, start = calls(target)[0], len(nodes)
        for node in graph.nodes:
            attrs = {"name": f"{target}/{node.id}"} if node.op == "input" else node.attrs
            inputs = tuple(start + i for i in node.inputs)
            nodes.append(dataclasses.replace(node, id=start + node.id, inputs=inputs, attrs=attrs))
    return Graph(tuple(nodes), (len(nodes) - 1,)).to_json().encode()


@cache
def small_ckks() -> bytes:
    """A CKKS Program that decrypts its input."""
    import numpy as np

    parameters = Parameters(8192, 1, 30, 38)
    content = np.full(parameters.slots, -1, dtype=np.int64)
    content[:4] = range(4)
    return CkksProgram(
        parameters=parameters,
        steps=(1, 2),
        client_graph=identity("x", 4),
        client_inputs=(ClientInput("x", 0, "plain", 0, (4,)),),
        ranges={"x": (-1.0, 1.0)},
        views={"x/0": ("x", 1, content)},
        refreshes=(),
        reserve=0,
        output_shape=(4,),
        output=content[None],
        output_unit=1.0,
        grain=0.001,
        counts={"rotations": 2},
        labels={},
    ).encoded


def tokenizer() -> bytes:
    from tests.tiny import word_tokenizer

    return word_tokenizer().to_str().encode()  # type: ignore[no-any-return]
