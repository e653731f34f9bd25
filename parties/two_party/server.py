"""The server's service: it computes on shares with clients, one session for each.

The handler of a session drives the computation itself: it yields the frames of the circuit's rounds and reads the
client's frames, so there is no thread between the computation and the connection.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import ClassVar
from urllib.parse import unquote

import grpc

from parties.net.caller import Permissions, permit
from parties.net.calls import unexpected
from parties.net.endpoints import Endpoint
from parties.net.frames import FrameReader, to_frames
from parties.net.network import Network
from parties.net.peer import Peer
from parties.net.watchdog import Watchdog
from parties.traces.trace_file import TraceDirectory
from parties.two_party.keys import (
    MAXIMUM_PREPARED,
    MAXIMUM_QUERY,
    Burnt,
    deal_proof,
    join_proof,
    query_key,
    session_label,
)
from parties.two_party.masked_model import MaskedModel
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import DealerStub, InferenceServicer
from protocols.circuit import Correlations, execute, split_corrections
from protocols.prg import fresh_seed
from protocols.protocol import SERVER
from protocols.steps import Framed
from secure.cost.timeline import Recorder, Timeline
from secure.deployments.two_party import CLIENT as CLIENT_ROLE
from secure.deployments.two_party import DEALER, TwoParty
from secure.errors import DealerError, Error, HandshakeError, PeerLost, ProtocolError, QueryError
from secure.version import WIRE_VERSION

log = logging.getLogger("unseen.server")

MAXIMUM_SESSIONS = 16  # at a time; fewer than the threads of the service, which also answers Describe and Download
BETWEEN = "between queries"
IDLE = 1800.0  # seconds that a client may keep its session between queries


class InferenceService(InferenceServicer):
    """The service that answers sessions on one masked model.

    deadline: seconds that a session waits for its client. traces: a directory for a timeline of every query, or None.
    """

    permissions: ClassVar[Permissions] = permit("Inference", Session=[CLIENT_ROLE])

    def __init__(
        self,
        model: MaskedModel,
        dealer: str | Endpoint,
        network: Network,
        *,
        deadline: float = 60.0,
        traces: TraceDirectory | None = None,
    ) -> None:
        self.model, self.deadline, self.traces = model, deadline, traces
        self._dealer_at = Peer("the dealer", dealer, network, role=DEALER, start="unseen dealer")
        self.dealer = DealerStub(self._dealer_at.channel)
        self._free = threading.BoundedSemaphore(MAXIMUM_SESSIONS)
        try:
            self.register()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the channel to the dealer."""
        self._dealer_at.close()

    def register(self) -> None:
        """Send the Program and the mask seed to the dealer; this is harmless if it knows them. Raises DealerError."""
        program = self.model.program
        request = pb.RegisterRequest(
            program=program.encoded, weights_digest=self.model.weights_digest, mask_seed=self.model.mask_seed
        )
        with self.asking_the_dealer("registering the Program"):
            reply = self.dealer.Register(request, timeout=30)
        if reply.program_digest != program.digest:
            raise DealerError("the dealer computes another digest of the Program", "run the same version everywhere")

    def asking_the_dealer(self, doing: str) -> AbstractContextManager[None]:
        return self._dealer_at.calling(doing, kind=DealerError)

    def Session(
        self, requests: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        if not self._free.acquire(blocking=False):
            busy = f"the server has {MAXIMUM_SESSIONS} sessions, which is its limit\nhint: try again later"
            yield pb.ServerMessage(failure=pb.Failure(code=Error.code, message=busy))
            return
        try:
            session = _Session(self, requests, context)
            try:
                yield from session.watch.sending(session.run())
            finally:
                session.close()
        finally:
            self._free.release()


class _Session:
    """One client's session on its stream."""

    def __init__(
        self, service: InferenceService, requests: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> None:
        self._service, self._requests = service, requests
        self._who = unquote(context.peer())
        self._model = service.model
        self._program = self._model.program
        self._prepared: dict[int, dict[int, memoryview]] = {}
        self._burnt = Burnt()
        self._seed, self._id = fresh_seed(), b""
        self._doing = "the handshake"
        self._active = context.is_active
        self._dealing: grpc.Call | None = None
        self.watch = Watchdog(service.deadline, context.cancel)
        context.add_callback(self._give_up_dealing)

    def close(self) -> None:
        self.watch.stop()
        self._prepared.clear()

    def _give_up_dealing(self) -> None:
        if self._dealing is not None:
            self._dealing.cancel()

    def run(self) -> Iterator[pb.ServerMessage]:
        """Yield all messages to this client; a failure is the last one."""
        try:
            yield from self._run()
        except Error as error:
            log.warning("session of %s ended: %s", self._who, str(error).splitlines()[0])
            yield pb.ServerMessage(failure=pb.Failure(code=error.code, message=str(error)))
        except GeneratorExit:
            late = "did not read in time" if self.watch.fired else "is gone"
            level = logging.INFO if self._doing == BETWEEN else logging.WARNING
            log.log(level, "session of %s ended: the client %s (%s)", self._who, late, self._doing)
            raise
        except Exception as error:
            unexpected(error, log)
            message = f"internal error ({self._doing})"
            yield pb.ServerMessage(failure=pb.Failure(code=Error.code, message=message))

    def _run(self) -> Iterator[pb.ServerMessage]:
        first = self._next("the handshake")
        if first is None:
            return
        self._greet(first)
        yield pb.ServerMessage(welcome=pb.Welcome())
        self._doing = BETWEEN
        while (message := self._next_or_gone()) is not None:
            kind = message.WhichOneof("content")
            if kind == "prepare":
                self._doing = f"preparing query {message.prepare.query}"
                yield self._prepare(message.prepare.query)
            elif kind == "query":
                self._doing = f"query {message.query.query}"
                yield from self._query(message.query.query)
            else:
                raise ProtocolError(f"a message {kind!r} where 'prepare' or 'query' was expected")

    def _next(self, what: str) -> pb.ClientMessage | None:
        """Return the client's next message; None if it has ended the stream. Raises PeerLost."""
        try:
            with self.watch.guard():
                message = next(self._requests, None)
        except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
            late = " in time" if self.watch.fired else ""
            raise PeerLost(f"the client did not send {what}{late} ({type(error).__name__})") from None
        if message is None and self.watch.fired:
            raise PeerLost(f"the client did not send {what} in time")
        return message

    def _next_or_gone(self) -> pb.ClientMessage | None:
        """Return the next message between queries, when a client may wait for long; None if it has left in any way."""
        try:
            with self.watch.guard(IDLE):
                message = next(self._requests, None)
        except Exception:  # gRPC raises bare Exception subclasses when the stream breaks
            message = None
        if message is None:  # a stream that is cancelled here may end like one that the client has ended
            log.info("%s %s between queries", self._who, "was idle too long" if self.watch.fired else "left")
        return message

    def _greet(self, message: pb.ClientMessage) -> None:
        if message.WhichOneof("content") != "hello":
            raise HandshakeError("the session does not begin with a handshake")
        hello, program = message.hello, self._program
        fixed = json.dumps(program.fixed.as_dict(), sort_keys=True)
        for what, theirs, ours in (
            ("version", str(hello.version), str(WIRE_VERSION)),
            ("deployment", hello.deployment, TwoParty.name),
            ("fixed point", hello.fixed_point, fixed),
            ("Program digest", hello.program_digest, program.digest),
            ("weights digest", hello.weights_digest, self._model.weights_digest),
        ):
            if not hmac.compare_digest(theirs.encode(), ours.encode()):
                raise HandshakeError(
                    f"{what}: the client has {theirs[:64]!r}, this server {ours[:64]!r}",
                    "connect again to fetch the server's Program, and use the same version of unseen on both sides",
                )
        self._id = hello.session
        request = pb.JoinRequest(
            session=self._id,
            program_digest=program.digest,
            weights_digest=self._model.weights_digest,
            server_seed=self._seed,
            proof=join_proof(self._model.mask_seed, self._id, program.digest, self._model.weights_digest, self._seed),
        )
        with self._service.asking_the_dealer("joining the client's session"):
            self._service.dealer.Join(request, timeout=30)

    def _prepare(self, query: int) -> pb.ServerMessage:
        """Fetch a query's corrections from the dealer, who burns the number, so that they can be fetched only once."""
        if len(self._prepared) >= MAXIMUM_PREPARED:
            raise QueryError(f"{MAXIMUM_PREPARED} queries are prepared already, which is the limit", "run one first")
        start, size = time.perf_counter(), self._program.cost.dealt
        if not 0 <= query < MAXIMUM_QUERY:
            raise QueryError(f"query number {query} is out of range")
        request = pb.DealRequest(session=self._id, query=query, proof=deal_proof(self._seed, self._id, query))
        buffer, filled = bytearray(size), 0
        with self._service.asking_the_dealer(f"sending the corrections of query {query}"):
            self._dealing = call = self._service.dealer.Deal(request, timeout=600)
            if not self._active():
                call.cancel()
            for chunk in call:
                filled += len(chunk.data)
                if filled > size:
                    call.cancel()
                    break
                buffer[filled - len(chunk.data) : filled] = chunk.data
        if filled != size:
            raise DealerError(f"the dealer sent {filled} bytes of corrections, the Program prescribes {size}")
        self._prepared[query] = split_corrections(self._program.circuit, buffer)
        seconds = time.perf_counter() - start
        self._doing = BETWEEN
        return pb.ServerMessage(prepared=pb.Prepared(query=query, bytes=size, seconds=seconds))

    def _query(self, query: int) -> Iterator[pb.ServerMessage]:
        self._burnt.burn(query)  # before anything else: whatever happens from now on, this number is used
        corrections = self._prepared.pop(query, None)
        self._prepared = {number: kept for number, kept in self._prepared.items() if number > query}  # burnt too
        if corrections is None:
            raise QueryError(f"query {query} was not prepared", "prepare it first; connect again to go on")
        program, recorder = self._program, Recorder("server")
        key = query_key(self._seed, "server", self._id, self._program.digest, query)
        correlations = Correlations(SERVER, key, corrections)
        step = execute(program.circuit, program.revealed, SERVER, correlations, self._model.weights, observer=recorder)

        def where() -> str:
            return program.paths[recorder.waiting] or "the model's input"

        recorder.start()
        for payload in Framed(step, lambda size: self._receive(size, where()) if size else b"", recorder):
            self._doing = f"query {query}, module '{where()}'"
            for frame in to_frames(payload) if payload else ():
                yield pb.ServerMessage(frame=frame)
        recorder.stop()
        log.info("query %d answered in %.2f s", query, recorder.timeline.seconds)
        self._doing = BETWEEN
        try:
            yield pb.ServerMessage(finished=pb.Finished(query=query))
        finally:  # after the last message, so that the client does not wait for it; also if the client leaves then
            self._keep(recorder.timeline, query)

    def _keep(self, timeline: Timeline, query: int) -> None:
        """Write the trace. If that fails, only the server's log says so: the client has its answer."""
        if self._service.traces is None:
            return
        try:
            path = self._service.traces.write(timeline, self._program, query, session_label(self._id))
        except Error as error:
            log.error("query %d left no trace: %s", query, str(error).replace("\n", "; "))
        else:
            log.info("query %d: trace in %s", query, path)

    def _receive(self, size: int, path: str) -> bytes:
        reader = FrameReader(size)
        while True:
            message = self._next(f"its message of module '{path}'")
            if message is None:
                raise PeerLost(f"the client ended the stream before its message of module '{path}'")
            if message.WhichOneof("content") != "frame":
                raise ProtocolError(f"a message {message.WhichOneof('content')!r} in the middle of a query")
            try:
                payload = reader.add(message.frame)
            except ValueError as error:
                raise ProtocolError(f"module '{path}': {error}") from None
            if payload is not None:
                return payload
