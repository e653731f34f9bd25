"""Peers of other versions: each side says which versions meet and who is to be updated, and nothing is computed.

Version 3 is version 0.3.0 of the package: the same services, whose messages carry no sums. Callers of it are made of
bytes here, and services of it answer without sums.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

import secure
from parties import deployments
from parties.deployments import starting_order
from parties.net.network import Plaintext
from parties.net.peer import Peer
from parties.net.summed import MethodSums
from parties.net.versions import of_other_package
from parties.proto import unseen_pb2 as pb
from parties.services.hosting import Service
from parties.services.status import ask_status
from parties.three_party.agreement import KeyOfCallee
from parties.three_party.shared_model import load_share
from secure.deployments.three_party import PARTIES, ThreeParty
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.errors import Error, HandshakeError, OtherVersion, PeerLost
from secure.version import WIRE_VERSION
from tests.ckks_server import compiled, dial, inputs
from tests.dealer_key import KEY
from tests.three_parties import shared
from tests.tiny import TEXT, Ready

SERVICES = {
    "server": ("Model", "Status", "Inference"),
    "dealer": ("Status", "Dealer"),
    "CKKS server": ("Model", "Status", "Ckks"),
    **dict.fromkeys(PARTIES, ("Model", "Status", "Party")),
}
METHODS = {f"{name}/{m.name}": m for name, s in pb.DESCRIPTOR.services_by_name.items() for m in s.methods}
NEWER = WIRE_VERSION + 1


@dataclass(frozen=True)
class Everywhere:
    """A running service of each role, by name, and queries that show that it works."""

    services: dict[str, Service]
    queries: dict[str, Callable[[], object]]

    def address(self, role: str) -> str:
        return self.services[role].address


@pytest.fixture(scope="module")
def shares(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(directory, tmp_path_factory.mktemp("shares"), "one-hot")


@pytest.fixture(scope="module")
def everywhere(model: Ready, shares: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everywhere]:
    with ExitStack() as stack:
        made = dict[str, Service]()

        def serve(name: str, *what: Any, **given: Any) -> None:
            made[name] = stack.enter_context(deployments.serve(*what, **given))

        serve(DEALER, role=DEALER, deployment=TwoParty())
        serve(SERVER, model.compiled, role=SERVER, peers={DEALER: made[DEALER].address})
        serve("CKKS server", compiled("tiny"), role=SERVER, state=tmp_path_factory.mktemp("keys"))
        for role in starting_order(ThreeParty()):
            peers = {name: made[name].address for name in role.peers if name in made}
            share = shares / role.name.replace(" ", "-")
            serve(role.name, share, role=role.name, deployment=ThreeParty(), peers=peers)
        two = stack.enter_context(
            secure.connect(TwoParty(server=made[SERVER].address, dealer=made[DEALER].address), cache=False)
        )
        three = stack.enter_context(
            secure.connect(ThreeParty(parties=tuple(made[role].address for role in PARTIES)), cache=False)
        )
        ckks = stack.enter_context(dial(made["CKKS server"].address))
        asks: dict[str, Callable[[], object]] = {
            "two": lambda: two.embed([TEXT]),
            "three": lambda: three.embed([TEXT]),
            "ckks": lambda: ckks.query(inputs("tiny")),
        }
        yield Everywhere(made, asks)
        for ask in asks.values():  # after all that strangers said, sessions that began before go on
            ask()


def told(channel: grpc.Channel, method: str, message: bytes, *, streams: bool, answers: bool) -> str:
    """What a service says to a caller who sends these bytes, in a failure or in the status."""
    made: Any = getattr(channel, f"{'stream' if streams else 'unary'}_{'stream' if answers else 'unary'}")(method)
    request = iter([message]) if streams else message
    try:
        found = made(request, timeout=10)
        replies = list(found) if answers else [found]
    except grpc.RpcError as error:
        return str(error.details())
    (reply,) = replies
    answer: Any = GetMessageClass(METHODS[method.partition("v3.")[2]].output_type).FromString(reply)
    assert isinstance(answer.failure, pb.Failure)
    assert answer.failure.code == "version"
    said: str = answer.failure.message
    return said


AMONG_PARTIES = {
    "Party/Agree": ("party 0", "party 2"),
    "Party/Compute": ("party 0",),
    **dict.fromkeys(("Party/Supply", "Party/Contribute", "Party/Seed"), ("party 2",)),
}
OLD_CALLERS = [
    (role, name)
    for role, services in SERVICES.items()
    for name in METHODS
    if name.split("/")[0] in services and role in AMONG_PARTIES.get(name, (role,))
]


@pytest.mark.parametrize(("role", "name"), OLD_CALLERS, ids=[f"{role}: {name}" for role, name in OLD_CALLERS])
def test_every_method_refuses_a_caller_of_version_3(role: str, name: str, everywhere: Everywhere) -> None:
    method = METHODS[name]
    message: Any = GetMessageClass(method.input_type)()
    if "version" in message.DESCRIPTOR.fields_by_name:
        message.version = 3
    with grpc.insecure_channel(everywhere.address(role)) as channel:
        said = told(
            channel,
            f"/unseen.v3.{name}",
            message.SerializeToString(),
            streams=method.client_streaming,
            answers=method.server_streaming,
        )
    assert f"speaks an older version of unseen's messages than version {WIRE_VERSION}" in said
    assert "\nhint: update the caller" in said


@pytest.mark.parametrize("role", SERVICES)
@pytest.mark.parametrize(
    ("package", "theirs", "older"),
    [
        ("unseen.v2", 2, "the caller"),
        ("unseen", 1, "the caller"),
        ("unseen.v9", 9, "this service"),
    ],
)
def test_services_of_other_packages_are_known(
    role: str, package: str, theirs: int, older: str, everywhere: Everywhere
) -> None:
    with grpc.insecure_channel(everywhere.address(role)) as channel:
        said = told(channel, f"/{package}.Model/Describe", b"", streams=False, answers=False)
    assert f"the caller speaks version {theirs} of" in said
    assert f"this service version {WIRE_VERSION}\nhint: update {older}: " in said


def test_other_methods_are_nobodys(everywhere: Everywhere) -> None:
    for method in (
        "/unseen.v3.Model/Nothing",
        "/other.v2.Model/Describe",
        "/grpc.health.v1.Health/Watch",
        "/unseen.v2",
    ):
        assert of_other_package(method) is None
    with grpc.insecure_channel(everywhere.address(SERVER)) as channel:
        unknown: Any = channel.unary_unary("/unseen.v3.Model/Nothing")
        with pytest.raises(grpc.RpcError) as caught:
            unknown(b"", timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_fields_of_versions_to_come_are_passed_over(everywhere: Everywhere) -> None:
    """A message with a field that this version does not know is served: protobuf leaves it out."""
    method = "/unseen.v3.Model/Describe"
    sums = MethodSums(method)
    unknown = b"\xa2\x06\x03abc"  # field 100, three bytes
    with grpc.insecure_channel(everywhere.address(SERVER)) as channel:
        made: Any = channel.unary_unary(method)
        answer = made(sums.put(unknown), timeout=10)
    kept = sums.take(answer)
    assert kept is not None
    assert pb.Description.FromString(bytes(kept)).version == WIRE_VERSION


def summed(channel: grpc.Channel, name: str, message: Any) -> str:
    """What a service says to a message with a sum."""
    path, method = f"/unseen.v3.{name}", METHODS[name]
    data = MethodSums(path).put(message.SerializeToString())
    return told(channel, path, data, streams=method.client_streaming, answers=method.server_streaming)


@pytest.mark.parametrize("theirs", [0, 3, NEWER])
@pytest.mark.parametrize(
    ("role", "name", "message", "who", "here"),
    [
        (
            SERVER,
            "Inference/Session",
            lambda v: pb.ClientMessage(hello=pb.Hello(version=v)),
            "the client",
            "this server",
        ),
        (DEALER, "Dealer/Open", lambda v: pb.OpenRequest(version=v), "the client", "this dealer"),
        ("party 0", "Party/Ask", lambda v: pb.AskPart(start=pb.AskStart(version=v)), "the client", "party 0"),
        ("party 1", "Party/Ask", lambda v: pb.AskPart(start=pb.AskStart(version=v)), "the client", "party 1"),
        ("party 2", "Party/Ask", lambda v: pb.AskPart(start=pb.AskStart(version=v)), "the client", "party 2"),
        (
            "party 0",
            "Party/Agree",
            lambda v: pb.AgreeMessage(hello=pb.AgreeHello(version=v, party=1)),
            "party 1",
            "party 0",
        ),
        ("party 0", "Party/Compute", lambda v: pb.PeerMessage(hello=pb.PeerHello(version=v)), "party 1", "party 0"),
    ],
)
def test_whoever_greets_with_another_version_is_refused(
    role: str, name: str, message: Any, who: str, here: str, theirs: int, everywhere: Everywhere
) -> None:
    """Before anything else of the greeting is looked at, which may mean something else in that version."""
    with grpc.insecure_channel(everywhere.address(role)) as channel:
        said = summed(channel, name, message(theirs))
    older = here if theirs > WIRE_VERSION else who
    assert said == (
        f"version: {who} speaks version {theirs} of unseen's messages, {here} version {WIRE_VERSION}\n"
        f"hint: update {older}: all sides need the same version of unseen"
    )


# clients and parties of today, and services of another version


@contextmanager
def foreign(version: int) -> Iterator[str]:
    """A service of all roles in one, of another version: it answers every method by an empty message of its kind.

    Of version 3, no message has a sum.
    """

    def handler(name: str, method: Any) -> Any:
        def answered() -> bytes:
            answer: Any = GetMessageClass(method.output_type)()
            if "version" in answer.DESCRIPTOR.fields_by_name:
                answer.version = version
            data: bytes = answer.SerializeToString()
            return data if version < WIRE_VERSION else MethodSums(f"/unseen.v3.{name}").put(data)

        def single(*_: Any) -> bytes:
            return answered()

        def several(*_: Any) -> Iterator[bytes]:
            yield answered()

        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        return getattr(grpc, f"{kind}_rpc_method_handler")(several if method.server_streaming else single)

    server = grpc.server(ThreadPoolExecutor(8))
    for service in pb.DESCRIPTOR.services_by_name.values():
        handlers = {m.name: handler(f"{service.name}/{m.name}", m) for m in service.methods}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service.full_name, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def said(version: int, who: str, here: str) -> str:
    """What is said of a service of another version."""
    if version > WIRE_VERSION:
        return rf"version: {who} .*speaks version {version} .*, {here} version {WIRE_VERSION}\nhint: update {here}"
    return rf"version: {who}.* speaks an older version .* than version {WIRE_VERSION}, .*\nhint: update {who}"


@pytest.mark.parametrize("version", [3, NEWER])
@pytest.mark.parametrize("kind", ["two", "three", "ckks"])
def test_a_client_says_that_a_service_has_another_version(kind: str, version: int, everywhere: Everywhere) -> None:
    with foreign(version) as address:
        first = {"two": "the server", "three": "party 0", "ckks": "the server"}[kind]
        deployment = {
            "two": TwoParty(server=address, dealer=everywhere.address(DEALER), dealer_key=KEY.public.text),
            "three": ThreeParty(parties=(address, everywhere.address("party 1"), everywhere.address("party 2"))),
            "ckks": secure.Ckks(server=address),
        }[kind]
        with pytest.raises(OtherVersion, match=said(version, first, "this client")):
            secure.connect(deployment, cache=False, deadline=10.0)


def test_a_client_says_that_the_dealer_has_another_version(everywhere: Everywhere) -> None:
    with foreign(3) as address:
        deployment = TwoParty(server=everywhere.address(SERVER), dealer=address, dealer_key=KEY.public.text)
        with pytest.raises(OtherVersion, match=said(3, "the dealer", "this client")):
            secure.connect(deployment, cache=False, deadline=10.0)


def test_a_party_that_was_not_updated_is_named(everywhere: Everywhere) -> None:
    with foreign(3) as address:
        addresses = (everywhere.address("party 0"), address, everywhere.address("party 2"))
        with pytest.raises(OtherVersion, match=said(3, "party 1", "this client")):
            secure.connect(ThreeParty(parties=addresses), cache=False, deadline=10.0)


def test_a_server_says_that_its_dealer_has_another_version(model: Ready) -> None:
    with foreign(3) as address, pytest.raises(OtherVersion, match=said(3, "the dealer", "")):
        deployments.serve(model.compiled, role=SERVER, peers={DEALER: address})


@pytest.mark.parametrize("version", [3, NEWER])
def test_parties_of_two_versions_agree_on_no_key(version: int, shares: Path) -> None:
    share = load_share(shares / "party-1")
    with foreign(version) as address:
        peer = Peer("party 0", address, Plaintext(), role="party 0", start="the test")
        key = KeyOfCallee(share, 0, peer, deadline=5.0, log=logging.getLogger("unseen.test"))
        try:
            with pytest.raises(OtherVersion if version < WIRE_VERSION else Error):
                key.key()
        finally:
            key.close()
            peer.close()


def test_what_status_says_of_an_older_service() -> None:
    """``unseen check`` asks it."""
    with foreign(3) as address:
        peer = Peer("the server", address, Plaintext(), role=SERVER, start="unseen serve")
        try:
            with pytest.raises(OtherVersion, match=said(3, "the server", "")):
                ask_status(peer)
        finally:
            peer.close()


def test_it_is_a_mistake_of_the_handshake_that_no_repeating_mends() -> None:
    assert issubclass(OtherVersion, HandshakeError)
    assert not issubclass(OtherVersion, PeerLost)
