"""What the documents name is there: messages in the code, tests of parsers, pictures."""

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
    for path in (ROOT / "unseen_start.py", *(p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))))
)


@pytest.mark.parametrize("message", LISTED.findall((ROOT / "docs/errors.md").read_text(encoding="utf-8")))
def test_every_message_that_is_listed_occurs_in_the_code(message: str) -> None:
    assert message in CODE


def test_every_parser_in_security_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table = text.partition("## Every parser")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"tests/\w+\.py", row.split(" | ")[-1])
        assert named, row
        assert all((ROOT / name).is_file() for name in named), row


@pytest.mark.parametrize(
    "page", ["README.md", "SECURITY.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_pictures_are_there(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).is_file(), target
