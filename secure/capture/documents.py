"""JSON documents and tensors from outside: their size and depth are bounded before anything is decoded.

Reading a JSON document of N bytes takes at most about 30 N bytes of memory (a list of empty objects is the worst) and
time in proportion to N, whatever it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
from pydantic import ValidationError
from safetensors.torch import load
from torch import Tensor

from secure.errors import Error, InvalidInput, InvalidProgram, printable

MAXIMUM_BYTES = 4 << 20
"""The most bytes of an encoded Program or graph; the largest of ours, of 32 layers, has one million."""

MAXIMUM_DEPTH = 24
"""The most lists and objects within one another. Tensors of constants have up to 16 dimensions."""

HEADER = 128
"""The bytes beside its name for one tensor in a safetensors header, and for the header itself."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


def read_document(encoded: str | bytes, *, most: int = MAXIMUM_BYTES, repeated: bool = True) -> Any:
    """Decode a JSON document that may come from anyone. Raises InvalidProgram if it is too large, too deep, or none.

    most: the most bytes that are read. repeated: allow a name that an object has twice; the last counts.
    """
    raw = encoded.encode() if isinstance(encoded, str) else encoded
    if len(raw) > most:
        raise InvalidProgram(f"a document of {len(raw)} bytes; at most {most} are read")
    steps = _STEPS[np.frombuffer(_STRING.sub(b"", raw), dtype=np.uint8)]
    if (depth := int(np.cumsum(steps, dtype=np.int32).max(initial=0))) > MAXIMUM_DEPTH:
        raise InvalidProgram(f"a document of depth {depth}; at most {MAXIMUM_DEPTH} are read")
    try:
        return json.loads(raw, parse_constant=_refuse, object_pairs_hook=None if repeated else _unrepeated)
    except (ValueError, RecursionError) as error:
        raise InvalidProgram(f"not a JSON document: {printable(str(error))[:200]}") from None


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise InvalidProgram("an object has a name twice")
    return found


def _refuse(text: str) -> NoReturn:
    raise InvalidProgram(f"{text} is no number of JSON")


def what_is_wrong(error: Exception) -> str:
    """Say in a few printable words what does not fit; the value itself, which may be long, is not repeated."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        text = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    else:  # messages of our own are sentences
        text = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
    return printable(text)[:300]


def header_size(names: Iterable[str]) -> int:
    """Return the most bytes of the header of a safetensors file of these tensors."""
    return HEADER + sum(HEADER + len(json.dumps(name)) for name in names)


def read_tensors(payload: bytes, names: Iterable[str] = (), *, most: int = 0) -> dict[str, Tensor]:
    """Read a safetensors file whose header is no larger than one of tensors of these names, or has ``most`` bytes.

    Raises InvalidInput for any other.

    Its first eight bytes say how long the header is. A header may list a tensor in some 60 bytes, and each takes a
    kilobyte when it is read, whatever its size.
    """
    header, most = int.from_bytes(payload[:8], "little"), most or header_size(names)
    if header > min(len(payload) - 8, most):
        raise InvalidInput(f"a header of {header} bytes, the Program needs {most} at most")
    try:
        return load(payload)
    except Exception as error:  # safetensors raises Exception itself
        raise InvalidInput(f"not a safetensors file: {type(error).__name__}") from None
