"""A lesson is what a student in polynomial form learns from, by the kind of its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secure.training.trainer import Batch, Loss


@dataclass(frozen=True)
class Lesson:
    """The original and the student, the data, and the loss.

    swapped: the part of the student whose functions are replaced. prefix: its path in the student, with a trailing
    point. collate: makes a batch of items of ``data``. forward: runs the student alone. size: of an item, if batches
    are to have items of about one size.
    """

    teacher: nn.Module
    student: nn.Module
    swapped: nn.Module
    prefix: str
    data: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    loss: Loss
    forward: Callable[[Batch], object]
    size: Callable[[Any], int] | None = None
