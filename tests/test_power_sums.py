"""The sums of Power-Softmax, block by block: the same as with whole matrices, forward and back."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from approximations import power_blocks, power_sums
from approximations.power_blocks import ROWS, PowerSums

EPS = 0.1


def plain(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None, p: int, shift: float, scale: float
) -> Tensor:
    """Power-Softmax from whole matrices."""
    x = query @ key.transpose(-1, -2) * scale
    powers = (1 + x / shift if shift else x) ** p
    powers = powers * weights if weights is not None else powers / key.shape[-2]
    return (powers @ value) / (powers.sum(-1, keepdim=True) + EPS)


def quotient(sums: PowerSums, p: int) -> Tensor:
    return sums.numerator / (sums.total + EPS * sums.largest**-p)


def tensors(rows: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, 3, rows, 4), (2, 3, keys, 4), (2, 3, keys, 5)
    query, key, value = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return query, key, value


def causal(rows: int, keys: int, padding: int) -> Tensor:
    """The weights of a causal mask, with padding before the second text: (2, 1, rows, keys)."""
    seen = torch.ones(2, 1, rows, keys, dtype=torch.float64).tril(keys - rows)
    seen[1, ..., :padding] = 0
    return seen / seen.sum(-1, keepdim=True).clamp_min(1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2 * ROWS + 5),
    st.integers(0, 40),
    st.integers(0, 30),
    st.sampled_from([2, 4, 6, 8]),
    st.sampled_from([0.0, 4.0]),
    st.booleans(),
    st.sampled_from([1, power_blocks.SCORES]),
    st.integers(0, 1 << 30),
)
def test_sums_and_gradients_are_those_of_whole_matrices(
    rows: int, more: int, padding: int, p: int, shift: float, stable: bool, scores: int, seed: int
) -> None:
    """Whether a block has rows of one text or of all."""
    torch.manual_seed(seed)
    given_ = tensors(rows, rows + more)
    weights = causal(rows, rows + more, min(padding, rows + more - 1))
    wanted = plain(*given_, weights, p, shift, 0.5)
    upwards = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, given_, upwards)
    with patch.object(power_blocks, "SCORES", scores):
        found = quotient(power_sums(*given_, weights, p, shift, 0.5, stable=stable), p)
        ours_ = torch.autograd.grad(found, given_, upwards)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(ours_, gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9 * float(theirs.abs().max().clamp_min(1)))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 0.5, 0, 0, 0], dtype=torch.float64).view(1, 1, 1, 5)])
def test_weights_of_all_rows_and_none(weights: Tensor | None) -> None:
    torch.manual_seed(0)
    given_ = tensors(7, 5)
    found = quotient(power_sums(*given_, weights, 4, 4.0), 4)
    assert torch.allclose(found, plain(*given_, weights, 4, 4.0, 1.0), rtol=1e-9)


def test_a_masked_key_that_is_not_finite_in_its_block_has_no_part() -> None:
    """Keys after the last that a block sees are not touched."""
    torch.manual_seed(0)
    query, key, value = tensors(ROWS, 2 * ROWS)
    weights = torch.zeros(2, 1, 1, 2 * ROWS, dtype=torch.float64)
    weights[..., :ROWS] = 1 / ROWS
    wanted = plain(query, key, value, weights, 4, 4.0, 1.0)
    with torch.no_grad():
        key[..., ROWS:, :], value[..., ROWS:, :] = torch.inf, torch.nan
    assert torch.allclose(quotient(power_sums(query, key, value, weights, 4, 4.0), 4), wanted, rtol=1e-9)


def test_powers_are_computed_in_32_bits_where_products_are_not() -> None:
    torch.manual_seed(0)
    given_ = tensors(40, 40, torch.float32)
    weights = causal(40, 40, 3).float()
    wanted = plain(*given_, weights, 4, 4.0, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        sums = power_sums(*given_, weights, 4, 4.0, 0.5, stable=True)
        assert sums.numerator.dtype == sums.total.dtype == torch.float32
        found = quotient(sums, 4)
    assert torch.allclose(found, wanted, atol=0.05 * float(wanted.detach().abs().max()))
    gradients = [torch.autograd.grad(x.square().sum(), given_, retain_graph=True) for x in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05
    with torch.no_grad():
        query, key, value = (x.bfloat16() for x in given_)
        lower = power_sums(query, key, value, weights, 4, 4.0, 0.5)
    assert lower.numerator.dtype == torch.float32


class Products(TorchDispatchMode):
    """Notes the types of matrices that are multiplied."""

    types: set[torch.dtype]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            self.types |= {x.dtype for x in args}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_on_the_way_back_have_the_type_of_those_there(dtype: torch.dtype) -> None:
    """The way back is not within the context that chose it."""
    torch.manual_seed(0)
    given_ = tensors(40, 40, torch.float32)
    with torch.autocast("cpu", dtype):
        sums = power_sums(*given_, None, 4, 4.0, 0.5)
    products = Products()  # type: ignore[no-untyped-call]
    products.types = set()
    with products:
        torch.autograd.grad(sums.numerator.sum() + sums.total.sum(), given_)
    assert products.types == {dtype}


def test_no_matrix_of_scores_is_kept() -> None:
    torch.manual_seed(0)
    query, key, value = tensors(4 * ROWS, 4 * ROWS)
    sizes: list[int] = []

    def keep(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        power_sums(query, key, value, None, 4, 4.0)
    assert max(sizes) <= max(value.numel(), 2 * (4 * ROWS) ** 2)
