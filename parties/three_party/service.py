"""What all three parties answer to clients: who they are, and the files that clients may hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import grpc

from parties.calls import answering
from parties.errors import DownloadError, HandshakeError
from parties.frames import parts
from parties.three_party.shares import PartyShare
from parties.watchdog import Watchdog
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import PartyServicer
from secure.program import VERSION

DEPLOYMENT = "three-party"
SESSION_BYTES = 16
MAXIMUM_QUERIES = 8  # at a time; each takes a thread, and its corrections are held in memory


class PartyService(PartyServicer):
    """Base of the three. ``deadline``: seconds that any one wait may last."""

    def __init__(self, share: PartyShare, *, deadline: float) -> None:
        self.share, self.deadline = share, deadline
        self.log = logging.getLogger(f"unseen.party-{share.party}")

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.PartyDescription:
        m = self.share.manifest
        return pb.PartyDescription(
            version=VERSION,
            deployment=DEPLOYMENT,
            party=m.party,
            public_weights=m.public_weights,
            program=self.share.program.encoded,
            model=m.model,
            files=self.share.files,
            tokenizer=self.share.tokenizer,
            pad_id=m.pad_id,
            lowercase=m.lowercase,
        )

    def Download(self, request: pb.DownloadRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        watch = Watchdog(self.deadline, context.cancel)
        try:
            with answering(context, self.log):
                if request.sha256 not in {file.sha256 for file in self.share.files} or self.share.table is None:
                    raise DownloadError("it has no such file", "connect again, the model may have changed")
                yield from watch.sending(pb.Chunk(data=part) for part in parts(self.share.table))
        finally:
            watch.stop()

    def agree(self, who: str, version: int, model: str, session: bytes) -> None:
        """HandshakeError unless another's version and model are ours."""
        if version != VERSION:
            raise HandshakeError(
                f"version: {who} has {version}, this party {VERSION}", "use the same version everywhere"
            )
        if model != self.share.manifest.model:
            raise HandshakeError(
                f"model: {who} has {model[:12]!r}, this party {self.share.manifest.model[:12]!r}",
                "connect again; all three parties hold shares of one run of: unseen share-model",
            )
        if len(session) != SESSION_BYTES:
            raise HandshakeError(f"a session has {SESSION_BYTES} bytes, not {len(session)}")
