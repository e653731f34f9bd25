"""The sums of Power-Softmax for training: block by block, forward and back, and no matrix of scores is kept.

Attention with the matrices of all scores is bound by memory: each step of a power and of its derivative reads and
writes all of them. Here a block of rows stays in the cache for all its steps, ends at the last key that any of its rows
sees, and is computed anew on the way back, as FlashAttention does (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS, SCORES = 64, 1 << 17  # the most in a block on a processor, whose cache is small; rows are of each head


class PowerSums(NamedTuple):
    """The sums of each row's weighed powers: sum_j w_j x_j^p v_j (B, H, T, d) and sum_j w_j x_j^p (B, H, T, 1).

    largest: the base by which each x_j of its row was divided, (B, H, T, 1); ones if none was.
    """

    numerator: Tensor
    total: Tensor
    largest: Tensor


def power_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    p: int,
    shift: float = 0.0,
    scale: float = 1.0,
    *,
    stable: bool = False,
) -> PowerSums:
    """Return the sums of x^p for the scores s = scale q k, where x is 1 + s / shift, or s without a shift; p is even.

    query: (B, H, T, d); key, value: (B, H, L, d). weights: (B, 1, 1 or T, L), zero where masked; None for 1 / L.
    stable: divide x by the largest magnitude of its row, which no gradient goes through: it changes a quotient of the
    sums in nothing but how large a power may be. Powers are computed in 32 bits if the tensors have fewer.
    """
    if weights is None:
        weights = query.new_full((1, 1, 1, key.shape[-2]), 1.0 / key.shape[-2])
    weights = weights.expand(query.shape[0], 1, query.shape[-2], key.shape[-2])
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Sums.apply
    return PowerSums(*apply(query, key, value, weights, p, scale / (shift or 1.0), 1.0 if shift else 0.0, stable))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weights: Tensor,
        p: int,
        factor: float,
        one: float,
        stable: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (_whole(x) for x in (query, key, value))
        weights = weights.to(query.dtype)
        numerator = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        total = torch.empty((*query.shape[:-1], 1), dtype=query.dtype, device=query.device)
        largest = torch.ones_like(total)
        for at, seen in _blocks(weights, query.shape[1]):
            x = _bases(query[at], key[at[0], :, :seen], factor, one)
            if stable:
                largest[at] = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).clamp_min(1e-6)
                x /= largest[at]
            powers = _power(x, p).mul_(weights[at][..., :seen])
            torch.sum(powers, -1, keepdim=True, out=total[at])
            numerator[at] = (powers @ value[at[0], :, :seen]).to(x.dtype)
        ctx.mark_non_differentiable(largest)
        ctx.save_for_backward(query, key, value, weights, largest)
        ctx.form = p, factor, one, stable
        kind = query.device.type  # the way back is not within the context that chose the type of products
        ctx.mixed = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        return numerator, total, largest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, largest = ctx.saved_tensors
        p, factor, one, stable = ctx.form
        of_numerator, of_total = grads[:2]
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        with torch.autocast(query.device.type, **ctx.mixed):
            for at, seen in _blocks(weights, query.shape[1]):
                keys = at[0], slice(None), slice(seen)
                x = _bases(query[at], key[keys], factor, one)
                if stable:
                    x /= largest[at]
                below = _power(x, p - 2).mul_(x).mul_(weights[at][..., :seen])  # w x^(p-1)
                of_scores = (of_numerator[at] @ value[keys].transpose(-1, -2)).to(x.dtype).add_(of_total[at])
                of_scores.mul_(below).mul_((p * factor) / largest[at] if stable else p * factor)
                of_value[keys] += below.mul_(x).transpose(-1, -2) @ of_numerator[at]
                of_query[at] = (of_scores @ key[keys]).to(x.dtype)
                of_key[keys] += of_scores.transpose(-1, -2) @ query[at]
        return of_query, of_key, of_value, None, None, None, None, None


def _whole(x: Tensor) -> Tensor:
    """Return a tensor with at least the precision of 32 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(weights: Tensor, heads: int) -> Iterator[tuple[tuple[slice, slice, slice], int]]:
    """Yield the places of each block, as slices of batch, heads and rows, and how many keys its rows see at most.

    weights: (B, 1, T, L).
    """
    batch, _, rows, keys = weights.shape
    if weights.device.type != "cpu":  # such devices want all at once
        yield (slice(None), slice(None), slice(None)), keys
        return
    places = torch.arange(1, keys + 1)
    last = ((weights[:, 0] != 0) * places).amax(-1)  # (B, T)
    for start in range(0, rows, ROWS):
        ends = last[:, start : start + ROWS].amax(-1).tolist()
        together = max(1, SCORES // (heads * min(ROWS, rows) * keys))
        for of in range(0, batch, together):
            seen = max(1, *ends[of : of + together])
            yield (slice(of, of + together), slice(None), slice(start, start + ROWS)), seen


def _bases(query: Tensor, key: Tensor, factor: float, one: float) -> Tensor:
    """Return one + factor q k for some rows and keys."""
    return (query * factor @ key.transpose(-1, -2)).to(query.dtype).add_(one)


def _power(x: Tensor, p: int) -> Tensor:
    """Return x^p for even p, as a tensor of its own."""
    if p == 0:
        return torch.ones_like(x)
    square = x * x
    if p % 4:
        return square.mul_(_power(x, p - 2)) if p > 2 else square
    half = _power(x, p // 2) if p > 4 else square
    return half.mul_(half)
