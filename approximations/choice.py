"""The sets of approximations that can replace a model's operations, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from approximations import puma
from approximations.activations import GELU_FORMS, gelu, silu
from approximations.norms import layer_norm_factors
from approximations.powers import power
from approximations.softmax import attend, softmax

Function = Callable[..., Any]


@dataclass(frozen=True)
class Functions:
    """A set of approximations. Operations not listed (tanh, ReLU, RMSNorm, L2 normalization) have only one each."""

    name: str
    gelu_form: str
    gelu: Function
    silu: Function
    softmax: Function
    attend: Function
    layer_norm_factors: Function  # before its weight and bias
    power: Function = power  # of models in polynomial form; a compiler may know another way to compute the same
    power_of_few: Function = power  # the same of few values, for which it may cost more

    @property
    def labels(self) -> dict[str, str]:
        """The labels that a Program records for this set."""
        return {"gelu": self.gelu_form, "approximations": self.name}


_DEFAULT = Functions("default", GELU_FORMS[0], gelu, silu, softmax, attend, layer_norm_factors)
_PUMA = Functions("puma", "puma", puma.gelu, puma.silu, puma.softmax, puma.attend, puma.layer_norm_factors)
_BY_NAME = {functions.name: functions for functions in (_DEFAULT, _PUMA)}
APPROXIMATIONS = tuple(_BY_NAME)


def choose(approximations: str = APPROXIMATIONS[0], gelu_form: str = GELU_FORMS[0]) -> Functions:
    """Return a set by name: "default" with a form of GeLU, or "puma", which has its own GeLU and ignores ``gelu_form``.

    Raises ValueError for an unknown name or form.
    """
    if approximations not in _BY_NAME:
        raise ValueError(f"unknown approximations {approximations!r}\nhint: one of {', '.join(APPROXIMATIONS)}")
    if gelu_form not in GELU_FORMS:
        raise ValueError(f"unknown GeLU form {gelu_form!r}\nhint: one of {', '.join(GELU_FORMS)}")
    chosen = _BY_NAME[approximations]
    if chosen is not _DEFAULT:
        return chosen
    return replace(chosen, gelu_form=gelu_form, gelu=partial(gelu, form=gelu_form))
