"""From a traced model to a circuit of ciphertexts: layouts, products, rotations and diagonals.

There are three rules. A linear step waits as a matrix (``ckks.linear_maps``) until a product or a polynomial needs it
as a ciphertext. A chain of polynomials of one value is one polynomial, whose degree alone costs levels. Every
ciphertext holds its value divided by a *unit*, chosen so that products and polynomials get numbers around one; the
factor is part of the matrix and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.polynomial import Chebyshev
from scipy import sparse

from protocols.ckks import diagonals as linear
from protocols.ckks import polynomial
from protocols.ckks.circuit import Circuit
from secure.ckks.layout import EMPTY, Content, Cube, at, diagonals, first_only, once, power_of_two, repeated
from secure.ckks.linear_maps import Affine, Array, Matrix, column_sums, selection
from secure.ckks.polynomials import Range, chains, needed, pure_power, units
from secure.ckks.rules import Chain
from secure.ckks.rules import linear as linear_rule
from secure.errors import UnsupportedOperation
from secure.lowering.primitives import Primitive
from secure.lowering.ranges import widened
from secure.lowering.trace import Trace

DIRECT, SPREAD = 160, 400  # diagonals above which a map takes another route
SETTLED = 3  # atoms in a sum that becomes a ciphertext of its own


@dataclass
class Atom:
    """A value with ciphertexts of its own: one node and one row of content for each.

    kind: "tu" for attention's scores.
    """

    shape: tuple[int, ...]
    nodes: list[int]
    content: Content
    kind: str = ""


@dataclass
class PackedModel:
    """A circuit, with the contents by which the client fills its inputs and reads its output."""

    circuit: Circuit
    views: dict[str, tuple[str, Content]]  # input of the circuit: input of the trace, content (one row)
    kept: dict[str, tuple[str, Content, float]]  # rows that are kept: their name in the trace, content, unit
    output: Content
    output_unit: float


class Packer:
    """A walk over a trace that emits the circuit. ``weights``: by their names in the trace; ``ranges``: calibrated.

    settle: sums of many atoms (a residual stream) become ciphertexts of their own, for one level; else every layer
    reads all atoms that were ever added.
    """

    def __init__(
        self, trace: Trace, weights: Mapping[str, Array], ranges: Sequence[Range], cube: Cube, *, settle: bool = False
    ) -> None:
        self.trace, self.weights, self.ranges, self.cube = trace, weights, ranges, cube
        self.circuit, self.settle = Circuit(cube.slots), settle
        self.atoms: list[Atom] = []
        self.views: dict[str, tuple[str, Content]] = {}
        self.kept: dict[str, tuple[str, Content, float]] = {}
        self.values: dict[int, Affine] = {}
        self.input_names: dict[int, str] = {}
        self.chains = chains(trace)
        self.needed = needed(trace, self.chains)
        self.units = units(trace, ranges, self.chains, self.needed)

    def run(self, output: int) -> PackedModel:
        """Pack the trace up to ``output``, a position in it. Raises DoesNotPack and UnsupportedOperation."""
        for i, p in enumerate(self.trace.primitives):
            self.circuit.path = p.path
            if self.needed[i] or i == output:
                self.values[i] = self._value(i, p)
                self.circuit.mark()
        value, cube = self.values[output], self.cube
        rows = int(np.prod(value.shape[:-1]))
        content = once(cube.dense(rows, value.shape[-1]))
        unit = widened(self.ranges[output].magnitude)
        # always through diagonals, as these are zero in slots that hold no element of the output
        self.circuit.outputs = [self._route(value.scaled(1 / unit), row) for row in content]
        return PackedModel(self.circuit.gathered(), self.views, self.kept, content, unit)

    def _unit(self, i: int) -> float:
        return self.units.get(i, self.ranges[i].magnitude)

    # values

    def _value(self, i: int, p: Primitive) -> Affine:
        chain = self.chains.get(i)
        if chain is not None and chain.degree > 1:
            return self._polynomial(i, chain)
        if p.op == "input":
            self.input_names[len(self.atoms)] = p.attrs["name"]
            return self._atom(p.shape, [], np.empty((0, self.cube.slots), np.int64))
        if p.op == "mul":
            return self._product(i, p)
        if p.op == "matmul":
            return self._matmul(i, p)
        if p.op == "keep" and p.attrs["rows"]:
            return self._keep(p)
        operands = [self.values[x] for x in p.inputs]
        if p.op == "sum" and (summed := self._sum_of_scores(p, operands[0])) is not None:
            return summed
        value = linear_rule(p, operands, self.weights.get(p.attrs.get("weight", "")))
        rows, t = int(np.prod(value.shape[:-1])), self.cube.t
        residual = len(value.terms) >= SETTLED if t > 1 else len(value.terms) > 1 and rows == t
        if self.settle and p.op == "add" and residual and len(value.shape) > 1:
            content = self.cube.dense(rows, value.shape[-1])
            value = self._atom(value.shape, *self._settled(value, content, self._unit(i)))
        return value

    def _settled(self, value: Affine, content: Content, unit: float) -> tuple[list[int], Content, float]:
        """Return ciphertexts of a value's own in this content, and their unit: what ``_atom`` takes."""
        nodes, unit = self._materialized(value, content, unit, content)
        return nodes, content, unit

    def _atom(
        self, shape: tuple[int, ...], nodes: list[int], content: Content, factor: float = 1.0, kind: str = ""
    ) -> Affine:
        self.atoms.append(Atom(shape, nodes, content, kind))
        return Affine.atom(len(self.atoms) - 1, shape).scaled(factor)

    def _keep(self, p: Primitive) -> Affine:
        """Keep a new row where attention will read it, and put the rows that earlier queries kept before it."""
        new, unit = self.values[p.inputs[0]], self.ranges[p.inputs[0]].magnitude
        (*_, heads, rows, features), name = p.shape, p.attrs["name"]
        rows -= 1
        self._check(p, math.prod(new.shape) == heads * features and rows < self.cube.keys)
        self._check(p, not self.cube.heads % heads and features <= self.cube.d)
        if len(new.terms) == 1 and selection(new) is None:  # once through the layer, then to both of its readers
            natural = self.cube.natural(new.shape)
            new = self._atom(new.shape, *self._settled(new, natural, unit))
        content, numbers = self.cube.kept((heads, rows, features))
        nodes = list[int]()
        for k, (row, number) in enumerate(zip(content, numbers, strict=True)):
            each = f"kept/{name}/{k}"
            self.kept[each] = name, row, unit
            nodes.append(self.circuit.kept(each))
            repeated = np.where(row >= 0, row // (rows * features) * features + row % features, EMPTY)
            self.circuit.keep(self._route(new.scaled(1 / unit), repeated), each, number.astype(np.float64))
        before = self._atom((*p.shape[:-2], rows, features), nodes, content, unit)
        return linear_rule(replace(p, op="cat", attrs={"dim": len(p.shape) - 2}), [before, new], None)

    def _polynomial(self, i: int, chain: Chain) -> Affine:
        value, known = self.values[chain.root], self.ranges[chain.root]
        content, kind = self._own_content(value)
        nodes, unit = self._materialized(value, content, self._unit(chain.root))
        if unit > 2 * self._unit(chain.root):  # of so small numbers coefficients would be large, and cancel each other
            unit = self._unit(chain.root)
            nodes = [self._route(value.scaled(1 / unit), row) for row in content]
        shape = self.trace.primitives[i].shape
        pure = pure_power(chain, known)
        if pure is not None:
            scale, centre, constant = pure
            shifted = self._shifted(nodes, content, -centre / unit)
            nodes = [polynomial.power(self.circuit, n, chain.degree) for n in shifted]
            return self._atom(shape, nodes, content, scale * unit**chain.degree, kind).offset(constant)
        reach = max(unit, known.half)  # exact in any domain: it is a polynomial of this degree
        fitted = Chebyshev.interpolate(
            chain.function, chain.degree, domain=[known.centre - reach, known.centre + reach]
        )
        out = self._unit(i)
        coefficients = [float(v) / out for v in fitted.coef]
        shifted = self._shifted(nodes, content, -known.centre / unit)
        nodes = [polynomial.evaluate(self.circuit, n, coefficients, unit / reach) for n in shifted]
        return self._atom(shape, nodes, content, out, kind)

    def _shifted(self, nodes: list[int], content: Content, value: float) -> list[int]:
        """Add ``value`` to slots that hold elements only, as a zero in others must not leave a polynomial's range."""
        rows = [np.where(row >= 0, value, 0.0) for row in content]
        return [self.circuit.shift(n, row) for n, row in zip(nodes, rows, strict=True)]

    def _own_content(self, value: Affine) -> tuple[Content, str]:
        """Return the content that already holds a value, and its kind; else the default content."""
        direct = selection(value)
        if direct is not None and self.atoms[direct.atom].nodes:
            atom, column = self.atoms[direct.atom], direct.column
            back = np.full(int(np.prod(atom.shape)) + 1, EMPTY)  # EMPTY (-1) indexes the last entry
            back[column] = np.arange(len(column))
            if len(np.unique(column)) == len(column):
                return back[atom.content], atom.kind
        return self.cube.natural(value.shape), ""

    def _product(self, i: int, p: Primitive) -> Affine:
        operands = [self.values[x].broadcast(p.shape) for x in p.inputs]
        direct = next((k for k, v in enumerate(operands) if self._stands(v)), 0)
        first, second = operands[direct], operands[1 - direct]
        content, _ = self._own_content(first)
        left, a = self._materialized(first, content, self._unit(p.inputs[direct]))
        right, b = self._materialized(second, content, self._unit(i) / a)
        nodes = [self.circuit.multiply(x, y) for x, y in zip(left, right, strict=True)]
        return self._atom(p.shape, nodes, content, a * b)

    def _stands(self, value: Affine) -> bool:
        direct = selection(value)
        return direct is not None and len(np.unique(direct.column)) == len(direct.column)

    def _matmul(self, i: int, p: Primitive) -> Affine:
        left, right = (self.values[x] for x in p.inputs)
        heads, rows, inner = int(np.prod(left.shape[:-2])), left.shape[-2], left.shape[-1]
        columns, cube, c = right.shape[-1], self.cube, self.circuit
        scores = left.only is not None and self.atoms[left.only[0]].kind == "tu"
        attends = scores or (cube.t == 1 and columns == cube.keys and heads == cube.heads)  # a single token does
        if rows == 1 and not attends:
            return self._weighted_sum(i, p, left, right)
        if scores:  # times values
            self._check(p, rows == cube.t and inner == cube.keys and columns <= cube.d and heads == cube.heads)
            content = cube.attention("tu", (heads, rows, inner))
            x, a = self._materialized(left, content, self._unit(p.inputs[0]))
            right = right.broadcast((*left.shape[:-2], inner, columns))
            if columns == 1:
                return self._weighed(i, p, right, content, x, a)
            keys = "ud", (heads, inner, columns)
            y, b = self._materialized(right, cube.attention(*keys), self._unit(i) / a, cube.once(*keys))
            nodes = []
            for group in range(cube.head_groups):
                part = range(group * cube.key_groups, (group + 1) * cube.key_groups)
                total = c.inner([(x[k], y[k]) for k in part])
                nodes.append(linear.sum_axis(c, total, cube.strides["u"], cube.u))
            return self._atom(p.shape, nodes, cube.summed("td", (heads, rows, columns)), a * b)
        self._check(p, rows == cube.t and columns == cube.keys and inner <= cube.d and heads == cube.heads)
        keys, queries = ("du", (heads, inner, columns)), ("td", (heads, rows, inner))
        magnitude = self.ranges[p.inputs[1]].magnitude
        y, b = self._materialized(right, cube.attention(*keys), magnitude, cube.once(*keys))
        x, a = self._materialized(left, cube.attention(*queries), self._unit(i) / b, cube.once(*queries))
        nodes = [linear.sum_axis(c, c.multiply(m, n), cube.strides["d"], cube.d) for m, n in zip(x, y, strict=True)]
        return self._atom(p.shape, nodes, cube.attention("tu", (heads, rows, columns)), a * b, "tu")

    def _weighed(self, i: int, p: Primitive, right: Affine, content: Content, x: list[int], a: float) -> Affine:
        """Multiply scores by one secret weight per key and sum over keys, by rotations that are right in every slot."""
        cube, c, shape = self.cube, self.circuit, (*p.shape[:-1], right.shape[-2])
        keys = np.broadcast_to(np.swapaxes(right.positions(), -1, -2), shape)
        b = self._unit(i) / a  # the product has the unit that its reader asks for, which inputs take at no level
        y = [self._route(right.select(keys, shape).scaled(1 / b), row) for row in content]
        nodes = []
        for group in range(cube.head_groups):
            part = range(group * cube.key_groups, (group + 1) * cube.key_groups)
            nodes.append(linear.sum_axis(c, c.inner([(x[k], y[k]) for k in part]), cube.strides["u"], cube.u))
        rows = content[:: cube.key_groups]
        return self._atom(p.shape, nodes, np.where(rows >= 0, rows // shape[-1], EMPTY), a * b)

    def _weighted_sum(self, i: int, p: Primitive, weights: Affine, rows: Affine) -> Affine:
        """Multiply a vector by a matrix (pooling of tokens by secret weights): an elementwise product, then a sum."""
        index = np.swapaxes(weights.positions(), -1, -2)
        content, _ = self._own_content(rows)
        x, a = self._materialized(rows, content, self._unit(p.inputs[1]))
        spread = weights.select(np.broadcast_to(index, rows.shape), rows.shape)
        y, b = self._materialized(spread, content, self._unit(i) / a)
        products = self._atom(
            rows.shape, [self.circuit.multiply(m, n) for m, n in zip(x, y, strict=True)], content, a * b
        )
        return column_sums(products, p.shape)

    def _check(self, p: Primitive, fits: bool) -> None:
        if not fits:
            raise UnsupportedOperation(
                f"{p.path or 'model'}: a product of two secret matrices of {p.shape} that is not attention with "
                f"{self.cube.heads} heads over {self.cube.t} tokens\nhint: ciphertexts are packed for one attention"
            )

    def _sum_of_scores(self, p: Primitive, value: Affine) -> Affine | None:
        """Sum scores over keys by rotations that are right in every slot; None if the value is not scores."""
        direct = selection(value)
        if direct is None or self.atoms[direct.atom].kind != "tu" or p.attrs["dims"] != (len(value.shape) - 1,):
            return None
        atom, factor, column = self.atoms[direct.atom], direct.factor, direct.column
        if not bool((column == np.arange(len(column))).all()):
            return None
        cube, c, nodes = self.cube, self.circuit, []
        for group in range(cube.head_groups):
            part = atom.nodes[group * cube.key_groups : (group + 1) * cube.key_groups]
            nodes.append(linear.sum_axis(c, c.add(*part), cube.strides["u"], cube.u))
        rows, keys = int(np.prod(p.shape)), value.shape[-1]
        content = atom.content[:: cube.key_groups]
        out = self._atom(p.shape, nodes, np.where(content >= 0, content // keys, EMPTY), factor)
        return out.offset(value.bias.reshape(rows, keys).sum(-1))

    # ciphertexts of linear values

    def _materialized(
        self, value: Affine, content: Content, unit: float, dense: Content | None = None
    ) -> tuple[list[int], float]:
        """Return nodes that hold value / factor in ``content``, and the factor.

        The factor is ``unit`` unless existing nodes hold the value already. dense: a content with each element once,
        through which the value may go.
        """
        direct = selection(value)
        if direct is not None:
            atom, factor, column = self.atoms[direct.atom], direct.factor, direct.column
            nodes = [self._standing(atom, column, row) for row in content]
            if all(n is not None for n in nodes):
                return [
                    self.circuit.shift(n, at(value.bias / factor, row))
                    for n, row in zip(nodes, content, strict=True)
                    if n is not None
                ], factor
        return [self._route(value.scaled(1 / unit), row, dense) for row in content], unit

    def _standing(self, atom: Atom, column: Content, row: Content) -> int | None:
        used = row >= 0
        for node, source in zip(atom.nodes, atom.content, strict=True):
            if bool((source[used] == column[row[used]]).all()):
                return node
        return None

    def _route(self, value: Affine, row: Content, dense: Content | None = None) -> int:
        """Return a node that holds a linear value in one row of content, by the first route that is short enough.

        The routes are: directly; to the first place of repeated elements, which are then spread; or first to a content
        with every element once, which takes one more level.
        """
        node = self._mapped(value, row, DIRECT)
        if node is not None:
            return node
        base = row
        spread: list[tuple[int, int]] = []
        for axis in ("t", "h", "u"):
            stride, size = self.cube.strides[axis], getattr(self.cube, axis)
            if repeated(base, stride, size):
                base, spread = first_only(base, stride, size), [*spread, (stride, size)]
        node = self._mapped(value, base, SPREAD) if spread else None
        if node is None:
            once = self.cube.natural(value.shape) if dense is None else dense
            if not any(bool((part == row).all()) for part in once):
                parts = [self._mapped(value, part, self.cube.slots) for part in once]
                value = self._atom(value.shape, [n for n in parts if n is not None], once)
            node = self._mapped(value, base, self.cube.slots)
        assert node is not None
        for stride, size in spread:
            node = linear.spread_axis(self.circuit, node, stride, size)
        return node

    def _mapped(self, value: Affine, row: Content, limit: int) -> int | None:
        """Apply a linear map, for one level; return None if it takes more than ``limit`` diagonals."""
        operands: list[int] = []
        whole: dict[tuple[int, int], Array] = {}
        for number, matrix in value.terms.items():
            for nodes, content, reduced in self._sources(number, matrix, row):
                found = diagonals(reduced, row, content, limit - len(whole))
                if found is None:
                    return None
                whole |= {(len(operands) + part, offset): v for (part, offset), v in found.items()}
                operands += nodes
        return self.circuit.shift(linear.apply(self.circuit, operands, whole), at(value.bias, row))

    def _sources(self, number: int, matrix: Matrix, row: Content) -> list[tuple[list[int], Content, Matrix]]:
        atom = self.atoms[number]
        pooled = self._totalled(atom, matrix) if self.cube.t == 1 else self._pooled(atom, matrix)
        if pooled is not None:
            return [pooled]
        if number in self.input_names:
            used = self._views(number, matrix, row)
            return [([atom.nodes[k] for k in used], atom.content[used], matrix)]
        return [(atom.nodes, atom.content, matrix)]

    def _pooled(self, atom: Atom, matrix: Matrix) -> tuple[list[int], Content, Matrix] | None:
        """If all tokens have the same weight, sum them by rotations, so that a map of one token remains; else None."""
        t = self.cube.t
        if not atom.nodes or matrix.nnz < matrix.shape[0] * t:
            return None
        base = first_only(atom.content, 1, t)
        used = np.flatnonzero(np.diff(sparse.csc_array(matrix).indptr))
        columns = sparse.csc_array(matrix)
        kept: list[int] = []
        groups: list[Content] = []
        for k, (content, first) in enumerate(zip(atom.content, base, strict=True)):
            slots = np.flatnonzero(first >= 0)
            members = np.unique(content[slots[:, None] + np.arange(t)], axis=0)
            if len(slots) and (members >= 0).all() and len(np.unique(members)) == members.size:  # each in one sum
                kept.append(k)
                groups.append(members)
        if not kept:
            return None
        group = np.unique(np.concatenate(groups), axis=0)
        if len(np.unique(group)) != group.size or not bool(np.isin(used, group).all()):
            return None
        for step in range(1, t):
            if abs(columns[:, group[:, 0]] - columns[:, group[:, step]]).max() > 1e-12:
                return None
        nodes = [linear.sum_axis(self.circuit, atom.nodes[k], 1, t) for k in kept]
        first_of = np.zeros(matrix.shape[1])
        first_of[group[:, 0]] = 1.0
        return nodes, base[kept], sparse.csr_array(matrix @ sparse.diags_array(first_of))

    def _totalled(self, atom: Atom, matrix: Matrix) -> tuple[list[int], Content, Matrix] | None:
        """If all features of a token have the same weight, sum them by rotations into every slot; else None."""
        cube, size, rows = self.cube, matrix.shape[1], sparse.csr_array(matrix)
        whole = len(atom.nodes) == 1 and size == power_of_two(size) and size >= cube.d * cube.h > 1
        if not whole or rows.nnz != rows.shape[0] * size or bool((atom.content != cube.dense(1, size)).any()):
            return None
        each = rows.toarray()
        if np.ptp(each, axis=1).max() > 1e-12:
            return None
        node = atom.nodes[0]
        for stride, count in ((cube.strides["d"], cube.d), (1, size // cube.d)):  # h, and u behind it, are cyclic too
            node = linear.sum_axis(self.circuit, node, stride, count)
        first = np.where(np.arange(size) == 0, each, 0.0)
        return [node], np.zeros_like(atom.content), sparse.csr_array(first)

    def _views(self, number: int, matrix: Matrix, row: Content) -> list[int]:
        """Return the client's ciphertexts of an input that serve a map, after adding missing ones.

        If d has room, the elements that a slot needs lie beside it along d; else every element is held once.
        """
        atom, wanted = self.atoms[number], sparse.csr_array(matrix)
        d, stride = self.cube.d, self.cube.strides["d"]
        used, out = np.flatnonzero(row >= 0), list[int]()
        width = int(np.diff(wanted.indptr).max())
        if width > d:
            views = list(self.cube.dense(int(np.prod(atom.shape[:-1])), atom.shape[-1]))
        else:
            views = self._beside(wanted, row, used, d, stride)
        for content in views:
            held = content >= 0
            k = next((k for k, old in enumerate(atom.content) if bool((old[held] == content[held]).all())), None)
            if k is None:
                name = f"{self.input_names[number]}/{len(self.views)}"
                self.views[name] = (self.input_names[number], content)
                atom.nodes.append(self.circuit.input(name))
                atom.content = np.concatenate([atom.content, content[None]])
                k = len(atom.nodes) - 1
            out.append(k)
        return out

    def _beside(self, wanted: Matrix, row: Content, used: Content, d: int, stride: int) -> list[Content]:
        lanes: dict[int, set[int]] = {}
        for slot in used:
            elements = wanted.indices[wanted.indptr[row[slot]] : wanted.indptr[row[slot] + 1]]
            lanes.setdefault(int(slot % stride), set()).update(map(int, elements))
        most, axis, out = max(map(len, lanes.values())), self.cube.axes["d"], list[Content]()
        period = most if 2 * most <= d else min(power_of_two(most), d)
        for part in range(-(-most // period)):
            content = np.full(self.cube.slots, EMPTY)
            for lane, held in lanes.items():
                listed = np.array(sorted(held)[part * period : (part + 1) * period], dtype=np.int64)
                padded = np.full(period, EMPTY)
                padded[: len(listed)] = listed
                slots = np.arange(lane, self.cube.slots, stride)
                content[slots] = padded[axis[slots] % period]
            out.append(content)
        return out
