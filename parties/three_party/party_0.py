"""Party 0: gets its share of a client's input, computes with party 1, takes its corrections from party 2.

The handler of party 1's stream is itself the driver of the rounds, as in the two-party server; the client's call waits
for what comes out of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
from torch import Tensor

from parties.net.calls import answering, calling, unexpected
from parties.net.endpoints import Endpoint, open_channel
from parties.net.frames import to_frames
from parties.net.watchdog import Watchdog
from parties.three_party.party import MAXIMUM_QUERIES, PartyService
from parties.three_party.party_2 import query_key
from parties.three_party.sealed_rounds import Rounds
from parties.three_party.shared_model import PartyShare
from parties.three_party.supply import Arriving, Stock
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import PartyStub
from protocols import wire
from protocols.circuit import Correlations
from secure.errors import Error, PeerLost, ProtocolError, from_code

PEER = "party 1"


@dataclass
class _Asked:
    """A client's query: its input's share, and where the answer goes."""

    session: bytes = field(repr=False)
    inputs: dict[str, Tensor] = field(repr=False)
    keys: list[bytes] = field(repr=False)
    answer: Future[pb.Answer] = field(default_factory=Future)
    joined: bool = False


def _forget(asked: _Asked) -> None:
    """Nobody waits for this answer any more."""
    asked.answer.cancel()


class ZeroService(PartyService):
    """``ahead``: queries whose corrections are kept ready. ``helper``: party 2's address."""

    def __init__(
        self, share: PartyShare, helper: Endpoint, *, ahead: int = 1, insecure: bool = False, deadline: float = 60.0
    ) -> None:
        super().__init__(share, deadline=deadline)
        self._helper_at = helper
        self._channel = open_channel(helper, insecure=insecure, what="party 2")
        self._helper = PartyStub(self._channel)
        self._asked: dict[bytes, _Asked] = {}
        self._came = threading.Condition()
        self._free = threading.BoundedSemaphore(MAXIMUM_QUERIES)
        self._stock = Stock(self._supply, ahead)
        self._stock.refill()

    def close(self) -> None:
        self._channel.close()

    def _supply(self) -> Arriving:
        """Ask party 2 for one query's corrections; they come in beside whatever else is done."""
        link = self.share.links[2]
        arriving = Arriving(self.share.circuit.circuit, lambda n: link.seal("corrections", n), self.deadline)
        request = pb.SupplyRequest(
            model=self.share.manifest.model, supply=arriving.number, proof=link.proof("supply", arriving.number)
        )

        def take() -> None:
            try:
                with calling("party 2", self._helper_at, "start it with: unseen party --id 2", doing="dealing"):
                    arriving.receive(self._helper.Supply(request))
            except Error as error:
                arriving.fail(error)

        threading.Thread(target=take, name="unseen-supply", daemon=True).start()
        return arriving

    # the client

    def Ask(self, requests: Iterator[pb.AskPart], context: grpc.ServicerContext) -> pb.Answer:
        with answering(context, self.log):
            if not self._free.acquire(blocking=False):
                raise Error(f"party 0 has {MAXIMUM_QUERIES} queries, which is its limit", "try again later")
            watch = Watchdog(self.deadline, context.cancel)
            try:
                asked = self._ask(requests, watch)
                context.add_callback(lambda: _forget(asked))
                return self._answer(asked)
            finally:
                watch.stop()
                self._free.release()

    def _answer(self, asked: _Asked) -> pb.Answer:
        """What comes out of the computation with party 1, once it has joined."""
        with self._came:
            if asked.session in self._asked:
                raise ProtocolError("this session is under way", "take a fresh one")
            self._asked[asked.session] = asked
            self._came.notify_all()
        try:
            with self._came:
                if not self._came.wait_for(lambda: asked.joined, self.deadline):
                    raise PeerLost(f"party 1 did not join within {self.deadline:g} s", "is it running? see its log")
            return asked.answer.result()  # whatever can last is watched by the driver
        finally:
            with self._came:
                del self._asked[asked.session]

    def _ask(self, requests: Iterator[pb.AskPart], watch: Watchdog) -> _Asked:
        forms = {name: p.out for name, (_, p) in self.share.circuit.inputs.items()}
        start, parts = self.read_ask(requests, [*(f.size for f in forms.values()), *self.key_sizes()], watch)
        inputs = {name: wire.decode(part, form) for (name, form), part in zip(forms.items(), parts, strict=False)}
        return _Asked(start.session, inputs, parts[len(forms) :])

    # party 1

    def Compute(self, requests: Iterator[pb.PeerMessage], context: grpc.ServicerContext) -> Iterator[pb.PeerMessage]:
        run = _Computation(self, requests, context)
        try:
            yield from run.watch.sending(run.messages())
        finally:
            run.close()
            self._stock.refill()

    def join(self, hello: pb.PeerHello) -> _Asked:
        """The query that party 1 comes for, once."""
        self.agree(PEER, hello.version, hello.model, hello.session)
        self.share.links[1].require(hello.proof, "compute", hello.session)
        with self._came:
            if not self._came.wait_for(lambda: hello.session in self._asked, self.deadline):
                raise PeerLost(f"the client did not come to party 0 within {self.deadline:g} s")
            asked = self._asked[hello.session]
            if asked.joined:
                raise ProtocolError("this session was joined before")
            asked.joined = True
            self._came.notify_all()
        return asked

    def take(self) -> Arriving:
        return self._stock.take()

    def look_up(self, asked: _Asked, number: bytes) -> int:
        """Put the looked-up rows among the inputs; the bytes that party 2 sent for them."""
        found = self.share.circuit.lookups
        shared = {name: p for name, (_, p) in found.items() if not p.public}
        link, model = self.share.links[2], self.share.manifest.model
        coming = None
        if shared:
            proof = link.proof("contribute", number, asked.session)
            request = pb.ContributeRequest(model=model, supply=number, session=asked.session, proof=proof)
            coming = self._helper.Contribute.future(request, timeout=self.deadline)  # while this party looks up
        rows = self.looked_up(asked.keys)
        if coming is not None:
            with calling("party 2", self._helper_at, "start it with: unseen party --id 2", doing="looking up rows"):
                contribution = coming.result()
            seal = link.seal("contribution", number)
            seal.update(contribution.rows)
            seal.check(contribution.tag, "the rows of party 2")
            at = 0
            for name, p in shared.items():
                rows[name] = rows[name] + wire.decode(contribution.rows[at : at + p.out.size], p.out)
                at += p.out.size
        asked.inputs.update(rows)
        return len(contribution.rows) if coming is not None else 0


class _Computation:
    """One query with party 1."""

    def __init__(self, service: ZeroService, requests: Iterator[pb.PeerMessage], context: grpc.ServicerContext) -> None:
        self._service, self._requests = service, requests
        self._asked: _Asked | None = None
        self.watch = Watchdog(service.deadline, context.cancel)

    def close(self) -> None:
        self.watch.stop()
        if self._asked is not None and not self._asked.answer.done():
            self._fail(PeerLost(f"{PEER} is gone", "see its log"))

    def _fail(self, error: Error) -> None:
        if self._asked is not None:
            with suppress(Exception):  # the client may have left, which cancels its future
                self._asked.answer.set_exception(error)

    def messages(self) -> Iterator[pb.PeerMessage]:
        """Everything that party 1 is told; a failure is the last of it, and reaches the client too."""
        log = self._service.log
        try:
            yield from self._run()
        except Error as error:
            log.warning("a query ended: %s", str(error).splitlines()[0])
            self._fail(error)
            yield pb.PeerMessage(failure=pb.Failure(code=error.code, message=str(error)))
        except Exception as error:
            unexpected(error, log)
            self._fail(Error("party 0 has an internal error", "see its log"))
            yield pb.PeerMessage(failure=pb.Failure(code=Error.code, message="internal error of party 0"))

    def _next(self, what: str) -> pb.PeerMessage:
        try:
            with self.watch.guard():
                message = next(self._requests, None)
        except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
            late = f" within {self._service.deadline:g} s" if self.watch.fired else ""
            raise PeerLost(f"{PEER} did not send {what}{late} ({type(error).__name__})", "see its log") from None
        if message is None:
            raise PeerLost(f"{PEER} is gone before {what}", "see its log")
        if message.WhichOneof("content") == "failure":
            raise from_code(message.failure.code, f"{PEER} reports: {message.failure.message}")
        return message

    def _run(self) -> Iterator[pb.PeerMessage]:
        service, hello = self._service, self._next("its greeting")
        if hello.WhichOneof("content") != "hello":
            raise ProtocolError(f"{PEER} does not begin with its greeting")
        self._asked = asked = service.join(hello.hello)
        supply = service.take()
        seed = supply.seed()  # a number that party 2 knows by now
        yield pb.PeerMessage(welcome=pb.PeerWelcome(supply=supply.number))
        rounds = Rounds.of(service.share, service.share.links[1], supply.number)
        correlations = Correlations(0, query_key(seed, 0, supply.number), supply)
        start = time.perf_counter()
        rows = service.look_up(asked, supply.number)
        running = rounds.run(correlations, asked.inputs, self._next, PEER)
        for payload in running:
            for frame in to_frames(payload) if payload else ():
                yield pb.PeerMessage(frame=frame)
        (share,) = running.result
        seconds = time.perf_counter() - start
        yield pb.PeerMessage(tag=rounds.sent_seal.tag())
        rounds.compare(self._next("its tag"), PEER)
        supply.finish()
        form = service.share.circuit.result
        share = share + service.share.links[1].zero_share(supply.number, form.shape)
        answer = pb.Answer(
            share=bytes(wire.encode(share, form)),
            seconds=seconds,
            waited=supply.waited,
            rounds=rounds.count,
            sent=rounds.sent_bytes,
            corrections=supply.size + rows,
            dealing=supply.dealing,
        )
        service.log.info("a query answered in %.2f s", seconds)
        with suppress(Exception):  # a client that has left
            asked.answer.set_result(answer)
