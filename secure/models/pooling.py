"""Pooling: one vector from the hidden states of a text's tokens, as sentence-transformers does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Callable[[Tensor], Tensor]


def _mean(mask: Tensor) -> Tensor:
    return mask / mask.sum(-1, keepdim=True)


def _mean_sqrt(mask: Tensor) -> Tensor:
    return mask * torch.rsqrt(mask.sum(-1, keepdim=True))


def _weighted_mean(mask: Tensor) -> Tensor:
    return _mean(mask * torch.arange(1, mask.shape[-1] + 1, dtype=mask.dtype, device=mask.device))


def _last(mask: Tensor) -> Tensor:
    return mask - mask * F.pad(mask[:, 1:], (0, 1))  # the one token that no other follows


WEIGHTS: Mapping[str, Weights] = {
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""The poolings that are weighted sums: the weights (batch, length) follow from the mask, so a client computes them."""

POOLINGS = ("cls", "max", *WEIGHTS)


def pool(name: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """Return (batch, hidden) of hidden states (batch, length, hidden) and a mask of zeros behind ones, a float."""
    if name == "cls":
        return hidden[:, 0]
    if name == "max":  # the first token stands in for padding, which changes no maximum and widens no range
        first = hidden[:, :1]
        return (first + mask.unsqueeze(-1) * (hidden - first)).amax(1)
    return (WEIGHTS[name](mask).unsqueeze(1) @ hidden).squeeze(1)
