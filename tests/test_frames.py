"""Byte strings in parts, deadlines, addresses, and query numbers: the pieces below client, server and dealer."""

from __future__ import annotations

import logging
import socket
import threading
import time

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.net import frames
from parties.net.calls import answering, calling
from parties.net.endpoints import Endpoint, is_loopback
from parties.net.frames import PART, FrameReader, chunk_data, field_data, parts, to_chunks, to_frames
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2 import Frame
from parties.two_party.keys import MAXIMUM_QUERY, Burnt, mask_key, query_key
from secure.errors import DealerError, EndpointError, Error, PeerLost, QueryError, from_code, kinds, printable


def read(payload: bytes, expected: int) -> bytes | None:
    reader, whole = FrameReader(expected), None
    for frame in to_frames(payload):
        assert whole is None
        whole = reader.add(frame)
    return whole


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 7])
def test_a_frame_arrives_whole(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    assert read(payload, size) == payload
    assert b"".join(parts(payload)) == payload
    assert [f.last for f in to_frames(payload)].count(True) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 16))
def test_chunks_regroup_and_keep_the_bytes(pieces: list[bytes], part: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "PART", part)
        chunks = [bytes(chunk_data(chunk)) for chunk in to_chunks(pieces)]
        assert b"".join(chunks) == b"".join(pieces)
        assert all(len(c) == part for c in chunks[:-1])
        payload = b"".join(pieces)
        assert read(payload, len(payload)) == payload


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.integers(0, 20_000).map(bytes)))
def test_a_chunk_is_encoded_as_protobuf_does(data: bytes) -> None:
    (message,) = to_chunks([data]) if data else (b"\x0a\x00",)
    assert message == pb.Chunk(data=data).SerializeToString() or not data
    assert pb.Chunk.FromString(message).data == chunk_data(message) == data
    (stocked,) = to_chunks([data], pb.StockPart.DATA_FIELD_NUMBER) if data else (b"\x12\x00",)
    assert stocked == pb.StockPart(data=data).SerializeToString()
    view = field_data(stocked, pb.StockPart.DATA_FIELD_NUMBER)
    assert view is not None
    assert bytes(view) == data


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(lambda rest: b"\x0a\x05first" + rest)))
def test_any_other_chunk_is_read_as_protobuf_reads_it(message: bytes) -> None:
    try:
        expected = pb.Chunk.FromString(message).data
    except DecodeError:
        with pytest.raises(DecodeError):
            chunk_data(message)
    else:
        assert chunk_data(message) == expected


@pytest.mark.parametrize(
    ("payload", "expected"), [(b"abc", 4), (b"abc", 2), (b"", 1), (bytes(PART + 1), PART), (bytes(PART), PART + 1)]
)
def test_wrong_sizes_are_refused(payload: bytes, expected: int) -> None:
    with pytest.raises(ValueError, match=f"the Program prescribes {expected}"):
        read(payload, expected)


def test_parts_that_never_end_are_refused() -> None:
    """Neither empty parts forever, nor crumbs of an allowed total that take a message each."""
    for data in (b"", b"x", bytes(PART - 1)):
        with pytest.raises(ValueError, match="not the last"):
            FrameReader(10 * PART).add(Frame(data=data))
    reader = FrameReader(2 * PART)
    assert reader.add(Frame(data=bytes(PART))) is None
    assert reader.add(Frame(data=bytes(PART))) is None
    with pytest.raises(ValueError, match="or more"):
        reader.add(Frame(data=bytes(PART)))


# deadlines


def test_a_watchdog_fires_once_and_its_thread_ends() -> None:
    fired = threading.Event()
    watch = Watchdog(0.1, fired.set)
    time.sleep(0.2)
    assert not fired.is_set()  # nothing is guarded
    with watch.guard():
        assert fired.wait(5)
    assert watch.fired
    wait_for_watchdogs()


def test_a_watchdog_that_is_stopped_does_nothing() -> None:
    fired = threading.Event()
    watch = Watchdog(0.1, fired.set)
    with watch.guard(60):
        time.sleep(0.25)
    with watch.guard():
        watch.stop()
        time.sleep(0.25)
    assert not fired.is_set()
    wait_for_watchdogs()


def test_a_consumer_that_does_not_take_the_next_message_is_guarded() -> None:
    fired = threading.Event()
    watch = Watchdog(0.1, fired.set)
    messages = watch.sending([1, 2])
    assert next(messages) == 1
    assert fired.wait(5)
    assert list(messages) == [2]
    watch.stop()


OTHERS = set[threading.Thread]()


@pytest.fixture(autouse=True)
def others() -> None:
    """Note the threads that other tests of this process left."""
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


def wait_for_watchdogs() -> None:
    end = time.monotonic() + 5
    while any(t.name == "unseen-watchdog" for t in {*threading.enumerate()} - OTHERS):
        assert time.monotonic() < end, "a watchdog's thread goes on"
        time.sleep(0.01)


# addresses


def test_addresses() -> None:
    assert Endpoint.parse("127.0.0.1:50051", what="x") == Endpoint("127.0.0.1", 50051)
    assert str(Endpoint.parse("[::1]:5", what="x")) == "[::1]:5"
    for text in ("", "localhost", ":5", "host:", "host:x", "host:65536", "host:-1", "host:²", "host:" + "9" * 5000):
        with pytest.raises(EndpointError, match=r"the server: .* is not host:port\nhint: "):
            Endpoint.parse(text, what="the server")


def test_what_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback(Endpoint("127.0.0.1", 1).resolved())
    assert is_loopback(Endpoint("::1", 1).resolved())
    for host in ("0.0.0.0", "192.0.2.7", "::"):
        assert not is_loopback(Endpoint(host, 1).resolved())
    both = [(0, 0, 0, "", ("127.0.0.1", 0)), (0, 0, 0, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert not is_loopback(Endpoint("two.example", 1).resolved())  # all of a host's addresses must be this machine's


def test_a_host_that_is_none() -> None:
    for host in ("no-such-host.invalid", "a" * 70, "a..b"):
        with pytest.raises(EndpointError, match="cannot be resolved"):
            Endpoint(host, 1).resolved()


# errors in words


@grpc.Call.register
class Refused(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    ("code", "details", "message"),
    [
        ("UNAVAILABLE", "x", "the dealer at h:1 cannot be reached (dealing)\nhint: start it"),
        ("DEADLINE_EXCEEDED", "x", "the dealer at h:1 did not answer in time (dealing)\nhint: start it"),
        ("FAILED_PRECONDITION", "no\nhint: do", "the dealer at h:1 refused (dealing): no\nhint: do"),
        ("INTERNAL", "a\x1b[31mb", "the dealer at h:1 refused (dealing): a?[31mb\nhint: start it"),
    ],
)
def test_grpc_errors_in_words(code: str, details: str, message: str) -> None:
    with (
        pytest.raises(DealerError) as caught,
        calling("the dealer", Endpoint("h", 1), "start it", doing="dealing", kind=DealerError),
    ):
        raise Refused(getattr(grpc.StatusCode, code), details)
    assert str(caught.value) == message


def test_errors_travel_by_code() -> None:
    assert len({kind.code for kind in kinds()}) == len(list(kinds())) > 15
    for kind in kinds():
        assert type(from_code(kind.code, "m")) is kind
    assert type(from_code("of-the-future", "m")) is Error
    assert len(printable("x" * 10**6)) == 2000


class Aborted(Exception):
    pass


class Context:
    """Of a call that is being answered."""

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.status = (code, details)
        raise Aborted

    def set_trailing_metadata(self, metadata: object) -> None:
        self.metadata = metadata


def test_what_should_not_happen_is_logged_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    context, log = Context(), logging.getLogger("unseen.test")
    with pytest.raises(Aborted), answering(context, log):  # type: ignore[arg-type]
        raise KeyError("a bug")
    assert context.status == (grpc.StatusCode.INTERNAL, "internal error\nhint: see its log")
    assert "KeyError" in caplog.text
    assert "Traceback" not in caplog.text
    with pytest.raises(Aborted), answering(context, log):  # type: ignore[arg-type]
        raise PeerLost("gone", "look")
    assert context.status == (grpc.StatusCode.FAILED_PRECONDITION, "gone\nhint: look")


# numbers and keys


def test_a_number_is_used_once_and_never_goes_back() -> None:
    burnt = Burnt()
    burnt.burn(0)
    burnt.burn(5)
    for number in (5, 3, 0):
        with pytest.raises(QueryError, match=f"query {number} was already used"):
            burnt.burn(number)
    for number in (-1, MAXIMUM_QUERY):
        with pytest.raises(QueryError, match="out of range"):
            burnt.burn(number)
    burnt.burn(6)


def test_of_many_threads_one_gets_a_number() -> None:
    burnt, won = Burnt(), []

    def run() -> None:
        try:
            burnt.burn(7)
        except QueryError:
            return
        won.append(1)

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]


def test_every_name_gives_another_key() -> None:
    base = (bytes(32), "client", bytes(16), "ab", 0)
    others = [
        (b"\1" * 32, "client", bytes(16), "ab", 0),
        (bytes(32), "server", bytes(16), "ab", 0),
        (bytes(32), "client", b"\1" * 16, "ab", 0),
        (bytes(32), "client", bytes(16), "ac", 0),
        (bytes(32), "client", bytes(16), "ab", 1),
    ]
    keys = [query_key(*names).value for names in (base, *others)] + [mask_key(bytes(32), "ab").value]
    assert len(set(keys)) == len(keys)
    assert query_key(*base).value == keys[0]
    assert keys[0].hex() not in repr(query_key(*base))
