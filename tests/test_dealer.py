"""The dealer: who it is, what is sealed to it, what it forgets, and that nobody pushes others out of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties.limits.tokens import Token, WithToken
from parties.net.endpoints import Endpoint
from parties.net.frames import to_chunks
from parties.net.network import Plaintext
from parties.net.summed import SummedChannel
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import DealerServicer, DealerStub, ModelStub
from parties.services import dealing as dealing_module
from parties.services import hosting
from parties.services.dealing import DealingHere, DealtModel
from parties.two_party import client as client_module
from parties.two_party import dealer as dealer_module
from parties.two_party import dealer_peer
from parties.two_party import server as server_module
from parties.two_party.dealer import DealerService
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.keys import close_proof, model_name, proving_key, renew_proof
from parties.two_party.sealing import SEALED_BYTES, DealerKey, SealingKey, answer_proof, fingerprint_of, transcript
from parties.two_party.server import InferenceService
from protocols.prg import Key, fresh_seed
from secure.deployments.two_party import DEALER, TwoParty
from secure.errors import DealerError, Error, HandshakeError, InvalidInput, PeerLost, ProtocolError
from tests.dealer_key import KEY
from tests.relay import Relay
from tests.tiny import (
    LENGTH,
    LOOPBACK,
    TEXT,
    Raw,
    Ready,
    Served,
    deal_proof,
    dealing,
    dial,
    named_callers,
    refused,
    register_request,
    run_query,
    serving,
    session_count,
    wait_until,
    works,
)

OTHER_KEY = SealingKey.generate()


# somebody else answers at the dealer's address


class Fake(DealerServicer):
    """It keeps all that it is sent, tells ``key``, and answers as well as it can without the dealer's secret."""

    def __init__(self, key: bytes = KEY.public.encoded) -> None:
        self.key, self.got = key, list[Any]()

    def Key(self, request: Any, context: Any) -> Any:
        self.got.append(request)
        return pb.DealerKeyReply(key=self.key)

    def Register(self, request: Any, context: Any) -> Any:
        self.got.append(request)
        return pb.RegisterReply(program_digest="0" * 64, weights_digest="0" * 64, proof=bytes(32))

    def Renew(self, request: Any, context: Any) -> Any:
        self.got.append(request)
        return pb.RenewReply()

    def Open(self, request: Any, context: Any) -> Any:
        self.got.append(request)
        return pb.OpenReply(session=bytes(16), proof=bytes(32))

    def Join(self, request: Any, context: Any) -> Any:
        self.got.append(request)
        return pb.JoinReply(proof=bytes(32))


@pytest.mark.parametrize("key", [KEY.public.encoded, OTHER_KEY.public.encoded, b"", bytes(1216)])
def test_a_fake_dealer_gets_nothing(
    key: bytes, model: Ready, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The exploit that once read all weights: the dealer is down, and something else listens on its port."""
    monkeypatch.setattr(server_module, "RENEWING", 0.1)
    monkeypatch.setattr(client_module, "PATIENCE", 0.2)
    seeds = [model.masked.mask_seed]

    def recorded() -> bytes:
        seeds.append(fresh_seed())
        return seeds[-1]

    for module in (client_module, server_module):
        monkeypatch.setattr(module, "fresh_seed", recorded)
    with dealing() as dealer, serving(model, dealer.address) as server:
        with dial(server, dealer) as session:
            session.embed([TEXT])
        dealer.stop()
        fake = Fake(key)
        with dealing(fake, dealer.endpoint):  # type: ignore[arg-type]
            with SummedChannel(grpc.insecure_channel(server.address), "it") as channel:
                ModelStub(channel).Describe(pb.DescribeRequest(), timeout=10)
            wait_until(lambda: len(fake.got) > 6, "the server asks the fake dealer")
            with pytest.raises(DealerError, match=r"did not prove that it could open|has the key SHA256:"):
                dial(server, dealer)
        received = b"".join(message.SerializeToString() for message in fake.got)
    assert len(seeds) > 2
    assert not any(seed in received or seed.hex().encode() in received for seed in seeds)
    asked = {type(message).__name__ for message in fake.got}
    if key == KEY.public.encoded:  # which is public: what it gets is sealed, and it does not prove that it opens it
        assert asked == {"DealerKeyRequest", "RenewRequest", "RegisterRequest", "OpenRequest"}
        assert "did not prove that it could open" in caplog.text
    else:
        assert asked == {"DealerKeyRequest", "RenewRequest"}


def test_masks_are_expanded_before_anybody_asks(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that queries multiply by, and of weights alone: the first client does not wait for it."""
    with dealing() as dealer, serving(model, dealer.address):
        (registered,) = dealer.service._models.values()
        expanded = registered.dealt.weights._expanded
        shapes = registered.program.weight_shapes
        wait_until(lambda: expanded.keys() == shapes.keys(), "they are there")
        assert {name: tuple(mask.shape) for name, mask in expanded.items()} == shapes
    monkeypatch.setattr(dealing_module, "memory_budget", lambda _: 0)  # of a machine with no room
    with dealing() as dealer, serving(model, dealer.address) as server:
        (registered,) = dealer.service._models.values()
        wait_until(lambda: not masks_are_expanded(), "it was found out")
        assert not registered.dealt.weights._expanded
        with dial(server, dealer) as session:
            session.embed([TEXT])
        assert registered.dealt.weights._expanded.keys() == shapes.keys()


def test_models_that_are_forgotten_are_not_expanded(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever registers many models, and lets them go, does not have the dealer work on."""
    go, program = threading.Event(), model.masked.program
    monkeypatch.setattr(dealing_module, "memory_budget", lambda _: go.wait(10) and 1 << 40)
    here, models = DealingHere(), [DealtModel.of(program, Key(bytes([i]) * 16)) for i in range(5)]
    first = models[0].weights._expanded
    here.expect(models[0])
    wait_until(lambda: not here._expected, "it begins with the first")
    for each in models[1:]:
        here.expect(each)
    kept = [each.weights._expanded for each in models]
    del models[2], each  # the third
    go.set()
    wait_until(lambda: not masks_are_expanded(), "it ends")
    whole = program.weight_shapes.keys()
    assert first.keys() == whole
    assert [found.keys() == whole for found in kept] == [True, True, False, True, True]


def test_the_thread_of_masks_outlives_an_error(
    model: Ready, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_: Any) -> int:
        raise RuntimeError("no memory")

    here, made = DealingHere(), DealtModel.of(model.masked.program, Key(bytes(16)))
    with monkeypatch.context() as patched:
        patched.setattr(dealing_module, "memory_budget", failing)
        here.expect(made)
        wait_until(lambda: not masks_are_expanded(), "it ends")
    assert "internal error: RuntimeError: no memory" in caplog.text
    here.expect(made)
    wait_until(lambda: made.weights._expanded.keys() == made.program.weight_shapes.keys(), "they are there")


def masks_are_expanded() -> bool:
    return any(thread.name == "unseen-masks" for thread in threading.enumerate())


def test_describe_sends_nothing_to_the_dealer(model: Ready) -> None:
    """Anybody may call it, so it must not make the server send anything."""
    with dealing() as dealer, serving(model, dealer.address) as server:
        dealer.stop()
        fake = Fake()
        with dealing(fake, dealer.endpoint), SummedChannel(grpc.insecure_channel(server.address), "it") as channel:  # type: ignore[arg-type]
            for _ in range(20):
                ModelStub(channel).Describe(pb.DescribeRequest(), timeout=10)
        assert fake.got == []


class Replaying(DealerService):
    """Answers a Register with the proof of an earlier one."""

    proofs: ClassVar[list[bytes]] = []

    def Register(self, request: Any, context: Any) -> Any:
        reply = super().Register(request, context)
        self.proofs.append(reply.proof)
        reply.proof = self.proofs[0]
        return reply


def test_an_earlier_answer_proves_nothing(model: Ready) -> None:
    with dealing(Replaying(KEY)) as dealer:
        peer = DealerPeer(dealer.address, Plaintext(), KEY.public.text)
        peer.register(model.program, model.masked.mask_seed)
        with pytest.raises(DealerError, match=r"did not prove.*\nhint: something else answers"):
            peer.register(model.program, model.masked.mask_seed)
        peer.close()


# which key is the dealer's


def test_the_key_can_be_given_in_three_ways(tmp_path: Path) -> None:
    public = tmp_path / "dealer.pub"
    public.write_text(f"{KEY.public.text}\n")
    public.chmod(0o644)
    for given in (str(public), KEY.public.text, KEY.public.fingerprint):
        assert fingerprint_of(given) == KEY.public.fingerprint
    for given, message in (
        (str(tmp_path / "no"), "there is no file"),
        ("SHA256:abc", "is no fingerprint"),
        ("unseen-dealer-1 abc", "is no dealer's key"),
        (KEY.public.text[:-4], "is no dealer's key"),
        (KEY.public.text.replace("unseen-dealer-1", "unseen-dealer-2"), "is no dealer's key"),
    ):
        with pytest.raises(InvalidInput, match=message):
            fingerprint_of(given)
    public.chmod(0o666)
    with pytest.raises(InvalidInput, match=r"others may write .* \(mode 0666\)\nhint: chmod 644"):
        fingerprint_of(str(public))


def test_without_certificates_a_key_must_be_known(
    model: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Served, dealer: Served
) -> None:
    """There is no trust on first use: nothing is sealed to a key that just anybody may have sent."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    deployment = TwoParty(server=server.address, dealer=dealer.address)
    with pytest.raises(DealerError, match=r"the key of the dealer at .* is not known.*\nhint: copy dealer\.pub"):
        secure.connect(deployment, cache=False)
    with secure.serve(role=DEALER, deployment=TwoParty()) as mine:  # it leaves dealer.pub in this user's directory
        peer = DealerPeer(mine.address, Plaintext())
        peer.register(model.program, model.masked.mask_seed)
        assert peer.key().fingerprint in mine.about[0]
        peer.close()
    with secure.serve(role=DEALER, deployment=TwoParty(), state=tmp_path / "other") as mine:
        peer = DealerPeer(mine.address, Plaintext(), state=tmp_path / "other")
        assert peer.key().fingerprint in mine.about[0]
        peer.close()
        with pytest.raises(DealerError, match=r"has the key .*, not"):  # of the user's usual directory
            DealerPeer(mine.address, Plaintext(), state=tmp_path / "nowhere").key()
    with pytest.raises(DealerError, match=f"has the key {KEY.public.fingerprint.replace('+', '.')}, not SHA256:.*"):
        secure.connect(deployment, cache=False)


def test_certificates_vouch_for_the_key_that_the_dealer_tells(
    model: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dealer: Served
) -> None:
    class Proving(Plaintext):
        proves_roles = True

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for network in (Proving(), WithToken(Proving(), Token.fresh())):
        peer = DealerPeer(dealer.address, network)
        peer.register(model.program, model.masked.mask_seed)
        peer.close()
    pinned = DealerPeer(dealer.address, Proving(), OTHER_KEY.public.fingerprint)  # what is given counts all the same
    with pytest.raises(DealerError, match="has the key"):
        pinned.register(model.program, model.masked.mask_seed)
    pinned.close()


def test_the_dealers_key_is_made_once(tmp_path: Path) -> None:
    state = tmp_path / "dealer"
    first = SealingKey.load(state)
    assert SealingKey.load(state).public == first.public != SealingKey.load(tmp_path / "other").public
    assert {p.name: p.stat().st_mode & 0o777 for p in state.iterdir()} == {"dealer.key": 0o600, "dealer.pub": 0o644}
    assert fingerprint_of(str(state / "dealer.pub")) == first.public.fingerprint
    assert first.open(first.public.seal(b"s" * 32, "a"), "a") == b"s" * 32
    (state / "dealer.pub").write_text("another")
    assert SealingKey.load(state).public == first.public
    assert fingerprint_of(str(state / "dealer.pub")) == first.public.fingerprint
    secret = (state / "dealer.key").read_text()
    assert secret.split()[1] not in repr(first) + str(first.public)
    for damaged in (secret[:40], "", "x" * 5000, secret.replace("unseen", "seen"), "é"):
        (state / "dealer.key").write_text(damaged)
        with pytest.raises(InvalidInput, match=r"dealer\.key is damaged\nhint: delete it"):
            SealingKey.load(state)


# seals


def test_a_seal_opens_in_its_own_request_alone() -> None:
    sealed = KEY.public.seal(b"s" * 32, "open", 2, "ab", "c")
    assert len(sealed) == SEALED_BYTES
    assert KEY.open(sealed, "open", 2, "ab", "c") == b"s" * 32
    for fields in (("open", 2, "a", "bc"), ("open", 2, "abc"), ("open", 3, "ab", "c"), ("join", 2, "ab", "c"), ()):
        with pytest.raises(HandshakeError, match="cannot open the seal"):
            KEY.open(sealed, *fields)
    for wrong in (b"", sealed[:-1], sealed + b"x", bytes(SEALED_BYTES), sealed * 1000):
        with pytest.raises(HandshakeError, match="cannot open the seal"):
            KEY.open(wrong, "open", 2, "ab", "c")
    with pytest.raises(HandshakeError, match="cannot open the seal"):
        OTHER_KEY.open(sealed, "open", 2, "ab", "c")
    with pytest.raises(HandshakeError, match="cannot open the seal"):
        KEY.open(KEY.public.seal(b"s" * 31))
    assert sealed != KEY.public.seal(b"s" * 32, "open", 2, "ab", "c")
    assert transcript("a", b"b", 1) != transcript("a", "b", b"1") != transcript("ab", 1)
    for junk in (b"", b"x" * 1216, bytes(1216), KEY.public.encoded[:-1]):
        if junk != b"x" * 1216:
            with pytest.raises(ProtocolError, match="the dealer's key is no key"):
                DealerKey(junk).seal(b"s" * 32)


def test_a_sealed_seed_cannot_be_moved_to_another_request(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw, Raw(server, dealer, model) as other:
        mine = raw.join(model.masked.mask_seed)
        with pytest.raises(grpc.RpcError, match="cannot open the seal"):
            raw.dealer.Join(other.join(model.masked.mask_seed, sealed=mine.sealed))
        with pytest.raises(grpc.RpcError, match="cannot open the seal"):
            raw.dealer.Open(raw.open_request(sealed=mine.sealed))
        with pytest.raises(grpc.RpcError, match="cannot open the seal"):
            raw.dealer.Register(register_request(raw.program.encoded, bytes(32), sealed=mine.sealed))
        reply = raw.dealer.Join(mine)
        assert reply.proof == answer_proof(bytes(32), mine.sealed, raw.token)


# nobody pushes others out


def test_opens_do_not_end_a_running_session(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """They once did, in 1.3 seconds: the oldest session made room."""
    monkeypatch.setattr(dealer_module, "MAXIMUM_SESSIONS", 20)
    with dealing() as dealer, serving(model, dealer.address) as server, dial(server, dealer) as running:
        running.embed([TEXT])
        with Raw(server, dealer, model) as raw:
            while len(dealer.service.sessions) < 20:
                raw.dealer.Open(raw.open_request())
            for _ in range(5):
                with pytest.raises(grpc.RpcError, match=r"the dealer has 20 sessions, which is its limit\nhint: try"):
                    raw.dealer.Open(raw.open_request())
            running.embed([TEXT, TEXT])
            raw.greet()
            later(dealer.service.sessions, 60)
            works(server, dealer)  # those that no server has joined make room
            running.embed([TEXT])
            raw.prepare(0)


def test_callers_have_limits_of_their_own(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealer_module, "CALLER_SESSIONS", 3)
    named_callers(monkeypatch)
    with dealing() as dealer, serving(model, dealer.address) as server, Raw(server, dealer, model, "good") as good:
        for _ in range(3):
            good.dealer.Open(good.open_request(), metadata=(("name", "bad"),))
        with pytest.raises(grpc.RpcError, match="the dealer has 3 sessions of this caller, which is its limit"):
            good.dealer.Open(good.open_request(), metadata=(("name", "bad"),))
        good.dealer.Open(good.open_request(), metadata=(("name", "good"),))
        good.start()
        run_query(good, 0)


def test_registers_take_no_model_and_no_name(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """65 of them once did. A name follows from the mask's seed, so nobody else has it, also after a restart."""
    monkeypatch.setattr(dealer_module, "MAXIMUM_MODELS", 6)
    monkeypatch.setattr(server_module, "RENEWING", 0.5)
    with dealing() as dealer, serving(model, dealer.address) as server, Raw(server, dealer, model) as raw:
        for _ in range(5):
            reply = raw.dealer.Register(register_request(model.program.encoded, fresh_seed()))
            assert reply.weights_digest != model.weights_digest
        for _ in range(5):
            with pytest.raises(grpc.RpcError, match="the dealer has 6 models, which is its limit"):
                raw.dealer.Register(register_request(model.program.encoded, fresh_seed()))
        raw.start()
        run_query(raw, 0)
        works(server, dealer)
        later(dealer.service.models, 100)
        wait_until(lambda: server.service.dealer.renew(model.program, model.masked.mask_seed), "it is renewed")
        later(dealer.service.models, 100)  # the others were not: they make room
        dealer.service.sweep()
        assert [m.weights_digest for m in dealer.service._models.values()] == [model.weights_digest]
        works(server, dealer)


def later(seats: Any, seconds: float) -> None:
    """Let so much time pass for whatever is idle."""
    for seat in seats._seats.values():
        if seat._idle is not None:
            seat._idle = (seat._idle[0] - seconds, seat._idle[1])


def test_a_model_that_nobody_renews_is_forgotten_with_its_mask(model: Ready) -> None:
    with dealing() as dealer:
        with serving(model, dealer.address) as server:
            works(server, dealer)
            assert len(dealer.service._models) == 1
            wait_until(lambda: not dealer.service._sessions, "the session is erased")
        later(dealer.service.models, 100)
        dealer.service.sweep()
        assert len(dealer.service._models) == 1
        later(dealer.service.models, 100)
        dealer.service.sweep()
        assert (len(dealer.service._models), len(dealer.service.models)) == (0, 0)


def test_only_the_server_renews_its_model(server: Served, dealer: Served, model: Ready) -> None:
    names: dict[str, Any] = {"program_digest": model.program.digest, "weights_digest": model.weights_digest}
    with Raw(server, dealer, model) as raw:
        for seed in (bytes(32), b"", fresh_seed()):
            nonce = bytes(16)
            proof = renew_proof(seed, "server", nonce, *names.values()) if seed else b""
            with pytest.raises(grpc.RpcError, match="only the server of this model can renew it"):
                raw.dealer.Renew(pb.RenewRequest(nonce=nonce, proof=proof, **names))
        seed = model.masked.mask_seed
        request = pb.RenewRequest(nonce=nonce, proof=renew_proof(seed, "server", nonce, *names.values()), **names)
        assert raw.dealer.Renew(request).proof == renew_proof(seed, "dealer", nonce, *names.values()) != request.proof
        assert not raw.dealer.Renew(pb.RenewRequest(program_digest="x")).proof


def test_many_who_read_slowly(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller has so many queries dealt at a time, and the others theirs."""
    monkeypatch.setattr(dealer_module, "CALLER_DEALS", 2)
    named_callers(monkeypatch)
    released = threading.Event()

    def slow(pieces: Any) -> Iterator[bytes]:
        chunks = to_chunks(pieces)
        yield next(chunks)
        released.wait(20)
        yield from chunks

    with dealing() as dealer, serving(model, dealer.address) as server:
        sessions = [Raw(server, dealer, model, "bad") for _ in range(3)]
        monkeypatch.setattr(dealer_module, "to_chunks", slow)
        calls = []
        for raw in sessions:
            raw.dealer.Join(raw.join(model.masked.mask_seed))
            request = pb.DealRequest(session=raw.token, query=0, proof=deal_proof(bytes(32), raw.token, 0))
            calls.append(raw.dealer.Deal(request, metadata=(("name", "bad"),)))
            if len(calls) <= 2:
                next(calls[-1])
        with pytest.raises(grpc.RpcError, match="the dealer has 2 queries being dealt of this caller, which is its"):
            next(calls[2])
        monkeypatch.setattr(dealer_module, "to_chunks", to_chunks)
        works(server, dealer)
        released.set()
        for raw in sessions:
            raw.__exit__()


# the server's sessions


@pytest.mark.parametrize("count", [16, 32])
def test_silent_streams_keep_nobody_out(count: int, model: Ready, dealer: Served) -> None:
    """They once took all sessions for half an hour. A stream has no session before its handshake, and the oldest silent
    one gives way, so this holds even where all callers look alike."""
    with serving(model, dealer.address, deadline=60.0) as server:
        silent = [Raw(server, dealer, model) for _ in range(count)]
        try:
            wait_until(lambda: len(server.service.greetings._inside) == server_module.MAXIMUM_GREETINGS, "they wait")
            assert session_count(server) == 0
            start = time.monotonic()
            works(server, dealer)
            works(server, dealer)
            assert time.monotonic() - start < 10
        finally:
            for raw in silent:
                raw.__exit__()
        wait_until(lambda: len(server.service.greetings._inside) == 0, "they are gone")


def test_silent_streams_of_one_caller_leave_those_of_others_alone(
    model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_callers(monkeypatch)
    with serving(model, dealer.address, deadline=60.0) as server, Raw(server, dealer, model, "good") as good:
        wait_until(lambda: len(server.service.greetings._inside) == 1, "it waits")
        silent = [Raw(server, dealer, model, "bad") for _ in range(20)]
        try:
            wait_until(lambda: sum(not raw.call.is_active() for raw in silent) == 13, "most of them are ended")
            good.start()
            run_query(good, 0)
        finally:
            for raw in silent:
                raw.__exit__()


def test_a_session_is_taken_after_the_dealers_word_alone(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        raw.token = bytes(16)
        raw.say(hello=raw.hello())
        refused(raw, "dealer", "no such session")
        assert session_count(server) == 0
        wait_until(lambda: len(server.service.greetings._inside) == 0, "its place is free")


def test_the_handshake_has_its_own_deadline(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST", 0.5)
    with serving(model, dealer.address, deadline=60.0) as server, Raw(server, dealer, model) as raw:
        with pytest.raises(grpc.RpcError):
            raw.hear()
        wait_until(lambda: len(server.service.greetings._inside) == 0, "its place is free", 5)


def test_an_idle_session_makes_room_and_one_at_work_does_not(
    model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server_module, "MAXIMUM_SESSIONS", 2)
    with serving(model, dealer.address) as server, Raw(server, dealer, model) as working:
        working.start()
        with dial(server, dealer) as idle:
            with pytest.raises(Error, match="the server has 2 sessions, which is its limit"):
                dial(server, dealer)
            wait_until(lambda: session_count(server) == 2, "both are there")
            later(server.service.sessions, 60)
            works(server, dealer)
            with pytest.raises(Error, match=r"connect again|is gone"):
                idle.embed([TEXT])
        run_query(working, 0)
    wait_until(lambda: "was idle, and made room for another, between queries" in caplog.text, "the log says so")


# what is forgotten, and what is counted


def test_a_session_is_erased_when_it_ends(model: Ready) -> None:
    with dealing() as dealer, serving(model, dealer.address) as server:
        with dial(server, dealer) as connection:
            connection.embed([TEXT])
            ((token, session),) = dealer.service._sessions.items()
            assert session.server is not None
            held = [session.client._seed, session.server._seed]
        wait_until(lambda: not dealer.service._sessions, "it is gone")
        assert [bytes(seed) for seed in held] == [bytes(32)] * 2
        assert (len(dealer.service.sessions), session.model.sessions) == (0, 0)
        with (
            SummedChannel(grpc.insecure_channel(dealer.address), "it") as channel,
            pytest.raises(grpc.RpcError, match="no such session"),
        ):
            list(DealerStub(channel).Deal(pb.DealRequest(session=token)))


def test_sessions_end_with_their_servers_process(model: Ready) -> None:
    """A server that was killed once left them for an hour."""
    with dealing() as dealer, serving(model, dealer.address) as server, serving(model, dealer.address) as other:

        def unheard() -> None:
            """Let so much time pass, and look."""
            heard = dealer.service._heard
            heard |= {process: at - dealer_module.UNHEARD for process, at in heard.items()}
            other.service.renew()
            dealer.service.sweep()

        with dial(server, dealer) as lost, dial(other, dealer) as kept:
            lost.embed([TEXT])
            server.service._renewing.close()  # as if it were killed
            assert len(dealer.service.sessions) == 2
            unheard()
            assert (len(dealer.service.sessions), len(dealer.service._sessions)) == (1, 1)
            assert kept.embed([TEXT])[0].isfinite().all()
            with pytest.raises(Error, match="no such session"):
                lost.query({"input_ids": torch.full((1, LENGTH), 5), "attention_mask": torch.ones(1, LENGTH).long()})


def test_a_dealer_that_stood_still_ends_no_session(model: Ready) -> None:
    with dealing() as dealer, serving(model, dealer.address) as server:
        service = dealer.service
        with dial(server, dealer) as asking:
            with service._lock:
                service._heard = {process: at - dealer_module.UNHEARD for process, at in service._heard.items()}
                service._looked -= 2 * dealer_module.UNHEARD
            service.sweep()
            assert asking.embed([TEXT])[0].isfinite().all()
            assert len(service._heard) == 1
        wait_until(lambda: not service._sessions, "it is gone")
        service.sweep()
        assert not service._heard  # only processes that have sessions are kept


def test_a_dealer_that_does_not_hear_holds_up_no_renewal(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    with dealing() as dealer, serving(model, dealer.address) as server:
        told = list[bytes]()

        def busy(session: bytes, proving: bytes) -> bool:
            told.append(session)
            return False

        monkeypatch.setattr(server.service.dealer, "end", busy)
        server.service._ended.extend([(bytes([i]) * 16, b"") for i in range(30)])
        server.service._renewing.close()
        told.clear()
        server.service.renew()
        assert told == [bytes(16)]
        assert len(server.service._ended) == 30


def test_the_end_of_a_session_is_told_later_to_a_dealer_that_could_not_hear_it(
    model: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dealer_peer, "ENDING", 0.1)
    with dealing() as dealer, Relay(dealer.address) as relay, serving(model, relay.address) as server:
        with dial(server, dealer) as session:
            session.embed([TEXT])
            server.service._renewing.close()  # it is renewed by hand
            relay.silence()
        wait_until(lambda: len(server.service._ended) == 1, "the dealer has not heard")
        assert len(dealer.service.sessions) == 1
        relay.speak()
        works(server, dealer)  # the connection is there
        server.service.renew()
        assert not server.service._ended
        wait_until(lambda: not dealer.service.sessions, "the dealer has heard")


def test_only_the_server_ends_a_session(server: Served, dealer: Served, model: Ready) -> None:
    with Raw(server, dealer, model) as raw:
        with pytest.raises(grpc.RpcError, match="was not joined"):
            raw.dealer.Close(pb.CloseRequest(session=raw.token))
        raw.greet()
        for proof in (b"", bytes(32), close_proof(proving_key(bytes(32)), raw.token)):
            with pytest.raises(grpc.RpcError, match="only the server that joined the session can end it"):
                raw.dealer.Close(pb.CloseRequest(session=raw.token, proof=proof))
        raw.prepare(0)


def test_preparations_are_counted_at_both_ends(model: Ready, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that the client drops, because it knows its share of the answer when it has prepared a query."""
    named_callers(monkeypatch)
    counted = list[tuple[str, str, str, int]]()

    def counting(where: str) -> Callable[..., None]:
        def spend(caller: Any, what: str, amount: int) -> None:
            counted.append((where, caller.name, what, amount))
            if what == "preparations" and len(counted) > 5:
                raise Error(f"{caller.name} has used up its {what}", "it has more tomorrow")

        return spend

    with (
        dealing(DealerService(KEY, counting("dealer"))) as own,
        serving(model, own.address, spend=counting("server")) as server,
        Raw(server, own, model, "ann") as raw,
    ):
        raw.greet()
        raw.prepare(0)
        raw.prepare(3)
        raw.say(query=pb.Query(query=3))
        run_query(raw, 3)
        raw.say(prepare=pb.Prepare(query=4))
        refused(raw, "error", "ann has used up its preparations")
    prepared = [(where, "ann", "preparations", 1) for _ in range(2) for where in ("server", "dealer")]
    assert counted[:5] == [*prepared, ("server", "ann", "queries", 1)]


def test_a_dealer_that_forgot_a_model_is_told_again(model: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart. A client that comes first waits for it."""
    monkeypatch.setattr(server_module, "RENEWING", 1.0)
    with dealing() as dealer, serving(model, dealer.address) as server:
        dealer.service._models.clear()
        works(server, dealer)


def test_a_service_waits_for_its_peers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with dealing() as dealer:
        at = dealer.endpoint
    with pytest.raises(PeerLost, match=f"the dealer at {at} cannot be reached\nhint: start it with: unseen dealer"):
        hosting.check(LOOPBACK, {DEALER: at}, Plaintext(), what="the server")
    assert "waiting" not in caplog.text
    waiting = {"what": "the server", "wait": 20.0}
    thread = threading.Thread(target=hosting.check, args=(LOOPBACK, {DEALER: at}, Plaintext()), kwargs=waiting)
    thread.start()
    wait_until(lambda: f"waiting for the dealer at {at}, 20 s at most" in caplog.text, "it says so")
    with dealing(listen=at):
        thread.join(10)
        assert not thread.is_alive()
    assert caplog.text.count("waiting for") == 1


def test_the_name_of_a_model_follows_from_its_seed(model: Ready) -> None:
    assert model.weights_digest == model_name(model.masked.mask_seed) != model_name(bytes(32))


def test_no_service_without_a_dealer_that_opens(model: Ready) -> None:
    with dealing(DealerService(OTHER_KEY)) as other:
        peer = DealerPeer(Endpoint.parse(other.address, what="x"), Plaintext(), KEY.public.fingerprint)
        with pytest.raises(DealerError, match="has the key"):
            InferenceService([model.masked], peer)
