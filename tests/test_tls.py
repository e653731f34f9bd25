"""TLS between parties: every fault of a certificate in one line on both sides, and nothing sent before."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties import deployments
from parties.cli import core_log
from parties.cli.main import app
from parties.net.caller import Caller, caller, permit
from parties.net.endpoints import Endpoint
from parties.net.network import Network, Plaintext
from parties.net.peer import Peer
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import DealerServicer, DealerStub, add_DealerServicer_to_server
from parties.services import hosting
from parties.tls.authority import Authority
from parties.tls.choice import network_of
from parties.tls.naming import Naming
from parties.tls.tls import Tls
from parties.two_party.dealer import DealerService
from secure.deployments.three_party import ThreeParty
from secure.deployments.two_party import CLIENT, DEALER, SERVER, TwoParty
from secure.errors import EndpointError, HandshakeError, InvalidInput, PeerLost, TlsError
from tests import ckks_server
from tests.certificates import FakePeer, Signer
from tests.dealer_key import KEY
from tests.three_parties import shared
from tests.tiny import LOOPBACK, TEXT, Ready, wait_until

HOUR = timedelta(hours=1)
ROLES = (CLIENT, SERVER, DEALER, "party 0", "party 1", "party 2")
OPEN = pb.OpenRequest(version=0)
PASSED = "FAILED_PRECONDITION"  # what a dealer says to OPEN if it reads it


@pytest.fixture(scope="module")
def root() -> Signer:
    return Signer.make("root")


@pytest.fixture(scope="module")
def other() -> Signer:
    return Signer.make("another root")


@pytest.fixture
def made(tmp_path: Path) -> Authority:
    """An authority of ``unseen certs``, with all roles."""
    authority = Authority.make(tmp_path / "certs")
    for role in ROLES:
        authority.issue(role, role.replace(" ", "-"))
    return authority


class Dealer:
    """A dealer under TLS in this process, which can be started again at the same address."""

    def __init__(self, network: Network, service: DealerServicer | None = None, listen: Endpoint = LOOPBACK) -> None:
        service = service or DealerService(KEY)
        adding: list[Callable[[grpc.Server], None]] = [lambda server: add_DealerServicer_to_server(service, server)]
        self._server, self.at = hosting.start(
            listen, adding, network=network, what="the dealer", role=DEALER, permissions=DealerService.permissions
        )

    def stop(self) -> None:
        self._server.stop(None).wait()


@contextmanager
def dealing(network: Network, service: DealerServicer | None = None) -> Iterator[Dealer]:
    dealer = Dealer(network, service)
    try:
        yield dealer
    finally:
        dealer.stop()


@contextmanager
def peer_of(at: Endpoint | str, network: Network, role: str = DEALER) -> Iterator[Peer]:
    peer = Peer(f"the {role}", at, network, role=role, start=f"unseen {role}")
    try:
        yield peer
    finally:
        peer.close()


def ask(at: Endpoint | str, network: Network, role: str = DEALER) -> Exception:
    """The error of a call to a dealer; a HandshakeError is what the dealer itself says."""
    with peer_of(at, network, role) as peer, pytest.raises(secure.Error) as caught:
        call(peer)
    return caught.value


def call(peer: Peer) -> None:
    with peer.calling("opening a session", kind=HandshakeError):
        DealerStub(peer.channel).Open(OPEN, timeout=10)


def reached(error: Exception) -> bool:
    return isinstance(error, HandshakeError) and "this dealer" in str(error)


def one_line(error: Exception) -> str:
    """The message, which is one line and a hint."""
    message, _, hint = str(error).partition("\nhint: ")
    assert hint, str(error)
    assert "\n" not in message + hint, str(error)
    return message


# who answers is not who should


def test_a_good_peer_gets_bytes(root: Signer, tmp_path: Path) -> None:
    """The fake peer of the tests below does record what is sent to it, once it is trusted."""
    ours = Tls(root.ours(tmp_path / "client", CLIENT))
    with FakePeer(root.ours(tmp_path / "dealer", DEALER)) as fake, peer_of(fake.address, ours) as peer:
        with pytest.raises(grpc.RpcError):
            DealerStub(peer.channel).Open(OPEN, timeout=1)
        assert fake.received.startswith(b"PRI * HTTP/2.0")


FAULTS: dict[str, tuple[Callable[[Signer, Signer, Path], Path], str, str]] = {
    "expired": (
        lambda root, other, d: root.ours(d, DEALER, starts=-50 * HOUR, ends=-HOUR),
        "the certificate of the dealer at {at} has expired",
        "certificate expired",
    ),
    "a clock an hour off": (
        lambda root, other, d: root.ours(d, DEALER, starts=HOUR),
        "the certificate of the dealer at {at} is not valid yet",
        "bad certificate",
    ),
    "wrong CA": (
        lambda root, other, d: other.ours(d, DEALER),
        "the certificate of the dealer at {at} is signed by an authority that ca.pem does not hold",
        "unknown ca",
    ),
    "wrong role": (
        lambda root, other, d: root.ours(d, SERVER),
        "the dealer at {at} shows the certificate of a server ('spiffe://unseen.internal/unseen/server/x'), "
        "not of a dealer",
        "",
    ),
    "another party": (
        lambda root, other, d: root.ours(d, "party 1"),
        "the dealer at {at} shows the certificate of a party 1 ('spiffe://unseen.internal/unseen/party-1/x'), "
        "not of a dealer",
        "",
    ),
    "no role": (
        lambda root, other, d: root.holder(d, [x509.DNSName("dealer.unseen.internal")]),
        "the dealer at {at}: the certificate 'dealer.unseen.internal' names no role",
        "",
    ),
    "two roles": (
        lambda root, other, d: root.holder(
            d,
            [
                x509.DNSName("dealer.unseen.internal"),
                *(x509.UniformResourceIdentifier(f"spiffe://a/unseen/{r}/x") for r in ("dealer", "server")),
            ],
        ),
        "the dealer at {at}: the certificate 'spiffe://a/unseen/dealer/x' names 2 roles",
        "",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_sent_to_a_wrong_peer(fault: str, root: Signer, other: Signer, tmp_path: Path) -> None:
    make, message, alert = FAULTS[fault]
    ours = Tls(root.ours(tmp_path / "client", CLIENT))
    with FakePeer(make(root, other, tmp_path / "peer")) as fake:
        for _ in range(2):  # a second call looks again, and learns the same
            error = ask(fake.address, ours)
            assert isinstance(error, TlsError)
            assert one_line(error).startswith(message.format(at=fake.address)), error
        wait_until(lambda: fake.connections == 2 and (not alert or len(fake.refused) == 2), "it sees both")
    assert fake.received == b""
    assert all(alert in each for each in fake.refused)


def test_nothing_is_sent_to_a_revoked_peer(root: Signer, tmp_path: Path) -> None:
    mine, theirs = root.ours(tmp_path / "client", CLIENT), root.ours(tmp_path / "dealer", DEALER)
    root.revoke(theirs, mine)
    with FakePeer(theirs) as fake:
        error = ask(fake.address, Tls(mine))
    assert one_line(error).startswith(f"the certificate of the dealer at {fake.address} was revoked")
    assert fake.received == b""


@pytest.mark.parametrize("second", ["another dealer", "revoked", "plaintext"])
def test_nothing_is_sent_to_whoever_takes_over_after_the_check(second: str, root: Signer, tmp_path: Path) -> None:
    """Who stands between lets the check pass to the real dealer, and then answers in its place."""
    mine, dealer = root.ours(tmp_path / "client", CLIENT), root.ours(tmp_path / "dealer", DEALER)
    stolen = root.ours(tmp_path / "stolen", DEALER)
    if second == "revoked":
        root.revoke(stolen, mine)
    with FakePeer(dealer, then=stolen) as fake, peer_of(fake.address, Tls(mine)) as peer:
        if second == "plaintext":
            fake._contexts[1] = None
        with pytest.raises(grpc.RpcError):
            DealerStub(peer.channel).Open(pb.OpenRequest(sealed=b"s" * 32), timeout=2)
        assert fake.connections >= 2
    assert b"PRI" not in fake.received
    assert b"s" * 32 not in fake.received
    assert second == "plaintext" or fake.received == b""


def test_nothing_is_sent_to_a_peer_without_tls(root: Signer, tmp_path: Path) -> None:
    ours = Tls(root.ours(tmp_path / "client", CLIENT))
    with FakePeer(None) as fake:  # it speaks HTTP/2 in the clear
        error = ask(fake.address, ours)
        wait_until(lambda: len(fake.received) > 0, "the handshake's first message came")
    assert isinstance(error, TlsError)
    assert one_line(error) == f"the dealer at {fake.address} does not speak TLS"
    assert fake.received[0] == 22  # a handshake record, and then an alert
    assert b"PRI" not in fake.received


def test_a_plaintext_service_of_ours(root: Signer, tmp_path: Path) -> None:
    with dealing(Plaintext()) as dealer:
        error = ask(dealer.at, Tls(root.ours(tmp_path / "client", CLIENT)))
    assert one_line(error) == f"the dealer at {dealer.at} does not speak TLS"


def test_a_plaintext_client_sends_no_call_to_a_service_with_tls(root: Signer, tmp_path: Path) -> None:
    """gRPC sends no call before the service's settings have come, and a service with TLS sends none in the clear."""
    with dealing(Tls(root.ours(tmp_path / "dealer", DEALER))) as dealer:
        error = ask(dealer.at, Plaintext())
    assert one_line(error) == f"the dealer at {dealer.at} closed the connection (opening a session)"
    assert "give --tls DIRECTORY" in str(error)
    with FakePeer(None, greeting=b"") as fake, peer_of(fake.address, Plaintext()) as peer:
        with pytest.raises(grpc.RpcError):
            DealerStub(peer.channel).Open(pb.OpenRequest(sealed=b"s" * 32), timeout=1)
        assert fake.received.startswith(b"PRI")
        assert b"s" * 32 not in fake.received


def test_no_older_tls(root: Signer, tmp_path: Path) -> None:
    client, server = root.ours(tmp_path / "client", CLIENT), root.ours(tmp_path / "dealer", DEALER)
    with FakePeer(server, newest=False) as fake:
        error = ask(fake.address, Tls(client))
    assert one_line(error) == f"the dealer at {fake.address} does not speak TLS 1.3"
    assert fake.received == b""
    with dealing(Tls(server)) as dealer:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.maximum_version, old.check_hostname = ssl.TLSVersion.TLSv1_2, False
        old.load_verify_locations(client / "ca.pem")
        old.load_cert_chain(client / "cert.pem", client / "key.pem")
        old.set_alpn_protocols(["h2"])
        with socket.create_connection((dealer.at.host, dealer.at.port)) as raw, pytest.raises(OSError, match="SSL"):
            old.wrap_socket(raw)
        assert reached(ask(dealer.at, Tls(client)))


def test_a_silent_peer_and_nobody(root: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parties.tls.preflight.HANDSHAKE", 0.5)
    ours = Tls(root.ours(tmp_path / "client", CLIENT))
    with FakePeer(None, greeting=b"") as fake:
        assert "did not finish the TLS handshake within 0.5 s" in one_line(ask(fake.address, ours))
    error = ask(fake.address, ours)  # it is gone by now
    assert isinstance(error, HandshakeError)  # the kind that the call asked for
    assert one_line(error) == f"the dealer at {fake.address} cannot be reached (opening a session)"
    with FakePeer(root.ours(tmp_path / "dealer", DEALER), greeting=b"SSH-2.0-x\r\n") as fake:
        assert "it speaks TLS, but no HTTP/2" in one_line(ask(fake.address, ours))
        assert fake.received == b""


# who calls is not who may


def test_who_calls(root: Signer, tmp_path: Path) -> None:
    found: list[Caller] = []

    class Noting(DealerService):
        def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
            found.append(caller(context))
            return super().Open(request, context)

    with dealing(Tls(root.ours(tmp_path / "dealer", DEALER)), Noting(KEY)) as dealer:
        assert reached(ask(dealer.at, Tls(root.ours(tmp_path / "client", CLIENT))))
    with dealing(Plaintext(), Noting(KEY)) as dealer:
        assert reached(ask(dealer.at, Plaintext()))
    assert [(c.name, c.role) for c in found] == [("x", CLIENT), ("", None)]
    assert all(c.address.startswith("127.0.0.1:") for c in found)


@pytest.mark.parametrize(("role", "method"), [
    *((CLIENT, m) for m in ("Register", "Join", "Deal", "Stock", "Assign")),
    *((SERVER, m) for m in ("Open",)),
    *((r, m) for r in ("party 0", DEALER) for m in ("Open", "Register", "Join", "Deal", "Stock", "Assign")),
])  # fmt: skip
def test_a_role_that_may_not_call_a_method(
    role: str, method: str, root: Signer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The call is refused before its request is read, so one of any size costs the service nothing."""
    allowed = {"Open": CLIENT}.get(method, SERVER)
    request = {
        "Open": pb.OpenRequest,
        "Register": pb.RegisterRequest,
        "Join": pb.JoinRequest,
        "Deal": pb.DealRequest,
        "Stock": pb.StockRequest,
        "Assign": pb.AssignRequest,
    }
    parsed: list[bytes] = []

    class Deaf(DealerServicer):
        def __getattribute__(self, name: str) -> Any:
            if name in request:
                return lambda *_: parsed.append(b"")
            return super().__getattribute__(name)

    ours = Tls(root.ours(tmp_path / "caller", role))
    with dealing(Tls(root.ours(tmp_path / "dealer", DEALER)), Deaf()) as dealer, peer_of(dealer.at, ours) as peer:
        found = getattr(DealerStub(peer.channel), method)
        with pytest.raises(TlsError) as caught, peer.calling():
            list(found(request[method](), timeout=10))
    full = f"/unseen.v3.Dealer/{method}"
    said = f"a {role} may not call {full}; only {allowed} may"
    assert one_line(caught.value) == f"the dealer at {dealer.at} refused: {said}"
    assert parsed == []
    (line,) = (r.getMessage() for r in caplog.records if r.name == "unseen.guard")
    assert line.startswith(f"refused {full} of {role} 'x' at 127.0.0.1:")
    assert line.endswith(f"only {allowed} may")


def test_every_method_says_who_may_call_it() -> None:
    """Each deployment's services list every method of theirs; one that is not listed may be called by nobody."""
    from parties.ckks.server import CkksService
    from parties.served.published import Published
    from parties.services.status import StatusService
    from parties.three_party.party_0 import Party0Service
    from parties.three_party.party_1 import Party1Service
    from parties.three_party.party_2 import Party2Service
    from parties.two_party.server import InferenceService

    services: list[Any] = [DealerService, InferenceService, Published, CkksService]
    services += [Party0Service, Party1Service, Party2Service]
    services += [StatusService("", "", [CLIENT], "", lambda _: False)]
    listed = {method for service in services for method in service.permissions}
    listed |= set(permit("Status", Check=ROLES))  # StatusService: those that may call another method of the service
    known = {
        f"/{service.full_name}/{name}"
        for service in pb.DESCRIPTOR.services_by_name.values()
        for name in service.methods_by_name
    }
    assert listed == known
    roles = {role.name for deployment in (TwoParty(), ThreeParty(), secure.Ckks()) for role in deployment.roles()}
    assert {role for service in services for allowed in service.permissions.values() for role in allowed} <= roles
    with pytest.raises(KeyError):
        permit("Dealer", Opne=[CLIENT])


def test_a_method_that_is_not_listed(root: Signer, tmp_path: Path) -> None:
    adding = [lambda server: add_DealerServicer_to_server(DealerService(KEY), server)]
    network = Tls(root.ours(tmp_path / "dealer", DEALER))
    server, at = hosting.start(LOOPBACK, adding, network=network, what="x", role=DEALER, permissions={})
    try:
        error = ask(at, Tls(root.ours(tmp_path / "client", CLIENT)))
    finally:
        server.stop(None).wait()
    assert "a client may not call /unseen.v3.Dealer/Open; nobody may" in one_line(error)


def test_a_server_cannot_pose_as_the_dealer(made: Authority, tmp_path: Path) -> None:
    """Who answers with another role's certificate gets nothing, and does not even start with it."""
    with (
        pytest.raises(TlsError, match="the dealer itself shows the certificate of a server"),
        dealing(Tls(made.directory / "server")),
    ):
        pass
    with FakePeer(made.directory / "server") as fake:
        error = ask(fake.address, Tls(made.directory / "client"))
        assert "shows the certificate of a server" in one_line(error)
    assert fake.received == b""
    # nor can the dealer's certificate be used to call anybody
    with dealing(Tls(made.directory / "dealer")) as dealer:
        said = one_line(ask(dealer.at, Tls(made.directory / "dealer")))
    assert said.endswith("it is not made for calling others")


@pytest.mark.parametrize("fault", ["wrong CA", "expired", "a clock an hour off", "no certificate"])
def test_a_caller_with_a_wrong_certificate(fault: str, root: Signer, other: Signer, tmp_path: Path) -> None:
    """It ends in the handshake. A caller that is ours finds out by itself if it is expired."""
    trusted = {"trusted": [root]}
    client = {
        "wrong CA": lambda d: other.ours(d, CLIENT, **trusted),
        "expired": lambda d: root.ours(d, CLIENT, starts=-50 * HOUR, ends=-HOUR),
        "a clock an hour off": lambda d: root.ours(d, CLIENT, starts=HOUR),
        "no certificate": lambda d: root.ours(d, CLIENT),
    }[fault](tmp_path / "client")
    with dealing(Tls(root.ours(tmp_path / "dealer", DEALER))) as dealer:
        key, chain = ((client / name).read_bytes() for name in ("key.pem", "cert.pem"))
        shown = (None, None) if fault == "no certificate" else (key, chain)
        credentials = grpc.ssl_channel_credentials(root.pem, *shown)
        name = [("grpc.ssl_target_name_override", "dealer.unseen.internal")]
        with grpc.secure_channel(str(dealer.at), credentials, name) as channel, pytest.raises(grpc.RpcError) as caught:
            DealerStub(channel).Open(OPEN, timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        if fault == "wrong CA":
            said = one_line(ask(dealer.at, Tls(client)))
            refused = f"the dealer at {dealer.at} refuses our certificate 'spiffe://unseen.internal/unseen/client/x'"
            assert said == f"{refused}: its authority is not the one of our ca.pem"


@pytest.mark.parametrize(
    ("starts", "ends", "message"),
    [(-50 * HOUR, -HOUR, "has expired"), (HOUR, 50 * HOUR, "is not valid yet, but from")],
)
def test_our_own_certificate_is_checked_first(
    starts: timedelta, ends: timedelta, message: str, root: Signer, tmp_path: Path
) -> None:
    directory = root.ours(tmp_path / "client", CLIENT, starts=starts, ends=ends)
    with pytest.raises(TlsError) as caught:
        Tls(directory)
    assert message in one_line(caught.value)
    assert "clock" in str(caught.value)


def test_a_certificate_that_ends_while_its_connection_lives(root: Signer, tmp_path: Path) -> None:
    client = Tls(root.ours(tmp_path / "client", CLIENT, ends=timedelta(seconds=2.5)))
    with dealing(Tls(root.ours(tmp_path / "dealer", DEALER))) as dealer, peer_of(dealer.at, client) as peer:
        with pytest.raises(HandshakeError, match="this dealer"):
            call(peer)
        time.sleep(3)
        with pytest.raises(TlsError) as caught:
            call(peer)
    assert "the certificate of the caller has expired" in one_line(caught.value)


# files


def test_keys_that_others_can_read(root: Signer, tmp_path: Path) -> None:
    directory = root.ours(tmp_path / "client", CLIENT)
    for mode in (0o640, 0o604, 0o660, 0o644):
        (directory / "key.pem").chmod(mode)
        with pytest.raises(TlsError) as caught:
            Tls(directory)
        said = f"the key of TLS: others may read or write {directory / 'key.pem'} (mode {mode:04o})"
        assert one_line(caught.value) == said
        assert f"chmod {mode & 0o700:o} {directory / 'key.pem'}" in str(caught.value)
    for mode in (0o600, 0o400):
        (directory / "key.pem").chmod(mode)
        Tls(directory)


@pytest.mark.parametrize("name", ["cert.pem", "key.pem", "ca.pem", "revoked.pem", "tls.toml"])
def test_files_that_are_damaged(name: str, root: Signer, other: Signer, tmp_path: Path) -> None:
    directory = root.ours(tmp_path / "client", CLIENT)
    root.revoke(directory, directory)  # only to have a list that is well formed
    for data in (b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"x" * (2 << 20)):
        if name == "tls.toml" and data == b"":
            continue
        path = directory / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(data)
        with pytest.raises(TlsError, match=name.replace(".", r"\.")):
            Tls(directory)
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


@pytest.mark.parametrize("name", ["ca.pem", "tls.toml", "cert.pem"])
def test_files_that_others_can_write(name: str, root: Signer, tmp_path: Path) -> None:
    """Who writes to ca.pem or tls.toml decides who is believed."""
    where = root.ours(tmp_path / "client", CLIENT)
    (where / "tls.toml").touch()
    (where / name).chmod(0o666)
    with pytest.raises(TlsError, match=rf"others may write .*{name} \(mode 0666\)\nhint: chmod go-w"):
        Tls(where)
    (where / name).chmod(0o644)
    beside = tmp_path / "elsewhere"
    (where / name).rename(beside)
    (where / name).symlink_to(beside)  # as systems keep the certificates of authorities
    Tls(where)


def test_files_that_do_not_fit_together(root: Signer, other: Signer, tmp_path: Path) -> None:
    one, two = root.ours(tmp_path / "one", CLIENT), root.ours(tmp_path / "two", CLIENT)
    shutil.copy(two / "key.pem", one / "key.pem")
    with pytest.raises(TlsError, match=r"key\.pem is not the key of the certificate in .*cert\.pem"):
        Tls(one)
    other.revoke(two, two)
    with pytest.raises(TlsError, match=r"revoked\.pem holds a revocation list that no authority of ca\.pem has signed"):
        Tls(two)
    root.revoke(two, two)
    with pytest.raises(TlsError, match="the certificate of this side was revoked"):
        Tls(two)
    with pytest.raises(TlsError, match="no directory"):
        Tls(tmp_path / "none")
    with pytest.raises(TlsError, match=r"cert\.pem cannot be read: No such file"):
        Tls(tmp_path)
    both = root.ours(tmp_path / "both", CLIENT, trusted=[root, other])
    with pytest.raises(TlsError, match="trusts 2 authorities, and any of them could name any role"):
        Tls(both)
    assert "PRIVATE" not in repr(Tls(root.ours(tmp_path / "three", CLIENT)).credentials)


def test_several_authorities_may_not_issue_the_same_names(root: Signer, other: Signer, tmp_path: Path) -> None:
    """A partner's authority without constraints could name its own holder the dealer."""
    both = root.ours(tmp_path / "both", CLIENT, trusted=[root, other])
    for pattern, said in (
        ("spiffe://a/dealer", "may issue every name that 'spiffe://a/dealer' stands for"),
        ("cn:dealer", "has the pattern 'cn:dealer' of common names"),
    ):
        (both / "tls.toml").write_text(f'[roles]\n"{pattern}" = "dealer"\n')
        with pytest.raises(TlsError, match=said):
            Tls(both)
    made = [Authority.make(tmp_path / name, domain=f"{name}.example") for name in ("acme", "partner")]
    where = made[0].issue("client", "ann")
    (where / "ca.pem").write_bytes(b"".join((a.directory / "authority" / "ca.pem").read_bytes() for a in made))
    (where / "tls.toml").write_text('[roles]\n"spiffe://acme.example/unseen/client/*" = "client"\n')
    (where / "revoked.pem").unlink()
    assert len(Tls(where).credentials.authorities) == 2


def test_single_files(root: Signer, tmp_path: Path) -> None:
    client = root.ours(tmp_path / "client", CLIENT)
    network = Tls(certificate=client / "cert.pem", key=client / "key.pem", authority=client / "ca.pem")
    with dealing(Tls(root.ours(tmp_path / "dealer", DEALER))) as dealer:
        assert reached(ask(dealer.at, network))
    with pytest.raises(TlsError, match="give a directory, or all three files"):
        Tls(certificate=client / "cert.pem")


def test_validity_is_said_and_warned_of(root: Signer, tmp_path: Path) -> None:
    def said(left: float, past: float = 60.0) -> str:
        life = {"starts": timedelta(days=-past), "ends": timedelta(days=left)}
        (line,) = Tls(root.ours(tmp_path / f"{left}", CLIENT, **life)).about()
        return line

    assert said(29.5).startswith("TLS 1.3: the certificate 'spiffe://unseen.internal/unseen/client/x' is valid until ")
    assert "(29 days), its authority 'root' is valid until" in said(29.5)
    assert said(13.5).startswith("warning: TLS 1.3: ")
    assert "(13 days, renew it)" in said(13.5)
    assert said(1.5, past=2.5).startswith("TLS 1.3: ")  # more than a third of its life
    assert "(24.0 hours, renew it)" in said(1.0001, past=2.5)
    ending = Signer.make("ending", days=5)
    (line,) = Tls(ending.ours(tmp_path / "x", CLIENT)).about()
    assert line.startswith("warning: ")  # the authority's end counts too


# files that change


def test_a_service_takes_new_files_at_once(made: Authority, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dealer, client = made.directory / "dealer", made.directory / "client"
    network = Tls(client)
    with dealing(Tls(dealer)) as served, peer_of(served.at, network) as peer:
        for _ in range(2):
            with pytest.raises(HandshakeError, match="this dealer"):
                call(peer)
        before = _shown(served.at, client)
        made.renew(dealer)
        assert _shown(served.at, client) != before  # who connects from now on sees the new one
        for _ in range(2):
            with pytest.raises(HandshakeError, match="this dealer"):
                call(peer)  # and who was connected goes on
        made.renew(client)
        with pytest.raises(HandshakeError, match="this dealer"):
            call(peer)
    said = [r.getMessage() for r in caplog.records if r.name == "unseen.tls"]
    assert sum(line.startswith("new TLS files are in use") for line in said) == 2


def _shown(at: Endpoint, client: Path) -> bytes:
    """The certificate that a service shows."""
    context = ssl.create_default_context(cafile=str(client / "ca.pem"))
    context.check_hostname = False
    context.load_cert_chain(client / "cert.pem", client / "key.pem")
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((at.host, at.port)) as raw, context.wrap_socket(raw) as secured:
        return secured.getpeercert(binary_form=True) or b""


def test_new_files_that_are_broken(made: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """They are reported once, and the old ones go on, on both sides; when they are mended they are taken."""
    dealer, client = made.directory / "dealer", made.directory / "client"
    with dealing(Tls(dealer)) as served, peer_of(served.at, Tls(client)) as peer:
        for directory in (dealer, client):
            for name in ("cert.pem", "key.pem", "ca.pem", "revoked.pem"):
                caplog.clear()
                before = (directory / name).read_bytes()
                (directory / name).write_bytes(b"garbage")
                for _ in range(3):
                    with pytest.raises(HandshakeError, match="this dealer"):
                        call(peer)
                    assert _shown(served.at, made.directory / "server")
                (line,) = (r.getMessage() for r in caplog.records if r.name == "unseen.tls")
                assert line.startswith("new TLS files are not used, the old ones go on: ")
                assert name in line
                (directory / name).write_bytes(before)
        (client / "revoked.pem").unlink()
        with pytest.raises(HandshakeError, match="this dealer"):
            call(peer)
        assert "is gone" in caplog.records[-1].getMessage()


def test_a_peer_that_comes_back_with_a_new_certificate(made: Authority) -> None:
    dealer = made.directory / "dealer"
    first = Dealer(Tls(dealer))
    with peer_of(first.at, Tls(made.directory / "client")) as peer:
        with pytest.raises(HandshakeError, match="this dealer"):
            call(peer)
        first.stop()
        made.renew(dealer)
        second = Dealer(Tls(dealer), listen=first.at)
        try:
            time.sleep(0.05)  # gRPC notices that the connection is gone
            with pytest.raises(HandshakeError, match="this dealer"):
                call(peer)
        finally:
            second.stop()
        time.sleep(0.5)
        with pytest.raises(HandshakeError, match="cannot be reached"):
            call(peer)


def test_a_peer_that_is_revoked_while_connected(made: Authority, caplog: pytest.LogCaptureFixture) -> None:
    with dealing(Tls(made.directory / "dealer")) as served, peer_of(served.at, Tls(made.directory / "client")) as peer:
        with pytest.raises(HandshakeError, match="this dealer"):
            call(peer)
        made.revoke(str(made.directory / "dealer"))
        with pytest.raises(TlsError) as caught:
            call(peer)
        assert one_line(caught.value).startswith(f"the certificate of the dealer at {served.at} was revoked")
        ask(served.at, Tls(made.directory / "server"))
    (line,) = {r.getMessage() for r in caplog.records if "of this side was revoked" in r.getMessage()}
    assert line.startswith("the certificate 'spiffe://unseen.internal/unseen/dealer/dealer' of this side was revoked")


def test_a_caller_that_is_revoked_while_connected(made: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """On its next call, though its own side does not know that it was revoked."""
    alone = shutil.copytree(made.directory / "client", made.directory.parent / "elsewhere")
    with dealing(Tls(made.directory / "dealer")) as served, peer_of(served.at, Tls(alone)) as peer:
        with pytest.raises(HandshakeError, match="this dealer"):
            call(peer)
        made.revoke(str(made.directory / "client"))
        with pytest.raises(TlsError) as caught:
            call(peer)
    assert one_line(caught.value).startswith(f"the dealer at {served.at} refused (opening a session): "
                                             "the certificate of the caller was revoked")  # fmt: skip
    (line,) = (r.getMessage() for r in caplog.records if r.name == "unseen.guard")
    assert line.startswith("refused a call of 127.0.0.1:")
    assert "the certificate of the caller was revoked ('spiffe://unseen.internal/unseen/client/client'" in line


# certificates of others


def test_certificates_of_a_corporate_authority(tmp_path: Path) -> None:
    """An intermediate authority, names of their own, and roles in tls.toml."""
    top = Signer.make("Acme Root")
    issuing = Signer.make("Acme Issuing", top)
    options: Any = {"trusted": [top], "between": [issuing]}
    uri, dns = x509.UniformResourceIdentifier, x509.DNSName
    dealer = issuing.holder(tmp_path / "dealer", [dns("unseen-dealer.acme.example")], **options)
    client = issuing.holder(tmp_path / "client", [uri("spiffe://acme/ns/prod/sa/unseen-client")], **options)
    person = issuing.holder(tmp_path / "person", [], common_name="Alice", **options)
    nobody = issuing.holder(tmp_path / "nobody", [uri("spiffe://acme/ns/prod/sa/other")], **options)
    posing = issuing.holder(tmp_path / "posing", [uri("spiffe://unseen.internal/unseen/client/x")], **options)
    (dealer / "tls.toml").write_text(
        '[roles]\n"spiffe://acme/ns/*/sa/unseen-client" = "client"\n"cn:Alice" = "client"\n'
    )
    for each in (client, person, nobody, posing):
        (each / "tls.toml").write_text('[names]\ndealer = "unseen-dealer.acme.example"\n')
    found: list[Caller] = []

    class Noting(DealerService):
        def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
            found.append(caller(context))
            return super().Open(request, context)

    with dealing(Tls(dealer), Noting(KEY)) as served:
        for allowed in (client, person):
            assert reached(ask(served.at, Tls(allowed)))
        for refused in (nobody, posing):  # the URIs of `unseen certs` mean nothing where tls.toml has roles
            assert "names no role" in one_line(ask(served.at, Tls(refused)))
        other = Tls(client, names={"dealer": "another.acme.example"})
        assert "'unseen-dealer.acme.example', where 'another.acme.example' is expected" in one_line(
            ask(served.at, other)
        )
        inline = Tls(client, names={"dealer": "*.acme.example"}, roles={})
        assert reached(ask(served.at, inline))
    assert [(c.name, c.role) for c in found[:2]] == [
        ("spiffe://acme/ns/prod/sa/unseen-client", CLIENT),
        ("Alice", CLIENT),
    ]
    with pytest.raises(TlsError, match="has no DNS name"), dealing(Tls(client, roles={"spiffe://a/b": "dealer"})):
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[name]\nserver = "a.example"\n', "tls.toml cannot be read: name: unknown"),
        ('[roles]\n"spiffe://a/c" = 1\n', "tls.toml cannot be read: roles.spiffe://a/c: input should be a"),
        ('[roles]\n"spiffe://a/c" = "clint"\n', "tls.toml: there is no role 'clint'\nhint: one of client, dealer,"),
        ('[names]\nsever = "a.example"\n', "tls.toml: there is no role 'sever'"),
    ],
)
def test_a_mistake_in_tls_toml_is_named(text: str, said: str) -> None:
    with pytest.raises(TlsError) as caught:
        Naming.read(text, "tls.toml")
    assert str(caught.value).startswith(said)


def test_a_party_is_named_in_both_ways() -> None:
    """A pattern for "party 0" was passed over: whoever had the role could answer."""
    for named in ("party 0", "party-0"):
        assert Naming({named: "zero.acme.example"}, {}).sni("party 0") == "zero.acme.example"


# the authority


def test_an_authority(made: Authority, tmp_path: Path) -> None:
    own = made.directory / "authority"
    assert oct(own.stat().st_mode)[-3:] == "700"
    for key in (own / "ca-key.pem", *made.directory.glob("*/key.pem")):
        assert oct(key.stat().st_mode)[-3:] == "600"
    alice = made.issue(CLIENT, "alice", days=30)
    assert alice == made.directory / "client-alice"
    with pytest.raises(InvalidInput, match="holds a certificate already"):
        made.issue(CLIENT, "alice")
    for name in ("", "a/b", "../x", "a b", "é", "x" * 65):
        with pytest.raises(InvalidInput, match="is not a name"):
            made.issue(CLIENT, name)
    with pytest.raises(InvalidInput, match="already"):
        Authority.make(made.directory)
    for domain in ("", "A", "a b", "a..b", "spiffe://x"):
        with pytest.raises(InvalidInput, match="is not a domain"):
            Authority.make(tmp_path / "x", domain=domain)
    again = Authority(made.directory)
    (found,) = (each for each in again.listed() if each.name == "alice")
    for way in (str(alice), str(alice / "cert.pem"), found.certificate.serial):
        assert again.revoke(way).name == "alice"
    with pytest.raises(InvalidInput, match="was not issued by"):
        again.revoke("12ab")
    assert [each.name for each in again.listed() if each.revoked] == ["alice"]
    strange = Authority.make(tmp_path / "other").issue("dealer", "dealer")
    with pytest.raises(InvalidInput, match=r"a certificate that the authority in .* has not issued"):
        again.renew(strange)
    again.renew(again.issue(CLIENT, "bob"))
    (own / "ca-key.pem").chmod(0o644)
    with pytest.raises(TlsError, match="others may read or write"):
        Authority(made.directory)


def test_the_authority_names_only_its_own_domain(made: Authority, root: Signer, tmp_path: Path) -> None:
    """Its certificate says so, and both OpenSSL and gRPC's BoringSSL hold it to that."""
    constraints = made.certificate.parsed.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
    signer = Signer(made._key, made.certificate.parsed)
    uri = x509.UniformResourceIdentifier("spiffe://elsewhere.example/unseen/dealer/x")
    stranger = signer.holder(tmp_path / "x", [x509.DNSName("dealer.unseen.internal"), uri])
    with FakePeer(stranger) as fake:
        assert "permitted subtree violation" in one_line(ask(fake.address, Tls(made.directory / "client")))
    with dealing(Tls(made.directory / "dealer")) as dealer:
        assert "refuses our certificate" in one_line(ask(dealer.at, Tls(stranger)))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "c"

    def certs(*arguments: str) -> str:
        app()(["certs", str(where), *arguments], standalone_mode=False)
        told = capsys.readouterr()
        return told.out + told.err

    for asked in ("--list", "--renew", "--revoke=1"):
        with pytest.raises(InvalidInput, match="there is no authority in"):
            certs(asked)
    assert certs("--domain", "acme.example").count("alone, it holds a key") == len(ROLES)
    assert "client-alice" in certs("client", "--name", "alice", "--days", "30")
    assert "revoked client alice" in certs("--revoke", str(where / "client-alice"))
    listed = {(each["role"], each["name"]): each["state"] for each in json.loads(certs("--json"))}
    assert listed == {**{(r, r.replace(" ", "-")): "valid" for r in ROLES}, (CLIENT, "alice"): "revoked"}
    assert "acme.example" in certs()
    before = (where / "server" / "cert.pem").read_bytes()
    assert certs("--renew", "server").count("renewed") == 1
    assert (where / "server" / "cert.pem").read_bytes() != before
    said = certs("--renew")  # whom somebody has revoked gets no new certificate by the way
    assert said.count("renewed; copy") == len(ROLES)
    assert "client-alice: revoked, so it is renewed only if it is named" in said
    assert certs("--renew", "client-alice").count("renewed; copy") == 1
    for wrong, message in (
        (["bishop"], "unknown role 'bishop'"),
        (["--domain", "x.example"], "--domain is for a new authority"),
        (["--name", "a"], "--name is for one new certificate"),
        (["client", "dealer", "--name", "a"], "--name is for one new certificate"),
        (["--renew", "nobody"], "there is no certificate in"),
        (["client"], "holds a certificate already"),
    ):
        with pytest.raises(InvalidInput, match=message):
            certs(*wrong)
    for role in ROLES:
        Tls(where / role.replace(" ", "-"))


# the network that is chosen


def test_the_default_network(made: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSEEN_TLS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert network_of("party 0") == Plaintext()
    shutil.copytree(made.directory, tmp_path / "config" / "unseen" / "tls")
    for role in ROLES:
        found = network_of(role)
        assert isinstance(found, Tls)
        assert found.files.key.parent.name == role.replace(" ", "-")
    monkeypatch.setenv("UNSEEN_TLS", str(made.directory / "server"))
    assert repr(network_of(SERVER)) == f"Tls({str(made.directory / 'server' / 'cert.pem')!r})"
    assert network_of(SERVER, insecure=True) == Plaintext(beyond_loopback=True)
    with pytest.raises(InvalidInput, match="exclude each other"):
        network_of(SERVER, directory=tmp_path, insecure=True)
    monkeypatch.setenv("UNSEEN_TLS", str(tmp_path / "none"))
    with pytest.raises(TlsError, match="no directory"):  # never silently plaintext
        network_of(SERVER)


def test_an_address_is_resolved_once(monkeypatch: pytest.MonkeyPatch, root: Signer, tmp_path: Path) -> None:
    """A name that somebody else controls gives another address when it is asked again."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def changing(host: Any, *rest: Any, **named: Any) -> Any:
        if host != "rebind.example":
            return real(host, *rest, **named)
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "192.0.2.7", *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    with dealing(Plaintext()) as dealer:
        assert reached(ask(Endpoint("rebind.example", dealer.at.port), Plaintext()))
        assert len(asked) == 1
        with pytest.raises(EndpointError, match="not on this machine"):
            Plaintext().channel(Endpoint("rebind.example", dealer.at.port), what="it", role=DEALER)
    asked.clear()
    with dealing(Tls(root.ours(tmp_path / "dealer", DEALER))) as dealer:
        ours = Tls(root.ours(tmp_path / "client", CLIENT))
        assert reached(ask(Endpoint("rebind.example", dealer.at.port), ours))
        assert len(asked) == 1


# whole queries


def test_two_parties(made: Authority, model: Ready, tmp_path: Path) -> None:
    def network(role: str) -> Tls:
        return Tls(made.directory / role)

    with ExitStack() as stack:
        dealer = stack.enter_context(
            secure.serve(role=DEALER, deployment=TwoParty(), network=network(DEALER), state=tmp_path / "d")
        )
        peers = {DEALER: dealer.address}
        server = stack.enter_context(
            secure.serve(model.compiled, role=SERVER, peers=peers, state=tmp_path, network=network(SERVER))
        )
        assert any("TLS 1.3" in line for line in server.about)
        located = TwoParty(server=server.address, dealer=dealer.address)
        with secure.connect(located, network=network(CLIENT), cache=False) as session:
            (answer,) = session.embed([TEXT])
            assert answer.isfinite().all()
        with pytest.raises(PeerLost, match="closed the connection"):
            secure.connect(located, network=Plaintext(), cache=False)
        with pytest.raises(TlsError, match="only client may"):
            secure.connect(located, network=network(SERVER), cache=False)
        swapped = TwoParty(server=dealer.address, dealer=server.address)
        with pytest.raises(TlsError, match="shows the certificate of a dealer"):
            secure.connect(swapped, network=network(CLIENT), cache=False)


def test_three_parties(made: Authority, directory: Path, tmp_path: Path) -> None:
    shares = shared(directory, tmp_path / "shares", "one-hot")
    with ExitStack() as stack:
        addresses: dict[str, str] = {}
        for role in deployments.starting_order(ThreeParty()):
            name = role.name.replace(" ", "-")
            service = secure.serve(
                shares / name,
                role=role.name,
                peers={peer: addresses[peer] for peer in role.peers},
                deployment=ThreeParty(),
                network=Tls(made.directory / name),
            )
            addresses[role.name] = stack.enter_context(service).address
        located = ThreeParty(parties=tuple(addresses[f"party {n}"] for n in range(3)))
        with secure.connect(located, network=Tls(made.directory / "client"), cache=False) as session:
            for _ in range(2):
                assert session.embed([TEXT])[0].isfinite().all()
        swapped = ThreeParty(parties=located.parties[::-1])
        with pytest.raises(TlsError, match=r"party 0 at .* shows the certificate of a party 2"):
            secure.connect(swapped, network=Tls(made.directory / "client"), cache=False)


def test_ckks(made: Authority, tmp_path: Path) -> None:
    compiled = ckks_server.compiled("tiny")
    with secure.serve(compiled, role=SERVER, state=tmp_path, network=Tls(made.directory / "server")) as server:
        located = secure.Ckks(server=server.address)
        with secure.connect(located, network=Tls(made.directory / "client"), cache=False) as session:
            assert session.query(ckks_server.inputs("tiny")).isfinite().all()


# the log of a service


def test_lines_of_the_core_in_words() -> None:
    begin = b"I1126 18:01:19.380704   13656 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
    failed = begin + b"error:1000007d:SSL routines:OPENSSL_internal:"
    for reason, words in (
        (b"CERTIFICATE_VERIFY_FAILED: certificate has expired", "the caller's certificate has expired"),
        (b"CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", "is not valid yet; compare the clocks"),
        (b"CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "that ca.pem does not hold"),
        (b"PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid certificate verification context", "shows no certificate"),
        (b"BAD_PACKET_LENGTH: Invalid certificate verification context", "broke off; it may not trust"),
        (b"WRONG_VERSION_NUMBER: Invalid certificate verification context", "does not speak TLS;"),
        (b"NO_SHARED_CIPHER: Invalid certificate verification context", "does not speak TLS 1.3"),
        (b"SOMETHING_NEW: x", "refused a connection: SOMETHING_NEW: x"),
    ):
        assert words in (core_log.in_words(failed + reason + b"\n") or "")
    looked = b"E1126 18:15:06.051323   32130 ssl_transport_security.cc:3238] No match found for server name: a.b\n"
    assert "a caller looks for 'a.b' here" in (core_log.in_words(looked) or "")
    for line in (b"", b"x\n", b"I am well\n", b"E1126 18:06:01.4 15876 chttp2_transport.cc:1403] goaway\n"):
        assert core_log.in_words(line) is None


def test_other_output_passes_unchanged() -> None:
    """Whole lines and parts of lines, by Python and by others, until the very end."""
    code = """
import os, sys, time, threading
from parties.cli.core_log import CoreLog
CoreLog()
os.write(2, b"no newline")
time.sleep(0.2)
sys.stderr.write("[python]")
os.write(2, b"\\xff\\n")
time.sleep(0.2)
os.write(2, b"".join(b"%d\\n" % i for i in range(100000)))
os.write(2, b"I cannot be the core\\nI")
"""
    command, environment = hosting.child("x")
    done = subprocess.run([command[0], "-c", code], env=environment, stderr=subprocess.PIPE, timeout=60, check=True)
    numbers = b"".join(b"%d\n" % i for i in range(100000))
    assert done.stderr == b"no newline[python]\xff\n" + numbers + b"I cannot be the core\nI"


@contextmanager
def started(*arguments: str) -> Iterator[tuple[Endpoint, Callable[[], list[str]]]]:
    """A command of its own: its address, and the lines of its log so far."""
    command, environment = hosting.child("parties.cli", *arguments, "--listen", "127.0.0.1:0", "--announce")
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    os.set_blocking(child.stderr.fileno(), False)
    said: list[str] = []

    def lines() -> list[str]:
        said.extend(child.stderr)  # type: ignore[arg-type]
        return "".join(said).splitlines()

    try:
        first = child.stdout.readline()
        assert first, child.stderr.read()
        yield Endpoint.parse(json.loads(first)["listening"], what="x"), lines
    finally:
        child.terminate()
        child.wait(timeout=30)
        child.stdout.close()
        child.stderr.close()


def test_a_service_logs_one_line_for_each_refused_caller(root: Signer, other: Signer, tmp_path: Path) -> None:
    service = root.ours(tmp_path / "dealer", DEALER)
    good = root.ours(tmp_path / "client", CLIENT)
    wrong = other.ours(tmp_path / "wrong", CLIENT, trusted=[root])

    def raw(directory: Path | None) -> None:
        shown = [(directory / n).read_bytes() for n in ("key.pem", "cert.pem")] if directory else [None, None]
        name = [("grpc.ssl_target_name_override", "dealer.unseen.internal")]
        credentials = grpc.ssl_channel_credentials(root.pem, *shown)
        with grpc.secure_channel(str(at), credentials, name) as channel, pytest.raises(grpc.RpcError):
            DealerStub(channel).Open(OPEN, timeout=5)

    with started("dealer", "--tls", str(service)) as (at, lines):
        for what, provoke, said in (
            ("plaintext", lambda: ask(at, Plaintext()), "the caller does not speak TLS; it needs --tls DIRECTORY"),
            ("wrong CA", lambda: ask(at, Tls(wrong)), "signed by an authority that ca.pem does not hold"),
            (
                "expired",
                lambda: raw(root.ours(tmp_path / "old", CLIENT, starts=-50 * HOUR, ends=-HOUR)),
                "the caller's certificate has expired",
            ),
            (
                "a clock an hour off",
                lambda: raw(root.ours(tmp_path / "new", CLIENT, starts=HOUR)),
                "the caller's certificate is not valid yet; compare the clocks of both machines",
            ),
            ("no certificate", lambda: raw(None), "the caller shows no certificate"),
            ("wrong role", lambda: ask(at, Tls(good), SERVER), "a caller looks for 'server.unseen.internal' here"),
            ("not allowed", lambda: ask(at, Tls(root.ours(tmp_path / "p", "party 0"))), "only client may"),
        ):
            before = len(lines())
            provoke()
            wait_until(lambda: len(lines()) > before, what)  # noqa: B023
            time.sleep(0.2)
            (line,) = lines()[before:]
            assert said in line, what
            assert " WARNING unseen." in line
        assert reached(ask(at, Tls(good)))
