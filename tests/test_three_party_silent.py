"""Callers that begin calls and send nothing, or nothing that is of use, keep no honest client out."""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from torch.nn.functional import cosine_similarity

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.net.frames import PART
from parties.net.network import Plaintext
from parties.net.peer import Peer
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyServicer, add_PartyServicer_to_server
from parties.three_party import client as client_module
from parties.three_party import party as party_module
from parties.three_party.party import MAXIMUM_QUERIES, SESSION_BYTES, WAITING
from parties.three_party.party_1 import Party1Service
from secure.errors import Error, PeerLost
from secure.version import WIRE_VERSION
from tests.three_parties import Party, Three, call, running, shared
from tests.tiny import TEXT, Served, expected, wait_until

SERVICE = "/unseen.v3."


@pytest.fixture(scope="module")
def shares(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(directory, tmp_path_factory.mktemp("shares"), "one-hot")


@pytest.fixture(scope="module")
def three(shares: Path) -> Iterator[Three]:
    with running(shares) as parties:
        yield parties


def begin(party: Party, method: str, stack: ExitStack, *messages: Any) -> Any:
    """A call that sends some messages and no more, and does not end."""
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for message in messages:
        outbox.put(message.SerializeToString())
    calling = party.peer().channel.stream_stream(
        SERVICE + method, request_serializer=lambda b: b, response_deserializer=lambda b: b
    )(iter(outbox.get, None))
    stack.callback(outbox.put, None)
    stack.callback(calling.cancel)
    return calling


def start(party: Party) -> pb.AskPart:
    model, session = party.service.share.manifest.model, secrets.token_bytes(SESSION_BYTES)
    return pb.AskPart(
        start=pb.AskStart(version=WIRE_VERSION, model=model, session=session, seed=bytes(32), deadline=20.0)
    )


def answered(three: Three, directory: Path) -> None:
    with three.dial() as connection:
        assert cosine_similarity(connection.embed([TEXT])[0], expected(directory, TEXT), dim=0) > 0.9999


@pytest.mark.parametrize("method", ["Party/Ask", "Party/Agree", "Party/Compute", "Party/Seed", "Model/Describe"])
@pytest.mark.parametrize("count", [MAXIMUM_QUERIES, 2 * MAXIMUM_QUERIES])
def test_silent_calls_keep_nobody_out(three: Three, directory: Path, method: str, count: int) -> None:
    """Eight silent streams at party 0 kept every client out for a minute, again and again."""
    with ExitStack() as stack:
        for party in three.parties:
            for _ in range(count):
                begin(party, method, stack)
        time.sleep(0.3)
        answered(three, directory)


def test_queries_that_begin_and_do_not_go_on_keep_nobody_out(three: Three, directory: Path) -> None:
    with ExitStack() as stack:
        for party in three.parties:
            for _ in range(2 * MAXIMUM_QUERIES):
                begin(party, "Party/Ask", stack, start(party))
        wait_until(lambda: all(len(p.service._asking._inside) == WAITING for p in three.parties), "rooms are full", 10)
        assert [party.service._places.free for party in three.parties] == [MAXIMUM_QUERIES] * 3
        answered(three, directory)


def test_a_silent_query_is_sent_away_in_time(shares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within seconds for its start, however long the deadline of the party is; the rest follows from the size."""
    monkeypatch.setattr(party_module, "FIRST", 0.5)
    monkeypatch.setattr(party_module, "patience", lambda size: 1.5)
    with running(shares, deadline=20.0) as three, ExitStack() as stack:
        for messages, least, most in (((), 0.3, 3.0), ((start(three.parties[0]),), 1.2, 4.5)):
            begun = time.monotonic()
            begun_call = begin(three.parties[0], "Party/Ask", stack, *messages)
            with pytest.raises(grpc.RpcError):
                list(begun_call)
            assert least < time.monotonic() - begun < most
        wait_until(lambda: not three.parties[0].service._asking._inside, "the room is empty", 5)


def test_a_query_of_the_wrong_size_is_refused_at_once(three: Three) -> None:
    size = sum(three.parties[0].service.asked_sizes(three.parties[0].service.share.sizes[0]))
    frames = [bytes(size - 1), bytes(size + 1), b"", bytes(PART)]
    for frame in frames:
        with ExitStack() as stack:
            part = pb.AskPart(frame=pb.Frame(data=frame, last=True))
            (reply,) = begin(three.parties[0], "Party/Ask", stack, start(three.parties[0]), part)
            assert "where the Program prescribes" in pb.AskReply.FromString(reply).failure.message


def test_the_reason_of_party_1_is_printable_in_the_log_of_party_0(
    shares: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Shouting(Party1Service):
        def seed(self, asked: Any, number: bytes) -> bytes:
            raise Error("red: \x1b[31m\x07 bell")

    with (
        caplog.at_level(logging.WARNING),
        running(shares, {1: Shouting}, deadline=5) as three,
        three.dial(deadline=5) as connection,
        pytest.raises(Error, match="red"),
    ):
        connection.embed([TEXT])
    told = [record.getMessage() for record in caplog.records if record.name == "unseen.party-0"]
    assert any("party 1 reports: red: ?[31m? bell" in line for line in told)
    assert not any("\x1b" in line or "\x07" in line for line in told)


def test_hints_say_how_a_party_is_started(three: Three) -> None:
    first, _, third = three.addresses
    with pytest.raises(PeerLost, match="unseen party --id 1 --share DIRECTORY --listen"):
        call((first, "127.0.0.1:9", third), deadline=3)


def test_steps_without_an_end_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A party that claims a step more in every message keeps a client no longer than LASTING."""

    class Stepping(PartyServicer):
        def Ask(self, requests: Any, context: grpc.ServicerContext) -> Iterator[pb.AskReply]:
            for steps in itertools.count(1):
                time.sleep(0.05)
                yield pb.AskReply(working=pb.Working(steps=steps))

    monkeypatch.setattr(client_module, "LASTING", 1.0)
    party = Served(add_PartyServicer_to_server, Stepping())
    peer = Peer("party 0", party.endpoint, Plaintext(), role="party 0", start="unseen party")
    try:
        began = time.monotonic()
        with pytest.raises(PeerLost, match="the query is not done after 1 s"):
            client_module._Asking([peer], [[pb.AskPart()]], 5.0).run()
        assert time.monotonic() - began < 3
    finally:
        peer.close()
        party.stop()
