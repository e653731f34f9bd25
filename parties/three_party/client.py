"""A client of three parties: shares its input between parties 0 and 1, and adds up what they answer.

It needs no party's weights, and talks to party 2 only to look up tokens in a shared table. Whoever runs a party may be
a client as well, or the model's owner: a party learns no more for that than what is its own.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from torch import Tensor

from parties.net.calls import calling
from parties.net.endpoints import Endpoint, open_channel
from parties.net.frames import to_frames
from parties.served.files import TOKEN_TABLE, cache_directory, fetch, received_tokenizer, unpack_tables
from parties.three_party.party import DEPLOYMENT, SESSION_BYTES
from parties.three_party.party_1 import input_key
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import PartyStub
from protocols import ring, wire
from protocols.prg import fresh_seed
from protocols.protocol import CircuitCost
from protocols.three_party.endpoints import seeded_share
from protocols.three_party.sharing import HELPER
from secure.deployments.three_party import three_party
from secure.errors import Error, HandshakeError, ProtocolError
from secure.models.tokens import tokenize
from secure.mpc.program import VERSION, Program

GRACE = 2.0  # seconds that the other party has to say why, when one has failed


@dataclass(frozen=True)
class ThreePartyReport:
    """What one query took. ``cost``: bytes between the parties, ``to_second`` from 0 to 1 and ``to_first`` back,
    ``dealt`` from 2 to 0.
    """

    cost: CircuitCost
    seconds: float  # that the client waited
    online_seconds: float  # of party 0, from the first round to the last
    waited_seconds: float  # of which for corrections of party 2
    dealing_seconds: float  # until all of them were there, which may have been before the query
    sent: int  # by the client, to both
    received: int


class ThreePartyConnection:
    """Queries to three parties; a context manager. One query at a time.

    parties: their addresses; that of party 2 may be left out where no tokens are looked up in a shared table.
    deadline: seconds to wait for an answer of a party that does nothing; what lasts is watched by the parties.
    program_digest: refuse parties whose Program has another digest.
    """

    def __init__(
        self,
        parties: Sequence[str],
        *,
        insecure: bool = False,
        deadline: float = 60.0,
        cache: Path | None = None,
        program_digest: str | None = None,
    ) -> None:
        if len(parties) not in (2, 3):
            raise Error(f"{len(parties)} addresses of parties", "those of parties 0 and 1, and 2 if you like")
        self._at = [Endpoint.parse(a, what=f"party {i}") for i, a in enumerate(parties)]
        self._deadline, self._lock = deadline, threading.Lock()
        self.reports: list[ThreePartyReport] = []
        with ExitStack() as stack:
            self._open = stack
            channels = [open_channel(at, insecure=insecure, what=f"party {i}") for i, at in enumerate(self._at)]
            for channel in channels:
                stack.callback(channel.close)
            self._stubs = [PartyStub(channel) for channel in channels]
            self._describe(program_digest, cache)
            self._open = stack.pop_all()

    def _describe(self, pinned: str | None, cache: Path | None) -> None:
        found = []
        for party, (stub, at) in enumerate(zip(self._stubs, self._at, strict=True)):
            with calling(f"party {party}", at, f"start it with: unseen party --id {party} --listen {at}"):
                found.append(stub.Describe(pb.DescribeRequest(), timeout=self._deadline))
            d = found[-1]
            if (d.version, d.deployment) != (VERSION, DEPLOYMENT):
                raise HandshakeError(f"version: party {party} speaks '{d.version}' of {d.deployment!r}")
            if d.party != party:
                raise HandshakeError(
                    f"party {d.party} answers at {at}, where party {party} should", "swap the addresses"
                )
        first = found[0]
        if len({(d.model, d.program, d.public_weights) for d in found}) > 1:
            raise HandshakeError(
                "the parties serve different models", "give them the shares of one run of: unseen share-model"
            )
        self.program, self._model = Program.from_bytes(first.program), first.model
        if pinned is not None and pinned != self.program.digest:
            raise HandshakeError(
                f"Program digest: the parties have {self.program.digest!r}, this client expects {pinned!r}",
                "ask the model's owner which Program it is",
            )
        self.public_weights = first.public_weights
        self._circuit = three_party(self.program, public=first.public_weights)
        self.files = {f.name: f.size for f in first.files}
        payloads = {f.name: fetch(f, self._download, cache) for f in first.files if f.name == TOKEN_TABLE}
        tables = {c.table: c.size for c in self.program.client_inputs if c.encoding == "client-table"}
        self._tables = unpack_tables(payloads.get(TOKEN_TABLE), tables)
        self._tokenizer = received_tokenizer(first.tokenizer, first.pad_id, first.lowercase)

    def _download(self, sha256: str) -> Iterator[bytes]:
        with calling("party 0", self._at[0], "try again"):
            for chunk in self._stubs[0].Download(pb.DownloadRequest(sha256=sha256), timeout=600):
                yield chunk.data

    @property
    def length(self) -> int:
        """Tokens that a text may have, special ones included."""
        return int(self.program.labels.get("length", 0))

    def query(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's answer (float64) on the model's own arguments; its report is the last of ``reports``."""
        values = self.program.client_values(inputs, self._tables)
        with self._lock:
            start = time.perf_counter()
            session, seed = secrets.token_bytes(SESSION_BYTES), fresh_seed()
            key, payload = input_key(seed, session), bytearray()
            for name, (index, p) in self._circuit.inputs.items():
                payload += wire.encode(values[name] - seeded_share(key, index, p.shape), p.out)
            given = [payload, bytearray(), bytearray()]
            for p in (p for _, p in self._circuit.lookups.values()):
                for party, keys in enumerate(p.keys(values[p.source].argmax(-1))):
                    given[party] += keys
            messages = []
            for party, (own, frame) in enumerate(zip((b"", seed, b""), given, strict=True)):
                start_of = pb.AskStart(version=VERSION, model=self._model, session=session, seed=own)
                frames = to_frames(bytes(frame)) if frame else ()
                if party != HELPER or frame:
                    messages.append([pb.AskPart(start=start_of), *(pb.AskPart(frame=f) for f in frames)])
            if len(messages) > len(self._stubs):
                raise Error("tokens are looked up in a shared table, so party 2 is needed", "give three addresses")
            zero, one = self._ask(messages)
            result = self._put_together(zero, one)
            seconds = time.perf_counter() - start
            self.reports.append(
                ThreePartyReport(
                    CircuitCost(zero.rounds, one.sent, zero.sent, zero.corrections),
                    seconds,
                    zero.seconds,
                    zero.waited,
                    zero.dealing,
                    sum(part.ByteSize() for parts in messages for part in parts),
                    zero.ByteSize() + one.ByteSize(),
                )
            )
        return self.program.decode(result)

    def _ask(self, messages: Sequence[Sequence[pb.AskPart]]) -> list[pb.Answer]:
        """Both parties at once; where one fails the other is given up, after a moment in which it may say why."""
        calls = [stub.Ask.future(iter(parts)) for stub, parts in zip(self._stubs, messages, strict=False)]
        ended = threading.Event()

        failed: list[Any] = []

        def look(done: Any) -> None:
            if done.code() != grpc.StatusCode.OK:
                failed.append(done)
            if failed or all(call.done() for call in calls):
                ended.set()

        for call in calls:
            call.add_done_callback(look)
        try:
            ended.wait()
            until = time.monotonic() + GRACE
            while not all(call.done() for call in calls) and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            for call in calls:
                call.cancel()
        # what failed first is nearest to the cause; a party that cannot be reached explains more than who waited for it
        first = sorted(failed, key=lambda call: call.code() != grpc.StatusCode.UNAVAILABLE)[:1]
        answers: dict[int, pb.Answer] = {}
        for party in sorted(range(len(calls)), key=lambda i: calls[i] not in first):
            with calling(
                f"party {party}", self._at[party], f"start it with: unseen party --id {party}", doing="asking"
            ):
                answers[party] = calls[party].result()
        return [answers[0], answers[1]]

    def _put_together(self, zero: pb.Answer, one: pb.Answer) -> Tensor:
        form = self._circuit.result
        for party, answer in enumerate((zero, one)):
            if len(answer.share) != form.size:
                raise ProtocolError(f"party {party} sent {len(answer.share)} bytes of the output, it has {form.size}")
        return ring.reduce(wire.decode(zero.share, form) + wire.decode(one.share, form), form.bits)

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding (float64 vector) a text. Too long or empty texts raise before anything is sent."""
        return list(self.embed_each(texts))

    def embed_each(self, texts: Sequence[str]) -> Iterator[Tensor]:
        """The same one by one, so that a failure leaves the answers before it."""
        if self._tokenizer is None:
            raise Error("this model takes no text", "use query with the model's own arguments")
        pairs = [tokenize(self._tokenizer, text, self.length) for text in texts]
        return (self.query({"input_ids": ids, "attention_mask": mask})[0] for ids, mask in pairs)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> ThreePartyConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect_three(
    parties: Sequence[str],
    *,
    insecure: bool = False,
    deadline: float = 60.0,
    cache: bool | Path = True,
    program_digest: str | None = None,
) -> ThreePartyConnection:
    """Connect to parties 0 and 1 ("host:port"), see ``ThreePartyConnection``. ``cache`` True: the user's own."""
    directory = cache_directory() if cache is True else (cache or None)
    return ThreePartyConnection(
        parties, insecure=insecure, deadline=deadline, cache=directory, program_digest=program_digest
    )
