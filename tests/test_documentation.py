"""The messages that docs/errors.md lists are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("approximations", "parties", "protocols", "secure")
LISTED = re.compile(r"^\| `([^`]+)`", re.MULTILINE)


def pieces(tree: ast.AST) -> str:
    """All texts of a module, one after another; what an f-string fills in is three dots."""
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            out.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            out.append(node.value)
    return "\n".join(out)


CODE = "\n".join(
    pieces(ast.parse(path.read_text(encoding="utf-8")))
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
)


@pytest.mark.parametrize("message", LISTED.findall((ROOT / "docs/errors.md").read_text(encoding="utf-8")))
def test_every_message_that_is_listed_occurs_in_the_code(message: str) -> None:
    assert message in CODE
