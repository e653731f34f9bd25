"""What a service says about itself, and that a peer of the same owner is refused."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import grpc
import pytest

from parties import deployments
from parties.net.endpoints import Endpoint
from parties.net.network import Plaintext
from parties.net.peer import Peer
from parties.net.summed import SummedChannel
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import StatusStub
from parties.services import hosting, status
from parties.services.status import ask_status, owner_tag
from secure.deployments.two_party import DEALER, TwoParty
from secure.errors import InvalidInput, PeerLost
from secure.version import WIRE_VERSION

NOBODY = Endpoint("127.0.0.1", 1)


def test_a_dealer_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with deployments.serve(role=DEALER, deployment=TwoParty()) as dealer:
        peer = Peer("the dealer", dealer.address, Plaintext(), role=DEALER, start="unseen dealer")
        found = ask_status(peer, "no-program")
        assert (found.version, found.deployment, found.role) == (WIRE_VERSION, "two-party", "dealer")
        assert (found.program_digest, found.known, found.same_owner) == ("", False, True)
        assert abs(found.skew) < 1
        at = Endpoint.parse(dealer.address, what="x")
        with pytest.raises(InvalidInput, match=r"is run by this user on this machine.*\n.*--same-owner"):
            hosting.check_owners({DEALER: at}, Plaintext())
        ours = status.owner_tag
        monkeypatch.setattr(status, "owner_tag", lambda nonce: ours(nonce + b"x"))  # of another user, on both sides
        assert ask_status(peer).same_owner
        peer.close()


def test_owners() -> None:
    nonce, other = secrets.token_bytes(32), secrets.token_bytes(32)
    assert owner_tag(nonce) == owner_tag(nonce) != owner_tag(other)


def test_another_owner_may_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    with deployments.serve(role=DEALER, deployment=TwoParty()) as dealer:
        at = Endpoint.parse(dealer.address, what="x")
        uid = os.getuid()
        users = iter([uid + 1, uid])  # the dealer's, then ours
        monkeypatch.setattr(os, "getuid", lambda: next(users))
        hosting.check_owners({DEALER: at}, Plaintext())
    hosting.check_owners({DEALER: NOBODY}, Plaintext())


def test_without_a_boot_number_nobody_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BOOT", Path("/no/file"))
    with deployments.serve(role=DEALER, deployment=TwoParty()) as dealer:
        hosting.check_owners({DEALER: Endpoint.parse(dealer.address, what="x")}, Plaintext())


def test_a_nonce_of_another_size() -> None:
    with (
        deployments.serve(role=DEALER, deployment=TwoParty()) as dealer,
        SummedChannel(grpc.insecure_channel(dealer.address), "it") as channel,
        pytest.raises(grpc.RpcError, match="a nonce has 32 bytes, not 5"),
    ):
        StatusStub(channel).Check(pb.CheckRequest(nonce=b"short"))


def test_a_clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with deployments.serve(role=DEALER, deployment=TwoParty()) as dealer:
        peer = Peer("the dealer", dealer.address, Plaintext(), role=DEALER, start="unseen dealer")
        asked = iter([0.0, 3600.0, 0.0])  # ours, the dealer's, ours
        monkeypatch.setattr(status, "clock", lambda: time.time() + next(asked))
        assert 3590 < ask_status(peer).skew < 3610
        peer.close()


def test_a_service_without_status(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer("the dealer", NOBODY, Plaintext(), role=DEALER, start="unseen dealer")
    with pytest.raises(PeerLost, match=r"the dealer at 127\.0\.0\.1:1 cannot be reached"):
        ask_status(peer)
    peer.close()
