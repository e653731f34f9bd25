"""A recipe: how a model is put into polynomial form, and what was found for its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

QUAD = 5.0  # the shift of 2Quad


class Found(BaseModel):
    """What may be known of a module: a recipe file comes from somebody else, and what it says is computed with."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    centre: float | None = Field(default=None, gt=0)
    low: float | None = Field(default=None, gt=0)
    high: float | None = Field(default=None, gt=0)
    steps: int = Field(default=0, ge=0, le=4)
    coefficients: list[float] = Field(default=[], max_length=5)
    seen: float | None = Field(default=None, gt=0)
    error: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if (self.low is None) != (self.high is None) or (self.low and self.high and self.low >= self.high):
            raise ValueError(f"a range from {self.low} to {self.high}")
        return self


class Recipe(BaseModel):
    """How a model is put into polynomial form. ``layers``: what was found for each module, by path.

    attention: "power" is Power-Softmax (1 + x/shift)^p, or x^p for shift 0; shift None is p. "quad" is MPCFormer's
    2Quad, p = 2 and shift 5. Both over a mean with ``eps``.
    activation_degree: of the least-squares polynomial; activation_reach: what |arguments| should stay below.
    reciprocal_degree, norm_degree: of the polynomials that inverse powers begin with.
    inverse_error: relative error of inverse powers, which training gets used to; corrections follow until it is met.
    *_spread: how many times larger than the smallest the largest argument of an inverse power should be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    attention: Literal["power", "quad"] = "power"
    power: int = Field(default=4, ge=2, le=8, multiple_of=2)
    shift: float | None = Field(default=None, ge=0)
    eps: float = Field(default=0.1, gt=0, lt=1)
    activation_degree: int = Field(default=4, ge=2, le=4)
    activation_reach: float = Field(default=5.0, gt=0)
    reciprocal_degree: int = Field(default=3, ge=1, le=3)
    norm_degree: int = Field(default=3, ge=1, le=3)
    inverse_error: float = Field(default=0.3, gt=0, lt=1)
    norm_spread: float = Field(default=32.0, gt=1)
    attention_spread: float = Field(default=100.0, gt=1)
    layers: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("layers")
    @classmethod
    def _known(cls, layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for found in layers.values():
            Found.model_validate(found)
        return layers

    @property
    def exponent(self) -> int:
        return self.power if self.attention == "power" else 2

    @property
    def offset(self) -> float:
        """c of (1 + x/c)^p, zero for x^p."""
        if self.attention == "quad":
            return QUAD
        return float(self.power) if self.shift is None else self.shift


def read_recipe(path: Path) -> Recipe:
    """A recipe file; ValueError where it is none."""
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is no recipe: {error.errors()[0]['msg']}\nhint: unseen train writes it") from None
