"""The layout of a directory of sentence-transformers: which modules it lists, and where they are."""

from __future__ import annotations

import json
from pathlib import Path

from secure.errors import InvalidInput
from secure.models.checkpoints import check_pointer


def transformer_directory(directory: Path) -> Path:
    """Return the directory of the transformer and its tokenizer within a model's: itself, or as modules.json says."""
    return next((place for kind, place in listed_modules(directory) if kind == "Transformer"), directory)


def listed_modules(directory: Path) -> list[tuple[str, Path]]:
    """Return the kinds and directories of the modules in modules.json, in order; none if there is no such file.

    Raises InvalidInput for other contents.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return []
    check_pointer(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        ordered = sorted(entries, key=lambda entry: int(entry["idx"]))
        return [(str(entry["type"]).rpartition(".")[2], directory / str(entry["path"])) for entry in ordered]
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidInput(f"{path} lists no modules: {type(error).__name__}", "save the model again") from None
