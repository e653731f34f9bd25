"""A record of what leaves this machine: every message, as it is handed to a channel of gRPC.

A ``Recorded`` network wraps another one, and all channels that it makes write into one ``Record``. A message is noted
where it becomes bytes, so nothing that a channel carries is missed. Noted are its kind, its size and those of its
fields that are no secrets, by ``OPEN``; never what it holds beside them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc

from parties.net.caller import Caller
from parties.net.endpoints import Endpoint
from parties.net.network import Network
from parties.net.wrapped import WrappedChannel
from secure.errors import InvalidInput

MAXIMUM_MESSAGES = 1 << 18
"""Messages and connections that a record takes: those of 2,000 queries of MiniLM, 100 bytes of memory each."""

OPEN: Mapping[str, tuple[str, ...]] = {
    "Describe": ("program_digest", "model"),
    "Download": ("sha256",),
    "Open": ("program_digest", "weights_digest"),
    "Session/hello": ("program_digest", "weights_digest"),
    "Session/prepare": ("query", "steps", "place.program_digest", "place.first", "place.rows"),
    "Session/query": ("query",),
    "Ask/start": ("wanted.program_digest", "wanted.rows", "following"),
    "Upload/header": ("program_digest",),
    "Query/start": ("program_digest",),
}
"""By the kind of a message, the fields that a record keeps: digests of Programs, names, numbers. No other is kept.

A kind is the name of the gRPC method, and behind a slash the content of the message where a stream has several.
"""


class Sent(NamedTuple):
    """A message that left. size: its bytes, before gRPC frames and encrypts it. said: its ``OPEN`` fields, by name."""

    kind: str
    size: int
    said: Mapping[str, str | int]


@dataclass(eq=False)
class Outgoing:
    """A channel and what left by it, in order. proven: the peer proves its role, by the certificates of that SHA-256,
    one for each time that the connection was made with another one.
    """

    role: str
    address: str
    proven: bool
    certificates: list[str] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)


class Record:
    """The record of what left this machine through all channels of a ``Recorded`` network. Threads may share it.

    full: it has MAXIMUM_MESSAGES, and what left since is missing.
    """

    def __init__(self, most: int = MAXIMUM_MESSAGES) -> None:
        self._most, self._count, self._lock = most, 0, threading.Lock()
        self._connections: list[Outgoing] = []
        self.full = False

    @property
    def connections(self) -> list[Outgoing]:
        """A copy of what is recorded so far."""
        with self._lock:
            return [Outgoing(c.role, c.address, c.proven, [*c.certificates], [*c.sent]) for c in self._connections]

    def opened(self, role: str, address: str, *, proven: bool) -> Outgoing:
        """Note a channel that is opened; return its part of the record."""
        found = Outgoing(role, address, proven)
        self._note(self._connections, found)
        return found

    def met(self, connection: Outgoing, certificate: str) -> None:
        """Note the certificate by which a peer has proved itself."""
        if connection.certificates[-1:] != [certificate]:
            self._note(connection.certificates, certificate)

    def sent(self, connection: Outgoing, method: str, message: Any, size: int) -> None:
        """Note a message. method: the full name of the gRPC method."""
        kind, content = kind_of(method, message)
        said = {name: value for name in OPEN.get(kind, ()) if (value := _field(content, name))}
        self._note(connection.sent, Sent(kind, size, said))

    def _note(self, place: list[Any], found: Any) -> None:
        with self._lock:
            if self._count < self._most:
                place.append(found)
                self._count += 1
            else:
                self.full = True

    def complete(self) -> None:
        """Raise InvalidInput if the record is full."""
        if self.full:
            raise InvalidInput(
                f"this session has sent more than the {self._most:,} messages that a receipt holds",
                "connect anew before that, and take a receipt of each session",
            )


def kind_of(method: str, message: Any) -> tuple[str, Any]:
    """Return the kind of a message by the full name of its gRPC method, as in ``OPEN``, and what has its fields."""
    name, oneofs = method.rpartition("/")[2], message.DESCRIPTOR.oneofs
    content = message.WhichOneof("content") if any(each.name == "content" for each in oneofs) else None
    return (f"{name}/{content}", getattr(message, content)) if content else (name, message)


def _field(message: Any, name: str) -> str | int:
    """Return a field by its name, with a dot before that of a message within; "" or 0 if it is not set."""
    for part in name.split("."):
        message = getattr(message, part)
    found: str | int = message
    return found


@dataclass(frozen=True)
class Recorded(Network):
    """A network like ``network``, on whose channels all that leaves is noted in ``record``."""

    network: Network
    record: Record

    @property
    def proves_roles(self) -> bool:
        return self.network.proves_roles

    def check(self, endpoint: Endpoint, *, what: str) -> None:
        self.network.check(endpoint, what=what)

    def probe(self, endpoint: Endpoint, *, what: str, role: str) -> None:
        self.network.probe(endpoint, what=what, role=role)

    def channel(
        self, endpoint: Endpoint, *, what: str, role: str, met: Callable[[str], None] | None = None
    ) -> grpc.Channel:
        part = self.record.opened(role, str(endpoint), proven=self.proves_roles)

        def heard(certificate: str) -> None:
            self.record.met(part, certificate)
            if met is not None:
                met(certificate)

        channel = self.network.channel(endpoint, what=what, role=role, met=heard)
        return _RecordedChannel(channel, lambda *sent: self.record.sent(part, *sent))

    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str, role: str) -> int:
        return self.network.bind(server, endpoint, what=what, role=role)

    def caller(self, context: grpc.ServicerContext) -> Caller:
        return self.network.caller(context)

    def about(self) -> tuple[str, ...]:
        return self.network.about()


class _RecordedChannel(WrappedChannel):
    """A channel that notes each message when it becomes bytes, by ``note(method, message, size)``."""

    def __init__(self, channel: grpc.Channel, note: Callable[[str, Any, int], None]) -> None:
        super().__init__(channel)
        self._note = note

    def _noting(self, method: str, named: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a stub, whose serializer notes what it serializes."""
        serializer = named["request_serializer"]

        def serialized(message: Any) -> bytes:
            data: bytes = serializer(message)
            self._note(method, message, len(data))
            return data

        return {**named, "request_serializer": serialized}

    def unary_unary(self, method: str, *_: Any, **named: Any) -> Any:
        return self._channel.unary_unary(method, **self._noting(method, named))

    def unary_stream(self, method: str, *_: Any, **named: Any) -> Any:
        return self._channel.unary_stream(method, **self._noting(method, named))

    def stream_unary(self, method: str, *_: Any, **named: Any) -> Any:
        return self._channel.stream_unary(method, **self._noting(method, named))

    def stream_stream(self, method: str, *_: Any, **named: Any) -> Any:
        return self._channel.stream_stream(method, **self._noting(method, named))
