"""A text encoder so small that compiling it and asking it takes moments, and its three parties in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor

from parties import hosting
from parties.dealer import DealerService
from parties.endpoints import Endpoint
from parties.model import ServedModel, compile_text_model, serve_ready, text_inputs
from parties.server import InferenceService
from proto.unseen_pb2_grpc import add_DealerServicer_to_server, add_InferenceServicer_to_server
from protocols.fixedpoint import FixedPoint
from secure.models import load_sentence_encoder
from secure.tokens import load_tokenizer

LENGTH = 8
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = tuple(f"zq{consonant}{vowel}" for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou")[:96]
LOOPBACK = Endpoint("127.0.0.1", 0)


def write_model(directory: Path, seed: int = 0) -> Path:
    """A random Bert of one layer and its word-level tokenizer, as files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=100, max_position_embeddings=16, **sizes)).eval().save_pretrained(directory)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    return directory


def sentences(count: int = 30, words: int = LENGTH - 2) -> list[str]:
    generator = random.Random(1)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, words))) for _ in range(count)]


def ready(directory: Path, state: Path, embedding: str = "one-hot", **fixed: int) -> ServedModel:
    """The model of ``directory``, compiled and with its files."""
    fixed_point = FixedPoint(**fixed)
    compiled, tokenizer, raw = compile_text_model(
        str(directory), LENGTH, embedding, "minimax8", fixed_point, sentences()
    )
    return serve_ready(compiled, tokenizer, raw, state)


def expected(directory: Path, text: str) -> Tensor:
    """The float model's answer."""
    encoder, tokenizer = load_sentence_encoder(directory).double(), load_tokenizer(directory)
    with torch.no_grad():
        answer: Tensor = encoder(**text_inputs(tokenizer, text, LENGTH))[0]
    return answer


class Served:
    """A running service: its address, and how to end it."""

    def __init__(self, add: Callable[[Any, grpc.Server], None], service: Any, listen: Endpoint = LOOPBACK) -> None:
        self.service = service
        self._server, self.endpoint = hosting.start(listen, lambda s: add(service, s), insecure=False, what="the test")
        self.address = str(self.endpoint)

    def stop(self) -> None:
        """At once, as a kill would."""
        self._server.stop(None).wait()


@contextmanager
def dealing(service: DealerService | None = None, listen: Endpoint = LOOPBACK) -> Iterator[Served]:
    """A dealer."""
    served = Served(add_DealerServicer_to_server, service or DealerService(), listen)
    try:
        yield served
    finally:
        served.stop()


@contextmanager
def serving(
    model: ServedModel,
    dealer: str,
    kind: type[InferenceService] = InferenceService,
    deadline: float = 20.0,
    **options: Any,
) -> Iterator[Served]:
    """A server of ``model``; ``kind``: one that misbehaves."""
    service = kind(model, Endpoint.parse(dealer, what="the dealer"), deadline=deadline, **options)
    served = Served(add_InferenceServicer_to_server, service)
    try:
        yield served
    finally:
        served.stop()
        service.close()
