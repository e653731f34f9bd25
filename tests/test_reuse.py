"""Correlations are used once, whatever fails: at the client, at the server, at the dealer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.net.frames import to_frames
from parties.two_party import client as client_module
from parties.two_party import server as server_module
from parties.two_party.dealer import DealerService
from parties.two_party.keys import MAXIMUM_QUERY, join_proof, query_key
from proto import unseen_pb2 as pb
from secure.cost.timeline import Recorder
from secure.errors import PeerLost
from tests.tiny import TEXT, Raw, Ready, Served, dealing, dial, refused, run_query, serving


def test_the_server_refuses_a_burnt_number(server: Served, dealer: Served, model: Ready) -> None:
    for number, message in ((5, "already used"), (4, "already used"), (6, "was not prepared")):
        with Raw(server, dealer, model) as raw:
            raw.start(5)
            run_query(raw, 5)
            raw.say(query=pb.Query(query=number))
            refused(raw, "query", message)


def test_the_server_limits_what_is_prepared(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        raw.greet()
        raw.prepare(0)
        raw.prepare(1)
        raw.say(prepare=pb.Prepare(query=2))
        refused(raw, "query", "2 queries are prepared already")


def test_a_query_drops_what_was_prepared_before_it(
    server: Served, dealer: Served, model: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller numbers are burnt with it: their corrections neither stay in memory nor take up the limit."""
    sessions, real = list[Any](), server_module._Session.__init__

    def recorded(self: Any, *arguments: Any) -> None:
        sessions.append(self)
        real(self, *arguments)

    monkeypatch.setattr(server_module._Session, "__init__", recorded)
    with Raw(server, dealer, model) as raw:
        raw.greet()
        raw.prepare(0)
        raw.prepare(1)
        raw.say(query=pb.Query(query=1))
        run_query(raw, 1)
        assert list(sessions[-1]._prepared) == []
        raw.prepare(2)
        raw.prepare(5)
        raw.say(query=pb.Query(query=2))
        run_query(raw, 2)
        assert list(sessions[-1]._prepared) == [5]  # larger ones stay
        raw.prepare(6)
        raw.say(query=pb.Query(query=5))
        run_query(raw, 5)
        raw.say(query=pb.Query(query=0))
        refused(raw, "query", "query 0 was already used")


def test_the_server_refuses_numbers_out_of_range(server: Served, dealer: Served, model: Ready) -> None:
    for number in (MAXIMUM_QUERY, (1 << 64) - 1):
        for content in ({"prepare": pb.Prepare(query=number)}, {"query": pb.Query(query=number)}):
            with Raw(server, dealer, model) as raw:
                raw.greet()
                raw.say(**content)
                refused(raw, "query", f"query number {number} is out of range")


def test_the_dealer_deals_a_number_once(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        raw.greet()
        raw.prepare(3)
        seed = dealer.service._sessions[raw.token].server_seed
        for number in (3, 2, 0):
            with pytest.raises(grpc.RpcError, match=f"query {number} was already used"):
                raw.deal(seed, number)
        with pytest.raises(grpc.RpcError, match="only the server that joined"):
            raw.deal(seed, 1 << 50)
        raw.say(prepare=pb.Prepare(query=3))
        refused(raw, "dealer", "query 3 was already used")


def test_a_session_is_joined_once(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        with pytest.raises(grpc.RpcError, match="was not joined"):
            raw.deal(bytes(32), 0)
        wrong: tuple[dict[str, Any], ...] = ({"program_digest": "0" * 64}, {"weights_digest": "0" * 64})
        for fields in wrong:
            with pytest.raises(grpc.RpcError, match="opened for another Program or other weights"):
                raw.dealer.Join(raw.join(model.masked.mask_seed, **fields))
        with pytest.raises(grpc.RpcError, match="a seed has 32 bytes, not 5"):
            raw.dealer.Join(raw.join(model.masked.mask_seed, server_seed=b"short"))
        raw.greet()
        with pytest.raises(grpc.RpcError, match="already joined"):
            raw.dealer.Join(raw.join(model.masked.mask_seed))
        raw.prepare(0)
    with Raw(server, dealer, model) as raw:  # and two of a server's streams cannot share one session
        raw.dealer.Join(raw.join(model.masked.mask_seed))
        with pytest.raises(AssertionError):
            raw.greet()


def test_a_session_is_joined_for_its_own_weights(dealer: Served, server: Served, model: Ready) -> None:
    """Other weights of the same Program have another mask, even if the dealer knows both."""
    with Raw(server, dealer, model) as raw:
        other = "a" * 64
        raw.dealer.Register(pb.RegisterRequest(program=raw.program.encoded, weights_digest=other, mask_seed=bytes(32)))
        proof = join_proof(bytes(32), raw.token, raw.program.digest, other, bytes(32))
        with pytest.raises(grpc.RpcError, match="other weights"):
            raw.dealer.Join(raw.join(model.masked.mask_seed, weights_digest=other, proof=proof))
        with pytest.raises(grpc.RpcError, match="only the server of this model"):
            raw.dealer.Join(raw.join(model.masked.mask_seed, proof=proof))


def test_the_dealer_checks_what_is_registered(dealer: Served, server: Served, model: Ready) -> None:
    program = model.program.encoded
    good: dict[str, Any] = {"program": program, "weights_digest": "b" * 64, "mask_seed": bytes(32)}
    with Raw(server, dealer, model) as raw:
        raw.dealer.Register(pb.RegisterRequest(**good))
        raw.dealer.Register(pb.RegisterRequest(**good))
        for other, message in (
            ({"mask_seed": b"\1" * 32}, "registered with another mask seed"),
            ({"mask_seed": b""}, "a seed has 32 bytes"),
            ({"program": b"{}"}, "not a valid Program"),
            ({"program": program + b" "}, "canonical"),
            ({"weights_digest": "x\ny"}, "not a SHA-256"),
        ):
            with pytest.raises(grpc.RpcError, match=message):
                raw.dealer.Register(pb.RegisterRequest(**{**good, **other}))
        wrong: tuple[tuple[dict[str, Any], str], ...] = (
            ({"client_seed": b"x"}, "has 32 bytes, not 1"),
            ({"version": 7}, "the client has '7'"),
        )
        for fields, message in wrong:
            with pytest.raises(grpc.RpcError, match=message):
                raw.dealer.Open(raw.open_request(**fields))


class Recording(DealerService):
    """Keeps what it deals, and can fail on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.dealt: list[bytes] = []

    def Deal(self, request: Any, context: Any) -> Iterator[pb.Chunk]:
        chunks = list(super().Deal(request, context))
        self.dealt.append(b"".join(c.data for c in chunks))
        yield from chunks


def test_after_a_failure_all_is_fresh(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, frames, real = list[bytes](), list[bytes](), query_key

    def recorded(*names: Any) -> Any:
        key = real(*names)
        keys.append(key.value)
        return key

    def sending(payload: bytes) -> Iterator[pb.Frame]:
        frames.append(payload)
        return to_frames(payload)

    monkeypatch.setattr(client_module, "query_key", recorded)
    monkeypatch.setattr(server_module, "query_key", recorded)
    monkeypatch.setattr(client_module, "to_frames", sending)
    with dealing(Recording()) as dealer, serving(model, dealer.address) as server:
        with dial(server, dealer) as connection:
            connection.embed([TEXT])
            with monkeypatch.context() as patch:
                patch.setattr(client_module, "Recorder", Failing)
                with pytest.raises(KeyboardInterrupt):
                    connection.embed([TEXT])
            with pytest.raises(PeerLost, match="this session has ended: KeyboardInterrupt"):
                connection.embed([TEXT])
            rounds = len(frames)
        with dial(server, dealer) as connection:
            connection.embed([TEXT, TEXT])
        sent = frames[0], frames[rounds - 1], frames[rounds]
        assert len(set(sent)) == 3  # the same text, masked otherwise each time
        assert {len(s) for s in sent} == {len(frames[0])}
        dealt = dealer.service.dealt
    assert len(dealt) == len(set(dealt)) == 4
    assert {len(d) for d in dealt} == {model.program.cost.dealt}
    assert len(keys) == len(set(keys)) == 8  # a client's and a server's key of each query


class Failing(Recorder):
    """Fails in the first round, when the party has sent its frame and got the peer's."""

    def unpacked(self) -> None:
        raise KeyboardInterrupt
