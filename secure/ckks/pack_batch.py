"""Circuits for many inputs at once, with one ciphertext per element of a tensor and one slot per input of the batch.

There are only products and sums: no rotation is needed, and so no rotation key. N/2 inputs take as long as one, which
is minutes, so that each costs milliseconds. Traced models of any shapes fit. Memory is the limit, so that nodes run
depth first from the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev

from protocols.ckks import polynomial
from protocols.ckks.circuit import Circuit
from secure.ckks.layout import EMPTY, Content
from secure.ckks.linear_maps import Affine, Array
from secure.ckks.pack import PackedModel
from secure.ckks.polynomials import Range, chains, needed, pure_power, units
from secure.ckks.rules import Chain
from secure.ckks.rules import linear as linear_rule
from secure.errors import DoesNotFit
from secure.lowering.primitives import Primitive
from secure.lowering.trace import Trace


class BatchPacker:
    """A walk over a trace that emits the circuit for ``slots`` inputs at once; it has the units of ``pack.Packer``."""

    def __init__(self, trace: Trace, weights: Mapping[str, Array], ranges: Sequence[Range], slots: int) -> None:
        self.trace, self.weights, self.ranges = trace, weights, ranges
        self.circuit = Circuit(slots)
        self.nodes: list[list[int]] = []  # of each atom, one a flat element
        self.values: dict[int, Affine] = {}
        self.inputs: dict[str, tuple[str, int]] = {}  # of the circuit: input of the trace, element
        self.chains = chains(trace)
        self.needed = needed(trace, self.chains)
        self.units = units(trace, ranges, self.chains, self.needed)

    def run(self, output: int) -> tuple[Circuit, float]:
        """Return the circuit and a unit; the circuit's outputs are the elements of the result divided by the unit."""
        for i, p in enumerate(self.trace.primitives):
            self.circuit.path = p.path
            if self.needed[i] or i == output:
                self.values[i] = self._value(i, p)
        self.circuit.outputs, unit = self._nodes(self.values[output], self.ranges[output].magnitude)
        return depth_first(self.circuit), unit

    def _unit(self, i: int) -> float:
        return self.units.get(i, self.ranges[i].magnitude)

    def _value(self, i: int, p: Primitive) -> Affine:
        chain = self.chains.get(i)
        if chain is not None and chain.degree > 1:
            return self._polynomial(i, chain)
        if p.op == "input":
            names = [f"{p.attrs['name']}/{k}" for k in range(int(np.prod(p.shape)))]
            self.inputs |= {name: (str(p.attrs["name"]), k) for k, name in enumerate(names)}
            return self._atom(p.shape, [self.circuit.input(name) for name in names])
        if p.op in ("mul", "matmul"):
            return self._product(i, p)
        return linear_rule(p, [self.values[x] for x in p.inputs], self.weights.get(p.attrs.get("weight", "")))

    def _atom(self, shape: tuple[int, ...], nodes: list[int], factor: float = 1.0) -> Affine:
        self.nodes.append(nodes)
        return Affine.atom(len(self.nodes) - 1, shape).scaled(factor)

    def _polynomial(self, i: int, chain: Chain) -> Affine:
        known = self.ranges[chain.root]
        shape, pure = self.trace.primitives[i].shape, pure_power(chain, known)
        x, unit = self._nodes(self.values[chain.root], self._unit(chain.root))
        c = self.circuit
        if pure is not None:
            scale, centre, constant = pure
            nodes = [polynomial.power(c, c.shift(n, -centre / unit), chain.degree) for n in x]
            return self._atom(shape, nodes, scale * unit**chain.degree).offset(constant)
        reach, out = max(unit, known.half), self._unit(i)
        fitted = Chebyshev.interpolate(
            chain.function, chain.degree, domain=[known.centre - reach, known.centre + reach]
        )
        coefficients = [float(v) / out for v in fitted.coef]
        nodes = [polynomial.evaluate(c, c.shift(n, -known.centre / unit), coefficients, unit / reach) for n in x]
        return self._atom(shape, nodes, out)

    def _product(self, i: int, p: Primitive) -> Affine:
        """Multiply elementwise, or as matrices with one relinearization per element of the result."""
        left, right = (self.values[x] for x in p.inputs)
        x, a = self._nodes(left, self._unit(i) / self.ranges[p.inputs[1]].magnitude)
        y, b = self._nodes(right, self._unit(i) / a)
        if p.op == "mul":
            x_at, y_at = (np.broadcast_to(v.positions(), p.shape).reshape(-1) for v in (left, right))
            nodes = [self.circuit.multiply(x[m], y[n]) for m, n in zip(x_at, y_at, strict=True)]
            return self._atom(p.shape, nodes, a * b)
        batch = p.shape[:-2]
        x_at, y_at = (
            np.broadcast_to(v.positions(), (*batch, *v.shape[-2:])).reshape(-1, *v.shape[-2:]) for v in (left, right)
        )
        listed: tuple[Any, Any] = x_at.tolist(), np.swapaxes(y_at, 1, 2).tolist()
        nodes = [
            self.circuit.inner([(x[m], y[n]) for m, n in zip(row, column, strict=True)])
            for rows, columns in zip(*listed, strict=True)
            for row in rows
            for column in columns
        ]
        return self._atom(p.shape, nodes, a * b)

    def _nodes(self, value: Affine, unit: float) -> tuple[list[int], float]:
        """Return one node per element of value / factor, and the factor: ``unit``, unless the value needs sums only."""
        rows = {atom: matrix.tocsr() for atom, matrix in value.terms.items()}
        data = np.concatenate([m.data for m in rows.values()])
        same = float(data[0])
        sums = bool(same) and bool((np.abs(data - same) <= 1e-12 * abs(same)).all())
        factor, out, c = same if sums else unit, list[int](), self.circuit
        for k, bias in enumerate(value.bias):
            terms: list[tuple[int, float | Array]] = []
            for atom, matrix in rows.items():
                part = slice(matrix.indptr[k], matrix.indptr[k + 1])
                nodes = [self.nodes[atom][e] for e in matrix.indices[part]]
                terms += [(n, float(v) / factor) for n, v in zip(nodes, matrix.data[part], strict=True)]
            node = c.add(*(n for n, _ in terms)) if sums else c.dot(terms)
            out.append(c.shift(node, float(bias) / factor))
        return out, factor


def depth_first(circuit: Circuit) -> Circuit:
    """Reorder a circuit so that nodes run just before they are needed, depth first from the outputs."""
    out, place = Circuit(circuit.slots, plains=circuit.plains), dict[int, int]()
    stack = [(x, False) for x in reversed(circuit.outputs)]
    while stack:
        i, ready = stack.pop()
        if i in place:
            continue
        node = circuit.nodes[i]
        if ready:
            place[i] = len(out.nodes)
            out.nodes.append(type(node)(node.op, tuple(place[x] for x in node.inputs), node.numbers, node.name))
            out.paths.append(circuit.paths[i])
        else:
            stack.append((i, True))
            stack.extend((x, False) for x in reversed(node.inputs) if x not in place)
    out.outputs = [place[x] for x in circuit.outputs]
    return out


def pack_batch(
    trace: Trace, weights: Mapping[str, Array], ranges: Sequence[Range], output: int, slots: int, batch: int
) -> PackedModel:
    """Pack a trace of one input for ``batch`` of them: slot k of each ciphertext holds an element of input k.

    Raises DoesNotFit if there are more inputs than slots.
    """
    if batch > slots:
        raise DoesNotFit(f"{batch} inputs, {slots} slots\nhint: smaller batches")
    packer = BatchPacker(trace, weights, ranges, slots)
    circuit, unit = packer.run(output)
    sizes = {str(p.attrs["name"]): math.prod(p.shape) for p in trace.primitives if p.op == "input"}

    def content(size: int, element: int) -> Content:
        found = np.full(slots, EMPTY)
        found[:batch] = np.arange(batch) * size + element
        return found

    views = {name: (source, content(sizes[source], k)) for name, (source, k) in packer.inputs.items()}
    results = math.prod(trace.primitives[output].shape)
    return PackedModel(circuit, views, {}, np.stack([content(results, k) for k in range(results)]), unit)
