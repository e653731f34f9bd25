"""CKKS without a single ciphertext: circuits, linear maps, polynomials, levels, and parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev

from protocols.ckks import diagonals, polynomial
from protocols.ckks.circuit import TAKES_LEVEL, Circuit, Vector, clear
from protocols.ckks.parameters import MAXIMUM_BITS, Parameters
from protocols.ckks.schedule import Schedule, depth_by_path, schedule
from secure.errors import DoesNotFit

SLOTS = 64
SMALL = 8  # slots of the random circuits


def numbers(seed: int, *shape: int) -> Vector:
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape)


def product_depth(circuit: Circuit) -> int:
    """Products on the longest way to an output."""
    depth = [0] * len(circuit.nodes)
    for i, node in enumerate(circuit.nodes):
        depth[i] = max((depth[x] for x in node.inputs), default=0) + (node.op in TAKES_LEVEL)
    return max(depth[x] for x in circuit.outputs)


# the circuit itself


def test_equal_nodes_are_one() -> None:
    c = Circuit(SLOTS)
    x, y = c.input("x"), c.input("y")
    vector = numbers(0, SLOTS)
    assert c.rotate(x, 3) == c.rotate(x, 3 + SLOTS) == c.rotate(x, 3 - SLOTS) != c.rotate(x, 4)
    assert c.rotate(x, 0) == c.rotate(x, SLOTS) == x
    assert c.multiply(x, y) == c.multiply(y, x)
    assert c.dot([(x, vector)]) == c.dot([(x, vector.copy())]) != c.dot([(x, -vector)])
    assert c.dot([(x, np.full(SLOTS, 0.5))]) == c.dot([(x, 0.5)])
    assert c.shift(x, 0.0) == c.shift(x, np.zeros(SLOTS)) == c.add(x) == x
    assert len({x, c.add(x, signs=(-1,)), c.add(x, y), c.add(x, y, signs=(1, -1))}) == 4
    assert c.steps == [3, 4]
    assert c.counts() == {"rotate": 2, "multiply": 1, "plain": 3, "add": 3, "refresh": 0}
    with pytest.raises(ValueError, match=r"a plain vector has \(3,\) numbers, a ciphertext 64 slots"):
        c.dot([(x, np.arange(3.0))])


# linear maps

OFFSETS = st.sets(st.integers(0, SLOTS - 1), min_size=1, max_size=24)


@settings(deadline=None)
@given(OFFSETS, st.integers(1, 3))
def test_a_split_represents_every_offset(offsets: set[int], operands: int) -> None:
    split = diagonals.split(offsets, SLOTS, operands)
    assert set(split.parts) == offsets
    for offset, (giant, baby) in split.parts.items():
        assert (giant + baby) % SLOTS == offset
    assert split.rotations(operands) <= operands * len(offsets - {0})  # no worse than none
    assert diagonals.split(set(range(SLOTS)), SLOTS).rotations(1) <= 15


@settings(deadline=None)
@given(st.sets(st.tuples(st.integers(0, 2), st.integers(0, SLOTS - 1)), min_size=1, max_size=20), st.integers(0, 99))
def test_diagonals_are_the_linear_map(places: set[tuple[int, int]], seed: int) -> None:
    c, names = Circuit(SLOTS), "xyz"
    operands = [c.input(name) for name in names]
    wanted = dict(zip(sorted(places), numbers(seed, len(places), SLOTS), strict=True))
    c.outputs = [diagonals.apply(c, operands, wanted)]
    inputs = dict(zip(names, numbers(seed + 1, 3, SLOTS), strict=True))
    dense = np.zeros((3, SLOTS, SLOTS))
    for (operand, offset), vector in wanted.items():
        dense[operand, np.arange(SLOTS), (np.arange(SLOTS) + offset) % SLOTS] = vector
    expected = sum(dense[k] @ inputs[name] for k, name in enumerate(names))
    assert clear(c, inputs)[0] == pytest.approx(expected, abs=1e-12)
    assert schedule(c).depth == 1
    assert c.counts()["plain"] == len(wanted)
    read = len({i for i, _ in places})
    split = diagonals.split({r for _, r in places}, SLOTS, read)
    assert c.counts()["rotate"] <= split.rotations(read) + 1  # one more where giants lie on both sides of zero


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 3), st.integers(0, 99))
def test_sums_and_spreads_along_an_axis(size_bits: int, stride_bits: int, seed: int) -> None:
    size, stride = 1 << size_bits, 1 << stride_bits
    c, x = Circuit(SLOTS), numbers(seed, SLOTS)
    node = c.input("x")
    c.outputs = [diagonals.sum_axis(c, node, stride, size), diagonals.spread_axis(c, node, stride, size)]
    summed, spread = clear(c, {"x": x})
    assert summed == pytest.approx(sum(np.roll(x, -k * stride) for k in range(size)), abs=1e-12)
    assert spread == pytest.approx(sum(np.roll(x, k * stride) for k in range(size)), abs=1e-12)
    assert schedule(c).depth == 0
    if size * stride <= SLOTS:  # the first of each line of places alone holds something
        first = np.where(np.arange(SLOTS) // stride % size == 0, x, 0.0)
        expected = x[np.arange(SLOTS) - np.arange(SLOTS) // stride % size * stride]
        assert clear(c, {"x": first})[1] == pytest.approx(expected, abs=1e-12)


def test_linear_maps_that_are_none() -> None:
    with pytest.raises(ValueError, match="without a single diagonal"):
        diagonals.apply(Circuit(SLOTS), [0], {})
    for size in (0, 3, 12):
        with pytest.raises(ValueError, match=f"not {size}"):
            diagonals.sum_axis(Circuit(SLOTS), 0, 1, size)


# polynomials


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=21), st.sampled_from([1.0, 0.5]), st.integers(0, 99))
def test_a_polynomial_is_chebyshevs_sum(coefficients: list[float], scale: float, seed: int) -> None:
    c, x = Circuit(SLOTS), numbers(seed, SLOTS) / scale
    if not any(coefficients[1:]):
        with pytest.raises(ValueError, match="a constant polynomial"):
            polynomial.evaluate(c, c.input("x"), coefficients, scale)
        return
    c.outputs = [polynomial.evaluate(c, c.input("x"), coefficients, scale)]
    assert clear(c, {"x": x})[0] == pytest.approx(chebyshev.chebval(scale * x, coefficients), abs=1e-9)
    assert schedule(c).depth <= max(j for j, v in enumerate(coefficients) if v).bit_length() + (scale < 1)


@pytest.mark.parametrize("degree", range(1, 21))
def test_a_polynomial_takes_the_logarithm_of_its_degree(degree: int) -> None:
    coefficients = list(numbers(degree, degree + 1))
    for scale, more in ((1.0, 0), (0.5, 1)):
        c = Circuit(SLOTS)
        c.outputs = [polynomial.evaluate(c, c.input("x"), coefficients, scale)]
        assert schedule(c).depth == degree.bit_length() + more == polynomial.depth(degree) + more


def test_a_power_of_two_takes_squarings_alone() -> None:
    for bits in range(5):
        c, x = Circuit(SLOTS), numbers(bits, SLOTS)
        c.outputs = [polynomial.power(c, c.input("x"), 1 << bits)]
        assert clear(c, {"x": x})[0] == pytest.approx(x ** (1 << bits), abs=1e-12)
        assert schedule(c).depth == bits == c.counts()["multiply"]


# levels


@st.composite
def circuits(draw: st.DrawFn) -> Circuit:
    """Any operations on what there is. Outputs: of all that nobody read, and of one value more."""
    c = Circuit(SMALL)
    values = [c.input("x"), c.input("y")]
    for number in range(draw(st.integers(1, 14))):
        c.path = f"part{number // 4}"
        op = draw(st.sampled_from(["rotate", "add", "shift", "multiply", "multiply", "dot"]))
        x, y = (draw(st.sampled_from(values)) for _ in range(2))
        factor = draw(st.sampled_from([-0.5, 0.25]))
        vector = factor + np.arange(SMALL) / 16
        if op == "rotate":
            node = c.rotate(x, draw(st.integers(0, SMALL - 1)))
        elif op == "add":
            node = c.add(x, y, signs=draw(st.sampled_from([(1, 1), (1, -1), (-1, 1)])))
        elif op == "shift":
            node = c.shift(x, vector if draw(st.booleans()) else factor)
        elif op == "multiply":
            node = c.multiply(x, y)
        else:
            c.mark()
            node = c.dot([(x, factor), (y, vector)])
        values.append(node)
    read = {x for node in c.nodes for x in node.inputs}
    left = [(x, 2.0) for x in dict.fromkeys(values) if x not in read] or [(values[-1], 2.0)]
    c.outputs = [c.dot(left), c.dot([(draw(st.sampled_from(values)), 3.0)])]
    return c


def check_levels(s: Schedule) -> None:
    begun, eras = 0, list[int]()  # how many refreshes came before a node: what a drop for a refresh does precedes it
    for i, node in enumerate(s.circuit.nodes):
        begun = max(begun, s.stages[i] * (node.op == "refresh"))
        eras.append(begun)
        assert s.levels[i] >= 0
        for x in node.inputs:
            assert x < i
            above = s.levels[i] + (node.op in TAKES_LEVEL)
            if node.op == "refresh":
                assert s.levels[x] == s.reserve
                assert eras[x] == s.stages[i] - 1
                assert x < s.refreshes(s.stages[i])[0]  # all of a stage leave together
            elif node.op == "dot":
                assert s.levels[x] >= above
            else:
                assert s.levels[x] == above
            if node.op != "refresh" and s.circuit.nodes[x].op != "input" and eras[x] != eras[i]:
                (source,) = s.circuit.nodes[x].inputs  # an input dropped earlier may still be read
                assert s.circuit.nodes[source].op == "input"
    assert all(s.levels[x] == 0 for x in s.circuit.outputs)
    assert set(s.inputs()) == {n.name for n in s.circuit.nodes if n.op == "input"}


def same(a: Circuit, b: Circuit) -> bool:
    inputs = dict(zip("xy", numbers(1, 2, SMALL), strict=True))
    return all(np.array_equal(v, w) for v, w in zip(clear(a, inputs), clear(b, inputs), strict=True))


@settings(deadline=None)
@given(circuits())
def test_levels_are_the_fewest(c: Circuit) -> None:
    s = schedule(c)
    check_levels(s)
    assert s.depth == product_depth(c) == sum(n for _, n in depth_by_path(c))
    assert (s.rounds, s.reserve) == (0, 0)
    assert same(c, s.circuit)


@settings(max_examples=200, deadline=None)
@given(circuits(), st.integers(1, 4), st.integers(0, 2))
def test_refreshes_keep_every_stage_within_its_levels(c: Circuit, levels: int, reserve: int) -> None:
    try:
        s = schedule(c, levels + reserve, reserve)
    except DoesNotFit:  # products stand alone between two marks, but for the last two of the outputs
        assert levels < 2
        return
    check_levels(s)
    assert s.depth <= levels + reserve
    assert s.rounds >= -(-product_depth(c) // (levels + reserve)) - 1
    assert [s.refreshes(k) != [] for k in range(1, s.rounds + 1)] == [True] * s.rounds
    assert same(c, s.circuit)


@pytest.mark.parametrize("read", [True, False])
def test_what_nobody_reads_needs_no_refresh(read: bool) -> None:
    """Cuts are chosen for what outputs need: else there are rounds of nothing, and refreshes of refreshes."""
    c = Circuit(SMALL)
    x = c.input("x")
    a = c.dot([(x, 0.5)]) if read else x
    b = a
    for _ in range(3):
        b = c.multiply(b, b)
    c.mark()
    c.outputs = [c.dot([(a, 2.0)])]
    s = schedule(c, 1)
    check_levels(s)
    assert [len(s.refreshes(k)) for k in range(1, s.rounds + 1)] == [1] * read
    assert same(c, s.circuit)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(0, SMALL - 1), min_size=2, max_size=12), min_size=2, max_size=4), st.booleans())
def test_maps_that_read_the_same_rotations_come_together(maps: list[set[int]], kept: bool) -> None:
    """Each map's result is raised to a power, then multiplied by that of the next."""
    c = Circuit(SMALL)
    x, weights = c.input("x"), iter(numbers(3, 64, SMALL))
    total = c.dot([(x, 0.5)])
    for offsets in maps:
        y = diagonals.apply(c, [x], {(0, r): next(weights) for r in offsets})
        total = c.multiply(total, c.multiply(y, y))
        c.mark()
    c.outputs = [total]
    if kept:
        c.keep(total, "rows", np.zeros(SMALL))
    made, inputs = c.gathered(), {"x": numbers(4, SMALL)}
    assert all(max(node.inputs, default=-1) < i for i, node in enumerate(made.nodes))
    assert sorted(made.paths) == sorted(c.paths)
    assert len(made.nodes) == len(c.nodes)
    assert made.keeps == ({"rows": (made.outputs[0], c.keeps["rows"][1])} if kept else {})
    assert np.allclose(clear(made, inputs), clear(c, inputs))
    check_levels(schedule(made, 5))
    multiplied = [i for i, node in enumerate(made.nodes) if node.op == "multiply"]
    for i, node in enumerate(made.nodes):
        if node.op == "dot" and i > multiplied[0]:  # it shares no rotation with what comes before
            rotated = {x for x in node.inputs if made.nodes[x].op == "rotate"}
            assert not any(rotated & set(other.inputs) for other in made.nodes[: multiplied[0]] if other.op == "dot")


def test_what_is_gathered_is_refreshed_without_its_rotations() -> None:
    """A gate and what it multiplies: a refresh of both maps' results, not of all rotations that they read."""
    c = Circuit(SLOTS)
    x, weights = c.input("x"), iter(numbers(5, 64, SLOTS))
    x = c.multiply(x, x)
    gate = diagonals.apply(c, [x], {(0, r): next(weights) for r in range(12)})
    y = gate
    for _ in range(3):
        y = c.multiply(y, y)
    up = diagonals.apply(c, [x], {(0, r): next(weights) for r in range(12)})
    c.outputs = [c.multiply(y, up)]
    rounds, most, rotated = [], [], []
    for each in (c, c.gathered()):
        s = schedule(each, 4)
        rounds.append(s.rounds)
        most.append(max(len(s.refreshes(k)) for k in range(1, s.rounds + 1)))
        rotated.append(sum(s.levels[i] for i, node in enumerate(s.circuit.nodes) if node.op == "rotate"))
    assert rounds == [1, 1]
    assert most == [4, 2]
    assert rotated[1] < rotated[0]


def test_what_does_not_fit_is_said_by_module() -> None:
    c = Circuit(SMALL)
    x = c.input("x")
    for path, count in (("embed", 1), ("blocks.0.up", 3), ("", 1)):
        c.path = path
        c.mark()
        for k in range(count):
            x = c.dot([(x, 1.5 + k)])
    c.outputs = [x]
    assert depth_by_path(c) == [("embed", 1), ("blocks.0.up", 3), ("", 1)]
    with pytest.raises(DoesNotFit, match=r"embed 1, blocks\.0\.up 3, model 1\nhint: "):
        schedule(c, 2)
    with pytest.raises(DoesNotFit, match=r"3 levels, 1 of them kept for masks, are too few"):
        schedule(c, 3, 1)
    for levels, reserve, rounds in ((5, 0, 0), (4, 0, 1), (4, 2, 1), (3, 0, 2)):  # the last stage keeps nothing
        s = schedule(c, levels, reserve)
        assert s.rounds == rounds
        check_levels(s)


# parameters


@settings(deadline=None)
@given(st.sampled_from([1024, 4096, 8192, 10000, 32768]), st.integers(-1, 70), st.integers(15, 64), st.integers(15, 64))
def test_parameters_keep_to_the_table(degree: int, levels: int, scale_bits: int, base_bits: int) -> None:
    sound = degree in MAXIMUM_BITS and 0 <= levels <= 64 and 22 <= scale_bits < base_bits <= 60
    if sound and 2 * base_bits + levels * scale_bits < MAXIMUM_BITS[degree]:
        try:
            p = Parameters(degree, levels, scale_bits, base_bits)
        except DoesNotFit:
            assert scale_bits < 30  # such primes are rare
            return
        assert math.log2(math.prod(p.primes)) < MAXIMUM_BITS[degree]
        assert (sum(p.prime_bits), len(p.prime_bits)) == (p.total_bits, levels + 2)
    else:
        with pytest.raises(DoesNotFit, match="\nhint: "):
            Parameters(degree, levels, scale_bits, base_bits)
    with pytest.raises(DoesNotFit, match="take a modulus of 214 bits; at 128-bit security N = 8192 has 214"):
        Parameters(8192, 4, 35, 37)


@pytest.mark.parametrize(("degree", "bits"), [(8192, 214), (16384, 430), (32768, 868)])
def test_all_primes_together_keep_to_the_guidelines_of_2024(degree: int, bits: int) -> None:
    """Bossuat et al., Security Guidelines for Implementing Homomorphic Encryption: ternary secrets, 128 bits."""
    for scale, base in ((30, 37), (41, 60), (30, 47)):
        p = Parameters(degree, (bits - 1 - 2 * base) // scale, scale, base)
        assert bits - scale - 1 < math.log2(math.prod(p.primes)) < bits
    if degree == 32768:  # primes that are 1 mod 65536 near 2^22 are so rare that they get larger by 11 bits in all
        with pytest.raises(DoesNotFit, match=r"36 levels of 22 bits take a modulus of 878.5 bits; .* has 868"):
            Parameters(degree, 36, 22, 29)


@pytest.mark.parametrize(
    ("degree", "levels", "scale", "base"), [(8192, 4, 30, 38), (4096, 1, 22, 40), (16384, 7, 40, 55)]
)
def test_scales_follow_the_primes(degree: int, levels: int, scale: int, base: int) -> None:
    p = Parameters(degree, levels, scale, base)
    assert len(p.scales) == levels + 1 == len(p.primes) - 1
    assert p.scales[levels] == 2.0**scale
    for level in range(levels, 0, -1):
        assert p.scales[level - 1] == p.scales[level] ** 2 / p.primes[level]
    assert all(abs(np.log2(q) - bits) < 0.2 for q, bits in zip(p.primes, p.prime_bits, strict=True))
    assert all(abs(np.log2(s) - scale) < 0.1 for s in p.scales)  # what primes miss does not add up
    assert len(set(p.primes)) == len(p.primes)
    assert all(q % (2 * degree) == 1 for q in p.primes)
    assert all(abs(s / 2.0**scale - 1) < 0.05 for s in p.scales)
