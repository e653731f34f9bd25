"""The client: connects to server and dealer, prepares queries ahead, and gets answers that only it can read.

It holds no weights and needs no model code: the Program, the masked weights and the tokenizer come from the server and are checked by
digest; the token table too, if the owner lets clients hold it.
"""

from __future__ import annotations

import hmac
import json
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from safetensors.torch import load
from torch import Tensor

from parties.endpoints import Endpoint, open_channel
from parties.errors import DealerError, HandshakeError, PartyError, PeerLost, ProtocolError, from_code
from parties.files import MASKED_WEIGHTS, TOKEN_TABLE, cache_directory, fetch, unpack_masked
from parties.frames import FrameReader, to_frames
from parties.sessions import DEPLOYMENT, query_key
from parties.watchdog import Watchdog
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import DealerStub, InferenceStub
from protocols.circuit import Correlations, execute, prepare
from protocols.prg import fresh_seed
from protocols.protocol import CLIENT, Cost, Exchange
from protocols.steps import pack_frame, unpack_frame
from protocols.weights import ClientWeights
from secure.program import VERSION, Program
from secure.tokens import TextTokenizer, tokenize


@dataclass(frozen=True)
class QueryReport:
    """What one query took, as measured here. Bytes are payloads of both directions and of the dealer's corrections."""

    cost: Cost
    online_seconds: float
    offline_seconds: float  # from asking until both sides were ready
    dealer_seconds: float  # of which the server waited for the dealer
    client_seconds: float  # of which the client computed


@dataclass(frozen=True)
class _Ready:
    query: int
    correlations: Correlations
    prepared: Mapping[int, Any]
    seconds: float
    client_seconds: float
    dealer_seconds: float
    corrections: int


class Connection:
    """A session with a server and a dealer; a context manager. One query at a time.

    deadline: seconds to wait for any one message before PeerLost. cache: where once-per-model files are kept (None: not at all).
    program_digest: refuse a server whose Program has another digest.
    """

    def __init__(
        self,
        server: str,
        dealer: str,
        *,
        insecure: bool = False,
        deadline: float = 60.0,
        cache: Path | None = None,
        program_digest: str | None = None,
    ) -> None:
        self._server_at = Endpoint.parse(server, what="the server")
        self._dealer_at = Endpoint.parse(dealer, what="the dealer")
        self._deadline = deadline
        self._channels = [
            open_channel(self._server_at, insecure=insecure, what="the server"),
            open_channel(self._dealer_at, insecure=insecure, what="the dealer"),
        ]
        self._inference = InferenceStub(self._channels[0])
        self._ready: list[_Ready] = []
        self._next_query = 0
        self.reports: list[QueryReport] = []
        self._describe(program_digest, cache)
        self._open_session()

    # setting up

    def _describe(self, pinned: str | None, cache: Path | None) -> None:
        with _blaming("the server", self._server_at, "start it with: unseen serve"):
            description = self._inference.Describe(pb.DescribeRequest(), timeout=self._deadline)
        if (description.version, description.deployment) != (VERSION, DEPLOYMENT):
            raise HandshakeError(
                f"the server speaks version {description.version} of {description.deployment!r}, "
                f"this client version {VERSION} of {DEPLOYMENT!r}",
                "use the same version of unseen on both sides",
            )
        self.program = Program.from_bytes(description.program)
        if pinned is not None and not hmac.compare_digest(pinned, self.program.digest):
            raise HandshakeError(f"the server's Program has digest {self.program.digest}, expected {pinned}")
        self.weights_digest = description.weights_digest
        self.files = {f.name: f.size for f in description.files}
        payloads = {}
        for file in description.files:
            with _blaming("the server", self._server_at, "try again"):
                payloads[file.name] = fetch(file, lambda sha=file.sha256: self._download(sha), cache)
        masked = unpack_masked(payloads.pop(MASKED_WEIGHTS), self.program.weight_rings, self.program.weight_shapes)
        self._weights = ClientWeights(masked)
        self._tables = load(payloads[TOKEN_TABLE]) if TOKEN_TABLE in payloads else {}
        self._tokenizer = _tokenizer(description)

    def _download(self, sha256: str) -> Iterator[bytes]:
        for chunk in self._inference.Download(pb.DownloadRequest(sha256=sha256), timeout=600):
            yield chunk.data

    def _open_session(self) -> None:
        program, self._seed = self.program, fresh_seed()
        request = pb.OpenRequest(
            version=VERSION,
            program_digest=program.digest,
            weights_digest=self.weights_digest,
            client_seed=self._seed,
        )
        hint = f"start it with: unseen dealer --listen {self._dealer_at}"
        with _blaming("the dealer", self._dealer_at, hint, DealerError):
            self._session = DealerStub(self._channels[1]).Open(request, timeout=self._deadline).session
        self._outbox: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        self._call = self._inference.Session(iter(self._outbox.get, None))
        self._watch = Watchdog(self._deadline, self._call.cancel)
        self._send(
            hello=pb.Hello(
                version=VERSION,
                deployment=DEPLOYMENT,
                program_digest=program.digest,
                fixed_point=json.dumps(program.fixed.as_dict(), sort_keys=True),
                weights_digest=self.weights_digest,
                session=self._session,
            )
        )
        self._expect("welcome", "the handshake")

    def _send(self, **content: Any) -> None:
        self._outbox.put(pb.ClientMessage(**content))

    def _expect(self, kind: str, what: str) -> Any:
        """The server's next message, which must be of one kind."""
        try:
            with self._watch:
                message = next(self._call)
        except (grpc.RpcError, StopIteration) as error:
            if self._watch.fired:
                reason = f"did not answer within {self._deadline:g} s"
            else:
                reason = "is gone" if isinstance(error, grpc.RpcError) else "ended the session"
            raise PeerLost(
                f"the server at {self._server_at} {reason}; this client waited for {what}", "see the server's log"
            ) from None
        found = message.WhichOneof("content")
        if found == "failure":
            raise from_code(message.failure.code, f"the server reports: {message.failure.message}")
        if found != kind:
            raise ProtocolError(f"the server sent {found!r} where {kind!r} was expected ({what})")
        return getattr(message, kind)

    # queries

    @property
    def length(self) -> int:
        """Tokens that a text may have, special ones included."""
        return int(self.program.labels["length"])

    @property
    def ready(self) -> int:
        """Queries that are prepared and not yet used."""
        return len(self._ready)

    def prepare(self) -> None:
        """The offline phase of one query: the dealer deals to the server, this client computes its shares of linear layers."""
        number, self._next_query = self._next_query, self._next_query + 1
        start = time.perf_counter()
        self._send(prepare=pb.Prepare(query=number))
        key = query_key(self._seed, "client", self._session, self.program.digest, number)
        correlations = Correlations(CLIENT, key)
        prepared = prepare(self.program.circuit, correlations, self._weights)
        own = time.perf_counter() - start
        answer = self._expect("prepared", f"the corrections of query {number}, which the server gets from the dealer")
        seconds = time.perf_counter() - start
        self._ready.append(_Ready(number, correlations, prepared, seconds, own, answer.seconds, answer.bytes))

    def query(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's answer (float64) on the model's own arguments; its report is the last of ``reports``."""
        values = self.program.client_values(inputs, self._tables)
        if not self._ready:
            self.prepare()
        ready = self._ready.pop(0)  # taken before the first message: a failed query never uses it again
        start = time.perf_counter()
        self._send(query=pb.Query(query=ready.query))
        result, cost = self._run(ready, values)
        self._expect("finished", "the end of the query")
        online = time.perf_counter() - start
        total = Cost(cost.rounds, cost.to_server, cost.to_client, ready.corrections)
        self.reports.append(QueryReport(total, online, ready.seconds, ready.dealer_seconds, ready.client_seconds))
        return self.program.decode(result)

    def _run(self, ready: _Ready, values: Mapping[str, Tensor]) -> tuple[Tensor, Cost]:
        program, waiting = self.program, [0]

        def observe(indices: Sequence[int]) -> None:
            waiting[0] = indices[0]

        step = execute(
            program.circuit, [program.output], CLIENT, ready.correlations, self._weights, values, ready.prepared, observe
        )
        rounds, sent, received, answer = 0, 0, 0, None
        while True:
            try:
                exchange = next(step) if answer is None else step.send(answer)
            except StopIteration as stop:
                return stop.value[0], Cost(rounds, sent, received)
            rounds += 1
            if exchange.send:
                payload = pack_frame(exchange)
                sent += len(payload)
                for frame in to_frames(payload):
                    self._send(frame=frame)
            answer = ()
            if exchange.receive:
                payload = self._receive(exchange, program.paths[waiting[0]] or "the model's input", rounds)
                received += len(payload)
                answer = unpack_frame(payload, exchange)

    def _receive(self, exchange: Exchange, path: str, rounds: int) -> bytes:
        reader = FrameReader(sum(w.size for w in exchange.receive))
        while True:
            frame = self._expect("frame", f"its message of module '{path}' (round {rounds} of {self.program.cost.rounds})")
            try:
                payload = reader.add(frame)
            except ValueError as error:
                raise ProtocolError(f"module '{path}': the server sent {error}") from None
            if payload is not None:
                return payload

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding (float64 vector) a text. Texts are tokenized here; too long or empty ones raise before anything is sent."""
        if self._tokenizer is None:
            raise PartyError("this server's model takes no text", "use query with the model's own arguments")
        pairs = [tokenize(self._tokenizer, text, self.length) for text in texts]
        return [self.query({"input_ids": ids, "attention_mask": mask})[0] for ids, mask in pairs]

    # closing

    def close(self) -> None:
        """End the session; what was prepared and not used is discarded by both sides."""
        self._outbox.put(None)
        self._watch.stop()
        self._ready.clear()
        self._call.cancel()
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _blaming:  # noqa: N801 - reads as a phrase: with _blaming("the dealer", ...)
    """Turn a gRPC error into one that says who failed and what to do."""

    def __init__(self, who: str, where: Endpoint, hint: str, kind: type[PartyError] = PeerLost) -> None:
        self._who, self._where, self._hint, self._kind = who, where, hint, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, grpc.RpcError):
            unreachable = isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAVAILABLE
            detail = error.details() if isinstance(error, grpc.Call) else str(error)
            message, _, hint = str(detail).partition("\nhint: ")
            if unreachable:
                raise self._kind(f"{self._who} at {self._where} cannot be reached", self._hint) from None
            raise self._kind(f"{self._who} at {self._where}: {message}", hint or self._hint) from None


def _tokenizer(description: pb.Description) -> TextTokenizer | None:
    if not description.tokenizer:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(description.tokenizer.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextTokenizer(tokenizer, description.pad_id, description.lowercase)


def connect(
    server: str,
    dealer: str,
    *,
    insecure: bool = False,
    deadline: float = 60.0,
    cache: bool | Path = True,
    program_digest: str | None = None,
) -> Connection:
    """Connect to ``server`` and ``dealer`` ("host:port"); see ``Connection``. ``cache``: True for the user's cache directory."""
    directory = cache_directory() if cache is True else (cache or None)
    return Connection(
        server, dealer, insecure=insecure, deadline=deadline, cache=directory, program_digest=program_digest
    )
