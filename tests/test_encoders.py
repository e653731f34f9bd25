"""Sentence encoders as people have them: poolings, modules, masks, prompts; and the self-test of what was compiled."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secure
from secure.capture.capture import capture
from secure.capture.graph import run
from secure.deployments.compilation import Compilation
from secure.deployments.compiled import build, plain_reference
from secure.deployments.deployment import CompileOptions
from secure.deployments.self_test import Accept, self_test
from secure.deployments.two_party import TwoParty
from secure.errors import InvalidInput, OutOfRange
from secure.models import text as text_module
from secure.models.calibration import REPEATED, SENTENCES
from secure.models.pooling import POOLINGS, pool
from secure.models.prompts import Prompts, prompts_from, read_prompts
from secure.models.sentence_encoder import SentenceEncoder, load_sentence_encoder
from secure.models.text import calibration_inputs, load_text_model, text_inputs
from secure.models.tokens import TextTokenizer
from secure.session.session import Session
from secure.tasks.embed import Embed
from secure.tasks.task import Loaded, Served
from tests.tiny import LENGTH, TEXT, WORDS, sentences, word_tokenizer, write_model

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

WIDTH = 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def modules(
    directory: Path, kinds: Sequence[str], pooling: dict[str, Any] | None = None, transformer: str = ""
) -> Path:
    """Write modules.json, as sentence-transformers does, and the configuration of pooling."""
    listed = [(transformer if kind == "Transformer" else f"{i}_{kind}", kind) for i, kind in enumerate(kinds)]
    names = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(listed)
    ]
    (directory / "modules.json").write_text(json.dumps(names))
    for path, kind in listed:
        (directory / path).mkdir(exist_ok=True)
        if kind == "Pooling":
            (directory / path / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    return directory


def write_dense(place: Path, wide: int, narrow: int, activation: str = "Tanh", **more: Any) -> Any:
    """A random dense module as files; return it."""
    from safetensors.torch import save_file

    torch.manual_seed(5)
    linear = nn.Linear(wide, narrow)
    place.mkdir(exist_ok=True)
    save_file({f"linear.{name}": value for name, value in linear.state_dict().items()}, place / "model.safetensors")
    kind = f"torch.nn.modules.activation.{activation}"
    settings = {"in_features": wide, "out_features": narrow, "bias": True, "activation_function": kind, **more}
    (place / "config.json").write_text(json.dumps(settings))
    return linear


def inputs(words: int = 4) -> dict[str, Tensor]:
    ids = torch.tensor([[2, *range(7, 7 + words), 3, *[0] * (LENGTH - 2 - words)]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


# poolings


def by_hand(name: str, rows: Tensor) -> Tensor:
    """The pooling of one text's own tokens (tokens, width)."""
    count = torch.arange(1, len(rows) + 1, dtype=rows.dtype)[:, None]
    found: dict[str, Tensor] = {
        "mean": rows.mean(0),
        "cls": rows[0],
        "max": rows.max(0).values,
        "mean_sqrt_len_tokens": rows.sum(0) / len(rows) ** 0.5,
        "weightedmean": (rows * count).sum(0) / count.sum(),
        "lasttoken": rows[-1],
    }
    return found[name]


@pytest.mark.parametrize("name", POOLINGS)
def test_poolings(name: str) -> None:
    hidden = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1)) - 2.0
    mask = torch.tensor([[1.0] * n + [0.0] * (6 - n) for n in (1, 4, 6)])
    found = pool(name, hidden, mask)
    expected = torch.stack([by_hand(name, hidden[i, : int(mask[i].sum())]) for i in range(3)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", POOLINGS)
def test_poolings_are_captured(name: str, directory: Path) -> None:
    """All that follows from the mask is the client's."""
    model = SentenceEncoder(load_sentence_encoder(directory).encoder, pooling=(name, "cls"))
    graph, parameters = capture(model, inputs())
    assert run(graph, inputs(), parameters)[0].allclose(model(**inputs()), atol=1e-5)
    assert all(node.visibility == "client" for node in graph.nodes if "attention_mask" in str(node.attrs))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "max": ({"pooling_mode_max_tokens": True}, "max"),
    "old names": ({"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_tokens": False}, "weightedmean"),
    "last": ({"pooling_mode_lasttoken": True, "include_prompt": True}, "lasttoken"),
    "several": ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls+mean"),
    "new name": ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean_sqrt_len_tokens"),
    "new list": ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_poolings_are_read(case: str, tmp_path: Path) -> None:
    settings, expected = SETTINGS[case]
    model = load_sentence_encoder(modules(write_model(tmp_path), ["Transformer", "Pooling"], settings))
    assert model.pooling == expected
    assert model(**inputs()).shape[-1] == WIDTH * len(model.poolings)


# modules behind pooling


@pytest.mark.parametrize("activation", ["Tanh", "Identity", "GELU"])
@pytest.mark.parametrize("residual", [False, True])
def test_dense_modules(activation: str, residual: bool, tmp_path: Path) -> None:
    modules(write_model(tmp_path), ["Transformer", "Pooling", "Dense", "Normalize"])
    linear = write_dense(tmp_path / "2_Dense", WIDTH, WIDTH, activation, use_residual=residual)
    model = load_sentence_encoder(tmp_path)
    pooled = SentenceEncoder(model.encoder, normalize=False)(**inputs())
    expected = getattr(nn, activation)()(linear(pooled)) + (pooled if residual else 0)
    torch.testing.assert_close(model(**inputs()), F.normalize(expected, dim=-1))
    assert model.normalized
    graph, parameters = capture(model, inputs())
    assert run(graph, inputs(), parameters)[0].allclose(model(**inputs()), atol=1e-5)


def test_dense_modules_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    modules(write_model(tmp_path), ["Transformer", "Pooling", "Dense"])
    place = tmp_path / "2_Dense"
    for change, message in (
        ({"activation_function": "os.system"}, r"activation 'os\.system'"),
        ({"activation_function": "torch.nn.Softmax2d"}, "activation"),
        ({"in_features": "many"}, "gives no sizes"),
        ({"in_features": 7}, "is not the weights of this module"),
        ({"out_features": 7}, "is not the weights of this module"),
        ({"bias": False}, "is not the weights of this module"),
        ({"module_input_name": "token_embeddings"}, "maps 'token_embeddings'"),
    ):
        write_dense(place, WIDTH, 8, activation="Tanh")
        settings = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(InvalidInput, match=message):
            load_sentence_encoder(tmp_path)
    write_dense(place, WIDTH + 1, 8)
    with pytest.raises(InvalidInput, match="its modules do not fit"):
        load_sentence_encoder(tmp_path)
    (place / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_sentence_encoder(tmp_path)


def test_dimensions_are_the_first_numbers(directory: Path) -> None:
    whole, cut = (load_sentence_encoder(directory, dimensions=n)(**inputs()) for n in (0, 5))
    torch.testing.assert_close(cut, whole[:, :5])
    with pytest.raises(InvalidInput, match="33 dimensions of 32"):
        load_sentence_encoder(directory, dimensions=33)


# directories


def test_the_transformer_may_be_in_a_directory_of_its_own(tmp_path: Path) -> None:
    """As versions of sentence-transformers before 2 wrote it; a byte order mark before modules.json."""
    modules(tmp_path, ["Transformer", "Pooling"], transformer="0_Transformer")
    write_model(tmp_path / "0_Transformer")
    (tmp_path / "config.json").write_text('{"__version__": "0.3.6"}')
    (tmp_path / "modules.json").write_text((tmp_path / "modules.json").read_text(), encoding="utf-8-sig")
    model = load_text_model(str(tmp_path))
    torch.testing.assert_close(model.module(**inputs()), load_sentence_encoder(tmp_path / "0_Transformer")(**inputs()))
    (tmp_path / "config.json").unlink()
    assert load_text_model(str(tmp_path)).tokenizer.pad_id == 0


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("BertForSequenceClassification", "a classifier .*unseen classify, or unseen rerank"),
        ("BertForTokenClassification", "a tagger of tokens.*unseen tag"),
        ("BertForQuestionAnswering", "a model that finds answers in a text.*unseen answer"),
    ],
)
def test_models_for_another_task_are_told(kind: str, command: str, tmp_path: Path, directory: Path) -> None:
    """A classifier was served as a sentence encoder with mean pooling."""
    import transformers

    encoder: Any = load_sentence_encoder(directory).encoder
    getattr(transformers, kind)(encoder.config).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match=rf"(?s)is {command}"):
        load_sentence_encoder(tmp_path)
    modules(tmp_path, ["Transformer", "Pooling"])  # whoever wrote this means the encoder
    load_sentence_encoder(tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    with pytest.raises(InvalidInput, match=r"is a CrossEncoder, no sentence encoder\nhint: use unseen rerank"):
        load_sentence_encoder(tmp_path)


def test_positions_behind_the_padding_are_not_counted(tmp_path: Path) -> None:
    """RoBERTa's table of 20 rows holds 18 positions."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    configuration = transformers.RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=20)
    transformers.RobertaModel(configuration).save_pretrained(tmp_path)
    model = load_sentence_encoder(tmp_path)
    assert model.maximum_length == 18
    ids = torch.arange(18)[None] + 3
    assert model(ids, torch.ones_like(ids)).isfinite().all()


# masks


def modern_bert() -> Any:
    import transformers

    torch.manual_seed(2)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    special: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    window: dict[str, Any] = {"local_attention": 6, "global_attn_every_n_layers": 2}
    return transformers.ModernBertModel(
        transformers.ModernBertConfig(**sizes, intermediate_size=32, **special, **window)
    )


def qwen() -> Any:
    import transformers

    torch.manual_seed(2)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.Qwen3Model(
        transformers.Qwen3Config(**sizes, intermediate_size=32, num_key_value_heads=1, head_dim=8)
    )


def gemma() -> Any:
    import transformers

    torch.manual_seed(2)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    window: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(
            **sizes, intermediate_size=32, num_key_value_heads=1, head_dim=8, use_bidirectional_attention=True, **window
        )
    )


@pytest.mark.parametrize("made", [modern_bert, qwen, gemma])
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_windows_and_causal_masks_are_the_models_own(made: Callable[[], Any], pooling: str) -> None:
    """At a length beyond the window, every token's state is that of the original model without any padding."""
    encoder = made().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # random weights hardly attend
    model = SentenceEncoder(encoder, pooling=pooling, normalize=False)
    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(4))
    for length in (24, 17, 5):
        mask = (torch.arange(24) < length).long()[None]
        with torch.no_grad():
            hidden = encoder(input_ids=ids[:, :length]).last_hidden_state[0]
            expected = by_hand(pooling, hidden)
            found = model(ids, mask)[0]
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    graph, parameters = capture(model, {"input_ids": ids, "attention_mask": mask})
    again = run(graph, {"input_ids": ids, "attention_mask": mask}, parameters)[0][0]
    torch.testing.assert_close(again, found, atol=2e-4, rtol=1e-4)


def test_only_the_encoder_of_t5_is_loaded(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(2)
    configuration = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    original = transformers.T5ForConditionalGeneration(configuration).eval()
    original.save_pretrained(tmp_path)
    model = load_sentence_encoder(tmp_path)
    ids = torch.arange(2, 8)[None]
    with torch.no_grad():
        expected = original.encoder(input_ids=ids).last_hidden_state.mean(1)
        torch.testing.assert_close(model(ids, torch.ones_like(ids)), expected)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    graph, parameters = capture(model, given)
    torch.testing.assert_close(run(graph, given, parameters)[0], expected, atol=1e-5, rtol=1e-4)


# prompts

PROMPTS = {"query": f"{WORDS[40]} {WORDS[41]}: ", "document": f"{WORDS[50]}\n"}


def with_prompts(directory: Path, default: str | None = "query", **more: Any) -> Path:
    settings = {"prompts": {**PROMPTS, **more}, "default_prompt_name": default}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return directory


def test_prompts_survive_labels(tmp_path: Path) -> None:
    heard = list[str]()
    found = read_prompts(with_prompts(tmp_path, empty="", long="x" * 600, **{"": "no name"}), heard.append)
    assert found == Prompts({**PROMPTS, "empty": ""}, "query")
    assert prompts_from({"model": "m", **found.labels()}) == found
    assert all(value.isprintable() and len(value) <= 512 for value in found.labels().values())
    assert heard == ["prompts left out, as they are too long or too many: long, "]
    assert [found.text(name) for name in (None, "", "document")] == [PROMPTS["query"], "", PROMPTS["document"]]
    with pytest.raises(InvalidInput, match=r"no prompt is called 'other'\nhint: query, document"):
        found.text("other")
    assert not Prompts({"a": ""})
    assert not prompts_from({})


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": ["query: "]},
        {"prompts": {"query": 7}},
        {"prompts": {"query": "q"}, "default_prompt_name": "passage"},
        {"prompts": {"query": "q" * 600}, "default_prompt_name": "query"},
        {"prompts": {"query": "q"}, "default_prompt_name": ["query"]},
    ],
)
def test_prompts_that_are_none_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidInput, match=r"config_sentence_transformers\.json (has|names) "):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "labels",
    [
        {"prompt:a": "no JSON"},
        {"prompt:a": "7"},
        {"prompt:a": '"' + "x" * 501 + '"'},
        {"prompt": "b", "prompt:a": '"x"'},
        {"prompt:a": "[" * 100_000},
    ],
)
def test_labels_of_a_server_that_are_no_prompts_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="the server's"):
        prompts_from(labels)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Session]:
    directory = with_prompts(write_model(tmp_path_factory.mktemp("prompted")))
    compiled = secure.compile_text_model(str(directory), LENGTH, calibration=sentences(), embedding="client-table")
    return directory, secure.insecure_in_process(compiled)


def test_the_default_prompt_goes_before_each_text(prompted: tuple[Path, Session]) -> None:
    """The answers are those of the text with its prompt; a client may name another prompt, or none."""
    directory, session = prompted
    model = load_text_model(str(directory))
    assert model.about[-1].startswith("prompts: query (")
    assert session.prompts == model.prompts
    for name, prompt in ((None, PROMPTS["query"]), ("document", PROMPTS["document"]), ("", "")):
        (found,) = session.embed([WORDS[7]], prompt=name)
        with torch.no_grad():
            expected = model.module(**text_inputs(model.tokenizer, prompt + WORDS[7], LENGTH))[0]
        torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=0)
    with pytest.raises(InvalidInput, match="no prompt is called 'other'"):
        session.embed([TEXT], prompt="other")
    with pytest.raises(secure.EmptyInput):  # a prompt alone is no text
        session.embed([" "])


@pytest.mark.parametrize("prompt", [None, "document", ""])
@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\x00\ufffd"])
def test_a_text_without_tokens_is_empty_whatever_goes_before_it(text: str, prompt: str | None) -> None:
    from tokenizers import normalizers

    tokenizer = word_tokenizer()
    tokenizer.normalizer = normalizers.BertNormalizer()  # which leaves out what cannot be seen
    served = Served(TextTokenizer(tokenizer, 0), LENGTH, prompts=Prompts(PROMPTS, "query"))
    with pytest.raises(secure.EmptyInput, match="the text is empty: it has no tokens"):
        Embed(prompt=prompt).inputs(text, served)
    ids = Embed(prompt=prompt).inputs(text + WORDS[7], served)["input_ids"]
    assert tokenizer.token_to_id(WORDS[7]) in ids


def test_prompts_that_pooling_leaves_out_are_refused(tmp_path: Path) -> None:
    with_prompts(write_model(tmp_path))
    modules(tmp_path, ["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "include_prompt": False})
    with pytest.raises(InvalidInput, match="leaves the tokens of its prompts out of pooling"):
        load_sentence_encoder(tmp_path)


# calibration


@pytest.mark.parametrize("length", [3, 5, 8, 12, 64, 300, 600])
def test_calibration_covers_every_length(length: int, directory: Path) -> None:
    """Beyond 428 tokens no sample was longer than a sentence."""
    tokenizer = load_text_model(str(directory)).tokenizer
    found = calibration_inputs(tokenizer, length, SENTENCES)
    counts = [int(each["attention_mask"].sum()) for each in found]
    assert counts.count(length) >= 2 + len(REPEATED)
    assert max(counts) == length
    assert {each["input_ids"].shape for each in found} == {(1, length)}
    if length > 100:
        assert any(length // 3 < count < length for count in counts)
    for each in found:
        ids = each["input_ids"][0][each["attention_mask"][0].bool()].tolist()
        assert (ids[0], ids[-1]) == (2, 3)
        assert not {2, 3} & set(ids[1:-1])
    assert len(found) <= len(SENTENCES) * (1 + 40 // length) + len(REPEATED) + 16


def test_a_weight_or_a_calibration_value_that_is_no_number_is_named() -> None:
    """Plausible numbers came out, or a message that named nothing."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    x = torch.linspace(-1, 1, 8)[None]
    named = nn.ModuleDict({"net": model})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = named

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.parts["net"](x)
            return found

    for bad, message in (
        (float("nan"), r"'x' holds values that are no number \(NaN\)"),
        (float("inf"), r"module 'parts.net.0'"),
    ):
        wrong = x.clone()
        wrong[0, 2] = bad
        with pytest.raises(InvalidInput, match=message):
            secure.compile(Net(), {"x": x}, calibration=[{"x": wrong}])
        with torch.no_grad():
            model[0].bias[3] = bad
        with pytest.raises(
            InvalidInput, match=r"the weight 'parts\.net\.0\.bias' holds values that are NaN or infinite"
        ):
            secure.compile(Net(), {"x": x})
        with torch.no_grad():
            model[0].bias[3] = 0.0


# the self-test


def compilation(directory: Path, **options: Any) -> Compilation:
    chosen = {"lengths": (LENGTH,), "sentences": tuple(sentences()), **options}
    return Compilation(str(directory), TwoParty(), **chosen)


def test_the_self_test_says_the_lowest_cosine(directory: Path) -> None:
    """Of every length, and the line is the model's owner's."""
    compiled = compilation(directory, lengths=(LENGTH, LENGTH - 2), batches=(2,)).run()
    assert "self-test: lowest cosine to the original 0.99" in compiled.about
    assert "on 3 texts" in compiled.about  # two at the greatest length, one at the other
    assert all(size.about == compiled.about for size in compiled.sizes)


def test_a_compiled_model_below_the_threshold_is_refused(directory: Path) -> None:
    with pytest.raises(InvalidInput, match=r"(?s)gives other answers than .* is accepted.*--accept-cosine"):
        compilation(directory, accept=Accept(cosine=0.999999999)).run()


class Other(nn.Module):
    """A module whose answers are not those that were compiled."""

    def __init__(self, model: nn.Module, value: float) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids, attention_mask)
        return found.flip(-1) * self.value


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_other_answers_are_refused_whatever_they_are(value: float, directory: Path) -> None:
    loaded = Embed().load(str(directory), LENGTH, sentences())
    compiled = build(loaded, TwoParty(), CompileOptions(embedding="client-table"), {})
    fields = {name: getattr(loaded, name) for name in ("name", "samples", "tokenizer", "held_out")}
    with pytest.raises(InvalidInput, match="gives other answers"):
        self_test(compiled, Loaded(module=Other(loaded.module, value), **fields))


@pytest.mark.parametrize("left", [1, 2])
def test_inputs_that_leave_their_ranges_are_told_or_refused(
    left: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two is a line for the owner, who knows what the texts of clients are like; both are a refusal."""
    compiled, asked = (
        build(loaded := Embed().load(str(directory), LENGTH, sentences()), TwoParty(), CompileOptions(), {}),
        [],
    )

    def answered(*given: Any) -> Any:
        asked.append(given)
        if len(asked) <= left:
            raise OutOfRange("a value left its range in encoder.layer.0, so there is no answer that could be trusted")
        return plain_reference(*given)

    monkeypatch.setattr("secure.deployments.self_test.plain_reference", answered)
    if left == 2:
        with pytest.raises(
            InvalidInput, match="2 of 2 inputs left the ranges of calibration: a value left its range in enc"
        ):
            self_test(compiled, loaded)
    else:
        about = self_test(compiled, loaded).about
        assert "1 of 2 inputs left the ranges of calibration: a value left its range in encoder.layer.0, for" in about


def test_the_key_of_a_compilation_covers_what_is_new(directory: Path) -> None:
    keys = {compilation(directory, **more).key() for more in ({}, {"dimensions": 4}, {"accept": Accept(cosine=0.5)})}
    assert len(keys) == 3


def test_dimensions_are_compiled(directory: Path) -> None:
    compiled = compilation(directory, dimensions=4).run()
    assert compiled.program.labels["dimensions"] == "4"
    assert list(compiled.program.output_shapes.values()) == [(1, 4)]
    with secure.insecure_in_process(compiled) as session:
        (found,) = session.embed([TEXT])
    model = load_text_model(str(directory), 4)
    expected = model.module(**text_inputs(model.tokenizer, TEXT, LENGTH))[0]
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=0)
    assert not Served(model.tokenizer, LENGTH, model.normalized).normalized


def test_held_out_inputs_fill_the_length(directory: Path) -> None:
    model = load_text_model(str(directory))
    found = text_module.held_out_inputs(model, LENGTH)
    assert max(int(each["attention_mask"].sum()) for each in found) == LENGTH
