"""Operations that one party evaluates in the clear, because it knows all their operands.

A client evaluates such nodes of a graph that a server sent. The operations are therefore an explicit table of pure
tensor functions: a name that is not in the table is an error, and nothing is ever looked up by an arbitrary name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secure.errors import InvalidInput, InvalidProgram

aten = torch.ops.aten

CLEAR_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    str(operation): operation
    for operation in (
        # arithmetic
        aten.abs.default, aten.add.Scalar, aten.add.Tensor, aten.clamp.default, aten.clamp_max.default,
        aten.clamp_min.default, aten.cos.default, aten.cumsum.default, aten.diff.default, aten.div.Scalar,
        aten.div.Tensor, aten.div.Tensor_mode, aten.erf.default, aten.exp.default, aten.floor.default,
        aten.floor_divide.default, aten.log.default, aten.maximum.default, aten.max.other, aten.minimum.default,
        aten.min.other, aten.mul.Scalar, aten.mul.Tensor, aten.neg.default, aten.pow.Scalar, aten.pow.Tensor_Scalar,
        aten.pow.Tensor_Tensor, aten.reciprocal.default, aten.remainder.Scalar, aten.round.default,
        aten.rsqrt.default, aten.rsub.Scalar, aten.rsub.Tensor, aten.sign.default, aten.sin.default,
        aten.sqrt.default, aten.square.default, aten.sub.Scalar, aten.sub.Tensor, aten.to.dtype,
        # comparison, logic and selection
        aten.__and__.Tensor, aten.__or__.Tensor, aten.bitwise_and.Tensor, aten.bitwise_not.default,
        aten.bitwise_or.Tensor, aten.eq.Scalar, aten.eq.Tensor, aten.ge.Scalar, aten.ge.Tensor, aten.gt.Scalar,
        aten.gt.Tensor, aten.le.Scalar, aten.le.Tensor, aten.logical_and.default, aten.logical_not.default,
        aten.logical_or.default, aten.lt.Scalar, aten.lt.Tensor, aten.masked_fill.Scalar, aten.ne.Scalar,
        aten.ne.Tensor, aten.tril.default, aten.triu.default, aten.where.ScalarOther, aten.where.ScalarSelf,
        aten.where.self,
        # shape and indexing
        aten.cat.default, aten.constant_pad_nd.default, aten.embedding.default, aten.expand.default,
        aten.expand_as.default, aten.flatten.using_ints, aten.flip.default, aten.gather.default,
        aten.index.Tensor, aten.index_select.default, aten.permute.default, aten.repeat.default,
        aten.reshape.default, aten.roll.default, aten.select.int, aten.slice.Tensor, aten.squeeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.stack.default, aten.t.default, aten.transpose.int,
        aten.unflatten.int, aten.unsqueeze.default, aten.view.default, aten._unsafe_view.default,
        # reductions, products and functions
        aten.amax.default, aten.amin.default, aten.bmm.default, aten.gelu.default, aten.layer_norm.default,
        aten.linalg_vector_norm.default, aten.linear.default, aten.matmul.default, aten.mean.default,
        aten.mean.dim, aten.mm.default, aten.mv.default, aten.relu.default, aten.sigmoid.default,
        aten.silu.default, aten.softmax.int, aten.softplus.default, aten.sum.default, aten.sum.dim_IntList,
        aten.tanh.default,
    )
}  # fmt: skip
"""The whitelist. It maps the name of an operation, as ``torch.export`` prints it, to its function."""

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

    Raises InvalidProgram for a target outside the whitelist, malformed arguments, or a result that is not one tensor.
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
    result = function(*args, **kwargs)
    if not isinstance(result, Tensor):
        raise InvalidProgram(f"{target} does not give one tensor")
    return result.to(float_dtype) if result.is_floating_point() else result
