"""A shared model's name: it confirms no guess of the weights, and binds Program, tokenizer and token table."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import queue
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyStub
from parties.served.described import ask_description
from parties.served.files import TOKEN_TABLE
from parties.three_party import client
from parties.three_party.shared_model import MANIFEST, SALT, TABLE, TOKENIZER, WEIGHTS, load_share, public_name
from secure.capture.tensor_files import write_tensors
from secure.deployments.three_party import ThreeParty
from secure.errors import DownloadError, HandshakeError, ShareError
from secure.version import WIRE_VERSION
from tests.three_parties import running, shared
from tests.tiny import LENGTH, sentences


@pytest.fixture(scope="module")
def public(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(directory, tmp_path_factory.mktemp("public"), "one-hot", public_weights=True)


@pytest.fixture(scope="module")
def table(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(directory, tmp_path_factory.mktemp("table"), "client-table")


# the weights


def test_a_name_confirms_no_guess_of_public_weights(directory: Path, public: Path) -> None:
    """A client that guessed the weights right, and knows all else, computed the name."""
    deployment = ThreeParty(public_weights=True)
    with running(public) as three, three.dial() as connection:
        link: Any = connection.link
        name, program = link.model, link.program
    guess = secure.compile_text_model(
        str(directory), LENGTH, deployment=deployment, embedding="one-hot", calibration=sentences()
    )
    rings, integers = deployment.translated(program).weight_rings, guess.model.integers
    file = io.BytesIO()
    write_tensors(file, list(rings), ((n, integers[n]) for n in rings))
    weights = file.getvalue()
    assert weights == (public / "party-0" / WEIGHTS).read_bytes()  # the guess is right
    digest = hashlib.sha256(weights).hexdigest()
    assert hashlib.sha256("/".join([program.digest, digest, "True"]).encode()).hexdigest() not in name
    for salt in (b"", bytes(32), program.digest.encode(), name[:64].encode(), bytes.fromhex(name[:64])):
        for about in (weights, digest.encode(), bytes.fromhex(digest), b"weights/" + bytes.fromhex(digest)):
            assert hmac.digest(salt, about, "sha256").hex() not in name
            assert hashlib.sha256(salt + about).hexdigest() not in name


@pytest.mark.parametrize("public_weights", [True, False])
def test_two_sharings_have_different_names(directory: Path, tmp_path: Path, public_weights: bool) -> None:
    names = []
    for at in ("a", "b"):
        where = shared(directory, tmp_path / at, "one-hot", public_weights=public_weights)
        loaded = [load_share(where / f"party-{party}").manifest.model for party in range(3)]
        assert len(set(loaded)) == 1
        names.append(loaded[0])
    assert names[0][:64] == names[1][:64]  # all that is public is equal
    assert names[0][64:] != names[1][64:]
    assert [len(name) for name in names] == [128, 128]


def test_the_salt_is_secret_and_with_those_who_hold_weights(public: Path) -> None:
    salts = {(public / f"party-{party}" / SALT).read_bytes() for party in range(2)}
    assert [len(salt) for salt in salts] == [32]
    assert not (public / "party-2" / SALT).exists()
    for party in range(2):
        assert (public / f"party-{party}" / SALT).stat().st_mode & 0o077 == 0


# what clients are given


def changed(where: Path, to: Path, party: int, file: str, payload: bytes) -> Path:
    """A party's share with another file in the place of one, and a manifest with that file's digest."""
    copy = to / f"party-{party}"
    shutil.copytree(where / f"party-{party}", copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    if file in manifest["files"]:
        manifest["files"][file] = hashlib.sha256(payload).hexdigest()
        _write(copy / file, payload)
    else:
        manifest[file] = json.loads(payload)
    _write(copy / MANIFEST, json.dumps(manifest).encode())
    return copy


def _write(path: Path, payload: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(payload)


def another_tokenizer(where: Path) -> bytes:
    found = json.loads((where / "party-0" / TOKENIZER).read_text())
    vocabulary = found["model"]["vocab"]
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return json.dumps(found).encode()


def another_table(where: Path) -> bytes:
    payload = bytearray((where / "party-0" / TABLE).read_bytes())
    payload[-3] ^= 1
    return bytes(payload)


@pytest.mark.parametrize("party", [0, 1, 2])
@pytest.mark.parametrize("what", [TOKENIZER, TABLE, "pad_id", "lowercase"])
def test_a_share_whose_files_are_not_those_of_its_name_is_refused(
    table: Path, tmp_path: Path, party: int, what: str
) -> None:
    made = {TOKENIZER: another_tokenizer, TABLE: another_table}
    payload = made[what](table) if what in made else {"pad_id": b"3", "lowercase": b"true"}[what]
    words = "the model's name is not that of its files" if what == TABLE else "tokenizer: one of the digest"
    with pytest.raises(ShareError, match=words):
        load_share(changed(table, tmp_path, party, what, payload))


@pytest.mark.parametrize("party", [0, 1])
def test_weights_that_are_not_those_of_the_name_are_refused(table: Path, tmp_path: Path, party: int) -> None:
    weights = bytearray((table / f"party-{party}" / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    with pytest.raises(ShareError, match="the model's name is not that of its files"):
        load_share(changed(table, tmp_path, party, WEIGHTS, bytes(weights)))


def describing(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """All parties describe what is ``change``-d."""

    def describe(peer: Any, deployment: Any, role: str, options: Any) -> pb.Description:
        found = ask_description(peer, deployment, role, options)
        change(found)
        return found

    monkeypatch.setattr(client, "ask_description", describe)


@pytest.mark.parametrize("what", ["tokenizer", "pad_id", "lowercase", "table", "name"])
def test_a_client_refuses_what_the_name_does_not_bind(table: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Even where everything that a client asks says the same."""

    def change(found: pb.Description) -> None:
        if what == "tokenizer":
            found.tokenizer = another_tokenizer(table)
        elif what == "pad_id":
            found.pad_id = 3
        elif what == "lowercase":
            found.lowercase = not found.lowercase
        elif what == "table":
            assert [file.name for file in found.files] == [TOKEN_TABLE]
            found.files.add(name="another", sha256="0" * 64, size=1)
        else:
            found.model = "0" * 64 + found.model[64:]

    describing(monkeypatch, change)
    words = "than the model's name says" if what in ("table", "name") else "tokenizer: one of the digest"
    with running(table) as three, pytest.raises(HandshakeError, match=words):
        three.dial()


# a party 0 that deviates: its share has another token table, and the name that fits it


@pytest.fixture
def forged(table: Path, tmp_path: Path) -> Path:
    payload = another_table(table)
    copy = changed(table, tmp_path, 0, TABLE, payload)
    manifest = json.loads((copy / MANIFEST).read_text())
    honest = load_share(table / "party-0")
    name = public_name(
        [honest.program.digest], {TOKEN_TABLE: hashlib.sha256(payload).hexdigest()}, manifest["compiled_as"]
    )
    manifest["model"] = name + honest.manifest.model[64:]
    _write(copy / MANIFEST, json.dumps(manifest).encode())
    return copy


def test_a_client_compares_the_table_of_party_0_with_the_others(table: Path, forged: Path) -> None:
    with (
        running(table, shares={0: forged}, deadline=3) as three,
        pytest.raises(HandshakeError, match="party 1 has another model than party 0"),
    ):
        three.dial()


def test_a_client_compares_the_table_with_the_program(
    table: Path, forged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SAME", ("program",))  # as if it had not asked the others
    with (
        running(table, shares={0: forged}, deadline=3) as three,
        pytest.raises(DownloadError, match="not the one of the Program"),
    ):
        three.dial()


@pytest.mark.parametrize("party", [1, 2])
def test_parties_refuse_a_query_under_the_name_of_another_table(table: Path, forged: Path, party: int) -> None:
    """As if the client had compared nothing at all. The party reads no share of such a query."""
    name = load_share(forged).manifest.model
    start = pb.AskStart(version=WIRE_VERSION, model=name, session=bytes(16), seed=bytes(32), deadline=3.0)
    unread: queue.SimpleQueue[pb.AskPart | None] = queue.SimpleQueue()
    unread.put(pb.AskPart(start=start))
    with running(table) as three:
        (reply,) = PartyStub(three.parties[party].peer().channel).Ask(iter(unread.get, None), timeout=5)
        unread.put(None)
    assert reply.failure.code == HandshakeError.code
    assert "model: the client has" in reply.failure.message
