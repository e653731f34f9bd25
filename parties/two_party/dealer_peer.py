"""The dealer as server and client see it: seeds are sealed to its key, and its answers prove that it opened them."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from parties.net.endpoints import Endpoint
from parties.net.frames import chunk_data
from parties.net.network import Network
from parties.net.peer import Peer
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import DealerStub
from parties.served.files import state_directory
from parties.two_party.conversations import Place
from parties.two_party.keys import (
    PROCESS_BYTES,
    assign_proof,
    close_proof,
    deal_proof,
    join_proof,
    model_name,
    renew_proof,
    stock_proof,
)
from parties.two_party.sealing import PUBLIC_FILE, DealerKey, answer_proof, fingerprint_of
from protocols.prg import fresh_seed
from secure.deployments.two_party import DEALER
from secure.errors import DealerError
from secure.mpc.program import Program
from secure.version import WIRE_VERSION

ANSWERING = 10.0  # seconds that the dealer may take to answer; Register checks a Program
REGISTERING = 60.0
ENDING = 2.0
DEALING = 600.0  # seconds that all corrections of a query may take
_DEAL = f"/{pb.DESCRIPTOR.services_by_name['Dealer'].full_name}/Deal"  # called without the stub, which copies all data


class DealerPeer:
    """An open channel to the dealer, and the key to which seeds for it are sealed.

    known: the dealer's key: the path of its ``dealer.pub``, the text in it, or its fingerprint. Without it, a network
    that proves roles (TLS) vouches for the key that the dealer itself tells; on one that proves nothing, it must be the
    key of this user's own dealer on this machine, whose state directory has ``dealer.pub``. There is no trust on first
    use. state: a directory to look at before that one. answering: seconds that the dealer may take for a
    short answer. Raises InvalidInput for a ``known`` that is no key, EndpointError.

    Every call raises DealerError if the dealer cannot be reached, refuses, or does not prove that it opened the seal.
    """

    def __init__(
        self,
        address: str | Endpoint,
        network: Network,
        known: str | None = None,
        *,
        state: Path | None = None,
        answering: float = ANSWERING,
    ) -> None:
        self._proves, self._known = network.proves_roles, fingerprint_of(known) if known else None
        self._key: DealerKey | None = None
        self._state = state
        self._answering = min(answering, ANSWERING)
        self._process = secrets.token_bytes(PROCESS_BYTES)
        self._peer = Peer("the dealer", address, network, role=DEALER, start="unseen dealer")

    def __str__(self) -> str:
        return str(self._peer)

    def close(self) -> None:
        self._peer.close()

    def key(self, *, again: bool = False) -> DealerKey:
        """Return the dealer's key; it is asked for it only once, or ``again``."""
        if self._key is None or again:
            with self.asking("asking for its key") as stub:
                found = DealerKey(stub.Key(pb.DealerKeyRequest(), timeout=self._answering).key)
            expected = self._expected()
            if expected is not None and not hmac.compare_digest(expected, found.fingerprint):
                raise DealerError(
                    f"{self} has the key {found.fingerprint}, not {expected}",
                    "check its address; if it is the right dealer, give its own dealer.pub: --dealer-key",
                )
            self._key = found
        return self._key

    def _expected(self) -> str | None:
        """Return the fingerprint that the key must have; None if the channel has proved who answers."""
        if self._known is not None or self._proves:
            return self._known
        places = [state / PUBLIC_FILE for state in (self._state, state_directory()) if state is not None]
        found = [path for path in places if path.exists()]
        if not found:
            raise DealerError(
                f"the key of {self} is not known, and a channel without certificates proves nothing",
                "copy dealer.pub from the dealer's state directory and give it: --dealer-key "
                "(secure.TwoParty(dealer_key=...)), or use certificates",
            )
        return fingerprint_of(str(found[0]))

    # the server's calls

    def register(self, program: Program, mask_seed: bytes) -> bytes:
        """Send the Program and the mask seed; this is harmless if the dealer knows them.

        Return the name of the store where the dealer keeps its halves of entries.
        """
        sealed = self.key(again=True).seal(mask_seed, "register", program.digest)
        with self.asking("registering the Program") as stub:
            reply = stub.Register(pb.RegisterRequest(program=program.encoded, sealed=sealed), timeout=REGISTERING)
        expected = program.digest, model_name(mask_seed)
        self._check(reply.proof, answer_proof(mask_seed, sealed, *expected, reply.store), "registering the Program")
        if (reply.program_digest, reply.weights_digest) != expected:
            raise DealerError("the dealer computes another digest of the Program", "run the same version everywhere")
        store: bytes = reply.store
        return store

    def renew(self, program: Program, mask_seed: bytes) -> bool:
        """Keep a model registered; False if the dealer does not know it."""
        nonce, names = secrets.token_bytes(16), (program.digest, model_name(mask_seed))
        digest, name = names
        with self.asking("renewing the Program") as stub:
            request = pb.RenewRequest(
                program_digest=digest,
                weights_digest=name,
                nonce=nonce,
                proof=renew_proof(mask_seed, "server", nonce, *names),
                process=self._process,
            )
            proof = stub.Renew(request, timeout=self._answering).proof
        if proof:
            self._check(proof, renew_proof(mask_seed, "dealer", nonce, *names), "renewing the Program")
        return bool(proof)

    def join(
        self, session: bytes, program_digest: str, weights_digest: str, mask_seed: bytes, server_seed: bytes
    ) -> None:
        """Join a client's session with a fresh seed."""
        agreed = program_digest, weights_digest
        sealed = self.key().seal(server_seed, "join", session, *agreed)
        request = pb.JoinRequest(
            session=session,
            program_digest=program_digest,
            weights_digest=weights_digest,
            sealed=sealed,
            proof=join_proof(mask_seed, session, *agreed, server_seed),
            process=self._process,
        )
        with self.asking("joining the client's session") as stub:
            proof = stub.Join(request, timeout=self._answering).proof
        self._check(proof, answer_proof(server_seed, sealed, session), "joining the client's session")

    def deal(self, session: bytes, query: int, proving: bytes, places: Sequence[Place] = ()) -> Any:
        """Return the call that brings the corrections of a query; use it inside ``asking``.

        proving: the session's ``proving_key``. places: that of the query in a conversation, if it stands in one, and
        those of the queries behind it that are dealt together with it.
        """
        about, place = ((*places[0], len(places)), places[0].message()) if places else ((), None)
        proof = deal_proof(proving, session, query, *about)
        request = pb.DealRequest(session=session, query=query, proof=proof, place=place, steps=len(places))
        call = self._peer.channel.unary_stream(_DEAL, pb.DealRequest.SerializeToString, chunk_data)
        return call(request, timeout=DEALING)

    @contextmanager
    def stocking(
        self, program_digest: str, weights_digest: str, mask_seed: bytes
    ) -> Iterator[tuple[bytes, bytes, Iterator[bytes]]]:
        """Yield the id of a new entry, this server's fresh seed of it, and its corrections as they come.

        The iterator ends only when the dealer keeps its half; otherwise it raises.
        """
        agreed, seed = (program_digest, weights_digest), fresh_seed()
        sealed = self.key().seal(seed, "stock", *agreed)
        request = pb.StockRequest(
            program_digest=program_digest,
            weights_digest=weights_digest,
            sealed=sealed,
            proof=stock_proof(mask_seed, *agreed, seed),
        )
        with self.asking("dealing ahead") as stub:
            call = stub.Stock(request, timeout=DEALING)
            try:
                first = next(call, pb.StockPart()).start
                self._check(first.proof, answer_proof(seed, sealed, first.entry), "dealing ahead")
                yield first.entry, seed, _stocked(call)
            finally:
                call.cancel()  # does nothing if everything came

    def assign(self, session: bytes, query: int, entry: bytes, proving: bytes, entry_proving: bytes) -> bytes:
        """Have an entry given to a query; return the client's key of it, sealed to the client, or nothing if it is not
        known there. The client checks the seal.

        proving, entry_proving: the session's and the entry's keys for proofs.
        """
        about = session, query, entry
        request = pb.AssignRequest(
            session=session,
            query=query,
            entry=entry,
            proof=assign_proof(proving, *about),
            entry_proof=assign_proof(entry_proving, *about),
        )
        with self.asking(f"assigning query {query}") as stub:
            sealed: bytes = stub.Assign(request, timeout=self._answering).sealed
        return sealed

    def end(self, session: bytes, proving: bytes) -> bool:
        """Tell the dealer that a session has ended; return whether it heard. Otherwise the session expires there."""
        request = pb.CloseRequest(session=session, proof=close_proof(proving, session))
        try:
            DealerStub(self._peer.channel).Close(request, timeout=ENDING)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.FAILED_PRECONDITION)  # the dealer's own answer: it has none
        except ValueError:  # the channel is closed, because the service has ended
            return False
        return True

    # the client's call

    def open(self, program_digest: str, weights_digest: str, client_seed: bytes, deadline: float) -> bytes | None:
        """Open a session; return its id, or None if the dealer does not know the model."""
        agreed = program_digest, weights_digest
        sealed = self.key().seal(client_seed, "open", WIRE_VERSION, *agreed)
        request = pb.OpenRequest(
            version=WIRE_VERSION, program_digest=program_digest, weights_digest=weights_digest, sealed=sealed
        )
        with self.asking("opening a session") as stub:
            reply = stub.Open(request, timeout=deadline)
        if not reply.session:
            return None
        self._check(reply.proof, answer_proof(client_seed, sealed, reply.session), "opening a session")
        session: bytes = reply.session
        return session

    @contextmanager
    def asking(self, doing: str) -> Iterator[DealerStub]:
        """Yield the dealer's stub, and turn a call's gRPC error into a DealerError that says at what it failed."""
        with self._peer.calling(doing, kind=DealerError):
            yield DealerStub(self._peer.channel)

    def _check(self, proof: bytes, expected: bytes, doing: str) -> None:
        if not hmac.compare_digest(proof, expected):
            raise DealerError(
                f"{self} did not prove that it could open what was sealed to it ({doing})",
                "something else answers at the dealer's address, and has learned nothing",
            )


def _stocked(call: Iterator[pb.StockPart]) -> Iterator[bytes]:
    """Yield the corrections of an entry. Raises DealerError unless the dealer says last that it keeps its half."""
    for part in call:
        kind, data = part.WhichOneof("content"), part.data  # read once: a message copies its bytes at each access
        if kind == "done":
            return
        if kind != "data":
            raise DealerError(f"the dealer sent {kind!r} in the middle of an entry")
        yield data
    raise DealerError("the dealer stopped in the middle of an entry", "see its log")
