"""LayerNorm, RMSNorm and L2 normalization, computed without divisions by n, because they are scale-invariant.

With d = n x - sum(x), LayerNorm is d sqrt(n) / sqrt(sum d^2): the mean is never rounded, and the power of two that
scales d back costs nothing (PUMA section 4.5 likewise takes the sum of squares and one inverse square root).

Each has two factors before its weight and bias: rows, and a column with one number a row. ``*_factors`` returns them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from approximations.division import rsqrt
from approximations.powers import power
from approximations.primitives import Value


def layer_norm(x: Value, weight: Value, bias: Value, eps: float, low: float, high: float) -> Value:
    """Return LayerNorm over the last dimension. low, high: the range of the variance."""
    d, scale = layer_norm_factors(x, eps, low, high)
    return d * scale * weight + bias


def layer_norm_factors(x: Value, eps: float, low: float, high: float) -> tuple[Value, Value]:
    """Return the factors of LayerNorm. low, high: the range of the variance."""
    n = x.shape[-1]
    shrink = 2.0 ** -math.ceil(math.log2(n))
    d = (x * float(n) - x.sum(-1, keepdim=True)) * shrink  # (n shrink)(x - mean), n shrink in (1/2, 1]
    unit = n * (n * shrink) ** 2  # sum d^2 = unit * variance
    return d, rsqrt(
        d.square().sum(-1, keepdim=True) + unit * eps, unit * (low + eps), unit * (high + eps), math.sqrt(n)
    )


def polynomial_layer_norm(
    x: Value,
    weight: Value,
    bias: Value,
    eps: float,
    low: float,
    high: float,
    degree: int,
    steps: int,
    power: Callable[..., Value] = power,
) -> Value:
    """Return LayerNorm without comparisons: ``power`` computes the inverse square root on the range of the variance.

    low, high: that range. degree, steps: those of ``power``, which may be another way to compute the same.
    """
    d, scale = polynomial_layer_norm_factors(x, eps, low, high, degree, steps, power)
    return d * scale * weight + bias


def polynomial_layer_norm_factors(
    x: Value, eps: float, low: float, high: float, degree: int, steps: int, power: Callable[..., Value] = power
) -> tuple[Value, Value]:
    """Return the factors of ``polynomial_layer_norm``."""
    n = x.shape[-1]
    shrink = 2.0 ** -math.ceil(math.log2(n))
    d = (x * float(n) - x.sum(-1, keepdim=True)) * shrink
    unit = n * (n * shrink) ** 2
    halves = round(math.log2(unit * math.sqrt((low + eps) * (high + eps))))  # scales the root's argument to about one
    total = (d.square().sum(-1, keepdim=True) + unit * eps) * 2.0**-halves
    unit *= 2.0**-halves
    return d, power(
        total, -0.5, unit * (low + eps), unit * (high + eps), degree, steps, math.sqrt(n) * 2 ** (-halves / 2)
    )


def rms_norm(x: Value, weight: Value, eps: float, low: float, high: float) -> Value:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension. low, high: the range of the mean square."""
    rows, scale = rms_norm_factors(x, eps, low, high)
    return rows * scale * weight


def rms_norm_factors(x: Value, eps: float, low: float, high: float) -> tuple[Value, Value]:
    """Return the factors of RMSNorm. low, high: the range of the mean square."""
    n = x.shape[-1]
    squares = x.square().sum(-1, keepdim=True)
    return x, rsqrt(squares + n * eps, n * (low + eps), n * (high + eps), math.sqrt(n))


def polynomial_rms_norm(
    x: Value,
    weight: Value,
    eps: float,
    low: float,
    high: float,
    degree: int,
    steps: int,
    power: Callable[..., Value] = power,
) -> Value:
    """Return RMSNorm without comparisons, as ``polynomial_layer_norm``. low, high: the range of the mean square."""
    rows, scale = polynomial_rms_norm_factors(x, eps, low, high, degree, steps, power)
    return rows * scale * weight


def polynomial_rms_norm_factors(
    x: Value, eps: float, low: float, high: float, degree: int, steps: int, power: Callable[..., Value] = power
) -> tuple[Value, Value]:
    """Return the factors of ``polynomial_rms_norm``."""
    n = x.shape[-1]
    halves = round(math.log2(n * math.sqrt((low + eps) * (high + eps))))  # scales the root's argument to about one
    unit = n * 2.0**-halves
    total = (x.square().sum(-1, keepdim=True) + n * eps) * 2.0**-halves
    return x, power(
        total, -0.5, unit * (low + eps), unit * (high + eps), degree, steps, math.sqrt(n) * 2 ** (-halves / 2)
    )


def l2_normalize(x: Value, low: float, high: float) -> Value:
    """Return x / |x| over the last dimension. low, high: the range of |x|^2."""
    return x * rsqrt(x.square().sum(-1, keepdim=True), low, high)
