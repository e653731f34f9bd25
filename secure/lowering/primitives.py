"""Primitives: the steps that a traced model consists of, with one record for each.

A record says what a primitive computes in floating point, and which range its result is assumed to have without
calibration. A record of the same name in each compiler (``secure.mpc.emit``, ``secure.ckks.rules``) says how that
compiler computes it. A new primitive is thus a record here and one in each compiler that can compute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from approximations.powers import power, power_error
from approximations.primitives import exp_below, inverse_power, perturbed, piecewise, top_indices, top_of, top_values
from protocols.local import quarter_turn
from protocols.two_party.noise import HIGHEST, LOWEST
from protocols.windows import Window, take
from secure.errors import UnsupportedOperation

Shape = tuple[int, ...]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Primitive:
    """One recorded operation: ``attrs`` are plain Python values, ``inputs`` positions in the trace."""

    op: str
    inputs: tuple[int, ...]
    attrs: Mapping[str, Any]
    shape: Shape
    path: str

    @property
    def where(self) -> str:
        """The module that the primitive belongs to, for messages."""
        return self.path or "the function"


class Operand(NamedTuple):
    """The range and shape of an operand, as assumed without calibration."""

    low: float
    high: float
    shape: Shape


Weights = Mapping[str, Tensor]
Evaluate = Callable[[Primitive, Weights, Sequence[Tensor]], Tensor]
Assume = Callable[[Primitive, Sequence[Operand], float], Interval]


@dataclass(frozen=True)
class Meaning:
    """The meaning of a primitive.

    evaluate: computes the value from the operands' values, in floating point; ``weights`` are the server's, by name.
    assume: computes the range of the result from the operands' ranges and the ``reach`` assumed of values.
    multiplies: True if its interval grows with the number of layers, as a product's does. In a model in polynomial form
    such results are assumed to stay within reach.
    promised: gives the range that the caller of the primitive knows, whatever calibration shows.
    drawn: True if its value is drawn at random. Its range is that of ``assume`` for what its operands were seen to be.
    """

    name: str
    evaluate: Evaluate
    assume: Assume
    multiplies: bool = False
    promised: Callable[[Primitive], Interval] | None = None
    drawn: bool = False


def meaning(p: Primitive) -> Meaning:
    """Return the record of a primitive. Raises UnsupportedOperation if there is none."""
    found = PRIMITIVES.get(p.op)
    if found is None:
        raise UnsupportedOperation(
            f"{p.where}: no record says what the primitive '{p.op}' computes",
            "add one to PRIMITIVES in secure/lowering/primitives.py",
        )
    return found


# ranges without calibration


def _within_reach(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    return -reach, reach


def _of_input(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    return (0.0, 1.0) if p.attrs["integer"] else (-reach, reach)


def _kept(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    return x[0].low, x[0].high


def _of_second(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    return x[1].low, x[1].high


def _of_all(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    return min(o.low for o in x), max(o.high for o in x)


def _of_difference(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    return x[0].low - x[1].high, x[0].high - x[1].low


def _of_product(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    corners = [a * b for a in x[0][:2] for b in x[1][:2]]
    square = p.inputs[0] == p.inputs[1]
    return (0.0 if square else min(corners)), max(corners)


def _of_rotation(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    most = max(abs(end) for end in x[0][:2]) * sum(max(abs(end) for end in factor[:2]) for factor in x[1:])
    return -most, most


def _scaled(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    ends = [end * p.attrs["value"] for end in x[0][:2]]
    return min(ends), max(ends)


def _shifted(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    return x[0].low + p.attrs["value"], x[0].high + p.attrs["value"]


def _summed(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    n = math.prod(x[0].shape) // math.prod(p.shape)
    return n * x[0].low, n * x[0].high


def _of_pieces(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    grid = torch.linspace(x[0].low, x[0].high, 513, dtype=torch.float64)
    values = piecewise(grid, p.attrs["knots"], p.attrs["pieces"])
    return float(values.min()), float(values.max())


def promise(p: Primitive) -> Interval:
    """Return the range of a "bounded" primitive, which its caller promised."""
    return p.attrs["low"], p.attrs["high"]


def _inverse_range(p: Primitive) -> Interval:
    a = p.attrs
    return a["scale"] * a["high"] ** (-1 / a["root"]), a["scale"] * a["low"] ** (-1 / a["root"])


def _power_range(p: Primitive) -> Interval:
    """Return the range of the power, widened by what its polynomial may miss of it."""
    a = p.attrs
    error = power_error(a["exponent"], a["degree"], a["low"], a["high"], a["steps"])
    ends = a["scale"] * a["high"] ** a["exponent"], a["scale"] * a["low"] ** a["exponent"]
    return ends[0] * (1 - error), ends[1] * (1 + error)


def _of_perturbed(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    most = p.attrs["temperature"] if len(x) == 1 else max(abs(x[1].low), abs(x[1].high))
    least = 0.0 if len(x) == 1 else min(0.0, x[1].low)  # a secret temperature may be below zero
    return x[0].low + min(most * LOWEST, least * HIGHEST), x[0].high + most * HIGHEST


# values


def _with_zero(p: Primitive, x: Sequence[Operand], reach: float) -> Interval:
    return min(x[0].low, 0.0), max(x[0].high, 0.0)


def _no_operand(p: Primitive, w: Weights, x: Sequence[Tensor]) -> Tensor:
    raise AssertionError("an input's value is given, not computed")


def _slice(p: Primitive, w: Weights, x: Sequence[Tensor]) -> Tensor:
    a = p.attrs
    return x[0][(slice(None),) * a["dim"] + (slice(a["start"], a["stop"], a["step"]),)]


PRIMITIVES: dict[str, Meaning] = {
    m.name: m
    for m in (
        Meaning("input", _no_operand, _of_input),
        Meaning("add", lambda p, w, x: x[0] + x[1], _within_reach),
        Meaning("sub", lambda p, w, x: x[0] - x[1], _of_difference),
        Meaning("offset", lambda p, w, x: x[0] + p.attrs["value"], _shifted),
        Meaning("scale", lambda p, w, x: x[0] * p.attrs["value"], _scaled),
        Meaning("mul", lambda p, w, x: x[0] * x[1], _of_product, multiplies=True),
        Meaning("polynomial_product", lambda p, w, x: x[0] * p.attrs["piece"](x[1]), _of_product, multiplies=True),
        Meaning("mul_public", lambda p, w, x: x[0] * x[1], _of_product, multiplies=True),
        Meaning("rotated", lambda p, w, x: x[0] * x[1] + quarter_turn(x[0]) * x[2], _of_rotation, multiplies=True),
        Meaning("keep", lambda p, w, x: F.pad(x[0], (0, 0, p.attrs["rows"], 0)), _with_zero),
        Meaning("matmul", lambda p, w, x: x[0] @ x[1], _within_reach),
        Meaning("linear", lambda p, w, x: x[0] @ w[p.attrs["weight"]], _within_reach),
        Meaning("mul_weight", lambda p, w, x: x[0] * w[p.attrs["weight"]], _kept, multiplies=True),
        Meaning("add_weight", lambda p, w, x: x[0] + w[p.attrs["weight"]], _within_reach),
        Meaning("sum", lambda p, w, x: x[0].sum(p.attrs["dims"], keepdim=True), _summed),
        Meaning("reshape", lambda p, w, x: x[0].reshape(p.shape), _kept),
        Meaning("expand", lambda p, w, x: x[0].expand(p.shape), _kept),
        Meaning("permute", lambda p, w, x: x[0].permute(p.attrs["dims"]), _kept),
        Meaning("slice", _slice, _kept),
        Meaning("cat", lambda p, w, x: torch.cat(list(x), p.attrs["dim"]), _of_all),
        Meaning("take", lambda p, w, x: take(x[0], **p.attrs), _with_zero),
        Meaning("patches", lambda p, w, x: Window(**p.attrs).patches(x[0]), _with_zero),
        Meaning(
            "piecewise",
            lambda p, w, x: piecewise(x[0], p.attrs["knots"], p.attrs["pieces"]),
            _of_pieces,
            multiplies=True,
        ),
        Meaning("row_bound", lambda p, w, x: x[0].amax(-1, keepdim=True), _kept),
        Meaning("exp_below", lambda p, w, x: exp_below(x[0], x[1]), lambda p, x, reach: (0.0, 1.0)),
        Meaning("maximum", lambda p, w, x: x[0].amax(-1, keepdim=True), _kept),
        Meaning(
            "top_indices",
            lambda p, w, x: top_indices(x[0], p.shape[-1], 0.0),
            lambda p, x, reach: (0.0, float(x[0].shape[-1])),
            promised=lambda p: (0.0, float(p.attrs["among"])),
        ),
        Meaning("top_of", lambda p, w, x: top_of(x[0], x[1], p.shape[-1], 0.0), _of_second),
        Meaning(
            "perturbed",
            lambda p, w, x: perturbed(x[0], p.attrs["temperature"], *x[1:]),
            _of_perturbed,
            drawn=True,
        ),
        Meaning(
            "units",
            lambda p, w, x: F.one_hot(x[0].long(), p.shape[-1]).to(x[0].dtype),
            lambda p, x, reach: (0.0, 1.0),
            promised=lambda p: (0.0, 1.0),
        ),
        Meaning("real", lambda p, w, x: x[0], _kept),
        Meaning("top_values", lambda p, w, x: top_values(x[0], p.shape[-1], 0.0), _kept),
        Meaning(
            "inverse_power",
            lambda p, w, x: inverse_power(x[0], *(p.attrs[k] for k in ("root", "low", "high", "scale", "extra"))),
            lambda p, x, reach: _inverse_range(p),
            promised=_inverse_range,
        ),
        Meaning(
            "power",
            lambda p, w, x: power(x[0], **p.attrs),
            lambda p, x, reach: _power_range(p),
            promised=_power_range,
        ),
        Meaning("bounded", lambda p, w, x: x[0], lambda p, x, reach: promise(p), promised=promise),
    )
}
