"""CrypTen 0.4.1 on current versions of torch, and what both of its users here need of it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

PARTIES = 2
SCALE = 2.0**16  # CrypTen's fixed point
_MOVED = "torch.onnx._internal.registration"
_WHERE = "torch.onnx._internal.torchscript_exporter.registration"


def load(rank: int, port: int) -> Any:
    """Import CrypTen and connect to the other party over loopback, with one thread; the module ``crypten``.

    CrypTen reads its place from the environment. It also imports a module that torch 2.9 moved.
    """
    torch.set_num_threads(1)
    if _MOVED not in sys.modules and importlib.util.find_spec("torch.onnx._internal.torchscript_exporter") is not None:
        sys.modules[_MOVED] = importlib.import_module(_WHERE)
    os.environ |= {"DISTRIBUTED_BACKEND": "gloo", "GLOO_SOCKET_IFNAME": "lo", "RENDEZVOUS": f"tcp://127.0.0.1:{port}"}
    os.environ |= {"WORLD_SIZE": str(PARTIES), "RANK": str(rank)}
    crypten: Any = importlib.import_module("crypten")
    crypten.init()
    return crypten


def tensors(arrays: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, Tensor]]:
    """Arrays as CrypTen takes them: it truncates when it encodes, so half a unit goes in beforehand."""
    for name, array in arrays.items():
        exact = torch.from_numpy(array).to(torch.float64)
        yield name, ((exact * SCALE).round() / SCALE)


def revealed(value: Any) -> NDArray[Any]:
    """The plaintext of a CrypTen tensor, for both parties.

    From the sum of the shares: CrypTen's ``get_plain_text`` is off by one on some negative values.
    """
    whole: NDArray[Any] = value.reveal().to(torch.float64).numpy()
    return whole / float(value.encoder.scale)
