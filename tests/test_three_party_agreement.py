"""Pairs of parties agree on keys that the model's owner does not know: who can, who cannot, and what a restart does."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch.nn.functional import cosine_similarity

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.net.caller import Caller
from parties.net.watchdog import Watchdog
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyStub
from parties.three_party.agreement import KeyOfCallee
from parties.three_party.conversations import WantedProgram
from parties.three_party.pair_keys import PairKey, PairSeed
from parties.three_party.party_0 import Party0Service
from parties.three_party.party_2 import Party2Service
from parties.three_party.shared_model import load_share
from secure.errors import Error, HandshakeError, PeerLost
from secure.version import WIRE_VERSION
from tests.three_parties import Party, Three, hosted, running, shared
from tests.tiny import TEXT, expected

CALLS = ((0, 2), (1, 0), (1, 2))  # (caller, callee)


@pytest.fixture(scope="module")
def shares(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(directory, tmp_path_factory.mktemp("shares"), "one-hot")


@pytest.fixture(scope="module")
def three(shares: Path) -> Iterator[Three]:
    with running(shares) as parties:
        yield parties


def seed_of(three: Three, party: int, other: int) -> PairSeed:
    """The owner's seed of a pair: an owner who kept it has it, too."""
    return three.parties[party].service.share.pair_seeds[other]


def impostor(three: Three, party: int, callee: int) -> KeyOfCallee:
    """An owner who kept all seeds, and calls in a party's name."""
    service = three.parties[party].service
    peer = three.parties[callee].peer()
    return KeyOfCallee(service.share, callee, peer, 5.0, service.log)


# what the owner's seeds give


def test_both_ends_of_a_pair_have_the_same_key(three: Three) -> None:
    found = []
    for caller, callee in CALLS:
        one, two = three.parties[caller].service.key(callee), three.parties[callee].service.key(caller)
        assert one.proof("x", b"y") == two.proof("x", b"y")
        assert set(one.pair) == set(two.pair) == {caller, callee}
        found.append(one.proof("x", b"y"))
    assert len(set(found)) == 3


def test_every_start_agrees_on_another_key(shares: Path, three: Three) -> None:
    with running(shares) as again:
        for caller, callee in CALLS:
            keys = [parties.parties[caller].service.key(callee) for parties in (three, again)]
            assert keys[0].proof("x") != keys[1].proof("x")


def test_who_kept_all_seeds_of_the_owner_makes_no_proof(three: Three) -> None:
    """Before, the proof of a Seed request followed from the owner's seed alone."""
    two, number = three.parties[2].service, bytes(range(1, 17))
    zero = three.parties[0].service.key(2)
    model, about = two.share.manifest.model, WantedProgram(two.share.program.digest).about()
    stub = PartyStub(three.parties[2].peer().channel)
    supply = pb.SupplyRequest(model=model, supply=number, proof=zero.proof("supply", number, about))
    list(stub.Supply(supply))
    known = seed_of(three, 1, 2)
    guesses = [known, PairKey(known._seed, known.pair), known.agreed(bytes(32), bytes(32)), known.agreed(b"", b"")]
    for guess in guesses:
        with pytest.raises(grpc.RpcError, match="does not show the key that parties 1 and 2 agreed on"):
            stub.Seed(pb.SupplyRequest(model=model, supply=number, proof=guess.proof("seed", number, about)))
    reply = stub.Seed(
        pb.SupplyRequest(model=model, supply=number, proof=three.parties[1].service.key(2).proof("seed", number, about))
    )
    assert len(reply.seed) == 32  # party 1 still gets it


def test_who_kept_all_seeds_of_the_owner_is_refused_while_the_party_is_connected(
    three: Three, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for party, callee in CALLS:
        posing = impostor(three, party, callee)
        with pytest.raises(PeerLost, match=f"party {party} has agreed on a key with party {callee} already"):
            posing.key()
        assert f"a second caller wants to agree on a key as party {party}" in caplog.text
    with three.dial() as connection:
        assert cosine_similarity(connection.embed([TEXT])[0], expected(directory, TEXT), dim=0) > 0.9999


def test_a_recorded_exchange_tells_a_holder_of_the_seeds_nothing(shares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All messages are recorded; neither seed nor public keys give the key without a private one."""
    seen: list[Any] = []
    agreed = PairSeed.agreed

    def noting(self: PairSeed, dh: bytes, transcript: bytes) -> PairKey:
        key = agreed(self, dh, transcript)
        seen.append((self, dh, transcript, key))
        return key

    monkeypatch.setattr(PairSeed, "agreed", noting)
    with running(shares):
        pass
    assert len(seen) == 6  # both ends of three pairs
    assert len({dh for _, dh, _, _ in seen}) == len({transcript for _, _, transcript, _ in seen}) == 3
    for seed, dh, transcript, key in seen:
        for other in (bytes(32), X25519PrivateKey.generate().private_bytes_raw(), dh[::-1]):
            assert agreed(seed, other, transcript).proof("x") != key.proof("x")
        assert agreed(seed, dh, bytes(32)).proof("x") != key.proof("x")
        assert agreed(PairSeed(bytes(32), seed.pair), dh, transcript).proof("x") != key.proof("x")


# who may agree


@pytest.fixture
def two(shares: Path) -> Iterator[Party]:
    """Party 2, which nobody has called."""
    service = Party2Service(load_share(shares / "party-2"), deadline=5.0)
    with hosted(service) as at:
        yield Party(lambda: service, service, at)


class Raw:
    """A caller that sends what it is told to."""

    def __init__(self, party: Party) -> None:
        self._outbox: queue.SimpleQueue[pb.AgreeMessage | None] = queue.SimpleQueue()
        self.call = PartyStub(party.peer().channel).Agree(iter(self._outbox.get, None), timeout=10)

    def ask(self, **content: Any) -> pb.AgreeMessage:
        self._outbox.put(pb.AgreeMessage(**content))
        message: pb.AgreeMessage = next(self.call)
        return message

    def end(self) -> None:
        self._outbox.put(None)
        self.call.cancel()


@pytest.fixture
def raw(two: Party) -> Iterator[Raw]:
    calling = Raw(two)
    yield calling
    calling.end()


def hello(shares: Path, own: int = 0, **changed: Any) -> pb.AgreeHello:
    """A party's greeting to party 2, with what is ``changed`` before the proof is made, but for the proof itself."""
    share = load_share(shares / f"party-{own}")
    public = X25519PrivateKey.generate().public_key().public_bytes_raw()
    fields: dict[str, Any] = {"version": WIRE_VERSION, "model": share.manifest.model, "party": own, "public": public}
    fields |= changed
    about = (fields["public"], bytes([fields["party"] % 256]), fields["model"].encode())
    return pb.AgreeHello(**({"proof": share.pair_seeds[2].proof("agree", *about)} | fields))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"proof": b""}, "does not show the seed of parties 2 and 0"),
        ({"proof": bytes(32)}, "does not show the seed of parties 2 and 0"),
        ({"party": 1}, "does not show the seed of parties 1 and 2"),
        ({"party": 2}, "not of the parties that call party 2"),
        ({"party": 300}, "not of the parties that call party 2"),
        ({"version": 1}, "version: party . speaks version 1"),
        ({"model": "other"}, "has a share of another model"),
        ({"public": bytes(32)}, "a public key is none"),
        ({"public": bytes(31)}, "a public key has 32 bytes, not 31"),
        ({"public": bytes(1 << 20)}, "a public key has 32 bytes, not 1048576"),
    ],
)
def test_a_wrong_greeting_is_refused(shares: Path, raw: Raw, two: Party, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(grpc.RpcError, match=words):
        raw.ask(hello=hello(shares, **changed))
    with pytest.raises(HandshakeError, match="party 0 has agreed on no key with party 2"):
        two.service.key(0)


@pytest.mark.parametrize(("role", "refused"), [("party 0", True), ("client", True), ("party 1", False), (None, False)])
def test_a_certificate_of_another_role_is_refused(shares: Path, two: Party, role: str | None, refused: bool) -> None:
    """Under TLS the owner's seeds do not suffice: party 0 with all of them is not party 1."""
    requests, watch = iter([pb.AgreeMessage(hello=hello(shares, 1))]), Watchdog(5.0, lambda: None)
    who = Caller("x" if role else "", role, "127.0.0.1:1")
    serving = two.service._of_callers.serve(requests, watch, who, nullcontext())
    if refused:
        with pytest.raises(HandshakeError, match="not of the parties that call party 2"):
            next(serving)
    else:
        assert next(serving).WhichOneof("content") == "answer"
    serving.close()  # type: ignore[attr-defined]
    watch.stop()


def test_a_recorded_greeting_gives_no_key(shares: Path, raw: Raw, two: Party) -> None:
    """Who repeats it has not the private key, and so neither confirms nor pushes anybody out."""
    recorded = hello(shares)
    assert len(raw.ask(hello=recorded).answer.public) == 32
    with pytest.raises(HandshakeError, match="agreed on no key"):
        two.service.key(0)
    with pytest.raises(grpc.RpcError, match="does not show the key that parties 2 and 0 agreed on"):
        raw.ask(confirm=bytes(32))
    again = Raw(two)  # the honest one is not kept out
    assert again.ask(hello=hello(shares)).WhichOneof("content") == "answer"
    again.end()


@pytest.mark.parametrize("first", [{"confirm": bytes(32)}, {"done": pb.AgreeDone()}, {}])
def test_an_exchange_begins_with_a_greeting(raw: Raw, first: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError, match="no hello where it should"):
        raw.ask(**first)


def test_a_caller_that_says_nothing_is_sent_away(shares: Path) -> None:
    service = Party2Service(load_share(shares / "party-2"), deadline=0.5)
    with hosted(service) as at:
        silent = Raw(Party(lambda: service, service, at))
        start = time.monotonic()
        with pytest.raises(grpc.RpcError):
            next(silent.call)
        assert time.monotonic() - start < 3
        silent.end()


@pytest.mark.parametrize("answered", ["nothing", "another seed", "no key", "another message"])
def test_whoever_poses_as_a_callee_is_refused(shares: Path, answered: str) -> None:
    """A callee without the owner's seed: the caller names it, and gives it no proof of any key."""
    heard: list[pb.AgreeMessage] = []

    class Posing(Party2Service):
        def Agree(self, requests: Any, context: Any) -> Iterator[pb.AgreeMessage]:
            if answered == "another seed":
                self.share.pair_seeds[0]._seed = bytes(32)
                self.share.pair_seeds[0].require = lambda *_: None  # type: ignore[method-assign]
                yield from super().Agree(requests, context)
                return
            heard.append(next(requests))
            if answered == "no key":
                yield pb.AgreeMessage(answer=pb.AgreeAnswer(public=bytes(range(32)), proof=bytes(32)))
            elif answered == "another message":
                yield pb.AgreeMessage(done=pb.AgreeDone())
            heard.extend(requests)

    service = Posing(load_share(shares / "party-2"), deadline=1.0)
    with hosted(service) as at:
        peer = Party(lambda: service, service, at).peer()
        calling = KeyOfCallee(load_share(shares / "party-0"), 2, peer, 1.0, service.log)
        words = {"nothing": "agreed on no key within 1 s", "another message": "before its answer"}
        with pytest.raises(Error, match=words.get(answered, "does not show the seed of parties 2 and 0")):
            calling.key()
        assert all(message.WhichOneof("content") == "hello" for message in heard)


# restarts


def answer(connection: Any, directory: Path) -> None:
    (found,) = connection.embed([TEXT])
    assert cosine_similarity(found, expected(directory, TEXT), dim=0) > 0.9999


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("party", [0, 1, 2])
def test_the_next_query_after_a_restart_is_answered(directory: Path, shares: Path, party: int, ahead: int) -> None:
    with running(shares, ahead=ahead) as three, three.dial() as connection:
        answer(connection, directory)
        before = {call: three.parties[call[0]].service.key(call[1]).proof("x") for call in CALLS}
        three.parties[party].restart()
        time.sleep(1.2)  # gRPC dials again after a second
        answer(connection, directory)
        for call, proof in before.items():
            assert (three.parties[call[0]].service.key(call[1]).proof("x") != proof) == (party in call)


@pytest.mark.parametrize("party", [0, 1, 2])
def test_a_query_under_way_fails_and_the_next_is_answered(directory: Path, shares: Path, party: int) -> None:
    class Restarting(Party0Service):
        three: Three
        restarted = False

        def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
            for number, message in enumerate(super().Compute(requests, context)):
                if number == 1 and not Restarting.restarted:
                    Restarting.restarted = True
                    threading.Thread(target=self.three.parties[party].restart).start()
                    time.sleep(1.0)
                yield message

    with running(shares, {0: Restarting}, deadline=5) as three, three.dial(deadline=5) as connection:
        Restarting.three = three
        if party == 2:  # its seed and corrections may have come already
            with suppress(Error):
                connection.embed([TEXT])
        else:
            with pytest.raises(Error, match=r"party [01]"):
                connection.embed([TEXT])
        time.sleep(1.5)
        answer(connection, directory)
