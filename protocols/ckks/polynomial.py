"""Polynomials of one ciphertext in as few levels as their degree d allows: ceil(log2(d + 1)).

They are evaluated in Chebyshev's basis, in which coefficients stay as small as the function. With h the largest power
of two below the number of coefficients, p = q T_h + r, by T_h T_j = (T_{h+j} + T_{|h-j|}) / 2. q and r are split in the
same way, so that T_h and q are ready at the same level. T_{2h} = 2 T_h^2 - 1 takes one addition more than a power does,
and no level more. (Source of the idea: Paterson and Stockmeyer.)
"""

from __future__ import annotations

from collections.abc import Sequence

from protocols.ckks.circuit import Circuit


def depth(degree: int) -> int:
    """Return the levels that ``evaluate`` takes for a degree; ``power`` takes one less for a power of two."""
    return degree.bit_length() if degree else 0


def evaluate(circuit: Circuit, x: int, coefficients: Sequence[float], scale: float = 1.0) -> int:
    """Add nodes for sum_j coefficients[j] T_j(scale * x), |scale * x| <= 1, and return the last.

    scale: at most one; a scale below one takes one level more. Raises ValueError for a constant polynomial.
    """
    c = [float(v) for v in coefficients]
    while c and not c[-1]:
        c.pop()
    if len(c) < 2:
        raise ValueError("a constant polynomial needs no ciphertext")
    basis = {1: circuit.dot([(x, scale)]) if scale < 1.0 - 1e-9 else x}
    h = 2
    while h < len(c):
        square = circuit.multiply(basis[h // 2], basis[h // 2])
        basis[h] = circuit.shift(circuit.add(square, square), -1.0)
        h *= 2
    return _evaluate(circuit, basis, c)


def _evaluate(circuit: Circuit, basis: dict[int, int], c: list[float]) -> int:
    if len(c) == 2:
        return circuit.shift(circuit.dot([(basis[1], c[1])]), c[0])
    h = 1 << ((len(c) - 1).bit_length() - 1)
    low, high = c[:h], [c[h], *(2 * v for v in c[h + 1 :])]
    for j in range(1, len(high)):  # T_{h+j} = 2 T_h T_j - T_{h-j}
        low[h - j] -= c[h + j]
    if len(high) == 1:
        top = circuit.dot([(basis[h], high[0])])
    else:
        top = circuit.multiply(basis[h], _evaluate(circuit, basis, high))
    while len(low) > 1 and not low[-1]:
        low.pop()
    if len(low) > 1:
        return circuit.add(top, _evaluate(circuit, basis, low))
    return circuit.shift(top, low[0])


def power(circuit: Circuit, x: int, exponent: int) -> int:
    """Add nodes for x^exponent by squarings, and return the last: log2(exponent) levels.

    exponent: a power of two, else ValueError.
    """
    if exponent < 1 or exponent & (exponent - 1):
        raise ValueError(f"squarings make powers of two, not {exponent}")
    while exponent > 1:
        x, exponent = circuit.multiply(x, x), exponent // 2
    return x
