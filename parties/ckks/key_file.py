"""Evaluation keys in a file: a JSON object with their names and sizes, then the bytes of each in the same order."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path


def write_keys(path: Path, keys: Mapping[str, bytes]) -> None:
    header = json.dumps({name: len(data) for name, data in keys.items()}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for data in keys.values():
            file.write(data)


def read_keys(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        sizes = json.loads(file.read(size))
        return {str(name): file.read(count) for name, count in sizes.items()}
