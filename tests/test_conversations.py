"""Texts over gRPC: each is a conversation of queries that client, server and dealer count by the same places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import pytest
import torch

from parties.limits import memory
from parties.limits.memory import PreparedMemory
from parties.limits.quotas import PREPARATIONS
from parties.net.network import Plaintext
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import add_InferenceServicer_to_server
from parties.served.published import Publication, Published
from parties.services.dealing import DealtModel
from parties.two_party import server as server_module
from parties.two_party.conversations import (
    MAXIMUM_CONVERSATIONS,
    TOGETHER,
    Conversations,
    Place,
    check_place,
    places_of,
)
from parties.two_party.dealer import DealerService
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.keys import Ratchet, deal_proof, proving_key
from parties.two_party.masked_model import MaskedModel, mask_models
from parties.two_party.server import InferenceService
from parties.two_party.stocked import memory_of, receive_together
from protocols.circuit import correction_places
from protocols.flow import Instruction
from protocols.prg import Key
from protocols.two_party import Input, KeptRows, Publish
from secure.deployments.two_party import SERVER
from secure.errors import Busy, DealerError, InvalidProgram, PeerLost, QueryError
from secure.mpc.budget import PARTS, Budget
from secure.mpc.program import Program
from secure.session import session as session_module
from secure.session.session import Session
from tests.dealer_key import KEY
from tests.helpers import key
from tests.test_generator import CAPACITY, PROMPTS, compiled, continued, decoder
from tests.tiny import Raw, Ready, Served, call, dealing, wait_until

pytest.importorskip("transformers")

STEP, SHORT, LONG = 1, 4, 8  # the lengths of the model's Programs
SERVER_SEED = bytes(range(32))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> list[MaskedModel]:
    made = mask_models([size.model for size in compiled("llama").sizes], tmp_path_factory.mktemp("state"))
    assert len({each.weights_digest for each in made}) == 1
    return made


@contextmanager
def serving(masked: list[MaskedModel], dealer: Served, **options: Any) -> Iterator[Served]:
    """A server of all Programs of the model."""
    peer = DealerPeer(dealer.address, Plaintext(), KEY.public.text)
    service = InferenceService(masked, peer, deadline=20.0, **options)
    held = compiled("llama").sizes
    offered = [
        Publication(each.deployment, m.program, m.weights_digest, m.files, each.tokenizer, each.tokenizer_json)
        for each, m in zip(held, masked, strict=True)
    ]
    log = server_module.log
    asked = lambda found: service.offer(found.program.digest, found.model)  # noqa: E731
    published = Published(SERVER, offered, deadline=20.0, log=log, asked=asked)
    served = Served(add_InferenceServicer_to_server, service, published=published)
    try:
        yield served
    finally:
        served.stop()
        service.close()


@pytest.fixture(scope="module")
def dealer() -> Iterator[Served]:
    with dealing() as found:
        yield found


@pytest.fixture(scope="module")
def server(masked: list[MaskedModel], dealer: Served) -> Iterator[Served]:
    with serving(masked, dealer) as found:
        yield found


def dial(server: Served, dealer: Served) -> Session:
    return call(server.address, dealer.address, deadline=20.0)


def expected(prompt: list[int], count: int) -> list[int]:
    return continued(decoder("llama"), prompt, count)


def program(length: int) -> Program:
    found: Program = next(
        size.program for size in compiled("llama").sizes if size.program.labels["length"] == str(length)
    )
    return found


# texts


def test_tokens_are_those_of_floating_point(server: Served, dealer: Served) -> None:
    with dial(server, dealer) as session:
        for prompt in PROMPTS:
            assert list(session.generate(prompt, 12)) == expected(prompt, 12)
            lengths = [report.length for report in session.reports[-12:]]
            assert lengths == [LONG if len(prompt) > SHORT else SHORT] + [1] * 11
        kinds = {offer.length: offer.program_digest for offer in session.sizes}
        for report in session.reports:
            found = program(report.length)
            assert kinds[report.length] == found.digest
            assert report.bytes(phase="online") == found.cost.to_first + found.cost.to_second
            assert report.bytes(sender="dealer", phase="offline") == found.cost.dealt


def test_two_texts_side_by_side_and_a_second_client(server: Served, dealer: Served) -> None:
    with dial(server, dealer) as one, dial(server, dealer) as other:
        texts = [one.generate(PROMPTS[0], 5), one.generate(PROMPTS[1], 5), other.generate(PROMPTS[0], 5)]
        found = [list(text) for text in zip(*zip(*texts, strict=True), strict=True)]
    assert found == [expected(PROMPTS[0], 5), expected(PROMPTS[1], 5), expected(PROMPTS[0], 5)]


def test_what_was_prepared_for_another_text_is_left(server: Served, dealer: Served) -> None:
    """A text that ends early leaves a step behind; prompts that were prepared for another length are left too."""
    with dial(server, dealer) as session:
        stop = expected(PROMPTS[0], 3)[2]
        for _ in range(2):
            session.prepare(SHORT)
            assert list(session.generate(PROMPTS[0], 12, stop={stop}))[-1] == stop
            session.prepare(LONG)
            assert list(session.generate(PROMPTS[0], 2)) == expected(PROMPTS[0], 2)
        session.prepare(LONG)
        session.prepare(SHORT)
        assert list(session.generate(PROMPTS[1], 2)) == expected(PROMPTS[1], 2)


def test_the_text_that_rested_longest_gives_way(server: Served, dealer: Served) -> None:
    with dial(server, dealer) as session:
        texts = [session.generate(PROMPTS[0], 4) for _ in range(MAXIMUM_CONVERSATIONS + 1)]
        for text in texts:
            next(text)
        with pytest.raises(QueryError, match="has ended: a session keeps 4"):
            next(texts[0])
        assert list(texts[1]) == expected(PROMPTS[0], 4)[1:], "the session goes on"


def test_a_server_that_is_lost_ends_the_text(masked: list[MaskedModel], dealer: Served) -> None:
    found: list[int] = []
    with serving(masked, dealer) as served, dial(served, dealer) as session:
        text = session.generate(PROMPTS[0], 8)
        found += [next(text), next(text)]
        served.stop()
        with pytest.raises(PeerLost):
            found += text
        with pytest.raises(PeerLost, match="has ended"):
            next(session.generate(PROMPTS[0], 2))
    assert found == expected(PROMPTS[0], 2)


def test_what_is_prepared_ends_the_same_text_everywhere(server: Served, dealer: Served) -> None:
    """A prompt that is prepared is a text: client, server and dealer count it when its number is drawn."""
    with dial(server, dealer) as session:
        texts = [session.generate(PROMPTS[0], 4) for _ in range(MAXIMUM_CONVERSATIONS)]
        for text in texts:
            next(iter(text))
        session.prepare(SHORT)
        with pytest.raises(QueryError, match="has ended"):
            next(iter(texts[0]))
        for text in texts[1:]:
            assert list(text)[-1] == expected(PROMPTS[0], 4)[-1]


def test_positions_are_counted_in_one_way(server: Served, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step's positions would show the length of the prompt."""
    real = Program.publishes.fget  # type: ignore[attr-defined]
    with dial(server, dealer) as session:
        monkeypatch.setattr(Program, "publishes", property(lambda self: real(self) and not self.rows))
        with pytest.raises(InvalidProgram, match="count positions differently"):
            next(iter(session.generate(PROMPTS[0], 4)))
        assert not session.reports


def test_every_token_counts_for_the_quotas(masked: list[MaskedModel], dealer: Served) -> None:
    counted: list[tuple[str, int]] = []
    spend = lambda who, what, count: counted.append((what, count))  # noqa: E731
    with serving(masked, dealer, spend=spend) as served, dial(served, dealer) as session:
        list(session.generate(PROMPTS[0], 5))
    assert sum(count for what, count in counted if what == PREPARATIONS) == 5


# bounds


def test_memory_for_rows_is_taken_before_they_come(
    masked: list[MaskedModel], dealer: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = 2 * program(STEP).kept_bytes
    held: list[int] = []
    with serving(masked, dealer, memory=PreparedMemory(1 << 30)) as served:
        service: Any = served.service
        with dial(served, dealer) as session:
            for _ in range(3):
                list(session.generate(PROMPTS[0], 2))
                held.append(kept)
                wait_until(lambda: service.memory.used == sum(held), "the rows of texts alone are held")
            for _ in range(MAXIMUM_CONVERSATIONS):
                list(session.generate(PROMPTS[0], 2))
            wait_until(lambda: service.memory.used == MAXIMUM_CONVERSATIONS * kept, "those of four texts at most")
        wait_until(lambda: not service.memory.used, "memory is given back")
    short = PreparedMemory(kept - 1)
    with serving(masked, dealer, memory=short) as served, dial(served, dealer) as session:
        monkeypatch.setattr(memory, "WAIT", 0.1)
        monkeypatch.setattr(session_module, "BUSY", 0.1)
        with pytest.raises(Busy, match="no memory for another query"):
            next(session.generate(PROMPTS[0], 2))


def test_the_dealers_memory_is_bounded_and_given_back(masked: list[MaskedModel]) -> None:
    service = DealerService(KEY)
    service.kept = PreparedMemory(program(STEP).kept_bytes, "memory for kept masks", "none", "the dealer")
    with dealing(service) as dealer, serving(masked, dealer) as served:
        with dial(served, dealer) as session:
            list(session.generate(PROMPTS[0], 2))
            assert service.kept.used == program(STEP).kept_bytes
            with pytest.raises(Busy, match="the dealer has no memory for kept masks"):
                next(session.generate(PROMPTS[0], 2))
        with dial(served, dealer) as session:
            assert list(session.generate(PROMPTS[0], 2)) == expected(PROMPTS[0], 2)


def test_what_a_dealer_refuses_holds_no_memory(masked: list[MaskedModel]) -> None:
    service = DealerService(KEY)
    with dealing(service) as dealer, serving(masked, dealer) as served:
        with dial(served, dealer) as session:
            list(session.generate(PROMPTS[0], 2))
        wait_until(lambda: not service.kept.used, "the session has ended")
        raw = joined(served, dealer, masked)
        begin = Place(program(SHORT).digest, 0, 0)
        dealt(raw, 0, begin)
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                dealt(raw, 0, begin)
        assert service.kept.used == program(SHORT).kept_bytes


def shown(program: Program) -> list[Program]:
    """The Program with a Publish that it should not have: of each of its inputs, and of what follows from them."""
    found = []
    public = {c.name for c in program.client_inputs if c.encoding == "public"}
    for index, instruction in enumerate(program.circuit):
        p = instruction.protocol
        if p.gives == "share" and not (isinstance(p, Input) and p.name in public):
            more = Instruction(Publish(p.out.shape, p.out.bits), (index,))
            found.append(
                replace(program, circuit=(*program.circuit, more), paths=(*program.paths, program.paths[index]))
            )
    return found


@pytest.mark.parametrize("length", [STEP, SHORT])
def test_a_program_makes_public_what_is_public(length: int) -> None:
    """A server that adds a Publish to its Program would read its clients' tokens."""
    evil = shown(program(length))
    assert len(evil) > 20
    for each in evil[:4] + evil[4::10]:
        with pytest.raises(InvalidProgram, match="would make more public than position_ids"):
            Program.from_bytes(each.encoded)


def test_a_budget_counts_the_rows(masked: list[MaskedModel]) -> None:
    step = program(STEP)
    Budget().admit(step)
    greedy = replace(step, labels={**step.labels, "capacity": "1000000"})
    with pytest.raises(InvalidProgram, match="GB of memory"):
        Budget(memory=0.1e9).admit(greedy)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"task": "embed"}, "does not say that it generates text"),
        ({"capacity": "many"}, "does not say that it generates text"),
        ({"capacity": str(CAPACITY - 1)}, f"reads {CAPACITY} rows of earlier queries, where {CAPACITY - 1} are kept"),
    ],
)
def test_programs_that_keep_rows_say_so(labels: dict[str, str], reason: str) -> None:
    step = program(STEP)
    with pytest.raises(InvalidProgram, match=reason):
        Program.from_bytes(replace(step, labels={**step.labels, **labels}).encoded)


# places


def test_places_that_a_query_cannot_have() -> None:
    step, prompt = program(STEP), program(SHORT)
    check_place(Place(prompt.digest, 5, 0), 5, prompt)
    check_place(Place(step.digest, 4, CAPACITY - 1), 5, step)
    for query, place, which in (
        (5, Place(prompt.digest, 3, 2), prompt),  # a prompt reads nothing
        (5, Place(prompt.digest, 4, 0), prompt),  # it is named after its number
        (5, Place(step.digest, 5, 0), step),  # a step reads something
        (5, Place(step.digest, 5, 4), step),  # of an earlier query
        (5, Place(step.digest, 9, 4), step),
        (5, Place(step.digest, 4, CAPACITY), step),  # no room for its own row
        (5, Place(step.digest, 4, 1 << 63), step),
    ):
        with pytest.raises(QueryError):
            check_place(place, query, which)


def test_keys_of_places_have_nothing_in_common() -> None:
    places = [(), Place("ab", 1, 0), Place("ab", 1, 1), Place("ab", 0, 1), Place("cd", 1, 1)]
    keys = {Ratchet(bytes(32), "client", bytes(16), "ab").key(1, *place).value for place in places}
    proofs = {deal_proof(bytes(32), bytes(16), 1, *place) for place in places}
    assert len(keys) == len(proofs) == len(places)


def joined(server: Served, dealer: Served, masked: list[MaskedModel]) -> Raw:
    """A client's session by hand, which somebody joined who knows the seed of the mask: a server that lies."""
    first = masked[0]
    raw = Raw(server, dealer, Ready(compiled("llama"), first))
    raw.dealer.Join(raw.join(first.mask_seed, SERVER_SEED))
    return raw


def dealt(raw: Raw, query: int, place: Place | None, proven: Place | None = None) -> bytes:
    """What the dealer deals for a place. proven: the one of the proof, if it is another."""
    own = proven or place
    proof = deal_proof(proving_key(SERVER_SEED), raw.token, query, *((*own, 1) if own is not None else ()))
    request = pb.DealRequest(session=raw.token, query=query, proof=proof, place=place and place.message(), steps=1)
    return b"".join(chunk.data for chunk in raw.dealer.Deal(request))


def test_a_dealer_deals_for_places_that_there_are(server: Served, dealer: Served, masked: list[MaskedModel]) -> None:
    step, prompt = program(STEP), program(SHORT)
    begin = Place(prompt.digest, 0, 0)
    with dial(server, dealer) as session:  # so that all Programs are registered
        list(session.generate(PROMPTS[0], 2))
    raw = joined(server, dealer, masked)

    def refused(query: int, place: Place | None, why: str, proven: Place | None = None) -> None:
        with pytest.raises(grpc.RpcError, match=why):
            dealt(raw, query, place, proven)

    refused(0, None, "stand in conversations")
    refused(0, begin, "only the server that joined", Place(prompt.digest, 0, 1))
    refused(0, Place("0" * 64, 0, 0), "another Program, which the dealer does not know")
    refused(0, Place(step.digest, 0, 4), "goes on with a conversation that is named 0")
    assert len(dealt(raw, 0, begin)) == prompt.cost.dealt, "nothing was burnt by what was refused"
    refused(0, begin, "begun before|already used")
    refused(1, Place(step.digest, 0, 5), "4 rows are kept, 5 are to be read")
    assert len(dealt(raw, 1, Place(step.digest, 0, 4))) == step.cost.dealt
    assert len(dealt(raw, 2, Place(step.digest, 0, 5))) == step.cost.dealt
    assert len(dealt(raw, 3, Place(step.digest, 0, 4))) == step.cost.dealt, "a text may go on from an earlier row"
    refused(4, Place(step.digest, 0, 6), "5 rows are kept, 6 are to be read")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda place: None, "stand in conversations"),
        (lambda place: place._replace(rows=place.rows + 1), "rows are kept|cannot have that place"),
        (lambda place: place._replace(first=place.first + 1), "has ended|goes on|begins a conversation"),
        (lambda place: place._replace(program_digest="0" * 64), "another model"),
    ],
    ids=["none", "more rows", "another text", "another Program"],
)
def test_a_server_refuses_places_that_there_are_not(
    change: Callable[[Place], Place | None],
    why: str,
    server: Served,
    dealer: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from parties.two_party import client as client_module

    real = client_module._Wanted.place

    def changed(self: Any, query: int) -> Place | None:
        place = real(self, query)
        return place and change(place)

    with dial(server, dealer) as session:
        text = session.generate(PROMPTS[0], 4)
        next(text)
        session.prepare(SHORT)  # beside the step that was asked for
        monkeypatch.setattr(client_module._Wanted, "place", changed)
        with pytest.raises((QueryError, DealerError, PeerLost), match=why):
            next(session.generate(PROMPTS[1], 2))


def test_parties_that_disagree_get_noise(server: Served, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads other rows than it says has keys that belong to nothing."""
    from parties.two_party import client as client_module

    class Deaf(Ratchet):
        def key(self, query: int, *place: str | int) -> Key:
            return super().key(query)

    monkeypatch.setattr(client_module, "Ratchet", Deaf)
    with dial(server, dealer) as session:
        wrong = 0
        for _ in range(3):
            try:
                wrong += list(session.generate(PROMPTS[0], 3)) != expected(PROMPTS[0], 3)
            except Exception:  # a token outside the vocabulary, or a value out of range
                wrong += 1
        assert wrong == 3


def test_conversations_end_with_their_session() -> None:
    ended: list[int] = []
    held, step = Conversations(), program(SHORT)
    for first in range(MAXIMUM_CONVERSATIONS + 1):
        held.begin(first, step, partial(ended.append, first))
    assert ended == [0]
    with pytest.raises(QueryError, match="begun before"):
        held.begin(2, step)
    held.clear()
    assert sorted(ended) == list(range(MAXIMUM_CONVERSATIONS + 1))


# steps that are prepared together


@pytest.mark.parametrize("count", [1, 3])
def test_steps_dealt_together_get_the_corrections_of_steps_dealt_one_by_one(count: int) -> None:
    """The same keys give the same bytes, and the same masks of rows are kept behind those that were there."""
    first, mask = DealtModel.of(program(SHORT), key()), key()
    step = DealtModel.of(program(STEP), mask)
    one, together = KeptRows(first.program.capacity), KeptRows(first.program.capacity)
    begun = (key(), key())
    for kept in (one, together):
        for _ in first.conversed([begun], kept, 0):
            pass
    keys, rows, size = [(key(), key()) for _ in range(count)], SHORT - 1, step.program.cost.dealt  # a row is forgotten
    alone = [b"".join(step.conversed([each], one, rows + i)) for i, each in enumerate(keys)]
    parts = [bytes(part) for part in step.conversed(keys, together, rows)]
    expected = receive_together(step.program.circuit, [pair[0] for pair in keys], size, parts)
    places = correction_places(step.program.circuit)
    for own, whole in zip(expected, alone, strict=True):
        found: Any = own._corrections
        assert {index: bytes(found[index]) for index in places} == {i: whole[place] for i, place in places.items()}
    assert one.filled == together.filled == rows + count
    ours, theirs = (kept.given(step.program.circuit) for kept in (one, together))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_steps_come_together_as_the_text_grows(masked: list[MaskedModel], dealer: Served) -> None:
    counted: list[int] = []
    spend = lambda who, what, count: counted.append(count) if what == PREPARATIONS else None  # noqa: E731
    with serving(masked, dealer, spend=spend) as served, dial(served, dealer) as session:
        assert list(session.generate(PROMPTS[0], 12)) == expected(PROMPTS[0], 12)
    assert sum(counted) == 12
    assert max(counted) == TOGETHER
    assert counted[:2] == [1, 2]


def test_a_server_with_room_for_few_prepares_one_by_one(masked: list[MaskedModel], dealer: Served) -> None:
    counted: list[int] = []
    spend = lambda who, what, count: counted.append(count) if what == PREPARATIONS else None  # noqa: E731
    room = PARTS * program(STEP).kept_bytes + memory_of(program(SHORT)) + memory_of(program(STEP))
    with serving(masked, dealer, memory=PreparedMemory(room), spend=spend) as served, dial(served, dealer) as session:
        assert list(session.generate(PROMPTS[0], 6)) == expected(PROMPTS[0], 6)
    assert counted == [1] * 6


@pytest.mark.parametrize(
    ("length", "rows", "steps"),
    [(SHORT, 0, 2), (STEP, SHORT, TOGETHER + 1), (STEP, CAPACITY - 1, 2), (STEP, SHORT, 1 << 31), (STEP, None, 2)],
)
def test_steps_that_cannot_be_prepared_together_are_refused(length: int, rows: int | None, steps: int) -> None:
    found = program(length)
    place = None if rows is None else Place(found.digest, 0 if rows else 5, rows).message()
    with pytest.raises(QueryError):
        places_of(pb.Prepare(query=5, place=place, steps=steps), found)
    if rows:
        assert len(places_of(pb.Prepare(query=5, place=place), found)) == 1


def test_the_number_of_steps_is_part_of_the_servers_proof() -> None:
    session, place = bytes(16), Place("a", 0, 4)
    assert deal_proof(bytes(32), session, 1, *place, 1) != deal_proof(bytes(32), session, 1, *place, 2)
