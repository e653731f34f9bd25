"""The dealer's service: it hands out correlated randomness, and sees no input, no weight and no share.

It learns Programs (public), the weight-mask seed of every registered model, the seeds of both parties of every
session, and both keys of every query that it deals ahead. Together with either party's messages these would show
everything, so the dealer must not collude with either party. Seeds come sealed to its key. It forgets a query's seeds
when it has dealt the query, a session when that ends, and a mask when no server renews it. Of a query that it deals
ahead it keeps the client's key until that is assigned, and of a text the masks of its rows until its session ends.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import grpc

from parties.limits.memory import PreparedMemory, memory_budget
from parties.limits.quotas import PREPARATIONS, Spend, unlimited
from parties.limits.seats import Seat, Seats
from parties.limits.waiting import Places
from parties.net.caller import Caller, Permissions, caller, permit
from parties.net.calls import answering
from parties.net.frames import to_chunks
from parties.net.versions import check_version
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import DealerServicer
from parties.services.dealing import Dealing, DealingHere, DealtModel
from parties.store.entries import ENTRY_BYTES, Store
from parties.store.memory import MemoryStore
from parties.telemetry.events import Events, PhaseEnded, Reading
from parties.telemetry.logs import tagged
from parties.telemetry.names import query_id, session_label
from parties.two_party.assigned import MODEL_ENTRIES, ClientKeys
from parties.two_party.conversations import Conversations, Place, places_of
from parties.two_party.keys import (
    PROCESS_BYTES,
    SESSION_BYTES,
    Ratchet,
    assign_proof,
    close_proof,
    deal_proof,
    entry_proving_key,
    join_proof,
    mask_key,
    model_name,
    new_session,
    proving_key,
    renew_proof,
    seal_client_key,
    server_entry_key,
    stock_proof,
)
from parties.two_party.sealing import SealingKey, answer_proof
from protocols.prg import KEY_BYTES, Key
from secure.cost.traffic import OFFLINE
from secure.deployments.two_party import CLIENT, SERVER
from secure.errors import Error, HandshakeError, InvalidProgram, ProtocolError, QueryError, StoreError
from secure.mpc.budget import Budget
from secure.mpc.program import Program

log = logging.getLogger("unseen.dealer")

# All that the dealer keeps at a time, and of it for one caller; callers without certificates count as one, which may
# have all. Only what is idle makes room for others.
MAXIMUM_MODELS, CALLER_MODELS = 128, 64  # a model counts once for each length and batch
MAXIMUM_SESSIONS, CALLER_SESSIONS = 4096, 256
MAXIMUM_DEALS, CALLER_DEALS = 24, 16  # fewer than the threads of the service, which also answers Open and Join
MAXIMUM_PROGRAM = 1 << 20  # bytes; that of BERT-base at 512 tokens has a third of it
LARGEST = MAXIMUM_PROGRAM + (16 << 10)  # bytes of a message

READING = 30.0  # seconds that a server may take to read one part of its corrections, of 1 MB
UNJOINED = 60.0  # seconds after which a session is idle that no server has joined
UNUSED = 3600.0  # the same for one that asks for nothing; a server ends its own after half of that
UNHEARD = 60.0  # seconds after which the sessions of a server's process end that renews nothing any more
LOOKING = 1.0  # seconds between two looks for such sessions
QUIET = 3.0  # seconds without a new query after which a dealer that is being stopped is not needed any more
LEASE = 120.0  # the same for a model that has no session and that its server does not renew


@dataclass(eq=False)
class _RegisteredModel:
    program: Program
    weights_digest: str
    dealt: DealtModel = field(repr=False)
    mask_seed: bytes = field(repr=False)
    seat: Seat = field(repr=False)
    sessions: int = 0


@dataclass(eq=False)
class _DealtSession:
    model: _RegisteredModel
    opener: Caller
    seat: Seat = field(repr=False)
    client: Ratchet = field(repr=False)
    server: Ratchet | None = field(default=None, repr=False)
    process: bytes = b""  # that of the server
    proving: bytes = field(default=b"", repr=False)
    conversations: Conversations = field(default_factory=Conversations, repr=False)
    conversing: threading.Lock = field(default_factory=threading.Lock, repr=False)


_Keys = tuple[Key, Key]
_Half = tuple[Key, bytes]  # of an entry: the client's key, and that by which its server shows itself


class DealerService(DealerServicer):
    """The dealer. Its models and sessions are in memory: once restarted it knows no session, so it deals none twice.

    spend: counts what callers use, and refuses what is beyond their quotas. budget: the most that one Program may take;
    a larger one is not registered. dealing: where corrections are computed; it is not closed here. store: where it
    keeps the clients' keys of entries; None: in memory, so that the entries which servers keep are lost with the
    process. events: hear of every query that is dealt.
    """

    permissions: ClassVar[Permissions] = permit(
        "Dealer",
        Key=[CLIENT, SERVER],
        Register=[SERVER],
        Renew=[SERVER],
        Open=[CLIENT],
        Join=[SERVER],
        Deal=[SERVER],
        Stock=[SERVER],
        Assign=[SERVER],
        Close=[SERVER],
    )

    def __init__(
        self,
        key: SealingKey,
        spend: Spend = unlimited,
        budget: Budget | None = None,
        dealing: Dealing | None = None,
        store: Store | None = None,
        events: Events | None = None,
    ) -> None:
        self._events = events or Events()
        self._key, self._spend, self._lock = key, spend, threading.Lock()
        self._dealing = dealing or DealingHere()
        self._budget = budget or Budget()
        self._models: dict[tuple[str, str], _RegisteredModel] = {}
        self._sessions: dict[bytes, _DealtSession] = {}
        self._heard: dict[bytes, float] = {}  # by process of a server with sessions: when it last asked
        self._looked = time.monotonic()  # when it was last looked which processes are not heard of any more
        self.models = Seats("the dealer", "models", MAXIMUM_MODELS, CALLER_MODELS)
        self.sessions = Seats("the dealer", "sessions", MAXIMUM_SESSIONS, CALLER_SESSIONS)
        self._asked_at = -QUIET
        self.deals = Places(MAXIMUM_DEALS, CALLER_DEALS, "the dealer", "queries being dealt")
        room = memory_budget(None)
        self.kept = PreparedMemory(room, "memory for kept masks", "give its machine more", "the dealer")
        self.entries = ClientKeys(store or MemoryStore(), MAXIMUM_MODELS * MODEL_ENTRIES)

    def sweep(self) -> None:
        """Forget all that is idle: sessions, then the masks of models that nobody uses, and entries that are old."""
        self._sweep_sessions()
        self.models.sweep()
        self.entries.sweep()

    def _sweep_sessions(self) -> None:
        """End sessions that are idle, and those of a server's process that is not heard of any more."""
        self.sessions.sweep()
        with self._lock:
            now, joined = time.monotonic(), {s.process for s in self._sessions.values() if s.process}
            if now - self._looked > UNHEARD:  # this process stood still, and could hear nobody
                self._heard = dict.fromkeys(self._heard, now)
            self._looked = now
            self._heard = {p: at for p, at in self._heard.items() if p in joined and now - at < UNHEARD}
            left = [token for token, s in self._sessions.items() if s.process and s.process not in self._heard]
        for token in left:
            self._end(token)
        if left:
            log.info("ended %d sessions of a server that is not heard of any more", len(left))

    def close(self) -> None:
        """Close the store of entries."""
        self.entries.close()

    def readings(self) -> Iterator[Reading]:
        """Yield the numbers of this service at this moment."""
        yield from self.sessions.readings()
        yield from self.models.readings()
        yield from self.deals.readings()
        yield from self.kept.readings("kept masks")
        yield Reading("unseen_assignable_queries", "Queries dealt ahead whose keys are here.", len(self.entries))

    def is_asked(self) -> bool:
        """Tell whether sessions have asked for corrections in the last QUIET seconds."""
        return time.monotonic() - self._asked_at < QUIET

    def Key(self, request: pb.DealerKeyRequest, context: grpc.ServicerContext) -> pb.DealerKeyReply:
        return pb.DealerKeyReply(key=self._key.public.encoded)

    # models

    def knows(self, program_digest: str) -> bool:
        """Tell whether a Program is registered, by its digest."""
        with self._lock:
            return any(program_digest == digest for digest, _ in self._models)

    def Register(self, request: pb.RegisterRequest, context: grpc.ServicerContext) -> pb.RegisterReply:
        with answering(context, log):
            return self._register(request, caller(context))

    def _register(self, request: pb.RegisterRequest, who: Caller) -> pb.RegisterReply:
        if len(request.program) > MAXIMUM_PROGRAM:
            raise ProtocolError(f"a Program of {len(request.program)} bytes, {MAXIMUM_PROGRAM} at most")
        digest = hashlib.sha256(request.program).hexdigest()
        seed = self._key.open(request.sealed, "register", digest)
        name = model_name(seed)  # which nobody else can register, because it takes the seed
        key = (digest, name)
        with self._lock:
            known = self._models.get(key)
        if known is None:
            program = _decoded(request.program, self._budget)
            seat = self.models.take(who.name, lambda: self._forget(key))
            seat.rest(LEASE)
            with self._lock:
                beside = next((model for (_, other), model in self._models.items() if other == name), None)
                dealt = _dealt(program, mask_key(seed, name), beside)
                known = self._models.setdefault(key, _RegisteredModel(program, name, dealt, seed, seat))
            if known.seat is not seat:  # it was registered in between
                self.models.give_back(seat)
            self._dealing.expect(known.dealt)
            log.info("registered program %s with weights %s", digest[:12], name[:12])
        store = self.entries.name
        return pb.RegisterReply(
            program_digest=digest,
            weights_digest=name,
            proof=answer_proof(seed, request.sealed, digest, name, store),
            store=store,
        )

    def _forget(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._models.pop(key, None)
        log.info("forgot program %s with weights %s, which no server renews", key[0][:12], key[1][:12])

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewReply:
        with answering(context, log):
            self.models.sweep()
            key = (request.program_digest, request.weights_digest)
            with self._lock:
                model = self._models.get(key)
                if model is None:
                    return pb.RenewReply()
                if not hmac.compare_digest(renew_proof(model.mask_seed, "server", request.nonce, *key), request.proof):
                    raise HandshakeError("only the server of this model can renew it")
                if not model.sessions:
                    model.seat.rest(LEASE)
            self._hear(request.process)
            if time.monotonic() - self._looked > LOOKING:
                self._sweep_sessions()
            return pb.RenewReply(proof=renew_proof(model.mask_seed, "dealer", request.nonce, *key))

    def _hear(self, process: bytes) -> None:
        """Note that a process asked for something, if it has sessions. It has shown that it is a server."""
        with self._lock:
            if process in self._heard:
                self._heard[process] = time.monotonic()

    # sessions

    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        with answering(context, log):
            check_version("the client", request.version, "this dealer")
            return self._open(request, caller(context))

    def _open(self, request: pb.OpenRequest, who: Caller) -> pb.OpenReply:
        key, session = (request.program_digest, request.weights_digest), new_session()
        with self._lock:
            known = key in self._models
        if not known:
            return pb.OpenReply()
        seed = self._key.open(request.sealed, "open", request.version, *key)
        seat = self.sessions.take(who.name, lambda: self._end(session))
        seat.rest(UNJOINED)
        ratchet = Ratchet(seed, "client", session, request.program_digest)
        with self._lock:
            model = self._models.get(key)
            if model is not None:
                model.sessions += 1
                model.seat.work()
                self._sessions[session] = _DealtSession(model, who, seat, ratchet)
        if model is None:  # it was forgotten in between
            self.sessions.give_back(seat)
            return pb.OpenReply()
        return pb.OpenReply(session=session, proof=answer_proof(seed, request.sealed, session))

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:
        with answering(context, log):
            session, token = self._session(request.session), request.session
            agreed = (session.model.program.digest, session.model.weights_digest)
            if (request.program_digest, request.weights_digest) != agreed:
                raise HandshakeError("the session was opened for another Program or other weights", "connect again")
            seed = self._key.open(request.sealed, "join", token, *agreed)
            if not hmac.compare_digest(join_proof(session.model.mask_seed, token, *agreed, seed), request.proof):
                raise HandshakeError("only the server of this model can join its sessions")
            with self._lock:
                if session.server is not None:  # a second seed would pair one client's masks with two of the server's
                    raise ProtocolError("the session was already joined", "connect again")
                session.server = Ratchet(seed, "server", token, session.model.program.digest)
                session.proving = proving_key(seed)
                session.seat.rest(UNUSED)
                if len(request.process) == PROCESS_BYTES:
                    session.process = request.process
                    self._heard[request.process] = time.monotonic()
            return pb.JoinReply(proof=answer_proof(seed, request.sealed, token))

    def Close(self, request: pb.CloseRequest, context: grpc.ServicerContext) -> pb.CloseReply:
        with answering(context, log):
            session = self._session(request.session)
            if not hmac.compare_digest(close_proof(_joined(session), request.session), request.proof):
                raise QueryError("only the server that joined the session can end it")
            self._end(request.session)
            return pb.CloseReply()

    def _end(self, token: bytes) -> None:
        """Erase a session; harmless if it is gone."""
        with self._lock:
            session = self._sessions.pop(token, None)
            if session is None:
                return
            session.model.sessions -= 1
            if not session.model.sessions:
                session.model.seat.rest(LEASE)
        self.kept.leave(session.seat)
        self.sessions.give_back(session.seat)
        session.client.erase()
        if session.server is not None:
            session.server.erase()

    # corrections

    def Deal(self, request: pb.DealRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk | bytes]:
        watch = Watchdog(READING, context.cancel)
        try:
            with answering(context, log):
                give_back = self.deals.take(caller(context))
                try:
                    yield from watch.sending(self._deal(request))
                finally:
                    give_back()
        finally:
            watch.stop()

    def _deal(self, request: pb.DealRequest) -> Iterator[bytes]:
        session, query, place = self._session(request.session), request.query, Place.of(request)
        about = (*place, request.steps) if place is not None else ()
        if not hmac.compare_digest(deal_proof(_joined(session), request.session, query, *about), request.proof):
            raise QueryError("only the server that joined the session gets its corrections")
        self._hear(session.process)
        session.seat.work()
        self._asked_at = time.monotonic()
        try:
            start = time.perf_counter()
            model = session.model if place is None else self._model_at(session, place)
            if place is None:
                places_of(request, session.model.program)
                server, client = self._burn(session, query)
                yield from to_chunks(self._dealing.corrections(session.model.dealt, server, client))
            else:
                yield from to_chunks(self._conversed(session, request, place, model))
            seconds, named = time.perf_counter() - start, query_id(session_label(request.session), query)
            log.info("dealt query %d of a session in %.2f s", query, seconds, extra=tagged(query=named))
            count = 1 if place is None else max(1, request.steps)
            dealt = count * model.program.cost.dealt
            self._events.ended(PhaseEnded(OFFLINE, seconds, named, sent=dealt, count=count))
        finally:
            session.seat.rest(UNUSED)

    def _burn(self, session: _DealtSession, query: int, *place: str | int) -> _Keys:
        """Burn a query's number, and return the keys of server and client. Raises QueryError, QuotaError."""
        assert session.server is not None
        self._spend(session.opener, PREPARATIONS, 1)  # also those that the client then drops
        return session.server.key(query, *place), session.client.key(query, *place)

    def _model_at(self, session: _DealtSession, place: Place) -> _RegisteredModel:
        """Return the model of a query that stands in a conversation. Raises QueryError if it is not known."""
        with self._lock:
            model = self._models.get((place.program_digest, session.model.weights_digest))
        if model is None:
            raise QueryError("a conversation needs another Program, which the dealer does not know", "connect again")
        return model

    def _conversed(
        self, session: _DealtSession, request: pb.DealRequest, place: Place, model: _RegisteredModel
    ) -> Iterator[memoryview]:
        """Yield the corrections of queries of a conversation, the first at ``place``, and keep the masks of their rows.

        Nothing else of the query is kept: from the masks of rows nobody computes another mask.
        """
        query, places = request.query, places_of(request, model.program)
        if not session.conversing.acquire(blocking=False):
            raise QueryError("the dealer deals one query of a session's conversations at a time")
        try:
            if place.begins:
                keys = [self._burn(session, query, *place)]  # before memory is taken: what is refused holds none
                session.conversations.make_room()
                grant = self.kept.take(session.seat, model.program.kept_bytes)
                found = session.conversations.begin(place.first, model.program, partial(self.kept.give_back, grant))
            else:
                found = session.conversations.find(place)
                found.at(place)
                keys = [self._burn(session, query + i, *each) for i, each in enumerate(places)]
            yield from model.dealt.conversed(keys, found.kept, place.rows)
        finally:
            session.conversing.release()

    # entries: queries that are dealt before a client comes

    def Stock(self, request: pb.StockRequest, context: grpc.ServicerContext) -> Iterator[pb.StockPart | bytes]:
        watch = Watchdog(READING, context.cancel)
        try:
            with answering(context, log):
                give_back = self.deals.take(caller(context))
                try:
                    yield from watch.sending(self._stock(request))
                finally:
                    give_back()
        finally:
            watch.stop()

    def _stock(self, request: pb.StockRequest) -> Iterator[pb.StockPart | bytes]:
        """Deal a query under two fresh keys. The client's is kept once the server has everything; it says so last.

        The corrections are what ``Deal`` sends, masked by the client's key, which the server never learns. A request
        that somebody sends once more gets an entry of its own, whose server's key differs too.
        """
        names = (request.program_digest, request.weights_digest)
        with self._lock:
            model = self._models.get(names)
        if model is None:
            raise Error("the dealer does not know this model", "the server registers it again within seconds")
        seed = self._key.open(request.sealed, "stock", *names)
        if not hmac.compare_digest(stock_proof(model.mask_seed, *names, seed), request.proof):
            raise HandshakeError("only the server of this model gets its entries")
        entry, client = secrets.token_bytes(ENTRY_BYTES), Key(secrets.token_bytes(KEY_BYTES))
        start = time.perf_counter()
        yield pb.StockPart(start=pb.StockStart(entry=entry, proof=answer_proof(seed, request.sealed, entry)))
        server = server_entry_key(seed, *names, entry)
        yield from to_chunks(self._dealing.corrections(model.dealt, server, client), pb.StockPart.DATA_FIELD_NUMBER)
        with self._lock:
            served = list(self._models)
        self.entries.keep(names, entry, client, entry_proving_key(seed, entry), served)
        seconds = time.perf_counter() - start
        log.debug("dealt a query ahead in %.2f s", seconds)
        self._events.ended(PhaseEnded(OFFLINE, seconds, sent=model.program.cost.dealt))
        yield pb.StockPart(done=pb.StockDone())

    def Assign(self, request: pb.AssignRequest, context: grpc.ServicerContext) -> pb.AssignReply:
        with answering(context, log):
            return self._assign(request)

    def _assign(self, request: pb.AssignRequest) -> pb.AssignReply:
        """Give an entry to a query: burn the entry durably, then the query's number, and seal the key to the client.

        An entry that is not known burns nothing, so that the query can be dealt under the same number. The client's
        ratchet gives a key for a number once, to deal with or to seal with: a number is either dealt or assigned.
        """
        session, about = self._session(request.session), (request.session, request.query, request.entry)
        if not hmac.compare_digest(assign_proof(_joined(session), *about), request.proof):
            raise QueryError("only the server that joined the session gets entries for it")
        self._hear(session.process)
        assert session.server is not None
        session.seat.work()
        try:
            names = session.model.program.digest, session.model.weights_digest
            self._spend(session.opener, PREPARATIONS, 1)  # before anything is burnt
            found = self._taken(names, request.entry)
            if found is None:
                self._spend(session.opener, PREPARATIONS, -1)  # it will be dealt, which counts
                return pb.AssignReply()
            client, proving = found
            if not hmac.compare_digest(assign_proof(proving, *about), request.entry_proof):
                raise QueryError("only the server that got an entry can have it assigned", "the entry is burnt")
            session.server.key(request.query)
            sealed = seal_client_key(session.client.key(request.query), client, *about, *names)
            return pb.AssignReply(sealed=sealed)
        finally:
            session.seat.rest(UNUSED)

    def _taken(self, names: tuple[str, str], entry: bytes) -> _Half | None:
        """Burn an entry, and return its two keys; None if it is not known, or if the store fails: its disk is full."""
        try:
            return self.entries.take(names, entry) if len(entry) == ENTRY_BYTES else None
        except StoreError as error:
            log.warning("an entry of the store is lost: %s", str(error).replace("\n", "; "))
            return None

    def _session(self, token: bytes) -> _DealtSession:
        with self._lock:
            session = self._sessions.get(token) if len(token) == SESSION_BYTES else None
        if session is None:
            raise Error("no such session (a restarted dealer knows none)", "connect again")
        return session


def _dealt(program: Program, mask: Key, beside: _RegisteredModel | None) -> DealtModel:
    """Return a model to deal for. It shares the mask B with a Program of the same weights that is registered."""
    try:
        return DealtModel.of(program, mask, beside.dealt if beside else None)
    except ValueError as error:
        raise HandshakeError(f"the Programs of one model differ: {error}") from None


def _decoded(encoded: bytes, budget: Budget) -> Program:
    try:
        program = budget.decode(encoded)
    except InvalidProgram as error:
        raise HandshakeError(str(error)) from None
    if program.encoded != encoded:
        raise HandshakeError("the Program is not in its canonical encoding")
    return program


def _joined(session: _DealtSession) -> bytes:
    """Return the key of the server's proofs. Raises QueryError if no server has joined."""
    if session.server is None:
        raise QueryError("the session was not joined by a server")
    return session.proving
