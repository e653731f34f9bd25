"""The service of the CKKS server: it keeps clients' evaluation keys and computes on ciphertexts.

It sees ciphertexts, evaluation keys, sizes and times; it has no key that decrypts. A value that a client decrypts for a
refresh is masked, and comes back encrypted anew; no other decrypted value comes back at all.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import ClassVar, TypeVar
from urllib.parse import unquote

import grpc

from parties.ckks.evaluators import Evaluators, Running
from parties.ckks.keystore import EXPIRES, KeyStore
from parties.net.caller import Permissions, permit
from parties.net.calls import answering, unexpected
from parties.net.frames import to_frames
from parties.net.watchdog import Watchdog
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import CkksServicer
from secure.ckks.program import CkksProgram
from secure.deployments.ckks import CLIENT
from secure.errors import Error, HandshakeError, PeerLost, ProtocolError, QueryError

log = logging.getLogger("unseen.server")
T = TypeVar("T")

WAITING = 8  # queries that wait for a worker or run
WORD = 1.0  # seconds between two messages to a client that waits for a worker, or for its keys to be loaded
UPLOADS = 2  # uploads at a time: each is held in memory as a whole


class CkksService(CkksServicer):
    """A service that keeps clients' keys for one Program, and answers queries with its ``evaluators``.

    model: the public name of the weights. state: a directory for keys. deadline: seconds that a query waits for any
    message of its client. expires: seconds that keys are held after their last use.
    """

    permissions: ClassVar[Permissions] = permit("Ckks", Keys=[CLIENT], Upload=[CLIENT], Query=[CLIENT])

    def __init__(
        self,
        program: CkksProgram,
        model: str,
        evaluators: Evaluators,
        state: Path,
        *,
        deadline: float = 60.0,
        expires: float = EXPIRES,
    ) -> None:
        self.program, self.model, self.evaluators = program, model, evaluators
        self.deadline, self.expires = deadline, expires
        self.store = KeyStore(state / "evaluation-keys" / program.digest[:32], program, expires=expires)
        self._waiting = threading.BoundedSemaphore(WAITING)
        self._uploads = threading.BoundedSemaphore(UPLOADS)

    def Keys(self, request: pb.KeysRequest, context: grpc.ServicerContext) -> pb.KeysReply:
        return pb.KeysReply(held=self.store.path(request.digest) is not None, expires_seconds=self.expires)

    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> Iterator[pb.KeysReply]:
        reading, writing = (Watchdog(self.deadline, context.cancel) for _ in range(2))  # two threads, a guard for each
        try:
            with answering(context, log):
                if not self._uploads.acquire(blocking=False):
                    raise Error(f"{UPLOADS} clients upload keys at this moment, which is the limit", "try again")
                try:
                    work = _while_doing(lambda: self._received(requests, reading, unquote(context.peer())))
                    yield from writing.sending(pb.KeysReply(held=False) for _ in work)
                finally:
                    self._uploads.release()
                yield from writing.sending([pb.KeysReply(held=True, expires_seconds=self.expires)])
        finally:
            reading.stop()
            writing.stop()

    def _received(self, requests: Iterator[pb.UploadPart], watch: Watchdog, who: str) -> None:
        first = _next(requests, watch, "the header of its keys")
        if first is None or first.WhichOneof("content") != "header":
            raise ProtocolError("an upload begins with the header of its keys")
        header = first.header
        if not hmac.compare_digest(header.program_digest.encode(), self.program.digest.encode()):
            raise HandshakeError("the keys are for another Program", "connect again to fetch the server's")
        sizes = [(k.name, k.size) for k in header.keys]
        self.store.add(header.digest, sizes, _data(requests, watch))
        self._load(header.digest)
        log.info("%s uploaded evaluation keys of %.0f MB", who, sum(n for _, n in sizes) / 1e6)

    def _load(self, digest: str) -> None:
        path = self.store.path(digest)
        if path is None:
            raise QueryError("the server does not hold these evaluation keys", "connect again to upload them")
        try:
            self.evaluators.load(digest, path)
        except ProtocolError:
            path.unlink(missing_ok=True)  # keys that cannot be read are of no use to anybody
            raise

    def Query(self, requests: Iterator[pb.CkksRequest], context: grpc.ServicerContext) -> Iterator[pb.CkksReply]:
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
            yield pb.CkksReply(failure=pb.Failure(code=error.code, message=str(error)))
        except Exception as error:
            unexpected(error, log)
            yield pb.CkksReply(failure=pb.Failure(code=Error.code, message="internal error"))
        finally:
            watch.stop()

    def _query(self, requests: _Requests) -> Iterator[pb.CkksReply]:
        start = requests.start()
        for what, theirs, ours in (
            ("Program digest", start.program_digest, self.program.digest),
            ("model", start.model, self.model),
        ):
            if not hmac.compare_digest(theirs.encode(), ours.encode()):
                raise HandshakeError(
                    f"{what}: the client has {theirs[:64]!r}, this server {ours[:64]!r}", "connect again"
                )
        sizes = [largest(self.program, level) for _, level, _ in self.program.views.values()]
        inputs = requests.ciphertexts(sizes)
        for _ in _while_doing(lambda: self._load(start.keys_digest)):
            yield pb.CkksReply(progress=pb.Progress(done=0, total=1, path="loading keys"))
        while not self.evaluators.acquire(WORD):
            yield pb.CkksReply(progress=pb.Progress(done=0, total=1, path="waiting for other queries"))
        query = self.evaluators.query(start.keys_digest)
        try:
            yield from self._evaluated(query, inputs, requests)
        finally:
            query.close()

    def _evaluated(self, query: Running, inputs: list[bytes], requests: _Requests) -> Iterator[pb.CkksReply]:
        query.send(inputs)
        while True:
            header, payloads = query.receive()
            if "done" in header:
                progress = pb.Progress(done=header["done"], total=header["total"], path=header["path"])
                yield pb.CkksReply(progress=progress)
                continue
            stage = int(header.get("refresh", 0))
            yield pb.CkksReply(refresh=stage) if stage else pb.CkksReply(result=len(payloads))
            for payload in payloads:
                for frame in to_frames(payload):
                    yield pb.CkksReply(frame=frame)
            if not stage:
                return
            sizes = [largest(self.program, level) for level in self.program.refreshes[stage - 1]]
            query.send(requests.ciphertexts(sizes))


def largest(program: CkksProgram, level: int) -> int:
    """Return the most bytes that a ciphertext of a level can have."""
    return 16 * program.parameters.degree * (level + 1) + 4096


def _while_doing(work: Callable[[], None]) -> Iterator[None]:
    """Run ``work`` on a thread of its own, and yield every WORD seconds until it is done; raises what it raised."""
    with ThreadPoolExecutor(1, "unseen-keys") as pool:
        future = pool.submit(work)
        while not wait([future], WORD).done:
            yield
        future.result()


def _next(messages: Iterator[T], watch: Watchdog, what: str) -> T | None:
    """Return the client's next message; None if it has ended the stream. Raises PeerLost if none comes in time."""
    try:
        with watch.guard():
            return next(messages, None)
    except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
        raise PeerLost(f"the client did not send {what} ({type(error).__name__})") from None


def _data(requests: Iterator[pb.UploadPart], watch: Watchdog) -> Iterator[bytes]:
    while (part := _next(requests, watch, "the rest of its keys")) is not None:
        if part.WhichOneof("content") != "data":
            raise ProtocolError("a second header in an upload")
        yield part.data


class _Requests:
    """The client's messages of one query, read in their order."""

    def __init__(self, requests: Iterator[pb.CkksRequest], watch: Watchdog) -> None:
        self._requests, self._watch = requests, watch

    def _next(self, what: str) -> pb.CkksRequest:
        message = _next(self._requests, self._watch, what)
        if message is None:
            raise PeerLost(f"the client ended the stream before {what}")
        return message

    def start(self) -> pb.CkksStart:
        message = self._next("the start of its query")
        if message.WhichOneof("content") != "start":
            raise ProtocolError("a query begins with its start")
        return message.start

    def ciphertexts(self, limits: list[int]) -> list[bytes]:
        """Read one ciphertext for each limit, which is its most bytes; raises ProtocolError if one is longer."""
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
