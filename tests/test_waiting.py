"""Places for calls: who waits, who is pushed out, and who is told to come later."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from parties.limits import waiting
from parties.limits.waiting import FIRST, SLOWEST, Clock, Places, WaitingRoom, patience
from parties.net.caller import Caller
from parties.net.endpoints import OPTIONS
from secure.errors import Error


class Call:
    """A call of somebody, as far as a waiting room looks at it."""

    def __init__(self, name: str = "") -> None:
        self.name, self.cancelled = name, False

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "caller", lambda call: who(call.name))


def who(name: str) -> Caller:
    return Caller(name, "client" if name else None, "127.0.0.1:1")


def enter(room: WaitingRoom, stack: ExitStack, call: Any) -> Call:
    stack.enter_context(room.place(call))
    assert isinstance(call, Call)
    return call


def test_a_full_room_pushes_out_the_oldest() -> None:
    room = WaitingRoom(3)
    with ExitStack() as stack:
        calls = [enter(room, stack, Call()) for _ in range(5)]
        assert [call.cancelled for call in calls] == [True, True, False, False, False]
    assert not room._inside


def test_who_has_left_takes_no_place() -> None:
    room, calls = WaitingRoom(2), [Call() for _ in range(6)]
    for call in calls:
        with ExitStack() as stack:
            enter(room, stack, call)
    assert not any(call.cancelled for call in calls)


def test_who_has_most_pushes_out_their_own() -> None:
    """However many calls one caller begins, another's stays."""
    room = WaitingRoom(4)
    with ExitStack() as stack:
        honest = enter(room, stack, Call("a"))
        others = [enter(room, stack, Call("b")) for _ in range(50)]
        late = enter(room, stack, Call("c"))
        assert not honest.cancelled
        assert not late.cancelled
        assert sum(not call.cancelled for call in others) == 2


def test_places_for_work() -> None:
    places = Places(4, 2, "party 0", "queries")
    mine = [places.take(who("a")) for _ in range(2)]
    with pytest.raises(Error, match="party 0 has 2 queries of this caller, which is its limit for one"):
        places.take(who("a"))
    others = [places.take(who("")) for _ in range(2)]  # callers without names have no limit of their own
    assert places.free == 0
    with pytest.raises(Error, match="party 0 has 4 queries, which is its limit"):
        places.take(who("b"))
    mine.pop()()
    places.take(who("b"))()
    for give_back in (*mine, *others):
        give_back()
    assert places.free == 4


def test_patience_follows_from_the_size() -> None:
    assert patience(0) == FIRST
    assert patience(30 * SLOWEST) == FIRST + 30
    clock = Clock(5.0)
    assert 4.9 < clock.left(100) <= 5.0
    assert clock.left(1.0) == 1.0
    assert 0 < Clock(-1.0).left(1.0) < 0.01  # a wait of 0 s would be no wait with a limit


def test_the_options_of_channels_are_grpcs() -> None:
    """gRPC ignores a name that it does not know: servers once ended idle connections for too many pings."""
    (library,) = (Path(grpc.__file__).parent / "_cython").glob("cygrpc*.so")
    known = library.read_bytes()
    for name, _ in OPTIONS:
        assert name.encode() + b"\0" in known, name
