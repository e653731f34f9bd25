"""Models whose weights are an ONNX graph alone: read as they were exported, or refused by name."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

from secure.errors import InvalidInput, MissingPackage
from secure.models import onnx_weights
from secure.models.checkpoints import load_checkpoint
from secure.models.onnx_weights import read_onnx

KINDS = {
    "AutoModel": "BertModel",
    "AutoModelForSequenceClassification": "DistilBertForSequenceClassification",
    "AutoModelForTokenClassification": "BertForTokenClassification",
    "AutoModelForQuestionAnswering": "BertForQuestionAnswering",
}


def tensors_alone(model: Any) -> Any:
    """Let a model's results be tensors alone, as exporters of models want them, under its own names of parameters."""
    forward = model.forward

    def results(found: Any) -> Any:
        return (found.start_logits, found.end_logits) if "start_logits" in found else found[0]

    def two(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return results(forward(input_ids=input_ids, attention_mask=attention_mask))

    def three(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        return results(forward(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids))

    model.forward = two if model.config.model_type == "distilbert" else three
    return model


def exported(directory: Path, kind: str, *, dynamo: bool = False) -> tuple[dict[str, Tensor], Path]:
    """A random model of two layers as ``model.onnx`` beside config.json; its weights, and the directory."""
    import transformers

    torch.manual_seed(0)
    name = KINDS[kind]
    if name.startswith("Distil"):
        sizes: dict[str, Any] = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config_class: Any = transformers.DistilBertConfig if name.startswith("Distil") else transformers.BertConfig
    config = config_class(
        vocab_size=100, max_position_embeddings=16, num_labels=2 if "Answering" in name else 3, **sizes
    )
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # exporters join what is equal, such as biases of 0
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config.architectures = [name]
    config.save_pretrained(directory)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if not name.startswith("Distil") else [])]
    given = {"input_ids": torch.randint(4, 100, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    given["token_type_ids"] = torch.zeros(2, 8, dtype=torch.int64)
    outputs = ["start_logits", "end_logits"] if "Answering" in name else ["result"]
    options: dict[str, Any] = {"dynamic_axes": {name: {0: "batch", 1: "length"} for name in names}}
    if dynamo:
        dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=16)}
        options = {"dynamic_shapes": [dims] * len(names), "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tensors_alone(model),
            tuple(given[name] for name in names),
            str(directory / "model.onnx"),
            input_names=names,
            output_names=outputs,
            dynamo=dynamo,
            **options,
        )
    return weights, directory


def same(directory: Path, kind: str, weights: dict[str, Tensor]) -> list[str]:
    """Load a directory, compare all weights; what was said."""
    heard = list[str]()
    found = load_checkpoint(directory, kind, optional=("pooler.",), told=heard.append).state_dict()
    compared = [name for name in weights if not name.startswith("pooler.")]
    assert len(compared) > 30
    for name in compared:
        assert torch.equal(found[name], weights[name]), name
    return heard


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_exported_model(kind: str, tmp_path: Path) -> None:
    weights, directory = exported(tmp_path, kind)
    assert any(each.name.startswith("onnx::MatMul") for each in onnx.load(directory / "model.onnx").graph.initializer)
    assert "with whose graph the model agrees" in same(directory, kind, weights)[-1]


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")
def test_weights_of_the_new_exporter_beside_the_graph(tmp_path: Path) -> None:
    weights, directory = exported(tmp_path, "AutoModel", dynamo=True)
    assert (directory / "model.onnx.data").is_file()
    same(directory, "AutoModel", weights)


def test_a_graph_below_and_nodes_without_names(tmp_path: Path) -> None:
    """As old exporters wrote them: the bias behind a product tells the layer."""
    weights, directory = exported(tmp_path, "AutoModel")
    model = onnx.load(directory / "model.onnx")
    for node in model.graph.node:
        node.name = ""
    (directory / "onnx").mkdir()
    (directory / "model.onnx").unlink()
    onnx.save(model, directory / "onnx" / "model.onnx")
    same(directory, "AutoModel", weights)


def test_halves_become_floats(tmp_path: Path) -> None:
    weights, directory = exported(tmp_path, "AutoModel")
    model = onnx.load(directory / "model.onnx")
    (table,) = (each for each in model.graph.initializer if each.name == "embeddings.word_embeddings.weight")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table).astype("f2"), table.name))
    onnx.save(model, directory / "model.onnx")
    name = "embeddings.word_embeddings.weight"
    assert read_onnx(directory / "model.onnx")[name].dtype == torch.float16
    with pytest.raises(InvalidInput, match="graph"):  # which mixes precisions, and cannot be run
        same(directory, "AutoModel", {**weights, name: weights[name].half().float()})


def exchanged(model: Any) -> None:
    """Names of two layers of one shape, everywhere: the graph gives the same as before."""

    def other(name: str) -> str:
        for one, two in (("query", "key"), ("key", "query")):
            if name.endswith(f".{one}.bias"):
                return name.replace(one, two)
        return name

    for each in model.graph.initializer:
        each.name = other(each.name)
    for node in model.graph.node:
        node.input[:] = [other(name) for name in node.input]


def without(model: Any) -> None:
    (at,) = (i for i, each in enumerate(model.graph.initializer) if each.name.endswith("0.output.dense.bias"))
    model.graph.initializer[at].name = "elsewhere"


def reshaped(model: Any) -> None:
    (table,) = (each for each in model.graph.initializer if each.name == "embeddings.word_embeddings.weight")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:50], table.name))


def more(model: Any) -> None:
    model.graph.initializer.append(helper.make_tensor("encoder.layer.7.bias", TensorProto.FLOAT, [1], [1.0]))


def quantized(model: Any) -> None:
    model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["input_ids"], ["a", "b", "c"]))


def eighths(model: Any) -> None:
    model.graph.initializer.append(helper.make_tensor("a.weight_quantized", TensorProto.INT8, [1], [1]))


def fused(model: Any) -> None:
    model.graph.node.append(helper.make_node("SkipLayerNormalization", ["x"], ["y"], domain="com.microsoft"))


def endless(model: Any) -> None:
    model.graph.node.append(helper.make_node("Loop", ["x"], ["y"]))


def outside(model: Any, location: str = "../secret", **other: int) -> None:
    each = model.graph.initializer[0]
    each.ClearField("raw_data")
    each.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **other}.items():
        entry = each.external_data.add()
        entry.key, entry.value = key, str(value)


REFUSED: dict[Callable[[Any], None], str] = {
    exchanged: "the model of the weights in .* differs from its graph, by",
    without: r"lacks encoder\.layer\.0\.output\.dense\.bias",
    reshaped: r"embeddings\.word_embeddings\.weight of shape \(50, 32\), config.json makes it \(100, 32\)",
    more: r"has encoder\.layer\.7\.bias, which BertModel has not",
    quantized: r"are quantized \(DynamicQuantizeLinear\)",
    eighths: r"are quantized \(a\.weight_quantized\)",
    fused: r"beyond the standard ones: com\.microsoft\.SkipLayerNormalization",
    endless: "beyond the standard ones: Loop",
    outside: "outside of its directory",
    lambda model: outside(model, "model.onnx", offset=1 << 30): "has other bytes than",
    lambda model: outside(model, "absent"): "cannot be read: No such file",
}


@pytest.mark.parametrize("change", REFUSED)
def test_other_graphs_are_refused_by_name(change: Callable[[Any], None], tmp_path: Path) -> None:
    _, directory = exported(tmp_path, "AutoModel")
    (tmp_path.parent / "secret").write_bytes(bytes(1 << 16))
    model = onnx.load(directory / "model.onnx")
    change(model)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InvalidInput, match=REFUSED[change]):
        load_checkpoint(directory, optional=("pooler.",))


def test_bytes_that_are_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff no graph")
    with pytest.raises(InvalidInput, match="is no ONNX graph, or damaged"):
        read_onnx(path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackage, match=r"onnx is not installed\nhint: pip install 'unseen\[onnx\]'"):
        onnx_weights.read_onnx(path)
