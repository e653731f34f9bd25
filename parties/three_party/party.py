"""The base class of the three parties' services: it takes a client's query, and reports progress until the answer."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import grpc
from torch import Tensor

from parties.limits.waiting import FIRST, Clock, Places, WaitingRoom, patience
from parties.net.caller import Caller, Permissions, caller
from parties.net.calls import answering, failure, unexpected
from parties.net.frames import FrameReader
from parties.net.peer import Peer
from parties.net.versions import check_version
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyServicer
from parties.telemetry.events import Events, PhaseEnded, Reading
from parties.telemetry.logs import tagged
from parties.telemetry.names import query_id, session_label
from parties.three_party.agreement import KeyOfCallee, KeyOfCaller
from parties.three_party.asked import Asked
from parties.three_party.conversations import OWNER_BYTES, PartyConversations, WantedProgram, kept_of
from parties.three_party.pair_keys import PairKey
from parties.three_party.shared_model import PartyShare, SharedProgram
from protocols import wire
from protocols.protocol import count
from protocols.three_party import SharedLinear
from protocols.three_party.endpoints import Coins, LookedUp
from protocols.three_party.lookup import warm_up
from protocols.three_party.sharing import PARTY_2
from protocols.three_party.weights import SharedWeights
from secure.cost.traffic import ONLINE
from secure.errors import Error, HandshakeError, PeerLost, ProtocolError, QueryError
from secure.mpc.budget import PARTS
from secure.mpc.program import Program

SESSION_BYTES = 16
MAXIMUM_QUERIES = 8  # queries at a time; each takes a thread, and its corrections are held in memory
QUERIES_OF_ONE = 4  # those of any one client that has a name
WAITING = 12  # requests of clients, and greetings of parties, that may come at a time
STREAMS = 96  # threads of a party's service: more than all places together, so that clients take none of parties' calls


class PartyService(PartyServicer, ABC):
    """Base class of the three services. deadline: seconds that any one wait may last. peers: the parties that it calls,
    by number.

    A query comes by ``Ask``. The call of another party, or at party 1 the query's own thread, computes on it: it finds
    the query by its session, and leaves the answer in it.

    conversations: what this party keeps between queries of Programs that need it; None if it serves none. events: hear
    of every phase of a query that ends.
    """

    permissions: ClassVar[Permissions]  # the roles that may call each of its methods
    called_by: tuple[int, ...]  # the numbers of the parties that call this one
    joined_by: str  # the role whose call takes up a query here; "" if this party does so itself

    def __init__(
        self, share: PartyShare, peers: Mapping[int, Peer], *, deadline: float, events: Events | None = None
    ) -> None:
        self.share, self.deadline = share, deadline
        self.log = logging.getLogger(f"unseen.{share.role.replace(' ', '-')}")
        self._peers = peers
        self.events = events or Events()
        self._places = Places(MAXIMUM_QUERIES, QUERIES_OF_ONE, share.role, "queries")
        self._asking, self._greeting = WaitingRoom(WAITING), WaitingRoom(WAITING)
        self._sizes = {size.program.digest: size for size in share.sizes}
        keeping = any(size.program.keeps for size in share.sizes)
        self.conversations = PartyConversations(share.role, self.log) if keeping else None
        self._joining = min(deadline, FIRST + patience(max(sum(self.asked_sizes(size)) for size in share.sizes)))
        self._asked: dict[bytes, Asked] = {}
        self._came = threading.Condition()
        self._of_callers = KeyOfCaller(share, self.called_by, self.log, self.store_name())
        self._of_callees = {
            number: KeyOfCallee(share, number, peer, deadline, self.log, self.lost, partial(self.met, number))
            for number, peer in peers.items()
        }
        self._pack()
        for each in self._of_callees.values():
            threading.Thread(target=each.try_now, name="unseen-agree", daemon=True).start()

    def close(self) -> None:
        """End the agreements and conversations, and close the channels to the other parties."""
        if self.conversations is not None:
            self.conversations.close()
        for number, peer in self._peers.items():
            self._of_callees[number].close()
            peer.close()

    def readings(self) -> Iterator[Reading]:
        """Yield the numbers of this service at this moment."""
        yield from self._places.readings()

    def answered(self, asked: Asked, answer: pb.Answer, received: int) -> None:
        """Say that this party has computed its part of a query. received: bytes of the other party's frames."""
        named = query_id(session_label(asked.session), 0)
        self.log.info("a query answered in %.2f s", answer.seconds, extra=tagged(query=named))
        self.events.ended(PhaseEnded(ONLINE, answer.seconds, named, answer.rounds, answer.sent, received))

    def _pack(self) -> None:
        """Compile look-ups and pack weights at the start, so that the first query does not wait for it."""
        for size in self.share.sizes:
            self._pack_for(size)

    def _pack_for(self, size: SharedProgram) -> None:
        weights, circuit = self.share.weights, size.circuit
        lookups = self._lookups(size)
        if lookups:
            warm_up()
        for p in lookups:
            for table in weights.tables(p.table, p.ring):
                table.pack(p.points)
        if isinstance(weights, SharedWeights):
            for instruction in circuit.circuit:
                linear = instruction.protocol
                if isinstance(linear, SharedLinear) and not linear.diagonal:
                    weights.pack(linear.weight, linear.ring, count(linear.shape[:-1]))

    # the client

    def Ask(self, requests: Iterator[pb.AskPart], context: grpc.ServicerContext) -> Iterator[pb.AskReply]:
        watch = Watchdog(self.deadline, context.cancel)
        try:
            yield from watch.sending(self._replies(requests, context, watch))
        finally:
            watch.stop()

    def _replies(
        self, requests: Iterator[pb.AskPart], context: grpc.ServicerContext, watch: Watchdog
    ) -> Iterator[pb.AskReply]:
        """Yield all messages to the client; a failure is the last one."""
        try:
            with ExitStack() as place:
                with self._asking.place(context):
                    asked = self._read_ask(requests, watch)
                place.callback(self._places.take(caller(context)))
                self.converse(asked, caller(context))
                place.callback(self._leave, asked)
                context.add_callback(asked.leave)
                with self._kept(asked):
                    self.begin(asked, place)
                    yield from asked.replies(self._joining)
        except Error as error:
            self.log.warning("a query ended: %s", str(error).splitlines()[0])
            yield pb.AskReply(failure=failure(error))
        except Exception as error:
            unexpected(error, self.log)
            yield pb.AskReply(failure=pb.Failure(code=Error.code, message="internal error\nhint: see its log"))

    @abstractmethod
    def asked_sizes(self, size: SharedProgram) -> list[int]:
        """Return the sizes of the byte strings that a client of this Program sends to this party, in order."""

    def converse(self, asked: Asked, who: Caller) -> None:
        """Begin or find the conversation in which a query stands, if it stands in one. Raises QueryError, Busy."""
        wanted, program = asked.wanted, asked.size.program
        if self.conversations is None or not wanted.conversation:
            return
        if len(asked.owner) != OWNER_BYTES:
            raise QueryError(f"who owns a conversation shows {OWNER_BYTES} bytes, not {len(asked.owner)}")
        size = self.kept_bytes(program)
        asked.conversation = self.conversations.open(wanted, program, size, who.name, asked.owner)
        asked.history = asked.conversation.history(wanted.rows)

    def kept_bytes(self, program: Program) -> int:
        """Return the bytes of memory that a conversation takes at this party, at most."""
        return PARTS * program.kept_bytes

    def end(self, asked: Asked) -> None:
        """End the conversation of a query that failed, if it stands in one; harmless if it has ended."""
        if self.conversations is not None and asked.conversation is not None:
            self.conversations.end(asked.conversation)

    def _leave(self, asked: Asked) -> None:
        """End the conversation of a query that no computation has taken up."""
        if not asked.joined:
            self.end(asked)

    def size(self, wanted: WantedProgram) -> SharedProgram:
        """Return the Program of a query. Raises QueryError if this party has none such, or not at this place."""
        found = self._sizes.get(wanted.program_digest)
        if found is None:
            raise QueryError(f"{self.share.role} has no Program {wanted.program_digest[:12]!r}", "connect again")
        wanted.check(found.program)
        return found

    def wanted(self, message: pb.Wanted) -> WantedProgram:
        """Return what a message names."""
        return WantedProgram.of(message, self.share.program.digest)

    @contextmanager
    def conversing(self, asked: Asked, key: PairKey) -> Iterator[None]:
        """Compute a query in its conversation, which ends if the query fails. key: that of parties 0 and 1."""
        if self.conversations is None:
            yield
            return
        with self.conversations.using(asked.conversation, key):
            yield

    def given(self, asked: Asked) -> dict[str, Any]:
        """Return what a query reads of earlier ones, by name."""
        text = asked.conversation
        return text.given(asked.wanted, asked.size.program) if text is not None and asked.wanted.rows else {}

    def keep(self, asked: Asked, number: bytes, results: Sequence[Any]) -> Sequence[Tensor]:
        """Keep what later queries read of this one, at its end, and return the shares of its outputs."""
        shares, rows = kept_of(asked.size.program, results)
        if asked.conversation is not None:
            asked.conversation.keep(asked.wanted, number, rows)
        return shares

    def begin(self, asked: Asked, place: ExitStack) -> None:
        """Start to compute, if this party does not wait for another's call; the default does nothing.

        place: the query's place among MAXIMUM_QUERIES. A thread that may outlive the client's call takes it over.
        """

    def _read_ask(self, requests: Iterator[pb.AskPart], watch: Watchdog) -> Asked:
        """Read a client's start and the byte strings that follow it in one frame.

        The start comes within FIRST seconds, all of it within ``patience`` of its size, and no part after more than the
        deadline. Raises HandshakeError, ProtocolError, PeerLost.
        """
        first = _next(requests, watch, min(FIRST, self.deadline))
        if first is None or first.WhichOneof("content") != "start":
            raise ProtocolError("a query does not begin with its start")
        start = first.start
        self.agree("the client", start.version, start.model, start.session)
        wanted = self.wanted(start.wanted)
        size = self.size(wanted)
        sizes = self.asked_sizes(size)
        clock = Clock(patience(sum(sizes)))
        reader, payload = FrameReader(sum(sizes)), None if sum(sizes) else b""
        while payload is None:
            part = _next(requests, watch, clock.left(self.deadline))
            if part is None or part.WhichOneof("content") != "frame":
                raise ProtocolError("what the client sends did not come whole")
            try:
                payload = reader.add(part.frame)
            except ValueError as error:
                raise ProtocolError(f"the client sent {error}") from None
        parts = [payload[a:b] for a, b in pairwise(accumulate(sizes, initial=0))]
        asked = Asked(start.session, start.seed, parts, start.deadline, wanted, size, start.owner, start.following)
        asked.progress.waits_for = self.joined_by
        return asked

    @contextmanager
    def _kept(self, asked: Asked) -> Iterator[None]:
        """Keep a query while it is under way, so that other calls find it by its session."""
        with self._came:
            if asked.session in self._asked:
                raise ProtocolError("this session is under way", "take a fresh one")
            self._asked[asked.session] = asked
            self._came.notify_all()
        try:
            yield
        finally:
            with self._came:
                del self._asked[asked.session]

    def join(self, session: bytes) -> Asked:
        """Take up the query of a session, after waiting for its client; a query can be taken up only once.

        Raises PeerLost, ProtocolError.
        """
        with self._came:
            if not self._came.wait_for(lambda: session in self._asked, self._joining):
                raise PeerLost(f"the client did not come to {self.share.role} within {self._joining:g} s")
            asked = self._asked[session]
            if asked.joined:
                raise ProtocolError("this session was joined before")
            asked.joined, asked.progress.waits_for = True, ""
        return asked

    def key_sizes(self, size: SharedProgram) -> list[int]:
        """Return the bytes of the keys that this party gets for each look-up."""
        return [p.key_bytes for p in self._lookups(size)]

    def _lookups(self, size: SharedProgram) -> list[LookedUp]:
        """List the look-ups in which this party takes part: all but party 2's in tables that are public."""
        found = [p for _, p in size.circuit.lookups.values()]
        return [p for p in found if self.share.party != PARTY_2 or not p.public]

    def looked_up(self, size: SharedProgram, keys: Sequence[bytes], coins: Coins) -> dict[str, Tensor]:
        """Return this party's additive shares of the rows that a client looks up, and of its keys' sketches, by name.

        size: the Program of the query. coins: keys of this query that this party has in common with each other party.
        """
        out: dict[str, Tensor] = {}
        for (index, p), own in zip(size.circuit.lookups.values(), keys, strict=True):
            out |= p.shares(self.share.party, own, self.share.weights, coins, index)
        return out

    def for_client(self, size: SharedProgram, shares: Sequence[Tensor], key: PairKey, number: bytes) -> bytes:
        """Encode the outputs' shares of party 0 or 1, one after the other, each masked by a zero share of its own.

        size: the Program of the query. key: that of parties 0 and 1 in this query.
        """
        payload, sign = bytearray(), 1 - 2 * self.share.party
        for output, (own, form) in enumerate(zip(shares, size.circuit.results, strict=True)):
            payload += wire.encode(own + sign * key.zero_share(number, output, form.shape), form)
        return bytes(payload)

    # the other parties

    def key(self, other: int) -> PairKey:
        """Return the key that this party has agreed on with another. Raises PeerLost, HandshakeError."""
        return self._of_callers.key(other) if other in self.called_by else self._of_callees[other].key()

    def lost(self) -> None:
        """Note that a key with a party that this one calls has ended. The default does nothing; it must not block."""

    def store_name(self) -> bytes:
        """Return the name of the store in which this party keeps what belongs to others' entries, or nothing."""
        return b""

    def met(self, number: int, store: bytes) -> None:
        """Note that a key with a party that this one calls is new. The default does nothing; it must not block.

        store: the name of that party's store, or nothing.
        """

    def Agree(self, requests: Iterator[pb.AgreeMessage], context: grpc.ServicerContext) -> Iterator[pb.AgreeMessage]:
        watch = Watchdog(min(FIRST, self.deadline), context.cancel)
        try:
            with answering(context, self.log):
                yield from self._of_callers.serve(requests, watch, caller(context), self._greeting.place(context))
        finally:
            watch.stop()

    def agree(self, who: str, version: int, model: str, session: bytes) -> None:
        """Raise HandshakeError unless the version and model of ``who`` are ours and the session is well-formed."""
        check_version(who, version, self.share.role)
        if model != self.share.manifest.model:
            raise HandshakeError(
                f"model: {who} has {model[:12]!r}, this party {self.share.manifest.model[:12]!r}",
                "connect again; all three parties hold shares of one run of: unseen share-model",
            )
        if len(session) != SESSION_BYTES:
            raise HandshakeError(f"a session has {SESSION_BYTES} bytes, not {len(session)}")


def _next(requests: Iterator[pb.AskPart], watch: Watchdog, seconds: float) -> pb.AskPart | None:
    """Return the next part of a client's request, None at its end. Raises PeerLost if it does not come."""
    try:
        with watch.guard(seconds):
            return next(requests, None)
    except Error:
        raise
    except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
        late = "did not send its query in time" if watch.fired else "left before its query had come"
        raise PeerLost(f"the client {late} ({type(error).__name__})") from None
