"""A client of three parties: it shares its input between parties 0 and 1, and adds up their answers.

It needs no party's weights, and talks to party 2 only to look up tokens in a shared table. Whoever runs a party may
also be a client or the model's owner: beyond its own input, answer or weights it learns nothing more by that.
"""

from __future__ import annotations

import hmac
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import grpc
from torch import Tensor

from parties.net.calls import failed
from parties.net.frames import to_frames
from parties.net.peer import Peer
from parties.net.watchdog import LASTING
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyStub
from parties.served.described import ConnectOptions, ask_description, read_description
from parties.telemetry.names import query_id, session_label
from parties.three_party.conversations import AGAIN, NAME_BYTES, OWNER_BYTES, WantedProgram
from parties.three_party.party import SESSION_BYTES
from parties.three_party.party_1 import input_key
from parties.three_party.shared_model import public_name
from protocols import ring, wire
from protocols.prg import fresh_seed
from protocols.protocol import CircuitCost
from protocols.three_party.endpoints import seeded_share
from secure.cost.traffic import ONLINE, Traffic, links
from secure.deployments.three_party import CLIENT, PARTIES, ThreeParty
from secure.errors import (
    Busy,
    Error,
    HandshakeError,
    InvalidInput,
    PeerLost,
    ProtocolError,
    QueryError,
)
from secure.session.link import Ahead, Link, Report
from secure.version import WIRE_VERSION

SAME = ("model", "program", "compiled_as", "tokenizer", "pad_id", "lowercase", "files")  # in all descriptions
GRACE = 2.0  # seconds that the other parties have to give a reason after one has failed


@dataclass(frozen=True)
class Times:
    """Seconds of party 0 in one query.

    computing: from the first round to the last. waited: those of them in which it waited for party 2's corrections.
    """

    computing: float
    waited: float


@dataclass(eq=False, repr=False)
class _PartyText:
    """A conversation of this client: its name, what it shows parties 0 and 1 to go on, and the rows that they keep."""

    name: bytes = field(default_factory=lambda: secrets.token_bytes(NAME_BYTES))
    owner: tuple[bytes, ...] = field(default_factory=lambda: tuple(secrets.token_bytes(OWNER_BYTES) for _ in range(2)))
    rows: int = 0
    ended: bool = False


class ThreePartyLink(Link):
    """Queries to three parties. One that fails does not end the link, but the conversation in which it stands.

    served: the deployment for which the parties' model was compiled, public weights or not. times: those of the last
    query.

    Deadline: parties report their progress every second. A query ends with a PeerLost that names a party which said
    nothing for the deadline, or for which the others waited while nobody made progress for as long. So a query may last
    longer than the deadline, up to LASTING, but no single step of it may.
    """

    def __init__(self, deployment: ThreeParty, options: ConnectOptions) -> None:
        if len(deployment.parties) not in (2, 3):
            raise InvalidInput(
                f"parties: {len(deployment.parties)} addresses", "those of parties 0, 1 and 2, in this order"
            )
        self.deployment, self._deadline = deployment.name, options.deadline
        self._with, self._options = deployment, options
        self.times = Times(0.0, 0.0)
        with ExitStack() as stack:  # whatever fails on the way closes what was opened
            self._peers = list[Peer]()
            for number, (role, at) in enumerate(zip(PARTIES, deployment.parties, strict=False)):
                start = f"unseen party --id {number} --share DIRECTORY"
                self._peers.append(Peer(role, at, options.network, role=role, start=start))
                stack.callback(self._peers[-1].close)
            self._describe(deployment, options)
            self._open = stack.pop_all()

    def _describe(self, deployment: ThreeParty, options: ConnectOptions) -> None:
        found = [
            ask_description(peer, deployment, role, options) for peer, role in zip(self._peers, PARTIES, strict=False)
        ]
        first = found[0]
        for role, other in zip(PARTIES[1:], found[1:], strict=False):
            if differing := [name for name in SAME if getattr(other, name) != getattr(first, name)]:
                raise HandshakeError(
                    f"the parties serve different models: {role} has another {differing[0]} than {PARTIES[0]}",
                    "give them the shares of one run of: unseen share-model",
                )
        admitted = partial(options.budget.decode, weights=False)
        read = read_description(self._peers[0], first, PARTIES[0], admitted, options)
        self.program, self.once, self.model, self.offers = read.program, read.once, read.model, read.offers
        self._check_name(first)
        self.tables, self.tokenizer = read.tables, read.tokenizer
        self.compiled_as = read.compiled_as
        try:
            self.served = ThreeParty.served(read.compiled_as)
        except InvalidInput as error:
            raise HandshakeError(f"{PARTIES[0]}: {error}", "use the same version of unseen everywhere") from None
        self._circuit = self.served.translated(self.program)
        self._names = self.served.deployed(self.program).names
        if len(self._peers) < len(PARTIES) and any(not p.public for _, p in self._circuit.lookups.values()):
            raise InvalidInput(
                f"tokens are looked up in a shared table, so {PARTIES[2]} is needed", "give three addresses"
            )

    def _check_name(self, found: pb.Description) -> None:
        """Raise HandshakeError unless the model's name is that of the Programs and table that came."""
        files = {file.name: file.sha256 for file in found.files}
        digests = [offer.program_digest for offer in self.offers]
        name = public_name(digests, files, found.compiled_as)
        if self.program.digest not in digests or not hmac.compare_digest(
            name.encode(), found.model[: len(name)].encode()
        ):
            raise HandshakeError(
                f"{self._peers[0]} gives another Program or token table than the model's name says",
                "ask the model's owner which party changed its share",
            )

    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Tensor], Report]:
        if self.program.keeps:
            raise QueryError("queries of this Program stand in conversations", "ask it to generate text")
        return self._ask(values, number, WantedProgram(self.program.digest))

    def converse(self, capacity: int) -> _PartyText:
        return _PartyText()

    def go_on(
        self,
        conversation: Any,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Tensor], Report]:
        text: _PartyText = conversation
        if text.ended:
            raise QueryError("a query of this text has failed", AGAIN)
        text.ended = True  # unless this one succeeds
        read = text.rows if rows is None else rows
        wanted = WantedProgram(self.program.digest, text.name, read)
        try:
            found = self._ask(
                values, number, wanted, text.owner, ahead.link.program.digest if ahead is not None else ""
            )
        except Busy:
            if not read:  # one party may have begun it: it can be begun again by another name
                fresh = _PartyText()
                text.name, text.owner, text.ended = fresh.name, fresh.owner, False
            raise
        text.rows, text.ended = read + self.program.kept_rows, False
        return found

    def beside(self, program_digest: str) -> Link:
        options = replace(self._options, program_digest=program_digest, model=self.model, told=None)
        return ThreePartyLink(self._with, options)

    def _ask(
        self,
        values: Mapping[str, Any],
        number: int,
        wanted: WantedProgram,
        owner: Sequence[bytes] = (b"", b""),
        following: str = "",
    ) -> tuple[Sequence[Tensor], Report]:
        start = time.perf_counter()
        messages = self._messages(values, wanted, owner, following)
        sharing = time.perf_counter() - start
        asking = _Asking(self._peers, messages, self._deadline)
        first, second, *_ = answers = asking.run()
        came = time.perf_counter()
        results = self._put_together([first.share, second.share])
        end = time.perf_counter()
        self.times = Times(first.seconds, first.waited)
        between = CircuitCost(first.rounds, second.sent, first.sent, first.corrections, first.rows)
        sent = [sum(part.ByteSize() for part in parts) for parts in messages]
        moved = (
            *(Traffic(CLIENT, role, size, ONLINE) for role, size in zip(PARTIES, sent, strict=False)),
            *(Traffic(r, CLIENT, a.ByteSize(), ONLINE) for r, a in zip(self._names, answers, strict=False)),
            *links(between, *self._names, PARTIES[2]),
        )
        computed = sharing + end - came
        named = query_id(session_label(messages[0][0].start.session), 0)
        times = end - start, first.dealing, computed, first.dealing
        return results, Report(first.rounds, moved, *times, number, id=named)

    def _messages(
        self, values: Mapping[str, Tensor], wanted: WantedProgram, owner: Sequence[bytes], following: str
    ) -> list[list[pb.AskPart]]:
        """Make the messages to each party; party 2 gets none unless rows are looked up in a shared table."""
        session, seed = secrets.token_bytes(SESSION_BYTES), fresh_seed()
        key, payload = input_key(seed, session), bytearray()
        for name, (index, p) in self._circuit.inputs.items():
            payload += wire.encode(values[name] - seeded_share(key, index, p.shape), p.out)
        given = [payload, bytearray(), bytearray()]
        for p in (p for _, p in self._circuit.lookups.values()):
            for party, keys in enumerate(p.keys(values[p.source].argmax(-1))):
                given[party] += keys
        out = []
        for role, own, shown, frame in zip(PARTIES, (b"", seed, b""), (*owner, b""), given, strict=True):
            begin = pb.AskStart(
                version=WIRE_VERSION,
                model=self.model,
                session=session,
                seed=own,
                deadline=self._deadline,
                wanted=wanted.message(),
                owner=shown,
                following=following if role == PARTIES[0] else "",
            )
            frames = to_frames(bytes(frame)) if frame else ()
            if role != PARTIES[2] or frame:
                out.append([pb.AskPart(start=begin), *(pb.AskPart(frame=f) for f in frames)])
        return out

    def _put_together(self, shares: Sequence[bytes]) -> list[Tensor]:
        """Add up the outputs, each modulo its ring, from the shares of parties 0 and 1."""
        forms, out, at = self._circuit.results, [], 0
        size = sum(form.size for form in forms)
        for role, share in zip(self._names, shares, strict=True):
            if len(share) != size:
                raise ProtocolError(f"{role} sent {len(share)} bytes of the outputs, they have {size}")
        for form in forms:
            zero, one = (wire.decode(share[at : at + form.size], form) for share in shares)
            out.append(ring.reduce(zero + one, form.bits))
            at += form.size
        return out

    def close(self) -> None:
        self._open.close()


_Heard = pb.AskReply | pb.Failure | grpc.RpcError | Error | None


class _Asking:
    """One query to all parties at once: it collects their answers, or finds the party to blame if there are none."""

    def __init__(self, peers: Sequence[Peer], messages: Sequence[Sequence[pb.AskPart]], deadline: float) -> None:
        self._peers, self._deadline = peers[: len(messages)], deadline
        self._heard: queue.SimpleQueue[tuple[int, _Heard]] = queue.SimpleQueue()
        self._answers: dict[int, pb.Answer] = {}
        self._failed: dict[int, _Heard] = {}  # in order of time; None: it gave no reason
        self._grown = self._began = time.monotonic()  # the last time that the steps of any party grew
        self._word = [self._grown] * len(messages)  # the last time that each party sent a message
        self._steps, self._waits_for = [0] * len(messages), [""] * len(messages)
        self._calls = [PartyStub(p.channel).Ask(iter(m)) for p, m in zip(self._peers, messages, strict=True)]
        for party, call in enumerate(self._calls):
            threading.Thread(target=self._listen, args=(party, call), name="unseen-ask", daemon=True).start()

    def _listen(self, party: int, call: Any) -> None:
        try:
            for reply in call:
                self._heard.put((party, reply))
            self._heard.put((party, None))
        except (grpc.RpcError, Error) as error:
            self._heard.put((party, error))

    def run(self) -> list[pb.Answer]:
        """Return all answers, by party. If one party fails, the others have GRACE seconds to give a reason."""
        until = None
        try:
            while len(self._answers) < len(self._peers):
                with suppress(queue.Empty):
                    self._take(*self._heard.get(timeout=min(0.25, self._deadline / 8)))
                if self._failed:
                    until = until or time.monotonic() + GRACE
                    if time.monotonic() > until or len(self._failed) + len(self._answers) == len(self._peers):
                        raise self._cause()
                elif late := self._late(time.monotonic()):
                    raise late
        finally:
            for call in self._calls:
                call.cancel()
        return [self._answers[party] for party in range(len(self._peers))]

    def _take(self, party: int, reply: _Heard) -> None:
        self._word[party] = time.monotonic()
        if not isinstance(reply, pb.AskReply):
            if party not in self._answers:
                self._failed.setdefault(party, reply)
        elif reply.WhichOneof("content") == "failure":
            self._failed.setdefault(party, reply.failure)
        elif reply.WhichOneof("content") == "answer":
            self._answers[party], self._grown = reply.answer, self._word[party]
        else:
            if reply.working.steps > self._steps[party]:
                self._steps[party], self._grown = reply.working.steps, self._word[party]
            self._waits_for[party] = reply.working.waits_for

    def _cause(self) -> Error:
        """Return the error of the party nearest to the cause: usually the one that failed first.

        But a party that cannot be reached explains why others waited for it, and a party that gives a reason explains
        why others lost it.
        """
        party = min(self._failed, key=lambda p: _distance(self._failed[p]))  # the first of equals
        peer, error = self._peers[party], self._failed[party]
        if error is None:
            return ProtocolError(f"{peer} ended the query without an answer")
        if isinstance(error, pb.Failure):
            return failed(error, str(peer))
        if isinstance(error, Error):
            return error
        assert isinstance(error, grpc.RpcError)  # as a message that is no failure is none
        try:
            with peer.calling("asking"):
                raise error
        except Error as found:
            return found

    def _late(self, now: float) -> PeerLost | None:
        """Return an error that names the party that kept the others waiting for the deadline; None if none did."""
        open_ = [party for party in range(len(self._peers)) if party not in self._answers]
        silent = [party for party in open_ if now - self._word[party] > self._deadline / 2]  # two messages are missing
        if silent and now - self._word[silent[0]] > self._deadline:
            return PeerLost(f"{self._peers[silent[0]]} said nothing for {self._deadline:g} s", "see its log")
        if now - self._began > LASTING:
            return PeerLost(f"the query is not done after {LASTING:g} s", "see the parties' logs")
        if now - self._grown <= self._deadline:
            return None
        party = silent[0] if silent else self._waited_for(open_[0])
        waiting = [PARTIES[p] for p in open_ if p != party and self._waits_for[p]]
        who = self._peers[party] if party < len(self._peers) else PARTIES[party]
        return PeerLost(
            f"{who} did not get any further for {self._deadline:g} s"
            + (f"; {', '.join(waiting)} waited" if waiting else ""),
            "see its log",
        )

    def _waited_for(self, party: int) -> int:
        """Find the party that keeps another waiting in the end; of two that wait for each other, the one behind."""
        seen: list[int] = []
        while party not in seen:
            seen.append(party)
            if party >= len(self._peers) or party in self._answers or self._waits_for[party] not in PARTIES:
                return party
            party = PARTIES.index(self._waits_for[party])
        return min(seen[seen.index(party) :], key=lambda p: self._steps[p])


def _distance(error: Any) -> int:
    """Rank a party's failure by its distance from the cause: damage, or nobody there 0, its own reason 1, others 2."""
    if isinstance(error, Error):
        return 0
    if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAVAILABLE:
        return 0
    return 1 if isinstance(error, pb.Failure) and error.code != PeerLost.code else 2
