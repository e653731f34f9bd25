"""Text on ciphertexts: a decoder's steps read rows that earlier ones kept, encrypted, and the client chooses tokens."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import secure
from parties.cli.generate import prices, summary
from parties.reports.verified import verify
from protocols.ckks import diagonals as linear
from protocols.ckks.circuit import Circuit, clear
from protocols.ckks.codec import reduced
from protocols.ckks.cost import Formula, node_seconds
from protocols.ckks.evaluate import EncodedWeights, EncryptedRows, evaluate
from protocols.ckks.parameters import Parameters
from protocols.ckks.refresh import Refresher
from protocols.ckks.schedule import Price, Schedule, schedule
from protocols.ckks.seal import Client, Context, EvaluationKeys
from secure.ckks import kept as kept_form
from secure.ckks.program import CkksProgram
from secure.errors import Busy, InputTooLong, InvalidInput, InvalidProgram, PeerLost
from secure.models.decoder import step_inputs
from secure.polynomial.forms import freeze_untrained
from secure.polynomial.recipe import Recipe
from secure.polynomial.swap import polynomialize
from secure.session.generation import chosen
from secure.session.session import Session

transformers = pytest.importorskip("transformers")

VOCABULARY, CAPACITY = 16, 4
CKKS = secure.Ckks(refresh=True, precision=8)
PROMPT = [5, 7]


def llama() -> Any:
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8, "intermediate_size": 12}
    sizes |= {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()


@cache
def polynomial() -> Any:
    torch.manual_seed(4)
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    polynomialize(model, Recipe(inverse_error=0.5))
    freeze_untrained(model, lambda: model(texts(256), use_cache=False))
    return model


def texts(count: int) -> torch.Tensor:
    """Texts of any tokens, so that none of the tests leaves the ranges that they set."""
    return torch.randint(0, VOCABULARY, (count, CAPACITY), generator=torch.Generator().manual_seed(1))


@cache
def compiled() -> secure.Compiled:
    given: Any = {"capacity": CAPACITY, "embedding": "client-table", "deployment": CKKS}
    return secure.compile_generator(polynomial(), calibration=texts(24).tolist(), **given)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with secure.insecure_in_process(compiled()) as opened:
        yield opened


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with secure.serve(compiled(), role="server", state=tmp_path_factory.mktemp("state"), workers=1) as service:
        yield service.address


@pytest.fixture(scope="module")
def connected(served: str) -> Iterator[Session]:
    with secure.connect(secure.Ckks(server=served), receipts=True) as opened:
        yield opened


def scores(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = polynomial().double()(torch.tensor([ids])).logits[0]
    polynomial().float()
    return found


def misses(prompt: list[int], ids: list[int]) -> list[float]:
    """By how much another token's score is better than that of each token, in floating point, behind the same text."""
    found = scores([*prompt, *ids])[len(prompt) - 1 : -1]
    behind: list[float] = (found.amax(-1) - found.gather(-1, torch.tensor(ids)[:, None])[:, 0]).tolist()
    return behind


# keeping rows, as a circuit


def keeping() -> Circuit:
    """A query x that reads the rows of those before: three times their sum by places, and x itself; it keeps 2 x."""
    circuit = Circuit(PARAMETERS.slots)
    x, rows = circuit.input("x"), circuit.kept("rows")
    number = np.full(PARAMETERS.slots, -1.0)
    number[:3] = [0, 1, 2]
    circuit.mark()
    circuit.keep(circuit.dot([(x, 2.0)]), "rows", number)
    circuit.mark()
    circuit.outputs = [circuit.add(circuit.dot([(rows, 3.0)]), circuit.dot([(x, 1.0)]))]
    return circuit


PARAMETERS = Parameters(8192, 4, 26, 33, 8)


def test_rows_are_kept_from_query_to_query() -> None:
    made = schedule(keeping(), 4, 3)
    assert made.circuit.rows == 3
    assert [n.op for n in made.circuit.nodes].count("keep") == 1
    assert made.rounds == 1  # the row's own
    context = Context(PARAMETERS)
    client = Client(context)
    keys = EvaluationKeys(context, client.evaluation_keys([]), [])
    weights, refresher, kept = EncodedWeights(context, made), Refresher(client), EncryptedRows()
    for number, x in enumerate((0.25, -0.5, 0.75, 0.5, 0.125)):  # the last two find no row that is free
        level = made.inputs()["x"]
        run = evaluate(weights, keys, {"x": client.encrypt(np.full(PARAMETERS.slots, x), level)}, None, kept)
        masked = next(run)
        levels = [made.levels[i] for i in made.refreshes(1)]
        answers = [refresher.refresh(each, made.reserve, to) for each, to in zip(masked, levels, strict=True)]
        with pytest.raises(StopIteration) as end:
            run.send(answers)
        (found,) = (client.decrypt(each) for each in end.value.value)
        rows = [2 * each for each in (0.25, -0.5, 0.75)[:number]]
        wanted = np.full(PARAMETERS.slots, x)
        wanted[: len(rows)] += 3 * np.array(rows)
        assert np.abs(found - wanted).max() < 1e-2
        assert kept.filled == number + 1
    exact = clear(made.circuit, {"x": np.full(PARAMETERS.slots, 0.5), "rows": np.zeros(PARAMETERS.slots)})
    assert np.allclose(exact, 0.5)


def test_a_query_that_does_not_end_keeps_nothing() -> None:
    made = schedule(keeping(), 4, 3)
    context = Context(PARAMETERS)
    client = Client(context)
    kept = EncryptedRows()
    x = client.encrypt(np.full(PARAMETERS.slots, 0.5), made.inputs()["x"])
    keys = EvaluationKeys(context, client.evaluation_keys([]), [])
    run = evaluate(EncodedWeights(context, made), keys, {"x": x}, None, kept)
    next(run)
    run.close()
    assert (kept.filled, kept.ciphertexts) == (0, {})


@pytest.mark.parametrize("bits", [1, 15, 16, 17, 48, 64, 118, 300])
def test_integers_are_reduced_as_python_does(bits: int) -> None:
    primes = [65537, 2**26 - 5, 2**37 - 25, 2**48 - 59, 2**58 - 27]  # the last one has no digits of 16 bits
    edges = [0, -1, 1, 2**bits, -(2**bits)]
    drawn = [secrets.randbelow(2 ** (bits + 1)) - 2**bits for _ in range(200)]
    integers = np.array([*edges, *drawn], dtype=object)
    assert reduced(integers, primes).tolist() == [[int(x) % prime for x in integers] for prime in primes]


def test_a_row_that_nobody_reads_is_not_kept() -> None:
    circuit = keeping()
    circuit.keep(circuit.input("x"), "others", np.arange(float(PARAMETERS.slots)))
    assert schedule(circuit, 4, 3).circuit.rows == 3


def maps_and_squares(count: int) -> Circuit:
    circuit, generator = Circuit(4096), np.random.default_rng(3)
    x = circuit.input("x")
    for _ in range(count):
        offsets = {(0, 64 * k): generator.uniform(-1, 1, 4096) / 8 for k in range(36)}
        y = linear.apply(circuit, [x], offsets)
        circuit.mark()
        x = circuit.multiply(y, y)
        circuit.mark()
    circuit.outputs = [x]
    return circuit


@pytest.mark.parametrize("refreshed", [0.0, 0.01, 0.1, 10.0])
def test_cuts_by_price_are_not_dearer_and_compute_the_same(refreshed: float) -> None:
    circuit, by = maps_and_squares(5), Formula()
    price = Price(lambda node, level: sum(node_seconds(node, level, 8192, by).values()), refreshed, 0.0)
    plain, priced = schedule(circuit, 5, 1), schedule(circuit, 5, 1, price)

    def seconds(made: Schedule) -> float:
        count = sum(node.op == "refresh" for node in made.circuit.nodes)
        found = zip(made.circuit.nodes, made.levels, strict=True)
        return count * refreshed + sum(price.node(node, level) for node, level in found if node.op != "refresh")

    assert priced.depth <= 5
    assert seconds(priced) <= seconds(plain) * 1.0001
    if refreshed == 0.01:  # rotations at a lower level are worth a refresh
        assert seconds(priced) < 0.9 * seconds(plain)
    given = {"x": np.random.default_rng(4).uniform(-1, 1, 4096)}
    (a,), (b,) = (clear(made.circuit, given) for made in (plain, priced))
    assert np.allclose(a, b, rtol=1e-12)


# texts


def test_a_text_is_that_of_floating_point_and_a_hidden_length_takes_all_steps(session: Session) -> None:
    before = len(session.reports)
    text = session.generate(PROMPT, 2, ignore_end=True, hide_length=True).complete()
    assert (len(text.ids), text.prompt_tokens, len(session.reports) - before) == (2, len(PROMPT), CAPACITY)
    assert max(misses(PROMPT, text.ids)) <= 2 * compiled().model.predicted_error
    assert all(report.rounds == compiled().program.rounds for report in session.reports[before:])


def test_scores_are_those_of_floating_point_within_the_predicted_error(session: Session) -> None:
    link, program = session.link, compiled().program
    ids = [*PROMPT, 11, 0]
    wanted, conversation = scores(ids), link.converse(CAPACITY)
    assert len(ids) == CAPACITY == program.rows + 1
    for filled, token in enumerate(ids):
        values = program.clear_values(step_inputs([token], 0, filled, program.rows), link.tables)
        results, report = link.go_on(conversation, program.encode(values, link.tables), filled, rows=filled)
        found = program.decode(results)["output"].flatten()
        assert (found - wanted[filled]).abs().max() <= compiled().model.predicted_error
        assert (report.bytes(sender="client"), report.bytes(sender="server")) == (program.to_server, program.to_client)


def test_the_predicted_error_is_no_fantasy(session: Session) -> None:
    """What is rounded away is most of it, and the rest is not 300 times what is found in this one step."""
    model = compiled().model
    noise = model.predicted_error - model.program.grain / 2
    link, program = session.link, model.program
    values = program.clear_values(step_inputs([5], 0, 0, program.rows), link.tables)
    (raw,), _ = link.go_on(link.converse(CAPACITY), program.encode(values, link.tables), 0)
    used = program.output[0] >= 0
    found = np.zeros(VOCABULARY)
    found[program.output[0][used]] = raw[used] * program.output_unit
    error = float(np.abs(found - scores([5])[0].numpy()).max())
    assert error <= noise <= 300 * error


def test_a_text_ends_where_it_stops(session: Session) -> None:
    (first,) = session.generate([5], 1, ignore_end=True).complete().ids
    before = len(session.reports)
    text = session.generate([5], 3, stop=[first]).complete()
    assert (text.finish_reason, text.ids, len(session.reports) - before) == ("stop", [first], 1)


def test_tokens_are_drawn_at_a_temperature() -> None:
    found = torch.tensor([1.0, 3.0, 2.0, -40.0])
    assert chosen(found, 0.0) == 1
    counts = np.bincount([chosen(found, 1.0) for _ in range(4000)], minlength=4) / 4000
    shares = torch.softmax(found.double(), -1).numpy()
    assert np.abs(counts - shares).max() < 6 * math.sqrt(0.25 / 4000)
    assert {chosen(found, 0.01) for _ in range(100)} == {1}


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"prompt": []}, "no token"),
        ({"prompt": [VOCABULARY]}, "outside 0..15"),
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"max_new_tokens": CAPACITY}, "take 5 steps"),
        ({"temperature": -1.0}, "temperature of -1"),
        ({"temperature": math.nan}, "temperature of nan"),
        ({"draft": "somewhere"}, "no Program that checks drafts"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_query(session: Session, given: Any, wrong: str) -> None:
    before = len(session.reports)
    with pytest.raises(InvalidInput, match=wrong):
        session.generate(**{"prompt": PROMPT, "max_new_tokens": 2, **given}).complete()
    assert len(session.reports) == before


def test_what_cannot_be_compiled_is_refused() -> None:
    def refused(wrong: str, model: Any = None, **given: Any) -> None:
        options = {"capacity": CAPACITY, "embedding": "client-table", "deployment": CKKS, **given}
        with pytest.raises(InvalidInput, match=wrong):
            secure.compile_generator(model or polynomial(), **options)

    refused("a power of two", capacity=12)
    refused("takes refreshes", deployment=secure.Ckks())
    refused("token by token", prompt=16)
    refused("at any temperature", temperature=1.0)
    refused("one token at a time", draft_length=4)
    refused("clients hold the token table", embedding=None)
    refused("no comparison", model=llama())


def test_a_compiled_step_is_kept_and_restored() -> None:
    model = compiled().model
    facts, tensors = kept_form.keep(model)
    program = CkksProgram.from_bytes(model.program.encoded)
    assert (program.rows, program.digest) == (CAPACITY - 1, model.program.digest)
    again = kept_form.restore(program, model.client_tables, json.loads(json.dumps(facts)), tensors)
    assert again.schedule.circuit.nodes == model.schedule.circuit.nodes
    assert again.schedule.circuit.rows == CAPACITY - 1


# over a wire


def test_a_text_over_grpc(connected: Session) -> None:
    said = list(prices(secure.Ckks(), connected, None))
    assert "rounds" in said[0]
    assert "scores of all tokens" in said[1]
    text = connected.generate([5, 7], 2, ignore_end=True).complete()
    assert max(misses([5, 7], text.ids)) <= 2 * compiled().model.predicted_error
    again = connected.generate([7], 2, ignore_end=True).complete()  # which knows nothing of the first
    assert max(misses([7], again.ids)) <= 2 * compiled().model.predicted_error
    assert len({report.id for report in connected.reports}) == 5
    (line,) = [line for line in summary(text, connected.reports, 1.0, 0.5) if "the server saw" in line]
    assert "5 steps" in line
    receipt = connected.receipt()
    assert receipt.answered == 5
    verify(receipt, {compiled().program.digest: compiled().program.encoded})


def test_a_text_that_is_left_frees_its_place(connected: Session) -> None:
    text = connected.generate([5], 4, ignore_end=True)
    next(iter(text))
    del text
    assert connected.generate([5], 1, ignore_end=True).complete().ids  # the server has one worker


def test_a_conversation_only_goes_on(connected: Session) -> None:
    link = connected.link
    conversation, program = link.converse(CAPACITY), link.program
    values = program.encode(program.clear_values(step_inputs([5], 0, 0, program.rows), link.tables), link.tables)
    link.go_on(conversation, values, 0, rows=0)
    with pytest.raises(InvalidInput, match="behind 0 of 1 rows"):
        link.go_on(conversation, values, 1, rows=0)
    link.leave(conversation)
    with pytest.raises(PeerLost, match="has ended"):
        link.go_on(conversation, values, 1, rows=1)


def test_a_prompt_that_is_too_long_says_so(session: Session) -> None:
    with pytest.raises(InputTooLong, match="take 5 steps"):
        session.generate([5] * 5, 1).complete()


def test_a_busy_server_is_asked_again(connected: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that has not begun loses nothing; one that has would, and ends."""
    link: Any = connected.link
    answer, refusals = type(link)._answer, [2]

    def busy(self: Any, *given: Any) -> Any:
        if refusals[0]:
            refusals[0] -= 1
            raise Busy("all places are taken", after=0.01)
        return answer(self, *given)

    monkeypatch.setattr(type(link), "_answer", busy)
    text = connected.generate([5], 2, ignore_end=True)
    assert (next(text), refusals) == (text.ids[0], [0])
    refusals[0] = 1
    with pytest.raises(PeerLost, match="has ended"):
        text.complete()


def test_a_program_of_more_rows_than_its_masks_have_is_refused() -> None:
    document = json.loads(compiled().program.encoded)
    document["rows"] = 2**30
    with pytest.raises(InvalidProgram, match="reads 1073741824 rows, none of its inputs"):
        CkksProgram.from_bytes(json.dumps(document).encode())


def test_a_program_shows_calibration_coarsely() -> None:
    """Its unit and the ranges of its inputs are powers of 2^(1/4), and no value of one text."""
    program = compiled().program
    shown = [program.output_unit, *(abs(edge) for pair in program.ranges.values() for edge in pair)]
    assert all(abs(quarters - round(quarters)) < 1e-9 for quarters in (4 * math.log2(value) for value in shown))


def test_results_beyond_twice_the_largest_are_no_answer() -> None:
    program = compiled().program
    slots = [np.where(row == 0, 1.9, 0.0) for row in program.output]
    assert program.decode(slots)["output"].flatten()[0] == pytest.approx(1.9 * program.output_unit, rel=1e-2)
    with pytest.raises(InvalidInput, match="it is not an answer"):
        program.decode([1.1 * row for row in slots])


def test_short_texts_leave_no_row_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps behind the longest text that is given are those of texts which the model writes."""
    measured = list[int]()

    def build(self: Any, model: Any, example: Any, whole: Any, texts: Any, *_: Any) -> Any:
        measured.extend(len(text) for text in texts)
        raise InvalidInput("enough")

    monkeypatch.setattr(secure.Ckks, "build_step", build)
    for given, lengths in (([[5, 7]], {2, CAPACITY}), ([[5, 7], [1, 2, 3, 4]], {2, 4})):
        measured.clear()
        with pytest.raises(InvalidInput, match="enough"):
            secure.compile_generator(
                polynomial(), calibration=given, capacity=CAPACITY, embedding="client-table", deployment=CKKS
            )
        assert {*measured} == lengths
