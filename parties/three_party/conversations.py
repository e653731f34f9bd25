"""Conversations at one of three parties: queries of which later ones read what earlier ones kept.

Parties 0 and 1 keep the openings of rows, party 2 their masks. What a query reads is said by its place: the name of
the conversation, and how many of its rows. Before anything is dealt or computed, each pair compares the place, and the
numbers of the queries that kept those rows. So rows of a query that failed at one party are never read by another.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from parties.limits.memory import PreparedMemory, memory_budget
from parties.limits.seats import Seat, Seats
from parties.proto import unseen_pb2 as pb
from parties.services.repeating import Repeating
from parties.three_party.pair_keys import PairKey
from protocols.protocol import Opening
from protocols.two_party import KeptRows
from secure.errors import QueryError
from secure.mpc.program import Program

NAME_BYTES, OWNER_BYTES = 16, 32
MAXIMUM_CONVERSATIONS = 64  # of all callers
OF_ONE = 8  # those of any one client that has a name
IDLE = 1800.0  # seconds after its last query in which a conversation is kept
SPARE = 60.0  # the same if another wants its place, or its memory
SWEEPING = 30.0  # seconds after which conversations that rest too long are looked for again
AGAIN = "begin the text again"


class WantedProgram(NamedTuple):
    """The Program that a query computes, and its place, see ``Wanted``. conversation: b"" if it stands for itself."""

    program_digest: str
    conversation: bytes = b""
    rows: int = 0

    @classmethod
    def of(cls, message: pb.Wanted, first: str) -> WantedProgram:
        """Return what a message names. first: the Program that is meant if it names none."""
        return cls(message.program_digest or first, message.conversation, message.rows)

    def message(self) -> pb.Wanted:
        return pb.Wanted(program_digest=self.program_digest, conversation=self.conversation, rows=self.rows)

    def about(self, history: bytes = b"") -> bytes:
        """Return 32 bytes that differ for whatever else is wanted, or rows that other queries kept."""
        digest = hashlib.sha256(self.rows.to_bytes(8, "big"))
        for each in (self.program_digest.encode(), self.conversation, history):
            digest.update(len(each).to_bytes(8, "big") + each)
        return digest.digest()

    def check(self, program: Program) -> None:
        """Raise QueryError unless a query of this Program can have this place."""
        if not program.keeps and (self.conversation or self.rows):
            raise QueryError("queries of this Program stand for themselves", "name no conversation")
        if not program.keeps:
            return
        if not self.conversation:
            raise QueryError("queries of this Program stand in conversations", "ask it to generate text")
        if len(self.conversation) != NAME_BYTES:
            raise QueryError(f"the name of a conversation has {NAME_BYTES} bytes, not {len(self.conversation)}")
        if bool(program.rows) != bool(self.rows):
            raise QueryError("this Program cannot have that place in a conversation", AGAIN)
        if self.rows > program.rows or self.rows + program.kept_rows > program.capacity:
            raise QueryError(
                f"{self.rows} rows before {program.kept_rows} new ones, where {program.capacity} fit at most",
                "begin a text anew",
            )


@dataclass(eq=False, repr=False)
class PartyConversation:
    """One party's rows of a conversation. owner: who may go on with it.

    key: that which the pair that computes its queries had agreed on at the first of them. at_work: a query of it is
    under way. coming: what party 0 has asked of party 2 for the query that goes on with it.
    """

    name: bytes
    owner: bytes
    kept: KeptRows
    seat: Seat
    key: PairKey | None = None
    at_work: bool = True
    ended: bool = False
    since: float = field(default_factory=time.monotonic)
    coming: Any = None
    _queries: list[tuple[int, bytes]] = field(default_factory=list)  # the first row of each, and its number

    def history(self, rows: int, following: bytes = b"") -> bytes:
        """Return SHA-256 over the numbers of the queries that kept the first ``rows``, each with its first row.

        following: the number of a query that keeps the next ones.
        """
        queries = [each for each in self._queries if each[0] < rows] + ([(rows, following)] if following else [])
        return hashlib.sha256(b"".join(start.to_bytes(8, "big") + number for start, number in queries)).digest()

    def given(self, wanted: WantedProgram, program: Program) -> dict[str, Any]:
        """Return what a query reads, by name. Raises QueryError if it has ended."""
        kept = self.kept
        if self.ended:
            raise unknown("it", "it gave its place to others")
        return kept.given(program.circuit, wanted.rows)

    def keep(self, wanted: WantedProgram, number: bytes, rows: Mapping[str, Any]) -> None:
        """Keep the rows of the query ``number`` behind those that it read. Raises QueryError if it has ended."""
        if self.ended:
            raise unknown("it", "it gave its place to others")
        self.kept.append(rows, wanted.rows)
        self._queries = [each for each in self._queries if each[0] < wanted.rows] + [(wanted.rows, number)]


def unknown(who: str, why: str = "it has ended, or the party was started anew") -> QueryError:
    return QueryError(f"{who} keeps nothing of this text: {why}", AGAIN)


class PartyConversations:
    """All conversations at one party. memory: the budget of what is kept.

    A conversation takes one of MAXIMUM_CONVERSATIONS places, and its memory, with its first query. It ends when one of
    its queries fails, when it rests for IDLE, or for SPARE if others want its place.
    """

    def __init__(self, who: str, log: logging.Logger, memory: PreparedMemory | None = None) -> None:
        self._who, self.memory = (
            who,
            memory or PreparedMemory(memory_budget(None), "memory for kept rows", "give its machine more", who),
        )
        self._seats = Seats(who, "conversations", MAXIMUM_CONVERSATIONS, OF_ONE)
        self._all: dict[bytes, PartyConversation] = {}
        self._lock = threading.Lock()
        self._sweeping = Repeating(SWEEPING, self.sweep, log)

    def __len__(self) -> int:
        return len(self._all)

    def close(self) -> None:
        self._sweeping.close()
        for each in list(self._all.values()):
            self.end(each)

    def sweep(self) -> None:
        """End those that have rested for IDLE."""
        for each in list(self._all.values()):
            if not each.at_work and time.monotonic() - each.since > IDLE:
                self.end(each)

    def open(
        self, wanted: WantedProgram, program: Program, size: int, caller: str = "", shown: bytes = b""
    ) -> PartyConversation:
        """Begin or find the conversation of a query, which is at work from now on, until ``rest`` or ``end``.

        wanted: it was checked. size: the bytes that all its rows take here. caller: the name of whose it is; shown: the
        bytes by which its owner is known. Raises QueryError, Busy.
        """
        owner = hashlib.sha256(len(caller).to_bytes(8, "big") + caller.encode() + shown).digest()
        if not wanted.rows:
            return self._begin(wanted.conversation, program, size, caller, owner)
        with self._lock:
            found = self._all.get(wanted.conversation)
            if found is None or not hmac.compare_digest(found.owner, owner):  # nobody learns that others' exist
                raise unknown(self._who)
            if found.at_work:
                raise QueryError("a query of this text is under way", "ask for one token after the other")
            filled = found.kept.filled
            if wanted.rows <= filled:
                found.at_work = True
                found.seat.work()
                return found
        self.end(found)
        raise QueryError(f"{self._who} keeps {filled} rows, {wanted.rows} are to be read", AGAIN)

    def _begin(self, name: bytes, program: Program, size: int, caller: str, owner: bytes) -> PartyConversation:
        if name in self._all:
            raise QueryError("a text of this name was begun before", "take a fresh one")
        seat = self._seats.take(caller, partial(self._end_named, name))
        made = PartyConversation(name, owner, KeptRows(program.capacity), seat)
        try:
            self.memory.take(seat, size)
            with self._lock:
                if name in self._all:
                    raise QueryError("a text of this name was begun before", "take a fresh one")
                self._all[name] = made
        except BaseException:
            self._leave(seat)
            raise
        return made

    @contextmanager
    def using(self, conversation: PartyConversation | None, key: PairKey) -> Iterator[None]:
        """Use a conversation that was opened for its query, if it has one; if the query fails, the conversation ends.

        key: that of the pair which computes the query. Raises QueryError if another was agreed on meanwhile.
        """
        if conversation is None:
            yield
            return
        try:
            if conversation.key not in (None, key):
                raise unknown(self._who, "a party was started anew, or lost its connection")
            conversation.key = key
            yield
        except BaseException:
            self.end(conversation)
            raise
        self._rest(conversation)

    def _rest(self, conversation: PartyConversation) -> None:
        conversation.since = time.monotonic()
        conversation.seat.rest(SPARE)
        conversation.at_work = False

    def drop_coming(self) -> None:
        """Forget what party 2 was asked for ahead: it no longer holds the seeds that belong to it."""
        for each in list(self._all.values()):
            each.coming = None

    def end(self, conversation: PartyConversation) -> None:
        """End a conversation; harmless if it has ended."""
        with self._lock:
            if self._all.get(conversation.name) is conversation:
                del self._all[conversation.name]
            conversation.ended = True
            conversation.kept, conversation.coming = KeptRows(0), None
        self._leave(conversation.seat)

    def _end_named(self, name: bytes) -> None:
        if (found := self._all.get(name)) is not None:
            self.end(found)

    def _leave(self, seat: Seat) -> None:
        self.memory.leave(seat)
        self._seats.give_back(seat)


def kept_of(program: Program, results: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Opening]]:
    """Part what a party computed into the shares of its answer, and the openings that it keeps, by name."""
    end = len(results) - len(program.keeps)
    return results[:end], dict(zip(program.keeps, results[end:], strict=True))
