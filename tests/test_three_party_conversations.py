"""Texts of three parties over gRPC: each party keeps its part of the rows, and none reads what another has not kept."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import secure
from parties.limits.memory import PreparedMemory
from parties.proto import unseen_pb2 as pb
from parties.served.described import ask_description
from parties.three_party import conversations as module
from parties.three_party.client import ThreePartyLink, _PartyText
from parties.three_party.conversations import MAXIMUM_CONVERSATIONS, OF_ONE, PartyConversations, WantedProgram
from parties.three_party.pair_keys import PairKey
from parties.three_party.party_0 import Party0Service
from parties.three_party.party_2 import Party2Service
from parties.three_party.shared_model import MANIFEST, PROGRAMS, WEIGHTS, load_share, share_model
from protocols.protocol import Opening
from secure.deployments.three_party import PARTIES
from secure.errors import (
    Busy,
    Error,
    HandshakeError,
    InvalidInput,
    PartiesDisagree,
    QueryError,
    ShareError,
)
from secure.mpc.program import Program
from secure.session import session as session_module
from secure.session.session import Session
from tests.test_generator import BUCKETS, CAPACITY, PROMPTS, compiled, continued, decoder
from tests.three_parties import Three, running
from tests.tiny import wait_until

PROMPT = PROMPTS[0]
STEP, SHORT, LONG = 1, min(BUCKETS), max(BUCKETS)
LOG = logging.getLogger("test")


@cache
def public() -> secure.Compiled:
    deployment = secure.ThreeParty(public_weights=True)
    return secure.compile_generator(decoder("llama"), prompt=SHORT, capacity=CAPACITY, deployment=deployment)


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name of the model."""
    base = tmp_path_factory.mktemp("shares")
    made = {"llama": compiled("llama", "three"), "gpt2": compiled("gpt2", "three"), "public": public()}
    for name, model in made.items():
        share_model(model, base / name)
    return {name: base / name for name in made}


@pytest.fixture(scope="module")
def three(shares: dict[str, Path]) -> Iterator[Three]:
    with running(shares["llama"], ahead=1) as parties:
        yield parties


def expected(name: str, prompt: list[int], count: int) -> list[int]:
    return continued(decoder(name), prompt, count)


def kept(three: Three) -> list[int]:
    """The conversations that each party keeps."""
    return [len(conversations(three, party)) for party in range(3)]


def conversations(three: Three, party: int) -> PartyConversations:
    found = three.parties[party].service.conversations
    assert found is not None
    return found


# texts


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "public"])
def test_tokens_are_those_of_floating_point(shares: dict[str, Path], name: str, ahead: int) -> None:
    model = "llama" if name == "public" else name
    with running(shares[name], ahead=ahead) as three, three.dial() as session:
        programs = {size.program.digest: size for size in three.parties[0].service.share.sizes}
        for prompt in PROMPTS if name != "public" else ([5, 7, 9], [59]):
            assert list(session.generate(prompt, 6)) == expected(model, prompt, 6)
        for report in session.reports[-6:]:
            digest = next(offer.program_digest for offer in session.sizes if offer.length == report.length)
            cost = programs[digest].circuit.cost
            assert report.rounds == cost.rounds
            assert report.bytes(sender=PARTIES[2], phase="offline") == cost.dealt
            assert report.bytes(sender=PARTIES[1], receiver=PARTIES[0]) == cost.to_first


def test_a_step_is_dealt_while_another_runs(shares: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dealt, real = list[WantedProgram](), Party2Service._supply

    def noted(self: Any, number: bytes, key: Any, wanted: WantedProgram, *about: Any) -> Any:
        dealt.append(wanted)
        return real(self, number, key, wanted, *about)

    monkeypatch.setattr(Party2Service, "_supply", noted)
    for ahead, more in ((0, 0), (1, 1)):
        with running(shares["llama"], ahead=ahead) as three, three.dial() as session:
            stop = expected("llama", PROMPT, 3)[2]
            dealt.clear()
            assert list(session.generate(PROMPT, 10, stop={stop}))[-1] == stop
            wait_until(lambda more=more: len(dealt) >= 3 + more, "the next is dealt", 10)  # type: ignore[misc]
            assert [wanted.rows for wanted in dealt] == [0, SHORT, SHORT + 1, SHORT + 2][: 3 + more]


def test_texts_side_by_side_and_a_second_client(three: Three) -> None:
    with three.dial() as one, three.dial() as other:
        texts = [one.generate(PROMPTS[0], 5), one.generate(PROMPTS[1], 5), other.generate(PROMPTS[0], 5)]
        found = [list(text) for text in zip(*zip(*texts, strict=True), strict=True)]
    assert found == [expected("llama", PROMPTS[at], 5) for at in (0, 1, 0)]


def test_the_public_functions(shares: dict[str, Path]) -> None:
    where, deployment = shares["public"], secure.ThreeParty()
    with (
        secure.serve(where / "party-2", role="party 2", deployment=deployment) as two,
        secure.serve(where / "party-0", role="party 0", deployment=deployment, peers={PARTIES[2]: two.address}) as zero,
        secure.serve(
            where / "party-1",
            role="party 1",
            deployment=deployment,
            peers={PARTIES[0]: zero.address, PARTIES[2]: two.address},
        ) as one,
    ):
        *sizes, together, _memory = zero.about
        assert all(f"a query of {n} tokens takes" in line for n, line in zip((4, 1), sizes, strict=True))
        assert together == f"all 2 Programs together: {public().programs_digest}"
        addresses = secure.ThreeParty(parties=(zero.address, one.address, two.address))
        with secure.connect(addresses, cache=False) as session:
            assert list(session.generate(PROMPT, 3)) == expected("llama", PROMPT, 3)


def test_a_store_means_nothing_to_it(shares: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="keeps nothing ready in a store"):
        secure.serve(
            shares["llama"] / "party-2", role="party 2", deployment=secure.ThreeParty(), store=tmp_path / "store"
        )


# parties that fail


@pytest.mark.parametrize("party", [0, 1, 2])
def test_a_party_that_is_started_anew(shares: dict[str, Path], party: int) -> None:
    """What was written counts, nothing goes on from it, and the next text is whole."""
    with running(shares["llama"], ahead=1) as three, three.dial() as session:
        text = session.generate(PROMPT, 6)
        found = [next(text), next(text)]
        three.parties[party].restart()
        three.meet()
        with pytest.raises(Error, match="begin the text again"):
            next(text)
        assert found == expected("llama", PROMPT, 2)
        wait_until(lambda: kept(three)[:2] == [0, 0], "both have dropped it", 5)
        assert list(session.generate(PROMPT, 3)) == expected("llama", PROMPT, 3)


class Flips(Party0Service):
    """One bit of a frame of party 0 is changed on its way, when it is armed."""

    armed = False

    def Compute(self, requests: Any, context: Any) -> Iterator[pb.PeerMessage]:
        for number, message in enumerate(super().Compute(requests, context)):
            if type(self).armed and number == 5 and message.WhichOneof("content") == "frame":
                data = bytes([message.frame.data[0] ^ 1]) + message.frame.data[1:]
                message = pb.PeerMessage(frame=pb.Frame(data=data, last=message.frame.last))
            yield message


def test_a_query_that_failed_ends_its_text(shares: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with running(shares["llama"], {0: Flips}) as three, three.dial() as session:
        link, text = links(session)[STEP], conversation(session)
        assert kept(three) == [1, 1, 1]
        monkeypatch.setattr(Flips, "armed", True)
        with pytest.raises(PartiesDisagree):
            link.go_on(text, zeros(link), 1)
        monkeypatch.setattr(Flips, "armed", False)
        wait_until(lambda: kept(three)[1] == 0, "party 1 has dropped it", 5)
        with pytest.raises(QueryError, match="a query of this text has failed"):
            link.go_on(text, zeros(link), 2)
        text.ended = False
        with pytest.raises(QueryError, match=r"party \d keeps nothing of this text"):
            link.go_on(text, zeros(link), 3)
        wait_until(lambda: kept(three)[:2] == [0, 0], "both have dropped it", 5)


def test_a_row_that_one_party_alone_has_is_never_read(three: Three) -> None:
    """Party 2 has dealt a step that nobody computed; the query after it ends before a frame is sent."""
    with three.dial() as session:
        link, text = links(session)[STEP], conversation(session)
        mine = conversations(three, 2)._all[text.name]
        mine._queries[-1] = (0, bytes(16))
        with pytest.raises(Error, match="party 0 keeps other rows of this text than party 2"):
            link.go_on(text, zeros(link), 1)
    with three.dial() as session:
        link, text = links(session)[STEP], conversation(session)
        mine = conversations(three, 1)._all[text.name]
        mine._queries[-1] = (0, bytes(16))
        with pytest.raises(Error, match="party 1 keeps other rows of this text than party 0"):
            link.go_on(text, zeros(link), 1)
        wait_until(lambda: text.name not in conversations(three, 0)._all, "it has ended", 5)


# clients that send what they should not


def links(session: Session) -> dict[int, ThreePartyLink]:
    """The session's links, by the length of their Programs."""
    found = {offer.length: session._links.of(offer) for offer in session.sizes}
    assert all(isinstance(link, ThreePartyLink) for link in found.values())
    return found  # type: ignore[return-value]


def zeros(link: ThreePartyLink) -> Mapping[str, Any]:
    return link.program.encode(link.program.dummy_values(), link.tables)  # type: ignore[no-any-return]


def conversation(session: Session) -> _PartyText:
    """A text of which the prompt has been read."""
    link = links(session)[SHORT]
    text = link.converse(CAPACITY)
    link.go_on(text, zeros(link), 0)
    return text


def asked(link: ThreePartyLink, owner: Sequence[bytes], **place: Any) -> Any:
    wanted = WantedProgram(link.program.digest)._replace(**place)
    return link._ask(zeros(link), 0, wanted, owner)


def test_a_text_goes_on_from_an_earlier_row(three: Three) -> None:
    """The same place once more is another query, which reads the same and is masked anew."""
    with three.dial() as session:
        link, text = links(session)[STEP], conversation(session)
        first = link.go_on(text, zeros(link), 1)[0]
        link.go_on(text, zeros(link), 2)
        text.rows = SHORT
        again = link.go_on(text, zeros(link), 3)[0]
        assert [torch.equal(*each) for each in zip(first, again, strict=True)] == [True] * len(first)
        assert text.rows == SHORT + 1
        for party in range(3):
            assert conversations(three, party)._all[text.name].kept.filled in (SHORT + 1, SHORT + 2)  # ahead


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"rows": SHORT + 1}, r"keeps 4 rows, 5 are to be read"),
        ({"rows": CAPACITY}, "28 rows before 1 new ones, where 28 fit at most"),
        ({"rows": 2**64 - 1}, "where 28 fit at most"),
        ({"rows": 0}, "cannot have that place"),
        ({"conversation": bytes(16)}, r"party \d keeps nothing of this text"),
        ({"conversation": bytes(15)}, "has 16 bytes, not 15"),
        ({"conversation": b""}, "stand in conversations"),
        ({"program_digest": "f" * 64}, "has no Program 'ffffffffffff'"),
    ],
)
def test_hostile_places(three: Three, place: dict[str, Any], words: str) -> None:
    with three.dial() as session:
        link, text = links(session)[STEP], conversation(session)
        with pytest.raises(QueryError, match=words):
            asked(link, text.owner, **{"conversation": text.name, "rows": SHORT, **place})
        if place.get("rows") != SHORT + 1:  # nobody's text has ended by it
            link.go_on(text, zeros(link), 1)


def test_a_text_belongs_to_who_began_it(three: Three) -> None:
    """Its name alone, which all parties know, is of no use; nor is what one of them was shown."""
    with three.dial() as session:
        link, text = links(session)[STEP], conversation(session)
        place = {"conversation": text.name, "rows": SHORT}
        for owner in (text.owner[::-1], (text.owner[0], bytes(32)), (bytes(32), text.owner[1])):
            with pytest.raises(QueryError, match=r"party \d keeps nothing of this text"):
                asked(link, owner, **place)
            text = conversation(session)
            place["conversation"] = text.name
        with pytest.raises(QueryError, match="shows 32 bytes, not 3"):
            asked(link, (b"abc", b"abc"), **place)
        prompt = links(session)[SHORT]
        with pytest.raises(QueryError, match="begun before"):
            asked(prompt, text.owner, conversation=text.name)


def test_a_text_belongs_to_the_name_in_a_certificate() -> None:
    table, program = PartyConversations("it", LOG, PreparedMemory(1000)), step()
    made = table.open(WantedProgram("", bytes(16)), program, 1, "ann", bytes(32))
    table._rest(made)
    with pytest.raises(QueryError, match="keeps nothing"):
        table.open(WantedProgram("", bytes(16), 1), program, 1, "bob", bytes(32))
    table.close()


def test_parties_compare_what_a_client_wants(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ThreePartyLink._messages
    for party, words in ((1, "wants another query of party 1 than of party 0"), (2, "of party 2 than of party 0")):
        with three.dial() as session:
            link, text = links(session)[STEP], conversation(session)
            link.go_on(text, zeros(link), 1)

            def differing(self: Any, *about: Any, party: int = party) -> list[list[pb.AskPart]]:
                out = real(self, *about)
                out[party][0].start.wanted.rows -= 1
                return out

            monkeypatch.setattr(ThreePartyLink, "_messages", differing)
            with pytest.raises(Error, match=words):
                link.go_on(text, zeros(link), 2)
            monkeypatch.setattr(ThreePartyLink, "_messages", real)
            wait_until(lambda text=text: text.name not in conversations(three, 0)._all, "it ended", 5)  # type: ignore[misc]


def test_its_program_answers_nothing_outside_a_text(three: Three) -> None:
    with three.dial() as session, pytest.raises(QueryError, match="ask it to generate text"):
        links(session)[SHORT].ask({}, 0)


def test_what_follows_must_fit(three: Three) -> None:
    with three.dial() as session:
        link = links(session)[SHORT]
        wanted = WantedProgram(link.program.digest, secrets.token_bytes(16))
        for following in ("f" * 64, link.program.digest):
            with pytest.raises(QueryError, match=r"has no Program|cannot have that place"):
                link._ask(zeros(link), 0, wanted, (bytes(32), bytes(32)), following)


# what a party keeps is bounded


def step() -> Program:
    return compiled("llama", "three").sizes[-1].program  # type: ignore[no-any-return]


def named(number: int) -> WantedProgram:
    return WantedProgram("", number.to_bytes(16, "big"))


def test_memory_is_bounded(shares: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "BUSY", 0.1)
    with running(shares["llama"]) as three, three.dial() as session:
        size = 2 * step().kept_bytes
        conversations(three, 1).memory = PreparedMemory(size, who="party 1")
        first = session.generate(PROMPT, 3)
        next(first)
        assert conversations(three, 1).memory.used == size
        with pytest.raises(Busy, match="party 1 has no memory"):
            next(session.generate(PROMPT, 3))
        wait_until(lambda: kept(three)[:2] == [1, 1], "the other has ended", 5)
        assert list(first) == expected("llama", PROMPT, 3)[1:]


def test_who_rests_longest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    table, program = PartyConversations("it", LOG, PreparedMemory(3)), step()
    made = [table.open(named(number), program, 1) for number in range(3)]
    monkeypatch.setattr("parties.limits.memory.WAIT", 0.2)
    with pytest.raises(Busy):
        table.open(named(3), program, 1)
    assert len(table._seats) == 3
    monkeypatch.setattr(module, "SPARE", 0.0)
    key = PairKey(bytes(32), (0, 1))
    for each in (made[1], made[0]):
        with table.using(each, key):
            pass
    table.open(named(3), program, 1)
    assert made[1].ended
    assert not made[0].ended
    assert table.memory.used == 3
    with pytest.raises(QueryError, match="gave its place to others"):
        made[1].keep(named(1), bytes(16), {})
    monkeypatch.setattr(module, "IDLE", -1.0)
    table.sweep()
    assert [each.ended for each in made] == [True, True, False]  # the last is at work
    table.close()
    assert not len(table)
    assert not table.memory.used


def test_places_are_bounded() -> None:
    table, program = PartyConversations("it", LOG, PreparedMemory(1000)), step()
    for number in range(OF_ONE):
        table.open(named(number), program, 1, "ann")
    with pytest.raises(Busy, match="of this caller"):
        table.open(named(OF_ONE), program, 1, "ann")
    for number in range(OF_ONE, MAXIMUM_CONVERSATIONS):
        table.open(named(number), program, 1)
    with pytest.raises(Busy, match="64 conversations, which is its limit"):
        table.open(named(MAXIMUM_CONVERSATIONS), program, 1)
    table.close()


def test_queries_of_one_text_run_one_after_the_other() -> None:
    table, program = PartyConversations("it", LOG, PreparedMemory(1000)), step()
    made = table.open(named(1), program, 1)
    key = PairKey(bytes(32), (0, 1))
    made.keep(named(1), b"a" * 16, {"keys": Opening(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))})
    goes_on = named(1)._replace(rows=2)
    with pytest.raises(QueryError, match="under way"):
        table.open(goes_on, program, 1)
    with table.using(made, key):
        pass
    assert table.open(goes_on, program, 1) is made
    with pytest.raises(QueryError, match="lost its connection"), table.using(made, PairKey(bytes(32), (0, 1))):
        pass
    assert made.ended
    table.close()


def test_a_history_names_the_queries_whose_rows_are_read() -> None:
    table, row = PartyConversations("it", LOG, PreparedMemory(1000)), torch.zeros(1, 1, 3)
    made, other = (table.open(named(number), step(), 1) for number in range(2))

    def keep(where: Any, rows: int, number: bytes, count: int = 1) -> None:
        opened = row.expand(1, count, 3)
        where.keep(named(0)._replace(rows=rows), number, {"keys": Opening(opened, opened)})

    for each in (made, other):
        keep(each, 0, b"a", 3)
        keep(each, 3, b"b")
    assert made.history(0) == other.history(0) != made.history(1) == made.history(3) != made.history(4)
    assert made.history(3, b"b") == made.history(4)
    keep(made, 3, b"c")
    assert made.history(3) == other.history(3)
    assert made.history(4) != other.history(4)
    keep(made, 2, b"b")  # within the rows of the first
    assert made.history(2) == other.history(2)
    assert made.history(3) not in (other.history(3), other.history(4))
    assert made.kept.filled == 3
    abouts = [named(0), named(1), named(0)._replace(rows=1), named(0)._replace(program_digest="a")]
    assert len({each.about(history) for each in abouts for history in (b"", b"h")}) == 8
    table.close()


# shares of several Programs


def test_weights_are_shared_once(shares: dict[str, Path]) -> None:
    share = load_share(shares["gpt2"] / "party-0")
    assert [size.program.labels["length"] for size in share.sizes] == [str(LONG), str(SHORT), str(STEP)]
    assert sorted(f for f in share.manifest.files if f.startswith("program")) == sorted(PROGRAMS[:3])
    for size in share.sizes:
        assert set(size.circuit.weight_rings) == set(share.manifest.rings)
        assert all(bits <= share.manifest.rings[name] for name, bits in size.circuit.weight_rings.items())
    assert (shares["gpt2"] / "party-0" / WEIGHTS).stat().st_size < 8.5 * sum(
        torch.Size(shape).numel() for shape in share.manifest.shapes.values()
    )


def test_sizes_with_other_weights_are_not_shared(tmp_path: Path) -> None:
    model = compiled("llama", "three")
    step = model.others[-1]
    changed = {name: value + (name == max(step.model.integers)) for name, value in step.model.integers.items()}
    other = replace(step, model=replace(step.model, integers=changed))
    with pytest.raises(InvalidInput, match="sizes of this model have different weights"):
        share_model(replace(model, others=(other,)), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidInput, match="a model of 9 sizes"):
        share_model(replace(model, others=(step,) * 8), tmp_path)


def test_the_name_covers_all_programs(shares: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "party-0"
    shutil.copytree(shares["llama"] / "party-0", copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["files"][PROGRAMS[1]]
    (copy / MANIFEST).chmod(0o600)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ShareError, match="name is not that of its files"):
        load_share(copy)


def test_a_client_compares_all_programs_with_the_name(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ask_description

    def describe(*about: Any) -> pb.Description:
        found = real(*about)
        found.offers[-1].program_digest = "f" * 64
        return found

    monkeypatch.setattr("parties.three_party.client.ask_description", describe)
    with pytest.raises(HandshakeError, match="gives another Program or token table than the model's name says"):
        three.dial()


def test_other_models_are_shared_as_before(tmp_path: Path) -> None:
    made = secure.compile(nn.Linear(3, 2), {"input": torch.ones(1, 3)}, deployment=secure.ThreeParty())
    share_model(made, tmp_path)
    with running(tmp_path, ahead=1) as three, three.dial() as session:
        assert three.parties[0].service.conversations is None
        assert session.query({"input": torch.ones(1, 3)}).shape == (1, 2)
        with pytest.raises(QueryError, match="name no conversation"):
            asked(session.link, (bytes(32), bytes(32)), conversation=bytes(16))
