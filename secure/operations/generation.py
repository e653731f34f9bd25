"""Operations of decoders that generate text: keys and values that later steps read, and the last tokens of a text.

``torch.export`` keeps both whole. ``rows`` is the number of earlier rows that a step reads; a prefill has none. So the
graphs of a prefill and of a step have the same operations, and the ranges of one are those of the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from secure.capture.builder import Builder, Value
from secure.capture.graph import Node
from secure.capture.operation import operation
from secure.lowering.lower import Lowering
from secure.lowering.trace import Symbol


@torch.library.custom_op("unseen::keep", mutates_args=())
def keep_operation(x: Tensor, name: str, rows: int, spare: int = 0) -> Tensor:
    """Put ``rows`` rows of zeros before those of x, in place of the rows that earlier queries kept as ``name``.

    spare: the fraction bits that what is kept can do without.
    """
    return F.pad(x, (0, 0, rows, 0)) if rows else x.clone()


@keep_operation.register_fake
def _(x: Tensor, name: str, rows: int, spare: int = 0) -> Tensor:
    return x.new_empty((*x.shape[:-2], rows + x.shape[-2], x.shape[-1]))


@torch.library.custom_op("unseen::last_rows", mutates_args=())
def last_rows_operation(x: Tensor, count: int) -> Tensor:
    """Take the last ``count`` rows, as (..., count, width)."""
    return x[..., -count:, :].clone()


@last_rows_operation.register_fake
def _(x: Tensor, count: int) -> Tensor:
    return x.new_empty((*x.shape[:-2], count, x.shape[-1]))


@operation("keep")
def keep(x: Tensor, /, *, name: str, rows: int, spare: int = 0) -> Tensor:
    """Put the rows of earlier queries, here zeros, before those of x, which are kept for later ones."""
    return F.pad(x, (0, 0, rows, 0))


@keep.aten("keep.default", namespace="unseen", structural=True)
def _(b: Builder, x: Value, name: str, rows: int, spare: int = 0) -> Value:
    return b.shared("keep", x, name=name, rows=rows, spare=spare)


@keep.lower
def _(to: Lowering, node: Node) -> Symbol:
    a = node.attrs
    return to.symbol(node.inputs[0]).keep(str(a["name"]), int(a["rows"]), -int(a.get("spare", 0)))


@operation("last_rows", moves=True)
def last_rows(x: Tensor, /, *, count: int) -> Tensor:
    """Take the last ``count`` rows of each matrix."""
    return x[..., -count:, :]


@last_rows.aten("last_rows.default", namespace="unseen", structural=True)
def _(b: Builder, x: Value, count: int) -> Value:
    return b.shared("last_rows", x, count=count)


@last_rows.lower
def _(to: Lowering, node: Node) -> Symbol:
    count = int(node.attrs["count"])
    if (unit := to.units.get(node.inputs[0])) is not None:  # layers take a normalization's weight behind them, too
        rows, column, of = unit
        to.units[node.id] = (_last(rows, count), None if column is None else _last(column, count), of)
    return _last(to.symbol(node.inputs[0]), count)


def _last(x: Symbol, count: int) -> Symbol:
    rank = len(x.shape)
    return x.slice(rank - 2, x.shape[-2] - count, x.shape[-2])
