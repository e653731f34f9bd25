"""The dealer's service: hands out correlated randomness, and sees neither input nor weight nor share.

It learns Programs (public), the weight-mask seed of every registered model, and the seeds of both parties of every session: together
with either party's messages these would show everything, which is why the dealer must not collude with either.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from parties.errors import PartyError, QueryError
from parties.frames import to_chunks
from parties.sessions import SESSION_BYTES, Burnt, mask_key, new_session, query_key
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import DealerServicer
from protocols.circuit import deal
from protocols.prg import SEED_BYTES
from protocols.weights import DealerWeights
from secure.program import VERSION, InvalidProgram, Program

log = logging.getLogger("unseen.dealer")

MAXIMUM_MODELS, MAXIMUM_SESSIONS = 64, 4096


@dataclass(eq=False)
class _Model:
    program: Program
    weights: DealerWeights
    mask_seed: bytes


@dataclass(eq=False)
class _Session:
    model: _Model
    client_seed: bytes = field(repr=False)
    server_seed: bytes | None = field(default=None, repr=False)
    burnt: Burnt = field(default_factory=Burnt)


class DealerService(DealerServicer):
    """State in memory only: a restarted dealer knows no session, so nothing of an old one can be dealt again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[str, str], _Model] = OrderedDict()
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()

    def Register(self, request: pb.RegisterRequest, context: grpc.ServicerContext) -> pb.RegisterReply:  # noqa: N802
        try:
            program = Program.from_bytes(request.program)
        except InvalidProgram as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        _require_seed(request.mask_seed, context)
        key = (program.digest, request.weights_digest)
        with self._lock:
            known = self._models.get(key)
            if known is None or not hmac.compare_digest(known.mask_seed, request.mask_seed):
                weights = DealerWeights(mask_key(request.mask_seed, request.weights_digest), program.weight_shapes)
                self._models[key] = _Model(program, weights, request.mask_seed)
                while len(self._models) > MAXIMUM_MODELS:
                    self._models.popitem(last=False)
        log.info("registered program %s with weights %s", program.digest[:12], request.weights_digest[:12])
        return pb.RegisterReply(program_digest=program.digest)

    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:  # noqa: N802
        if request.version != VERSION:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this dealer speaks version {VERSION}, not {request.version}")
        _require_seed(request.client_seed, context)
        with self._lock:
            model = self._models.get((request.program_digest, request.weights_digest))
            if model is None:
                context.abort(
                    grpc.StatusCode.NOT_FOUND,
                    f"this dealer does not know the Program {request.program_digest[:12]}...\n"
                    "hint: start the server with this dealer's address, and use the same dealer for the client",
                )
            session = new_session()
            self._sessions[session] = _Session(model, request.client_seed)
            while len(self._sessions) > MAXIMUM_SESSIONS:
                self._sessions.popitem(last=False)
        return pb.OpenReply(session=session)

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:  # noqa: N802
        _require_seed(request.server_seed, context)
        session = self._session(request.session, context)
        agreed = (session.model.program.digest, request.weights_digest)
        if request.program_digest != agreed[0] or (request.program_digest, request.weights_digest) not in self._models:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the session was opened for another Program")
        with self._lock:
            if session.server_seed is not None:  # a second seed could pair one client's masks with two of the server's
                context.abort(grpc.StatusCode.ALREADY_EXISTS, "the session was already joined")
            session.server_seed = request.server_seed
        return pb.JoinReply()

    def Deal(self, request: pb.DealRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:  # noqa: N802
        session = self._session(request.session, context)
        if session.server_seed is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the session was not joined by a server")
        try:
            session.burnt.burn(request.query)
        except QueryError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        program = session.model.program
        keys = [
            query_key(seed, party, request.session, program.digest, request.query)
            for seed, party in ((session.server_seed, "server"), (session.client_seed, "client"))
        ]
        start = time.perf_counter()
        corrections = deal(program.circuit, keys[0], keys[1], session.model.weights)
        yield from to_chunks(payload for _, payload in corrections)
        log.info("dealt query %d of a session in %.2f s", request.query, time.perf_counter() - start)

    def _session(self, token: bytes, context: grpc.ServicerContext) -> _Session:
        with self._lock:
            session = self._sessions.get(token) if len(token) == SESSION_BYTES else None
        if session is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such session (a restarted dealer knows none)\nhint: connect again")
        return session


def _require_seed(seed: bytes, context: grpc.ServicerContext) -> None:
    if len(seed) != SEED_BYTES:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a seed has {SEED_BYTES} bytes")


__all__ = ["DealerService", "PartyError"]
