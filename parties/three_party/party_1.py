"""Party 1: it expands its share of a client's input from a seed, and computes with party 0."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import ExitStack, suppress

import grpc
from torch import Tensor

from parties.net.caller import permit
from parties.net.calls import failed, failure, unexpected
from parties.net.frames import to_frames
from parties.net.peer import Peer
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyStub
from parties.telemetry.events import Events
from parties.three_party.asked import Asked
from parties.three_party.conversations import WantedProgram
from parties.three_party.pair_keys import PairKey
from parties.three_party.party import PartyService
from parties.three_party.party_2 import check_seed, query_key, sketch_key
from parties.three_party.sealed_rounds import Rounds
from parties.three_party.shared_model import PartyShare, SharedProgram
from protocols.circuit import Correlations
from protocols.prg import SEED_BYTES, Key, derive_key
from protocols.three_party.endpoints import seeded_share
from secure.deployments.three_party import CLIENT, PARTIES
from secure.errors import Error, PeerLost, ProtocolError, printable
from secure.version import WIRE_VERSION

PEER, _, PARTY_2 = PARTIES


def input_key(seed: bytes, session: bytes) -> Key:
    """Return the key of party 1's share of a client's input; the client draws a fresh seed for each query."""
    return Key(derive_key(seed, "input", session.hex()))


class Party1Service(PartyService):
    """The service of party 1. A query has a thread of its own, so that its client hears of progress meanwhile."""

    permissions = permit("Party", Ask=[CLIENT])
    called_by = ()
    joined_by = ""

    def __init__(
        self, share: PartyShare, party_0: Peer, party_2: Peer, *, deadline: float = 60.0, events: Events | None = None
    ) -> None:
        super().__init__(share, {0: party_0, 2: party_2}, deadline=deadline, events=events)
        self.party_0, self._party_2 = party_0, party_2

    def asked_sizes(self, size: SharedProgram) -> list[int]:
        return self.key_sizes(size)

    def begin(self, asked: Asked, place: ExitStack) -> None:
        if len(asked.seed) != SEED_BYTES:
            raise ProtocolError(f"a seed has {SEED_BYTES} bytes, not {len(asked.seed)}")
        asked.joined = True
        # the thread frees the place at its end, however early the client leaves
        threading.Thread(target=self._answer, args=(asked, place.pop_all()), name="unseen-query", daemon=True).start()

    def _answer(self, asked: Asked, place: ExitStack) -> None:
        with ExitStack() as stack:
            stack.enter_context(place)
            call = _Call(self, asked)
            stack.callback(call.close)
            try:
                asked.finish(call.run())
            except Error as error:
                self.end(asked)
                asked.fail(error)
                call.fail(error)
            except Exception as error:
                unexpected(error, self.log)
                self.end(asked)
                asked.fail(Error("party 1 has an internal error", "see its log"))

    def seed(self, asked: Asked, number: bytes) -> bytes:
        """Get this party's seed of a query from party 2, which gives it only once."""
        with asked.progress.waiting(PARTY_2):
            key, wanted, history = self.key(2), asked.wanted, asked.history
            request = pb.SupplyRequest(
                model=self.share.manifest.model,
                supply=number,
                proof=key.proof("seed", number, wanted.about(history)),
                wanted=wanted.message(),
                history=history,
            )
            stub = PartyStub(self._party_2.channel)
            with self._party_2.calling("giving party 1 its seed"):
                return check_seed(key, stub.Seed(request, timeout=self.deadline), number)


class _Call:
    """One query, computed with party 0."""

    def __init__(self, service: Party1Service, asked: Asked) -> None:
        self._service, self._asked = service, asked
        self._outbox: queue.SimpleQueue[pb.PeerMessage | None] = queue.SimpleQueue()
        self._call = PartyStub(service.party_0.channel).Compute(iter(self._outbox.get, None))
        self._watch = Watchdog(service.deadline, self._call.cancel)
        asked.when_left(self._call.cancel)

    def close(self) -> None:
        self._watch.stop()
        self._outbox.put(None)
        self._call.cancel()

    def _next(self, what: str) -> pb.PeerMessage:
        where = str(self._service.party_0)
        try:
            with self._asked.progress.waiting(PEER), self._watch.guard():
                message: pb.PeerMessage = next(self._call)
        except StopIteration:
            raise PeerLost(f"{where} ended the query before {what}", "see its log") from None
        except grpc.RpcError as error:
            details = printable(getattr(error, "details", lambda: "")() or type(error).__name__)
            gone = (
                f"did not answer within {self._service.deadline:g} s" if self._watch.fired else f"is gone ({details})"
            )
            raise PeerLost(f"{where} {gone}; party 1 waited for {what}", "see its log") from None
        if message.WhichOneof("content") == "failure":
            raise failed(message.failure)
        return message

    def run(self) -> pb.Answer:
        asked = self._asked
        with asked.progress.waiting(PEER):
            key = self._service.key(0)
        with self._service.conversing(asked, key):
            return self._answered(key, asked.session, asked.wanted, asked.history)

    def _answered(self, key: PairKey, session: bytes, wanted: WantedProgram, history: bytes) -> pb.Answer:
        hello = pb.PeerHello(
            version=WIRE_VERSION,
            model=self._service.share.manifest.model,
            session=session,
            proof=key.proof("compute", session, wanted.about(history)),
            wanted=wanted.message(),
            history=history,
        )
        self._outbox.put(pb.PeerMessage(hello=hello))
        welcome = self._next("its greeting")
        if welcome.WhichOneof("content") != "welcome":
            raise ProtocolError(f"{PEER} does not begin with its greeting")
        return self._compute(key, welcome.welcome.supply)

    def fail(self, error: Error) -> None:
        """Tell party 0 why this query has ended."""
        self._outbox.put(pb.PeerMessage(failure=failure(error)))
        self._end()

    def _end(self) -> None:
        """Wait until party 0 has read everything, or has told the client why it did not."""
        self._outbox.put(None)
        with self._watch.guard(), suppress(grpc.RpcError):
            for _ in self._call:
                pass

    def _compute(self, key: PairKey, number: bytes) -> pb.Answer:
        service, asked, size = self._service, self._asked, self._asked.size
        shared = input_key(asked.seed, asked.session)
        inputs: dict[str, Tensor] = {
            name: seeded_share(shared, index, p.shape) for name, (index, p) in size.circuit.inputs.items()
        }
        seed, begun = service.seed(asked, number), time.perf_counter()
        own, coins = query_key(seed, 1, number), {0: key.sketch_key(number), 2: sketch_key(seed, number)}
        for name, rows in service.looked_up(size, asked.parts, coins).items():
            index, p = size.circuit.from_keys[name]
            inputs[name] = rows + p.zero_share(own, index)
        correlations, rounds = Correlations(1, own), Rounds.of(service.share, size, key, number)
        running = rounds.run(correlations, inputs | service.given(asked), self._next, PEER)
        for payload in running:
            for frame in to_frames(payload) if payload else ():
                self._outbox.put(pb.PeerMessage(frame=frame))
        seconds = time.perf_counter() - begun
        self._outbox.put(pb.PeerMessage(tag=rounds.sent_seal.tag()))
        rounds.compare(self._next("its tag"), PEER)
        self._end()
        encoded = service.for_client(size, service.keep(asked, number, running.result), key, number)
        answer = pb.Answer(share=encoded, seconds=seconds, rounds=rounds.count, sent=rounds.sent_bytes)
        service.answered(asked, answer, rounds.received_bytes)
        return answer
