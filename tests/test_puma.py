"""PUMA's approximations beside ours: the published formulas, their errors, and both names in whole models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secure
from approximations import APPROXIMATIONS, attend, choose, puma, rms_norm
from approximations.softmax import CLIP
from secure import insecure_in_process, plain_reference
from secure.cost.count import profile
from secure.cost.outline import outline
from secure.lowering.trace import Trace, WeightRef, evaluate
from tests.helpers import run_function

GRID = torch.linspace(-30, 30, 600_001, dtype=torch.float64)


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# the published formulas, written out once more


def published_gelu(x: Tensor) -> Tensor:
    """Equations 2 and 3."""
    f0 = -0.011034134030615728 * x**3 - 0.11807612951181953 * x**2 - 0.42226581151983866 * x - 0.5054031199708174
    f1 = (
        0.0018067462606141187 * x**6
        - 0.037688200365904236 * x**4
        + 0.3603292692789629 * x**2
        + 0.5 * x
        + 0.008526321541038084
    )
    inner = torch.where(x < -1.95, f0, f1)
    return torch.where(x < -4, 0.0, torch.where(x < 3, inner, x))


def published_silu(x: Tensor) -> Tensor:
    f0 = -0.0055465625580307 * x**2 - 0.0819767021525476 * x - 0.3067541139982155
    f1 = 0.0002743776353465 * x**6 - 0.011113046708173 * x**4 + 0.2281430841728270 * x**2 + 0.5 * x + 0.0085064025895951
    inner = torch.where(x < -4, f0, f1)
    return torch.where(x < -8, 0.0, torch.where(x < 4, inner, x))


def published_softmax(x: Tensor) -> Tensor:
    """Equations 4 and 5, with the clip before the sum."""
    shifted = x - x.amax(-1, keepdim=True) - 1e-6
    e = torch.where(shifted < -14, 0.0, (1 + shifted / 2**5) ** (2**5))
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "published", "exact", "error", "worst"),
    [
        (puma.gelu, published_gelu, F.gelu, 0.0199, 3.0),
        (puma.silu, published_silu, F.silu, 0.0719, 4.0),
    ],
)
def test_activations_are_the_published_ones(
    function: Callable[..., Any], published: Any, exact: Any, error: float, worst: float
) -> None:
    assert largest(function(GRID) - published(GRID)) <= 1e-12
    difference = (function(GRID) - exact(GRID)).abs()
    assert float(difference.max()) == pytest.approx(error, abs=1e-4)
    assert float(GRID[difference.argmax()]) == pytest.approx(worst, abs=1e-3)


def test_exponential_is_the_published_one() -> None:
    y = torch.linspace(0, 14, 140_001, dtype=torch.float64)[:-1]
    assert largest(puma.exp_neg(y) - (1 - y / 32) ** 32) <= 1e-12
    difference = (puma.exp_neg(y) - torch.exp(-y)).abs()
    assert float(difference.max()) == pytest.approx(8.5e-3, abs=1e-4)
    assert float(y[difference.argmax()]) == pytest.approx(2, abs=0.05)
    assert largest(puma.exp_neg(torch.tensor([14.0, 30.0, 70.0, 100.0, 1e4], dtype=torch.float64))) == 0


@given(
    st.lists(
        st.lists(st.floats(-150, 150), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_softmax_is_the_published_one(rows: list[list[float]]) -> None:
    x = torch.tensor(rows, dtype=torch.float64)
    assert largest(puma.softmax(x) - published_softmax(x)) <= 3e-5  # the reciprocal is ours
    values = normal(5, 3)
    assert largest(puma.attend(x, values) - published_softmax(x) @ values) <= 3e-4
    assert largest(puma.softmax(x) - torch.softmax(x, -1)) <= 0.02


@given(st.integers(2, 40), st.floats(0.1, 8), st.floats(-3, 3), st.integers(0, 99))
def test_norms_are_the_published_ones(width: int, scale: float, shift: float, seed: int) -> None:
    x, w, b = normal(6, width, seed=seed) * scale + shift, normal(width, seed=1), normal(width, seed=2)
    variance, square = x.var(-1, unbiased=False), x.square().mean(-1)
    found = puma.layer_norm(x, w, b, 1e-5, float(variance.min()) * 0.9, float(variance.max()) * 1.1)
    assert largest(found - F.layer_norm(x, (width,), w, b, 1e-5)) <= 1e-4 * math.sqrt(width)
    found = rms_norm(x, w, 1e-5, float(square.min()) * 0.9, float(square.max()) * 1.1)
    assert largest(found - F.rms_norm(x, (width,), w, 1e-5)) <= 1e-4 * math.sqrt(width)


# under the protocol


def test_activations_under_the_protocol() -> None:
    x = torch.cat([torch.linspace(-9, 9, 4001, dtype=torch.float64), normal(96) * 3])
    near = (x[:, None] - torch.tensor([-8.0, -4.0, -1.95, 3.0, 4.0])).abs().amin(-1) < 2**-7
    for function in (puma.gelu, puma.silu):  # sixth powers leave few bits of x; at their knots they jump
        run = run_function(function, x)
        assert largest((run.result - run.floating)[~near]) <= 3e-2


def test_exponential_under_the_protocol() -> None:
    y = torch.cat([torch.linspace(0, 20, 4001, dtype=torch.float64), torch.tensor([70.0, 100.0])])
    run = run_function(puma.exp_neg, y)
    assert largest(run.result - puma.exp_neg(y)) <= 2e-4
    assert largest(run.result[y > 14]) <= 2**-15


@pytest.mark.parametrize("away", [15.0, 31.0, 33.0, 64.0, 70.0, 100.0, 1e4])
def test_what_is_far_below_the_maximum_stays_out(away: float) -> None:
    """(1 - 70/32)^32 is 244 and (1 - 100/32)^32 3e10: clipped after the division they would fill the row sum."""
    x = torch.tensor([[0.0, -1.0, -2.0, -away], [-away, -away, -away, 0.0], [3.0, 3.0, -away, -away]]).double()
    expected = published_softmax(x)
    assert largest(expected - torch.softmax(x, -1)) <= 0.02
    run = run_function(puma.softmax, x)
    assert largest(run.result - expected) <= 4e-4
    assert largest(run.result[x <= 3 - away]) <= 2**-14
    values = normal(4, 2)
    assert largest(run_function(puma.attend, x, values).result - expected @ values) <= 2e-3


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 33), st.floats(0.1, 60), st.integers(0, 99))
def test_softmax_under_the_protocol(length: int, scale: float, seed: int) -> None:
    x = normal(5, length, seed=seed) * scale
    run = run_function(puma.softmax, x)
    assert largest(run.result - published_softmax(x)) <= 5e-4
    assert largest(run.result.sum(-1) - 1) <= 5e-4 + 2**-16 * length


@pytest.mark.parametrize("width", [2, 7, 48])
def test_norms_under_the_protocol(width: int) -> None:
    x, w, b = normal(20, width) * 2 + 1.5, normal(width, seed=1), normal(width, seed=2)
    weights, refs = {"w": w, "b": b}, (WeightRef("w", (width,)), WeightRef("b", (width,)))
    variance, square = x.var(-1, unbiased=False), x.square().mean(-1)
    low, high = float(variance.min()) * 0.5, float(variance.max()) * 2
    run = run_function(lambda v: puma.layer_norm(v, *refs, 1e-5, low, high), x, weights=weights)
    assert largest(run.result - F.layer_norm(x, (width,), w, b, 1e-5)) <= 3e-3
    low, high = float(square.min()) * 0.5, float(square.max()) * 2
    run = run_function(lambda v: rms_norm(v, refs[0], 1e-5, low, high), x, weights=weights)
    assert largest(run.result - F.rms_norm(x, (width,), w, 1e-5)) <= 3e-3


# by name


class Block(nn.Module):
    """A layer of attention and a gated network: softmax, GeLU, SiLU, LayerNorm, both spellings of RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.gate, self.down = (nn.Linear(16, n) for n in (48, 24, 24, 16))
        self.down = nn.Linear(24, 16)
        self.first, self.second, self.weight = nn.LayerNorm(16), nn.RMSNorm(16, eps=1e-5), nn.Parameter(torch.ones(16))

    def rms(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32) if x.dtype != torch.float64 else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.second(x)
        out: Tensor = self.rms(x + self.down(F.silu(self.gate(h)) * F.gelu(self.up(h))))
        return out


def model() -> nn.Module:
    torch.manual_seed(3)
    block = Block().eval()
    with torch.no_grad():
        block.weight.uniform_(0.5, 1.5)
        block.second.weight.uniform_(0.5, 1.5)
    return block


def inputs(seed: int) -> dict[str, Tensor]:
    return {"x": normal(1, 6, 16, seed=seed).float()}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_a_transformer_under_both_names(name: str) -> None:
    block = model()
    compiled = secure.compile(block, inputs(0), calibration=[inputs(s) for s in range(1, 12)], approximations=name)
    labels = compiled.program.labels
    assert (labels["approximations"], labels["gelu"]) == (name, "cubic" if name == "default" else "puma")
    error, added = {"default": (3e-3, 3e-3), "puma": (5e-2, 1e-2)}[name]
    process = insecure_in_process(compiled)
    for seed in range(50, 53):
        expected = block(**inputs(seed)).detach().double()
        result = process.query(inputs(seed))
        report = process.reports[-1]
        assert largest(result - expected) <= error
        assert largest(result - plain_reference(compiled, inputs(seed))) <= added
        assert (report.rounds, report.traffic) == (compiled.cost.rounds, compiled.cost.traffic)
    outlined = outline(block, inputs(0), approximations=name)
    assert outlined.labels["approximations"] == name
    assert profile(outlined).products == profile(compiled.program).products
    assert outlined.cost.rounds >= compiled.program.cost.rounds - 4  # wider ranges take no fewer


def test_the_names_choose_different_programs() -> None:
    block, calibration = model(), [inputs(s) for s in range(1, 6)]
    found = {
        name: secure.compile(block, inputs(0), calibration=calibration, approximations=name).program
        for name in APPROXIMATIONS
    }
    assert found["default"].digest != found["puma"].digest
    exponentials = {name: sum(i.protocol.kind == "exponential" for i in p.circuit) for name, p in found.items()}
    assert exponentials == {"default": 1, "puma": 0}


@pytest.mark.parametrize("spelling", ["module", "by hand"])
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_rms_norms_before_a_linear_layer(spelling: str, name: str) -> None:
    """Their weight moves into it, and a row of zeros is one that the epsilon divides."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 8, bias=False), nn.RMSNorm(8, eps=1e-2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            by_hand = self.norm.weight * (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-2))
            out: Tensor = self.last(self.norm(h) if spelling == "module" else by_hand)
            return out

    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
    samples = [{"x": normal(3, 6, seed=s).float() * torch.tensor([[1.0], [1.0], [0.0]])} for s in range(6)]
    compiled = secure.compile(net, samples[0], calibration=samples[1:], approximations=name)
    for sample in samples:
        expected = net(**sample).detach().double()
        assert largest(insecure_in_process(compiled).query(sample) - expected) <= 2e-3
    kinds = [i.protocol.kind for i in compiled.program.circuit]
    assert kinds.count("linear") == 2  # none for the norm's weight


def test_an_unknown_name_is_refused() -> None:
    assert APPROXIMATIONS == ("default", "puma")
    said = r"unknown approximations 'bolt'\nhint: one of default, puma"
    with pytest.raises(ValueError, match=said):
        secure.compile(model(), inputs(0), approximations="bolt")
    with pytest.raises(ValueError, match=said):
        outline(model(), inputs(0), approximations="bolt")
    with pytest.raises(ValueError, match=r"unknown GeLU form 'exact'\nhint: one of cubic"):
        choose("puma", "exact")


def test_the_approximations_alone() -> None:
    """In floating point, by the trace: what is left of the error without fixed point."""
    x, values = normal(4, 7) * 3, normal(7, 5)
    for function, error in ((attend, 1e-4), (puma.attend, 0.05)):
        trace = Trace()
        out = function(trace.input("x", (4, 7)), trace.input("v", (7, 5)))
        (found,) = evaluate(trace, {"x": x, "v": values}, {}, outputs=[out.id])
        assert largest(found - torch.softmax(x, -1) @ values) <= error
    assert CLIP > -puma.T_EXP  # masks reach below the clip under either name
