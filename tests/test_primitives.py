"""Primitives as records: a new one is a record in lowering and one in each compiler, and nothing else."""

from __future__ import annotations

import pytest
import torch

from protocols import local
from secure.errors import UnsupportedOperation
from secure.lowering.primitives import PRIMITIVES, Meaning
from secure.lowering.ranges import Ranges
from secure.lowering.trace import Symbol, Trace
from secure.mpc import arithmetic
from secure.mpc.emit import RULES, Emission
from tests.helpers import run_function

TRIPLE = Meaning("triple", lambda p, w, x: 3 * x[0], lambda p, x, reach: (3 * x[0].low, 3 * x[0].high))
ON_SHARES = Emission(
    arithmetic.local_needs,
    keeps_scale=True,
    emit=lambda e, i, p: arithmetic.emit_local(e, i, p, lambda p, ring, _: local.MulConstant(p.shape, ring, 3)),
)


def triple(x: Symbol) -> Symbol:
    return x.trace.record("triple", (x,), x.shape)


def test_every_primitive_is_computed_on_shares() -> None:
    assert set(RULES) == set(PRIMITIVES)


def test_a_primitive_of_ones_own_is_two_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIMITIVES, "triple", TRIPLE)
    monkeypatch.setitem(RULES, "triple", ON_SHARES)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    run = run_function(lambda x: triple(x) * x, x)
    assert torch.equal(run.floating, 3 * x * x)
    assert float((run.result - 3 * x * x).abs().max()) < 1e-3


def test_its_range_is_assumed_where_nothing_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIMITIVES, "triple", TRIPLE)
    trace = Trace()
    out = triple(trace.input("x", (2,)))
    assert Ranges.assume(trace, 5.0).seen(out.id) == (-15.0, 15.0)


def test_a_primitive_that_nobody_knows_is_refused_by_name() -> None:
    trace = Trace()
    with (
        trace.within("layer.0"),
        pytest.raises(UnsupportedOperation, match=r"layer\.0: no record .* 'triple' computes\nhint: add"),
    ):
        triple(trace.input("x", (2,)))


def test_a_primitive_that_shares_cannot_compute_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIMITIVES, "triple", TRIPLE)
    with pytest.raises(UnsupportedOperation, match=r"no record says how shares compute the primitive 'triple'\nhint:"):
        run_function(triple, torch.ones(2))
