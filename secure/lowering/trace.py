"""Symbolic values. Running a function on them records the primitives that it consists of.

The recorded trace is at the level of floating point: it has shapes and names of weights, but no rings yet. Its
interpreter, ``evaluate``, lets calibration learn the range of every intermediate value, and measures the error of the
approximations alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from approximations.primitives import Piece
from protocols.windows import Run, Window, check_runs
from secure.lowering.primitives import Primitive, Shape, meaning


@dataclass(frozen=True)
class WeightRef:
    """A reference to a tensor that the server holds, for use in expressions: ``x * ref``, ``x + ref``."""

    name: str
    shape: Shape


@dataclass
class Trace:
    """Primitives in the order of recording; ``path`` labels what is recorded next."""

    primitives: list[Primitive] = field(default_factory=list)
    path: str = ""

    @contextmanager
    def within(self, path: str) -> Iterator[None]:
        """Label the primitives recorded in this context with the path of a module."""
        before, self.path = self.path, path
        try:
            yield
        finally:
            self.path = before

    def record(self, op: str, inputs: Sequence[Symbol], shape: Shape, **attrs: Any) -> Symbol:
        """Record a primitive and return its symbol. Raises UnsupportedOperation if ``op`` has no record."""
        p = Primitive(op, tuple(x.id for x in inputs), attrs, tuple(shape), self.path)
        meaning(p)
        self.primitives.append(p)
        return Symbol(self, len(self.primitives) - 1)

    def input(self, name: str, shape: Shape, *, integer: bool = False, public: bool = False) -> Symbol:
        """Record a client's input.

        integer: it holds whole numbers, which need no fraction bits (one-hot rows). public: it is no secret.
        """
        return self.record("input", (), shape, name=name, integer=integer, **({"public": True} if public else {}))


_REFINED = frozenset({"input", "linear", "matmul", "mul", "mul_public", "mul_weight", "piecewise", "rotated"})
"""Primitives whose results may have more fraction bits than usual."""

_PASSING = frozenset(
    {
        "add",
        "add_weight",
        "bounded",
        "cat",
        "expand",
        "offset",
        "patches",
        "permute",
        "reshape",
        "scale",
        "slice",
        "sub",
    }
    | {"sum", "take"}
)
"""Primitives whose results have the fraction bits of their operands."""


def _broadcast(a: Shape, b: Shape) -> Shape:
    return tuple(torch.broadcast_shapes(a, b))


@dataclass(frozen=True)
class Symbol:
    """A traced value. Its operators compute nothing; they record primitives in its trace."""

    trace: Trace = field(repr=False)
    id: int

    @property
    def shape(self) -> Shape:
        return self.trace.primitives[self.id].shape

    def _same(self, op: str, **attrs: Any) -> Symbol:
        return self.trace.record(op, (self,), self.shape, **attrs)

    def _two(self, op: str, other: Symbol, **attrs: Any) -> Symbol:
        return self.trace.record(op, (self, other), _broadcast(self.shape, other.shape), **attrs)

    def __add__(self, other: Symbol | WeightRef | float) -> Symbol:
        if isinstance(other, WeightRef):
            return self.trace.record("add_weight", (self,), _broadcast(self.shape, other.shape), weight=other.name)
        if isinstance(other, Symbol):
            return self._two("add", other)
        return self if other == 0 else self._same("offset", value=float(other))

    __radd__ = __add__

    def __neg__(self) -> Symbol:
        return self._same("scale", value=-1.0)

    def __sub__(self, other: Symbol | float) -> Symbol:
        return self._two("sub", other) if isinstance(other, Symbol) else self + -float(other)

    def __rsub__(self, other: float) -> Symbol:
        return -self + other

    def __mul__(self, other: Symbol | WeightRef | float) -> Symbol:
        if isinstance(other, WeightRef):
            return self.trace.record("mul_weight", (self,), _broadcast(self.shape, other.shape), weight=other.name)
        if not isinstance(other, Symbol):
            return self if other == 1 else self._same("scale", value=float(other))
        return self._two("mul", other, extra=0)

    __rmul__ = __mul__

    def __matmul__(self, other: Symbol) -> Symbol:
        return self._matmul(other)

    def precise_matmul(self, other: Symbol, extra_bits: int, kept_bits: int) -> Symbol:
        """Multiply matrices, with ``extra_bits`` more fraction bits in the result and ``kept_bits`` of ``other``."""
        return self._matmul(other, extra=extra_bits, kept=kept_bits)

    def _matmul(self, other: Symbol, **attrs: int) -> Symbol:
        batch = _broadcast(self.shape[:-2], other.shape[:-2])
        shape = (*batch, self.shape[-2], other.shape[-1])
        return self.trace.record("matmul", (self, other), shape, **attrs)

    def linear(self, weight: WeightRef) -> Symbol:
        """Return x @ W for a weight of shape (in, out)."""
        return self.trace.record("linear", (self,), (*self.shape[:-1], weight.shape[-1]), weight=weight.name)

    def square(self) -> Symbol:
        return self._two("mul", self, extra=0)

    def precise_product(self, other: Symbol, extra_bits: int) -> Symbol:
        """Multiply, with ``extra_bits`` more fraction bits in the result."""
        return self._two("mul", other, extra=extra_bits)

    def times_public(self, other: Symbol) -> Symbol:
        """Multiply by an input that is no secret, elementwise."""
        return self._two("mul_public", other)

    def rotated(self, cosine: Symbol, sine: Symbol) -> Symbol:
        """Return x * cosine + (-x'', x') * sine for halves x', x'' of the last dimension; the factors are public."""
        return self.trace.record("rotated", (self, cosine, sine), _broadcast(self.shape, cosine.shape))

    def keep(self, name: str, rows: int, extra_bits: int = 0) -> Symbol:
        """Keep the value as an opening for later queries; the result has ``rows`` rows of earlier ones before it.

        extra_bits: how many fraction bits it has more than the value.
        """
        shape = (*self.shape[:-2], rows + self.shape[-2], self.shape[-1])
        return self.trace.record("keep", (self,), shape, name=name, rows=rows, extra=extra_bits)

    def sum(self, dim: int | Sequence[int], keepdim: bool = False) -> Symbol:
        dims = tuple(sorted(d % len(self.shape) for d in ([dim] if isinstance(dim, int) else dim)))
        kept = tuple(1 if i in dims else n for i, n in enumerate(self.shape))
        out = self.trace.record("sum", (self,), kept, dims=dims)
        return out if keepdim else out.reshape(tuple(n for i, n in enumerate(self.shape) if i not in dims))

    def mean(self, dim: int | Sequence[int], keepdim: bool = False) -> Symbol:
        total = self.sum(dim, keepdim)
        return total * (math.prod(total.shape) / math.prod(self.shape))

    def reshape(self, shape: Shape) -> Symbol:
        return self if tuple(shape) == self.shape else self.trace.record("reshape", (self,), shape)

    def expand(self, shape: Shape) -> Symbol:
        return self if tuple(shape) == self.shape else self.trace.record("expand", (self,), shape)

    def permute(self, dims: Sequence[int]) -> Symbol:
        return self.trace.record("permute", (self,), tuple(self.shape[d] for d in dims), dims=tuple(dims))

    def slice(self, dim: int, start: int, stop: int, step: int = 1) -> Symbol:
        shape = list(self.shape)
        shape[dim] = len(range(start, stop, step))
        return self.trace.record("slice", (self,), tuple(shape), dim=dim, start=start, stop=stop, step=step)

    def take(self, dim: int, runs: Sequence[Run]) -> Symbol:
        """Take the entries along a dimension that runs name, and zeros (see ``protocols.windows``)."""
        shape = (*self.shape[:dim], check_runs(runs, self.shape[dim]), *self.shape[dim + 1 :])
        return self.trace.record("take", (self,), shape, dim=dim, runs=tuple(runs))

    def patches(self, window: Window) -> Symbol:
        """Return the patches under a moving window, (batch, places, channels * entries of the window)."""
        form = {name: getattr(window, name) for name in ("kernel", "stride", "padding", "dilation")}
        return self.trace.record("patches", (self,), window.shape(self.shape), **form)

    def refined(self, extra: int) -> Symbol:
        """Give this value ``extra`` more fraction bits: those products from which sums and moves compute it have them.

        It is for values well below one, of which the usual fraction bits hold few significant ones.
        """
        waiting, seen = [self.id], set[int]()
        while waiting:
            i = waiting.pop()
            if i in seen:
                continue
            seen.add(i)
            p = self.trace.primitives[i]
            if p.op in _REFINED and int(p.attrs.get("extra", 0)) < extra:
                self.trace.primitives[i] = replace(p, attrs={**p.attrs, "extra": extra})
            elif p.op in _PASSING:
                waiting.extend(p.inputs)
        return self

    def piecewise(
        self, knots: tuple[float, ...], pieces: tuple[Piece, ...], tolerance: float, extra: int, error: float
    ) -> Symbol:
        """Apply ``pieces[s]`` between the knots s - 1 and s.

        Each knot may be missed by ``tolerance``. ``extra``: more fraction bits in the result. ``error``: of the pieces.
        """
        return self._same("piecewise", knots=knots, pieces=pieces, tolerance=tolerance, extra=extra, error=error)

    def exp_below(self, bound: Symbol, extra: int) -> Symbol:
        """Compute e^(x - bound) for x <= bound, which is broadcast. ``extra``: more fraction bits in the result."""
        return self.trace.record("exp_below", (self, bound), self.shape, extra=extra)

    def perturbed(self, temperature: float, by: Symbol | None) -> Symbol:
        """Add Gumbel noise that nobody knows, times ``temperature`` or the secret ``by``."""
        inputs = (self,) if by is None else (self, by)
        return self.trace.record("perturbed", inputs, self.shape, temperature=temperature)

    def top_indices(self, count: int, tolerance: float) -> Symbol:
        """Find the ``count`` largest of the last dimension, as whole numbers: see ``primitives.top_indices``."""
        shape = (*self.shape[:-1], count)
        return self.trace.record("top_indices", (self,), shape, tolerance=tolerance, among=self.shape[-1], integer=True)

    def top_of(self, numbers: Symbol, count: int, tolerance: float) -> Symbol:
        """Take the whole numbers that stand where the ``count`` largest of the last dimension do."""
        shape = (*self.shape[:-1], count)
        return self.trace.record("top_of", (self, numbers), shape, tolerance=tolerance, integer=True)

    def top_values(self, count: int, tolerance: float) -> Symbol:
        """Take the ``count`` largest of the last dimension."""
        return self.trace.record("top_values", (self,), (*self.shape[:-1], count), tolerance=tolerance)

    def units(self, entries: int) -> Symbol:
        """Make a unit vector of ``entries`` whole numbers of each position, a whole number below ``entries``."""
        return self.trace.record("units", (self,), (*self.shape, entries), integer=True)

    def real(self) -> Symbol:
        """Give whole numbers, such as those of ``top_indices``, the usual fraction bits."""
        return self._same("real")

    def maximum(self, tolerance: float) -> Symbol:
        """Compute the maximum over the last dimension, which is kept; the result may be too low by ``tolerance``."""
        return self.trace.record("maximum", (self,), (*self.shape[:-1], 1), tolerance=tolerance)

    def row_bound(self, slack: float) -> Symbol:
        """Compute an upper bound of the last dimension, which is kept, that is at most ``slack`` too high."""
        return self.trace.record("row_bound", (self,), (*self.shape[:-1], 1), slack=slack)

    def inverse_power(self, root: int, low: float, high: float, scale: float, extra: int) -> Symbol:
        """Compute scale * x^(-1/root) for low <= x <= high. ``extra``: more fraction bits in the result."""
        return self._same("inverse_power", root=root, low=low, high=high, scale=scale, extra=extra)

    def power(self, exponent: float, low: float, high: float, degree: int, steps: int, scale: float) -> Symbol:
        """Compute ``approximations.power`` of these arguments as one primitive."""
        form = {"exponent": exponent, "low": low, "high": high, "degree": degree, "steps": steps, "scale": scale}
        return self._same("power", **form)

    def bounded(self, low: float, high: float) -> Symbol:
        """Promise that the value lies in [low, high]; no calibration widens that range."""
        return self._same("bounded", low=low, high=high)


def concatenate(parts: Sequence[Symbol], dim: int) -> Symbol:
    """Concatenate symbols of one trace along a dimension."""
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return parts[0].trace.record("cat", parts, tuple(shape), dim=dim)


def evaluate(
    trace: Trace,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    observe: Callable[[int, Tensor], None] | None = None,
    outputs: Sequence[int] = (),
    kept: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Evaluate a trace in floating point and return the values of ``outputs`` (positions in the trace).

    ``observe`` is called with every primitive's position and value. kept: the rows that earlier queries kept, by name;
    zeros by default.
    """
    last = {i: index for index, p in enumerate(trace.primitives) for i in p.inputs}
    last |= dict.fromkeys(outputs, len(trace.primitives))
    values: dict[int, Tensor] = {}
    for index, p in enumerate(trace.primitives):
        if p.op == "input":
            value = inputs[p.attrs["name"]]
        elif p.op == "keep" and kept is not None:
            value = torch.cat([kept[p.attrs["name"]], values[p.inputs[0]]], -2)
        else:
            value = meaning(p).evaluate(p, weights, [values[i] for i in p.inputs])
        values[index] = value
        if observe is not None:
            observe(index, value)
        for i in {index, *p.inputs}:
            if last.get(i, -1) <= index:
                del values[i]
    return [values[i] for i in outputs]
