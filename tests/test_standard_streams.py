"""Commands with closed standard streams, and in locales that lack characters: a message, or the answer."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parties.cli.config import read_file
from parties.cli.generate import _prompt
from parties.cli.plan import read_prices
from parties.tls.naming import Naming
from secure.cost.outline import _read

ROOT = Path(__file__).parents[1]

ASKING = ("embed", "embed --input - --output {there}", "classify", "tag", "search", "generate", "token list --tokens x")
VERBS = """
import os, sys
from parties.cli.main import app_main

for line in sys.argv[1:]:
    sys.argv = ["unseen", *line.split()]
    try:
        app_main()
    except SystemExit as ended:
        sys.stderr.write(f"{line}: {ended.code}\\n")
file = open(os.devnull)
sys.stderr.write(f"{file.fileno()}\\n")
"""
SAYING = """
import sys
from parties.cli.console import OUT
from parties.cli.streams import settle_streams

settle_streams()
OUT.print(sys.stdin.read().rstrip())
"""


def ended(script: str, *arguments: str, given: bytes = b"", closed: bool = False, **variables: str) -> tuple[str, str]:
    """Run a script in a process; return what it says on both streams. closed: all that it could read is closed."""
    command = [sys.executable, "-c", script, *arguments]
    if closed:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    done = subprocess.run(
        command,
        input=given,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


def test_a_closed_standard_input_is_an_empty_one(tmp_path: Path) -> None:
    """It was an AttributeError, and the first file that was opened was read as the input."""
    there = str(tmp_path / "out.jsonl")
    lines = [line.format(there=there) for line in ASKING]
    _, said = ended(VERBS, *lines, closed=True, XDG_CONFIG_HOME=str(tmp_path))
    assert "Traceback" not in said
    found = said.splitlines()
    for line in lines:
        assert f"{line}: 1" in found
    assert sum(each.startswith("unseen: error: no ") for each in found) == 5, said
    assert int(found[-1]) > 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_answer_is_not_lost_for_a_character(encoding: str) -> None:
    """The codec's error came when the answer was there, and was paid for. Texts are read as UTF-8 everywhere."""
    said, _ = ended(SAYING, given="a é 中".encode(), PYTHONIOENCODING=encoding, PYTHONUTF8="0", LC_ALL="C")
    expected = {"ascii": "a \\xe9 \\u4e2d", "latin-1": "a é \\u4e2d", "utf-8": "a é 中".encode().decode("latin-1")}
    assert said == expected[encoding] + "\n"


def test_bytes_that_are_no_text_are_refused_and_not_guessed() -> None:
    from secure.errors import InvalidInput
    from secure.models.tokens import checked_text

    wrong = io.TextIOWrapper(io.BytesIO("é".encode("latin-1")), encoding="utf-8", errors="surrogateescape").read()
    with pytest.raises(InvalidInput, match="not UTF-8"):
        checked_text(wrong, 8, "refuse")


def test_files_of_settings_and_prompts_may_begin_with_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8-sig")
        return path

    assert read_file(written("settings.toml", "[common]\nthreads = 2\n"))[1] == {"common": {"threads": 2}}
    assert read_prices(str(written("prices", "core-hour = 0.5\n"))).core_hour == 0.5
    assert _read(written("config.json", json.dumps({"model_type": "bert"}))) == {"model_type": "bert"}
    assert Naming.read("\ufeff[names]\n", "tls.toml") == Naming()
    assert _prompt(None, str(written("prompt", "once\n"))) == "once"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffonce\n"))
    assert _prompt(None, None) == "once"
