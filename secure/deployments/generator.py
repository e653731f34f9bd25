"""``secure.compile_generator``, which compiles a decoder to generate text: Programs for its prompt and for each token.

All Programs have the same ranges and weights, and keep keys and values in the same rings. So they are one model in
several sizes, as the lengths of a text model are; that of a step has the length 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from protocols.fixedpoint import FixedPoint
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.compiled import Compiled
from secure.deployments.deployment import CompileOptions, Deployment
from secure.deployments.two_party import TwoParty
from secure.errors import InvalidInput
from secure.frontend import Size
from secure.lowering.client_inputs import GENERATE, MOST_ROWS, TASK
from secure.models.checkpoints import load_checkpoint, quiet_transformers
from secure.models.decoder import (
    Decoder,
    looks_positions_up,
    most_positions,
    prompt_inputs,
    step_inputs,
    vocabulary,
)
from secure.models.tokens import TextTokenizer
from secure.progress import Told, silent
from secure.session.link import MAXIMUM_LENGTHS

TEXTS = 8
"""Texts that a decoder writes itself, to calibrate with, if none are given."""

PROMPT, CAPACITY = 32, 256


def compile_generator(
    model: nn.Module | str,
    *,
    prompt: int | Sequence[int] = PROMPT,
    capacity: int = CAPACITY,
    calibration: Sequence[Sequence[int]] = (),
    deployment: Deployment | None = None,
    embedding: str | None = None,
    gelu: str | None = None,
    approximations: str | None = None,
    fixed_point: FixedPoint | None = None,
    network: str | None = None,
    tokenizer: TextTokenizer | None = None,
    tokenizer_json: bytes = b"",
    told: Told = silent,
) -> Compiled:
    """Compile a causal language model of ``transformers`` so that a session's ``generate`` writes text with it.

    model: the model, or the directory in which ``save_pretrained`` wrote it. prompt: the tokens to which prompts are
    padded; of several lengths a prompt takes the shortest that holds it, and the parties see which. capacity: the most
    tokens of the padded prompt and what is written together. calibration: token ids of texts, as long as the capacity
    if they can be, which set the ranges; by default the model writes TEXTS texts itself, by sampling.
    Other arguments are those of ``secure.compile``.

    The Programs compute the token that the model finds most likely next. The client learns it, and nobody else; nobody
    learns a score. Raises InvalidInput for a model that is no decoder, or has no room for so many tokens; and what
    ``secure.compile`` raises.
    """
    deployment = deployment or TwoParty()
    if not isinstance(deployment, CircuitDeployment):
        raise InvalidInput(f"{deployment.name} does not generate text", "deploy by secret sharing: TwoParty()")
    options = CompileOptions(embedding, gelu, approximations, fixed_point, network)
    deployment.check(options, tokens=True)
    buckets = sorted({prompt} if isinstance(prompt, int) else {*prompt}, reverse=True)
    _check_sizes(buckets, capacity)
    if isinstance(model, str):
        told(0, 0, "loading the model")
        found = load_checkpoint(Path(model), "AutoModelForCausalLM")
        name = Path(model).name
    else:
        found, name = model, ""
    _check_model(found, capacity)
    places = not looks_positions_up(found)
    texts = list(calibration) or written(found, capacity, told)
    known = vocabulary(found)
    _check_texts(texts, known)
    samples = _samples(texts, capacity, places=places)
    labels = {TASK: GENERATE, MOST_ROWS: str(capacity), "vocabulary": str(known), **({"model": name} if name else {})}
    sizes: list[tuple[Size, Mapping[str, str] | None]] = [(Size(samples[0], samples), None)]
    for bucket in buckets:
        example = prompt_inputs([0] * bucket, bucket, places=places)
        sizes.append((Size(example, []), {**labels, "length": str(bucket)}))
    example = step_inputs(0, 0, 0, capacity, places=places)
    sizes.append((Size(example, []), {**labels, "length": "1"}))
    made = deployment.build_sizes(Decoder(found), sizes, options, told, public_positions=places)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    first, *others = [Compiled(deployment, each, tokenizer, tokenizer_json, options, "", now) for each in made]
    return replace(first, others=tuple(others))


def written(model: nn.Module, length: int, told: Told = silent, count: int = TEXTS) -> list[list[int]]:
    """Let a model write texts of ``length`` tokens by sampling, the same at every call; return their token ids."""
    told(0, 0, f"writing {count} texts to calibrate with")
    writer: Any = copy.copy(model)
    begin = getattr(writer.config, "bos_token_id", None)
    begin = begin if isinstance(begin, int) and 0 <= begin < vocabulary(model) else 0
    ids = torch.full((count, 1), begin)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_transformers():
        torch.manual_seed(0)
        found = writer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length - 1,
            min_new_tokens=length - 1,
            do_sample=True,
            top_k=0,
            pad_token_id=begin,
        )
    texts: list[list[int]] = found.tolist()
    return texts


def _samples(texts: Sequence[Sequence[int]], length: int, *, places: bool) -> list[dict[str, torch.Tensor]]:
    """Make the inputs of texts that set the ranges. One text enters twice, cut to the half, so that one is padded."""
    cut = [list(text)[:length] for text in texts]
    cut.append(cut[0][: max(1, length // 2)])
    return [prompt_inputs(text, length, places=places) for text in cut]


def _check_sizes(buckets: Sequence[int], capacity: int) -> None:
    if not buckets or len(buckets) >= MAXIMUM_LENGTHS:
        raise InvalidInput(f"{len(buckets)} lengths of prompts", f"1 to {MAXIMUM_LENGTHS - 1}")
    if min(buckets) < 2:
        raise InvalidInput(f"prompts of {min(buckets)} tokens", "2 or more; shorter ones are padded")
    if capacity < max(buckets):
        raise InvalidInput(f"a capacity of {capacity} tokens for prompts of {max(buckets)}", "at least as many")


def _check_model(model: nn.Module, capacity: int) -> None:
    if not callable(getattr(model, "generate", None)) or not callable(getattr(model, "get_output_embeddings", None)):
        raise InvalidInput(
            f"{type(model).__name__} generates no text", "a class of transformers such as LlamaForCausalLM does"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise InvalidInput(f"{type(model).__name__} has an encoder", "models without one generate text here")
    if (most := most_positions(model)) is not None and capacity + 1 > most:
        raise InvalidInput(f"a capacity of {capacity} tokens", f"{type(model).__name__} has {most - 1} places at most")


def _check_texts(texts: Sequence[Sequence[int]], known: int) -> None:
    for text in texts:
        if not text or not all(0 <= token < known for token in text):
            raise InvalidInput(
                "a text to calibrate with is not a list of token ids", f"integers from 0 to {known - 1}, one at least"
            )
