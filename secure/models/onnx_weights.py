"""Weights of an ONNX graph under the names that they had in the model from which it was exported.

A graph keeps the names of most parameters. The weights of linear layers without a kept name stand transposed in a
``MatMul``; the bias that is added behind it tells the layer, or else the scope of the node, which exporters write.
Whether all of it was understood is found out by running both, the graph with the reference evaluator of ``onnx``, which
knows standard operations alone: ``check_graph``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secure.errors import Error, InvalidInput, MissingPackage, printable

ONNX = ("model.onnx", "onnx/model.onnx")
"""The places of a graph in a directory."""

DEVIATION = {"float32": 1e-3, "float16": 3e-2}
"""The most that a model may be from its graph, in parts of the result's greatest number, by the weights' precision."""

QUANTIZED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
    | {"QLinearMatMul", "QLinearConv"}
)
CONTROL = frozenset({"If", "Loop", "Scan", "SequenceMap"})  # whose running time no size bounds
TOKENS = 6  # of the text on which a model and its graph are compared
_PARAMETER = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
_WAY_OUT = "use the model from which it was exported, in transformers' own format (save_pretrained)"


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Return the floating point weights of a graph, by the names of the exported model's parameters.

    Raises MissingPackage without ``onnx``, and InvalidInput for a graph that is damaged or quantized, that has fused
    operations of a runtime or control flow, or whose data are outside of its directory.
    """
    graph = _parsed(path).graph
    tensors = {each.name: each for each in graph.initializer}
    same = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity" and n.input[0] in tensors}
    found = {name: _values(path, tensors[name]) for name in tensors if _PARAMETER.fullmatch(name)}
    found |= {name: found[of] for name, of in same.items() if _PARAMETER.fullmatch(name) and of in found}
    biases = dict[str, str]()  # of sums, by the value to which they are added
    for node in graph.node:
        for value, bias in (node.input, tuple(reversed(node.input))) if node.op_type == "Add" else ():
            if bias.endswith(".bias") and bias in found:
                biases[value] = bias
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
            continue
        weight = node.input[1]
        if weight not in tensors or _PARAMETER.fullmatch(weight):
            continue
        bias = node.input[2] if len(node.input) > 2 else biases.get(node.output[0], "")
        module = bias.removesuffix(".bias") if _PARAMETER.fullmatch(bias) else _scope(node)
        straight = any(each.name == "transB" and each.i for each in node.attribute)
        name, value = f"{module}.weight", _values(path, tensors[weight])
        if not module or name in found:
            raise InvalidInput(f"{path} has weights {printable(weight)[:80]!r} whose layer is not known", _WAY_OUT)
        found[name] = value if straight else value.T.contiguous()
        if len(node.input) > 2 and bias in tensors and not _PARAMETER.fullmatch(bias):
            found[f"{module}.bias"] = _values(path, tensors[bias])
    return {name: value for name, value in found.items() if value.is_floating_point()}


def check_graph(path: Path, model: nn.Module) -> None:
    """Run a model and the graph of its weights on the same tokens. Raises InvalidInput where they differ."""
    from onnx.reference import ReferenceEvaluator

    parsed = _parsed(path)
    for each in parsed.graph.initializer:
        _filled(path, each)
    given, config = dict[str, Tensor](), getattr(model, "config", None)
    initial = {each.name for each in parsed.graph.initializer}
    for each in parsed.graph.input:
        if each.name in initial:
            continue
        dims = [d.dim_value for d in each.type.tensor_type.shape.dim]
        if each.name not in ("input_ids", "attention_mask", "token_type_ids") or len(dims) != 2:
            raise InvalidInput(f"{path} takes {printable(each.name)[:80]!r}, which is not supported", _WAY_OUT)
        shape = (dims[0] or 1, dims[1] or TOKENS)
        rows = int(getattr(config, "vocab_size", 0) or 16)
        if np.prod(shape) > 1 << 16:
            raise InvalidInput(f"{path} takes {shape} tokens at once", _WAY_OUT)
        made = torch.arange(shape[0] * shape[1]).reshape(shape) * 7 % rows
        ones, zeros = torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        given[each.name] = {"input_ids": made, "attention_mask": ones, "token_type_ids": zeros}[each.name]
    with torch.no_grad():
        result = model(**given)
    ours = [value for value in result.to_tuple() if isinstance(value, Tensor)]
    ours = ours[: 2 if "start_logits" in result else 1]
    try:
        theirs: Any = ReferenceEvaluator(parsed).run(None, {name: value.numpy() for name, value in given.items()})
    except Exception as error:  # every operation raises errors of its own
        reason = printable(" ".join(str(error).split()))[:200]
        raise InvalidInput(f"the graph of {path} cannot be run: {type(error).__name__}: {reason}", _WAY_OUT) from None
    halves = any(each.data_type == 10 for each in parsed.graph.initializer)
    accepted = DEVIATION["float16" if halves else "float32"]
    for value in ours:
        same = [other for other in map(np.asarray, theirs) if other.shape == tuple(value.shape)]
        scale = max(float(value.abs().max()), 1e-6)
        far = [float(np.abs(other.astype("f8") - value.double().numpy()).max()) / scale for other in same]
        if not far or not min(far) <= accepted:
            by = f"by {min(far):.2g} of the greatest number" if far else "as no result has its shape"
            raise InvalidInput(f"the model of the weights in {path} differs from its graph, {by}", _WAY_OUT)


def _parsed(path: Path) -> Any:
    try:
        import onnx
    except ImportError:
        raise MissingPackage(f"{path}: onnx is not installed\nhint: pip install 'unseen[onnx]'") from None
    try:
        model: Any = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise InvalidInput(f"{path} is no ONNX graph, or damaged: {type(error).__name__}", _WAY_OUT) from None
    kinds = {node.op_type for node in model.graph.node}
    small = [each.name for each in model.graph.initializer if each.data_type in (2, 3, 21, 22)]  # of 8 and 4 bits
    if quantized := sorted(kinds & QUANTIZED) or small[:1]:
        raise InvalidInput(f"the weights in {path} are quantized ({printable(quantized[0])[:80]})", _WAY_OUT)
    foreign = sorted(f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx"))
    if foreign or model.functions or kinds & CONTROL:
        name = (foreign or sorted(kinds & CONTROL) or ["functions"])[0]
        raise InvalidInput(f"{path} has operations beyond the standard ones: {printable(name)[:80]}", _WAY_OUT)
    return model


def _values(path: Path, tensor: Any) -> Tensor:
    from onnx import numpy_helper

    _filled(path, tensor)
    try:
        return torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
    except (ValueError, TypeError) as error:
        what = printable(tensor.name)[:80]
        raise InvalidInput(f"{path} has {what!r}, which is no tensor: {type(error).__name__}", _WAY_OUT) from None


def _filled(path: Path, tensor: Any) -> None:
    """Read a tensor's bytes where they stand in another file of the directory, as many as its shape says."""
    if tensor.data_location != 1:
        return
    from onnx import helper

    said = {entry.key: entry.value for entry in tensor.external_data}
    try:
        name, offset = said["location"], int(said.get("offset", 0))
        wanted = int(np.prod(tensor.dims, dtype=object)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        file = path.parent / name
        if Path(name).name != name or file.resolve().parent != path.parent.resolve():
            raise InvalidInput(f"{path} has data in {printable(name)[:80]!r}, outside of its directory", _WAY_OUT)
        if offset < 0 or offset + wanted > file.stat().st_size or int(said.get("length", wanted)) != wanted:
            raise InvalidInput(f"{file} has other bytes than {path.name} says", "download or copy both again")
        with file.open("rb") as opened:
            opened.seek(offset)
            tensor.raw_data = opened.read(wanted)
    except Error:
        raise
    except OSError as error:
        raise InvalidInput(f"the data of {path} cannot be read: {error.strerror}", "copy all its files") from None
    except (LookupError, ValueError, TypeError):
        raise InvalidInput(f"{path} does not say where its data are", _WAY_OUT) from None
    tensor.data_location = 0
    del tensor.external_data[:]


def _scope(node: Any) -> str:
    """Return the module of a node, as the exporters of torch write it; "" if they did not."""
    said = {str(entry.key): str(entry.value) for entry in node.metadata_props}
    if (scopes := said.get("pkg.torch.onnx.name_scopes")) is not None:
        found: list[str] = re.findall(r"'([^']*)'", scopes)
        return ["", "", *found][-2]
    return ".".join(str(node.name).strip("/").split("/")[:-1])
