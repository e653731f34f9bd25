"""One party's timeline of a query as a file that Perfetto and chrome://tracing open.

A file holds the steps that the public Program prescribes, and their times: no share, no seed, no text, no session id.
A server's times show as much about its weights as timing does (see SECURITY.md), so its traces should stay private.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from parties.served.files import store
from secure.cost.timeline import Timeline
from secure.errors import InvalidInput
from secure.mpc.program import Program
from secure.version import __version__

FORMAT: Final = 1
PROCESSES = {"client": 1, "server": 2}
COMPUTE, WIRE = 1, 2  # threads of each process
Event = dict[str, Any]

LARGEST = 256 << 20  # bytes of another party's trace


class Stamps(NamedTuple):
    """A round's times, in seconds since the party's query began, and its bytes. As in ``timeline.Round``."""

    start: float
    sent_at: float
    received_at: float
    stop: float
    sent: int
    received: int


@dataclass(frozen=True)
class Head:
    """The description of a trace, stored in the file under "otherData"."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal[1]
    version: str
    party: Literal["client", "server"]
    query: int
    program_digest: str
    session_label: str
    seconds: float
    round_fields: list[str]
    rounds: list[Stamps]

    @property
    def name(self) -> str:
        """The part of the file name that both parties' traces of a query have in common."""
        return f"{self.session_label}-{self.query}"


@dataclass(frozen=True)
class TraceFile:
    """One party's trace of a query, as in its file."""

    head: Head
    events: list[Event]

    @property
    def encoded(self) -> bytes:
        return encode(self.events, dataclasses.asdict(self.head) | {"rounds": [list(r) for r in self.head.rounds]})


def trace(timeline: Timeline, program: Program, query: int, session_label: str) -> TraceFile:
    """Make a trace from the timeline of one query of ``program``."""
    zero = timeline.start
    rounds = [
        Stamps(r.start - zero, r.sent_at - zero, r.received_at - zero, r.stop - zero, r.sent, r.received)
        for r in timeline.rounds
    ]
    head = Head(
        format=FORMAT,
        version=__version__,
        party=_party(timeline),
        query=query,
        program_digest=program.digest,
        session_label=session_label,
        seconds=timeline.seconds,
        round_fields=list(Stamps._fields),
        rounds=rounds,
    )
    return TraceFile(head, list(_events(timeline, program)))


def _party(timeline: Timeline) -> Literal["client", "server"]:
    return "client" if timeline.party == "client" else "server"


def microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _events(timeline: Timeline, program: Program) -> Iterator[Event]:
    process, zero = PROCESSES[timeline.party], timeline.start

    def span(thread: int, name: str, start: float, stop: float, **arguments: Any) -> Event:
        # round the end, not the duration, so that neighbours touch and never overlap
        ts = microseconds(start - zero)
        dur = round(max(0.0, microseconds(stop - zero) - ts), 3)
        return {"ph": "X", "pid": process, "tid": thread, "name": name, "ts": ts, "dur": dur, "args": arguments}

    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": timeline.party}}
    yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
    for thread, name in ((COMPUTE, "compute"), (WIRE, "wire")):
        yield {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": name}}
    for work in timeline.work:
        kind, path = program.circuit[work.index].protocol.kind, program.paths[work.index]
        yield span(COMPUTE, kind, work.start, work.start + work.seconds, module=path, instruction=work.index)
    for number, r in enumerate(timeline.rounds, 1):
        about = {
            "round": number,
            "sent": r.sent,
            "received": r.received,
            "modules": list(dict.fromkeys(program.paths[part.index] for part in r.parts)),
        }
        yield span(WIRE, "pack", r.start, r.sent_at, **about)
        yield span(WIRE, "wait", r.sent_at, r.received_at, **about)
        yield span(WIRE, "unpack", r.received_at, r.stop, **about)


def encode(events: Sequence[Event], about: dict[str, Any]) -> bytes:
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


# files


class TraceDirectory:
    """A directory to which a party writes a trace of every query.

    It is made before the first query, so that a wrong directory costs no query; raises InvalidInput then.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        try:
            directory.mkdir(parents=True, mode=0o700, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise InvalidInput(
                f"--trace: the directory {directory} cannot be written: {error.strerror}", "give another one"
            ) from None

    def write(self, timeline: Timeline, program: Program, query: int, session_label: str) -> Path:
        """Write ``PARTY-SESSIONLABEL-QUERY.json``, whole or not at all, and return its path."""
        made = trace(timeline, program, query, session_label)
        path = self.path / f"{made.head.party}-{made.head.name}.json"
        write(path, made.encoded)
        return path


def write(path: Path, encoded: bytes) -> None:
    """Write a trace atomically; raises InvalidInput if that is not possible."""
    try:
        store(path, encoded)
    except OSError as error:
        raise InvalidInput(
            f"the trace {path} cannot be written: {error.strerror}", "make room there, or give another directory"
        ) from None


def _is_of(party: str, event: Event) -> bool:
    """True if the event is a name or a span in the party's own lanes: a peer's file must not draw into others."""
    known = event.get("ph") == "M" or (event["ph"] == "X" and float(event["ts"]) >= 0)
    return known and event["pid"] == PROCESSES[party] and event.get("tid", WIRE) in (COMPUTE, WIRE)


def read(path: Path) -> TraceFile:
    """Read a file of ``TraceDirectory``; raises InvalidInput if it is none."""
    hint = "give the client's and the server's files, as --trace wrote them"
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise InvalidInput(f"the trace {path} has {size} bytes, {LARGEST} are read at most", hint)
        document = json.loads(path.read_bytes())
        head = TypeAdapter(Head).validate_python(document["otherData"])
        events = TypeAdapter(list[Event]).validate_python(document["traceEvents"])
        foreign = not all(_is_of(head.party, event) for event in events)
    except OSError as error:
        raise InvalidInput(f"the trace {path} cannot be read: {error.strerror}", hint) from None
    except (LookupError, TypeError, ValueError, RecursionError, ValidationError) as error:
        raise InvalidInput(f"{path} is not one party's trace of a query ({type(error).__name__})", hint) from None
    if foreign:
        raise InvalidInput(f"{path} holds events that no party's trace has", hint)
    return TraceFile(head, events)
