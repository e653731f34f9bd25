"""Which functions stand for a model's operations: one table, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from approximations import puma
from approximations.activations import GELU_FORMS, gelu, silu
from approximations.norms import layer_norm
from approximations.softmax import attend, softmax

Function = Callable[..., Any]


@dataclass(frozen=True)
class Functions:
    """One choice. Operations that are not here (tanh, ReLU, RMSNorm, L2 normalization) have one approximation each."""

    name: str
    gelu_form: str
    gelu: Function
    silu: Function
    softmax: Function
    attend: Function
    layer_norm: Function

    @property
    def labels(self) -> dict[str, str]:
        """What a Program says of it."""
        return {"gelu": self.gelu_form, "approximations": self.name}


_DEFAULT = Functions("default", GELU_FORMS[0], gelu, silu, softmax, attend, layer_norm)
_PUMA = Functions("puma", "puma", puma.gelu, puma.silu, puma.softmax, puma.attend, puma.layer_norm)
_BY_NAME = {functions.name: functions for functions in (_DEFAULT, _PUMA)}
APPROXIMATIONS = tuple(_BY_NAME)


def choose(approximations: str = APPROXIMATIONS[0], gelu_form: str = GELU_FORMS[0]) -> Functions:
    """Ours with a form of GeLU, or PUMA's, whose GeLU is its own whatever ``gelu_form`` says."""
    if approximations not in _BY_NAME:
        raise ValueError(f"unknown approximations {approximations!r}\nhint: one of {', '.join(APPROXIMATIONS)}")
    if gelu_form not in GELU_FORMS:
        raise ValueError(f"unknown GeLU form {gelu_form!r}\nhint: one of {', '.join(GELU_FORMS)}")
    chosen = _BY_NAME[approximations]
    if chosen is not _DEFAULT:
        return chosen
    return replace(chosen, gelu_form=gelu_form, gelu=partial(gelu, form=gelu_form))
