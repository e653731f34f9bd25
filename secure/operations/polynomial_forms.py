"""Translation rules for the operations of ``secure.operations``; see `secure.capture.rules`."""

from __future__ import annotations

from collections.abc import Sequence

from secure.capture.builder import Builder, Value
from secure.capture.rules import RULES


def polynomial(b: Builder, x: Value, coefficients: Sequence[float], centre: float) -> Value:
    """A polynomial with public coefficients."""
    return b.shared("polynomial", x, coefficients=list(coefficients), centre=centre)


def power(b: Builder, x: Value, exponent: float, low: float, high: float, degree: int, steps: int) -> Value:
    """An inverse power by polynomials."""
    return b.shared("power", x, exponent=exponent, low=low, high=high, degree=degree, steps=steps)


def layer_norm(
    b: Builder, x: Value, weight: Value, bias: Value, eps: float, low: float, high: float, degree: int, steps: int
) -> Value:
    """Layer normalization by polynomials."""
    return b.shared("polynomial_norm", x, weight, bias, eps=eps, low=low, high=high, degree=degree, steps=steps)


RULES |= {
    "unseen.polynomial.default": polynomial,
    "unseen.power.default": power,
    "unseen.layer_norm.default": layer_norm,
}
