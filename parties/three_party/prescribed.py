"""The messages of a client of three parties, as Programs prescribe them: what its receipt may hold.

To each party: the request for its description; for each query a start, to party 0 the masked inputs, and to every party
that looks up rows the keys of these.
"""

from __future__ import annotations

from collections.abc import Mapping

from parties.proto import unseen_pb2 as pb
from parties.receipts.described import DescriptionMessages
from parties.receipts.receipt import Receipt, SentMessage
from parties.receipts.walk import Frames, Walk, frames
from parties.three_party.conversations import NAME_BYTES, OWNER_BYTES, WantedProgram
from parties.three_party.party import SESSION_BYTES
from protocols.prg import SEED_BYTES
from secure.deployments.three_party import PARTIES, ThreeParty
from secure.mpc.program import Program
from secure.version import WIRE_VERSION


def prescribed(receipt: Receipt, programs: Mapping[str, Program]) -> int:
    """Compare a receipt with what its Programs prescribe; return the queries that were sent whole.

    Raises ReceiptError, InvalidProgram.
    """
    served, whole = ThreeParty.served(receipt.compiled_as), dict.fromkeys(PARTIES[:2], 0)
    sizes = {digest: _payloads(served, program) for digest, program in programs.items()}
    for number, channel in enumerate(receipt.connections, 1):
        walk = Walk(channel, number)
        if channel.role not in PARTIES:
            raise walk.differs("no client of three parties talks to this role")
        party = _Party(walk, receipt, programs, {d: each[PARTIES.index(channel.role)] for d, each in sizes.items()})
        whole[channel.role] = whole.get(channel.role, 0) + party.run()
    if any(any(each[2:]) for each in sizes.values()):
        return min(whole.get(role, 0) for role in PARTIES)
    return min(whole[role] for role in PARTIES[:2])


def _payloads(served: ThreeParty, program: Program) -> list[int]:
    """Return the bytes that a client sends to each party behind the start of a query."""
    circuit = served.translated(program)
    out = [sum(p.out.size for _, p in circuit.inputs.values()), 0, 0]
    for _, p in circuit.lookups.values():
        for party in range(2 if p.public else 3):
            out[party] += p.key_bytes
    return out


class _Party:
    """The messages of a client to one party."""

    def __init__(
        self, walk: Walk, receipt: Receipt, programs: Mapping[str, Program], payloads: Mapping[str, int]
    ) -> None:
        self._walk, self._receipt, self._programs, self._payloads = walk, receipt, programs, payloads
        self._party = PARTIES.index(walk.channel.role)
        self._asked = DescriptionMessages(walk, receipt, programs)
        self._running, self._frames, self._whole = False, Frames(), 0

    def run(self) -> int:
        """Compare all messages; return the queries that were sent whole."""
        for message in self._walk:
            if self._asked.takes(message):
                continue
            if message.kind == "Ask/start":
                self._ended()
                self._start(message)
            elif message.kind == "Ask/frame" and self._running:
                self._frames.take(self._walk, message)
            else:
                raise self._walk.unknown(message)
        self._ended()
        return self._whole

    def _start(self, message: SentMessage) -> None:
        digest = self._walk.one_of(message, "wanted.program_digest", self._programs)
        program, payload = self._programs[digest], self._payloads[digest]
        if self._party == 2 and not payload:
            raise self._walk.unknown(message)
        rows = self._walk.count(message, "wanted.rows", program.rows if program.keeps else 0)
        following = self._walk.one_of(message, "following", {"", *self._receipt.digests})
        if following and (self._party or not program.keeps):
            raise self._walk.differs("the Program of a query that goes on, where none does")
        wanted = WantedProgram(digest, bytes(NAME_BYTES) if program.keeps else b"", rows)
        start = pb.AskStart(
            version=WIRE_VERSION,
            model=self._receipt.model,
            session=bytes(SESSION_BYTES),
            seed=bytes(SEED_BYTES) if self._party == 1 else b"",
            deadline=1.0,
            wanted=wanted.message(),
            owner=bytes(OWNER_BYTES) if program.keeps and self._party != 2 else b"",
            following=following,
        )
        self._walk.built(message, pb.AskPart(start=start))
        self._running, self._frames = True, Frames(frames(pb.AskPart, [payload]))

    def _ended(self) -> None:
        """Count the query that ran, if all of it was sent."""
        if self._running and not self._frames.left:
            self._whole += 1
        self._running = False
