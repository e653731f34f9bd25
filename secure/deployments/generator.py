"""``secure.compile_generator``, which compiles a decoder to generate text: Programs for its prompt and for each token.

With a draft length there is one more, a pass: it reads what a step reads, and takes several tokens at once.

All Programs have the same weights, and keep keys and values in the same rings. So they are one model in several sizes,
as the lengths of a text model are; that of a step has the length 1, and ranges of its own, of all tokens but a text's
first one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
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
from secure.lowering.client_inputs import GENERATE, MOST_ROWS, SETTINGS, TASK
from secure.models.causal import ends_of
from secure.models.checkpoints import quiet_transformers
from secure.models.decoder import (
    DRAFT_LENGTH,
    MOST_DRAFTED,
    STEPWISE,
    TEMPERATURE,
    Decoder,
    ScoringDecoder,
    at_temperature,
    looks_positions_up,
    most_positions,
    prompt_inputs,
    step_inputs,
    vocabulary,
)
from secure.models.settings import TOKEN, TaskSettings, WritingSettings
from secure.models.tokenizer_document import TOKENIZER, tokenizer_digest
from secure.models.tokens import TextTokenizer
from secure.polynomial.forms import forms
from secure.progress import Told, silent
from secure.session.link import MAXIMUM_LENGTHS
from secure.tasks.closeness import ScoreError
from secure.tasks.generate import Generate
from secure.tasks.task import Loaded

TEXTS = 8
"""Texts that a decoder writes itself, to calibrate with, if none are given."""

PROMPT, CAPACITY = 32, 256

STEPWISE_CAPACITY = 32
"""The capacity by default where a prompt is read token by token, in seconds each."""

TOKENS = ScoreError(TaskSettings(TOKEN))
"""The measure by which tokens are compared."""

STEP = "step"
"""The group of sizes whose ranges are those of later tokens."""


def compile_generator(
    model: nn.Module | str,
    *,
    prompt: int | Sequence[int] = PROMPT,
    capacity: int = CAPACITY,
    calibration: Sequence[Sequence[int] | str] = (),
    temperature: float | None = None,
    draft_length: int = 0,
    deployment: Deployment | None = None,
    embedding: str | None = None,
    gelu: str | None = None,
    approximations: str | None = None,
    fixed_point: FixedPoint | None = None,
    network: str | None = None,
    checked: bool | None = None,
    tokenizer: TextTokenizer | None = None,
    tokenizer_json: bytes = b"",
    told: Told = silent,
) -> Compiled:
    """Compile a causal language model of ``transformers`` so that a session's ``generate`` writes text with it.

    model: the model, or the directory in which ``save_pretrained`` wrote it, with its tokenizer: then clients give
    texts, and messages if it has a chat template. prompt: the tokens to which prompts are padded; of several lengths a
    prompt takes the shortest that holds it, and the parties see which. capacity: the most tokens of the padded prompt
    and what is written together. calibration: texts, as token ids or (of a directory) as they are, as long as the
    capacity if they can be, which set the ranges; by default the model writes TEXTS texts itself, by sampling.
    temperature: the greatest that clients may choose, each for itself and in secret, so that tokens are samples; by
    default the Programs take none. draft_length: compile a pass over so many tokens too, the last one and those that a
    client's draft guesses; 0 for none. Other arguments are those of ``secure.compile``.

    The Programs compute the token that the model finds most likely next, or a sample (``secure.sample``). The client
    learns it, and nobody else; nobody learns a score. Under ``Ckks`` there is one Program, of a step, by which prompts
    of any length are read as well: ``prompt`` means nothing, the capacity is a power of two, and the client learns the
    scores of all tokens, so that it chooses at whatever temperature it likes. Raises InvalidInput for a model that is
    no decoder, or has no room for so many tokens; for a directory without a tokenizer or with one that clients do not
    run; and what ``secure.compile`` raises.
    """
    lengths = (prompt,) if isinstance(prompt, int) else tuple(prompt)
    deployment, options = (
        deployment or TwoParty(),
        CompileOptions(embedding, gelu, approximations, fixed_point, network, checked=checked),
    )
    if deployment.stepwise and lengths == (PROMPT,):
        lengths, capacity = sizes_of_generator((), 0 if capacity == CAPACITY else capacity, deployment)
    check_generator(deployment, options, lengths, capacity, temperature, draft_length)  # before the model is loaded
    if isinstance(model, str):
        loaded = Generate().load(model, told=told)
    else:
        settings = TaskSettings(TOKEN, writing=WritingSettings(ends_of(model) if _writes(model) else ()))
        labels = {TASK: GENERATE, SETTINGS: settings.encoded}
        loaded = Loaded("", model, [], tokenizer, tokenizer_json, labels=labels)
    given = loaded, deployment, options, lengths, capacity, calibration, told
    return build_generator(*given, temperature=temperature, draft_length=draft_length)


def sizes_of_generator(lengths: Sequence[int], capacity: int, deployment: Deployment) -> tuple[tuple[int, ...], int]:
    """Return lengths of prompts and a capacity, where none of them and 0 stand for the defaults of a deployment."""
    if deployment.stepwise:
        return tuple(lengths), capacity or STEPWISE_CAPACITY
    lengths = tuple(lengths) or (min(PROMPT, max(2, capacity // 2)) if capacity else PROMPT,)
    return lengths, capacity or max(CAPACITY, *(2 * length for length in lengths))


def check_generator(
    deployment: Deployment,
    options: CompileOptions,
    lengths: Sequence[int],
    capacity: int,
    temperature: float | None = None,
    draft_length: int = 0,
) -> None:
    """Raise InvalidInput for a deployment, options, sizes or a greatest temperature that no generator can have."""
    if temperature is not None and not 0 < temperature < math.inf:
        raise InvalidInput(f"a temperature of {temperature} at most", "a number above zero, or None for no samples")
    deployment.check_writing()
    if deployment.stepwise:
        _check_stepwise(deployment, options, lengths, capacity, temperature, draft_length)
        return
    if options.answer_bits is not None:
        raise InvalidInput("answer_bits mean nothing for a model that generates text", "its answers are tokens")
    deployment.check(options, tokens=True)
    _check_sizes(sorted({*lengths}), capacity, draft_length)


def build_generator(
    loaded: Loaded,
    deployment: Deployment,
    options: CompileOptions,
    lengths: Sequence[int],
    capacity: int,
    calibration: Sequence[Sequence[int] | str] = (),
    told: Told = silent,
    *,
    temperature: float | None = None,
    draft_length: int = 0,
) -> Compiled:
    """Compile a model that ``Generate`` has loaded; see ``compile_generator``."""
    check_generator(deployment, options, lengths, capacity, temperature, draft_length)
    if deployment.stepwise:
        return _build_stepwise(loaded, deployment, options, capacity, calibration, told)
    assert isinstance(deployment, CircuitDeployment)  # no other writes texts
    buckets, model = sorted({*lengths}, reverse=True), loaded.module
    _check_model(model, capacity)
    places = not looks_positions_up(model)
    texts = _token_ids(calibration, loaded.tokenizer) or written(model, capacity, told)
    known = vocabulary(model)
    _check_texts(texts, known)
    samples, firsts = _samples(texts, capacity, places=places)
    samples = [at_temperature(each, temperature) for each in samples]
    labels = _labels(loaded, capacity, known)
    labels |= {} if temperature is None else {TEMPERATURE: repr(float(temperature))}
    labels |= {DRAFT_LENGTH: str(draft_length)} if draft_length else {}
    sizes: list[tuple[Size, Mapping[str, str] | None]] = [(Size(samples[0], samples), None)]
    for bucket in buckets:
        example = at_temperature(prompt_inputs([0] * bucket, bucket, places=places), temperature)
        sizes.append((Size(example, []), {**labels, "length": str(bucket)}))
    # a step never computes a text's first token, whose activations may be far larger than all others
    sizes.append((Size(samples[0], samples, STEP, firsts), None))
    for count, rows in ((1, capacity), (draft_length, capacity - draft_length)):
        if count:
            example = at_temperature(step_inputs([0] * count, 0, 0, rows, places=places), temperature)
            sizes.append((Size(example, [], STEP), {**labels, "length": str(count)}))
    made = deployment.build_sizes(Decoder(model), sizes, options, told, public_positions=places)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    about = loaded.tokenizer, loaded.tokenizer_json, options, loaded.about, now
    first, *others = [Compiled(deployment, each, *about) for each in made]
    return replace(first, others=tuple(others))


def _labels(loaded: Loaded, capacity: int, known: int) -> dict[str, str]:
    """Return the labels that all Programs of a model have."""
    labels = {**loaded.labels, MOST_ROWS: str(capacity), "vocabulary": str(known)}
    labels |= {"model": loaded.name} if loaded.name else {}
    if (found := loaded.tokenizer) is not None and loaded.tokenizer_json:
        labels[TOKENIZER] = tokenizer_digest(loaded.tokenizer_json, found.pad_id, found.lowercase)
    return labels


def _build_stepwise(
    loaded: Loaded,
    deployment: Deployment,
    options: CompileOptions,
    capacity: int,
    calibration: Sequence[Sequence[int] | str],
    told: Told,
) -> Compiled:
    """Compile the step by which a model reads prompts and writes. It reads all rows of its capacity but its own."""
    model = loaded.module
    _check_model(model, capacity)
    if not any(forms(model)):
        raise InvalidInput(
            f"{type(model).__name__} compares values, and ciphertexts have no comparison",
            "unseen train puts it into polynomial form",
        )
    texts = [list(text)[:capacity] for text in _token_ids(calibration, loaded.tokenizer)]
    texts = texts or written(model, capacity, told)
    _check_texts(texts, known := vocabulary(model))
    if not (whole := [text for text in texts if len(text) == capacity]):  # no later row would be measured
        whole = written(model, capacity, told)
        texts = [*texts, *whole]
    rows = capacity - 1
    made = deployment.build_step(
        ScoringDecoder(model),
        step_inputs([0], 0, 0, rows),
        [prompt_inputs(text, capacity) for text in whole],
        [[step_inputs([token], 0, filled, rows) for filled, token in enumerate(text)] for text in texts],
        options,
        {**_labels(loaded, capacity, known), STEPWISE: "scores", "length": "1"},
        told,
    )
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return Compiled(deployment, made, loaded.tokenizer, loaded.tokenizer_json, options, loaded.about, now)


def held_out_texts(
    loaded: Loaded, temperature: float | None = None, told: Told = silent, *, draft_length: int = 0
) -> Loaded:
    """Return a model that ``Generate`` has loaded with what the self-test of its prompts' Programs needs.

    Texts that the model writes, other than those that calibrate it, are held out: as much of one as a prompt takes, and
    the beginnings of two. What is compared is the token after each; where the Programs draw it, it is the one that a
    temperature of 0 gives.
    """
    model = loaded.module

    def held_out(length: int) -> list[dict[str, torch.Tensor]]:
        if length in (1, draft_length):  # they read what a prompt keeps
            return []
        texts = written(model, length, told, 3, seed=1)
        cut = [text[: max(1, length // part)] for text, part in zip(texts, (1, 2, 4), strict=True)]
        inputs = [prompt_inputs(text, length, places=not looks_positions_up(model)) for text in cut]
        return [at_temperature(each, None if temperature is None else 0.0) for each in inputs]

    return replace(loaded, module=Decoder(model), held_out=held_out, closeness=TOKENS)


def _token_ids(texts: Sequence[Sequence[int] | str], tokenizer: TextTokenizer | None) -> list[Sequence[int]]:
    """Return texts to calibrate with as token ids."""
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        raise InvalidInput("texts to calibrate with, and no tokenizer", "give token ids")
    return [
        tokenizer.tokenizer.encode(text).ids if isinstance(text, str) and tokenizer is not None else text  # type: ignore[misc]
        for text in texts
    ]


def written(model: nn.Module, length: int, told: Told = silent, count: int = TEXTS, seed: int = 0) -> list[list[int]]:
    """Let a model write texts of ``length`` tokens by sampling, the same at every call; return their token ids.

    Raises InvalidInput if its scores become no numbers, as those of a polynomial form do behind texts that leave its
    ranges.
    """
    told(0, 0, f"writing {count} texts to calibrate or test with")
    writer: Any = copy.copy(model)
    begin = getattr(writer.config, "bos_token_id", None)
    begin = begin if isinstance(begin, int) and 0 <= begin < vocabulary(model) else 0
    ids = torch.full((count, 1), begin)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        try:
            found = writer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length - 1,
                min_new_tokens=length - 1,
                do_sample=True,
                top_k=0,
                pad_token_id=begin,
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise InvalidInput(
                f"the model's scores within {length} tokens are no numbers",
                "a model in polynomial form holds for texts as long as it was trained on: take a smaller capacity",
            ) from None
    texts: list[list[int]] = found.tolist()
    return texts


def _samples(
    texts: Sequence[Sequence[int]], length: int, *, places: bool
) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """Make the inputs of texts that set the ranges, and tell in which row the second token of each stands.

    One text enters twice, cut to the half, so that one is padded.
    """
    cut = [list(text)[:length] for text in texts]
    cut.append(cut[0][: max(1, length // 2)])
    return [prompt_inputs(text, length, places=places) for text in cut], [length - len(text) + 1 for text in cut]


def _check_stepwise(
    deployment: Deployment,
    options: CompileOptions,
    lengths: Sequence[int],
    capacity: int,
    temperature: float | None,
    draft_length: int,
) -> None:
    """Raise InvalidInput for what a deployment has no use of that reads prompts token by token."""
    if lengths:
        raise InvalidInput(
            f"under {deployment.name} prompts are read token by token", "leave the length of prompts (--length) out"
        )
    if temperature is not None:
        raise InvalidInput(
            f"under {deployment.name} clients learn scores, and draw tokens at any temperature",
            "leave --temperature out",
        )
    if draft_length:
        raise InvalidInput(f"{deployment.name} takes one token at a time", "leave --draft-length out")
    if options.answer_bits is not None:
        raise InvalidInput("answer_bits mean nothing for a model that generates text", "its answers are tokens")
    if capacity < 2 or capacity & (capacity - 1):
        raise InvalidInput(f"a capacity of {capacity} tokens", "a power of two, as ciphertexts sum by doubling")
    deployment.check(options, tokens=True)


def _check_sizes(buckets: Sequence[int], capacity: int, draft_length: int) -> None:
    most = MAXIMUM_LENGTHS - 1 - (draft_length > 0)
    if not 1 <= len(buckets) <= most:
        raise InvalidInput(f"{len(buckets)} lengths of prompts", f"1 to {most}")
    if min(buckets) < 2:
        raise InvalidInput(f"prompts of {min(buckets)} tokens", "2 or more; shorter ones are padded")
    if capacity < max(buckets):
        raise InvalidInput(f"a capacity of {capacity} tokens for prompts of {max(buckets)}", "at least as many")
    if draft_length and not 2 <= draft_length <= min(MOST_DRAFTED, min(buckets) - 1):  # Programs are told by lengths
        raise InvalidInput(
            f"a draft length of {draft_length} beside prompts of {min(buckets)} tokens",
            f"2 to {MOST_DRAFTED}, and fewer than the shortest prompts are padded to",
        )


def _writes(model: object) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("generate", "get_output_embeddings"))


def _check_model(model: nn.Module, capacity: int) -> None:
    if not _writes(model):
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
