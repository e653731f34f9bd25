"""Merge both parties' traces of a query: compare their clocks and bytes, and draw an arrow for every message."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parties.traces.trace_file import PROCESSES, WIRE, Event, Head, Stamps, encode, microseconds, read, write
from secure.errors import InvalidInput


@dataclass(frozen=True)
class Merged:
    """Both parties' trace of a query. offset: seconds that the server's clock is ahead, wrong by ``bound`` at most.

    Each party's clock reads 0 when its own part of the query begins.
    """

    encoded: bytes
    offset: float
    bound: float


def merge(paths: Sequence[Path]) -> Merged:
    """Put a client's and a server's trace of one query on one time line, with an arrow for every message.

    The clocks are compared as NTP does it. No message arrives before its sender began to pack it. So with
    d1 = min(server received - client packs) and d2 = min(client received - server packs), the server's clock is ahead
    by a number in [-d2, d1]. The middle, (d1 - d2) / 2, is right if the fastest message takes the same time in both
    directions, which is an **assumption**; whatever the delays, it is wrong by (d1 + d2) / 2 at most. Clocks are
    assumed to run equally fast within a query. (The time at which a message has left is not used: a gRPC server learns
    of it late, often after the client has answered.)
    """
    traces = {t.head.party: t for t in map(read, paths)}
    if len(paths) != 2 or len(traces) != 2:
        raise InvalidInput("two traces are merged: one of the client and one of the server", "give one file of each")
    client, server = traces["client"], traces["server"]
    _require_same_query(client.head, server.head)
    d1 = _delay(client.head.rounds, server.head.rounds)
    d2 = _delay(server.head.rounds, client.head.rounds)
    offset, bound = (d1 - d2) / 2, (d1 + d2) / 2
    if bound < 0:
        raise InvalidInput("a message came before it was sent: the stamps are not of one query", "measure it again")
    # both start at 0 on their own clocks; neither moves below 0, which viewers show badly
    shifts = {"client": max(0.0, offset), "server": max(0.0, -offset)}
    events = [_shifted(event, shifts[t.head.party]) for t in (client, server) for event in t.events]
    about = {
        key: value
        for key, value in dataclasses.asdict(client.head).items()
        if key not in ("party", "rounds", "seconds")
    }
    about |= {"parties": list(traces), "server_clock_ahead_seconds": offset, "error_at_most_seconds": bound}
    about |= {"seconds": {party: t.head.seconds for party, t in traces.items()}}
    about |= {"rounds": {party: [list(r) for r in t.head.rounds] for party, t in traces.items()}}
    events += _arrows(client.head, server.head, shifts) + _arrows(server.head, client.head, shifts)
    return Merged(encode(events, about), offset, bound)


def _require_same_query(client: Head, server: Head) -> None:
    for what, of in _IDENTITY:
        ours, theirs = of(client), of(server)
        if ours != theirs:
            raise InvalidInput(
                f"these are not traces of one query: the client's {what} is {ours!r}, the server's {theirs!r}",
                "traces of one query have the same name but for the party",
            )
    for number, (c, s) in enumerate(zip(client.rounds, server.rounds, strict=True), 1):
        if (c.sent, c.received) != (s.received, s.sent):
            raise InvalidInput(
                f"the parties measured different bytes in round {number}: the client sent {c.sent} and received "
                f"{c.received}, the server received {s.received} and sent {s.sent}",
                "please report it: this should not happen",
            )


_IDENTITY: tuple[tuple[str, Callable[[Head], object]], ...] = (
    ("Program digest", lambda h: h.program_digest),
    ("session label", lambda h: h.session_label),
    ("query number", lambda h: h.query),
    ("number of rounds", lambda h: len(h.rounds)),
)


def _delay(sender: Sequence[Stamps], receiver: Sequence[Stamps]) -> float:
    """Return the least receiver's minus sender's time of a message: its delay, plus the receiver's clock offset."""
    delays = [r.received_at - s.start for s, r in zip(sender, receiver, strict=True) if s.sent]
    if not delays:
        raise InvalidInput("messages went one way only, so the two clocks cannot be compared")
    return min(delays)


def _shifted(event: Event, seconds: float) -> Event:
    return event if event["ph"] == "M" else event | {"ts": _moved(float(event["ts"]), seconds)}


def _moved(ts: float, seconds: float) -> float:
    return round(ts + seconds * 1e6, 3)


def _arrows(sender: Head, receiver: Head, shifts: dict[str, float]) -> list[Event]:
    """Make an arrow for each message, from the start of its packing to the start of its unpacking."""
    events: list[Event] = []
    for number, (s, r) in enumerate(zip(sender.rounds, receiver.rounds, strict=True), 1):
        if s.sent:
            about = {"cat": "message", "name": f"to {receiver.party}", "id": f"{receiver.party}-{number}", "tid": WIRE}
            # rounded like the slices "pack" and "unpack", so that both ends of an arrow lie exactly at a slice's start
            left = _moved(microseconds(s.start), shifts[sender.party])
            came = _moved(microseconds(r.received_at), shifts[receiver.party])
            events.append({"ph": "s", "pid": PROCESSES[sender.party], "ts": left, **about})
            events.append({"ph": "f", "bp": "e", "pid": PROCESSES[receiver.party], "ts": came, **about})
    return events


def merged(paths: Sequence[Path], output: Path) -> str:
    """Merge two traces and write the result to ``output``; return a line that says what was found."""
    found = merge(paths)
    write(output, found.encoded)
    return (
        f"both parties, equal bytes in every round: {output} (the server began {-found.offset * 1e3:.3f} ms after the "
        f"client, give or take {found.bound * 1e3:.3f} ms at most)"
    )
