"""Party 2: its share of every value comes from seeds, so it deals ahead of queries and sees no message of their rounds.

It knows the masks of every opening, and two of the three summands of every weight. Together with either other party's
messages these would show everything; the assumption that at most one party is corrupted excludes this.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import grpc
from torch import Tensor

from parties.net.caller import Caller, permit
from parties.net.calls import answering
from parties.net.frames import to_chunks
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.store.entries import Store, Taken, label_of
from parties.store.filler import KEPT, MOST_ENTRIES
from parties.store.memory import MemoryStore
from parties.telemetry.events import Events, PhaseEnded, Reading
from parties.telemetry.names import query_id, session_label
from parties.three_party.asked import Asked
from parties.three_party.conversations import AGAIN, WantedProgram
from parties.three_party.pair_keys import PairKey, Seal
from parties.three_party.party import PartyService
from parties.three_party.shared_model import PartyShare, SharedProgram
from parties.three_party.supply import NUMBER_BYTES
from protocols import wire
from protocols.circuit import deal
from protocols.prg import SEED_BYTES, Key, derive_key, fresh_seed
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.three_party import CLIENT, PARTIES
from secure.errors import Error, HandshakeError, NotDealt, ProtocolError, QueryError
from secure.mpc.program import Program

SEEDS, LOOKING = "seed", "rows"  # seeds of party 1, until it takes them; both parties', until rows are looked up
MAXIMUM_SEEDS = MOST_ENTRIES + 1024  # of a kind and a Program: those of party 0's store, and of its memory
SEEDS_KEPT = KEPT + 86400.0  # seconds that they wait; party 0 keeps its own halves for less


def query_key(seed: bytes, party: int, number: bytes) -> Key:
    """Return the key of one party's streams in one query; the seed is fresh and serves this query alone."""
    return Key(derive_key(seed, "query", party, number.hex()))


def sketch_key(seed: bytes, number: bytes) -> Key:
    """Return the key with which party 2 and the party of this seed sketch a client's look-up keys in one query."""
    return Key(derive_key(seed, "sketch", number.hex()))


def supply_seal(key: PairKey, number: bytes, seed: bytes) -> Seal:
    """Start the tag of one supply, which begins with party 0's ``seed``.

    Party 2 draws the seed, and the tag's key follows from it: a request that somebody sends once more, when party 1 has
    taken its seed, gets another tag under another key. Two tags under one would show how to make others.
    """
    return key.seal("corrections", number + seed)


class Party2Service(PartyService):
    """The service of party 2. It draws fresh seeds for every query number, and gives each out once.

    store: where seeds wait, durably burnt before they are given out; None: in memory. Is closed with the service.
    """

    permissions = permit(
        "Party",
        Ask=[CLIENT],
        Agree=PARTIES[:2],
        Supply=[PARTIES[0]],
        Contribute=[PARTIES[0]],
        Seed=[PARTIES[1]],
    )
    called_by = (0, 1)
    joined_by = PARTIES[0]

    def __init__(
        self, share: PartyShare, *, deadline: float = 60.0, store: Store | None = None, events: Events | None = None
    ) -> None:
        self._store: Store = store or MemoryStore()
        super().__init__(share, {}, deadline=deadline, events=events)

    def store_name(self) -> bytes:
        return self._store.name

    def readings(self) -> Iterator[Reading]:
        yield from super().readings()
        waiting = sum(self._store.level(self._label(SEEDS, digest)).entries for digest in self._digests())
        yield Reading("unseen_assignable_queries", "Queries dealt ahead whose seeds are here.", waiting)

    def close(self) -> None:
        super().close()
        self._store.close()

    def _digests(self) -> list[str]:
        return [size.program.digest for size in self.share.sizes]

    def _label(self, kind: str, program_digest: str) -> str:
        """Return the label of what waits for queries of a Program: each has its own bound."""
        return label_of(kind, self.share.manifest.model, program_digest)

    def _taken(self, kind: str, number: bytes) -> Taken | None:
        """Burn what waits for a query, whatever Program it was dealt for, and return it; None if nothing does."""
        for digest in self._digests():
            if (found := self._store.take(self._label(kind, digest), number)) is not None:
                return found
        return None

    def asked_sizes(self, size: SharedProgram) -> list[int]:
        return self.key_sizes(size)

    def converse(self, asked: Asked, who: Caller) -> None:
        """Do nothing: what this party keeps belongs to what it deals, not to the keys that a client sends it."""

    def _check(self, request: pb.SupplyRequest, party: int, purpose: str) -> tuple[bytes, WantedProgram, PairKey]:
        """Return a request's number, what the query computes, and the key that its proof was made with."""
        if request.model != self.share.manifest.model:
            raise HandshakeError(
                f"party {party} has another model than party 2", "give all three the shares of one run of share-model"
            )
        if len(request.supply) != NUMBER_BYTES:
            raise ProtocolError(f"a query's number has {NUMBER_BYTES} bytes, not {len(request.supply)}")
        key, wanted = self.key(party), self.wanted(request.wanted)
        key.require(request.proof, purpose, request.supply, wanted.about(request.history))
        return request.supply, wanted, key

    def Supply(self, request: pb.SupplyRequest, context: grpc.ServicerContext) -> Iterator[pb.SupplyPart | bytes]:
        watch = Watchdog(self.deadline, context.cancel)
        try:
            with answering(context, self.log):
                number, wanted, key = self._check(request, 0, "supply")
                yield from watch.sending(self._supply(number, key, wanted, request.history))
        finally:
            watch.stop()

    def _supply(
        self, number: bytes, key: PairKey, wanted: WantedProgram, history: bytes
    ) -> Iterator[pb.SupplyPart | bytes]:
        size, zero, one = self.size(wanted), fresh_seed(), fresh_seed()
        self._store.sweep(before=time.time() - SEEDS_KEPT)
        waiting = {SEEDS: one + wanted.about(history)}
        if self.key_sizes(size):
            waiting[LOOKING] = zero + one + wanted.about()
        for kind, kept in waiting.items():
            label = self._label(kind, wanted.program_digest)
            if self._store.level(label).entries >= MAXIMUM_SEEDS:
                self._store.take(label)  # the oldest
            self._store.put(label, number, kept)
        seal = supply_seal(key, number, zero)
        keys = (query_key(zero, 0, number), query_key(one, 1, number))
        with self._keeping(number, key, size.program, wanted, history) as (given, masks):
            yield pb.SupplyPart(seed=zero)
            start = time.perf_counter()
            corrections = deal(size.circuit.circuit, *keys, self.share.weights, given, masks)
            yield from to_chunks(_sealed(seal, corrections), pb.SupplyPart.DATA_FIELD_NUMBER)
        seconds = time.perf_counter() - start
        self.log.info("dealt a query in %.2f s", seconds)
        self.events.ended(PhaseEnded(OFFLINE, seconds, sent=size.circuit.cost.dealt))
        yield pb.SupplyPart(tag=seal.tag())  # the masks are kept by now: party 0 may ask for the next query

    @contextmanager
    def _keeping(
        self, number: bytes, key: PairKey, program: Program, wanted: WantedProgram, history: bytes
    ) -> Iterator[tuple[Mapping[str, Tensor], dict[str, Tensor]]]:
        """Yield the masks of what a query reads, and where to put those that are kept of it for later queries.

        Nothing else of the query is kept: from the masks of rows nobody computes another mask.
        """
        masks = dict[str, Tensor]()
        if self.conversations is None or not wanted.conversation:
            yield {}, masks
            return
        conversation = self.conversations.open(wanted, program, program.kept_bytes)
        with self.conversations.using(conversation, key):
            if not hmac.compare_digest(history, conversation.history(wanted.rows)):
                raise QueryError("party 0 keeps other rows of this text than party 2", AGAIN)
            yield conversation.given(wanted, program) if wanted.rows else {}, masks
            conversation.keep(wanted, number, masks)

    def Contribute(self, request: pb.ContributeRequest, context: grpc.ServicerContext) -> pb.Contribution:
        with answering(context, self.log):
            key = self.key(0)
            if request.model != self.share.manifest.model:
                raise HandshakeError("party 0 has another model than party 2", "give all three the shares of one run")
            key.require(request.proof, "contribute", request.supply, request.session)
            # used once: its zero shares serve one client
            seeds = self._taken(LOOKING, number) if len(number := request.supply) == NUMBER_BYTES else None
            asked, start = self.join(request.session), time.perf_counter()
            try:
                if seeds is None:
                    raise NotDealt("no such query was dealt, or its rows were looked up before", "ask again")
                zero, one, about = (seeds.head[at : at + SEED_BYTES] for at in range(0, 3 * SEED_BYTES, SEED_BYTES))
                if not hmac.compare_digest(about, asked.wanted.about()):
                    raise QueryError("the client wants another query of party 2 than of party 0", "ask again")
                own, rows = query_key(one, 1, request.supply), bytearray()
                coins = {party: sketch_key(seed, request.supply) for party, seed in enumerate((zero, one))}
                for name, value in self.looked_up(asked.size, asked.parts, coins).items():
                    index, p = asked.size.circuit.from_keys[name]
                    rows += wire.encode(value - p.zero_share(own, index), p.out)
                seal = key.seal("contribution", request.supply)
                seal.update(bytes(rows))
                asked.finish(pb.Answer())
                seconds, named = time.perf_counter() - start, query_id(session_label(asked.session), 0)
                self.events.ended(PhaseEnded(ONLINE, seconds, named, rounds=1, sent=len(rows)))
                return pb.Contribution(rows=bytes(rows), tag=seal.tag())
            except Error as error:
                asked.fail(error)
                raise
            except Exception:
                asked.fail(Error("party 2 has an internal error", "see its log"))
                raise

    def Seed(self, request: pb.SupplyRequest, context: grpc.ServicerContext) -> pb.SeedReply:
        with answering(context, self.log):
            number, wanted, key = self._check(request, 1, "seed")
            found = self._taken(SEEDS, number)
            if found is None:
                raise NotDealt("no such query was dealt, or its seed was given before", "ask again")
            seed, about = found.head[:SEED_BYTES], found.head[SEED_BYTES:]
            if not hmac.compare_digest(about, wanted.about(request.history)):
                raise QueryError("party 1 wants another query than was dealt, or reads other rows", "ask again")
            return pb.SeedReply(seed=seed, tag=key.proof("seed given", number, seed))


def check_seed(key: PairKey, reply: pb.SeedReply, number: bytes) -> bytes:
    """Party 1: return the seed of a query; raises ProtocolError if party 2 did not send it."""
    if not key.shows(reply.tag, "seed given", number, reply.seed):
        raise ProtocolError("the seed that came is not the one that party 2 sent", "ask again")
    return reply.seed


def _sealed(seal: Seal, corrections: Iterator[tuple[int, memoryview]]) -> Iterator[memoryview]:
    """Yield the corrections, and take each into the tag as it passes."""
    for _, payload in corrections:
        seal.update(payload)
        yield payload
