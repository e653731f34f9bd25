"""One party's rounds as frames, with running tags over the frames that it sends and receives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from parties.net.frames import FrameReader
from parties.proto import unseen_pb2 as pb
from parties.three_party.pair_keys import PairKey, Seal
from parties.three_party.shared_model import PartyShare, SharedProgram
from protocols.circuit import Correlations, Observer, Part, execute
from protocols.protocol import Weights
from protocols.steps import Framed
from protocols.two_party import keepers
from secure.errors import PeerLost, ProtocolError

NextMessage = Callable[[str], pb.PeerMessage]  # returns the peer's next message; its argument says what it should be


@dataclass
class Rounds(Observer):
    """One query's rounds between parties 0 and 1, as ``party`` sees them. size: the Program that it computes."""

    party: int
    size: SharedProgram
    weights: Weights
    sent_seal: Seal
    received_seal: Seal
    count: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    _waiting: int = field(default=0, repr=False)

    @classmethod
    def of(cls, share: PartyShare, size: SharedProgram, key: PairKey, number: bytes) -> Rounds:
        """Start the rounds of a query. number: the query's number, which party 0 has drawn afresh."""
        mine, theirs = (key.seal(f"frames of party {p}", number) for p in (share.party, 1 - share.party))
        return cls(share.party, size, share.weights, mine, theirs)

    def exchanging(self, parts: Sequence[Part]) -> None:
        self._waiting = parts[0].index

    def where(self) -> str:
        """Name the module whose round is under way."""
        circuit = self.size.circuit
        path = self.size.program.paths[circuit.origin[self._waiting]] or "the model's input"
        return f"module '{path}' (round {self.count} of {circuit.cost.rounds})"

    def run(self, correlations: Correlations, inputs: dict[str, Any], following: NextMessage, peer: str) -> Framed[Any]:
        """Run this party's part, as frames to send; the result is its shares of the outputs, and the openings to keep.

        following: returns the peer's messages, from which the peer's frames are read.
        """
        circuit = self.size.circuit.circuit
        outputs = (*self.size.circuit.outputs, *keepers(circuit).values())
        step = execute(circuit, outputs, self.party, correlations, self.weights, inputs, self)
        return Framed(step, lambda size: self._read(size, following, peer), self)

    def sent(self, payload: bytes) -> None:
        self.count += 1
        self.sent_bytes += len(payload)
        self.sent_seal.update(payload)

    def received(self, payload: bytes) -> None:
        self.received_bytes += len(payload)
        self.received_seal.update(payload)

    def _read(self, size: int, following: NextMessage, peer: str) -> bytes:
        reader, what = FrameReader(size), f"its message of {self.where()}"
        while size:
            message = following(what)
            if message.WhichOneof("content") != "frame":
                raise ProtocolError(f"{self.where()}: {peer} sent no frame")
            try:
                payload = reader.add(message.frame)
            except ValueError as error:
                raise ProtocolError(f"{self.where()}: {peer} sent {error}") from None
            if payload is not None:
                return payload
        return b""

    def compare(self, message: pb.PeerMessage, peer: str) -> None:
        """Check, at the end of a query, that the frames received here are those that the peer sent.

        Raises PartiesDisagree if the tags differ, PeerLost if no tag came.
        """
        if message.WhichOneof("content") != "tag":
            raise PeerLost(f"{peer} did not end the query with its tag")
        self.received_seal.check(message.tag, f"the frames of {peer}")
