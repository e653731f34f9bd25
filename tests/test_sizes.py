"""One model for several lengths and batches, and several models, on one server."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secure
from parties import deployments
from parties.proto import unseen_pb2 as pb
from parties.served import described as described_module
from parties.served.files import MASKED_WEIGHTS, unpack_masked
from parties.two_party.keys import mask_key
from parties.two_party.masked_model import mask_models
from protocols.prg import fresh_seed
from protocols.weights import DealerWeights
from secure.deployments.compilation import Compilation
from secure.deployments.deployment import CompileOptions
from secure.errors import HandshakeError, InputTooLong, InvalidInput, PeerLost, ProtocolError
from secure.lowering.client_inputs import MAXIMUM_BATCH
from secure.session.link import MAXIMUM_LENGTHS, Link, Offer, digest_of_all
from secure.session.queries import planned
from secure.tasks.embed import Embed
from tests.tiny import LENGTH, TEXT, WORDS, dealing, expected, sentences, write_model

LENGTHS, BATCHES = (4, 6, LENGTH), (1, 3)
TEXTS = [" ".join(WORDS[i : i + words]) for i, words in enumerate((2, 6, 1, 4, 3, 2, 5, 1, 2))]
TOKENS = [4, 8, 4, 6, 6, 4, 8, 4, 4]  # the shortest of LENGTHS that holds each with its two special tokens


def compiled_sizes(directory: Path, lengths: Any = LENGTHS, batches: Any = BATCHES) -> secure.Compiled:
    return secure.compile_text_model(
        str(directory), lengths, batch=batches, embedding="client-table", calibration=sentences()
    )


@pytest.fixture(scope="module")
def compiled(directory: Path) -> secure.Compiled:
    return compiled_sizes(directory)


@pytest.fixture(scope="module")
def address(compiled: secure.Compiled, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three models on one server: that of several sizes, one that has other weights, and a copy of this one."""
    models = tmp_path_factory.mktemp("models")
    other, copy = write_model(models / "other", seed=5), write_model(models / "copy", seed=5)
    with ExitStack() as stack:
        dealer = stack.enter_context(dealing())
        held = [compiled, compiled_sizes(other, LENGTH, 1), compiled_sizes(copy, LENGTH, 1)]
        service = stack.enter_context(
            deployments.serve(
                held, role="server", peers={"dealer": dealer.address}, state=tmp_path_factory.mktemp("state")
            )
        )
        yield secure.TwoParty(server=service.address, dealer=dealer.address)


def connect(address: Any, directory: Path, **options: Any) -> secure.Session:
    return deployments.connect(address, **{"model": directory.name, "pace": 0.0, **options})


def right(directory: Path, text: str, answer: Any) -> None:
    torch.testing.assert_close(answer, expected(directory, text)[: len(answer)], atol=2e-2, rtol=0)


def test_every_pair_of_a_length_and_a_batch_is_compiled(compiled: secure.Compiled) -> None:
    found = [(Offer.of(size.program).length, Offer.of(size.program).batch) for size in compiled.sizes]
    assert found == [(n, batch) for n in sorted(LENGTHS, reverse=True) for batch in BATCHES]
    assert len({size.program.digest for size in compiled.sizes}) == len(found)


def test_a_text_takes_the_shortest_length_that_holds_it(address: Any, directory: Path) -> None:
    with connect(address, directory) as session:
        assert [(o.length, o.batch) for o in session.sizes] == [(n, b) for n in LENGTHS for b in BATCHES]
        assert (session.length, session.batch) == (LENGTH, 3)
        for text, tokens in zip(TEXTS, TOKENS, strict=True):
            (answer,) = session.embed([text])
            right(directory, text, answer)
            assert session.report is not None
            assert session.report.length == tokens


def test_a_list_fills_batches_of_each_length_and_keeps_its_order(address: Any, directory: Path) -> None:
    with connect(address, directory) as session:
        answers = list[Any]()
        for text, tokens, answer in zip(TEXTS, TOKENS, session.run(Embed(), TEXTS), strict=True):
            right(directory, text, answer)
            assert session.report is not None
            assert session.report.length == tokens
            answers.append(answer)
        sent = [report.length for report in session.reports]
        assert sorted(sent) == [4, 4, 6, 8]  # 5 texts of 4 tokens make a query of 3 and one of 2, filled up
        for text, found in zip(TEXTS, session.stream(Embed(), iter(TEXTS), window=4), strict=True):
            right(directory, text, found)


def test_fixed_length_hides_lengths(address: Any, directory: Path) -> None:
    with connect(address, directory, fixed_length=True) as session:
        assert {size.length for size in session.sizes} == {LENGTH}
        for text, answer in zip(TEXTS, session.embed(TEXTS), strict=True):
            right(directory, text, answer)
        assert {report.length for report in session.reports} == {LENGTH}
        assert len(session.reports) == len(TEXTS) // 3


def test_a_pinned_program_is_the_only_one(address: Any, directory: Path, compiled: secure.Compiled) -> None:
    short = compiled.sizes[-2]
    with connect(address, directory, program_digest=short.program.digest) as session:
        assert [(o.length, o.batch) for o in session.sizes] == [(4, 1)]
        right(directory, TEXTS[0], session.embed([TEXTS[0]])[0])
        with pytest.raises(InputTooLong, match="the limit is 4"):
            session.embed([TEXTS[1]])
    with pytest.raises(HandshakeError, match="Program digest"), connect(address, directory, program_digest="0" * 64):
        pass


def test_all_programs_can_be_pinned_together(address: Any, directory: Path, compiled: secure.Compiled) -> None:
    with connect(address, directory, program_digest=compiled.programs_digest) as session:
        assert len(session.sizes) == len(compiled.sizes)
        right(directory, TEXTS[0], session.embed([TEXTS[0]])[0])
    digests = [size.program.digest for size in compiled.sizes]
    assert digest_of_all(digests) == digest_of_all([*reversed(digests), digests[0]]) == compiled.programs_digest
    assert digest_of_all(digests[:1]) == digests[0]
    others = {digest_of_all(digests[:count]) for count in range(1, len(digests) + 1)}
    assert len(others) == len(digests)
    for other in others - {compiled.programs_digest, digests[0]}:
        refused = pytest.raises(HandshakeError, match="for all its Programs together, this client expects")
        with refused, connect(address, directory, program_digest=other):
            pass


def test_what_cannot_be_used_goes_to_the_greatest_length(address: Any, directory: Path) -> None:
    long = " ".join(WORDS[:40])
    with connect(address, directory) as session:
        found = list(session.stream(Embed(), [long, TEXTS[0], ""]))
        assert isinstance(found[0], InputTooLong)
        assert isinstance(found[2], secure.EmptyInput)
        right(directory, TEXTS[0], found[1])
        assert sorted(report.length for report in session.reports) == [4, LENGTH]


def test_a_text_that_is_split_has_pieces_of_different_lengths(address: Any, directory: Path) -> None:
    long = " ".join(WORDS[:8])
    with connect(address, directory) as split, connect(address, directory, fixed_length=True) as fixed:
        (ours,), (theirs,) = split.embed([long], long="split"), fixed.embed([long], long="split")
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)
        assert [report.length for report in split.reports] == [8, 4]


def test_models_are_told_by_their_names(address: Any, directory: Path) -> None:
    with connect(address, directory) as session, connect(address, directory, model="other") as other:
        (ours,), (theirs,) = session.embed([TEXT]), other.embed([TEXT])
        right(directory, TEXT, ours)
        assert (ours - theirs).abs().max() > 0.1
        assert [(o.length, o.batch) for o in other.sizes] == [(LENGTH, 1)]
        assert session.link.model != other.link.model
    with (
        pytest.raises(HandshakeError, match="offers several models") as caught,
        connect(address, directory, model=None),
    ):
        pass
    assert f"name one: {', '.join(sorted(['copy', directory.name, 'other']))}" in str(caught.value)
    with connect(address, directory, model="copy") as copy:  # of equal weights, which the two share
        assert [(o.length, o.batch) for o in copy.sizes] == [(LENGTH, 1)]
        torch.testing.assert_close(copy.embed([TEXT])[0], theirs, atol=1e-3, rtol=0)
    with pytest.raises(HandshakeError, match="offers no model 'absent'"), connect(address, directory, model="absent"):
        pass


def test_prepare_is_for_a_length(address: Any, directory: Path) -> None:
    with connect(address, directory) as session:
        session.prepare(5)
        assert session.ready == 1
        session.embed([TEXTS[3]])
        assert session.ready == 0
        session.prepare()
        session.embed([TEXTS[0]])
        assert session.ready == 1  # for the greatest length
        with pytest.raises(InvalidInput, match=f"no query has {LENGTH + 1} tokens"):
            session.prepare(LENGTH + 1)


def test_a_lost_link_is_opened_again(address: Any, directory: Path) -> None:
    with connect(address, directory) as session:
        session.embed(TEXTS[:1])
        assert len(session._links.opened) == 2
        session._links.opened[1]._call.cancel()  # type: ignore[attr-defined]
        (answer,) = session.stream(Embed(), TEXTS[:1])
        right(directory, TEXTS[0], answer)


def test_links_share_what_is_large(address: Any, directory: Path) -> None:
    with connect(address, directory) as session:
        session.embed(TEXTS)
        links = session._links.opened
        assert len(links) >= 3
        assert len({id(link._weights) for link in links}) == 1  # type: ignore[attr-defined]
        assert len({id(table) for link in links for table in link.tables.values()}) == len(links[0].tables)


class Posing(Link):
    """A link whose Program has other labels than its offer."""

    def __init__(self, link: Link, **labels: str) -> None:
        self._link, self.program = link, dataclasses.replace(link.program, labels={**link.program.labels, **labels})
        self.tables, self.tokenizer, self.model, self.closed = link.tables, link.tokenizer, link.model, False

    def ask(self, values: Any, number: int, *, ahead: bool = False) -> Any:
        raise AssertionError("nothing is asked of it")

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("label", ["length", "batch", "model", "normalized", "tokenizer"])
def test_a_program_of_another_model_is_refused(compiled: secure.Compiled, label: str) -> None:
    """A server that answers for one size with the Program of another model would give answers that do not belong."""
    first, second = compiled.sizes[0], compiled.sizes[2]
    main = first.deployment.insecure(first.model, first.tokenizer)
    posing = Posing(second.deployment.insecure(second.model, second.tokenizer), **{label: "7"})
    offers = [Offer.of(first.program), dataclasses.replace(Offer.of(second.program), program_digest="a" * 64)]
    with secure.Session(main, pace=0.0, open=lambda _: posing, offers=offers) as session:
        with pytest.raises(HandshakeError, match="not one of the same model"):
            session.embed([TEXTS[0]])
        assert posing.closed


# the parts


@given(
    lengths=st.lists(st.sampled_from([4, 8, 16]), max_size=40),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
)
def test_inputs_are_put_into_queries(lengths: list[int], batches: list[int]) -> None:
    offers = [Offer(length, batch, "") for length in (4, 8, 16) for batch in batches]
    found = planned(lengths, offers)
    assert sorted(place for query in found for place in query.places) == list(range(len(lengths)))
    assert [query.places[0] for query in found] == sorted(query.places[0] for query in found)
    for query in found:
        assert {lengths[place] for place in query.places} == {query.size.length}
        assert list(query.places) == sorted(query.places)
        assert 1 <= len(query.places) <= query.size.batch
        smaller = [batch for batch in batches if batch < query.size.batch]
        assert 2 * len(query.places) >= query.size.batch or not smaller
    for length in set(lengths):
        own = [place for query in found if query.size.length == length for place in query.places]
        assert own == sorted(own)


def test_sizes_share_one_mask_only_for_equal_weights(compiled: secure.Compiled, tmp_path: Path) -> None:
    """Two different weights under one mask would show their difference to whoever holds both."""
    other = compiled_sizes(write_model(tmp_path / "other", seed=7), LENGTH, 1)
    models = [size.model for size in (*compiled.sizes, *other.sizes)]
    masked = mask_models(models, tmp_path)
    assert len({each.weights_digest for each in masked}) == 2
    assert len({each.mask_seed for each in masked}) == 2
    assert len({id(each.files[MASKED_WEIGHTS]) for each in masked[:-1]}) == 1
    for each, model in zip(masked, models, strict=True):
        program, key = each.program, mask_key(each.mask_seed, each.weights_digest)
        opened = unpack_masked(each.files[MASKED_WEIGHTS], program.weight_rings, program.weight_shapes)
        mask = DealerWeights(key, program.weight_shapes)
        for name, bits in program.weight_rings.items():
            assert not (opened[name] + mask.mask(name) - model.integers[name]).remainder(2**bits).any()


def test_a_mask_is_not_shared_with_another_shape() -> None:
    mask = DealerWeights(mask_key(fresh_seed(), "x"), {"a": (2, 3), "b": (4,)})
    beside = mask.beside({"a": (2, 3), "c": (5, 5)})
    assert beside.mask("a").equal(mask.mask("a"))
    with pytest.raises(ValueError, match=r"'b' has the shape \(2, 2\), not \(4,\)"):
        mask.beside({"b": (2, 2)})


def test_kept_sizes_are_the_same(compiled: secure.Compiled, tmp_path: Path) -> None:
    secure.save_compiled(compiled, tmp_path / "kept")
    again = secure.load_compiled(tmp_path / "kept")
    assert [size.program.digest for size in again.sizes] == [size.program.digest for size in compiled.sizes]
    for ours, theirs in zip(compiled.sizes, again.sizes, strict=True):
        assert ours.model.integers.keys() == theirs.model.integers.keys()
        assert all(value.equal(theirs.model.integers[name]) for name, value in ours.model.integers.items())
    held = {id(value) for size in again.sizes for value in size.model.integers.values()}
    names = {name for size in again.sizes for name in size.model.integers}
    assert len(held) < len(names) + 2 * len(again.sizes)  # the position table alone is one for each length
    weights = (tmp_path / "kept" / "weights.safetensors").stat().st_size
    secure.save_compiled(compiled_sizes_of_one(compiled), tmp_path / "one")
    assert weights < 1.5 * (tmp_path / "one" / "weights.safetensors").stat().st_size  # not six times


def compiled_sizes_of_one(compiled: secure.Compiled) -> secure.Compiled:
    return dataclasses.replace(compiled, others=())


def test_sizes_are_refused_where_one_alone_is_served(directory: Path) -> None:
    for deployment in (secure.ThreeParty(), secure.Ckks()):
        options = CompileOptions(embedding="client-table")
        with pytest.raises(InvalidInput, match="one length and one batch are served under"):
            Compilation(str(directory), deployment, (4, 8), (), options).run()


def test_a_model_whose_graph_depends_on_its_size(directory: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.ones(x.shape[-1], 2) if x.shape[0] == 1 else (x @ torch.ones(x.shape[-1], 2)) * 2.0

    from secure.frontend import Size
    from secure.mpc.compile import compile_sizes

    inputs = [{"x": torch.ones(n, 3)} for n in (1, 2)]
    with pytest.raises(InvalidInput, match="computes in another way at another size"):
        compile_sizes(Odd().eval(), [(Size(x, [x]), {}) for x in inputs])


def test_two_models_of_one_name_are_refused(compiled: secure.Compiled) -> None:
    with pytest.raises(InvalidInput, match="two models of the name"):
        deployments.serve([compiled, compiled], role="server", peers={"dealer": "127.0.0.1:1"})


@given(tokens=st.integers(1, LENGTH - 2), length=st.integers(3, LENGTH))
def test_an_input_fits_a_length_or_not(tokens: int, length: int) -> None:
    mask = (torch.arange(LENGTH) < tokens + 2).long()[None]
    found = Embed().fitted({"input_ids": torch.arange(LENGTH)[None], "attention_mask": mask}, length)
    if tokens + 2 > length:
        assert found is None
    else:
        assert found is not None
        assert found["input_ids"].tolist() == [list(range(length))]
        assert int(found["attention_mask"].sum()) == tokens + 2


def test_lengths_and_offers_are_bounded(directory: Path) -> None:
    with pytest.raises(InvalidInput, match="a model for 9 lengths and 1 batches"):
        compiled_sizes(directory, range(3, 12), 1)
    with pytest.raises(InvalidInput, match="1 lengths and 5 batches"):
        compiled_sizes(directory, 4, range(1, 6))
    with pytest.raises(InvalidInput, match="no length or no batch"):
        compiled_sizes(directory, [], 1)

    def offers(lengths: int, weights: str = "w") -> list[pb.Offer]:
        return [pb.Offer(weights=weights, length=n + 3, batch=1, program_digest=str(n)) for n in range(lengths)]

    described = pb.Description(model="w", offers=[*offers(MAXIMUM_LENGTHS), *offers(40, "other")])
    assert len(described_module._offers(described, "")) == MAXIMUM_LENGTHS
    with pytest.raises(ProtocolError, match="offered for 9 lengths, at most 8 are used"):
        described_module._offers(pb.Description(model="w", offers=offers(MAXIMUM_LENGTHS + 1)), "")
    described_module._check(described, "it")
    with pytest.raises(ProtocolError, match="offers 257 Programs, at most 256 are read"):
        described_module._check(pb.Description(offers=offers(257)), "it")
    # 0 would never be put together, and many would be read before the first
    for batch in (0, MAXIMUM_BATCH + 1, (1 << 32) - 1):
        with pytest.raises(ProtocolError, match=f"offered for {batch} inputs a query"):
            described_module._offers(
                pb.Description(model="w", offers=[pb.Offer(weights="w", length=3, batch=batch)]), ""
            )
    with pytest.raises(ProtocolError, match="offered twice for one length"):
        described_module._offers(pb.Description(model="w", offers=offers(1) * 2), "")
    for bad in (pb.Offer(model="\x1b[2J"), pb.Offer(weights="x" * 513), pb.Offer(program_digest="\n")):
        with pytest.raises(ProtocolError, match="printable"):
            described_module._check(pb.Description(offers=[bad]), "it")


def test_a_link_that_opens_while_the_session_is_closed_is_closed_too(compiled: secure.Compiled) -> None:
    first, second = compiled.sizes[0], compiled.sizes[2]
    opened = list[Posing]()

    def open(digest: str) -> Link:
        session.close()  # as another thread may
        opened.append(Posing(second.deployment.insecure(second.model, second.tokenizer)))
        return opened[-1]

    offers = [Offer.of(first.program), Offer.of(second.program)]
    main = first.deployment.insecure(first.model, first.tokenizer)
    session = secure.Session(main, pace=0.0, open=open, offers=offers)
    with pytest.raises(PeerLost, match="it was closed"):
        session.embed([TEXTS[0]])
    assert [link.closed for link in opened] == [True]
