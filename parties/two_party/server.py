"""The server's service: it computes on shares with clients, one session for each.

The handler of a session drives the computation itself: it yields the frames of the circuit's rounds and reads the
client's frames, so there is no thread between the computation and the connection. An event loop would save the threads
of idle sessions, of which each has three; but steps of milliseconds must not run on it, so every one of a query's
hundreds of rounds would cross from the loop to a thread and back. And an idle session is cheap: 0.13 MB, or 0.36 MB
once it has asked a query (resident, measured with 100 of them). What bounds sessions is the memory of prepared queries
(``parties.limits.memory``) and the cores (``parties.limits.turns``).
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import grpc

from parties.limits.memory import DISK, Grant, PreparedMemory, disk_budget, memory_budget
from parties.limits.quotas import PREPARATIONS, QUERIES, Spend, unlimited
from parties.limits.seats import Seat, Seats
from parties.limits.turns import Turns
from parties.limits.waiting import FIRST, WaitingRoom
from parties.net.caller import Permissions, caller, permit
from parties.net.calls import failure, unexpected
from parties.net.frames import FrameReader, to_frames
from parties.net.versions import check_version
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import InferenceServicer
from parties.services.draining import going_away
from parties.services.repeating import Repeating
from parties.telemetry.events import Events, PhaseEnded, Reading
from parties.telemetry.logs import tagged
from parties.telemetry.names import query_id, session_label
from parties.traces.trace_file import TraceDirectory
from parties.two_party.conversations import Conversations, HeldConversation, Place, places_of
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.keys import MAXIMUM_PREPARED, MAXIMUM_STEPS, Burnt, Ratchet, proving_key
from parties.two_party.masked_model import MaskedModel
from parties.two_party.stocked import Stocked, memory_of, receive, receive_together, spooled_of
from protocols.circuit import Correlations, execute
from protocols.prg import fresh_seed
from protocols.protocol import SERVER
from protocols.steps import Framed
from secure.cost.timeline import Recorder, Timeline
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.two_party import CLIENT, TwoParty
from secure.errors import (
    LEAST_AFTER,
    Busy,
    Error,
    GoingAway,
    HandshakeError,
    PeerLost,
    ProtocolError,
    QueryError,
)
from secure.mpc.budget import PARTS
from secure.mpc.program import Program

log = logging.getLogger("unseen.server")

MAXIMUM_SESSIONS = 128  # at a time
CALLER_SESSIONS = 32  # of one caller with a name
STREAMS = MAXIMUM_SESSIONS + 32  # threads of the service, which also answers Describe and Download
MAXIMUM_GREETINGS = 8  # streams that have no session yet
BETWEEN = "between queries"
IDLE = 1800.0  # seconds that a client may keep its session between queries
SPARE = 60.0  # the same if the table of sessions is full and another client wants its place
RENEWING = 2.0  # seconds between the server's questions whether the dealer still knows its model
UNHEARD = 4096  # sessions whose end the dealer could not be told, and is told later


class InferenceService(InferenceServicer):
    """The service that answers sessions on masked models.

    models: each is registered at the dealer when the first client asks for it, the first of all at once; all of them at
    once if there is a store, which keeps queries of each ready. dealer: is closed with the service. deadline: seconds
    that a session waits for its client. traces: a directory for a timeline of every query, or None. spend: counts what
    callers use, and refuses what is beyond their quotas. memory: the budget of what sessions keep prepared; None: half
    of what the machine has to spare. disk: that of temporary files, for what is too large for memory; None: half of
    what is free there. turns: who computes when; None: as many queries as there are cores. stocked: queries that are
    dealt ahead, or None; it is closed with the service. events: hear of every phase of a query that ends.

    A stream gets one of the few sessions only after a valid handshake that the dealer has confirmed; until then it
    is in a waiting room, in which those of the caller who has the most give way to newer ones.
    """

    permissions: ClassVar[Permissions] = permit("Inference", Session=[CLIENT])

    def __init__(
        self,
        models: Sequence[MaskedModel],
        dealer: DealerPeer,
        *,
        deadline: float = 60.0,
        traces: TraceDirectory | None = None,
        spend: Spend = unlimited,
        memory: PreparedMemory | None = None,
        disk: PreparedMemory | None = None,
        turns: Turns | None = None,
        stocked: Stocked | None = None,
        events: Events | None = None,
    ) -> None:
        self.turns = turns or Turns()
        self.memory = memory or PreparedMemory(memory_budget(None))
        self.disk = disk or PreparedMemory(disk_budget(), *DISK)
        self.models = {(model.program.digest, model.weights_digest): model for model in models}
        self.deadline, self.traces = deadline, traces
        self.dealer, self.spend, self.stocked = dealer, spend, stocked
        self.events = events or Events()
        self.greetings = WaitingRoom(MAXIMUM_GREETINGS)
        self.sessions = Seats("the server", "sessions", MAXIMUM_SESSIONS, CALLER_SESSIONS)
        self._registered = dict[tuple[str, str], MaskedModel]()  # at the dealer, by names
        try:
            for model in models if stocked is not None else models[:1]:
                self.register(model)
        except BaseException:
            if stocked is not None:
                stocked.close()
            dealer.close()
            raise
        self.beside = ThreadPoolExecutor(MAXIMUM_SESSIONS, "beside")  # one a session at most
        self.readers = ThreadPoolExecutor(MAXIMUM_SESSIONS, "reader")  # likewise, between queries
        self.going = Future[None]()  # done when the service begins to end
        self._ended: deque[tuple[bytes, bytes]] = deque(maxlen=UNHEARD)  # sessions that the dealer still has
        self._renewing = Repeating(RENEWING, self.renew, log)

    def drain(self) -> None:
        """End every session before its next query."""
        if not self.going.done():
            self.going.set_result(None)

    def readings(self) -> Iterator[Reading]:
        """Yield the numbers of this service at this moment."""
        yield from self.sessions.readings()
        yield from self.memory.readings("memory")
        yield from self.disk.readings("disk")
        yield Reading("unseen_models", "Models, of each length and batch, that are served.", len(self.models))
        if self.stocked is not None:
            yield from self.stocked.readings()

    def close(self) -> None:
        """Close the channel to the dealer."""
        self._renewing.close()
        for pool in (self.beside, self.readers):
            pool.shutdown(wait=False, cancel_futures=True)
        if self.stocked is not None:
            self.stocked.close()
        self.dealer.close()

    def register(self, model: MaskedModel) -> None:
        """Send a Program and the sealed mask seed to the dealer. Raises DealerError."""
        dealers_store = self.dealer.register(model.program, model.mask_seed)
        self._registered[model.program.digest, model.weights_digest] = model
        if self.stocked is not None and not model.program.keeps:  # masks of rows are kept for one conversation
            self.stocked.serve(model, dealers_store)

    def offer(self, program_digest: str, weights_digest: str) -> None:
        """Register a model for a client that is about to open a session with it. Raises DealerError."""
        names = program_digest, weights_digest
        if names not in self._registered:
            self.register(self.models[names])

    def renew(self) -> None:
        """Keep models registered, or register them again with a dealer that was restarted. Raises DealerError."""
        failed: Error | None = None
        for model in list(self._registered.values()):
            try:
                if not self.dealer.renew(model.program, model.mask_seed):
                    self.register(model)
                    log.info("registered the Program again: the dealer did not know it")
            except Error as error:
                failed = failed or error  # the others are renewed all the same
        self._tell_ended()
        if failed is not None:
            raise failed

    def _tell_ended(self) -> None:
        """Tell the dealer of sessions whose end it has not heard, until it does not hear, or RENEWING seconds are over.

        The next renewal must not wait for it: by that the dealer hears that this process lives.
        """
        until = time.monotonic() + RENEWING
        while self._ended and time.monotonic() < until:
            session = self._ended.popleft()
            if not self.dealer.end(*session):
                self._ended.appendleft(session)
                return

    def end(self, session: bytes, proving: bytes) -> None:
        """Tell the dealer that a session has ended: now, or when it is renewed if it cannot be reached."""
        if not self.dealer.end(session, proving):
            self._ended.append((session, proving))

    def meant(self, program_digest: str, weights_digest: str) -> MaskedModel:
        """Return the model of these names; any other if there is none, whose names then differ."""
        first = next(iter(self.models.values()))
        same = next((m for m in self.models.values() if m.program.digest == program_digest), first)
        return self.models.get((program_digest, weights_digest), same)

    def Session(
        self, requests: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        session = _Session(self, requests, context)
        try:
            yield from session.watch.sending(session.run())
        finally:
            session.close()


@dataclass(frozen=True, eq=False, repr=False)  # holds masks
class _PreparedQuery:
    """A query whose correlations are there. conversation: that in which it stands, at ``place``."""

    model: MaskedModel
    correlations: Correlations
    place: Place | None = None
    conversation: HeldConversation | None = None


class _Session:
    """One client's session on its stream."""

    def __init__(
        self, service: InferenceService, requests: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> None:
        self._service, self._requests = service, requests
        self._caller, self._context = caller(context), context
        self._who = str(self._caller)
        self._prepared: dict[int, _PreparedQuery] = {}
        self._conversations = Conversations()
        self._grants: dict[int, list[tuple[PreparedMemory, Grant]]] = {}  # of what is prepared, and the query that runs
        self._burnt = Burnt()
        self._keys: Ratchet | None = None
        self._id, self._proving, self._label = b"", b"", ""
        self._doing = "the handshake"
        self._dealing: grpc.Call | None = None
        self._coming: Future[None] | None = None  # a query that is prepared while another runs
        self._said = deque[pb.ServerMessage]()  # by the thread that prepares it
        self._seat: Seat | None = None
        self.watch = Watchdog(service.deadline, context.cancel)
        context.add_callback(self._give_up_dealing)

    def close(self) -> None:
        """End the session: forget its keys, have the dealer forget it, and give its place back."""
        self.watch.stop()
        self._prepared.clear()
        self._conversations.clear()
        if self._seat is not None:
            for budget in (self._service.memory, self._service.disk):
                budget.leave(self._seat)
            self._service.sessions.give_back(self._seat)
        if self._keys is not None:
            self._keys.erase()
            self._service.end(self._id, self._proving)

    def _give_up_dealing(self) -> None:
        if self._dealing is not None:
            self._dealing.cancel()

    def run(self) -> Iterator[pb.ServerMessage]:
        """Yield all messages to this client; a failure is the last one."""
        try:
            yield from self._run()
        except Error as error:
            level = logging.INFO if isinstance(error, GoingAway) else logging.WARNING
            log.log(level, "session of %s ended: %s", self._who, str(error).splitlines()[0], extra=self._about())
            yield pb.ServerMessage(failure=failure(error))
        except GeneratorExit:
            late = "did not read in time" if self.watch.fired else "is gone"
            level = logging.INFO if self._doing == BETWEEN else logging.WARNING
            log.log(level, "session of %s ended: the client %s (%s)", self._who, late, self._doing, extra=self._about())
            raise
        except Exception as error:
            unexpected(error, log)
            message = f"internal error ({self._doing})"
            yield pb.ServerMessage(failure=pb.Failure(code=Error.code, message=message))

    def _about(self) -> dict[str, Any]:
        """Return what a log line says of this session."""
        return tagged(session=self._label)

    def _run(self) -> Iterator[pb.ServerMessage]:
        with self._service.greetings.place(self._context):
            first = self._next("the handshake", min(FIRST, self._service.deadline))
            if first is None:
                return
            self._greet(first)
            self._seat = self._service.sessions.take(self._caller.name, self._context.cancel)
        yield pb.ServerMessage(welcome=pb.Welcome(stored=self._service.stocked is not None))
        self._doing = BETWEEN
        while (message := self._next_or_gone()) is not None:
            kind = message.WhichOneof("content")
            if kind == "prepare":
                self._doing = f"preparing query {message.prepare.query}"
                yield from self._admitted(message.prepare)
            elif kind == "query":
                self._doing = f"query {message.query.query}"
                try:
                    yield from self._query(message.query.query)
                finally:
                    self._give_back(message.query.query)
                if self._coming is not None:
                    self._doing = "preparing a query beside another"
                    coming, self._coming = self._coming, None
                    coming.result()
                    yield from self._news()
            else:
                raise ProtocolError(f"a message {kind!r} where 'prepare' or 'query' was expected")
            self._doing = BETWEEN

    def _next(self, what: str, seconds: float | None = None) -> pb.ClientMessage | None:
        """Return the client's next message; None if it has ended the stream. Raises PeerLost."""
        try:
            with self.watch.guard(seconds):
                message = next(self._requests, None)
        except Error:
            raise
        except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
            late = " in time" if self.watch.fired else ""
            raise PeerLost(f"the client did not send {what}{late} ({type(error).__name__})") from None
        if message is None and self.watch.fired:
            raise PeerLost(f"the client did not send {what} in time")
        return message

    def _next_or_gone(self) -> pb.ClientMessage | None:
        """Return the next message between queries, when a client may wait for long; None if it has left in any way.

        A thread beside reads it, because the service may begin to end meanwhile. Raises GoingAway then.
        """
        assert self._seat is not None
        self._seat.rest(SPARE)
        coming: Future[pb.ClientMessage | None] = self._service.readers.submit(next, self._requests, None)
        either: list[Future[Any]] = [coming, self._service.going]
        done, _ = wait(either, IDLE, FIRST_COMPLETED)
        self._seat.work()
        if self._service.going in done:
            raise going_away("this server")
        late = coming not in done
        if late:
            self._context.cancel()
        try:
            message = coming.result()
        except Error:
            raise
        except Exception:  # gRPC raises bare Exception subclasses when the stream breaks
            message = None
        if message is None:  # a stream that is cancelled here may end like one that the client has ended
            gone = "was idle, and made room for another," if self._seat.gone else "was idle too long"
            log.info("%s %s between queries", self._who, gone if late or self._seat.gone else "left")
        return message

    def _greet(self, message: pb.ClientMessage) -> None:
        if message.WhichOneof("content") != "hello":
            raise HandshakeError("the session does not begin with a handshake")
        hello = message.hello
        check_version("the client", hello.version, "this server")
        self._model = self._service.meant(hello.program_digest, hello.weights_digest)
        program = self._model.program
        fixed = json.dumps(program.fixed.as_dict(), sort_keys=True)
        for what, theirs, ours in (
            ("deployment", hello.deployment, TwoParty.name),
            ("fixed point", hello.fixed_point, fixed),
            ("Program digest", hello.program_digest, program.digest),
            ("weights digest", hello.weights_digest, self._model.weights_digest),
        ):
            if not hmac.compare_digest(theirs.encode(), ours.encode()):
                raise HandshakeError(
                    f"{what}: the client has {theirs[:64]!r}, this server {ours[:64]!r}",
                    "connect again to fetch the server's Program",
                )
        session, seed = hello.session, fresh_seed()
        self._service.dealer.join(session, program.digest, self._model.weights_digest, self._model.mask_seed, seed)
        self._id, self._proving, self._label = session, proving_key(seed), session_label(session)
        self._keys = Ratchet(seed, "server", session, program.digest)

    def _admitted(self, asked: pb.Prepare) -> Iterator[pb.ServerMessage]:
        """Prepare queries when there is memory for them, else say that the server is busy.

        In the latter case nothing has happened to their numbers: they are burnt neither here nor at the dealer.
        """
        assert self._seat is not None
        query, place = asked.query, Place.of(asked)
        model = self._beside(place)
        places = places_of(asked, model.program)
        grants = list[tuple[PreparedMemory, Grant]]()
        memory, spooled = self._service.memory, spooled_of(model.program)
        kept = PARTS * model.program.kept_bytes if place is not None and place.begins else 0
        wanted = [(memory, memory_of(model.program)), (self._service.disk, spooled), (memory, kept)]
        if kept:
            self._conversations.make_room()  # the memory of the oldest goes to the new one
        if spooled and (grant := memory.take_spare(self._seat, spooled)) is not None:
            grants, wanted, spooled = [(memory, grant)], [(memory, kept)], 0
        try:
            for budget, size in wanted:
                if size:
                    grants.append((budget, budget.take(self._seat, size, self._context.is_active)))
            for _ in places[1:]:  # nobody waits for the memory of more than one
                if (grant := memory.take_spare(self._seat, memory_of(model.program))) is None:
                    raise Busy(f"no memory for {len(places)} queries together", "ask for one", after=LEAST_AFTER)
                grants.append((memory, grant))
        except Busy as error:
            for budget, grant in grants:
                budget.give_back(grant)
            named = tagged(query=query_id(self._label, query))
            log.info("%s: query %d was put off: %s", self._who, query, str(error).splitlines()[0], extra=named)
            yield pb.ServerMessage(failure=failure(error, goes_on=True))
            return
        conversation: HeldConversation | None = None
        if place is not None:
            self._make_room(len(places))
            if place.begins:
                end = partial(memory.give_back, grants.pop()[1])
                conversation = self._conversations.begin(query, model.program, end)
            else:
                conversation = self._conversations.find(place)
        for i in range(len(places) - 1, 0, -1):  # the memory of each query is given back with it
            self._grants[query + i] = [grants.pop()]
        self._grants[query] = grants
        yield from self._prepare(query, model, places, conversation, whole=not spooled)

    def _beside(self, place: Place | None) -> MaskedModel:
        """Return the model that queries at a place compute. Raises QueryError if it is not the session's."""
        if place is None:
            return self._model
        found = self._service.models.get((place.program_digest, self._model.weights_digest))
        if found is None:
            raise QueryError("a conversation goes on with another model", "connect again")
        return found

    def _make_room(self, count: int) -> None:
        """Drop the prepared queries that a conversation has left behind: whoever writes texts prepares steps ahead."""
        while len(self._prepared) > MAXIMUM_STEPS - count:
            dropped = min(self._prepared)
            del self._prepared[dropped]
            for budget, grant in self._grants.pop(dropped, ()):
                budget.give_back(grant)

    def _admitted_beside(self, asked: pb.Prepare) -> None:
        for message in self._admitted(asked):
            self._said.append(message)

    def _news(self, *kinds: str) -> Iterator[pb.ServerMessage]:
        """Yield what the preparation beside a query has said by now. kinds: only as far as it is of these."""
        while self._said and (not kinds or self._said[0].WhichOneof("content") in kinds):
            yield self._said.popleft()

    def _give_back(self, query: int) -> None:
        """Give back the memory of a query that has ended, and of those before it, which are burnt with it."""
        for number in [number for number in list(self._grants) if number <= query]:  # a thread beside may add one
            for budget, grant in self._grants.pop(number):
                budget.give_back(grant)

    def _prepare(
        self,
        query: int,
        model: MaskedModel,
        places: Sequence[Place],
        conversation: HeldConversation | None,
        whole: bool,
    ) -> Iterator[pb.ServerMessage]:
        """Take a query from the store, or fetch its corrections from the dealer; the dealer burns the number in either
        case, so that it gets correlations only once.

        places: those of the query and of others behind it that are dealt together. With a store, the client first hears
        which correlations they are, so that it can compute its half meanwhile. whole: they are held in memory as a
        whole.
        """
        if not places and len(self._prepared) >= MAXIMUM_PREPARED:
            raise QueryError(f"{MAXIMUM_PREPARED} queries are prepared already, which is the limit", "run one first")
        assert self._keys is not None
        program, start = model.program, time.perf_counter()
        count, stocked, assignment = max(1, len(places)), self._service.stocked, None
        self._service.spend(self._caller, PREPARATIONS, count)  # also those that the client then drops
        keys = [self._keys.key(query + i, *place) for i, place in enumerate(places or [()])]
        if stocked is not None and not places:
            assignment = stocked.assign(model, self._id, query, self._proving)
        if stocked is not None:
            said = assignment.said if assignment is not None else pb.Assigned(query=query)
            yield pb.ServerMessage(assigned=said)
        size = program.cost.dealt
        if assignment is not None:
            correlations = [assignment.correlations(program.circuit, whole)]
        elif count > 1:
            correlations = receive_together(program.circuit, keys, size, self._dealt(query, places))
        else:
            correlations = [receive(program.circuit, keys[0], size, self._dealt(query, places), whole)]
        for i, found in enumerate(correlations):
            self._prepared[query + i] = _PreparedQuery(model, found, places[i] if places else None, conversation)
        seconds = time.perf_counter() - start
        named = query_id(self._label, query)
        self._service.events.ended(PhaseEnded(OFFLINE, seconds, named, received=count * size, count=count))
        yield pb.ServerMessage(prepared=pb.Prepared(query=query, bytes=count * size, seconds=seconds))

    def _dealt(self, query: int, places: Sequence[Place]) -> Iterator[bytes]:
        """Yield the corrections of queries as they come from the dealer. Raises DealerError."""
        with self._service.dealer.asking(f"sending the corrections of query {query}"):
            self._dealing = call = self._service.dealer.deal(self._id, query, self._proving, places)
            try:
                if not self._context.is_active():
                    call.cancel()
                yield from call
            finally:
                call.cancel()  # does nothing if everything came

    def _query(self, query: int) -> Iterator[pb.ServerMessage]:
        self._service.spend(self._caller, QUERIES, 1)
        self._burnt.burn(query)  # before anything else: whatever happens from now on, this number is used
        ready = self._prepared.pop(query, None)
        self._prepared = {number: kept for number, kept in self._prepared.items() if number > query}  # burnt too
        if ready is None:
            raise QueryError(f"query {query} was not prepared", "prepare it first; connect again to go on")
        program, recorder = ready.model.program, Recorder("server")
        given = dict[str, Any]()
        if ready.conversation is not None and ready.place is not None:
            given = ready.conversation.given(ready.place, program)
        outputs = (*program.revealed, *program.keeps.values()) if ready.conversation is not None else program.revealed
        weights = ready.model.weights
        step = execute(program.circuit, outputs, SERVER, ready.correlations, weights, given, recorder)

        def where() -> str:
            return program.paths[recorder.waiting] or "the model's input"

        assert self._seat is not None
        stocked = self._service.stocked
        running = stocked.query() if stocked is not None else nullcontext()
        with running, self._service.turns.query(self._caller.name or self._seat.number) as turn:

            def receive(size: int) -> bytes:
                came = self._receive(size, where()) if size else b""
                turn.begin()
                return came

            recorder.start()
            turn.begin()
            frames = Framed(step, receive, recorder)
            for payload in frames:
                turn.end()  # before anything is sent: nobody keeps a turn while it waits for a client
                self._doing = f"query {query}, module '{where()}'"
                yield from self._news("assigned")
                for frame in to_frames(payload) if payload else ():
                    yield pb.ServerMessage(frame=frame)
            recorder.stop()
        if ready.conversation is not None and ready.place is not None:
            ready.conversation.keep(ready.place, program, frames.result)
        named = tagged(query=query_id(self._label, query))
        log.info("query %d answered in %.2f s", query, recorder.timeline.seconds, extra=named)
        self._doing = BETWEEN  # a client that leaves as soon as it has its answer leaves between queries
        try:
            yield pb.ServerMessage(finished=pb.Finished(query=query))
        finally:  # after the last message, so that the client does not wait for it; also if the client leaves then
            self._tell(recorder.timeline, program, query)
            self._keep(recorder.timeline, program, query)

    def _tell(self, timeline: Timeline, program: Program, query: int) -> None:
        """Tell of a query that was answered."""
        moved, named = timeline.total, query_id(self._label, query)
        rounds = len(timeline.rounds)
        self._service.events.ended(
            PhaseEnded(
                *(ONLINE, timeline.seconds, named, rounds, moved.sent, moved.received),
                timeline=timeline,
                paths=program.paths,
            )
        )

    def _keep(self, timeline: Timeline, program: Program, query: int) -> None:
        """Write the trace. If that fails, only the server's log says so: the client has its answer."""
        if self._service.traces is None:
            return
        named = tagged(query=query_id(self._label, query))
        try:
            path = self._service.traces.write(timeline, program, query, self._label)
        except Error as error:
            log.error("query %d left no trace: %s", query, str(error).replace("\n", "; "), extra=named)
        else:
            log.info("query %d: trace in %s", query, path, extra=named)

    def _receive(self, size: int, path: str) -> bytes:
        reader = FrameReader(size)
        while True:
            message = self._next(f"its message of module '{path}'")
            if message is None:
                raise PeerLost(f"the client ended the stream before its message of module '{path}'")
            if message.WhichOneof("content") == "prepare" and self._coming is None:
                self._coming = self._service.beside.submit(self._admitted_beside, message.prepare)
                continue
            if message.WhichOneof("content") != "frame":
                raise ProtocolError(f"a message {message.WhichOneof('content')!r} in the middle of a query")
            try:
                payload = reader.add(message.frame)
            except ValueError as error:
                raise ProtocolError(f"module '{path}': {error}") from None
            if payload is not None:
                return payload
