"""What all three parties answer to clients: who they are, and the files that clients may hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import grpc
from torch import Tensor

from parties.net.calls import answering
from parties.net.frames import FrameReader, parts
from parties.net.watchdog import Watchdog
from parties.three_party.shared_model import PartyShare
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import PartyServicer
from protocols.three_party import SharedLinear
from protocols.three_party.lookup import warm_up
from protocols.three_party.sharing import HELPER
from protocols.three_party.weights import SharedWeights
from secure.errors import DownloadError, HandshakeError, ProtocolError
from secure.mpc.program import VERSION

DEPLOYMENT = "three-party"
SESSION_BYTES = 16
MAXIMUM_QUERIES = 8  # at a time; each takes a thread, and its corrections are held in memory


class PartyService(PartyServicer):
    """Base of the three. ``deadline``: seconds that any one wait may last."""

    def __init__(self, share: PartyShare, *, deadline: float) -> None:
        self.share, self.deadline = share, deadline
        self.log = logging.getLogger(f"unseen.party-{share.party}")
        self._pack()

    def _pack(self) -> None:
        """What the first query would otherwise wait for."""
        weights, circuit = self.share.weights, self.share.circuit
        if circuit.lookups:
            warm_up()
        for _, p in circuit.lookups.values():
            weights.tables(p.table, p.ring)
        if isinstance(weights, SharedWeights):
            for instruction in circuit.circuit:
                linear = instruction.protocol
                if isinstance(linear, SharedLinear) and not linear.diagonal:
                    weights.pack(linear.weight, linear.ring)

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

    def read_ask(
        self, requests: Iterator[pb.AskPart], sizes: Sequence[int], watch: Watchdog
    ) -> tuple[pb.AskStart, list[bytes]]:
        """A client's start, and the byte strings of ``sizes`` that follow it in one frame."""
        with watch.guard():
            first = next(requests, None)
        if first is None or first.WhichOneof("content") != "start":
            raise ProtocolError("a query does not begin with its start")
        self.agree("the client", first.start.version, first.start.model, first.start.session)
        reader, payload = FrameReader(sum(sizes)), None if sum(sizes) else b""
        while payload is None:
            with watch.guard():
                part = next(requests, None)
            if part is None or part.WhichOneof("content") != "frame":
                raise ProtocolError("what the client sends did not come whole")
            try:
                payload = reader.add(part.frame)
            except ValueError as error:
                raise ProtocolError(f"the client sent {error}") from None
        ends = list(accumulate(sizes, initial=0))
        return first.start, [payload[a:b] for a, b in pairwise(ends)]

    def key_sizes(self) -> list[int]:
        """Bytes of the keys that this party gets of each look-up."""
        found = [p for _, p in self.share.circuit.lookups.values()]
        return [p.key_bytes for p in found if self.share.party != HELPER or not p.public]

    def looked_up(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """This party's additive shares of what a client looks up."""
        found = self.share.circuit.lookups
        return {
            name: p.rows_of(self.share.party, own, self.share.weights)
            for (name, (_, p)), own in zip(found.items(), keys, strict=True)
        }

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
