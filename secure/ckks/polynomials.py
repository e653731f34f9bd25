"""Chains: parts of a traced model that are one polynomial of one value, and the degree of that polynomial.

A reciprocal, for instance, is traced as a polynomial, corrections and their products. On ciphertexts it is one
polynomial of the composed degree, whose depth is the logarithm of that degree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from secure.ckks import rules
from secure.ckks.rules import Chain
from secure.lowering.trace import Trace

DEGREE = 31  # largest degree to which chains are composed
MARGIN = 1.25  # room around the calibrated range of a polynomial's argument


@dataclass
class Range:
    """The calibrated range of a value, empty at first."""

    low: float = np.inf
    high: float = -np.inf

    @property
    def centre(self) -> float:
        return (self.low + self.high) / 2

    @property
    def half(self) -> float:
        """Half the width of the range, with MARGIN of room."""
        return max((self.high - self.low) / 2, 1e-9) * MARGIN

    @property
    def magnitude(self) -> float:
        return max(abs(self.low), abs(self.high), 1e-9)


def chains(trace: Trace) -> dict[int, Chain]:
    """Find the values that are polynomials of one other value, with the composed degree."""
    out: dict[int, Chain] = {}

    def of(i: int) -> Chain:
        return out.get(i, Chain(i, 1, lambda x: x))

    for i, p in enumerate(trace.primitives):
        made = rules.chain(p, [of(x) for x in p.inputs])
        if made is not None and made.degree > DEGREE:  # a new chain begins
            made = rules.chain(p, [Chain(x, 1, lambda v: v) for x in p.inputs])
        if made is not None and trace.primitives[made.root].shape == p.shape:
            out[i] = made
    return out


def needed(trace: Trace, known: Mapping[int, Chain]) -> list[bool]:
    """Tell for each value if anything reads it itself, rather than only through a longer chain."""
    out = [False] * len(trace.primitives)
    out[-1] = True
    for i in range(len(out) - 1, -1, -1):
        chain = known.get(i)
        if out[i]:
            for x in (chain.root,) if chain is not None and chain.degree > 1 else trace.primitives[i].inputs:
                out[x] = True
    return out


def pure_power(chain: Chain, known: Range) -> tuple[float, float, float] | None:
    """Return (a, c, b) if the chain is a (x - c)^degree + b and squarings suffice (the degree is a power of two)."""
    n = chain.degree
    if n & (n - 1) or n > 8:
        return None
    domain = [known.centre - known.half, known.centre + known.half]
    fitted = Chebyshev.interpolate(chain.function, n, domain=domain)
    coefficients = fitted.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef
    if len(coefficients) <= n or not coefficients[n]:
        return None
    scale = float(coefficients[n])
    centre = float(-coefficients[n - 1] / (n * scale))
    x = np.linspace(domain[0], domain[1], 64)
    rest = chain.function(x) - scale * (x - centre) ** n
    if np.ptp(rest) > 1e-9 * max(float(np.abs(chain.function(x)).max()), 1e-12):
        return None
    return scale, centre, float(rest.mean())


def units(
    trace: Trace, ranges: Sequence[Range], known: Mapping[int, Chain], wanted_by: Sequence[bool]
) -> dict[int, float]:
    """Return the units by which ciphertexts of some values are divided; other values take their largest magnitude.

    The walk goes from the last primitive to the first: polynomials ask for the units of their arguments, and linear
    primitives pass the unit of their result on to their operand.
    """
    wanted: dict[int, float] = {}
    for i in range(len(trace.primitives) - 1, -1, -1):
        p, chain = trace.primitives[i], known.get(i)
        if wanted_by[i] and chain is not None and chain.degree > 1:
            root = ranges[chain.root]
            pure = pure_power(chain, root)
            if pure is None:
                wanted[chain.root] = root.half
            else:
                scale, centre, _ = pure
                reach = max(abs(root.low - centre), abs(root.high - centre), 1e-9)
                own = wanted.get(i, abs(scale) * reach**chain.degree)
                wanted[chain.root] = float((own / abs(scale)) ** (1 / chain.degree))
        elif i in wanted and (unit := rules.operand_unit(p, wanted[i])) is not None:
            wanted.setdefault(p.inputs[0], unit)
    return wanted
