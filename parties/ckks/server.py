"""The service of the CKKS server: it keeps clients' evaluation keys and computes on ciphertexts.

It sees ciphertexts, evaluation keys, sizes and times; it has no key that decrypts. A value that a client decrypts for a
refresh is masked, and comes back encrypted anew; no other decrypted value comes back at all.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, TypeVar

import grpc

from parties.ckks.evaluators import Evaluators, Running
from parties.ckks.keystore import EXPIRES, KeyStore
from parties.limits.waiting import FIRST, Places, WaitingRoom, patience
from parties.net.caller import Caller, Permissions, caller, permit
from parties.net.calls import answering, failure, unexpected
from parties.net.frames import FrameReader, to_frames
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import CkksServicer
from parties.telemetry.events import Events, PhaseEnded, Reading
from parties.telemetry.logs import tagged
from parties.telemetry.names import query_of_ciphertext
from protocols.wire import FrameError
from secure.ckks.program import CkksProgram
from secure.cost.traffic import ONLINE
from secure.deployments.ckks import CLIENT
from secure.errors import Error, HandshakeError, PeerLost, ProtocolError, QueryError

log = logging.getLogger("unseen.server")
T = TypeVar("T")

ARRIVING = 16  # calls that have not said yet all that they begin with; each takes a thread
WAITING, WAITING_EACH = 8, 4  # queries that wait for a worker or run
UPLOADS, UPLOADS_EACH = 4, 2  # uploads at a time
TRIES = 3  # times that keys are loaded for one query, as their process may end, or make room, before it begins
WORD = 1.0  # seconds between two messages to a client that waits for a worker, or for its keys to be loaded


class CkksService(CkksServicer):
    """A service that keeps clients' keys for one Program, and answers queries with its ``evaluators``.

    model: the public name of the weights. state: a directory for keys. deadline: seconds that a call waits for its
    client, all waits together, besides those that its bytes may take (``waiting.patience``). expires: seconds that keys
    are held after their last use. events: hear of every query that ends.

    A call takes a place among the queries or uploads only after all that it begins with has come, in bounded time: a
    start and the inputs, or a header. A client with a name has a part of each kind of place, and of the room for keys.
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
        events: Events | None = None,
    ) -> None:
        self.events = events or Events()
        self.program, self.model, self.evaluators = program, model, evaluators
        self.deadline, self.expires = deadline, expires
        self.store = KeyStore(state / "evaluation-keys", program, expires=expires)
        self._arriving = WaitingRoom(ARRIVING)
        self._waiting = Places(WAITING, WAITING_EACH, "the server", "queries that wait or run")
        self._uploads = Places(UPLOADS, UPLOADS_EACH, "the server", "uploads of keys at this moment")

    def readings(self) -> Iterator[Reading]:
        """Yield the numbers of this service at this moment."""
        yield from self._waiting.readings()
        yield from self._uploads.readings()
        yield Reading("unseen_key_files_bytes", "Bytes of clients' evaluation keys on the disk.", self.store.used)

    def Keys(self, request: pb.KeysRequest, context: grpc.ServicerContext) -> pb.KeysReply:
        held = self.store.path(request.digest, caller(context).name) is not None
        return pb.KeysReply(held=held, expires_seconds=self.expires)

    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> Iterator[pb.KeysReply]:
        reading, writing = (Allowance(self.deadline, context.cancel) for _ in range(2))  # two threads, a guard for each
        try:
            with answering(context, log):
                work = _while_doing(lambda: self._received(requests, reading, context))
                yield from writing.sending(pb.KeysReply(held=False) for _ in work)
                yield from writing.sending([pb.KeysReply(held=True, expires_seconds=self.expires)])
        finally:
            reading.stop()
            writing.stop()

    def _received(self, requests: Iterator[pb.UploadPart], allowance: Allowance, context: grpc.ServicerContext) -> None:
        who = caller(context)
        with self._arriving.place(context):
            allowance.left = FIRST
            first = _next(requests, allowance, "the header of its keys")
            if first is None or first.WhichOneof("content") != "header":
                raise ProtocolError("an upload begins with the header of its keys")
            header = first.header
            if not hmac.compare_digest(header.program_digest.encode(), self.program.digest.encode()):
                raise HandshakeError("the keys are for another Program", "connect again to fetch the server's")
        with _place(self._uploads, who):
            allowance.left = self.deadline + patience(self.store.size)
            self.store.add(header.digest, _data(requests, allowance), who.name)
            self._load(header.digest, who.name)
        log.info("%s uploaded evaluation keys of %.0f MB", who, self.store.size / 1e6)

    def _load(self, digest: str, name: str) -> None:
        path = self._keys(digest, name)
        try:
            self.evaluators.load(name, digest, path)
        except ProtocolError:
            path.unlink(missing_ok=True)  # keys that cannot be read are of no use to anybody
            raise

    def _keys(self, digest: str, name: str) -> Path:
        path = self.store.path(digest, name)
        if path is None:
            raise QueryError("the server does not hold these evaluation keys", "connect again to upload them")
        return path

    def Query(self, requests: Iterator[pb.CkksRequest], context: grpc.ServicerContext) -> Iterator[pb.CkksReply]:
        allowance = Allowance(self.deadline, context.cancel)
        who, asked = caller(context), _Requests(requests, allowance)
        try:
            yield from allowance.sending(self._query(asked, who, context))
        except Error as error:
            log.warning("query of %s ended: %s", who, str(error).splitlines()[0], extra=tagged(query=asked.named))
            yield pb.CkksReply(failure=failure(error))
        except Exception as error:
            unexpected(error, log)
            yield pb.CkksReply(failure=pb.Failure(code=Error.code, message="internal error"))
        finally:
            allowance.stop()
            if asked.answered:  # also if the client left as soon as it had everything
                self._tell(asked, who)

    def _tell(self, asked: _Requests, who: Caller) -> None:
        """Tell of a query that was answered."""
        program, seconds = self.program, time.perf_counter() - asked.began
        log.info("query of %s answered in %.2f s", who, seconds, extra=tagged(query=asked.named))
        moved = 1 + len(program.refreshes), program.to_client, program.to_server
        self.events.ended(PhaseEnded(ONLINE, seconds, asked.named, *moved))

    def _query(self, requests: _Requests, who: Caller, context: grpc.ServicerContext) -> Iterator[pb.CkksReply]:
        program, name = self.program, who.name
        with self._arriving.place(context):
            requests.allowance.left = FIRST
            start = requests.start()
            for what, theirs, ours in (
                ("Program digest", start.program_digest, program.digest),
                ("model", start.model, self.model),
            ):
                if not hmac.compare_digest(theirs.encode(), ours.encode()):
                    raise HandshakeError(
                        f"{what}: the client has {theirs[:64]!r}, this server {ours[:64]!r}", "connect again"
                    )
            self._keys(start.keys_digest, name)
            levels = program.input_levels
            requests.allowance.left = patience(sum(map(program.parameters.fresh_bytes, levels)))
            inputs = requests.ciphertexts(program, levels)
            requests.named = query_of_ciphertext(inputs[0])
        with _place(self._waiting, who):
            # refreshes and their answers, and the result
            requests.allowance.left = self.deadline + patience(program.to_server + program.to_client)
            for left in reversed(range(TRIES)):
                for _ in _while_doing(lambda: self._load(start.keys_digest, name)):
                    yield pb.CkksReply(progress=pb.Progress(done=0, total=1, path="loading keys"))
                while not self.evaluators.acquire(WORD):
                    yield pb.CkksReply(progress=pb.Progress(done=0, total=1, path="waiting for other queries"))
                try:
                    query = self.evaluators.query(name, start.keys_digest)
                    break
                except QueryError:  # nothing is lost yet
                    if not left:
                        raise
            try:
                yield from self._evaluated(query, inputs, requests, who)
            finally:
                query.close()

    def _evaluated(
        self, query: Running, inputs: list[bytes], requests: _Requests, who: Caller
    ) -> Iterator[pb.CkksReply]:
        """Answer a query; of a model that keeps rows, also those that follow, until the client ends the stream."""
        program = self.program
        for left in reversed(range(program.rows + 1)):
            yield from self._answered(query, inputs, requests)
            if not left:
                return
            requests.allowance.left = self.deadline
            if (found := requests.following(program)) is None:
                return
            self._tell(requests, who)  # of the one that was answered before
            inputs, requests.began, requests.answered = found, time.perf_counter(), False
            requests.named = query_of_ciphertext(inputs[0])
            requests.allowance.left = self.deadline + patience(program.to_server + program.to_client)

    def _answered(self, query: Running, inputs: list[bytes], requests: _Requests) -> Iterator[pb.CkksReply]:
        query.send(inputs)
        while True:
            header, payloads = query.receive()
            if "done" in header:
                progress = pb.Progress(done=header["done"], total=header["total"], path=header["path"])
                yield pb.CkksReply(progress=progress)
                continue
            stage = int(header.get("refresh", 0))
            yield pb.CkksReply(refresh=stage) if stage else pb.CkksReply(result=len(payloads))
            for number, payload in enumerate(payloads, 1):
                for frame in to_frames(payload):
                    requests.answered = not stage and number == len(payloads) and frame.last
                    yield pb.CkksReply(frame=frame)
            if not stage:
                return
            query.send(requests.ciphertexts(self.program, self.program.refreshes[stage - 1]))


class Allowance:
    """The seconds that a call still waits for its client, to send or to take: all its waits together.

    seconds: at first; set ``left`` to change it. action: called if a wait uses them up.
    """

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self.left = seconds
        self._watch = Watchdog(min(seconds, FIRST), action)

    @contextmanager
    def wait(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            with self._watch.guard(max(self.left, 0.001)):
                yield
        finally:
            self.left -= time.monotonic() - began

    def sending(self, messages: Iterable[T]) -> Iterator[T]:
        """Yield the messages; the time until each is taken counts."""
        for message in messages:
            with self.wait():
                yield message

    def stop(self) -> None:
        self._watch.stop()


@contextmanager
def _place(places: Places, who: Caller) -> Iterator[None]:
    give_back = places.take(who)
    try:
        yield
    finally:
        give_back()


def _while_doing(work: Callable[[], None]) -> Iterator[None]:
    """Run ``work`` on a thread of its own, and yield every WORD seconds until it is done; raises what it raised."""
    with ThreadPoolExecutor(1, "unseen-keys") as pool:
        future = pool.submit(work)
        while not wait([future], WORD).done:
            yield
        future.result()


def _next(messages: Iterator[T], allowance: Allowance, what: str) -> T | None:
    """Return the client's next message; None if it has ended the stream. Raises PeerLost if none comes in time."""
    try:
        with allowance.wait():
            return next(messages, None)
    except Error:
        raise
    except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
        raise PeerLost(f"the client did not send {what} ({type(error).__name__})") from None


def _data(requests: Iterator[pb.UploadPart], allowance: Allowance) -> Iterator[bytes]:
    while (part := _next(requests, allowance, "the rest of its keys")) is not None:
        if part.WhichOneof("content") != "data":
            raise ProtocolError("a second header in an upload")
        yield part.data


class _Requests:
    """The client's messages of one query, read in their order."""

    def __init__(self, requests: Iterator[pb.CkksRequest], allowance: Allowance) -> None:
        self._requests, self.allowance = requests, allowance
        self.named = ""  # the query's id, once its inputs are here
        self.answered = False  # whether the last part of the answer was handed over
        self.began = time.perf_counter()  # the query that runs

    def _next(self, what: str) -> pb.CkksRequest:
        message = _next(self._requests, self.allowance, what)
        if message is None:
            raise PeerLost(f"the client ended the stream before {what}")
        return message

    def start(self) -> pb.CkksStart:
        message = self._next("the start of its query")
        if message.WhichOneof("content") != "start":
            raise ProtocolError("a query begins with its start")
        return message.start

    def following(self, program: CkksProgram) -> list[bytes] | None:
        """Read the inputs of a conversation's next query; None if the client ends, or leaves, before they begin."""
        first = None
        with suppress(PeerLost):
            first = _next(self._requests, self.allowance, "the inputs of its next query")
        if first is None:
            return None
        self._requests = itertools.chain([first], self._requests)
        self.allowance.left = patience(sum(map(program.parameters.fresh_bytes, program.input_levels)))
        return self.ciphertexts(program, program.input_levels)

    def ciphertexts(self, program: CkksProgram, levels: Sequence[int]) -> list[bytes]:
        """Read one fresh ciphertext for each level; raises ProtocolError if one has another size than it must."""
        out = []
        for number, level in enumerate(levels):
            reader, data = FrameReader(program.parameters.fresh_bytes(level)), None
            while data is None:
                message = self._next(f"ciphertext {number + 1} of {len(levels)}")
                if message.WhichOneof("content") != "frame":
                    raise ProtocolError(f"a message {message.WhichOneof('content')!r} where a ciphertext was expected")
                try:
                    data = reader.add(message.frame)
                except FrameError as error:
                    raise ProtocolError(f"ciphertext {number + 1} of {len(levels)}: {error}") from None
            out.append(data)
        return out
