"""Lowering of normalizations, and of the polynomial forms that a model was trained with."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, cast

from torch import Tensor

from approximations import Functions, Piece, l2_normalize, polynomial, polynomial_layer_norm, power, rms_norm, rsqrt
from approximations.powers import steps_for
from secure.capture.graph import Graph, Node
from secure.errors import UnsupportedOperation
from secure.lowering.ranges import widened
from secure.lowering.trace import Symbol, WeightRef

if TYPE_CHECKING:
    from secure.lowering.observe import Observed

NORM_DEGREE, NORM_ERROR = 3, 2.0**-13  # of the inverse roots of a Program that compares nothing else


class Normalizations:
    """Handlers by operation; the attributes are those of the lowering."""

    graph: Graph
    seen: Observed
    functions: Functions
    margin: float
    compares: bool
    readers: tuple[tuple[int, ...], ...]
    server: dict[int, Tensor]
    unscaled: dict[int, Symbol]

    @abstractmethod
    def _symbol(self, i: int) -> Symbol: ...

    @abstractmethod
    def _weight(self, i: int, suffix: str = "", value: Tensor | None = None) -> WeightRef: ...

    def _affine(self, node: Node) -> tuple[Tensor | None, Tensor | None]:
        """A normalization's weight and bias."""
        scale, shift, *_ = (*(self.server[i] for i in node.inputs[1:]), None, None)
        return scale, shift

    def _layer_norm(self, node: Node) -> Symbol:
        x, (low, high) = self._symbol(node.inputs[0]), self._variance(node)
        if list(node.attrs["axes"]) != [len(node.shape) - 1]:
            raise UnsupportedOperation(f"{node.path or 'model'}: layer_norm over axes {node.attrs['axes']}")
        unit = self.functions.layer_norm(x, 1.0, 0.0, float(node.attrs["eps"]), low, high)
        return self._scaled(node, cast(Symbol, unit))

    def _rms_norm(self, node: Node) -> Symbol:
        x, (low, high), eps = self._symbol(node.inputs[0]), self._variance(node), float(node.attrs["eps"])
        if self.compares:
            return self._scaled(node, cast(Symbol, rms_norm(x, 1.0, eps, low - eps, high - eps)))
        return self._scaled(node, x * self._root(x.square().mean(-1, keepdim=True) + eps, low, high))

    def _polynomial_norm(self, node: Node) -> Symbol:
        x, a = self._symbol(node.inputs[0]), node.attrs
        self._holds(node)
        form = (a["eps"], a["low"], a["high"], a["degree"], a["steps"])
        return self._scaled(node, cast(Symbol, polynomial_layer_norm(x, 1.0, 0.0, *form)))

    def _scaled(self, node: Node, unit: Symbol) -> Symbol:
        """A normalization's own weight and bias, unless linear layers alone read it: they take them in."""
        self.unscaled[node.id] = unit
        readers = [self.graph.nodes[i] for i in self.readers[node.id]]
        if readers and node.id not in self.graph.outputs and all(r.op == "linear" for r in readers):
            return unit
        # an absent weight is one, an absent bias zero
        weight = self._weight(node.inputs[1]) if len(node.inputs) > 1 else 1.0
        bias = self._weight(node.inputs[2]) if len(node.inputs) > 2 else 0.0
        return unit * weight + bias

    def _polynomial(self, node: Node) -> Symbol:
        piece = Piece(tuple(node.attrs["coefficients"]), float(node.attrs["centre"]))
        return cast(Symbol, polynomial(self._symbol(node.inputs[0]), piece))

    def _power(self, node: Node) -> Symbol:
        self._holds(node)
        a = node.attrs
        form = (a["exponent"], a["low"], a["high"], a["degree"], a["steps"])
        return cast(Symbol, power(self._symbol(node.inputs[0]), *form))

    def _holds(self, node: Node) -> None:
        """Whether calibration stays in the range that training has left."""
        low, high = self.seen.variance[node.id]
        if not node.attrs["low"] <= low <= high <= node.attrs["high"]:
            raise ValueError(
                f"{node.path or 'model'}: '{node.op}' met values in [{low:.4g}, {high:.4g}], its polynomial is "
                f"made for [{node.attrs['low']:.4g}, {node.attrs['high']:.4g}]\n"
                "hint: train on inputs like these, or longer, so that the range holds"
            )

    def _l2_normalize(self, node: Node) -> Symbol:
        x, (low, high) = self._symbol(node.inputs[0]), self._variance(node)
        if node.attrs["dim"] != len(node.shape) - 1:
            raise UnsupportedOperation(f"{node.path or 'model'}: normalize over dimension {node.attrs['dim']}")
        if self.compares:
            return cast(Symbol, l2_normalize(x, low, high))
        return x * self._root(x.square().sum(-1, keepdim=True), low, high)

    def _rsqrt(self, node: Node) -> Symbol:
        x, (low, high) = self._symbol(node.inputs[0]), self._variance(node)
        return rsqrt(x, low, high) if self.compares else self._root(x, low, high)

    def _root(self, x: Symbol, low: float, high: float) -> Symbol:
        """1 / sqrt(x) by polynomials alone, brought to a size around one first."""
        halves = round(math.log2(math.sqrt(low * high)))
        low, high = low * 2.0**-halves, high * 2.0**-halves
        steps = steps_for(-0.5, NORM_DEGREE, low, high, NORM_ERROR)
        return cast(Symbol, power(x * 2.0**-halves, -0.5, low, high, NORM_DEGREE, steps, 2.0 ** (-halves / 2)))

    def _variance(self, node: Node) -> tuple[float, float]:
        """The calibrated range of what is rooted, widened by the margin (it is a square) on both sides, and twice that
        where it is compared.
        """
        low, high = self.seen.variance[node.id]
        if not low > 0:
            raise UnsupportedOperation(
                f"{node.path or 'model'}: '{node.op}' met a value of {low:.3g} at calibration, "
                "where a positive one is needed\n"
                "hint: check the calibration inputs"
            )
        if self.compares:
            return low / (2 * self.margin), high * 2 * self.margin
        # less room, as it costs polynomials rounds; and rounded, as their edges themselves are public
        return widened(low / self.margin, down=True), widened(high * self.margin)
