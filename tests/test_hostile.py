"""Peers that say what they should not: what the Program does not prescribe is refused, and service goes on.

Those that are slow, or say nothing, cost the other side a bounded time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.net.frames import PART
from parties.proto import unseen_pb2 as pb
from parties.served.published import Published
from secure.errors import PeerLost
from tests.tiny import FIRST, Raw, Ready, Served, dial, refused, serving, works


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pb.Frame(data=b"", last=True), "the Program prescribes"),
        (pb.Frame(data=b"x", last=True), "the Program prescribes"),
        (pb.Frame(data=bytes(1 << 20), last=True), "the Program prescribes"),
        (pb.Frame(data=bytes(PART)), "the Program prescribes"),
        (pb.Frame(data=b""), "not the last"),
        (pb.Frame(data=b"x"), "not the last"),
    ],
)
def test_the_server_refuses_wrong_frames(
    frame: pb.Frame, message: str, server: Served, dealer: Served, model: Ready
) -> None:
    with Raw(server, dealer, model) as raw:
        raw.start()
        raw.say(frame=frame)
        failure = raw.hear_failure()
        assert failure.code == "protocol"
        assert message in failure.message
        assert f"module '{FIRST}" in failure.message
    works(server, dealer)


def test_a_message_beyond_the_limit_of_the_channel(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        raw.start()
        raw.say(frame=pb.Frame(data=bytes(17 << 20), last=True))
        with pytest.raises(grpc.RpcError):
            raw.hear_failure()
    works(server, dealer)


@pytest.mark.parametrize("content", [{"query": pb.Query(query=1)}, {"hello": pb.Hello()}, {}])
def test_the_server_refuses_other_messages_in_a_query(
    content: dict[str, Any], server: Served, dealer: Served, model: Ready
) -> None:
    with Raw(server, dealer, model) as raw:
        raw.start()
        raw.say(**content)
        refused(raw, "protocol", "in the middle of a query")


def test_one_query_at_most_is_prepared_beside_another(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        raw.start()
        raw.say(prepare=pb.Prepare(query=1))
        raw.say(prepare=pb.Prepare(query=2))
        refused(raw, "protocol", "'prepare' in the middle of a query")
    works(server, dealer)


@pytest.mark.parametrize("content", [{"frame": pb.Frame()}, {"hello": pb.Hello()}, {}])
def test_the_server_refuses_other_messages_between_queries(
    content: dict[str, Any], server: Served, dealer: Served, model: Ready
) -> None:
    with Raw(server, dealer, model) as raw:
        raw.greet()
        raw.say(**content)
        refused(raw, "protocol", "where 'prepare' or 'query' was expected")


def test_a_session_begins_with_a_handshake(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        raw.say(query=pb.Query(query=0))
        refused(raw, "handshake", "does not begin with a handshake")


@pytest.mark.parametrize("token", [b"", bytes(16), bytes(10_000)])
def test_sessions_that_the_dealer_does_not_know(token: bytes, server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        raw.token = token
        with pytest.raises(AssertionError):
            raw.greet()
    with Raw(server, dealer, model) as raw, pytest.raises(grpc.RpcError, match="no such session"):
        list(raw.dealer.Deal(pb.DealRequest(session=token, query=0)))


class Dripping(Published):
    """A server whose files come as ``Dripping.parts`` says: by their bytes, forever or as long as they last."""

    parts: Callable[[bytes], Iterator[bytes]]

    def Download(self, request: pb.DownloadRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        for data in type(self).parts(self._files[request.sha256]):
            yield pb.Chunk(data=data)


def silent(payload: bytes) -> Iterator[bytes]:
    time.sleep(8)
    yield payload


def dripping(payload: bytes) -> Iterator[bytes]:
    for i in range(400):
        time.sleep(0.02)
        yield payload[i : i + 1]


def empty(payload: bytes) -> Iterator[bytes]:
    until = time.monotonic() + 8
    while time.monotonic() < until:
        yield b""
    yield payload


@pytest.mark.parametrize(
    ("parts", "message"),
    [(silent, "nothing of a file for 1 s"), (dripping, r"sent \d+ bytes of a file"), (empty, "sent 0 bytes of a file")],
)
def test_a_download_that_does_not_come_ends_at_the_deadline(
    parts: Callable[[bytes], Iterator[bytes]],
    message: str,
    dealer: Served,
    model: Ready,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Dripping, "parts", staticmethod(parts), raising=False)
    with serving(model, dealer.address, describing=Dripping) as server:
        began = time.monotonic()
        with pytest.raises(PeerLost, match=message):
            dial(server, dealer, deadline=1.0)
        assert time.monotonic() - began < 3.0
