"""The messages of a client of two parties, as Programs prescribe them: what its receipt may hold.

To the server: its description and files, the greeting of a session, and for each query its number, and the frames of
its rounds, whose sizes are counted by the Program's own generators. To the dealer: the request for its key, and a
sealed seed for each session.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property

from parties.proto import unseen_pb2 as pb
from parties.receipts.described import DescriptionMessages
from parties.receipts.receipt import Receipt, SentMessage
from parties.receipts.walk import Frames, Walk, frames
from parties.two_party.conversations import Place, most_together, places_of
from parties.two_party.keys import MAXIMUM_PREPARED, MAXIMUM_QUERY, MAXIMUM_STEPS, SESSION_BYTES
from parties.two_party.masked_model import by_file
from parties.two_party.sealing import SEALED_BYTES
from secure.cost.count import profile
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.errors import QueryError, ReceiptError
from secure.mpc.program import Program
from secure.version import WIRE_VERSION


class _Known:
    """A Program and the sizes of the messages that carry a query's rounds to the server."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @cached_property
    def frames(self) -> list[int]:
        _, client = profile(self.program).schedules
        return frames(pb.ClientMessage, (sum(part.sent for part in stage.parts) for stage in client))


def prescribed(receipt: Receipt, programs: Mapping[str, Program]) -> int:
    """Compare a receipt with what its Programs prescribe; return the queries that were sent whole.

    Raises ReceiptError.
    """
    known = {digest: _Known(program) for digest, program in programs.items()}
    sessions, seeds, whole = dict[str, int](), dict[str, int](), 0
    for number, channel in enumerate(receipt.connections, 1):
        walk = Walk(channel, number)
        if channel.role == DEALER:
            _to_dealer(walk, receipt, seeds)
        elif channel.role == SERVER:
            whole += _ToServer(walk, receipt, known, sessions).run()
        else:
            raise walk.differs("no client of two parties talks to this role")
    for digest, count in sessions.items():
        if seeds.get(digest, 0) < count:
            raise ReceiptError(f"{count} sessions with a server, and {seeds.get(digest, 0)} with the dealer")
    return whole


def _to_dealer(walk: Walk, receipt: Receipt, seeds: dict[str, int]) -> None:
    for message in walk:
        if message.kind == "Key":
            walk.built(message, pb.DealerKeyRequest())
        elif message.kind == "Open":
            digest = walk.one_of(message, "program_digest", receipt.digests)
            name = walk.one_of(message, "weights_digest", {receipt.model})
            sealed = bytes(SEALED_BYTES)
            request = pb.OpenRequest(version=WIRE_VERSION, program_digest=digest, weights_digest=name, sealed=sealed)
            walk.built(message, request)
            seeds[digest] = seeds.get(digest, 0) + 1
        else:
            raise walk.unknown(message)


class _ToServer:
    """The messages of a client to a server: a session's, and those that ask about the model around it."""

    def __init__(self, walk: Walk, receipt: Receipt, known: Mapping[str, _Known], sessions: dict[str, int]) -> None:
        self._walk, self._receipt, self._known, self._sessions = walk, receipt, known, sessions
        programs = {digest: each.program for digest, each in known.items()}
        most = max((len(by_file(each.weight_rings)) for each in programs.values()), default=1)
        self._asked = DescriptionMessages(walk, receipt, programs, most + 1)  # a table of tokens besides
        self._own = ""  # the digest of the session's Program
        self._prepared = dict[int, str]()  # digests by query
        self._begun = set[int]()  # the queries that began a text
        self._last, self._next, self._whole = 0, 0, 0  # _last: the first query of those that were prepared last
        self._running, self._frames = False, Frames()

    def run(self) -> int:
        """Compare all messages; return the queries that were sent whole."""
        for message in self._walk:
            if self._asked.takes(message):
                continue
            take = {"Session/hello": self._hello, "Session/prepare": self._prepare}
            take |= {"Session/query": self._query, "Session/frame": self._frame}
            if message.kind not in take or (message.kind != "Session/hello") != bool(self._own):
                raise self._walk.unknown(message)
            take[message.kind](message)
        self._ended()
        return self._whole

    def _hello(self, message: SentMessage) -> None:
        self._own = self._walk.one_of(message, "program_digest", self._known)
        self._sessions[self._own] = self._sessions.get(self._own, 0) + 1
        fixed = self._known[self._own].program.fixed
        hello = pb.Hello(
            version=WIRE_VERSION,
            deployment=TwoParty.name,
            program_digest=self._own,
            fixed_point=json.dumps(fixed.as_dict(), sort_keys=True),
            weights_digest=self._walk.one_of(message, "weights_digest", {self._receipt.model}),
            session=bytes(SESSION_BYTES),
        )
        self._walk.built(message, pb.ClientMessage(hello=hello))

    def _prepare(self, message: SentMessage) -> None:
        query = self._walk.count(message, "query", min(self._next, MAXIMUM_QUERY - 1))
        again = query in self._prepared and query == self._last  # the server was busy
        if query < self._next and not again:
            raise self._walk.unknown(message)
        place, digest = self._place(message, query)
        steps = self._walk.count(message, "steps", most_together(self._known[digest].program))
        prepare = pb.Prepare(query=query, place=place and place.message(), steps=steps)
        try:
            places_of(prepare, self._known[digest].program)
        except QueryError as error:
            raise self._walk.differs(str(error)) from None
        self._walk.built(message, pb.ClientMessage(prepare=prepare))
        self._prepared = {number: each for number, each in self._prepared.items() if number < query}
        behind = query + max(1, steps)
        self._last, self._next = query, max(self._next, behind)  # what a busy server was asked for is not asked again
        self._prepared |= dict.fromkeys(range(query, behind), digest)
        if len(self._prepared) > MAXIMUM_PREPARED + MAXIMUM_STEPS:
            raise self._walk.unknown(message)

    def _place(self, message: SentMessage, query: int) -> tuple[Place | None, str]:
        """Return the place in a conversation that a message names, if any, and the digest of its Program."""
        if "place.program_digest" not in message.said:
            if self._known[self._own].program.keeps:
                raise self._walk.differs("a query of text without its place in a conversation")
            return None, self._own
        digest = self._walk.one_of(message, "place.program_digest", self._known)
        if not self._known[digest].program.keeps:
            raise self._walk.differs("a place in a conversation, which this Program does not keep")
        first = self._walk.count(message, "place.first", query)
        rows = self._walk.count(message, "place.rows", self._known[digest].program.rows)
        if not rows:
            self._begun.add(query)
        elif first not in self._begun:
            raise self._walk.differs(f"query {query} goes on with a text that none began")
        return Place(digest, first, rows), digest

    def _query(self, message: SentMessage) -> None:
        self._ended()
        if self._frames.left:
            raise self._walk.differs(f"a query begins where {self._frames.left} frames of another are missing")
        query = self._walk.count(message, "query", MAXIMUM_QUERY)
        if query not in self._prepared:
            raise self._walk.differs(f"query {query} was not prepared")
        self._walk.built(message, pb.ClientMessage(query=pb.Query(query=query)))
        self._running, self._frames = True, Frames(self._known[self._prepared[query]].frames)
        self._prepared = {number: digest for number, digest in self._prepared.items() if number > query}

    def _frame(self, message: SentMessage) -> None:
        self._frames.take(self._walk, message)

    def _ended(self) -> None:
        """Count the query that ran, if all of it was sent."""
        if self._running and not self._frames.left:
            self._whole += 1
            self._running = False
