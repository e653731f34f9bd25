"""Conversations: queries of one session of which later ones read what earlier ones kept.

Client, server and dealer each keep the rows of a session's conversations by themselves. What a query reads is said by
its place, from which all three derive its keys: if they do not agree about it, no two of their masks belong together,
and the answer is random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from parties.proto import unseen_pb2 as pb
from protocols.two_party import KeptRows
from secure.errors import QueryError
from secure.mpc.program import Program

MAXIMUM_CONVERSATIONS = 4  # of one session at a time; the one that has rested the longest gives way
TOGETHER = 4  # the most queries of a conversation that are prepared together
IN_MEMORY = 512 << 20  # bytes of one query's corrections; more lie in a file unless there is memory to spare


class Place(NamedTuple):
    """The place of a query in a conversation, see ``Place``: part of what its keys are derived from."""

    program_digest: str
    first: int
    rows: int

    @classmethod
    def of(cls, message: pb.Prepare | pb.DealRequest) -> Place | None:
        """Return the place that a message names; None for a query that stands for itself."""
        if not message.HasField("place"):
            return None
        return cls(message.place.program_digest, message.place.first, message.place.rows)

    def message(self) -> pb.Place:
        return pb.Place(program_digest=self.program_digest, first=self.first, rows=self.rows)

    @property
    def begins(self) -> bool:
        """True if it is the first of its conversation."""
        return not self.rows

    def steps(self, program: Program, count: int) -> list[Place]:
        """Return the places of queries of one Program, from this one on: each reads what the one before kept too."""
        return [self._replace(rows=self.rows + i * program.kept_rows) for i in range(count)]


@dataclass(eq=False)
class HeldConversation:
    """One party's rows of a conversation. first: the number of the query that began it. end: called when it goes."""

    first: int
    kept: KeptRows
    end: Callable[[], None]

    def at(self, place: Place) -> KeptRows:
        """Return what is kept, if it has the rows that a query at a place reads. Raises QueryError."""
        if place.rows > self.kept.filled:
            raise QueryError(f"{self.kept.filled} rows are kept, {place.rows} are to be read", "begin the text again")
        return self.kept

    def given(self, place: Place, program: Program) -> dict[str, Any]:
        """Return the openings that a query at a place reads, by name. Raises QueryError if they are not there."""
        try:
            return self.at(place).given(program.circuit, place.rows)
        except ValueError as error:  # Programs that do not belong together
            raise QueryError(f"a Program reads what the one before did not keep: {error}") from None

    def keep(self, place: Place, program: Program, results: Sequence[Any]) -> Sequence[Any]:
        """Keep a query's last results, the openings, behind the rows that it read. Return the others."""
        end = len(results) - len(program.keeps)
        try:
            self.kept.append(dict(zip(program.keeps, results[end:], strict=True)), place.rows)
        except ValueError as error:
            raise QueryError(f"a Program keeps what the one before did not: {error}") from None
        return results[:end]


class Conversations:
    """The conversations of one session at one party, MAXIMUM_CONVERSATIONS at most. No two threads use it at a time."""

    def __init__(self) -> None:
        self._all: dict[int, HeldConversation] = {}  # the one that was used last is the last

    def begin(self, first: int, program: Program, end: Callable[[], None] = lambda: None) -> HeldConversation:
        """Begin a conversation with the query ``first``. end: called when it gives way, or the session ends."""
        if first in self._all:
            raise QueryError(f"the conversation {first} was begun before")
        self.make_room()
        self._all[first] = found = HeldConversation(first, KeptRows(program.capacity), end)
        return found

    def make_room(self) -> None:
        """End the conversation that has rested the longest, if there are as many as there may be."""
        while len(self._all) >= MAXIMUM_CONVERSATIONS:
            self._all.pop(next(iter(self._all))).end()

    def require(self, first: int) -> HeldConversation:
        """Return the conversation that a query began. Raises QueryError if it has ended."""
        if (found := self._all.get(first)) is None:
            raise QueryError(
                f"the text that query {first} began has ended: a session keeps {MAXIMUM_CONVERSATIONS} of them",
                "begin it again",
            )
        return found

    def find(self, place: Place) -> HeldConversation:
        """Return the conversation of a place, which does not rest now. Raises QueryError if it has ended."""
        found = self.require(place.first)
        self._all[place.first] = self._all.pop(place.first)
        return found

    def clear(self) -> None:
        """End them all."""
        while self._all:
            self._all.popitem()[1].end()


def require_no_place(program: Program) -> None:
    """Raise QueryError for a Program whose queries stand in conversations."""
    if program.keeps:
        raise QueryError("queries of this Program stand in conversations", "ask it to generate text")


def most_together(program: Program) -> int:
    """Return how many queries of a conversation may be prepared together."""
    return TOGETHER if program.keeps_first and program.cost.dealt <= IN_MEMORY else 1


def places_of(message: pb.Prepare | pb.DealRequest, program: Program) -> list[Place]:
    """Return the places of the queries that are to be prepared together. Raises QueryError if one cannot be there."""
    place, count = Place.of(message), message.steps or 1
    if count == 1 and place is None:
        require_no_place(program)
        return []
    if place is None or (count > 1 and (place.begins or count > most_together(program))):
        raise QueryError(f"{count} queries of this Program cannot be prepared together")
    places = place.steps(program, count)
    for i, each in enumerate(places):
        check_place(each, message.query + i, program)
    return places


def check_place(place: Place, query: int, program: Program) -> None:
    """Raise QueryError unless a query can have this place, and its Program the rows."""
    if not program.keeps or place.begins == bool(program.rows):
        raise QueryError("this Program cannot have that place in a conversation")
    if place.begins and place.first != query:
        raise QueryError(f"query {query} begins a conversation that is named {place.first}")
    if not place.begins and place.first >= query:
        raise QueryError(f"query {query} goes on with a conversation that is named {place.first}")
    if place.rows > program.rows or place.rows + program.kept_rows > program.capacity:
        raise QueryError(
            f"{place.rows} rows before {program.kept_rows} new ones, where {program.capacity} fit at most",
            "begin a text anew",
        )
