"""Circuits: rounds, order, lifetimes, one-time correlations, frames and channels."""

from __future__ import annotations

import math
import queue
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocols import local
from protocols import two_party as tp
from protocols.circuit import (
    CircuitError,
    CorrelationReused,
    Correlations,
    MetaWeights,
    Observer,
    Part,
    check,
    deal,
    execute,
    prepare,
    reference,
    total_cost,
)
from protocols.flow import Flow, Instruction
from protocols.protocol import CLIENT, SERVER, CircuitCost, Exchange, Local, Protocol, Shape, Step, Weights
from protocols.steps import Done, Framed, FrameObserver, PairTraffic, advance, run_pair, unpack_frame
from protocols.weights import ServerWeights
from protocols.wire import FrameError, Wire
from tests.helpers import combine, deal_circuit, integers, key, run_circuit, shared, words

SHAPE: Shape = (5,)
RING = 40
NUMBERS = {name: torch.arange(5) * 1000 + offset for name, offset in (("x", -2000), ("y", 7))}
MATRIX = {"w": torch.arange(35).reshape(5, 7) - 17, "v": torch.arange(35).reshape(5, 7) % 11}
ROW = (1, 5)


def sources(rng: np.random.Generator | None = None) -> list[Instruction]:
    rng = rng or np.random.default_rng(0)
    return [Instruction(shared(name, SHAPE, RING, words(rng, SHAPE))) for name in NUMBERS]


def product_circuit() -> list[Instruction]:
    """(x y + x) y, with x extended on the side."""
    return [
        *sources(),  # 0, 1
        Instruction(tp.Open(SHAPE, RING), (0,)),  # 2
        Instruction(tp.Open(SHAPE, RING), (1,)),  # 3
        Instruction(tp.Product(SHAPE, RING), (2, 3)),  # 4
        Instruction(local.Add(SHAPE, RING), (4, 0)),  # 5
        Instruction(tp.Open(SHAPE, RING), (5,)),  # 6
        Instruction(tp.Product(SHAPE, RING), (6, 3)),  # 7
        Instruction(tp.Extend(SHAPE, RING, 64), (0,)),  # 8
        Instruction(tp.Reveal(SHAPE, RING), (7,)),  # 9
    ]


def linear_circuit() -> list[Instruction]:
    """Two layers that read one delivery, a third behind them."""
    return [
        Instruction(shared("x", ROW, RING, words(np.random.default_rng(1), ROW))),
        Instruction(tp.Deliver(ROW, RING), (0,)),
        Instruction(tp.Linear((1, 7), RING, "w"), (1,)),
        Instruction(tp.Linear((1, 7), 30, "v"), (1,)),
        Instruction(local.Truncate((1, 7), RING, 3), (2,)),
        Instruction(tp.Deliver((1, 7), RING - 3), (4,)),
        Instruction(tp.Linear((1, 7), RING - 3, "d", True), (5,)),
        Instruction(tp.Reveal((1, 7), RING - 3), (6,)),
        Instruction(tp.Reveal((1, 7), 30), (3,)),
    ]


LINEAR_WEIGHTS = {**MATRIX, "d": torch.arange(7) - 3}
LINEAR_INPUT = {"x": torch.arange(5).reshape(1, 5) * 100}


# results, rounds and order


def test_products_in_two_rounds_and_a_reveal() -> None:
    circuit = product_circuit()
    outcome = run_circuit(circuit, NUMBERS, [9, 8])
    x, y = (integers(NUMBERS[n], signed=True) for n in "xy")
    assert (integers(outcome.client[0], RING, signed=True) == (x * y + x) * y).all()
    assert (integers(outcome.value(1), signed=True) == x).all()
    assert outcome.cost == total_cost(circuit)
    assert outcome.cost.rounds == 3  # the two openings and the extension share one


def test_independent_exchanges_share_a_round() -> None:
    circuit = sources()
    circuit += [Instruction(tp.Open(SHAPE, k), (i % 2,)) for i, k in enumerate(range(1, 41))]
    circuit += [Instruction(tp.Compare(SHAPE, 17, 0, (i,)), (41,)) for i in range(3)]
    outcome = run_circuit(circuit, NUMBERS, range(len(circuit)))
    assert outcome.cost == total_cost(circuit)
    assert outcome.cost.rounds == 2


def test_both_parties_wait_for_the_same_instructions() -> None:
    dealt = deal_circuit(product_circuit(), NUMBERS, [9])
    seen: dict[int, list[list[int]]] = {SERVER: [], CLIENT: []}
    steps = [
        execute(
            dealt.circuit,
            dealt.outputs,
            party,
            Correlations(party, dealt.keys[party], dealt.corrections if party == SERVER else None),
            dealt.server_weights if party == SERVER else dealt.client_weights,
            NUMBERS if party == CLIENT else None,
            observer=_Seen(seen[party]),
        )
        for party in (SERVER, CLIENT)
    ]
    run_pair(steps[SERVER], steps[CLIENT])
    assert seen[SERVER] == seen[CLIENT] == [[2, 3, 8], [6], [9]]


class _Chatty(tp.Open):
    def cost(self) -> CircuitCost:
        return CircuitCost()


def test_a_protocol_that_exchanges_more_often_than_its_cost_is_a_fault() -> None:
    """The schedule is that of the costs: its result would be read before it is there."""
    circuit = [Instruction(tp.Input(SHAPE, RING, "x", 0, -1.0, 1.0)), Instruction(_Chatty(SHAPE, RING), (0,))]
    step = execute(circuit, [1], SERVER, Correlations(SERVER, key()), ServerWeights({}))
    with pytest.raises(RuntimeError, match=r"instruction 1 \(open\) exchanges more often than its cost"):
        next(step)


def test_a_run_that_would_never_be_called_is_a_fault() -> None:
    with pytest.raises(TypeError, match=r"_Loud\.run would never be called"):

        class _Loud(tp.Product):
            def run(self, *of: Any) -> Step[Any]:
                return (yield Exchange())


def test_nothing_is_held_while_a_party_waits_but_what_is_read_later() -> None:
    made: list[weakref.ref[Tensor]] = []

    class Watched(local.MulConstant):
        def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
            made.append(weakref.ref(found := super().apply(party, operands, weights)))
            return found

    circuit = [
        Instruction(tp.Input(SHAPE, RING, "x", 0, -1.0, 1.0)),
        Instruction(tp.Open(SHAPE, RING), (0,)),
        Instruction(Watched(SHAPE, RING, 3), (0,)),
        Instruction(local.Add(SHAPE, RING), (2, 2)),
    ]
    x = {"x": torch.ones(SHAPE, dtype=torch.int64)}
    step = execute(circuit, [1], CLIENT, Correlations(CLIENT, key()), ServerWeights({}), x)
    next(step)
    assert [each() for each in made] == [None]


class _Seen(Observer):
    def __init__(self, rounds: list[list[int]]) -> None:
        self.rounds = rounds

    def exchanging(self, parts: Sequence[Part]) -> None:
        self.rounds.append([part.index for part in parts])


@st.composite
def circuits(draw: st.DrawFn) -> list[Instruction]:
    """Random circuits of exact protocols over one shape and ring."""
    circuit, shares = sources(), [0, 1]
    openings: list[int] = []
    for _ in range(draw(st.integers(1, 25))):
        kinds = ["add", "open", "extend", "deliver"] + (["product", "polynomial", "compare"] if openings else [])
        kind = draw(st.sampled_from(kinds))

        def share() -> int:
            return int(draw(st.sampled_from(shares)))

        def opening() -> int:
            return int(draw(st.sampled_from(openings)))

        protocol: Protocol
        inputs: tuple[int, ...]
        at, result = len(circuit), shares
        if kind == "add":
            protocol, inputs = local.Add(SHAPE, RING), (share(), share())
        elif kind == "open":
            protocol, inputs, result = tp.Open(SHAPE, RING), (share(),), openings
        elif kind == "extend":
            # far out of range as often as not: the result is right modulo the narrower ring
            protocol, inputs = tp.Extend(SHAPE, RING, 64), (share(),)
        elif kind == "deliver":
            circuit.append(Instruction(tp.Deliver(SHAPE, RING), (share(),)))
            protocol, inputs, at = tp.Linear(SHAPE, RING, "d", True), (at,), at + 1
        elif kind == "product":
            protocol, inputs = tp.Product(SHAPE, RING), (opening(), opening())
        elif kind == "polynomial":
            circuit.append(Instruction(tp.Powers(SHAPE, RING, 3), (opening(),)))
            protocol, inputs, at = tp.Polynomial(SHAPE, RING, 5, (1, -2, 3, 4)), (at,), at + 1
        else:
            circuit.append(Instruction(tp.Compare(SHAPE, 20, 0, (0,)), (opening(),)))
            circuit.append(Instruction(tp.OpenBits(SHAPE, 1), (at,)))
            protocol, inputs, at = tp.Select(SHAPE, RING, (0,), (3,)), (at + 1,), at + 2
        circuit.append(Instruction(protocol, inputs))
        result.append(at)
    return circuit


@settings(deadline=None)
@given(circuit=circuits())
def test_instructions_start_as_soon_as_their_operands_are_there(circuit: list[Instruction]) -> None:
    flow = Flow.of(circuit)
    assert list(flow) == circuit
    assert Flow.of(flow) is flow
    starts = {index: rounds for rounds, phase in enumerate(flow.phases) for index in phase}
    assert sorted(starts) == list(range(len(circuit)))
    assert all(phase == sorted(phase) for phase in flow.phases)
    for index, instruction in enumerate(circuit):
        assert starts[index] == max((flow.finished[i] for i in instruction.inputs), default=0)
        assert flow.finished[index] == starts[index] + instruction.protocol.cost().rounds


@settings(deadline=None, max_examples=60)
@given(circuit=circuits(), prepared=st.booleans())
def test_any_circuit(circuit: list[Instruction], prepared: bool) -> None:
    """Results modulo 2^40 as in plain arithmetic; cost as computed."""
    weights = {"d": torch.arange(5) - 2}
    exact = [i for i, c in enumerate(circuit) if c.protocol.out.bits in (RING, 64) and c.protocol.kind != "powers"]
    exact = [i for i in exact if not c_planes(circuit[i].protocol)]
    outcome = run_circuit(circuit, NUMBERS, exact, weights, prepared=prepared)
    plain = reference(circuit, exact, ServerWeights(weights), NUMBERS)
    for position, expected in enumerate(plain):
        assert (integers(outcome.value(position), RING) == integers(expected, RING)).all()
    assert outcome.cost == total_cost(circuit)


def c_planes(protocol: Protocol) -> bool:
    return protocol.out.planes


# circuits that somebody else made

EIGHT: Shape = (8,)
OPENED = [
    Instruction(tp.Input(EIGHT, RING, "x", 0, -1.0, 1.0)),
    Instruction(tp.Open(EIGHT, RING), (0,)),
    Instruction(tp.Compare(EIGHT, 17, 0, (0, 1)), (1,)),
    Instruction(tp.OpenBits(EIGHT, 2), (2,)),
    Instruction(tp.Powers(EIGHT, RING, 2), (1,)),
    Instruction(tp.Input((1,), RING, "y", 0, -1.0, 1.0)),
    Instruction(tp.Open((1,), RING), (5,)),
]
MISFITS: dict[str, Instruction] = {
    "reads a result that does not exist": Instruction(local.Reshape(EIGHT, RING), (7,)),
    "too few operands": Instruction(local.Add(EIGHT, RING), (0,)),
    "too many operands": Instruction(tp.Open(EIGHT, RING), (0, 0)),
    "a share where an opening is read": Instruction(tp.Product(EIGHT, RING), (0, 0)),
    "an opening where a share is read": Instruction(tp.Open(EIGHT, RING), (1,)),
    "bits where numbers are read": Instruction(tp.Open((2, 1), RING), (2,)),
    "one mask for eight numbers": Instruction(tp.Open((1,), RING), (0,)),
    "one delivery mask for eight numbers": Instruction(tp.Deliver((1,), RING), (0,)),
    "eight masks for one number": Instruction(tp.Open(EIGHT, RING), (5,)),
    "a mask of another shape": Instruction(tp.Open((2, 4), RING), (0,)),
    "masks of fewer bits": Instruction(tp.OpenBits(EIGHT, 1), (2,)),
    "a wider opening than its secret": Instruction(tp.Open(EIGHT, RING + 1), (0,)),
    "a wider product than its openings": Instruction(tp.Product(EIGHT, RING + 1), (1, 1)),
    "an extension from a wider ring": Instruction(tp.Extend(EIGHT, RING + 1, 64), (0,)),
    "an extension of another shape": Instruction(tp.Extend((1,), RING, 64), (0,)),
    "a comparison wider than the opening": Instruction(tp.Compare(EIGHT, RING + 1, 0, (0,)), (1,)),
    "a comparison of fewer elements": Instruction(tp.Compare((7,), 17, 0, (0,)), (1,)),
    "a comparison of more elements": Instruction(tp.Compare((2, 8), 17, 0, (0,)), (1,)),
    "a comparison of one number as eight": Instruction(tp.Compare(EIGHT, 17, 0, (0,)), (6,)),
    "an exponential of one number as eight": Instruction(tp.Exponential(EIGHT, 20, 19, 16, 40, 16), (6,)),
    "an exponential of many digits without a bit": Instruction(tp.Exponential(EIGHT, 24, 20, 16, 40, 16), (1,)),
    "a sum of one opening for two signs": Instruction(tp.OpenedSum(EIGHT, RING, (False, True), 0), (1,)),
    "a sum of wider openings than there are": Instruction(tp.OpenedSum(EIGHT, RING + 1, (False,), 0), (1,)),
    "a sum of openings of another shape": Instruction(tp.OpenedSum((2, 4), RING, (False,), 0), (1,)),
    "a table of one number as eight": Instruction(
        tp.Tabulated(EIGHT, 20, 16, 4, 2, 1 << 17, 1 << 19, 1e6, 16, 64), (6,)
    ),
    "a table of a wider ring": Instruction(
        tp.Tabulated(EIGHT, RING + 2, RING - 11, 4, 2, 1 << 29, 1 << 32, 1e9, 16, 64), (1,)
    ),
    "tables of a wider ring": Instruction(
        tp.TabulatedBands(EIGHT, ((20, 16, 4, 1 << 17, 1 << 19), (RING + 1, 30, 1, 1 << 31, 1 << 32)), 2, 1.0, 16, 64),
        (1,),
    ),
    "a table of too many rows among others": Instruction(
        tp.TabulatedBands(EIGHT, ((20, 16, 4, 1 << 17, 1 << 19), (20, 8, 4, 1 << 17, 1 << 19)), 2, 1.0, 16, 64), (1,)
    ),
    "tables of one number as eight": Instruction(
        tp.TabulatedBands(EIGHT, ((20, 16, 4, 1 << 17, 1 << 19),), 2, 1e6, 16, 64), (6,)
    ),
    "bits of digits of one number as eight": Instruction(tp.DigitsIn(EIGHT, 20, ((16, 3),)), (6,)),
    "bits of digits, one of which has too many": Instruction(tp.DigitsIn(EIGHT, 20, ((16, 3), (7, 3))), (1,)),
    "bits of one number's digit as eight": Instruction(tp.DigitIn(EIGHT, 20, 16, 3), (6,)),
    "bits of digits wider than the opening": Instruction(tp.DigitIn(EIGHT, RING + 1, RING, 1), (1,)),
    "a digit of too many bits": Instruction(tp.DigitIn(EIGHT, 20, 7, 3), (1,)),
    "a digit of no bits": Instruction(tp.DigitIn(EIGHT, 20, 20, 1), (1,)),
    "a digit of negative bits": Instruction(tp.DigitIn(EIGHT, 20, 64, 1), (1,)),
    "a bit that is always true": Instruction(tp.DigitIn(EIGHT, 20, 16, 16), (1,)),
    "a bit that is never true": Instruction(tp.DigitIn(EIGHT, 20, 16, 0), (1,)),
    "a histogram of one number as eight": Instruction(tp.Histogram(EIGHT, 20, 16, 16, 1), (6,)),
    "a histogram of rows of another length": Instruction(tp.Histogram((2, 4), 20, 16, 16, 1), (1,)),
    "a histogram wider than the opening": Instruction(tp.Histogram(EIGHT, RING + 1, RING, 2, 1), (1,)),
    "a histogram of no row": Instruction(tp.Histogram((), 20, 16, 16, 1), (1,)),
    "a histogram of rows whose counts wrap": Instruction(tp.Histogram((256,), 20, 16, 16, 1), (1,)),
    "a histogram of more bins than digits": Instruction(tp.Histogram(EIGHT, 20, 16, 32, 1), (1,)),
    "a histogram of blocks shorter than its bins": Instruction(tp.Histogram(EIGHT, 20, 16, 9, 2), (3, 1)),
    "a histogram of more blocks than digits": Instruction(tp.Histogram(EIGHT, 20, 16, 1, 17), (3, 1)),
    "a histogram of too many places": Instruction(tp.Histogram(EIGHT, 20, 8, 256, 3), (3, 1)),
    "a histogram without the bits of its window": Instruction(tp.Histogram(EIGHT, 20, 16, 8, 2), (1,)),
    "a histogram by two bits": Instruction(tp.Histogram(EIGHT, 20, 16, 8, 2), (3, 1)),
    "a histogram of all digits by bits": Instruction(tp.Histogram(EIGHT, 20, 16, 16, 1), (3, 1)),
    "a selection of one number as eight": Instruction(tp.Select(EIGHT, RING, (1, 1), (0, 0)), (3, 6)),
    "a selection by fewer bits": Instruction(tp.Select(EIGHT, RING, (1, 1, 1), (0, 0, 0)), (3, 1)),
    "a selection by bits of other elements": Instruction(tp.Select((9,), RING, (0, 0), (1, 1)), (3,)),
    "a selection of nothing": Instruction(tp.Select(EIGHT, RING, (), ()), (3,)),
    "a slope that is zero modulo 2^64 alone": Instruction(tp.Select(EIGHT, RING, (1 << 64, 1), (0, 0)), (3, 1)),
    "a selection among fewer numbers than bits": Instruction(tp.SelectEach(EIGHT, RING, 2), (3, 1)),
    "powers of another shape": Instruction(tp.Powers((1,), RING, 2), (1,)),
    "a polynomial beyond its powers": Instruction(tp.Polynomial(EIGHT, RING, 0, (1, 2, 3, 4)), (4,)),
    "polynomials beyond their powers": Instruction(tp.Polynomials(EIGHT, RING, (0, 1), ((1,), (1, 2, 3, 4))), (4,)),
    "polynomials of too many terms": Instruction(tp.Polynomials(EIGHT, RING, (0,) * 129, ((1, 2),) * 129), (4,)),
    "an opening that is kept under no name": Instruction(tp.Keep(EIGHT, RING, ""), (1,)),
    "an opening of before without a name": Instruction(tp.Recall(EIGHT, RING, "")),
    "polynomials without a centre": Instruction(tp.Polynomials(EIGHT, RING, (0,), ((1,), (1, 2))), (4,)),
    "an opening lifted from more bits than it has": Instruction(tp.Lift(EIGHT, RING + 1, 0, 64), (1,)),
    "an opening lifted to less": Instruction(tp.Lift(EIGHT, RING, 0, RING), (1,)),
    "an opening lifted without all of its bits": Instruction(tp.Lift(EIGHT, RING, RING - 1, 64), (1,)),
    "one number lifted as eight": Instruction(tp.Lift(EIGHT, RING, 0, 64), (6,)),
    "a lifted product of openings": Instruction(tp.LiftedProduct(EIGHT, RING, 20, RING), (1, 1)),
    "a lifted product of what is not lifted": Instruction(tp.LiftedProduct(EIGHT, RING, RING, RING), (1, 1)),
    "powers of what is not lifted": Instruction(tp.LiftedPowers(EIGHT, RING, 20, 2), (1,)),
    "a polynomial of another shape": Instruction(tp.Polynomial((1,), RING, 0, (1, 2)), (4,)),
    "indicators of planes that are not there": Instruction(local.Indicators(1, ((2,),), (False,)), (2,)),
    "indicators of longer planes": Instruction(local.Indicators(2, ((0,),), (False,)), (2,)),
    "differences of a single number": Instruction(local.Differences((0,), RING), (5,)),
    "differences of more": Instruction(local.Differences(EIGHT, RING), (0,)),
    "a slice past the end": Instruction(local.Slice((4,), RING, 0, 6, 10, 1), (0,)),
    "a slice of another dimension": Instruction(local.Slice((4,), RING, 1, 0, 4, 1), (0,)),
    "a reshape to more": Instruction(local.Reshape((9,), RING), (0,)),
    "a permutation that is none": Instruction(local.Permute(EIGHT, RING, (1,)), (0,)),
    "a truncation of a wider ring": Instruction(local.Truncate(EIGHT, RING + 1, 4), (0,)),
    "a layer without its weight": Instruction(tp.Linear(EIGHT, RING, "w", True), (0,)),
    "an answer of another shape": Instruction(tp.Reveal((1,), RING), (0,)),
    "an answer wider than it is": Instruction(tp.Reveal(EIGHT, 64), (0,)),
    "an input without a lower end": Instruction(tp.Input(EIGHT, RING, "z", 0, -math.inf, 1.0)),
    "an input without an upper end": Instruction(tp.Input(EIGHT, RING, "z", 0, -1.0, math.inf)),
    "an input above what is no number": Instruction(tp.Input(EIGHT, RING, "z", 0, math.nan, 1.0)),
    "an input below what is no number": Instruction(tp.Input(EIGHT, RING, "z", 0, -1.0, math.nan)),
    "an input of an empty range": Instruction(tp.Input(EIGHT, RING, "z", 0, 1.0, -1.0)),
    "an input of too many fraction bits": Instruction(tp.Input(EIGHT, RING, "z", 64, -1.0, 1.0)),
    "an input of negative fraction bits": Instruction(tp.Input(EIGHT, RING, "z", -1, -1.0, 1.0)),
}


def test_the_circuit_around_misfits_is_fit() -> None:
    check(OPENED, {})
    check([*OPENED, Instruction(tp.Select(EIGHT, RING, (1, 0), (0, 5)), (3, 1))], {})


@pytest.mark.parametrize("how", MISFITS)
def test_misfits_are_refused(how: str) -> None:
    """Masks must cover what they hide, and compiled loops trust the sizes that they are given."""
    with pytest.raises(CircuitError, match="instruction 7 "):
        check([*OPENED, MISFITS[how]], {})


@pytest.mark.parametrize(
    "operands", [(5, 7, 7), (0, 7, 7), (0, 8, 7), (0, 8, 0)], ids=["odd", "other angles", "two shapes", "a secret"]
)
def test_pairs_that_do_not_fit_their_angles_are_refused(operands: tuple[int, ...]) -> None:
    known = [*OPENED, Instruction(tp.Publish((1,), RING), (5,)), Instruction(tp.Publish(EIGHT, RING), (0,))]
    check([*known, Instruction(local.Rotated(EIGHT, RING), (0, 8, 8))], {})
    shape = known[operands[0]].protocol.out.shape
    with pytest.raises(CircuitError, match="instruction 9 "):
        check([*known, Instruction(local.Rotated(shape, RING), operands)], {})


@pytest.mark.parametrize(
    ("protocol", "reads"),
    [
        (tp.LiftedPowers(EIGHT, 64, 21, 2), 1),
        (tp.LiftedPowers(EIGHT, 20, 20, 2), 1),
        (tp.LiftedProduct(EIGHT, 64, 20, 21), 2),
        (tp.LiftedProduct((7,), 64, 20, 20), 2),
        (tp.PolynomialProduct(EIGHT, 64, 20, 20, 0, (1, 2)), 3),  # of what is no powers
    ],
)
def test_readers_of_a_lifted_opening_know_it(protocol: Protocol, reads: int) -> None:
    """How many bits agree is the reader's field, and the lift's: they must be the same."""
    lifted = [*OPENED, Instruction(tp.Lift(EIGHT, 20, 0, 64), (1,))]
    check([*lifted, Instruction(tp.LiftedProduct(EIGHT, 64, 20, 20), (7, 7))], {})
    check([*lifted, Instruction(tp.LiftedProduct(EIGHT, RING, 20, RING), (7, 6))], {})
    with pytest.raises(CircuitError, match="instruction 8 "):
        check([*lifted, Instruction(protocol, (7,) * reads)], {})


def test_a_product_with_a_polynomial_reads_powers_that_are_lifted() -> None:
    """As many as it has, of representatives that agree in as many bits."""
    lifted = [*OPENED, Instruction(tp.Lift(EIGHT, 20, 0, 64), (1,))]
    product = Instruction(tp.PolynomialProduct(EIGHT, 64, 20, 20, 0, (1, 2, 3)), (7, 8, 7))
    check([*lifted, Instruction(tp.LiftedPowers(EIGHT, 64, 20, 2), (7,)), product], {})
    for powers in (
        Instruction(tp.LiftedPowers(EIGHT, 64, 20, 1), (7,)),
        Instruction(tp.Powers(EIGHT, RING, 4), (1,)),
    ):
        with pytest.raises(CircuitError, match="instruction 9 "):
            check([*lifted, powers, product], {})
    for agreed in ((21, 20), (20, 19)):
        wrong = Instruction(tp.PolynomialProduct(EIGHT, 64, *agreed, 0, (1, 2, 3)), (7, 8, 7))
        with pytest.raises(CircuitError, match="instruction 9 "):
            check([*lifted, Instruction(tp.LiftedPowers(EIGHT, 64, 20, 2), (7,)), wrong], {})


@settings(deadline=None, max_examples=30)
@given(circuit=circuits())
def test_every_fit_circuit_is_accepted(circuit: list[Instruction]) -> None:
    check(circuit, {"d": (5,)})


def test_a_weight_that_broadcasts_its_operand_is_accepted() -> None:
    check([*OPENED, Instruction(local.AddWeight((3, 8), RING, "w"), (0,))], {"w": (3, 8)})


# the client's preparation


def test_a_prepared_client_is_the_same_client() -> None:
    circuit = linear_circuit()
    results = [
        run_circuit(circuit, LINEAR_INPUT, [7, 8], LINEAR_WEIGHTS, prepared=prepared) for prepared in (False, True)
    ]
    x = integers(LINEAR_INPUT["x"])
    w, v = (integers(MATRIX[n], signed=True) for n in "wv")
    for outcome in results:
        assert (integers(outcome.client[1], 30, signed=True) == x @ v).all()
        d = integers(outcome.client[0], RING - 3, signed=True) / (np.arange(7) - 3).astype(object).clip(1)
        assert (abs(d[:, 4:] * 8 - (x @ w)[:, 4:]) <= 8).all()
        assert outcome.cost == total_cost(circuit)
    assert results[0].cost == results[1].cost


def test_preparation_takes_no_input_and_finishes_linear_layers() -> None:
    circuit = linear_circuit()
    dealt = deal_circuit(circuit, {}, [7], LINEAR_WEIGHTS)
    correlations = Correlations(CLIENT, dealt.keys[CLIENT])
    prepare(circuit, correlations, dealt.client_weights)
    assert [i for i in range(len(circuit)) if correlations.is_finished(i)] == [2, 3, 6]
    for index in (2, 3, 6):
        assert isinstance(correlations.finished(index), Tensor)
        assert not correlations.is_finished(index)
        with pytest.raises(KeyError):
            correlations.finished(index)
    for index in (1, 5):  # the deliveries' masks, which the query itself takes
        assert correlations.take(index, circuit[index].protocol)
    for index in (1, 2, 3, 5, 6):
        with pytest.raises(CorrelationReused):
            correlations.take(index, circuit[index].protocol)


def test_a_linear_layer_straight_behind_another() -> None:
    circuit = [
        Instruction(shared("x", ROW, RING, torch.zeros(ROW, dtype=torch.int64))),
        Instruction(tp.Deliver(ROW, RING), (0,)),
        Instruction(tp.Linear((1, 7), RING, "w"), (1,)),
        Instruction(tp.Deliver((1, 7), RING), (2,)),
        Instruction(tp.Linear((1, 7), RING, "d", True), (3,)),
    ]
    outcome = run_circuit(circuit, LINEAR_INPUT, weights=LINEAR_WEIGHTS, prepared=True)
    expected = integers(LINEAR_INPUT["x"] @ MATRIX["w"] * LINEAR_WEIGHTS["d"], RING)
    assert (integers(outcome.value(), RING) == expected).all()


@pytest.mark.parametrize("ring", [20, 21, 32, 37, 48, 63, 64])
@pytest.mark.parametrize("diagonal", [False, True])
def test_linear_layers_are_exact_in_every_ring(ring: int, diagonal: bool) -> None:
    """Several layers of several rings behind one delivery, whose D serves them all."""
    rng = np.random.default_rng(ring)
    n, m, p = 4, 65, 65 if diagonal else 33
    x = words(rng, (n, m))
    weights = {
        name: torch.from_numpy(rng.integers(-(1 << 20), 1 << 20, (m,) if diagonal else (m, p))) for name in ("a", "b")
    }
    circuit = [
        Instruction(shared("x", (n, m), 64, words(rng, (n, m)))),
        Instruction(tp.Deliver((n, m), 64), (0,)),
        Instruction(tp.Linear((n, p), ring, "a", diagonal), (1,)),
        Instruction(tp.Linear((n, p), 64, "a", diagonal), (1,)),
        Instruction(tp.Linear((n, p), ring, "b", diagonal), (1,)),
    ]
    for prepared in (False, True):
        outcome = run_circuit(circuit, {"x": x}, [2, 3, 4], weights, prepared=prepared)
        for position, (name, k) in enumerate((("a", ring), ("a", 64), ("b", ring))):
            w = integers(weights[name])
            expected = (integers(x) * w if diagonal else integers(x) @ w) % (1 << k)
            assert (integers(outcome.value(position), k) == expected).all()
        assert outcome.cost == total_cost(circuit)
        assert outcome.cost.to_first == 8 * n * m


# correlations


def test_a_correlation_is_burnt_by_its_use() -> None:
    for party in (SERVER, CLIENT):
        correlations = Correlations(party, key(), {3: bytes(5 * 5)})
        product, opening = tp.Product(SHAPE, RING), tp.Open(SHAPE, RING)
        correlations.take(3, product)
        correlations.take(4, opening)
        with pytest.raises(CorrelationReused, match=r"instruction 3 \(product\) was already used"):
            correlations.take(3, product)
        with pytest.raises(CorrelationReused, match=r"instruction 4 \(open\) was already used"):
            correlations.take(4, opening)
        add = local.Add(SHAPE, RING)
        assert correlations.take(5, add) == correlations.take(5, add) == {}


def test_a_correlation_that_does_not_fit_is_burnt_too() -> None:
    correlations = Correlations(SERVER, key(), {0: bytes(3)})
    with pytest.raises(FrameError, match="a correction has 25 bytes here, got 3"):
        correlations.take(0, tp.Product(SHAPE, RING))
    with pytest.raises(CorrelationReused):
        correlations.take(0, tp.Product(SHAPE, RING))


def test_a_second_run_with_the_same_correlations_is_refused() -> None:
    dealt = deal_circuit(product_circuit(), NUMBERS, [9])
    run_pair(dealt.server(), dealt.client())
    correlations = Correlations(CLIENT, dealt.keys[CLIENT])
    for _ in range(2):
        step = execute(dealt.circuit, [9], CLIENT, correlations, dealt.client_weights, NUMBERS)
        if correlations._taken:
            with pytest.raises(CorrelationReused):
                next(step)
        else:
            next(step)


def test_preparation_burns() -> None:
    circuit = linear_circuit()
    dealt = deal_circuit(circuit, LINEAR_INPUT, [7], LINEAR_WEIGHTS)
    correlations = Correlations(CLIENT, dealt.keys[CLIENT])
    prepare(circuit, correlations, dealt.client_weights)
    with pytest.raises(CorrelationReused):
        prepare(circuit, correlations, dealt.client_weights)
    step = execute(circuit, [7], CLIENT, correlations, dealt.client_weights, LINEAR_INPUT)
    run_pair(dealt.server(), step)  # with what the first preparation left
    with pytest.raises(CorrelationReused):
        prepare(circuit, correlations, dealt.client_weights)


@pytest.mark.parametrize("finished", [False, True])
def test_what_was_prepared_serves_one_query(finished: bool) -> None:
    """Two inputs under one prepared mask would show their difference: nothing of the second may leave."""
    circuit = linear_circuit()
    dealt = deal_circuit(circuit, LINEAR_INPUT, [7], LINEAR_WEIGHTS)
    correlations = Correlations(CLIENT, dealt.keys[CLIENT])
    prepare(circuit, correlations, dealt.client_weights)
    first = execute(circuit, [7], CLIENT, correlations, dealt.client_weights, LINEAR_INPUT)
    if finished:
        run_pair(dealt.server(), first)
    else:
        assert next(first).send  # the message is made; the query then breaks
    other = {"x": LINEAR_INPUT["x"] + 1}
    for _ in range(2):
        with pytest.raises(CorrelationReused, match=r"instruction 1 \(deliver\) was already used"):
            next(execute(circuit, [7], CLIENT, correlations, dealt.client_weights, other))


@pytest.mark.parametrize("prepared", [False, True])
def test_an_input_of_another_shape_is_refused(prepared: bool) -> None:
    circuit = [
        Instruction(tp.Input(ROW, RING, "x", 0, -1.0, 1.0)),
        Instruction(tp.Deliver(ROW, RING), (0,)),
        Instruction(tp.Linear((1, 7), RING, "w"), (1,)),
        Instruction(tp.Reveal((1, 7), RING), (2,)),
    ]
    for shape in ((5,), (1, 4), (1, 6), (2, 5), (1, 1, 5), ()):
        dealt = deal_circuit(circuit, {"x": torch.zeros(shape, dtype=torch.int64)}, weights={"w": MATRIX["w"]})
        with pytest.raises(ValueError, match=r"the input 'x' has shape .* is made for \(1, 5\)"):
            next(dealt.client(prepared=prepared))


def test_missing_corrections_are_noticed() -> None:
    dealt = deal_circuit(product_circuit(), NUMBERS, [9])
    dealt.corrections.pop(4)
    with pytest.raises(FrameError, match="a correction has 25 bytes here, got 0"):
        run_pair(dealt.server(), dealt.client())


def test_dealing_depends_on_the_keys_alone() -> None:
    circuit, keys = product_circuit(), (key(), key())
    none = ServerWeights({})
    first, second = dict(deal(circuit, *keys, none)), dict(deal(circuit, *keys, none))
    other = dict(deal(circuit, keys[0], key(), none))
    assert first == second
    assert list(first) == sorted(first) == [4, 7, 8]
    assert all(first[i] != other[i] for i in first)


def test_wrong_corrections_give_wrong_results() -> None:
    """The dealer's bytes matter: the test of the results above can fail."""
    dealt = deal_circuit(product_circuit(), NUMBERS, [9])
    dealt.corrections[4] = memoryview(bytes(len(dealt.corrections[4])))
    _, (result,) = run_pair(dealt.server(), dealt.client())
    expected = reference(product_circuit(), [9], ServerWeights({}), NUMBERS)[0]
    assert not torch.equal(result, expected)


# lifetimes


@dataclass(frozen=True, eq=False)
class Watched(Local):
    """x + 1, of which it tells how many results are alive."""

    alive: list[weakref.ref[Tensor]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def out(self) -> Wire:
        return Wire(SHAPE, RING)

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        out = operands[0] + 1
        self.alive.append(weakref.ref(out))
        self.counts.append(sum(r() is not None for r in self.alive))
        return out


def test_results_are_freed_after_their_last_use() -> None:
    watched = Watched()
    circuit = sources()[:1]
    for i in range(50):
        circuit.append(Instruction(watched, (i,)))
    circuit += [Instruction(watched, (0,)) for _ in range(20)]  # which nobody reads
    weights = ServerWeights({})
    step = execute(circuit, [50], CLIENT, Correlations(CLIENT, key()), weights, {"x": NUMBERS["x"]})
    with pytest.raises(StopIteration) as stop:
        next(step)
    assert len(watched.counts) == 70
    assert max(watched.counts) <= 4
    assert len(stop.value.value) == 1
    reference(circuit, [50], weights, {"x": NUMBERS["x"]})
    assert max(watched.counts[70:]) <= 4


def test_a_result_may_be_an_output_several_times() -> None:
    circuit = [*sources(), Instruction(local.Add(SHAPE, RING), (0, 0))]
    outcome = run_circuit(circuit, NUMBERS, [2, 2, 0])
    assert torch.equal(outcome.value(0), outcome.value(1))
    assert torch.equal(outcome.value(0), 2 * NUMBERS["x"])
    assert torch.equal(outcome.value(2), NUMBERS["x"])


# steps and frames


def counting(rounds: int, tag: int) -> Step[int]:
    """Sends its number each round, returns the sum of what came."""
    total, form = 0, Wire((1,), 64)
    for i in range(rounds):
        (got,) = yield Exchange(((torch.tensor([tag * 100 + i]), form),), (form,))
        total += int(got)
    return total


def test_run_pair_counts_rounds_and_bytes() -> None:
    traffic = PairTraffic()
    assert run_pair(counting(3, 1), counting(3, 4), traffic) == (400 + 401 + 402, 100 + 101 + 102)
    assert traffic.cost == CircuitCost(3, 24, 24)
    assert run_pair(counting(0, 1), counting(0, 1)) == (0, 0)


def test_advance_starts_resumes_and_ends_a_step() -> None:
    step = counting(1, 7)
    exchange = advance(step)
    assert isinstance(exchange, Exchange)
    assert exchange.send[0][0].tolist() == [700]
    assert advance(step, (torch.tensor([5]),)) == Done(5)


def test_run_pair_notices_a_party_that_ends_early() -> None:
    with pytest.raises(RuntimeError, match="one party finished while the other waits"):
        run_pair(counting(1, 1), counting(2, 2))


def both(server: Callable[[], Any], client: Callable[[], Any]) -> tuple[Any, Any]:
    """Two parties in two threads."""
    results: list[Any] = [None, None]

    def call(party: int, function: Callable[[], Any]) -> None:
        try:
            results[party] = function()
        except Exception as error:
            results[party] = error

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate((server, client))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results[0], results[1]


class Line:
    """Two queues between two threads, each with a party at its end."""

    def __init__(self) -> None:
        self.queues: tuple[queue.SimpleQueue[bytes], ...] = (queue.SimpleQueue(), queue.SimpleQueue())

    def run(self, party: int, step: Step[Any], observer: FrameObserver | None = None) -> Any:
        inbox, outbox = self.queues[party], self.queues[1 - party]
        frames = Framed(step, lambda size: inbox.get(timeout=10) if size else b"", observer)
        for payload in frames:
            if payload:
                outbox.put(payload)
        return frames.result


def test_two_threads_compute_what_one_does() -> None:
    for circuit, inputs, weights in (
        (product_circuit(), NUMBERS, {}),
        (linear_circuit(), LINEAR_INPUT, LINEAR_WEIGHTS),
    ):
        dealt, line = deal_circuit(circuit, inputs, range(len(circuit)), weights), Line()
        threaded = both(lambda: line.run(0, dealt.server()), lambda: line.run(1, dealt.client(prepared=True)))  # noqa: B023
        together = run_pair(dealt.server(), dealt.client(prepared=True))
        for left, right in zip(threaded, together, strict=True):
            assert len(left) == len(right) == len(circuit)
            for a, b in zip(left, right, strict=True):
                assert all(torch.equal(p, q) for p, q in zip(flat(a), flat(b), strict=True))


def flat(value: Any) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


class Told(FrameObserver):
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, bytes]] = []

    def packing(self) -> None:
        self.events.append(("packing", b""))

    def sent(self, payload: bytes) -> None:
        self.events.append(("sent", payload))

    def received(self, payload: bytes) -> None:
        self.events.append(("received", payload))

    def unpacked(self) -> None:
        self.events.append(("unpacked", b""))


def test_an_observer_is_told_of_every_frame_once_it_has_passed() -> None:
    told = Told()

    def receive(size: int) -> bytes:
        told.events.append(("receive", bytes(size)))
        return b"1" * size

    for payload in Framed(counting(2, 1), receive, told):
        told.events.append(("send", payload))
    first, second = (torch.tensor([n]).numpy().tobytes() for n in (100, 101))
    assert told.events == [
        event
        for payload in (first, second)
        for event in (
            ("packing", b""),
            ("send", payload),
            ("sent", payload),
            ("receive", bytes(8)),
            ("received", b"1" * 8),
            ("unpacked", b""),
        )
    ]


def test_frames_of_another_size_are_refused() -> None:
    for payload in (bytes(7), bytes(9), b""):
        with pytest.raises(FrameError, match=rf"prescribes a frame of 8 bytes here, got {len(payload)}"):
            list(Framed(counting(1, 1), lambda _: payload))  # noqa: B023
    with pytest.raises(FrameError):
        unpack_frame(bytes(5), Exchange((), (Wire((2,), 20),)))

    def silent() -> Step[None]:  # sends where the other expects nothing
        yield Exchange(((torch.tensor([1]), Wire((1,), 64)),), ())

    def waiting() -> Step[None]:
        yield Exchange()

    run_pair(waiting(), waiting())
    with pytest.raises(FrameError, match="a frame of 0 bytes here, got 8"):
        run_pair(silent(), waiting())
    with pytest.raises(FrameError, match="a frame of 0 bytes here, got 8"):
        run_pair(waiting(), silent())


def test_nothing_is_sent_where_nothing_is_to_send() -> None:
    circuit = [*sources(), Instruction(tp.Reveal(SHAPE, RING), (0,))]
    dealt, line, told = deal_circuit(circuit, NUMBERS), Line(), Told()
    _, (result,) = both(lambda: line.run(0, dealt.server()), lambda: line.run(1, dealt.client(), told))
    assert (integers(result, RING) == integers(NUMBERS["x"], RING)).all()
    assert ("sent", b"") in told.events  # a round in which no frame went to the server
    assert line.queues[0].empty()


def test_frames_are_kept_on_request() -> None:
    outcome = run_circuit(product_circuit(), NUMBERS, [9], views=True)
    frames = outcome.traffic.frames_to_first, outcome.traffic.frames_to_second
    assert [len(f or []) for f in frames] == [3, 3]
    assert sum(map(len, frames[0] or [])) == outcome.cost.to_first
    assert sum(map(len, frames[1] or [])) == outcome.cost.to_second
    assert combine(torch.tensor([1]), torch.tensor([2])).tolist() == [3]


def _resized(shape: Shape, rng: random.Random) -> Shape:
    """A shape as it is, or with a dimension more, less, or of another size."""
    at = rng.randrange(len(shape)) if shape else 0
    return rng.choice([shape, shape, shape[1:], (1, *shape), (*shape[:at], 1, *shape[at + 1 :]), (*shape[:-1], 3)])


def test_shapes_are_those_that_torch_gives() -> None:
    """``check`` infers shapes by itself. What it accepts has the shape that the computation has, on tensors of it."""
    pytest.importorskip("transformers")
    from secure.mpc.program import Program
    from tests import programs

    program, rng, agreed, refused = Program.from_bytes(programs.every_protocol()), random.Random(1), 0, 0
    weights = MetaWeights(program.weight_shapes)
    for instruction in program.circuit:
        p, operands = instruction.protocol, [program.circuit[i].protocol for i in instruction.inputs]
        if not operands or isinstance(p, local.Concat):  # torch also joins what is empty
            continue
        for _ in range(8):
            shapes = [o.out.shape if p.elementwise else _resized(o.out.shape, rng) for o in operands]
            metas = [torch.empty(s, dtype=o.out.dtype, device="meta") for s, o in zip(shapes, operands, strict=True)]
            try:
                found = p.shape_of(shapes, program.weight_shapes)
            except (ValueError, LookupError):
                refused += 1
                continue
            assert tuple(p.clear(tuple(metas), weights).shape) == found, (p, shapes)
            agreed += 1
    assert agreed > 800
    assert refused > 50
