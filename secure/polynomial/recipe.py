"""A recipe says how a model is put into polynomial form, and holds what training found for its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from secure.errors import InvalidInput

RECIPE = "polynomial.json"
"""The name of a recipe's file, beside the weights of a model in polynomial form."""

CHECKPOINT = "training.safetensors"
"""The name of the file from which a training goes on, in the directory that it writes its model to in the end."""

QUAD = 5.0  # the shift of 2Quad


Size = Annotated[float, Field(ge=1e-9, le=1e9)]
Coefficient = Annotated[float, Field(ge=-1e6, le=1e6)]


class Found(BaseModel):
    """The values that a recipe may hold for one module.

    They are validated strictly, because a recipe file may come from anyone and its values enter computations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    centre: Size | None = None
    low: Size | None = None
    high: Size | None = None
    steps: int | None = Field(default=None, ge=0, le=4)
    coefficients: list[Coefficient] | None = Field(default=None, min_length=1, max_length=5)
    seen: Size | None = None
    error: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = self.model_fields_set
        for together in ({"low", "high", "steps"}, {"coefficients", "seen"}):
            if given & together and not together <= given:
                raise InvalidInput(f"{', '.join(sorted(together - given))} is missing")
        if any(getattr(self, name) is None for name in given):
            raise InvalidInput("null is no value")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise InvalidInput(f"a range from {self.low} to {self.high}")
        return self


Power = Annotated[int, Field(ge=2, le=8, multiple_of=2)]
MOST_LAYERS = 1 << 10


class Recipe(BaseModel):
    """The settings by which a model is put into polynomial form. ``layers``: what was found for each module, by path.

    attention: "power" is Power-Softmax (1 + x/shift)^p, or x^p for shift 0; shift None is p. "quad" is MPCFormer's
    2Quad, p = 2 and shift 5. Both are divided by a mean plus ``eps``. power: p of all attention layers, or of each.
    activation_degree: degree of the least-squares polynomial. activation_reach: bound for the magnitude of arguments.
    reciprocal_degree, norm_degree: degrees of the polynomials that inverse powers begin with.
    inverse_error: relative error allowed for inverse powers, which training compensates; corrections are added until it
    is met.
    *_spread: the ratio of the largest to the smallest argument of an inverse power that training aims at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    attention: Literal["power", "quad"] = "power"
    power: Power | Annotated[tuple[Power, ...], Field(min_length=1, max_length=MOST_LAYERS)] = 4
    shift: float | None = Field(default=None, ge=0)  # zero, or not so small that powers of its inverse overflow
    eps: float = Field(default=0.1, gt=0, lt=1)
    activation_degree: int = Field(default=4, ge=2, le=4)
    activation_reach: float = Field(default=5.0, gt=0)
    reciprocal_degree: int = Field(default=3, ge=1, le=3)
    norm_degree: int = Field(default=3, ge=1, le=3)
    inverse_error: float = Field(default=0.3, gt=0, lt=1)
    norm_spread: float = Field(default=32.0, gt=1)
    attention_spread: float = Field(default=100.0, gt=1)
    layers: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("shift")
    @classmethod
    def _sane(cls, shift: float | None) -> float | None:
        if shift and not 2.0**-6 <= shift <= 2.0**6:
            raise InvalidInput("a shift is 0 or from 1/64 to 64")
        return shift

    @field_validator("layers")
    @classmethod
    def _known(cls, layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {path: Found.model_validate(found).model_dump(exclude_unset=True) for path, found in layers.items()}

    def of_layer(self, number: int, layers: int) -> Recipe:
        """Return the recipe of one attention layer of so many, with its own power.

        Raises InvalidInput for as many powers as there are not layers.
        """
        if isinstance(self.power, int):
            return self
        if len(self.power) != layers:
            raise InvalidInput(
                f"{len(self.power)} powers for the {layers} attention layers of the model",
                "one for each, or for all",
            )
        return self.model_copy(update={"power": self.power[number]})

    @property
    def exponent(self) -> int:
        """The power p of a recipe that has one for all layers."""
        if self.attention != "power":
            return 2
        assert isinstance(self.power, int)  # of one layer
        return self.power

    @property
    def offset(self) -> float:
        """The shift c of (1 + x/c)^p; zero stands for x^p."""
        if self.attention == "quad":
            return QUAD
        return float(self.exponent) if self.shift is None else self.shift


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises InvalidInput if it is not a valid recipe."""
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InvalidInput(f"{path} is no recipe: {error.errors()[0]['msg']}\nhint: unseen train writes it") from None
