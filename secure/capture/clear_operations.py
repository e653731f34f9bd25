"""Operations that one party evaluates in the clear, because it knows all their operands.

A party evaluates its own graphs by an explicit table of pure tensor functions: a name that is not in the table is an
error, and nothing is ever looked up by an arbitrary name.

A client evaluates graphs that a server sent, on values that the server must not learn. What it does, and when it sends
its first message, must not depend on them. So its table, ``CLIENT_TARGETS``, is shorter: its operations are *total*
(they raise for no value and end no process), and their work follows from shapes alone. There is no integer division,
no power but of small constant exponents, and no function with slow paths. An index out of range is clamped. Which
addresses of memory a look-up touches, and what a processor does with them, still depends on its index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secure.errors import InvalidInput, InvalidProgram

aten = torch.ops.aten

_OF_OTHER_STRIDES: Mapping[str, Callable[..., Any]] = {
    "aten.view.default": aten.reshape.default,
    "aten._unsafe_view.default": aten.reshape.default,
    "aten.copy.default": lambda x, source: source.to(x.dtype).expand_as(x).clone(),
}
"""The functions of operations that torch refuses for some layouts in memory, which a graph does not know."""

CLEAR_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    str(operation): _OF_OTHER_STRIDES.get(str(operation), operation)
    for operation in (
        # arithmetic
        aten.abs.default, aten.add.Scalar, aten.add.Tensor, aten.ceil.default, aten.clamp.default,
        aten.clamp_max.default, aten.clamp_min.default, aten.cos.default, aten.cumsum.default, aten.diff.default,
        aten.div.Scalar, aten.div.Tensor, aten.div.Tensor_mode, aten.erf.default, aten.exp.default, aten.floor.default,
        aten.floor_divide.default, aten.log.default, aten.maximum.default, aten.max.other, aten.minimum.default,
        aten.min.other, aten.mul.Scalar, aten.mul.Tensor, aten.neg.default, aten.pow.Scalar, aten.pow.Tensor_Scalar,
        aten.pow.Tensor_Tensor, aten.reciprocal.default, aten.remainder.Scalar, aten.round.default, aten.rsqrt.default,
        aten.rsub.Scalar, aten.rsub.Tensor, aten.sign.default, aten.sin.default, aten.sqrt.default,
        aten.square.default, aten.sub.Scalar, aten.sub.Tensor, aten.to.dtype,
        # comparison, logic and selection
        aten.__and__.Tensor, aten.__or__.Tensor, aten.bitwise_and.Tensor, aten.bitwise_not.default,
        aten.bitwise_or.Tensor, aten.eq.Scalar, aten.eq.Tensor, aten.ge.Scalar, aten.ge.Tensor, aten.gt.Scalar,
        aten.gt.Tensor, aten.le.Scalar, aten.le.Tensor, aten.logical_and.default, aten.logical_not.default,
        aten.logical_or.default, aten.lt.Scalar, aten.lt.Tensor, aten.masked_fill.Scalar, aten.ne.Scalar,
        aten.ne.Tensor, aten.tril.default, aten.triu.default, aten.where.ScalarOther, aten.where.ScalarSelf,
        aten.where.self,
        # shape and indexing
        aten.as_strided.default, aten.cat.default, aten.constant_pad_nd.default, aten.copy.default,
        aten.embedding.default, aten.expand.default, aten.expand_as.default, aten.flatten.using_ints,
        aten.flip.default, aten.gather.default, aten.index.Tensor, aten.index_select.default, aten.permute.default,
        aten.repeat.default, aten.repeat_interleave.self_int, aten.reshape.default, aten.roll.default, aten.select.int,
        aten.slice.Tensor, aten.slice_scatter.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.stack.default, aten.t.default, aten.tile.default, aten.transpose.int, aten.unflatten.int,
        aten.unfold.default, aten.unsqueeze.default, aten.upsample_bicubic2d.vec, aten.upsample_bilinear2d.vec,
        aten.upsample_nearest2d.vec, aten.view.default, aten._unsafe_view.default,
        # reductions, products and functions
        aten._weight_norm.default, aten.amax.default, aten.amin.default, aten.argmax.default, aten.bmm.default,
        aten.gelu.default, aten.layer_norm.default, aten.linalg_vector_norm.default, aten.linear.default,
        aten.matmul.default, aten.mean.default, aten.mean.dim, aten.mm.default, aten.mv.default, aten.relu.default,
        aten.sigmoid.default, aten.silu.default, aten.softmax.int, aten.softplus.default, aten.sum.default,
        aten.sum.dim_IntList, aten.tanh.default,
    )
}  # fmt: skip
"""The whitelist. It maps the name of an operation, as ``torch.export`` prints it, to its function."""

CLIENT_TARGETS = frozenset(
    str(operation)
    for operation in (
        # arithmetic
        aten.abs.default, aten.add.Scalar, aten.add.Tensor, aten.ceil.default, aten.clamp.default,
        aten.clamp_max.default, aten.clamp_min.default, aten.cumsum.default, aten.div.Scalar, aten.div.Tensor,
        aten.floor.default, aten.maximum.default, aten.max.other, aten.minimum.default, aten.min.other,
        aten.mul.Scalar, aten.mul.Tensor, aten.neg.default, aten.pow.Tensor_Scalar, aten.reciprocal.default,
        aten.relu.default, aten.round.default, aten.rsqrt.default, aten.rsub.Scalar, aten.rsub.Tensor,
        aten.sign.default, aten.sqrt.default, aten.square.default, aten.sub.Scalar, aten.sub.Tensor, aten.to.dtype,
        # comparison, logic and selection
        aten.__and__.Tensor, aten.__or__.Tensor, aten.bitwise_and.Tensor, aten.bitwise_not.default,
        aten.bitwise_or.Tensor, aten.eq.Scalar, aten.eq.Tensor, aten.ge.Scalar, aten.ge.Tensor, aten.gt.Scalar,
        aten.gt.Tensor, aten.le.Scalar, aten.le.Tensor, aten.logical_and.default, aten.logical_not.default,
        aten.logical_or.default, aten.lt.Scalar, aten.lt.Tensor, aten.masked_fill.Scalar, aten.ne.Scalar,
        aten.ne.Tensor, aten.tril.default, aten.triu.default, aten.where.ScalarOther, aten.where.ScalarSelf,
        aten.where.self,
        # shape and indexing
        aten.cat.default, aten.constant_pad_nd.default, aten.copy.default, aten.expand.default, aten.expand_as.default,
        aten.flatten.using_ints, aten.flip.default, aten.gather.default, aten.index.Tensor, aten.index_select.default,
        aten.permute.default, aten.repeat.default, aten.reshape.default, aten.roll.default, aten.select.int,
        aten.slice.Tensor, aten.slice_scatter.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.stack.default, aten.t.default, aten.transpose.int, aten.unflatten.int, aten.unfold.default,
        aten.unsqueeze.default, aten.view.default, aten._unsafe_view.default,
        # reductions
        aten.amax.default, aten.amin.default, aten.argmax.default, aten.mean.default, aten.mean.dim, aten.sum.default,
        aten.sum.dim_IntList,
    )
)  # fmt: skip
"""The operations that a client evaluates for somebody else: a part of the whitelist. Its masks and ids need few."""

ELEMENTWISE = frozenset(
    str(operation)
    for operation in (
        aten.abs.default, aten.add.Scalar, aten.add.Tensor, aten.ceil.default, aten.clamp.default,
        aten.clamp_max.default, aten.clamp_min.default, aten.cos.default, aten.div.Scalar, aten.div.Tensor,
        aten.floor.default, aten.maximum.default, aten.max.other, aten.minimum.default, aten.min.other, aten.mul.Scalar,
        aten.mul.Tensor, aten.neg.default, aten.pow.Tensor_Scalar, aten.reciprocal.default, aten.relu.default,
        aten.rsqrt.default, aten.rsub.Scalar, aten.rsub.Tensor, aten.sign.default, aten.sin.default, aten.sqrt.default,
        aten.square.default, aten.sub.Scalar, aten.sub.Tensor, aten.__and__.Tensor, aten.__or__.Tensor,
        aten.bitwise_and.Tensor, aten.bitwise_not.default, aten.bitwise_or.Tensor, aten.eq.Scalar, aten.eq.Tensor,
        aten.ge.Scalar, aten.ge.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.le.Scalar, aten.le.Tensor,
        aten.logical_and.default, aten.logical_not.default, aten.logical_or.default, aten.lt.Scalar, aten.lt.Tensor,
        aten.masked_fill.Scalar, aten.ne.Scalar, aten.ne.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf,
        aten.where.self,
    )
)  # fmt: skip
"""The operations of which each element of the result follows from one element of every operand, after broadcasting."""

OF_POSITIONS = CLIENT_TARGETS | {
    str(operation) for operation in (aten.cos.default, aten.repeat_interleave.self_int, aten.sin.default)
}
"""Those that a client evaluates on positions of tokens, which are no secret: their time may depend on values."""

LARGEST_POWER = 4
ARGUMENTS = 1 << 10  # the most entries of a list among the arguments


def _within(index: Tensor, low: int, size: int) -> Tensor:
    """Clamp indices to those from ``low`` to below ``size``. On the device "meta" they have no values."""
    return index if index.is_meta else index.clamp(low, size - 1)


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    if len(indices) > x.dim() or any(index is not None and index.dtype == torch.bool for index in indices):
        raise InvalidProgram("it selects by more indices than there are, or by a mask, whose result has any size")
    sizes = zip(indices, x.shape, strict=False)
    return aten.index.Tensor(x, [None if i is None else _within(i, -n, n) for i, n in sizes])  # type: ignore[no-any-return]


def _gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return aten.gather.default(x, dim, _within(index, 0, x.shape[dim]))  # type: ignore[no-any-return]


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return aten.index_select.default(x, dim, _within(index, 0, x.shape[dim]))  # type: ignore[no-any-return]


_TOTAL: Mapping[str, Callable[..., Any]] = {
    "aten.index.Tensor": _index,
    "aten.gather.default": _gather,
    "aten.index_select.default": _index_select,
}
"""The total forms of operations that torch refuses for some values: indices out of range are clamped."""


def check_client_operation(attrs: Mapping[str, Any], *, secret: bool = True) -> None:
    """Check the attributes of a clear node that a client is to evaluate for somebody else. Raises InvalidProgram.

    secret: its operands are not positions of tokens alone.
    """
    if set(attrs) != {"target", "args", "kwargs"} or not isinstance(attrs["args"], list):
        raise InvalidProgram(f"a clear operation has target, args and kwargs, not {', '.join(sorted(attrs))[:200]}")
    target, args, kwargs = attrs["target"], attrs["args"], attrs["kwargs"]
    if not isinstance(target, str) or target not in (CLIENT_TARGETS if secret else OF_POSITIONS):
        raise InvalidProgram(
            f"{str(target)[:80]!r} is not among the operations that clients evaluate",
            "both parties need the same version; a graph from elsewhere is refused",
        )
    if not isinstance(kwargs, dict) or len(kwargs) > len(args) + 8 or _longest([args, *kwargs.values()]) > ARGUMENTS:
        raise InvalidProgram(f"{target} has too many arguments, or none by name")
    if target == str(aten.pow.Tensor_Scalar) and not (
        len(args) == 2 and not kwargs and type(args[1]) is int and 0 <= args[1] <= LARGEST_POWER
    ):
        raise InvalidProgram(f"{target} takes a constant exponent from 0 to {LARGEST_POWER} here")


def _longest(value: Any) -> int:
    return max([len(value), *map(_longest, value)]) if isinstance(value, list) else 0


CREATION_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    str(operation): operation
    for operation in (
        aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.full.default,
        aten.full_like.default, aten.linspace.default, aten.new_full.default, aten.new_ones.default,
        aten.new_zeros.default, aten.ones.default, aten.ones_like.default, aten.scalar_tensor.default,
        aten.zeros.default, aten.zeros_like.default,
    )
}  # fmt: skip
"""Operations whose result depends on shapes alone. They are evaluated at capture time and never part of a graph."""


def kind_of(dtype: torch.dtype) -> str:
    """Return the kind of a torch data type: "float", "int" or "bool". Raises InvalidInput for complex types."""
    if dtype.is_complex:
        raise InvalidInput(f"complex values ({dtype}) are not supported", "use real arithmetic")
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def dtype_of(kind: str, float_dtype: torch.dtype = torch.float32) -> torch.dtype:
    """Return the torch data type that stands for a kind. Raises InvalidProgram for an unknown kind."""
    try:
        return {"float": float_dtype, "int": torch.int64, "bool": torch.bool}[kind]
    except KeyError:
        raise InvalidProgram(f"unknown kind of value {kind!r}: one of float, int, bool") from None


def encode_argument(value: Any, position: Callable[[Any], int | None]) -> Any:
    """Encode an argument as JSON; ``position`` returns the number of an operand, and None for anything else."""
    index = position(value)
    if index is not None:
        return {"input": index}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": kind_of(value)}
    if isinstance(value, list | tuple):
        return [encode_argument(item, position) for item in value]
    raise InvalidInput(f"an argument of type {type(value).__name__} cannot be part of a graph")


def decode_argument(value: Any, operands: Sequence[Tensor], float_dtype: torch.dtype) -> Any:
    """Decode what `encode_argument` wrote. Raises InvalidProgram for anything else."""
    if isinstance(value, list):
        return [decode_argument(item, operands, float_dtype) for item in value]
    if isinstance(value, Mapping):
        match list(value.items()):
            case [("input", int(index))] if 0 <= index < len(operands):
                return operands[index]
            case [("dtype", str(kind))]:
                return dtype_of(kind, float_dtype)
            case [("float", "inf" | "-inf" | "nan" as text)]:
                return float(text)
        raise InvalidProgram(f"malformed argument {dict(value)!r} of a clear operation")
    return value


def evaluate_clear(attrs: Mapping[str, Any], operands: Sequence[Tensor], float_dtype: torch.dtype) -> Tensor:
    """Evaluate a clear operation given its attributes {"target", "args", "kwargs"}.

    Indices out of range are clamped. Raises InvalidProgram for a target outside the whitelist, malformed arguments, or
    a result that is not one tensor.
    """
    target = attrs.get("target")
    function = CLEAR_OPERATIONS.get(target) if isinstance(target, str) else None
    if function is None:
        raise InvalidProgram(
            f"{target!r} is not among the operations that may be evaluated in the clear",
            "both parties need the same version; a graph from elsewhere is refused",
        )
    args = decode_argument(list(attrs.get("args", [])), operands, float_dtype)
    kwargs = {
        name: decode_argument(value, operands, float_dtype) for name, value in dict(attrs.get("kwargs", {})).items()
    }
    result = _TOTAL.get(str(target), function)(*args, **kwargs)
    if not isinstance(result, Tensor):
        raise InvalidProgram(f"{target} does not give one tensor")
    return result.to(float_dtype) if result.is_floating_point() else result


def clear_type(attrs: Mapping[str, Any], operands: Sequence[Tensor], float_dtype: torch.dtype) -> Tensor:
    """Return a tensor of the device "meta" of the shape and type that ``evaluate_clear`` gives, for such operands.

    For many operations torch would import its compiler on this device, which takes seconds. So where a shape follows
    from the operands' (``_shape``), the type is that of one element. Raises what ``evaluate_clear`` raises.
    """
    shape = _shape(attrs, operands)
    if shape is None:
        return evaluate_clear(attrs, operands, float_dtype)
    result = evaluate_clear(attrs, [_one(x.dim(), x.dtype) for x in operands], float_dtype)
    return torch.empty(shape, dtype=result.dtype, device="meta")


@cache
def _one(dimensions: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor of one element, for all who evaluate with it: no operation writes to an operand."""
    return torch.ones((1,) * dimensions, dtype=dtype, device="cpu")


def _shape(attrs: Mapping[str, Any], operands: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Return the shape of an elementwise operation, a running sum or a concatenation; None where torch has to say.

    An operand must not stand for a whole number, such as a dimension: evaluated, torch would read the number out of it,
    and the result depend on it. Elementwise operations take none. Of the others only the plain form is known here.
    """
    target, args, kwargs = attrs.get("target"), list(attrs.get("args", ())), dict(attrs.get("kwargs", {}))

    def read(values: Iterable[Any]) -> list[tuple[int, ...]]:
        given = [v.get("input") for v in values if isinstance(v, Mapping)]  # evaluation refuses what is malformed
        return [tuple(operands[i].shape) for i in given if isinstance(i, int) and 0 <= i < len(operands)]

    if target in ELEMENTWISE:
        return np.broadcast_shapes(*read([*args, *kwargs.values()]))
    if kwargs or len(args) != 2 or type(args[1]) is not int:
        return None
    if target == str(aten.cumsum.default):
        return next(iter(read(args[:1])), None)
    parts = read(args[0]) if target == str(aten.cat.default) and isinstance(args[0], list) else []
    if not parts or len(parts) != len(args[0]) or not -len(parts[0]) <= args[1] < len(parts[0]):
        return None
    dim = args[1] % len(parts[0])
    others = {(*part[:dim], *part[dim + 1 :]) for part in parts}
    if len(others) > 1 or len({len(part) for part in parts}) > 1:
        return None
    return (*parts[0][:dim], sum(part[dim] for part in parts), *parts[0][dim + 1 :])
