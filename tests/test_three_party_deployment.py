"""A model shared among three servers over gRPC: answers, what is refused, and parties that fail or change bytes."""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch.nn.functional import cosine_similarity

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties.net.frames import to_frames
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyStub
from parties.served.described import ask_description
from parties.three_party import client, party_0, party_1, party_2
from parties.three_party.asked import Asked
from parties.three_party.client import ThreePartyLink
from parties.three_party.conversations import WantedProgram
from parties.three_party.pair_keys import PairKey, Seal
from parties.three_party.party import MAXIMUM_QUERIES, SESSION_BYTES, PartyService
from parties.three_party.party_0 import Party0Service
from parties.three_party.party_1 import Party1Service
from parties.three_party.party_2 import Party2Service
from parties.three_party.shared_model import MANIFEST, PROGRAM, SEEDS, TABLE, WEIGHTS, load_share, share_model
from protocols.prg import Key
from secure.cost.traffic import ONLINE
from secure.deployments.three_party import CLIENT, PARTIES, ThreeParty
from secure.errors import Error, HandshakeError, InvalidInput, PartiesDisagree, PeerLost, ProtocolError, ShareError
from secure.version import WIRE_VERSION
from tests.three_parties import Party, Three, call, running, shared
from tests.tiny import TEXT, expected, wait_until

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
        share = three.parties[0].service.share
        predicted = share.deployment.price(share.program)
        for number, report in enumerate(connection.reports):
            assert (report.query, report.rounds) == (number, predicted.rounds)
            for link in predicted.traffic:
                assert report.bytes(sender=link.sender, receiver=link.receiver, phase=link.phase) == link.bytes
            rows = predicted.bytes(sender=PARTIES[2], phase=ONLINE)  # they depend on the query
            assert (rows > 0) == (name == "one-hot")
            asked = PARTIES if name == "one-hot" else PARTIES[:2]
            assert {t.receiver for t in report.traffic if t.sender == CLIENT} == set(asked)
            assert {t.sender for t in report.traffic if t.receiver == CLIENT} == set(PARTIES[:2])
            assert all(t.bytes > 0 for t in report.traffic)
            assert report.online_seconds > report.client_seconds > 0
            assert report.offline_seconds == report.dealer_seconds > 0
        assert connection.once == (() if name != "client-table" else connection.once)
        assert sum(t.bytes for t in connection.once) == len(share.files.get("token-table", b""))


def test_party_2_is_not_asked_where_clients_hold_the_table(directory: Path, shares: dict[str, Path]) -> None:
    with running(shares["client-table"]) as three:
        three.parties = three.parties[:2]
        with three.dial() as connection:
            close(directory, connection.embed([TEXT])[0])


def test_a_look_up_in_a_shared_table_needs_party_2(three: Three) -> None:
    with pytest.raises(InvalidInput, match="party 2 is needed"):
        Three(three.parties[:2]).dial()
    with pytest.raises(InvalidInput, match="1 addresses"):
        Three(three.parties[:1]).dial()


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


def test_shared_weights_are_files_of_their_own(shares: dict[str, Path]) -> None:
    one, other = (shares["one-hot"] / f"party-{party}" / WEIGHTS for party in range(2))
    assert not one.samefile(other)


def test_weights_that_others_may_change_are_not_mapped(shares: dict[str, Path], tmp_path: Path) -> None:
    copied = tmp_path / "party-0"
    shutil.copytree(shares["public"] / "party-0", copied)
    load_share(copied)
    (copied / WEIGHTS).chmod(0o660)
    with pytest.raises(ShareError, match="others may read or write"):
        load_share(copied)


def test_a_missing_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShareError, match="hint: write it with: unseen share-model"):
        load_share(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ShareError, match="cannot be read"):
        load_share(tmp_path)


@pytest.mark.parametrize("name", ["../party-1/seeds", "/etc/hostname", SEEDS, "notes.txt"])
def test_a_manifest_names_files_of_a_share_alone(shares: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(ShareError, match=f"may not name '{name}'"):
        load_share(renamed(shares, tmp_path, WEIGHTS, name))


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_a_manifest_names_all_that_a_share_needs(shares: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(ShareError, match=f"does not name '{name}'"):
        load_share(renamed(shares, tmp_path, name, TABLE))


def renamed(shares: dict[str, Path], tmp_path: Path, name: str, other: str) -> Path:
    """A copy of party 0's share whose manifest calls a file by another name."""
    copy = tmp_path / "party-0"
    shutil.copytree(shares["one-hot"] / "party-0", copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][other] = manifest["files"].pop(name)
    (copy / MANIFEST).chmod(0o600)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize("party", [0, 2])
@pytest.mark.parametrize("changed", ["9" * 600, 10**40, 1 << 29, "2", -1, None])
def test_weights_of_other_shapes_than_the_program_reads_are_refused(
    shares: dict[str, Path], tmp_path: Path, party: int, changed: Any
) -> None:
    """Party 2 makes weights by their shapes alone: a wrong one must cost it nothing."""
    copy = tmp_path / "share"
    shutil.copytree(shares["one-hot"] / f"party-{party}", copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    name = next(name for name, shape in manifest["shapes"].items() if len(shape) == 2)
    if changed is None:
        del manifest["shapes"][name]
    else:
        manifest["shapes"][name][0] = changed
    (copy / MANIFEST).chmod(0o600)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ShareError, match=r"not those that its Programs read|its manifest cannot be read"):
        load_share(copy)


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


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("program", b"another"),
        ("tokenizer", b"another"),
        ("pad_id", 7),
        ("lowercase", None),
        ("files", [pb.File(name="token-table", sha256="0" * 64, size=1)]),
    ],
)
@pytest.mark.parametrize("party", [1, 2])
def test_parties_that_describe_another_model_are_refused(
    three: Three, monkeypatch: pytest.MonkeyPatch, party: int, name: str, changed: Any
) -> None:
    def describe(peer: Any, deployment: Any, role: str, options: Any) -> pb.Description:
        found = ask_description(peer, deployment, role, options)
        if role == PARTIES[party]:
            new: Any = {name: not found.lowercase if name == "lowercase" else changed}
            found.ClearField(name)
            found.MergeFrom(pb.Description(**new))
        return found

    monkeypatch.setattr(client, "ask_description", describe)
    with pytest.raises(HandshakeError, match=f"party {party} has another {name} than party 0"):
        three.dial()


# what is served, and asked for


def test_serve_and_connect(directory: Path, shares: dict[str, Path]) -> None:
    """The public functions, with a share's directory."""
    where, deployment = shares["public"], ThreeParty()
    with (
        secure.serve(where / "party-2", role="party 2", deployment=deployment) as two,
        secure.serve(
            where / "party-0", role="party 0", deployment=deployment, peers={"party 2": two.address}, ahead=1
        ) as zero,
        secure.serve(
            str(where / "party-1"),
            role="party 1",
            deployment=deployment,
            peers={"party 0": zero.address, "party 2": two.address},
            deadline=9.0,
        ) as one,
    ):
        assert "public weights; a query takes" in zero.about[0]
        addresses = (zero.address, one.address, two.address)
        with secure.connect(ThreeParty(parties=addresses), cache=False) as session:
            close(directory, session.embed([TEXT])[0])
            assert session.deployment == ThreeParty.name
            assert session.link.served == ThreeParty(public_weights=True)


@pytest.mark.parametrize(
    ("role", "held", "words"),
    [
        ("party 2", None, "not nothing"),
        ("party 2", "party-1", "is the share of party 1, not of party 2"),
        ("server", "party-0", "no service of role"),
        ("party 0", "party-0", "needs the address of the party 2"),
    ],
)
def test_a_wrong_share_is_refused(shares: dict[str, Path], role: str, held: str | None, words: str) -> None:
    where = None if held is None else shares["one-hot"] / held
    with pytest.raises(InvalidInput, match=words):
        secure.serve(where, role=role, deployment=ThreeParty())


def test_options_that_mean_nothing_to_a_party_are_refused(shares: dict[str, Path]) -> None:
    for option in ("ahead", "state", "traces", "workers"):
        with pytest.raises(InvalidInput, match=f"{option} means nothing to the party 2"):
            secure.serve(shares["one-hot"] / "party-2", role="party 2", deployment=ThreeParty(), **{option: 1})


def test_who_insists_on_public_weights_gets_them(three: Three, shares: dict[str, Path]) -> None:
    public = ThreeParty(public_weights=True)
    with pytest.raises(HandshakeError, match="public_weights"):
        call(three.addresses, public)
    with pytest.raises(InvalidInput, match="public_weights"):
        secure.serve(shares["one-hot"] / "party-2", role="party 2", deployment=public)
    with running(shares["public"]) as parties:
        call(parties.addresses, public).close()


def test_a_model_for_two_parties_is_not_shared(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="compile it with deployment=secure"):
        share_model(model.compiled, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_output_has_a_zero_share_of_its_own(three: Three) -> None:
    zero, one = (three.parties[party].service.key(1 - party) for party in range(2))
    first, second = (zero.zero_share(bytes(16), output, (100,)) for output in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, one.zero_share(bytes(16), 0, (100,)))


# changed bytes on the way


class FlipsFromZero(Party0Service):
    """One bit of a frame that party 0 sends is changed behind its back."""

    def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
        for number, message in enumerate(super().Compute(requests, context)):
            if message.WhichOneof("content") == "frame" and number == 5:
                message = pb.PeerMessage(frame=pb.Frame(data=_flipped(message.frame.data), last=message.frame.last))
            yield message


class FlipsFromOne(Party0Service):
    """The same of a frame of party 1."""

    def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
        def changed() -> Iterator[pb.PeerMessage]:
            for number, message in enumerate(requests):
                if message.WhichOneof("content") == "frame" and number == 5:
                    message = pb.PeerMessage(frame=pb.Frame(data=_flipped(message.frame.data), last=message.frame.last))
                yield message

        yield from super().Compute(changed(), context)


class FlipsCorrections(Party2Service):
    def Supply(self, request: Any, context: Any) -> Iterator[Any]:
        for part in super().Supply(request, context):
            if isinstance(part, bytes):  # encoded already: corrections
                part = pb.SupplyPart(data=_flipped(pb.SupplyPart.FromString(part).data))
            yield part


class FlipsRows(Party2Service):
    def Contribute(self, request: Any, context: Any) -> pb.Contribution:
        found = super().Contribute(request, context)
        return pb.Contribution(rows=_flipped(found.rows), tag=found.tag)


class FlipsSeed(Party2Service):
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
        with pytest.raises(kind_of_error, match=words):
            connection.embed([TEXT])
        assert not connection.reports


# parties that disappear


@pytest.mark.parametrize("party", [0, 1])
def test_a_party_that_disappears_is_named(shares: dict[str, Path], party: int) -> None:
    class Stopping(Party0Service):
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
    class Silent(Party2Service):
        def Supply(self, request: Any, context: Any) -> Iterator[Any]:
            for number, part in enumerate(super().Supply(request, context)):
                if number:
                    time.sleep(4)
                    return
                yield part

    with running(shares["client-table"], {2: Silent}, deadline=1.5) as three, three.dial() as connection:
        with pytest.raises(PeerLost, match="party 2 sent nothing"):
            connection.embed([TEXT])
        assert not connection.reports


def test_party_2_that_falls_silent_holds_nothing_of_party_0(shares: dict[str, Path]) -> None:
    """Nobody asks here: corrections are dealt ahead."""
    calls: list[Any] = []

    class Silent(Party2Service):
        def Supply(self, request: Any, context: Any) -> Iterator[Any]:
            calls.append(context)
            for number, part in enumerate(super().Supply(request, context)):
                if number:
                    while context.is_active():
                        time.sleep(0.05)
                    return
                yield part

    with running(shares["client-table"], {2: Silent}, deadline=1.0) as three:
        service = three.parties[0].service
        assert isinstance(service, Party0Service)
        arriving = service._supply(service.share.sizes[0], WantedProgram(service.share.program.digest))
        wait_until(lambda: arriving.failed, "party 0 gives up", 5)
        with pytest.raises(PeerLost, match="party 2 sent nothing for 1 s"):
            arriving.finish()
        wait_until(lambda: not calls[0].is_active(), "the call has ended", 2)


# deadlines of the client, which the parties' own are far beyond

DEADLINE = 2.0


class Blocking(PartyService):
    """Blocks where it is told to, until the test has ended."""

    free: threading.Event

    def block(self) -> None:
        self.free.wait(30)


class StuckZero(Blocking, Party0Service):
    def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
        for number, message in enumerate(super().Compute(requests, context)):
            if number == 6:
                self.block()
            yield message


class StuckOne(Blocking, Party1Service):
    def for_client(self, *about: Any) -> bytes:
        self.block()
        return super().for_client(*about)


class NeverOne(Blocking, Party1Service):
    """It never begins to compute."""

    def _answer(self, asked: Any, place: Any) -> None:
        self.block()


class StuckTwo(Blocking, Party2Service):
    def Supply(self, request: Any, context: Any) -> Iterator[Any]:
        for number, part in enumerate(super().Supply(request, context)):
            if number:
                self.block()
                return
            yield part


class LatelyTwo(Blocking, Party2Service):
    """It deals, but gives no rows."""

    def Contribute(self, request: Any, context: Any) -> pb.Contribution:
        self.block()
        return super().Contribute(request, context)


def silent(kind: type[PartyService]) -> type[PartyService]:
    """A party that takes a query and says nothing at all."""

    class Silent(Blocking, kind):  # type: ignore[valid-type, misc]
        def Ask(self, requests: Any, context: Any) -> Iterator[pb.AskReply]:
            self.block()
            yield from super().Ask(requests, context)

    return Silent


@pytest.mark.parametrize(
    ("party", "kind"),
    [
        (0, StuckZero),
        (1, StuckOne),
        (1, NeverOne),
        (2, StuckTwo),
        (2, LatelyTwo),
        (0, silent(Party0Service)),
        (1, silent(Party1Service)),
        (2, silent(Party2Service)),
    ],
)
def test_a_party_that_hangs_is_named_within_the_deadline(
    shares: dict[str, Path], party: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(Blocking, "free", free, raising=False)
    with (
        running(shares["one-hot"], {party: kind}, deadline=4 * DEADLINE) as three,
        three.dial(deadline=DEADLINE) as connection,
    ):
        try:
            start = time.monotonic()
            with pytest.raises(PeerLost, match=rf"^party {party} at .* {DEADLINE:g} s"):
                connection.embed([TEXT])
            assert DEADLINE <= time.monotonic() - start < 2 * DEADLINE
            assert not connection.reports
        finally:
            free.set()


def test_a_query_may_last_longer_than_the_deadline(directory: Path, shares: dict[str, Path]) -> None:
    """It is a step that may not: here each takes a third of it."""

    class Slow(Party0Service):
        def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
            for number, message in enumerate(super().Compute(requests, context)):
                if number in range(2, 10):
                    time.sleep(DEADLINE / 6)
                yield message

    with running(shares["one-hot"], {0: Slow}) as three, three.dial(deadline=DEADLINE / 2) as connection:
        close(directory, connection.embed([TEXT])[0])
        assert connection.reports[0].online_seconds > DEADLINE


@pytest.mark.parametrize("kind", ["progress", "failure"])
def test_a_client_that_does_not_read(shares: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It fills its window and no more; the party does not wait for it for ever."""
    large = "x" * (1 << 20)

    def replies(self: Asked, joining: float) -> Iterator[pb.AskReply]:
        for _ in range(20 if kind == "progress" else 1):
            yield pb.AskReply(working=pb.Working(waits_for=large))
        raise Error("no answer", 40 * large)  # more than a window that gRPC widens as it goes

    monkeypatch.setattr(Asked, "replies", replies)
    with running(shares["client-table"], deadline=0.5) as three:
        asking = ask(three.parties[0])
        time.sleep(2)
        assert free(three.parties[0]) == MAXIMUM_QUERIES
        with pytest.raises(grpc.RpcError) as caught:
            list(asking)
        assert caught.value.code() == grpc.StatusCode.CANCELLED


def test_an_internal_error_of_party_2_ends_the_query(shares: dict[str, Path]) -> None:
    class Failing(Party2Service):
        def looked_up(self, *about: Any) -> Any:
            raise ZeroDivisionError

    with running(shares["one-hot"], {2: Failing}) as three, three.dial() as connection:
        with pytest.raises(Error, match=r"party 2 at .* reports: party 2 has an internal error"):
            connection.embed([TEXT])
        assert not connection.reports


def test_who_asks_and_leaves_starts_no_more_threads_than_queries_are_allowed(
    shares: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def run(self: Any) -> pb.Answer:
        ended.wait(30)
        return pb.Answer()

    monkeypatch.setattr("parties.three_party.party_1._Call.run", run)
    with running(shares["client-table"]) as three:
        one = three.parties[1]
        try:
            for left in reversed(range(MAXIMUM_QUERIES)):
                asking = ask(one)
                assert next(asking).WhichOneof("content") == "working"
                asking.cancel()
                wait_until(lambda: not one.service._asked, "the query has ended")
                assert free(one) == left
            (refused,) = ask(one)
            assert f"{MAXIMUM_QUERIES} queries, which is its limit" in refused.failure.message
        finally:
            ended.set()
        wait_until(lambda: free(one) == MAXIMUM_QUERIES, "all places are free again")


def test_after_a_failure_others_are_served(directory: Path, shares: dict[str, Path]) -> None:
    class Once(FlipsFromZero):
        failed = False

        def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
            if Once.failed:
                yield from Party0Service.Compute(self, requests, context)
                return
            Once.failed = True
            yield from super().Compute(requests, context)

    with running(shares["one-hot"], {0: Once}, deadline=5) as three, three.dial() as connection:
        with pytest.raises(Error):
            connection.embed([TEXT])
        close(directory, connection.embed([TEXT])[0])


def test_a_client_that_cannot_reach_a_party_is_told_which(three: Three) -> None:
    first, _, third = three.addresses
    with pytest.raises(PeerLost, match=r"party 1 at 127\.0\.0\.1:9 cannot be reached"):
        call((first, "127.0.0.1:9", third), deadline=3)


def test_swapped_addresses_are_noticed(three: Three) -> None:
    first, second, third = three.parties
    with pytest.raises(HandshakeError, match="check the order of the addresses"):
        Three([second, first, third]).dial()


# who may ask for what


def stub(party: Party) -> PartyStub:
    return PartyStub(party.peer().channel)


def ask(party: Party) -> Any:
    """A query at one party alone, with zeros for what the client sends."""
    service = party.service
    start = pb.AskStart(
        version=WIRE_VERSION,
        model=service.share.manifest.model,
        session=secrets.token_bytes(SESSION_BYTES),
        seed=bytes(32),
        deadline=20.0,
    )
    sent = bytes(sum(service.asked_sizes(service.share.sizes[0])))
    frames = to_frames(sent) if sent else ()
    return stub(party).Ask(iter([pb.AskPart(start=start), *(pb.AskPart(frame=frame) for frame in frames)]))


def free(party: Party) -> int:
    """The queries that a party would still take."""
    return party.service._places.free


def test_corrections_are_for_party_0_alone(three: Three) -> None:
    share, number = three.parties[2].service.share, bytes(16)
    about = WantedProgram(share.program.digest).about()
    proofs = [b"", bytes(32), PairKey(bytes(32), (2, 0)).proof("supply", number, about)]
    proofs += [
        seed.proof(purpose, number, about) for seed in share.pair_seeds.values() for purpose in ("supply", "seed")
    ]
    proofs += [three.parties[2].service.key(1).proof("supply", number, about)]
    for proof in proofs:
        request = pb.SupplyRequest(model=share.manifest.model, supply=number, proof=proof)
        with pytest.raises(grpc.RpcError, match="does not show the key that parties 2 and 0 agreed on"):
            list(stub(three.parties[2]).Supply(request))
        with pytest.raises(grpc.RpcError, match="does not show the key that parties 1 and 2 agreed on"):
            stub(three.parties[2]).Seed(request)


def test_numbers_and_seeds_serve_once(three: Three) -> None:
    share, number = three.parties[2].service.share, bytes(range(16))
    about = WantedProgram(share.program.digest).about()
    zero, one = (three.parties[party].service.key(2) for party in range(2))
    supply = pb.SupplyRequest(model=share.manifest.model, supply=number, proof=zero.proof("supply", number, about))
    seed = pb.SupplyRequest(model=share.manifest.model, supply=number, proof=one.proof("seed", number, about))
    first = list(stub(three.parties[2]).Supply(supply))
    assert [part.WhichOneof("content") for part in first[:2]] == ["seed", "data"]
    with pytest.raises(grpc.RpcError, match="was used before"):
        list(stub(three.parties[2]).Supply(supply))
    assert stub(three.parties[2]).Seed(seed).seed != first[0].seed
    with pytest.raises(grpc.RpcError, match="was given before"):
        stub(three.parties[2]).Seed(seed)


def test_a_supply_that_is_asked_for_again_has_a_tag_under_another_key(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends party 0's request once more, after party 1 took its seed, gets no second tag under one key.

    Nothing is dealt under a number that was used.
    """
    share, number, made = three.parties[2].service.share, bytes(range(2, 18)), list[bytes]()
    about = WantedProgram(share.program.digest).about()
    zero, one = (three.parties[party].service.key(2) for party in range(2))
    supply = pb.SupplyRequest(model=share.manifest.model, supply=number, proof=zero.proof("supply", number, about))
    seed = pb.SupplyRequest(model=share.manifest.model, supply=number, proof=one.proof("seed", number, about))
    start = Seal.__init__

    def noting(self: Seal, key: bytes) -> None:
        made.append(key)
        start(self, key)

    monkeypatch.setattr(Seal, "__init__", noting)
    list(stub(three.parties[2]).Supply(supply))
    stub(three.parties[2]).Seed(seed)
    with pytest.raises(grpc.RpcError, match="it was used before"):
        list(stub(three.parties[2]).Supply(supply))
    assert len(made) == 1


def test_party_0_computes_with_party_1_alone(three: Three) -> None:
    share = three.parties[0].service.share
    hello = pb.PeerHello(version=WIRE_VERSION, model=share.manifest.model, session=bytes(16), proof=bytes(32))
    messages = list(stub(three.parties[0]).Compute(iter([pb.PeerMessage(hello=hello)])))
    assert [m.WhichOneof("content") for m in messages] == ["failure"]
    assert "the key that parties 0 and 1 agreed on" in messages[0].failure.message


def test_party_1_needs_its_seed(three: Three) -> None:
    share = three.parties[1].service.share
    start = pb.AskStart(version=WIRE_VERSION, model=share.manifest.model, session=bytes(16), seed=b"short")
    keys = pb.Frame(data=bytes(sum(three.parties[1].service.key_sizes(share.sizes[0]))), last=True)
    (reply,) = stub(three.parties[1]).Ask(iter([pb.AskPart(start=start), pb.AskPart(frame=keys)]))
    assert reply.failure.code == ProtocolError.code
    assert "a seed has 32 bytes" in reply.failure.message


def test_nothing_secret_is_shown(three: Three) -> None:
    for party in three.parties:
        share, number = party.service.share, party.service.share.party
        for key in (*share.pair_seeds.values(), *(party.service.key(other) for other in range(3) if other != number)):
            assert key._seed.hex() not in repr(key)
            assert str(key._seed) not in repr(key)
        assert "Tensor" not in repr(share)
    assert Party1Service.__name__ in repr(type(three.parties[1].service))


def test_shares_of_an_answer_say_no_more_than_their_sum(
    directory: Path, shares: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every seed that party 2 and a client know the same again, shares would be too but for the zero share."""
    seen: list[list[bytes]] = []
    inner = ThreePartyLink._put_together

    def noting(self: ThreePartyLink, answers: Sequence[bytes]) -> list[torch.Tensor]:
        seen.append(list(answers))
        return inner(self, answers)

    monkeypatch.setattr(ThreePartyLink, "_put_together", noting)
    for module in (client, party_2):
        monkeypatch.setattr(module, "fresh_seed", lambda: bytes(32))
    monkeypatch.setattr(party_2, "query_key", lambda seed, party, number: Key(bytes([party] * 16)))
    for module in (party_0, party_1):
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
