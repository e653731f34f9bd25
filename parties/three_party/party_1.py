"""Party 1: expands its share of a client's input from a seed, and computes with party 0."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import suppress

import grpc
from torch import Tensor

from parties.net.calls import answering, calling
from parties.net.endpoints import Endpoint, open_channel
from parties.net.frames import to_frames
from parties.net.watchdog import Watchdog
from parties.three_party.party import PartyService
from parties.three_party.party_2 import check_seed, query_key
from parties.three_party.sealed_rounds import Rounds
from parties.three_party.shared_model import PartyShare
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import PartyStub
from protocols import wire
from protocols.circuit import Correlations
from protocols.prg import SEED_BYTES, Key, derive_key
from protocols.three_party.endpoints import seeded_share
from secure.errors import Error, PeerLost, ProtocolError, from_code, printable
from secure.mpc.program import VERSION

PEER = "party 0"


def input_key(seed: bytes, session: bytes) -> Key:
    """Of party 1's share of a client's input; the client draws the seed afresh for each query."""
    return Key(derive_key(seed, "input", session.hex()))


class OneService(PartyService):
    """``zero``, ``helper``: the addresses of parties 0 and 2."""

    def __init__(
        self, share: PartyShare, zero: Endpoint, helper: Endpoint, *, insecure: bool = False, deadline: float = 60.0
    ) -> None:
        super().__init__(share, deadline=deadline)
        self.zero_at, self._helper_at = zero, helper
        self._channels = [
            open_channel(at, insecure=insecure, what=who) for at, who in ((zero, PEER), (helper, "party 2"))
        ]
        self.zero, self._helper = (PartyStub(channel) for channel in self._channels)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def Ask(self, requests: Iterator[pb.AskPart], context: grpc.ServicerContext) -> pb.Answer:
        watch = Watchdog(self.deadline, context.cancel)
        try:
            with answering(context, self.log):
                start, keys = self.read_ask(requests, self.key_sizes(), watch)
                if len(start.seed) != SEED_BYTES:
                    raise ProtocolError(f"a seed has {SEED_BYTES} bytes, not {len(start.seed)}")
                call = _Call(self, context)
                try:
                    return call.run(start, keys)
                finally:
                    call.close()
        finally:
            watch.stop()

    def seed(self, number: bytes) -> bytes:
        """This party's seed of a query, from party 2, which gives it once."""
        request = pb.SupplyRequest(
            model=self.share.manifest.model, supply=number, proof=self.share.links[2].proof("seed", number)
        )
        with calling("party 2", self._helper_at, "start it with: unseen party --id 2", doing="giving party 1 its seed"):
            return check_seed(self.share, self._helper.Seed(request, timeout=self.deadline), number)


class _Call:
    """One query with party 0."""

    def __init__(self, service: OneService, context: grpc.ServicerContext) -> None:
        self._service = service
        self._outbox: queue.SimpleQueue[pb.PeerMessage | None] = queue.SimpleQueue()
        self._call = service.zero.Compute(iter(self._outbox.get, None))
        self._watch = Watchdog(service.deadline, self._call.cancel)
        context.add_callback(self._call.cancel)  # the client has left

    def close(self) -> None:
        self._watch.stop()
        self._outbox.put(None)
        self._call.cancel()

    def _next(self, what: str) -> pb.PeerMessage:
        where = f"{PEER} at {self._service.zero_at}"
        try:
            with self._watch.guard():
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
            raise from_code(message.failure.code, printable(message.failure.message))
        return message

    def run(self, start: pb.AskStart, keys: list[bytes]) -> pb.Answer:
        share = self._service.share
        proof = share.links[0].proof("compute", start.session)
        hello = pb.PeerHello(version=VERSION, model=share.manifest.model, session=start.session, proof=proof)
        self._outbox.put(pb.PeerMessage(hello=hello))
        welcome = self._next("its greeting")
        if welcome.WhichOneof("content") != "welcome":
            raise ProtocolError(f"{PEER} does not begin with its greeting")
        number = welcome.welcome.supply
        try:
            return self._compute(start, keys, number)
        except Error as error:
            self._outbox.put(pb.PeerMessage(failure=pb.Failure(code=error.code, message=str(error))))
            raise

    def _compute(self, start: pb.AskStart, keys: list[bytes], number: bytes) -> pb.Answer:
        service, share = self._service, self._service.share
        key = input_key(start.seed, start.session)
        inputs: dict[str, Tensor] = {
            name: seeded_share(key, index, p.shape) for name, (index, p) in share.circuit.inputs.items()
        }
        own, begun = query_key(service.seed(number), 1, number), time.perf_counter()
        for name, rows in service.looked_up(keys).items():
            index, p = share.circuit.lookups[name]
            inputs[name] = rows + p.zero_share(own, index)
        correlations, rounds = Correlations(1, own), Rounds.of(share, share.links[0], number)
        running = rounds.run(correlations, inputs, self._next, PEER)
        for payload in running:
            for frame in to_frames(payload) if payload else ():
                self._outbox.put(pb.PeerMessage(frame=frame))
        (result,) = running.result
        seconds = time.perf_counter() - begun
        self._outbox.put(pb.PeerMessage(tag=rounds.sent_seal.tag()))
        rounds.compare(self._next("its tag"), PEER)
        self._outbox.put(None)
        with self._watch.guard(), suppress(grpc.RpcError):  # until party 0 has read all, or has told the client why not
            for _ in self._call:
                pass
        form = share.circuit.result
        result = result - share.links[0].zero_share(number, form.shape)
        encoded = bytes(wire.encode(result, form))
        return pb.Answer(share=encoded, seconds=seconds, rounds=rounds.count, sent=rounds.sent_bytes)
