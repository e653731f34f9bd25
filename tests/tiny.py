"""A text encoder so small that compiling it and asking it takes moments, and its three parties in this process."""

from __future__ import annotations

import hashlib
import json
import queue
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

import secure
from parties.limits import waiting
from parties.net.caller import Caller
from parties.net.endpoints import Endpoint
from parties.net.network import Plaintext
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import (
    DealerStub,
    InferenceStub,
    add_DealerServicer_to_server,
    add_InferenceServicer_to_server,
    add_ModelServicer_to_server,
)
from parties.served.files import MASKED_WEIGHTS, unpack_masked
from parties.served.published import Publication, Published
from parties.services import hosting
from parties.two_party import dealer as dealer_module
from parties.two_party import server as server_module
from parties.two_party.dealer import DealerService
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.keys import Ratchet, join_proof, proving_key
from parties.two_party.keys import deal_proof as proof_of_dealing
from parties.two_party.masked_model import MaskedModel, mask_model
from parties.two_party.sealing import SealingKey
from parties.two_party.server import InferenceService
from protocols.circuit import Correlations, execute, prepare
from protocols.fixedpoint import FixedPoint
from protocols.protocol import CLIENT
from protocols.steps import pack_frame, unpack_frame
from protocols.weights import ClientWeights
from secure.deployments.two_party import SERVER, TwoParty
from secure.models.sentence_encoder import load_sentence_encoder
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import text_inputs
from secure.mpc.program import Program
from secure.session.session import Session
from secure.version import WIRE_VERSION
from tests.dealer_key import KEY

LENGTH = 8
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = tuple(f"zq{consonant}{vowel}" for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou")[:96]
TEXT = " ".join(WORDS[:4])
FIRST = "encoder.embeddings"  # the module whose message the client sends first
LOOPBACK = Endpoint("127.0.0.1", 0)


def write_model(directory: Path, seed: int = 0) -> Path:
    """A random Bert of one layer and its word-level tokenizer, as files."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertModel(BertConfig(vocab_size=100, max_position_embeddings=16, **sizes)).eval().save_pretrained(directory)
    tokenizer = word_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"pad_token": "[PAD]", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    return directory


def word_tokenizer() -> Any:
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def sentences(count: int = 12, words: int = LENGTH - 2) -> list[str]:
    generator = random.Random(1)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, words))) for _ in range(count)]


@dataclass(frozen=True, eq=False, repr=False)
class Ready:
    """A compiled model, and behind its mask."""

    compiled: secure.Compiled
    masked: MaskedModel

    @property
    def program(self) -> Program:
        return self.masked.program

    @property
    def weights_digest(self) -> str:
        return self.masked.weights_digest


def ready(directory: Path, state: Path, embedding: str = "one-hot", **fixed: int) -> Ready:
    """The model of ``directory``, compiled and with its files."""
    compiled = secure.compile_text_model(
        str(directory), LENGTH, embedding=embedding, fixed_point=FixedPoint(**fixed), calibration=sentences()
    )
    return Ready(compiled, mask_model(compiled.model, state))


def expected(directory: Path, text: str) -> Tensor:
    """The float model's answer."""
    encoder, tokenizer = load_sentence_encoder(directory).double(), load_tokenizer(directory)
    with torch.no_grad():
        answer: Tensor = encoder(**text_inputs(tokenizer, text, LENGTH))[0]
    return answer


class Served:
    """A running service: its address, and how to end it."""

    def __init__(
        self,
        add: Callable[[Any, grpc.Server], None],
        service: Any,
        listen: Endpoint = LOOPBACK,
        published: Published | None = None,
    ) -> None:
        self.service = service
        adding: list[Callable[[grpc.Server], None]] = [lambda server: add(service, server)]
        if published is not None:
            adding.append(lambda server: add_ModelServicer_to_server(published, server))
        self._server, self.endpoint = hosting.start(
            listen, adding, network=Plaintext(), what="the test", role=SERVER, permissions={}
        )
        self.address = str(self.endpoint)

    def stop(self) -> None:
        """At once, as a kill would."""
        self._server.stop(None).wait()


@contextmanager
def dealing(service: DealerService | None = None, listen: Endpoint = LOOPBACK) -> Iterator[Served]:
    """A dealer."""
    served = Served(add_DealerServicer_to_server, service or DealerService(KEY), listen)
    try:
        yield served
    finally:
        served.stop()


@contextmanager
def serving(
    model: Ready,
    dealer: str,
    kind: type[InferenceService] = InferenceService,
    deadline: float = 20.0,
    describing: type[Published] = Published,
    key: str | None = None,
    **options: Any,
) -> Iterator[Served]:
    """A server of ``model``; ``kind``, ``describing``: those that misbehave; ``key``: the dealer's."""
    compiled, masked = model.compiled, model.masked
    service = kind([masked], DealerPeer(dealer, Plaintext(), key or KEY.public.text), deadline=deadline, **options)
    offered = Publication(
        compiled.deployment,
        masked.program,
        masked.weights_digest,
        masked.files,
        compiled.tokenizer,
        compiled.tokenizer_json,
    )
    published = describing(SERVER, [offered], deadline=deadline, log=server_module.log)
    served = Served(add_InferenceServicer_to_server, service, published=published)
    try:
        yield served
    finally:
        served.stop()
        service.close()


def dial(server: Served, dealer: Served, **options: Any) -> Session:
    return call(server.address, dealer.address, **{"deadline": 20.0, **options})


def call(server: str, dealer: str, **options: Any) -> Session:
    """A session with a server and a dealer at these addresses; no cache and no pace unless ``options`` say so."""
    deployment = TwoParty(server=server, dealer=dealer, dealer_key=KEY.public.text)
    return secure.connect(deployment, **{"cache": False, "pace": 0.0, **options})


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.01)


def works(server: Served, dealer: Served) -> None:
    with dial(server, dealer) as connection:
        assert connection.embed([TEXT])[0].isfinite().all()


def served_program(server: Served) -> Program:
    """The Program of a server's first model."""
    return next(iter(server.service.models.values())).program  # type: ignore[no-any-return]


def session_count(server: Served) -> int:
    return len(server.service.sessions)


def deal_proof(seed: bytes, session: bytes, query: int) -> bytes:
    """The proof of somebody who knows this server seed."""
    return proof_of_dealing(proving_key(seed), session, query)


def named_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take callers for what they say they are, as certificates would prove it."""

    def named(context: grpc.ServicerContext) -> Caller:
        return Caller(str(dict(context.invocation_metadata()).get("name", "")), None, context.peer())

    for module in (server_module, dealer_module, waiting):
        monkeypatch.setattr(module, "caller", named)


def register_request(program: bytes, mask_seed: bytes, key: SealingKey = KEY, **other: Any) -> pb.RegisterRequest:
    """What a server tells the dealer about its model."""
    sealed = key.public.seal(mask_seed, "register", hashlib.sha256(program).hexdigest())
    return pb.RegisterRequest(**{"program": program, "sealed": sealed, **other})


# a client that says what it likes


class Raw:
    """The wire format by hand. name: what ``named_callers`` take it for."""

    def __init__(self, server: Any, dealer: Any, model: Ready, name: str = "") -> None:
        self.model, self.program = model, model.program
        self.channels = [Plaintext().channel(s.endpoint, what="x", role=SERVER) for s in (server, dealer)]
        self.dealer = DealerStub(self.channels[1])
        self.token = self.dealer.Open(self.open_request(), metadata=(("name", name),)).session
        assert self.token, "the dealer does not know the model"
        self.keys = Ratchet(bytes(32), "client", self.token, self.program.digest)
        self.outbox: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        self.call = InferenceStub(self.channels[0]).Session(iter(self.outbox.get, None), metadata=(("name", name),))

    def open_request(self, **other: Any) -> pb.OpenRequest:
        fields = {
            "version": WIRE_VERSION,
            "program_digest": self.program.digest,
            "weights_digest": self.model.weights_digest,
            **other,
        }
        sealed = KEY.public.seal(bytes(32), "open", *fields.values())
        return pb.OpenRequest(**{"sealed": sealed, **fields})

    def join(self, mask_seed: bytes, seed: bytes = bytes(32), **other: Any) -> pb.JoinRequest:
        """What the server tells the dealer, as somebody says it who knows this mask seed."""
        program, weights = self.program.digest, self.model.weights_digest
        sealed = KEY.public.seal(seed, "join", self.token, program, weights)
        fields = {"session": self.token, "program_digest": program, "weights_digest": weights, "sealed": sealed}
        proof = join_proof(mask_seed, self.token, program, weights, seed)
        return pb.JoinRequest(**{**fields, "proof": proof, **other})

    def deal(self, seed: bytes, query: int, **other: Any) -> bytes:
        """The corrections of a query, as far as the dealer gives them to somebody with this server seed."""
        fields = {"session": self.token, "query": query, "proof": deal_proof(seed, self.token, query)}
        return b"".join(chunk.data for chunk in self.dealer.Deal(pb.DealRequest(**{**fields, **other})))

    def say(self, **content: Any) -> None:
        self.outbox.put(pb.ClientMessage(**content))

    def hear(self) -> Any:
        message = next(self.call)
        return getattr(message, message.WhichOneof("content"))

    def hear_failure(self) -> pb.Failure:
        """After the frames that the server had sent before."""
        while isinstance(message := self.hear(), pb.Frame):
            pass
        assert isinstance(message, pb.Failure)
        return message

    def hello(self) -> pb.Hello:
        return pb.Hello(
            version=WIRE_VERSION,
            deployment=TwoParty.name,
            program_digest=self.program.digest,
            fixed_point=json.dumps(self.program.fixed.as_dict(), sort_keys=True),
            weights_digest=self.model.weights_digest,
            session=self.token,
        )

    def greet(self) -> None:
        self.say(hello=self.hello())
        assert isinstance(self.hear(), pb.Welcome)

    def prepare(self, number: int) -> None:
        self.say(prepare=pb.Prepare(query=number))
        assert self.hear().query == number

    def start(self, number: int = 0) -> None:
        """Up to the middle of a query: the server waits for the client's first message."""
        self.greet()
        self.prepare(number)
        self.say(query=pb.Query(query=number))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.outbox.put(None)
        self.call.cancel()
        for channel in self.channels:
            channel.close()


def refused(raw: Raw, code: str, message: str) -> None:
    failure = raw.hear_failure()
    assert failure.code == code
    assert message in failure.message
    with pytest.raises(StopIteration):
        next(raw.call)


def run_query(raw: Raw, number: int) -> None:
    """All of a prepared query, by hand."""
    key = raw.keys.key(number)
    correlations, payload = Correlations(CLIENT, key), raw.model.masked.files[MASKED_WEIGHTS]
    weights = ClientWeights(unpack_masked(payload, raw.program.weight_rings, raw.program.weight_shapes))
    ids = torch.full((1, LENGTH), 5)
    values = raw.program.client_values({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})
    prepare(raw.program.circuit, correlations, weights)
    step = execute(raw.program.circuit, raw.program.revealed, CLIENT, correlations, weights, values)
    exchange = next(step)
    while True:
        if exchange.send:
            raw.say(frame=pb.Frame(data=pack_frame(exchange), last=True))
        answer = unpack_frame(raw.hear().data, exchange) if exchange.receive else ()
        try:
            exchange = step.send(answer)
        except StopIteration:
            break
    assert raw.hear().query == number
