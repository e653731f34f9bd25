"""Checkpoints as they are found: the model that was saved, or a refusal that names what is wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secure.errors import InvalidInput, ModelNotFound
from secure.models.checkpoints import load_checkpoint, read_weights
from secure.models.text import model_directory

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

Weights = Mapping[str, Tensor]
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[2, 7, 9, 3]])


def bert(kind: str = "BertModel", **settings: Any) -> Any:
    import transformers

    torch.manual_seed(3)
    configuration = transformers.BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=20, **settings)
    return getattr(transformers, kind)(configuration).eval()


def same(weights: Weights) -> Weights:
    return weights


def saved(
    directory: Path, change: Callable[[Weights], Weights] = same, *, pickled: bool = False, model: Any = None
) -> Any:
    """Write a model whose weights are changed; return the model as it was."""
    from safetensors.torch import save_file

    model = model or bert()
    model.config.save_pretrained(directory)
    weights = {name: value.clone().contiguous() for name, value in change(model.state_dict()).items()}
    if pickled:
        torch.save(weights, directory / "pytorch_model.bin")
    else:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return model


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).last_hidden_state
    return found


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "0.auto_model.", "model.", "module.bert."]
)
def test_prefixes_of_wrapped_models_are_taken_off_and_said(tmp_path: Path, prefix: str, pickled: bool) -> None:
    """Transformers would initialize all weights at random."""
    original, heard = saved(tmp_path, prefixed(prefix), pickled=pickled), list[str]()
    model = load_checkpoint(tmp_path, told=heard.append)
    torch.testing.assert_close(hidden(model), hidden(original), atol=1e-6, rtol=0)
    assert len(heard) == 1
    assert "of a wrapped model is taken off" in heard[0]


def test_names_that_transformers_knows_need_no_word(tmp_path: Path) -> None:
    original, heard = saved(tmp_path, prefixed("bert.")), list[str]()
    torch.testing.assert_close(hidden(load_checkpoint(tmp_path, told=heard.append)), hidden(original))
    assert not heard


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def with_one_more(weights: Weights) -> Weights:
    return {**weights, "encoder.layer.2.output.dense.bias": torch.zeros(16)}


def with_a_value(value: float) -> Callable[[Weights], Weights]:
    name = "encoder.layer.1.output.dense.bias"
    return lambda weights: {**weights, name: weights[name].clone().index_fill(0, torch.tensor([3]), value)}


CHANGES: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "an unknown prefix": (prefixed("student."), r"lacks embeddings.*and has student\.embeddings"),
    "a layer is missing": (without("layer.1."), r"lacks encoder\.layer\.1\..* and 8 more"),
    "one weight is missing": (without("layer.0.output.dense.bias"), r"lacks encoder\.layer\.0\.output\.dense\.bias\n"),
    "the pooler is missing": (without("pooler."), r"lacks pooler\.dense\.bias, pooler\.dense\.weight"),
    "a layer too many": (with_one_more, r"has encoder\.layer\.2\.output\.dense\.bias, which BertModel has not"),
    "another vocabulary": (
        lambda w: {name: value[:-1] if "word_embeddings" in name else value for name, value in w.items()},
        r"word_embeddings\.weight of shape \(39, 16\), config\.json makes it \(40, 16\)",
    ),
    "NaN": (with_a_value(float("nan")), r"1 values in encoder\.layer\.1\.output\.dense\.bias that are NaN or infinite"),
    "infinity": (with_a_value(float("inf")), r"1 values in encoder\.layer\.1\.output\.dense\.bias that are NaN"),
    "eight bits": (
        lambda w: {name: value.to(torch.int8) if "dense.weight" in name else value for name, value in w.items()},
        r"are quantized: encoder\.layer\.0\.attention\.output\.dense\.weight.*in (I8|torch\.int8)",
    ),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_checkpoints_of_another_model_are_refused_by_name(tmp_path: Path, change: str, pickled: bool) -> None:
    """Each would give another model, or none that computes."""
    changed, message = CHANGES[change]
    saved(tmp_path, changed, pickled=pickled)
    with pytest.raises(InvalidInput, match=rf"(?s){message}.*hint: "):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", sorted(bert().state_dict()))
def test_any_weight_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path, without(name))
    with pytest.raises(InvalidInput, match=name.replace(".", r"\.")):
        load_checkpoint(tmp_path)


def test_what_nobody_reads_may_be_missing(tmp_path: Path) -> None:
    original, heard = saved(tmp_path, without("pooler.")), list[str]()
    model = load_checkpoint(tmp_path, optional=("pooler.",), told=heard.append)
    torch.testing.assert_close(hidden(model), hidden(original))
    assert heard == [f"{tmp_path.name}: not in the checkpoint, and not read: pooler.dense.bias, pooler.dense.weight"]


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_heads_of_another_task_are_left_out_and_said(tmp_path: Path, kind: str) -> None:
    original, heard = bert(kind), list[str]()
    original.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path, optional=("pooler.",), told=heard.append)
    torch.testing.assert_close(hidden(model), hidden(original.bert))
    assert "left out, as BertModel does not read them: c" in heard[0]


def test_a_head_that_is_missing_is_never_random(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match=r"BertForSequenceClassification\): it lacks classifier\.bias"):
        load_checkpoint(tmp_path, "AutoModelForSequenceClassification")
    original = bert("BertForSequenceClassification")
    original.save_pretrained(tmp_path)
    found: Any = load_checkpoint(tmp_path, "AutoModelForSequenceClassification")
    torch.testing.assert_close(found(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["one file", "shards", "pickled"])
def test_every_precision_becomes_float32(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    narrow = bert().to(dtype)
    if form == "pickled":
        saved(tmp_path, pickled=True, model=narrow)
    else:
        narrow.save_pretrained(tmp_path, max_shard_size=9000 if form == "shards" else "1GB")
    assert len(list(tmp_path.glob("model*.safetensors"))) == {"one file": 1, "shards": 2, "pickled": 0}[form]
    model = load_checkpoint(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    torch.testing.assert_close(hidden(model), hidden(narrow.float()))


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path, max_shard_size=9000)
    (last,) = tmp_path.glob("model-00002-*")
    last.unlink()
    with pytest.raises(ModelNotFound, match=rf"lacks {last.name}, which model\.safetensors\.index\.json lists"):
        load_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(last.name, f"../{last.name}"))
    with pytest.raises(InvalidInput, match="which is not in its directory"):
        load_checkpoint(tmp_path)


def test_tied_weights_are_there_once(tmp_path: Path) -> None:
    original = bert("BertForMaskedLM")
    original.save_pretrained(tmp_path)
    model: Any = load_checkpoint(tmp_path, "AutoModelForMaskedLM")
    assert model.cls.predictions.decoder.weight.data_ptr() == model.bert.embeddings.word_embeddings.weight.data_ptr()
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits)


def test_old_position_ids_are_no_weights(tmp_path: Path) -> None:
    heard = list[str]()
    saved(tmp_path, lambda weights: {**weights, "embeddings.position_ids": torch.arange(20)[None]})
    load_checkpoint(tmp_path, told=heard.append)
    assert not heard


def test_adapters_are_refused(tmp_path: Path) -> None:
    """Beside the model's weights an adapter would be ignored."""
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InvalidInput, match=r"holds an adapter.*\nhint: .*merge_and_unload"):
        load_checkpoint(tmp_path)


def test_quantized_configurations_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidInput, match=r"are quantized \(quant_method 'gptq'\)\nhint: "):
        load_checkpoint(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_files_that_git_lfs_did_not_download_are_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path, pickled=name == "pytorch_model.bin")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(InvalidInput, match=rf"{name} is a pointer of git-lfs.*\nhint: git lfs pull"):
        load_checkpoint(tmp_path)


class Harmful:
    """A pickled object that would call a function where it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.marker),))

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)


def test_pickled_weights_run_nothing(tmp_path: Path) -> None:
    saved(tmp_path, pickled=True)
    marker = tmp_path / "executed"
    torch.save({"a": Harmful(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"holds other things than tensors.*\(UnpicklingError\)\nhint: "):
        load_checkpoint(tmp_path)
    assert not marker.exists()
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="holds no table of weights"):
        read_weights(tmp_path / "pytorch_model.bin")


def test_directories_without_weights_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load_checkpoint(tmp_path)
    bert().config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match=r"config\.json' is a file\nhint: give the directory"):
        model_directory(str(tmp_path / "config.json"))
    with pytest.raises(ModelNotFound, match=r"has no weights: none of model\.safetensors"):
        load_checkpoint(tmp_path)
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "flax_model.msgpack").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match=r"there is flax_model\.msgpack\nhint: "):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(InvalidInput, match=r"cannot be loaded: SafetensorError: "):
        load_checkpoint(tmp_path)


def test_nothing_of_transformers_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, without("pooler."))
    capfd.readouterr()
    load_checkpoint(tmp_path, optional=("pooler.",))
    with pytest.raises(InvalidInput):
        load_checkpoint(tmp_path)
    assert capfd.readouterr() == ("", "")
