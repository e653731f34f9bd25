"""Types of the fields of protocols, with the bounds that a field from somebody else must keep.

A protocol's fields are annotated with these types, so that their bounds stand in its class and nowhere else. Python
ignores them; ``secure.mpc.program`` checks them (by pydantic) before it computes anything from a decoded field.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, AllowInfNan, FailFast, Field, Strict

from protocols import ring

MAXIMUM_ELEMENTS = 1 << 30
"""The most elements of one tensor."""

RANK = 16
"""The most dimensions of a tensor."""

ENTRIES = 256
"""The most entries of a list of constants: thresholds, coefficients, segments. Ours have up to 57."""


def _few_elements(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > MAXIMUM_ELEMENTS:
        raise ValueError(f"more than {MAXIMUM_ELEMENTS} elements")
    return shape


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds characters that cannot be printed")
    return text


Whole = Annotated[int, Strict(), Field(ge=0, le=MAXIMUM_ELEMENTS)]
"""A size, a position or a count."""

Count = Annotated[int, Strict(), Field(ge=1, le=ENTRIES)]
"""A number of constants or of bits of an element."""

Shape = Annotated[tuple[Whole, ...], FailFast(), Field(max_length=RANK), AfterValidator(_few_elements)]

Operands = Annotated[tuple[Whole, ...], FailFast(), Field(max_length=1 << 12)]
"""Positions of what an instruction or a node reads."""

Ring = Annotated[int, Strict(), Field(ge=1, le=ring.WORD)]
"""The bits of a ring."""

Bits = Annotated[int, Strict(), Field(ge=0, le=ring.WORD)]
"""A number of bits: a shift, or fraction bits."""

Residue = Annotated[int, Strict(), Field(gt=-(1 << 80), lt=1 << 80)]
"""A constant of a ring, which is reduced where it is used."""

Residues = Annotated[tuple[Residue, ...], FailFast(), Field(min_length=1, max_length=ENTRIES)]

ResidueRows = Annotated[tuple[Residues, ...], FailFast(), Field(min_length=1, max_length=ENTRIES)]

Degree = Annotated[int, Strict(), Field(ge=1, le=16)]

Bands = Annotated[
    tuple[Annotated[tuple[Ring, Bits, Degree, Residue, Residue], FailFast()], ...],
    FailFast(),
    Field(min_length=1, max_length=8),
]
"""Tables of bands of one argument: the ring and the shift of each, its degree, and its lowest and highest argument."""

Digits = Annotated[tuple[Annotated[tuple[Bits, Whole], FailFast()], ...], FailFast(), Field(min_length=1, max_length=8)]
"""The shift of each of several coarse digits, and the count that it is compared with."""

Root = Annotated[int, Strict(), Field(ge=1, le=2)]
"""The root of an inverse power: 1 for 1 / x, 2 for 1 / sqrt(x)."""

Corrections = Annotated[int, Strict(), Field(ge=0, le=4)]
"""A number of corrections of a polynomial, each of which raises its degree fourfold and more."""

Axis = Annotated[int, Strict(), Field(ge=-RANK, lt=RANK)]

Axes = Annotated[tuple[Axis, ...], FailFast(), Field(max_length=RANK)]

Real = Annotated[float, Strict(), AllowInfNan(False)]

Start = Annotated[tuple[Real, ...], FailFast(), Field(max_length=8)]
"""The coefficients of a polynomial that corrections follow, or none."""

Flag = Annotated[bool, Strict()]

Size = Annotated[int, Strict(), Field(ge=1, le=1 << 12)]

Sizes = Annotated[tuple[Size, ...], FailFast(), Field(min_length=1, max_length=3)]
"""The sizes of a window, its steps or its gaps, one for each dimension."""

Padding = Annotated[tuple[Annotated[int, Strict(), Field(ge=0, le=1 << 12)], ...], FailFast(), Field(max_length=3)]
"""The zeros on both sides of each dimension."""

Place = Annotated[int, Strict(), Field(ge=-1, le=MAXIMUM_ELEMENTS)]

Step = Annotated[int, Strict(), Field(ge=-MAXIMUM_ELEMENTS, le=MAXIMUM_ELEMENTS)]

Runs = Annotated[
    tuple[Annotated[tuple[Place, Step, Whole], FailFast()], ...], FailFast(), Field(min_length=1, max_length=1 << 14)
]
"""Positions of entries, in runs of (start, step, count); see ``protocols.windows``."""

Rows = Annotated[
    tuple[Annotated[tuple[Whole, ...], FailFast(), Field(min_length=1, max_length=ENTRIES)], ...],
    FailFast(),
    Field(min_length=1, max_length=ENTRIES),
]

Signs = Annotated[tuple[Flag, ...], FailFast(), Field(min_length=1, max_length=ENTRIES)]

Name = Annotated[str, Field(max_length=512), AfterValidator(_printable)]
"""A name of a module, a weight or an input. It is printable, because messages show it."""

Text = Annotated[str, Field(max_length=1 << 20), AfterValidator(_printable)]
"""A printable text that is longer than a name: the settings of a task."""
