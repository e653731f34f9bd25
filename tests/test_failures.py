"""Peers that die, stall or misbehave in the middle: who is told what, and that service goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.net.frames import PART, chunk_data
from parties.net.network import Plaintext
from parties.net.peer import Peer
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import DealerStub, ModelStub
from parties.services import hosting
from parties.two_party import server as server_module
from parties.two_party.dealer import DealerService
from parties.two_party.server import InferenceService
from secure.deployments.two_party import DEALER
from secure.errors import DealerError, Error, PeerLost, ProtocolError
from secure.session.session import Session
from tests.dealer_key import KEY
from tests.tiny import (
    FIRST,
    TEXT,
    Raw,
    Ready,
    Served,
    dealing,
    dial,
    refused,
    serving,
    session_count,
    wait_until,
    works,
)

# failures in the middle


class Misbehaving(InferenceService):
    """Passes its session's messages through ``change``."""

    def change(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
        raise NotImplementedError

    def Session(self, requests: Any, context: Any) -> Iterator[pb.ServerMessage]:
        yield from self.change(super().Session(requests, context), context)


def each_frame(change: Callable[[pb.Frame], None]) -> type[InferenceService]:
    def run(_: Any, messages: Iterator[pb.ServerMessage], __: Any) -> Iterator[pb.ServerMessage]:
        for message in messages:
            if message.WhichOneof("content") == "frame":
                change(message.frame)
            yield message

    return type("Changing", (Misbehaving,), {"change": run})


def shorten(frame: pb.Frame) -> None:
    frame.data = frame.data[1:]


def lengthen(frame: pb.Frame) -> None:
    frame.data += b"x"


def never_last(frame: pb.Frame) -> None:
    frame.data, frame.last = b"", False


@pytest.mark.parametrize("change", [shorten, lengthen, never_last])
def test_the_client_refuses_wrong_frames(change: Any, model: Ready, dealer: Served) -> None:
    with serving(model, dealer.address, each_frame(change)) as server, dial(server, dealer) as connection:
        with pytest.raises(ProtocolError, match=r"module 'encoder[^']*': the server sent a (frame|part) of \d+ bytes"):
            connection.embed([TEXT])
        with pytest.raises(PeerLost, match="this session has ended: module"):
            connection.embed([TEXT])
        assert connection.reports == []


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        (
            pb.ServerMessage(finished=pb.Finished()),
            "'finished' where 'frame' was expected .its message",
        ),
        (pb.ServerMessage(), "None where 'frame' was expected"),
        (
            pb.ServerMessage(failure=pb.Failure(code="x", message="a\x1b[2J" + "y" * 9000)),
            r"the server reports: a\?\[2Jy",
        ),
    ],
)
def test_the_client_refuses_other_messages(
    instead: pb.ServerMessage, message: str, model: Ready, dealer: Served
) -> None:
    def run(_: Any, messages: Iterator[pb.ServerMessage], __: Any) -> Iterator[pb.ServerMessage]:
        for m in messages:
            yield instead if m.WhichOneof("content") == "frame" else m

    kind = type("Other", (Misbehaving,), {"change": run})
    with serving(model, dealer.address, kind) as server, dial(server, dealer) as connection:
        with pytest.raises(Error, match=message) as caught:
            connection.embed([TEXT])
        assert len(str(caught.value)) < 2500


def test_a_server_that_stalls(model: Ready, dealer: Served) -> None:
    released = threading.Event()

    def run(_: Any, messages: Iterator[pb.ServerMessage], __: Any) -> Iterator[pb.ServerMessage]:
        for n, message in enumerate(messages):
            if n == 6:
                released.wait(20)
            yield message

    kind = type("Stalling", (Misbehaving,), {"change": run})
    with serving(model, dealer.address, kind) as server, dial(server, dealer, deadline=1.0) as connection:
        start = time.monotonic()
        with pytest.raises(PeerLost, match=WAITING.replace("REASON", "did not answer within 1 s")):
            connection.embed([TEXT])
        assert time.monotonic() - start < 5
        released.set()


def test_closing_ends_the_query_of_another_thread(model: Ready, dealer: Served) -> None:
    """The query says that the session was closed, not that the server is gone."""
    released, stalled, failed = threading.Event(), threading.Event(), list[BaseException]()

    def run(_: Any, messages: Iterator[pb.ServerMessage], __: Any) -> Iterator[pb.ServerMessage]:
        for n, message in enumerate(messages):
            if n == 6:
                stalled.set()
                released.wait(20)
            yield message

    def ask(session: Session) -> None:
        try:
            session.embed([TEXT])
        except BaseException as error:
            failed.append(error)

    kind = type("Stalling", (Misbehaving,), {"change": run})
    with serving(model, dealer.address, kind) as server, dial(server, dealer) as session:
        thread = threading.Thread(target=ask, args=(session,))
        thread.start()
        assert stalled.wait(20)
        session.close()
        thread.join(10)
        released.set()
        assert not thread.is_alive()
    (error,) = failed
    assert type(error) is PeerLost
    assert str(error) == "this session has ended: it was closed\nhint: connect again"


def test_closing_before_a_prepared_query_is_taken(server: Served, dealer: Served) -> None:
    class Closing(list[Any]):
        def pop(self, index: Any = -1) -> Any:
            session.close()  # as another thread may, after the look whether a query is there
            return super().pop(index)

    with dial(server, dealer) as session:
        session.prepare()
        session.link._ready = Closing(session.link._ready)
        with pytest.raises(PeerLost, match=r"^this session has ended: it was closed\nhint: connect again$"):
            session.embed([TEXT])
        assert session.reports == []


WAITING = (
    r"the server at 127[^ ]* REASON; this client waited for its message of module 'encoder[^']*' \(round \d+ of \d+\)\n"
)


def test_a_server_that_dies(model: Ready, dealer: Served) -> None:
    def run(_: Any, messages: Iterator[pb.ServerMessage], context: Any) -> Iterator[pb.ServerMessage]:
        for n, message in enumerate(messages):
            if n == 6:
                threading.Thread(target=served[0].stop).start()
                while context.is_active():
                    time.sleep(0.01)
            yield message

    kind = type("Dying", (Misbehaving,), {"change": run})
    with serving(model, dealer.address, kind) as server, dial(server, dealer) as connection:
        served = [server]
        with pytest.raises(PeerLost, match=WAITING.replace("REASON", "is gone")):
            connection.embed([TEXT])


def test_a_bug_in_the_server(
    server: Served, dealer: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with dial(server, dealer) as connection, monkeypatch.context() as patch:
        patch.setattr(server_module, "execute", bug)
        with pytest.raises(Error, match=r"the server reports: internal error \(query 0\)"):
            connection.embed([TEXT])
    wait_until(lambda: "internal error: ZeroDivisionError" in caplog.text, "the log says so")
    assert "Traceback" not in caplog.text
    works(server, dealer)


def bug(*_: object, **__: object) -> Any:
    raise ZeroDivisionError("division")


@pytest.mark.parametrize("how", ["stalls", "dies", "ends"])
def test_a_client_that_is_lost_in_a_query(
    how: str, model: Ready, dealer: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with serving(model, dealer.address, deadline=3.0 if how == "stalls" else 20.0) as server:
        with Raw(server, dealer, model) as raw:
            raw.start()
            wait_until(lambda: session_count(server) == 1, "the session is counted")
            if how == "dies":
                raw.hear()  # the server's part of the first round
                raw.call.cancel()
            elif how == "ends":
                raw.outbox.put(None)
                refused(raw, "peer-lost", "the client ended the stream before its message of module")
            else:
                works(server, dealer)  # others are served meanwhile
            wait_until(lambda: session_count(server) == 0, "the session is freed", 10)
        wait_until(lambda: "WARNING" in caplog.text, "the log says so")
        (line,) = [r.getMessage() for r in caplog.records if r.name == "unseen.server" and r.levelname == "WARNING"]
        assert line.startswith("session of 127.0.0.1:")
        assert f"module '{FIRST}" in line
        assert "Traceback" not in caplog.text
        works(server, dealer)


def test_a_client_that_does_not_read(model: Ready, dealer: Served) -> None:
    """It fills its window and no more; the server does not wait for it for ever."""
    large = bytes(64 << 20)
    digest = hashlib.sha256(large).hexdigest()
    masked = dataclasses.replace(model.masked, files={"large": large})
    with serving(dataclasses.replace(model, masked=masked), dealer.address, deadline=0.5) as server:
        channel = Plaintext().channel(server.endpoint, what="x", role="server")
        chunks = ModelStub(channel).Download(pb.DownloadRequest(sha256=digest))
        next(chunks)
        time.sleep(1.5)
        with pytest.raises(grpc.RpcError) as caught:
            list(chunks)
        assert caught.value.code() == grpc.StatusCode.CANCELLED
        channel.close()


def test_a_client_that_says_nothing(model: Ready, dealer: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving(model, dealer.address, deadline=0.5) as server, Raw(server, dealer, model) as raw:
        with pytest.raises(grpc.RpcError):
            raw.hear()
        wait_until(lambda: session_count(server) == 0, "the session is freed", 5)
        wait_until(lambda: "did not send the handshake in time" in caplog.text, "the log says so")


def test_a_call_that_comes_while_the_process_ends_is_dropped() -> None:
    threads = hosting._Threads(1)
    assert threads.submit(int, "7").result() == 7
    threads.shutdown()
    assert threads.submit(int, "7").cancelled()


def test_a_call_for_which_there_is_no_thread_is_not_dropped_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        hosting._Threads(1).submit(int, "7")


def test_idle_sessions_end(
    model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by the deadline of a message, but in the end."""
    caplog.set_level(logging.INFO)
    with serving(model, dealer.address, deadline=0.5) as server:
        with dial(server, dealer) as connection:
            time.sleep(1.2)
            connection.embed([TEXT])
        monkeypatch.setattr(server_module, "IDLE", 0.5)
        with dial(server, dealer) as connection:
            wait_until(lambda: session_count(server) == 0, "the session is freed", 5)
            with pytest.raises(PeerLost, match="is gone"):
                connection.embed([TEXT])
    wait_until(lambda: "was idle too long between queries" in caplog.text, "the log says so")


def test_too_many_sessions(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAXIMUM_SESSIONS", 2)
    with serving(model, dealer.address) as server:
        with dial(server, dealer) as one, dial(server, dealer):
            with pytest.raises(Error, match=r"2 sessions, which is its limit\nhint: try again later"):
                dial(server, dealer)
            one.embed([TEXT])
        wait_until(lambda: session_count(server) == 0, "sessions are freed")
        works(server, dealer)


# the dealer


def test_a_dealer_that_was_restarted(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is lost, and no more: the server registers again by itself, and new clients wait for that."""
    monkeypatch.setattr(server_module, "RENEWING", 0.5)
    with dealing() as dealer, serving(model, dealer.address) as server, dial(server, dealer) as connection:
        connection.embed([TEXT])
        dealer.stop()
        with dealing(listen=dealer.endpoint) as again:
            with pytest.raises(DealerError) as caught:
                connection.prepare()
            assert "sending the corrections of query 1" in str(caught.value)
            assert "no such session (a restarted dealer knows none)\nhint: connect again" in str(caught.value)
            assert str(caught.value).count("hint:") == 1
            works(server, again)  # the server registers its Program again


class Dying(DealerService):
    """Sends half of the corrections, and is gone."""

    served: Served

    def Deal(self, request: Any, context: Any) -> Iterator[Any]:
        chunks: list[Any] = list(super().Deal(request, context))
        first = bytes(chunk_data(chunks[0]))
        yield pb.Chunk(data=first[: len(first) // 2])
        threading.Thread(target=self.served.stop).start()
        while context.is_active():
            time.sleep(0.01)


def test_a_peer_that_was_away_is_found_again_soon() -> None:
    """gRPC's pauses between two attempts grow to two minutes by default."""
    with dealing() as first:
        peer = Peer("the dealer", first.endpoint, Plaintext(), role=DEALER, start="unseen dealer")

    def answers() -> bool:
        try:
            with peer.calling():
                DealerStub(peer.channel).Key(pb.DealerKeyRequest(), timeout=5)
        except PeerLost:
            return False
        return True

    away = time.monotonic()
    while time.monotonic() - away < 4:  # by then its own pauses would be 4 s
        assert not answers()
        time.sleep(0.1)
    with dealing(listen=first.endpoint):
        wait_until(answers, "it is found", 2.0)
    peer.close()


def test_a_dealer_that_dies_while_it_deals(model: Ready) -> None:
    service = Dying(KEY)
    with dealing(service) as dealer, serving(model, dealer.address) as server, dial(server, dealer) as connection:
        service.served = dealer
        with pytest.raises(
            DealerError, match=f"the server reports: the dealer at {dealer.address} .*the corrections of query 0"
        ):
            connection.prepare()
        assert connection.ready == 0
        wait_until(lambda: session_count(server) == 0, "the session is freed")


@pytest.mark.parametrize("size", [0, 100, 10**7])
def test_a_dealer_that_deals_another_size(size: int, model: Ready) -> None:
    class Other(DealerService):
        def Deal(self, request: Any, context: Any) -> Iterator[Any]:
            for start in range(0, size, PART):
                yield pb.Chunk(data=bytes(min(PART, size - start)))

    prescribed = model.program.cost.dealt
    message = rf"the dealer sent \d+ bytes of corrections, the Program prescribes {prescribed}"
    with dealing(Other(KEY)) as dealer, serving(model, dealer.address) as server, dial(server, dealer) as connection:
        with pytest.raises(DealerError, match=message):
            connection.prepare()
        assert connection.ready == 0


def test_a_dealer_that_stalls(model: Ready) -> None:
    """The client gives up, and the server with it."""

    class Stalling(DealerService):
        ended = threading.Event()

        def Deal(self, request: Any, context: Any) -> Iterator[Any]:
            context.add_callback(self.ended.set)
            self.ended.wait(30)
            yield pb.Chunk()

    with dealing(Stalling(KEY)) as dealer, serving(model, dealer.address) as server:
        with (
            dial(server, dealer, deadline=1.0) as connection,
            pytest.raises(
                PeerLost, match="did not answer within 1 s; this client waited for the corrections of query 0"
            ),
        ):
            connection.prepare()
        wait_until(lambda: session_count(server) == 0, "the session is freed", 5)
        assert Stalling.ended.wait(5)
