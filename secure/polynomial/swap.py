"""``polynomialize`` swaps polynomial forms into Hugging Face models that use transformers' attention interface.

All weights keep their names, so that a trained model is saved as an ordinary checkpoint with its recipe beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secure.errors import InvalidInput
from secure.polynomial.forms import PolynomialActivation, PolynomialNorm, PolynomialRMSNorm, PowerAttention, forms
from secure.polynomial.recipe import RECIPE, Recipe, read_recipe

INTERFACE = "unseen-power"  # the name of our attention in transformers' registry
_ACTIVATIONS = ("GELU", "SiLU", "ReLU", "QuickGELU", "NewGELU", "Tanh")


def polynomialize(model: nn.Module, recipe: Recipe, prefix: str = "") -> nn.Module:
    """Swap a model's softmax, activations and layer norms in place, and return the model.

    ``recipe.layers`` restores what training found before. prefix: the path of this model in those names, with its
    trailing point. Weights and their names stay. Raises InvalidInput for an architecture without a known polynomial
    form, with the names of its modules.
    """
    attention = [(n, m) for n, m in model.named_modules() if _goes_through_interface(m)]
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) or _is_rms(m)]
    activations = [(n, m) for n, m in model.named_modules() if _is_activation(m)]
    others = sorted({type(m).__name__ for _, m in model.named_modules() if _has_no_form(m)})
    if not attention or others:
        kinds = sorted({type(m).__name__ for _, m in model.named_modules() if not list(m.children())})
        raise InvalidInput(
            f"{type(model).__name__} has no known polynomial form: "
            + (f"{', '.join(others)} cannot be replaced" if others else "no attention that can be replaced")
            + f"; its modules are {', '.join(kinds)}\nhint: supported are attention through transformers' interface "
            "(BERT, RoBERTa, DistilBERT, ViT, GPT-2, GPT-NeoX, LLaMA), LayerNorm, RMSNorm, and the activations GeLU, "
            "SiLU, ReLU and tanh"
        )
    for number, (path, module) in enumerate(attention):
        found, own = recipe.layers.get(f"{prefix}{path}.polynomial"), recipe.of_layer(number, len(attention))
        module.add_module("polynomial", PowerAttention(own, found, _query_scaling(module)))
        module.config._attn_implementation = INTERFACE
    for path, module in norms:
        found = recipe.layers.get(prefix + path)
        norm = PolynomialRMSNorm(module, recipe, found) if _is_rms(module) else PolynomialNorm(module, recipe, found)
        _replace(model, path, norm)
    for path, module in activations:
        _replace(model, path, PolynomialActivation(module, recipe, recipe.layers.get(prefix + path)))
    _register()
    known = {prefix + path for path, _ in forms(model)}
    if unknown := [path for path in recipe.layers if path not in known]:
        raise InvalidInput(
            f"the recipe knows of {unknown[0]!r}, the model does not\nhint: it is a recipe for another model"
        )
    return model


def restore(model: nn.Module, directory: Path, prefix: str = "") -> nn.Module:
    """Put a model that was loaded from a directory into polynomial form, if there is a recipe beside its weights."""
    recipe = directory / RECIPE
    return polynomialize(model, read_recipe(recipe), prefix) if recipe.is_file() else model


def _goes_through_interface(module: nn.Module) -> bool:
    return isinstance(getattr(module, "scaling", None), float) and hasattr(module, "config")


def _query_scaling(attention: nn.Module) -> Callable[[Tensor], None]:
    """Return a function that scales an attention module's query projection, which is found by its usual names."""
    for name in ("query", "q_lin", "q_proj", "c_attn", "query_key_value"):
        if isinstance(projection := getattr(attention, name, None), nn.Module):
            break
    else:
        children = ", ".join(name for name, _ in attention.named_children())
        raise InvalidInput(
            f"{type(attention).__name__} has no known projection of queries among {children}\n"
            "hint: query, q_lin, q_proj, c_attn and query_key_value are known"
        )

    def scale(factors: Tensor) -> None:
        weight: Any = projection.weight
        bias: Any = projection.bias
        if name == "query_key_value":  # GPT-NeoX's has the queries, keys and values of each head together
            with torch.no_grad():
                for part in (weight, bias):
                    if part is not None:
                        part.view(len(factors), 3, -1)[:, 0] *= factors.to(part)[:, None]
            return
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


def _is_rms(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter)


def _has_no_form(module: nn.Module) -> bool:
    return isinstance(module, nn.Softmax | nn.MultiheadAttention)


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
    **others: Any,
) -> tuple[Tensor, None]:
    """Implement transformers' attention interface; the additive mask becomes weights of the keys."""
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise InvalidInput(f"{type(module).__name__} asks for {name}, which has no polynomial form")
    form: Any = module.polynomial
    groups: int = getattr(module, "num_key_value_groups", 1)
    if groups > 1:  # queries that share keys and values
        key, value = (_shared(x, groups) for x in (key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = form(query, key, value, mask_weights(attention_mask, query), factor)
    return out.transpose(1, 2).contiguous(), None


def _shared(x: Tensor, groups: int) -> Tensor:
    """Repeat each head (B, H, L, d) for the queries that share it, as transformers does."""
    return x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def seen_keys(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask, or an additive one of zero or very low, into ones and zeros."""
    return (mask if mask.dtype == torch.bool else mask > -1.0).to(dtype)


def mask_weights(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Turn an additive mask (B, 1, 1 or T, L), zero or very low, into weights of the keys with a sum of one."""
    if mask is None:
        return None
    keep = seen_keys(mask, query.dtype)
    return keep / keep.sum(-1, keepdim=True).clamp_min(1)  # a row without keys attends to nothing
