"""Turn a model of llama2.c (stories260K.bin and tok512.bin, for one) into a directory that transformers loads.

python -m examples.converters.llama2c stories260K.bin tok512.bin stories260K
"""

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BYTES = 3
"""The id of the token of byte 0; unknown, begin and end stand before it, the other tokens after the 256 bytes."""


def read_model(path: Path) -> LlamaForCausalLM:
    """Read a checkpoint of llama2.c's first format: seven integers, then all weights of one kind for all layers.

    Raises ValueError for a file of another length.
    """
    raw = path.read_bytes()
    width, hidden, layers, heads, key_heads, vocabulary, length = struct.unpack_from("<7i", raw)
    tied, vocabulary, size = vocabulary > 0, abs(vocabulary), width // heads
    weights, at = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        start, at = at, at + int(np.prod(shape))
        if at > len(weights):
            raise ValueError(f"{path} has {len(weights)} numbers, fewer than its header asks for")
        return weights[start:at].reshape(shape)

    def by_halves(x: Tensor) -> Tensor:
        """Reorder each head's rows: llama2.c rotates neighbours, transformers a number of each half."""
        halves: Tensor = x.unflatten(1, (-1, size // 2, 2)).transpose(2, 3).flatten(1, 3)
        return halves

    state = {"model.embed_tokens.weight": take(vocabulary, width)}
    of_layers = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": by_halves(take(layers, heads * size, width)),
        "self_attn.k_proj": by_halves(take(layers, key_heads * size, width)),
        "self_attn.v_proj": take(layers, key_heads * size, width),
        "self_attn.o_proj": take(layers, width, heads * size),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, hidden, width),
        "mlp.down_proj": take(layers, width, hidden),
        "mlp.up_proj": take(layers, hidden, width),
    }
    for name, every in of_layers.items():
        state |= {f"model.layers.{i}.{name}.weight": one for i, one in enumerate(every)}
    state["model.norm.weight"] = take(width)
    take(length, size)  # sines and cosines, which transformers computes
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else take(vocabulary, width)
    if at != len(weights):
        raise ValueError(f"{path} has {len(weights)} numbers, its header asks for {at}: not llama2.c's first format")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def read_vocabulary(path: Path) -> list[tuple[str, float]]:
    """Read tokens and their scores from the file of a tokenizer: after one integer, score, length and text of each."""
    raw, at, found = path.read_bytes(), 4, list[tuple[str, float]]()
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        found.append((raw[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    return found


def make_tokenizer(vocabulary: list[tuple[str, float]]) -> Tokenizer:
    """Make byte-pair encoding that merges as llama2.c does: of all neighbours, those whose union has the best score.

    So every way to put a token together from two others is a rule, and rules stand in the order of their results'
    scores. Of rules of one result, those are first that take less on their left.
    """
    ids = {token: i for i, (token, _) in enumerate(vocabulary)}
    pieces = {token for token, _ in vocabulary[BYTES + 256 :]}
    by_score = sorted(vocabulary[BYTES + 256 :], key=lambda each: -each[1])
    merges = [
        (token[:cut], token[cut:])
        for token, _ in by_score
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    unknown, begin, end = (token for token, _ in vocabulary[:BYTES])
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, ids[begin])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (begin, end)])
    return tokenizer


def main(model: str, tokenizer: str, target: str) -> None:
    vocabulary = read_vocabulary(Path(tokenizer))
    _, begin, end = (token for token, _ in vocabulary[:BYTES])  # there is no unknown token: bytes stand for the rest
    PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(vocabulary), bos_token=begin, eos_token=end, pad_token=end
    ).save_pretrained(target)
    read_model(Path(model)).save_pretrained(target)
    print(f"{target}: now LlamaForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load it")


if __name__ == "__main__":
    main(*sys.argv[1:])
