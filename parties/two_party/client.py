"""The client of two parties: it prepares queries ahead with server and dealer, and asks them.

It holds no weights and needs no model code. The Program, the masked weights and the tokenizer come from the server, and
so does the token table if the owner lets clients hold it; files are checked by digest.
"""

from __future__ import annotations

import hashlib
import json
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import grpc
from torch import Tensor

from parties.net.calls import failed, named_refusal, refusal
from parties.net.frames import FrameReader, to_frames
from parties.net.peer import Peer
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import InferenceStub
from parties.served.described import ConnectOptions, Described, ask_description, read_description
from parties.served.files import masked_size, unpack_masked
from parties.telemetry.names import query_id, session_label
from parties.two_party.conversations import Conversations, HeldConversation, Place, check_place, most_together
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.keys import MAXIMUM_PREPARED, Ratchet, open_client_key
from parties.two_party.masked_model import by_file
from protocols.circuit import Correlations, execute, prepare_together
from protocols.prg import Key, fresh_seed
from protocols.protocol import CLIENT
from protocols.steps import Framed
from protocols.weights import ClientWeights
from secure.cost.timeline import Recorder, Timeline
from secure.cost.traffic import OFFLINE, Traffic, links
from secure.deployments.two_party import CLIENT as CLIENT_ROLE
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.errors import Busy, DealerError, HandshakeError, PeerLost, ProtocolError, QueryError
from secure.mpc.program import Program
from secure.session.link import Ahead, Link, Report
from secure.version import WIRE_VERSION

PATIENCE = 15.0  # seconds in which a server registers its model again with a dealer that was restarted


def _files(program: Program) -> dict[str, int]:
    """The most bytes of the files that the client needs, by name."""
    return {name: masked_size(part, program.weight_shapes) for name, part in by_file(program.weight_rings).items()}


_HELD: WeakValueDictionary[tuple[object, ...], ClientWeights] = WeakValueDictionary()  # of all links of this process


def _weights(program: Program, files: Mapping[str, bytes]) -> ClientWeights:
    """Return the masked weights of files, which fit the Program. Links that hold the same files share them."""
    shapes = {name: tuple(program.weight_shapes[name]) for name in program.weight_rings}
    tensors, digests = dict[str, Tensor](), list[bytes]()
    for name, part in by_file(program.weight_rings).items():
        tensors |= unpack_masked(files.get(name), part, shapes)
        digests.append(hashlib.sha256(files.get(name, b"")).digest())
    return _HELD.setdefault((*digests, *sorted(shapes.items())), ClientWeights(tensors))


@dataclass(frozen=True)
class _Wanted:
    """The Program that a query computes. rows: those that it reads of a conversation, which the query ``first`` began.

    0 rows: it begins one itself. None: it stands for itself.
    """

    program: Program
    rows: int | None = None
    first: int = 0

    def place(self, query: int) -> Place | None:
        """Return the place of the query of this number."""
        if self.rows is None:
            return None
        return Place(self.program.digest, self.first if self.rows else query, self.rows)

    def same(self, other: _Wanted) -> bool:
        return self.place(0) == other.place(0) and self.program.digest == other.program.digest

    def behind(self, count: int) -> _Wanted:
        """Return the query that reads what ``count`` more queries like this one keep."""
        return self if self.rows is None else replace(self, rows=self.rows + count * self.program.kept_rows)


@dataclass(eq=False)
class _Text:
    """A conversation of this client, which has a number once its first query has one.

    together: the queries that are prepared together next. It grows as the text does, so that of a short text few are
    prepared in vain.
    """

    conversation: HeldConversation | None = None
    together: int = 1


@dataclass(frozen=True, repr=False)  # holds masks
class _Ready:
    query: int
    wanted: _Wanted
    correlations: Correlations
    seconds: float
    client_seconds: float
    dealer_seconds: float
    corrections: int
    received: int


@dataclass(frozen=True, repr=False)  # holds masks
class _Coming:
    """Queries that are being prepared together, the first of them and their number.

    own: the client's key of the first, if the dealer deals it now; key: that which it gets; half: this side's half of
    each, once there is a key, and the seconds that they took.
    """

    query: int
    wanted: _Wanted
    count: int
    own: Key
    key: Future[Key]
    start: float
    half: Future[tuple[list[Correlations], float]]
    asked: bool = True  # False: the server was busy, and has done nothing for them


class TwoPartyLink(Link):
    """A session with a server and a dealer. Any failure ends it, because the two sides are no longer in step then."""

    def __init__(self, deployment: TwoParty, options: ConnectOptions) -> None:
        self.deployment = deployment.name
        self._deadline, self._next_query, self._ready = options.deadline, 0, list[_Ready]()
        self._coming: _Coming | None = None  # a query that is prepared while another runs
        self._stored = False  # the server has a store
        self._several = True  # the server has had room for several queries that are prepared together
        self._conversations, self._options, self._with = Conversations(), options, deployment
        self._beside = ThreadPoolExecutor(1, "beside")
        with ExitStack() as stack:  # whatever fails on the way closes what was opened
            self._open = stack
            self._server = Peer("the server", deployment.server, options.network, role=SERVER, start="unseen serve")
            stack.callback(self._server.close)
            self._dealer = DealerPeer(
                deployment.dealer, options.network, deployment.dealer_key, answering=options.deadline
            )
            stack.callback(self._dealer.close)
            self._describe(deployment, options)
            self._open_session()
            self._open = stack.pop_all()

    # setting up

    def _describe(self, deployment: TwoParty, options: ConnectOptions) -> None:
        description = ask_description(self._server, deployment, SERVER, options)
        found = read_description(self._server, description, SERVER, options.budget.decode, options, _files)
        self.program, self.weights_digest, self.once = found.program, found.model, found.once
        self.model, self.offers, self.compiled_as = found.model, found.offers, found.compiled_as
        self.tables, self.tokenizer = found.tables, found.tokenizer
        self._weights = _weights(self.program, found.files)

    def _open_session(self) -> None:
        program = self.program
        self._session, self._keys = self._opened(program.digest)
        self._outbox: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        self._call = InferenceStub(self._server.channel).Session(iter(self._outbox.get, None))
        self._watch = Watchdog(self._deadline, self._call.cancel)
        self._open.callback(self._end, "it was closed")
        self._send(
            hello=pb.Hello(
                version=WIRE_VERSION,
                deployment=self.deployment,
                program_digest=program.digest,
                fixed_point=json.dumps(program.fixed.as_dict(), sort_keys=True),
                weights_digest=self.weights_digest,
                session=self._session,
            )
        )
        self._stored = self._expect("welcome", "the handshake").stored

    def _opened(self, program_digest: str) -> tuple[bytes, Ratchet]:
        """Open a session at the dealer, with fresh keys. One that was restarted gets the model from its server soon."""
        until = time.monotonic() + min(PATIENCE, self._deadline)
        while True:
            seed = fresh_seed()
            session = self._dealer.open(program_digest, self.weights_digest, seed, self._deadline)
            if session is not None:
                return session, Ratchet(seed, "client", session, program_digest)
            if time.monotonic() > until:
                raise DealerError(
                    f"{self._dealer} does not know the Program {program_digest[:12]!r} with these weights",
                    "start the server with this dealer's address, and use the same dealer for the client",
                )
            time.sleep(0.5)

    def _send(self, **content: Any) -> None:
        self._outbox.put(pb.ClientMessage(**content))

    def _expect(self, kind: str, what: str) -> Any:
        """Return the content of the server's next message, which must be of one kind.

        Meanwhile the server may say which correlations a query gets that is being prepared. Raises PeerLost,
        ProtocolError, or the error that the server reports.
        """
        while True:
            message = self._hear(what)
            found = message.WhichOneof("content")
            if found == "failure":
                self._note_busy(message.failure, kind)
                raise failed(message.failure, "the server")
            if found == kind:
                return getattr(message, kind)
            if found != "assigned" or self._coming is None or self._coming.key.done():
                raise ProtocolError(f"the server sent {found!r} where {kind!r} was expected ({what})")
            self._assigned(self._coming, message.assigned)

    def _hear(self, what: str) -> pb.ServerMessage:
        """Return the server's next message. Raises PeerLost, or the error for a call that was refused."""
        try:
            with self._watch.guard():
                message: pb.ServerMessage = next(self._call)
                return message
        except (grpc.RpcError, StopIteration) as error:
            if self._watch.fired:
                reason = f"did not answer within {self._deadline:g} s"
            elif isinstance(error, grpc.Call) and (
                named := named_refusal(error, f"{self._server} refused ({what})", "see the server's log")
            ):
                raise named from None
            elif isinstance(error, grpc.Call) and error.code() not in _GONE:
                raise refusal(error, f"{self._server} refused ({what})", "see the server's log") from None
            else:
                reason = "is gone" if isinstance(error, grpc.RpcError) else "ended the session"
            raise PeerLost(f"{self._server} {reason}; this client waited for {what}", "see the server's log") from None

    def _note_busy(self, failure: pb.Failure, expected: str) -> None:
        """Note that a busy server has done nothing for the query that is being prepared: it can be asked for again.

        The number is not burnt at the server and the dealer then, and this side's share, of which nobody has seen
        anything, keeps for it. expected: the kind of message that was waited for; in the middle of a query's rounds,
        any failure ends the session.
        """
        preparing = expected in ("assigned", "prepared") and self._coming is not None and self._coming.asked
        if failure.goes_on and failure.code == Busy.code and preparing:
            assert self._coming is not None
            self._several = self._several and self._coming.count == 1
            self._coming = replace(self._coming, asked=False, count=1)  # there may be room for one

    # queries

    @property
    def session_label(self) -> str:
        """The name of this session in both parties' traces; the session's id itself stays between the parties."""
        return session_label(self._session)

    @property
    def ready(self) -> int:
        """The number of queries of this link's Program that are prepared and not yet used."""
        return self._ready_of(self.program)

    def _ready_of(self, program: Program) -> int:
        return sum(wanted.program.digest == program.digest for wanted in self._prepared)

    @property
    def _prepared(self) -> list[_Wanted]:
        """The queries that are prepared and not yet used, those of links beside among them."""
        found = [ready.wanted for ready in self._ready]
        if (coming := self._coming) is not None and coming.asked:
            found += [coming.wanted.behind(i) for i in range(coming.count)]
        return found

    def prepare(self) -> None:
        """Prepare one query: the server takes corrections from its store or gets them from the dealer, and the client
        computes its shares of layers.

        Raises QueryError if MAXIMUM_PREPARED queries are prepared already; PeerLost, ProtocolError; Busy, after which
        it can be called again.
        """
        self._prepare(self.program)

    def _prepare(self, program: Program) -> None:
        """Prepare a query of this link's Program, or the first of a text with one of a link beside."""
        if sum(not wanted.rows for wanted in self._prepared) >= MAXIMUM_PREPARED:  # steps of texts are left
            raise QueryError(f"{MAXIMUM_PREPARED} queries are prepared already, which is the limit", "run one first")
        wanted = _Wanted(program, 0 if program.keeps else None)
        with self._in_session():
            self._leave(wanted)
            if self._coming is None or self._coming.asked:
                self._come()
                self._begin(wanted)
            self._come()

    def _leave(self, wanted: _Wanted) -> None:
        """Leave a query that a busy server put off, if another one is wanted now."""
        if (coming := self._coming) is not None and not coming.asked and not coming.wanted.same(wanted):
            coming.key.cancel()
            self._coming = None

    def _begin(self, wanted: _Wanted, count: int = 1) -> None:
        """Ask for the next query's corrections, and compute this side's share of layers in a thread beside.

        count: of queries that are prepared together, each behind the rows of the one before. What a busy server had no
        room for is asked for again instead. A server without a store has it dealt under this session's key, so the
        thread begins at once.
        """
        if (again := self._coming) is not None:
            self._ask_for(again.query, again.wanted, again.count)
            self._coming = replace(again, asked=True)
            return
        number, self._next_query = self._next_query, self._next_query + count
        if (place := wanted.place(number)) is not None:  # in the order in which the server hears of it
            check_place(place, number, wanted.program)
            if place.begins:
                self._conversations.begin(number, wanted.program)
            else:
                self._conversations.find(place)
        places = [()] if place is None else place.steps(wanted.program, count)
        (own, *others), key = [self._keys.key(number + i, *each) for i, each in enumerate(places)], Future[Key]()
        start = time.perf_counter()
        self._ask_for(number, wanted, count)
        if not self._stored:
            key.set_result(own)

        def work() -> tuple[list[Correlations], float]:
            correlations = [Correlations(CLIENT, each) for each in (key.result(), *others)]
            began = time.perf_counter()
            prepare_together(wanted.program.circuit, correlations, self._weights)
            return correlations, time.perf_counter() - began

        self._coming = _Coming(number, wanted, count, own, key, start, self._beside.submit(work))

    def _ask_for(self, number: int, wanted: _Wanted, count: int) -> None:
        place = wanted.place(number)
        self._send(prepare=pb.Prepare(query=number, place=place and place.message(), steps=count))

    def _assigned(self, coming: _Coming, message: pb.Assigned) -> None:
        """Take up the key under which a query is dealt: this session's, or that of an entry, which the dealer sealed.

        The dealer burnt the number for the one that it used, so a server that names the other gets a wrong answer.
        Raises ProtocolError for a key that the dealer did not seal to this query.
        """
        if message.query != coming.query:
            raise ProtocolError(f"the server assigned query {message.query} where {coming.query} was asked for")
        if not message.entry:
            coming.key.set_result(coming.own)
            return
        about = self._session, coming.query, message.entry, self.program.digest, self.weights_digest
        coming.key.set_result(open_client_key(coming.own, message.sealed, *about))

    def _come(self) -> None:
        """Wait for the query that is being prepared, if there is one. Raises Busy."""
        if self._coming is None:
            return
        if not self._coming.asked:
            self._begin(self._coming.wanted)
        coming = self._coming
        number = coming.query
        if not coming.key.done():
            self._assigned(coming, self._expect("assigned", f"which correlations query {number} gets"))
        correlations, own = coming.half.result()
        answer = self._expect("prepared", f"the corrections of query {number}, which the server gets from the dealer")
        if answer.query != number:
            raise ProtocolError(f"the server prepared query {answer.query} where {number} was asked for")
        seconds, self._coming = time.perf_counter() - coming.start, None
        seconds, own, dealer = (each / coming.count for each in (seconds, own, answer.seconds))
        dealt, came = answer.bytes // coming.count, answer.ByteSize()
        for i, each in enumerate(correlations[: coming.count]):
            wanted, received = coming.wanted.behind(i), 0 if i else came
            self._ready.append(_Ready(number + i, wanted, each, seconds, own, dealer, dealt, received))

    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Tensor], Report]:
        wanted = _Wanted(self.program)
        return self._ask(wanted, values, wanted if ahead else None)

    def _ask(
        self,
        wanted: _Wanted,
        values: Mapping[str, Any],
        following: _Wanted | None,
        text: _Text | None = None,
        most: int = 1,
    ) -> tuple[Sequence[Tensor], Report]:
        """Run a query. following: the next one, which is prepared meanwhile, and of a text up to ``most`` like it, each
        behind the rows of the one before. text: that in which the query stands.
        """
        program = wanted.program
        with self._in_session():
            self._have_one(wanted)
            ready = self._ready.pop(0)  # taken before the first message: a failed query never uses it again
            place, conversation = wanted.place(ready.query), None
            if text is not None and place is not None:
                if text.conversation is None:
                    text.conversation = self._conversations.require(ready.query)
                conversation = text.conversation
                values = {**values, **conversation.given(place, program)}
            start = time.perf_counter()
            self._send(query=pb.Query(query=ready.query))
            if following is not None and text is not None and conversation is not None:
                self._begin_ahead(replace(following, first=conversation.first), most, text)
            elif following is not None and not self._ready:
                self._begin(following)
            result, timeline = self._run(ready, values)
            self._expect("finished", "the end of the query")
            if conversation is not None and place is not None:
                result = conversation.keep(place, program, result)
            online = time.perf_counter() - start
        self.timeline, cost = timeline, timeline.cost
        computed = ready.client_seconds + timeline.total.compute + timeline.total.wire
        moved = links(replace(cost, dealt=ready.corrections), SERVER, CLIENT_ROLE, DEALER)
        moved += (Traffic(SERVER, CLIENT_ROLE, ready.received, OFFLINE),)
        report = Report(
            *(cost.rounds, moved, online, ready.seconds, computed, ready.dealer_seconds, ready.query),
            id=query_id(self.session_label, ready.query),
        )
        return result, report

    def _begin_ahead(self, following: _Wanted, most: int, text: _Text) -> None:
        """Prepare more queries of a text together, while those that are prepared last for some more queries."""
        there = len(self._ready)
        if any(not ready.wanted.same(following.behind(i)) for i, ready in enumerate(self._ready)):
            there = 0  # they were prepared for something else, and are left with the next query
        if self._coming is not None or there > text.together // 2 or there >= most:
            return
        text.together = min(2 * text.together, most_together(following.program)) if self._several else 1
        self._begin(following.behind(there), min(text.together, most - there))

    def _have_one(self, wanted: _Wanted) -> None:
        """Wait until the query that is wanted is prepared, and for the answer to one that was asked for. Raises Busy.

        Queries before it that were prepared for something else are left: their numbers are burnt with it.
        """
        if self._coming is not None and self._coming.asked:
            try:
                self._come()
            except Busy:
                if not self._ready or not self._goes_on:
                    raise
        self._leave(wanted)
        while self._ready and not self._ready[0].wanted.same(wanted):
            self._ready.pop(0)
        if not self._ready:
            if self._coming is None:
                self._begin(wanted)
            self._come()

    @property
    def _goes_on(self) -> bool:
        """Tell whether a Busy left the session in step: the server has done nothing for what is being prepared."""
        return self._coming is not None and not self._coming.asked

    @contextmanager
    def _in_session(self) -> Iterator[None]:
        """End the session if anything fails inside this context, unless a busy server lets it go on.

        Raises PeerLost for whatever fails because another thread has ended the session.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, Busy) and self._goes_on and not self.ended:
                raise
            ended = self.ended
            self._end(str(error).partition("\n")[0] or type(error).__name__)
            if ended and isinstance(error, Exception):
                raise PeerLost(f"this session has ended: {ended}", "connect again") from None
            raise

    def _end(self, why: str) -> None:
        self.ended = self.ended or why
        self._watch.stop()
        self._ready.clear()
        if (coming := self._coming) is not None:
            coming.key.cancel()  # so that its thread ends
        self._coming = None
        self._beside.shutdown(wait=False, cancel_futures=True)
        self._keys.erase()
        self._outbox.put(None)
        self._call.cancel()

    def _run(self, ready: _Ready, values: Mapping[str, Tensor]) -> tuple[Sequence[Tensor], Timeline]:
        program, recorder = ready.wanted.program, Recorder("client")
        step = execute(
            program.circuit,
            program.revealed if ready.wanted.rows is None else (*program.revealed, *program.keeps.values()),
            CLIENT,
            ready.correlations,
            self._weights,
            values,
            recorder,
        )

        def receive(size: int) -> bytes:
            path = program.paths[recorder.waiting] or "the model's input"
            which = f"round {len(recorder.timeline.rounds) + 1} of {program.cost.rounds}"
            return self._receive(size, path, which) if size else b""

        recorder.start()
        frames = Framed(step, receive, recorder)
        for payload in frames:
            for frame in to_frames(payload) if payload else ():
                self._send(frame=frame)
        recorder.stop()
        return frames.result, recorder.timeline

    def _receive(self, size: int, path: str, which: str) -> bytes:
        reader = FrameReader(size)
        while True:
            frame = self._expect("frame", f"its message of module '{path}' ({which})")
            try:
                payload = reader.add(frame)
            except ValueError as error:
                raise ProtocolError(f"module '{path}': the server sent {error}") from None
            if payload is not None:
                return payload

    def close(self) -> None:
        self._open.close()

    # conversations

    def converse(self, capacity: int) -> _Text:
        return _Text()

    def go_on(
        self,
        conversation: Any,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Tensor], Report]:
        return self._go_on(self.program, conversation, values, rows, ahead)

    def _go_on(
        self, program: Program, text: _Text, values: Mapping[str, Any], rows: int | None, ahead: Ahead | None
    ) -> tuple[Sequence[Tensor], Report]:
        read, first = rows or 0, 0
        if (conversation := text.conversation) is not None:
            read, first = conversation.kept.filled if rows is None else rows, conversation.first
            self._conversations.require(first)  # before the session is at stake
        following = None if ahead is None else _Wanted(ahead.link.program, read + program.kept_rows)
        return self._ask(_Wanted(program, read, first), values, following, text, 1 if ahead is None else ahead.most)

    def beside(self, program_digest: str) -> Link:
        options = replace(self._options, program_digest=program_digest, model=self.model, told=None)
        description = ask_description(self._server, self._with, SERVER, options)
        return _Beside(self, read_description(self._server, description, SERVER, options.budget.decode, options))


class _Beside(Link):
    """A link to another Program of the same model, whose queries run in the session of ``main``."""

    def __init__(self, main: TwoPartyLink, found: Described[Program]) -> None:
        if dict(found.program.weight_shapes) != dict(main.program.weight_shapes):
            raise HandshakeError("the server's Programs of one model have other weights", "ask the server's owner")
        self._main, self.deployment, self.model = main, main.deployment, main.model
        self.program, self.once, self.offers = found.program, found.once, found.offers
        self.tables, self.tokenizer = found.tables, found.tokenizer

    @property
    def ready(self) -> int:
        return self._main._ready_of(self.program)

    def prepare(self) -> None:
        self._main._prepare(self.program)

    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Tensor], Report]:
        raise QueryError("queries of this Program stand in conversations", "ask it to generate text")

    def converse(self, capacity: int) -> _Text:
        return self._main.converse(capacity)

    def go_on(
        self,
        conversation: Any,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Tensor], Report]:
        try:
            return self._main._go_on(self.program, conversation, values, rows, ahead)
        finally:
            self.timeline, self.ended = self._main.timeline, self._main.ended

    def close(self) -> None:
        pass


_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
