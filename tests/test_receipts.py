"""Receipts: what left is what Programs prescribe, every change of one is found, and nothing secret is in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from parties.cli.main import app
from parties.limits.memory import PreparedMemory
from parties.net import recorded
from parties.net.frames import PART, to_frames
from parties.net.recorded import Record
from parties.proto import unseen_pb2 as pb
from parties.receipts.receipt import Receipt
from parties.receipts.walk import frames
from parties.reports.verified import asked_for, found_in, verify
from parties.two_party import hosted
from parties.two_party.keys import MAXIMUM_STEPS
from parties.two_party.masked_model import MaskedModel
from parties.two_party.stocked import memory_of
from secure.errors import InvalidInput, InvalidProgram, ReceiptError
from secure.mpc.budget import PARTS, Budget
from tests import ckks_server, test_conversations
from tests.dealer_key import KEY
from tests.test_conversations import SHORT, STEP, masked  # noqa: F401 (a fixture)
from tests.test_generator import PROMPTS, compiled
from tests.three_parties import running, shared
from tests.tiny import TEXT, Ready, Served, call

Document = dict[str, Any]


def programs_of(receipt: Receipt, address: str) -> dict[str, bytes]:
    return dict(asked_for(receipt, address))


@pytest.fixture(scope="module")
def two(server: Served, dealer: Served) -> tuple[Receipt, dict[str, bytes]]:
    """The receipt of three queries of two parties, and their Program."""
    with call(server.address, dealer.address, receipts=True) as session:
        session.prepare()
        session.embed([TEXT, "", TEXT][::2])
        session.embed([TEXT])
        receipt = session.receipt()
    return receipt, programs_of(receipt, server.address)


def changed(receipt: Receipt, change: Callable[[Document], object]) -> Receipt:
    document = json.loads(json.dumps(receipt.as_dict()))
    change(document)
    return Receipt.from_json(json.dumps(document).encode())


def is_found(receipt: Receipt, programs: Mapping[str, bytes], change: Callable[[Document], object]) -> None:
    with pytest.raises((ReceiptError, InvalidInput)):
        verify(changed(receipt, change), programs)


# what left is what is prescribed


def test_two_parties(two: tuple[Receipt, dict[str, bytes]]) -> None:
    receipt, programs = two
    verify(receipt, programs)
    assert receipt.answered == 3
    assert [each.role for each in receipt.connections] == ["server", "dealer"]
    to_server = [message.kind for message in receipt.connections[0].sent]
    assert to_server.count("Session/query") == 3
    assert [message.kind for message in receipt.connections[1].sent] == ["Key", "Open"]
    assert not receipt.token


def test_bytes_are_those_of_the_reports(server: Served, dealer: Served) -> None:
    with call(server.address, dealer.address, receipts=True) as session:
        session.embed([TEXT])
        receipt = session.receipt()
        (report,) = session.reports
    sent = [message.bytes for message in receipt.connections[0].sent if message.kind == "Session/frame"]
    payload = report.bytes(sender="client", phase="online")
    assert payload < sum(sent) <= payload + 16 * len(sent)


def test_what_left_before_a_mistake_is_in_it(server: Served, dealer: Served) -> None:
    with call(server.address, dealer.address, receipts=True) as session:
        with pytest.raises(InvalidInput):
            session.embed([TEXT, " ".join([TEXT] * 9)])
        receipt = session.receipt()
    assert receipt.answered == 2
    verify(receipt, programs_of(receipt, server.address))


def test_a_session_that_broke(model: Ready, server: Served, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with call(server.address, dealer.address, receipts=True) as session:
        session.embed([TEXT])
        monkeypatch.setattr(session.link, "_receive", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.embed([TEXT])
        receipt = session.receipt()
    assert receipt.answered == 1
    verify(receipt, programs_of(receipt, server.address))


def test_text(masked: list[MaskedModel], dealer: Served) -> None:  # noqa: F811
    with (
        test_conversations.serving(masked, dealer) as served,
        call(served.address, dealer.address, receipts=True, deadline=20.0) as session,
    ):
        list(session.generate(PROMPTS[0], 10))
        list(session.generate(PROMPTS[1], 3))
        receipt = session.receipt()
    programs = {size.program.digest: size.program.encoded for size in compiled("llama").sizes}
    assert receipt.answered == 13
    verify(receipt, programs)

    def rows(document: Document) -> None:
        sent = document["connections"][0]["sent"]
        next(m for m in sent if m.get("place.rows"))["place.rows"] += 1 << 20

    def steps(number: int, document: Document) -> None:
        sent = document["connections"][0]["sent"]
        next(m for m in sent if m.get("steps", 0) > 1)["steps"] = number

    is_found(receipt, programs, rows)
    for number in (1, MAXIMUM_STEPS):
        is_found(receipt, programs, partial(steps, number))


def test_text_of_a_server_with_room_for_few(masked: list[MaskedModel], dealer: Served) -> None:  # noqa: F811
    """It puts several steps off, and the client asks for one of them, without the numbers of the others."""
    of = test_conversations.program
    room = PARTS * of(STEP).kept_bytes + memory_of(of(SHORT)) + memory_of(of(STEP))
    with (
        test_conversations.serving(masked, dealer, memory=PreparedMemory(room)) as served,
        call(served.address, dealer.address, receipts=True, deadline=20.0) as session,
    ):
        list(session.generate(PROMPTS[0], 6))
        receipt = session.receipt()
    asked = [message.said for message in receipt.connections[0].sent if message.kind == "Session/prepare"]
    assert {said["steps"] for said in asked} == {1, 2}
    assert receipt.answered == 6
    verify(receipt, {size.program.digest: size.program.encoded for size in compiled("llama").sizes})


def test_a_program_that_is_too_large_is_not_walked(
    two: tuple[Receipt, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted, "Budget", partial(Budget, memory=1e3))
    with pytest.raises(InvalidProgram, match="the budget is"):
        verify(*two)


@pytest.mark.parametrize("public", [False, True])
def test_three_parties(directory: Path, tmp_path: Path, public: bool) -> None:
    where = shared(directory, tmp_path / "shares", "one-hot", public_weights=public)
    with running(where) as parties, parties.dial(receipts=True) as session:
        session.embed([TEXT, TEXT])
        receipt: Receipt = session.receipt()
        programs = programs_of(receipt, parties.addresses[0])
    verify(receipt, programs)
    assert [each.role for each in receipt.connections] == ["party 0", "party 1", "party 2"]
    asked = [[m.kind for m in each.sent].count("Ask/start") for each in receipt.connections]
    assert asked == [2, 2, 0 if public else 2]
    for number, each in enumerate(receipt.connections):
        for at in range(len(each.sent)):
            is_found(receipt, programs, partial(_grow, number, at))
            if each.sent[at].kind != "Describe":
                is_found(receipt, programs, partial(_drop, number, at))


@pytest.mark.slow
def test_ciphertexts(tmp_path: Path) -> None:
    with ckks_server.running("refresh", tmp_path) as served:
        with ckks_server.dial(served.address, receipts=True) as session:
            session.query(ckks_server.inputs("refresh"))
            receipt: Receipt = session.receipt()
        programs = programs_of(receipt, served.address)
    verify(receipt, programs)
    kinds = [message.kind for message in receipt.connections[0].sent]
    assert kinds[:2] == ["Describe", "Upload/header"]
    for at in range(len(kinds)):
        is_found(receipt, programs, partial(_grow, 0, at))
    is_found(receipt, programs, lambda d: d["connections"][0]["sent"].pop())


# whatever is changed is found


def _grow(connection: int, at: int, document: Document) -> None:
    document["connections"][connection]["sent"][at]["bytes"] += 1


def _drop(connection: int, at: int, document: Document) -> None:
    del document["connections"][connection]["sent"][at]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_change_is_found(two: tuple[Receipt, dict[str, bytes]], data: st.DataObject) -> None:
    receipt, programs = two
    number = data.draw(st.integers(0, 1))
    count = len(receipt.connections[number].sent)
    at, other = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count - 1))

    def more(sent: list[Document]) -> None:
        sent[at]["bytes"] += data.draw(st.integers(1, 1 << 20))

    def less(sent: list[Document]) -> None:
        sent[at]["bytes"] = max(0, sent[at]["bytes"] - data.draw(st.integers(1, 9)))

    def gone(sent: list[Document]) -> None:
        sent.pop(at)

    def twice(sent: list[Document]) -> None:
        sent.insert(other, copy.deepcopy(sent[at]))

    def swapped(sent: list[Document]) -> None:
        sent[at], sent[other] = sent[other], sent[at]

    def renamed(sent: list[Document]) -> None:
        sent[at]["kind"] = data.draw(st.sampled_from([*recorded.OPEN, "Session/frame", "Exfiltrate", "Check"]))

    change = data.draw(st.sampled_from([more, less, gone, twice, swapped, renamed]))
    found = json.loads(json.dumps(receipt.as_dict()))
    change(found["connections"][number]["sent"])
    if found == receipt.as_dict() or _harmless(receipt, found, number):
        return
    with pytest.raises((ReceiptError, InvalidInput)):
        verify(Receipt.from_json(json.dumps(found).encode()), programs)


def _harmless(receipt: Receipt, found: Document, number: int) -> bool:
    """What a client may send as well: another description, key or seed, or none that it had kept."""
    own, rows = receipt.as_dict()["connections"][number]["sent"], found["connections"][number]["sent"]
    free = ("Describe", "Download", "Key", "Open")
    left = [[row for row in sent if row["kind"] not in free] for sent in (own, rows)]
    sizes = {row["kind"]: row["bytes"] for row in own}
    known = all(row["kind"] in free and row["bytes"] == sizes.get(row["kind"]) for row in rows if row not in own)
    return left[0] == left[1] and known and (number == 0 or any(row["kind"] == "Open" for row in rows))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(answered=2), "2 queries were answered; 3 were sent"),
        (lambda d: d.update(receipt=2), "its version is not 1"),
        (lambda d: d.update(wire=3), "messages of version 3"),
        (lambda d: d.update(more=1), "more"),
        (lambda d: d.update(model="ab" * 32), "another weights_digest"),
        (lambda d: d["connections"].pop(1), "1 sessions with a server, and 0 with the dealer"),
        (lambda d: d["connections"][1].update(role="friend"), "talks to this role"),
        (lambda d: d["connections"][0].update(proven=True), "proven without a certificate"),
        (lambda d: d["connections"][0]["sent"][-1].update(bytes=True), "bytes"),
        (lambda d: d["connections"][0]["sent"][-1].update(text="secret"), "does not say text"),
        (lambda d: d["connections"][0]["sent"].append({"kind": "Session/frame", "bytes": 9}), "behind the"),
        (lambda d: d["connections"][0]["sent"].append({"kind": "Leak", "bytes": 9}), "no conforming client"),
    ],
)
def test_changes_in_words(
    two: tuple[Receipt, dict[str, bytes]], change: Callable[[Document], object], why: str
) -> None:
    receipt, programs = two
    with pytest.raises((ReceiptError, InvalidInput), match=why):
        verify(changed(receipt, change), programs)


def test_another_program_is_not_taken(two: tuple[Receipt, dict[str, bytes]]) -> None:
    receipt, programs = two
    with pytest.raises(InvalidInput, match="is not among what was given"):
        verify(receipt, {})
    (digest,) = receipt.used
    with pytest.raises(InvalidInput, match="a Program that is not"):
        verify(receipt, {digest: programs[digest] + b" "})
    with pytest.raises(ReceiptError, match="does not offer"):
        verify(changed(receipt, lambda d: d["offers"][0].update(digest="0" * 64)), programs)


# what is in it, and where it is read


def test_nothing_secret_is_in_it(
    server: Served, dealer: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = list[Any]()
    noted = Record.sent

    def hold(self: Record, connection: Any, method: str, message: Any, size: int) -> None:
        held.append(message)
        noted(self, connection, method, message, size)

    monkeypatch.setattr(Record, "sent", hold)
    with call(server.address, dealer.address, receipts=True) as session:
        session.embed([TEXT])
        session.receipt().write(tmp_path / "receipt.json")
        ids = session.link._session
    written = (tmp_path / "receipt.json").read_bytes()
    secrets = [ids, *(m.sealed for m in held if isinstance(m, pb.OpenRequest))]
    secrets += [m.frame.data for m in held if isinstance(m, pb.ClientMessage) and m.frame.data]
    assert len(secrets) > 3
    for secret in secrets:
        for form in (secret, secret.hex().encode(), secret[:8].hex().encode()):
            assert len(secret) < 8 or form not in written
    for word in TEXT.split():
        assert word.encode() not in written


def test_no_secret_field_is_open() -> None:
    """Of the messages that a client sends, the fields that are kept are strings and numbers, never bytes."""
    known: dict[str, Any] = {
        "Describe": pb.DescribeRequest,
        "Download": pb.DownloadRequest,
        "Open": pb.OpenRequest,
        "Session/hello": pb.Hello,
        "Session/prepare": pb.Prepare,
        "Session/query": pb.Query,
        "Ask/start": pb.AskStart,
        "Upload/header": pb.KeysHeader,
        "Query/start": pb.CkksStart,
    }
    assert known.keys() == recorded.OPEN.keys()
    for kind, names in recorded.OPEN.items():
        for name in names:
            found: Any = known[kind].DESCRIPTOR
            *within, last = name.split(".")
            for part in within:
                found = found.fields_by_name[part].message_type
            assert found.fields_by_name[last].cpp_type != found.fields_by_name[last].CPPTYPE_MESSAGE
            assert found.fields_by_name[last].type != found.fields_by_name[last].TYPE_BYTES


def test_a_file_is_written_once_and_read_strictly(two: tuple[Receipt, dict[str, bytes]], tmp_path: Path) -> None:
    receipt, programs = two
    path = tmp_path / "receipt.json"
    receipt.write(path)
    assert path.stat().st_mode & 0o077 == 0
    assert Receipt.read(path) == receipt
    with pytest.raises(InvalidInput, match="cannot be written"):
        receipt.write(path)
    for text in (
        "",
        "[]",
        "{}",
        '{"receipt": 1}',
        path.read_text().replace('"wire"', '"receipt"', 1),
        "\xff",
        "[" * 99,
    ):
        path.write_text(text)
        with pytest.raises(InvalidInput, match="is no receipt"):
            Receipt.read(path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        Receipt.read(tmp_path)
    file = tmp_path / "program.json"
    ((digest, program),) = programs.items()
    file.write_bytes(program)
    assert found_in([file, tmp_path], [digest]) == programs
    with pytest.raises(InvalidInput, match="cannot be read"):
        found_in([tmp_path / "nothing"], [digest])


def test_a_command_writes_one(server: Served, dealer: Served, tmp_path: Path) -> None:
    key, path = tmp_path / "dealer.pub", tmp_path / "receipt.json"
    key.write_text(KEY.public.text)
    line = ["embed", TEXT, "--server", server.address, "--dealer", dealer.address, "--dealer-key", str(key)]
    line += ["--receipt", str(path), "--no-cache"]
    run = CliRunner().invoke
    said = run(app(), line)
    assert said.exit_code == 0, said.output
    receipt = Receipt.read(path)
    assert receipt.answered == 1
    verify(receipt, programs_of(receipt, server.address))
    assert "is there already" in str(run(app(), line).exception)


def test_a_session_without_a_record(server: Served, dealer: Served) -> None:
    with call(server.address, dealer.address) as session, pytest.raises(InvalidInput, match="receipts=True"):
        session.receipt()


def test_a_full_record_gives_no_receipt() -> None:
    record = Record(most=3)
    connection = record.opened("server", "here", proven=False)
    for _ in range(2):
        record.sent(connection, "/x/Check", pb.CheckRequest(), 1)
        record.complete()
    record.sent(connection, "/x/Check", pb.CheckRequest(), 1)
    with pytest.raises(InvalidInput, match="more than the"):
        record.complete()
    assert len(record.connections[0].sent) == 2


def test_frames_are_counted_in_their_parts() -> None:
    for payload in (1, 126, 127, 128, PART, PART + 1, 3 * PART):
        own = [pb.ClientMessage(frame=frame).ByteSize() for frame in to_frames(bytes(payload))]
        assert frames(pb.ClientMessage, [payload, 0]) == own


def test_the_command(two: tuple[Receipt, dict[str, bytes]], server: Served, tmp_path: Path) -> None:
    receipt, programs = two
    path, other = tmp_path / "receipt.json", tmp_path / "other.json"
    receipt.write(path)
    changed(receipt, partial(_grow, 0, 5)).write(other)
    for number, program in enumerate(programs.values()):
        (tmp_path / f"program-{number}.json").write_bytes(program)
    run = CliRunner().invoke
    for given_by in (["--program", str(tmp_path)], ["--server", server.address]):
        said = run(app(), ["verify", str(path), *given_by])
        assert said.exit_code == 0, said.output
        assert "3 answered queries" in said.output
        said = run(app(), ["verify", str(other), *given_by])
        assert said.exit_code == 1
        assert "message 6" in said.output
    assert isinstance(run(app(), ["verify", str(path)]).exception, InvalidInput)
