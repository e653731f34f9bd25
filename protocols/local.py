"""Steps that each party takes alone: sums, shapes, public constants, truncation. No rounds, no bytes, no correlations.

Only the server adds constants, so that the shares' sum changes by the constant once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import kernels, ring, windows
from protocols.fields import (
    Axes,
    Axis,
    Bits,
    Name,
    Padding,
    Residue,
    Ring,
    Rows,
    Runs,
    Shape,
    Signs,
    Sizes,
    Whole,
)
from protocols.protocol import SERVER, Local, Weights, broadcast, count, expanded
from protocols.wire import Wire


def _axes(dims: Sequence[int], shape: Shape) -> tuple[int, ...]:
    """Return the positions of dimensions, which torch lets count from the end; raises ValueError if there are none."""
    found = tuple(dim + len(shape) if dim < 0 else dim for dim in dims)
    if any(not 0 <= axis < len(shape) for axis in found) or len(set(found)) < len(found):
        raise ValueError(f"the dimensions {tuple(dims)} of a tensor of {len(shape)}")
    return found


@dataclass(frozen=True)
class _Shaped(Local):
    shape: Shape
    ring: Ring

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)


@dataclass(frozen=True)
class Add(_Shaped):
    """[x] + [y], broadcast; the ring is the narrower of the two."""

    kind: ClassVar[str] = "add"
    reads: ClassVar[tuple[str, ...]] = ("share", "share")

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        x, y = operands
        return x + y

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return broadcast(*operands)


@dataclass(frozen=True)
class Sub(_Shaped):
    """[x] - [y], broadcast."""

    kind: ClassVar[str] = "sub"
    reads: ClassVar[tuple[str, ...]] = ("share", "share")

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        x, y = operands
        return x - y

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return broadcast(*operands)


@dataclass(frozen=True)
class AddConstant(_Shaped):
    """[x] + c for a public integer c."""

    kind: ClassVar[str] = "add_constant"
    constant: Residue

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return x + ring.wrap(self.constant) if party == SERVER else x


@dataclass(frozen=True)
class MulConstant(_Shaped):
    """[x] * c for a public integer c."""

    kind: ClassVar[str] = "mul_constant"
    constant: Residue

    @property
    def operand_ring(self) -> int:
        """The narrowest ring that suffices: if x is known modulo 2^k, then x 2^d is known modulo 2^(k + d)."""
        return self.ring - (self.constant & -self.constant).bit_length() + 1 if self.constant else 0

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return x * ring.wrap(self.constant)


@dataclass(frozen=True)
class MulPublic(_Shaped):
    """[x] * c, broadcast, for a tensor of integers c that all parties know at run time (``two_party.Publish``)."""

    kind: ClassVar[str] = "mul_public"
    reads: ClassVar[tuple[str, ...]] = ("share", "public")

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        x, c = operands
        return x * c

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return broadcast(*operands)


def quarter_turn(x: Tensor) -> Tensor:
    """Return (-x'', x') for the halves x', x'' of the last dimension, each pair of entries turned by 90 degrees."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


@dataclass(frozen=True)
class Rotated(_Shaped):
    """[x] * c + [(-x'', x')] * s, broadcast, for halves x', x'' of the last dimension and integers c, s that all know.

    Pairs of entries are turned by angles of the cosines c and sines s (rotary embeddings: Su et al., RoFormer, 2021,
    section 3.4.2).
    """

    kind: ClassVar[str] = "rotated"
    reads: ClassVar[tuple[str, ...]] = ("share", "public", "public")

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        x, c, s = operands
        return x * c + quarter_turn(x) * s

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        x, c, s = operands
        if x[-1:] != c[-1:] or c != s or not x or x[-1] % 2:
            raise ValueError(f"pairs of the shape {x}, turned by cosines {c} and sines {s}")
        return broadcast(x, c)

    def scratch(self) -> int:
        """Return the bytes of two products and of the turned entries."""
        return 3 * 8 * count(self.shape)


@dataclass(frozen=True)
class AddWeight(_Shaped):
    """[x] + w for a weight w (a bias, position embeddings).

    Each party adds its summand of w; if the server holds w in the clear, the server adds all of it.
    """

    kind: ClassVar[str] = "add_weight"
    weight_field: ClassVar[str] = "weight"
    multiplies: ClassVar[bool] = False
    weight: Name

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        x = operands[0].expand(self.shape)
        own = weights.summand(self.weight)
        return x if own is None else x + own

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return expanded(operands[0], self.shape)


@dataclass(frozen=True)
class Sum(_Shaped):
    """The sum over ``dims``, which are kept with length one."""

    kind: ClassVar[str] = "sum"
    dims: Axes

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return x.sum(dim=self.dims, keepdim=True)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        (x,) = operands
        gone = _axes(self.dims, x)
        if not gone:  # torch would sum over all dimensions
            raise ValueError("a sum over no dimension")
        return tuple(1 if i in gone else n for i, n in enumerate(x))


@dataclass(frozen=True)
class Reshape(_Shaped):
    kind: ClassVar[str] = "reshape"

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0].reshape(self.shape)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        if count(operands[0]) != count(self.shape):
            raise ValueError(f"the shape {operands[0]} has another number of elements than {self.shape}")
        return self.shape


@dataclass(frozen=True)
class Expand(_Shaped):
    kind: ClassVar[str] = "expand"

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0].expand(self.shape)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return expanded(operands[0], self.shape)


@dataclass(frozen=True)
class Permute(_Shaped):
    kind: ClassVar[str] = "permute"
    dims: Axes

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0].permute(self.dims)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        (x,) = operands
        order = _axes(self.dims, x)
        if len(order) != len(x):
            raise ValueError(f"{self.dims} is no order of {len(x)} dimensions")
        return tuple(x[i] for i in order)


@dataclass(frozen=True)
class Slice(_Shaped):
    """Elements start, start + step, ... below stop along ``dim``."""

    kind: ClassVar[str] = "slice"
    dim: Axis
    start: Whole
    stop: Whole
    step: Whole

    def validate(self) -> None:
        if not self.step:
            raise ValueError("a slice of steps of zero")

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        index = [slice(None)] * x.dim()
        index[self.dim] = slice(self.start, self.stop, self.step)
        return x[tuple(index)]

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        (x,) = operands
        (axis,) = _axes((self.dim,), x)
        kept = len(range(x[axis])[self.start : self.stop : self.step])
        return tuple(kept if i == axis else n for i, n in enumerate(x))


@dataclass(frozen=True)
class Concat(_Shaped):
    kind: ClassVar[str] = "concat"
    reads: ClassVar[tuple[str, ...]] = ("share", "...")
    dim: Axis

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return torch.cat(operands, dim=self.dim)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        first = operands[0]
        (axis,) = _axes((self.dim,), first)
        if len({(*x[:axis], *x[axis + 1 :]) for x in operands}) != 1 or any(len(x) != len(first) for x in operands):
            raise ValueError(f"the shapes {', '.join(map(str, operands[:4]))} cannot be joined along {self.dim}")
        return (*first[:axis], sum(x[axis] for x in operands), *first[axis + 1 :])


@dataclass(frozen=True)
class Differences(_Shaped):
    """[x_1 - x_0], [x_2 - x_1], ... of tensors x_i that are stacked along the first dimension."""

    kind: ClassVar[str] = "differences"

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return x[1:] - x[:-1]

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        (x,) = operands
        if not x or x[0] < 2:
            raise ValueError(f"differences along the first dimension of {x}")
        return (x[0] - 1, *x[1:])


@dataclass(frozen=True)
class Take(_Shaped):
    """Entries along ``dim`` in any order, repeated or left out, and zeros: see ``windows``."""

    kind: ClassVar[str] = "take"
    dim: Axis
    runs: Runs

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return windows.take(operands[0], self.dim, self.runs)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        (x,) = operands
        (axis,) = _axes((self.dim,), x)
        return (*x[:axis], windows.check_runs(self.runs, x[axis]), *x[axis + 1 :])

    def scratch(self) -> int:
        """Return the bytes of the index, of as many entries as the result at most."""
        return 8 * count(self.shape)


@dataclass(frozen=True)
class Windowed:
    """The fields and the sizes of protocols that give the patches under a moving window: see ``windows``."""

    shape: Shape
    ring: Ring
    kernel: Sizes
    stride: Sizes
    padding: Padding
    dilation: Sizes

    @property
    def window(self) -> windows.Window:
        return windows.Window(self.kernel, self.stride, self.padding, self.dilation)

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def validate(self) -> None:
        if len(self.shape) != 2 + len(self.window.kernel):
            raise ValueError(f"patches of the shape {self.shape} under a window of {len(self.kernel)} dimensions")

    def scratch(self) -> int:
        """Return the bytes of what the patches are taken of, with its padding."""
        return 8 * self.window.room(self.shape)

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return self.window.shape(operands[0])


@dataclass(frozen=True)
class Patches(Windowed, Local):
    """The patches of [x], which is (batch, channels, sizes)."""

    kind: ClassVar[str] = "patches"

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.window.patches(operands[0])


@dataclass(frozen=True)
class Truncate(Local):
    """Truncate [x] in a ring of ``ring`` bits to [x / 2^shift] in a ring of ``ring - shift`` bits.

    Source: truncate-reduce of SIGMA. Each party shifts its own share. The carry out of the low parts is lost, and the
    server adds 2^shift beforehand to centre the error. The high bits are never wrong: local truncation *within* one
    ring (SecureML) fails when the shares wrap around, but here the wrap stays a multiple of the new, narrower modulus.
    Error: result - x / 2^shift lies in (-1, 1], mean zero for uniform shares. The result is floor(x / 2^shift) or the
    next integer, so that it is not negative if x is not.
    """

    kind: ClassVar[str] = "truncate"
    elementwise: ClassVar[bool] = True
    error: ClassVar[str] = "within one unit in the last place"
    shape: Shape
    ring: Ring
    shift: Bits

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring - self.shift)

    def validate(self) -> None:
        if not 0 <= self.shift < self.ring:
            raise ValueError(f"a shift of {self.shift} in a ring of {self.ring} bits")

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return kernels.dropped(x, (1 << self.shift) if party == SERVER else 0, self.shift, self.ring)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        half = 1 << (self.shift - 1) if self.shift else 0
        return ring.drop_low(x + half, self.shift, self.ring)


@dataclass(frozen=True)
class Indicators(Local):
    """Stacked XORs of chosen planes, each optionally negated.

    From the comparisons [x < t_j] it makes the bits of the segments t_j <= x < t_{j+1}. rows: the planes of each XOR.
    """

    kind: ClassVar[str] = "indicators"
    reads: ClassVar[tuple[str, ...]] = ("bits",)
    gives: ClassVar[str] = "bits"
    width: Whole  # bytes of a plane
    rows: Rows
    negate: Signs

    @property
    def out(self) -> Wire:
        return Wire((len(self.rows), self.width), planes=True)

    def validate(self) -> None:
        if len(self.rows) != len(self.negate):
            raise ValueError(f"{len(self.rows)} rows and {len(self.negate)} signs")

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        (planes,) = operands
        if planes[1:] != (self.width,) or max(map(max, self.rows)) >= planes[0]:
            raise ValueError(f"it reads other planes of {self.width} bytes than those of shape {planes}")
        return self.out.shape

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (planes,) = operands
        return torch.stack([self._one(planes, *row, party=party) for row in zip(self.rows, self.negate, strict=True)])

    @staticmethod
    def _one(planes: Tensor, rows: tuple[int, ...], negate: bool, party: int) -> Tensor:
        out: Tensor = planes[rows[0]]
        for row in rows[1:]:
            out = out ^ planes[row]
        return ~out if negate and party == SERVER else out
