"""Correlations are used once, whatever fails: at the client, at the server, at the dealer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.net.frames import chunk_data, to_frames
from parties.proto import unseen_pb2 as pb
from parties.two_party import client as client_module
from parties.two_party import keys as keys_module
from parties.two_party import server as server_module
from parties.two_party.dealer import DealerService
from parties.two_party.keys import MAXIMUM_QUERY, MAXIMUM_SKIP, Ratchet, join_proof, model_name
from parties.two_party.sealing import SealingKey
from protocols.prg import next_seed
from secure.cost.timeline import Recorder
from secure.errors import PeerLost, QueryError
from tests.dealer_key import KEY
from tests.tiny import TEXT, Raw, Ready, Served, dealing, dial, refused, register_request, run_query, serving


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
        raw.say(prepare=pb.Prepare(query=3))
        refused(raw, "query", "query 3 was already used")
    with Raw(server, dealer, model) as raw:
        raw.dealer.Join(raw.join(model.masked.mask_seed))
        raw.deal(bytes(32), 3)
        for number in (3, 2, 0):
            with pytest.raises(grpc.RpcError, match=f"query {number} was already used"):
                raw.deal(bytes(32), number)
        with pytest.raises(grpc.RpcError, match="out of range"):
            raw.deal(bytes(32), 1 << 50)
        with pytest.raises(grpc.RpcError, match=f"{MAXIMUM_SKIP} numbers at most may be left out"):
            raw.deal(bytes(32), 5 + MAXIMUM_SKIP)
        raw.deal(bytes(32), 4 + MAXIMUM_SKIP)


def test_a_session_is_joined_once(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        with pytest.raises(grpc.RpcError, match="was not joined"):
            raw.deal(bytes(32), 0)
        wrong: tuple[dict[str, Any], ...] = ({"program_digest": "0" * 64}, {"weights_digest": "0" * 64})
        for fields in wrong:
            with pytest.raises(grpc.RpcError, match="opened for another Program or other weights"):
                raw.dealer.Join(raw.join(model.masked.mask_seed, **fields))
        for sealed in (b"", b"short", KEY.public.seal(bytes(31), "join", raw.token, raw.program.digest)):
            with pytest.raises(grpc.RpcError, match="cannot open the seal"):
                raw.dealer.Join(raw.join(model.masked.mask_seed, sealed=sealed))
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
        other = model_name(bytes(32))
        raw.dealer.Register(register_request(raw.program.encoded, bytes(32)))
        proof = join_proof(bytes(32), raw.token, raw.program.digest, other, bytes(32))
        with pytest.raises(grpc.RpcError, match="other weights"):
            raw.dealer.Join(raw.join(model.masked.mask_seed, weights_digest=other, proof=proof))
        with pytest.raises(grpc.RpcError, match="only the server of this model"):
            raw.dealer.Join(raw.join(model.masked.mask_seed, proof=proof))


def test_the_dealer_checks_what_is_registered(dealer: Served, server: Served, model: Ready) -> None:
    program = model.program.encoded
    with Raw(server, dealer, model) as raw:
        for _ in range(2):
            reply = raw.dealer.Register(register_request(program, bytes(32)))
            assert (reply.program_digest, reply.weights_digest) == (model.program.digest, model_name(bytes(32)))
        for request, message in (
            (register_request(program, b""), "cannot open the seal"),
            (register_request(program, bytes(32), sealed=b""), "cannot open the seal"),
            (register_request(program, bytes(32), sealed=register_request(b"", bytes(32)).sealed), "cannot open"),
            (register_request(program, bytes(32), SealingKey.generate()), "cannot open the seal"),
            (register_request(b"{}", bytes(32)), "the Program has version None"),
            (register_request(program + b" ", bytes(32)), "canonical"),
            (register_request(bytes(5 << 20), bytes(32)), "a Program of 5242880 bytes, 1048576 at most"),
        ):
            with pytest.raises(grpc.RpcError, match=message):
                raw.dealer.Register(request)
        with pytest.raises(grpc.RpcError, match="cannot open the seal"):
            raw.dealer.Open(raw.open_request(sealed=b"x"))
        with pytest.raises(grpc.RpcError, match=r"the client speaks version 7 .* this dealer version 4"):
            raw.dealer.Open(raw.open_request(version=7))
        for names in ({"program_digest": "0" * 64}, {"weights_digest": "x"}):
            assert raw.dealer.Open(raw.open_request(**names)) == pb.OpenReply()


class Recording(DealerService):
    """Keeps what it deals, and can fail on the way."""

    def __init__(self) -> None:
        super().__init__(KEY)
        self.dealt: list[bytes] = []

    def Deal(self, request: Any, context: Any) -> Iterator[Any]:
        chunks: list[Any] = list(super().Deal(request, context))
        self.dealt.append(b"".join(map(chunk_data, chunks)))
        yield from chunks


def test_after_a_failure_all_is_fresh(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, frames, real = list[bytes](), list[bytes](), keys_module.query_key

    def recorded(*names: Any) -> Any:
        key = real(*names)
        keys.append(key.value)
        return key

    def sending(payload: bytes) -> Iterator[pb.Frame]:
        frames.append(payload)
        return to_frames(payload)

    monkeypatch.setattr(keys_module, "query_key", recorded)
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
    assert len(set(keys)) == 8  # a client's and a server's key of each query
    assert {keys.count(key) for key in keys} == {2}  # its own and the dealer's


class Failing(Recorder):
    """Fails in the first round, when the party has sent its frame and got the peer's."""

    def unpacked(self) -> None:
        raise KeyboardInterrupt


def test_a_ratchet_forgets() -> None:
    """Both sides agree on every key, and what is left after a query leads to no key of it or of an earlier one."""
    one, other = (Ratchet(b"s" * 32, "client", bytes(16), "d") for _ in range(2))
    numbers, left, keys = (0, 1, 2, 5, 6 + MAXIMUM_SKIP), list[bytes](), list[bytes]()
    for number in numbers:
        keys.append(one.key(number).value)
        assert other.key(number).value == keys[-1]
        left.append(bytes(one._seed))
    for done, seed in enumerate(left, 1):
        chain, reached = bytearray(seed), set[bytes]()
        for _ in range(2 * MAXIMUM_SKIP):
            reached |= {keys_module.query_key(bytes(chain), "client", bytes(16), "d", n).value for n in numbers}
            next_seed(chain)
        assert reached & set(keys) == set(keys[done:])
    held = one._seed
    one.erase()
    assert bytes(held) == bytes(32)
    with pytest.raises(QueryError, match="the session has ended"):
        one.key(numbers[-1] + 1)


@pytest.mark.parametrize("number", [-1, MAXIMUM_SKIP + 1, 1 << 39, MAXIMUM_QUERY, 1 << 63])
def test_a_ratchet_refuses_at_no_cost(number: int) -> None:
    ratchet = Ratchet(b"s" * 32, "client", bytes(16), "d")
    with pytest.raises(QueryError):
        ratchet.key(number)
    assert (ratchet._next, ratchet.last, bytes(ratchet._seed)) == (0, -1, b"s" * 32)
    ratchet.key(0)
    with pytest.raises(QueryError, match="already used"):
        ratchet.key(0)
