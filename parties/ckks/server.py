"""The server of the CKKS deployment: hands out the Program, keeps clients' evaluation keys, computes on ciphertexts.

It sees ciphertexts, evaluation keys, sizes and times; it has no key that decrypts. What a client decrypts for a refresh
is masked, and comes back encrypted anew; nothing else that it decrypts comes back at all.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
from safetensors.torch import save

from parties.ckks.evaluators import Evaluators, InvalidKeys, Running
from parties.ckks.keystore import EXPIRES, KeyStore
from parties.net.calls import answering, unexpected
from parties.net.frames import parts, to_frames
from parties.net.watchdog import Watchdog
from parties.served.files import TOKEN_TABLE, describe
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import EncryptedServicer
from secure.ckks.compile import Encrypted
from secure.ckks.program import VERSION, EncryptedProgram
from secure.errors import DownloadError, Error, HandshakeError, PeerLost, ProtocolError, QueryError
from secure.models.tokens import TextTokenizer

log = logging.getLogger("unseen.server")

DEPLOYMENT = "ckks"
WAITING = 8  # queries that wait for a worker or run
QUEUED = 5.0  # seconds between two words to a client that waits for a worker
UPLOADS = 2  # at a time: each is in memory as a whole


@dataclass(frozen=True, eq=False)
class ServedEncrypted:
    """What is served; ``files``: the token table, where there is one."""

    encrypted: Encrypted
    tokenizer: TextTokenizer | None = None
    tokenizer_json: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)
    descriptions: list[pb.File] = field(default_factory=list)

    @classmethod
    def of(
        cls, encrypted: Encrypted, tokenizer: TextTokenizer | None = None, tokenizer_json: bytes = b""
    ) -> ServedEncrypted:
        payloads = {TOKEN_TABLE: save(dict(encrypted.client_tables))} if encrypted.client_tables else {}
        descriptions = [describe(name, payload) for name, payload in payloads.items()]
        files = {d.sha256: payloads[d.name] for d in descriptions}
        return cls(encrypted, tokenizer, tokenizer_json, files, descriptions)


class EncryptedService(EncryptedServicer):
    """``deadline``: seconds that a query waits for any message of its client; ``state``: where keys are kept."""

    def __init__(
        self,
        served: ServedEncrypted,
        evaluators: Evaluators,
        state: Path,
        *,
        deadline: float = 60.0,
        expires: float = EXPIRES,
    ) -> None:
        self.served, self.evaluators, self.deadline, self.expires = served, evaluators, deadline, expires
        self.program = served.encrypted.program
        self.store = KeyStore(state / "evaluation-keys" / self.program.digest[:32], self.program, expires=expires)
        # a name for the weights that tells nothing of them: clients only compare it between calls
        self.weights_label = hmac.digest(
            secrets.token_bytes(32), served.encrypted.weights_digest.encode(), "sha256"
        ).hex()
        self._waiting = threading.BoundedSemaphore(WAITING)
        self._uploads = threading.BoundedSemaphore(UPLOADS)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.EncryptedDescription:
        s = self.served
        return pb.EncryptedDescription(
            version=VERSION,
            deployment=DEPLOYMENT,
            program=self.program.encoded,
            weights_digest=self.weights_label,
            files=s.descriptions,
            tokenizer=s.tokenizer_json,
            pad_id=s.tokenizer.pad_id if s.tokenizer else 0,
            lowercase=s.tokenizer.lowercase if s.tokenizer else False,
        )

    def Download(self, request: pb.DownloadRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        watch = Watchdog(self.deadline, context.cancel)
        try:
            with answering(context, log):
                payload = self.served.files.get(request.sha256)
                if payload is None:
                    raise DownloadError("it has no such file", "connect again, the server may have changed")
                yield from watch.sending(pb.Chunk(data=part) for part in parts(payload))
        finally:
            watch.stop()

    def Keys(self, request: pb.KeysRequest, context: grpc.ServicerContext) -> pb.KeysReply:
        return pb.KeysReply(held=self.store.path(request.digest) is not None, expires_seconds=self.expires)

    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> pb.KeysReply:
        watch = Watchdog(self.deadline, context.cancel)
        try:
            with answering(context, log):
                if not self._uploads.acquire(blocking=False):
                    raise Error(f"{UPLOADS} clients upload keys at this moment, which is the limit", "try again")
                try:
                    sizes = self._received(requests, watch)
                finally:
                    self._uploads.release()
        finally:
            watch.stop()
        log.info("%s uploaded evaluation keys of %.0f MB", unquote(context.peer()), sum(n for _, n in sizes) / 1e6)
        return pb.KeysReply(held=True, expires_seconds=self.expires)

    def _received(self, requests: Iterator[pb.UploadPart], watch: Watchdog) -> list[tuple[str, int]]:
        with watch.guard():
            first = next(requests, None)
        if first is None or first.WhichOneof("content") != "header":
            raise ProtocolError("an upload begins with the header of its keys")
        header = first.header
        if not hmac.compare_digest(header.program_digest.encode(), self.program.digest.encode()):
            raise HandshakeError("the keys are for another Program", "connect again to fetch the server's")
        sizes = [(k.name, k.size) for k in header.keys]
        self.store.add(header.digest, sizes, _guarded(requests, watch))
        self._load(header.digest)
        return sizes

    def _load(self, digest: str) -> None:
        path = self.store.path(digest)
        if path is None:
            raise QueryError("the server does not hold these evaluation keys", "connect again to upload them")
        try:
            self.evaluators.load(digest, path)
        except InvalidKeys:
            path.unlink(missing_ok=True)  # keys that cannot be read are of no use to anybody
            raise

    def Query(
        self, requests: Iterator[pb.EncryptedRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.EncryptedReply]:
        watch = Watchdog(self.deadline, context.cancel)
        who, began = unquote(context.peer()), time.perf_counter()
        try:
            if not self._waiting.acquire(blocking=False):
                raise Error(f"{WAITING} queries wait or run, which is the limit", "try again later")
            try:
                yield from watch.sending(self._query(_Requests(requests, watch)))
            finally:
                self._waiting.release()
            log.info("query of %s answered in %.2f s", who, time.perf_counter() - began)
        except Error as error:
            log.warning("query of %s ended: %s", who, str(error).splitlines()[0])
            yield pb.EncryptedReply(failure=pb.Failure(code=error.code, message=str(error)))
        except Exception as error:
            unexpected(error, log)
            yield pb.EncryptedReply(failure=pb.Failure(code=Error.code, message="internal error"))
        finally:
            watch.stop()

    def _query(self, requests: _Requests) -> Iterator[pb.EncryptedReply]:
        start = requests.start()
        for what, theirs, ours in (
            ("Program digest", start.program_digest, self.program.digest),
            ("weights digest", start.weights_digest, self.weights_label),
        ):
            if not hmac.compare_digest(theirs.encode(), ours.encode()):
                raise HandshakeError(
                    f"{what}: the client has {theirs[:64]!r}, this server {ours[:64]!r}", "connect again"
                )
        sizes = [largest(self.program, level) for _, level, _ in self.program.views.values()]
        inputs = requests.ciphertexts(sizes)
        self._load(start.keys_digest)
        while not self.evaluators.acquire(QUEUED):
            yield pb.EncryptedReply(progress=pb.Progress(done=0, total=1, path="waiting for other queries"))
        query = self.evaluators.query(start.keys_digest)
        try:
            yield from self._evaluated(query, inputs, requests)
        finally:
            query.close()

    def _evaluated(self, query: Running, inputs: list[bytes], requests: _Requests) -> Iterator[pb.EncryptedReply]:
        query.send(inputs)
        while True:
            header, payloads = query.receive()
            if "done" in header:
                progress = pb.Progress(done=header["done"], total=header["total"], path=header["path"])
                yield pb.EncryptedReply(progress=progress)
                continue
            stage = int(header.get("refresh", 0))
            yield pb.EncryptedReply(refresh=stage) if stage else pb.EncryptedReply(result=len(payloads))
            for payload in payloads:
                for frame in to_frames(payload):
                    yield pb.EncryptedReply(frame=frame)
            if not stage:
                return
            sizes = [largest(self.program, level) for level in self.program.refreshes[stage - 1]]
            query.send(requests.ciphertexts(sizes))


def largest(program: EncryptedProgram, level: int) -> int:
    """Bytes that a ciphertext of a level can have at most."""
    return 16 * program.parameters.degree * (level + 1) + 4096


def _guarded(requests: Iterator[pb.UploadPart], watch: Watchdog) -> Iterator[bytes]:
    while True:
        with watch.guard():
            part = next(requests, None)
        if part is None:
            return
        if part.WhichOneof("content") != "data":
            raise ProtocolError("a second header in an upload")
        yield part.data


class _Requests:
    """The client's messages of one query, in their order."""

    def __init__(self, requests: Iterator[pb.EncryptedRequest], watch: Watchdog) -> None:
        self._requests, self._watch = requests, watch

    def _next(self, what: str) -> Any:
        try:
            with self._watch.guard():
                message = next(self._requests, None)
        except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
            raise PeerLost(f"the client did not send {what} ({type(error).__name__})") from None
        if message is None:
            raise PeerLost(f"the client ended the stream before {what}")
        return message

    def start(self) -> pb.EncryptedStart:
        message = self._next("the start of its query")
        if message.WhichOneof("content") != "start":
            raise ProtocolError("a query begins with its start")
        return message.start  # type: ignore[no-any-return]

    def ciphertexts(self, limits: list[int]) -> list[bytes]:
        """As many ciphertexts as there are limits, each at most that long."""
        out = []
        for number, limit in enumerate(limits):
            data = bytearray()
            while True:
                message = self._next(f"ciphertext {number + 1} of {len(limits)}")
                if message.WhichOneof("content") != "frame":
                    raise ProtocolError(f"a message {message.WhichOneof('content')!r} where a ciphertext was expected")
                data += message.frame.data
                if len(data) > limit:
                    raise ProtocolError(f"ciphertext {number + 1} has more than {limit} bytes")
                if message.frame.last:
                    break
            out.append(bytes(data))
        return out
