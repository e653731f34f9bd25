"""Sums behind messages: every change is noticed, at both ends and in every kind of call, and said as what it is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parties.net import summed
from parties.net.calls import calling
from parties.net.endpoints import Endpoint
from parties.net.network import Plaintext
from parties.net.summed import SUM_BYTES, MethodSums
from parties.proto import unseen_pb2 as pb
from parties.services.guard import Guard
from secure.errors import ChangedOnTheWay

SUMS = MethodSums("/unseen.Inference/Session")
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@given(st.binary(max_size=300))
def test_a_message_comes_as_it_was_sent(data: bytes) -> None:
    sent = SUMS.put(data)
    found = SUMS.take(sent)
    assert found is not None
    assert bytes(found) == data
    assert len(sent) == len(data) + SUM_BYTES


@given(st.binary(max_size=300), st.data())
def test_a_change_of_any_byte_is_noticed(data: bytes, chosen: st.DataObject) -> None:
    sent = bytearray(SUMS.put(data))
    sent[chosen.draw(st.integers(0, len(sent) - 1))] ^= chosen.draw(st.integers(1, 255))
    assert SUMS.take(bytes(sent)) is None


@given(st.binary(max_size=60), st.integers(1, 40))
def test_bytes_that_are_lost_are_noticed(data: bytes, lost: int) -> None:
    sent = SUMS.put(data)
    assert SUMS.take(sent[:-lost]) is None
    assert SUMS.take(sent[lost:]) is None


def test_a_message_of_another_method_or_without_a_sum_is_none() -> None:
    data = pb.Query(query=3).SerializeToString()
    assert MethodSums("/unseen.Dealer/Deal").take(SUMS.put(data)) is None
    assert SUMS.take(data) is None
    assert SUMS.take(b"") is None


def test_a_message_with_a_sum_is_one_of_protobuf() -> None:
    message = pb.ClientMessage(frame=pb.Frame(data=b"abc", last=True))
    found = pb.ClientMessage.FromString(SUMS.put(message.SerializeToString()))
    assert found.frame.data == b"abc"


@contextmanager
def echoing(heard: list[bytes]) -> Iterator[Endpoint]:
    """Serve methods of all kinds that answer with what they get."""

    def single(request: Any, _: Any) -> Any:
        heard.append(request.data)
        return request

    def each(requests: Any, _: Any) -> Iterator[Any]:
        for request in requests:
            heard.append(request.data)
            yield request

    made = {
        "unary_unary": single,
        "unary_stream": lambda request, context: each([request], context),
        "stream_unary": lambda requests, context: list(each(requests, context))[-1],
        "stream_stream": each,
    }
    handlers = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(does, pb.Chunk.FromString, pb.Chunk.SerializeToString)
        for kind, does in made.items()
    }
    allowed = {f"/test.Echo/{kind}": frozenset[str]() for kind in KINDS}
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[Guard(Plaintext(), allowed)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Endpoint("127.0.0.1", port)
    finally:
        server.stop(None).wait()


def ask(at: Endpoint, kind: str) -> list[bytes]:
    """Send one message to a method of a kind; return what it answers."""
    with Plaintext().channel(at, what="the echo", role="echo") as channel, calling("the echo", at, "start it"):
        made = getattr(channel, kind)(f"/test.Echo/{kind}", pb.Chunk.SerializeToString, pb.Chunk.FromString)
        request = pb.Chunk(data=b"secret")
        answer = made(iter([request]) if kind.startswith("stream") else request, timeout=10)
        return [each.data for each in answer] if kind.endswith("stream") else [answer.data]


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_on_either_way_is_not_used(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[bytes]()
    put = MethodSums.put
    with echoing(heard) as at:
        assert ask(at, kind) == heard == [b"secret"]
        for spoiled in (1, 2):  # the first message that is sent is the request, the second one the answer
            heard.clear()
            sent = list[bytes]()

            def spoil(self: MethodSums, data: bytes, sent: list[bytes] = sent, spoiled: int = spoiled) -> bytes:
                sent.append(data)
                found = bytearray(put(self, data))
                found[-SUM_BYTES - 2] ^= len(sent) == spoiled
                return bytes(found)

            with monkeypatch.context() as patch:
                patch.setattr(summed.MethodSums, "put", spoil)
                with pytest.raises(Exception, match="changed on the way, and was not used") as caught:
                    ask(at, kind)
            assert len(heard) == spoiled - 1
            if spoiled == 2 or kind.startswith("unary"):  # handlers of streams tell their own errors
                assert isinstance(caught.value, ChangedOnTheWay)
            assert b"secret" not in str(caught.value).encode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_caller_without_sums_is_refused(kind: str) -> None:
    heard = list[bytes]()
    with echoing(heard) as at, grpc.insecure_channel(str(at)) as channel:
        made = getattr(channel, kind)(f"/test.Echo/{kind}", pb.Chunk.SerializeToString, pb.Chunk.FromString)
        request = pb.Chunk(data=b"x")
        with pytest.raises(grpc.RpcError, match="an older version of unseen"):
            list(made(iter([request]) if kind.startswith("stream") else request, timeout=10))
    assert not heard
