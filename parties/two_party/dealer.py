"""The dealer's service: it hands out correlated randomness, and sees no input, no weight and no share.

It learns Programs (public), the weight-mask seed of every registered model, and the seeds of both parties of every
session. Together with either party's messages these would show everything, so the dealer must not collude with either
party.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import grpc

from parties.net.caller import Permissions, permit
from parties.net.calls import answering
from parties.net.frames import to_chunks
from parties.net.watchdog import Watchdog
from parties.two_party.keys import (
    MAXIMUM_QUERY,
    SESSION_BYTES,
    Burnt,
    deal_proof,
    join_proof,
    mask_key,
    new_session,
    query_key,
)
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import DealerServicer
from protocols.circuit import deal
from protocols.prg import SEED_BYTES
from protocols.weights import DealerWeights
from secure.deployments.two_party import CLIENT, SERVER
from secure.errors import Error, HandshakeError, InvalidProgram, ProtocolError, QueryError
from secure.mpc.budget import Budget
from secure.mpc.program import Program
from secure.version import WIRE_VERSION

log = logging.getLogger("unseen.dealer")

MAXIMUM_MODELS, MAXIMUM_SESSIONS = 64, 4096
READING = 120.0  # seconds that a server may take to read one part of its corrections


@dataclass(eq=False)
class _RegisteredModel:
    program: Program
    weights_digest: str
    weights: DealerWeights = field(repr=False)
    mask_seed: bytes = field(repr=False)


@dataclass(eq=False)
class _DealtSession:
    model: _RegisteredModel
    client_seed: bytes = field(repr=False)
    server_seed: bytes | None = field(default=None, repr=False)
    burnt: Burnt = field(default_factory=Burnt)


class DealerService(DealerServicer):
    """The dealer. Its state is in memory only: a restarted dealer knows no session, so it deals nothing twice.

    budget: the most that one Program may take; a larger one is not registered.
    """

    permissions: ClassVar[Permissions] = permit(
        "Dealer", Register=[SERVER], Open=[CLIENT], Join=[SERVER], Deal=[SERVER]
    )

    def __init__(self, budget: Budget | None = None) -> None:
        self._budget = budget or Budget()
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[str, str], _RegisteredModel] = OrderedDict()
        self._sessions: OrderedDict[bytes, _DealtSession] = OrderedDict()

    def Register(self, request: pb.RegisterRequest, context: grpc.ServicerContext) -> pb.RegisterReply:
        with answering(context, log):
            return pb.RegisterReply(program_digest=self._register(request))

    def _register(self, request: pb.RegisterRequest) -> str:
        _require_seed(request.mask_seed)
        if not re.fullmatch("[0-9a-f]{64}", request.weights_digest):
            raise HandshakeError("the weights digest is not a SHA-256 in hexadecimal digits")
        key = (hashlib.sha256(request.program).hexdigest(), request.weights_digest)
        with self._lock:
            known = self._models.get(key)
        if known is None:
            model = self._new_model(request)
            with self._lock:
                known = self._models.setdefault(key, model)
                while len(self._models) > MAXIMUM_MODELS:
                    self._models.popitem(last=False)
            log.info("registered program %s with weights %s", key[0][:12], key[1][:12])
        if not hmac.compare_digest(known.mask_seed, request.mask_seed):
            # replacing it would make every answer of the other server wrong
            raise HandshakeError(
                "these weights are registered with another mask seed, by another server or before its state was lost",
                "give all servers of a model the same --state, or restart the dealer",
            )
        return key[0]

    def _new_model(self, request: pb.RegisterRequest) -> _RegisteredModel:
        try:
            program = self._budget.decode(request.program)
        except InvalidProgram as error:
            raise HandshakeError(str(error)) from None
        if program.encoded != request.program:
            raise HandshakeError("the Program is not in its canonical encoding")
        weights = DealerWeights(mask_key(request.mask_seed, request.weights_digest), program.weight_shapes)
        return _RegisteredModel(program, request.weights_digest, weights, request.mask_seed)

    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        with answering(context, log):
            if request.version != WIRE_VERSION:
                raise HandshakeError(
                    f"version: the client has '{request.version}', this dealer '{WIRE_VERSION}'",
                    "use the same version of unseen everywhere",
                )
            _require_seed(request.client_seed)
            session = new_session()
            with self._lock:
                model = self._models.get((request.program_digest, request.weights_digest))
                if model is None:
                    raise HandshakeError(
                        f"it does not know the Program {request.program_digest[:12]!r} with these weights",
                        "start the server with this dealer's address, and use the same dealer for the client",
                    )
                self._sessions[session] = _DealtSession(model, request.client_seed)
                while len(self._sessions) > MAXIMUM_SESSIONS:
                    self._sessions.popitem(last=False)
            return pb.OpenReply(session=session)

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:
        with answering(context, log):
            _require_seed(request.server_seed)
            session = self._session(request.session)
            agreed = (session.model.program.digest, session.model.weights_digest)
            if (request.program_digest, request.weights_digest) != agreed:
                raise HandshakeError("the session was opened for another Program or other weights", "connect again")
            proof = join_proof(session.model.mask_seed, request.session, *agreed, request.server_seed)
            if not hmac.compare_digest(proof, request.proof):
                raise HandshakeError("only the server of this model can join its sessions")
            with self._lock:
                if (
                    session.server_seed is not None
                ):  # a second seed would pair one client's masks with two of the server's
                    raise ProtocolError("the session was already joined", "connect again")
                session.server_seed = request.server_seed
            return pb.JoinReply()

    def Deal(self, request: pb.DealRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        watch = Watchdog(READING, context.cancel)
        try:
            with answering(context, log):
                yield from watch.sending(self._deal(request.session, request.query, request.proof))
        finally:
            watch.stop()

    def _deal(self, token: bytes, query: int, proof: bytes) -> Iterator[pb.Chunk]:
        session = self._session(token)
        if session.server_seed is None:
            raise QueryError("the session was not joined by a server")
        if query >= MAXIMUM_QUERY or not hmac.compare_digest(deal_proof(session.server_seed, token, query), proof):
            raise QueryError("only the server that joined the session gets its corrections")
        session.burnt.burn(query)
        program = session.model.program
        server = query_key(session.server_seed, "server", token, program.digest, query)
        client = query_key(session.client_seed, "client", token, program.digest, query)
        start = time.perf_counter()
        corrections = deal(program.circuit, server, client, session.model.weights)
        yield from to_chunks(payload for _, payload in corrections)
        log.info("dealt query %d of a session in %.2f s", query, time.perf_counter() - start)

    def _session(self, token: bytes) -> _DealtSession:
        with self._lock:
            session = self._sessions.get(token) if len(token) == SESSION_BYTES else None
        if session is None:
            raise Error("no such session (a restarted dealer knows none)", "connect again")
        return session


def _require_seed(seed: bytes) -> None:
    if len(seed) != SEED_BYTES:
        raise ProtocolError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
