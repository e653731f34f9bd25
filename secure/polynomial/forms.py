"""Modules in polynomial form, in the place of attention's softmax, activations and normalizations.

Each has two modes. While a model is trained, it computes the exact function and measures how far its arguments stray
from a range (``range_loss``). Once ``frozen``, it uses a polynomial, mixed with the exact function while ``blend`` is
below one. Captured into a Program, each becomes operations whose protocols compare nothing (``approximations.powers``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approximations.fits import least_squares
from approximations.norms import polynomial_layer_norm, polynomial_rms_norm
from approximations.power_blocks import power_sums
from approximations.powers import power, power_error, power_pieces, power_scores, steps_for
from approximations.primitives import Piece
from secure.errors import InvalidInput
from secure.lowering.ranges import widened
from secure.polynomial.operations import (
    layer_norm_operation,
    polynomial_operation,
    power_operation,
    rms_norm_operation,
)
from secure.polynomial.recipe import Recipe

SAMPLES = 1 << 18  # arguments of an activation on which its polynomial is fitted
SPARE = 4
"""Fraction bits that all else has more than powers, which are one and more on the average of a row, and kept values."""

SPARE_OF_KEYS = 2
"""Fraction bits that all else has more than keys that are kept, and queries: their scores are read at a few alone."""

RANGE_ROOM = 2.0  # factor by which a frozen range reaches beyond the arguments seen


def _excess(away: Tensor) -> Tensor:
    """Return the mean square of the distances beyond a range, plus the largest distance.

    The largest counts by itself because the polynomial must hold for it too. away: signed distances in logarithms
    (positive beyond the range), so that the far outliers of a fresh student do not drown everything else.
    """
    beyond = F.relu(away)
    return beyond.square().sum() / (away > 0).sum().clamp_min(1) + beyond.amax()


class Form(nn.Module):
    """A module in polynomial form: it has a range, a loss for leaving that range, and a record of the arguments seen.

    found: what training found (``centre`` of the range, then ``low``, ``high``, ``steps``).
    """

    kind = ""
    floor = 0.0  # no argument can be smaller

    def __init__(self, recipe: Recipe, found: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.recipe, self.found = recipe, dict(found or {})
        self.blend = 1.0  # share of the polynomial in a frozen form, the rest is exact; below one only in training
        self.watching = False  # forward records the arguments that it saw, and its range loss
        self.guarded = False  # exact beyond the range; for training only, never in a served model
        self.range_loss: Tensor | None = None
        self.seen: list[Tensor] = []

    @property
    def frozen(self) -> bool:
        return "low" in self.found

    def wanted(self) -> tuple[float, float]:
        """Return the range in which training should keep arguments: the recipe's range less some room."""
        reach = math.sqrt(self.recipe.norm_spread) / RANGE_ROOM
        return self.found["centre"] / reach, self.found["centre"] * reach

    def _watch(self, value: Tensor, times: Tensor | float = 0.0) -> None:
        """Record a positive value's extremes, and its range loss, which grows with the distance from the range.

        times: the logarithm of a factor of the value.
        """
        if not self.watching:
            return
        logarithm = value.clamp_min(1e-30).log() + times
        self.seen.append(torch.stack([logarithm.detach().amin(), logarithm.detach().amax()]))
        if "centre" in self.found:
            low, high = self.wanted()
            self.range_loss = _excess(torch.maximum(logarithm - math.log(high), math.log(low) - logarithm))

    def _mixed(self, value: Tensor, form: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor]) -> Tensor:
        """Mix the polynomial (by ``blend``) with the exact function, for training.

        Beyond the range the result is exact, so that one sentence cannot make the loss infinite before the range loss
        has drawn it in.
        """
        low, high = self.bounds()
        inside = self.blend * form(value.clamp(low, high)) + (1 - self.blend) * exact(value)
        return torch.where((value < low) | (value > high), exact(value), inside)

    def bounds(self) -> tuple[float, float]:
        """Return the range on which the polynomial holds."""
        return self.found["low"], self.found["high"]

    def range_seen(self) -> tuple[float, float]:
        """Return the smallest and the largest argument since ``seen`` was emptied."""
        both = torch.stack(self.seen)
        return float(both[:, 0].min().exp()), float(both[:, 1].max().exp())

    def freeze(self) -> None:
        """Switch to polynomials on the range that was seen, plus some room."""
        low, high = (edge * room for edge, room in zip(self.range_seen(), (1 / RANGE_ROOM, RANGE_ROOM), strict=True))
        low, high = max(widened(low, down=True), self.floor), widened(high)
        steps = steps_for(*self._power(), low, high, self.recipe.inverse_error)
        self.found |= {"low": low, "high": high, "steps": steps}

    def assume(self) -> None:
        """Freeze on the range that training aims at. For models without weights."""
        self.found = {"centre": 1.0}
        low, high = self.wanted()
        steps = steps_for(*self._power(), low, high, self.recipe.inverse_error)
        self.found |= {"low": low, "high": high, "steps": steps}

    def _power(self) -> tuple[float, int]:
        """Return the exponent of the inverse power, and the degree of the polynomial that approximates it first."""
        return -1.0, self.recipe.reciprocal_degree

    def error(self) -> float:
        """Return the relative error of the polynomial against the exact function; zero before ranges are frozen."""
        if not self.frozen:
            return 0.0
        return power_error(*self._power(), self.found["low"], self.found["high"], self.found["steps"])


class PowerAttention(Form):
    """Attention by Power-Softmax. ``found`` holds the range of the mean of the scores' powers.

    scale_queries: multiplies the queries' projection by one factor per head, shape (heads,), before training. In a
    softmax model a head's mean power lies anywhere from 0.1 to 100,000, and one polynomial must hold for all heads.
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
        self.weighed = False  # values come with what is masked as zero; see ``weighed_values``
        self.padded = False  # keys that the last row does not see are padding; see ``padded_before``

    @property
    def floor(self) -> float:  # type: ignore[override]
        return self.recipe.eps  # means of even powers are not negative

    def wanted(self) -> tuple[float, float]:
        return self.floor, self.floor * self.recipe.attention_spread / RANGE_ROOM

    def forward(self, query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None, scaling: float) -> Tensor:
        """Attend with query, key and value of shape (B, H, T, d).

        weights: (B, 1, 1 or T, L), zero where masked, with a sum of one in every row; None for equal weights.
        """
        r = self.recipe
        if weights is not None and self.padded:
            value = value * (weights[..., -1:, :] > 0).to(value.dtype).transpose(-1, -2)
        if not self.frozen and self.weighed:
            raise InvalidInput("a decoder whose ranges are not frozen", "train it to the end, or freeze_untrained")
        exporting = torch.compiler.is_exporting()
        if not self.frozen:
            sums = power_sums(query, key, value, weights, r.exponent, r.offset, scaling, stable=True)
            least = r.eps * sums.largest**-r.exponent
            self._watch(sums.total + least, sums.largest.log() * r.exponent)
            return (sums.numerator / (sums.total + least)).to(value.dtype)
        if exporting or self.weighed:
            total, numerator = self._in_whole(query @ key.transpose(-1, -2), value, weights, scaling)
        else:
            numerator, total, _ = power_sums(query, key, value, weights, r.exponent, r.offset, scaling)
        total = total + r.eps
        self._watch(total)
        bounds = (self.found["low"], self.found["high"], r.reciprocal_degree, self.found["steps"])
        inverse: Tensor
        if exporting:
            inverse = power_operation(total, -1.0, *bounds)
        elif self.guarded:
            inverse = self._mixed(total.float(), lambda t: power(t, -1.0, *bounds), lambda t: 1 / t)
        else:
            inverse = power(total, -1.0, *bounds)
        return (numerator * inverse).to(value.dtype)

    def _in_whole(
        self, products: Tensor, value: Tensor, weights: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Return the total and the numerator from the matrix of all products, as a Program computes them."""
        r = self.recipe
        if torch.compiler.is_exporting():
            e = products  # not multiplied by the factor, which the polynomial takes
            for number, piece in enumerate(power_pieces(r.exponent, r.offset, scaling)):
                if number and self.weighed:  # keys behind a query are no part of the result, and may be far larger
                    e = e.tril(e.shape[-1] - e.shape[-2])
                e = polynomial_operation(e, list(piece.coefficients), piece.centre, SPARE)
        else:
            e = power_scores(products, r.exponent, r.offset, scaling)
        if weights is not None and self.weighed:
            # a row of the weights is equal where it is not zero: its largest entry is 1 / keys. The product by it takes
            # no round of its own, as the inverse takes longer; and values that are zero need no other mask
            share = weights.amax(-1, keepdim=True)
            e = e.tril(e.shape[-1] - e.shape[-2]).unsqueeze(-2)  # one opening for both products
            total = (e @ weights.unsqueeze(-1)).squeeze(-1)
            return total, (e @ value.unsqueeze(-3)).squeeze(-2) * share
        if weights is None:
            return e.mean(-1, keepdim=True), e @ (value * (1.0 / value.shape[-2]))
        if weights.shape[-2] == 1:  # the same for all rows: weigh the values once
            column = weights.transpose(-1, -2)
            return e @ column, e @ (value * column)
        weighted = e * weights
        return weighted.sum(-1, keepdim=True), weighted @ value


@contextmanager
def weighed_values(model: nn.Module) -> Iterator[None]:
    """Within a ``with`` block, let attention get values that are zero at all keys which are masked but by causality.

    A decoder keeps its values so: then no mask is multiplied by scores. It computes the same, padding included.
    """
    with _attentions(model, "weighed"):
        yield


@contextmanager
def padded_before(model: nn.Module) -> Iterator[None]:
    """Within a ``with`` block, let values count as zero, for every row, at all keys that the last row does not see.

    They are padding before the texts of a batch: other masks, such as windows, are not for it. Rows of padding then
    compute in training what they compute where ``weighed_values`` are served, and their ranges are the same.
    """
    with _attentions(model, "padded"):
        yield


@contextmanager
def _attentions(model: nn.Module, name: str) -> Iterator[None]:
    """Set an attribute of every attention within a ``with`` block."""
    attentions = [form for _, form in forms(model) if isinstance(form, PowerAttention)]
    for form in attentions:
        setattr(form, name, True)
    try:
        yield
    finally:
        for form in attentions:
            setattr(form, name, False)


class PolynomialActivation(Form):
    """A polynomial in place of GeLU and the like. ``found`` holds its coefficients, and the largest argument seen."""

    kind = "activation"

    def __init__(self, original: nn.Module, recipe: Recipe, found: dict[str, Any] | None = None) -> None:
        super().__init__(recipe, found)
        self.original = original

    @property
    def frozen(self) -> bool:
        return "coefficients" in self.found

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            self.range_loss = _excess((x.abs() / self.recipe.activation_reach).clamp_min(1e-6).log())
            self.seen.append(x.detach().abs().amax().clamp_min(1e-6).log().repeat(2))
        if not self.frozen:
            result: Tensor = self.original(x)
            return result
        coefficients = self.found["coefficients"]
        if torch.compiler.is_exporting():
            out: Tensor = polynomial_operation(x, list(coefficients), 0.0)
            return out
        piece = Piece(tuple(coefficients))
        if self.guarded:
            return self._mixed(x, piece, self.original)
        return piece(x)

    def bounds(self) -> tuple[float, float]:
        return -self.found["seen"], self.found["seen"]

    def fit(self, samples: Tensor) -> None:
        """Fit the polynomial by least squares on these arguments (one dimension)."""
        piece, error = least_squares(self.original, samples.cpu(), self.recipe.activation_degree)
        self.found |= {"coefficients": list(piece.coefficients), "error": float(f"{error:.4g}")}

    def freeze(self) -> None:
        """Record the largest argument seen. The polynomial itself comes from ``fit``, and no range must be kept."""
        self.found["seen"] = self.range_seen()[1]

    def assume(self) -> None:
        reach = self.recipe.activation_reach
        self.fit(torch.linspace(-reach, reach, 1001))
        self.found["seen"] = reach

    def error(self) -> float:
        """Return the root mean square error of the fit."""
        return float(self.found.get("error", 0.0))


class PolynomialNorm(Form):
    """LayerNorm over the last dimension, with the original's names of weight and bias.

    ``found`` holds the range of the variance.
    """

    kind = "norm"

    def __init__(self, original: nn.LayerNorm, recipe: Recipe, found: dict[str, Any] | None = None) -> None:
        super().__init__(recipe, found)
        if len(original.normalized_shape) != 1:
            raise InvalidInput(f"layer_norm over {original.normalized_shape}\nhint: the last dimension alone")
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
        weight = torch.ones(x.shape[-1], device=x.device) if weight is None else weight
        bias = torch.zeros(x.shape[-1], device=x.device) if bias is None else bias
        form = (self.eps, self.found["low"], self.found["high"], r.norm_degree, self.found["steps"])
        if torch.compiler.is_exporting():
            out: Tensor = layer_norm_operation(x, weight, bias, *form)
            return out
        if self.guarded:
            return self._trained(x, weight, bias)
        return torch.as_tensor(polynomial_layer_norm(x, weight, bias, *form))

    def _trained(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Compute the same function for training, with the inverse root by ``_mixed``."""
        centred = x - x.mean(-1, keepdim=True)
        edges = (self.found["low"] + self.eps, self.found["high"] + self.eps)
        form = (-0.5, *edges, self.recipe.norm_degree, self.found["steps"])
        variance = centred.square().mean(-1, keepdim=True)
        root = self._mixed(variance, lambda v: power(v + self.eps, *form), lambda v: (v + self.eps).rsqrt())
        out: Tensor = centred * root * weight + bias
        return out

    def _exact(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class PolynomialRMSNorm(Form):
    """RMSNorm over the last dimension, with the original's name of its weight.

    ``found`` holds the range of the mean square.
    """

    kind = "norm"

    def __init__(self, original: nn.Module, recipe: Recipe, found: dict[str, Any] | None = None) -> None:
        super().__init__(recipe, found)
        eps = getattr(original, "variance_epsilon", getattr(original, "eps", None))
        self.weight = cast(nn.Parameter, original.weight)
        self.eps = float(torch.finfo(torch.float32).eps if eps is None else eps)

    def _power(self) -> tuple[float, int]:
        return -0.5, self.recipe.norm_degree

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        if self.watching:
            self._watch(square)
        if not self.frozen:
            exact: Tensor = x * (square + self.eps).rsqrt() * self.weight
            return exact
        form = (self.eps, *self.bounds(), self.recipe.norm_degree, self.found["steps"])
        if torch.compiler.is_exporting():
            out: Tensor = rms_norm_operation(x, self.weight, *form)
            return out
        if not self.guarded:
            return torch.as_tensor(polynomial_rms_norm(x, self.weight, *form))
        low, high = (edge + self.eps for edge in self.bounds())
        power_of = (-0.5, low, high, *form[-2:])
        root = self._mixed(
            square, lambda v: torch.as_tensor(power(v + self.eps, *power_of)), lambda v: (v + self.eps).rsqrt()
        )
        trained: Tensor = x * root * self.weight
        return trained


def forms(model: nn.Module) -> Iterator[tuple[str, Form]]:
    """Yield the polynomial modules of a model with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, Form):
            yield path, module


def freeze_untrained(model: nn.Module, run: Callable[[], object]) -> None:
    """Freeze every form on the arguments that it gets while ``run`` runs, without training. For costs and tests."""
    met: dict[Form, list[Tensor]] = {}
    hooks = []

    def keep(form: Form, arguments: tuple[Tensor, ...]) -> None:
        met.setdefault(form, []).append(arguments[0].flatten())

    for _, form in forms(model):
        form.found, form.watching = {"centre": 1.0}, True
        form.seen.clear()
        if isinstance(form, PolynomialActivation):
            hooks.append(form.register_forward_pre_hook(keep))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    for _, form in forms(model):
        form.watching = False
        if isinstance(form, PolynomialActivation) and form in met:
            form.fit(torch.cat(met[form])[:: 1 + sum(map(len, met[form])) // SAMPLES])
        if form.seen:
            form.freeze()
            form.seen.clear()


def described(model: nn.Module, recipe: Recipe) -> Recipe:
    """Return the recipe, completed by what the model's modules found."""
    return recipe.model_copy(update={"layers": {path: form.found for path, form in forms(model)}})
