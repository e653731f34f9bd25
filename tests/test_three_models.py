"""Whole models under three parties: answers, costs, and everything that each party sees on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocols import ring
from protocols import two_party as tp
from protocols.circuit import deal, reference
from protocols.flow import Instruction
from protocols.prg import fresh_seed
from protocols.protocol import SERVER, Material, Step, Weights
from protocols.steps import PairTraffic, run_pair
from protocols.three_party import Translated, translate
from protocols.three_party.weights import Party2Weights, SharedWeights, masked
from protocols.weights import ServerWeights
from protocols.wire import Wire, decode
from secure import Compiled, Program, ThreeParty, insecure_in_process, plain_reference
from secure.deployments import in_process
from secure.session.session import Session
from tests.helpers import key
from tests.test_program import answer, classifier, largest, points
from tests.three import Query, query, shared_inputs, watched
from tests.uniformity import CERTAIN, difference, suspicious

RUNS = 40
Messages = list[tuple[Tensor, int]]  # what a party sees in a query, in order: elements, and bits of each


def compiled(*, public: bool = False) -> Compiled:
    """The classifier, for three parties."""
    return replace(classifier()[1], deployment=ThreeParty(public_weights=public))


def process(*, public: bool = False) -> Session:
    """Its parties in this process, with fresh keys."""
    return insecure_in_process(compiled(public=public))


# answers


@pytest.mark.parametrize("public", [False, True])
def test_a_model_with_gelu_layernorm_and_softmax(public: bool) -> None:
    model, session = classifier()[0], process(public=public)
    expected = compiled(public=public).cost
    for number, seed in enumerate(range(100, 110)):
        inputs = points(4, seed)
        result = session.query(inputs)
        report = session.reports[-1]
        assert result.dtype == torch.float64
        assert result.shape == answer(model, inputs).shape
        assert largest(result - plain_reference(compiled(public=public), inputs)) < 5e-3
        assert largest(result - answer(model, inputs)) < 5e-3
        assert (report.rounds, report.traffic, report.query) == (expected.rounds, expected.traffic, number)
        assert report.dealer_seconds > 0
        assert report.online_seconds > 0


@pytest.mark.parametrize("public", [False, True])
def test_a_text_encoder(public: bool, model: Any, directory: Path) -> None:
    from secure.models.served_tokenizer import load_tokenizer
    from secure.models.text import text_inputs
    from tests.tiny import LENGTH, sentences

    made, tokenizer = replace(model.compiled, deployment=ThreeParty(public_weights=public)), load_tokenizer(directory)
    session = insecure_in_process(made)
    for text in sentences(5):
        inputs = text_inputs(tokenizer, text, LENGTH)
        result = session.query(inputs)
        assert largest(result - plain_reference(made, inputs)) < 5e-3
        assert (session.reports[-1].rounds, session.reports[-1].traffic) == (made.cost.rounds, made.cost.traffic)


def test_two_queries_and_two_deployments_share_nothing_but_the_answer() -> None:
    inputs, sessions = points(4, 5), [process(), process()]
    answers = [session.query(inputs) for session in (*sessions, *sessions)]
    for other in answers[1:]:
        assert largest(answers[0] - other) < 2e-3


def test_every_deployment_and_every_query_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of the weights; then the two parties' keys, the client's seed and three pairs', anew for each query."""
    seeds = list[bytes]()

    def recorded() -> bytes:
        seeds.append(fresh_seed())
        return seeds[-1]

    monkeypatch.setattr(in_process, "fresh_seed", recorded)
    for public, of_weights in ((False, 2), (True, 0)):
        seeds.clear()
        session = process(public=public)
        assert len(seeds) == of_weights
        for number in (1, 2):
            session.query(points(4, 5))
            assert len(set(seeds)) == len(seeds) == of_weights + 6 * number
    zero, one, _ = process().link._weights
    assert isinstance(zero, SharedWeights)
    assert isinstance(one, SharedWeights)
    for name in translate(classifier()[1].program.circuit, classifier()[1].program.revealed).weight_rings:
        (w_0, w_1), (same, w_2) = zero.pair(name), one.pair(name)
        assert torch.equal(w_1, same)
        assert not bool(((w_0 == w_2) | (w_0 == w_1) | (w_1 == w_2)).any())


def test_costs_beside_those_of_two_parties() -> None:
    """Nothing is revealed between the parties; deliveries go both ways, or with public weights not at all."""
    program = classifier()[1].program
    two, three = program.cost, ThreeParty(trusted_clients=True).translated(program).cost
    public = ThreeParty(public_weights=True, trusted_clients=True).translated(program).cost
    assert three.rounds < two.rounds
    assert public.rounds <= three.rounds
    assert three.dealt == two.dealt  # a ring element for an output of a layer, either way
    linear = [i.protocol for i in program.circuit if isinstance(i.protocol, tp.Linear)]
    assert public.dealt == two.dealt - sum(p.cost().dealt for p in linear)
    assert three.to_second == three.to_first >= public.to_second == public.to_first
    beside = insecure_in_process(classifier()[1])
    beside.query(points(4, 1))
    assert beside.reports[0].traffic == classifier()[1].cost.traffic  # as before


# party 2


def test_party_2_is_done_before_there_is_an_input_or_a_weight() -> None:
    """It deals from seeds and public shapes alone; what it dealt then serves whatever is asked of whichever weights.

    (One key serves two queries here, as it never may elsewhere.)
    """
    program, integers = classifier()[1].program, classifier()[1].model.integers
    made = translate(program.circuit, program.revealed)
    keys, seeds = (key(), key()), (key(), key())
    shapes = {name: program.weight_shapes[name] for name in program.weight_rings}  # as the Program names them
    ahead = dict(deal(made.circuit, *keys, Party2Weights(*seeds, shapes)))
    assert sum(map(len, ahead.values())) == made.cost.dealt
    for seed, factor in ((1, 1), (2, 0)):
        weights = {name: w * factor for name, w in integers.items()}
        values = program.client_values(points(4, seed), {})
        common = dict(masked(weights, *seeds, made.weight_rings))
        held = SharedWeights(0, seeds[0], common), SharedWeights(1, seeds[1], common), Party2Weights(*seeds, {})
        protocols = {i.protocol.name: i.protocol for i in program.circuit if isinstance(i.protocol, tp.Input)}
        asked = Query(made, ahead, keys, held, shared_inputs(protocols, values, made))
        (a, told), (b, other) = run_pair(asked.party(0), asked.party(1))
        plain, _ = reference(program.circuit, program.revealed, ServerWeights(weights), values)
        form, _ = made.results
        answer, expected = (program.decode([ring.reduce(x, form.bits), told])["output"] for x in (a + b, plain))
        assert not (told + other).any()
        assert largest(answer - expected) < 5e-3


# views


@dataclass
class Seen:
    """What parties 0 and 1 receive in one query, and what they can compute of each opened value: x + the other's mask,
    from the opening and their own mask.
    """

    received: tuple[Messages, Messages] = field(default_factory=lambda: ([], []))
    opened: tuple[Messages, Messages] = field(default_factory=lambda: ([], []))


def look(
    program: Program, made: Translated, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, public: bool
) -> Seen:
    """Ask a model, with fresh keys and seeds."""
    seen = Seen()
    asked = query(program.circuit, program.client_values(inputs, {}), weights, public=public, made=made)
    traffic, views = PairTraffic(), list[list[tuple[Tensor, Wire]]]([[], []])
    with pytest.MonkeyPatch.context() as patch:
        for kind in (tp.Open, tp.OpenBits):
            patch.setattr(kind, "run", remembering(kind.run, seen.opened))
        run_pair(watched(asked.party(0), views[0]), watched(asked.party(1), views[1]), traffic)
    assert [sum(wire.size for _, wire in view) for view in views] == [traffic.to_first, traffic.to_second]
    for party in (0, 1):
        seen.received[party].extend((x, 8 if w.planes else w.bits) for x, w in views[party])
    for index, correction in asked.corrections.items():
        for d in made.circuit[index].protocol.draws:
            if d.derived:
                part, correction = correction[: d.wire.size], correction[d.wire.size :]
                seen.received[SERVER].append((decode(part, d.wire), 8 if d.planes else d.bits))
        assert not correction
    return seen


def remembering(real: Any, opened: tuple[Messages, Messages]) -> Any:
    def run(self: Any, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        opening = yield from real(self, party, material, operands, weights)
        own = next(iter(material.values()))
        opened[party].append((difference(opening.value, own), 8 if self.out.planes else self.out.bits))
        return opening

    return run


def octets_of(x: Tensor, bits: int) -> Iterator[Tensor]:
    """The whole bytes of elements, one place after the other."""
    for start in range(0, bits - 7, 8):
        yield ((x.reshape(-1).to(torch.int64) >> start) & 255).to(torch.uint8)


def told(queries: list[Messages]) -> list[str]:
    """What many queries about the same tell by any message, over the queries, or by all of them together."""
    found, whole = [], []
    for index, same in enumerate(zip(*queries, strict=True)):
        (bits,) = {bits for _, bits in same}
        x = torch.cat([x.reshape(-1) for x, _ in same])
        ones = sum(int(((x >> place) & 1).sum()) for place in range(bits))
        if math.erfc(abs(ones - bits * len(x) / 2) / math.sqrt(bits * len(x) / 2)) < CERTAIN:
            found.append(f"message {index}: {ones} ones among {bits * len(x)} bits")
        parts = list(octets_of(x, bits))
        whole += parts
        if parts and len(parts) * len(x) >= 2048:
            reason = suspicious(torch.cat(parts), 8)
            found += [f"message {index}: {reason}"] if reason else []
    reason = suspicious(torch.cat(whole), 8)
    return found + ([f"all messages: {reason}"] if reason else [])


def between(first: list[Messages], second: list[Messages]) -> list[Messages]:
    """Of each pair of queries, how their messages differ."""
    return [
        [(difference(x, y), bits) for (x, bits), (y, _) in zip(a, b, strict=True)]
        for a, b in zip(first, second, strict=True)
    ]


def asked_about(factor: int, value: float, made: Translated, *, public: bool) -> list[Seen]:
    """One input and one model, again and again."""
    model, inputs = classifier()[1], {"x": torch.full((4, 6), value)}
    weights = {name: w * factor for name, w in model.model.integers.items()}
    return [look(model.program, made, inputs, weights, public=public) for _ in range(RUNS)]


def suspicions(made: Translated, *, public: bool) -> list[str]:
    """Of what two inputs and two models show, and of how that differs between them and between two queries."""
    seens = asked_about(1, -3.0, made, public=public), asked_about(0, 3.0, made, public=public)
    found = []
    for what in ("received", "opened"):
        for party in (0, 1):
            first, second = ([getattr(seen, what)[party] for seen in of_one] for of_one in seens)
            assert all(first)
            for queries in (first, second, between(first, second), between(first[::2], first[1::2])):
                found += [f"party {party}, {what}: {reason}" for reason in told(queries)]
    return found


@pytest.mark.parametrize("public", [False, True])
def test_everything_that_a_party_sees_is_uniform(public: bool) -> None:
    program = classifier()[1].program
    made = translate(program.circuit, program.revealed, public=public)
    assert not suspicions(made, public=public)


@dataclass(frozen=True)
class BareOpen(tp.Open):
    """Party 1 sends its share without a mask."""

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        return (yield from super().run(party, {"r": material["r"] * (party == SERVER)}, operands, weights))


def test_one_opening_without_a_mask_is_noticed() -> None:
    program = classifier()[1].program
    made = translate(program.circuit, program.revealed, trusted_clients=True)  # the check would notice it as well
    index = next(i for i, x in enumerate(made.circuit) if isinstance(x.protocol, tp.Open))
    opening = made.circuit[index].protocol
    broken = Instruction(BareOpen(opening.shape, opening.ring), made.circuit[index].inputs)  # type: ignore[attr-defined]
    circuit = (*made.circuit[:index], broken, *made.circuit[index + 1 :])
    assert suspicions(replace(made, circuit=circuit), public=False)
