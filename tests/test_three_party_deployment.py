"""A model shared among three servers over gRPC: answers, what is refused, and parties that fail or change bytes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.net.endpoints import open_channel
from parties.three_party import client
from parties.three_party import party_0 as zero
from parties.three_party import party_1 as one
from parties.three_party import party_2 as helper
from parties.three_party.client import ThreePartyConnection
from parties.three_party.pair_keys import Link
from parties.three_party.party_0 import ZeroService
from parties.three_party.party_1 import OneService
from parties.three_party.party_2 import HelperService
from parties.three_party.shared_model import MANIFEST, SEEDS, WEIGHTS, load_share
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import PartyStub
from protocols.prg import Key
from secure.errors import Error, HandshakeError, PartiesDisagree, PeerLost, ProtocolError, ShareError
from tests.three_parties import Three, running, shared
from tests.tiny import TEXT, Served, expected

EMBEDDINGS = ("one-hot", "client-table")


@pytest.fixture(scope="module")
def shares(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name, each made once."""
    base = tmp_path_factory.mktemp("shares")
    made = {name: shared(directory, base / name, name) for name in EMBEDDINGS}
    return made | {"public": shared(directory, base / "public", "one-hot", public_weights=True)}


@pytest.fixture(scope="module")
def three(shares: dict[str, Path]) -> Iterator[Three]:
    with running(shares["one-hot"]) as parties:
        yield parties


def close(directory: Path, answer: torch.Tensor) -> None:
    assert cosine_similarity(answer, expected(directory, TEXT), dim=0) > 0.9999


# answers


@pytest.mark.parametrize("name", [*EMBEDDINGS, "public"])
def test_answers_are_the_models(directory: Path, shares: dict[str, Path], name: str) -> None:
    with running(shares[name]) as three, three.dial() as connection:
        for _ in range(2):
            (answer,) = connection.embed([TEXT])
            close(directory, answer)
        predicted = three.parties[0].service.share.circuit.cost
        assert [report.cost for report in connection.reports] == [predicted] * 2


def test_party_2_is_not_asked_where_clients_hold_the_table(directory: Path, shares: dict[str, Path]) -> None:
    with running(shares["client-table"]) as three:
        three.parties = three.parties[:2]
        with three.dial() as connection:
            close(directory, connection.embed([TEXT])[0])


def test_a_look_up_in_a_shared_table_needs_party_2(three: Three) -> None:
    with Three(three.parties[:2]).dial() as connection, pytest.raises(Error, match="party 2 is needed"):
        connection.embed([TEXT])


def test_party_2_stores_no_weights(shares: dict[str, Path]) -> None:
    assert not (shares["one-hot"] / "party-2" / WEIGHTS).exists()
    assert (shares["one-hot"] / "party-2" / SEEDS).stat().st_mode & 0o077 == 0


def test_two_sharings_of_a_model_have_nothing_in_common(
    directory: Path, shares: dict[str, Path], tmp_path: Path
) -> None:
    other = shared(directory, tmp_path, "one-hot")
    for party in range(3):
        a, b = shares["one-hot"] / f"party-{party}", other / f"party-{party}"
        assert (a / SEEDS).read_bytes() != (b / SEEDS).read_bytes()
        if party < 2:
            assert (a / WEIGHTS).read_bytes() != (b / WEIGHTS).read_bytes()


def test_queries_dealt_ahead_are_used_once(directory: Path, shares: dict[str, Path]) -> None:
    with running(shares["one-hot"], ahead=2) as three, three.dial() as connection:
        for _ in range(4):
            close(directory, connection.embed([TEXT])[0])


def test_clients_at_the_same_time(directory: Path, three: Three) -> None:
    answers: list[torch.Tensor] = []

    def ask() -> None:
        with three.dial() as connection:
            answers.extend(connection.embed([TEXT]))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 3
    for answer in answers:
        close(directory, answer)


# shares on disk


def damaged(shares: dict[str, Path], tmp_path: Path, party: int, file: str) -> Path:
    """A copy of a party's share with one byte changed."""
    copy = tmp_path / f"party-{party}"
    shutil.copytree(shares["one-hot"] / f"party-{party}", copy)
    payload = bytearray((copy / file).read_bytes())
    payload[-40] ^= 1
    (copy / file).chmod(0o600)
    (copy / file).write_bytes(payload)
    return copy


@pytest.mark.parametrize(("party", "file"), [(0, WEIGHTS), (1, WEIGHTS), (2, "program.json"), (1, "tokenizer.json")])
def test_a_damaged_share_is_refused(shares: dict[str, Path], tmp_path: Path, party: int, file: str) -> None:
    with pytest.raises(ShareError, match=f"{file} is damaged"):
        load_share(damaged(shares, tmp_path, party, file))


def test_a_missing_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShareError, match="hint: write it with: unseen share-model"):
        load_share(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ShareError, match="cannot be read"):
        load_share(tmp_path)


@pytest.mark.parametrize("party", [0, 1, 2])
def test_another_seed_is_noticed(shares: dict[str, Path], tmp_path: Path, party: int) -> None:
    """Each seed has two holders, who show each other that they have the same."""
    copy = damaged(shares, tmp_path, party, SEEDS)
    with running(shares["one-hot"], shares={party: copy}, deadline=4) as three, three.dial() as connection:
        with pytest.raises(Error, match="does not show the seed of parties"):
            connection.embed([TEXT])
        assert not connection.reports


def test_parties_of_two_sharings_do_not_answer(directory: Path, shares: dict[str, Path], tmp_path: Path) -> None:
    other = shared(directory, tmp_path, "one-hot")
    with (
        running(shares["one-hot"], shares={1: other / "party-1"}) as three,
        pytest.raises(HandshakeError, match="different models"),
    ):
        three.dial()


# changed bytes on the way


class FlipsFromZero(ZeroService):
    """One bit of a frame that party 0 sends is changed behind its back."""

    def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
        for number, message in enumerate(super().Compute(requests, context)):
            if message.WhichOneof("content") == "frame" and number == 5:
                message = pb.PeerMessage(frame=pb.Frame(data=_flipped(message.frame.data), last=message.frame.last))
            yield message


class FlipsFromOne(ZeroService):
    """The same of a frame of party 1."""

    def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
        def changed() -> Iterator[pb.PeerMessage]:
            for number, message in enumerate(requests):
                if message.WhichOneof("content") == "frame" and number == 5:
                    message = pb.PeerMessage(frame=pb.Frame(data=_flipped(message.frame.data), last=message.frame.last))
                yield message

        yield from super().Compute(changed(), context)


class FlipsCorrections(HelperService):
    def Supply(self, request: Any, context: Any) -> Iterator[pb.SupplyPart]:
        for part in super().Supply(request, context):
            if part.WhichOneof("content") == "data":
                part = pb.SupplyPart(data=_flipped(part.data))
            yield part


class FlipsRows(HelperService):
    def Contribute(self, request: Any, context: Any) -> pb.Contribution:
        found = super().Contribute(request, context)
        return pb.Contribution(rows=_flipped(found.rows), tag=found.tag)


class FlipsSeed(HelperService):
    def Seed(self, request: Any, context: Any) -> pb.SeedReply:
        found = super().Seed(request, context)
        return pb.SeedReply(seed=_flipped(found.seed), tag=found.tag)


def _flipped(payload: bytes) -> bytes:
    changed = bytearray(payload)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


@pytest.mark.parametrize(
    ("party", "kind", "kind_of_error", "words"),
    [
        (0, FlipsFromZero, PartiesDisagree, "the frames of party 0"),
        (0, FlipsFromOne, PartiesDisagree, "the frames of party 1"),
        (2, FlipsCorrections, PartiesDisagree, "the corrections of party 2"),
        (2, FlipsRows, PartiesDisagree, "the rows of party 2"),
        (2, FlipsSeed, ProtocolError, "not the one that party 2 sent"),
    ],
)
def test_changed_bytes_give_no_answer(
    shares: dict[str, Path], party: int, kind: Any, kind_of_error: type[Error], words: str
) -> None:
    with running(shares["one-hot"], {party: kind}, deadline=5) as three, three.dial() as connection:
        with pytest.raises(Error, match=words):
            connection.embed([TEXT])
        assert not connection.reports
    assert issubclass(kind_of_error, Error)


# parties that disappear


@pytest.mark.parametrize("party", [0, 1])
def test_a_party_that_disappears_is_named(shares: dict[str, Path], party: int) -> None:
    class Stopping(ZeroService):
        three: Three

        def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
            for number, message in enumerate(super().Compute(requests, context)):
                if number == 6:
                    threading.Thread(target=self.three.parties[party].stop).start()
                    time.sleep(0.5)
                yield message

    with running(shares["one-hot"], {0: Stopping}, deadline=5) as three, three.dial() as connection:
        Stopping.three = three
        start = time.monotonic()
        with pytest.raises(Error, match=f"party {party}"):
            connection.embed([TEXT])
        assert not connection.reports
        assert time.monotonic() - start < 20


def test_party_2_that_disappears_is_named(shares: dict[str, Path]) -> None:
    with running(shares["client-table"], deadline=5) as three, three.dial() as connection:
        three.parties[2].stop()
        with pytest.raises(Error, match=r"party 2 at .* cannot be reached"):
            connection.embed([TEXT])
        assert not connection.reports


def test_party_2_that_falls_silent_is_named(shares: dict[str, Path]) -> None:
    class Silent(HelperService):
        def Supply(self, request: Any, context: Any) -> Iterator[pb.SupplyPart]:
            for number, part in enumerate(super().Supply(request, context)):
                if number:
                    time.sleep(4)
                    return
                yield part

    with running(shares["client-table"], {2: Silent}, deadline=1.5) as three, three.dial() as connection:
        with pytest.raises(PeerLost, match="party 2 sent nothing"):
            connection.embed([TEXT])
        assert not connection.reports


def test_after_a_failure_others_are_served(directory: Path, shares: dict[str, Path]) -> None:
    class Once(FlipsFromZero):
        failed = False

        def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
            if Once.failed:
                yield from ZeroService.Compute(self, requests, context)
                return
            Once.failed = True
            yield from super().Compute(requests, context)

    with running(shares["one-hot"], {0: Once}, deadline=5) as three, three.dial() as connection:
        with pytest.raises(Error):
            connection.embed([TEXT])
        close(directory, connection.embed([TEXT])[0])


def test_a_client_that_cannot_reach_a_party_is_told_which(three: Three) -> None:
    addresses = [three.addresses[0], "127.0.0.1:9", three.addresses[2]]
    broken = Three(three.parties)
    broken.__dict__["parties"] = [Fake(a) for a in addresses]
    with pytest.raises(PeerLost, match=r"party 1 at 127\.0\.0\.1:9 cannot be reached"):
        broken.dial(deadline=3)


class Fake:
    def __init__(self, address: str) -> None:
        self.address = address


def test_swapped_addresses_are_noticed(three: Three) -> None:
    first, second, third = three.parties
    with pytest.raises(HandshakeError, match="swap the addresses"):
        Three([second, first, third]).dial()


# who may ask for what


def stub(served: Served) -> PartyStub:
    return PartyStub(open_channel(served.endpoint, insecure=False, what="the test"))


def test_corrections_are_for_party_0_alone(three: Three) -> None:
    import grpc

    share = three.parties[2].service.share
    number = bytes(16)
    for proof in (
        b"",
        bytes(32),
        Link(bytes(32), (2, 0)).proof("supply", number),
        share.links[0].proof("seed", number),
    ):
        request = pb.SupplyRequest(model=share.manifest.model, supply=number, proof=proof)
        with pytest.raises(grpc.RpcError, match="does not show the seed of parties 2 and 0"):
            list(stub(three.parties[2]).Supply(request))
        with pytest.raises(grpc.RpcError, match="does not show the seed of parties 1 and 2"):
            stub(three.parties[2]).Seed(request)


def test_numbers_and_seeds_serve_once(three: Three) -> None:
    import grpc

    share, number = three.parties[2].service.share, bytes(range(16))
    supply = pb.SupplyRequest(model=share.manifest.model, supply=number, proof=share.links[0].proof("supply", number))
    seed = pb.SupplyRequest(model=share.manifest.model, supply=number, proof=share.links[1].proof("seed", number))
    first = list(stub(three.parties[2]).Supply(supply))
    assert [part.WhichOneof("content") for part in first[:2]] == ["seed", "data"]
    with pytest.raises(grpc.RpcError, match="was used before"):
        list(stub(three.parties[2]).Supply(supply))
    assert stub(three.parties[2]).Seed(seed).seed != first[0].seed
    with pytest.raises(grpc.RpcError, match="was given before"):
        stub(three.parties[2]).Seed(seed)


def test_party_0_computes_with_party_1_alone(three: Three) -> None:
    share = three.parties[0].service.share
    hello = pb.PeerHello(version=1, model=share.manifest.model, session=bytes(16), proof=bytes(32))
    messages = list(stub(three.parties[0]).Compute(iter([pb.PeerMessage(hello=hello)])))
    assert [m.WhichOneof("content") for m in messages] == ["failure"]
    assert "seed of parties 0 and 1" in messages[0].failure.message


def test_party_1_needs_its_seed(three: Three) -> None:
    import grpc

    share = three.parties[1].service.share
    start = pb.AskStart(version=1, model=share.manifest.model, session=bytes(16), seed=b"short")
    keys = pb.Frame(data=bytes(sum(three.parties[1].service.key_sizes())), last=True)
    with pytest.raises(grpc.RpcError, match="a seed has 32 bytes"):
        stub(three.parties[1]).Ask(iter([pb.AskPart(start=start), pb.AskPart(frame=keys)]))


def test_nothing_secret_is_shown(three: Three) -> None:
    for party in three.parties:
        share = party.service.share
        for link in share.links.values():
            assert link._seed.hex() not in repr(link)
        assert "Tensor" not in repr(share)
    assert OneService.__name__ in repr(type(three.parties[1].service))


def test_shares_of_an_answer_say_no_more_than_their_sum(
    directory: Path, shares: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every seed that party 2 and a client know the same again, shares would be too but for the zero share."""
    seen: list[list[bytes]] = []
    inner = ThreePartyConnection._put_together

    def noting(self: ThreePartyConnection, a: pb.Answer, b: pb.Answer) -> torch.Tensor:
        seen.append([a.share, b.share])
        return inner(self, a, b)

    monkeypatch.setattr(ThreePartyConnection, "_put_together", noting)
    for module in (client, helper):
        monkeypatch.setattr(module, "fresh_seed", lambda: bytes(32))
    monkeypatch.setattr(helper, "query_key", lambda seed, party, number: Key(bytes([party] * 16)))
    for module in (zero, one):
        monkeypatch.setattr(module, "query_key", lambda seed, party, number: Key(bytes([party] * 16)))
    monkeypatch.setattr(client, "secrets", Fixed)
    with running(shares["client-table"]) as three, three.dial() as connection:
        answers = [connection.embed([TEXT])[0] for _ in range(2)]
    assert torch.equal(*answers)
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


class Fixed:
    @staticmethod
    def token_bytes(size: int) -> bytes:
        return bytes(size)
