"""The status of a service, for whoever may call it: version, deployment, role, Program, clock, and whose process it is.

``unseen check`` asks every peer before a query. A service that starts asks the peers that it must not collude with
whether the same user runs them on the same machine: then one person reads the memory of both, and no secret is kept.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc

from parties.net.caller import permit
from parties.net.calls import answering
from parties.net.peer import Peer
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import StatusServicer, StatusStub, add_StatusServicer_to_server
from secure.errors import ProtocolError, printable
from secure.version import WIRE_VERSION

NONCE_BYTES = 32
BOOT = Path("/proc/sys/kernel/random/boot_id")
log = logging.getLogger("unseen.status")


class StatusService(StatusServicer):
    """The answer of one role. roles: those that may ask. program: the digest of the Program that it serves, or "".

    knows: tells whether it serves or deals a Program, by its digest. draining: whether it takes no new clients.
    """

    def __init__(
        self,
        deployment: str,
        role: str,
        roles: Iterable[str],
        program: str,
        knows: Callable[[str], bool],
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self.permissions = permit("Status", Check=roles)
        self._deployment, self._role, self._program, self._knows = deployment, role, program, knows
        self._draining = draining

    def Check(self, request: pb.CheckRequest, context: grpc.ServicerContext) -> pb.CheckReply:
        with answering(context, log):
            if len(request.nonce) != NONCE_BYTES:
                raise ProtocolError(f"a nonce has {NONCE_BYTES} bytes, not {len(request.nonce)}")
            return pb.CheckReply(
                version=WIRE_VERSION,
                deployment=self._deployment,
                role=self._role,
                program_digest=self._program,
                known=bool(request.program_digest) and self._knows(request.program_digest),
                clock=clock(),
                owner=owner_tag(request.nonce),
                draining=self._draining(),
            )

    def add(self, server: grpc.Server) -> None:
        """Add it to a server."""
        add_StatusServicer_to_server(self, server)


def clock() -> float:
    """Return the seconds since 1970, UTC."""
    return time.time()


def owner_tag(nonce: bytes) -> bytes:
    """Return HMAC-SHA-256, under the nonce, of this machine's boot and this process's user; empty if unknown.

    Two processes have equal tags if one user runs them under one kernel, in containers too. The boot's number is random
    and known to processes of this machine alone, so others learn from a tag neither the machine nor the user. But
    whoever asks several services, or one several times, with one nonce learns whether user and boot are the same.
    """
    try:
        boot = BOOT.read_bytes().strip()
    except OSError:
        return b""
    return hmac.digest(nonce, boot + f"/{os.getuid()}".encode(), "sha256")


@dataclass(frozen=True)
class Answered:
    """The answer of a service.

    skew: seconds by which its clock is ahead of ours. same_owner: our user runs it on this machine. draining: it is
    being stopped, and takes no new clients.
    """

    version: int
    deployment: str
    role: str
    program_digest: str
    known: bool
    skew: float
    same_owner: bool
    draining: bool = False


def ask_status(peer: Peer, program_digest: str = "", *, timeout: float = 10.0) -> Answered:
    """Ask a service for its status. Raises PeerLost, TlsError."""
    nonce, start = secrets.token_bytes(NONCE_BYTES), clock()
    with peer.calling():
        found: pb.CheckReply = StatusStub(peer.channel).Check(
            pb.CheckRequest(nonce=nonce, program_digest=program_digest), timeout=timeout
        )
    ours = owner_tag(nonce)
    return Answered(
        found.version,
        printable(found.deployment[:64]),
        printable(found.role[:64]),
        printable(found.program_digest[:64]),
        found.known,
        found.clock - (start + clock()) / 2,
        bool(ours) and hmac.compare_digest(ours, found.owner),
        found.draining,
    )
