"""The soak's own instruments: its faults, the accounts of its queries, and the ledger that sees a key used twice."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import random
import threading
import time
from collections import Counter

import grpc
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from benchmarks import chaos, watched
from benchmarks.chaos_faults import JUMPS, Fault, deck
from benchmarks.chaos_world import Asked, Numbers, Query
from parties.services.status import clock
from protocols.prg import Key

KINDS = {"kill": ["server", "dealer"], "cut": ["client>server"], "clock": []}


def test_faults_follow_from_their_seed_and_every_kind_comes() -> None:
    def some(seed: int) -> list[tuple[str, str]]:
        return [(fault.kind, fault.on) for fault in itertools.islice(deck(random.Random(seed), KINDS), 40)]

    assert some(1) == some(1) != some(2)
    assert Counter(kind for kind, _ in some(1)) == {"kill": 20, "cut": 20}  # none that is on nobody
    assert {on for kind, on in some(1) if kind == "kill"} == {"server", "dealer"}


@pytest.mark.parametrize(
    ("drawn", "twice"),
    [
        ([("server", [(1, 0), (1, 1), (2, 0)]), ("dealer", [(1, 0)])], 0),  # each party has its own streams
        ([("server", [(1, 0)]), ("server", [(1, 0)])], 1),  # also by a process that came after it
        ([("server", [(1, 0), (1, 1)]), ("server", [(2, 0), (1, 2)])], 1),
        ([("server", [(1, 0), (2, 0), (1, 0)])], 1),  # a stream
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_key_that_serves_twice_is_seen(
    drawn: list[tuple[str, list[tuple[int, int]]]], twice: int, together: bool
) -> None:
    ledger = watched.Ledger()
    for role, names in drawn:  # a process each
        keys = {value: Key(bytes([value]) * 16) for value, _ in names}
        with pytest.MonkeyPatch.context() as patched:
            for method in ("stream", "streams"):
                patched.setattr(Key, method, getattr(Key, method))  # and back again
            watched.watch(ledger.pipe, role)
            for value, index in names:
                if together:
                    keys[value].streams({index: 5})
                else:
                    keys[value].stream(index)
    ledger.close()
    assert ledger.twice == twice


def test_what_clients_say_is_counted() -> None:
    asked = Asked()
    for client, begin, outcome in (("a", 1.0, "right"), ("b", 2.0, "wrong"), ("b", 6.0, "right"), ("a", 7.0, "")):
        line = '{{"what": "{}", "begin": {}, "end": {}, "outcome": "{}", "why": ""}}'
        asked.hear(client, line.format("asked", begin, begin, ""))
        if outcome:
            asked.hear(client, line.format("query", begin, begin + 0.5, outcome))
    assert [query.outcome for query in asked.queries] == ["right", "wrong", "right", ""]
    assert asked.right_since(0.5) == {"a": 1.5, "b": 6.5}
    assert asked.right_since(3.0) == {"b": 6.5}


def test_queries_beside_a_fault_are_left_out() -> None:
    fault = Fault("cut", "client>server", begin=10.0, over=11.0, first=0.5, all=2.0)
    times = [(8.0, 9.9), (9.0, 10.1), (12.0, 12.5), (12.9, 13.5), (13.1, 14.0)]
    queries = [Query("a", begin, end, "right") for begin, end in times]
    assert chaos.untouched(queries, [fault], 20.0) == [queries[0], queries[4]]
    fault.all = math.inf  # it never came back
    assert chaos.untouched(queries, [fault], 20.0) == [queries[0]]
    assert chaos.percentile(queries[:1]) == pytest.approx(1.9)
    assert chaos.percentile([]) == math.inf


@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_is_our_code_s_alone_and_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """A role whose waits do not end renews nothing, and a server of gRPC waits before it has started."""
    right, began = time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", time.time)  # which is put back
    watched.set_clock(jump)
    assert clock() - right == pytest.approx(jump, abs=60)
    assert time.time() - right == pytest.approx(0, abs=60)
    threading.Event().wait(0.1)
    time.sleep(0.1)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        server.start()
        server.stop(None).wait(60)
    assert 0.2 <= time.monotonic() - began < 10


def test_what_a_role_may_have_more_in_the_end() -> None:
    before = Numbers(threads=20, descriptors=20, resident=400.0)
    assert chaos.growth(before, Numbers(20, 10, 500.0), [400.0, 531.0]) == []
    assert chaos.growth(before, Numbers(20, 10, 400.0), [400.0, 600.0]) == ["600 MB, bound 532"]
    assert chaos.growth(before, Numbers(29, 37, 533.0)) == [
        "533 MB, bound 532",
        "29 threads, bound 28",
        "37 descriptors, bound 36",
    ]
