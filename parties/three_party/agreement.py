"""The agreement of two parties on a key of their own, which the model's owner does not know.

The caller of a pair (party 1 calls parties 0 and 2, party 0 calls party 2) opens a call when it starts, and again
whenever that call has ended. Four messages cross, in both directions; X and Y are fresh public keys of X25519:

    caller    version, model, its number, X, and a proof under the owner's seed of this pair, over X
    callee    Y, and a proof under the agreed key
    caller    a proof under the agreed key
    callee    a word that the key is in use, and the name of its store, if it has one, with a proof

    transcript = SHA-256(X, Y, both numbers, model)
    key = HKDF-SHA-256(X25519(X, Y), the owner's seed; transcript)

The call then stays open, and the key lives for as long: a restart, or a broken connection, ends it on both sides. While
it is open, the callee refuses every other call in the same party's name. (A machine that vanished without a word is
noticed after 30 seconds, by gRPC's pings.)

- Who reads all messages and knows all three of the owner's seeds learns nothing about the key (the computational
  Diffie-Hellman assumption in X25519, HKDF as a random oracle). So an owner who kept the seeds makes no proof and no
  tag of a pair, and computes no zero share.
- Who does not know the owner's seed gets no key at all, whatever it sends, even if it could break X25519.
- Each side drops its private key after the exchange, and the agreed key with the call (Python overwrites neither). Who
  takes a party's disk, or its memory at a later start, computes no earlier proof, tag or zero share.
- Who knows the owner's seed *and* takes part in the exchange in a party's place agrees on a key. That takes an active
  attack at the time of the exchange. Certificates exclude it: under TLS the channel proves the callee's role, and the
  callee compares the caller's number with the role in its certificate. Without TLS, who merely calls first is noticed:
  the honest party is refused for as long as the other call lasts, which the logs of both sides say. But who stands on
  the path, and agrees on a key with each side in the other's name, is seen by neither.

All four messages are public: they tell who talks to whom, and when a party started.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from parties.net.caller import Caller
from parties.net.peer import Peer
from parties.net.versions import check_version
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyStub
from parties.three_party.pair_keys import PairKey, other_seed
from parties.three_party.shared_model import PartyShare
from secure.deployments.three_party import PARTIES
from secure.errors import Error, HandshakeError, PeerLost, ProtocolError, printable
from secure.version import WIRE_VERSION

PUBLIC_BYTES = 32


class _Exchange:
    """One party's part of the exchange. others: the other party's number. Its private key goes with this object."""

    def __init__(self, share: PartyShare, other: int) -> None:
        self._share, self._other = share, other
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def hello_about(self, caller: int, public: bytes) -> tuple[bytes, ...]:
        return public, bytes([caller]), self._share.manifest.model.encode()

    def agree(self, theirs: bytes, *, calling: bool) -> tuple[PairKey, bytes]:
        """Return the agreed key and the transcript's hash. Raises ProtocolError for what is no public key."""
        if len(theirs) != PUBLIC_BYTES:
            raise ProtocolError(f"a public key has {PUBLIC_BYTES} bytes, not {len(theirs)}")
        ends = ((self._share.party, self.public), (self._other, theirs))
        (caller, x), (callee, y) = ends if calling else reversed(ends)
        transcript = hashlib.sha256(x + y + bytes([caller, callee]) + self._share.manifest.model.encode()).digest()
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(theirs))
        except ValueError:  # a point of small order gives zero
            raise ProtocolError("a public key is none") from None
        return self._share.pair_seeds[self._other].agreed(shared, transcript), transcript


class KeyOfCaller:
    """The keys that parties which call this one have agreed on with it. callers: the numbers of those parties.

    store: the name of the store in which this party keeps what belongs to their entries, or nothing.
    """

    def __init__(self, share: PartyShare, callers: tuple[int, ...], log: logging.Logger, store: bytes = b"") -> None:
        self._share, self._callers, self._log, self._store = share, callers, log, store
        self._agreed: dict[int, PairKey] = {}
        self._lock = threading.Lock()

    def key(self, caller: int) -> PairKey:
        """Return the key in use with a party; raises HandshakeError if there is none."""
        found = self._agreed.get(caller)
        if found is None:
            raise HandshakeError(f"{PARTIES[caller]} has agreed on no key with {self._share.role}", "ask again")
        return found

    def serve(
        self,
        requests: Iterator[pb.AgreeMessage],
        watch: Watchdog,
        who: Caller,
        waiting: AbstractContextManager[None],
    ) -> Iterator[pb.AgreeMessage]:
        """Agree on a key with a caller, and keep it until the call ends.

        watch: the guard of the wait for each of the first two messages. waiting: a place for the first of these waits.
        Raises HandshakeError, ProtocolError, PeerLost.
        """
        with waiting, watch.guard():
            hello = self._content(requests, "hello").hello
        number = hello.party
        if number not in self._callers or who.role not in (None, PARTIES[number]):
            raise HandshakeError(f"a caller who is not of the parties that call {self._share.role}")
        check_version(PARTIES[number], hello.version, self._share.role)
        if hello.model != self._share.manifest.model:
            raise HandshakeError(
                f"{PARTIES[number]} has a share of another model than {self._share.role}",
                "give all three parties the shares of one run of: unseen share-model",
            )
        exchange = _Exchange(self._share, number)
        seed = self._share.pair_seeds[number]
        seed.require(hello.proof, "agree", *exchange.hello_about(number, hello.public))
        self._refuse_a_second(number)
        key, transcript = exchange.agree(hello.public, calling=False)
        answer = pb.AgreeAnswer(public=exchange.public, proof=key.proof("callee", transcript))
        del exchange
        yield pb.AgreeMessage(answer=answer)
        with watch.guard():
            confirm = self._content(requests, "confirm").confirm
        key.require(confirm, "caller", transcript)
        with self._lock:
            self._refuse_a_second(number)
            self._agreed[number] = key
        self._log.info("agreed on a key with %s", PARTIES[number])
        try:
            proof = key.proof("store", self._store) if self._store else b""
            yield pb.AgreeMessage(done=pb.AgreeDone(store=self._store, proof=proof))
            with suppress(Exception):  # gRPC raises bare Exception subclasses when the stream breaks
                next(requests, None)
        finally:
            del self._agreed[number]
            self._log.info("the key with %s has ended", PARTIES[number])

    def _refuse_a_second(self, number: int) -> None:
        if number in self._agreed:
            who = PARTIES[number]
            self._log.warning("a second caller wants to agree on a key as %s: refused", who)
            raise HandshakeError(
                f"{who} has agreed on a key with {self._share.role} already, and is still connected",
                f"run {who} only once; after a crash of its machine, wait 30 s",
            )

    @staticmethod
    def _content(requests: Iterator[pb.AgreeMessage], kind: str) -> pb.AgreeMessage:
        try:
            message = next(requests, None)
        except Error:
            raise
        except Exception as error:  # gRPC raises bare Exception subclasses when the stream breaks
            raise PeerLost(f"a caller left before its {kind} ({type(error).__name__})") from None
        if message is None or message.WhichOneof("content") != kind:
            raise ProtocolError(f"an agreement on a key has no {kind} where it should")
        return message


class KeyOfCallee:
    """The key with a party that this one calls. It is agreed on at first need, and again after the call has ended.

    number: that party's. deadline: seconds that an exchange may last. lost: called when the key has ended; met: called
    with the name of that party's store, or nothing, when there is a new one. Neither may block.
    """

    def __init__(
        self,
        share: PartyShare,
        number: int,
        peer: Peer,
        deadline: float,
        log: logging.Logger,
        lost: Callable[[], object] = lambda: None,
        met: Callable[[bytes], object] = lambda store: None,
    ) -> None:
        self._share, self._number, self._peer, self._deadline = share, number, peer, deadline
        self._log, self._lost, self._met = log, lost, met
        self._lock = threading.Lock()  # held during an exchange, so never taken where gRPC's messages are delivered
        self._agreed: tuple[Any, PairKey] | None = None
        self._closed = False

    def key(self) -> PairKey:
        """Return the key in use, after agreeing on one if there is none. Raises PeerLost, HandshakeError."""
        with self._lock:
            found = self._agreed
            if found is None:
                if self._closed:
                    raise PeerLost(f"{self._share.role} is ending")
                found = self._agreed = self._agree()
                if not found[0].is_active():
                    self._agreed = None
        return found[1]

    def try_now(self) -> None:
        """Agree on a key if the other party is there; else the first query will."""
        with suppress(Error, ValueError):  # gRPC raises ValueError if the channel was closed meanwhile
            self.key()

    def close(self) -> None:
        """End the agreement."""
        self._closed, found = True, self._agreed
        if found is not None:
            found[0].cancel()

    def _agree(self) -> tuple[Any, PairKey]:
        exchange = _Exchange(self._share, self._number)
        outbox: queue.SimpleQueue[pb.AgreeMessage | None] = queue.SimpleQueue()
        call = PartyStub(self._peer.channel).Agree(iter(outbox.get, None))

        def ended() -> None:
            outbox.put(None)
            if self._agreed is not None and self._agreed[0] is call:
                self._agreed = None
                self._log.info("the key with %s has ended", self._peer)
            self._lost()

        watch = Watchdog(self._deadline, call.cancel)
        try:
            with self._peer.calling("agreeing on a key"), watch.guard():
                outbox.put(pb.AgreeMessage(hello=self._hello(exchange)))
                answer = self._content(call, "answer").answer
                key, transcript = exchange.agree(answer.public, calling=True)
                if not key.shows(answer.proof, "callee", transcript):
                    raise other_seed(str(self._peer), key.pair)
                outbox.put(pb.AgreeMessage(confirm=key.proof("caller", transcript)))
                done = self._content(call, "done").done
                if done.store and not key.shows(done.proof, "store", done.store):
                    raise ProtocolError(f"{self._peer} did not name its store")
        except BaseException as error:
            call.cancel()
            outbox.put(None)
            if watch.fired:
                raise PeerLost(f"{self._peer} agreed on no key within {self._deadline:g} s", "see its log") from None
            if isinstance(error, Error):
                self._log.warning("no key with %s: %s", self._peer, printable(str(error).splitlines()[0]))
            raise
        finally:
            watch.stop()
        if not call.add_callback(ended):
            ended()
        self._log.info("agreed on a key with %s", self._peer)
        self._met(done.store)
        return call, key

    def _hello(self, exchange: _Exchange) -> pb.AgreeHello:
        own = self._share.party
        proof = self._share.pair_seeds[self._number].proof("agree", *exchange.hello_about(own, exchange.public))
        return pb.AgreeHello(
            version=WIRE_VERSION,
            model=self._share.manifest.model,
            party=own,
            public=exchange.public,
            proof=proof,
        )

    def _content(self, call: Any, kind: str) -> pb.AgreeMessage:
        message: pb.AgreeMessage | None = next(call, None)
        if message is None or message.WhichOneof("content") != kind:
            raise ProtocolError(f"{self._peer} ended the agreement on a key before its {kind}")
        return message
