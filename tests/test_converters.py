"""The examples that convert language models, on small files which these tests write: the same numbers, the same ids."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.converters import llama2c

WIDTH, HIDDEN, LAYERS, HEADS, KEY_HEADS, LENGTH = 24, 40, 2, 6, 3, 16
PROMPT = [1, 5, 260, 3, 7, 300]

PIECES = [" a", "aa", " b", "ab", "ba", "aba", " ab", "aaa", "abab", "é", " é", "a", "b", " ", "c"]
VOCABULARY = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
VOCABULARY += [(piece, -float(i)) for i, piece in enumerate(PIECES)]
VOCABULARY += [(chr(0x4E00 + i), -100.0 - i) for i in range(50)]  # some more rows for the model's table

Weights = Mapping[str, NDArray[np.float32]]


def write_tokenizer(path: Path) -> Path:
    tokens = [(token.encode(), score) for token, score in VOCABULARY]
    body = b"".join(struct.pack("<fi", score, len(token)) + token for token, score in tokens)
    path.write_bytes(struct.pack("<i", max(len(token) for token, _ in tokens)) + body)
    return path


def write_model(path: Path, *, tied: bool) -> Weights:
    """Write random weights as llama2.c's first export does; return them by its names, in its order."""
    rng, size, words = np.random.default_rng(5), WIDTH // HEADS, len(VOCABULARY)
    shapes = {
        "table": (words, WIDTH),
        "attention_norm": (LAYERS, WIDTH),
        "wq": (LAYERS, WIDTH, WIDTH),
        "wk": (LAYERS, KEY_HEADS * size, WIDTH),
        "wv": (LAYERS, KEY_HEADS * size, WIDTH),
        "wo": (LAYERS, WIDTH, WIDTH),
        "ffn_norm": (LAYERS, WIDTH),
        "w1": (LAYERS, HIDDEN, WIDTH),
        "w2": (LAYERS, WIDTH, HIDDEN),
        "w3": (LAYERS, HIDDEN, WIDTH),
        "norm": (WIDTH,),
        "frequencies": (2, LENGTH, size // 2),
        **({} if tied else {"classifier": (words, WIDTH)}),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    header = (WIDTH, HIDDEN, LAYERS, HEADS, KEY_HEADS, words if tied else -words, LENGTH)
    path.write_bytes(struct.pack("<7i", *header) + b"".join(w.tobytes() for w in weights.values()))
    return weights


def run_llama2c(w: Weights, ids: list[int]) -> NDArray[np.float64]:
    """Compute the scores of the next token as llama2.c's run.c does: token by token, neighbours rotated together."""
    size, out = WIDTH // HEADS, np.empty(0)
    keys: list[list[Any]] = [[] for _ in range(LAYERS)]
    values: list[list[Any]] = [[] for _ in range(LAYERS)]

    def normed(x: Any, weight: Any) -> Any:
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    for position, token in enumerate(ids):
        x = w["table"][token].astype(np.float64)
        for n in range(LAYERS):
            y = normed(x, w["attention_norm"][n])
            q, k, v = w["wq"][n] @ y, w["wk"][n] @ y, w["wv"][n] @ y
            for i in range(0, WIDTH, 2):
                angle = position / 10000.0 ** ((i % size) / size)
                cos, sin = math.cos(angle), math.sin(angle)
                for each in (q, k) if i < len(k) else (q,):
                    each[i], each[i + 1] = each[i] * cos - each[i + 1] * sin, each[i] * sin + each[i + 1] * cos
            keys[n].append(k)
            values[n].append(v)
            found = np.zeros(WIDTH)
            for head in range(HEADS):
                mine, theirs = (slice(h * size, (h + 1) * size) for h in (head, head // (HEADS // KEY_HEADS)))
                scores = np.array([q[mine] @ each[theirs] for each in keys[n]]) / math.sqrt(size)
                shares = np.exp(scores - scores.max())
                found[mine] = sum(s * each[theirs] for s, each in zip(shares / shares.sum(), values[n], strict=True))
            x = x + w["wo"][n] @ found
            y = normed(x, w["ffn_norm"][n])
            gate = w["w1"][n] @ y
            x = x + w["w2"][n] @ (gate / (1 + np.exp(-gate)) * (w["w3"][n] @ y))
        out = w.get("classifier", w["table"]) @ normed(x, w["norm"])
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_llama2c(tmp_path: Path, tied: bool) -> None:
    weights, target = write_model(tmp_path / "model.bin", tied=tied), tmp_path / "converted"
    llama2c.main(str(tmp_path / "model.bin"), str(write_tokenizer(tmp_path / "tokens.bin")), str(target))
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float64).eval()
    with torch.no_grad():
        scores = model(torch.tensor([PROMPT])).logits[0, -1]
    expected = torch.from_numpy(run_llama2c(weights, PROMPT))
    assert float((scores - expected).abs().max()) < 1e-5 * float(expected.abs().max())  # its own sines are float32
    assert model.config.tie_word_embeddings == tied
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("aba").input_ids == merge_as_llama2c("aba")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_model_of_another_length_is_refused(tmp_path: Path) -> None:
    write_model(path := tmp_path / "model.bin", tied=True)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(8))
    with pytest.raises(ValueError, match=r"not llama2\.c's first format"):
        llama2c.read_model(path)
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="fewer than its header asks for"):
        llama2c.read_model(path)


def merge_as_llama2c(text: str) -> list[int]:
    """Encode as run.c does: characters, or their bytes, and then the best pair again and again, the first of equals."""
    known = {token: i for i, (token, _) in enumerate(VOCABULARY)}
    ids = [1]
    for character in (" " if text else "") + text:
        if character in known:
            ids.append(known[character])
        else:
            ids += [byte + llama2c.BYTES for byte in character.encode()]
    while True:
        best, place = -1e10, -1
        for i, pair in enumerate(itertools.pairwise(ids)):
            merged = known.get("".join(VOCABULARY[each][0] for each in pair))
            if merged is not None and VOCABULARY[merged][1] > best:
                best, place = VOCABULARY[merged][1], i
        if place < 0:
            return ids
        ids[place : place + 2] = [known["".join(VOCABULARY[each][0] for each in ids[place : place + 2])]]


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from("aaabbé c\n🙂<>s"), max_size=30) | st.text(max_size=20))
def test_ids_are_those_of_llama2c(text: str) -> None:
    if "\n<s>\n" in text or "\n</s>\n" in text:  # transformers takes these as begin and end, wherever they stand
        return
    encoded = _TOKENIZER.encode(text)
    assert encoded.ids == merge_as_llama2c(text)
    assert _TOKENIZER.decode(encoded.ids) == text


_TOKENIZER = llama2c.make_tokenizer(VOCABULARY)


# GGUF

TEXTS = ["low lower lowest", " new  12 wider\n", "<|im_start|>newer<|im_end|> 345", "é🙂"]


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf")


def write_gguf(gguf: Any, path: Path, model: Any, tokenizer: Any, kind: Any, *, split: str = "smollm") -> None:
    """Write a model as llama.cpp's converter does, which reorders the rows of queries and keys."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(words)
    special = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([special[not word.startswith("<|")] for word in words])
    writer.add_token_merges([" ".join(pair) for pair in merges_of(tokenizer)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        w = value.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                w = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        of = kind if w.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(w, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merges_of(tokenizer: Any) -> list[list[str]]:
    found: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return found


def small_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["low lower lowest new newer newest wide wider  widest"] * 5, trainer)
    return tokenizer


def small_model(words: int, *, tied: bool) -> Any:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize(("kind", "tied"), [("F32", True), ("F16", False), ("Q4_1", True), ("Q8_0", False)])
def test_a_gguf_file(tmp_path: Path, gguf: Any, kind: str, tied: bool) -> None:
    from examples.converters import gguf_llama

    tokenizer, kind = small_tokenizer(), gguf.GGMLQuantizationType[kind]
    original = small_model(tokenizer.get_vocab_size(), tied=tied)
    write_gguf(gguf, tmp_path / "model.gguf", original, tokenizer, kind)
    gguf_llama.main(str(tmp_path / "model.gguf"), str(target := tmp_path / "converted"))

    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    for parameter in original.parameters():  # as exact as the file is
        if parameter.ndim == 2:
            parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind).copy()))
    ids = torch.arange(20)[None] * 13 % tokenizer.get_vocab_size()
    with torch.no_grad():
        assert float((model(ids).logits - original(ids).logits).abs().max()) < 1e-4
    assert model.config.tie_word_embeddings == tied
    assert model.config.rms_norm_eps == 1e-5

    converted = AutoTokenizer.from_pretrained(target)
    for text in TEXTS:
        assert converted(text).input_ids == tokenizer.encode(text).ids
        assert converted.decode(converted(text).input_ids) == text
    assert (converted.bos_token, converted.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert converted.apply_chat_template([{"content": "low"}], tokenize=False) == "<|im_start|>low<|im_end|>"


def test_a_gguf_file_with_another_tokenizer_is_refused(tmp_path: Path, gguf: Any) -> None:
    from examples.converters import gguf_llama

    tokenizer = small_tokenizer()
    model = small_model(tokenizer.get_vocab_size(), tied=True)
    write_gguf(gguf, path := tmp_path / "model.gguf", model, tokenizer, gguf.GGMLQuantizationType.F32, split="qwen2")
    with pytest.raises(ValueError, match="'gpt2', split 'qwen2'; this example reads 'gpt2' with gpt-2, smollm"):
        gguf_llama.main(str(path), str(tmp_path / "converted"))
    assert not (tmp_path / "converted").exists()
