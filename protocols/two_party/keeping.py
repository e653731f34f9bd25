"""Openings that outlive their query: a decoder's keys and values are opened once and read by every later step.

A tensor x that a product reads is opened as z = x + r anyway (``opening``). ``Keep`` lets both parties keep that
opening after the query, z and their share of r, and the dealer r. ``Recall`` reads openings of earlier queries, row by
row behind one another, and ``OpenedConcat`` puts this query's behind them. So a step of a decoder opens one new row,
however many rows the product reads, and the dealer gives shares of R_q R^T for the masks R of all rows.

Nothing new is seen. z is uniform because r is uniform and masks this one opening: it is never drawn, added or sent
again. What is kept is the pair of z and r, so that no second value can be opened under r. A product of a kept opening
with a fresh one reveals nothing: it is local, and its correction, a product of two masks, is hidden by the client's
share of it, which is drawn anew in every query. The mask of the other operand is fresh in every query too.
Rows that are not there yet are zeros under the mask zero, which everybody knows: products with them are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from protocols import local
from protocols.fields import Name, Ring, Shape
from protocols.flow import Flow
from protocols.protocol import SERVER, Local, Material, Opening, Silent, Weights
from protocols.wire import Wire


@dataclass(frozen=True)
class Keep(Silent):
    """The opening that it reads, which is kept under ``name`` for later queries. Rounds 0; nothing is sent or dealt."""

    kind: ClassVar[str] = "keep"
    elementwise: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("opening",)
    gives: ClassVar[str] = "opening"
    shape: Shape
    ring: Ring
    name: Name

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def validate(self) -> None:
        _check_name(self.name)

    @property
    def keeps(self) -> str:
        return self.name

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, operands[0]

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0]

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0]


@dataclass(frozen=True)
class Recall(Silent):
    """The opening of ``name`` from earlier queries. All parties and the dealer have it: z and r, or r alone.

    Rounds 0; nothing is sent or dealt.
    """

    kind: ClassVar[str] = "recall"
    reads: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[str] = "opening"
    shape: Shape
    ring: Ring
    name: Name

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    def validate(self) -> None:
        _check_name(self.name)

    @property
    def recalls(self) -> str:
        return self.name

    def input_of(self, party: int) -> str | None:
        return self.name

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, self._checked(operands[0])

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        ((z, r),) = operands
        return Opening(self._checked(z), self._checked(r))

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self._checked(operands[0])

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape) != self.shape:
            raise ValueError(f"what is kept as {self.name!r} has shape {tuple(x.shape)}, not {self.shape}")
        return x


def _check_name(name: str) -> None:
    if not name:
        raise ValueError("an opening that is kept under no name")


class _Moved(Local):
    """The base of moves of openings: each party moves the entries of z and of its share of r, the dealer those of r."""

    gives: ClassVar[str] = "opening"

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, self.apply(SERVER, operands, weights)

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return Opening(*(self.apply(party, part, weights) for part in zip(*operands, strict=True)))


@dataclass(frozen=True)
class OpenedConcat(_Moved, local.Concat):
    """The opening of tensors one behind another along ``dim``, from openings of them. Rounds 0; nothing is sent."""

    kind: ClassVar[str] = "opened_concat"
    reads: ClassVar[tuple[str, ...]] = ("opening", "...")


@dataclass(frozen=True)
class OpenedReshape(_Moved, local.Reshape):
    """The opening of x in another shape, from an opening of x. Rounds 0; nothing is sent."""

    kind: ClassVar[str] = "opened_reshape"
    reads: ClassVar[tuple[str, ...]] = ("opening",)


@dataclass(frozen=True)
class OpenedExpand(_Moved, local.Expand):
    """The opening of x repeated, from an opening of x: heads that share keys read one opening. Nothing is sent."""

    kind: ClassVar[str] = "opened_expand"
    reads: ClassVar[tuple[str, ...]] = ("opening",)


@dataclass(frozen=True)
class OpenedPermute(_Moved, local.Permute):
    """The opening of x with its dimensions in another order, from an opening of x. Rounds 0; nothing is sent."""

    kind: ClassVar[str] = "opened_permute"
    reads: ClassVar[tuple[str, ...]] = ("opening",)


def keepers(circuit: Sequence[Any]) -> dict[str, int]:
    """Return the instructions of a circuit whose openings are kept for later queries, by name."""
    return Flow.of(circuit).keeps


class KeptRows:
    """The rows of openings that one party keeps between the queries of one conversation, by name.

    A party keeps openings, the dealer their masks. A row comes of one ``Open`` with its mask, and nothing takes the
    mask out. ``capacity``: the most rows. Memory for all of them is taken with the first, 8 bytes a number and twice
    that for an opening, so that a new row moves no other.

    A query may read fewer rows than are kept, and go on from there: the rows behind are forgotten, with their masks.
    All parties and the dealer must name the same number, or the query's result is random.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled = capacity, 0
        self._rows: dict[str, tuple[torch.Tensor, ...]] = {}

    def __repr__(self) -> str:
        return f"KeptRows({self.filled} of {self.capacity})"

    def given(self, circuit: Sequence[Any], rows: int | None = None) -> dict[str, Any]:
        """Return what the ``Recall`` of a circuit read, by name: the first ``rows``, and zeros behind them.

        rows: all that are kept by default. What is returned is valid until rows are appended. Raises ValueError for a
        name under which nothing is kept, for more rows than are kept, and for more than the circuit reads.
        """
        count, found = self._known(rows), dict[str, Any]()
        for name, index in Flow.of(circuit).recalls.items():
            read = circuit[index].protocol.out.shape[-2]
            if name not in self._rows or read < count:
                raise ValueError(f"{count} rows are kept, {read} of {name!r} are to be read")
            parts = [self._read(x, count, read) for x in self._rows[name]]
            found[name] = Opening(*parts) if len(parts) > 1 else parts[0]
        return found

    def append(self, rows: Mapping[str, Any], after: int | None = None) -> None:
        """Put the rows of one query, as its ``Keep`` gave them, behind the first ``after`` ones: those that it read.

        rows: by name; a party's are openings, the dealer's are masks. after: all that are kept by default; others are
        forgotten. Raises ValueError if they are too many, or have other names or shapes than those that are there.
        """
        start, new = self._known(after), {n: tuple(x) if isinstance(x, Opening) else (x,) for n, x in rows.items()}
        sizes = {part.shape[-2] for parts in new.values() for part in parts}
        (size,) = sizes
        stop = start + size
        if stop > self.capacity or (self._rows and set(new) != set(self._rows)):
            raise ValueError(f"{size} rows more than {start}, {self.capacity} fit")
        kept = self._rows or {name: tuple(map(self._empty, parts)) for name, parts in new.items()}
        for name, parts in new.items():
            for whole, part in zip(kept[name], parts, strict=True):
                if (*whole.shape[:-2], size, whole.shape[-1]) != tuple(part.shape):
                    raise ValueError(f"a row of {name!r} has another shape than those that are kept")
        for name, parts in new.items():
            for whole, part in zip(kept[name], parts, strict=True):
                whole[..., start:stop, :] = part
                whole[..., stop : self.filled, :] = 0
        self._rows, self.filled = kept, stop

    def branch(self) -> KeptRows:
        """Return a copy that goes on by itself: what is there is the same, what is opened later has other masks."""
        other = KeptRows(self.capacity)
        other.filled, other._rows = self.filled, {n: tuple(x.clone() for x in kept) for n, kept in self._rows.items()}
        return other

    def _known(self, rows: int | None) -> int:
        """Return how many rows are meant. Raises ValueError unless so many are kept."""
        if rows is None:
            return self.filled
        if not 0 <= rows <= self.filled:
            raise ValueError(f"{rows} rows of {self.filled} that are kept")
        return rows

    def _read(self, whole: torch.Tensor, rows: int, shown: int) -> torch.Tensor:
        """Return the first ``rows`` of a tensor and zeros behind them, without a copy if nothing is to be hidden."""
        if shown <= self.capacity and rows == self.filled:
            return whole[..., :shown, :]
        return torch.nn.functional.pad(whole[..., :rows, :], (0, 0, 0, shown - rows))

    def _empty(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_zeros((*rows.shape[:-2], self.capacity, rows.shape[-1]))
