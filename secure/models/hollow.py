"""Models whose parameters take no memory: for what follows from shapes, and to be given parameters of a mapped file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_LARGE = 1 << 16  # elements; tensors with fewer are allocated, so that small buffers have their real values


class _LargeOnMeta(TorchFunctionMode):
    """A mode in which large tensors that a module makes for itself get no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            planned = func(*args, **{**kwargs, "device": "meta"})
            if planned.numel() > _LARGE:
                return planned
        return func(*args, **kwargs)


def hollow(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a module by ``make`` with parameters that take no memory: zeros that all share one element."""
    with _LargeOnMeta():
        model = make()
    replaced: dict[int, Tensor] = {}  # by identity: tied parameters stay tied
    for module in model.modules():
        for table in (cast(dict[str, Any], module._parameters), cast(dict[str, Any], module._buffers)):
            for name, value in table.items():
                if isinstance(value, nn.Parameter) or (value is not None and value.is_meta):
                    zeros = torch.zeros(1, dtype=value.dtype).expand(value.shape)
                    kept = nn.Parameter(zeros, requires_grad=False) if isinstance(value, nn.Parameter) else zeros
                    table[name] = replaced.setdefault(id(value), kept)
    return model.eval()
