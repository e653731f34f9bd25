"""Evaluation keys in a file: the bytes of each, one after another. Their names and sizes follow from the Program."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

from protocols.ckks.canonical import Form, InvalidCiphertext


def total(forms: Mapping[str, Form]) -> int:
    """Return the exact bytes of all keys of these forms."""
    return sum(form.size for form in forms.values())


def map_keys(path: Path, forms: Mapping[str, Form]) -> dict[str, memoryview]:
    """Map a file of keys into memory, and return the bytes of each key. Raises InvalidCiphertext for another size."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size != total(forms):
            raise InvalidCiphertext(
                f"evaluation keys of {size} bytes, where they have {total(forms)}\nhint: connect again to upload them"
            )
        view = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    at, out = 0, dict[str, memoryview]()
    for name, form in forms.items():
        out[name] = view[at : at + form.size]
        at += form.size
    return out
