"""Operations that ``torch.export`` keeps whole, so that capture finds one node where plain code would leave many."""

from __future__ import annotations

import torch
from torch import Tensor

from approximations.norms import polynomial_layer_norm, polynomial_rms_norm
from approximations.powers import polynomial, power
from approximations.primitives import Piece


@torch.library.custom_op("unseen::polynomial", mutates_args=())
def polynomial_operation(x: Tensor, coefficients: list[float], centre: float, spare: int = 0) -> Tensor:
    """Compute sum_j coefficients[j] (x - centre)^j. spare: the fraction bits that its readers can do without."""
    return torch.as_tensor(polynomial(x, Piece(tuple(coefficients), centre))).clone()


@torch.library.custom_op("unseen::power", mutates_args=())
def power_operation(x: Tensor, exponent: float, low: float, high: float, degree: int, steps: int) -> Tensor:
    """Compute x^exponent on [low, high]; see ``approximations.power``."""
    return torch.as_tensor(power(x, exponent, low, high, degree, steps))


@torch.library.custom_op("unseen::layer_norm", mutates_args=())
def layer_norm_operation(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, low: float, high: float, degree: int, steps: int
) -> Tensor:
    """Normalize over the last axis; see ``approximations.polynomial_layer_norm``."""
    return torch.as_tensor(polynomial_layer_norm(x, weight, bias, eps, low, high, degree, steps))


@torch.library.custom_op("unseen::rms_norm", mutates_args=())
def rms_norm_operation(
    x: Tensor, weight: Tensor, eps: float, low: float, high: float, degree: int, steps: int
) -> Tensor:
    """Divide by the root of the mean square of the last axis; see ``approximations.polynomial_rms_norm``."""
    return torch.as_tensor(polynomial_rms_norm(x, weight, eps, low, high, degree, steps))


@polynomial_operation.register_fake
def _(x: Tensor, coefficients: list[float], centre: float, spare: int = 0) -> Tensor:
    return torch.empty_like(x)


@power_operation.register_fake
def _(x: Tensor, exponent: float, low: float, high: float, degree: int, steps: int) -> Tensor:
    return torch.empty_like(x)


@layer_norm_operation.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, low: float, high: float, degree: int, steps: int) -> Tensor:
    return torch.empty_like(x)


@rms_norm_operation.register_fake
def _(x: Tensor, weight: Tensor, eps: float, low: float, high: float, degree: int, steps: int) -> Tensor:
    return torch.empty_like(x)
