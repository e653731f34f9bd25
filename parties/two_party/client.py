"""The client: connects to server and dealer, prepares queries ahead, and gets answers that only it can read.

It holds no weights and needs no model code: the Program, the masked weights and the tokenizer come from the server and
are checked by digest; the token table too, if the owner lets clients hold it.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from torch import Tensor

from parties.net.calls import calling
from parties.net.endpoints import Endpoint, open_channel
from parties.net.frames import FrameReader, to_frames
from parties.net.watchdog import Watchdog
from parties.served.files import (
    MASKED_WEIGHTS,
    TOKEN_TABLE,
    cache_directory,
    fetch,
    received_tokenizer,
    unpack_masked,
    unpack_tables,
)
from parties.two_party.keys import DEPLOYMENT, MAXIMUM_PREPARED, query_key, session_label
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import DealerStub, InferenceStub
from protocols.circuit import Correlations, execute, prepare
from protocols.prg import fresh_seed
from protocols.protocol import CLIENT, CircuitCost
from protocols.steps import Framed
from protocols.weights import ClientWeights
from secure.cost.timeline import Recorder, Timeline
from secure.errors import DealerError, Error, HandshakeError, PeerLost, ProtocolError, QueryError, from_code, printable
from secure.models.tokens import tokenize
from secure.mpc.program import VERSION, Program


@dataclass(frozen=True)
class QueryReport:
    """What one query took, as measured here. Bytes are payloads of both directions and of the dealer's corrections."""

    cost: CircuitCost
    online_seconds: float
    offline_seconds: float  # from asking until both sides were ready
    dealer_seconds: float  # of which the server waited for the dealer
    client_seconds: float  # of which the client computed
    offline_to_client: (
        int  # bytes of the server's message that a query is prepared; the dealer sends the client nothing
    )
    query: int  # its number in the session


@dataclass(frozen=True, repr=False)  # holds masks
class _Ready:
    query: int
    correlations: Correlations
    seconds: float
    client_seconds: float
    dealer_seconds: float
    corrections: int
    received: int


class Connection:
    """A session with a server and a dealer; a context manager. One query at a time.

    deadline: seconds to wait for any one message before PeerLost.
    cache: where once-per-model files are kept (None: not at all).
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
        self._deadline, self._lock = deadline, threading.RLock()
        self._ended = ""  # why nothing can be asked any more
        self._next_query, self._ready = 0, list[_Ready]()
        self.reports: list[QueryReport] = []
        self.timeline: Timeline | None = None  # of the last query alone, as it has an entry for every step
        with ExitStack() as stack:  # whatever fails on the way closes what was opened
            self._open = stack
            self._inference = InferenceStub(self._channel(self._server_at, "the server", insecure))
            self._dealer = DealerStub(self._channel(self._dealer_at, "the dealer", insecure))
            self._describe(program_digest, cache)
            self._open_session()
            self._open = stack.pop_all()

    # setting up

    def _channel(self, where: Endpoint, what: str, insecure: bool) -> grpc.Channel:
        channel = open_channel(where, insecure=insecure, what=what)
        self._open.callback(channel.close)
        return channel

    def _describe(self, pinned: str | None, cache: Path | None) -> None:
        with calling("the server", self._server_at, f"start it with: unseen serve --listen {self._server_at}"):
            description = self._inference.Describe(pb.DescribeRequest(), timeout=self._deadline)
        if (description.version, description.deployment) != (VERSION, DEPLOYMENT):
            raise HandshakeError(
                f"version: the server speaks '{description.version}' of {description.deployment!r}, "
                f"this client '{VERSION}' of {DEPLOYMENT!r}",
                "use the same version of unseen on both sides",
            )
        self.program = Program.from_bytes(description.program)
        if pinned is not None and pinned != self.program.digest:
            raise HandshakeError(
                f"Program digest: the server has {self.program.digest!r}, this client expects {pinned!r}",
                "ask the server's owner which Program it serves",
            )
        self.weights_digest = description.weights_digest
        self.files = {f.name: f.size for f in description.files}
        payloads = {}
        for file in description.files:
            if file.name in (MASKED_WEIGHTS, TOKEN_TABLE):
                with calling("the server", self._server_at, "try again"):
                    payloads[file.name] = fetch(file, self._download, cache)
        masked = unpack_masked(payloads.get(MASKED_WEIGHTS), self.program.weight_rings, self.program.weight_shapes)
        self._weights = ClientWeights(masked)
        tables = {c.table: c.size for c in self.program.client_inputs if c.encoding == "client-table"}
        self._tables = unpack_tables(payloads.get(TOKEN_TABLE), tables)
        self._tokenizer = received_tokenizer(description.tokenizer, description.pad_id, description.lowercase)

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
        with calling("the dealer", self._dealer_at, hint, doing="opening a session", kind=DealerError):
            self._session = self._dealer.Open(request, timeout=self._deadline).session
        self._outbox: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        self._call = self._inference.Session(iter(self._outbox.get, None))
        self._watch = Watchdog(self._deadline, self._call.cancel)
        self._open.callback(self._end, "it was closed")
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
            with self._watch.guard():
                message = next(self._call)
        except (grpc.RpcError, StopIteration) as error:
            if self._watch.fired:
                reason = f"did not answer within {self._deadline:g} s"
            elif isinstance(error, grpc.Call) and error.code() not in _GONE:
                reason = f"refused ({printable(error.details() or '')})"
            else:
                reason = "is gone" if isinstance(error, grpc.RpcError) else "ended the session"
            raise PeerLost(
                f"the server at {self._server_at} {reason}; this client waited for {what}", "see the server's log"
            ) from None
        found = message.WhichOneof("content")
        if found == "failure":
            raise from_code(message.failure.code, f"the server reports: {printable(message.failure.message)}")
        if found != kind:
            raise ProtocolError(f"the server sent {found!r} where {kind!r} was expected ({what})")
        return getattr(message, kind)

    # queries

    @property
    def length(self) -> int:
        """Tokens that a text may have, special ones included."""
        return int(self.program.labels.get("length", 0))

    @property
    def session_label(self) -> str:
        """What both parties' traces call this session, whose id stays between the parties."""
        return session_label(self._session)

    @property
    def ready(self) -> int:
        """Queries that are prepared and not yet used."""
        return len(self._ready)

    def prepare(self) -> None:
        """The offline phase of one query: the dealer deals to the server, the client makes its shares of layers."""
        with self._lock:
            if len(self._ready) >= MAXIMUM_PREPARED:
                raise QueryError(
                    f"{MAXIMUM_PREPARED} queries are prepared already, which is the limit", "run one first"
                )
            with self._in_session():
                self._prepare()

    def _prepare(self) -> None:
        number, self._next_query = self._next_query, self._next_query + 1
        start = time.perf_counter()
        self._send(prepare=pb.Prepare(query=number))
        key = query_key(self._seed, "client", self._session, self.program.digest, number)
        correlations = Correlations(CLIENT, key)
        prepare(self.program.circuit, correlations, self._weights)
        own = time.perf_counter() - start
        answer = self._expect("prepared", f"the corrections of query {number}, which the server gets from the dealer")
        if answer.query != number:
            raise ProtocolError(f"the server prepared query {answer.query} where {number} was asked for")
        seconds = time.perf_counter() - start
        self._ready.append(_Ready(number, correlations, seconds, own, answer.seconds, answer.bytes, answer.ByteSize()))

    def query(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's answer (float64) on the model's own arguments; its report is the last of ``reports``."""
        values = self.program.client_values(inputs, self._tables)
        with self._lock, self._in_session():
            if not self._ready:
                self._prepare()
            ready = self._ready.pop(0)  # taken before the first message: a failed query never uses it again
            start = time.perf_counter()
            self._send(query=pb.Query(query=ready.query))
            result, timeline = self._run(ready, values)
            self._expect("finished", "the end of the query")
            online = time.perf_counter() - start
            total = timeline.cost + CircuitCost(dealt=ready.corrections)
            times = (online, ready.seconds, ready.dealer_seconds, ready.client_seconds)
            self.reports.append(QueryReport(total, *times, ready.received, ready.query))
            self.timeline = timeline
        return self.program.decode(result)

    @contextmanager
    def _in_session(self) -> Iterator[None]:
        """Whatever goes wrong inside leaves the two sides at different places: the session is over then."""
        if self._ended:
            raise PeerLost(f"this connection has ended: {self._ended}", "connect again")
        try:
            yield
        except BaseException as error:
            self._end(str(error).partition("\n")[0] or type(error).__name__)
            raise

    def _end(self, why: str) -> None:
        self._ended = self._ended or why
        self._watch.stop()
        self._ready.clear()
        self._outbox.put(None)
        self._call.cancel()

    def _run(self, ready: _Ready, values: Mapping[str, Tensor]) -> tuple[Tensor, Timeline]:
        program, recorder = self.program, Recorder("client")
        step = execute(
            program.circuit,
            [program.output],
            CLIENT,
            ready.correlations,
            self._weights,
            values,
            recorder,
        )

        def receive(size: int) -> bytes:
            path = program.paths[recorder.waiting] or "the model's input"
            return self._receive(size, path, len(recorder.timeline.rounds) + 1) if size else b""

        recorder.start()
        frames = Framed(step, receive, recorder)
        for payload in frames:
            for frame in to_frames(payload) if payload else ():
                self._send(frame=frame)
        recorder.stop()
        return frames.result[0], recorder.timeline

    def _receive(self, size: int, path: str, rounds: int) -> bytes:
        reader = FrameReader(size)
        while True:
            frame = self._expect(
                "frame", f"its message of module '{path}' (round {rounds} of {self.program.cost.rounds})"
            )
            try:
                payload = reader.add(frame)
            except ValueError as error:
                raise ProtocolError(f"module '{path}': the server sent {error}") from None
            if payload is not None:
                return payload

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding (float64 vector) a text. Too long or empty texts raise before anything is sent."""
        return list(self.embed_each(texts))

    def embed_each(self, texts: Sequence[str]) -> Iterator[Tensor]:
        """The same one by one, so that a failure leaves the answers before it."""
        if self._tokenizer is None:
            raise Error("this server's model takes no text", "use query with the model's own arguments")
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise Error("embed takes a list of texts", 'for example embed(["A sentence."])')
        pairs = []
        for number, text in enumerate(texts, 1):
            try:
                pairs.append(tokenize(self._tokenizer, text, self.length))
            except ValueError as error:
                which = f"text {number} of {len(texts)}: " if len(texts) > 1 else ""
                raise type(error)(f"{which}{error}") from None
        return (self.query({"input_ids": ids, "attention_mask": mask})[0] for ids, mask in pairs)

    # closing

    def close(self) -> None:
        """End the session; what was prepared and not used is discarded by both sides."""
        self._open.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def connect(
    server: str,
    dealer: str,
    *,
    insecure: bool = False,
    deadline: float = 60.0,
    cache: bool | Path = True,
    program_digest: str | None = None,
) -> Connection:
    """Connect to ``server`` and ``dealer`` ("host:port"), see ``Connection``. ``cache`` True: the user's own."""
    directory = cache_directory() if cache is True else (cache or None)
    return Connection(
        server, dealer, insecure=insecure, deadline=deadline, cache=directory, program_digest=program_digest
    )
