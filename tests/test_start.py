"""Commands that compute nothing start without torch, which takes seconds to import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from parties.cli.verbs import VERBS

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from parties.cli.main import app_main

for line in ("--help", "--version", "embd", "--nothing", "token --help", "token list --tokens /no/file"):
    sys.argv = ["unseen", *line.split()]
    try:
        app_main()
    except SystemExit as ended:
        print(line, ended.code, sorted({"torch", "numba", "numpy", "scipy", "sympy"} & set(sys.modules)))
sys.argv = ["unseen", "embed", "--nothing"]
try:
    app_main()
except SystemExit:
    print("torch" in sys.modules)
"""


def test_commands_that_compute_nothing_start_without_torch() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    found = [line for line in ended.stdout.splitlines() if line.endswith("]") and line[0] not in " │"]
    assert found == [
        "--help 0 []",
        "--version 0 []",
        "embd 2 []",
        "--nothing 2 []",
        "token --help 0 []",
        "token list --tokens /no/file 1 []",
    ]
    assert ended.stdout.splitlines()[-1] == "True"  # a module that is there is found


@pytest.mark.parametrize("name", VERBS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    module, function = VERBS[name].place.split(".")
    said = inspect.getdoc(getattr(import_module(f"parties.cli.{module}"), function)) or ""
    assert VERBS[name].help == " ".join(said.partition("\n\n")[0].split())
