"""Party 2: its share of every value comes from seeds, so it deals ahead of queries and sees no message of their rounds.

It knows the masks of every opening, and two of the three summands of every weight. Together with either other party's
messages these would show everything; the assumption that at most one party is corrupted excludes this.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc

from parties.net.caller import permit
from parties.net.calls import answering
from parties.net.frames import to_chunks
from parties.net.watchdog import Watchdog
from parties.store.entries import Store, label_of
from parties.store.filler import KEPT, MOST_ENTRIES
from parties.store.memory import MemoryStore
from parties.three_party.pair_keys import PairKey, Seal
from parties.three_party.party import PartyService
from parties.three_party.shared_model import PartyShare
from parties.three_party.supply import NUMBER_BYTES
from proto import unseen_pb2 as pb
from protocols import wire
from protocols.circuit import deal
from protocols.prg import SEED_BYTES, Key, derive_key, fresh_seed
from secure.deployments.three_party import CLIENT, PARTIES
from secure.errors import Error, HandshakeError, ProtocolError, QueryError

MAXIMUM_SEEDS = MOST_ENTRIES + 1024  # seeds of party 1 that wait for it: those of party 0's store, and of its memory
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

    def __init__(self, share: PartyShare, *, deadline: float = 60.0, store: Store | None = None) -> None:
        self._store: Store = store or MemoryStore()
        model = share.manifest.model
        self._seeds = label_of("seed", model)  # seeds of party 1, until it takes them
        self._looking = label_of("rows", model)  # both parties' seeds, until rows are looked up
        super().__init__(share, {}, deadline=deadline)

    def store_name(self) -> bytes:
        return self._store.name

    def close(self) -> None:
        super().close()
        self._store.close()

    def asked_sizes(self) -> list[int]:
        return self.key_sizes()

    def _check(self, request: pb.SupplyRequest, party: int, purpose: str) -> tuple[bytes, PairKey]:
        """Return a request's number, and the key that its proof was made with."""
        if request.model != self.share.manifest.model:
            raise HandshakeError(
                f"party {party} has another model than party 2", "give all three the shares of one run of share-model"
            )
        if len(request.supply) != NUMBER_BYTES:
            raise ProtocolError(f"a query's number has {NUMBER_BYTES} bytes, not {len(request.supply)}")
        key = self.key(party)
        key.require(request.proof, purpose, request.supply)
        return request.supply, key

    def Supply(self, request: pb.SupplyRequest, context: grpc.ServicerContext) -> Iterator[pb.SupplyPart | bytes]:
        watch = Watchdog(self.deadline, context.cancel)
        try:
            with answering(context, self.log):
                number, key = self._check(request, 0, "supply")
                yield from watch.sending(self._supply(number, key))
        finally:
            watch.stop()

    def _supply(self, number: bytes, key: PairKey) -> Iterator[pb.SupplyPart | bytes]:
        zero, one = fresh_seed(), fresh_seed()
        self._store.sweep(before=time.time() - SEEDS_KEPT)
        for label, kept in ((self._seeds, one), *([(self._looking, zero + one)] if self.key_sizes() else [])):
            if self._store.level(label).entries >= MAXIMUM_SEEDS:
                self._store.take(label)  # the oldest
            self._store.put(label, number, kept)
        seal = supply_seal(key, number, zero)
        yield pb.SupplyPart(seed=zero)
        start = time.perf_counter()
        keys = (query_key(zero, 0, number), query_key(one, 1, number))
        corrections = deal(self.share.circuit.circuit, *keys, self.share.weights)
        yield from to_chunks(_sealed(seal, corrections), pb.SupplyPart.DATA_FIELD_NUMBER)
        yield pb.SupplyPart(tag=seal.tag())
        self.log.info("dealt a query in %.2f s", time.perf_counter() - start)

    def Contribute(self, request: pb.ContributeRequest, context: grpc.ServicerContext) -> pb.Contribution:
        with answering(context, self.log):
            key = self.key(0)
            if request.model != self.share.manifest.model:
                raise HandshakeError("party 0 has another model than party 2", "give all three the shares of one run")
            key.require(request.proof, "contribute", request.supply, request.session)
            # used once: its zero shares serve one client
            seeds = self._store.take(self._looking, number) if len(number := request.supply) == NUMBER_BYTES else None
            asked = self.join(request.session)
            try:
                if seeds is None:
                    raise QueryError("no such query was dealt, or its rows were looked up before", "ask again")
                zero, one = seeds.head[:SEED_BYTES], seeds.head[SEED_BYTES:]
                own, rows = query_key(one, 1, request.supply), bytearray()
                coins = {party: sketch_key(seed, request.supply) for party, seed in enumerate((zero, one))}
                for name, value in self.looked_up(asked.parts, coins).items():
                    index, p = self.share.circuit.from_keys[name]
                    rows += wire.encode(value - p.zero_share(own, index), p.out)
                seal = key.seal("contribution", request.supply)
                seal.update(bytes(rows))
                asked.finish(pb.Answer())
                return pb.Contribution(rows=bytes(rows), tag=seal.tag())
            except Error as error:
                asked.fail(error)
                raise
            except Exception:
                asked.fail(Error("party 2 has an internal error", "see its log"))
                raise

    def Seed(self, request: pb.SupplyRequest, context: grpc.ServicerContext) -> pb.SeedReply:
        with answering(context, self.log):
            number, key = self._check(request, 1, "seed")
            found = self._store.take(self._seeds, number)
            if found is None:
                raise QueryError("no such query was dealt, or its seed was given before", "ask again")
            seed = found.head
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
