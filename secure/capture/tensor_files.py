"""Files of tensors that are larger than memory: written one tensor after another, and mapped where they are read.

They are safetensors files, which hold no code. A mapped file takes memory of the system's own cache, of which all
processes of a machine share one copy, and which gives way to what needs it more.
"""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Collection, Iterable
from typing import IO

import torch
from torch import Tensor

from secure.capture.documents import header_size
from secure.errors import InvalidInput

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_MOST_DIMENSIONS = 64
_TYPES = {name: kind for kind, name in _NAMES.items()}
_ALIGNED = 8  # bytes: where a tensor of any type may begin


def write_tensors(file: IO[bytes], names: Collection[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as they come, each contiguous in the file; no more than one of them needs to be in memory.

    names: those of all tensors, which bound the header that is left room for. Tensors whose bytes would put the next
    one at an odd place come last, the widest first.
    """
    room = header_size(names) // _ALIGNED * _ALIGNED
    file.write(bytes(8 + room))
    header, last, at = dict[str, object](), list[tuple[str, Tensor]](), 0

    def write(name: str, value: Tensor) -> None:
        nonlocal at
        size = value.numel() * value.element_size()
        if size:
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + size]}
        at += size

    for name, value in tensors:
        if value.numel() * value.element_size() % _ALIGNED:
            last.append((name, value))
        else:
            write(name, value)
    for name, value in sorted(last, key=lambda each: -each[1].element_size()):
        write(name, value)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    if set(header) != set(names) or len(encoded) > room:
        raise AssertionError("the tensors are not those whose names were given")
    file.seek(0)
    file.write(room.to_bytes(8, "little") + encoded.ljust(room))


def map_file(file: IO[bytes]) -> mmap.mmap | bytes:
    """Return the content of an open file, mapped to be read; it stays when the file is closed."""
    file.seek(0, 2)
    if not file.tell():
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def map_tensors(content: mmap.mmap | bytes, *, most: int) -> dict[str, Tensor]:
    """Return the tensors of a mapped safetensors file, which must not be written to.

    most: the most bytes of its header. Raises InvalidInput for anything but a whole file of tensors that lie one behind
    another, each at a place that is a multiple of its type.
    """
    size = int.from_bytes(content[:8], "little")
    if size > min(len(content) - 8, most):
        raise InvalidInput(f"a header of {size} bytes, of {most} at most")
    try:
        header = json.loads(bytes(content[8 : 8 + size]))
        found = {name: _place(about) for name, about in header.items() if name != "__metadata__"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"not a safetensors file: {type(error).__name__}") from None
    at, out = 0, dict[str, Tensor]()
    for name, (kind, shape, start, stop) in sorted(found.items(), key=lambda each: each[1][2:]):
        if start != at or stop - start != math.prod(shape) * kind.itemsize or (8 + size + start) % kind.itemsize:
            raise InvalidInput("not a safetensors file: its tensors do not lie one behind another")
        at = stop
        if stop > len(content) - 8 - size:
            raise InvalidInput("not a safetensors file: it ends too early")
        out[name] = _tensor(content, kind, shape, 8 + size + start)
    if at != len(content) - 8 - size:
        raise InvalidInput("not a safetensors file: it has bytes that belong to no tensor")
    return out


def _place(about: dict[str, object]) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    shape, offsets = about["shape"], about["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise ValueError
    if len(shape) > _MOST_DIMENSIONS or any(number >= 1 << 62 for number in shape):  # torch counts in 64 bits
        raise ValueError
    return _TYPES[str(about["dtype"])], tuple(shape), offsets[0], offsets[1]


def _tensor(content: mmap.mmap | bytes, kind: torch.dtype, shape: tuple[int, ...], at: int) -> Tensor:
    if not (count := math.prod(shape)):
        return torch.empty(shape, dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no tensors that cannot be written to
        return torch.frombuffer(content, dtype=kind, count=count, offset=at).reshape(shape)
