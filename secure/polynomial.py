"""Models in polynomial form: modules that take the place of attention's softmax, activations and normalizations.

Each module has two faces. While a model is trained, attention and normalizations divide exactly and tell how far their
arguments stray from a range (``range_loss``); once ``frozen`` on a range, they use polynomials on it. Captured into a
Program, each becomes one operation whose protocol compares nothing (``approximations.powers``).

``polynomialize`` swaps them into any Hugging Face model whose attention goes through transformers' attention interface
and keeps all weights under their names; a ``Recipe`` says how, and with the ranges and coefficients that were found it
is what a checkpoint needs beside its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from approximations.fits import least_squares
from approximations.norms import polynomial_layer_norm
from approximations.powers import polynomial, power, power_attend, power_error, power_pieces, power_scores, steps_for
from approximations.primitives import Piece
from secure.operations import layer_norm_operation, polynomial_operation, power_operation

INTERFACE = "unseen-power"  # the name of our attention in transformers' registry
QUAD = 5.0  # the shift of 2Quad
RANGE_ROOM = 2.0  # a frozen range reaches this far beyond what was seen


class Recipe(BaseModel):
    """How a model is put into polynomial form. ``layers``: what was found for each module, by path.

    attention: "power" is Power-Softmax (1 + x/shift)^p, or x^p for shift 0; shift None is p. "quad" is MPCFormer's
    2Quad, p = 2 and shift 5. Both over a mean with ``eps``.
    activation_degree: of the least-squares polynomial; activation_reach: what |arguments| should stay below. *_degree: of the polynomials that inverse powers begin with.
    inverse_error: relative error of inverse powers, which training gets used to; corrections follow until it is met.
    *_spread: how many times larger than the smallest the largest argument of an inverse power should be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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

    @property
    def exponent(self) -> int:
        return self.power if self.attention == "power" else 2

    @property
    def offset(self) -> float:
        """c of (1 + x/c)^p, zero for x^p."""
        if self.attention == "quad":
            return QUAD
        return float(self.power) if self.shift is None else self.shift


def _excess(away: Tensor) -> Tensor:
    """The mean square of what lies beyond a range, and the largest: polynomials must hold for every single value."""
    beyond = F.relu(away)
    return beyond.square().sum() / (away > 0).sum().clamp_min(1) + beyond.amax().square()


class Form(nn.Module):
    """What the three have in common: a range, a loss for leaving it, and what was seen."""

    kind = ""
    floor = 0.0  # below which no argument can fall

    def __init__(self, recipe: Recipe, found: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.recipe, self.found = recipe, dict(found or {})
        self.blend = 1.0  # how much of a frozen form is the polynomial; the rest is exact. Below one in training alone
        self.watching = False  # whether forward keeps what it saw, and its range loss
        self.range_loss: Tensor | None = None
        self.seen: list[Tensor] = []

    @property
    def frozen(self) -> bool:
        return "low" in self.found

    def wanted(self) -> tuple[float, float]:
        """The range that training should keep arguments in, so that with some room it is the recipe's."""
        reach = math.sqrt(self.recipe.norm_spread) / RANGE_ROOM
        return self.found["centre"] / reach, self.found["centre"] * reach

    def _watch(self, value: Tensor) -> None:
        """Keep the range loss of a positive value: squared distance of its logarithm from the wanted range."""
        if not self.watching:
            return
        logarithm = value.clamp_min(1e-12).log()
        self.seen.append(torch.stack([logarithm.detach().amin(), logarithm.detach().amax()]))
        if "centre" in self.found:
            low, high = self.wanted()
            self.range_loss = _excess(torch.maximum(logarithm - math.log(high), math.log(low) - logarithm))

    def _kept(self, value: Tensor) -> Tensor:
        """In training a value beyond the range is taken at its edge: one sentence must not make the loss infinite."""
        return value.clamp(self.found["low"], self.found["high"]) if self.watching else value

    def _blended(self, polynomial: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        return polynomial if self.blend == 1.0 else self.blend * polynomial + (1 - self.blend) * exact()

    def range_seen(self) -> tuple[float, float]:
        """The smallest and the largest argument since ``seen`` was emptied."""
        both = torch.stack(self.seen)
        return float(both[:, 0].min().exp()), float(both[:, 1].max().exp())

    def freeze(self) -> None:
        """From here on use polynomials on the range that was seen, and some room."""
        low, high = (edge * room for edge, room in zip(self.range_seen(), (1 / RANGE_ROOM, RANGE_ROOM), strict=True))
        low = max(low, self.floor)
        steps = steps_for(*self._power(), low, high, self.recipe.inverse_error)
        self.found |= {"low": low, "high": high, "steps": steps}

    def _power(self) -> tuple[float, int]:
        """The exponent of its inverse power, and the degree of the polynomial that this begins with."""
        return -1.0, self.recipe.reciprocal_degree

    def error(self) -> float:
        """Of the polynomial beside the exact function; zero before ranges are frozen."""
        if not self.frozen:
            return 0.0
        return power_error(*self._power(), self.found["low"], self.found["high"], self.found["steps"])


class PowerAttention(Form):
    """Attention by Power-Softmax; ``found``: the range of the mean of the scores' powers.

    scale_queries: multiplies the queries' projection by one factor per head (heads,), before training: in a softmax
    model a head's mean power is anything from 0.1 to 100,000, and one polynomial must hold for all heads.
    """

    kind = "attention"

    def __init__(
        self,
        recipe: Recipe,
        found: dict[str, Any] | None = None,
        scale_queries: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__(recipe, found)
        self.scale_queries = scale_queries

    @property
    def floor(self) -> float:  # type: ignore[override]
        return self.recipe.eps  # means of even powers are not negative

    def wanted(self) -> tuple[float, float]:
        return self.floor, self.floor * self.recipe.attention_spread / RANGE_ROOM

    def forward(self, query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None, scaling: float) -> Tensor:
        """(B, H, T, d) each; weights (B, 1, 1 or T, L), zero where masked, adding up to one in every row; None: equal
        ones.
        """
        r = self.recipe
        scores = (query @ key.transpose(-1, -2)) * scaling
        if not self.frozen:
            if self.watching:
                powers = power_scores(scores, r.exponent, r.offset) * key_weights(weights, scores)
                self._watch(powers.sum(-1) + r.eps)
            return power_attend(scores, value, key_weights(weights, scores), r.exponent, r.eps, r.offset, stable=True)
        exporting = torch.compiler.is_exporting()
        if exporting:
            e = scores
            for piece in power_pieces(r.exponent, r.offset):
                e = polynomial_operation(e, list(piece.coefficients), piece.centre)
        else:
            e = power_scores(scores, r.exponent, r.offset)
        if weights is None:
            total, numerator = e.mean(-1, keepdim=True), e @ (value * (1.0 / value.shape[-2]))
        elif weights.shape[-2] == 1:  # the same for all rows: weigh the values once
            column = weights.transpose(-1, -2)
            total, numerator = e @ column, e @ (value * column)
        else:
            weighted = e * weights
            total, numerator = weighted.sum(-1, keepdim=True), weighted @ value
        total = total + r.eps
        self._watch(total)
        bounds = (self.found["low"], self.found["high"], r.reciprocal_degree, self.found["steps"])
        inverse: Tensor = (
            power_operation(total, -1.0, *bounds) if exporting else power(self._kept(total), -1.0, *bounds)
        )
        out: Tensor = numerator * self._blended(inverse, lambda: 1 / total)
        return out


class PolynomialActivation(Form):
    """A polynomial in place of GeLU and the like; ``found``: its coefficients, and how far arguments reached."""

    kind = "activation"

    def __init__(self, original: nn.Module, recipe: Recipe, found: dict[str, Any] | None = None) -> None:
        super().__init__(recipe, found)
        self.original = original

    @property
    def frozen(self) -> bool:
        return "coefficients" in self.found

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            self.range_loss = _excess(x.abs() / self.recipe.activation_reach - 1)
            self.seen.append(x.detach().abs().amax().clamp_min(1e-6).log().repeat(2))
        if not self.frozen:
            result: Tensor = self.original(x)
            return result
        coefficients = self.found["coefficients"]
        if torch.compiler.is_exporting():
            out: Tensor = polynomial_operation(x, list(coefficients), 0.0)
            return out
        return self._blended(torch.as_tensor(polynomial(x, Piece(tuple(coefficients)))), lambda: self.original(x))

    def fit(self, samples: Tensor) -> None:
        """Least squares under these arguments (one dimension)."""
        piece, error = least_squares(self.original, samples, self.recipe.activation_degree)
        self.found |= {"coefficients": list(piece.coefficients), "error": float(f"{error:.4g}")}

    def freeze(self) -> None:
        """``fit`` gives its polynomial; there is no range that it must keep."""
        self.found["seen"] = self.range_seen()[1]

    def error(self) -> float:
        """The root mean square where it was fitted."""
        return float(self.found.get("error", 0.0))


class PolynomialNorm(Form):
    """LayerNorm over the last dimension, under the names of its weight and bias; ``found``: the range of the
    variance.
    """

    kind = "norm"

    def __init__(self, original: nn.LayerNorm, recipe: Recipe, found: dict[str, Any] | None = None) -> None:
        super().__init__(recipe, found)
        if len(original.normalized_shape) != 1:
            raise ValueError(f"layer_norm over {original.normalized_shape}\nhint: the last dimension alone")
        self.weight, self.bias, self.eps = original.weight, original.bias, original.eps

    def _power(self) -> tuple[float, int]:
        return -0.5, self.recipe.norm_degree

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            self._watch(x.var(-1, unbiased=False))
        if not self.frozen:
            return self._exact(x)
        r = self.recipe
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        weight = torch.ones(x.shape[-1]) if weight is None else weight
        bias = torch.zeros(x.shape[-1]) if bias is None else bias
        form = (self.eps, self.found["low"], self.found["high"], r.norm_degree, self.found["steps"])
        if torch.compiler.is_exporting():
            out: Tensor = layer_norm_operation(x, weight, bias, *form)
            return out
        if self.watching:
            return self._blended(self._trained(x, weight, bias), lambda: self._exact(x))
        return torch.as_tensor(polynomial_layer_norm(x, weight, bias, *form))

    def _trained(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same function, with the variance kept in its range."""
        centred = x - x.mean(-1, keepdim=True)
        variance = self._kept(centred.square().mean(-1, keepdim=True)) + self.eps
        edges = (self.found["low"] + self.eps, self.found["high"] + self.eps)
        root = power(variance, -0.5, *edges, self.recipe.norm_degree, self.found["steps"])
        return centred * root * weight + bias

    def _exact(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def forms(model: nn.Module) -> Iterator[tuple[str, Form]]:
    """The polynomial modules of a model, by path."""
    for path, module in model.named_modules():
        if isinstance(module, Form):
            yield path, module


# Hugging Face models

_ACTIVATIONS = ("GELU", "SiLU", "ReLU", "QuickGELU", "NewGELU", "Tanh")


def read_recipe(path: Path) -> Recipe:
    """A recipe file; ValueError where it is none."""
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is no recipe: {error.errors()[0]['msg']}\nhint: unseen train writes it") from None


def polynomialize(model: nn.Module, recipe: Recipe, prefix: str = "") -> nn.Module:
    """Swap a model's softmax, activations and layer norms, in place; ``recipe.layers`` restores what was found before.

    prefix: of the model's own path in those names.
    Weights and their names stay. ValueError for an architecture without a known recipe: it names what was found.
    """
    attention = [(n, m) for n, m in model.named_modules() if _goes_through_interface(m)]
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    activations = [(n, m) for n, m in model.named_modules() if _is_activation(m)]
    others = sorted({type(m).__name__ for _, m in model.named_modules() if _has_no_form(m)})
    if not attention or others:
        kinds = sorted({type(m).__name__ for _, m in model.named_modules() if not list(m.children())})
        raise ValueError(
            f"{type(model).__name__} has no known polynomial form: "
            + (f"{', '.join(others)} cannot be replaced" if others else "no attention that can be replaced")
            + f"; its modules are {', '.join(kinds)}\nhint: supported are attention through transformers' interface "
            "(BERT, RoBERTa, DistilBERT, ViT, GPT-2), nn.LayerNorm, and the activations GeLU, SiLU, ReLU and tanh"
        )
    for path, module in attention:
        found = recipe.layers.get(f"{prefix}{path}.polynomial")
        module.add_module("polynomial", PowerAttention(recipe, found, _query_scaling(module)))
        module.config._attn_implementation = INTERFACE
    for path, module in norms:
        _replace(model, path, PolynomialNorm(module, recipe, recipe.layers.get(prefix + path)))
    for path, module in activations:
        _replace(model, path, PolynomialActivation(module, recipe, recipe.layers.get(prefix + path)))
    _register()
    return model


def described(model: nn.Module, recipe: Recipe) -> Recipe:
    """The recipe with what the model's modules found."""
    return recipe.model_copy(update={"layers": {path: form.found for path, form in forms(model)}})


def _goes_through_interface(module: nn.Module) -> bool:
    return isinstance(getattr(module, "scaling", None), float) and hasattr(module, "config")


def _query_scaling(attention: nn.Module) -> Callable[[Tensor], None]:
    """Of the projection that an attention module's queries come from, by the names that it goes by."""
    for name in ("query", "q_lin", "q_proj", "c_attn"):
        if isinstance(projection := getattr(attention, name, None), nn.Module):
            break
    else:
        children = ", ".join(name for name, _ in attention.named_children())
        raise ValueError(
            f"{type(attention).__name__} has no known projection of queries among {children}\n"
            "hint: query, q_lin, q_proj and c_attn are known"
        )

    def scale(factors: Tensor) -> None:
        weight: Any = projection.weight
        bias: Any = projection.bias
        by_column = name == "c_attn"  # GPT-2's, of queries, keys and values, is (in, out)
        width = weight.shape[1] // 3 if by_column else weight.shape[0]
        each = factors.to(weight).repeat_interleave(width // len(factors))
        with torch.no_grad():
            if by_column:
                weight[:, :width] *= each
            else:
                weight *= each[:, None]
            if bias is not None:
                bias[:width] *= each

    return scale


def _is_activation(module: nn.Module) -> bool:
    name = type(module).__name__
    return not list(module.children()) and any(name.startswith(known) for known in _ACTIVATIONS)


def _has_no_form(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.endswith("RMSNorm") or isinstance(module, nn.Softmax | nn.MultiheadAttention)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(INTERFACE, _attention)
    AttentionMaskInterface.register(INTERFACE, eager_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; the mask's summands become weights."""
    form: Any = module.polynomial
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = form(query, key, value, mask_weights(attention_mask, query), factor)
    return out.transpose(1, 2).contiguous(), None


def mask_weights(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """An additive mask (B, 1, 1 or T, L), zero or very low, as weights of the keys."""
    if mask is None:
        return None
    keep = (mask > -1.0).to(query.dtype)
    return keep / keep.sum(-1, keepdim=True)


def key_weights(weights: Tensor | None, scores: Tensor) -> Tensor:
    """The weights of the keys, equal ones if there are none."""
    return scores.new_full((1,), 1.0 / scores.shape[-1]) if weights is None else weights
