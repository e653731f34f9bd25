"""all-MiniLM-L6-v2 for the peers' benchmarks: its weights, and a sentence at each length, as one .npz file.

    python -m benchmarks.peers.export_minilm FILE [--lengths 32 128] [--text SENTENCE]

Peers cannot look tokens up at a reasonable price, so their input starts behind the look-up: "N/x" is the sum of word,
position and type embeddings, "N/mask" tells tokens from padding, "N/embedding" is the float64 model's mean over
tokens, before L2 normalization.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.peers.works import LAYER
from benchmarks.sentences import sentences
from secure.models.sentence_encoder import (
    TextTokenizer,
    find_packaged_model,
    load_sentence_encoder,
    load_tokenizer,
    tokenize,
)

MODULES = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
)


def numbers(tensor: Tensor) -> NDArray[Any]:
    out: NDArray[Any] = tensor.detach().numpy()
    return np.ascontiguousarray(out)


def fitting(tokenizer: TextTokenizer, length: int) -> str:
    """The longest of the sentences that fits."""
    counts = {text: len(tokenizer.tokenizer.encode(text).ids) for text in sentences()}
    return max((text for text in counts if counts[text] <= length), key=counts.__getitem__)


def export(text: str | None, lengths: list[int]) -> dict[str, NDArray[Any]]:
    directory = find_packaged_model()
    encoder, tokenizer = load_sentence_encoder(directory), load_tokenizer(directory)
    encoded = {length: tokenize(tokenizer, text or fitting(tokenizer, length), length) for length in lengths}
    model: Any = encoder.encoder
    out: dict[str, NDArray[Any]] = {}
    for i, layer in enumerate(model.encoder.layer):
        for j, module in enumerate(map(layer.get_submodule, MODULES)):
            weight, bias = LAYER[2 * j : 2 * j + 2]
            # torch keeps matrices as (out, in)
            out[f"{i}.{weight}"], out[f"{i}.{bias}"] = numbers(module.weight.t()), numbers(module.bias)
    norm = model.embeddings.LayerNorm
    out |= {"norm": numbers(norm.weight), "norm.bias": numbers(norm.bias)}
    tables = model.embeddings
    for length, (ids, mask) in encoded.items():
        words, types = tables.word_embeddings(ids), tables.token_type_embeddings(torch.zeros_like(ids))
        out[f"{length}/x"] = numbers((words + types + tables.position_embeddings(torch.arange(length)))[0])
        out[f"{length}/mask"] = numbers(mask[0].to(torch.float32))
    encoder.double()
    for length, (ids, mask) in encoded.items():
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        out[f"{length}/embedding"] = numbers(hidden[mask[0].bool()].mean(0))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--text", help="default: for each length, the longest of benchmarks.sentences that fits")
    options = parser.parse_args()
    arrays = export(options.text, options.lengths)
    np.savez(options.file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
    print(f"{options.file}: {len(arrays)} arrays, {sum(a.nbytes for a in arrays.values()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
