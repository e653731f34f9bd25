"""Party 0: it gets a share of a client's input, computes with party 1, and gets its corrections from party 2.

The handler of party 1's stream drives the rounds itself; the client's call waits for the result.
"""

from __future__ import annotations

import hmac
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import grpc
from torch import Tensor

from parties.limits.waiting import FIRST
from parties.net.caller import Caller, permit
from parties.net.calls import failed, failure, unexpected
from parties.net.frames import to_frames
from parties.net.peer import Peer
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyStub
from parties.store.entries import Store, label_of
from parties.store.filler import Filler, Shelf
from parties.store.sealed import sealed_size
from parties.telemetry.events import Events, PhaseEnded, Reading
from parties.telemetry.names import query_id, session_label
from parties.three_party.asked import Asked, Progress
from parties.three_party.conversations import AGAIN, PartyConversation, WantedProgram
from parties.three_party.pair_keys import PairKey, Seal
from parties.three_party.party import PartyService
from parties.three_party.party_2 import query_key, sketch_key, supply_seal
from parties.three_party.sealed_rounds import Rounds
from parties.three_party.shared_model import PartyShare, SharedProgram
from parties.three_party.supply import NUMBER_BYTES, Arriving, Stock, StoredSupply, checked, silent
from protocols import wire
from protocols.circuit import Correlations
from protocols.prg import SEED_BYTES
from protocols.three_party.endpoints import Coins
from secure.cost.traffic import OFFLINE
from secure.deployments.three_party import CLIENT, PARTIES
from secure.errors import Error, HandshakeError, NotDealt, PeerLost, ProtocolError, QueryError, StoreError
from secure.mpc.program import Program

_, PEER, PARTY_2 = PARTIES
DROPPING = 60.0  # seconds between two times that all that was dealt ahead is dropped


class Party0Service(PartyService):
    """The service of party 0. ahead: the number of queries whose corrections are kept ready in memory.

    store: where more of them are kept, and used first, or None; is closed with the service. most: the bytes that they
    take there. Their other halves, party 1's seeds, lie in party 2's store.
    """

    permissions = permit("Party", Ask=[CLIENT], Agree=[PEER], Compute=[PEER])
    called_by = (1,)
    joined_by = PEER

    def __init__(
        self,
        share: PartyShare,
        party_2: Peer,
        *,
        ahead: int = 1,
        deadline: float = 60.0,
        store: Store | None = None,
        most: int = 0,
        events: Events | None = None,
    ) -> None:
        self._party_2, self._ahead = party_2, ahead
        alone = [size for size in share.sizes if not size.program.keeps]  # what is dealt before anybody asks
        self._stocks = {
            size.program.digest: Stock(partial(self._supply, size, WantedProgram(size.program.digest)), ahead)
            for size in alone
        }
        self._alone = alone
        self._store, self._labels = store, dict[str, str]()
        self._halves, self._dropped, self._dropped_at = b"", 0, -math.inf  # the name of party 2's store
        self._filler = Filler(store, most, logging.getLogger("unseen.party-0")) if store is not None else None
        super().__init__(share, {2: party_2}, deadline=deadline, events=events)
        self._refill()

    def _refill(self) -> None:
        for stock in self._stocks.values():
            stock.refill()

    def close(self) -> None:
        if self._filler is not None and self._store is not None:
            self._filler.close()
            self._store.close()
        super().close()

    def met(self, number: int, store: bytes) -> None:
        """Fill the store with entries whose other halves party 2 keeps; those that another store kept are dropped."""
        if self._store is None or self._filler is None or number != 2:
            return
        self._halves, times = store, [str(self._dropped)] if self._dropped else []
        for size in self._alone:
            digest, dealt = size.program.digest, size.circuit.cost.dealt
            self._labels[digest] = label = label_of("supplied", self.share.manifest.model, digest, store, *times)
            make, what = partial(self._put, self._store, label, size), f"party 2's corrections of {digest[:12]}"
            self._filler.serve(Shelf(what, label, sealed_size(SEED_BYTES, dealt), make))

    def readings(self) -> Iterator[Reading]:
        yield from super().readings()
        ahead = sum(map(len, self._stocks.values()))
        yield Reading("unseen_queries_ahead", "Queries whose corrections are kept in memory, or come.", ahead)
        if self._filler is not None:
            yield from self._filler.readings()

    def _put(self, store: Store, label: str, size: SharedProgram) -> None:
        """Put one query into the store."""
        number, wanted = secrets.token_bytes(NUMBER_BYTES), WantedProgram(size.program.digest)
        with self._supplying(number, wanted, b"") as (parts, sealing):
            start = time.perf_counter()
            seed, corrections = checked(parts, sealing)
            store.put(label, number, seed, size.circuit.cost.dealt, corrections)
            self.events.ended(PhaseEnded(OFFLINE, time.perf_counter() - start, received=size.circuit.cost.dealt))

    @contextmanager
    def _supplying(
        self, number: bytes, wanted: WantedProgram, history: bytes
    ) -> Iterator[tuple[Iterator[pb.SupplyPart], Callable[[bytes], Seal]]]:
        """Yield what party 2 sends for a query's number, and how its tag begins. Raises PeerLost, HandshakeError."""
        key = self.key(2)
        request = pb.SupplyRequest(
            model=self.share.manifest.model,
            supply=number,
            proof=key.proof("supply", number, wanted.about(history)),
            wanted=wanted.message(),
            history=history,
        )
        call = PartyStub(self._party_2.channel).Supply(request)
        watch = Watchdog(self.deadline, call.cancel)
        try:
            with self._party_2.calling("dealing"):
                yield watch.receiving(call), lambda seed: supply_seal(key, number, seed)
        except Error as error:
            raise (silent(self.deadline) if watch.fired else error) from None
        finally:
            watch.stop()
            call.cancel()  # does nothing if everything came

    def _supply(self, size: SharedProgram, wanted: WantedProgram, history: bytes = b"") -> Arriving:
        """Ask party 2 for one query's corrections; a thread receives them meanwhile."""
        arriving = Arriving(size.circuit.circuit, self.deadline)

        def take() -> None:
            try:
                with self._supplying(arriving.number, wanted, history) as (parts, sealing):
                    arriving.receive(parts, sealing)
            except Error as error:
                arriving.fail(error)

        threading.Thread(target=take, name="unseen-supply", daemon=True).start()
        return arriving

    # the client

    def asked_sizes(self, size: SharedProgram) -> list[int]:
        return [*(p.out.size for _, p in size.circuit.inputs.values()), *self.key_sizes(size)]

    def converse(self, asked: Asked, who: Caller) -> None:
        if asked.following:
            self.size(_following(asked))
        super().converse(asked, who)

    def kept_bytes(self, program: Program) -> int:
        dealt = [size.circuit.cost.dealt for size in self.share.sizes if size.program.rows and self._ahead]
        return super().kept_bytes(program) + max(dealt, default=0)

    def inputs(self, asked: Asked, number: bytes, coins: Coins) -> tuple[dict[str, Tensor], int]:
        """Return this party's shares of a query's inputs and looked-up rows, and the bytes that party 2 sent.

        coins: see ``looked_up``.
        """
        forms = {name: p.out for name, (_, p) in asked.size.circuit.inputs.items()}
        shared, keys = asked.parts[: len(forms)], asked.parts[len(forms) :]
        found = {name: wire.decode(part, form) for (name, form), part in zip(forms.items(), shared, strict=True)}
        rows, size = self._look_up(asked, keys, number, coins)
        return found | rows, size

    def _look_up(
        self, asked: Asked, keys: Sequence[bytes], number: bytes, coins: Coins
    ) -> tuple[dict[str, Tensor], int]:
        shared = {name: p for name, (_, p) in asked.size.circuit.from_keys.items() if not p.public}
        if not shared:
            return self.looked_up(asked.size, keys, coins), 0
        key = self.key(2)
        request = pb.ContributeRequest(
            model=self.share.manifest.model,
            supply=number,
            session=asked.session,
            proof=key.proof("contribute", number, asked.session),
        )
        stub = PartyStub(self._party_2.channel)
        coming = stub.Contribute.future(request, timeout=self.deadline)  # runs while this party looks up
        rows = self.looked_up(asked.size, keys, coins)
        with asked.progress.waiting(PARTY_2), self._party_2.calling("looking up rows"):
            contribution = coming.result()
        seal = key.seal("contribution", number)
        seal.update(contribution.rows)
        seal.check(contribution.tag, "the rows of party 2")
        at = 0
        for name, p in shared.items():
            rows[name] = rows[name] + wire.decode(contribution.rows[at : at + p.out.size], p.out)
            at += p.out.size
        return rows, len(contribution.rows)

    # party 1

    def Compute(self, requests: Iterator[pb.PeerMessage], context: grpc.ServicerContext) -> Iterator[pb.PeerMessage]:
        run = _Computation(self, requests, context)
        try:
            with self._filler.paused() if self._filler is not None else nullcontext():
                yield from run.watch.sending(run.messages(self._greeting.place(context)))
        finally:
            run.close()
            self._refill()

    def lost(self) -> None:
        for stock in self._stocks.values():
            stock.drop()
        if self.conversations is not None:
            self.conversations.drop_coming()

    def greeted(self, hello: pb.PeerHello) -> tuple[Asked, PairKey]:
        """Check party 1's greeting, and take up the query that it names; the key is that of the query.

        Raises HandshakeError, PeerLost.
        """
        self.agree(PEER, hello.version, hello.model, hello.session)
        key = self.key(1)
        wanted = self.wanted(hello.wanted)
        key.require(hello.proof, "compute", hello.session, wanted.about(hello.history))
        return self.join(hello.session), key

    def agreed(self, asked: Asked, hello: pb.PeerHello) -> None:
        """Raise QueryError unless party 1 computes the same query of the same conversation."""
        if self.wanted(hello.wanted) != asked.wanted:
            raise QueryError("the client wants another query of party 1 than of party 0", "ask again")
        if not hmac.compare_digest(hello.history, asked.history):
            raise QueryError(f"{PEER} keeps other rows of this text than party 0", AGAIN)

    def take(self, asked: Asked) -> Arriving | StoredSupply:
        """Take the corrections of a query, whose progress hears of waits for party 2."""
        digest = asked.wanted.program_digest
        supply = (
            self._in_conversation(asked, asked.conversation)
            if asked.conversation is not None
            else self._from_store(asked.size) or self._stocks[digest].take()
        )
        supply.progress = asked.progress
        return supply

    def _in_conversation(self, asked: Asked, conversation: PartyConversation) -> Arriving:
        """Take what was asked of party 2 ahead if it is for this query, and ask for the one that follows.

        Party 2 deals one query of a conversation at a time, and each reads the masks of those before.
        """
        coming, conversation.coming = conversation.coming, None
        about = asked.wanted.about(asked.history)
        if coming is not None and coming.about == about and not coming.supply.failed:
            supply: Arriving = coming.supply
        else:
            if coming is not None:
                with suppress(Error):
                    coming.supply.finish()
            supply = self._supply(asked.size, asked.wanted, asked.history)
        if asked.following and self._ahead:
            wanted, history = _following(asked), conversation.history(asked.wanted.rows, supply.number)

            def follow() -> None:
                made = self._supply(self.size(wanted), wanted, history)
                conversation.coming = _ComingQuery(wanted.about(history), made)

            supply.then(follow)
        return supply

    def _from_store(self, size: SharedProgram) -> StoredSupply | None:
        """Take a query of this Program from the store; None if it has none whose other half party 2 keeps.

        It is burnt before party 1 hears its number, and party 2 burns party 1's seed when it gives that out.
        """
        if self._store is None or self._filler is None:
            return None
        try:
            self.key(2)  # party 2 is there, and has said which store it has
            label = self._labels.get(size.program.digest)
            taken = self._store.take(label) if label else None
        except (StoreError, PeerLost, HandshakeError) as error:
            self.log.warning("the store is not used: %s", str(error).replace("\n", "; "))
            return None
        self._filler.wake()
        return None if taken is None else StoredSupply(size.circuit.circuit, taken)

    def not_dealt(self) -> None:
        """Drop all that was dealt ahead: party 2 has lost the other half of one, as when its clock was set.

        Else as many queries would fail as are kept. It is done once in DROPPING seconds: queries that run at that time
        may fail in the same way, and whoever can make party 0 believe it has no more done than that. No client can: it
        draws no number, and asks for none.
        """
        if time.monotonic() - self._dropped_at < DROPPING:
            return
        self._dropped_at = time.monotonic()
        self.log.warning("party 2 has lost its half of a query: what was dealt ahead is dropped")
        self.lost()
        if self._halves:
            self._dropped += 1
            self.met(2, self._halves)  # other labels: the filler removes entries of those before


@dataclass(frozen=True, repr=False)
class _ComingQuery:
    """Corrections that party 2 deals for the query that goes on with a conversation. about: of what is wanted."""

    about: bytes
    supply: Arriving


def _following(asked: Asked) -> WantedProgram:
    """Return what the query after this one computes."""
    wanted = asked.wanted
    return WantedProgram(asked.following, wanted.conversation, wanted.rows + asked.size.program.kept_rows)


class _Computation:
    """One query, computed with party 1."""

    def __init__(
        self, service: Party0Service, requests: Iterator[pb.PeerMessage], context: grpc.ServicerContext
    ) -> None:
        self._service, self._requests = service, requests
        self._asked: Asked | None = None
        self._progress = Progress()
        self.watch = Watchdog(service.deadline, context.cancel)

    def close(self) -> None:
        self.watch.stop()
        self._fail(PeerLost(f"{PEER} is gone", "see its log"))  # does nothing if the query has ended

    def _fail(self, error: Error) -> None:
        if self._asked is not None:
            self._asked.fail(error)

    def messages(self, waiting: AbstractContextManager[None]) -> Iterator[pb.PeerMessage]:
        """Yield all messages to party 1; a failure is the last one, and the client gets it too.

        waiting: a place for the wait for party 1's greeting.
        """
        log = self._service.log
        try:
            with waiting:
                hello = self._next("its greeting", FIRST)
            yield from self._run(hello)
        except Error as error:
            log.warning("a query ended: %s", str(error).splitlines()[0])
            if isinstance(error, NotDealt):
                self._service.not_dealt()
            self._fail(error)
            yield pb.PeerMessage(failure=failure(error))
        except Exception as error:
            unexpected(error, log)
            self._fail(Error("party 0 has an internal error", "see its log"))
            yield pb.PeerMessage(failure=pb.Failure(code=Error.code, message="internal error of party 0"))

    def _next(self, what: str, seconds: float | None = None) -> pb.PeerMessage:
        seconds = min(seconds or self._service.deadline, self._service.deadline)
        try:
            with self._progress.waiting(PEER), self.watch.guard(seconds):
                message = next(self._requests, None)
        except Error:
            raise
        except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
            late = f" within {seconds:g} s" if self.watch.fired else ""
            raise PeerLost(f"{PEER} did not send {what}{late} ({type(error).__name__})", "see its log") from None
        if message is None:
            raise PeerLost(f"{PEER} is gone before {what}", "see its log")
        if message.WhichOneof("content") == "failure":
            raise failed(message.failure, PEER)
        return message

    def _run(self, hello: pb.PeerMessage) -> Iterator[pb.PeerMessage]:
        service = self._service
        if hello.WhichOneof("content") != "hello":
            raise ProtocolError(f"{PEER} does not begin with its greeting")
        asked, key = service.greeted(hello.hello)
        self._asked = asked
        self._progress = asked.progress
        with service.conversing(asked, key):
            service.agreed(asked, hello.hello)
            answer = yield from self._answered(asked, key)
        asked.finish(answer)

    def _answered(self, asked: Asked, key: PairKey) -> Generator[pb.PeerMessage, None, pb.Answer]:
        service, supply = self._service, self._service.take(asked)
        seed = supply.seed()  # once it is here, party 2 knows the supply's number, so party 1 may use it
        yield pb.PeerMessage(welcome=pb.PeerWelcome(supply=supply.number))
        rounds = Rounds.of(service.share, asked.size, key, supply.number)
        correlations = Correlations(0, query_key(seed, 0, supply.number), supply)
        start = time.perf_counter()
        coins = {1: key.sketch_key(supply.number), 2: sketch_key(seed, supply.number)}
        inputs, rows = service.inputs(asked, supply.number, coins)
        running = rounds.run(correlations, inputs | service.given(asked), self._next, PEER)
        for payload in running:
            for frame in to_frames(payload) if payload else ():
                yield pb.PeerMessage(frame=frame)
        seconds = time.perf_counter() - start
        yield pb.PeerMessage(tag=rounds.sent_seal.tag())
        rounds.compare(self._next("its tag"), PEER)
        supply.finish()
        answer = pb.Answer(
            share=service.for_client(
                asked.size, service.keep(asked, supply.number, running.result), key, supply.number
            ),
            seconds=seconds,
            waited=supply.waited,
            rounds=rounds.count,
            sent=rounds.sent_bytes,
            corrections=supply.size,
            dealing=supply.dealing,
            rows=rows,
        )
        if supply.dealing:  # else it lay in the store, and was counted when it came there
            named = query_id(session_label(asked.session), 0)
            service.events.ended(PhaseEnded(OFFLINE, supply.dealing, named, received=supply.size))
        service.answered(asked, answer, rounds.received_bytes)
        return answer
