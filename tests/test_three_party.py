"""Three parties: replicated sharing itself, what each holds of the weights, and what becomes of a Program's circuit."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocols import local, matmul, ring
from protocols import two_party as tp
from protocols.circuit import drawn
from protocols.flow import Circuit, Instruction
from protocols.protocol import Opening, Protocol, Shape
from protocols.steps import run_pair
from protocols.three_party import PublicLinear, SharedInput, SharedLinear, Translated, translate
from protocols.three_party.sharing import HOLDERS, PARTIES, PARTY_2
from protocols.three_party.weights import Party2Weights, PublicWeights, SharedWeights, masked, summand
from secure import InvalidProgram, Program
from tests.helpers import integers, key, octets, shared, shared_bits, tensor, words
from tests.replicated import CopiesDiffer, Pair, held, product, reconstruct, share
from tests.test_program import classifier
from tests.three import held_weights, query
from tests.uniformity import leaks

N = 1 << 15
TWO_OR_THREE = [c for size in (2, 3) for c in itertools.combinations(range(PARTIES), size)]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)


def values(seed: int, shape: Shape, *, planes: bool = False) -> Tensor:
    """Every other one an extreme."""
    rng = np.random.default_rng(seed)
    if planes:
        x, ends = octets(rng, shape), torch.tensor([0, 255], dtype=torch.uint8)
    else:
        x, ends = words(rng, shape), torch.tensor([0, 1, -1, -(2**63), 2**63 - 1])
    extreme = ends[torch.from_numpy(rng.integers(len(ends), size=shape))]
    return torch.where(torch.from_numpy(rng.integers(2, size=shape)) == 1, extreme, x)


def split(x: Tensor) -> tuple[Pair, Pair, Pair]:
    return share(x, key().stream(0), key().stream(0))


def chosen(pairs: tuple[Pair, Pair, Pair], parties: tuple[int, ...]) -> dict[int, Pair]:
    return {party: pairs[party] for party in parties}


# sharing


@settings(deadline=None)
@given(shape=SHAPES, seed=SEEDS, planes=st.booleans())
def test_any_two_parties_know_the_value(shape: Shape, seed: int, planes: bool) -> None:
    x = values(seed, shape, planes=planes)
    pairs = split(x)
    for parties in TWO_OR_THREE:
        assert torch.equal(reconstruct(chosen(pairs, parties)), x)
    for party in range(PARTIES):
        with pytest.raises(ValueError, match="two parties are needed"):
            reconstruct({party: pairs[party]})
    for j, (first, second) in enumerate(HOLDERS):
        assert torch.equal(pairs[first].second, pairs[second].first)
        assert second == j


@pytest.mark.parametrize("planes", [False, True])
def test_one_party_knows_nothing(planes: bool) -> None:
    dtype, width = (torch.uint8, 8) if planes else (torch.int64, 64)
    runs = [split(torch.full((N,), v, dtype=dtype)) for v in ((0, 255) if planes else (0, -(2**63)))]
    for party in range(PARTIES):
        assert not leaks(
            [(f"{run}.{i}", x, width) for run, pairs in enumerate(runs) for i, x in enumerate(pairs[party])]
        )
    assert leaks([("x0", runs[0][0].first, width), ("x0 + x1 + x2", reconstruct(chosen(runs[0], (0, 1))), width)])


@settings(deadline=None)
@given(shape=SHAPES.filter(lambda s: 0 not in s), seed=SEEDS, planes=st.booleans(), data=st.data())
def test_a_changed_copy_is_noticed_where_two_holders_are_asked(
    shape: Shape, seed: int, planes: bool, data: st.DataObject
) -> None:
    x = values(seed, shape, planes=planes)
    element = data.draw(st.integers(0, x.numel() - 1))
    bit = data.draw(st.integers(0, 7 if planes else 63))
    flip = torch.tensor(ring.wrap(1 << bit), dtype=x.dtype)
    for party, place in itertools.product(range(PARTIES), range(2)):
        pairs = list(split(x))
        copy = pairs[party][place].clone()
        copy.reshape(-1)[element] ^= flip
        pairs[party] = Pair(copy, pairs[party].second) if place == 0 else Pair(pairs[party].first, copy)
        j = (party + place) % PARTIES
        for parties in TWO_OR_THREE:
            given_pairs = {p: pairs[p] for p in parties}
            if set(HOLDERS[j]) <= set(parties):
                names = f"parties {HOLDERS[j][0]} and {HOLDERS[j][1]} hold different copies of summand {j}"
                with pytest.raises(CopiesDiffer, match=names):
                    reconstruct(given_pairs)
            else:  # nobody can notice: the value is another, or untouched
                assert torch.equal(reconstruct(given_pairs), x) == (party not in parties)


@settings(deadline=None)
@given(shape=SHAPES, seed=SEEDS, matrix=st.booleans(), batch=st.sampled_from([(), (3,), (2, 1)]))
def test_the_parties_products_sum_to_the_product(shape: Shape, seed: int, matrix: bool, batch: Shape) -> None:
    times: Callable[[Tensor, Tensor], Tensor] = torch.matmul if matrix else torch.mul
    if matrix:
        shapes: tuple[Shape, Shape] = (*batch, 3, 7), (*batch[1:], 7, 5)
    else:
        shapes = shape, (*shape[:-1], 1) if shape else ()
    x, y = (values(seed + i, s) for i, s in enumerate(shapes))
    parts = [product(p, q, times) for p, q in zip(split(x), split(y), strict=True)]
    assert torch.equal(parts[0] + parts[1] + parts[2], times(x, y))


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES.filter(lambda s: 0 not in s), seed=SEEDS, bits=st.integers(1, 64), planes=st.booleans())
def test_an_opening_is_a_replicated_value(shape: Shape, seed: int, bits: int, planes: bool) -> None:
    """Parties 0 and 1 as the protocol left them; party 2, which took no part, from the seeds of the two."""
    rng = np.random.default_rng(seed)
    circuit: Circuit
    if planes:
        count = 8 * int(np.prod(shape, dtype=int))
        x, mask = (octets(rng, (2, count // 8)) for _ in range(2))
        circuit = [Instruction(shared_bits("x", (2, count // 8), mask)), Instruction(tp.OpenBits((count,), 2), (0,))]
    else:
        x, mask = words(rng, shape), words(rng, shape)
        circuit = [Instruction(shared("x", shape, bits, mask)), Instruction(tp.Open(shape, bits), (0,))]
    asked = query(circuit, {"x": x})
    (zero,), (one,) = run_pair(asked.party(0), asked.party(1))
    (spec,) = circuit[1].protocol.draws
    (r_0,), (r_1,) = (drawn([spec], k.stream(1)) for k in asked.keys)
    pairs = {0: held(0, zero), 1: held(1, one), 2: held(PARTY_2, Opening(torch.zeros_like(x), r_0), r_1)}
    for parties in TWO_OR_THREE:
        result = reconstruct({p: pairs[p] for p in parties})
        assert torch.equal(result, x) if planes else torch.equal(ring.reduce(result, bits), ring.reduce(x, bits))
    for party, other in ((0, r_1), (1, r_0), (PARTY_2, None)):
        with pytest.raises(ValueError, match="both masks"):
            held(party, zero, other)


# weights


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, bits=st.integers(2, 64), shape=st.sampled_from([(3,), (4, 7), (2, 3, 5)]))
def test_what_the_parties_hold_is_the_weight(seed: int, bits: int, shape: Shape) -> None:
    w, seeds = values(seed, shape), (key(), key())
    common = dict(masked({"w": w, "unread": w}, *seeds, {"w": bits}))
    assert list(common) == ["w"]
    zero, one = (SharedWeights(party, k, common) for party, k in enumerate(seeds))
    w_0, w_2 = (summand(k, "w", shape) for k in seeds)
    pairs = (Pair(*zero.pair("w")), Pair(*one.pair("w")), Pair(w_2, w_0))
    for parties in TWO_OR_THREE:
        assert torch.equal(ring.reduce(reconstruct(chosen(pairs, parties)), bits), ring.reduce(w, bits))
    assert torch.equal(ring.reduce(zero.summand("w") + one.summand("w"), bits), ring.reduce(w, bits))
    two = Party2Weights(*seeds, {"w": shape})
    assert two.summand("w") is None
    assert torch.equal(two.mask("w"), w_0 + w_2)
    assert int(common["w"].min()) >= 0 or bits == 64
    assert not bits < 64 or int(common["w"].max()) < 1 << bits
    for weights in (zero, one):
        with pytest.raises(LookupError, match="nobody multiplies"):
            weights.multiply(w, "w", bits, diagonal=True)


def test_public_weights_are_added_once() -> None:
    w = {"w": values(0, (5,))}
    first, *others = [PublicWeights(party, w).summand("w") for party in range(PARTIES)]
    assert first is not None
    assert torch.equal(first, w["w"])
    assert others == [None, None]


@pytest.mark.parametrize("bits", [64, 40])
def test_what_a_party_stores_says_nothing_of_the_weights(bits: int) -> None:
    """Of two weights alike, alone and together; the other summand of the two would tell."""
    shape = (256, 128)
    for w in (0, -(1 << 20)):
        weights, seeds = {name: torch.full(shape, w) for name in ("a", "b")}, (key(), key())
        common = dict(masked(weights, *seeds, dict.fromkeys(weights, bits)))
        for party in (0, 1):
            stored = [(n, p) for n in weights for p in SharedWeights(party, seeds[party], common).pair(n)]
            assert not leaks([(f"{party}: {n}", x, bits) for n, x in stored])
        assert not leaks([(f"2: {n}", summand(k, n, shape), 64) for n in weights for k in seeds])
        w_0, w_2 = (summand(k, "a", shape) for k in seeds)
        assert leaks([("w_0 + w_1", w_0 + common["a"], bits), ("w_2", -w_2, bits)])


def test_fresh_seeds_hide_that_two_deployments_have_one_model() -> None:
    w = {"w": torch.zeros(N, dtype=torch.int64)}
    stored = [p for _ in range(2) for p in party_zero(held_weights(w, {"w": 64})[0])]
    assert not leaks([(str(i), x, 64) for i, x in enumerate(stored)])


def party_zero(weights: Any) -> tuple[Tensor, Tensor]:
    assert isinstance(weights, SharedWeights)
    return weights.pair("w")


@pytest.mark.parametrize("native", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    ring_bits=st.integers(2, 64),
    stored=st.integers(0, 62),
    batch=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4)]),
    inner=st.sampled_from([1, 2, 31, 150]),
    outer=st.sampled_from([0, 1, 6, 17]),
)
def test_summands_of_a_product(
    native: bool, seed: int, ring_bits: int, stored: int, batch: Shape, inner: int, outer: int
) -> None:
    """Parties 0 and 1, and party 2's term, sum to x W; the diagonal where ``outer`` is 0. In two rings."""
    diagonal, bits = outer == 0, min(64, ring_bits + stored)
    w = values(seed, (inner,) if diagonal else (inner, outer))
    zero, one, two = held_weights({"w": w}, {"w": bits})
    assert isinstance(zero, SharedWeights)
    assert isinstance(one, SharedWeights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "native", lambda: native)
        for query_number, taken in enumerate((ring_bits, bits)):
            x, r_0, r_1 = (values(seed + 3 * query_number + i, (*batch, inner)) for i in range(1, 4))
            z = ring.reduce(x + r_0 + r_1, bits)
            total = (
                zero.opened_product(z, r_0, "w", taken, diagonal=diagonal)
                + one.opened_product(z, r_1, "w", taken, diagonal=diagonal)
                - two.multiply(r_0 + r_1, "w", taken, diagonal=diagonal)
            )
            a, b = (t.numpy().astype(object) for t in (x, w))
            expected = (a * b if diagonal else a @ b) % (1 << taken)
            assert tuple(total.shape) == expected.shape
            assert (integers(total, taken) == expected).all()


# translation


def kinds(made: Translated) -> list[str]:
    return [i.protocol.kind for i in made.circuit]


def layer(*rings: tuple[type[Protocol], int]) -> list[Instruction]:
    """An input, openings and deliveries of it, a layer for each delivery, the sum of those and its Reveal."""
    circuit = [Instruction(tp.Input((2, 3), 64, "x", 0, -1.0, 1.0))]
    circuit += [Instruction(kind((2, 3), bits), (0,)) for kind, bits in rings]  # type: ignore[call-arg]
    last = 0
    for index, (kind, bits) in enumerate(rings, 1):
        reader: Protocol = tp.Linear((2, 3), bits, "w", True)
        if kind is tp.Open:
            reader = tp.Compare((2, 3), bits, 0, (0,))
        circuit.append(Instruction(reader, (index,)))
        if kind is tp.Deliver:
            circuit.append(Instruction(local.Add((2, 3), bits), (last, len(circuit) - 1)))
            last = len(circuit) - 1
    circuit.append(Instruction(tp.Reveal((2, 3), 20), (last,)))
    return circuit


@pytest.mark.parametrize("order", list(itertools.permutations([(tp.Open, 20), (tp.Deliver, 40), (tp.Deliver, 30)])))
def test_what_is_opened_and_delivered_is_opened_once(order: tuple[tuple[type[Protocol], int], ...]) -> None:
    circuit = layer(*order)
    made = translate(circuit, [len(circuit) - 1], trusted_clients=True)
    assert kinds(made)[:2] == ["shared_input", "open"]
    assert made.circuit[0].protocol == SharedInput((2, 3), 64, "x")
    assert made.circuit[1] == Instruction(tp.Open((2, 3), 40), (0,))
    assert sum(kind == "open" for kind in kinds(made)) == 1
    readers = [i for i in made.circuit if isinstance(i.protocol, (SharedLinear, tp.Compare))]
    assert [i.inputs for i in readers] == [(1,)] * 3
    assert made.weight_rings == {"w": 40}
    assert made.origin[:2] == (0, 1)
    assert made.origin[made.outputs[0]] == len(circuit) - (3 if order[-1][0] is tp.Open else 2)

    public = translate(circuit, [len(circuit) - 1], public=True, trusted_clients=True)
    assert [i.protocol for i in public.circuit if isinstance(i.protocol, tp.Open)] == [tp.Open((2, 3), 20)]
    assert [i.inputs for i in public.circuit if isinstance(i.protocol, PublicLinear)] == [(0,), (0,)]
    assert public.weight_rings == {"w": 40}


def test_values_apart_are_opened_apart() -> None:
    """Also where they are of the same form; each in its own ring."""
    circuit = [
        *(Instruction(tp.Input((3,), 64, name, 0, -1.0, 1.0)) for name in "xy"),
        Instruction(tp.Deliver((3,), 40), (0,)),
        Instruction(tp.Open((3,), 30), (1,)),
        Instruction(tp.Open((3,), 20), (0,)),
        Instruction(tp.Product((3,), 20), (3, 4)),
        Instruction(tp.Reveal((3,), 20), (5,)),
    ]
    made = translate(circuit, [6], trusted_clients=True)
    expected = [SharedInput((3,), 64, "x"), SharedInput((3,), 64, "y"), tp.Open((3,), 40), tp.Open((3,), 30)]
    assert [i.protocol for i in made.circuit] == [*expected, tp.Product((3,), 20)]
    assert made.circuit[-1].inputs == (3, 2)
    assert made.origin == (0, 1, 2, 3, 5)
    assert made.outputs == (4,)
    assert {name: index for name, (index, _) in made.inputs.items()} == {"x": 0, "y": 1}


@pytest.mark.parametrize("public", [False, True])
def test_a_program_is_left_alone_and_its_instructions_are_found_again(public: bool) -> None:
    program = classifier()[1].program
    circuit = program.circuit
    made = translate(circuit, program.revealed, public=public, trusted_clients=True)
    again = dataclasses.replace(program)  # encodes anew
    assert (again.encoded, again.digest) == (program.encoded, program.digest)
    assert Program.from_bytes(again.encoded).digest == program.digest

    def value(index: int) -> int:
        """What an instruction stands for: openings and deliveries for the value itself."""
        p = circuit[index].protocol
        return value(circuit[index].inputs[0]) if isinstance(p, (tp.Open, tp.Deliver)) else index

    renamed: dict[type[Any], type[Any]] = {tp.Input: SharedInput, tp.Linear: PublicLinear if public else SharedLinear}
    assert list(made.origin) == sorted(set(made.origin))
    for index, instruction in enumerate(made.circuit):
        origin, p = circuit[made.origin[index]], instruction.protocol
        reads = [value(made.origin[i]) for i in instruction.inputs]
        assert reads == [value(i) for i in origin.inputs]
        assert all(i < index for i in instruction.inputs)
        if isinstance(p, tp.Open):
            same = [
                o.protocol
                for o in circuit
                if isinstance(o.protocol, (tp.Open, tp.Deliver)) and o.inputs == origin.inputs
            ]
            rings = [o.ring for o in same if not public or isinstance(o, tp.Open)]
            assert (p.ring, p.shape) == (max(rings), same[0].shape)
        elif type(origin.protocol) in renamed:
            assert type(p) is renamed[type(origin.protocol)]
            shown = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}  # type: ignore[arg-type]
            assert shown == {name: getattr(origin.protocol, name) for name in shown}
        else:
            assert p is origin.protocol
    kept = {i for i, o in enumerate(circuit) if not isinstance(o.protocol, (tp.Open, tp.Deliver, tp.Reveal))}
    opened = {o.inputs for o in circuit if isinstance(o.protocol, tp.Open if public else (tp.Open, tp.Deliver))}
    assert kept <= set(made.origin)
    assert len(made.circuit) == len(kept) + len(opened)
    assert made.origin[made.outputs[0]] == circuit[program.revealed[0]].inputs[0]


def test_only_the_output_is_revealed() -> None:
    circuit = layer((tp.Deliver, 40))
    with pytest.raises(ValueError, match="reveals its outputs alone"):
        translate([*circuit, Instruction(tp.Reveal((2, 3), 20), (0,))], [len(circuit) - 1])
    with pytest.raises(ValueError, match="not a Reveal"):
        translate(circuit, [len(circuit) - 2])


@pytest.mark.parametrize(
    ("kind", "like"), [("shared_input", "input"), ("shared_linear", "linear"), ("public_linear", "linear")]
)
def test_no_program_names_what_one_deployment_makes(kind: str, like: str) -> None:
    document = json.loads(classifier()[1].program.encoded)
    fields = {f.name for f in dataclasses.fields(Protocol.registry[kind])}  # type: ignore[arg-type]
    index = next(i for i, (k, *_) in enumerate(document["instructions"]) if k == like)
    _, values, *rest = document["instructions"][index]
    document["instructions"][index] = [kind, {k: v for k, v in values.items() if k in fields}, *rest]
    with pytest.raises(InvalidProgram, match=f"unknown protocol '{kind}'"):
        Program.from_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def test_an_input_of_another_shape_is_refused() -> None:
    asked = query([Instruction(tp.Input((4,), 64, "x", 0, -1.0, 1.0))], {"x": tensor(np.arange(4))})
    for party in (0, 1):
        asked.shares[party]["x"] = asked.shares[party]["x"][:3]
        with pytest.raises(ValueError, match=r"has shape \(3,\), the Program says \(4,\)"):
            next(asked.party(party))
