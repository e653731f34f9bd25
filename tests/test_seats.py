"""Seats: who gives way to whom, whatever is asked in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parties.limits.seats import Seat, Seats
from secure.errors import Error

LIMIT, EACH = 4, 2
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["take", "rest", "work", "give back", "wait", "sweep"]),
        st.sampled_from("ab"),
        st.integers(0, 5),
    ),
    max_size=60,
)


class Leaving:
    """Takes a seat, and tells when it is taken away."""

    def __init__(self, seats: Seats, who: str, left: list[Seat]) -> None:
        self.seat = seats.take(who, lambda: left.append(self.seat))


@given(ACTIONS, st.booleans())
def test_nobody_at_work_gives_way_and_no_limit_is_passed(actions: list[tuple[str, str, int]], named: bool) -> None:
    clock, taken, left = [0.0], list[Seat](), list[Seat]()
    idle = dict[int, float]()  # when each may be taken away
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parties.limits.seats.time.monotonic", lambda: clock[0])
        seats = Seats("the service", "things", LIMIT, EACH)
        for action, caller, which in actions:
            who, before = caller if named else "", len(left)
            seat = taken[which % len(taken)] if taken else None
            if action == "take":
                mine = [s for s in taken if s.caller == who]
                full = mine if named and len(mine) == EACH else taken if len(taken) == LIMIT else []
                if full and all(idle.get(s.number, 1e9) > clock[0] for s in full):
                    with pytest.raises(Error, match="which is its limit"):
                        seats.take(who, str)
                else:
                    taken.append(Leaving(seats, who, left).seat)
                    assert len(left) - before == bool(full)
                    assert not full or left[-1] in full
            elif action == "wait":
                clock[0] += which
            elif action == "sweep":
                seats.sweep()
            elif seat is not None:
                if action == "rest":
                    seat.rest(which)
                    idle[seat.number] = clock[0] + which
                elif action == "work":
                    seat.work()
                    idle.pop(seat.number, None)
                else:
                    seats.give_back(seat)
                    taken.remove(seat)
            for gone in left[before:]:
                assert idle[gone.number] <= clock[0]
                assert gone.gone
                taken.remove(gone)
            if action == "sweep":
                assert all(idle.get(s.number, 1e9) > clock[0] for s in taken)
            assert len(seats) == len(taken) <= LIMIT
            assert not named or all(sum(s.caller == c for s in taken) <= EACH for c in "ab")


def test_the_longest_idle_gives_way() -> None:
    left = list[str]()
    seats = Seats("the service", "things", 3, 3)
    first = seats.take("", lambda: left.append("first"))
    second = seats.take("", lambda: left.append("second"))
    seats.take("", lambda: left.append("third"))
    second.rest(0)
    first.rest(0)
    seats.take("", lambda: None)
    assert (left, second.gone, first.gone) == (["second"], True, False)
    seats.give_back(second)  # harmless
    assert len(seats) == 3
    seats.take("", lambda: None)
    with pytest.raises(Error, match=r"^the service has 3 things, which is its limit\nhint: try again later$"):
        seats.take("", lambda: None)
