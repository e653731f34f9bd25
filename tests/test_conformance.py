"""Every protocol: its result against Python integers, its cost against its formula, over shapes, rings and sharings;
under two parties and a dealer, and under three with shared and with public weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.chebyshev import chebval
from torch import Tensor

from protocols import bits, kernels, local, matmul, three_party
from protocols import two_party as tp
from protocols.circuit import check as check_circuit
from protocols.circuit import reference
from protocols.flow import Instruction
from protocols.protocol import CircuitCost, Opening, Protocol, Shape
from protocols.three_party import Translated
from protocols.two_party import intervals
from protocols.two_party.exponential import _COARSE, _FINE, _LOW, _tables
from protocols.two_party.noise import HIGHEST, LOWEST
from protocols.two_party.tabulated import ACCURACY, ROWS, WIDEST, smallest
from protocols.two_party.tabulated import PUBLIC as TABLE_BITS
from protocols.weights import ServerWeights
from protocols.windows import runs_of
from tests.helpers import (
    Integers,
    Outcome,
    centred,
    combine,
    integers,
    octets,
    run_circuit,
    shared,
    shared_bits,
    tensor,
    words,
)
from tests.three import cost_of, run_three, translated

SHAPES: tuple[Shape, ...] = ((1,), (7,), (8,), (13,), (3, 5), (1, 1, 1), (2, 1, 9), (33,))


@dataclass
class Setup:
    """A circuit in the making, with inputs of chosen values and chosen sharings."""

    data: st.DataObject
    circuit: list[Instruction] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.draw(st.integers(0, 2**32 - 1), "seed"))

    def draw(self, strategy: st.SearchStrategy[Any], label: str) -> Any:
        return self.data.draw(strategy, label=label)

    def shape(self) -> Shape:
        shape: Shape = self.draw(st.sampled_from(SHAPES), "shape")
        return shape

    def number(self, label: str, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high), label))

    def add(self, protocol: Protocol, *inputs: int) -> int:
        self.circuit.append(Instruction(protocol, inputs))
        return len(self.circuit) - 1

    def choose(self, shape: Shape, low: int, high: int, near: tuple[int, ...] = ()) -> Integers:
        """Numbers from low to high, both included, every other one an extreme or close to one of ``near``."""
        special = [v for c in (low, high, 0, *near) for v in (c - 1, c, c + 1) if low <= v <= high]
        out = np.empty(math.prod(shape), dtype=object)
        for i in range(out.size):
            if self.rng.random() < 0.5:
                out[i] = special[self.rng.integers(len(special))]
            else:
                out[i] = low + int.from_bytes(self.rng.bytes(16), "little") % (high - low + 1)
        return out.reshape(shape)

    def secret(
        self, shape: Shape, ring: int, low: int | None = None, high: int | None = None, near: tuple[int, ...] = ()
    ) -> tuple[int, Integers]:
        """The instruction of an input, and its integers. Shares carry junk above the ring."""
        half = 1 << (ring - 1)
        x = self.choose(shape, -half if low is None else low, half - 1 if high is None else high, near)
        split = self.draw(st.sampled_from(["random", "client", "server", "extreme"]), "split")
        junk = words(self.rng, shape).numpy().astype(object) << ring
        if split == "random":
            mask = words(self.rng, shape)
        elif split == "client":
            mask = torch.zeros(shape, dtype=torch.int64)
        elif split == "server":
            mask = tensor(x + junk)
        else:
            mask = tensor(self.choose(shape, -half, half - 1) + junk)
        name = f"x{len(self.circuit)}"
        self.inputs[name] = tensor(x)
        return self.add(shared(name, shape, ring, mask)), x

    def planes(self, rows: int, elements: int) -> tuple[int, Tensor]:
        shape = (rows, bits.plane_bytes(elements))
        x, name = octets(self.rng, shape), f"b{len(self.circuit)}"
        self.inputs[name] = x
        mask = self.draw(st.sampled_from([octets(self.rng, shape), torch.zeros_like(x), x]), "split")
        return self.add(shared_bits(name, shape, mask)), x

    def opened(
        self, shape: Shape, ring: int, low: int | None = None, high: int | None = None, near: tuple[int, ...] = ()
    ) -> tuple[int, Integers]:
        index, x = self.secret(shape, ring, low, high, near)
        if self.draw(st.booleans(), "delivered, too"):  # then three parties open it once, in all of the 64 bits
            p = self.circuit[index].protocol
            self.circuit[index] = Instruction(replace(p, ring=64))  # type: ignore[type-var]
            self.add(tp.Deliver(shape, 64), index)
        return self.add(tp.Open(shape, ring), index), x

    def opened_planes(self, shape: Shape, rows: int) -> tuple[int, Tensor]:
        index, b = self.planes(rows, math.prod(shape))
        return self.add(tp.OpenBits(shape, rows), index), b


Check = Callable[[Any, Any], None]  # the two parties' results
CASES: dict[str, Callable[[Setup], Check]] = {}


def case(protocol: type[Protocol]) -> Callable[[Callable[[Setup], Check]], Callable[[Setup], Check]]:
    """The protocol under test is the last instruction that the case adds."""

    def register(function: Callable[[Setup], Check]) -> Callable[[Setup], Check]:
        CASES[protocol.kind] = function
        return function

    return register


def exactly(expected: Integers, ring: int) -> Check:
    def check(server: Any, client: Any) -> None:
        result = integers(combine(server, client), ring)
        assert result.shape == expected.shape
        assert (result == expected % (1 << ring)).all(), (result, expected)

    return check


def close(expected: Integers, ring: int, low: float, high: float) -> Check:
    """result - expected in (low, high]; expected are fractions or floats."""

    def check(server: Any, client: Any) -> None:
        result = integers(combine(server, client), ring, signed=True)
        difference = result - expected
        assert (difference > low).all(), difference.min()
        assert (difference <= high).all(), difference.max()

    return check


def plane_bits(planes: Tensor, shape: Shape) -> Integers:
    return np.stack([bits.unpack(p, shape).numpy() for p in planes]).astype(object)


def same_bits(expected: Integers, shape: Shape) -> Check:
    def check(server: Any, client: Any) -> None:
        assert (plane_bits(combine(server, client), shape) == expected).all()

    return check


# local steps


@case(local.Add)
def add(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    b, y = s.secret(s.draw(st.sampled_from([shape, shape[-1:], (*shape[:-1], 1)]), "other"), ring)
    s.add(local.Add(shape, ring), a, b)
    return exactly(x + y, ring)


@case(local.Sub)
def sub(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    b, y = s.secret(s.draw(st.sampled_from([shape, shape[-1:], (*shape[:-1], 1)]), "other"), ring)
    s.add(local.Sub(shape, ring), a, b)
    return exactly(x - y, ring)


@case(local.AddConstant)
def add_constant(s: Setup) -> Check:
    ring, shape, c = s.number("ring", 1, 64), s.shape(), s.number("constant", -(2**64), 2**64)
    a, x = s.secret(shape, ring)
    s.add(local.AddConstant(shape, ring, c), a)
    return exactly(x + c, ring)


@case(local.MulConstant)
def mul_constant(s: Setup) -> Check:
    ring, shape, c = s.number("ring", 1, 64), s.shape(), s.number("constant", -(2**64), 2**64)
    a, x = s.secret(shape, ring)
    s.add(local.MulConstant(shape, ring, c), a)
    return exactly(x * c, ring)


@case(local.MulPublic)
def mul_public(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    b, c = s.secret(s.draw(st.sampled_from([shape, shape[-1:], (*shape[:-1], 1)]), "other"), 20)
    known = s.add(tp.Publish(c.shape, 20), b)
    s.add(local.MulPublic(shape, ring), a, known)
    return exactly(x * c, ring)


@case(local.Rotated)
def rotated(s: Setup) -> Check:
    """Pairs are entries half a row apart; the factors stand for all rows of another dimension."""
    ring, (*rows, half) = s.number("ring", 1, 64), s.shape()
    shape = (*rows, 2 * half)
    a, x = s.secret(shape, ring)
    one = s.draw(st.sampled_from([shape, shape[-1:]]), "factors")
    (b, c), (d, e) = (s.secret(one, 20) for _ in range(2))
    s.add(local.Rotated(shape, ring), a, *(s.add(tp.Publish(one, 20), i) for i in (b, d)))
    turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
    return exactly(x * c + turned * e, ring)


@case(tp.Publish)
def publish(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    s.add(tp.Publish(shape, ring), a)

    def check(server: Any, client: Any) -> None:
        for known in (server, client):
            assert (integers(known, signed=True) == x).all()

    return check


@case(tp.Keep)
def keep(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.opened(shape, ring)
    s.add(tp.Keep(shape, ring, "keys"), a)
    return exactly(x, ring)


@case(tp.OpenedConcat)
def opened_concat(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    dim = s.number("dim", 0, len(shape) - 1)
    parts = [s.opened((*shape[:dim], n, *shape[dim + 1 :]), ring) for n in (1, 4, shape[dim])]
    expected = np.concatenate([x for _, x in parts], axis=dim)
    s.add(tp.OpenedConcat(expected.shape, ring, dim), *(i for i, _ in parts))
    return exactly(expected, ring)


@case(tp.OpenedReshape)
def opened_reshape(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.opened(shape, ring)
    s.add(tp.OpenedReshape((1, x.size, 1), ring), a)
    return exactly(x.reshape(1, -1, 1), ring)


@case(tp.OpenedExpand)
def opened_expand(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.opened((1, *shape), ring)
    s.add(tp.OpenedExpand((2, 3, *shape), ring), a)
    return exactly(np.broadcast_to(x, (2, 3, *shape)), ring)


@case(tp.OpenedPermute)
def opened_permute(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), (*s.shape(), 2)
    a, x = s.opened(shape, ring)
    dims = tuple(s.draw(st.permutations(range(len(shape))), "dims"))
    s.add(tp.OpenedPermute(tuple(shape[d] for d in dims), ring, dims), a)
    return exactly(x.transpose(dims), ring)


@case(local.AddWeight)
def add_weight(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    wide = s.draw(st.booleans(), "broadcast")
    a, x = s.secret((1, *shape) if wide else shape, ring)
    w = s.choose((3, *shape) if wide else shape[-1:], -(2**63), 2**63 - 1)
    s.weights["w"] = tensor(w)
    s.add(local.AddWeight((3, *shape) if wide else shape, ring, "w"), a)
    return exactly(x + w, ring)


@case(local.Sum)
def total(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), (*s.shape(), 3)
    a, x = s.secret(shape, ring)
    dims = tuple(sorted(s.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1), "dims")))
    s.add(local.Sum(tuple(1 if i in dims else n for i, n in enumerate(shape)), ring, dims), a)
    return exactly(x.sum(axis=dims, keepdims=True), ring)


@case(local.Reshape)
def reshape(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    s.add(local.Reshape((1, x.size, 1), ring), a)
    return exactly(x.reshape(1, -1, 1), ring)


@case(local.Expand)
def expand(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret((1, *shape), ring)
    s.add(local.Expand((2, 3, *shape), ring), a)
    return exactly(np.broadcast_to(x, (2, 3, *shape)), ring)


@case(local.Permute)
def permute(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), (*s.shape(), 2)
    a, x = s.secret(shape, ring)
    dims = tuple(s.draw(st.permutations(range(len(shape))), "dims"))
    s.add(local.Permute(tuple(shape[d] for d in dims), ring, dims), a)
    return exactly(x.transpose(dims), ring)


@case(local.Slice)
def slice_(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    dim = s.number("dim", 0, len(shape) - 1)
    start, step = s.number("start", 0, shape[dim] - 1), s.number("step", 1, 3)
    stop = s.number("stop", start + 1, shape[dim])
    index = (*[slice(None)] * dim, slice(start, stop, step))
    s.add(local.Slice(x[index].shape, ring, dim, start, stop, step), a)
    return exactly(x[index], ring)


@case(local.Concat)
def concat(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    dim = s.number("dim", 0, len(shape) - 1)
    parts = [s.secret((*shape[:dim], n, *shape[dim + 1 :]), ring) for n in (1, 4, shape[dim])]
    expected = np.concatenate([x for _, x in parts], axis=dim)
    s.add(local.Concat(expected.shape, ring, dim), *(i for i, _ in parts))
    return exactly(expected, ring)


@case(local.Differences)
def differences(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), (s.number("tensors", 2, 5), *s.shape())
    a, x = s.secret(shape, ring)
    s.add(local.Differences((shape[0] - 1, *shape[1:]), ring), a)
    return exactly(np.diff(x, axis=0), ring)


@case(local.Take)
def take(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    dim = s.number("dim", 0, len(shape) - 1)
    positions = s.draw(st.lists(st.integers(-1, shape[dim] - 1), min_size=1, max_size=12), "positions")
    index = np.array(positions)
    picked = np.take(x, np.maximum(index, 0), dim)
    zeros = (index < 0).reshape([-1 if i == dim else 1 for i in range(len(shape))])
    s.add(local.Take(picked.shape, ring, dim, runs_of(positions)), a)
    return exactly(np.where(zeros, 0, picked), ring)


def window_of(s: Setup) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """A shape, and a window that fits into it."""
    rank = s.number("rank", 1, 2)
    sizes = [s.number("size", 3, 6) for _ in range(rank)]
    form = {
        "kernel": tuple(s.number("kernel", 1, 3) for _ in range(rank)),
        "stride": tuple(s.number("stride", 1, 3) for _ in range(rank)),
        "padding": tuple(s.number("padding", 0, 2) for _ in range(rank)),
        "dilation": tuple(s.number("dilation", 1, 2) for _ in range(rank)),
    }
    for i in range(rank):  # a window that is as long as what it moves over
        sizes[i] = max(sizes[i], form["dilation"][i] * (form["kernel"][i] - 1) + 1 - 2 * form["padding"][i])
    return (s.number("batch", 1, 2), s.number("channels", 1, 3), *sizes), form


def patches_by_hand(x: Any, form: Mapping[str, tuple[int, ...]]) -> Any:
    """The patches, entry by entry."""
    padded = np.pad(x.astype(object), [(0, 0), (0, 0), *((p, p) for p in form["padding"])])
    kernel, stride, dilation = (form[name] for name in ("kernel", "stride", "dilation"))
    sizes = zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    counts = [(n - d * (k - 1) - 1) // t + 1 for n, k, t, d in sizes]
    out = np.empty((x.shape[0], *counts, x.shape[1] * math.prod(kernel)), dtype=object)
    for place in np.ndindex(*counts):
        entries = [
            padded[
                (slice(None), c, *(p * t + e * d for p, t, e, d in zip(place, stride, entry, dilation, strict=True)))
            ]
            for c in range(x.shape[1])
            for entry in np.ndindex(*kernel)
        ]
        out[(slice(None), *place)] = np.stack(entries, -1)
    return np.vectorize(int, otypes=[object])(out)


@case(local.Patches)
def patches(s: Setup) -> Check:
    ring, (shape, form) = s.number("ring", 1, 64), window_of(s)
    a, x = s.secret(shape, ring)
    expected = patches_by_hand(x, form)
    s.add(local.Patches(expected.shape, ring, **form), a)
    return exactly(expected, ring)


@case(local.Truncate)
def truncate(s: Setup) -> Check:
    ring = s.number("ring", 3, 64)
    shift, shape = s.number("shift", 1, ring - 2), s.shape()
    # a result one unit above the largest is a wrap of its own: leave that unit
    a, x = s.secret(shape, ring, high=(1 << (ring - 1)) - (1 << shift) - 1, near=(1 << shift, -(1 << shift)))
    s.add(local.Truncate(shape, ring, shift), a)
    unit = 1 << shift

    def check(server: Any, client: Any) -> None:
        result = integers(combine(server, client), ring - shift, signed=True)
        assert (result * unit - x > -unit).all()
        assert (result * unit - x <= unit).all()

    return check


@case(local.Indicators)
def indicators(s: Setup) -> Check:
    shape, planes = s.shape(), s.number("planes", 1, 4)
    a, b = s.planes(planes, math.prod(shape))
    rows = tuple(
        tuple(s.draw(st.lists(st.integers(0, planes - 1), min_size=1, max_size=3), "row"))
        for _ in range(s.number("rows", 1, 3))
    )
    negate = tuple(s.draw(st.booleans(), "negate") for _ in rows)
    s.add(local.Indicators(b.shape[1], rows, negate), a)
    plain = plane_bits(b, shape)
    expected = [(sum(plain[r] for r in row) + n) % 2 for row, n in zip(rows, negate, strict=True)]
    return same_bits(np.stack(expected), shape)


# endpoints and openings


@case(tp.Input)
def input_(s: Setup) -> Check:
    ring, shape = s.number("ring", 2, 64), s.shape()
    x = s.choose(shape, -(1 << (ring - 1)), (1 << (ring - 1)) - 1)
    s.inputs["x"] = tensor(x)
    s.add(tp.Input(shape, ring, "x", 0, -1.0, 1.0))
    return exactly(x, ring)


@case(tp.Reveal)
def reveal(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    s.add(tp.Reveal(shape, ring), a)

    def check(server: Any, client: Any) -> None:
        assert server is None
        assert (integers(client, ring) == x % (1 << ring)).all()

    return check


@case(tp.Open)
def open_(s: Setup) -> Check:
    shape = s.shape()
    ring = s.number("ring", 1, 64)
    a, x = s.secret(shape, ring)
    s.add(tp.Open(shape, ring), a)
    return exactly(x, ring)


@case(tp.OpenBits)
def open_bits(s: Setup) -> Check:
    shape, rows = s.shape(), s.number("planes", 1, 5)
    _, b = s.opened_planes(shape, rows)
    return same_bits(plane_bits(b, shape), shape)


@case(tp.Deliver)
def deliver(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    a, x = s.secret(shape, ring)
    s.add(tp.Deliver(shape, ring), a)
    return exactly(x, ring)


@case(tp.Linear)
def linear(s: Setup) -> Check:
    ring, width = s.number("ring", 2, 64), s.draw(st.sampled_from([1, 7, 33]), "in")
    wide, shape = s.number("delivered", ring, 64), (*s.draw(st.sampled_from([(), (5,), (2, 3)]), "batch"), width)
    a, x = s.secret(shape, wide)
    diagonal = s.draw(st.booleans(), "diagonal")
    out = width if diagonal else s.draw(st.sampled_from([1, 6, 17]), "out")
    reach = 1 << s.draw(st.sampled_from([1, 14, 20, 31]), "weight bits")
    w = s.choose((width,) if diagonal else (width, out), -reach, reach - 1)
    s.weights["w"] = tensor(w)
    s.add(tp.Linear((*shape[:-1], out), ring, "w", diagonal), s.add(tp.Deliver(shape, wide), a))
    return exactly(x * w if diagonal else x @ w, ring)


@case(tp.DeliveredPatches)
def delivered_patches(s: Setup) -> Check:
    """The patches of what was delivered once, whose linear map is a convolution."""
    ring, (shape, form) = s.number("ring", 2, 64), window_of(s)
    wide = s.number("delivered", ring, 64)
    a, x = s.secret(shape, wide)
    expected = patches_by_hand(x, form)
    s.add(tp.DeliveredPatches(expected.shape, ring, **form), s.add(tp.Deliver(shape, wide), a))
    return exactly(expected, ring)


# of three parties: what they make of inputs and linear layers, further out than two parties go


@case(three_party.SharedInput)
def shared_input(s: Setup) -> Check:
    return input_(s)


@case(three_party.OpenedPatches)
def opened_patches(s: Setup) -> Check:
    return delivered_patches(s)


@case(three_party.SharedLinear)
def shared_linear(s: Setup) -> Check:
    """Weights of all of the ring, and a value that is opened, and delivered more than once, in several rings."""
    ring, inner = s.number("ring", 1, 64), s.draw(st.sampled_from([1, 2, 33, 130]), "in")
    shape = (*s.draw(st.sampled_from([(1,), (5,), (2, 3), (2, 1, 4)]), "batch"), inner)
    a, x = s.secret(shape, 64)
    reads = [s.add(tp.Deliver(shape, s.number("delivered", ring, 64)), a) for _ in range(s.number("deliveries", 1, 2))]
    if s.draw(st.booleans(), "opened"):
        s.add(tp.Open(shape, s.number("opened", 1, 64)), a)
    diagonal = s.draw(st.booleans(), "diagonal")
    out = inner if diagonal else s.draw(st.sampled_from([1, 6, 17]), "out")
    w = s.choose((inner,) if diagonal else (inner, out), 1 - 2**63, 2**63 - 1)
    s.weights["w"] = tensor(w)
    s.add(tp.Linear((*shape[:-1], out), ring, "w", diagonal), reads[-1])
    return exactly(x * w if diagonal else x @ w, ring)


@case(three_party.PublicLinear)
def public_linear(s: Setup) -> Check:
    return linear(s)


# between openings


@case(tp.Extend)
def extend(s: Setup) -> Check:
    ring, shape = s.number("ring", 2, 63), s.shape()
    wide, quarter = s.number("wide", ring + 1, 64), 1 << (ring - 2)
    a, x = s.secret(shape, ring, -quarter, quarter - 1)
    s.add(tp.Extend(shape, ring, wide), a)
    return exactly(x, wide)


@case(tp.OpenedSum)
def opened_sum(s: Setup) -> Check:
    """Openings of several rings, one of them broadcast, added up."""
    ring, shape = s.number("ring", 1, 64), s.shape()
    minus = tuple(bool(s.number("minus", 0, 1)) for _ in range(s.number("operands", 1, 3)))
    constant = s.number("constant", -(1 << 66), 1 << 66)
    operands, total = [], np.full(shape, constant, dtype=object)
    for position, negated in enumerate(minus):
        a, x = s.opened((*shape[:-1], 1) if position == 1 else shape, s.number("operand ring", ring, 64))
        operands.append(a)
        total = total - x if negated else total + x
    s.add(tp.OpenedSum(shape, ring, minus, constant), *operands)
    return exactly(total, ring)


@case(tp.Product)
def product(s: Setup) -> Check:
    ring = s.number("ring", 1, 64)
    left, right = s.number("left ring", ring, 64), s.number("right ring", ring, 64)
    kind = s.draw(st.sampled_from(["elementwise", "broadcast", "square", "matrix", "batched"]), "kind")
    shape = s.shape()
    if kind in ("matrix", "batched"):
        batch = (2, 3) if kind == "batched" else ()
        rows, inner, columns = (s.draw(st.sampled_from([1, 4, 7]), n) for n in ("rows", "inner", "columns"))
        a, x = s.opened((*batch, rows, inner), left)
        b, y = s.opened((*batch, inner, columns), right)
        s.add(tp.Product((*batch, rows, columns), ring, True), a, b)
        return exactly(x @ y, ring)
    a, x = s.opened(shape, left)
    if kind == "square":
        s.add(tp.Product(shape, ring), a, a)
        return exactly(x * x, ring)
    b, y = s.opened((*shape[:-1], 1) if kind == "broadcast" else shape, right)
    s.add(tp.Product(shape, ring), a, b)
    return exactly(x * y, ring)


@case(tp.Powers)
def powers(s: Setup) -> Check:
    ring, shape, degree = s.number("ring", 1, 64), s.shape(), s.number("degree", 2, 6)
    a, x = s.opened(shape, ring)
    s.add(tp.Powers(shape, ring, degree), a)

    def check(server: Any, client: Any) -> None:
        (z, mine), (same, theirs) = server, client
        assert torch.equal(z, same)
        masks = [integers(p + q, ring) for p, q in zip(mine, theirs, strict=True)]
        assert len(masks) == degree
        assert ((integers(z, ring) - masks[0] - x) % (1 << ring) == 0).all()
        for i, mask in enumerate(masks, 1):
            assert ((masks[0] ** i - mask) % (1 << ring) == 0).all()

    return check


@case(tp.Polynomial)
def polynomial(s: Setup) -> Check:
    ring, shape, degree = s.number("ring", 1, 64), s.shape(), s.number("degree", 0, 6)
    most = max(degree, s.number("powers", 1, 6))
    if ring > 2 and s.draw(st.booleans(), "lifted"):
        a, x, agreed = lifted(s, shape, ring)
        p = s.add(tp.LiftedPowers(shape, ring, agreed, most), a)
    else:
        a, x = s.opened(shape, ring)
        p = s.add(tp.Powers(shape, ring, most), a)
    coefficients = tuple(s.number("coefficient", -(2**63), 2**63 - 1) for _ in range(degree + 1))
    centre = s.number("centre", -(2**20), 2**20)
    s.add(tp.Polynomial(shape, ring, centre, coefficients), p)
    return exactly(sum((c * (x - centre) ** j for j, c in enumerate(coefficients)), np.zeros(shape, object)), ring)


@case(tp.Polynomials)
def polynomials(s: Setup) -> Check:
    ring, shape, count = s.number("ring", 1, 64), s.shape(), s.number("polynomials", 1, 4)
    most = s.number("powers", 1, 6)
    if ring > 2 and s.draw(st.booleans(), "lifted"):
        a, x, agreed = lifted(s, shape, ring)
        p = s.add(tp.LiftedPowers(shape, ring, agreed, most), a)
    else:
        a, x = s.opened(shape, ring)
        p = s.add(tp.Powers(shape, ring, most), a)
    coefficients = tuple(
        tuple(s.number("coefficient", -(2**63), 2**63 - 1) for _ in range(s.number("degree", 0, most) + 1))
        for _ in range(count)
    )
    centres = tuple(s.number("centre", -(2**20), 2**20) for _ in range(count))
    s.add(tp.Polynomials(shape, ring, centres, coefficients), p)
    return exactly(
        np.stack(
            [
                sum((c * (x - centre) ** j for j, c in enumerate(own)), np.zeros(shape, object))
                for centre, own in zip(centres, coefficients, strict=True)
            ]
        ),
        ring,
    )


def lifted(s: Setup, shape: Shape, wide: int, drop: int = 0, name: str = "opened") -> tuple[int, Integers, int]:
    """The instruction of a lifted opening, the opened integers, and the bits in which the representatives agree."""
    opened = s.number(name, 2 + drop, min(63, wide - 1 + drop))
    quarter = 1 << (opened - 2)
    ring = s.number("ring of the opening", opened, 64)
    a, x = s.opened(shape, ring, -quarter, quarter - 1)
    return s.add(tp.Lift(shape, opened, drop, wide), a), x, opened - drop


def lifted_value(result: Any) -> Integers:
    """Over the integers, not modulo the ring."""
    server, client = result
    assert torch.equal(server.value, client.value)
    assert torch.equal(server.lower, client.lower)
    return integers(server.value, signed=True)


@case(tp.Lift)
def lift(s: Setup) -> Check:
    wide, shape = s.number("wide", 3, 64), s.shape()
    drop = s.draw(st.sampled_from([0, 0, s.number("drop", 0, 20)]), "drops")
    _, x, _ = lifted(s, shape, wide, drop)

    def check(server: Any, client: Any) -> None:
        mask = integers(combine(server.mask, client.mask), wide)
        result = centred(lifted_value((server, client)) - mask, wide)
        assert (abs(result * (1 << drop) - x) < 1 << drop).all() or (1 << wide) <= 2 * abs(x).max() >> drop

    return check


@case(tp.LiftedPowers)
def lifted_powers(s: Setup) -> Check:
    wide, shape, degree = s.number("wide", 3, 64), s.shape(), s.number("degree", 1, 6)
    a, x, agreed = lifted(s, shape, wide)
    ring = s.number("ring", agreed + 1, wide)
    s.add(tp.LiftedPowers(shape, ring, agreed, degree), a)

    def check(server: Any, client: Any) -> None:
        (z, mine), (same, theirs) = server, client
        assert torch.equal(z, same)
        masks = [integers(p + q, ring) for p, q in zip(mine, theirs, strict=True)]
        assert len(masks) == degree
        assert ((integers(z, ring) - masks[0] - x) % (1 << ring) == 0).all()
        for i, mask in enumerate(masks, 1):
            assert ((masks[0] ** i - mask) % (1 << ring) == 0).all()

    return check


@case(tp.LiftedProduct)
def lifted_product(s: Setup) -> Check:
    wide, shape = s.number("wide", 3, 64), s.shape()
    other = s.draw(st.sampled_from([shape, shape[-1:], (*shape[:-1], 1)]), "other")
    a, x, agreed = lifted(s, shape, wide)
    ring = s.number("ring", agreed + 1, wide)
    kind = s.draw(st.sampled_from(["lifted", "square", "opening"]), "second")
    if kind == "square":
        b, y, also = a, x, agreed
    elif kind == "lifted":
        b, y, also = lifted(s, other, ring, name="second opened")
    else:
        b, y = s.opened(other, s.number("second opened", ring, 64))
        also = s.number("agreed", ring, 64)
    turned = s.draw(st.booleans(), "turned")
    operands, bits_of = ((b, a), (also, agreed)) if turned else ((a, b), (agreed, also))
    s.add(tp.LiftedProduct(shape, ring, *bits_of), *operands)
    return exactly(x * y, ring)


@case(tp.PolynomialProduct)
def polynomial_product(s: Setup) -> Check:
    wide, shape, degree = s.number("wide", 4, 64), s.shape(), s.number("degree", 1, 5)
    of_x = s.draw(st.sampled_from([shape, shape[-1:], (*shape[:-1], 1)]), "other")
    a, x, agreed = lifted(s, of_x, wide)
    ring = s.number("ring", max(4, agreed + 1), wide)
    powers = s.add(tp.LiftedPowers(of_x, wide, agreed, s.number("powers", degree, 6)), a)
    b, y, also = (
        (a, x, agreed) if of_x == shape and s.draw(st.booleans(), "itself") else lifted(s, shape, ring, name="y")
    )
    coefficients = tuple(s.number("coefficient", -(2**63), 2**63 - 1) for _ in range(degree + 1))
    centre = s.number("centre", -(2**20), 2**20)
    s.add(tp.PolynomialProduct(shape, ring, agreed, also, centre, coefficients), a, powers, b)
    return exactly(y * sum((c * (x - centre) ** j for j, c in enumerate(coefficients)), np.zeros(of_x, object)), ring)


@case(tp.Compare)
def compare(s: Setup) -> Check:
    width, shape = s.number("width", 2, 64), s.shape()
    ring, drop = s.number("ring", width, 64), s.number("drop", 0, width - 2)
    reach = 1 << (width - 1)
    spread = max(0, reach // 4 - 1)
    centre = s.number("centre", -spread, spread)
    ts = tuple(centre + s.number("threshold", -spread, spread) for _ in range(s.number("thresholds", 1, 4)))
    low, high = max(ts) - reach, min(ts) + reach - (1 << drop) - bool(drop)
    a, x = s.opened(shape, ring, low, high, (*ts, *(t - (1 << drop) for t in ts)))
    s.add(tp.Compare(shape, width, drop, ts, s.number("digit", 3, 6)), a)

    def check(server: Any, client: Any) -> None:
        below = plane_bits(combine(server, client), shape)
        for plane, t in zip(below, ts, strict=True):
            assert (plane[x >= t] == 0).all()
            assert (plane[x < t - (1 << drop if drop else 0)] == 1).all()

    return check


@case(tp.Select)
def select(s: Setup) -> Check:
    ring, shape, rows = s.number("ring", 1, 64), s.shape(), s.number("bits", 1, 5)
    planes, b = s.opened_planes(shape, rows)
    number = st.one_of(st.sampled_from([0, 1, -1]), st.integers(-(2**63), 2**63 - 1))
    slopes = tuple(s.draw(number, "slope") for _ in range(rows))
    offsets = tuple(s.draw(number, "offset") for _ in range(rows))
    operands, x = [planes], np.zeros(shape, dtype=object)
    if any(slopes):
        a, x = s.opened(shape, s.number("opened", ring, 64))
        operands.append(a)
    s.add(tp.Select(shape, ring, slopes, offsets), *operands)
    chosen = plane_bits(b, shape)
    return exactly(sum(c * (m * x + o) for c, m, o in zip(chosen, slopes, offsets, strict=True)), ring)


@case(tp.SelectEach)
def select_each(s: Setup) -> Check:
    ring, shape, rows = s.number("ring", 1, 64), s.shape(), s.number("bits", 1, 5)
    planes, b = s.opened_planes(shape, rows)
    a, x = s.opened((rows, *shape), s.number("opened", ring, 64))
    s.add(tp.SelectEach(shape, ring, rows), planes, a)
    return exactly(sum(c * each for c, each in zip(plane_bits(b, shape), x, strict=True)), ring)


def exponential_bound(p: tp.Exponential) -> float:
    """As declared in ``Exponential.error``."""
    return 2.0 ** -(p.public_fraction + 1) + math.exp(16) * 2.0 ** -(p.mask_fraction + 1) + 2.0**-19


@case(tp.Exponential)
def exponential(s: Setup) -> Check:
    """Two digits without a bit, or more with the bit that the digit is one of the first two."""
    shape, fraction = s.shape(), s.number("fraction", 4, 18)
    if s.number("clipped", 0, 1):
        shift = fraction + 4
        ring = shift + s.number("digits", 2, 6)
        a, x = s.opened(shape, ring, 0, (1 << ring) - (1 << shift) - 1)
        near = s.add(tp.DigitIn(shape, ring, shift, 2), a)
        operands = [s.add(tp.OpenBits(shape, 1), near), a]
    else:
        shift = fraction + s.number("integer bits", 0, 4)
        ring = shift + 1
        a, x = s.opened(shape, ring, 0, (1 << shift) - 1)
        operands = [a]
    protocol = tp.Exponential(shape, ring, shift, fraction, 40, 16)
    s.add(protocol, *operands)
    scale = 2.0 ** (protocol.mask_fraction + protocol.public_fraction)
    expected = np.exp(-x.astype(np.float64) * 2.0**-fraction) * scale
    reach = exponential_bound(protocol) * scale  # e^-16, which is left out, is less
    return close(expected, 64, -reach, reach)


def reaches(protocol: tp.Tabulated, x: Integers) -> tuple[Integers, Integers]:
    """The value, and the declared error, of each x, in units of the revealed integers."""
    expected = protocol.scale * x.astype(np.float64) ** (-1 / protocol.root)
    error = ACCURACY * expected + (protocol.degree + 2) / 2
    return expected * 2.0**protocol.public, error * 2.0**protocol.public


@case(tp.Tabulated)
def tabulated(s: Setup) -> Check:
    shape, root, degree = s.shape(), s.number("root", 1, 2), s.number("degree", 4, 9)
    low = s.number("low", 8, 1 << 22)
    shift = math.floor(math.log2(WIDEST[root][degree] * low))
    ring = shift + s.number("digit bits", 3, 6)
    above = (1 << ring) - (1 << shift)
    high = s.number("high", low + 1, above - 1)
    a, x = s.opened(shape, ring, low, high, (above, 1 << shift, 3 << (shift - 1)))
    bits_ = s.number("fraction bits", 10, 30)
    wide = min(64, bits_ + TABLE_BITS + 2 + s.number("spare", 0, 10))
    protocol = tp.Tabulated(
        shape, ring, shift, degree, root, low, high, 2.0**bits_ * low ** (1 / root), TABLE_BITS, wide
    )
    s.add(protocol, a)
    expected, reach = reaches(protocol, x)

    def check(server: Any, client: Any) -> None:
        result = integers(combine(server, client), wide, signed=True).astype(np.float64)
        assert (abs(result - expected) <= reach).all(), (abs(result - expected) / reach).max()

    return check


@case(tp.TabulatedBands)
def tabulated_bands(s: Setup) -> Check:
    """Each table is right for the arguments of its band, of one opening that is as wide as the widest needs."""
    shape, root = s.shape(), s.number("root", 1, 2)
    bands, low = [], s.number("low", 8, 1 << 12)
    for _ in range(s.number("bands", 1, 3)):
        degree = s.number("degree", 4, 9)
        shift = math.floor(math.log2(WIDEST[root][degree] * low))
        ring = shift + s.number("digit bits", 3, 5)
        bands.append((ring, shift, degree, low, s.number("high", low + 1, (1 << ring) - (1 << shift) - 1)))
        low = s.number("next", low, 4 * low)
    opened = max(ring for ring, *_ in bands)
    a, x = s.opened(shape, opened, min(band[3] for band in bands), max(band[4] for band in bands))
    bits_ = s.number("fraction bits", 10, 30)
    wide = min(64, bits_ + TABLE_BITS + 2 + s.number("spare", 0, 10))
    protocol = tp.TabulatedBands(shape, tuple(bands), root, 2.0**bits_ * bands[0][3] ** (1 / root), TABLE_BITS, wide)
    s.add(protocol, a)

    def check(server: Any, client: Any) -> None:
        result = integers(combine(server, client), wide, signed=True).astype(np.float64)
        for table, found in zip(protocol.tables, result, strict=True):
            expected, reach = reaches(table, x)
            inside = (table.low <= x) & (x <= table.high)
            assert (abs(found - expected) <= reach)[inside].all()

    return check


def tops(x: Integers, ring: int, shift: int) -> Integers:
    return (x % (1 << ring)) >> shift


@case(tp.DigitIn)
def digit_in(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    shift = s.number("shift", max(0, ring - 9), ring - 1)
    digits = 1 << (ring - shift)
    count, first = s.number("count", 1, digits - 1), s.draw(st.sampled_from([0, digits // 2, digits - 1]), "first")
    near = tuple((d % digits) << shift for d in (first - 1, first, first + count - 1, first + count))
    a, x = s.opened(shape, s.number("opened", ring, 64), 0, (1 << ring) - 1, near)
    s.add(tp.DigitIn(shape, ring, shift, count, first), a)

    def check(server: Any, client: Any) -> None:
        (found,) = plane_bits(combine(server, client), shape)
        here, after = ((tops(x, ring, shift) + k - first) % digits < count for k in (0, bool(shift)))
        assert (found[~here & ~after] == 0).all()
        assert (found[here & after] == 1).all()

    return check


@case(tp.DigitsIn)
def digits_in(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    shifts = [s.number("shift", max(0, ring - 9), ring - 1) for _ in range(s.number("digits", 1, 4))]
    digits = tuple((shift, s.number("count", 1, (1 << (ring - shift)) - 1)) for shift in shifts)
    near = tuple((count - k) << shift for shift, count in digits for k in (0, 1))
    a, x = s.opened(shape, s.number("opened", ring, 64), 0, (1 << ring) - 1, near)
    s.add(tp.DigitsIn(shape, ring, digits), a)

    def check(server: Any, client: Any) -> None:
        for found, (shift, count) in zip(plane_bits(combine(server, client), shape), digits, strict=True):
            size = 1 << (ring - shift)
            here, after = ((tops(x, ring, shift) + k) % size < count for k in (0, bool(shift)))
            assert (found[~here & ~after] == 0).all()
            assert (found[here & after] == 1).all()

    return check


@case(tp.Unmet)
def unmet(s: Setup) -> Check:
    """Parities are zero where every bit is one; padding does not count."""
    sizes = tuple(s.number("bits", 1, 40) for _ in range(s.number("planes", 1, 3)))
    planes, zeros = [], 0
    for size in sizes:
        index, x = s.planes(1, size)
        name = next(reversed(s.inputs))
        kept = s.draw(st.sampled_from([[], [0], [size - 1], list(range(size))]), "zeros")
        bit = torch.ones(size, dtype=torch.int64)
        bit[kept] = 0
        used = bits.pack(torch.ones(size, dtype=torch.int64))
        s.inputs[name] = (x & ~used) | bits.pack(bit)[None]
        planes.append(index)
        zeros += len(kept)
    s.add(tp.Unmet(sizes), *planes)

    def check(server: Any, client: Any) -> None:
        assert bool(combine(server, client).any()) == bool(zeros)

    return check


@case(tp.Alarm)
def alarm(s: Setup) -> Check:
    a, b = s.opened_planes((64,), 1)
    if s.draw(st.booleans(), "silent"):
        b.zero_()
    s.add(tp.Alarm(), a)

    def check(server: Any, client: Any) -> None:
        assert bool((server + client).any()) == bool(b.any())

    return check


@case(tp.Histogram)
def histogram(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), s.shape()
    digits = s.number("digits", 1, min(8, ring))
    shift, size = ring - digits, 1 << digits
    blocks = s.number("blocks", 1, size)
    length = size // blocks
    bins = s.number("bins", 1, length)
    high = (1 << ring) - (1 << shift) - 1 if shift else (1 << ring) - 1
    operands, b = [], np.ones(shape, dtype=object)
    if blocks > 1:
        planes, secret = s.opened_planes(shape, 1)
        operands, b = [planes], plane_bits(secret, shape)[0]
    a, x = s.opened(shape, s.number("opened", ring, 64), 0, high, tuple((1 << shift) * d for d in (1, 2, bins)))
    s.add(tp.Histogram(shape, ring, shift, bins, blocks), *operands, a)
    # in how many suffixes each element is, if it has no carry and if it has one; those may be any too far from all bins
    digit = np.stack([tops(x, ring, shift) + carry for carry in (0, int(shift > 0))]) % size
    near = (digit < length) | (digit >= size + bins - length) if blocks > 1 else digit < size
    inside = [((i <= digit) & (digit < bins) & (b == 1))[..., None] for i in range(bins)]
    least, most = (
        np.concatenate([choose(where & near[..., None] | ~near[..., None] & other, 0) for where in inside], -1).sum(-2)
        for choose, other in ((np.all, False), (np.any, (b == 1)[..., None]))
    )

    def check(server: Any, client: Any) -> None:
        counts = integers(combine(server, client), 8)
        assert ((least <= counts) & (counts <= most)).all()
        assert (np.diff(counts, axis=-1) <= 0).all()

    return check


# rounding and ranks


@case(tp.Quotient)
def quotient(s: Setup) -> Check:
    ring, shape = s.number("ring", 2, 64), s.shape()
    shift = s.number("shift", 1, min(9, ring - 1))
    a, x = s.opened(shape, s.number("opened", ring, 64), near=(1 << shift, -(1 << shift)))
    s.add(tp.Quotient(shape, ring, shift), a)
    return exactly(x >> shift, ring - shift)


def rows_of(s: Setup, least: int = 2, groups: bool = False) -> Shape:
    first = (s.number("rows", 1, 3),) if groups or s.draw(st.booleans(), "several rows") else ()
    return (
        (*first, s.number("groups", 1, 3), s.number("entries", least, 9))
        if groups
        else (
            *first,
            s.number("entries", least, 9),
        )
    )


@case(tp.OpenedPairs)
def opened_pairs(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), rows_of(s)
    a, x = s.opened(shape, s.number("opened", ring, 64))
    s.add(tp.OpenedPairs(shape, ring), a)
    first, second = np.triu_indices(shape[-1], 1)
    return exactly(x[..., first] - x[..., second], ring)


@case(tp.Ranks)
def ranks(s: Setup) -> Check:
    """Of any numbers, not only of bits."""
    ring, shape = s.number("ring", 1, 64), rows_of(s)
    entries = shape[-1]
    a, x = s.secret((*shape[:-1], entries * (entries - 1) // 2), ring)
    s.add(tp.Ranks(shape, ring), a)
    expected = np.zeros(shape, dtype=object) + np.arange(entries, dtype=object)
    for number, (i, j) in enumerate(zip(*np.triu_indices(entries, 1), strict=True)):
        expected[..., i] += x[..., number]
        expected[..., j] -= x[..., number]
    return exactly(expected, ring)


def ranked(s: Setup, shape: Shape) -> tuple[int, int, int, list[Integers]]:
    """The opening of ranks, their bits, a count of them, and for each of these who has it; some have the same."""
    digit = s.number("digit", max(1, (shape[-1] - 1).bit_length()), 6)
    a, x = s.opened(shape, s.number("opened ranks", digit, 64), 0, (1 << digit) - 1)
    count = s.number("count", 1, min(9, 1 << digit))
    return a, digit, count, [(x == t).astype(object) for t in range(count)]


def summed(has: list[Integers], x: Integers) -> Integers:
    """For each rank the sum of x over those who have it; (..., ranks)."""
    return np.concatenate([(one * x).sum(-1, keepdims=True) for one in has], -1)


@case(tp.Placed)
def placed(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), rows_of(s)
    at, digit, count, has = ranked(s, shape)
    a, x = s.opened(shape, s.number("opened", ring, 64))
    s.add(tp.Placed(shape, ring, digit, count), at, a)
    return exactly(summed(has, x), ring)


@case(tp.PlacedPositions)
def placed_positions(s: Setup) -> Check:
    ring, shape = s.number("ring", 1, 64), rows_of(s, groups=True)
    at, digit, count, has = ranked(s, shape)
    first = s.number("first", 0, 1000)
    s.add(tp.PlacedPositions(shape, ring, digit, count, first), at)
    position = first + np.arange(shape[-2] * shape[-1]).astype(object).reshape(shape[-2:])
    return exactly(summed(has, position), ring)


@case(tp.Units)
def units(s: Setup) -> Check:
    """A position beyond the entries gives zeros."""
    digit = s.number("digit", 1, 6)
    ring, entries, shape = s.number("ring", 1, 64), s.number("entries", 1, 1 << digit), s.shape()
    a, x = s.opened(shape, s.number("opened", digit, 64), 0, (1 << digit) - 1)
    s.add(tp.Units(shape, ring, digit, entries), a)
    return exactly(np.stack([(x == j).astype(object) for j in range(entries)], -1), ring)


def small(s: Setup, ring: int, factor: int = 1) -> int:
    """Fraction bits with which noise times a factor fits a ring."""
    return s.number("fraction", 0, ring - 7 - factor.bit_length())


@case(tp.Gumbel)
def gumbel(s: Setup) -> Check:
    """Within the range of the noise; test_sampling.py has its values and its distribution."""
    ring, shape = s.number("ring", 10, 64), s.shape()
    temperature = s.draw(st.sampled_from([0.125, 0.7, 1.0, 3.0]), "temperature")
    fraction = small(s, ring, 3)
    s.add(tp.Gumbel(shape, ring, fraction, s.number("number", 0, 9), temperature))

    def check(server: Any, client: Any) -> None:
        result = integers(combine(server, client), ring, signed=True)
        for noise in result.reshape(-1):
            assert LOWEST * temperature * 2**fraction - 0.51 <= noise <= HIGHEST * temperature * 2**fraction + 0.51

    return check


@case(tp.ScaledGumbel)
def scaled_gumbel(s: Setup) -> Check:
    ring, shape = s.number("ring", 16, 64), s.shape()
    fraction = small(s, ring, 100)
    a, t = s.opened(s.draw(st.sampled_from([shape, (*shape[:-1], 1), (1,)]), "of"), ring, -100, 100)
    s.add(tp.ScaledGumbel(shape, ring, fraction, s.number("number", 0, 9)), a)

    def check(server: Any, client: Any) -> None:
        result = integers(combine(server, client), ring, signed=True)
        for scaled, factor in zip(result.reshape(-1), np.broadcast_to(t, shape).reshape(-1), strict=True):
            noise, rest = divmod(scaled, factor) if factor else (0, scaled)
            assert rest == 0
            assert LOWEST * 2**fraction - 0.51 <= noise <= HIGHEST * 2**fraction + 0.51

    return check


# the suite

TWO, THREE, PUBLIC = DEPLOYMENTS = ("two", "three", "three-public")  # parties; PUBLIC: who all know the weights
MADE_BY = {  # what only three parties have: the Program's protocol behind it, and where it is made
    "shared_input": ("input", (THREE, PUBLIC)),
    "opened_patches": ("delivered_patches", (THREE,)),
    "shared_linear": ("linear", (THREE,)),
    "public_linear": ("linear", (PUBLIC,)),
}
RUNS = [(kind, deployment) for kind in sorted(CASES) for deployment in MADE_BY.get(kind, (None, DEPLOYMENTS))[1]]


def test_every_protocol_has_a_case() -> None:
    # look-ups take no part in the rounds, and checks have no result: see test_lookup.py and test_client_checks.py
    elsewhere = {"looked_up", "key_sketch", "unit_vectors", "in_range"}
    elsewhere |= {"recall"}  # reads what another query kept: see test_keeping.py
    assert set(CASES) == set(Protocol.registry) - elsewhere
    assert set(MADE_BY) == {kind for kind, p in Protocol.registry.items() if not p.in_programs} - elsewhere


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in tensors(part)]


def measure(s: Setup, length: int, deployment: str, *, prepared: bool = False) -> Outcome:
    circuit = s.circuit[:length]
    if deployment == TWO:
        return run_circuit(circuit, s.inputs, weights=s.weights, prepared=prepared)
    return run_three(circuit, s.inputs, s.weights, public=deployment == PUBLIC, prepared=prepared)


def executed(circuit: list[Instruction], deployment: str) -> Translated:
    """The circuit that the parties run."""
    if deployment == TWO:
        return Translated(tuple(circuit), (len(circuit) - 1,), (circuit[-1].protocol.out,), tuple(range(len(circuit))))
    return translated(circuit, public=deployment == PUBLIC)


@pytest.mark.parametrize(("kind", "deployment"), RUNS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_conforms(kind: str, deployment: str, data: st.DataObject) -> None:
    setup = Setup(data)
    check = CASES[kind](setup)
    size = len(setup.circuit)
    assert setup.circuit[-1].protocol.kind == MADE_BY.get(kind, (kind,))[0]
    made = executed(setup.circuit, deployment)
    (last,) = made.outputs
    protocol = made.circuit[last].protocol
    assert protocol.kind == kind or kind in ("deliver", "delivered_patches", "input", "linear", "reveal")
    if kind != "add_weight":  # see test_a_weight_that_broadcasts_its_operand_is_accepted
        shapes = {name: tuple(w.shape) for name, w in setup.weights.items()}
        check_circuit(setup.circuit, shapes)
        check_circuit(made.circuit, shapes)

    prepared, portable = (data.draw(st.booleans(), label=label) for label in ("prepared", "portable"))
    with pytest.MonkeyPatch.context() as patch:
        if portable:
            patch.setattr(kernels, "on_cpu", lambda x: False)
            patch.setattr(matmul, "native", lambda: False)
        outcome = measure(setup, size, deployment, prepared=prepared)
    check(outcome.server[0], outcome.client[0])
    assert outcome.cost == made.cost

    before = measure(setup, size - 1, deployment).cost if size > 1 else CircuitCost()
    alone = CircuitCost(*(b - a for a, b in zip(before.astuple(), outcome.cost.astuple(), strict=True)))
    assert protocol.exchanges or not protocol.cost().rounds
    assert alone == (protocol.cost() if deployment == TWO else cost_of(made, size - 1))
    given = [outcome.corrections.get(i, b"") for i, origin in enumerate(made.origin) if origin == size - 1]
    assert sum(map(len, given)) == alone.dealt

    out, mine, theirs = protocol.out, outcome.server[0], outcome.client[0]
    for share in (mine, theirs):
        if isinstance(share, Tensor):
            assert tuple(share.shape) == out.shape
            assert share.dtype == out.dtype
        elif isinstance(share, Opening):
            assert tuple(share.value.shape) == tuple(share.mask.shape) == out.shape
        if share is not None:
            parts = tensors(share)
            assert protocol.memory() == sum(x.numel() * x.element_size() for x in parts)
            assert [(x.shape, x.dtype) for x in tensors(protocol.stand_in())] == [(x.shape, x.dtype) for x in parts]

    if protocol.error == "exact":
        for circuit, output in ((setup.circuit, size - 1), (made.circuit, last)):
            (plain,) = reference(circuit, [output], ServerWeights(setup.weights), setup.inputs)
            if isinstance(plain, Tensor) and isinstance(mine, Tensor):
                result = mine if protocol.gives == "public" else combine(mine, theirs)
                if out.planes:
                    assert torch.equal(result, plain) or kind == "indicators"  # whose padding is junk
                else:
                    assert (integers(result, out.bits) == integers(plain, out.bits)).all()


# single protocols, closer


def opened_numbers(x: Integers, ring: int, protocol: Protocol) -> Outcome:
    """Open x under a random sharing and run one protocol on it."""
    rng = np.random.default_rng(int(x.sum()) & 0xFFFF)
    circuit = [
        Instruction(shared("x", x.shape, ring, words(rng, x.shape))),
        Instruction(tp.Open(x.shape, ring), (0,)),
        Instruction(protocol, (1,)),
    ]
    return run_circuit(circuit, {"x": tensor(x)})


@pytest.mark.parametrize("digit", [4, 6])
@pytest.mark.parametrize("width", range(2, 65))
def test_compare_every_width(width: int, digit: int) -> None:
    """All drops of every width, exact where promised, with the formula's rounds and bytes."""
    reach, rng = 1 << (width - 1), np.random.default_rng(width)
    for drop in sorted({*range(0, width - 1, 5), width - 2}):
        t = int(rng.integers(-(reach // 2), reach // 2)) if width > 2 else 0
        low, high = t - reach, t + reach - (1 << drop) - bool(drop)
        marks = [low, high, t, t - 1, t + 1, t - (1 << drop), t - (1 << drop) - 1, 0, -1, 1]
        x = np.array([m for m in marks if low <= m <= high] + [low + (high - low) * i // 20 for i in range(21)], object)
        protocol = tp.Compare(x.shape, width, drop, (t,), digit)
        outcome = opened_numbers(x, width, protocol)
        below = plane_bits(outcome.value(), x.shape)[0]
        assert (below[x >= t] == 0).all()
        assert (below[x < t - (1 << drop) * bool(drop)] == 1).all()
        if drop == 0:
            assert (below == (x < t)).all()
        digits = max(1, -(-(width - 1 - drop) // digit))
        assert outcome.cost.rounds == 1 + (digits > 1) + (digits > 4)


def test_compare_costs_what_its_description_says() -> None:
    """d = 4: six bits each way, eight bytes and 1 + 15 bits from the dealer."""
    assert tp.Compare((8,), 17, 0, (0,)).cost() == CircuitCost(1, 6, 6, 8 * 8 + 16)
    assert tp.Compare((8,), 13, 0, (0,), 6).cost() == CircuitCost(1, 2, 2, 8 * 16 + 2)


@pytest.mark.parametrize("digit", [3, 5, 6])
def test_compare_looks_every_digit_up(digit: int) -> None:
    """Every pair of a secret digit and a public one: all values of one digit, under masks that take all values."""
    size = 1 << digit
    x = np.repeat(np.arange(size, dtype=object) - size // 2, 40)
    for t in range(-(size // 2), size // 2):
        protocol = tp.Compare(x.shape, digit + 2, 1, (2 * t,), digit)
        below = plane_bits(opened_numbers(2 * x, digit + 2, protocol).value(), x.shape)[0]
        assert (below[x >= t] == 0).all()
        assert (below[x < t - 1] == 1).all()


@pytest.mark.parametrize("digit", [-1, 0, 2, 7, 64])
def test_compare_refuses_digits_whose_codes_fill_no_word(digit: int) -> None:
    with pytest.raises(ValueError, match=f"digits of {digit} bits, they have 3 to 6"):
        tp.Compare((1,), 20, 0, (0,), digit).validate()


@pytest.mark.parametrize("ring", [2, 3, 8, 20, 33, 63])
def test_extend_up_to_its_bounds(ring: int) -> None:
    quarter = 1 << (ring - 2)
    values = [-quarter, -quarter + 1, -1, 0, quarter - 2, quarter - 1]
    x = np.array([v for v in values if -quarter <= v < quarter] * 500, dtype=object)
    rng = np.random.default_rng(ring)
    outside = np.array([2 * quarter - 1, -2 * quarter] * 500, dtype=object)  # as far off as the ring goes
    for numbers, right in ((x, True), (outside, False)):
        circuit = [
            Instruction(shared("x", numbers.shape, ring, words(rng, numbers.shape))),
            Instruction(tp.Extend(numbers.shape, ring, 64), (0,)),
        ]
        result = integers(run_circuit(circuit, {"x": tensor(numbers)}).value(), signed=True)
        assert ((result - numbers) % (1 << ring) == 0).all()
        assert (result == numbers).all() == right


@pytest.mark.parametrize("ring", [2, 3, 8, 20, 33, 63])
def test_lift_up_to_its_bounds(ring: int) -> None:
    """Right up to the bounds for every mask, and beyond them off by multiples of 2^ring."""
    quarter = 1 << (ring - 2)
    values = [-quarter, -quarter + 1, -1, 0, quarter - 2, quarter - 1]
    inside = np.array([v for v in values if -quarter <= v < quarter] * 500, dtype=object)
    outside = np.array([2 * quarter - 1, -2 * quarter] * 500, dtype=object)
    for x, right in ((inside, True), (outside, False)):
        circuit = [
            Instruction(shared("x", x.shape, ring, words(np.random.default_rng(ring), x.shape))),
            Instruction(tp.Open(x.shape, ring), (0,)),
            Instruction(tp.Lift(x.shape, ring, 0, 64), (1,)),
            Instruction(tp.LiftedPowers(x.shape, 64, ring, 1), (2,)),
            Instruction(tp.Polynomial(x.shape, 64, 0, (0, 1)), (3,)),
        ]
        result = integers(run_circuit(circuit, {"x": tensor(x)}).value(), signed=True)
        assert ((result - x) % (1 << ring) == 0).all()
        assert (result == x).all() == right


@pytest.mark.parametrize(("ring", "drop"), [(24, 8), (24, 22), (64, 1), (64, 40), (10, 3)])
def test_dropped_bits_cost_less_than_a_unit(ring: int, drop: int) -> None:
    """And no bias: both floors lose as much."""
    n, unit, quarter = 20_000, 1 << drop, 1 << (ring - 2)
    rng = np.random.default_rng(ring)
    x = np.frombuffer(rng.bytes(8 * n), np.uint64).astype(object) % (2 * quarter) - quarter
    x[:2] = -quarter, quarter - 1
    circuit = [
        Instruction(shared("x", x.shape, ring, words(rng, x.shape))),
        Instruction(tp.Open(x.shape, ring), (0,)),
        Instruction(tp.Lift(x.shape, ring, drop, 64), (1,)),
        Instruction(tp.LiftedPowers(x.shape, 64, ring - drop, 1), (2,)),
        Instruction(tp.Polynomial(x.shape, 64, 0, (0, 1)), (3,)),
    ]
    difference = integers(run_circuit(circuit, {"x": tensor(x)}).value(), signed=True) * unit - x
    assert (abs(difference) < unit).all()
    assert abs(float(difference.mean()) / unit) < 0.02


@pytest.mark.parametrize(("ring", "shift"), [(64, 16), (64, 18), (40, 14), (64, 1), (20, 18), (3, 1)])
def test_truncation_never_wraps(ring: int, shift: int) -> None:
    """100,000 elements at the very ends of the ring: where truncation within one ring fails half of the time."""
    n, unit, top = 50_000, 1 << shift, 1 << (ring - 1)
    rng = np.random.default_rng(ring + shift)
    offsets = np.frombuffer(rng.bytes(8 * n), np.uint64).astype(object) % unit
    x = np.concatenate([-top + offsets, top - 1 - unit - offsets])
    circuit = [
        Instruction(shared("x", x.shape, ring, words(rng, x.shape))),
        Instruction(local.Truncate(x.shape, ring, shift), (0,)),
    ]
    result = integers(run_circuit(circuit, {"x": tensor(x)}).value(), ring - shift, signed=True)
    # at the lower end a result one unit below the smallest number would wrap: it never gets there
    difference = result * unit - x
    assert (difference > -unit).all()
    assert (difference <= unit).all()
    if unit > 2:
        assert abs(float(difference.mean()) / unit) < 0.02  # centred


def test_truncation_by_nothing_is_within_its_error() -> None:
    x = np.array([-4, 0, 3], dtype=object)
    circuit = [
        Instruction(shared("x", x.shape, 8, words(np.random.default_rng(0), x.shape))),
        Instruction(local.Truncate(x.shape, 8, 0), (0,)),
    ]
    difference = integers(run_circuit(circuit, {"x": tensor(x)}).value(), 8, signed=True) - x
    assert ((difference > -1) & (difference <= 1)).all()


def exact_powers(count: int, step: int, fraction: int, scale_bits: int) -> list[int]:
    """round(e^(i step / 2^fraction) 2^scale_bits), by a Taylor series in integers of 400 fraction bits."""
    precision = 400
    one = 1 << precision
    argument, term, base, k = (step << precision) >> fraction, one, one, 1
    while term:
        term = (term * argument >> precision) // k
        base, k = base + term, k + 1
    out, power = [], one
    for _ in range(count):
        out.append(((power >> (precision - scale_bits - 1)) + 1) >> 1)
        power = power * base >> precision
    return out


@pytest.mark.parametrize(("half_bits", "fraction"), [(20, 16), (14, 12), (9, 8), (4, 0), (18, 18), (22, 18)])
def test_exponential_tables_are_the_rounded_powers(half_bits: int, fraction: int) -> None:
    """Both parties need the same integers on every machine."""
    coarse, fine = _tables(half_bits, fraction)
    low = min(_LOW, half_bits)
    assert coarse.dtype == fine.dtype == torch.int64
    assert coarse.tolist() == exact_powers((1 << (half_bits - low)) + 1, 1 << low, fraction, _COARSE)
    assert fine.tolist() == exact_powers(1 << low, 1, fraction, _FINE)


def test_exponential_public_factor_never_overflows() -> None:
    """With powers of one, the result is the public factor alone."""
    for fraction in (16, 12, 8, 4, 0):
        shift = fraction + 4
        coarse, fine = _tables(shift, fraction)
        z = torch.arange(0, 2 << shift, 1 << max(0, shift - 13))
        ones = torch.ones((2, z.numel()), dtype=torch.int64)
        factor = kernels.exponential(z, None, ones, coarse, fine, shift, _COARSE + _FINE - 16)
        t = (1 << shift) - (z & ((1 << shift) - 1))
        expected = torch.exp(t.to(torch.float64) * 2.0**-fraction) * 2.0**16
        assert bool((factor > 0).all())
        torch.testing.assert_close(factor.to(torch.float64), expected, rtol=2.0**-17, atol=1.0)


def test_exponential_error_is_as_declared() -> None:
    """Over all of [0, 16), and many times at 0, where the result, and so the error, is largest."""
    p = tp.Exponential((1 << 19,), 21, 20, 16, 40, 16)
    x = torch.arange(1 << 19) * 2
    x[: 1 << 17] = 0
    result = opened_numbers(x.numpy().astype(object), 21, p).value().to(torch.float64) * 2.0**-56
    error = (result - torch.exp(-x.to(torch.float64) * 2.0**-16)).abs()
    assert exponential_bound(p) / 2 < float(error.max()) <= exponential_bound(p)


@pytest.mark.parametrize(
    "fields",
    [
        (22, 21, 16, 40, 16),  # intervals of 32
        (64, 59, 55, 40, 16),  # whose tables would take all memory
        (24, 23, 19, 40, 16),
        (1, 0, 0, 40, 16),
        (21, 20, -1, 40, 16),
        (21, 20, 21, 40, 16),
        (20, 20, 16, 40, 16),  # no digit
        (22, 19, 16, 40, 16),  # two intervals of 8 are too few to clip behind
        (20, 19, 16, 41, 16),
        (20, 19, 16, 0, 16),
        (20, 19, 16, -70, 16),
        (20, 19, 16, 40, 21),
        (20, 19, 16, 40, 0),
        (20, 19, 16, 40, 5000),
    ],
)
def test_exponential_refuses_absurd_sizes(fields: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"intervals of|ring .*, scales "):
        tp.Exponential((1,), *fields).validate()


def test_exponential_is_zero_behind_its_clip() -> None:
    """Above two intervals the result is no small number but 0, whatever the mask is; up to e^-10 it is not 0."""
    rng, shift, ring = np.random.default_rng(5), 12, 18
    x = np.concatenate([np.arange(0, 1 << shift, 7), np.arange(2 << shift, (1 << ring) - (1 << shift), 31)])
    circuit = [
        Instruction(shared("x", x.shape, ring, words(rng, x.shape))),
        Instruction(tp.Open(x.shape, ring), (0,)),
        Instruction(tp.DigitIn(x.shape, ring, shift, 2), (1,)),
        Instruction(tp.OpenBits(x.shape, 1), (2,)),
        Instruction(tp.Exponential(x.shape, ring, shift, shift - 4, 40, 16), (3, 1)),
    ]
    result = run_circuit(circuit, {"x": tensor(x.astype(object))}).value()
    assert (result[torch.from_numpy(x < 10 << (shift - 4))] > 0).all()
    assert (result[torch.from_numpy(x >= 2 << shift)] == 0).all()


@pytest.mark.parametrize(("root", "degree"), [(root, degree) for root, known in WIDEST.items() for degree in known])
def test_tables_are_as_accurate_as_declared(root: int, degree: int) -> None:
    """Rows as wide as allowed, with ``low`` at every place of its row: the fit's error and that of all T_j together.

    Rows wider by a quarter are not, so the bound says what it is.
    """
    shift, ring = 20, 24
    ends = torch.logspace(0, 18, 200, base=2, dtype=torch.float64).round()
    start = torch.cat([torch.linspace(0, (1 << shift) - 1, 1500, dtype=torch.float64).round(), ends, 2.0**shift - ends])
    for stretch, kept in ((1.0, True), (1.25, False)):
        low = math.ceil((1 << shift) / (stretch * WIDEST[root][degree]))
        p = tp.Tabulated((1,), ring, shift, degree, root, low, (15 << shift) - 1, low ** (1 / root), TABLE_BITS, 64)
        p = replace(p, shape=(len(start),), scale=2.0**40 * p.scale)
        r = start.to(torch.int64) - low
        rows = p.deal({}, (r,), ServerWeights({}))[0]["rows"]  # the row of zero as its digit holds ``low``
        c = rows[:, 0].T.to(torch.float64) * 2.0**-40
        t = start[:, None] + (2.0**shift - 1 - start)[:, None] * torch.linspace(0, 1, 80, dtype=torch.float64) ** 2
        exact = (1 + (t - start[:, None]) / low) ** (-1 / root)
        fit = torch.from_numpy(chebval(2.0 ** (1 - shift) * t.numpy() - 1, c[..., None].numpy(), tensor=False))
        rounding = 1.04 * 2.0 ** -(TABLE_BITS + 1) * c[1:].abs().sum(0)
        error = float((((fit - exact).abs() + rounding[:, None]) / exact).max())
        assert (error <= ACCURACY) == kept, error / ACCURACY


@pytest.mark.parametrize("root", [1, 2])
def test_tables_over_their_range(root: int) -> None:
    """Values close to ``low``, which lies at any place of its row; others; and values in the last row."""
    n, shift, ring, degree = 1 << 14, 20, 24, 8
    low, high = math.ceil((1 << shift) / WIDEST[root][degree]), (1 << ring) - (1 << shift) - 1
    p = tp.Tabulated((n,), ring, shift, degree, root, low, high, 2.0**40 * low ** (1 / root), TABLE_BITS, 64)
    share = np.random.default_rng(root).random(n)
    x = (low + share**4 * (high - low)).astype(np.int64).astype(object)
    x[: n // 3], x[-n // 8 :] = low, high
    result = integers(opened_numbers(x, ring, p).value(), signed=True).astype(np.float64) * 2.0**-TABLE_BITS
    assert float(abs(result / (p.scale * x.astype(np.float64) ** (-1 / root)) - 1).max()) <= ACCURACY


def test_rows_that_do_not_hold_the_end_of_the_range_keep_the_formula() -> None:
    """1 / T_n(1 + 2 low / width), whatever the degree; a hundredth more for the rounding of T_j."""
    for root in (1, 2):
        for degree in range(1, 17):
            p = tp.Tabulated(
                (4096,), 22, 20, degree, root, 1 << 20, (3 << 20) - 1, 2.0**28 * (1 << 20) ** (1 / root), 30, 64
            )
            r = torch.arange(4096) * 1021 + 1
            x = torch.full((4096,), 1 << 20)
            x += (-(x + r)) % (1 << 20)  # the start of the first row above the lowest
            rows = p.deal({}, (r,), ServerWeights({}))[0]["rows"]
            for t in (0, 1 << 17, 1 << 19, (1 << 20) - 1):
                value = finished(p, rows, (x + t + r) % (1 << 22))
                exact = p.scale * (x + t).to(torch.float64) ** (-1 / root)
                error = float((value.to(torch.float64) * 2.0**-30 / exact - 1).abs().max())
                assert error <= 1.01 / math.cosh((degree + 1) * math.acosh(3.0)) + 1e-7


def finished(p: Protocol, rows: Tensor, z: Tensor) -> Tensor:
    """What a protocol without messages gives a party that holds all of its material."""
    with pytest.raises(StopIteration) as end:
        next(p.run(0, {"rows": rows}, (Opening(z, z),), ServerWeights({})))
    value: Tensor = end.value.value
    return value


def test_polynomials_of_tables_are_integers_that_every_machine_has() -> None:
    p = tp.Tabulated((1,), 14, 10, 16, 1, 1 << 10, 1 << 13, 2.0**30, 16, 64)
    t = torch.arange(1 << 10)
    found = intervals.chebyshev(t, p.shift, p.degree, 30, p.public)
    assert found.dtype == torch.int64
    exact = [[Fraction(1)] * 1024, [Fraction(2 * int(v), 1024) - 1 for v in t]]
    for _ in range(15):
        exact.append([2 * u * b - a for u, a, b in zip(exact[1], exact[-2], exact[-1], strict=True)])
    for row, values in zip(found.T.tolist(), exact, strict=True):
        assert all(abs(a - b * 65536) <= Fraction(52, 100) for a, b in zip(row, values, strict=True))


@settings(max_examples=300, deadline=None)
@given(root=st.integers(1, 2), low=st.integers(1, 1 << 30), ratio=st.floats(1.0, 3000.0))
def test_the_smallest_table_is_fit_and_accurate(root: int, low: int, ratio: float) -> None:
    high = max(low + 1, int(low * ratio))
    if low < root % 2 + 1 or ratio > 100:
        with contextlib.suppress(ValueError):
            smallest(root, low, high)
        return
    ring, shift, degree = smallest(root, low, high)
    tp.Tabulated((1,), ring, shift, degree, root, low, high, 1.0, TABLE_BITS, 64).validate()
    assert (1 << shift) <= WIDEST[root][degree] * low


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shift": 0}, "rows of"),
        ({"shift": 31, "ring": 36}, "rows of"),
        ({"ring": 20}, "rows of"),
        ({"ring": 53}, "rows of"),
        ({"ring": 30}, "coefficients"),
        ({"low": 0}, r"\[0, "),
        ({"low": -5}, r"\[-5, "),
        ({"high": 1 << 19}, "524288]"),
        ({"high": (1 << 24) - (1 << 20)}, "in a ring of 24"),
        ({"public": 0}, "public"),
        ({"public": 31}, "public"),
        ({"scale": 0.0}, "results do not fit"),
        ({"scale": -1.0}, "results do not fit"),
        ({"scale": 1e300}, "results do not fit"),
        ({"wide": 16}, "results do not fit"),
    ],
)
def test_tables_of_absurd_sizes_are_refused(changed: dict[str, Any], message: str) -> None:
    good = tp.Tabulated((1,), 24, 20, 7, 2, 1 << 19, 1 << 23, 2.0**30, TABLE_BITS, 64)
    good.validate()
    assert ((good.degree + 1) << 9) <= ROWS < ((good.degree + 1) << 10)
    with pytest.raises(ValueError, match=message):
        replace(good, **changed).validate()


def test_masks_of_narrow_tests_are_words() -> None:
    """The helpers themselves: residues survive the way to tensors and back."""
    x = np.array([-(2**63), 2**63 - 1, -1, 0, 2**64 - 1, 2**64], dtype=object)
    assert (integers(tensor(x)) == x % 2**64).all()
    assert (centred(x, 8) == np.array([0, -1, -1, 0, -1, 0], dtype=object)).all()
