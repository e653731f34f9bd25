"""A sum behind every message, by which bytes that change on the way are noticed before anybody uses them.

A channel without TLS has no more than the checksums of TCP, which miss an error in 65,536, and nothing between the
network card and the program. The sum is a tag of AES-GCM under a key of zeros that everybody knows: of errors by
accident it misses one in 2^64. It is no protection from whoever changes bytes on purpose and makes another sum: that is
what TLS is for. A message of one method is none of another method. Each message has its own sum, so one that is lost
as a whole, or comes twice, is not noticed here: TCP and HTTP/2 keep messages in order, and queries prescribe each.

A message keeps being one of protobuf, which ignores the sum: it is the field 2047 behind all others, of 8 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import grpc
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from parties.net import forked
from parties.net.versions import without_sum
from parties.net.wrapped import WrappedChannel
from secure.errors import ChangedOnTheWay, Error

SUM_BYTES: Final = 10
"""The bytes of a message that are its sum, with the number of the field."""

_FIELD: Final = b"\xf9\x7f"  # field 2047, of 64 bits
_SUMS: Final = AESGCM(bytes(16))
_CHANGED: Final = object()
_WITHOUT: Final = object()

WITHOUT_SUMS: Final = frozenset({"/grpc.health.v1.Health/Check"})
"""The methods whose messages carry none: those of standard clients, which know of no sums."""

Bytes = bytes | memoryview


def sums_of(method: str) -> MethodSums:
    """Return the sums of messages of a method, by its full name."""
    return _NoSums(method) if method in WITHOUT_SUMS else MethodSums(method)


class MethodSums:
    """The sums of messages of one method. method: its full name."""

    def __init__(self, method: str) -> None:
        self._nonce = hashlib.sha256(method.encode()).digest()[:12]

    def _sum(self, data: Bytes) -> bytes:
        return _FIELD + _SUMS.encrypt(self._nonce, b"", data)[:8]

    def put(self, data: bytes) -> bytes:
        """Return an encoded message with its sum behind it."""
        return data + self._sum(data)

    def take(self, data: bytes) -> memoryview | None:
        """Return an encoded message without its sum; None if it has another one than it should, or none."""
        message = memoryview(data)[:-SUM_BYTES]
        return message if data[-SUM_BYTES:] == self._sum(message) else None

    def _has_sum(self, data: bytes) -> bool:
        """Tell whether a message that has changed seems to have come with a sum: its mark or its value is there."""
        end = data[-SUM_BYTES:]
        return end.startswith(_FIELD) or end[len(_FIELD) :] == self._sum(memoryview(data)[:-SUM_BYTES])[len(_FIELD) :]

    def serializer(self, serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        """Return the serializer of a stub or handler whose messages carry sums; bytes are encoded messages already."""
        return lambda message: self.put(message if type(message) is bytes else serialize(message))

    def deserializer(self, deserialize: Callable[[Any], Any]) -> Callable[[bytes], Any]:
        """Return the deserializer of a stub or handler whose messages carry sums, to be read by ``sound``.

        What it returns for a message that has changed is told by ``sound`` alone: gRPC would write an error that is
        raised here to the terminal, and go on with another one.
        """

        def deserialized(data: bytes) -> Any:
            message = self.take(data)
            if message is None:
                return _CHANGED if self._has_sum(data) else _WITHOUT
            return deserialize(message)

        return deserialized


class _NoSums(MethodSums):
    """Messages as they are."""

    def put(self, data: bytes) -> bytes:
        return data

    def take(self, data: bytes) -> memoryview:
        return memoryview(data)


def sound(message: Any, whose: str) -> Any:
    """Return what a ``deserializer`` made, or raise ChangedOnTheWay or OtherVersion. whose: who sent it."""
    if message is _CHANGED:
        raise ChangedOnTheWay(
            f"a message of {whose} changed on the way, and was not used",
            "ask again; if it happens again, look for what damages it: a cable, memory, or somebody in between",
        )
    if message is _WITHOUT:
        raise without_sum(whose)
    return message


def all_sound(messages: Iterator[Any], whose: str) -> Iterator[Any]:
    """Return the messages of a stream, which raises ``sound``'s errors at one that has changed."""
    return map(partial(sound, whose=whose), messages)


class SummedChannel(WrappedChannel):
    """A channel whose messages carry sums, in both directions. who: the service at its other end, for errors."""

    def __init__(self, channel: grpc.Channel, who: str) -> None:
        forked.check(who)
        super().__init__(channel)
        self._who = who

    def unary_unary(self, method: str, *coders: Any, **named: Any) -> Any:
        return _SummedMethod(self._bound(self._channel.unary_unary, method, coders, named), self._who, streams=False)

    def unary_stream(self, method: str, *coders: Any, **named: Any) -> Any:
        return _SummedMethod(self._bound(self._channel.unary_stream, method, coders, named), self._who, streams=True)

    def stream_unary(self, method: str, *coders: Any, **named: Any) -> Any:
        return _SummedMethod(self._bound(self._channel.stream_unary, method, coders, named), self._who, streams=False)

    def stream_stream(self, method: str, *coders: Any, **named: Any) -> Any:
        return _SummedMethod(self._bound(self._channel.stream_stream, method, coders, named), self._who, streams=True)

    @staticmethod
    def _bound(make: Callable[..., Any], method: str, coders: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Make the method of a stub, with coders that write and read sums."""
        named = {**dict(zip(("request_serializer", "response_deserializer"), coders, strict=False)), **named}
        sums = MethodSums(method)
        named["request_serializer"] = sums.serializer(named["request_serializer"])
        named["response_deserializer"] = sums.deserializer(named["response_deserializer"])
        return make(method, **named)


class _SummedMethod:
    """A method of the service behind a SummedChannel. streams: it answers with a stream."""

    def __init__(self, method: Any, who: str, *, streams: bool) -> None:
        self._method, self._who, self._streams = method, who, streams

    def __call__(self, *request: Any, **options: Any) -> Any:
        found = self._method(*request, **options)
        return _Answers(found, self._who) if self._streams else sound(found, self._who)

    def with_call(self, *request: Any, **options: Any) -> Any:
        found, call = self._method.with_call(*request, **options)
        return sound(found, self._who), call

    def future(self, *request: Any, **options: Any) -> Any:
        return _Answers(self._method.future(*request, **options), self._who)


class _Answers:
    """A call under way, whose answers are looked at as they are read; all else is the call's."""

    def __init__(self, call: Any, who: str) -> None:
        self._call, self._who = call, who

    def __iter__(self) -> _Answers:
        return self

    def __next__(self) -> Any:
        return self._sound(next(self._call))

    def result(self, timeout: float | None = None) -> Any:
        return self._sound(self._call.result(timeout))

    def _sound(self, answer: Any) -> Any:
        try:
            return sound(answer, self._who)
        except Error:
            self._call.cancel()
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)
