"""Turn a GGUF file of a LLaMA model, quantized or not, into a directory that transformers loads.

pip install 'unseen[models,gguf]'
python -m examples.converters.gguf_llama SmolLM2-135M-Instruct.Q4_1.gguf smollm2-135m
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, TokenType, dequantize, get_tensor_name_map
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPLITS = {  # what llama.cpp calls them -> what divides a text before its byte pairs are merged
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
IDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""Special tokens by their names in GGUF and in transformers."""


def make_model(said: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> LlamaForCausalLM:
    """Make the model, float32, of a file's metadata and tensors. Raises KeyError for a tensor that is not there."""
    heads = said["llama.attention.head_count"]
    key_heads = said.get("llama.attention.head_count_kv", heads)
    special: dict[str, Any] = {
        f"{name}_token_id": said.get(f"tokenizer.ggml.{key}_token_id") for key, name in IDS.items()
    }
    config = LlamaConfig(
        vocab_size=len(said["tokenizer.ggml.tokens"]),
        hidden_size=said["llama.embedding_length"],
        intermediate_size=said["llama.feed_forward_length"],
        num_hidden_layers=said["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=said["llama.context_length"],
        rms_norm_eps=float(f"{said['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # float32 in the file
        rope_parameters={"rope_type": "default", "rope_theta": said.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in tensors,
        **special,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)

    def weight(name: str) -> Tensor:
        found = tensors[f"{names.get_name(name.removesuffix('.weight'))}.weight"]
        value: Tensor = torch.from_numpy(dequantize(found.data, found.tensor_type).copy()).float()
        if rotated := re.search(r"\.([qk])_proj\.", name):  # GGUF has neighbours rotated, transformers halves
            count = heads if rotated[1] == "q" else key_heads
            value = value.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        return value

    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    model.load_state_dict({name: weight(tied.get(name, name)) for name in model.state_dict()})
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def make_tokenizer(said: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Make the byte-level tokenizer of a file's metadata. Raises ValueError for another kind."""
    kind, split = said["tokenizer.ggml.model"], said.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        raise ValueError(f"a tokenizer {kind!r}, split {split!r}; this example reads 'gpt2' with {', '.join(SPLITS)}")
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split], decoders.ByteLevel()
    for token, of in zip(tokens, kinds, strict=True):
        if of in (TokenType.CONTROL, TokenType.USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=of == TokenType.CONTROL, normalized=False)])
    special = {
        f"{name}_token": tokens[said[at]]
        for key, name in IDS.items()
        if (at := f"tokenizer.ggml.{key}_token_id") in said
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=said["llama.context_length"],
        **special,
    )
    made.chat_template = said.get("tokenizer.chat_template")
    return made


def main(source: str, target: str) -> None:
    reader = GGUFReader(source)
    said = {name: field.contents() for name, field in reader.fields.items()}
    if said["general.architecture"] != "llama":
        raise ValueError(f"{source} holds {said['general.architecture']!r}; this example reads LLaMA")
    make_tokenizer(said).save_pretrained(target)
    make_model(said, {tensor.name: tensor for tensor in reader.tensors}).save_pretrained(target)
    print(f"{target}: now LlamaForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load it")


if __name__ == "__main__":
    main(*sys.argv[1:])
