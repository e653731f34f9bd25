"""The client of the CKKS deployment: makes the keys, encrypts, re-encrypts masked ciphertexts, decrypts.

The secret key is made here and stays here. What the client sends: evaluation keys, ciphertexts, digests. What it
decrypts goes to its caller alone.
"""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc
import torch
from torch import Tensor

from parties.ckks.keystore import keys_digest
from parties.ckks.server import DEPLOYMENT, largest
from parties.net.calls import calling
from parties.net.endpoints import Endpoint, open_channel
from parties.net.frames import parts, to_frames
from parties.net.watchdog import Watchdog
from parties.served.files import TOKEN_TABLE, fetch, received_tokenizer, store, unpack_tables
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import EncryptedStub
from protocols.ckks.refresh import Refresher
from protocols.ckks.seal import Client, Context, key_names
from secure.ckks.program import VERSION, EncryptedProgram
from secure.errors import Error, HandshakeError, InvalidProgram, PeerLost, ProtocolError, from_code, printable
from secure.models.tokens import tokenize

Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EncryptedReport:
    """What one query took: wall time, of which the client computed; bytes of ciphertexts each way; refreshes."""

    seconds: float
    client_seconds: float
    to_server: int
    to_client: int
    rounds: int


class EncryptedConnection:
    """A server of the CKKS deployment and this client's keys for its Program; a context manager. One query at a time.

    keys: a directory in which the secret key is kept (mode 0600) for the next connection, so that evaluation keys are
    uploaded once; None: keys live and die with this connection. deadline: seconds to wait for any message, without the
    evaluation itself, whose progress counts as messages.
    """

    def __init__(
        self,
        server: str,
        *,
        insecure: bool = False,
        deadline: float = 60.0,
        keys: Path | None = None,
        cache: Path | None = None,
        program_digest: str | None = None,
        told: Told | None = None,
    ) -> None:
        self._at = Endpoint.parse(server, what="the server")
        self._deadline, self._told = deadline, told
        self.reports: list[EncryptedReport] = []
        self.key_bytes, self.key_seconds = 0, 0.0
        with ExitStack() as stack:
            channel = open_channel(self._at, insecure=insecure, what="the server")
            stack.callback(channel.close)
            self._stub = EncryptedStub(channel)
            self._describe(program_digest, cache)
            self._keys(keys)
            self._open = stack.pop_all()

    def __enter__(self) -> EncryptedConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def length(self) -> int:
        """Of texts, in tokens."""
        return int(self.program.labels.get("length", "0"))

    def _describe(self, pinned: str | None, cache: Path | None) -> None:
        with calling("the server", self._at, f"start it with: unseen serve --deployment ckks --listen {self._at}"):
            description = self._stub.Describe(pb.DescribeRequest(), timeout=self._deadline)
        if (description.version, description.deployment) != (VERSION, DEPLOYMENT):
            raise HandshakeError(
                f"the server offers {printable(description.deployment)!r}, version {description.version}",
                "use the same version of unseen on both sides",
            )
        try:
            self.program = EncryptedProgram.from_bytes(description.program)
        except InvalidProgram as error:
            raise ProtocolError(f"the server's Program: {error}") from None
        if pinned is not None and self.program.digest != pinned:
            raise HandshakeError(f"the server's Program has the digest {self.program.digest}, not {pinned}")
        self._weights_digest = description.weights_digest
        rows = {c.table: c.size for c in self.program.client_inputs if c.encoding == "client-table"}
        payload: bytes | None = None
        for file in description.files:
            if file.name == TOKEN_TABLE:
                with calling("the server", self._at, "try again", doing="sending the token table"):
                    payload = fetch(file, self._download, cache)
        self._tables = unpack_tables(payload, rows)
        self.tokenizer = received_tokenizer(description.tokenizer, description.pad_id, description.lowercase)

    def _download(self, digest: str) -> Iterator[bytes]:
        for chunk in self._stub.Download(pb.DownloadRequest(sha256=digest), timeout=600):
            yield chunk.data

    def _keys(self, directory: Path | None) -> None:
        began = time.perf_counter()
        context = Context(self.program.parameters)
        # one key a server and Program: the digest of its evaluation keys is a name that servers could compare
        label = hashlib.sha256(f"{self._at}/{self.program.digest}".encode()).hexdigest()[:32]
        kept = directory / f"{label}.secret" if directory else None
        if kept is not None and kept.is_file():
            digest, _, secret = kept.read_bytes().partition(b"\n")
            self.client, self._keys_digest = Client(context, secret), digest.decode()
            with calling("the server", self._at, "try again", doing="asking for its keys"):
                if self._stub.Keys(pb.KeysRequest(digest=self._keys_digest), timeout=self._deadline).held:
                    return
        else:
            self.client = Client(context)
        keys = self.client.evaluation_keys(list(self.program.steps))
        self._keys_digest = keys_digest(keys)
        self.key_bytes = sum(map(len, keys.values()))
        self.key_seconds = time.perf_counter() - began
        with calling("the server", self._at, "try again", doing="taking the evaluation keys"):
            self._stub.Upload(self._uploading(keys), timeout=600 + self._deadline)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            store(kept, self._keys_digest.encode() + b"\n" + self.client.secret_bytes())

    def _uploading(self, keys: Mapping[str, bytes]) -> Iterator[pb.UploadPart]:
        names = key_names(self.program.steps)
        header = pb.KeysHeader(
            program_digest=self.program.digest,
            digest=self._keys_digest,
            keys=[pb.KeySize(name=n, size=len(keys[n])) for n in names],
        )
        yield pb.UploadPart(header=header)
        for number, name in enumerate(names):
            if self._told:
                self._told(number, len(names), "uploading keys")
            for part in parts(keys[name]):
                yield pb.UploadPart(data=part)

    # queries

    def embed(self, text: str) -> Tensor:
        """The model's answer on a text."""
        if self.tokenizer is None:
            raise Error("the model that is served takes no text")
        ids, mask = tokenize(self.tokenizer, text, self.length)
        return self.query({"input_ids": ids, "attention_mask": mask})[0]

    def query(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's answer. ValueError for inputs outside of their range, and for results that cannot be right."""
        began = time.perf_counter()
        values = self.program.client_values(inputs, self._tables)
        levels = {name: level for name, (_, level, _) in self.program.views.items()}
        ciphertexts = [self.client.encrypt(values[name], levels[name]) for name in self.program.views]
        run = _Run(self, ciphertexts)
        run.client_seconds = time.perf_counter() - began
        results = run.results()
        at = time.perf_counter()
        answer = self.program.decode([self.client.decrypt(data) for data in results])
        run.client_seconds += time.perf_counter() - at
        self.reports.append(
            EncryptedReport(time.perf_counter() - began, run.client_seconds, run.to_server, run.to_client, run.rounds)
        )
        return answer.to(torch.float32)


class _Run:
    """One query's stream."""

    def __init__(self, connection: EncryptedConnection, ciphertexts: list[bytes]) -> None:
        self.c, self.program = connection, connection.program
        self.to_server = self.to_client = self.rounds = 0
        self.client_seconds = 0.0
        self._refresher = Refresher(connection.client) if self.program.refreshes else None
        self._outgoing: queue.SimpleQueue[pb.EncryptedRequest | None] = queue.SimpleQueue()
        start = pb.EncryptedStart(
            program_digest=self.program.digest,
            weights_digest=connection._weights_digest,
            keys_digest=connection._keys_digest,
        )
        self._outgoing.put(pb.EncryptedRequest(start=start))
        self._put(ciphertexts)

    def _put(self, ciphertexts: list[bytes]) -> None:
        self.to_server += sum(map(len, ciphertexts))
        for data in ciphertexts:
            for frame in to_frames(data):
                self._outgoing.put(pb.EncryptedRequest(frame=frame))

    def results(self) -> list[bytes]:
        c = self.c
        with calling("the server", c._at, "connect again", doing="evaluating", kind=PeerLost):
            stream = c._stub.Query(iter(self._outgoing.get, None))
            watch = Watchdog(c._deadline, stream.cancel)
            try:
                return self._results(_in_time(stream, watch))
            except grpc.RpcError:
                if not watch.fired:
                    raise
                raise PeerLost(f"the server sent nothing for {c._deadline:g} s", "see the server's log") from None
            finally:
                watch.stop()
                self._outgoing.put(None)
                stream.cancel()

    def _results(self, stream: Iterator[pb.EncryptedReply]) -> list[bytes]:
        for message in stream:
            kind = message.WhichOneof("content")
            if kind == "progress":
                if self.c._told:
                    p = message.progress
                    self.c._told(p.done, p.total, printable(p.path))
            elif kind == "failure":
                raise from_code(message.failure.code, printable(message.failure.message))
            elif kind == "refresh":
                self._refresh(message.refresh, stream)
            elif kind == "result":
                if message.result != len(self.program.output):
                    raise ProtocolError(f"the server sends {message.result} results, not {len(self.program.output)}")
                return self._read(stream, [0] * message.result)
            else:
                raise ProtocolError(f"the server sent {kind!r} where a refresh or a result was expected")
        raise PeerLost("the server ended the query without an answer", "connect again")

    def _refresh(self, stage: int, stream: Iterator[pb.EncryptedReply]) -> None:
        if stage != self.rounds + 1 or stage > len(self.program.refreshes) or self._refresher is None:
            raise ProtocolError(f"the server asks for refresh {stage}, the Program has {len(self.program.refreshes)}")
        self.rounds, levels = stage, self.program.refreshes[stage - 1]
        masked = self._read(stream, [self.program.reserve] * len(levels))
        at = time.perf_counter()
        fresh = [
            self._refresher.refresh(data, self.program.reserve, level)
            for data, level in zip(masked, levels, strict=True)
        ]
        self.client_seconds += time.perf_counter() - at
        self._put(fresh)

    def _read(self, stream: Iterator[pb.EncryptedReply], levels: list[int]) -> list[bytes]:
        out = []
        for level in levels:
            data, limit = bytearray(), largest(self.program, level)
            for message in stream:
                if message.WhichOneof("content") != "frame":
                    raise ProtocolError("the server sent no ciphertext where one was expected")
                data += message.frame.data
                if len(data) > limit:
                    raise ProtocolError(f"the server sent a ciphertext of more than {limit} bytes")
                if message.frame.last:
                    break
            out.append(bytes(data))
        self.to_client += sum(map(len, out))
        return out


def _in_time(stream: Iterator[pb.EncryptedReply], watch: Watchdog) -> Iterator[pb.EncryptedReply]:
    while True:
        with watch.guard():
            message = next(stream, None)
        if message is None:
            return
        yield message
