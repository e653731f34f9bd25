"""Texts with a draft: the same tokens, samples of the same probabilities, and what a pass reads and keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import secure
from parties.three_party.party_2 import Party2Service
from parties.three_party.shared_model import share_model
from protocols.two_party import Keep, Open
from secure.cost.passes import asked
from secure.deployments.deployment import Deployment
from secure.errors import InvalidInput, InvalidProgram, ModelNotFound, OutOfRange
from secure.models.decoder import at_temperature, prompt_inputs, step_inputs
from secure.models.draft import Draft, Guessing, load_draft
from secure.mpc.program import Program
from secure.session import generation
from secure.session.generation import Generation
from secure.session.session import Session
from tests.test_generator import continued, llama
from tests.three_parties import running
from tests.writers import made_tokenizer, scripted, tokenizer_of, write_writer

PROMPT, CAPACITY, LENGTH, VOCABULARY = 5, 24, 4, 60
TEXTS = ([5, 7, 9], [59, 1, 20, 33, 4])


@cache
def decoder(seed: int = 3) -> nn.Module:
    """A decoder of one layer, with weights so large that it does not say the same token for ever."""
    torch.manual_seed(seed)
    model: nn.Module = llama(num_hidden_layers=1, max_position_embeddings=64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


@cache
def compiled(kind: type[Deployment] = secure.TwoParty) -> secure.Compiled:
    return secure.compile_generator(decoder(), prompt=PROMPT, capacity=CAPACITY, draft_length=LENGTH, deployment=kind())


def expected(prompt: list[int], count: int) -> list[int]:
    return continued(decoder(), prompt, count)


def program(length: int) -> Program:
    found: Program = next(s.program for s in compiled().sizes if s.program.labels["length"] == str(length))
    return found


def test_a_query_is_named_by_what_it_is() -> None:
    """In profiles: a token is no query of its own to whoever writes text."""
    named = {asked(size.program) for size in compiled().sizes}
    assert named == {f"a prompt of {PROMPT} tokens", "a token", f"a pass over {LENGTH} tokens"}


@pytest.fixture
def mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a draft be wrong in some passes, so that all numbers of guesses agree, and what is prepared is left."""
    real, passes = Guessing.guess, [0]

    def guess(self: Guessing, text: Sequence[int], count: int) -> list[int]:
        found, passes[0] = real(self, text, count), passes[0] + (count > 1)
        right = (3, 3, 0, 3, 3, 1, 3, 2)[passes[0] % 8]
        return [*found[:right], *((token + 1) % VOCABULARY for token in found[right:])] if count > 1 else found

    monkeypatch.setattr(Guessing, "guess", guess)


def seen(session: Session, count: int) -> list[int]:
    return [report.length for report in session.reports[-count:]]


# the same texts


@pytest.mark.parametrize("kind", [secure.TwoParty, secure.ThreeParty])
def test_a_draft_changes_no_token(kind: type[Deployment]) -> None:
    with secure.insecure_in_process(compiled(kind)) as session:
        text = session.generate(TEXTS[0], 14, ignore_end=True, draft=decoder()).complete()
        assert (text.ids, text.finish_reason) == (expected(TEXTS[0], 14), "length")
        assert (text.drafted, text.agreed) == (9, 9)
        assert seen(session, 5) == [PROMPT, LENGTH, LENGTH, LENGTH, 1]
        text = session.generate(TEXTS[0], 9, ignore_end=True, draft=decoder(4)).complete()
        assert text.ids == expected(TEXTS[0], 9)
        assert text.agreed < text.drafted / 2, "this draft guesses too well to tell"


@pytest.mark.parametrize("kind", [secure.TwoParty, secure.ThreeParty])
def test_guesses_that_are_right_now_and_then(kind: type[Deployment], mistaken: None) -> None:
    with secure.insecure_in_process(compiled(kind)) as session:
        text = session.generate(TEXTS[1], 16, ignore_end=True, draft=decoder()).complete()
    assert text.ids == expected(TEXTS[1], 16)
    assert 0 < text.agreed < text.drafted


def test_by_services(mistaken: None, tmp_path: Path) -> None:
    """What is prepared ahead for all guesses is left where some are wrong."""
    with (
        secure.serve(role="dealer", deployment=secure.TwoParty(), state=tmp_path / "dealer") as dealer,
        secure.serve(
            replace(
                compiled(), deployment=secure.TwoParty(dealer_key=(key := str(tmp_path / "dealer" / "dealer.pub")))
            ),
            role="server",
            peers={"dealer": dealer.address},
            state=tmp_path / "server",
        ) as server,
        secure.connect(
            secure.TwoParty(server=server.address, dealer=dealer.address, dealer_key=key), cache=False, pace=0.0
        ) as session,
    ):
        for draft in (decoder(), decoder(4)):
            text = session.generate(TEXTS[0], 15, ignore_end=True, draft=draft).complete()
            assert text.ids == expected(TEXTS[0], 15)
        cost, reports = program(LENGTH).cost, [r for r in session.reports if r.length == LENGTH]
        assert all(r.bytes(phase="online") == cost.to_first + cost.to_second for r in reports)
        assert len({report.query for report in session.reports}) == len(session.reports)
        assert session.reports[-1].query >= len(session.reports), "something was prepared and left"


def test_by_three_parties(mistaken: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt, real = list[int](), Party2Service._supply

    def noted(self: Any, number: bytes, key: Any, wanted: Any, *about: Any) -> Any:
        dealt.append(wanted.rows)
        return real(self, number, key, wanted, *about)

    monkeypatch.setattr(Party2Service, "_supply", noted)
    share_model(compiled(secure.ThreeParty), tmp_path / "shares")
    with running(tmp_path / "shares", ahead=1) as three, three.dial() as session:
        text = session.generate(TEXTS[0], 15, ignore_end=True, draft=decoder()).complete()
        assert text.ids == expected(TEXTS[0], 15)
        assert dealt != sorted(dealt), "rows are read again from an earlier one"
        assert len(dealt) > len(session.reports), "something was dealt and left"


# samples


STATES, START = 3, 1
CHAIN = torch.tensor([[0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [0.45, 0.3, 0.25]], dtype=torch.float64)


def drawn(count: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """The chi-square distance of texts of four tokens, drawn from a chain with a draft, from their probabilities."""
    choices = torch.Generator().manual_seed(7)

    def chosen(values: Any) -> list[int]:
        rows = CHAIN[values["input_ids"][0]]
        found: list[int] = torch.multinomial(rows, 1, generator=choices).flatten().tolist()
        return found if values["input_ids"].shape[1] < 8 else found[-1:]

    def guess(text: Sequence[int], count: int) -> list[int]:
        found = list(text)
        for _ in range(count):
            found.append(int(CHAIN[found[-1]].argmax()))
        return found[len(text) :]

    draft = SimpleNamespace(rows=None, begin=lambda _: SimpleNamespace(guess=guess))
    monkeypatch.setattr(generation, "load_draft", lambda *_: draft)
    session, _ = scripted(chosen, lengths=(8,), draft_length=LENGTH)
    with session:
        texts = [tuple(session.generate([START], 4, draft="any")) for _ in range(count)]
    distance = 0.0
    for text in product(range(STATES), repeat=4):
        likely = float(torch.stack([CHAIN[a, b] for a, b in zip((START, *text), text, strict=False)]).prod()) * count
        distance += (texts.count(text) - likely) ** 2 / likely
    return distance


def test_samples_have_the_same_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the draft guesses. A client that kept one more of the model's choices would be found out."""
    bound = float(pytest.importorskip("scipy.stats").chi2.isf(1e-6, STATES**4 - 1))
    assert drawn(800, monkeypatch) < bound
    real = Generation.checked

    def greedy(self: Generation, guesses: Sequence[int], chosen: Sequence[int]) -> list[int]:
        return list(chosen[: len(real(self, guesses, chosen)) + 1])

    monkeypatch.setattr(Generation, "checked", greedy)
    assert drawn(800, monkeypatch) > bound


def test_a_pass_draws_each_token_with_its_probabilities() -> None:
    """The noise is new in each of them: what is drawn behind one guess tells nothing about the next."""
    temperature, width, count = 8.0, 6, 20
    made = secure.compile_generator(decoder(), prompt=7, capacity=13, draft_length=width, temperature=temperature)
    text = [5, 7, 9, 5, 7, 9, 5, 7, 9, 5, 7, 9]
    with secure.insecure_in_process(made) as session:
        assert list(session.generate(text[:3], 5, draft=decoder(), ignore_end=True)) == expected(text[:3], 5)
        links = {offer.length: session._links.of(offer) for offer in session.sizes}
        kept, link = links[7].converse(13), links[width]

        def ask(length: int, inputs: dict[str, Tensor], rows: int) -> Tensor:
            heated = at_temperature(inputs, temperature)
            encoded = links[length].program.encode(links[length].program.clear_values(heated, {}), {})
            results, _ = links[length].go_on(kept, encoded, 0, rows=rows)
            return links[length].program.decode(results).popitem()[1].flatten()  # type: ignore[no-any-return]

        ask(7, prompt_inputs(text[:6], 7), 0)
        inputs = step_inputs(text[6:], 1, 7, link.program.rows)
        found = torch.stack([ask(width, inputs, 7) for _ in range(count)])
    with torch.no_grad():
        logits = decoder()(torch.tensor([text])).logits[0, 6:].double()
    p = torch.softmax(logits / temperature, -1)
    mean = (p * p.log()).sum(-1)
    variance = (p * p.log() ** 2).sum(-1) - mean**2
    assert float(p.max()) < 0.9, "the model is too sure to tell"
    likely = p.log().gather(1, found.T).sum()
    assert abs(float(likely - count * mean.sum())) < 5 * float(count * variance.sum()) ** 0.5
    assert len({tuple(each) for each in found.tolist()}) > count // 2


# what a pass is


def test_a_pass_opens_its_own_rows_alone() -> None:
    verify, step = program(LENGTH), program(1)
    assert (verify.rows, verify.kept_rows) == (CAPACITY - LENGTH, LENGTH)
    for program_, rows in ((verify, LENGTH), (step, 1)):
        keeps = [i for i in program_.circuit if isinstance(i.protocol, Keep)]
        assert len(keeps) == 2
        for keep in keeps:
            opening = program_.circuit[keep.inputs[0]].protocol
            assert isinstance(opening, Open)
            assert opening.shape[-2] == rows
    assert verify.cost.rounds <= step.cost.rounds + 4


def test_what_the_parties_see() -> None:
    """The size of a query and the rows that it reads follow from how many guesses agree, and nothing else shows."""
    script: list[Any] = [3, [9, 2, 2, 2], [9, 9, 9, 8], [4, 4, 4, 4], 5]
    session, asked = scripted(script, draft_length=LENGTH, lengths=(8,), capacity=24)
    with pytest.MonkeyPatch.context() as patch, session:
        draft = SimpleNamespace(rows=None, begin=lambda _: SimpleNamespace(guess=lambda _, count: [9] * count))
        patch.setattr(generation, "load_draft", lambda *_: draft)
        text = session.generate([1, 2], 9, draft="any").complete()
    assert text.ids == [3, 9, 2, 9, 9, 9, 8, 4, 5]
    assert (text.drafted, text.agreed) == (9, 4)
    inputs = [(each["input_ids"][0].tolist(), int(each["position_ids"][0, 0])) for each in asked[1:]]
    assert inputs == [([3, 9, 9, 9], 8), ([2, 9, 9, 9], 10), ([8, 9, 9, 9], 14), ([4], 15)]
    for each, (ids, place) in zip(asked[1:], inputs, strict=True):
        count, seen_by = len(ids), each["attention_mask"][0, 0] == 0
        rows = seen_by.shape[1] - count
        assert rows == 40 - (count - 1)
        for row in range(count):
            known = [*range(6, place), *range(rows, rows + row + 1)]
            assert seen_by[row].nonzero().flatten().tolist() == known


def test_a_text_ends_within_a_pass() -> None:
    session, asked = scripted([3, [9, 5, 9, 8]], draft_length=LENGTH, lengths=(8,), ends=[5])
    with pytest.MonkeyPatch.context() as patch, session:
        draft = SimpleNamespace(rows=None, begin=lambda _: SimpleNamespace(guess=lambda _, count: [9, 5, 9][:count]))
        patch.setattr(generation, "load_draft", lambda *_: draft)
        text = session.generate([1, 2], 9, draft="any").complete()
    assert (text.ids, text.finish_reason, len(asked)) == ([3, 9, 5], "stop", 2)


def test_a_guess_that_leaves_the_ranges_is_asked_for_again() -> None:
    """By a step, which tells whether the text itself has left them."""
    script: list[Any] = [3, OutOfRange("a"), 4, [5, 6, 7, 8], OutOfRange("a"), OutOfRange("b")]
    session, asked = scripted(script, draft_length=LENGTH, lengths=(8,))
    with pytest.MonkeyPatch.context() as patch, session:
        draft = SimpleNamespace(rows=None, begin=lambda _: SimpleNamespace(guess=lambda _, count: [9] * count))
        patch.setattr(generation, "load_draft", lambda *_: draft)
        text = session.generate([1, 2], 9, draft="any")
        with pytest.raises(OutOfRange, match="b"):
            text.complete()
    assert text.ids == [3, 4, 5]
    inputs = [(each["input_ids"][0].tolist(), int(each["position_ids"][0, 0])) for each in asked[1:]]
    assert inputs == [([3, 9, 9, 9], 8), ([3], 8), ([4, 9, 9, 9], 9), ([5, 9, 9, 9], 10), ([5], 10)]


def test_a_guess_on_which_the_servers_graph_fails() -> None:
    session, asked = scripted([3, [0, 0, 0, 0], 4, 5], draft_length=LENGTH, lengths=(8,), refuses=[9])
    with pytest.MonkeyPatch.context() as patch, session:
        draft = SimpleNamespace(rows=None, begin=lambda _: SimpleNamespace(guess=lambda _, count: [9] * count))
        patch.setattr(generation, "load_draft", lambda *_: draft)
        assert session.generate([1, 2], 3, draft="any").complete().ids == [3, 4, 5]
    inputs = [(each["input_ids"][0].tolist(), int(each["position_ids"][0, 0])) for each in asked[1:]]
    assert inputs == [([0, 0, 0, 0], 8), ([3], 8), ([4], 9)], "zeros take the place of what cannot be computed"


def test_passes_end_where_the_rows_or_the_draft_do() -> None:
    for rows, capacity, passes in ((None, 16, 2), (13, 40, 1), (12, 40, 1), (None, 40, 2)):
        script: Any = lambda values: [0] * values["input_ids"].shape[1] if values["input_ids"].shape[1] < 8 else [0]  # noqa: E731
        session, asked = scripted(script, draft_length=LENGTH, lengths=(8,), capacity=capacity)
        with pytest.MonkeyPatch.context() as patch, session:
            guessing, begun = SimpleNamespace(guess=lambda _, count: [0] * count), list[Any]()
            draft = SimpleNamespace(rows=rows, begin=lambda prompt, g=guessing, b=begun: b.append(prompt) or g)
            patch.setattr(generation, "load_draft", lambda *_, draft=draft: draft)
            assert len(session.generate([1, 2], 9, draft="any").complete().ids) == 9
        assert bool(begun) == bool(passes)  # a draft that no pass fits in reads no prompt either
        assert sum(each["input_ids"].shape[1] == LENGTH for each in asked) == passes


def test_a_draft_that_is_too_small_for_the_bucket_reads_no_prompt() -> None:
    """It fits with the shorter prompts. Else a prompt of too many tokens would fail before anything is asked."""
    session, asked = scripted(
        lambda values: [0] * (values["input_ids"].shape[1] == LENGTH) * LENGTH or [0],
        draft_length=LENGTH,
        lengths=(8, 16),
        capacity=40,
    )
    draft = SimpleNamespace(rows=13, begin=lambda _: pytest.fail("the draft began"))
    with pytest.MonkeyPatch.context() as patch, session:
        patch.setattr(generation, "load_draft", lambda *_: draft)
        assert len(session.generate([1] * 10, 9, draft="any").complete().ids) == 9
    assert not [each for each in asked if each["input_ids"].shape[1] == LENGTH]


def test_a_program_that_gives_another_number_of_tokens() -> None:
    session, _ = scripted([3, [1, 2, 3]], draft_length=LENGTH, lengths=(8,))
    with pytest.MonkeyPatch.context() as patch, session:
        draft = SimpleNamespace(rows=None, begin=lambda _: SimpleNamespace(guess=lambda _, count: [9] * count))
        patch.setattr(generation, "load_draft", lambda *_: draft)
        with pytest.raises(InvalidProgram, match="gives 3 tokens, not 4"):
            session.generate([1, 2], 9, draft="any").complete()


# drafts


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_guesses_are_those_of_the_whole_text(kind: str) -> None:
    """What is kept of a text, and of guesses that were wrong, changes none."""
    from tests.test_generator import decoder as other

    model = decoder() if kind == "llama" else other("gpt2")
    generator = torch.Generator().manual_seed(5)
    draft = Draft(model, VOCABULARY)
    text = [5, 7, 9]
    guessing = draft.begin(text)
    for count in (3, 1, 3, 2, 3, 3):
        found = guessing.guess(text, count)
        assert found == continued(model, text, count)
        right = int(torch.randint(count + 1, (1,), generator=generator))
        text = [*text, *found[:right], int(torch.randint(VOCABULARY, (1,), generator=generator))]


def test_tokens_that_a_draft_does_not_know() -> None:
    draft = Draft(decoder(), 7)
    assert all(token < 7 for token in draft.begin([5]).guess([5, 1 << 40, -3], 4))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("drafts")
    return {kind: write_writer(base / kind, kind) for kind in ("bytes", "pieces")}


def test_a_draft_has_the_same_tokens(directories: dict[str, Path], tmp_path: Path) -> None:
    ours = tokenizer_of("bytes")
    known = len(made_tokenizer("bytes").get_vocab())
    assert load_draft(directories["bytes"], ours, known).rows == 128
    assert load_draft(str(directories["bytes"]), None, known).rows == 128
    with pytest.raises(InvalidInput, match=r"another tokenizer than the served model: \d+ tokens differ"):
        load_draft(directories["pieces"], ours, known)
    with pytest.raises(InvalidInput, match="the draft knows 60 tokens, the served model 61"):
        load_draft(decoder(), ours, 61)
    with pytest.raises(ModelNotFound, match="the draft: no model at"):
        load_draft(tmp_path, ours, known)
    for wrong in (5, ["a"], b"a"):
        with pytest.raises(InvalidInput, match="the draft is a "):
            load_draft(wrong, ours, known)

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(60, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, **given: Any) -> None:
            raise KeyError("no such thing")

    with pytest.raises(InvalidInput, match="the draft cannot be run: KeyError"):
        load_draft(Broken(), None, 60)


def test_drafts_that_mean_nothing() -> None:
    with secure.insecure_in_process(compiled()) as session:
        with pytest.raises(InvalidInput, match="its length cannot be hidden\nhint: --hide-length"):
            session.generate([5], 3, draft=decoder(), hide_length=True)
        torch.manual_seed(1)
        short = llama(num_hidden_layers=1, max_position_embeddings=PROMPT + LENGTH - 1)
        with pytest.raises(InvalidInput, match="the draft takes texts of 8 tokens\nhint: 9 or more"):
            session.generate([5], 3, draft=short)
        assert not session.reports
    for length in (0, 17):
        session, asked = scripted([5], draft_length=length, lengths=(24,))
        with pytest.raises(InvalidInput, match="has no Program that checks drafts"):
            session.generate([5], 3, draft=decoder())
        assert not asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_length": 1}, "a draft length of 1 beside prompts of 8 tokens"),
        ({"draft_length": 8}, "a draft length of 8 .*\nhint: 2 to 16, and fewer than the shortest prompts"),
        ({"draft_length": 17, "prompt": (32, 20), "capacity": 40}, "a draft length of 17 beside prompts of 20"),
        ({"draft_length": 3, "prompt": tuple(range(8, 15)), "capacity": 40}, "7 lengths of prompts\nhint: 1 to 6"),
    ],
)
def test_draft_lengths_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        secure.compile_generator(decoder(), **{"prompt": 8, "capacity": 16, **options})


def test_the_greatest_length_alone_still_checks_drafts() -> None:
    session, _ = scripted([5], draft_length=LENGTH)
    kept = Session(session.link, open=session._links._open, offers=session.sizes, fixed_length=True)
    assert [offer.length for offer in kept.sizes] == [1, LENGTH, 16]
    assert generation.Sizes.of(kept.sizes, kept.program.labels).verify is not None
