"""Steps that each party takes alone: sums, shapes, public constants, truncation. No rounds, no bytes, no correlations.

Only the server adds constants, so that the shares' sum changes by the constant once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from protocols import kernels, ring
from protocols.protocol import SERVER, Local, Shape, Weights
from protocols.wire import Wire


@dataclass(frozen=True)
class _Shaped(Local):
    shape: Shape
    ring: int

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


@dataclass(frozen=True)
class Sub(_Shaped):
    """[x] - [y], broadcast."""

    kind: ClassVar[str] = "sub"
    reads: ClassVar[tuple[str, ...]] = ("share", "share")

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        x, y = operands
        return x - y


@dataclass(frozen=True)
class AddConstant(_Shaped):
    """[x] + c for a public integer c."""

    kind: ClassVar[str] = "add_constant"
    constant: int

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return x + ring.wrap(self.constant) if party == SERVER else x


@dataclass(frozen=True)
class MulConstant(_Shaped):
    """[x] * c for a public integer c."""

    kind: ClassVar[str] = "mul_constant"
    constant: int

    @property
    def operand_ring(self) -> int:
        """The narrowest ring that suffices: if x is known modulo 2^k, then x 2^d is known modulo 2^(k + d)."""
        return self.ring - (self.constant & -self.constant).bit_length() + 1 if self.constant else 0

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return x * ring.wrap(self.constant)


@dataclass(frozen=True)
class AddWeight(_Shaped):
    """[x] + w for a weight w (a bias, position embeddings).

    Each party adds its summand of w; if the server holds w in the clear, the server adds all of it.
    """

    kind: ClassVar[str] = "add_weight"
    weight_field: ClassVar[str] = "weight"
    multiplies: ClassVar[bool] = False
    weight: str

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        x = operands[0].expand(self.shape)
        own = weights.summand(self.weight)
        return x if own is None else x + own


@dataclass(frozen=True)
class Sum(_Shaped):
    """The sum over ``dims``, which are kept with length one."""

    kind: ClassVar[str] = "sum"
    dims: tuple[int, ...]

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        return x.sum(dim=self.dims, keepdim=True)


@dataclass(frozen=True)
class Reshape(_Shaped):
    kind: ClassVar[str] = "reshape"

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0].reshape(self.shape)


@dataclass(frozen=True)
class Expand(_Shaped):
    kind: ClassVar[str] = "expand"

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0].expand(self.shape)


@dataclass(frozen=True)
class Permute(_Shaped):
    kind: ClassVar[str] = "permute"
    dims: tuple[int, ...]

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0].permute(self.dims)


@dataclass(frozen=True)
class Slice(_Shaped):
    """Elements start, start + step, ... below stop along ``dim``."""

    kind: ClassVar[str] = "slice"
    dim: int
    start: int
    stop: int
    step: int

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (x,) = operands
        index = [slice(None)] * x.dim()
        index[self.dim] = slice(self.start, self.stop, self.step)
        return x[tuple(index)]


@dataclass(frozen=True)
class Concat(_Shaped):
    kind: ClassVar[str] = "concat"
    reads: ClassVar[tuple[str, ...]] = ("share", "...")
    dim: int

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        return torch.cat(operands, dim=self.dim)


@dataclass(frozen=True)
class Truncate(Local):
    """Truncate [x] in a ring of ``ring`` bits to [x / 2^shift] in a ring of ``ring - shift`` bits.

    Source: truncate-reduce of SIGMA. Each party shifts its own share. The carry out of the low parts is lost, and the
    server adds 2^shift beforehand to centre the error. The high bits are never wrong: local truncation *within* one
    ring (SecureML) fails when the shares wrap around, but here the wrap stays a multiple of the new, narrower modulus.
    Error: result - x / 2^shift lies in (-1, 1], mean zero for uniform shares.
    """

    kind: ClassVar[str] = "truncate"
    elementwise: ClassVar[bool] = True
    error: ClassVar[str] = "within one unit in the last place"
    shape: Shape
    ring: int
    shift: int

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
    width: int  # bytes of a plane
    rows: tuple[tuple[int, ...], ...]
    negate: tuple[bool, ...]

    @property
    def out(self) -> Wire:
        return Wire((len(self.rows), self.width), planes=True)

    def validate(self) -> None:
        if not self.rows or len(self.rows) != len(self.negate) or not all(row and min(row) >= 0 for row in self.rows):
            raise ValueError(f"{len(self.rows)} rows and {len(self.negate)} signs")

    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any:
        (planes,) = operands
        return torch.stack([self._one(planes, *row, party=party) for row in zip(self.rows, self.negate, strict=True)])

    @staticmethod
    def _one(planes: Tensor, rows: tuple[int, ...], negate: bool, party: int) -> Tensor:
        out: Tensor = planes[rows[0]]
        for row in rows[1:]:
            out = out ^ planes[row]
        return ~out if negate and party == SERVER else out
