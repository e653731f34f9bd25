"""Directories that cannot be written, or are nowhere: said in words, and before anything takes long."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import secure
from parties import deployments
from parties.net.directories import check_writable, user_directory
from secure.errors import InvalidInput
from tests.test_cli import ROOT, Ended, Run, in_words, run

__all__ = ["run"]  # the fixture

HOMELESS = """
import pathlib, sys

def nowhere(*_):
    raise RuntimeError("Could not determine home directory.")

pathlib.Path.home = nowhere
from parties.cli.main import app_main
sys.argv = ["unseen", *sys.argv[1:]]
app_main()
"""


def homeless(*arguments: str) -> Ended:
    """Run a command as a user without a home: no HOME, and no entry among the system's users."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HOME", "UNSEEN_"))}
    command = [sys.executable, "-c", HOMELESS, *arguments]
    done = subprocess.run(
        command,
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_user_without_a_home_is_told_what_to_set() -> None:
    """It was a traceback. What needs no directory works."""
    assert homeless("token", "list", "--tokens", "/no/file").err.startswith("unseen: error: tokens: /no/file")
    for command, variable in (("embed x", "XDG_CACHE_HOME"), ("dealer --listen 127.0.0.1:0", "XDG_STATE_HOME")):
        assert homeless(*command.split()).err.splitlines()[-2:] == [
            "unseen: error: this user has no home directory",
            f"hint: set HOME, or {variable} for this directory",
        ]


def test_a_directory_of_the_standard_needs_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert user_directory("XDG_STATE_HOME", ".local", "state") == tmp_path


def test_a_full_disk_is_noticed(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    check_writable(tmp_path / "new", "the state directory", "")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InvalidInput, match=r"the state directory .* cannot be written: File too large\nhint: x"):
            check_writable(tmp_path, "the state directory", "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_a_state_that_cannot_be_written_is_said_before_anything_is_compiled(
    directory: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a bare OSError after the model was compiled."""
    monkeypatch.setattr("parties.cli.serve.made", lambda *_, **__: pytest.fail("it was compiled"))
    wrong = tmp_path / "file"
    wrong.touch()
    state = str(wrong / "state")
    said = "the state directory .* cannot be written: Not a directory"
    in_words(run("serve", str(directory), "--state", state), said, "give another directory: --state")
    in_words(run("dealer", "--state", state), said, "give another directory: --state")
    for deployment, role in ((secure.TwoParty(), "dealer"),):
        with pytest.raises(InvalidInput, match=said):
            deployments.serve(role=role, listen="127.0.0.1:0", deployment=deployment, state=wrong / "state")
    deployments.check_state(secure.ThreeParty(), "party 1", wrong / "state", counts=False)  # it keeps none
    with pytest.raises(InvalidInput, match=said):
        deployments.check_state(secure.ThreeParty(), "party 1", wrong / "state", counts=True)
