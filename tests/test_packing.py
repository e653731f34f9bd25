"""From a traced model to slots: contents, linear maps, chains of polynomials, and the Program under CKKS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import sparse

from approximations.powers import power, power_error
from secure.ckks import layout as packing
from secure.ckks.layout import EMPTY, Content, Cube, diagonals
from secure.ckks.linear_maps import Affine
from secure.ckks.polynomials import Range, chains, needed, pure_power
from secure.ckks.rules import RULES, Chain, linear
from secure.errors import DoesNotPack
from secure.lowering.primitives import PRIMITIVES
from secure.lowering.trace import Symbol, Trace, WeightRef, concatenate, evaluate

# contents


@settings(deadline=None)
@given(st.integers(6, 12), st.integers(1, 9), st.integers(0, 4), st.integers(1, 5), st.integers(0, 4))
def test_a_cube_is_the_fewest_ciphertexts(bits: int, features: int, keys: int, heads: int, tokens: int) -> None:
    slots, keys, tokens = 1 << bits, 1 << keys, 1 << tokens
    smallest = packing.power_of_two(features) * tokens
    if smallest > slots:
        with pytest.raises(DoesNotPack, match=rf"{tokens} tokens of {features} features a head exceed {slots} slots"):
            Cube.fitting(slots, features, keys, heads, tokens)
        return
    cube = Cube.fitting(slots, features, keys, heads, tokens)
    assert cube.d * cube.u * cube.h * cube.t <= slots
    assert cube.d >= features > cube.d / 2 or cube.d == 1
    assert (cube.t, cube.key_groups * cube.u) == (tokens, keys)
    assert cube.head_groups * cube.h >= heads
    fewest = -(-heads * keys * smallest // slots)
    assert cube.head_groups * cube.key_groups >= fewest
    if packing.power_of_two(heads) == heads:
        assert cube.head_groups * cube.key_groups == fewest


def test_a_cube_of_odd_sizes_is_refused() -> None:
    for keys, tokens, what in ((3, 4, "3 keys"), (4, 6, "6 tokens")):
        with pytest.raises(DoesNotPack, match=rf"{what} in an attention\nhint: pad the input to \d tokens"):
            Cube.fitting(4096, 8, keys, 2, tokens)
    with pytest.raises(DoesNotPack, match="3 rows of 5 features among 4 tokens"):
        Cube.fitting(4096, 8, 4, 2, 4).dense(3, 5)


def check_content(content: Content, size: int, *, once: bool = False) -> None:
    elements, counts = np.unique(content[content != EMPTY], return_counts=True)
    assert elements.tolist() == list(range(size))
    assert not once or (counts == 1).all()
    assert (content >= EMPTY).all()


CUBES = st.builds(
    Cube.fitting,
    st.sampled_from([128, 1024]),
    st.integers(1, 8),
    st.sampled_from([4, 8]),
    st.integers(1, 3),
    st.just(4),
)


@settings(deadline=None)
@given(CUBES, st.integers(1, 40))
def test_every_element_stands_somewhere(cube: Cube, features: int) -> None:
    sizes = {"t": cube.t, "u": cube.keys, "d": max(1, cube.d - 1)}
    axes = cube.axes
    for index in ("tu", "td", "ud", "du"):
        shape = (cube.heads, *(sizes[k] for k in index))
        content = cube.attention(index, shape)
        assert content.shape == (cube.head_groups * cube.key_groups, cube.slots)
        check_content(content, int(np.prod(shape)))
        (third,) = set("tud") - set(index)
        used = content[content != EMPTY]
        assert len(used) >= getattr(cube, third) * np.prod(shape)  # it is repeated along the axis it does not have
        row = cube.attention(index, shape)[0]
        for slot in np.flatnonzero(row != EMPTY)[:: max(1, cube.slots // 64)]:
            at = [int(axes[k][slot]) for k in ("h", *index)]
            assert row[slot] == np.ravel_multi_index(at, shape)
    if cube.keys == cube.t:
        period = cube.d * cube.u * cube.h * cube.t
        for index in ("td", "ud", "du"):
            shape = (cube.heads, *(sizes[k] for k in index))
            summed, once = cube.summed(index, shape), cube.once(index, shape)
            assert summed.shape == (cube.head_groups, cube.slots)
            assert len(once) <= cube.head_groups
            for content in (summed, once):
                check_content(content[:, :period], int(np.prod(shape)), once=True)
    for rows in (1, cube.t):
        check_content(cube.dense(rows, features), rows * features, once=True)


@st.composite
def placed(draw: st.DrawFn, size: int, slots: int, parts: int) -> Content:
    """Every element once at least, many of them more often, empty places between."""
    content = draw(st.lists(st.integers(EMPTY, size - 1), min_size=slots * parts, max_size=slots * parts))
    places = draw(st.permutations(range(slots * parts)))
    for element in range(size):
        content[places[element]] = element
    return np.array(content).reshape(parts, slots)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 2), st.integers(0, 99))
def test_diagonals_are_the_matrix(data: st.DataObject, size: int, parts: int, seed: int) -> None:
    slots, rows = 16, 5
    source = data.draw(placed(size, slots, parts))
    (target,) = data.draw(placed(rows, slots, 1))
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(rows, size)) * (generator.random((rows, size)) < 0.6)
    assume(matrix.any())
    found = diagonals(sparse.csr_array(matrix), target, source, 10_000)
    assert found is not None
    x = generator.normal(size=size)
    held = np.where(source == EMPTY, 1e3, x[np.maximum(source, 0)])  # what stands in empty places is not read
    out = sum(vector * np.roll(held[part], -offset) for (part, offset), vector in found.items())
    assert out == pytest.approx(np.where(target == EMPTY, 0.0, (matrix @ x)[np.maximum(target, 0)]), abs=1e-9)
    assert diagonals(sparse.csr_array(matrix), target, source, len(found)) is not None
    assert diagonals(sparse.csr_array(matrix), target, source, len(found) - 1) is None
    missing = np.where(source == int(np.flatnonzero(matrix.any(0))[0]), EMPTY, source)
    assert diagonals(sparse.csr_array(matrix), target, missing, 10_000) is None


# linear values and chains

WEIGHTS = {
    "w": torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "b": torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
}
W, B = WeightRef("w", (4, 4)), WeightRef("b", (4,))
STEPS: dict[str, Callable[[Symbol], Symbol]] = {
    "linear": lambda x: x.linear(W),
    "mul_weight": lambda x: x * B,
    "add_weight": lambda x: x + B,
    "offset": lambda x: x + 0.5,
    "scale": lambda x: -x * 0.75,
    "sum": lambda x: x - x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(0, keepdim=True).expand(x.shape),
    "permute": lambda x: x.permute((1, 0, 2)).permute((1, 0, 2)) + x.permute((0, 1, 2)),
    "transpose": lambda x: x.reshape((x.shape[0] * x.shape[1], 4)).permute((1, 0)).reshape(x.shape),
    "slice": lambda x: concatenate([x.slice(2, 2, 4), x.slice(2, 0, 4, 2)], 2),
    "cat": lambda x: concatenate([x, x * 2.0], 1).slice(1, 1, 1 + x.shape[1]),
    "bounded": lambda x: x.bounded(-1.0, 1.0),
}


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=6), st.booleans())
def test_linear_values_are_matrices(names: list[str], two: bool) -> None:
    trace = Trace()
    x, y = trace.input("x", (2, 3, 4)), trace.input("y", (3, 1))
    for name in names:
        x = STEPS[name](x)
    out = concatenate([x - y, y.expand((2, 3, 4)) + x], 0) if two else x
    values, atoms, inputs, generator = dict[int, Affine](), {}, {}, np.random.default_rng(len(names))
    for i, p in enumerate(trace.primitives):
        if p.op == "input":
            values[i] = Affine.atom(i, p.shape)
            atoms[i] = generator.normal(size=int(np.prod(p.shape)))
            inputs[p.attrs["name"]] = torch.from_numpy(atoms[i]).reshape(p.shape)
        else:
            weight = WEIGHTS[p.attrs["weight"]].numpy() if "weight" in p.attrs else None
            values[i] = linear(p, [values[k] for k in p.inputs], weight)
        assert values[i].shape == p.shape
    (expected,) = evaluate(trace, inputs, WEIGHTS, outputs=[out.id])
    assert values[out.id].of(atoms) == pytest.approx(expected.numpy().reshape(-1), abs=1e-9)
    assert (values[out.id].only is not None) == (not two)


@pytest.mark.parametrize(("steps", "degree"), [(0, 3), (1, 15)])
def test_a_reciprocal_is_one_chain(steps: int, degree: int) -> None:
    trace = Trace()
    x = trace.input("x", (2, 3))
    out = power(x * 1.0, -1.0, 0.5, 4.0, degree=3, steps=steps)
    found = chains(trace)
    chain = found[out.id]
    assert (chain.root, chain.degree) == (x.id, degree)
    points = np.linspace(0.5, 4.0, 99)
    assert np.abs(chain.function(points) * points - 1).max() == pytest.approx(
        power_error(-1.0, 3, 0.5, 4.0, steps), rel=0.05
    )
    wanted = needed(trace, found)
    assert [i for i, used in enumerate(wanted) if used] == [x.id, out.id]


def test_a_chain_too_long_begins_anew() -> None:
    trace = Trace()
    x = y = trace.input("x", (2,))
    for _ in range(6):
        y = y * y
    found = chains(trace)
    assert [found[i].degree for i in range(1, 7)] == [2, 4, 8, 16, 2, 4]
    assert (found[4].root, found[6].root) == (x.id, 4)
    assert (x * trace.input("z", (2,))).id not in chains(trace)


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_power_is_seen_as_one(degree: int) -> None:
    found = pure_power(Chain(0, degree, lambda x: 0.5 * (x - 0.25) ** degree + 3.0), Range(-1.0, 2.0))
    assert found == pytest.approx((0.5, 0.25, 3.0), abs=1e-6)
    assert pure_power(Chain(0, degree + 1, lambda x: x ** (degree + 1)), Range(-1.0, 2.0)) is None
    if degree > 2:
        assert pure_power(Chain(0, degree, lambda x: x**degree + x), Range(-1.0, 2.0)) is None


def test_every_record_is_of_a_primitive() -> None:
    assert set(RULES) <= set(PRIMITIVES)
    assert set(PRIMITIVES) - set(RULES) == {
        "input",
        "matmul",
        "exp_below",
        "maximum",
        "row_bound",
        "inverse_power",
        "keep",
        "mul_public",
        "power",
        "polynomial_product",
        "perturbed",
        "real",
        "rotated",
        "top_indices",
        "top_of",
        "top_values",
        "units",
    }  # the packers', comparisons, tables, and what queries of text share
